"""Password hashing is expensive, and must not delay other requests."""

import threading
from concurrent.futures import ThreadPoolExecutor

from conftest import LOGIN, PASSWORD, assert_json_error, client, make_user, post_prompt

LOGINS = 50


def test_fifty_logins_at_once_leave_health_checks_and_posts_working(service, http):
    users = [make_user(http) for _ in range(2)]
    poster = make_user(http)
    start = threading.Barrier(LOGINS + 2)
    busy = threading.Event()
    busy.set()

    def login(number):
        with client(service) as mine:
            # Hashing gets the processor time that other work leaves.
            mine.timeout = 300
            start.wait()
            return mine.post(LOGIN, json={"username": users[number % 2].username, "password": PASSWORD})

    def meanwhile(request):
        answers = []
        with client(service) as mine:
            start.wait()
            # At least some requests, however quickly the logins are done.
            while busy.is_set() or len(answers) < 5:
                answers.append(request(mine).status_code)
        return answers

    with ThreadPoolExecutor(LOGINS + 2) as pool:
        health = pool.submit(meanwhile, lambda mine: mine.get("/healthz"))
        posts = pool.submit(meanwhile, lambda mine: post_prompt(mine, poster, "posted while others log in"))
        try:
            logins = list(pool.map(login, range(LOGINS)))
        finally:
            # Otherwise, after a failed login, the other tasks would never end.
            busy.clear()
        assert set(health.result()) == {200}
        assert set(posts.result()) == {201}
    # The queue of hashes is bounded: beyond it, a login gets 503 with `Retry-After` at once.
    statuses = [answer.status_code for answer in logins]
    assert set(statuses) <= {200, 503} and 200 in statuses, statuses
    for answer in logins:
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) >= 1
            assert_json_error(answer)
