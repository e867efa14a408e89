"""What the tests of the deployment files share. They need neither the binary nor a container engine nor an AWS account."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Says at the end what was skipped.
pytest_plugins = ["machine"]


def tool(name):
    """Path of a program that the tests' environment installed."""
    # Beside the interpreter, or, where packages are in a plain folder, in that one.
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
