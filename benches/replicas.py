#!/usr/bin/env python3
"""Loads replicas on one Postgres and one Redis with wrk, beside the embedded service on the same machine in the same run.

    make bench-replicas                    all cases, about ten minutes
    make bench-replicas BENCH=--short      the same cases with few rows, seconds each: to see that the harness works, not to quote

Posts a second of one and of two replicas, and how long own-scope searches and posts take among 1,000,000 stored prompts. Postgres
keeps its promises here (fsync on), as SQLite does. Everything shares the machine: replicas, Postgres, Redis and the load generator, so two
replicas can be no faster than the cores are; ratios are what to read. Prints a table and writes it to target/bench/replicas.md.
"""

import argparse
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from service import FILLERS_PASSWORD, LOAD, TARGET, debian_tools, machine, output_of, say

# `service` has put tests/tools on the path.
from replicas import Cluster  # isort: skip
from running_service import THROTTLES_OFF, Service  # isort: skip
from servers import Postgres, Redis  # isort: skip

# Who searches, and how many of the stored prompts are that user's.
OWNERS = {"few": 10, "some": 1_000, "many": 10_000}
# Prompts of each of the other users: copies of the ones that were posted.
EACH = 1_000


@dataclass
class Length:
    """How long everything takes: seconds, and numbers of rows."""

    warm_up: int
    measure: int
    rows: int


FULL = Length(warm_up=3, measure=12, rows=1_000_000)
SHORT = Length(warm_up=1, measure=2, rows=20_000)


@dataclass
class Figures:
    """What wrk measured: requests a second, and times in milliseconds."""

    rate: float
    p50: float
    p99: float

    def __str__(self):
        return f"{self.rate:,.1f}/s, p50 {self.p50:.1f} ms, p99 {self.p99:.1f} ms"


def call(service, path, body, access=None):
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {access}"} if access else {})
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(service.url + path, data, headers)) as answer:
        return json.load(answer)


class Load:
    """Runs wrk against one service that has several addresses."""

    def __init__(self, addresses, folder, length):
        self.addresses, self.folder, self.length = addresses, folder, length
        (folder / "prompts.txt").write_text(output_of([sys.executable, LOAD / "gen_prompts.py", 5000]))

    def environment(self, case, address):
        return {
            "BASE_URL": address.url, "SESSION_DIR": str(self.folder), "PROMPTS": str(self.folder / "prompts.txt"), "CASE": case,
            # The texts must be new in every run.
            "RUN_NONCE": uuid.uuid4().hex[:12],
        }

    def log_in_new_users(self):
        output_of([sys.executable, LOAD / "session.py", 4], **self.environment("prompts", self.addresses[0]))

    def log_in(self, name):
        pair = call(self.addresses[0], "/api/auth/login/", {"username": name, "password": FILLERS_PASSWORD})
        (self.folder / "tokens.txt").write_text(pair["access"] + "\n")
        (self.folder / "credentials.txt").write_text(f"{name} {FILLERS_PASSWORD}\n")
        return pair["access"]

    def wrk(self, case, connections, seconds):
        """One wrk for each address at once, each with its share of the connections; their rates add up."""
        share = connections // len(self.addresses)
        running = [
            subprocess.Popen(
                [debian_tools.path("wrk"), "-t1", f"-c{share}", f"-d{seconds}s", "--timeout", "30s", "-s", LOAD / "wrk.lua", address.url],
                env={**os.environ, **self.environment(case, address)}, text=True, stdout=subprocess.PIPE,
            )
            for address in self.addresses
        ]
        parts = []
        for process in running:
            text, _ = process.communicate()
            figures = dict(re.findall(r"(\w+)=([\d.]+)", text[text.index("RESULT") :]))
            if int(figures["non2xx"]) or int(figures["socket_errors"]):
                raise SystemExit(f"{case}: requests failed:\n{text}")
            parts.append(figures)
        # The slower address tells: nobody knows which one serves the next request.
        return Figures(sum(float(part["rps"]) for part in parts), *(max(float(part[name]) for part in parts) for name in ("p50", "p99")))

    def run(self, case, connections):
        self.wrk(case, connections, self.length.warm_up)
        return self.wrk(case, connections, self.length.measure)


def register(service, name):
    user = f"{name}-{uuid.uuid4().hex[:10]}"
    return user, call(service, "/api/auth/register/", {"username": user, "email": f"{name}@example.com", "password": FILLERS_PASSWORD})["id"]


def plan(length):
    """How many other users there are, each with a copy of the posted prompts."""
    return -(-(length.rows - sum(OWNERS.values()) - EACH) // EACH)


class InPostgres:
    """Multiplies the stored prompts by statements that Postgres runs by itself."""

    def __init__(self, cluster):
        self.run = lambda sql: cluster.postgres.psql(sql, cluster.database)
        self.query = lambda sql: cluster.postgres.query(sql, cluster.database)

    def first_user(self):
        [[user]] = self.query("SELECT min(user_id) FROM prompt")
        return int(user)

    def others(self, count):
        self.run(
            "INSERT INTO account (username, email, password_hash, is_active, tokens_valid_from, created_at)"
            f" SELECT 'other-' || n, 'o@example.com', '', true, 0, 0 FROM generate_series(1, {count}) n"
        )

    def copy(self, source, where, limit):
        # Prompt by prompt, so that the rows of a user lie apart from each other, as if all had posted at the same time.
        self.run(
            f"""
            WITH source AS (
                SELECT row_number() OVER (ORDER BY id) AS number, id FROM prompt WHERE user_id = {source}
            ), wanted AS (
                SELECT nextval(pg_get_serial_sequence('prompt', 'id')) AS new_id, owner, source_id
                FROM (
                    SELECT a.id AS owner, s.id AS source_id FROM generate_series(0, ({limit} - 1) / {EACH}) turn
                    JOIN source s ON turn * {EACH} + s.number <= {limit} CROSS JOIN (SELECT id FROM account WHERE {where}) a
                    ORDER BY turn, s.number, a.id
                ) pairs
            ), copied AS (
                INSERT INTO prompt (id, user_id, created_at, status, model, prompt, response)
                OVERRIDING SYSTEM VALUE
                SELECT new_id, owner, created_at, status, model, prompt, response FROM wanted JOIN prompt ON prompt.id = source_id
            )
            INSERT INTO prompt_embedding (prompt_id, user_id, model_id, embedding)
            SELECT new_id, owner, model_id, embedding FROM wanted JOIN prompt_embedding ON prompt_id = source_id ORDER BY new_id
            """
        )

    def finish(self):
        self.run("ANALYZE")
        self.run("VACUUM")

    def count(self):
        [[count]] = self.query("SELECT count(*) FROM prompt_embedding")
        return int(count)


class InSqlite:
    """The same in the embedded service's file."""

    def __init__(self, service):
        [path] = service.database_files()
        self.connection = sqlite3.connect(path, isolation_level=None)

    def first_user(self):
        [(user,)] = self.connection.execute("SELECT min(user_id) FROM prompt")
        return user

    def others(self, count):
        self.connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            " INSERT INTO account (username, email, password_hash, is_active, tokens_valid_from, created_at)"
            " SELECT 'other-' || i, 'o@example.com', '', 1, 0, 0 FROM n", (count,),
        )

    def copy(self, source, where, limit):
        run = self.connection.execute
        run("BEGIN")
        run(
            "CREATE TEMP TABLE wanted AS WITH RECURSIVE turn(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM turn WHERE (i + 1) * :each < :limit),"
            " source AS (SELECT row_number() OVER (ORDER BY id) AS number, id FROM prompt WHERE user_id = :source)"
            " SELECT s.id AS source_id, u.id AS owner, (SELECT max(id) FROM prompt) + row_number() OVER (ORDER BY turn.i, s.number, u.id) AS new_id"
            f" FROM turn JOIN source s ON turn.i * :each + s.number <= :limit JOIN (SELECT id FROM account WHERE {where}) u",
            {"source": source, "limit": limit, "each": EACH},
        )
        run(
            "INSERT INTO prompt (id, user_id, created_at, status, model, prompt, response)"
            " SELECT new_id, owner, created_at, status, model, prompt, response FROM wanted JOIN prompt ON id = source_id"
        )
        run(
            "INSERT INTO prompt_embedding (user_id, prompt_id, model_id, embedding)"
            " SELECT owner, new_id, model_id, embedding FROM wanted JOIN prompt_embedding ON prompt_id = source_id AND user_id = ?", (source,),
        )
        run("DROP TABLE wanted")
        run("COMMIT")

    def finish(self):
        self.connection.close()

    def count(self):
        [(count,)] = self.connection.execute("SELECT count(*) FROM prompt_embedding")
        return count


def fill(service, rows, length):
    """Stores the owners' prompts among all others; returns each owner's name."""
    output_of([sys.executable, LOAD / "fill_http.py", EACH, 10_000], BASE_URL=service.url)
    source = rows.first_user()
    names = {}
    for owner, count in OWNERS.items():
        names[owner], identifier = register(service, owner)
        rows.copy(source, f"id = {identifier}", count)
    rows.others(plan(length))
    rows.copy(source, "username LIKE 'other-%'", EACH)
    say(f"{rows.count():,} prompts stored")
    rows.finish()
    return names


def measure_posts(results, name, addresses, folder, length):
    load = Load(addresses, folder, length)
    load.log_in_new_users()
    results["posts", name] = load.run("prompts", 16)
    say(f"posts, 16 connections, {name}: {results['posts', name]}")


def measure_among_many(results, name, service, names, folder, length):
    load = Load([service], folder, length)
    for owner, count in OWNERS.items():
        access = load.log_in(names[owner])
        found = call(service, "/api/prompts/similar?q=anything&k=100", None, access)["results"]
        if len(found) != min(100, count):
            raise SystemExit(f"{name}: a user with {count} prompts was given {len(found)}")
        results[f"search among own {count:,}", name] = load.run("similar", 1)
        say(f"own-scope search of a user with {count:,}, {name}: {results[f'search among own {count:,}', name]}")
    load.log_in_new_users()
    results["a post", name] = load.run("prompts", 1)
    say(f"a post among all, {name}: {results['a post', name]}")


@contextmanager
def embedded(folder):
    with Service(data_dir=folder / "data", **THROTTLES_OFF) as service:
        yield service


@contextmanager
def cluster(count):
    with Postgres(durable=True, shared_buffers="1GB", max_wal_size="8GB") as postgres, Redis() as redis:
        with Cluster(count, postgres, redis, **THROTTLES_OFF) as running:
            yield running


def rows_of(results, unit):
    lines = []
    for what in dict.fromkeys(what for what, _ in results):
        base = results[what, "embedded"]
        for name in [name for other, name in results if other == what]:
            figures = results[what, name]
            ratio = figures.rate / base.rate if unit == "rate" else figures.p50 / base.p50
            lines.append(f"| {what} | {name} | {figures.rate:,.1f} | {figures.p50:.1f} / {figures.p99:.1f} | {ratio:.2f} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few rows and seconds: checks the harness")
    length = SHORT if parser.parse_args().short else FULL
    posts, among = {}, {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prompt-service-bench-")))
        with embedded(folder) as service:
            measure_posts(posts, "embedded", [service], folder, length)
        for count in (1, 2):
            with cluster(count) as running:
                measure_posts(posts, f"{count} replica{'s' * (count > 1)}", running.replicas, folder, length)
        with embedded(folder / "many") as service:
            names = fill(service, InSqlite(service), length)
            measure_among_many(among, "embedded", service, names, folder, length)
        with cluster(1) as running:
            [replica] = running.replicas
            names = fill(replica, InPostgres(running), length)
            measure_among_many(among, "1 replica", replica, names, folder, length)
    described = subprocess.run(["git", "-C", LOAD, "describe", "--always", "--dirty"], text=True, capture_output=True)
    text = "\n".join([
        "# Replicas on one Postgres", "",
        f"{time.strftime('%Y-%m-%d')}, commit {described.stdout.strip() or 'unknown'}, `make bench-replicas`. Machine, shared by all processes: {machine()}.", "",
        "Posts by 16 connections; the ratio is of requests a second, greater is better.", "",
        "| case | service | requests/s | p50 / p99 ms | to embedded |", "| --- | --- | ---: | ---: | ---: |", *rows_of(posts, "rate"), "",
        f"Among {length.rows:,} stored prompts, by one connection; the ratio is of the p50, smaller is better.", "",
        "| case | service | requests/s | p50 / p99 ms | to embedded |", "| --- | --- | ---: | ---: | ---: |", *rows_of(among, "p50"), "",
    ])
    target = TARGET / "bench" / "replicas.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
