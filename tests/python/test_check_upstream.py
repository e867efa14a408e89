"""`check --upstream`, and addresses as people copy them, against a server with a list of models and
one response."""

import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import client, embedded, make_user, post_prompt
from running_service import BINARY, Service

KEY = "sk-right-key-0123456789"
ANSWER = {"choices": [{"message": {"content": "answered"}, "finish_reason": "stop"}]}
MODELS = {"data": [{"id": "model-1"}]}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer("/v1/models", MODELS)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer("/v1/chat/completions", ANSWER)

    def answer(self, path, body):
        self.server.asked.append(f"{self.command} {self.path}")
        status = 404 if self.path != path else 200 if self.headers["Authorization"] == f"Bearer {KEY}" else 401
        body = json.dumps(body if status == 200 else {"error": {"message": f"Not so: {status}"}}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def upstream():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def address(upstream, path):
    return f"http://127.0.0.1:{upstream.server_port}{path}"


def check(folder, *arguments, **settings):
    settings = {"DATA_DIR": str(folder / "data"), "BIND_ADDR": "127.0.0.1:0", "OPENAI_API_KEY": KEY, "OPENAI_MODEL": "model-1", **settings}
    return subprocess.run([BINARY, "check", *arguments], env=settings, cwd=folder, text=True, capture_output=True, timeout=60)


@embedded
def test_a_check_of_the_upstream_fails_for_a_wrong_address_key_or_model(upstream, tmp_path):
    right = address(upstream, "/v1")
    for settings, words in [
        ({"OPENAI_BASE_URL": right}, "has the model model-1"),
        ({"OPENAI_BASE_URL": right, "OPENAI_MODEL": "model-2"}, "no model-2, but model-1: set OPENAI_MODEL"),
        ({"OPENAI_BASE_URL": right, "OPENAI_API_KEY": "sk-wrong-key-0123456789"}, "refuses the key (status 401): set OPENAI_API_KEY"),
        ({"OPENAI_BASE_URL": address(upstream, "")}, f"one under {right}: set OPENAI_BASE_URL to that"),
        ({"OPENAI_BASE_URL": address(upstream, "/other")}, "is the path in OPENAI_BASE_URL right?"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}, "cannot be reached"),
    ]:
        is_right = words.startswith("has")
        run = check(tmp_path, "--upstream", **settings)
        [line] = [line for line in run.stdout.splitlines() if " upstream: " in line]
        assert words in line, run.stdout
        assert (run.returncode == 0) == is_right == line.startswith("ok"), run.stdout
        assert KEY not in run.stdout + run.stderr and "sk-wrong" not in run.stdout + run.stderr
        # Without the flag, the check only notes it.
        plain = check(tmp_path, **settings)
        assert plain.returncode == 0 and words in plain.stdout, plain.stdout
    assert not [asked for asked in upstream.asked if not asked.startswith("GET ")]


@embedded
def test_the_address_of_an_endpoint_works_as_a_base_url(upstream):
    for path in ["/v1/chat/completions", "/v1/models/", "/v1"]:
        settings = {"OPENAI_BASE_URL": address(upstream, path), "OPENAI_API_KEY": KEY, "OPENAI_MODEL": "model-1"}
        with Service(REGISTRATION="open", PROMPT_THROTTLE="off", **settings) as service, client(service) as http:
            answer = post_prompt(http, make_user(http), "hello")
            assert answer.status_code == 201 and answer.json()["response"] == "answered"
    assert {asked for asked in upstream.asked if asked.startswith("POST ")} == {"POST /v1/chat/completions"}


@embedded
def test_the_log_of_a_refused_attempt_has_the_url_and_the_upstreams_message(upstream):
    settings = {"OPENAI_BASE_URL": address(upstream, "/wrong"), "OPENAI_API_KEY": KEY}
    with Service(REGISTRATION="open", PROMPT_THROTTLE="off", **settings) as service, client(service) as http:
        assert post_prompt(http, make_user(http), "hello").status_code == 502
        [line] = [line for line in service.log() if line["message"].startswith("upstream refused")]
    assert line["url"] == address(upstream, "/wrong/chat/completions")
    assert line["upstream_message"] == "Not so: 404"
