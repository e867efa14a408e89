"""Two replicas behind the proxy of docker-compose.yml, with its unchanged configuration: requests,
sockets, addresses, TLS, stopping."""

import os
import signal
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import debian_tools
import httpx
import machine
import pytest
from conftest import LOGIN, PASSWORD, PROMPTS, REGISTER, SOCKET, assert_healthy, assert_json_error, make_user, post_prompt
from running_service import ROOT, THROTTLES_OFF, Service, wait_until
from servers import Postgres, free_port
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

CONFIG = ROOT / "deploy/haproxy/haproxy.cfg"


@pytest.fixture(scope="module")
def haproxy():
    return machine.tool("haproxy")


class Proxy:
    """The proxy before two addresses, started with the configuration of the container."""

    def __init__(self, haproxy, replicas, log, **settings):
        self.port = free_port()
        self.log = log
        self.url = f"http://127.0.0.1:{self.port}"
        first, second = replicas
        environment = {
            "PATH": os.environ["PATH"], "PROXY_BIND": f"127.0.0.1:{self.port}", "REPLICA_1": first.address, "REPLICA_2": second.address,
            **settings,
        }
        with open(log, "wb") as out:
            self.process = subprocess.Popen([haproxy, "-W", "-db", "-f", CONFIG], env=environment, stdout=out, stderr=out)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)

    def answers(self, client, path="/readyz"):
        assert self.process.poll() is None, self.log.read_text()
        try:
            return client.get(path).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def replicas():
    # Each has its own data folder: they share nothing, so a response shows which replica sent it.
    with ExitStack() as stack:
        yield [stack.enter_context(Service(TRUSTED_PROXIES="127.0.0.1/32", **THROTTLES_OFF)) for _ in range(2)]


@pytest.fixture(scope="module")
def proxy(haproxy, replicas, tmp_path_factory):
    with Proxy(haproxy, replicas, tmp_path_factory.mktemp("proxy") / "log") as running:
        with httpx.Client(base_url=running.url) as http:
            wait_until(lambda: running.answers(http), 60, "the proxy reaches a replica")
        yield running


def one_replica(haproxy, log, service, **settings):
    """A proxy whose two replicas are the same."""
    return Proxy(haproxy, [service, service], log, **settings)


def test_the_configuration_is_valid(haproxy):
    environment = {"PATH": os.environ["PATH"], "PROXY_BIND": "127.0.0.1:8080", "REPLICA_1": "127.0.0.1:1", "REPLICA_2": "127.0.0.1:2"}
    checked = subprocess.run([haproxy, "-c", "-f", CONFIG], env=environment, capture_output=True, text=True)
    assert checked.returncode == 0 and "[WARNING]" not in checked.stderr, checked.stderr


def requests_seen(service):
    with httpx.Client(base_url=service.url) as http:
        lines = http.get("/metrics").text.splitlines()
    counted = [line for line in lines if line.startswith("http_requests_total{") and 'route="/"' in line]
    return sum(float(line.split()[-1]) for line in counted)


def test_both_replicas_get_requests(proxy, replicas):
    def ask(_):
        # A new connection each, like different clients.
        return httpx.get(f"{proxy.url}/").status_code

    def both():
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, range(16))) == {200}
        return all(requests_seen(replica) > 0 for replica in replicas)

    wait_until(both, 60, "both replicas answered")


def test_a_session_with_a_socket_goes_through_the_proxy(haproxy, tmp_path):
    with Service(TRUSTED_PROXIES="127.0.0.1/32", **THROTTLES_OFF) as service, one_replica(haproxy, tmp_path / "log", service) as proxy:
        with httpx.Client(base_url=proxy.url, timeout=60) as http:
            wait_until(lambda: proxy.answers(http), 60, "the proxy reaches the replica")
            assert_healthy(http)
            user = make_user(http)
            with connect(f"ws://127.0.0.1:{proxy.port}{SOCKET}?token={user.access}") as ws:
                assert "WebSocket connected" in ws.recv(timeout=30)
                created = post_prompt(http, user, "through the proxy", websocket=True)
                assert created.status_code == 201
                assert "through the proxy" in ws.recv(timeout=30)
        # The query of a socket's URL may have a token.
        assert user.access not in (tmp_path / "log").read_text()


def test_a_client_cannot_forge_its_address(haproxy, tmp_path):
    # Registrations and failed logins are counted by address: a client that could forge its address
    # would have no limit.
    with Service(TRUSTED_PROXIES="127.0.0.1/32", REGISTER_THROTTLE="3/day") as service, one_replica(haproxy, tmp_path / "log", service) as proxy:
        with httpx.Client(base_url=proxy.url, timeout=60) as http:
            wait_until(lambda: proxy.answers(http), 60, "the proxy reaches the replica")
            statuses = []
            for number in range(5):
                forged = {
                    "X-Forwarded-For": f"198.51.100.{number}", "Forwarded": f"for=198.51.100.{number}", "X-Real-IP": f"198.51.100.{number}",
                }
                account = {"username": f"somebody{number}", "email": "a@b.c", "password": PASSWORD}
                statuses.append(http.post(REGISTER, json=account, headers=forged).status_code)
            assert statuses == [201, 201, 201, 429, 429]
        # A service that trusts no proxy is as safe without one.
    with Service(REGISTER_THROTTLE="1/day") as service, httpx.Client(base_url=service.url, timeout=60) as http:
        for number, expected in ((1, 201), (2, 429)):
            account = {"username": f"somebody{number}", "email": "a@b.c", "password": PASSWORD}
            answer = http.post(REGISTER, json=account, headers={"X-Forwarded-For": f"198.51.100.{number}"})
            assert answer.status_code == expected


def test_the_service_behind_the_proxy_tells_clients_apart(haproxy, tmp_path):
    # The other half: the proxy's addresses are trusted, so that clients do not share a throttle.
    with Service(TRUSTED_PROXIES="127.0.0.1/32", REGISTER_THROTTLE="1/day") as service:
        with one_replica(haproxy, tmp_path / "log", service, PROXY_BIND="0.0.0.0:" + str(port := free_port())) as proxy:
            proxy.url = f"http://127.0.0.1:{port}"
            statuses = []
            # Loopback has many addresses; for the proxy each is another client.
            for number in (2, 3):
                transport = httpx.HTTPTransport(local_address=f"127.0.0.{number}")
                with httpx.Client(base_url=proxy.url, timeout=60, transport=transport) as http:
                    wait_until(lambda http=http: proxy.answers(http), 60, "the proxy reaches the replica")
                    account = {"username": f"client{number}", "email": "a@b.c", "password": PASSWORD}
                    statuses += [http.post(REGISTER, json={**account, "username": f"client{number}-{again}"}).status_code for again in "ab"]
            assert statuses == [201, 429, 201, 429]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of this machine, and the file of certificate and key for the proxy."""
    tmp_path = tmp_path_factory.mktemp("tls")
    key, certificate, both = tmp_path / "key.pem", tmp_path / "certificate.pem", tmp_path / "both.pem"
    subprocess.run(
        [debian_tools.path("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )
    both.write_text(certificate.read_text() + key.read_text())
    return certificate, both


def test_plain_http_is_redirected_to_the_port_of_tls(haproxy, tmp_path, certificate):
    certificate, both = certificate
    port = free_port()
    settings = {"TLS_BIND": f"127.0.0.1:{port}", "TLS_CERTIFICATE": str(both), "TLS_PORT": str(port)}
    trust = ssl.create_default_context(cafile=certificate)
    with Service(**THROTTLES_OFF) as service, one_replica(haproxy, tmp_path / "log", service, **settings) as proxy:
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", timeout=60, verify=trust) as http:
            wait_until(lambda: proxy.answers(http), 60, "the proxy reaches the replica")
        # The redirection keeps method and body: the response is the service's.
        with httpx.Client(base_url=proxy.url, timeout=60, verify=trust, follow_redirects=True) as http:
            answer = http.post(f"{LOGIN}?next=%2Fdocs&x=1", json={})
            assert answer.status_code == 400 and answer.json()["username"]
            assert str(answer.url) == f"https://127.0.0.1:{port}{LOGIN}?next=%2Fdocs&x=1"
            assert [each.status_code for each in answer.history] == [308]
        # For every name and port that the client asks for.
        for asked, name in (
            ("prompts.example", "prompts.example"), ("prompts.example:8080", "prompts.example"), ("[::1]:8080", "[::1]"), ("127.0.0.1", "127.0.0.1"),
        ):
            redirected = httpx.get(f"{proxy.url}/docs", headers={"Host": asked})
            assert redirected.headers["location"] == f"https://{name}:{port}/docs", asked


def test_without_another_port_plain_http_is_redirected_to_the_usual_one(haproxy, tmp_path, certificate):
    settings = {"TLS_BIND": f"127.0.0.1:{free_port()}", "TLS_CERTIFICATE": str(certificate[1])}
    with Service(**THROTTLES_OFF) as service, one_replica(haproxy, tmp_path / "log", service, **settings) as proxy:

        def answer():
            try:
                return httpx.get(f"{proxy.url}/docs?a=b", headers={"Host": "prompts.example:8080"})
            except httpx.TransportError:
                return None

        redirected = wait_until(answer, 60, "the proxy listens")
        assert (redirected.status_code, redirected.headers["location"]) == (308, "https://prompts.example/docs?a=b")


def test_with_a_certificate_the_proxy_speaks_tls_and_the_cookie_is_secure(haproxy, tmp_path, certificate):
    certificate, both = certificate
    port = free_port()
    settings = {"TLS_BIND": f"127.0.0.1:{port}", "TLS_CERTIFICATE": str(both)}
    trust = ssl.create_default_context(cafile=certificate)
    with Service(TRUSTED_PROXIES="127.0.0.1/32", **THROTTLES_OFF) as service, one_replica(haproxy, tmp_path / "log", service, **settings) as proxy:
        with httpx.Client(base_url=f"https://127.0.0.1:{port}", timeout=60, verify=trust) as http:
            wait_until(lambda: proxy.answers(http), 60, "the proxy reaches the replica")
            user = make_user(http)
            answer = http.post(LOGIN, json={"username": user.username, "password": PASSWORD, "session": True})
            assert "Secure" in answer.headers["set-cookie"] and answer.headers["strict-transport-security"]
            with connect(f"wss://127.0.0.1:{port}{SOCKET}?token={user.access}", ssl=trust) as ws:
                assert "WebSocket connected" in ws.recv(timeout=30)
        # A service that trusts no proxy does not trust a direct client that claims to use TLS.
    with Service(**THROTTLES_OFF) as service, httpx.Client(base_url=service.url, timeout=60) as http:
        user = make_user(http)
        answer = http.post(
            LOGIN, json={"username": user.username, "password": PASSWORD, "session": True}, headers={"X-Forwarded-Proto": "https"}
        )
        assert "Secure" not in answer.headers["set-cookie"]


def test_no_request_is_lost_while_a_replica_is_stopped_and_its_sockets_close_with_1001(haproxy, tmp_path):
    with ExitStack() as stack:
        first, second = (stack.enter_context(Service(SHUTDOWN_DELAY="5s", **THROTTLES_OFF)) for _ in range(2))
        proxy = stack.enter_context(Proxy(haproxy, [first, second], tmp_path / "log"))
        http = stack.enter_context(httpx.Client(base_url=proxy.url, timeout=60))
        wait_until(lambda: proxy.answers(http), 60, "the proxy reaches a replica")
        direct = stack.enter_context(httpx.Client(base_url=first.url, timeout=60))
        user = make_user(direct)
        ws = stack.enter_context(connect(f"{first.ws_url}{SOCKET}?token={user.access}"))
        ws.recv(timeout=30)
        first.signal(signal.SIGTERM)
        statuses = set()
        while first.process.poll() is None:
            statuses.add(httpx.get(f"{proxy.url}/").status_code)
        # And for a while after it has stopped.
        end = time.monotonic() + 2
        while time.monotonic() < end:
            statuses.add(httpx.get(f"{proxy.url}/").status_code)
        assert statuses == {200}
        assert first.process.returncode == 0
        with pytest.raises(ConnectionClosed) as closed:
            ws.recv(timeout=20)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001


def test_without_a_ready_replica_clients_hear_the_service_itself(haproxy, tmp_path):
    with ExitStack() as stack:
        postgres = stack.enter_context(Postgres())
        service = stack.enter_context(Service(DATABASE_URL=postgres.make_database(), **THROTTLES_OFF))
        proxy = stack.enter_context(one_replica(haproxy, tmp_path / "log", service))
        http = stack.enter_context(httpx.Client(base_url=proxy.url, timeout=60))
        wait_until(lambda: proxy.answers(http), 60, "the proxy reaches the replica")
        user = make_user(http)
        postgres.stop()
        wait_until(lambda: service.get("/readyz") == 503, 60, "the replica is not ready")

        def heard():
            # The service's own response, which has a request id, before and after the proxy has
            # noticed.
            answer = post_prompt(http, user, "hello")
            assert answer.status_code == 503 and answer.headers["retry-after"] and answer.headers["x-request-id"], answer.text
            assert_json_error(answer)
            return http.get("/readyz").json()

        end = time.monotonic() + 5
        while time.monotonic() < end:
            assert heard()
        postgres.start()
        wait_until(lambda: post_prompt(http, user, "hello").status_code == 201, 60, "prompts are answered again")


def test_the_proxys_own_responses_are_json(haproxy, tmp_path):
    with ExitStack() as stack:
        service = stack.enter_context(Service(**THROTTLES_OFF))
        proxy = stack.enter_context(one_replica(haproxy, tmp_path / "log", service))
        http = stack.enter_context(httpx.Client(base_url=proxy.url, timeout=60))
        wait_until(lambda: proxy.answers(http), 60, "the proxy reaches the replica")
        service.process.kill()

        def ask():
            # A new connection each: a connection to a replica that died is closed without a
            # response, as HTTP says.
            return httpx.get(f"{proxy.url}{PROMPTS}", timeout=60)

        wait_until(lambda: ask().status_code == 503, 60, "the proxy finds nobody")
        answer = ask()
        assert int(answer.headers["retry-after"]) > 0
        assert assert_json_error(answer)["code"] == "unavailable"
