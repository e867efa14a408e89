#!/usr/bin/env python3
"""Loads the release binary with wrk and a WebSocket client, and compares it with the system it replaces.

    make bench-service                    all cases, about seven minutes
    make bench-service BENCH=--short      the same cases, seconds each: to see that the harness works, not to quote

The load scripts are those of benches/load, with which the old system was measured: one wrk thread, a closed loop, keep-alive,
four users, throttles off, the mock LLM, every text new. The load generator shares the machine with the service, as it did then.
Prints a table and writes it to target/bench/service.md.
"""

import argparse
import json
import os
import platform
import re
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "tools"))

import debian_tools  # noqa: E402
from running_service import BINARY, TARGET, THROTTLES_OFF, Service  # noqa: E402

LOAD = ROOT / "benches" / "load"
# That of the user whom fill_http.py registers.
FILLERS_PASSWORD = "Str0ng-enough-9x"

# The Django system's measured figures, the best of its variants for each case, on 2 virtual cores (AMD EPYC) shared with the
# load generator as here: requests/s, p50 and p99 in ms.
OLD_REQUESTS = {
    ("login", 16, 1_000): (8.0, 1812, 2535),
    ("login", 1, 1_000): (4.4, 216, 277),
    ("prompts", 16, 1_000): (62.6, 241, 648),
    ("prompts", 1, 1_000): (41.6, 23.5, 33.8),
    ("similar", 16, 1_000): (60.7, 283, 579),
    ("similar", 1, 1_000): (42.3, 23.0, 30.8),
    ("unauthorized", 16, 1_000): (518, 31, 392),
    ("throttled", 16, 1_000): (211, 72, 169),
    ("similar", 16, 100_000): (49.7, 306, 587),
    ("similar", 1, 100_000): (28.2, 34.4, 57.3),
    # The old system had no other scope: one index over everybody's prompts.
    ("own", 16, 100_000): (49.7, 306, 587),
    ("own", 1, 100_000): (28.2, 34.4, 57.3),
    ("short", 1, 100_000): (28.2, 34.4, 57.3),
    ("prompts", 16, 100_000): (37.5, 407, 883),
}
# The same system's other figures: MiB, seconds, and milliseconds from a prompt being sent to its event on a socket.
OLD_OTHERS = {
    "idle memory, MiB": 949,
    "memory under load, MiB": 1080,
    "idle memory with 100,000 prompts, MiB": 1147,
    "memory under load with 100,000 prompts, MiB": 1302,
    "memory with 500 sockets open, MiB": 979,
    "start to ready, s": 6.6,
    "start to ready with 100,000 prompts, s": 7.8,
    "sockets opened a second": 564,
    "event to the first of 500 sockets, ms": 48,
    "event to the middle socket, ms": 80,
    "event to the last socket, ms": 98,
}
# What the service has promised to reach.
TARGETS = {
    ("unauthorized", 16, 1_000): "40x",
    ("login", 16, 1_000): "5x",
    ("prompts", 16, 1_000): "15x",
    ("similar", 16, 1_000): "15x",
    ("short", 1, 100_000): "p50 < 2 ms",
    "idle memory, MiB": "< 100",
    "start to ready, s": "< 0.3",
    "start to ready with 100,000 prompts, s": "< 0.3",
    "memory with 1,000,000 prompts in shared scope, MiB": "< 954",
}

ROUTES = {
    "login": "POST /api/auth/login/",
    "prompts": "POST /api/prompts",
    "similar": "GET /api/prompts/similar?k=3",
    "own": "GET /api/prompts/similar?k=3, own scope, all the caller's",
    "short": "the same with queries of some 20 tokens",
    "unauthorized": "GET /api/prompts/similar without a token (401)",
    "throttled": "POST /api/prompts by one user, throttle on (429)",
}


@dataclass
class Length:
    """How long everything takes: seconds, and numbers of repetitions."""

    warm_up: int
    measure: int
    measure_single: int
    starts: int
    events: int
    silence: float


FULL = Length(warm_up=3, measure=12, measure_single=5, starts=9, events=8, silence=8)
SHORT = Length(warm_up=1, measure=2, measure_single=1, starts=3, events=2, silence=1)


@dataclass
class Report:
    """What was measured so far."""

    requests: dict = field(default_factory=dict)
    others: dict = field(default_factory=dict)
    # Texts a second that the engine alone embeds on the same cores.
    engine: float = 0.0
    # Texts that the service did not have to embed: with every text new there are none.
    saved: int = 0
    hashing: str = ""

    def note(self, name, value):
        self.others[name] = value
        say(f"{name}: {value:g}")


def say(text):
    print(text, file=sys.stderr, flush=True)


def output_of(command, **environment):
    run = subprocess.run([str(part) for part in command], env={**os.environ, **environment}, text=True, capture_output=True)
    if run.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{run.stdout}{run.stderr}")
    return run.stdout


def start(data_dir, secret_key, **settings):
    # In the old system a search saw everybody's prompts, so each of the four users searches all that are stored here, too.
    return Service(data_dir=data_dir, secret_key=secret_key, **{**THROTTLES_OFF, "SIMILAR_SCOPE": "shared", **settings})


def memory(service):
    """Resident memory in MiB, by the script that measured the old system."""
    found = re.search(r"Rss=(\d+)", output_of([sys.executable, LOAD / "rss.py", service.pid]))
    return int(found.group(1))


class Load:
    """Runs one case after the other against a service."""

    def __init__(self, service, report, length, stored):
        self.service, self.report, self.length, self.stored = service, report, length, stored
        self.folder = service.folder / "load"
        self.folder.mkdir(exist_ok=True)
        self.most_memory = 0
        self.environment = {"BASE_URL": service.url, "SESSION_DIR": str(self.folder)}
        texts = output_of([sys.executable, LOAD / "gen_prompts.py", 5000])
        (self.folder / "prompts.txt").write_text(texts)
        # What comes before the audience ("Explain black holes"): with the number that makes it new, some 20 tokens.
        (self.folder / "short.txt").write_text("".join(f"{text.partition(' for ')[0]}\n" for text in texts.splitlines()))

    def wrk(self, case, connections, seconds):
        # The case's texts must be new in every run, also after the warm-up a moment before.
        environment = {
            **self.environment,
            "CASE": {"own": "similar", "short": "similar"}.get(case, case),
            "PROMPTS": str(self.folder / ("short.txt" if case == "short" else "prompts.txt")),
            "RUN_NONCE": f"{time.time_ns():x}" if case != "short" else f"{time.time_ns() // 10**6 % 16**5:x}",
        }
        wrk = debian_tools.path("wrk")
        return output_of(
            [wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", LOAD / "wrk.lua", self.service.url],
            **environment,
        )

    def log_in(self, case):
        """Writes the tokens that a case is to use: of four new users, or of the one that has the stored prompts."""
        if case not in ("own", "short"):
            output_of([sys.executable, LOAD / "session.py", 1 if case == "throttled" else 4], **self.environment)
            return
        [database] = self.service.database_files()
        connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
        [(owner,)] = connection.execute("SELECT username FROM account ORDER BY id LIMIT 1")
        connection.close()
        credentials = json.dumps({"username": owner, "password": FILLERS_PASSWORD}).encode()
        request = urllib.request.Request(f"{self.service.url}/api/auth/login/", credentials, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            (self.folder / "tokens.txt").write_text(json.load(answer)["access"] + "\n")
        (self.folder / "credentials.txt").write_text(f"{owner} {FILLERS_PASSWORD}\n")

    def run(self, case, connections):
        self.log_in(case)
        seconds = self.length.measure if connections > 1 else self.length.measure_single
        self.wrk(case, connections, self.length.warm_up)
        watch = subprocess.Popen(
            [sys.executable, str(LOAD / "rss.py"), str(self.service.pid), "--watch", str(seconds)], text=True, stdout=subprocess.PIPE
        )
        result = self.wrk(case, connections, seconds)
        self.most_memory = max(self.most_memory, int(re.search(r"Rss=(\d+)", watch.communicate()[0]).group(1)))
        figures = dict(re.findall(r"(\w+)=([\d.]+)", result[result.index("RESULT") :]))
        errors = int(figures["socket_errors"])
        if case not in ("unauthorized", "throttled"):
            errors += int(figures["non2xx"])
        row = (float(figures["rps"]), float(figures["p50"]), float(figures["p99"]), errors)
        self.report.requests[case, connections, self.stored] = row
        say(f"{case}, {connections} connections, {self.stored} prompts: {row[0]:.1f}/s, p50 {row[1]} ms, p99 {row[2]} ms, {errors} errors")

    def sockets(self):
        """500 sockets of one user, and how long an event takes to reach them."""
        text = output_of(
            [sys.executable, LOAD / "ws_fanout.py", "--sockets", 500, "--events", self.length.events, "--idle", self.length.silence],
            PROC=str(self.service.pid), **self.environment,
        )
        opened = re.search(r"sockets=(\d+) failed=(\d+) seconds=\S+ per_second=(\d+)", text)
        if opened.group(1) != "500" or re.search(r"lost=[1-9]", text):
            raise SystemExit(f"sockets or events were lost:\n{text}")
        self.report.note("sockets opened a second", int(opened.group(3)))
        events = [[float(number) for number in found] for found in re.findall(r"first=(\d+)ms median=(\d+)ms last=(\d+)ms", text)]
        for name, times in zip(("event to the first of 500 sockets, ms", "event to the middle socket, ms", "event to the last socket, ms"), zip(*events)):
            self.report.note(name, statistics.median(times))
        self.report.note("memory with 500 sockets open, MiB", int(re.search(r"'Rss': (\d+)", text).group(1)))


def cold_start(report, name, data_dir, secret_key, length):
    """The median time from starting the process to the first 200 on /readyz."""
    times = []
    for _ in range(length.starts):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = "127.0.0.1:%d" % free.getsockname()[1]
        text = output_of(
            [sys.executable, LOAD / "coldstart.py", "--url", f"http://{address}/readyz", "--cwd", data_dir.parent, "--", BINARY],
            BIND_ADDR=address, DATA_DIR=str(data_dir), SECRET_KEY=secret_key,
        )
        times.append(float(re.search(r"seconds=([\d.]+)", text).group(1)))
    report.note(name, statistics.median(times))


def multiply_prompts(database, wanted):
    """Copies the stored prompts and their vectors until there are as many as wanted: an exact search costs the same whatever they hold."""
    with sqlite3.connect(database) as connection:
        columns = ", ".join(row[1] for row in connection.execute("PRAGMA table_info(prompt)") if row[1] != "id")
        while True:
            [(stored, last)] = connection.execute("SELECT count(*), max(id) FROM prompt")
            if stored == wanted:
                break
            part = {"offset": last, "until": min(last, wanted - stored)}
            connection.execute(f"INSERT INTO prompt (id, {columns}) SELECT id + :offset, {columns} FROM prompt WHERE id <= :until", part)
            connection.execute(
                "INSERT INTO prompt_embedding (user_id, prompt_id, model_id, embedding)"
                " SELECT user_id, prompt_id + :offset, model_id, embedding FROM prompt_embedding WHERE prompt_id <= :until", part,
            )
    connection.close()


def engine_alone(report, folder, length):
    """What the engine alone makes of such texts on all cores: the ceiling of posts and searches."""
    prompts = output_of([sys.executable, LOAD / "gen_prompts.py", 5000]).splitlines()
    file = folder / "texts.txt"
    # As wrk.lua sends them, with a nonce as long as `Load.wrk` sets: it is a third of a text's tokens.
    nonce = f"{time.time_ns():x}"
    file.write_text("".join(f"{prompt} #{nonce}-{number}\n" for number, prompt in enumerate(prompts, 1)))
    text = output_of(["cargo", "bench", "--quiet", "--locked", "--bench", "engine", "--", "texts", file, length.measure], CARGO_TERM_QUIET="true")
    report.engine = float(re.search(r"texts_per_second=([\d.]+)", text).group(1))
    say(f"the engine alone: {report.engine:.0f} texts/s")


def seed(folder, key):
    """A data folder with one user who has 1,000 prompts, and another in which that user has 100,000."""
    with start(folder / "seed", key) as service:
        output_of([sys.executable, LOAD / "fill_http.py", 1_000, 10_000], BASE_URL=service.url)
        stop(service)
    for name in ("1000", "100000"):
        shutil.copytree(folder / "seed", folder / name)
    [database] = (folder / "100000").glob("*.sqlite3")
    multiply_prompts(database, 100_000)


def with_1_000_prompts(report, folder, key, length):
    data_dir = folder / "1000"
    cold_start(report, "start to ready, s", data_dir, key, length)
    with start(data_dir, key) as service:
        report.note("idle memory, MiB", memory(service))
        load = Load(service, report, length, 1_000)
        for case, connections in (("unauthorized", 16), ("similar", 16), ("similar", 1), ("login", 16), ("login", 1)):
            load.run(case, connections)
        load.sockets()
        # Last, because they store more.
        for connections in (16, 1):
            load.run("prompts", connections)
        report.note("memory under load, MiB", load.most_memory)
        counters = urllib.request.urlopen(f"{service.url}/metrics").read().decode()
        saved = re.findall(r'^embedding_saved_total\{how="(?:cached|coalesced)"\} (\d+)', counters, re.MULTILINE)
        report.saved = sum(map(int, saved))
        [database] = service.database_files()
        connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
        [(stored_hash,)] = connection.execute("SELECT password_hash FROM account LIMIT 1")
        connection.close()
        report.hashing = " ".join(stored_hash.split("$")[1:4])
        stop(service)
    with start(data_dir, key, PROMPT_THROTTLE="1/s,10/min") as service:
        Load(service, report, length, 1_000).run("throttled", 16)
        stop(service)


def with_100_000_prompts(report, folder, key, length):
    data_dir = folder / "100000"
    cold_start(report, "start to ready with 100,000 prompts, s", data_dir, key, length)
    with start(data_dir, key) as service:
        load = Load(service, report, length, 100_000)
        # The first search loads what it needs, so that memory is counted with all vectors in it.
        load.log_in("similar")
        load.wrk("similar", 1, 1)
        report.note("idle memory with 100,000 prompts, MiB", memory(service))
        for case, connections in (("similar", 16), ("similar", 1), ("prompts", 16)):
            load.run(case, connections)
        report.note("memory under load with 100,000 prompts, MiB", load.most_memory)
        stop(service)
    with start(data_dir, key, SIMILAR_SCOPE="own") as service:
        load = Load(service, report, length, 100_000)
        load.run("own", 16)
        load.run("own", 1)
        load.run("short", 1)
        stop(service)


def with_1_000_000_prompts(report, folder, key):
    """All vectors in memory after searches of all of them: the store's hundred thousand, ten times over."""
    data_dir = folder / "100000"
    [database] = data_dir.glob("*.sqlite3")
    multiply_prompts(database, 1_000_000)
    with start(data_dir, key) as service:
        load = Load(service, report, SHORT, 1_000_000)
        load.run("similar", 1)
        report.note("memory with 1,000,000 prompts in shared scope, MiB", memory(service))
        stop(service)


def stop(service):
    status = service.stop()
    if status != 0:
        raise SystemExit(f"the service ended with {status}\n{service.output()}")


def machine():
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory_gib:.0f} GiB, {platform.system()} {platform.release()}"


def table(report, options):
    described = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], text=True, capture_output=True)
    commit = described.stdout.strip() or "unknown"
    lines = [
        "# The service under load", "",
        f"{time.strftime('%Y-%m-%d')}, commit {commit}, `make bench-service{' BENCH=--short' if options.short else ''}`.",
        f"Machine, shared with the load generator: {machine()}.",
        f"Password hashing: {report.hashing}. Ratios are to the best variant of the Django system, greater is better.", "",
        "| request | connections | prompts stored | requests/s | p50 / p99 ms | errors | old requests/s | old p50 / p99 ms | ratio | target |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for (case, connections, stored), (rate, p50, p99, errors) in report.requests.items():
        target = TARGETS.get((case, connections, stored), "")
        line = f"| {ROUTES[case]} | {connections} | {stored:,} | {rate:,.1f} | {p50:.1f} / {p99:.1f} | {errors} |"
        if (case, connections, stored) in OLD_REQUESTS:
            old, old_p50, old_p99 = OLD_REQUESTS[case, connections, stored]
            lines.append(f"{line} {old:,} | {old_p50:,} / {old_p99:,} | {rate / old:.1f}x | {target} |")
        else:
            lines.append(f"{line} – | – | – | {target} |")
    shares = [f"{ROUTES[case]} {report.requests[case, 16, 1_000][0] / report.engine:.0%}" for case in ("prompts", "similar")]
    lines += [
        "", f"The engine alone embeds {report.engine:,.0f} such texts/s on the same cores without a load generator; of that, with 16"
        f" connections: {', '.join(shares)} (target 80%). Texts found in a cache or computed once for two: {report.saved}.",
    ]
    lines += ["", "| figure | value | old | ratio | target |", "| --- | ---: | ---: | ---: | --- |"]
    for name, value in report.others.items():
        old = OLD_OTHERS.get(name)
        if old is None:
            lines.append(f"| {name} | {value:g} | – | – | {TARGETS.get(name, '')} |")
            continue
        ratio = value / old if name == "sockets opened a second" else old / max(value, 0.01)
        lines.append(f"| {name} | {value:g} | {old:g} | {ratio:.1f}x | {TARGETS.get(name, '')} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="seconds for each case: checks the harness")
    options = parser.parse_args()
    length = SHORT if options.short else FULL
    report = Report()
    folder = Path(tempfile.mkdtemp(prefix="prompt-service-bench-"))
    key = "benchmark-" * 4
    try:
        seed(folder, key)
        engine_alone(report, folder, length)
        with_1_000_prompts(report, folder, key, length)
        with_100_000_prompts(report, folder, key, length)
        if not options.short:
            with_1_000_000_prompts(report, folder, key)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = table(report, options)
    target = TARGET / "bench" / "service.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
