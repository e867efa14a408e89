#!/usr/bin/env python3
"""Measures an import: the release binary imports the Django system's database and is killed half
way.

    make bench-import                    1,000 users, 100,000 prompts
    make bench-import BENCH=--short      a fiftieth of that: checks only that the harness works

Prints a table, and at the end the time of a login with an imported account.
"""

import argparse
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "tools"))

import httpx  # noqa: E402
import old_system  # noqa: E402
from running_service import BINARY, KEPT, Service  # noqa: E402
from servers import Postgres  # noqa: E402

LOOK_EVERY = 0.2


def stored(data_dir):
    try:
        with sqlite3.connect(f"file:{data_dir}/prompt-service.sqlite3?mode=ro", uri=True) as file:
            return file.execute("SELECT count(*) FROM prompt").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def start(data_dir, url, *arguments):
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"DATA_DIR": str(data_dir), "OLD": url}
    return subprocess.Popen([BINARY, "import", "--from-env", "OLD", *arguments], text=True, stdout=subprocess.PIPE, env=environment)


def timed(data_dir, url, *arguments):
    began = time.monotonic()
    process = start(data_dir, url, *arguments)
    out, _ = process.communicate()
    if process.returncode != 0:
        sys.exit(f"the import ended with status {process.returncode}\n{out}")
    return time.monotonic() - began


def row(what, figure):
    print(f"| {what} | {figure} |", flush=True)


def log_in(data_dir, user):
    with Service(data_dir=data_dir) as service:
        credentials = {"username": old_system.username(user), "password": old_system.password(user)}
        began = time.monotonic()
        answer = httpx.post(f"{service.url}/api/auth/login/", json=credentials, timeout=60)
        answer.raise_for_status()
        return time.monotonic() - began


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--short", action="store_true")
    users, prompts = (20, 2_000) if arguments.parse_args().short else (1_000, 100_000)
    data_dir = Path(tempfile.mkdtemp(prefix="bench-import-"))
    try:
        with Postgres() as server:
            url = server.make_database(extension=False)
            old_system.fill(url, users, prompts)
            print("| moving in | figure |\n| --- | ---: |")
            row("users, prompts", f"{users:,}, {prompts:,}")
            row("dry run, s", f"{timed(data_dir, url, '--dry-run'):.1f}")
            began = time.monotonic()
            first = start(data_dir, url)
            while first.poll() is None and stored(data_dir) < prompts // 2:
                time.sleep(LOOK_EVERY)
            if first.poll() is not None:
                sys.exit("the import ended before it was killed")
            first.kill()
            first.wait()
            to_half, half = time.monotonic() - began, stored(data_dir)
            row("killed with kill -9 after, s", f"{to_half:.1f}")
            row("prompts committed by then", f"{half:,}")
            rest = timed(data_dir, url)
            row("the same command again, s", f"{rest:.1f}")
            row("prompts/s over both", f"{prompts / (to_half + rest):,.0f}")
            if stored(data_dir) != prompts:
                sys.exit(f"{stored(data_dir)} prompts are stored")
            row("once more, nothing left to do, s", f"{timed(data_dir, url):.1f}")
            row("login with an old password, s", f"{log_in(data_dir, 1):.2f}")
    finally:
        shutil.rmtree(data_dir, ignore_errors=True)


main()
