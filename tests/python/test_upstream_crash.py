"""Clients, the service and the upstream die during calls. The tests count rows, calls and events:
none is lost, none is doubled.

KILL_ROUNDS sets how often the service is killed (2; `make soak` says 50).
"""

import json
import os
import random
import subprocess
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import debian_tools
import httpx
from conftest import PROMPTS, SIMILAR, SOCKET, client, embedded, list_prompts, make_user, post_prompt
from running_service import THROTTLES_OFF, Service, wait_until
from scripted_upstream import Upstream, answer_to
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

pytestmark = embedded

ROUNDS = int(os.environ.get("KILL_ROUNDS", "2"))
# Seconds: enough for a busy machine.
DEADLINE = 60
# The lease is longer than a pause of a few seconds, which a busy machine may cause: no call of a
# living process may expire.
SETTINGS = {**THROTTLES_OFF, "CALL_LEASE": "6s", "ACCESS_TOKEN_LIFETIME": "1d"}


class Listener:
    """A user's socket; counts the last events of prompts, by event and id."""

    def __init__(self, service, user):
        self.ends = Counter()
        self.stack = ExitStack()
        self.socket = self.stack.enter_context(connect(f"{service.ws_url}{SOCKET}?token={user.access}", max_queue=None))
        self.socket.recv(timeout=DEADLINE)
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stack.close()
        self.thread.join()

    def read(self):
        try:
            while True:
                event = json.loads(self.socket.recv())
                if event["event"] != "prompt.delta":
                    self.ends[event["event"], event["data"]["id"]] += 1
        except ConnectionClosed:
            return

    def told(self, name):
        # A copy, because events arrive at the same time.
        return Counter({id: count for (event, id), count in dict(self.ends).items() if event == name})


def events_of(answer):
    """The events of a stream as they come, as pairs of name and data."""
    name = None
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def new_text(kind):
    return f"{kind} {uuid.uuid4().hex}"


def by_text(http, user):
    """All stored prompts by their text; none may be there twice."""
    rows = list_prompts(http, user)
    assert len({row["prompt"] for row in rows}) == len(rows)
    return {row["prompt"]: row for row in rows}


def assert_found(http, user, row):
    answer = http.get(SIMILAR, params={"q": row["prompt"], "k": 3}, headers=user.auth)
    assert row["id"] in [found["id"] for found in answer.json()["results"]], row


def test_calls_of_clients_killed_during_a_stream_are_completed_stored_and_announced():
    count = 12
    with Upstream() as upstream, Service(**SETTINGS, OPENAI_BASE_URL=upstream.url) as service, client(service) as http:
        user = make_user(http)
        with Listener(service, user) as listener:
            upstream.hold()
            texts = [new_text("killed client") for _ in range(count)]
            clients = []
            for text in texts:
                body = json.dumps({"prompt": text, "websocket": True})
                command = [debian_tools.path("curl"), "-sN", "-H", f"Authorization: Bearer {user.access}", "-H", "Accept: text/event-stream"]
                clients.append(subprocess.Popen([*command, "--json", body, service.url + PROMPTS], stdout=subprocess.PIPE))
            for process in clients:
                assert process.stdout.readline() == b"event: started\n"
            wait_until(lambda: upstream.asked.total() == count, DEADLINE, "all calls arrive")
            for process in clients:
                process.kill()
                process.wait()
                process.stdout.close()
            upstream.release()
            wait_until(lambda: listener.told("prompt_completed").total() == count, DEADLINE, lambda: f"events: {listener.ends}")
            rows = by_text(http, user)
            assert set(rows) == set(texts)
            for text, row in rows.items():
                assert (row["status"], row["response"]) == ("completed", answer_to(text))
                assert_found(http, user, row)
            assert listener.told("prompt_completed") == Counter(row["id"] for row in rows.values())
            assert upstream.asked == Counter(texts)
            assert not listener.told("prompt_failed")
    print(f"{count} clients killed in mid-stream: {len(rows)} rows completed, {upstream.asked.total()} calls, {count} events; 0 lost, 0 doubled")


class Posts:
    """Posts in flight while the service is killed: with a key (whole and streamed), and streamed
    without a key."""

    KEYED, STREAMED = 12, 6

    def __init__(self, service, user):
        self.service, self.user = service, user
        self.keyed = {new_text("keyed"): number % 2 == 0 for number in range(self.KEYED)}
        # The id at the start of a stream, if it came, and the stream's end.
        self.streamed = {new_text("streamed"): None for _ in range(self.STREAMED)}
        self.ended, self.acknowledged = {}, {}
        self.pool = ThreadPoolExecutor(self.KEYED + self.STREAMED)
        self.futures = [self.pool.submit(self.post, text, True, streams) for text, streams in self.keyed.items()]
        self.futures += [self.pool.submit(self.post, text, False, True) for text in self.streamed]

    def post(self, text, has_key, streams):
        headers = {**self.user.auth} | ({"Idempotency-Key": text.split()[1]} if has_key else {})
        body = {"prompt": text, "websocket": True, "stream": streams}
        try:
            with client(self.service) as http, http.stream("POST", PROMPTS, json=body, headers=headers) as answer:
                if not streams:
                    answer.read()
                    assert answer.status_code == 201, answer.text
                    self.acknowledged[text] = answer.json()
                    return
                assert answer.status_code == 200, answer.read()
                for name, data in events_of(answer):
                    if name == "started" and not has_key:
                        self.streamed[text] = data["id"]
                    elif name in ("completed", "failed"):
                        self.ended[text] = name
                        if name == "completed":
                            self.acknowledged[text] = data
        except httpx.TransportError:
            # The kill.
            return

    def join(self):
        self.pool.shutdown()
        for future in self.futures:
            future.result()

    def repeat(self, http, text):
        """Repeats a post with its key until it gets 201; returns whether it was a replay."""
        body = {"prompt": text, "websocket": True}

        def answered():
            answer = http.post(PROMPTS, json=body, headers={**self.user.auth, "Idempotency-Key": text.split()[1]})
            assert answer.status_code in (201, 409), answer.text
            return answer if answer.status_code == 201 else None

        answer = wait_until(answered, DEADLINE, f"{text} is answered", interval=0.2)
        return answer.json(), "idempotent-replayed" in answer.headers


def test_a_service_killed_during_calls_leaves_one_row_for_each_post_and_calls_at_most_once_more():
    pauses = random.Random(4)
    total = Counter()
    with Upstream(seconds=0.4) as upstream, Service(**SETTINGS, OPENAI_BASE_URL=upstream.url) as first:
        settings = {**SETTINGS, "OPENAI_BASE_URL": upstream.url, "data_dir": first.data_dir, "secret_key": first.secret_key}
        with client(first) as http:
            user = make_user(http)
        first.stop()
        for _ in range(ROUNDS):
            with Service(**settings) as service:
                with Listener(service, user) as before:
                    posts = Posts(service, user)
                    # This does not wait for a result: by then some posts have responses and some
                    # have not.
                    kinds = (posts.keyed, posts.streamed)
                    wait_until(lambda: all(any(upstream.asked[text] for text in kind) for kind in kinds), DEADLINE, "a call of each kind arrives")
                    time.sleep(pauses.uniform(0.0, 0.6))
                    service.kill()
                    posts.join()
            with Service(**settings) as service, client(service) as http, Listener(service, user) as after:
                # A start that takes longer than the lease ends calls before a socket is open, so
                # their events may reach nobody.
                unheard = {row["id"] for row in list_prompts(http, user) if row["status"] == "failed"}
                with ThreadPoolExecutor(Posts.KEYED) as pool:
                    repeated = dict(zip(posts.keyed, pool.map(lambda text: posts.repeat(http, text), posts.keyed)))
                known = [id for id in posts.streamed.values() if id is not None]

                def running():
                    return [row for row in list_prompts(http, user) if row["status"] == "running"]

                wait_until(lambda: not running(), DEADLINE, lambda: f"no row is running: {running()}")
                rows = by_text(http, user)
                for text in posts.keyed:
                    row, (answer, _) = rows[text], repeated[text]
                    assert (row["status"], row["response"], row["id"]) == ("completed", answer_to(text), answer["id"])
                    assert 1 <= upstream.asked[text] <= 2, (text, upstream.asked[text])
                    if text in posts.acknowledged:
                        assert posts.acknowledged[text] == answer and upstream.asked[text] == 1
                for text, id in posts.streamed.items():
                    assert upstream.asked[text] <= 1
                    if id is not None:
                        assert rows[text]["id"] == id
                    if text in posts.acknowledged:
                        assert rows[text]["response"] == posts.acknowledged[text]["response"]
                    elif text in rows:
                        # Failed because it expired, or stored in the moment before the kill.
                        assert (rows[text]["status"], rows[text]["error"]) in (("failed", "interrupted"), ("completed", None))
                assert len(known) == len([id for id in known if id in {row["id"] for row in rows.values()}])
                # An event that was not yet sent when the process died is lost; otherwise each end
                # is sent once.
                again = [rows[text]["id"] for text in posts.keyed if not repeated[text][1]]
                failed = [rows[text]["id"] for text in posts.streamed if text in rows and rows[text]["status"] == "failed"]
                wait_until(
                    lambda: set(after.told("prompt_completed")) >= set(again) and set(after.told("prompt_failed")) >= set(failed) - unheard,
                    DEADLINE, lambda: f"the ends are told: {after.ends}",
                )
                ends = before.ends + after.ends
                # For a call that expired before its repetition, the first event is a failure, which
                # is correct. No outcome is sent twice.
                assert not [end for end, count in ends.items() if count > 1], ends
                total["rows"] += sum(text in rows for text in (*posts.keyed, *posts.streamed))
                total["calls"] += sum(upstream.asked[text] for text in (*posts.keyed, *posts.streamed))
                total["called again"] += sum(upstream.asked[text] == 2 for text in posts.keyed)
                total["lapsed streams"] += len(failed)
                total["events"] += ends.total()
                assert not [line for line in service.log() if line.get("level") == "ERROR"], service.output()
    posted = ROUNDS * (Posts.KEYED + Posts.STREAMED)
    print(f"{ROUNDS} kills in mid-call, {posted} posts: {dict(total)}; each key ended in one row; 0 lost, 0 doubled")


def test_an_upstream_restarted_under_load_loses_and_doubles_nothing():
    clients, each = 8, 12
    statuses = Counter()
    with Upstream(seconds=0.05) as upstream, Service(**SETTINGS, OPENAI_BASE_URL=upstream.url) as service, client(service) as http:
        user = make_user(http)
        answered = {}

        # Copies, because other threads count at the same time.
        def calls():
            return sum(dict(upstream.asked).values())

        def failed_so_far():
            return sum(count for status, count in dict(statuses).items() if status not in (201, "completed"))

        def post_all(number):
            with client(service) as mine:
                for turn in range(each):
                    text = new_text(f"client-{number}")
                    headers = {**user.auth, "Idempotency-Key": text.split()[1]}
                    body = {"prompt": text, "websocket": True, "stream": (number + turn) % 2 == 0}
                    while text not in answered:
                        with mine.stream("POST", PROMPTS, json=body, headers=headers) as answer:
                            if answer.headers["content-type"] == "text/event-stream":
                                *_, (name, data) = events_of(answer)
                                statuses[name] += 1
                                status = 201 if name == "completed" else 502
                            else:
                                answer.read()
                                status, data = answer.status_code, answer.json()
                                statuses[status] += 1
                        assert status in (201, 502, 503, 504), (status, data)
                        if status == 201:
                            answered[text] = data
                        else:
                            # A pause, as clients make.
                            time.sleep(0.25)

        with Listener(service, user) as listener, ThreadPoolExecutor(clients) as pool:
            futures = [pool.submit(post_all, number) for number in range(clients)]
            for part in (1, 2):
                wait_until(lambda: len(answered) >= part * clients * each // 3, DEADLINE, "a third of the answers")
                # Otherwise all posts could have responses before the upstream stops.
                upstream.hold()
                asked = calls()
                wait_until(lambda: calls() > asked, DEADLINE, "another call is in flight")
                failures = failed_so_far()
                upstream.stop()
                upstream.release()
                wait_until(lambda: failed_so_far() > failures, DEADLINE, "a failure is told")
                upstream.start()
            for future in futures:
                future.result()
            rows = list_prompts(http, user)
            completed = [row for row in rows if row["status"] == "completed"]
            failed = [row for row in rows if row["status"] == "failed"]
            assert len(completed) + len(failed) == len(rows)
            wait_until(lambda: listener.ends.total() >= len(rows), DEADLINE, lambda: f"{len(rows)} ends are told: {listener.ends.total()}")
            assert Counter(row["prompt"] for row in completed) == Counter(answered.keys())
            assert all(row["response"] == answer_to(row["prompt"]) == answered[row["prompt"]]["response"] for row in completed)
            assert listener.told("prompt_completed") == Counter(row["id"] for row in completed)
            assert listener.told("prompt_failed") == Counter(row["id"] for row in failed)
            told_failed = sum(count for status, count in statuses.items() if status not in (201, "completed"))
            assert told_failed == len(failed)
            # A response may be lost on its way after it was written. After a response that arrived,
            # the upstream is not asked again.
            assert all(upstream.answered[text] >= 1 for text in answered)
            assert sum(upstream.answered.values()) <= len(completed) + len(failed)
            for row in completed[:: max(1, len(completed) // 8)]:
                assert_found(http, user, row)
            assert post_prompt(http, user, "and on it goes").status_code == 201
    print(
        f"upstream restarted twice under load: {len(answered)} prompts answered once each, {len(failed)} failed attempts kept, "
        f"{upstream.asked.total()} calls, {len(rows)} events; 0 lost, 0 doubled"
    )
