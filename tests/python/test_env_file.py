"""The `.env` file of the working directory: its settings, and the error for an unusable file."""

import base64
import hashlib
import hmac

import pytest
from conftest import client, make_user
from running_service import THROTTLES_OFF, Service, refusal, run

# Like the keys that Django's startproject generates.
DJANGO_KEY = "django-insecure-4x$ab(9!&*^@-_=+#k%2$HOME${PATH}"


def signature(token, key):
    signed = token.rpartition(".")[0]
    digest = hmac.new(key.encode(), signed.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


@pytest.fixture
def service():
    """A service, not yet started, whose environment sets no key."""
    service = Service(**THROTTLES_OFF)
    del service.environment["SECRET_KEY"]
    yield service
    service.close()


def write(folder, text, mode=0o600):
    file = folder / ".env"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    file.chmod(mode)


@pytest.mark.parametrize(
    "line",
    [
        "SECRET_KEY={}", "SECRET_KEY='{}'", 'SECRET_KEY="{}"', "export SECRET_KEY={}", "SECRET_KEY = {} ", "SECRET_KEY='{}' # a comment",
        "\ufeffSECRET_KEY={}\r", "# the key\n\nSECRET_KEY={}\nOTHER=1",
    ],
)
def test_tokens_are_signed_with_exactly_the_key_in_the_file(service, line):
    write(service.folder, line.format(DJANGO_KEY) + "\n")
    with client(service.start()) as http:
        token = make_user(http).access
    assert token.rpartition(".")[2] == signature(token, DJANGO_KEY)


UNREADABLE = {
    "no equals sign": "hunter2",
    "a name with a dash": "SECRET-KEY=hunter2",
    "a name that begins with a digit": "1KEY=hunter2",
    "no name": "=hunter2",
    "YAML": "SECRET_KEY: hunter2",
    "an open quote": "SECRET_KEY='hunter2",
    "text after the closing quote": "SECRET_KEY='hunter2'3",
    "an escaped quote": 'SECRET_KEY="hunter\\"2"',
    "a comment or not": "SECRET_KEY=hunter2 # 3",
    "a key that begins with a blank and a hash": "SECRET_KEY= #hunter2",
    "a null character": "SECRET_KEY=hunter2\0",
    "a carriage return in mid-line": "SECRET_KEY=hunter2\rA=1",
    "an escape sequence": "SECRET_KEY=hunter2\x1b[2J",
    "a name that comes twice": "REGISTRATION=hunter2",
    "no UTF-8": b"SECRET_KEY=hunter2\xff",
}


@pytest.mark.parametrize("arguments", [[], ["check"], ["user", "list"]], ids=["serve", "check", "user list"])
@pytest.mark.parametrize("problem", UNREADABLE)
def test_a_line_that_cannot_be_read_is_refused_by_its_number_and_not_quoted(tmp_path, problem, arguments):
    line = UNREADABLE[problem]
    line = line if isinstance(line, bytes) else line.encode()
    write(tmp_path, b"# a comment\nREGISTRATION=open\n\n" + line + b"\nBIND_ADDR=127.0.0.1:0\n")
    error = refusal(run(*arguments, folder=tmp_path))
    assert error.startswith("error: .env: line 4: "), error
    assert "hunter" not in error
    assert [file.name for file in tmp_path.iterdir()] == [".env"]


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o664, 0o666, 0o777])
def test_a_file_that_others_can_write_is_refused_with_the_fix(tmp_path, mode):
    write(tmp_path, "REGISTRATION=open\n", mode)
    for arguments in ([], ["check"], ["user", "list"], ["openapi"]):
        line = refusal(run(*arguments, folder=tmp_path))
        assert line.startswith("error: .env: ") and "chmod go-w .env" in line, line


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o644, 0o755])
def test_a_file_that_only_its_owner_can_write_is_read(tmp_path, mode):
    write(tmp_path, "REGISTRATION=perhaps\n", mode)
    assert refusal(run("openapi", folder=tmp_path)).startswith("error: REGISTRATION: ")


def test_a_folder_of_that_name_and_an_empty_file_set_nothing(tmp_path):
    (tmp_path / ".env").mkdir()
    assert run("openapi", folder=tmp_path).returncode == 0
    (tmp_path / ".env").rmdir()
    write(tmp_path, "")
    assert run("openapi", folder=tmp_path).returncode == 0


MISSPELT = {"OPENAI_BASEURL": "OPENAI_BASE_URL", "PROMT_THROTTLE": "PROMPT_THROTTLE", "DATABASE_URI": "DATABASE_URL", "data_dir": "DATA_DIR"}


@pytest.mark.parametrize("place", ["environment", "file"])
def test_a_misspelt_setting_is_reported_with_the_right_name(service, place):
    if place == "file":
        write(service.folder, "".join(f"{name}=hunter2\n" for name in MISSPELT))
    else:
        service.environment |= {name: "hunter2" for name in MISSPELT}
    service.start()
    warnings = [line["message"] for line in service.log() if line["level"] == "WARN"]
    check = run("check", folder=service.folder, **service.environment)
    users = run("user", "list", folder=service.folder, **service.environment)
    for name, setting in MISSPELT.items():
        sentence = f"{name} is not a setting: did you mean {setting}?"
        assert sentence in warnings
        assert f"note  settings: {sentence}" in check.stdout.splitlines()
        assert f"warning: {sentence}" in users.stderr.splitlines()
    assert "hunter2" not in service.output() + check.stdout + users.stderr


def test_variables_of_other_programs_and_keys_of_fallbacks_cause_no_warning(tmp_path):
    fallback = '[{"model": "m", "base_url": "http://127.0.0.1:1/v1", "api_key_env": "OPENAI_API_KEYS"}]'
    write(tmp_path, f"POSTGRES_PASSWORD=x\nOPENAI_API_KEYS=x\nOPENAI_API_KEY=y\nOPENAI_FALLBACK={fallback}\n")
    check = run("check", folder=tmp_path, BIND_ADDR="127.0.0.1:0", LOG_LEVEL="debug", PORT="5000")
    assert check.returncode == 0, check
    assert [line for line in check.stdout.splitlines() if "settings: " in line] == ["ok    settings: each can be used"]
