"""A clock that is wrong for one start, and then right again."""

import debian_tools
import pytest
from conftest import LOGIN, ME, PASSWORD, PROMPTS, REFRESH, client, make_user
from running_service import THROTTLES_OFF, Service, wait_until

LOGOUT = "/api/auth/logout/"
DAY = 86_400


def ahead_by(seconds):
    try:
        return debian_tools.wrong_clock(seconds)
    except debian_tools.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("ahead", [2 * DAY, 400 * DAY], ids=["two days", "over a year"])
def test_a_clock_that_is_ahead_for_one_start_makes_nothing_forgotten_or_last(tmp_path, ahead):
    settings = {
        "data_dir": tmp_path / "data", "secret_key": "k" * 64, **THROTTLES_OFF,
        "RUST_LOG": "info,prompt_service=debug", "ACCESS_TOKEN_LIFETIME": "1h",
    }
    wrong = ahead_by(ahead)
    keyed = {"Idempotency-Key": "once"}
    post = {"json": {"prompt": "only once"}}
    with Service(**settings) as service, client(service) as http:
        user = make_user(http)
        credentials = {"username": user.username, "password": PASSWORD}
        first = http.post(PROMPTS, headers={**user.auth, **keyed}, **post)
        assert first.status_code == 201
        kept, ended, ended_later = (http.post(LOGIN, json=credentials).json()["refresh"] for _ in range(3))
        cookie = http.post(LOGIN, json={**credentials, "session": True}).headers["set-cookie"].split(";")[0]
        # Otherwise the client would send it with the logout, and end it.
        http.cookies.clear()
        assert http.post(LOGOUT, json={"refresh": ended}).status_code == 204
        service.stop()

    with Service(**settings, **wrong) as service, client(service) as http:
        assert http.post(PROMPTS, headers=user.auth, **post).status_code == 401, "by this clock the token has expired"
        wait_until(lambda: "expired credentials and keys were deleted" in service.written("stdout"), 60, "the purge has been")
        # By this clock it has expired; by the right one it has not.
        assert http.post(LOGOUT, json={"refresh": ended_later}).status_code == 204
        early = http.post(LOGIN, json=credentials).json()
        service.stop()

    with Service(**settings) as service, client(service) as http:
        refresh = lambda token: http.post(REFRESH, json={"refresh": token})  # noqa: E731
        assert refresh(kept).status_code == 200
        for token in (ended, ended_later):
            assert (refresh(token).status_code, refresh(token).json()["code"]) == (401, "token_not_valid")
        by_session = http.post(REFRESH, headers={"Cookie": cookie, "Origin": service.url})
        assert by_session.status_code == 200
        again = http.post(PROMPTS, headers={**user.auth, **keyed}, **post)
        assert (again.status_code, again.json()) == (201, first.json())
        assert again.headers["idempotent-replayed"] == "true"
        # What the wrong clock gave is from the future.
        assert refresh(early["refresh"]).json()["detail"] == "Token is invalid"
        assert http.get(ME, headers={"Authorization": f"Bearer {early['access']}"}).status_code == 401
        service.stop()


def test_a_key_is_free_again_after_a_day(tmp_path):
    settings = {"data_dir": tmp_path / "data", "secret_key": "k" * 64, **THROTTLES_OFF, "ACCESS_TOKEN_LIFETIME": "2d"}
    request = {"headers": {"Idempotency-Key": "daily"}, "json": {"prompt": "once a day"}}
    wrong = ahead_by(DAY + 3600)
    with Service(**settings) as service, client(service) as http:
        user = make_user(http)
        request["headers"] |= user.auth
        first = http.post(PROMPTS, **request)
        assert http.post(PROMPTS, **request).json() == first.json()
        service.stop()
    with Service(**settings, **wrong) as service, client(service) as http:
        next_day = http.post(PROMPTS, **request)
        assert next_day.status_code == 201
        assert next_day.json()["id"] > first.json()["id"]
        assert http.post(PROMPTS, **request).json() == next_day.json()
        service.stop()
