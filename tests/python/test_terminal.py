"""The output at a terminal: the log of a start, the help, progress."""

import json
import re
import signal
import urllib.request

import pytest
from running_service import BINARY, run
from terminal import ESCAPE, Terminal

WIDTHS = [60, 80, 160]
COMMANDS = [
    [], ["serve"], ["user"], ["user", "create"], ["user", "list"], ["user", "set-password"], ["check"], ["backup"], ["export"], ["import"], ["move"], ["openapi"],
    ["health"],
]
# Settings that the help of a command shows beside its own options.
SHOWN = {
    "user": {"--data-dir"}, "backup": {"--data-dir"}, "export": {"--data-dir"}, "move": {"--data-dir", "--embedding-model-dir"},
    "import": {"--data-dir", "--max-prompt-chars", "--embedding-model-dir"}, "health": {"--bind-addr"},
}


def words(arguments):
    return " ".join(arguments) or "the program"


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("arguments", COMMANDS, ids=words)
def test_the_help_fits_the_terminal(tmp_path, arguments, columns):
    with Terminal(*arguments, "--help", folder=tmp_path, columns=columns) as terminal:
        assert terminal.end() == 0
        assert any(line.startswith("Usage: prompt-service") for line in terminal.lines), terminal.text
        assert [line for line in terminal.lines if len(line) > columns] == []


def options(arguments, folder):
    text = run(*arguments, "--help", folder=folder).stdout
    return set(re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", text, re.MULTILINE)), text


@pytest.mark.parametrize("arguments", COMMANDS[2:], ids=words)
def test_the_help_of_a_command_shows_its_own_options_and_few_settings(tmp_path, arguments):
    of_server, _ = options([], tmp_path)
    own, text = options(arguments, tmp_path)
    assert own & of_server - {"--help", "--version"} == SHOWN.get(arguments[0], set())
    assert len(text.splitlines()) < 50


def test_the_help_of_the_server_is_the_programs_with_its_settings_in_groups(tmp_path):
    program, text = options([], tmp_path)
    assert program - {"--version"} == options(["serve"], tmp_path)[0]
    groups = re.findall(r"^([A-Z][a-z]+):$", text, re.MULTILINE)
    expected = ["Commands", "Options", "Listening", "Data", "Accounts", "Limits", "Prompts", "Search", "Log", "Stopping", "Upstream", "Secrets"]
    assert groups == expected
    assert re.search(r"^Options:\n  -h, --help .*\n  -V, --version .*\n\n", text, re.MULTILINE), "every setting stands in a group"


@pytest.mark.parametrize("before", [True, False], ids=["before the command", "after the command"])
def test_a_setting_may_stand_before_and_after_a_command(tmp_path, before):
    account = ["user", "create", "alice", "--email", "a@b.c", "--init"]
    flags = ["--data-dir", "elsewhere", "--bind-addr", "127.0.0.1:9"]
    arguments = [*flags, *account] if before else [*account, *flags]
    assert run(*arguments, folder=tmp_path, stdin="Str0ng-enough-9x\n").returncode == 0
    assert (tmp_path / "elsewhere" / "prompt-service.sqlite3").is_file()


SECRETS = ["--openai-api-key", "--secret-key", "--secret-key-fallbacks", "--database-url", "--redis-url", "--openai-api-key-file", "--openai-key"]


@pytest.mark.parametrize("flag", SECRETS)
@pytest.mark.parametrize("arguments", [[], ["serve"], ["user", "list"], ["check"]], ids=words)
def test_a_secret_given_as_a_flag_is_refused_with_its_variable(tmp_path, arguments, flag):
    for given in ([flag, "hunter2"], [f"{flag}=hunter2"]):
        process = run(*arguments, *given, folder=tmp_path)
        assert process.returncode > 0 and process.stdout == "" and process.stderr.count("\n") == 1, process
        name = flag.removeprefix("--").replace("-", "_").upper().removesuffix("_FILE").replace("OPENAI_KEY", "OPENAI_API_KEY")
        assert process.stderr.startswith(f"error: {name}: a secret has no flag"), process.stderr
        assert f"{name}_FILE" in process.stderr and "hunter2" not in process.stderr
    assert list(tmp_path.iterdir()) == []


def start(folder, **variables):
    return Terminal("--bind-addr", variables.pop("bind", "127.0.0.1:0"), folder=folder, **variables)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("bind", ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"])
def test_the_last_line_of_a_start_is_the_address_to_open(tmp_path, bind, columns):
    with start(tmp_path, bind=bind, columns=columns) as terminal:
        terminal.wait_for(" open http://")
        line = terminal.lines[-1]
        url = re.fullmatch(r"\d\d:\d\d:\d\dZ  INFO open (http://(?:127\.0\.0\.1|\[::1\]):\d+)", line)[1]
        with urllib.request.urlopen(f"{url}/healthz", timeout=30) as answer:
            assert answer.status == 200
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.end() == 0


def test_the_log_on_a_terminal_is_pretty_and_coloured(tmp_path):
    with start(tmp_path) as terminal:
        terminal.wait_for("open http://")
        assert "\x1b[33m WARN\x1b[0m prompts are answered by the built-in mock" in terminal.text
        assert "\x1b[32m INFO\x1b[0m" in terminal.text
        assert all(re.match(r"\d\d:\d\d:\d\dZ  (?:INFO|WARN) ", line) for line in terminal.lines), terminal.lines


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"CLICOLOR": "0"}], ids=str)
def test_a_terminal_without_colours_or_with_colours_switched_off_gets_none(tmp_path, variables):
    with start(tmp_path, **variables) as terminal:
        terminal.wait_for("open http://")
        assert not ESCAPE.search(terminal.text), terminal.text


def test_a_log_format_that_is_set_wins_over_the_terminal(tmp_path):
    with start(tmp_path, LOG_FORMAT="json") as terminal:
        terminal.wait_for('"message":"listening"')
        assert json.loads(terminal.lines[-1])["message"] == "listening"


def test_a_progress_bar_fits_a_narrow_terminal_and_is_cleared(tmp_path):
    at = '"created_at":"2020-01-02T03:04:05Z"'
    rows = ['{"type":"header","format":"prompt-service","version":1}', f'{{"type":"user","id":1,"username":"eve",{at}}}']
    rows += [f'{{"type":"prompt","id":{n},"user_id":1,"prompt":"{n}{" words" * 20}","response":"x",{at}}}' for n in range(1, 301)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    with Terminal("import", "in.jsonl", folder=tmp_path, columns=60) as terminal:
        assert terminal.end(deadline=300) == 0
        drawn = [line for line in terminal.lines if line.startswith("importing [")]
        assert drawn, terminal.text
        assert [line for line in drawn if len(line) >= 60] == []
        assert terminal.text.splitlines()[-1].rpartition("\x1b[2K")[2].startswith("imported 1 users, 300 prompts")
    quiet = run("import", "in.jsonl", folder=tmp_path)
    assert quiet.returncode == 0 and "\r" not in quiet.stderr and "\x1b" not in quiet.stderr


def test_help_that_a_program_reads_has_each_option_on_one_line(tmp_path):
    text = run("--help", folder=tmp_path, COLUMNS="60").stdout
    assert "[env: OPENAI_FIRST_TOKEN_TIMEOUT=] [default: 60s]" in text
    assert not ESCAPE.search(text)
    assert str(BINARY) not in text
