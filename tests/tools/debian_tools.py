#!/usr/bin/env python3
"""Finds or fetches tools that Debian and Ubuntu package, without root and without changing the
system.

    python3 tests/tools/debian_tools.py promtool wrk     prints a path for each

A tool on PATH is used as it is. Otherwise its package, with the libraries that are missing here, is
downloaded by `apt-get download` and unpacked into target/tools, and a small script there starts it
with those libraries. Standard library only.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
HOME = TARGET / "tools"
UNPACKED = HOME / "root"
APT = HOME / "apt"

# Tool: its package, and whether the tool needs the dependencies of the package. Prometheus depends
# on web assets and an account for its daemon, but each of its programs is one file.
PACKAGES = {
    # Debian's Chromium without a window: less than half of the size of the package `chromium`.
    "chromium-headless-shell": ("chromium-headless-shell", True),
    "curl": ("curl", True),
    "haproxy": ("haproxy", True),
    "openssl": ("openssl", True),
    "prometheus": ("prometheus", False),
    "promtool": ("prometheus", False),
    "redis-server": ("redis-server", True),
    "wrk": ("wrk", True),
}

# The program's path in its package, if it is not in a folder of programs: there is only a script
# that starts /usr/lib/….
EXECUTABLES = {"chromium-headless-shell": "lib/chromium/chromium-headless-shell"}

# Shared libraries that are preloaded into a program, and their packages.
LIBRARIES = {"libfaketime.so.1": "libfaketime"}


class Unavailable(Exception):
    """The tool is not installed and cannot be fetched on this platform."""


def apt(tool, *arguments, own_lists, cwd=None):
    """Runs an apt tool with separate caches, so that it needs no root and does not change those of
    the system."""
    for folder in ("cache/archives/partial", "lists/partial"):
        (APT / folder).mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::Cache": APT / "cache",
        "Debug::NoLocking": "1",
        # As root, apt would let another account download, which cannot write here.
        "APT::Sandbox::User": "root",
        "Acquire::Retries": "3",
    }
    if own_lists:
        options["Dir::State::Lists"] = APT / "lists"
    flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    return subprocess.run(
        [tool, "-qq", *flags, *arguments], cwd=cwd, text=True, stdin=subprocess.DEVNULL, capture_output=True,
        env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
    )


def missing_packages(package, own_lists):
    """The package and those of its dependencies that this system has not installed."""
    planned = apt("apt-get", "--simulate", "--no-install-recommends", "install", package, own_lists=own_lists)
    names = re.findall(r"^Inst (\S+)", planned.stdout, re.MULTILINE)
    return names if package in names else [package]


def download(package, with_dependencies, own_lists):
    """Downloads and unpacks; returns apt's error, or nothing if it worked."""
    names = missing_packages(package, own_lists) if with_dependencies else [package]
    folder = HOME / "packages"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    fetched = apt("apt-get", "download", *names, own_lists=own_lists, cwd=folder)
    archives = sorted(folder.glob("*.deb"))
    if fetched.returncode != 0 or not archives:
        return fetched.stderr.strip() or "nothing was downloaded"
    for archive in archives:
        subprocess.run(["dpkg-deb", "--extract", archive, UNPACKED], check=True)
    shutil.rmtree(folder)
    return ""


def fetch(tool, package, with_dependencies):
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise Unavailable(
            f"{tool} is not on PATH, and this platform has no apt-get to fetch it with: "
            f"install the package that holds it (Debian's name for it is {package})"
        )
    print(f"fetching {tool} (package {package}) into {HOME}", file=sys.stderr)
    complaint = download(package, with_dependencies, own_lists=False)
    if complaint:
        # Containers often have no apt lists, and old lists name files that the mirrors have
        # replaced.
        updated = apt("apt-get", "update", own_lists=True)
        complaint = download(package, with_dependencies, own_lists=True)
        if complaint:
            raise RuntimeError(f"cannot fetch {package}: {complaint}\n{updated.stderr.strip()}")


def library_folders():
    folders = {path.parent for path in UNPACKED.rglob("*.so*") if path.is_file()}
    return ":".join(str(folder) for folder in sorted(folders))


def path(tool):
    """Path of an executable `tool`. Raises Unavailable where there is neither the tool nor apt,
    RuntimeError when fetching fails."""
    installed = shutil.which(tool)
    if installed:
        return Path(installed)
    start = HOME / "bin" / tool
    if start.is_file():
        return start
    fetch(tool, *PACKAGES[tool])
    places = [EXECUTABLES[tool]] if tool in EXECUTABLES else [f"bin/{tool}", f"sbin/{tool}"]
    executable = next((found for place in places if (found := UNPACKED / "usr" / place).is_file()), None)
    if executable is None:
        raise RuntimeError(f"package {PACKAGES[tool][0]} holds no {tool}")
    start.parent.mkdir(parents=True, exist_ok=True)
    libraries = shlex.quote(library_folders())
    start.write_text(
        f"#!/bin/sh\nLD_LIBRARY_PATH={libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}\nexport LD_LIBRARY_PATH\n"
        f'exec {shlex.quote(str(executable))} "$@"\n'
    )
    start.chmod(0o755)
    return start


def library(name):
    """Path of a shared library for LD_PRELOAD. Raises as `path` does."""
    for folder in (Path("/usr/lib"), UNPACKED / "usr" / "lib"):
        for found in folder.rglob(name) if folder.is_dir() else ():
            return found
    fetch(name, LIBRARIES[name], False)
    found = next((UNPACKED / "usr" / "lib").rglob(name), None)
    if found is None:
        raise RuntimeError(f"package {LIBRARIES[name]} holds no {name}")
    return found


def wrong_clock(seconds):
    """The environment in which a process sees wrong wall time, by this offset. Its monotonic clock
    is right, as on a machine whose time is set wrong. Raises as `path` does."""
    return {
        "LD_PRELOAD": str(library("libfaketime.so.1")), "FAKETIME": f"{seconds:+d}s",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
    }


if __name__ == "__main__":
    try:
        for name in sys.argv[1:] or PACKAGES:
            print(path(name))
    except (Unavailable, RuntimeError) as error:
        sys.exit(str(error))
