"""Starts of the service on Postgres and Redis, and the errors of starts that fail."""

import json
import os
import secrets
import socket
import threading
from contextlib import contextmanager

import machine
import pytest
from conftest import SOCKET, assert_healthy, client, list_prompts, make_user, post_prompt
from replicas import Cluster, database_of
from running_service import THROTTLES_OFF, Service, run, wait_until
from servers import TIED, Postgres, Redis, free_port
from websockets.sync.client import connect

# Seconds in which a service that cannot start must report it.
PATIENCE = 30


@pytest.fixture(scope="module")
def postgres():
    with Postgres() as running:
        yield running


@pytest.fixture(scope="module")
def redis():
    with Redis() as running:
        yield running


@pytest.fixture
def make():
    """A maker of services without local data, not yet started."""
    made = []

    def make(**settings):
        service = Service(command=TIED, **{**THROTTLES_OFF, **settings})
        del service.environment["DATA_DIR"]
        made.append(service)
        return service

    yield make
    for service in made:
        service.close()


def assert_refuses_to_start(service, setting, *said, secret=()):
    """The process ends by itself, with an error status and one line that names the setting and
    contains no secret."""
    service.launch()
    status = service.wait(PATIENCE)
    assert status > 0, f"ended with {status}\n{service.output()}"
    lines = [line for line in service.stderr().splitlines() if line.strip()]
    assert len(lines) == 1, service.output()
    assert lines[0].startswith(f"error: {setting}: "), lines[0]
    for word in said:
        assert word in lines[0], lines[0]
    for word in secret:
        assert word not in service.written("stdout") + service.stderr(), service.output()


def test_replicas_that_start_together_on_an_empty_database_migrate_it_once(postgres, redis):
    with Cluster(4, postgres, redis, **THROTTLES_OFF) as cluster:
        for replica in cluster.replicas:
            with client(replica) as http:
                assert_healthy(http)
            assert not (replica.folder / "data").exists(), "nothing is kept beside Postgres"
            assert replica.stop() == 0
        # The server closes its ends of them after a while.
        wait_until(lambda: cluster.connections() == 0, 30, "no connection is left")


def test_replicas_work_on_a_newer_redis(postgres):
    try:
        redis = Redis("redis7")
    except RuntimeError as reason:
        machine.missing("redis-server", reason)
    with redis, Cluster(2, postgres, redis, PROMPT_THROTTLE="1/min") as cluster, client(cluster.replicas[0]) as here, client(cluster.replicas[1]) as there:
        user = make_user(here)
        with connect(f"{cluster.replicas[1].ws_url}{SOCKET}?token={user.access}") as events:
            events.recv(timeout=10)
            posted = post_prompt(here, user, "heard on the other", websocket=True)
            assert posted.status_code == 201, posted.text
            assert json.loads(events.recv(timeout=10))["data"] == posted.json()
        assert post_prompt(there, user, "at once again").status_code == 429
        ticket = here.post("/api/auth/ws-ticket/", headers=user.auth).json()["ticket"]
        with connect(f"{cluster.replicas[1].ws_url}{SOCKET}?ticket={ticket}") as events:
            events.recv(timeout=10)


def test_the_service_creates_the_extension_itself_if_it_has_the_right(postgres, make):
    name = f"d{secrets.token_hex(6)}"
    postgres.psql(f"CREATE DATABASE {name}")
    service = make(DATABASE_URL=postgres.url(name))
    with service, client(service) as http:
        assert_healthy(http)


def test_one_server_runs_on_postgres_alone_and_a_second_is_refused_until_it_stops(postgres, make):
    url = postgres.make_database()
    key = secrets.token_hex(32)
    first = make(DATABASE_URL=url, SECRET_KEY=key)
    with first, client(first) as http:
        user = make_user(http)
        created = post_prompt(http, user, "the only one")
        assert created.status_code == 201, created.text
        assert_refuses_to_start(make(DATABASE_URL=url), "DATABASE_URL", "REDIS_URL", secret=[postgres.password])
        assert_healthy(http)
        # The process cannot even release its lock.
        first.kill()
        # The server notices after a while, and the next process waits for 3 s only.
        wait_until(lambda: postgres.connections(database_of(url)) == 0, 30, "the server knows that it is gone")
        second = make(DATABASE_URL=url, SECRET_KEY=key)
        with second, client(second) as http:
            assert [item["prompt"] for item in list_prompts(http, user)] == ["the only one"]
            assert second.stop() == 0


def test_replicas_and_a_server_without_redis_refuse_to_run_together(postgres, redis, make):
    url = postgres.make_database()
    with make(DATABASE_URL=url) as alone:
        assert_refuses_to_start(make(DATABASE_URL=url, REDIS_URL=redis.url), "DATABASE_URL", "REDIS_URL", secret=[postgres.password])
        assert alone.stop() == 0
    wait_until(lambda: postgres.connections(database_of(url)) == 0, 30, "the server knows that it is gone")
    with make(DATABASE_URL=url, REDIS_URL=redis.url):
        assert_refuses_to_start(make(DATABASE_URL=url), "DATABASE_URL", "REDIS_URL", secret=[postgres.password])


def test_redis_without_postgres_is_refused(redis, make):
    assert_refuses_to_start(make(REDIS_URL=redis.url), "REDIS_URL", "DATABASE_URL", secret=[redis.password])


def test_replicas_without_a_common_key_are_refused(postgres, redis, make):
    service = make(DATABASE_URL=postgres.make_database(), REDIS_URL=redis.url)
    del service.environment["SECRET_KEY"]
    assert_refuses_to_start(service, "SECRET_KEY", secret=[postgres.password, redis.password])


@contextmanager
def silent_server():
    """A port that accepts connections and never sends anything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = []

        def take():
            try:
                while True:
                    taken.append(listener.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=take)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in taken:
            connection.close()


@contextmanager
def nobody():
    yield free_port()


DATABASES = {
    "nobody listens": lambda postgres, redis, port: postgres.url("postgres", port=port),
    "silence": lambda postgres, redis, port: postgres.url("postgres", port=port),
    "another protocol": lambda postgres, redis, port: postgres.url("postgres", port=redis.port),
    "wrong password": lambda postgres, redis, port: postgres.url("postgres", password="hunter2-wrong"),
    "no such database": lambda postgres, redis, port: postgres.url("nowhere"),
    "no such host": lambda postgres, redis, port: f"postgres://u:{postgres.password}@nowhere.invalid/x",
    "no TLS there": lambda postgres, redis, port: postgres.url("postgres") + "?sslmode=require",
    "unknown option": lambda postgres, redis, port: postgres.url("postgres") + "?sslmode=perhaps",
    "no URL": lambda postgres, redis, port: f"postgres://{postgres.password}@:x:y/",
}


@pytest.mark.parametrize("problem", DATABASES)
def test_a_database_url_that_leads_nowhere_is_refused_in_one_line_without_its_password(postgres, redis, make, problem):
    with silent_server() if problem == "silence" else nobody() as port:
        url = DATABASES[problem](postgres, redis, port)
        assert_refuses_to_start(make(DATABASE_URL=url), "DATABASE_URL", secret=[postgres.password, "hunter2"])


def test_a_database_without_pgvector_is_refused_with_the_fix(postgres, make):
    url = postgres.make_database(extension=False)
    assert_refuses_to_start(make(DATABASE_URL=url), "DATABASE_URL", "CREATE EXTENSION vector", secret=[postgres.password])


def test_a_standby_is_refused_with_the_fix(make):
    with Postgres() as postgres:
        url = postgres.make_database()
        with make(DATABASE_URL=url) as service:
            assert service.stop() == 0
        assert postgres.stop() is None
        (postgres.data / "standby.signal").touch()
        postgres.start()
        refused = make(DATABASE_URL=url)
        assert_refuses_to_start(refused, "DATABASE_URL", "standby", "target_session_attrs=read-write", secret=[postgres.password])
        check = run("check", folder=refused.folder, **refused.environment)
        assert "fault store: DATABASE_URL: " in check.stdout and "standby" in check.stdout, check


REDISES = {
    "nobody listens": lambda postgres, redis, port: redis.url_at(port),
    "silence": lambda postgres, redis, port: redis.url_at(port),
    "another protocol": lambda postgres, redis, port: redis.url_at(postgres.port),
    "wrong password": lambda postgres, redis, port: f"redis://:hunter2-wrong@127.0.0.1:{redis.port}/0",
    "no password": lambda postgres, redis, port: f"redis://127.0.0.1:{redis.port}/0",
    "no such database": lambda postgres, redis, port: redis.url.replace("/0", "/9999"),
    "no such host": lambda postgres, redis, port: f"redis://:{redis.password}@nowhere.invalid/0",
    "no TLS there": lambda postgres, redis, port: redis.url.replace("redis://", "rediss://"),
    "no URL": lambda postgres, redis, port: f"redis://{redis.password}@:x:y/",
}


@pytest.mark.parametrize("problem", REDISES)
def test_a_redis_url_that_leads_nowhere_is_refused_in_one_line_without_its_password(postgres, redis, make, problem):
    with silent_server() if problem == "silence" else nobody() as port:
        url = REDISES[problem](postgres, redis, port)
        service = make(DATABASE_URL=postgres.make_database(), REDIS_URL=url)
        assert_refuses_to_start(service, "REDIS_URL", secret=[postgres.password, redis.password, "hunter2"])


def test_secrets_can_come_from_files(postgres, redis, make, tmp_path):
    (tmp_path / "database").write_text(postgres.make_database() + "\n")
    (tmp_path / "redis").write_text(redis.url + "\n")
    with make(DATABASE_URL_FILE=str(tmp_path / "database"), REDIS_URL_FILE=str(tmp_path / "redis")) as service, client(service) as http:
        assert_healthy(http)


@pytest.mark.parametrize("level", ["debug", "trace"])
def test_no_log_contains_a_servers_password_even_when_the_servers_fail(make, level):
    with Postgres() as postgres, Redis() as redis:
        url = postgres.make_database()
        service = make(DATABASE_URL=url, REDIS_URL=redis.url, RUST_LOG=level)
        with service, client(service) as http:
            user = make_user(http)
            text = f"nobody's business {user.username}"
            for server in (redis, postgres):
                server.stop()
                post_prompt(http, user, text)
                http.get("/readyz")
                server.start()
            service.wait_until_ready()
            assert post_prompt(http, user, text).status_code == 201
            metrics = http.get("/metrics").text
            assert service.stop() == 0
            told = service.written("stdout") + service.stderr() + metrics
    for secret in (postgres.password, redis.password, database_of(url), text, user.access):
        place = told.find(secret)
        assert place < 0, told[max(0, place - 300) : place + 60]


def test_postgres_started_by_root_runs_as_another_user(postgres):
    if os.geteuid() != 0:
        machine.missing("root", "only root can be somebody else")
    assert os.stat(f"/proc/{postgres.process.pid}").st_uid != 0
