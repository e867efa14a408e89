#!/usr/bin/env python3
"""Creates a Python environment of the tests and prints the path of its interpreter.

    python3 tests/tools/python_env.py             target/venv, from tests/requirements.txt
    python3 tests/tools/python_env.py clients     target/venv-clients, from tests/requirements-clients.txt
    python3 tests/tools/python_env.py deploy      target/venv-deploy, from tests/requirements-deploy.txt
    python3 tests/tools/python_env.py litellm     target/venv-litellm, from tests/requirements-litellm.txt
    python3 tests/tools/python_env.py llamaindex  target/venv-llamaindex, from tests/requirements-llamaindex.txt

Standard library only, so any Python 3.11 or newer can run it. If the requirements and the Python
have not changed, nothing is done, which takes a few milliseconds.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Which environment: none, or the name of a separate one, whose many packages conflict with the
# others.
SUFFIX = "".join(f"-{name}" for name in sys.argv[1:])
REQUIREMENTS = ROOT / "tests" / f"requirements{SUFFIX}.txt"
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
VENV = TARGET / f"venv{SUFFIX}"
INTERPRETER = VENV / "bin" / "python"
STAMP = VENV / "stamp"

# If the `venv` module cannot install pip (Debian and Ubuntu package it separately), the packages go
# to a plain folder, and this script is used as the interpreter.
WRAPPER = """#!/bin/sh
PYTHONPATH="{site}${{PYTHONPATH:+:$PYTHONPATH}}"
export PYTHONPATH
exec "{python}" "$@"
"""


def wanted():
    """The content of the stamp of an up-to-date environment."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    return f"{digest} {sys.version_info.major}.{sys.version_info.minor} {VENV}\n"


def run(*command):
    """Runs a command; its output goes to standard error, because standard output is for the result.
    """
    return subprocess.run([str(part) for part in command], stdout=sys.stderr).returncode == 0


def say(text):
    print(text, file=sys.stderr)


def install():
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--requirement", REQUIREMENTS]
    made = subprocess.run([sys.executable, "-m", "venv", VENV], capture_output=True, text=True)
    if made.returncode == 0:
        # As root, pip warns as if this were the system's environment; it is a private one.
        return run(INTERPRETER, "-m", "pip", "install", "--root-user-action=ignore", *options)
    say("the venv module cannot make an environment here; installing into a plain folder instead")
    shutil.rmtree(VENV, ignore_errors=True)
    site = VENV / "site"
    if not run(sys.executable, "-m", "pip", "install", "--root-user-action=ignore", "--target", site, *options):
        return False
    INTERPRETER.parent.mkdir(parents=True, exist_ok=True)
    INTERPRETER.write_text(WRAPPER.format(site=site, python=sys.executable))
    INTERPRETER.chmod(0o755)
    return True


def ensure():
    """Returns the interpreter's path, and first creates the environment if it is missing or out of
    date."""
    if STAMP.is_file() and STAMP.read_text() == wanted():
        return INTERPRETER
    say(f"making the Python environment {VENV}")
    shutil.rmtree(VENV, ignore_errors=True)
    if not install():
        sys.exit(
            f"could not install tests/{REQUIREMENTS.name}: this needs pip (Debian, Ubuntu: python3-pip) "
            "and access to a Python package index"
        )
    STAMP.write_text(wanted())
    return INTERPRETER


if __name__ == "__main__":
    if sys.version_info < (3, 11):
        sys.exit(f"the tests need Python 3.11 or newer; this is {sys.version.split()[0]}")
    print(ensure())
