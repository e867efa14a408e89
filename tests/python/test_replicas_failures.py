"""Postgres, Redis and replicas fail in turn while clients work: only allowed responses, quick
recovery, nothing lost, no leftovers.

FAULT_ROUNDS sets how often (1; `make soak` says 10).
"""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
from clients import MARK, Clients
from conftest import SOCKET, client, make_user, post_prompt
from replicas import Cluster, count_open_files, count_threads
from running_service import wait_until
from servers import Postgres, Redis
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

TICKET = "/api/auth/ws-ticket/"
# Posts a second of one user: low, so that a missing throttle would show; eight users are enough
# load.
LIMIT, USERS, REPLICAS = 2, 8, 3
ROUNDS = range(int(os.environ.get("FAULT_ROUNDS", "1")))
# The same while Redis is unavailable: each replica keeps the limit alone, and in the window of the
# change Redis's count is added.
MOST = LIMIT * (REPLICAS + 1)
# Seconds from the return of a server until everything works again: 5 if nothing else runs (`make
# soak`), more if other work may delay every process.
RECOVERY = 5 if "FAULT_ROUNDS" in os.environ else 30
# Seconds in which readiness and metrics must report an unavailable server.
NOTICE = 30
# How many more files a replica may have open than before: scrapes, health checks and clients of
# this moment.
SLACK = 12


@pytest.fixture(scope="module")
def cluster():
    settings = {
        "PROMPT_THROTTLE": f"{LIMIT}/s", "REGISTER_THROTTLE": "off", "ACCESS_TOKEN_LIFETIME": "1h",
        # As in the image: time for the balancer to notice that a replica is stopping, also on a
        # busy machine.
        "SHUTDOWN_DELAY": "5s",
        # So few that a full pool differs from a nearly empty one by at most SLACK: the load decides
        # how full it gets.
        "DATABASE_POOL_SIZE": "5",
    }
    with Postgres() as postgres, Redis() as redis, Cluster(REPLICAS, postgres, redis, faulty=True, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def users(cluster):
    with client(cluster) as http:
        return [make_user(http) for _ in range(USERS)]


@dataclass
class Held:
    """The open files and connections of the replicas at one time."""

    files: list = field(default_factory=list)
    threads: list = field(default_factory=list)
    connections: int = 0

    @classmethod
    def by(cls, cluster):
        pids = [replica.pid for replica in cluster.replicas]
        return cls([count_open_files(pid) for pid in pids], [count_threads(pid) for pid in pids], cluster.connections())

    def is_like(self, before):
        return (
            all(now <= then + SLACK for now, then in zip(self.files, before.files))
            and all(now <= then + SLACK for now, then in zip(self.threads, before.threads))
            and self.connections <= before.connections + SLACK
        )


@pytest.fixture(scope="module")
def before(cluster, users):
    """The open files and connections of the replicas after some normal work, when pools and caches
    are filled."""
    with Clients(cluster, users) as clients:
        clients.wait_for_more(200)
    clients.check()
    return Held.by(cluster)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(cluster, before):
    yield
    # Idle connections of clients that have left are closed after a while.
    wait_until(lambda: Held.by(cluster).is_like(before), 30, lambda: f"{before} again; now {Held.by(cluster)}", interval=0.2)


def restarted(server):
    # As after a crash: Postgres recovers from its log, and Redis has lost everything.
    server.stop(signal.SIGQUIT if isinstance(server, Postgres) else signal.SIGKILL)
    server.start()


FAULTS = {
    "stopped": lambda server, link: (server.stop, server.start),
    "restarted": lambda server, link: (lambda: restarted(server), lambda: None),
    "paused": lambda server, link: (server.pause, server.resume),
    "stalled on the way": lambda server, link: (lambda: link.tell("stall"), lambda: link.tell("pass")),
    "cut off": lambda server, link: (lambda: link.tell("cut"), lambda: link.tell("pass")),
    # In each direction, so a request and its reply take twice as long.
    "slow": lambda server, link: (lambda: link.tell("delay 0.4"), lambda: link.tell("pass")),
}
# The faults that readiness and metrics must report. A restart may be over before a check, and a
# slow server is not unavailable.
TELLING = {"stopped", "paused", "stalled on the way", "cut off"}


def tells(replica, part, status, word, up):
    """Whether a replica's readiness and metrics report this state of a part, and its health that
    the process is alive."""
    assert replica.get("/healthz") == 200
    answer, body = replica.ask("/readyz")
    return (answer, json.loads(body)["parts"][part], replica.metric(f'backend_up{{backend="{part}"}}')) == (status, word, up)


def tells_of(replica, part):
    # Without Redis a replica works alone, and the balancer must not remove it.
    return tells(replica, part, 503 if part == "store" else 200, "down", 0)


def tells_nothing_of(replica, part):
    return tells(replica, part, 200, "ok", 1)


def wait_for_all(cluster, condition, deadline, what):
    """Waits until a condition holds for every replica."""
    with ThreadPoolExecutor(len(cluster.replicas)) as pool:
        list(pool.map(lambda replica: wait_until(lambda: condition(replica), deadline, what, interval=0.05), cluster.replicas))


def decided_alone(cluster):
    """How often each replica has decided the limit of posts alone so far."""
    return sum(replica.metric('degraded_limit_decisions_total{limit="prompts"}') or 0 for replica in cluster.replicas)


def go_through(cluster, users, part, kind):
    """The clients with their responses during a fault, the moment at which it began, and whether
    Redis decided everything until then."""
    server, link = {"store": (cluster.postgres, cluster.postgres_link), "redis": (cluster.redis, cluster.redis_link)}[part]
    begin, end = FAULTS[kind](server, link)
    alone = decided_alone(cluster)
    with Clients(cluster, users, count=USERS) as clients:
        clients.wait_for_more(50)
        began = time.monotonic()
        # If the machine stands still for a second, Redis counts as unavailable, too.
        is_common = decided_alone(cluster) == alone
        begin()
        try:
            if kind in TELLING:
                wait_for_all(cluster, lambda replica: tells_of(replica, part), NOTICE, f"{part} is told as down")
                if part == "redis":
                    clients.demand(users[0], more_than=MOST, deadline=60)
            # Only requests from here on are certainly sent during the fault.
            faulty = time.monotonic()
            if kind != "restarted":
                # Every request gets a response.
                clients.wait_for_more(2 * USERS, deadline=60)
                if part == "redis":
                    # And everything works. The throttle refuses most posts also without a fault, so
                    # it may take a while until one is accepted.
                    clients.wait_for_success(faulty, deadline=60)
        finally:
            end()
        returned = time.monotonic()
        clients.wait_for_recovery(returned, RECOVERY)
        left = returned + RECOVERY - time.monotonic()
        wait_for_all(cluster, lambda replica: tells_nothing_of(replica, part), left, f"{part} is told as up")
        clients.wait_for_more(50)
    clients.check()
    clients.check_stored()
    for replica in cluster.replicas:
        assert replica.process.poll() is None
    return clients, began, is_common and (part == "redis" or decided_alone(cluster) == alone)


@pytest.mark.parametrize("again", ROUNDS)
@pytest.mark.parametrize("kind", FAULTS)
def test_a_failing_postgres_is_503_at_worst_and_nothing_acknowledged_is_lost(cluster, users, kind, again):
    clients, _, is_common = go_through(cluster, users, "store", kind)
    for user in users:
        assert clients.most_within(user, 1.0) <= (LIMIT if is_common else MOST)


@pytest.mark.parametrize("again", ROUNDS)
@pytest.mark.parametrize("kind", FAULTS)
def test_a_failing_redis_stops_neither_prompts_nor_searches_nor_throttles(cluster, users, kind, again):
    clients, began, is_common = go_through(cluster, users, "redis", kind)
    for answer in clients.answers:
        # The only allowed reason is too much work at once, as without a fault.
        assert answer.status != 503 or answer.code == "overloaded", str(answer)
    for user in users:
        assert clients.most_within(user, 1.0) <= MOST
        assert clients.most_within(user, 1.0, until=began) <= (LIMIT if is_common else MOST)


def opened(stack, replica, user):
    """A socket of the user after its welcome message, closed with the stack; None if the service
    refuses it for now."""
    try:
        socket = stack.enter_context(connect(f"{replica.ws_url}{SOCKET}?token={user.access}"))
    except InvalidStatus as refused:
        assert refused.response.status_code == 503 and int(refused.response.headers["retry-after"]) >= 1, refused
        return None
    socket.recv(timeout=10)
    return socket


def test_without_redis_tickets_are_refused_and_sockets_that_may_have_missed_something_are_told(cluster, users):
    user = users[0]
    listening = cluster.replicas[0]
    with ExitStack() as stack:
        here, *elsewhere = [stack.enter_context(client(replica)) for replica in cluster.replicas]
        socket = opened(stack, listening, user)
        cluster.redis.stop()
        try:
            wait_until(lambda: tells_of(listening, "redis"), NOTICE, "redis is told as down")
            refused = here.post(TICKET, headers=user.auth)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1, refused.text
            # An event that cannot come.
            assert post_prompt(elsewhere[0], user, "unheard", websocket=True).status_code == 201
        finally:
            cluster.redis.start()
        returned = time.monotonic()
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                socket.recv(timeout=RECOVERY)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
        # The client's part: it opens another socket, and from then on gets every event of every
        # replica.
        again = wait_until(lambda: opened(stack, listening, user), returned + RECOVERY - time.monotonic(), "sockets are let in")
        left = returned + RECOVERY - time.monotonic()
        wait_for_all(cluster, lambda replica: tells_nothing_of(replica, "redis"), left, "redis is told as up")
        assert here.post(TICKET, headers=user.auth).status_code == 201
        posted = []
        for http in elsewhere:

            def is_heard():
                nonlocal again
                answer = post_prompt(http, user, "heard", websocket=True)
                if answer.status_code == 429:
                    return False
                assert answer.status_code == 201, answer.text
                posted.append(answer.json()["id"])
                try:
                    # A new socket may still get the event of the post before.
                    while (heard := json.loads(again.recv(timeout=30))["data"]["id"]) != posted[-1]:
                        assert heard in posted
                except ConnectionClosed as closed:
                    # The replica of the post may have come back last. Only then it reports that an
                    # event was missed, and closes sockets that were opened before. Their clients
                    # open another socket, too.
                    assert closed.rcvd is not None and closed.rcvd.code == 1012
                    again = wait_until(lambda: opened(stack, listening, user), 30, "sockets are let in")
                    return False
                return True

            wait_until(is_heard, 60, "a prompt is let through and heard of", interval=0.1)


@pytest.mark.parametrize("again", ROUNDS)
@pytest.mark.parametrize("kind", ["killed", "drained"])
def test_the_stop_and_return_of_a_replica_do_not_affect_other_requests(cluster, users, kind, again):
    leaving = cluster.replicas[1]
    port = leaving.host_and_port[1]
    with Clients(cluster, users, count=USERS) as clients:
        clients.wait_for_more(60)
        if kind == "killed":
            leaving.kill()
        else:
            assert leaving.stop() == 0
        gone = time.monotonic()
        clients.wait_for_more(60)
        assert not [answer for answer in clients.since(gone) if answer.served_by == port]
        leaving.start()
        clients.wait_for_more(10, among=lambda answer: answer.served_by == port and answer.is_success)
    broken = [answer for answer in clients.answers if answer.status is None]
    if kind == "killed":
        # At most one request of each client: the one that was open there at that moment.
        assert len(broken) <= USERS, len(broken)
        for answer in broken:
            assert answer.sent <= gone, str(answer)
            clients.answers.remove(answer)
    clients.check()
    clients.check_stored()


def test_no_log_of_all_this_holds_a_secret_a_prompt_or_a_panic(cluster, users):
    for replica in cluster.replicas:
        written = replica.written("stdout") + replica.written("stderr")
        for secret in (cluster.postgres.password, cluster.redis.password, cluster.secret_key, cluster.database, MARK, users[0].access):
            place = written.find(secret)
            assert place < 0, written[max(0, place - 300) : place + 60]
        assert "panicked" not in written
    # Of the replicas that ran all the time. The mock's warning at the start is not about an outage.
    cluster.redis.stop()
    try:
        wait_for_all(
            cluster, lambda replica: any("Redis is away" in line["message"] for line in replica.log() if line.get("level") == "WARN"),
            NOTICE, "the outage is told in the log",
        )
    finally:
        cluster.redis.start()
