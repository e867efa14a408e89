"""The session of the README, command by command, on a service with no settings but its address and
folder."""

import json
import os
import re
import shlex
import subprocess

import debian_tools
import pytest
from conftest import SOCKET
from running_service import ROOT, Service
from websockets.sync.client import connect

JSON = "Content-Type: application/json"


@pytest.fixture
def fresh():
    with Service() as running:
        yield running


def curl(*arguments):
    """Runs curl and returns the JSON that it prints; fails on an error status."""
    run = subprocess.run([debian_tools.path("curl"), "--silent", "--show-error", "--fail-with-body", *arguments], text=True, capture_output=True)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    return json.loads(run.stdout)


def test_the_published_curl_session_and_a_socket_that_receives_the_event(fresh):
    registered = curl("-X", "POST", f"{fresh.url}/api/auth/register/", "-H", JSON,
                      "-d", '{"username":"alice","email":"a@b.c","password":"secret123"}')
    assert registered == {"id": 1, "username": "alice", "email": "a@b.c"}

    pair = curl("-X", "POST", f"{fresh.url}/api/auth/login/", "-H", JSON, "-d", '{"username":"alice","password":"secret123"}')
    assert set(pair) == {"refresh", "access"}
    bearer = f"Authorization: Bearer {pair['access']}"

    with connect(f"{fresh.ws_url}{SOCKET}?token={pair['access']}") as socket:
        assert json.loads(socket.recv(timeout=10)) == {"message": "WebSocket connected", "user_id": 1}
        posted = curl("-X", "POST", f"{fresh.url}/api/prompts", "-H", bearer, "-H", JSON,
                      "-d", '{"prompt":"hello world","websocket":true}')
        assert posted["prompt"] == "hello world" and posted["model"] == "mock"
        assert posted["response"] == "[mock] You said: hello world"
        assert json.loads(socket.recv(timeout=10)) == {
            "type": "prompt.message", "event": "prompt_completed", "data": posted,
        }

    found = curl("--get", f"{fresh.url}/api/prompts/similar", "-H", bearer, "--data-urlencode", "q=hello")
    assert found["query"] == "hello"
    [result] = found["results"]
    assert result["id"] == posted["id"]
    # Near, but not the same text: an embedding finds this, a comparison of letters would not.
    assert 0.5 < result["score"] < 0.99


def test_every_curl_command_of_the_readme_succeeds(fresh, tmp_path):
    readme = (ROOT / "README.md").read_text()
    commands = []
    for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", readme, re.MULTILINE | re.DOTALL):
        commands += [line for line in block.replace("\\\n", " ").splitlines() if re.search(r"\bcurl\b", line)]
    assert len(commands) >= 4, "the README shows how to register, log in, post and search"
    script = "\n".join(["set -euo pipefail", *commands]).replace("http://localhost:8000", fresh.url)
    script = script.replace("http://127.0.0.1:8000", fresh.url).replace("curl ", "curl --fail-with-body -sS ")
    folder = debian_tools.path("curl").parent
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    # In a separate folder: the commands may write files.
    run = subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, text=True, capture_output=True)
    assert run.returncode == 0, f"{shlex.join(commands)}\n{run.stdout}\n{run.stderr}"
    assert "hello world" in run.stdout
