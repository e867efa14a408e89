"""Shared code of the tests of the deployment files. They need no binary, no container engine and no
AWS account."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Prints at the end which tests were skipped.
pytest_plugins = ["machine"]


def tool(name):
    """Path of a program that the tests' environment installed."""
    # Beside the interpreter, or in the folder of the packages if that is a plain folder.
    for folder in (Path(sys.executable).parent, Path(__file__).parent, *map(Path, sys.path)):
        for path in (folder / name, folder / "bin" / name):
            if path.is_file():
                return path
    raise FileNotFoundError(f"{name} is not in this environment")


def run(*command, **options):
    """Runs a command and fails with all that it said unless it succeeds."""
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True, cwd=ROOT, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done
