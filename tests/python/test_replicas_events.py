"""Sockets, tickets and ended credentials over replicas: all replicas know what happens on one."""

import itertools
import json
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from conftest import LOGIN, ME, PASSWORD, REFRESH, SIMILAR, SOCKET, client, make_user, post_prompt
from replicas import Cluster
from running_service import BINARY, THROTTLES_OFF, wait_until
from servers import Postgres, Redis
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

LOGOUT, TICKET = "/api/auth/logout/", "/api/auth/ws-ticket/"
EVENTS = 1_000
# Events that may be on their way to a socket. A reader that is further behind is closed, and these
# readers share one slow process.
AHEAD = 30
# Seconds in which an ended credential must end on all replicas.
SOON = 5


@pytest.fixture(scope="module")
def cluster():
    with Postgres() as postgres, Redis() as redis, Cluster(3, postgres, redis, **THROTTLES_OFF) as running:
        yield running


@pytest.fixture
def each(cluster):
    """An HTTP client of each replica."""
    with ExitStack() as stack:
        yield [stack.enter_context(client(replica)) for replica in cluster.replicas]


class Listener:
    """A socket whose events are read when they come."""

    def __init__(self, replica, query):
        self.stack = ExitStack()
        self.socket = self.stack.enter_context(connect(f"{replica.ws_url}{SOCKET}{query}", max_queue=None))
        self.socket.recv(timeout=10)
        self.ids = []
        self.closed_with = None
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stack.close()
        self.thread.join()

    def read(self):
        try:
            for message in self.socket:
                event = json.loads(message)
                if event.get("event") == "prompt_completed":
                    self.ids.append(event["data"]["id"])
            self.closed_with = self.socket.close_code
        except ConnectionClosed:
            self.closed_with = self.socket.close_code

    def wait_closed(self, code, deadline):
        wait_until(lambda: self.closed_with is not None, deadline, "the socket is closed")
        assert self.closed_with == code


def test_a_thousand_events_reach_the_other_replicas_sockets_once_each_while_a_third_restarts(cluster, each):
    listening, posting, restarting = cluster.replicas
    http = each[1]
    user = make_user(http)
    posted, listeners, numbers = [], [], itertools.count()
    restarted = threading.Event()

    def post(number):
        wait_until(lambda: all(len(listener.ids) >= len(posted) - AHEAD for listener in listeners), 30, "events arrive", interval=0.001)
        answer = post_prompt(http, user, f"event {number}", websocket=True)
        assert answer.status_code == 201, answer.text
        posted.append(answer.json()["id"])

    def post_all():
        # Until the third replica is back, whatever the speed of posts and starts.
        while len(posted) < EVENTS or not restarted.is_set():
            post(next(numbers))

    with ExitStack() as stack:
        listeners += [stack.enter_context(Listener(replica, f"?token={user.access}")) for replica in [listening] * 3 + [posting]]
        pool = stack.enter_context(ThreadPoolExecutor(4))
        results = [pool.submit(post_all) for _ in range(4)]
        try:
            # Once with a normal stop and once with a kill, while events are sent.
            wait_until(lambda: len(posted) > EVENTS // 5, 60, "the first events are posted")
            assert restarting.stop() == 0
            restarting.start()
            restarting.kill()
            restarting.start()
        finally:
            restarted.set()
        for result in results:
            result.result()
        # A doubled event would arrive before the last event.
        last = post_prompt(http, user, "the last event", websocket=True).json()["id"]
        for listener in listeners:
            wait_until(lambda: last in listener.ids, 30, lambda: f"the last event arrives; {len(listener.ids)} of {len(posted)} have, closed with {listener.closed_with}")
            assert Counter(listener.ids) == Counter([*posted, last])
            assert listener.closed_with is None
    assert len(set(posted)) == len(posted) >= EVENTS


def test_a_prompt_is_found_and_listed_by_the_next_request_on_every_replica(each):
    user = make_user(each[0])
    for number in range(10):
        text = f"read your writes {number} {user.username}"
        created = post_prompt(each[number % 3], user, text)
        assert created.status_code == 201, created.text
        for http in each:
            found = http.get(SIMILAR, params={"q": text, "k": 1}, headers=user.auth).json()["results"]
            assert [item["id"] for item in found] == [created.json()["id"]]
    identifier = created.json()["id"]
    assert each[1].delete(f"/api/prompts/{identifier}", headers=user.auth).status_code == 204
    for http in each:
        assert http.get(f"/api/prompts/{identifier}", headers=user.auth).status_code == 404
        found = http.get(SIMILAR, params={"q": text, "k": 100}, headers=user.auth).json()["results"]
        assert identifier not in [item["id"] for item in found] and len(found) == 9


def test_a_ticket_of_one_replica_opens_one_socket_on_another_and_no_second_anywhere(cluster, each):
    user = make_user(each[0])
    for _ in range(5):
        ticket = each[0].post(TICKET, headers=user.auth).json()["ticket"]
        start = threading.Barrier(6)

        def use(replica):
            start.wait()
            try:
                with connect(f"{replica.ws_url}{SOCKET}?ticket={ticket}") as socket:
                    return json.loads(socket.recv(timeout=10))["user_id"]
            except InvalidStatus as refused:
                return refused.response.status_code

        with ThreadPoolExecutor(6) as pool:
            outcomes = Counter(pool.map(use, cluster.replicas * 2))
        assert outcomes == {user.id: 1, 401: 5}


def test_failed_logins_count_over_all_replicas(each):
    user = make_user(each[0])
    statuses = [each[number % 3].post(LOGIN, json={"username": user.username, "password": "wrong"}).status_code for number in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    for http in each:
        refused = http.post(LOGIN, json={"username": user.username, "password": PASSWORD})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1


def operate(cluster, *arguments, typed=""):
    """Runs one of the operator's commands as on another machine: it knows only the database."""
    run = subprocess.run(
        [BINARY, "user", *arguments], input=typed, text=True, capture_output=True, timeout=60,
        env={"DATABASE_URL": cluster.database_url}, cwd=cluster.redis.folder,
    )
    assert run.returncode == 0, run.stderr


KEYS = "/api/keys"
# Seconds in which an API key that ended is refused everywhere.
KEY_SOON = 2


def revoke_key(cluster, http, user, key):
    assert http.delete(f"{KEYS}/{key['id']}", headers=user.auth).status_code == 204


def rotate_key(cluster, http, user, key):
    assert http.post(f"{KEYS}/{key['id']}/rotate", json={"grace": 0}, headers=user.auth).status_code == 200


def disable_owner(cluster, http, user, key):
    operate(cluster, "disable", user.username)


@pytest.mark.parametrize("end", [revoke_key, rotate_key, disable_owner])
def test_a_key_that_ended_on_one_replica_is_refused_by_all_within_two_seconds(cluster, each, end):
    user = make_user(each[0])
    key = each[0].post(KEYS, json={"name": "a key"}, headers=user.auth).json()
    auth = {"Authorization": f"Bearer {key['key']}"}
    ended, refused_at, over = [], {}, threading.Event()

    def watch(number):
        """Uses the key without pause, so that the replica always remembers it."""
        while not over.is_set():
            asked = time.monotonic()
            status = each[number].get("/api/prompts", headers=auth).status_code
            if not ended or asked < ended[0]:
                assert status in (200, 401), status
            elif status == 401:
                refused_at.setdefault(number, asked)
            else:
                # A second later it must not be there again either.
                assert number not in refused_at, f"replica {number} took the key again"
                assert asked - ended[0] < KEY_SOON, f"replica {number} took the key after {asked - ended[0]:.2f} s"

    with ThreadPoolExecutor(len(each)) as pool:
        watching = [pool.submit(watch, number) for number in range(len(each))]
        for http in each:
            assert http.get("/api/prompts", headers=auth).status_code == 200
        end(cluster, each[0], user, key)
        ended.append(time.monotonic())
        wait_until(lambda: len(refused_at) == len(each) or any(one.done() for one in watching), 30, "all replicas refuse the key")
        over.set()
        for one in watching:
            one.result()
    assert all(at - ended[0] < KEY_SOON for at in refused_at.values()), refused_at


def test_a_new_secret_works_at_once_on_every_replica(cluster, each):
    user = make_user(each[0])
    key = each[0].post(KEYS, json={"name": "a key"}, headers=user.auth).json()
    for rotating in each:
        for http in each:
            assert http.get("/api/prompts", headers={"Authorization": f"Bearer {key['key']}"}).status_code == 200
        key = rotating.post(f"{KEYS}/{key['id']}/rotate", json={"grace": 0}, headers=user.auth).json()


def test_the_rates_of_a_key_hold_over_all_replicas(cluster, each):
    user = make_user(each[0])
    key = each[0].post(KEYS, json={"name": "a key", "rates": "5/h"}, headers=user.auth).json()
    auth = {"Authorization": f"Bearer {key['key']}"}
    with ThreadPoolExecutor(12) as pool:
        posts = [pool.submit(each[n % 3].post, "/api/prompts", json={"prompt": "hi"}, headers=auth) for n in range(12)]
    statuses = Counter(post.result().status_code for post in posts)
    assert statuses == {201: 5, 429: 7}


def log_out(cluster, http, user):
    assert http.post(LOGOUT, json={"refresh": user.refresh}).status_code == 204


def disable(cluster, http, user):
    operate(cluster, "disable", user.username)


def change_password(cluster, http, user):
    operate(cluster, "set-password", user.username, typed="An0ther-password\n")


@pytest.mark.parametrize("end", [log_out, disable, change_password])
def test_an_ended_refresh_token_is_ended_on_every_replica(cluster, each, end):
    user = make_user(each[0])
    for http in each:
        assert http.post(REFRESH, json={"refresh": user.refresh}).status_code == 200
    end(cluster, each[0], user)
    ended = time.monotonic()
    for http in each:
        left = ended + SOON - time.monotonic()
        wait_until(lambda: http.post(REFRESH, json={"refresh": user.refresh}).status_code == 401, left, "the refresh token has ended")


@pytest.mark.parametrize("end", [disable, change_password])
def test_ending_an_accounts_credentials_closes_its_sockets_on_every_replica(cluster, each, end):
    user = make_user(each[0])
    with ExitStack() as stack:
        listeners = [stack.enter_context(Listener(replica, f"?token={user.access}")) for replica in cluster.replicas]
        end(cluster, each[0], user)
        ended = time.monotonic()
        for listener in listeners:
            listener.wait_closed(4401, ended + SOON - time.monotonic())
        for http in each:
            left = ended + SOON - time.monotonic()
            wait_until(lambda: http.get(ME, headers=user.auth).status_code == 401, left, "the access token has ended")


def test_a_logout_on_one_replica_closes_the_sessions_socket_on_another(cluster, each):
    user = make_user(each[0])
    pair = each[0].post(LOGIN, json={"username": user.username, "password": PASSWORD, "session": True})
    cookie = {"Cookie": f"session={pair.cookies['session']}"}
    each[0].cookies.clear()
    here, there = cluster.replicas[0], cluster.replicas[1]
    with connect(f"{there.ws_url}{SOCKET}", additional_headers=cookie, origin=there.url) as socket:
        socket.recv(timeout=10)
        assert each[0].post(LOGOUT, headers={**cookie, "Origin": here.url}).status_code == 204
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=SOON)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 4401
