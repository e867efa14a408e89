"""The old system's database, made by Django, taken in by the release binary: killed half way, resumed, and its users at work."""

import os
import resource
import secrets
import signal
import sqlite3
import subprocess
import sys
import time

import httpx
import old_system
import pytest
from conftest import LOGIN, ME, PROMPTS, SIMILAR
from running_service import BINARY, KEPT, ROOT, Service
from servers import Postgres

USERS, ROWS = 50, 2000
DEADLINE = 600


@pytest.fixture(scope="module")
def server():
    with Postgres() as running:
        yield running


@pytest.fixture(scope="module")
def old_url(server):
    url = server.make_database(extension=False)
    # In a process of its own: Django can be set up once a process.
    script = ROOT / "tests" / "tools" / "old_system.py"
    subprocess.run([sys.executable, script, url, str(USERS), str(ROWS)], check=True)
    return url


def command(data_dir, *arguments, longest_file=resource.RLIM_INFINITY, **variables):
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest_file, longest_file))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    return subprocess.Popen(
        [BINARY, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=data_dir, preexec_fn=limit,
        env={**environment, "DATA_DIR": str(data_dir), **variables},
    )


def run(data_dir, *arguments, **variables):
    process = command(data_dir, *arguments, **variables)
    out, err = process.communicate(timeout=DEADLINE)
    return process.returncode, out, err


def stored(data_dir):
    """How many prompts the file holds, as far as another process sees."""
    try:
        with sqlite3.connect(f"file:{data_dir}/prompt-service.sqlite3?mode=ro", uri=True) as file:
            return file.execute("SELECT count(*) FROM prompt").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


@pytest.fixture(scope="module")
def moved_in(old_url, tmp_path_factory):
    """A data folder with everything imported, in two goes."""
    data_dir = tmp_path_factory.mktemp("moved-in")
    # The system kills it amid a write, by a signal that it does not know of, once a file is that long: always at the same row, however
    # quick the machine is and whoever looks when.
    first = command(data_dir, "import", "--from-env", "OLD", OLD=old_url, longest_file=4 << 20)
    _, err = first.communicate(timeout=DEADLINE)
    assert first.returncode == -signal.SIGXFSZ, err
    half = stored(data_dir)
    assert ROWS // 4 <= half < ROWS, "the import was killed at work"
    status, out, err = run(data_dir, "import", "--from", old_url)
    assert status == 0, err
    assert f"here already: {USERS} users, {half} prompts" in out
    assert f"imported 0 users, {ROWS - half} prompts" in out
    return data_dir


def test_a_dry_run_says_what_would_be_done_and_imports_nothing(old_url, tmp_path):
    url_file = tmp_path / "url"
    url_file.write_text(old_url + "\n")
    status, out, err = run(tmp_path, "import", "--from-file", url_file, "--dry-run")
    assert status == 0, err
    assert out == f"to import: {USERS} users, {ROWS} prompts\n"
    assert stored(tmp_path) == 0


def test_every_row_is_there_once_as_it_was(moved_in):
    with sqlite3.connect(moved_in / "prompt-service.sqlite3") as file:
        rows = file.execute(
            "SELECT p.id, p.user_id, prompt, response, model, status, created_at, count(e.embedding)"
            " FROM prompt p LEFT JOIN prompt_embedding e ON e.prompt_id = p.id GROUP BY p.id ORDER BY p.id"
        ).fetchall()
        users = file.execute("SELECT id, username, email, is_active, created_at FROM account ORDER BY id").fetchall()
    def micros(n):
        return round(old_system.asked_at(n).timestamp() * 1_000_000)

    assert users == [(n, old_system.username(n), f"u{n}@example.com", 1, micros(n)) for n in range(1, USERS + 1)]
    assert rows == [
        (n, old_system.owner(n, USERS), old_system.text(n), old_system.answer(n), "mock" if n % 2 else "unknown", "completed",
         micros(n), 1)
        for n in range(1, ROWS + 1)
    ]


def test_an_old_password_logs_in_and_the_old_prompts_are_found_and_new_ids_follow(moved_in):
    with Service(data_dir=moved_in, PROMPT_THROTTLE="off") as service, httpx.Client(base_url=service.url, timeout=60) as http:
        for n in (1, USERS):
            wrong = http.post(LOGIN, json={"username": old_system.username(n), "password": "Neues Passwort"})
            assert wrong.status_code == 401
            answer = http.post(LOGIN, json={"username": old_system.username(n), "password": old_system.password(n)})
            assert answer.status_code == 200, answer.text
            auth = {"Authorization": f"Bearer {answer.json()['access']}"}
            assert http.get(ME, headers=auth).json()["id"] == n
            mine = [row for row in range(1, ROWS + 1) if old_system.owner(row, USERS) == n]
            sought = mine[len(mine) // 2]
            found = http.get(SIMILAR, params={"q": old_system.text(sought), "k": 1}, headers=auth).json()["results"]
            assert [row["id"] for row in found] == [sought]
            assert found[0]["score"] > 0.999
        posted = http.post(PROMPTS, json={"prompt": "after the move"}, headers=auth)
        # The old sequence had given out one more than there are rows.
        assert posted.json()["id"] == ROWS + 2


def test_an_import_that_is_done_finds_nothing_to_do(moved_in, old_url):
    began = time.monotonic()
    status, out, _ = run(moved_in, "import", "--from", old_url)
    assert status == 0
    assert f"here already: {USERS} users, {ROWS} prompts" in out
    print(f"{ROWS} rows were found to be here in {time.monotonic() - began:.2f} s")


def test_conflicts_are_told_and_nothing_is_imported_unless_they_are_left_out(old_url, tmp_path):
    lines = [
        '{"type":"header","format":"prompt-service","version":1}',
        '{"type":"user","id":7,"username":"someone","created_at":"2020-01-01T00:00:00Z"}',
        f'{{"type":"user","id":900,"username":"{old_system.username(3)}","created_at":"2020-01-01T00:00:00Z"}}',
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    assert run(tmp_path, "import", "mine.jsonl")[0] == 0
    status, out, err = run(tmp_path, "import", "--from", old_url)
    assert status == 1
    assert "fault: user 3: its name belongs to another account here" in out
    assert "fault: user 7: its id belongs to another one here" in out
    assert "fault: prompt 2: its user is not imported and not here" in out
    assert "nothing was imported" in err
    assert stored(tmp_path) == 0


@pytest.mark.parametrize("break_url, complaint", [
    (lambda url: url.replace("postgres://", "mysql://"), "must be postgres://"),
    (lambda url: url.rsplit("/", 1)[0] + "/absent", "refuses|no database"),
    (lambda url: url.rsplit(":", 1)[0] + ":1/x", "cannot be reached"),
    (lambda url: url.replace("@", "x@", 1), "refuses the user or the password"),
])
def test_an_address_that_does_not_work_is_told_without_being_shown(old_url, tmp_path, break_url, complaint):
    broken = break_url(old_url)
    status, out, err = run(tmp_path, "import", "--from", broken)
    assert status == 1
    assert any(words in err for words in complaint.split("|")), err
    assert len(err.splitlines()) == 1
    password = old_url.split(":")[2].split("@")[0]
    assert password not in out + err


def test_another_database_is_recognised_as_such(server, tmp_path):
    status, _, err = run(tmp_path, "import", "--from", server.make_database(extension=False))
    assert status == 1
    assert "auth_user and prompts_prompt" in err


def test_a_reader_without_rights_to_the_sequences_can_import(server, old_url, tmp_path):
    database = old_url.rsplit("/", 1)[1]
    role, word = f"r{secrets.token_hex(4)}", secrets.token_hex(8)
    server.psql(f"CREATE ROLE {role} LOGIN PASSWORD '{word}'; GRANT SELECT ON auth_user TO {role}", database)
    url = server.url(database, role, word)
    status, _, err = run(tmp_path, "import", "--from", url, "--dry-run")
    assert status == 1 and "grant it SELECT" in err
    server.psql(f"GRANT SELECT ON prompts_prompt TO {role}", database)
    status, out, err = run(tmp_path, "import", "--from", url, "--dry-run")
    assert status == 0, err
    assert f"{ROWS} prompts" in out
