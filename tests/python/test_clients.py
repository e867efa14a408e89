"""The sessions of docs/CLIENTS.md, run unchanged with the tools they name."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import debian_tools
import node_tools
import pytest
import python_env
from conftest import client, make_user
from running_service import ROOT, Service, wait_until

# Seconds. Each session takes one or two; the rest is for a busy machine.
DEADLINE = 60

# The name that each session registers, new in each run. The second form replaces it in the test of
# taken names.
NAMES = {
    "curl": ("alice-$(date +%s)-$RANDOM", "alice"),
    "Python": ('f"alice-{secrets.token_hex(4)}"', '"alice"'),
    "JavaScript": ("`alice-${crypto.randomUUID().slice(0, 8)}`", '"alice"'),
    "A generated client": ('f"alice-{secrets.token_hex(4)}"', '"alice"'),
}
NAME = re.compile(r"alice-[0-9a-f-]+")
TAKEN = "A user with that username already exists."

BREAD, PLANET = "How do I bake bread?", "Which planet is the largest?"


def blocks(heading):
    """The code blocks below a heading of the page, as (language, text)."""
    page = (ROOT / "docs" / "CLIENTS.md").read_text()
    [section] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```(\w+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def for_service(text, service):
    """A block with the address of a running service instead of the published one."""
    host, port = service.host_and_port
    assert "localhost:8000" in text
    return text.replace("localhost:8000", f"{host}:{port}")


def with_one_name(heading, text):
    """A session that registers the same name in each run, as if somebody had edited it."""
    made, fixed = NAMES[heading]
    assert text.count(made) == 1
    return text.replace(made, fixed)


def environment(*folders, **variables):
    """The caller's environment with `folders` first on PATH."""
    path = os.pathsep.join([*map(str, folders), os.environ["PATH"]])
    return {**os.environ, "PATH": path, **variables}


def run(command, cwd, env=None):
    """Runs a command to its end and returns the lines that it prints; fails when it does."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, text=True, capture_output=True, timeout=DEADLINE)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


def by_label(lines):
    """Lines such as `posted {"id": 1}` as a dictionary of lists: the part after the label, read as
    JSON or Python if possible."""
    found = {}
    for line in lines:
        label, rest = re.fullmatch(r"(told to wait|logged out|\w+) (.*)", line).groups()
        found.setdefault(label, []).append(rest)
    return found


def throttled_posts(service):
    with client(service) as http:
        counts = re.findall(r'^http_requests_total\{(.*)\} (\d+)$', http.get("/metrics").text, re.MULTILINE)
    return sum(int(count) for labels, count in counts if 'route="/api/prompts"' in labels and 'status="429"' in labels)


def assert_waited(service, first, second):
    """The second post was refused and repeated. On a slow machine, on which a second passed between
    the posts, there was no wait."""
    apart = datetime.fromisoformat(second) - datetime.fromisoformat(first)
    assert throttled_posts(service) >= 1 or apart.total_seconds() > 0.9, f"posts {apart} apart, and none was throttled"


@pytest.fixture
def fresh():
    """A service with default settings, throttles included, and no users."""
    with Service() as running:
        yield running


def curl_session(service, cwd):
    """Runs the curl session; returns the JSON that it prints, and the text after that."""
    [(_, script)] = blocks("curl")
    script = "\n".join(["set -euo pipefail", for_service(script, service), 'echo "$TICKET"'])
    # Responses have no newline at their end, so they follow each other directly.
    printed = "\n".join(run(["bash", "-c", script], cwd, environment(debian_tools.path("curl").parent)))
    answers, rest = [], printed
    while rest.startswith("{"):
        answer, end = json.JSONDecoder().raw_decode(rest)
        answers.append(answer)
        rest = rest[end:].lstrip()
    return answers, rest


def test_the_curl_session_registers_posts_finds_deletes_and_logs_out(fresh, tmp_path):
    answers, rest = curl_session(fresh, tmp_path)
    registered, planet, listed, similar, shown = answers
    assert NAME.fullmatch(registered.pop("username"))
    assert registered == {"id": 1, "email": "a@b.c"}
    assert planet["response"] == f"[mock] You said: {PLANET}"
    assert [prompt["prompt"] for prompt in listed["results"]] == [PLANET, BREAD]
    assert [found["prompt"] for found in similar["results"]] == [BREAD]
    assert shown["status"] == "completed"
    assert rest, "a ticket comes last"
    assert_waited(fresh, shown["created_at"], planet["created_at"])


@contextlib.contextmanager
def terminal(script, output, cwd, env):
    """Runs a script as at a terminal: its input stays open. Stops it and its child processes at the
    end."""
    with open(output, "wb") as out:
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=cwd, env=env, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()


def test_wscat_shows_the_event_of_a_post_from_another_terminal(service, http, tmp_path):
    (_, with_ticket), (_, post), (_, with_header) = blocks("wscat")
    # Before the ticket, which is valid for 30 s: fetching may take longer.
    tools = node_tools.folder(), debian_tools.path("curl").parent
    user = make_user(http)
    ticket = http.post("/api/auth/ws-ticket/", headers=user.auth).json()["ticket"]
    # Offline: npx must run the version that is installed there.
    env = environment(*tools, TICKET=ticket, ACCESS=user.access, npm_config_offline="true")
    for number, script in enumerate((with_ticket, with_header)):
        output = tmp_path / f"wscat{number}"

        def lines():
            # wscat prompts for input with "> ", and does not end that line.
            shown = (line.removeprefix("> ") for line in output.read_text().splitlines())
            return [json.loads(line) for line in shown if line.startswith("{") and line.endswith("}")]

        with terminal(for_service(script, service), output, node_tools.HOME, env) as wscat:
            def wait_for(count):
                wait_until(lambda: len(lines()) >= count or wscat.poll() is not None, DEADLINE, f"{count} messages")
                assert len(lines()) >= count, output.read_text()
                return lines()[count - 1]

            assert wait_for(1) == {"message": "WebSocket connected", "user_id": user.id}
            [posted] = run(["bash", "-c", for_service(post, service)], tmp_path, env)
            assert wait_for(2) == {"type": "prompt.message", "event": "prompt_completed", "data": json.loads(posted)}
            typed = {"type": "auth", "token": user.access}
            wscat.stdin.write(json.dumps(typed).encode() + b"\n")
            wscat.stdin.flush()
            assert wait_for(3) == {"type": "auth", "status": "extended"}
            wscat.stdin.close()
            assert wscat.wait(DEADLINE) == 0, output.read_text()


def check_session(lines, service, read):
    """The output of the Python and the JavaScript session. It differs only in the notation of
    objects."""
    printed = by_label(lines)
    registered = read(printed["registered"][0])
    name = registered.pop("username")
    assert NAME.fullmatch(name)
    assert registered == {"id": 1, "email": "a@b.c"}
    assert read(printed["socket"][0]) == {"message": "WebSocket connected", "user_id": 1}
    posted = read(printed["posted"][0])
    assert posted["response"] == f"[mock] You said: {BREAD}"
    assert read(printed["event"][0]) == {"type": "prompt.message", "event": "prompt_completed", "data": posted}
    assert printed["listed"] == [PLANET, BREAD]
    assert read(printed["similar"][0]) == [BREAD]
    assert printed["shown"] == ["completed"]
    assert printed["deleted"] == ["404 Not found."]
    assert printed["logged out"] == ["401"]
    waits = printed.get("told to wait", [])
    assert len(waits) == throttled_posts(service) and set(waits) <= {"1 s"}
    with client(service) as http:
        tokens = http.post("/api/auth/login/", json={"username": name, "password": "secret123"}).json()
        [planet] = http.get("/api/prompts", headers={"Authorization": f"Bearer {tokens['access']}"}).json()["results"]
    assert_waited(service, posted["created_at"], planet["created_at"])


def test_the_python_session_gets_its_event_and_waits_and_renews_its_token(fresh, tmp_path):
    [(_, script)] = blocks("Python")
    (tmp_path / "session.py").write_text(for_service(script, fresh))
    lines = run([sys.executable, "session.py"], tmp_path)
    check_session(lines, fresh, read=lambda text: json.loads(text.replace("'", '"')))


def test_the_javascript_session_gets_its_event_and_waits_and_renews_its_token(fresh, tmp_path):
    [(_, script)] = blocks("JavaScript")
    (tmp_path / "session.mjs").write_text(for_service(script, fresh))
    lines = run([node_tools.folder() / "node", "session.mjs"], tmp_path)
    check_session(lines, fresh, read=json.loads)


def test_every_session_can_be_run_again_on_the_same_service(fresh, tmp_path):
    python, javascript = (tmp_path / name for name in ("session.py", "session.mjs"))
    for heading, file in (("Python", python), ("JavaScript", javascript)):
        [(_, script)] = blocks(heading)
        file.write_text(for_service(script, fresh))
    ids = []
    for _ in range(2):
        ids.append(curl_session(fresh, tmp_path)[0][0]["id"])
        for command in ([sys.executable, python], [node_tools.folder() / "node", javascript]):
            [registered] = by_label(run(command, tmp_path))["registered"]
            ids.append(json.loads(registered.replace("'", '"'))["id"])
    assert ids == [1, 2, 3, 4, 5, 6]


def test_a_session_whose_name_is_taken_says_so_in_one_line(fresh, tmp_path):
    with client(fresh) as http:
        # The sessions have another password, so nothing after the registration succeeds.
        made = http.post("/api/auth/register/", json={"username": "alice", "email": "a@b.c", "password": "another-one-9x"})
        assert made.status_code == 201
    commands = {"curl": ["bash", "-e"], "Python": [sys.executable], "JavaScript": [node_tools.folder() / "node"]}
    for heading, command in commands.items():
        [(_, script)] = blocks(heading)
        file = tmp_path / ("session.mjs" if heading == "JavaScript" else "session")
        file.write_text(with_one_name(heading, for_service(script, fresh)))
        done = subprocess.run(
            [*map(str, command), str(file)], text=True, capture_output=True, timeout=DEADLINE,
            env=environment(debian_tools.path("curl").parent),
        )
        said = done.stdout + done.stderr
        assert done.returncode != 0 and TAKEN in said, said
        assert "Traceback" not in said and "    at " not in said and len(said.splitlines()) <= 2, said


def test_no_command_of_the_documents_asks_before_it_fetches_a_package():
    commands = [
        (page.name, line) for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for line in page.read_text().splitlines() if re.search(r"\bnpx\b", line)
    ]
    assert commands
    for page, line in commands:
        assert all(rest.startswith(" --yes ") for rest in re.split(r"\bnpx\b", line)[1:]), f"{page}: {line}"


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A folder with the client that the page's command generates, and the service it was generated
    from.

    Its throttle lets one post through and refuses the next, also after a while.
    """
    folder = tmp_path_factory.mktemp("generated")
    (_, command), _ = blocks("A generated client")
    # If the test environment is a plain folder, its commands are in it.
    env = environment(Path(sys.executable).parent, python_env.VENV / "site" / "bin")
    with Service(PROMPT_THROTTLE="1/min") as running:
        printed = run(["bash", "-c", for_service(command, running)], folder, env)
        assert not [line for line in printed if "warning" in line.lower() or "error" in line.lower()], printed
        yield folder, running


def test_a_generated_client_works_with_typed_answers_and_errors(generated):
    folder, service = generated
    _, (_, script) = blocks("A generated client")
    (folder / "session.py").write_text(for_service(script, service))
    printed = by_label(run([sys.executable, "session.py"], folder))
    [registered] = printed.pop("registered")
    assert re.fullmatch(rf"1 {NAME.pattern} a@b\.c", registered), registered
    [throttled] = printed.pop("throttled")
    # A minute minus the time between the two posts.
    assert re.fullmatch(r"429 (60|[1-5]?[0-9])", throttled), throttled
    assert printed == {
        "posted": [f"1 mock [mock] You said: {BREAD} UTC"],
        "listed": ["[(1, 'completed', None)] None"],
        "similar": [f"[('{BREAD}', True)]"],
        "deleted": ["Not found."],
        "refused": ["['password']"],
        "logged out": ["204"],
    }


def test_a_generated_client_whose_name_is_taken_says_so_in_one_line(generated):
    folder, service = generated
    with client(service) as http:
        http.post("/api/auth/register/", json={"username": "alice", "email": "a@b.c", "password": "another-one-9x"})
    _, (_, script) = blocks("A generated client")
    (folder / "taken.py").write_text(with_one_name("A generated client", for_service(script, service)))
    done = subprocess.run([sys.executable, "taken.py"], cwd=folder, text=True, capture_output=True, timeout=DEADLINE)
    assert done.returncode != 0 and TAKEN in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_generated_client_sends_each_body_in_one_encoding(generated):
    folder, _ = generated
    script = """
from prompt_service.api.accounts import login, logout, refresh, register
from prompt_service.api.prompts import create_prompt
from prompt_service.models import CreatePromptRequest, LogInRequest, LogOutRequest, RefreshRequest, RegisterRequest
for operation, body in [
    (register, RegisterRequest("a", "a@b.c", "p")), (login, LogInRequest("p", "a")), (refresh, RefreshRequest("r")),
    (logout, LogOutRequest("r")), (create_prompt, CreatePromptRequest("p")),
]:
    sent = operation._get_kwargs(body=body)
    print(sorted(sent.keys() & {"json", "data", "files"}), sent["headers"])
"""
    assert run([sys.executable, "-c", script], folder) == ["['json'] {'Content-Type': 'application/json'}"] * 5
