"""Clients that work without pause while something fails, and all responses that they got."""

import itertools
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
from conftest import PROMPTS, SIMILAR, client, list_prompts, post_prompt
from running_service import wait_until

# Words for texts that differ so much that each text is nearest to itself.
SUBJECTS = "bread chess lisbon soil jazz tax planets nursing engines rivers verbs glaciers looms tides beetles bridges".split()

# Part of every posted text, so that a log can be searched for prompts.
MARK = "x9prompt7q"

# Each kind of request, and the status of its success.
KINDS = {"post": 201, "search": 200, "list": 200}


@dataclass
class Answer:
    """One request and its result. Times are of time.monotonic."""

    kind: str
    user: str
    sent: float
    received: float
    # None: the connection broke.
    status: int | None
    # The port of the replica that responded.
    served_by: int | None
    retry_after: str | None
    body: object
    text: str | None

    @property
    def is_success(self):
        return self.status == KINDS[self.kind]

    @property
    def code(self):
        return self.body.get("code") if isinstance(self.body, dict) else None

    def __str__(self):
        took = self.received - self.sent
        return f"{self.kind} at {self.sent:.3f}: {self.status} by {self.served_by} after {took:.3f} s: {str(self.body)[:200]}"


class Clients:
    """Posts, searches and lists in turn, each client for one of the users, until the end of the
    block.

    Every response is kept; `check` fails if one of them is not allowed.
    """

    # Seconds after which a request counts as hung: more than every deadline of the service. A post
    # waits up to 30 s for its answer to be stored, because that was paid for.
    DEADLINES = {"post": 40, "search": 15, "list": 15}
    # More than these, so that a hang is reported as a hang.
    TIMEOUT = 80

    def __init__(self, cluster, users, count=6, pause=0.02):
        self.cluster, self.users, self.pause = cluster, users, pause
        self.answers = []
        self.stopping = threading.Event()
        self.failures = []
        self.threads = [threading.Thread(target=self.guarded, args=(number,)) for number in range(count)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.stopping.set()
        for thread in self.threads:
            thread.join()
        assert not self.failures, self.failures[0]

    def guarded(self, number):
        try:
            with client(self.cluster) as http:
                http.timeout = httpx.Timeout(self.TIMEOUT)
                self.work(http, number)
        except BaseException as error:
            self.failures.append(error)
            raise

    def work(self, http, number):
        user = self.users[number % len(self.users)]
        # No text may come twice, also in different runs.
        chosen = random.Random(f"{number} {time.time_ns()}")
        for turn, kind in enumerate(itertools.cycle(("post", "search", "post", "list"))):
            if self.stopping.is_set():
                return
            text = f"{MARK} {' '.join(chosen.choices(SUBJECTS, k=5))} {number}-{turn}-{chosen.randrange(1 << 40):x}"
            self.request(http, user, kind, text)
            # A pause, as clients make: the kinds of requests matter here, not their number.
            self.stopping.wait(self.pause)

    def request(self, http, user, kind, text):
        sent = time.monotonic()
        try:
            if kind == "post":
                answer = post_prompt(http, user, text, websocket=True)
            elif kind == "search":
                answer = http.get(SIMILAR, params={"q": text, "k": 3}, headers=user.auth)
            else:
                answer = http.get(PROMPTS, params={"limit": 5}, headers=user.auth)
        except httpx.TimeoutException as error:
            raise AssertionError(f"no answer to {kind} within {self.TIMEOUT} s") from error
        except httpx.TransportError as error:
            self.answers.append(Answer(kind, user.username, sent, time.monotonic(), None, None, None, repr(error), text))
            return
        port = answer.headers.get("x-served-by")
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        self.answers.append(
            Answer(
                kind, user.username, sent, time.monotonic(), answer.status_code, port and int(port),
                answer.headers.get("retry-after"), answer.json() if is_json else answer.text, text if kind == "post" else None,
            )
        )

    def since(self, moment):
        """The responses to requests that were sent after a moment."""
        return [answer for answer in list(self.answers) if answer.sent >= moment]

    def wait_for_more(self, count, deadline=30, among=lambda answer: True):
        """Waits until that many requests, sent from now on, have responses."""
        now = time.monotonic()
        wait_until(
            lambda: sum(map(among, self.since(now))) >= count, deadline,
            lambda: f"{count} more answers; there were {Counter((answer.kind, answer.status) for answer in self.since(now))}",
        )

    def demand(self, user, more_than, deadline):
        """Posts for a user over many connections at once, until more than that many posts were sent
        within one second. The clients wait for responses, so their rate depends on the machine;
        this number does not.
        """
        with client(self.cluster) as http, ThreadPoolExecutor(2 * more_than) as pool:
            http.timeout = httpx.Timeout(self.TIMEOUT)

            def burst():
                began = time.time_ns()
                list(pool.map(lambda number: self.request(http, user, "post", f"{MARK} at once {began} {number}"), range(2 * more_than)))
                return self.most_within(user, 1.0, wanted=True) > more_than

            wait_until(burst, deadline, f"more than {more_than} posts of one user within a second", interval=0)

    def wait_for_success(self, since, deadline):
        """Waits until a request of every kind that was sent after a moment has succeeded, on
        whichever replica."""

        def missing():
            return KINDS.keys() - {answer.kind for answer in self.since(since) if answer.is_success}

        wait_until(lambda: not missing(), deadline, lambda: f"a success of every kind; missing yet: {missing()}")

    def wait_for_recovery(self, returned, seconds):
        """Waits until every replica has done every kind of request again; fails when that takes
        longer than `seconds`."""
        wanted = {(replica.host_and_port[1], kind) for replica in self.cluster.replicas for kind in KINDS}

        def missing():
            return wanted - {(answer.served_by, answer.kind) for answer in self.since(returned) if answer.is_success}

        wait_until(lambda: not missing(), returned + seconds - time.monotonic(), lambda: f"recovery; missing yet: {missing()}")

    def statuses(self):
        return Counter(answer.status for answer in self.answers)

    def check(self, allowed=(200, 201, 429, 503)):
        """Every response is one that the contract allows, comes in time, and has `Retry-After` if
        it is a refusal."""
        for answer in self.answers:
            assert answer.status in allowed, str(answer)
            assert answer.received - answer.sent < self.DEADLINES[answer.kind], str(answer)
            if answer.status in (429, 503):
                assert int(answer.retry_after) >= 1, str(answer)
                assert answer.body["detail"], str(answer)

    def check_stored(self):
        """Every acknowledged prompt is stored exactly once, and no other more than once."""
        for user in self.users:
            mine = [answer for answer in self.answers if answer.user == user.username and answer.kind == "post"]
            with client(self.cluster) as http:
                stored = list_prompts(http, user)
            times = Counter(item["prompt"] for item in stored)
            ids = {item["id"]: item["prompt"] for item in stored}
            twice = [text for text, count in times.items() if count > 1 and text.startswith(MARK)]
            assert not twice, f"stored more than once: {twice[:3]}"
            acknowledged = [answer for answer in mine if answer.status == 201]
            lost = [str(answer) for answer in acknowledged if ids.get(answer.body["id"]) != answer.text]
            assert not lost, f"{len(lost)} of {len(acknowledged)} acknowledged prompts are missing: {lost[:3]}"

    def most_within(self, user, window, until=float("inf"), wanted=False):
        """The most of a user's posts that were certainly accepted within one window: sent and
        acknowledged inside of it.

        With `wanted`, of all that the user sent, accepted or not.
        """
        posts = sorted(
            (answer.sent, answer.received)
            for answer in list(self.answers)
            if answer.kind == "post" and answer.user == user.username and answer.received <= until and (wanted or answer.status == 201)
        )
        most = 0
        for first, (start, _) in enumerate(posts):
            # Only the posts near it are examined, because this runs often while the clients need
            # the processor.
            near = itertools.takewhile(lambda post: post[0] < start + window, itertools.islice(posts, first, None))
            most = max(most, sum(received < start + window for _, received in near))
        return most
