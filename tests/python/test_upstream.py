"""The release binary with an upstream over TLS: which certificates it trusts, where it sends its
key, and the errors of bad settings."""

import http.server
import json
import ssl
import subprocess
import threading

import machine
import pytest
from conftest import client, make_user, post_prompt
from running_service import BINARY, THROTTLES_OFF, Service

KEY = "sk-a-key-that-nobody-may-see"


class Upstream(http.server.ThreadingHTTPServer):
    """Responds to every prompt with the same words, over TLS, and keeps the requests."""

    daemon_threads = True

    def __init__(self, certificate, key):
        super().__init__(("127.0.0.1", 0), Answer)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.requests, self.connections = [], set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, host):
        return f"https://{host}:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that does not trust the certificate ends the handshake; that is the test, not an
        error."""


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        self.server.connections.add(self.client_address)
        answer = {"model": "over-tls", "choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}
        answer = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two authorities, and a certificate of `localhost` that the first has signed."""
    folder = tmp_path_factory.mktemp("tls")
    openssl = machine.tool("openssl")

    def run(*arguments):
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
    for authority in ("authority", "other"):
        run("req", "-x509", *new_key, "-keyout", f"{authority}.key", "-out", f"{authority}.pem", "-days", "2", "-subj", f"/CN=Test {authority}")
    run("req", *new_key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    (folder / "names").write_text("subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n")
    run("x509", "-req", "-in", "server.csr", "-CA", "authority.pem", "-CAkey", "authority.key", "-CAcreateserial", "-days", "2", "-extfile", "names", "-out", "server.pem")
    return folder


@pytest.fixture
def upstream(folder):
    server = Upstream(folder / "server.pem", folder / "server.key")
    yield server
    server.shutdown()
    server.server_close()


def test_a_trusted_upstream_is_asked_over_one_kept_connection(folder, upstream):
    settings = {"OPENAI_BASE_URL": upstream.url("localhost"), "OPENAI_API_KEY": KEY, "SSL_CERT_FILE": str(folder / "authority.pem"), "RUST_LOG": "trace"}
    with Service(**THROTTLES_OFF, **settings) as service, client(service) as http:
        user = make_user(http)
        for _ in range(3):
            answer = post_prompt(http, user, "hello")
            assert answer.status_code == 201, service.output()
            assert (answer.json()["response"], answer.json()["model"]) == ("Hello", "over-tls")
        metrics = http.get("/metrics").text
        assert KEY not in service.written("stdout") + service.stderr() + metrics + answer.text
    assert {headers["authorization"] for _, headers, _ in upstream.requests} == {f"Bearer {KEY}"}
    assert len(upstream.connections) == 1


@pytest.mark.parametrize(("host", "trusted"), [("localhost", "other.pem"), ("127.0.0.1", "authority.pem")])
def test_an_upstream_that_is_not_trusted_gets_nothing(folder, upstream, host, trusted):
    # Signed by another authority, or by the right authority for another name.
    settings = {"OPENAI_BASE_URL": upstream.url(host), "OPENAI_API_KEY": KEY, "OPENAI_MAX_RETRIES": "0", "SSL_CERT_FILE": str(folder / trusted)}
    with Service(**THROTTLES_OFF, **settings) as service, client(service) as http:
        answer = post_prompt(http, make_user(http), "hello")
        assert answer.status_code in (502, 503), service.output()
    assert upstream.requests == []


def start_error(**settings):
    """The one line of a start that is refused."""
    run = subprocess.run([BINARY], env={"DATA_DIR": "/nonexistent", **settings}, cwd="/", text=True, capture_output=True, timeout=60)
    assert run.returncode != 0
    assert len(run.stderr.splitlines()) == 1, run.stderr
    return run.stderr


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("OPENAI_BASE_URL", {"OPENAI_BASE_URL": "http://8.8.8.8/v1"}),
        ("OPENAI_BASE_URL", {"OPENAI_BASE_URL": f"https://user:{KEY}@example.org/v1"}),
        ("OPENAI_API_KEY", {"OPENAI_API_KEY": f"{KEY}\r\n"}),
        ("OPENAI_FALLBACK", {"OPENAI_API_KEY": KEY, "OPENAI_FALLBACK": f'[{{"model": "m", "base_url": "https://a.example", "api_key": "{KEY}"}}]'}),
        ("OPENAI_FALLBACK", {"OPENAI_API_KEY": KEY, "OPENAI_FALLBACK": '[{"model": "m", "base_url": "https://a.example", "api_key_env": "UNSET_KEY"}]'}),
        ("OPENAI_FALLBACK", {"OPENAI_API_KEY": KEY, "OPENAI_FALLBACK": '[{"model": "m", "base_url": "https://a.example", "api_key_env": "OPENAI_API_KEY"}]'}),
        ("OPENAI_FALLBACK", {"OPENAI_API_KEY": KEY, "SECRET_KEY": KEY * 2, "OPENAI_FALLBACK": '[{"model": "m", "base_url": "https://api.openai.com/v1", "api_key_env": "SECRET_KEY"}]'}),
        ("OPENAI_TOTAL_TIMEOUT", {"OPENAI_API_KEY": KEY, "OPENAI_TOTAL_TIMEOUT": "soon"}),
        ("REGISTRATION", {"OPENAI_API_KEY": KEY, "BIND_ADDR": "0.0.0.0:0"}),
    ],
)
def test_an_invalid_setting_is_reported_by_name(name, settings):
    line = start_error(**settings)
    assert line.startswith(f"error: {name}: ")
    assert KEY not in line


def test_without_anybody_to_trust_the_start_says_so(tmp_path):
    (tmp_path / "none.pem").write_text("")
    line = start_error(OPENAI_API_KEY=KEY, SSL_CERT_FILE=str(tmp_path / "none.pem"), DATA_DIR=str(tmp_path / "data"))
    assert "SSL_CERT_FILE" in line


def test_the_fallbacks_key_can_come_from_a_file_and_goes_only_to_the_fallback(folder, upstream, tmp_path):
    (tmp_path / "key").write_text("sk-fallback\n")
    fallback = [{"model": "spare", "base_url": upstream.url("localhost"), "api_key_env": "SPARE_KEY"}]
    settings = {
        "OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_KEY": KEY, "OPENAI_MAX_RETRIES": "0", "SSL_CERT_FILE": str(folder / "authority.pem"),
        "OPENAI_FALLBACK": json.dumps(fallback), "SPARE_KEY_FILE": str(tmp_path / "key"),
    }
    with Service(**THROTTLES_OFF, **settings) as service, client(service) as http:
        answer = post_prompt(http, make_user(http), "hello")
        assert answer.status_code == 201, service.output()
    [(path, headers, body)] = upstream.requests
    assert (path, headers["authorization"], body["model"]) == ("/v1/chat/completions", "Bearer sk-fallback", "spare")
