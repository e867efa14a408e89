#!/usr/bin/env python3
"""Fetches the tests of OpenAI's Python library, which only its source package has.

    python3 tests/tools/openai_tests.py     prints the folder in which they run

The interpreter's environment must have `hatchling`, with which pip reads the package. If the
version has not changed, nothing is done.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
# SHA-256 of the source package of the version in tests/requirements-clients.txt.
SHA256 = "5a0a89d6a542efc85e2a8cec701ca9265b795d578c777828e10fafdf80e333b6"


def folder():
    """The unpacked package; first fetches it if it is missing."""
    name = f"openai-{version('openai')}"
    home = TARGET / "tools" / name
    if not home.is_dir():
        home.parent.mkdir(parents=True, exist_ok=True)
        # In a new folder that is renamed at the end, so that a half unpacked one is never used.
        with tempfile.TemporaryDirectory(dir=home.parent) as fresh:
            options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--no-build-isolation"]
            command = [sys.executable, "-m", "pip", "download", *options, "--no-binary", "openai", "--dest", fresh, name.replace("-", "==")]
            subprocess.run(command, check=True, stdout=sys.stderr)
            package = Path(fresh) / f"{name}.tar.gz"
            found = hashlib.sha256(package.read_bytes()).hexdigest()
            if found != SHA256:
                sys.exit(f"{package.name} has the SHA-256 {found}, not the one in {Path(__file__).name}")
            with tarfile.open(package) as archive:
                archive.extractall(fresh, filter="data")
            shutil.move(Path(fresh) / name, home)
    return home


if __name__ == "__main__":
    print(folder())
