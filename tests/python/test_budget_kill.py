"""A service that is killed in the middle of calls: what was spent stays counted once, and what was
reserved is free again.

BUDGET_KILLS sets how often it is killed (3; `make soak` says 100).
"""

import os
import random
import threading
import time

import httpx
from api_keys import make_key
from conftest import embedded
from ledger import MODEL, PICODOLLARS, check_ledger, open_sqlite, running_calls, write_prices
from openai_upstream import Upstream
from running_service import THROTTLES_OFF, Service, wait_until

pytestmark = embedded

ROUNDS = int(os.environ.get("BUDGET_KILLS", "3"))
CLIENTS = 8
# Seconds: the shortest that a busy machine keeps renewing.
LEASE = 6
DEADLINE = 60


class Calls:
    """Clients that make calls, whole and streamed in turn, until the service is killed."""

    def __init__(self, service, key):
        self.service, self.key = service, key
        self.answered, self.unexpected = 0, []
        self.threads = [threading.Thread(target=self.call, args=(number,)) for number in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def call(self, number):
        streams = number % 2 == 0
        body = {"model": "paced-5x10" if streams else MODEL, "stream": streams, "max_tokens": 20, "messages": [{"role": "user", "content": "How much?"}]}
        try:
            with httpx.Client(base_url=self.service.url, timeout=DEADLINE, headers={"Authorization": f"Bearer {self.key}"}) as http:
                while True:
                    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                        answer.read()
                        if answer.status_code != 200:
                            self.unexpected.append(answer.text)
                            return
                        self.answered += 1
        except httpx.TransportError:
            return

    def join(self):
        for thread in self.threads:
            thread.join()
        assert not self.unexpected, self.unexpected[:3]


def test_after_kill_9_rows_sums_and_counters_agree_and_nothing_stays_reserved(tmp_path):
    settings = {
        **THROTTLES_OFF, "V1_THROTTLE": "off", "CALL_LEASE": f"{LEASE}s", "PRICES_FILE": str(write_prices(tmp_path)), "BUDGET": "1000.00/month",
    }
    pauses, answered = random.Random(7), 0
    with Upstream() as upstream, Service(OPENAI_BASE_URL=upstream.url, OPENAI_MODEL=MODEL, **settings) as first:
        key = make_key(first)
        first.kill()

        def restart():
            return Service(data_dir=first.data_dir, secret_key=first.secret_key, OPENAI_BASE_URL=upstream.url, OPENAI_MODEL=MODEL, **settings)

        for _ in range(ROUNDS):
            with restart() as service:
                calls = Calls(service, key)
                wait_until(lambda: calls.answered >= CLIENTS // 2, DEADLINE, lambda: f"first answers: {calls.unexpected}")
                # This does not wait for a result: the kill must come at a random moment of the
                # work.
                time.sleep(pauses.uniform(0.0, 0.1))
                service.kill()
                calls.join()
                answered += calls.answered
        with restart() as last:
            with open_sqlite(last) as database:
                wait_until(lambda: running_calls(database) == 0, DEADLINE, "the leases of killed calls expire", interval=0.2)
                rows, cost = check_ledger(database, tracks_service=True)
            assert last.stop() == 0
    # A call that was answered is metered. One that was killed may be, too.
    assert rows >= answered
    print(f"{ROUNDS} kills: {answered} calls answered, {rows} rows that cost {cost / PICODOLLARS:.6f} dollars; sums and counters agree, nothing is reserved")

