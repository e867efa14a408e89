#!/usr/bin/env python3
"""The time that `/v1` adds to chat completions, beside LiteLLM's proxy in the same run.

    make bench-gateway

Starts the release binary and the proxy, both before the scripted upstream of benches/gateway, which
then measures them. The proxy has as many workers as there are processors. With BENCH=--short it
checks only that the harness works. Standard library only.
"""

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "tools"))

from api_keys import make_key  # noqa: E402
from litellm_proxy import MASTER_KEY, LiteLlm  # noqa: E402
from running_service import THROTTLES_OFF, Service  # noqa: E402
from servers import free_port  # noqa: E402

UPSTREAM_KEY = "sk-of-the-benchmark"


def service_before(upstream):
    one = {"name": "scripted", "base_url": upstream, "key_env": "BENCH_KEY", "models": ["*"]}
    # One user holds all the streams, and may hold half of what there is.
    settings = {"V1_THROTTLE": "off", "OPENAI_MAX_IN_FLIGHT": "2048", "ACCESS_TOKEN_LIFETIME": "1h"}
    return Service(**THROTTLES_OFF, **settings, UPSTREAMS=json.dumps([one]), BENCH_KEY=UPSTREAM_KEY)


def memory(pid):
    """The resident memory of a process and its children, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) / 1024
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(memory(child) for child in children)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--litellm", metavar="PYTHON", help="the interpreter with LiteLLM; without it only the service is measured")
    parser.add_argument("--without-service", action="store_true", help="measure only the others")
    parser.add_argument("--short", action="store_true", help="seconds in place of minutes")
    options = parser.parse_args()
    port = free_port()
    upstream = f"http://127.0.0.1:{port}/v1"
    with ExitStack() as running:
        targets, pids, extra = [], {}, ["--short"] if options.short else []
        if not options.without_service:
            service = running.enter_context(service_before(upstream))
            targets.append(f"service={service.address},{make_key(service, 'bench')}")
            pids["service"] = service.pid
            extra += ["--commit-dir", str(service.folder)]
        if options.litellm:
            models = [{"model_name": "*", "litellm_params": {"model": "openai/*", "api_base": upstream, "api_key": UPSTREAM_KEY}}]
            proxy = running.enter_context(LiteLlm(options.litellm, models, workers=os.cpu_count()))
            targets.append(f"LiteLLM=127.0.0.1:{proxy.port},{MASTER_KEY}")
            pids["LiteLLM"] = proxy.process.pid
        cargo = os.environ.get("CARGO", "cargo")
        subprocess.run([cargo, "bench", "--locked", "--bench", "gateway", "--", str(port), *targets, *extra], cwd=ROOT, check=True)
        print("\nMemory (RSS) at the end: " + ", ".join(f"{name} {memory(pid):.0f} MiB" for name, pid in pids.items()))


if __name__ == "__main__":
    main()
