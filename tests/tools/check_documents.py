#!/usr/bin/env python3
"""Checks files that no compiler reads: links between the project's documents, files that they name,
checksums of vendored files, syntax of Python files.

Prints the problems and fails, or prints one line. Standard library only.
"""

import ast
import hashlib
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


# Folders with built files and data, not with sources.
NOT_OURS = {".git", ".venv", "__pycache__", "data", "target"}


def project_files(suffix):
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(set(folders) - NOT_OURS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(suffix))


def headings(text):
    """The anchors of a Markdown file, as they are made from its headings."""
    anchors = set()
    for heading in re.findall(r"^#+\s+(.*?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchors.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return anchors


def broken_links():
    for page in project_files(".md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            linked = (page.parent / name) if name else page
            if not linked.exists():
                yield f"{page.relative_to(ROOT)}: {target} does not exist"
            elif anchor and linked.suffix == ".md" and anchor not in headings(linked.read_text()):
                yield f"{page.relative_to(ROOT)}: {target} names no heading"


def missing_files():
    """Files that a document names in code style, such as `docs/STREAMING.md`, but that do not exist
    in the project."""
    names = re.compile(r"`([\w.-]+(?:/[\w.-]+)*\.(?:cfg|html|js|json|md|py|rs|sh|sql|toml|txt|ya?ml))`")
    known = ["/" + path.relative_to(ROOT).as_posix() for path in project_files("")]
    for page in project_files(".md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for name in names.findall(text):
            # Named by its whole path, or by the end of it.
            if not any(path.endswith("/" + name) for path in known):
                yield f"{page.relative_to(ROOT)}: there is no file {name}"


def changed_vendored_files():
    folder = ROOT / "assets" / "web"
    listed = dict(re.findall(r"^\| `([^`]+)` \|.*`([0-9a-f]{64})` \|$", (folder / "README.md").read_text(), re.MULTILINE))
    scripts = {path.name for path in (folder / "vendor").iterdir() if path.suffix in (".js", ".css")}
    for name in sorted(scripts ^ set(listed)):
        yield f"assets/web: {name} is in vendor/ or in README.md's table, but not in both"
    for name in sorted(scripts & set(listed)):
        if hashlib.sha256((folder / "vendor" / name).read_bytes()).hexdigest() != listed[name]:
            yield f"assets/web/vendor/{name}: not the file whose checksum README.md says"


def broken_python():
    for path in project_files(".py"):
        try:
            ast.parse(path.read_text(), str(path))
        except SyntaxError as error:
            yield f"{path.relative_to(ROOT)}:{error.lineno}: {error.msg}"


if __name__ == "__main__":
    problems = [*broken_links(), *missing_files(), *changed_vendored_files(), *broken_python()]
    if problems:
        sys.exit("\n".join(problems))
    print("documents: links, files named, vendored files and scripts are in order")
