"""One user's clients race against three replicas whose clocks disagree; Redis's clock decides.
THROTTLE_RACE sets the seconds, with the default rates (`make soak`: 120). If it is unset, the race
is short, with suitable rates.
"""

import itertools
import os
import re
import threading
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import datetime, timedelta

import debian_tools
import httpx
import machine
import pytest
from conftest import PROMPTS, client, make_user
from replicas import Cluster
from running_service import wait_until
from servers import Postgres, Redis

RACE = int(os.environ.get("THROTTLE_RACE", "0"))
# The rates (limit, window in seconds), and the time of the race in seconds. The race ends earlier
# when the clients have used up one window of the longest rate, which must not end before that.
THROTTLE, RATES, SECONDS = ("1/s,10/min", [(1, 1), (10, 60)], RACE) if RACE else ("3/s,24/min", [(3, 1), (24, 60)], 50)
CLIENTS = 64
SKEWS = (-5, 0, 5)

# Seconds in which one of so many waiting clients takes a free place, on a machine that runs only
# this test.
HUNGRY = 0.5


@pytest.fixture(scope="module")
def cluster():
    try:
        environments = [debian_tools.wrong_clock(seconds) for seconds in SKEWS]
    except debian_tools.Unavailable as reason:
        machine.missing("libfaketime", reason)
    settings = {"PROMPT_THROTTLE": THROTTLE, "REGISTER_THROTTLE": "off", "ACCESS_TOKEN_LIFETIME": "1h"}
    with Postgres() as postgres, Redis() as redis, Cluster(3, postgres, redis, environments=environments, **settings) as running:
        yield running


def clock_of(replica):
    """A replica's wall time, by the timestamps of its responses."""
    with client(replica) as http:
        user = make_user(http)
        created = http.post(PROMPTS, json={"prompt": "what time is it"}, headers=user.auth)
    return datetime.fromisoformat(created.json()["created_at"])


def race(cluster, user, seconds, places=None):
    """Posts from all clients without pause. Returns the status of each request, and when it was
    sent and answered.

    Without `places` the race lasts `seconds`. With `places` it ends as soon as that many posts are
    accepted and each client has been refused often enough since; `seconds` is then the deadline.
    """
    answers, over = [], threading.Event()
    start = threading.Barrier(CLIENTS)
    urls = itertools.cycle(replica.url for replica in cluster.replicas)

    def run(url):
        with httpx.Client(base_url=url, timeout=60) as http:
            start.wait(60)
            end = time.monotonic() + seconds
            while time.monotonic() < end and not over.is_set():
                sent = time.time()
                answer = http.post(PROMPTS, json={"prompt": "me first"}, headers=user.auth)
                answers.append((answer.status_code, sent, time.time()))

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(run, next(urls)) for _ in range(CLIENTS)]
        try:
            if places:
                accepted = lambda: sum(status == 201 for status, _, _ in list(answers))  # noqa: E731
                wait_until(lambda: accepted() >= places, seconds, lambda: f"{places} posts are accepted; {accepted()} are", interval=0.1)
                enough = len(answers) + 10 * CLIENTS
                wait_until(lambda: len(answers) >= enough, seconds, "more is asked for", interval=0.1)
            else:
                # Each client stops by itself when its time is over.
                wait(clients)
        finally:
            over.set()
    for each in clients:
        # Raises the error of a client that ended early; otherwise the race would only be smaller.
        each.result()
    assert answers, "no client sent a request, so the race shows nothing"
    return answers


def accepted_by_redis(record, user):
    """When Redis took a request of the user into its windows, in seconds by Redis's clock.

    From the server's record of its commands, each with the server's time.
    """
    key = '"[^"]*throttle[^"]*' + re.escape(f"{{{user.id}}}") + '"'
    times = []
    for line in record:
        found = re.match(rf'\+(\d+\.\d+) \[\d+ lua\] "(?i:zadd)" {key} "(\d+)"', line.decode())
        if found:
            at, score = float(found[1]), int(found[2]) / 1e6
            # The score is what later windows are counted by: it must be Redis's time, and no
            # replica's.
            assert abs(at - score) < 0.5, line
            times.append(score)
    return times


def in_windows(times, moment):
    """How many of the sorted times are in each rate's window that ends at a moment."""
    return [bisect_right(times, moment) - bisect_right(times, moment - window) for _, window in RATES]


def test_the_clocks_of_the_replicas_disagree(cluster):
    first, second, third = [clock_of(replica) for replica in cluster.replicas]
    assert second - first > timedelta(seconds=4) and third - second > timedelta(seconds=4)


def new_user(cluster):
    """A user made on the replica whose clock is behind, so that no replica takes its token for one
    older than the account."""
    with client(cluster.replicas[0]) as http:
        return make_user(http)


def test_a_race_without_a_number_of_places_lasts_for_the_given_time(cluster):
    answers = race(cluster, new_user(cluster), seconds=2)
    lasted = max(received for _, _, received in answers) - min(sent for _, sent, _ in answers)
    assert lasted > 1.5


def test_a_race_without_requests_fails_for_that_reason(cluster):
    with pytest.raises(AssertionError, match="no client sent a request"):
        race(cluster, new_user(cluster), seconds=0)


def test_racing_clients_get_neither_more_nor_less_than_the_limits_by_redis_clock(cluster):
    user = new_user(cluster)
    with cluster.redis.monitored() as record:
        answers = race(cluster, user, SECONDS, None if RACE else RATES[-1][0])
    times = accepted_by_redis(record, user)
    assert times == sorted(times)
    statuses = {status for status, _, _ in answers}
    assert statuses == {201, 429}, statuses
    accepted = [(sent, received) for status, sent, received in answers if status == 201]
    assert len(times) == len(accepted), "Redis counted what was accepted, and nothing else"
    assert len(answers) > 20 * len(accepted), "the clients raced"

    # Never more: no window that ends with an accepted request has more than its limit.
    for moment in times:
        for count, (limit, window) in zip(in_windows(times, moment), RATES):
            assert count <= limit, f"{count} within {window} s before {moment}"
    # The same by the clients' clocks, without Redis: sent and answered within one window.
    for limit, window in RATES:
        for begin, _ in accepted:
            certain = sum(begin <= sent and received < begin + window for sent, received in accepted)
            assert certain <= limit, f"{certain} within {window} s after {begin}"

    # Never fewer: for each refused request, some window was full at every moment of the request.
    for status, sent, received in answers:
        if status == 429:
            moments = [sent, *times[bisect_right(times, sent) : bisect_right(times, received)]]
            # Between two acceptances entries only leave the windows, so windows are fullest at
            # these moments.
            blamed = any(count >= limit for moment in moments for count, (limit, _) in zip(in_windows(times, moment), RATES))
            assert blamed, f"refused between {sent} and {received} though no window was full"
    first = min(sent for _, sent, _ in answers)
    last = max(received for _, _, received in answers)
    print(f"{len(accepted)} of {len(answers)} requests accepted in {last - first:.1f} s")
    if not RACE:
        assert len(times) == RATES[-1][0]
        return
    # And a place that becomes free is taken at once.
    for taken, following in itertools.pairwise([*times, last]):
        free = max(
            [taken] + [
                times[index] + window
                for limit, window in RATES
                if (index := bisect_right(times, taken) - limit) >= 0
            ]
        )
        assert following - free < HUNGRY, f"nobody was let in between {free} and {following}"
    assert times[0] - first < HUNGRY
