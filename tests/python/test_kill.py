"""`kill -9` while clients post: every acknowledged prompt is stored, and the next start needs no
repair.

KILL_ROUNDS sets how often (5; `make soak` says 50).
"""

import os
import random
import re
import shutil
import sqlite3
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from conftest import SIMILAR, client, list_prompts, make_user, post_prompt
from running_service import THROTTLES_OFF, Service, wait_until

CLIENTS = 16
USERS = 4
ROUNDS = int(os.environ.get("KILL_ROUNDS", "5"))

# Words for texts that differ so much that each text is nearest to itself.
SUBJECTS = "bread chess lisbon soil jazz tax planets nursing engines rivers verbs glaciers looms tides beetles bridges".split()


class Posting:
    """Clients that post without pause until the service is killed, and the prompts that it
    acknowledged to each user."""

    def __init__(self, service, users, round_number):
        self.acknowledged = {user.username: {} for user in users}
        self.refused = []
        self.threads = [
            threading.Thread(target=self.post, args=(service, users[number % len(users)], f"{round_number}-{number}"))
            for number in range(CLIENTS)
        ]
        for thread in self.threads:
            thread.start()

    def post(self, service, user, name):
        random_word = random.Random(name)
        with client(service) as http:
            for number in range(1_000_000):
                words = " ".join(random_word.choices(SUBJECTS, k=5))
                text = f"{words} {name}-{number}"
                try:
                    answer = post_prompt(http, user, text)
                except httpx.HTTPError:
                    return
                if answer.status_code == 201:
                    self.acknowledged[user.username][answer.json()["id"]] = text
                elif answer.status_code == 503:
                    # Overload is an allowed response to 16 clients without pause; the client then
                    # waits a little.
                    time.sleep(0.01)
                else:
                    self.refused.append(answer.text)
                    return

    def count(self):
        return sum(len(prompts) for prompts in self.acknowledged.values())

    def join(self):
        for thread in self.threads:
            thread.join()
        assert not self.refused, self.refused[:3]


def assert_intact(service):
    """The database passes SQLite's check in the state that the killed process left."""
    with tempfile.TemporaryDirectory() as folder:
        # A copy, because opening the database is already a recovery.
        copy = Path(shutil.copytree(service.data_dir, Path(folder) / "copy"))
        [database] = service.database_files()
        connection = sqlite3.connect(copy / database.name)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        connection.close()


def assert_started_without_repair(service, http):
    """The start took about as long as on an empty folder, with a wide margin, and logged no
    problem."""
    [seconds] = re.findall(r"^startup_duration_seconds (\S+)$", http.get("/metrics").text, re.MULTILINE)
    # A fraction of a second, whatever the kill left; the rest is for a busy machine.
    assert float(seconds) < 30, seconds
    complaints = [line for line in service.log() if line.get("level") in ("WARN", "ERROR") and "mock" not in line["message"]]
    assert not complaints, service.output()
    return float(seconds)


def assert_stored(http, user, prompts):
    stored = {item["id"]: item["prompt"] for item in list_prompts(http, user)}
    lost = {id: text for id, text in prompts.items() if stored.get(id) != text}
    assert not lost, f"{len(lost)} of {len(prompts)} acknowledged prompts are missing: {list(lost.items())[:3]}"


def assert_found(http, user, prompts):
    def is_found(item):
        id, text = item
        answer = http.get(SIMILAR, params={"q": text, "k": 3}, headers=user.auth)
        assert answer.status_code == 200, answer.text
        return id in [result["id"] for result in answer.json()["results"]]

    # Few enough at once to stay below the service's admission limit.
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(is_found, prompts.items()))
    missing = [item for item, ok in zip(prompts.items(), found) if not ok]
    assert not missing, f"{len(missing)} of {len(prompts)} acknowledged prompts are not found: {missing[:3]}"


def test_an_acknowledged_prompt_survives_kill_9_and_is_found_by_search():
    everything, slowest = {}, 0.0
    settings = {"ACCESS_TOKEN_LIFETIME": "1d", **THROTTLES_OFF}
    # The folder of the first holds the data of all rounds.
    with Service(**settings) as first:
        with client(first) as http:
            users = [make_user(http) for _ in range(USERS)]
        first.kill()
        pauses = random.Random(9)
        for number in range(ROUNDS):
            with Service(data_dir=first.data_dir, secret_key=first.secret_key, **settings) as service:
                posting = Posting(service, users, number)
                wait_until(lambda: posting.count() >= CLIENTS, 60, "the first prompts are acknowledged")
                # This does not wait for a result: the kill must come at a random moment of the
                # work.
                time.sleep(pauses.uniform(0.0, 0.4))
                service.kill()
                posting.join()
                assert_intact(service)
            with Service(data_dir=first.data_dir, secret_key=first.secret_key, **settings) as again, client(again) as http:
                slowest = max(slowest, assert_started_without_repair(again, http))
                for user in users:
                    new = posting.acknowledged[user.username]
                    everything.setdefault(user.username, {}).update(new)
                    assert_found(http, user, new)
                    assert_stored(http, user, everything[user.username])
                assert not [line for line in again.log() if line.get("level") == "ERROR"], again.output()
                assert again.stop() == 0
                assert_intact(again)
    total = sum(len(prompts) for prompts in everything.values())
    assert total >= ROUNDS * CLIENTS
    print(f"{total} acknowledged prompts survived {ROUNDS} kills; the slowest start afterwards took {slowest * 1000:.0f} ms")
