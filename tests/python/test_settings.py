"""The settings that the binary knows are the ones that its documents explain."""

import re
import subprocess

import httpx
import pytest
from running_service import BINARY, ROOT, Service, refusal, run

# Secrets have no flag, so the help text's list of flags does not have them; each may also be given
# as NAME_FILE.
SECRETS = {"DATABASE_URL", "REDIS_URL", "SECRET_KEY", "SECRET_KEY_FALLBACKS", "OPENAI_API_KEY"}


@pytest.fixture(scope="module")
def help_text():
    run = subprocess.run([BINARY, "--help"], text=True, capture_output=True, check=True)
    return run.stdout


@pytest.fixture(scope="module")
def known(help_text):
    """Every setting with a flag."""
    return set(re.findall(r"\[env: ([A-Z_]+)=", help_text))


def test_the_example_file_has_every_setting_and_no_other(known):
    example = (ROOT / ".env.example").read_text()
    named = set(re.findall(r"^# ?([A-Z][A-Z_]+)=", example, re.MULTILINE))
    assert named == known | SECRETS


def test_the_readme_has_every_setting(known):
    readme = (ROOT / "README.md").read_text()
    missing = {name for name in known | SECRETS if f"`{name}`" not in readme}
    assert not missing


def test_the_help_text_names_the_secrets(help_text):
    for name in SECRETS:
        assert name in help_text


def test_neither_help_nor_an_error_prints_a_secret():
    secret = "a secret of more than thirty-two bytes"
    environment = {name: secret for name in SECRETS}
    for arguments in (["--help"], ["--version"], []):
        run = subprocess.run([BINARY, *arguments], env=environment, text=True, capture_output=True, cwd="/", timeout=30)
        assert secret not in run.stdout + run.stderr


def test_the_example_file_works_as_it_is():
    # As a user would have it: copied to .env in the working directory.
    service = Service()
    try:
        (service.folder / ".env").write_text((ROOT / ".env.example").read_text())
        assert service.start().get("/readyz") == 200
    finally:
        service.close()


def test_a_setting_in_the_env_file_is_used_and_the_environment_wins():
    service = Service(PROMPT_THROTTLE="off")
    try:
        (service.folder / ".env").write_text("REGISTRATION=closed\nPROMPT_THROTTLE=nonsense\n")
        service.start()
        answer = httpx.post(f"{service.url}/api/auth/register/", json={"username": "a", "email": "a@b.c", "password": "secret123"})
        assert answer.status_code == 403
    finally:
        service.close()


def test_a_flag_wins_over_the_environment():
    run = subprocess.run([BINARY, "--prompt-throttle", "nonsense"], env={"PROMPT_THROTTLE": "off"}, text=True, capture_output=True, timeout=30)
    assert run.returncode != 0
    assert "PROMPT_THROTTLE" in run.stderr or "--prompt-throttle" in run.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"%s\r\n", "CRLF"), (b"%s \n", "blank"), (b"%s\t", "blank"), (b" %s\n", "blank"), (b"%s\n\n", "empty line"), (b"\xef\xbb\xbf%s\n", "BOM"),
        (b"%s\n%s\n", "more than one line"), (b"%s\xff\n", "UTF-8"), (b"%s\0\n", "control character"), (b"", "is empty"), (b"\n", "is empty"),
    ],
    ids=["CRLF", "trailing blank", "trailing tab", "leading blank", "two line ends", "BOM", "two lines", "no UTF-8", "NUL", "empty", "a line end alone"],
)
@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_secrets_file_that_holds_more_than_the_secret_is_refused(tmp_path, name, content, expected):
    file = tmp_path / "secret"
    file.write_bytes(content.replace(b"%s", b"hunter2" * 6))
    process = run(folder=tmp_path, **{f"{name}_FILE": str(file)})
    line = refusal(process)
    assert line.startswith(f"error: {name}: the file of {name}_FILE ") and expected in line, line
    assert "hunter2" not in process.stdout + process.stderr
    assert [found.name for found in tmp_path.iterdir()] == ["secret"]


def test_one_line_end_after_a_key_in_a_file_is_removed(tmp_path):
    key = "k" * 64
    (tmp_path / "key").write_text(f"{key}\n")
    with Service(secret_key=key) as service, httpx.Client(base_url=service.url) as http:
        account = {"username": "alice", "email": "a@b.c", "password": "secret123"}
        assert http.post("/api/auth/register/", json=account).status_code == 201
        access = http.post("/api/auth/login/", json=account).json()["access"]
        assert service.stop() == 0
        again = Service(data_dir=service.data_dir, SECRET_KEY_FILE=str(tmp_path / "key"))
        del again.environment["SECRET_KEY"]
        with again:
            me = httpx.get(f"{again.url}/api/auth/me/", headers={"Authorization": f"Bearer {access}"})
            assert me.status_code == 200, me.text


def test_a_database_urls_path_is_percent_decoded(tmp_path):
    file = tmp_path / "a b%.db"
    with Service(DATABASE_URL=f"sqlite://{tmp_path}/a%20b%25.db"):
        assert file.is_file()
    with Service(DATABASE_URL="sqlite://here.db") as service:
        assert (service.folder / "here.db").is_file()


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///{}/x.db?mode=rwc", "sqlite:///{}/x.db#part", "sqlite:///{}/%zz.db", "sqlite:///{}/x%", "sqlite:///{}/%00.db", "sqlite::memory:",
        "sqlite://:memory:", "sqlite://", "sqlite:///", "sqlite:///{}/", "sqlite:{}/x.db", "sqlite3:///{}/x.db",
    ],
)
def test_a_database_url_that_names_no_file_is_refused_and_makes_nothing(tmp_path, url):
    for arguments in ([], ["check"]):
        process = run(*arguments, folder=tmp_path, DATABASE_URL=url.format(str(tmp_path).lstrip("/")))
        assert "DATABASE_URL: " in process.stdout + process.stderr, process
        refusal(process)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"OPENAI_MODEL": "llama3.2"}, ["OPENAI_MODEL", "OPENAI_API_KEY", "OPENAI_BASE_URL"]),
        ({"SYSTEM_PROMPT": "Be brief.", "OPENAI_TEMPERATURE": "1", "UPSTREAM_DAILY_LIMIT": "5"}, ["SYSTEM_PROMPT", "OPENAI_TEMPERATURE", "UPSTREAM_DAILY_LIMIT"]),
        ({"OPENAI_MODEL": "llama3.2", "OPENAI_API_KEY": ""}, ["OPENAI_MODEL", "OPENAI_API_KEY"]),
        ({"REDIS_PREFIX": "mine:"}, ["REDIS_PREFIX", "REDIS_URL"]),
        ({"DATABASE_POOL_SIZE": "5"}, ["DATABASE_POOL_SIZE", "DATABASE_URL"]),
        ({"SEARCH_MEMORY": "1GiB", "SIMILAR_SCOPE": "shared"}, ["SEARCH_MEMORY", "SIMILAR_SCOPE"]),
    ],
    ids=lambda value: "+".join(value),
)
def test_a_setting_without_effect_is_named_at_the_start_with_what_it_needs(settings, expected):
    with Service(**settings) as service:
        warnings = [line["message"] for line in service.log() if line["level"] == "WARN" and all(word in line["message"] for word in expected)]
        assert len(warnings) == 1, service.output()
        check = run("check", folder=service.folder, **service.environment)
        assert f"note  settings: {warnings[0]}" in check.stdout.splitlines()


def test_settings_that_have_an_effect_cause_no_warning():
    with Service(OPENAI_MODEL="llama3.2", OPENAI_BASE_URL="http://127.0.0.1:1/v1", SYSTEM_PROMPT="Be brief.", SEARCH_MEMORY="1GiB") as service:
        assert [line for line in service.log() if line["level"] == "WARN"] == [], service.output()
