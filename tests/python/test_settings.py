"""The settings that the binary knows are the ones that its documents explain."""

import re
import subprocess

import httpx
import pytest
from running_service import BINARY, ROOT, Service

# Secrets have no flag, so the help text's list of flags does not have them; each may also be given as NAME_FILE.
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


def test_a_setting_in_the_env_file_counts_and_the_environment_wins():
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
