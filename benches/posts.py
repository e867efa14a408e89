#!/usr/bin/env python3
"""Posts a second with the mock and with an upstream that answers at once, of this build and, beside
it in the same run, of another one.

    make bench-posts BEFORE=path/to/prompt-service

The two binaries take turns, several rounds of a few seconds each, every round on a new data folder:
compare the ratios, not the figures. Load as in service.py: wrk, one thread, keep-alive, every text
new. With BENCH=--short it checks only that the harness works.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "tools"))

import debian_tools  # noqa: E402
from running_service import BINARY, THROTTLES_OFF, Service  # noqa: E402

LOAD = ROOT / "benches" / "load"
CASES = [("mock", 1), ("mock", 16), ("instant upstream", 1), ("instant upstream", 16)]


def output_of(command, **environment):
    return subprocess.run(
        [str(part) for part in command], env={**os.environ, **environment}, text=True, capture_output=True, check=True
    ).stdout


def posts_a_second(binary, upstream_port, connections, seconds):
    settings = dict(THROTTLES_OFF)
    if upstream_port:
        settings |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{upstream_port}/v1", "OPENAI_API_KEY": "sk-bench"}
    with Service(binary=binary, **settings) as service:
        folder = service.folder / "load"
        folder.mkdir()
        (folder / "prompts.txt").write_text(output_of([sys.executable, LOAD / "gen_prompts.py", 5000]))
        environment = {"BASE_URL": service.url, "SESSION_DIR": str(folder)}
        output_of([sys.executable, LOAD / "session.py", 4], **environment)
        environment |= {"CASE": "prompts", "PROMPTS": str(folder / "prompts.txt"), "RUN_NONCE": os.urandom(8).hex()}
        wrk = [debian_tools.path("wrk"), "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
        report = output_of([*wrk, "-s", LOAD / "wrk.lua", service.url], **environment)
    figures = dict(re.findall(r"(\w+)=([\d.]+)", report[report.index("RESULT") :]))
    if int(figures["socket_errors"]) + int(figures["non2xx"]):
        raise SystemExit(f"some posts failed:\n{report}")
    return float(figures["rps"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the other binary")
    parser.add_argument("--short", action="store_true", help="one round of a second")
    options = parser.parse_args()
    rounds, seconds = (1, 1) if options.short else (5, 5)
    binaries = {"before": options.before, "now": BINARY} if options.before else {"now": BINARY}
    upstream = subprocess.Popen([sys.executable, ROOT / "benches" / "instant_upstream.py"], stdout=subprocess.PIPE, text=True)
    try:
        port = int(upstream.stdout.readline())
        print("| posts/s, median of rounds | connections |", " | ".join(binaries), "| now/before |" if options.before else "|")
        print("|---|---|" + "---|" * (len(binaries) + bool(options.before)))
        for case, connections in CASES:
            rates = {name: [] for name in binaries}
            for _ in range(rounds):
                for name, binary in binaries.items():
                    rates[name].append(posts_a_second(binary, port if case != "mock" else None, connections, seconds))
            medians = [statistics.median(rates[name]) for name in binaries]
            ratio = [f"{medians[1] / medians[0]:.2f}"] if options.before else []
            print("|", " | ".join([case, str(connections), *(f"{rate:.0f}" for rate in medians), *ratio]), "|", flush=True)
    finally:
        upstream.terminate()
        upstream.wait()


if __name__ == "__main__":
    main()
