"""Fixtures of the tests that run the release binary from outside, as an operator and a client
would."""

import itertools
import json
import os
import subprocess
import sys
import uuid
from contextlib import contextmanager
from dataclasses import dataclass

import debian_tools
import httpx
import pytest
from browser import Browser, executable
from replicas import Cluster
from running_service import ROOT, THROTTLES_OFF, Service
from servers import Postgres, Redis

# What `serve` starts: the service without any setting, or "replica", which keeps everything in
# Postgres and Redis.
KIND = os.environ.get("SERVICE_KIND", "embedded")

# Prints at the end which tests were skipped.
pytest_plugins = ["machine"]

PASSWORD = "Str0ng-enough-9x"

REGISTER, LOGIN, REFRESH = "/api/auth/register/", "/api/auth/login/", "/api/auth/refresh/"
ME = "/api/auth/me/"
PROMPTS, SIMILAR = "/api/prompts", "/api/prompts/similar"
SOCKET = "/ws/prompts/"


@dataclass
class User:
    """A registered user with the tokens of its first login."""

    id: int
    username: str
    access: str
    refresh: str

    @property
    def auth(self):
        return {"Authorization": f"Bearer {self.access}"}


def client(service):
    """An HTTP client of a service, for `with`. Redirects are failures: no route redirects."""
    return httpx.Client(base_url=service.url, timeout=60, follow_redirects=False)


def make_user(http):
    """Registers a new user and logs in."""
    name = "t" + uuid.uuid4().hex[:14]
    created = http.post(REGISTER, json={"username": name, "email": f"{name}@example.com", "password": PASSWORD})
    assert created.status_code == 201, created.text
    pair = http.post(LOGIN, json={"username": name, "password": PASSWORD})
    assert pair.status_code == 200, pair.text
    return User(created.json()["id"], name, pair.json()["access"], pair.json()["refresh"])


def post_prompt(http, user, text, **extra):
    return http.post(PROMPTS, json={"prompt": text, **extra}, headers=user.auth)


def list_prompts(http, user):
    """Every stored prompt of a user, newest first, read page by page."""
    items, cursor = [], None
    for _ in itertools.count():
        page = http.get(PROMPTS, params={"limit": 100, **({"cursor": cursor} if cursor else {})}, headers=user.auth)
        assert page.status_code == 200, page.text
        body = page.json()
        items += body["results"]
        cursor = body["next"]
        if not cursor:
            return items


def assert_healthy(http):
    """The service works: a new user can store a prompt and find it."""
    assert http.get("/healthz").status_code == 200
    assert http.get("/readyz").status_code == 200
    user = make_user(http)
    created = post_prompt(http, user, f"still well {user.username}")
    assert created.status_code == 201, created.text
    found = http.get(SIMILAR, params={"q": created.json()["prompt"], "k": 1}, headers=user.auth)
    assert [item["id"] for item in found.json()["results"]] == [created.json()["id"]]


def assert_json_error(response):
    """An error in the contract's shape: JSON with a `detail` text or lists of texts by field."""
    assert response.headers["content-type"].split(";")[0] == "application/json", response.text
    body = response.json()
    assert isinstance(body, dict) and body, body
    assert isinstance(body.get("detail"), str) or all(isinstance(value, list) for value in body.values()), json.dumps(body)
    return body


# Marks a test that opens the SQLite file, or whose subject does not depend on the store.
embedded = pytest.mark.skipif(KIND != "embedded", reason="it is about the embedded kind alone")


def run_contract_suite(service):
    """Runs the black-box contract suite against a service; returns its summary line."""
    # In a separate process: the suite reads the service's address from the environment and has its
    # own conftest.
    path = os.pathsep.join(filter(None, [str(ROOT / "tests" / "tools"), os.environ.get("PYTHONPATH")]))
    address = {"BASE_URL": service.url, "WS_URL": service.ws_url, "SECRET_KEY": service.secret_key}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "contract_pace", str(ROOT / "tests" / "contract")],
        env={**os.environ, "PYTHONPATH": path, **address}, text=True, capture_output=True, timeout=600,
    )
    assert run.returncode == 0, f"{run.stdout[-20000:]}\n{service.output()}"
    summary = run.stdout.strip().splitlines()[-1]
    assert "passed" in summary and "skipped" not in summary, summary
    return summary


@pytest.fixture(scope="session")
def serve():
    """Starts a service of the tested kind, for `with serve(**settings) as service`."""
    if KIND == "embedded":
        yield Service
        return
    with Postgres() as postgres:

        @contextmanager
        def serve_replica(**settings):
            # Each service has its own Redis: user ids repeat in other databases, and Redis counts
            # by user id.
            with Redis() as redis, Cluster(1, postgres, redis, **settings) as cluster:
                yield cluster.replicas[0]

        yield serve_replica


@pytest.fixture(scope="session")
def service(serve):
    """A service without throttles, shared by tests that change nothing for the others."""
    with serve(**THROTTLES_OFF) as running:
        yield running


@pytest.fixture(scope="session")
def http(service):
    with client(service) as connection:
        yield connection


@pytest.fixture
def user(http):
    return make_user(http)


@pytest.fixture(scope="session")
def browser(pytestconfig):
    """A browser for all tests; each test opens new pages in it."""
    try:
        executable()
    except debian_tools.Unavailable as reason:
        # Not imported above: pytest loads it as a plugin, after this file.
        pytestconfig.pluginmanager.get_plugin("machine").missing("chromium", reason)
    with Browser() as running:
        yield running


@pytest.fixture
def page(browser):
    with browser.page() as opened:
        yield opened
