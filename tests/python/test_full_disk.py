"""The service while the disk of the embedded store is full, and its recovery."""

import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import httpx
import machine
import pytest
from conftest import PROMPTS, REFRESH, SIMILAR, client, list_prompts, make_user, post_prompt
from running_service import THROTTLES_OFF, wait_until
from small_disk import SmallDisk, Unavailable

LOGOUT = "/api/auth/logout/"

# Seconds within which the service notices that the disk is full or has room. It looks every 3.
NOTICES = 20

# Seconds after which a caller leaves. A post whose outcome finds no room has its answer after 30.
LEAVES = 2


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    try:
        disk = SmallDisk(folder)
    except Unavailable:
        machine.missing("namespaces", "users may not make them on this system")
    with disk:
        yield disk


@contextmanager
def running(disk, **settings):
    with disk.service(**THROTTLES_OFF, **settings) as service, client(service) as http:
        yield service, http


def text(number):
    # Few words, so that embedding is quick.
    return f"filling {number} " + "x" * 12_000


def post_or_leave(http, user, number):
    """The id of the stored prompt, or `None`: the post was refused, or its outcome waits for room.
    The caller does not wait for the latter until it gets its 503."""
    try:
        answer = http.post(PROMPTS, json={"prompt": text(number)}, headers=user.auth, timeout=LEAVES)
    except httpx.ReadTimeout:
        return None
    assert answer.status_code in (201, 503), answer.text
    return answer.json()["id"] if answer.status_code == 201 else None


def fill(http, user):
    """Posts until posts are refused. Returns the ids of the stored prompts."""
    stored, refused = [], 0
    for number in range(5000):
        prompt = post_or_leave(http, user, number)
        if prompt is not None:
            stored.append(prompt)
            refused = 0
        else:
            refused += 1
            if refused == 5:
                return stored
    raise AssertionError("the disk is not full")


def assert_kept(http, user, acknowledged, others):
    """Each acknowledged prompt is stored with its answer. Of the posts that got 503, at most
    `others` are stored too: those whose running row still found room, and whose outcome did not."""
    listed = list_prompts(http, user)
    completed = {item["id"] for item in listed if item["status"] == "completed"}
    assert set(acknowledged) <= completed, set(acknowledged) - completed
    more = {item["id"]: item["status"] for item in listed if item["id"] not in acknowledged}
    assert len(more) <= others, more


def store_part(http):
    answer = http.get("/readyz")
    return answer.status_code, answer.json()["parts"]["store"]


def assert_full(service, http):
    wait_until(lambda: store_part(http) == (503, "read_only"), NOTICES, lambda: f"{store_part(http)}")
    up = 'backend_up{backend="store"}'
    wait_until(lambda: service.metric(up) == 0, NOTICES, "the metric says that the store is not well")
    assert http.get("/healthz").status_code == 200


def assert_ready(service, http):
    wait_until(lambda: store_part(http) == (200, "ok"), NOTICES, lambda: f"{store_part(http)}\n{service.output()}")
    up = 'backend_up{backend="store"}'
    wait_until(lambda: service.metric(up) == 1, NOTICES, "the metric says that the store is well")


def delete(http, user, number):
    return http.delete(f"{PROMPTS}/{number}", headers=user.auth).status_code


def assert_sound(disk, tmp_path):
    shutil.copytree(disk.outside, tmp_path / "kept")
    [database] = (tmp_path / "kept").glob("*.sqlite3")
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_disk_filled_by_posts_is_reported_and_deletes_make_room_for_posts(disk, tmp_path):
    with running(disk) as (service, http):
        user, leaving = make_user(http), make_user(http)
        stored = fill(http, user)
        assert_full(service, http)

        # Operations that need no room still work.
        assert_kept(http, user, set(stored), 5)
        found = http.get(SIMILAR, params={"q": "filling"}, headers=user.auth)
        assert found.status_code == 200, found.text
        out = http.post(LOGOUT, json={"refresh": leaving.refresh}, headers=leaving.auth)
        assert out.status_code < 300, out.text
        assert http.post(REFRESH, json={"refresh": leaving.refresh}).status_code == 401

        # Several rounds: each uses the reserve and restores it.
        for _ in range(3):
            gone, stored = stored[:12], stored[12:]
            assert [delete(http, user, number) for number in gone] == [204] * len(gone)
            assert_ready(service, http)
            more = fill(http, user)
            assert len(more) >= len(gone) // 2, (len(more), len(gone))
            stored += more
            assert_full(service, http)
        assert_kept(http, user, set(stored), 4 * 5)
        # Until the last one: no operation waits for room for ever.
        assert [delete(http, user, number) for number in stored] == [204] * len(stored)
        assert_ready(service, http)
        assert post_prompt(http, user, text(0)).status_code == 201
        assert service.stop() == 0
    assert_sound(disk, tmp_path)


def test_a_process_killed_on_a_full_disk_starts_again_and_deletes(disk, tmp_path):
    with running(disk) as (service, http):
        user = make_user(http)
        stored = fill(http, user)
        disk.fill()
        service.kill()
        key = service.secret_key
    service = disk.service(secret_key=key, **THROTTLES_OFF).launch()
    try:
        wait_until(service.listening, NOTICES, "the service listens")
        service.address = service.listening()
        with client(service) as http:
            assert_kept(http, user, set(stored), 5)
            assert_full(service, http)
            for number in stored[:12]:
                assert delete(http, user, number) == 204
            assert_kept(http, user, set(stored[12:]), 5)
            assert_ready(service, http)
            assert post_prompt(http, user, text(0)).status_code == 201
            assert service.stop() == 0
    finally:
        service.close()
    assert_sound(disk, tmp_path)


def test_a_disk_filled_by_another_program_is_reported_without_a_post_and_recovers(disk, tmp_path):
    with running(disk) as (service, http):
        user = make_user(http)
        stored = [post_prompt(http, user, text(number)).json()["id"] for number in range(30)]
        disk.fill()
        assert_full(service, http)
        for number in stored[:10]:
            assert delete(http, user, number) == 204
        disk.fill()
        assert delete(http, user, stored[10]) == 204
        disk.make_room()
        # Nobody writes, so the service must notice by itself.
        assert_ready(service, http)
        assert post_prompt(http, user, text(0)).status_code == 201
        assert [item["id"] for item in list_prompts(http, user)][1:] == stored[:10:-1]
        assert service.stop() == 0
    assert_sound(disk, tmp_path)


def test_deletes_among_many_posts_on_a_full_disk_succeed(disk, tmp_path):
    with running(disk) as (service, http):
        user = make_user(http)
        stored = fill(http, user)
        gone, kept = stored[::2], set(stored[1::2])

        with ThreadPoolExecutor(8) as pool:
            posts = pool.map(lambda number: post_or_leave(http, user, number), range(len(gone)))
            deletes = pool.map(lambda number: delete(http, user, number), gone)
            assert set(deletes) == {204}
            kept |= {number for number in posts if number is not None}
        assert_kept(http, user, kept, 5 + len(gone))
        assert service.stop() == 0
    assert_sound(disk, tmp_path)


def test_a_start_on_a_full_disk_is_refused_with_one_line(disk):
    disk.fill()
    service = disk.service()
    del service.environment["SECRET_KEY"]
    service.launch()
    try:
        assert service.wait(NOTICES) == 1
        lines = service.stderr().splitlines()
        assert len(lines) == 1 and ("full" in lines[0] or "No space left" in lines[0]), lines
    finally:
        service.close()
