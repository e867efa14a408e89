#!/usr/bin/env python3
"""Builds the fuzz targets and runs each for FUZZ_SECONDS seconds (60).

    python3 fuzz/run.py                     all targets
    python3 fuzz/run.py tokens web_socket   some of them

Needs a nightly toolchain of Rust beside the stable one, and does not install it. cargo-fuzz is
installed into the target folder. New inputs that a run finds stay there too. Failing inputs are put
into fuzz/artifacts, and the exit status is then 1. Standard library only.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FUZZ = ROOT / "fuzz"
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
CARGO_FUZZ_VERSION = "0.13.2"
CARGO_FUZZ = TARGET / "tools" / f"cargo-fuzz-{CARGO_FUZZ_VERSION}"
BUILT = TARGET / "fuzz"
ARTIFACTS = FUZZ / "artifacts"
# An input that takes more seconds, or more MiB of memory, is a finding. The slowest input of the
# corpora takes some milliseconds, but libFuzzer also counts the time in which a busy machine does
# not run the target.
INPUT_SECONDS = 60
INPUT_MEMORY = 2048
# Seconds that libFuzzer needs to start and to stop, beyond the time of the run.
LEEWAY = 120


def output(*command):
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        return None
    return run.stdout if run.returncode == 0 else None


def nightly_host():
    """The target triple of this machine, as the nightly toolchain names it."""
    version = output("rustup", "run", "nightly", "rustc", "-vV")
    if version is None:
        sys.exit("fuzz: there is no nightly toolchain of Rust; install one with `rustup toolchain install nightly --profile minimal`")
    return re.search(r"^host: (\S+)$", version, re.MULTILINE)[1]


def install_cargo_fuzz():
    if not (CARGO_FUZZ / "bin" / "cargo-fuzz").exists():
        command = ["cargo", "install", "--quiet", "--locked", "--root", CARGO_FUZZ, "--version", f"={CARGO_FUZZ_VERSION}", "cargo-fuzz"]
        subprocess.run(command, check=True, env={**os.environ, "CARGO_TARGET_DIR": str(BUILT / "cargo-fuzz")})


def build(host):
    # More code generation units than cargo-fuzz's one: half the build time, for a few per cent of
    # the speed.
    command = [CARGO_FUZZ / "bin" / "cargo-fuzz", "build", "--codegen-units", "16", "--target", host]
    environment = {**os.environ, "RUSTUP_TOOLCHAIN": "nightly", "CARGO_TARGET_DIR": str(BUILT)}
    if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
        sys.exit("fuzz: the targets cannot be built")


def artifacts(name):
    return set((ARTIFACTS / name).iterdir())


def run(name, host, seconds):
    """Runs one target. Returns the number of inputs it tried, the seconds, and the new findings."""
    found, logs = BUILT / "corpus" / name, BUILT / "logs"
    for folder in (found, logs, ARTIFACTS / name):
        folder.mkdir(parents=True, exist_ok=True)
    before, began = artifacts(name), time.monotonic()
    command = [
        BUILT / host / "release" / name, found, FUZZ / "corpus" / name,
        f"-max_total_time={seconds}", f"-artifact_prefix={ARTIFACTS / name}/", f"-timeout={INPUT_SECONDS}",
        f"-rss_limit_mb={INPUT_MEMORY}", "-print_final_stats=1",
    ]
    log = logs / f"{name}.log"
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=file, timeout=seconds + LEEWAY).returncode
    tried = re.findall(r"^stat::number_of_executed_units:\s+(\d+)$", log.read_text(errors="replace"), re.MULTILINE)
    finds = sorted(artifacts(name) - before)
    if status != 0 and not finds:
        sys.exit(f"fuzz: {name} ended with status {status}: see {log}")
    return int(tried[-1]) if tried else 0, time.monotonic() - began, finds


def main(chosen):
    host = nightly_host()
    names = sorted(path.stem for path in (FUZZ / "fuzz_targets").glob("*.rs"))
    for name in chosen:
        if name not in names:
            sys.exit(f"fuzz: there is no target {name}; there are {', '.join(names)}")
    seconds = int(os.environ.get("FUZZ_SECONDS", "60"))
    install_cargo_fuzz()
    build(host)
    finds = {}
    print(f"{'target':<20}{'executions':>12}{'seconds':>9}{'findings':>10}", flush=True)
    for name in chosen or names:
        tried, took, finds[name] = run(name, host, seconds)
        print(f"{name:<20}{tried:>12}{took:>9.0f}{len(finds[name]):>10}", flush=True)
    for name, paths in finds.items():
        for path in paths:
            print(f"{path}\n    fails; once more: {BUILT / host / 'release' / name} {path}\n    log: {BUILT / 'logs' / name}.log")
    sys.exit(1 if any(finds.values()) else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
