"""Hostile requests: a clear 4xx or a close in time, never a 5xx, never a hang, and the service
works afterwards."""

import json
import random
import re
import select
import socket
import threading
import time
from dataclasses import dataclass

import pytest
from conftest import LOGIN, PROMPTS, REGISTER, SIMILAR, assert_healthy, assert_json_error, client, make_user
from running_service import THROTTLES_OFF

MIB = 1 << 20

# Seconds in which a complete request must get a response or a close.
PROMPT = 20
# Seconds in which a connection that sends slowly must be closed: more than the service's deadlines.
PATIENCE = 60


@dataclass
class Outcome:
    """The bytes that came back over a socket."""

    received: bytes
    closed: bool

    @property
    def statuses(self):
        return [int(found) for found in re.findall(rb"HTTP/1\.[01] (\d{3}) ", self.received)]

    def assert_refused(self, *expected):
        """A 4xx (one of `expected`, if given), or a close without a response if none is expected.
        """
        if not self.statuses:
            assert self.closed and not expected, "no answer and no close"
        for status in self.statuses:
            assert status in (expected or range(400, 500)), self.received[:300]


def exchange(service, payload, deadline=PROMPT, half_close=False, until_closed=False):
    """Sends bytes and reads at the same time, as long as the other side takes them; returns the
    bytes that came back until it closed or was silent.

    With `until_closed` a silence is no end: for responses after which the other side must close.
    """
    received, sent, closed = bytearray(), 0, False
    end = time.monotonic() + deadline
    with socket.create_connection(service.host_and_port, timeout=deadline) as connection:
        connection.setblocking(False)
        shut = False
        while time.monotonic() < end and not closed:
            if sent == len(payload) and half_close and not shut:
                connection.shutdown(socket.SHUT_WR)
                shut = True
            # When a response has begun and everything is sent, a short silence is its end.
            quiet = 1.0 if received and sent >= len(payload) and not until_closed else end - time.monotonic()
            readable, writable, _ = select.select([connection], [connection] if sent < len(payload) else [], [], max(0, quiet))
            if not readable and not writable:
                break
            try:
                if readable:
                    data = connection.recv(65536)
                    closed = not data
                    received += data
                elif writable:
                    sent += connection.send(payload[sent : sent + 65536])
            except (BrokenPipeError, ConnectionResetError):
                # The other side has stopped reading. The bytes that it sent before can still be
                # read.
                sent = len(payload)
                try:
                    received += connection.recv(65536)
                except OSError:
                    pass
                closed = True
    return Outcome(bytes(received), closed)


def request(method, path, body=b"", **headers):
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(body, size=65536):
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


class Trickle(threading.Thread):
    """Sends a beginning, then one byte a second for as long as the other side keeps the connection.
    """

    def __init__(self, service, beginning, byte):
        super().__init__(daemon=True)
        self.service, self.beginning, self.byte = service, beginning, byte
        self.seconds = None
        self.received = b""

    def run(self):
        start = time.monotonic()
        with socket.create_connection(self.service.host_and_port, timeout=PATIENCE) as connection:
            connection.settimeout(1)
            try:
                connection.sendall(self.beginning)
                while time.monotonic() - start < PATIENCE:
                    try:
                        data = connection.recv(65536)
                        if not data:
                            break
                        self.received += data
                    except TimeoutError:
                        if self.byte:
                            connection.sendall(self.byte)
                else:
                    return
            except (BrokenPipeError, ConnectionResetError):
                pass
        self.seconds = time.monotonic() - start


@pytest.fixture(scope="module")
def service(serve):
    with serve(**THROTTLES_OFF) as running:
        yield running
        # All of the log: its end alone would not contain the first tests.
        assert "panicked" not in running.written("stdout") + running.stderr()


@pytest.fixture(scope="module")
def http(service):
    with client(service) as connection:
        yield connection


@pytest.fixture(scope="module")
def owner(http):
    return make_user(http)


@pytest.fixture(scope="module")
def token(owner):
    return f"Bearer {owner.access}"


@pytest.fixture(scope="module", autouse=True)
def trickles(service, token):
    """Slow clients for the last test: they wait while the other tests run."""
    head = f"POST {PROMPTS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {token}\r\nContent-Type: application/json\r\n"
    started = {
        "header": Trickle(service, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", b"a"),
        "body": Trickle(service, head.encode() + b'Content-Length: 5000\r\n\r\n{"prompt": "', b"a"),
        "chunks": Trickle(service, head.encode() + b'Transfer-Encoding: chunked\r\n\r\n', b"1\r\na\r\n"),
        "silence": Trickle(service, b"", b""),
    }
    for trickle in started.values():
        trickle.start()
    return started


@pytest.fixture(autouse=True)
def healthy_afterwards(http):
    yield
    assert_healthy(http)


def send_json(http, owner, body, path=PROMPTS):
    return http.post(path, content=body, headers={**owner.auth, "Content-Type": "application/json"})


@pytest.mark.parametrize(
    "body",
    [
        lambda depth: b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}",
        lambda depth: b'{"prompt": ' + b"[" * depth,
        lambda depth: b"[" * depth + b"]" * depth,
        lambda depth: b'{"a":' * depth + b"1" + b"}" * depth,
        lambda depth: b'{"prompt": "x", "ignored": ' + b"[" * depth,
    ],
    ids=["nested", "nested and cut", "bare", "objects", "cut in an ignored field"],
)
def test_deep_nesting_is_a_400(http, owner, body):
    # Bodies with names and passwords are 16 KiB at most.
    for path, depth in ((PROMPTS, 100_000), (LOGIN, 2_500), (REGISTER, 2_500)):
        answer = send_json(http, owner, body(depth), path)
        assert answer.status_code == 400, answer.text
        assert_json_error(answer)


def test_deep_nesting_in_an_unknown_field_is_ignored(http, owner):
    answer = send_json(http, owner, b'{"prompt": "x", "ignored": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    assert answer.status_code == 201, answer.text


@pytest.mark.parametrize("path", [PROMPTS, LOGIN, REGISTER])
@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=B"])
def test_a_body_of_3_mib_is_413(service, token, path, kind):
    sent = request("POST", path, b"x" * (3 * MIB), Content_Type=kind, Authorization=token)
    exchange(service, sent).assert_refused(413)


@pytest.mark.parametrize("path", [PROMPTS, LOGIN])
def test_a_chunked_body_over_the_limit_is_413(service, token, path):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {token}\r\nContent-Type: application/json\r\n"
    sent = head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b'{"prompt": "' + b"x" * (3 * MIB))
    exchange(service, sent).assert_refused(413)


def test_a_big_body_without_credentials_is_401_before_it_is_read(service):
    exchange(service, request("POST", PROMPTS, b"x" * (3 * MIB), Content_Type="application/json")).assert_refused(401)


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "\\ud800"}', b'{"prompt": "a\\udc00b"}', b'{"prompt": "\\udc00\\ud800"}', b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "a\\u0000b"}', b'{"prompt": "\\u0000"}', b'{"prompt": "a\x00b"}', b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\xc3\x28"}', b'{"\xff": "x"}', b'\xef\xbb\xbf', b'\x00', b'{"prompt": "x"}{"prompt": "y"}', b"{'prompt': 'x'}",
        b'{"prompt": Infinity}', b'{"prompt": 0x10}', b'{"prompt": "x"', b'{"prompt": "\n"}', b"nul", b"{}" * 1000,
    ],
)
def test_text_with_invalid_characters_is_a_400(http, owner, body):
    answer = send_json(http, owner, body)
    assert answer.status_code == 400, answer.text
    assert_json_error(answer)


@pytest.mark.parametrize("field", ["username", "email", "password"])
@pytest.mark.parametrize("text", ["a\\u0000b", "\\ud800"])
def test_text_with_invalid_characters_is_a_400_in_each_account_field(http, field, text):
    body = {"username": "bad-text", "email": "bad@example.com", "password": "Str0ng-enough-9x"}
    raw = json.dumps({**body, field: "@"}).replace('"@"', f'"{text}"').encode()
    answer = http.post(REGISTER, content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert_json_error(answer)


@pytest.mark.parametrize("number", [b"1e999999", b"-1e400", b"9" * 100_000, b"1" * 400 + b".5", b"1e-400", b"-0"], ids=lambda number: number[:12].decode())
def test_a_number_of_any_size_is_a_prompt_or_a_400(http, owner, number):
    answer = send_json(http, owner, b'{"prompt": ' + number + b"}")
    assert answer.status_code in (201, 400), answer.text


@pytest.mark.parametrize("k", ["101", "2147483648", "9223372036854775808", "1" + "0" * 5000, "1e9", "0x7f", "%00", "%ff", "-9223372036854775809", "+", "NaN", "²"], ids=lambda k: k[:20])
def test_a_huge_or_odd_k_is_a_field_error(http, owner, k):
    answer = http.get(f"{SIMILAR}?q=x&k={k}", headers=owner.auth)
    assert answer.status_code == 400, answer.text
    assert set(assert_json_error(answer)) == {"k"}


@pytest.mark.parametrize("query", ["q=%ff%fe", "q=%00", "q=a%00b", "q=%ed%a0%80", "q=%", "q=%zz", "q", "&&&==&q", "q=a&q=b", "k=1&k=2&q=a", "q=" + "%20" * 3000], ids=lambda query: query[:20])
def test_an_odd_query_string_gets_a_result_or_a_400(http, owner, query):
    answer = http.get(f"{SIMILAR}?{query}", headers=owner.auth)
    assert answer.status_code in (200, 400), answer.text


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "limit=-1", "limit=99999999999999999999", "cursor=%00", "cursor=x", "cursor=" + "A" * 5000], ids=lambda query: query[:20])
def test_a_bad_page_is_a_field_error(http, owner, query):
    answer = http.get(f"{PROMPTS}?{query}", headers=owner.auth)
    assert answer.status_code == 400, answer.text
    assert set(assert_json_error(answer)) == {query.partition("=")[0]}


@pytest.mark.parametrize("id", ["0", "-1", "x", "1.5", "99999999999999999999", "%00", "%ff", "1%2f..", "9223372036854775807"])
def test_an_odd_id_is_404(http, owner, id):
    for method in ("GET", "DELETE"):
        answer = http.request(method, f"{PROMPTS}/{id}", headers=owner.auth)
        assert answer.status_code == 404, answer.text
        assert_json_error(answer)


MULTIPART = {
    "no boundary": ("multipart/form-data", b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--B--\r\n'),
    "empty boundary": ("multipart/form-data; boundary=", b"--\r\n"),
    "another boundary": ("multipart/form-data; boundary=B", b'--C\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--C--\r\n'),
    "cut in the part": ("multipart/form-data; boundary=B", b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx'),
    "cut in the header": ("multipart/form-data; boundary=B", b"--B\r\nContent-Dispo"),
    "no name": ("multipart/form-data; boundary=B", b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n--B--\r\n"),
    "no header": ("multipart/form-data; boundary=B", b"--B\r\n\r\nx\r\n--B--\r\n"),
    "not UTF-8": ("multipart/form-data; boundary=B", b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\xfe\r\n--B--\r\n'),
    "nothing": ("multipart/form-data; boundary=B", b""),
    "only dashes": ("multipart/form-data; boundary=B", b"-" * 10_000),
    "header without end": ("multipart/form-data; boundary=B", b"--B\r\n" + b"X: y\r\n" * 50_000),
    "long header": ("multipart/form-data; boundary=B", b"--B\r\nContent-Disposition: " + b"x" * 500_000),
}


@pytest.mark.parametrize("kind", MULTIPART)
def test_a_broken_multipart_body_is_a_400(http, owner, kind):
    content_type, body = MULTIPART[kind]
    answer = http.post(PROMPTS, content=body, headers={**owner.auth, "Content-Type": content_type})
    assert answer.status_code == 400, answer.text
    assert_json_error(answer)


def test_ten_thousand_multipart_fields_are_answered(http, owner):
    part = b'--B\r\nContent-Disposition: form-data; name="f"\r\n\r\nx\r\n'
    body = part * 10_000 + b"--B--\r\n"
    answer = http.post(PROMPTS, content=body, headers={**owner.auth, "Content-Type": "multipart/form-data; boundary=B"})
    assert answer.status_code == 400, answer.text


def get(*headers):
    return "\r\n".join(["GET /healthz HTTP/1.1", "Host: localhost", *headers]).encode() + b"\r\n\r\n"


BROKEN = {
    "header of 1 MiB": get("X-Long: " + "a" * MIB),
    "cookie of 1 MiB": get("Cookie: session=" + "a" * MIB),
    "10,000 headers": get(*(f"X-{number}: y" for number in range(10_000))),
    "address of 1 MiB": b"GET /" + b"a" * MIB + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "space in the header's name": get("X Y: z"),
    "NUL in a header": get("X: a\0b"),
    "header without a colon": get("nonsense"),
    "folded header": get("X: a", " b"),
    "length that is no number": get("Content-Length: abc"),
    "negative length": get("Content-Length: -1"),
    "two lengths": get("Content-Length: 1", "Content-Length: 2"),
    "length beyond 64 bits": get("Content-Length: 99999999999999999999999"),
    "chunk size that is no number": f"POST {LOGIN} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
    "chunk size beyond 64 bits": f"POST {LOGIN} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n{'F' * 20}\r\n".encode(),
    "unknown transfer encoding": get("Transfer-Encoding: banana"),
    "no version": b"GET /healthz\r\n\r\n",
    "version 9": b"GET /healthz HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "start of TLS": bytes.fromhex("16030100c8010000c40303") + bytes(200) + b"\r\n\r\n",
    "random bytes": random.Random(1).randbytes(10_000) + b"\r\n\r\n",
    "only line ends": b"\r\n" * 100_000,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_bytes_that_are_no_http_are_refused_or_closed(service, kind):
    # Empty lines are allowed before a request, so only the end of the input shows that none
    # follows.
    exchange(service, BROKEN[kind], half_close=kind == "only line ends").assert_refused()


def test_garbage_after_a_good_request_is_refused_after_its_response(service):
    outcome = exchange(service, get() + b"\x00\x01garbage\r\n\r\n", until_closed=True)
    assert outcome.statuses[:1] == [200]
    assert outcome.closed and all(400 <= status < 500 for status in outcome.statuses[1:])


def test_a_hundred_pipelined_requests_are_answered_in_order(service):
    last = b"GET /api/nope HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    outcome = exchange(service, get() * 99 + last, until_closed=True)
    assert outcome.statuses == [200] * 99 + [404]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", PROMPTS, {}, 401), ("POST", LOGIN, {"Content_Type": "text/plain"}, 415), ("POST", "/api/nope", {}, 404),
        ("POST", "/healthz", {}, 405), ("GET", "/healthz", {}, 200),
    ],
    ids=["unauthenticated", "unsupported", "unknown path", "unknown method", "a body on GET"],
)
def test_a_body_that_nobody_reads_does_not_cost_the_connection(service, method, path, headers, status):
    whole = request(method, path, b"x" * 5000, **headers)
    with socket.create_connection(service.host_and_port, timeout=PROMPT) as connection:
        connection.sendall(whole[:-5000])
        # The response must not close the connection before the body is sent.
        readable, _, _ = select.select([connection], [], [], 0.2)
        assert not readable, "answered before the body was there"
        connection.sendall(whole[-5000:] + get("Connection: close"))
        received = b""
        while data := connection.recv(65536):
            received += data
    assert Outcome(received, closed=True).statuses == [status, 200]


def test_a_body_that_was_announced_and_is_refused_need_not_be_sent(service):
    head = request("POST", PROMPTS, b"x" * 5000, Expect="100-continue")[:-5000]
    outcome = exchange(service, head, until_closed=True)
    outcome.assert_refused(401)
    # The body may or may not follow, so the connection cannot be used again.
    assert outcome.closed and b"connection: close" in outcome.received.lower()


def test_a_body_with_two_lengths_is_refused(service):
    hidden = b"GET /api/nope HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = f"POST {LOGIN} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {5 + len(hidden)}\r\nTransfer-Encoding: chunked\r\n\r\n"
    # Whichever of the two lengths counts: an empty body, a cut body and the hidden request are all
    # errors.
    exchange(service, head.encode() + b"0\r\n\r\n" + hidden).assert_refused()


def test_a_body_that_ends_early_is_refused_or_closed(service, token):
    whole = request("POST", PROMPTS, b'{"prompt": "cut short"}', Content_Type="application/json", Authorization=token)
    exchange(service, whole[:-5], half_close=True).assert_refused()


@pytest.mark.parametrize("path", ["/assets/../../../etc/passwd", "/assets/%2e%2e/%2e%2e/etc/passwd", "/docs/..%2f..%2fetc%2fpasswd", "//etc/passwd", "/%00", "/%ff"])
def test_no_path_leads_out_of_the_routes(service, path):
    exchange(service, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()).assert_refused()


@pytest.mark.parametrize(
    "headers",
    [
        {"Upgrade": "websocket"},
        {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "1", "Sec_WebSocket_Key": "AAAAAAAAAAAAAAAAAAAAAA=="},
        {"Upgrade": "banana", "Connection": "Upgrade"},
        {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13"},
    ],
    ids=["no connection header", "old version", "another protocol", "no key"],
)
def test_a_broken_handshake_is_refused(service, token, headers):
    exchange(service, request("GET", "/ws/prompts/", Authorization=token, **headers)).assert_refused()


@pytest.mark.parametrize("kind", ["header", "body", "chunks", "silence"])
def test_a_client_that_trickles_is_cut_off(trickles, kind):
    trickle = trickles[kind]
    trickle.join(PATIENCE + 10)
    assert trickle.seconds is not None, f"still connected after {PATIENCE} s"
    Outcome(trickle.received, closed=True).assert_refused()
