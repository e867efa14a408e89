"""Stops of the service, and the errors of starts that fail."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

import machine
import pytest
from conftest import PROMPTS, REGISTER, SOCKET, client, list_prompts, make_user, post_prompt
from running_service import BINARY, THROTTLES_OFF, Service, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_service_with_status_0(number):
    with Service() as service:
        service.signal(number)
        assert service.wait() == 0


def test_readyz_is_503_at_once_while_requests_are_still_served_for_the_delay():
    # Long enough for all of this on a busy machine.
    with Service(SHUTDOWN_DELAY="15s", **THROTTLES_OFF) as service, client(service) as http:
        user = make_user(http)
        service.signal(signal.SIGTERM)
        wait_until(lambda: service.get("/readyz") == 503, 10, "/readyz answers 503")
        assert service.process.poll() is None
        assert http.get("/healthz").status_code == 200
        created = post_prompt(http, user, "posted during the delay")
        assert created.status_code == 201, created.text
        assert service.wait() == 0


def test_a_request_in_flight_is_finished_and_stored():
    with Service(**THROTTLES_OFF) as service:
        with client(service) as http:
            user = make_user(http)
        body = b'{"prompt": "sent in two halves"}'
        head = (
            f"POST {PROMPTS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {user.access}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(service.host_and_port, timeout=30) as connection:
            # The service asks for the rest of the body when it has begun the request.
            connection.sendall(head.replace("\r\n\r\n", "\r\nExpect: 100-continue\r\n\r\n").encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 100")
            service.signal(signal.SIGTERM)
            wait_until(lambda: service.get("/readyz") is None, 20, "the listener closes")
            assert service.process.poll() is None, "the service waits for the request in flight"
            connection.sendall(body)
            assert connection.recv(65536).startswith(b"HTTP/1.1 201")
        assert service.wait() == 0
        with Service(data_dir=service.data_dir, secret_key=service.secret_key) as again, client(again) as http:
            assert [item["prompt"] for item in list_prompts(http, user)] == ["sent in two halves"]


def test_the_grace_bounds_a_request_that_never_ends():
    with Service(SHUTDOWN_GRACE="1s", **THROTTLES_OFF) as service:
        with client(service) as http:
            user = make_user(http)
        head = (
            f"POST {PROMPTS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {user.access}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n"
        )
        with socket.create_connection(service.host_and_port, timeout=30) as connection:
            connection.sendall(head.encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 100")
            service.signal(signal.SIGTERM)
            # Well below the 30 s of the default.
            assert service.wait(15) == 0


def test_open_sockets_are_closed_with_1001():
    with Service() as service:
        with client(service) as http:
            user = make_user(http)
        with ExitStack() as stack:
            sockets = [stack.enter_context(connect(f"{service.ws_url}{SOCKET}?token={user.access}")) for _ in range(3)]
            for open_socket in sockets:
                open_socket.recv(timeout=10)
            service.signal(signal.SIGTERM)
            for open_socket in sockets:
                with pytest.raises(ConnectionClosed) as closed:
                    open_socket.recv(timeout=20)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001
        assert service.wait() == 0


def assert_refuses_to_start(service, *said):
    """The process ends by itself, with an error status and one line that holds each of the words.
    """
    service.launch()
    status = service.wait(30)
    assert status > 0, f"ended with {status}\n{service.output()}"
    lines = [line for line in service.stderr().splitlines() if line.strip()]
    assert len(lines) == 1, service.output()
    for word in said:
        assert word in lines[0], lines[0]


@pytest.fixture
def refused():
    """A maker of services that are only launched."""
    made = []

    def make(**options):
        made.append(Service(**options))
        return made[-1]

    yield make
    for service in made:
        service.close()


def test_a_second_server_on_the_same_folder_is_refused_and_the_first_still_works(refused):
    with Service() as service:
        assert_refuses_to_start(refused(data_dir=service.data_dir), str(service.data_dir))
        assert service.get("/readyz") == 200
        assert service.stop() == 0
        with Service(data_dir=service.data_dir) as next_one:
            assert next_one.get("/readyz") == 200


def test_a_port_in_use_is_refused(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "127.0.0.1:%d" % taken.getsockname()[1]
        assert_refuses_to_start(refused(BIND_ADDR=address), "BIND_ADDR", address)


SECRETS = {"SECRET_KEY", "REDIS_URL", "DATABASE_URL"}


@pytest.mark.parametrize(
    "setting",
    [
        {"BIND_ADDR": "nonsense"}, {"METRICS_ADDR": "9100"}, {"SECRET_KEY": "hunter2-hunter2"}, {"PROMPT_THROTTLE": "often"},
        {"REGISTER_THROTTLE": "0/min"}, {"SIMILAR_SCOPE": "mine"}, {"REGISTRATION": "maybe"}, {"ACCESS_TOKEN_LIFETIME": "soon"},
        {"REFRESH_TOKEN_LIFETIME": "10ms"}, {"SHUTDOWN_GRACE": "later"}, {"REDIS_URL": "redis://:hunter2@127.0.0.1:1"},
        {"DATABASE_URL": "mysql://root:hunter2@127.0.0.1/x"}, {"EMBEDDING_MODEL_DIR": "/nonexistent"}, {"TRUSTED_PROXIES": "10.0.0.0/99"},
        {"CORS_ALLOWED_ORIGINS": "*"}, {"MAX_PROMPT_CHARS": "0"}, {"MAX_CONNECTIONS": "many"}, {"SEARCH_MEMORY": "9 apples"},
        {"COOKIE_SECURE": "perhaps"}, {"LOG_FORMAT": "xml"}, {"RUST_LOG": "=,="},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_bad_setting_is_refused_by_its_name(refused, setting):
    [(name, value)] = setting.items()
    service = refused(**setting)
    assert_refuses_to_start(service, f"error: {name}: ")
    if name in SECRETS:
        assert "hunter2" not in service.output()


def test_a_bad_flag_is_refused_by_its_settings_name():
    run = subprocess.run([BINARY, "--bind-addr", "nonsense"], env={}, text=True, capture_output=True, timeout=30)
    assert run.returncode > 0 and run.stdout == ""
    assert run.stderr.startswith("error: BIND_ADDR: ") and run.stderr.count("\n") == 1, run.stderr


@pytest.mark.parametrize("broken", ["empty", "no weights", "config that is no JSON", "weights that are none"])
def test_a_broken_model_folder_is_refused(refused, tmp_path, broken):
    if broken != "empty":
        config = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "vocab_size": 30522}
        (tmp_path / "config.json").write_text("{" if broken == "config that is no JSON" else json.dumps(config))
        (tmp_path / "tokenizer.json").write_text("{}")
    if broken == "weights that are none":
        (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert_refuses_to_start(refused(EMBEDDING_MODEL_DIR=str(tmp_path)), "error: EMBEDDING_MODEL_DIR: ")


@pytest.fixture
def ordinary_user():
    """Popen's options to run the service as a user for whom file modes hold (not root), and a
    binary that this user can reach."""
    if os.geteuid() != 0:
        yield {}
        return
    folder = Path(tempfile.mkdtemp(prefix="prompt-service-binary-"))
    folder.chmod(0o755)
    shutil.copy(BINARY, folder)
    nobody = 65534
    yield {
        "binary": folder / BINARY.name,
        "process_options": {"user": nobody, "group": nobody, "extra_groups": [], "cwd": "/"},
    }
    shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written_is_refused(refused, ordinary_user):
    folder = Path(tempfile.mkdtemp(prefix="prompt-service-locked-"))
    folder.chmod(0o555)
    try:
        assert_refuses_to_start(refused(data_dir=folder, **ordinary_user), str(folder))
        assert list(folder.iterdir()) == []
    finally:
        folder.rmdir()


def test_a_folder_that_cannot_be_made_is_refused(refused):
    # Not even root can create a folder there.
    assert_refuses_to_start(refused(data_dir="/proc/prompt-service"), "/proc/prompt-service")


def test_a_file_with_the_folders_name_is_refused(refused):
    with tempfile.NamedTemporaryFile() as file:
        assert_refuses_to_start(refused(data_dir=file.name), file.name)


def test_a_database_that_is_not_ours_is_refused_and_left_as_it_is(refused):
    with Service() as service:
        assert service.stop() == 0
        [database] = service.database_files()
        for path in service.data_dir.iterdir():
            if path.name.startswith(database.name):
                path.unlink()
        foreign = b"this is somebody's file\n" * 500
        database.write_bytes(foreign)
        assert_refuses_to_start(refused(data_dir=service.data_dir), str(service.data_dir))
        assert database.read_bytes() == foreign


def test_another_programs_database_is_refused_and_left_as_it_is(refused, tmp_path):
    path = tmp_path / "prompt-service.sqlite3"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE recipes (title TEXT); INSERT INTO recipes VALUES ('bread');")
    assert_refuses_to_start(refused(data_dir=tmp_path), str(path), "another program")
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_schema").fetchall() == [("recipes",)]
        assert connection.execute("SELECT title FROM recipes").fetchall() == [("bread",)]


def test_a_database_of_a_newer_version_is_refused_and_left_as_it_is(refused):
    with Service() as service:
        assert service.stop() == 0
        [database] = service.database_files()
        with closing(sqlite3.connect(database)) as connection:
            [(known,)] = connection.execute("PRAGMA user_version").fetchall()
            connection.execute(f"PRAGMA user_version = {known + 1}")
            connection.commit()
        assert_refuses_to_start(refused(data_dir=service.data_dir), str(database), "newer version")
        with closing(sqlite3.connect(database)) as connection:
            assert connection.execute("PRAGMA user_version").fetchall() == [(known + 1,)]


@pytest.mark.parametrize("key", [b"too short", b"\xff" * 64], ids=["short", "no text"])
def test_a_broken_key_file_is_refused_and_left_as_it_is(refused, tmp_path, key):
    (tmp_path / "secret.key").write_bytes(key)
    service = refused(data_dir=tmp_path)
    del service.environment["SECRET_KEY"]
    assert_refuses_to_start(service, str(tmp_path), "secret.key")
    assert (tmp_path / "secret.key").read_bytes() == key


# The process must survive the signal of a file size limit, to get an error as from a full disk.
IGNORE_SIZE_SIGNAL = (
    "/usr/bin/env", "python3", "-c",
    "import os, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])",
)


# A separate file system that only this process sees. Every user can create one if the kernel allows
# user namespaces.
SMALL_FILE_SYSTEM = (
    "unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
    'mount -t tmpfs -o size=8m,mode=0700 none "$DATA_DIR" && exec "$0" "$@"',
)


class FileSizeLimit:
    """No file of the service can grow: every write fails as on a full disk, though with another
    error."""

    def __init__(self, folder):
        self.service = Service(data_dir=folder, command=IGNORE_SIZE_SIGNAL, **THROTTLES_OFF)

    def fill(self):
        largest = max(path.stat().st_size for path in self.service.data_dir.iterdir())
        self.service.limit_file_size(largest + 200_000)

    def make_room(self):
        self.service.limit_file_size(None)

    def keep(self, folder):
        shutil.copytree(self.service.data_dir, folder)


class FullFileSystem:
    """The service's data are on a small file system, which another program's large file fills."""

    def __init__(self, folder):
        self.service = Service(data_dir=folder, command=SMALL_FILE_SYSTEM, **THROTTLES_OFF)

    def fill(self):
        # While the folder is open, it and its file system outlive the process.
        self.held = os.open(f"/proc/{self.service.pid}/root{self.service.data_dir}", os.O_RDONLY | os.O_DIRECTORY)
        with open(self.ballast, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))

    @property
    def ballast(self):
        return f"/proc/self/fd/{self.held}/ballast"

    def make_room(self):
        os.unlink(self.ballast)

    def keep(self, folder):
        shutil.copytree(f"/proc/self/fd/{self.held}", folder)
        os.close(self.held)


@pytest.mark.parametrize("disk", [FileSizeLimit, FullFileSystem])
def test_a_full_disk_is_a_5xx_and_the_service_recovers_once_there_is_room(tmp_path, disk):
    folder = tmp_path / "data"
    folder.mkdir()
    if disk is FullFileSystem and subprocess.run([*SMALL_FILE_SYSTEM, "true"], env={**os.environ, "DATA_DIR": str(folder)}).returncode != 0:
        machine.missing("namespaces", "users may not make them on this system")
    disk = disk(folder)
    with disk.service as service, client(service) as http:
        user = make_user(http)
        stored = {}
        text = "filling the disk " * 1000

        def post(number):
            answer = post_prompt(http, user, f"{number} {text}")
            if answer.status_code == 201:
                stored[answer.json()["id"]] = answer.json()["prompt"]
            return answer

        assert post(0).status_code == 201
        disk.fill()
        full = next(answer for answer in map(post, range(1, 1000)) if answer.status_code != 201)
        assert 500 <= full.status_code < 600
        assert isinstance(full.json()["detail"], str)
        for word in ("SQL", "sqlite", "disk"):
            assert word not in full.text
        # Reading still works, and nothing hangs.
        assert http.get("/healthz").status_code == 200
        assert {item["id"] for item in list_prompts(http, user)} >= set(stored)
        # A row this small may still fit.
        answer = http.post(REGISTER, json={"username": "one-more", "email": "a@b.c", "password": "secret123"})
        assert answer.status_code == 201 or (500 <= answer.status_code < 600 and answer.json()["detail"]), answer.text

        disk.make_room()
        wait_until(lambda: post(2000).status_code == 201, 20, "a post succeeds once there is room", interval=0.1)
        kept = {item["id"]: item["prompt"] for item in list_prompts(http, user)}
        assert kept.items() >= stored.items()
        assert service.stop() == 0
    disk.keep(tmp_path / "kept")
    with Service(data_dir=tmp_path / "kept", secret_key=service.secret_key) as again, client(again) as http:
        assert {item["id"]: item["prompt"] for item in list_prompts(http, user)} == kept
        [database] = again.database_files()
        with closing(sqlite3.connect(database)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
