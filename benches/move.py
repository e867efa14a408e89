#!/usr/bin/env python3
"""Measures a move: the release binary moves an embedded store to PostgreSQL, is killed half way,
and starts again.

    make bench-move                    1,000 users, 100,000 prompts
    make bench-move BENCH=--short      a fiftieth of that: checks only that the harness works

The vectors are synthetic. The results of searches are compared on both sides, prompt by prompt.
Prints a table.
"""

import argparse
import base64
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "tools"))

import httpx  # noqa: E402
from running_service import BINARY, KEPT, Service  # noqa: E402
from servers import Postgres  # noqa: E402

PASSWORD = "a long enough password"
KEY = "k" * 64
ASKING = 20
QUERIES = ["a cup of tea", "the weather in spring", "proof by induction", "invoice 2024", "x"]
K = 20
# Scores are rounded to half precision on one side.
TOLERANCE = 2e-4
LOOK_EVERY = 0.01


def row(what, figure):
    print(f"| {what} | {figure} |", flush=True)


def start(data_dir, *arguments, **variables):
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"DATA_DIR": str(data_dir), "SECRET_KEY": KEY, **variables}
    return subprocess.Popen([BINARY, *map(str, arguments)], text=True, stdout=subprocess.PIPE, env=environment)


def run(data_dir, *arguments, **variables):
    process = start(data_dir, *arguments, **variables)
    out, _ = process.communicate()
    if process.returncode != 0:
        sys.exit(f"{arguments[0]} ended with status {process.returncode}\n{out}")
    return out


def pattern(folder):
    """A user's and a prompt's line as this program writes them."""
    data_dir = folder / "pattern"
    with Service(data_dir=data_dir) as service, httpx.Client(base_url=service.url, timeout=60) as http:
        account = {"username": "u1", "email": "u@example.com", "password": PASSWORD}
        http.post("/api/auth/register/", json=account).raise_for_status()
        auth = {"Authorization": f"Bearer {http.post('/api/auth/login/', json=account).json()['access']}"}
        http.post("/api/prompts/", json={"prompt": "one"}, headers=auth).raise_for_status()
    file = folder / "pattern.jsonl"
    run(data_dir, "export", "--with-password-hashes", "--with-embeddings", file)
    _, user, prompt = map(json.loads, file.read_text().splitlines())
    return user, prompt


def direction(rng, length):
    numbers = [rng.gauss(0, 1) for _ in range(length)]
    norm = sum(x * x for x in numbers) ** 0.5
    return base64.b64encode(struct.pack(f"<{length}e", *(x / norm for x in numbers))).decode()


def write_lines(folder, users, prompts):
    rng = random.Random(20_261_124)
    user, prompt = pattern(folder)
    model, length = prompt["embedding"]["model"], len(base64.b64decode(prompt["embedding"]["f16"])) // 2
    file = folder / "source.jsonl"
    with open(file, "w") as out:
        out.write('{"type":"header","format":"prompt-service","version":1}\n')
        for n in range(1, users + 1):
            out.write(json.dumps(user | {"id": n, "username": f"u{n}"}) + "\n")
        for n in range(1, prompts + 1):
            embedding = {"model": model, "f16": direction(rng, length)}
            out.write(json.dumps(prompt | {"id": n, "user_id": n % users + 1, "prompt": f"prompt {n}", "embedding": embedding}) + "\n")
    return file


def found(data_dir, users, **settings):
    """The search results of a few users, by user and query: ids with scores."""
    results = {}
    with Service(data_dir=data_dir, secret_key=KEY, **settings) as service, httpx.Client(base_url=service.url, timeout=60) as http:
        for n in range(1, min(users, ASKING) + 1):
            answer = http.post("/api/auth/login/", json={"username": f"u{n}", "password": PASSWORD}).raise_for_status()
            auth = {"Authorization": f"Bearer {answer.json()['access']}"}
            for query in QUERIES:
                answer = http.get("/api/prompts/similar/", params={"q": query, "k": K}, headers=auth).raise_for_status()
                results[n, query] = [(each["id"], each["score"]) for each in answer.json()["results"]]
    return results


def compare(before, after):
    """How many searches found the same prompts in the same order, and the largest difference of a
    score. Ends the program if the sides differ by more than rounding. Rounding may swap prompts of
    nearly the same score, also around the last place."""
    same, largest = 0, 0
    for key, theirs in before.items():
        ours = after[key]
        if len(ours) != len(theirs) or not theirs:
            sys.exit(f"user {key[0]} finds {len(ours)} prompts for {key[1]!r} after the move, and {len(theirs)} before")
        same += [id for id, _ in ours] == [id for id, _ in theirs]
        for one, other in ((dict(ours), dict(theirs)), (dict(theirs), dict(ours))):
            last = min(other.values())
            largest = max(largest, *(abs(score - other.get(id, last)) for id, score in one.items()))
    if largest > TOLERANCE:
        sys.exit(f"scores differ by {largest}")
    return same, largest


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--short", action="store_true")
    is_short = arguments.parse_args().short
    users, prompts = (20, 2_000) if is_short else (1_000, 100_000)
    folder = Path(tempfile.mkdtemp(prefix="bench-move-"))
    try:
        with Postgres() as server:
            url = server.make_database()
            name = url.rsplit("/", 1)[1]
            source = folder / "source"
            run(source, "import", write_lines(folder, users, prompts))
            before = found(source, users)
            print("| a move to PostgreSQL | figure |\n| --- | ---: |")
            row("users, prompts", f"{users:,}, {prompts:,}")

            def arrived():
                try:
                    [[count]] = server.query("SELECT count(*) FROM prompt", name)
                except RuntimeError:
                    # The table does not exist yet.
                    return 0
                return int(count)

            began = time.monotonic()
            first = start(source, "move", "--to-env", "NEW", NEW=url)
            while first.poll() is None and arrived() < prompts // 10:
                time.sleep(LOOK_EVERY)
            if first.poll() is not None and not is_short:
                sys.exit("the move ended before it was killed")
            first.kill()
            first.wait()
            row("killed with kill -9 after, s", f"{time.monotonic() - began:.1f}")
            row("prompts committed by then", f"{arrived():,}")
            began = time.monotonic()
            run(source, "move", "--to-env", "NEW", NEW=url)
            row("the same command again, with the comparison, s", f"{time.monotonic() - began:.1f}")
            began = time.monotonic()
            run(source, "move", "--to-env", "NEW", NEW=url)
            row("once more, only compared, s", f"{time.monotonic() - began:.1f}")
            after = found(folder / "target", users, DATABASE_URL=url)
            same, largest = compare(before, after)
            row("searches compared", f"{len(before):,}")
            row("of them in the very same order", f"{same:,}")
            row("largest difference of a score", f"{largest:.6f}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


main()
