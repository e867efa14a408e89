"""Budgets over three replicas: however many clients race, exactly what the budget pays for is
served.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import psycopg
import pytest
from api_keys import ALL_SCOPES, PASSWORD, post
from ledger import MODEL, PICODOLLARS, PRICE, check_ledger, running_calls, write_prices
from openai_upstream import Upstream
from replicas import Cluster
from running_service import THROTTLES_OFF, wait_until
from servers import Postgres, Redis

CLIENTS, CALLS_EACH = 64, 2
# Calls that the budget pays for.
SERVED = 40
# A call costs exactly what it reserves: the answer is cut off here.
TOKENS = 2
BUDGET = f"{SERVED * TOKENS * PRICE:.6f}"
DEADLINE = 60


def make_caller(cluster, budget=None):
    """A new user's key, with a budget if one is given."""
    account = {"username": "racer", "email": "racer@example.org", "password": PASSWORD}
    post(f"{cluster.url}/api/auth/register/", account)
    access = post(f"{cluster.url}/api/auth/login/", account)["access"]
    bounds = {"budget_usd": budget, "budget_period": "month"} if budget else {}
    return post(f"{cluster.url}/api/keys", {"name": "racer", "scopes": ALL_SCOPES, **bounds}, access)["key"]


def race(urls, key):
    """Makes the calls of all clients at once; returns the statuses and codes of their answers."""

    def client(number):
        body = {"model": MODEL, "max_tokens": TOKENS, "stream": number % 2 == 0, "messages": [{"role": "user", "content": "Once upon a time there was"}]}
        seen = []
        with httpx.Client(base_url=urls[number % len(urls)], timeout=DEADLINE, headers={"Authorization": f"Bearer {key}"}) as http:
            for _ in range(CALLS_EACH):
                answer = http.post("/v1/chat/completions", json=body)
                refusal = answer.json()["error"]["code"] if answer.status_code != 200 else None
                seen.append((answer.status_code, refusal, answer.headers.get("x-should-retry")))
        return seen

    with ThreadPoolExecutor(CLIENTS) as pool:
        return [each for seen in pool.map(client, range(CLIENTS)) for each in seen]


@pytest.mark.parametrize("subject", ["key", "service"])
def test_racing_clients_get_exactly_what_the_budget_pays_for(subject, tmp_path):
    settings = {**THROTTLES_OFF, "V1_THROTTLE": "off", "PRICES_FILE": str(write_prices(tmp_path)), "OPENAI_MODEL": MODEL}
    if subject == "service":
        settings["BUDGET"] = f"{BUDGET}/month"
    with Upstream() as upstream, Postgres() as postgres, Redis() as redis, Cluster(3, postgres, redis, OPENAI_BASE_URL=upstream.url, **settings) as cluster:
        key = make_caller(cluster, BUDGET if subject == "key" else None)
        seen = race([replica.url for replica in cluster.replicas], key)
        refused = (429, "insufficient_quota", "false")
        assert {each for each in seen if each != (200, None, None)} == {refused}, seen
        assert seen.count((200, None, None)) == SERVED
        assert len(upstream.chats()) == SERVED, "nothing is asked that the budget does not pay for"
        with psycopg.connect(cluster.database_url, autocommit=True) as database:
            wait_until(lambda: running_calls(database) == 0, DEADLINE, "all calls end")
            rows, cost = check_ledger(database, tracks_service=subject == "service")
    assert (rows, cost) == (SERVED, round(SERVED * TOKENS * PRICE * PICODOLLARS))
    print(json.dumps({"budget of the": subject, "calls": len(seen), "served": SERVED, "refused": len(seen) - SERVED}))
