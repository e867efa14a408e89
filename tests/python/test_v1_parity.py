"""Every call of /v1 is kept, found and metered, whatever becomes of its client.

V1_CALLS sets how many mixed calls there are (330; `make soak` says 10000), V1_CANCELLED how many
streams are left in the middle (40; `make soak` says 1000).
"""

import asyncio
import os

from conftest import SIMILAR, client, list_prompts, make_user
from mixed_calls import Call, check_answers, check_rows, check_usage, counts, make_all, mixed, upstreams
from openai_upstream import Upstream
from running_service import THROTTLES_OFF, Service, wait_until

CALLS = int(os.environ.get("V1_CALLS", "330"))
CANCELLED = int(os.environ.get("V1_CANCELLED", "40"))
# Seconds for the calls whose clients have left.
DEADLINE = 120
AT_ONCE = 16
SETTINGS = {**THROTTLES_OFF, "V1_THROTTLE": "off", "ACCESS_TOKEN_LIFETIME": "1d", "OPENAI_MAX_RETRIES": "0"}


def rows_when_ended(http, user, count):
    """All rows of the user, once none runs any more."""

    def ended():
        rows = list_prompts(http, user)
        return rows if len(rows) == count and all(row["status"] != "running" for row in rows) else None

    return wait_until(ended, DEADLINE, "all calls end", interval=0.5)


def check_found(http, user, rows):
    """Each answered row is the nearest to its own text, or as near as another."""
    for row in rows:
        if row["status"] == "completed":
            answer = http.get(SIMILAR, params={"q": row["prompt"], "k": 1}, headers=user.auth)
            [found] = answer.json()["results"]
            assert found["id"] == row["id"] or found["score"] > 0.999, (row, found)


def check_parity(service, urls, calls, upstream):
    """Makes the calls, then checks all that must be true of them."""
    with client(service) as http:
        user = make_user(http)
        asyncio.run(make_all(urls, user.auth, calls, AT_ONCE))
        check_answers(calls)
        rows = rows_when_ended(http, user, len(calls))
        by_text = check_rows(calls, rows)
        check_usage(calls, by_text, upstream.chats())
        check_found(http, user, rows)


def test_mixed_calls_are_kept_as_one_row_each_and_found_and_metered():
    calls = mixed(CALLS)
    with Upstream() as upstream, Service(**SETTINGS, UPSTREAMS=upstreams(upstream.url)) as service:
        check_parity(service, [service.url], calls, upstream)
    print(f"{len(calls)} mixed calls: {len(calls)} rows; {counts(calls)}")


def test_streams_that_are_left_have_the_usage_of_their_upstream():
    calls = [Call("left") for _ in range(CANCELLED)]
    with Upstream() as upstream, Service(**SETTINGS, UPSTREAMS=upstreams(upstream.url)) as service:
        check_parity(service, [service.url], calls, upstream)
    print(f"{len(calls)} streams left in the middle: {len(calls)} rows with the usage of their upstream")
