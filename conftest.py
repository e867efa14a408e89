"""Has `pytest` in this folder run the contract suite (tests/contract) against a service that it
starts on a free port.

With BASE_URL set, the suite runs against the service there, and none is started.
"""

import importlib.util
import os
import secrets
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tests" / "tools"))

from running_service import BINARY, Service  # noqa: E402
from servers import free_port  # noqa: E402

pytest_plugins = ["contract_pace"]

# A missing condition is reported in one line, before the suite's own conftest fails on it.
if missing := [name for name in ("httpx", "websockets") if not importlib.util.find_spec(name)]:
    sys.exit(f"the contract suite needs {' and '.join(missing)}: run `pip install {' '.join(missing)}` first")
STARTS_SERVICE = "BASE_URL" not in os.environ
if STARTS_SERVICE:
    if not BINARY.is_file():
        sys.exit(f"{BINARY} is missing: run `cargo build --release` first")
    # The suite reads its variables when it is loaded, which is before any test.
    ADDRESS = f"127.0.0.1:{free_port()}"
    os.environ |= {"BASE_URL": f"http://{ADDRESS}", "WS_URL": f"ws://{ADDRESS}", "SECRET_KEY": secrets.token_hex(32)}


@pytest.fixture(scope="session", autouse=True)
def started_service():
    if not STARTS_SERVICE:
        yield
        return
    with Service(secret_key=os.environ["SECRET_KEY"], BIND_ADDR=ADDRESS):
        yield
