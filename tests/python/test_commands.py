"""The operator's commands in a wrong folder, with wrong arguments, and with pipes."""

import json
import os
import re
import socket
import subprocess
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from conftest import LOGIN, PASSWORD, PROMPTS, client, embedded, make_user
from running_service import BINARY, THROTTLES_OFF, Service, refusal, run, wait_until
from servers import Postgres

HEADER = '{"type":"header","format":"prompt-service","version":1}\n'
USER = '{"type":"user","id":1,"username":"eve","created_at":"2020-01-02T03:04:05Z"}\n'
CREATE = ("user", "create", "alice", "--email", "a@b.c")

NEED_A_STORE = [
    ("user", "list"), CREATE, ("user", "disable", "alice"), ("user", "enable", "alice"), ("user", "set-password", "alice"), ("backup", "copy.sqlite3"),
    ("key", "create", "alice", "--name", "ci"), ("key", "list"), ("key", "rotate", "abcd1234"), ("key", "revoke", "abcd1234"),
    ("export",), ("export", "all.jsonl"), ("move", "--to", "postgres://u:hunter2@127.0.0.1:1/x"),
]


@pytest.mark.parametrize("arguments", NEED_A_STORE, ids=" ".join)
@pytest.mark.parametrize("place", ["nothing", "an empty data folder", "a store elsewhere"])
def test_a_command_without_a_store_is_refused_and_creates_nothing(tmp_path, arguments, place):
    variables = {}
    if place == "an empty data folder":
        (tmp_path / "data").mkdir()
    elif place == "a store elsewhere":
        variables["DATABASE_URL"] = "sqlite://elsewhere/prompts.db"
    before = sorted(tmp_path.rglob("*"))
    line = refusal(run(*arguments, folder=tmp_path, stdin="secret123\n", **variables))
    setting = "DATABASE_URL" if variables else "DATA_DIR"
    assert line.startswith(f"error: {setting}: there is no store at ") and "where the server runs" in line, line
    assert ("--init" in line) == (arguments[:2] == ("user", "create"))
    assert "hunter2" not in line
    assert sorted(tmp_path.rglob("*")) == before


def test_the_first_account_can_create_the_store_before_any_server_has_run(tmp_path):
    refused = run(*CREATE, "--init", folder=tmp_path, stdin="short\n")
    assert "password: " in refusal(refused)
    assert list(tmp_path.iterdir()) == [], "an account that cannot be made makes no store"
    made = run(*CREATE, "--init", folder=tmp_path, stdin=f"{PASSWORD}\n")
    assert (made.returncode, made.stdout, made.stderr) == (0, "created user 1\n", "")
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    assert run("user", "list", folder=tmp_path).stdout == "1\talice\ta@b.c\tactive\n"
    # The option is for the first account; it does no harm with the next.
    bob = run("user", "create", "bob", "--email", "b@b.c", "--init", folder=tmp_path, stdin=f"{PASSWORD}\n")
    assert bob.stdout == "created user 2\n", bob
    with Service(data_dir=tmp_path / "data", REGISTRATION="closed") as service:
        login = httpx.post(service.url + LOGIN, json={"username": "alice", "password": PASSWORD})
        assert login.status_code == 200, login.text


@pytest.mark.parametrize("url", ["sqlite://data/x.db", "sqlite://./data/x.db", "sqlite://{folder}/data/x.db"])
def test_a_database_in_the_data_folder_needs_no_folder_before_the_start(tmp_path, url):
    url = url.format(folder=tmp_path)
    checked = run("check", folder=tmp_path, DATABASE_URL=url, BIND_ADDR="127.0.0.1:0")
    assert (checked.returncode, "the first start makes it" in checked.stdout) == (0, True), checked
    assert list(tmp_path.iterdir()) == []
    made = run(*CREATE, "--init", folder=tmp_path, DATABASE_URL=url, stdin=f"{PASSWORD}\n")
    assert made.stdout == "created user 1\n", made
    assert (tmp_path / "data" / "x.db").is_file()


def test_a_first_account_in_a_database_elsewhere_makes_no_data_folder(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    made = run(*CREATE, "--init", folder=tmp_path, DATABASE_URL="sqlite://elsewhere/x.db", stdin=f"{PASSWORD}\n")
    assert made.stdout == "created user 1\n", made
    assert [file.name for file in tmp_path.iterdir()] == ["elsewhere"]


@pytest.fixture(scope="module")
def postgres():
    with Postgres() as running:
        yield running


def test_commands_on_an_empty_postgres_database_are_refused_and_make_no_tables(postgres, tmp_path):
    url = postgres.make_database()
    for arguments in [("user", "list"), CREATE, ("export",)]:
        line = refusal(run(*arguments, folder=tmp_path, DATABASE_URL=url, stdin=f"{PASSWORD}\n"))
        assert line.startswith("error: DATABASE_URL: the database holds no store"), line
        assert postgres.password not in line
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
    assert postgres.query(tables, database=url.rpartition("/")[2]) == [["0"]]
    made = run(*CREATE, "--init", folder=tmp_path, DATABASE_URL=url, stdin=f"{PASSWORD}\n")
    assert made.stdout == "created user 1\n", made
    assert run("user", "list", folder=tmp_path, DATABASE_URL=url).stdout.startswith("1\talice\t")


def test_a_dry_run_of_an_import_makes_no_store(tmp_path):
    (tmp_path / "in.jsonl").write_text(HEADER + USER)
    done = run("import", "--dry-run", "in.jsonl", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "to import: 1 users, 0 prompts\n"), done
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_import_reads_standard_input_from_a_pipe_and_from_a_file(tmp_path):
    piped = run("import", "-", "--data-dir", "piped", folder=tmp_path, stdin=HEADER + USER)
    assert piped.stdout.startswith("to import: 1 users, 0 prompts\nimported 1 users, 0 prompts in "), piped
    (tmp_path / "in.jsonl").write_text("not a part of it\n" + HEADER + USER)
    # The shell has read the first line; the import reads the rest.
    shell = f"{{ read line; '{BINARY}' import - --data-dir file; }} <in.jsonl"
    from_file = subprocess.run(["sh", "-c", shell], cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert from_file.stdout.startswith("to import: 1 users, 0 prompts\nimported "), from_file
    again = run("export", "--data-dir", "piped", folder=tmp_path)
    assert run("import", "-", "--data-dir", "again", folder=tmp_path, stdin=again.stdout).returncode == 0


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder with a store of more accounts than a pipe holds."""
    folder = tmp_path_factory.mktemp("store")
    users = (json.dumps({"type": "user", "id": n, "username": f"user{n}", "created_at": "2020-01-02T03:04:05Z"}) for n in range(1, 3001))
    (folder / "in.jsonl").write_text(HEADER + "\n".join(users) + "\n")
    assert run("import", "in.jsonl", folder=folder).returncode == 0
    return folder


@pytest.mark.parametrize("arguments", [("openapi",), ("--help",), ("user", "create", "--help"), ("user", "list"), ("export",), ("check",)], ids=" ".join)
@pytest.mark.parametrize("reads", [0, 1])
def test_a_command_whose_output_pipe_closes_ends_quietly(store, arguments, reads):
    environment = {"PATH": os.environ["PATH"], "BIND_ADDR": "127.0.0.1:0"}
    process = subprocess.Popen([BINARY, *arguments], cwd=store, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(reads)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_an_import_whose_output_pipe_closes_is_completed(tmp_path):
    (tmp_path / "in.jsonl").write_text(HEADER + USER)
    subprocess.run(["sh", "-c", f"'{BINARY}' import in.jsonl | true"], cwd=tmp_path, env={"PATH": os.environ["PATH"]}, check=True)
    assert run("user", "list", folder=tmp_path).stdout.startswith("1\teve\t")


def test_a_backup_is_a_file(store):
    assert "name a file" in refusal(run("backup", "-", folder=store))
    assert not (store / "-").exists()


def test_an_address_instead_of_a_variables_name_is_not_shown(tmp_path):
    secret = "postgres://u:hunter2@127.0.0.1/x"
    for flag in ("--from-env", "--from-file"):
        line = refusal(run("import", flag, secret, folder=tmp_path))
        assert line.startswith(f"error: {flag}: ") and "hunter2" not in line, line


REFUSED_BY_A_START = {
    "log filter": ({"RUST_LOG": "loud"}, "RUST_LOG"),
    "log format": ({"LOG_FORMAT": "xml"}, "LOG_FORMAT"),
    "a folder that cannot be made": ({"DATA_DIR": "/proc/prompt-service"}, "DATA_DIR"),
    "a folder below a file": ({"DATA_DIR": "file/data"}, "DATA_DIR"),
    "a file in the folder's place": ({"DATA_DIR": "file"}, "DATA_DIR"),
    "a key with two line ends": ({"DATA_DIR": "keyed"}, "DATA_DIR"),
    "a database in a folder that is not there": ({"DATABASE_URL": "sqlite://nowhere/x.db"}, "DATABASE_URL"),
    "a database that is none": ({"DATABASE_URL": "sqlite://file"}, "DATABASE_URL"),
    "a database server that is not there": ({"DATABASE_URL": "postgres://u:hunter2@127.0.0.1:1/x"}, "DATABASE_URL"),
    "a Redis that is not there": (
        {"DATABASE_URL": "postgres://u:hunter2@127.0.0.1:1/x", "REDIS_URL": "redis://:hunter2@127.0.0.1:1", "SECRET_KEY": "k" * 32}, "DATABASE_URL",
    ),
    "a model folder that is not there": ({"EMBEDDING_MODEL_DIR": "nowhere"}, "EMBEDDING_MODEL_DIR"),
    "an address of another machine": ({"BIND_ADDR": "192.0.2.1:80"}, "BIND_ADDR"),
    "a metrics address of another machine": ({"METRICS_ADDR": "192.0.2.1:80"}, "METRICS_ADDR"),
    "one port twice": ({"BIND_ADDR": "0.0.0.0:8123", "METRICS_ADDR": "127.0.0.1:8123"}, "METRICS_ADDR"),
    "a short key": ({"SECRET_KEY": "hunter2"}, "SECRET_KEY"),
    "no UTF-8": ({"REGISTRATION": "\udcff"}, "REGISTRATION"),
}


@pytest.mark.parametrize("problem", REFUSED_BY_A_START)
def test_check_refuses_what_a_start_refuses_and_neither_creates_anything(tmp_path, problem):
    variables, setting = REFUSED_BY_A_START[problem]
    (tmp_path / "file").write_text("no database " * 99)
    (tmp_path / "keyed").mkdir()
    (tmp_path / "keyed" / "secret.key").write_text("k" * 64 + "\n\n")
    before = sorted(tmp_path.rglob("*"))
    variables = {"BIND_ADDR": "127.0.0.1:0", **variables}
    start = run(folder=tmp_path, **variables)
    assert refusal(start).startswith(f"error: {setting}: "), start
    check = run("check", folder=tmp_path, **variables)
    refusal(check)
    assert f"{setting}: " in check.stdout + check.stderr, check
    assert "hunter2" not in start.stdout + start.stderr + check.stdout + check.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_port_in_use_is_refused_with_the_fix_and_nothing_is_created(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "127.0.0.1:%d" % taken.getsockname()[1]
        for setting in ("BIND_ADDR", "METRICS_ADDR"):
            variables = {"BIND_ADDR": "127.0.0.1:0", setting: address}
            line = refusal(run(folder=tmp_path, **variables))
            assert line.startswith(f"error: {setting}: cannot listen on {address}: "), line
            assert f"set {setting} to another port" in line and "ss -ltnp" in line
            check = run("check", folder=tmp_path, **variables)
            assert "fault" in check.stdout and line.removeprefix("error: ") in check.stdout, check
            assert list(tmp_path.iterdir()) == []


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_check_beside_a_running_server_and_after_it_succeeds_and_changes_nothing():
    with Service() as service:
        environment = {**service.environment, "BIND_ADDR": service.address}
        check = run("check", folder=service.folder, **environment)
        assert check.returncode == 0, check
        assert f"note  address: {service.address} is in use by the server that runs" in check.stdout.splitlines()
        # Another folder and the same port: this server would be refused.
        other = run("check", folder=service.folder, **{**environment, "DATA_DIR": "other"})
        assert other.returncode == 1 and "fault address: BIND_ADDR: cannot listen" in other.stdout, other
        assert service.stop() == 0
        before = files(service.data_dir)
        after = run("check", folder=service.folder, **environment)
        assert after.returncode == 0 and "note  address" not in after.stdout, after
        assert files(service.data_dir) == before


@embedded
def test_keys_are_made_listed_rotated_and_revoked_beside_a_running_server(tmp_path):
    with Service(data_dir=tmp_path / "data", **THROTTLES_OFF) as service, client(service) as http:
        user = make_user(http)

        def key(*arguments):
            return run("key", *arguments, folder=tmp_path)

        def status(text):
            return http.get(PROMPTS, headers={"Authorization": f"Bearer {text}"}).status_code

        options = ("--name", "nightly report", "--scopes", "read,write", "--models", "gpt-*,llama3.2", "--rates", "100/day", "--budget-usd", "20.5/week", "--expires", "90d")
        made = key("create", user.username, *options)
        assert made.returncode == 0, made
        text = made.stdout.removesuffix("\n")
        assert re.fullmatch(r"ps_[0-9A-Za-z]{46}", text), "standard output is the key alone"
        key_id = text[3:11]
        assert made.stderr == f"made key {key_id}; it is not shown again\n"
        assert status(text) == 200
        plain = key("create", user.username, "--name", "second").stdout.strip()
        rows = [row.split("\t") for row in key("list").stdout.splitlines()]
        [row] = [row for row in rows if row[0] == key_id]
        assert row[1:7] == [user.username, "nightly report", "read,write", "gpt-*,llama3.2", "100/day", "20.50/week"]
        expires = datetime.fromisoformat(row[7]) - datetime.now(UTC)
        assert timedelta(days=89) < expires <= timedelta(days=90)
        [second] = [row for row in rows if row[0] == plain[3:11]]
        assert second[2:] == ["second", "chat,read", "-", "-", "-", "-", "-"]
        assert {row[0] for row in rows} == {row.split("\t")[0] for row in key("list", user.username).stdout.splitlines()}

        rotated = key("rotate", key_id, "--grace", "0s")
        new = rotated.stdout.removesuffix("\n")
        assert new[:11] == text[:11] and new != text
        assert status(new) == 200, "a new secret works at once, although the server remembers the old one"
        wait_until(lambda: status(text) == 401, 2, "the old secret is refused")
        revoked = key("revoke", new)
        assert (revoked.returncode, revoked.stdout) == (0, ""), revoked
        wait_until(lambda: status(new) == 401, 2, "the revoked key is refused")
        assert status(plain) == 200
        everything = service.output() + made.stderr + rotated.stderr + revoked.stderr
        for secret in (text, new, plain):
            assert secret not in everything and secret[11:43] not in everything


@embedded
def test_a_key_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    made = run(*CREATE, "--init", folder=tmp_path, stdin=f"{PASSWORD}\n")
    assert made.returncode == 0, made
    name = ("--name", "ci")
    for arguments, words in [
        (("create", "bob", *name), "there is no such user"),
        (("create", "alice", "--name", " "), "--name: "),
        (("create", "alice", *name, "--scopes", "admin"), "--scopes: "),
        (("create", "alice", *name, "--models", "a*b"), "--models: "),
        (("create", "alice", *name, "--rates", "often"), "--rates: "),
        (("create", "alice", *name, "--budget-usd", "20/year"), "--budget-usd: "),
        (("create", "alice", *name, "--budget-usd", "0"), "--budget-usd: "),
        (("create", "alice", *name, "--expires", "soon"), "--expires: "),
        (("create", "alice", *name, "--expires", "2020-01-01T00:00:00Z"), "expires_at: "),
        (("rotate", "abcd1234"), "there is no such key"),
        (("rotate", "abcd1234", "--grace", "soon"), "--grace: "),
        (("revoke", "nonsense!"), "there is no such key"),
    ]:
        refused = run("key", *arguments, folder=tmp_path)
        assert refused.stdout == "" and words in refusal(refused), (arguments, refused)
    assert run("key", "list", folder=tmp_path).stdout == ""
