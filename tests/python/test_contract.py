"""The black-box contract suite, against a started service with the default throttle."""

import os
import subprocess
import sys

from running_service import ROOT, Service


def test_the_contract_suite_passes_with_the_default_throttle():
    with Service() as service:
        # A process of its own: the suite reads the service's address from the environment and has its own conftest.
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "contract")],
            env={**os.environ, "BASE_URL": service.url, "WS_URL": service.ws_url, "SECRET_KEY": service.secret_key},
            text=True, capture_output=True, timeout=600,
        )
        assert run.returncode == 0, f"{run.stdout[-20000:]}\n{service.output()}"
        summary = run.stdout.strip().splitlines()[-1]
        assert "passed" in summary and "skipped" not in summary, summary
        print(summary)
