"""djangorestframework-simplejwt and the service stand in for each other when they share a key."""

import sqlite3
from datetime import timedelta
from types import SimpleNamespace

import django
import pytest
from conftest import LOGIN, ME, REFRESH, assert_json_error, client, embedded, make_user
from django.conf import settings
from running_service import THROTTLES_OFF, Service

KEY = "a key that this service and a Django project share, 0123456789"

settings.configure(
    SECRET_KEY=KEY,
    USE_TZ=True,
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "rest_framework_simplejwt"],
    PASSWORD_HASHERS=["django.contrib.auth.hashers.PBKDF2PasswordHasher"],
)
django.setup()

# Both read the settings while they are imported.
from django.contrib.auth.hashers import make_password  # noqa: E402
from rest_framework_simplejwt.authentication import JWTAuthentication  # noqa: E402
from rest_framework_simplejwt.exceptions import TokenError  # noqa: E402
from rest_framework_simplejwt.tokens import AccessToken, RefreshToken  # noqa: E402


@pytest.fixture(scope="module")
def service(serve):
    with serve(secret_key=KEY, **THROTTLES_OFF) as running:
        yield running


@pytest.fixture(scope="module")
def http(service):
    with client(service) as connection:
        yield connection


def me(http, token):
    return http.get(ME, headers={"Authorization": f"Bearer {token}"})


def test_simplejwt_verifies_our_access_token(user):
    token = JWTAuthentication().get_validated_token(user.access.encode())
    assert isinstance(token, AccessToken)
    assert token["user_id"] == str(user.id)
    assert token["exp"] - token["iat"] == 300


def test_simplejwt_verifies_our_refresh_token(user):
    token = RefreshToken(user.refresh)
    assert token["user_id"] == str(user.id)
    assert token["exp"] - token["iat"] == 86_400
    assert len(token["jti"]) == 32 and int(token["jti"], 16) >= 0


def test_simplejwt_verifies_the_access_token_of_a_refresh(http, user):
    answer = http.post(REFRESH, json={"refresh": user.refresh})
    assert AccessToken(answer.json()["access"])["user_id"] == str(user.id)


def test_simplejwt_tells_our_tokens_apart(user):
    with pytest.raises(TokenError, match="wrong type"):
        RefreshToken(user.access)
    with pytest.raises(TokenError, match="wrong type"):
        AccessToken(user.refresh)


def test_simplejwt_turns_our_refresh_token_into_an_access_token_that_we_accept(http, user):
    answer = me(http, RefreshToken(user.refresh).access_token)
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == user.id


def test_we_accept_simplejwts_access_token(http, user):
    answer = me(http, AccessToken.for_user(SimpleNamespace(id=user.id, is_active=True)))
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == user.id


def test_we_accept_simplejwts_access_token_with_a_number_for_the_user(http, user):
    token = AccessToken()
    token["user_id"] = user.id
    assert me(http, token).status_code == 200


def test_we_accept_simplejwts_refresh_token(http, user):
    answer = http.post(REFRESH, json={"refresh": str(RefreshToken.for_user(SimpleNamespace(id=user.id, is_active=True)))})
    assert answer.status_code == 200, answer.text
    assert me(http, answer.json()["access"]).json()["id"] == user.id


def test_simplejwts_expired_tokens_are_rejected(http, user):
    person = SimpleNamespace(id=user.id, is_active=True)
    access, refresh = AccessToken.for_user(person), RefreshToken.for_user(person)
    for token in (access, refresh):
        token.set_exp(lifetime=-timedelta(seconds=1))
    answer = me(http, access)
    assert answer.status_code == 401
    assert assert_json_error(answer)["messages"][0]["message"] == "Token is expired"
    answer = http.post(REFRESH, json={"refresh": str(refresh)})
    assert answer.status_code == 401
    assert assert_json_error(answer)["code"] == "token_not_valid"


# Django 5.2 uses a million iterations; an account may also be of an older release.
@embedded
@pytest.mark.parametrize("iterations", [1_000_000, 260_000])
def test_a_hash_made_by_django_logs_in_and_is_replaced(iterations):
    from django.contrib.auth.hashers import PBKDF2PasswordHasher

    hasher = PBKDF2PasswordHasher()
    password = "imported-Pass-77"
    imported = hasher.encode(password, hasher.salt(), iterations)
    with Service(**THROTTLES_OFF) as service:
        with client(service) as http:
            user = make_user(http)
        assert service.stop() == 0
        [database] = service.database_files()
        with sqlite3.connect(database) as connection:
            changed = connection.execute(
                "UPDATE account SET password_hash = ? WHERE username = ?", (imported, user.username)
            )
            assert changed.rowcount == 1
        connection.close()

        with Service(data_dir=service.data_dir, **THROTTLES_OFF) as again, client(again) as http:
            wrong = http.post(LOGIN, json={"username": user.username, "password": "not-" + password})
            assert wrong.status_code == 401
            for _ in range(2):
                right = http.post(LOGIN, json={"username": user.username, "password": password})
                assert right.status_code == 200, right.text
            assert again.stop() == 0
        with sqlite3.connect(database) as connection:
            [(stored,)] = connection.execute("SELECT password_hash FROM account WHERE username = ?", (user.username,))
        connection.close()
        assert stored.startswith("$argon2id$"), stored.split("$")[:2]


def test_djangos_default_hash_is_of_the_kind_we_read():
    assert make_password("x").startswith("pbkdf2_sha256$")
