#!/usr/bin/env python3
"""Checks files that no compiler reads: links between the project's documents, files, types and modules
that they name, checksums of vendored files, syntax of Python files, width of comments.

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


def text_of(page):
    """A Markdown file without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def broken_links():
    for page in project_files(".md"):
        for target in re.findall(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)", text_of(page)):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            linked = (page.parent / name) if name else page
            if not linked.exists():
                yield f"{page.relative_to(ROOT)}: {target} does not exist"
            elif anchor and linked.suffix == ".md" and anchor not in headings(linked.read_text()):
                yield f"{page.relative_to(ROOT)}: {target} names no heading"


def unclear_files():
    """Files that a document names in code style, such as `docs/STREAMING.md`, but that do not exist
    in the project, or that are several."""
    names = re.compile(r"`([\w.-]+(?:/[\w.-]+)*\.(?:cfg|html|js|json|md|py|rs|sh|sql|toml|txt|ya?ml))`")
    known = ["/" + path.relative_to(ROOT).as_posix() for path in project_files("")]
    for page in project_files(".md"):
        for name in names.findall(text_of(page)):
            # Named by its path from here or from one of these folders, or by the end of its path.
            if any((folder / name).is_file() for folder in (page.parent, ROOT, ROOT / "src")):
                continue
            found = [path for path in known if path.endswith("/" + name)]
            if not found:
                yield f"{page.relative_to(ROOT)}: there is no file {name}"
            elif len(found) > 1:
                yield f"{page.relative_to(ROOT)}: {name} may be any of {len(found)} files, such as {found[0][1:]} and {found[1][1:]}"


def unknown_names():
    """Types, and paths of modules, that the map and the glossary name but that the code has not."""
    code = "\n".join(path.read_text() for path in project_files(".rs") if "src" in path.parts)
    words = set(re.findall(r"\w+", code))
    for page in (ROOT / "docs" / "ARCHITECTURE.md", ROOT / "docs" / "GLOSSARY.md"):
        text = text_of(page).partition("\n## Old words")[0]
        for name in sorted(set(re.findall(r"`((?:\w+::)*[A-Z]\w*[a-z]\w*(?:::\w+)*|(?:\w+::)+\w+)`", text))):
            if not words.issuperset(name.split("::")):
                yield f"{page.relative_to(ROOT)}: the code has no {name}"
        for name in sorted(set(re.findall(r"`((?!docs/)[a-z_]\w*(?:/\w+)+)/?`", text))):
            if not any((ROOT / folder / (name + end)).exists() for folder in ("src", "") for end in ("", ".rs", ".md")):
                if not list((ROOT / "docs").glob(f"{name.removeprefix('docs/')}*")):
                    yield f"{page.relative_to(ROOT)}: there is no module {name}"


def forgotten_modules():
    """Differences between the map's table of modules and that of tests/it/architecture.rs."""
    checked = (ROOT / "tests" / "it" / "architecture.rs").read_text().partition("const MAY_USE")[2].partition("\n];")[0]
    rows = re.findall(r"^    \(\s*\"(\w+)\"", checked, re.MULTILINE)
    table = text_of(ROOT / "docs" / "ARCHITECTURE.md").partition("\n## Modules")[2].partition("\n## ")[0]
    described = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    if rows != described:
        yield f"docs/ARCHITECTURE.md: its modules are {described}; tests/it/architecture.rs has {rows}"


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


def wide_comments():
    """Comment lines of more than 100 columns, which rustfmt leaves as they are."""
    for suffix, comment in ((".rs", r"//"), (".py", r"#"), (".sh", r"#"), (".toml", r"#"), ("Makefile", r"#")):
        for path in project_files(suffix):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if len(line) > 100 and re.match(rf"\s*{comment}", line):
                    yield f"{path.relative_to(ROOT)}:{number}: a comment of {len(line)} columns"


if __name__ == "__main__":
    checks = (broken_links, unclear_files, unknown_names, forgotten_modules, changed_vendored_files, broken_python, wide_comments)
    problems = [problem for check in checks for problem in check()]
    if problems:
        sys.exit("\n".join(problems))
    print("documents: links, names, vendored files, scripts and comments are in order")
