"""Prometheus' linter on /metrics, while the service works."""

import subprocess
import threading

import machine
import pytest
from conftest import LOGIN, PROMPTS, SIMILAR, SOCKET, make_user, post_prompt
from websockets.sync.client import connect

ROUNDS = 10


@pytest.fixture(scope="module")
def promtool():
    return machine.tool("promtool")


def traffic(http, user):
    """Every kind of response that a label could come from: good, refused, unknown."""
    post_prompt(http, user, "measure me", websocket=True)
    http.get(SIMILAR, params={"q": "measure"}, headers=user.auth)
    http.get(SIMILAR, params={"q": "measure", "k": "0"}, headers=user.auth)
    http.get(PROMPTS, headers=user.auth)
    http.get(f"{PROMPTS}/1", headers=user.auth)
    http.get(PROMPTS)
    http.post(LOGIN, json={"username": user.username, "password": "wrong"})
    http.get('/no/such/"route"\\')
    http.request("BREW", PROMPTS)
    http.request("DELETE", SIMILAR, headers=user.auth)
    http.post(PROMPTS, content=b"{", headers={**user.auth, "Content-Type": "application/json"})


def test_promtool_finds_nothing_in_the_metrics_under_traffic(service, http, promtool):
    user = make_user(http)
    failures = []

    def worker():
        try:
            for _ in range(ROUNDS):
                traffic(http, user)
        except Exception as error:
            failures.append(error)

    with connect(f"{service.ws_url}{SOCKET}?token={user.access}") as socket:
        socket.recv(timeout=10)
        threads = [threading.Thread(target=worker) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            scrape = http.get("/metrics")
            assert scrape.status_code == 200
            assert scrape.headers["content-type"].startswith("text/plain")
            check = subprocess.run([promtool, "check", "metrics"], input=scrape.text, text=True, capture_output=True)
            assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
        for thread in threads:
            thread.join()
    assert not failures, failures
    last = http.get("/metrics").text
    assert 'method="other"' in last and "BREW" not in last
    assert "unmatched" in last and "no/such" not in last
    for name in ("gen_ai_client_operation_duration_seconds", "gen_ai_client_token_usage", "process_resident_memory_bytes"):
        assert f"# TYPE {name} " in last, name
