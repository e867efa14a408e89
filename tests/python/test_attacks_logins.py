"""Attacks on logins and sessions. Beside each, an honest user at another address makes requests,
which are quick and never fail."""

import asyncio
import json
import statistics
import threading
import time
import uuid
from contextlib import contextmanager

import httpx
import pytest
from conftest import LOGIN, PASSWORD, PROMPTS, REFRESH, REGISTER, make_user
from running_service import THROTTLES_OFF

LOGOUT = "/api/auth/logout/"

# The addresses of the honest user and the attackers. All of 127.0.0.0/8 is this machine.
HONEST = "127.0.0.99"
ATTACKERS = [f"127.0.1.{n}" for n in range(1, 4)]
# An address that the service trusts as a proxy, and the IPv6 clients that it reports.
PROXY = "127.0.2.1"

# Largest median time of the honest user's requests, in seconds.
QUICK = 0.25
# The honest user makes at least this number of requests, however short the attack is.
ENOUGH = 12


@pytest.fixture(scope="module")
def service(serve):
    with serve(TRUSTED_PROXIES=PROXY, **THROTTLES_OFF) as running:
        yield running


def client_at(service, address):
    """An HTTP client at a local address."""
    transport = httpx.HTTPTransport(local_address=address)
    return httpx.Client(base_url=service.url, transport=transport, timeout=60)


@contextmanager
def undisturbed(service):
    """An honest user who logs in, lists and refreshes during the block. Yields the list of the
    times of its logins."""
    over, requests, logins = threading.Event(), [], []
    with client_at(service, HONEST) as http:
        user = make_user(http)
        credentials = {"username": user.username, "password": PASSWORD}
        kinds = [
            lambda: http.post(LOGIN, json=credentials),
            lambda: http.get(PROMPTS, headers=user.auth),
            lambda: http.post(REFRESH, json={"refresh": user.refresh}),
        ]

        def go_on():
            while not over.is_set() or len(requests) < ENOUGH:
                for request in kinds:
                    began = time.monotonic()
                    answer = request()
                    took = time.monotonic() - began
                    requests.append((answer.request.url.path, answer.status_code, took))
                    if request is kinds[0]:
                        logins.append(took)

        honest = threading.Thread(target=go_on)
        honest.start()
        try:
            yield logins
        finally:
            over.set()
            honest.join()
    assert {status for _, status, _ in requests} == {200}, requests
    times = [seconds for _, _, seconds in requests]
    assert statistics.median(times) < QUICK, sorted(times)


def post(service, path, body="", *headers):
    """A request as bytes; headers may hold any bytes, as Latin-1."""
    host, port = service.host_and_port
    lines = [
        f"POST {path} HTTP/1.1", f"Host: {host}:{port}", "Connection: close", "Content-Type: application/json",
        f"Content-Length: {len(body)}", *headers,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode("latin-1")


def login(service, name, password="a guess", *headers):
    return post(service, LOGIN, json.dumps({"username": name, "password": password}), *headers)


async def connect(service, address):
    return await asyncio.open_connection(*service.host_and_port, local_addr=(address, 0))


async def send(service, address, request):
    """Sends a request from an address and returns the status of the response."""
    reader, writer = await connect(service, address)
    try:
        writer.write(request)
        await writer.drain()
        answer = await asyncio.wait_for(reader.read(), 120)
        return int(answer.split(b" ", 2)[1])
    finally:
        writer.close()


async def send_and_hang_up(service, address, request):
    """Sends a request and closes the connection after the service has had time to begin."""
    _, writer = await connect(service, address)
    writer.write(request)
    await writer.drain()
    await asyncio.sleep(0.01)
    writer.transport.abort()


async def all_at_once(sending, at_once=100):
    """Runs the coroutines, a given number at a time; returns their results."""
    places = asyncio.Semaphore(at_once)

    async def one(coroutine):
        async with places:
            return await coroutine

    return await asyncio.gather(*(one(coroutine) for coroutine in sending))


def status_of(service, address, request):
    return asyncio.run(send(service, address, request))


def test_wrong_passwords_from_three_addresses_hold_up_nobody_elsewhere(service):
    with undisturbed(service) as logins:
        began = time.monotonic()
        burst = [send(service, address, login(service, f"name{n}")) for n in range(100) for address in ATTACKERS]
        statuses = asyncio.run(all_at_once(burst, 300))
        # While the burst lasts, only the burst may be refused.
        assert set(statuses) <= {401, 503}, statuses
        took = time.monotonic() - began
    # A login from another address waits for its turn, not for the burst.
    assert statistics.median(logins) < took / 8, (took, logins)
    # The failures of each address are counted; the limit is a hundred.
    for address in ATTACKERS:
        more = [send(service, address, login(service, f"more{n}")) for n in range(100)]
        assert 429 in asyncio.run(all_at_once(more, 20))


def test_wrong_logins_whose_client_hangs_up_end_in_429(service):
    address, name = "127.0.3.1", f"gone{uuid.uuid4().hex[:8]}"
    with undisturbed(service):
        hasty = [send_and_hang_up(service, address, login(service, name)) for _ in range(300)]
        asyncio.run(all_at_once(hasty, 20))
        assert status_of(service, address, login(service, name)) == 429


def test_right_logins_whose_client_disconnects_lock_nobody_out(service):
    address = "127.0.3.2"
    with client_at(service, address) as http:
        user = make_user(http)
    right = login(service, user.username, PASSWORD)
    with undisturbed(service):
        asyncio.run(all_at_once([send_and_hang_up(service, address, right) for _ in range(60)], 20))
        assert status_of(service, address, right) == 200


def test_registrations_whose_client_disconnects_delay_nobody_else(service):
    def registration():
        name = "r" + uuid.uuid4().hex[:14]
        return post(service, REGISTER, json.dumps({"username": name, "email": "a@b.c", "password": PASSWORD}))

    with undisturbed(service):
        hasty = [send_and_hang_up(service, address, registration()) for _ in range(50) for address in ATTACKERS]
        asyncio.run(all_at_once(hasty, 60))


def test_changing_between_the_networks_of_an_ipv6_site_ends_in_429(service):
    def from_network(n):
        return login(service, f"name{n}", "a guess", f"X-Forwarded-For: 2001:db8:77:{n:x}::1")

    with undisturbed(service):
        guesses = [send(service, PROXY, from_network(n)) for n in range(400)]
        statuses = asyncio.run(all_at_once(guesses, 50))
    assert set(statuses) <= {401, 429}, statuses
    assert statuses.count(401) == 300
    assert status_of(service, PROXY, from_network(0xFFFF)) == 429
    elsewhere = login(service, "name", "a guess", "X-Forwarded-For: 2001:db8:78::1")
    assert status_of(service, PROXY, elsewhere) == 401


def test_cookies_of_every_form_hide_no_session_and_delay_nobody(service):
    address = "127.0.3.3"
    with client_at(service, address) as http:
        user = make_user(http)
        answer = http.post(LOGIN, json={"username": user.username, "password": PASSWORD, "session": True})
        session = f"session={answer.cookies['session']}"

    def refresh(cookie):
        return post(service, REFRESH, "", f"Cookie: {cookie}", f"Origin: {service.url}")

    made_up = "; ".join(f"session={n:043}" for n in range(1000))
    others = [
        made_up, "\xff\xfe" * 10_000, '"' * 10_000, ";" * 30_000, "=" * 30_000, "session=" * 3000, "a" * 50_000,
        f"__Host-session={'A' * 43}", "session=; session", "theme=gr\xf6\xdfe",
    ]
    with undisturbed(service):
        for other in others:
            alone = [send(service, address, refresh(other)) for _ in range(30)]
            assert set(asyncio.run(all_at_once(alone, 10))) <= {400, 401}, other[:20]
            assert status_of(service, address, refresh(f"{other}; {session}")) == 200, other[:20]
        ending = post(service, LOGOUT, "", f"Cookie: theme=gr\xf6\xdfe; {made_up}; {session}")
        assert status_of(service, address, ending) == 204
    assert status_of(service, address, refresh(session)) == 401
