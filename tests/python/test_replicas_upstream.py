"""A replica dies during calls: another replica ends its calls, and serves the repeated posts."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from conftest import PROMPTS, client, make_user
from replicas import Cluster
from running_service import THROTTLES_OFF, wait_until
from scripted_upstream import Upstream, answer_to
from servers import Postgres, Redis
from test_upstream_crash import DEADLINE, Listener, Posts, by_text, events_of, new_text


@pytest.fixture(scope="module")
def upstream():
    with Upstream(seconds=0.4) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(upstream):
    settings = {**THROTTLES_OFF, "CALL_LEASE": "6s", "OPENAI_BASE_URL": upstream.url, "REGISTRATION": "open"}
    with Postgres() as postgres, Redis() as redis, Cluster(2, postgres, redis, **settings) as running:
        yield running


def test_a_response_of_one_replica_is_readable_whole_on_the_other(cluster, upstream):
    one, other = cluster.replicas
    with client(one) as here, client(other) as there:
        user = make_user(here)
        text = new_text("read elsewhere")
        upstream.hold()
        headers = {**user.auth, "Accept": "text/event-stream"}
        with here.stream("POST", PROMPTS, json={"prompt": text}, headers=headers) as answer:
            events = events_of(answer)
            name, data = next(events)
            assert name == "started"
            shown = there.get(f"{PROMPTS}/{data['id']}", headers=user.auth).json()
            assert (shown["status"], shown["response"]) == ("running", None)
            with there.stream("GET", f"{PROMPTS}/{data['id']}", headers=headers) as reading:
                elsewhere = events_of(reading)
                assert next(elsewhere) == ("started", data)
                upstream.release()
                ends = [list(events), list(elsewhere)]
        for end in ends:
            assert "".join(data["text"] for name, data in end if name == "delta") == answer_to(text)
            assert end[-1] == ends[0][-1] and end[-1][0] == "completed"


def test_a_replica_killed_during_calls_leaves_one_row_for_each_post(cluster, upstream):
    dying, other = cluster.replicas
    with client(other) as http:
        user = make_user(http)
        with Listener(other, user) as listener:
            # The last pieces wait, so that all calls are running.
            upstream.hold()
            posts = Posts(dying, user)
            texts = (*posts.keyed, *posts.streamed)
            wait_until(lambda: sum(upstream.asked[text] for text in texts) == len(texts), DEADLINE, "the calls arrive")
            dying.kill()
            posts.join()
            upstream.release()
            killed = time.monotonic()
            with ThreadPoolExecutor(Posts.KEYED) as pool:
                repeated = dict(zip(posts.keyed, pool.map(lambda text: posts.repeat(http, text), posts.keyed)))
            took = time.monotonic() - killed
            wait_until(lambda: all(row["status"] != "running" for row in by_text(http, user).values()), DEADLINE, "no row is running")
            rows = by_text(http, user)
            for text in posts.keyed:
                row = rows[text]
                assert (row["status"], row["response"], row["id"]) == ("completed", answer_to(text), repeated[text][0]["id"])
                assert 1 <= upstream.asked[text] <= 2
            for text in posts.streamed:
                assert upstream.asked[text] <= 1
                if text in rows:
                    assert rows[text]["status"] == "failed" or rows[text]["response"] == answer_to(text)
            ended = {row["id"]: f"prompt_{row['status']}" for row in rows.values()}
            wait_until(lambda: all((event, id) in listener.ends for id, event in ended.items()), DEADLINE, lambda: f"{ended}: {listener.ends}")
            assert max(listener.ends.values()) == 1, listener.ends
    calls = sum(upstream.asked[text] for text in texts)
    print(f"a replica killed with {len(texts)} calls in flight: {len(rows)} rows, {calls} calls, {listener.ends.total()} events; served again after {took:.1f} s")
    dying.start()
    with client(dying) as http:
        assert http.get("/readyz").status_code == httpx.codes.OK
