"""Attacks on the service's connections and memory, each with an honest user beside it.

The median time of the honest user's requests stays under MEDIAN, and none of them fails.
ATTACK_SCALE sets the size of the attacks (0.1; with `make soak` 1: 2,000 connections that send half
a body, 100 that read nothing).
"""

import os
import select
import socket
import statistics
import threading
import time
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from conftest import LOGIN, ME, PROMPTS, SIMILAR, client, embedded, make_user, post_prompt
from running_service import THROTTLES_OFF, Service, wait_until

pytestmark = embedded

SCALE = float(os.environ.get("ATTACK_SCALE", "0.1"))
MIB = 1 << 20

# Largest median time of the honest user's requests, in seconds.
MEDIAN = 0.25
# Largest memory of the process during an attack, in bytes.
MEMORY = 400 * MIB
# The same with every connection in use: less than a machine of 512 MiB has.
MEMORY_OF_ALL = 480 * MIB
# The honest user makes at least this number of requests during an attack.
ROUNDS = 12

# The attackers' addresses. The honest user comes from 127.0.0.1, as some of the attackers do.
ELSEWHERE = "127.0.0.2"


@pytest.fixture(scope="module")
def service():
    with Service(**THROTTLES_OFF) as running:
        yield running


@pytest.fixture(scope="module")
def attacker(service):
    """A user with a hundred prompts of the greatest length, of control characters, which take six
    times as much in JSON."""
    with client(service) as http:
        user = make_user(http)
        for number in range(100):
            created = post_prompt(http, user, f"{number} " + "\x01" * 31_990)
            assert created.status_code == 201, created.text[:200]
        return user


def memory(service, name):
    """Bytes of the process's memory: VmRSS now, VmHWM at most so far."""
    with open(f"/proc/{service.pid}/status") as status:
        [line] = [line for line in status if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


class HonestUser:
    """A user that works in a thread, and records the time and the failure of each request."""

    def __init__(self, service):
        self.service = service
        self.took, self.failed = [], []
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.work)
        with client(service) as http:
            self.user = make_user(http)

    def work(self):
        with client(self.service) as http:
            number = 0
            while not self.is_over.is_set() or len(self.took) < ROUNDS:
                number += 1
                self.note(http.get, "/healthz")
                self.note(http.get, ME, headers=self.user.auth)
                self.note(http.post, PROMPTS, json={"prompt": f"question {number}"}, headers=self.user.auth)
                self.note(http.get, SIMILAR, params={"q": "question", "k": 5}, headers=self.user.auth)
                self.note(http.get, PROMPTS, params={"limit": 20}, headers=self.user.auth)

    def note(self, ask, path, **options):
        began = time.monotonic()
        try:
            answer = ask(path, **options)
        except Exception as error:
            self.failed.append(f"{path}: {error!r}")
            return
        self.took.append(time.monotonic() - began)
        if answer.status_code not in (200, 201):
            self.failed.append(f"{path}: {answer.status_code} {answer.text[:200]}")


@contextmanager
def undisturbed(service, what):
    """An honest user who works during the block and must not notice it."""
    honest = HonestUser(service)
    honest.thread.start()
    try:
        yield honest
    finally:
        honest.is_over.set()
        honest.thread.join()
    median, longest = statistics.median(honest.took), max(honest.took)
    print(f"\n{what}: {len(honest.took)} honest requests, median {median * 1000:.1f} ms, longest {longest * 1000:.0f} ms;"
          f" memory {memory(service, 'VmRSS') / MIB:.0f} MiB, at most {memory(service, 'VmHWM') / MIB:.0f} MiB so far")
    assert not honest.failed, honest.failed[:5]
    assert median < MEDIAN, f"{median:.3f} s at the median"


class Connections:
    """Many raw connections from one address, closed at the end of the block."""

    def __init__(self, service, address):
        self.service, self.address = service, address
        self.open = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for connection in self.open:
            connection.close()

    def add(self, payload=b"", receive_buffer=None):
        """Opens a connection and sends the part of `payload` that the other side takes at once."""
        connection = socket.socket()
        self.open.append(connection)
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.bind((self.address, 0))
        connection.connect(self.service.host_and_port)
        connection.setblocking(False)
        self.send(connection, payload)
        return connection

    def send(self, connection, payload):
        """Sends all of it; stops if the other side has closed or takes nothing for a second."""
        poll = select.poll()
        poll.register(connection, select.POLLOUT)
        while payload:
            if not poll.poll(1000):
                return
            try:
                payload = payload[connection.send(payload) :]
            except OSError:
                return

    def closed(self):
        """How many connections the other side has closed so far. Reads none of its data."""
        poll = select.poll()
        for connection in self.open:
            poll.register(connection, select.POLLRDHUP)
        return sum(1 for _, event in poll.poll(0) if event & (select.POLLRDHUP | select.POLLHUP | select.POLLERR))


def head(method, path, user=None, **headers):
    lines = [f"{method} {path} HTTP/1.1", "Host: test"]
    lines += [f"Authorization: Bearer {user.access}"] if user else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def scaled(number):
    return max(int(number * SCALE), 4)


@pytest.fixture(scope="module", autouse=True)
def idle(service):
    """A connection that is open since the beginning of the module, and idle since its first
    response."""
    with Connections(service, "127.0.0.1") as connections:
        connection = connections.add(head("GET", "/healthz"))
        connection.setblocking(True)
        connection.settimeout(20)
        assert b" 200 " in connection.recv(65536)
        yield connection, time.monotonic()


def test_as_many_silent_connections_as_allowed_delay_nobody():
    bound = scaled(2000)
    with Service(**THROTTLES_OFF, MAX_CONNECTIONS=str(bound)) as service, Connections(service, "127.0.0.1") as silent:
        for _ in range(bound):
            silent.add()
        with undisturbed(service, f"{bound} silent connections, which is all"):
            for _ in range(bound // 2):
                silent.add()
        assert silent.closed() > 0


def test_half_heads_and_slow_heads_delay_nobody(service):
    with Connections(service, ELSEWHERE) as slow, undisturbed(service, "half heads"):
        for number in range(scaled(1000)):
            slow.add(b"GET / HTTP/1.1\r\nHost: test\r\nX-Filler: " + b"x" * (60_000 if number % 2 else 10))
        for connection in slow.open:
            slow.send(connection, b"x")


def test_half_bodies_hold_little_memory_and_delay_nobody(service, attacker):
    body = b'{"prompt": "' + b"x" * 524_000
    count = scaled(2000)
    with ExitStack() as stack:
        slow = [stack.enter_context(Connections(service, address)) for address in (ELSEWHERE, "127.0.0.1")]
        with undisturbed(service, f"{count} half bodies"):
            for number in range(count):
                user = attacker if number % 4 else None
                path = PROMPTS if user else "/api/auth/register/"
                begun = head("POST", path, user, Content_Type="application/json", Content_Length=1_048_000)
                slow[number % 2].add(begun + body)
        assert memory(service, "VmHWM") < MEMORY


def test_half_requests_of_four_networks_at_every_limit_leave_room_to_log_in():
    bound = scaled(10_000)
    settings = {**THROTTLES_OFF, "MAX_CONNECTIONS": str(bound), "REQUEST_MEMORY": f"{max(int(128 * SCALE), 16)}MiB"}
    of_each = bound // 4 - 10
    with Service(**settings) as service, ExitStack() as stack, client(service) as http:
        user = make_user(http)
        half = [
            head("POST", LOGIN, Content_Type="application/json", Content_Length=16_000) + b" " * 8_000,
            head("POST", PROMPTS, user, Content_Type="application/json", Content_Length=1_000_000) + b" " * 60_000,
            b"GET / HTTP/1.1\r\nHost: test\r\nX-Filler: " + b"x" * 60_000,
        ]
        networks = [stack.enter_context(Connections(service, f"127.0.0.{number}")) for number in range(10, 14)]
        with undisturbed(service, f"half requests on {4 * of_each} connections of four networks"):
            for number in range(of_each):
                for network in networks:
                    network.add(half[number % 3])
            elsewhere = httpx.HTTPTransport(local_address="127.0.0.20")
            with httpx.Client(base_url=service.url, transport=elsewhere, timeout=60) as stranger:
                make_user(stranger)
        assert memory(service, "VmHWM") < MEMORY_OF_ALL


def test_unread_responses_hold_little_memory_and_delay_nobody(service, attacker):
    paths = [f"{SIMILAR}?q=anything&k=100", f"{PROMPTS}?limit=100", f"{PROMPTS}/1"]
    count = scaled(300)
    with Connections(service, "127.0.0.1") as unread, undisturbed(service, f"{count} answers that nobody reads"):
        for number in range(count):
            unread.add(head("GET", paths[number % len(paths)], attacker), receive_buffer=4096)
    assert memory(service, "VmHWM") < MEMORY


def test_many_lists_of_one_user_do_not_delay_another_user(service, attacker):
    is_over = threading.Event()
    answered = []

    def list_again_and_again():
        with client(service) as http:
            while not is_over.is_set():
                answer = http.get(PROMPTS, params={"limit": 100}, headers=attacker.auth)
                answered.append(answer.status_code)
                if answer.status_code == 503:
                    time.sleep(0.05)

    threads = [threading.Thread(target=list_again_and_again) for _ in range(scaled(100))]
    with undisturbed(service, f"{len(threads)} lists at once, again and again"):
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answered) >= 2 * len(threads), 60, "lists are answered")
        is_over.set()
        for thread in threads:
            thread.join()
    assert 200 in answered and set(answered) <= {200, 503}, set(answered)


def test_wide_bodies_do_not_hold_up_others(service, attacker):
    form = "&".join(f"f{number}=" for number in range(125_000)).encode()[: MIB - 1]
    members = b"{" + b",".join(b'"m%d":0' % number for number in range(80_000)) + b"}"
    parts = b"".join(b'--b\r\nContent-Disposition: form-data; name="p%d"\r\n\r\n\r\n' % n for n in range(16_000))
    bodies = [
        ("application/x-www-form-urlencoded", form),
        ("application/json", members[: MIB - 1]),
        ("multipart/form-data; boundary=b", parts[: MIB - 10]),
    ]
    is_over = threading.Event()
    statuses = set()

    def send_again_and_again(kind, body):
        with client(service) as http:
            while not is_over.is_set():
                for path, user in (("/api/auth/refresh/", None), (PROMPTS, attacker)):
                    headers = {"Content-Type": kind, **(user.auth if user else {})}
                    statuses.add(http.post(path, content=body, headers=headers).status_code)

    threads = [threading.Thread(target=send_again_and_again, args=bodies[n % 3]) for n in range(6)]
    with undisturbed(service, "six connections that send wide bodies"):
        for thread in threads:
            thread.start()
        wait_until(lambda: len(statuses) >= 2, 60, "bodies are answered")
        is_over.set()
        for thread in threads:
            thread.join()
    assert statuses <= {400, 413}, statuses


def test_a_reader_at_six_kilobytes_a_second_is_closed_and_a_faster_one_is_served(service, attacker):
    path = f"{SIMILAR}?q=anything&k=100"
    decent = {}

    def read_decently():
        # 38 MB at some 2 MB/s.
        with client(service) as http, http.stream("GET", path, headers=attacker.auth) as answer:
            received = 0
            for piece in answer.iter_raw(256 << 10):
                received += len(piece)
                time.sleep(len(piece) / (2 * MIB))
            decent["bytes"] = received

    reading = threading.Thread(target=read_decently)
    reading.start()
    with Connections(service, ELSEWHERE) as slow:
        connection = slow.add(head("GET", path, attacker), receive_buffer=4096)
        connection.setblocking(True)
        connection.settimeout(60)
        began, received = time.monotonic(), 0
        while True:
            try:
                piece = connection.recv(3000)
            except ConnectionResetError:
                break
            if not piece:
                break
            received += len(piece)
            assert time.monotonic() - began < 120, f"still served after 120 s and {received} bytes"
            # What keeps a reader at 6 kB/s is the wait between two reads.
            time.sleep(len(piece) / 6000)
    reading.join()
    assert decent["bytes"] > 36 * MIB
    wait_until(lambda: service.metric('http_connections_ended_total{reason="slow_reader"}'), 20, "it is counted")


def test_a_kept_connection_is_answered_after_more_than_thirty_seconds(idle):
    connection, since = idle
    # Most of it has passed during the other tests.
    time.sleep(max(0, since + 33 - time.monotonic()))
    connection.sendall(head("GET", "/healthz"))
    assert b" 200 " in connection.recv(65536)


def test_all_memory_is_released(service):
    wait_until(lambda: service.metric("request_memory_bytes") == 0.0, 60, "nothing is held any more")
