"""The black-box contract suite against a service with the default throttle, as `pytest` in the
project's folder runs it."""

import os
import subprocess
import sys

from running_service import ROOT, Service


def run_pytest(*arguments, **variables):
    unset = ("BASE_URL", "WS_URL", "SECRET_KEY")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | variables
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *arguments], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=600,
    )


def test_pytest_alone_runs_the_whole_contract_suite_against_a_service_that_it_starts():
    run = run_pytest()
    summary = run.stdout.strip().splitlines()[-1]
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert "passed" in summary and "skipped" not in summary, summary
    print(summary)


def test_pytest_alone_says_in_one_line_what_has_to_be_built_first(tmp_path):
    run = run_pytest(PROMPT_SERVICE_BINARY=str(tmp_path / "prompt-service"))
    assert run.returncode != 0
    assert run.stdout == "" and run.stderr.count("\n") == 1, run
    assert "run `cargo build --release` first" in run.stderr


def test_pytest_alone_takes_a_service_that_runs_already(tmp_path):
    with Service() as service:
        # No binary is needed then.
        run = run_pytest(
            "-k", "login", BASE_URL=service.url, SECRET_KEY=service.secret_key, PROMPT_SERVICE_BINARY=str(tmp_path / "prompt-service"),
        )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
