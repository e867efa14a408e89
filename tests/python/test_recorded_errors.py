"""Every request that the replaced system answered with a 4xx gets the same status and keys here.

A table of that system's recorded responses. If the service's contract differs, the row follows the
contract and says so. Texts for people are not compared, except the `detail` texts that the contract
quotes.
"""

import json
import time
from dataclasses import dataclass, field

import jwt
import pytest
from conftest import LOGIN, PASSWORD, PROMPTS, REFRESH, REGISTER, SIMILAR, assert_json_error, client, make_user, post_prompt
from running_service import wait_until
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

FORM = "application/x-www-form-urlencoded"
NON_FIELD = {"non_field_errors"}
DETAIL = {"detail"}
FULL_TOKEN_ERROR = {"detail", "code", "messages"}


@dataclass
class Case:
    """One request and the required response. `body` is sent as JSON unless it is bytes; `token`
    makes the credential."""

    name: str
    method: str
    path: str
    status: int
    keys: set
    body: object = None
    type: str = "application/json"
    token: object = None
    headers: dict = field(default_factory=dict)
    code: str | None = None

    def content(self):
        if self.body is None or isinstance(self.body, bytes):
            return self.body
        return json.dumps(self.body).encode()


def claims(user, kind="access", **changes):
    now = int(time.time())
    made = {"token_type": kind, "exp": now + 300, "iat": now, "jti": "0123456789abcdef" * 2, "user_id": str(user.id)}
    made.update(changes)
    return {name: value for name, value in made.items() if value is not None}


def minted(kind="access", algorithm="HS256", foreign=False, **changes):
    """A maker of tokens with these claims; a claim of None is left out."""

    def make(user, key):
        secret = "x" * 64 if foreign else key
        return jwt.encode(claims(user, kind, **changes), None if algorithm == "none" else secret, algorithm)

    return make


def own(user, _):
    return user.access


ENDED = {"exp": 1_700_000_000, "iat": 1_699_999_000}
NAME = {"username": "recorded-name", "email": "r@example.com", "password": PASSWORD}


def register(name, keys, body, **more):
    return Case(name, "POST", REGISTER, 400, keys, body, **more)


REGISTER_CASES = [
    register("register: empty object", {"username", "email", "password"}, {}),
    register("register: no body", {"username", "email", "password"}, b""),
    register("register: missing email", {"email"}, {"username": "recorded-x", "password": PASSWORD}),
    register("register: blank fields", {"username", "email", "password"}, {"username": "", "email": "", "password": ""}),
    register("register: null fields", {"username", "email", "password"}, {"username": None, "email": None, "password": None}),
    register("register: wrong types", {"username", "email", "password"}, {"username": ["a"], "email": {"a": 1}, "password": True}),
    register("register: bad email", {"email"}, {**NAME, "email": "not-an-email"}),
    register("register: username of 151 characters", {"username"}, {**NAME, "username": "a" * 151}),
    register("register: username with a space", {"username"}, {**NAME, "username": "two words"}),
    register("register: NUL in the username", {"username"}, {**NAME, "username": "a\0b"}),
    register("register: short and common password", {"password"}, {**NAME, "password": "abc"}),
    register("register: password of digits", {"password"}, {**NAME, "password": "8675309421"}),
    register("register: password like the username", {"password"}, {**NAME, "username": "oracle3d8e32544", "password": "oracle3d8e325444"}),
    register("register: common password", {"password"}, {**NAME, "password": "password123"}),
    register("register: several field errors at once", {"username", "email"}, {"username": "two words", "email": "x", "password": "abc"}),
    register("register: array body", NON_FIELD, [NAME]),
    register("register: malformed JSON", DETAIL, b'{"username": '),
    Case("register: wrong content type", "POST", REGISTER, 415, DETAIL, b"username=a", "text/plain"),
    Case("register: GET", "GET", REGISTER, 405, DETAIL),
]

LOGIN_CASES = [
    Case("login: unknown user", "POST", LOGIN, 401, DETAIL, {"username": "no-such-user", "password": "nope"}),
    Case("login: missing fields", "POST", LOGIN, 400, {"username", "password"}, {}),
    Case("login: missing password", "POST", LOGIN, 400, {"password"}, {"username": "somebody"}),
    Case("login: blank", "POST", LOGIN, 400, {"username", "password"}, {"username": "", "password": ""}),
    Case("login: null", "POST", LOGIN, 400, {"username", "password"}, {"username": None, "password": None}),
    Case("login: malformed JSON", "POST", LOGIN, 400, DETAIL, b"{"),
    Case("login: wrong content type", "POST", LOGIN, 415, DETAIL, b"{}", "text/plain"),
    Case("login: GET", "GET", LOGIN, 405, DETAIL),
    # The record has a redirect here; in the contract the route works with and without the slash.
    Case("login: without the slash, missing fields", "POST", "/api/auth/login", 400, {"username", "password"}, {}),
    Case("register: without the slash, empty object", "POST", "/api/auth/register", 400, {"username", "email", "password"}, {}),
]


def refresh(name, token):
    """An invalid refresh token; the token is made for the body."""
    return Case(f"refresh: {name}", "POST", REFRESH, 401, {"detail", "code"}, token, code="token_not_valid")


REFRESH_CASES = [
    refresh("garbage", lambda *_: "garbage"),
    refresh("expired", minted("refresh", **ENDED)),
    refresh("foreign key", minted("refresh", foreign=True)),
    refresh("an access token", own),
    refresh("no token_type claim", minted(None)),
    refresh("no jti claim", minted("refresh", jti=None)),
    Case("refresh: missing", "POST", REFRESH, 400, {"refresh"}, {}),
    Case("refresh: blank", "POST", REFRESH, 400, {"refresh"}, {"refresh": ""}),
    Case("refresh: null", "POST", REFRESH, 400, {"refresh"}, {"refresh": None}),
    # The record has a 500 here, a bug of that system.
    Case("refresh: deleted account", "POST", REFRESH, 401, DETAIL, minted("refresh", user_id="999999999")),
    Case("refresh: malformed JSON", "POST", REFRESH, 400, DETAIL, b"{"),
    Case("refresh: GET", "GET", REFRESH, 405, DETAIL),
]


def unauthorized(name, keys, code=None, token=None, headers=None, path=PROMPTS):
    return Case(f"prompts: {name}", "POST", path, 401, keys, {"prompt": "x"}, token=token, headers=headers or {}, code=code)


def bad_token(name, token):
    return unauthorized(name, FULL_TOKEN_ERROR, "token_not_valid", token)


CREDENTIAL_CASES = [
    unauthorized("no Authorization header", DETAIL),
    unauthorized("another scheme", DETAIL, headers={"Authorization": "Basic YTpi"}),
    unauthorized("lower-case scheme", DETAIL, headers={"Authorization": "bearer {access}"}),
    unauthorized("Bearer without a token", {"detail", "code"}, "bad_authorization_header", headers={"Authorization": "Bearer"}),
    unauthorized("Bearer with three parts", {"detail", "code"}, "bad_authorization_header", headers={"Authorization": "Bearer a b"}),
    bad_token("garbage token", lambda *_: "garbage"),
    bad_token("expired token", minted(**ENDED)),
    bad_token("foreign key", minted(foreign=True)),
    bad_token("alg none", minted(algorithm="none")),
    bad_token("HS512 with the right key", minted(algorithm="HS512")),
    bad_token("refresh token", minted("refresh")),
    bad_token("no exp claim", minted(exp=None)),
    unauthorized("no user_id claim", {"detail", "code"}, "token_not_valid", minted(user_id=None)),
    # The record has a 500 here; without the signing key it cannot be reached.
    unauthorized("user_id that is no number", {"detail", "code"}, None, minted(user_id="abc")),
    unauthorized("deleted account", {"detail", "code"}, "user_not_found", minted(user_id="999999999")),
    unauthorized("?token= does not authenticate HTTP", DETAIL, path=PROMPTS + "?token={access}"),
    Case("prompts: GET, not authenticated", "GET", PROMPTS, 401, DETAIL),
    Case("prompts: OPTIONS, not authenticated", "OPTIONS", PROMPTS, 401, DETAIL),
    Case("similar: no credentials", "GET", f"{SIMILAR}?q=a", 401, DETAIL),
    Case("similar: expired token", "GET", f"{SIMILAR}?q=a", 401, FULL_TOKEN_ERROR, token=minted(**ENDED), code="token_not_valid"),
]


def prompt(name, keys, body, status=400, **more):
    return Case(f"prompts: {name}", "POST", PROMPTS, status, keys, body, token=own, **more)


PROMPT_CASES = [
    prompt("empty object", {"prompt"}, {}),
    prompt("blank", {"prompt"}, {"prompt": ""}),
    prompt("only spaces", {"prompt"}, {"prompt": "   "}),
    prompt("null", {"prompt"}, {"prompt": None}),
    prompt("list", {"prompt"}, {"prompt": ["a"]}),
    prompt("object", {"prompt"}, {"prompt": {"a": 1}}),
    prompt("boolean", {"prompt"}, {"prompt": True}),
    prompt("NUL character", {"prompt"}, {"prompt": "a\0b"}),
    prompt("websocket null", {"websocket"}, {"prompt": "x", "websocket": None}),
    prompt("websocket no boolean", {"websocket"}, {"prompt": "x", "websocket": "maybe"}),
    prompt("websocket 2", {"websocket"}, {"prompt": "x", "websocket": 2}),
    prompt("websocket list", {"websocket"}, {"prompt": "x", "websocket": []}),
    prompt("array body", NON_FIELD, [{"prompt": "x"}]),
    prompt("string body", NON_FIELD, b'"hello"'),
    prompt("number body", NON_FIELD, b"3"),
    prompt("null body", NON_FIELD, b"null"),
    prompt("malformed JSON", DETAIL, b'{"prompt": '),
    prompt("NaN", DETAIL, b'{"prompt": NaN}'),
    prompt("invalid UTF-8", DETAIL, b'{"prompt": "\xff"}'),
    prompt("empty body", {"prompt"}, b""),
    prompt("wrong content type", DETAIL, b'{"prompt": "x"}', 415, type="text/plain"),
    prompt("no content type", DETAIL, b'{"prompt": "x"}', 415, type=None),
    # The record has 400 in HTML from 2.5 MiB on: the contract has 413 from 1 MiB on.
    prompt("JSON of 3 MiB", DETAIL, {"prompt": "x" * 3_145_728}, 413),
    prompt("form of 3 MiB", DETAIL, b"prompt=" + b"x" * 3_145_728, 413, type=FORM),
    Case("prompts: DELETE", "DELETE", PROMPTS, 405, DETAIL, token=own),
    Case("prompts: Accept of XML", "POST", PROMPTS, 406, DETAIL, {"prompt": "x"}, token=own, headers={"Accept": "application/xml"}),
]


def similar(name, keys, query, status=400):
    return Case(f"similar: {name}", "GET", SIMILAR + query, status, keys, token=own)


SIMILAR_CASES = [
    similar("q missing", DETAIL, ""),
    similar("q empty", DETAIL, "?q="),
    # The record has a `detail`: the contract makes these errors of the field `k`, and bounds it.
    *(similar(f"k={k!r}", {"k"}, f"?q=a&k={k}") for k in ("abc", "1.5", "", "0", "-1", "101", "1000000", "9" * 23)),
    Case("similar: POST", "POST", SIMILAR, 405, DETAIL, {"q": "a"}, token=own),
]

OTHER_CASES = [
    Case("unknown path", "GET", "/api/nope", 404, DETAIL),
]

CASES = REGISTER_CASES + LOGIN_CASES + REFRESH_CASES + CREDENTIAL_CASES + PROMPT_CASES + SIMILAR_CASES + OTHER_CASES


@pytest.fixture(scope="module")
def owner(http):
    return make_user(http)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_recorded_error_keeps_its_status_and_keys(service, http, owner, case):
    headers = {name: value.format(access=owner.access) for name, value in case.headers.items()}
    if case.type and case.body is not None:
        headers["Content-Type"] = case.type
    if case.token:
        headers["Authorization"] = f"Bearer {case.token(owner, service.secret_key)}"
    content = case.content() if not callable(case.body) else json.dumps({"refresh": case.body(owner, service.secret_key)})
    answer = http.request(case.method, case.path.format(access=owner.access), content=content, headers=headers)
    assert answer.status_code == case.status, answer.text
    body = assert_json_error(answer)
    assert set(body) == case.keys
    if case.code:
        assert body["code"] == case.code
    if case.status == 401:
        assert answer.headers["www-authenticate"].startswith("Bearer")
    if case.status == 405:
        assert answer.headers["allow"]


def test_a_taken_username_is_a_field_error_also_with_spaces_around_it(http, owner):
    for name in (owner.username, f"  {owner.username}  "):
        answer = http.post(REGISTER, json={**NAME, "username": name})
        assert answer.status_code == 400
        assert set(assert_json_error(answer)) == {"username"}


def test_a_stale_token_does_not_change_what_register_answers(http, owner):
    answer = http.post(REGISTER, json={**NAME, "username": owner.username}, headers={"Authorization": "Bearer garbage"})
    assert answer.status_code == 400
    assert set(assert_json_error(answer)) == {"username"}


@pytest.mark.parametrize("change", [{"password": "nope"}, {"username": str.upper}], ids=["wrong password", "wrong case"])
def test_wrong_credentials_are_401_without_a_hint(http, owner, change):
    body = {"username": owner.username, "password": PASSWORD}
    body |= {name: value(body[name]) if callable(value) else value for name, value in change.items()}
    answer = http.post(LOGIN, json=body)
    assert answer.status_code == 401
    assert answer.json() == {"detail": "No active account found with the given credentials"}


def test_a_missing_query_has_the_contracts_words(http, owner):
    assert http.get(SIMILAR, headers=owner.auth).json() == {"detail": "Missing ?q="}


def test_a_lone_surrogate_is_a_400(http, owner):
    headers = {**owner.auth, "Content-Type": "application/json"}
    answer = http.post(PROMPTS, content=b'{"prompt": "\\ud800"}', headers=headers)
    assert answer.status_code == 400
    # The record has the key `prompt`; the contract also allows `detail`.
    assert set(assert_json_error(answer)) in ({"prompt"}, {"detail"})


def test_a_second_prompt_within_a_second_is_429_and_an_invalid_one_counts(serve):
    with serve() as service, client(service) as http:

        def refused():
            user = make_user(http)
            began = time.monotonic()
            assert http.post(PROMPTS, json={}, headers=user.auth).status_code == 400
            answer = post_prompt(http, user, "at once again")
            if answer.status_code == 201:
                # This is correct if the machine took a second; then another user tries.
                assert time.monotonic() - began >= 1
                return None
            return answer

        answer = wait_until(refused, 60, "two posts within a second", interval=0)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        # The contract's "second(s)" stands for the singular and the plural.
        assert answer.json() == {"detail": "Request was throttled. Expected available in 1 second."}


@pytest.mark.parametrize("token", ["", "garbage", None], ids=["empty", "garbage", "none"])
def test_a_socket_without_a_valid_token_is_refused_before_the_upgrade(service, token):
    # The record accepts such a socket as anonymous: the contract does not.
    with pytest.raises(InvalidStatus) as refused:
        connect(f"{service.ws_url}/ws/prompts/" + ("" if token is None else f"?token={token}")).close()
    assert refused.value.response.status_code == 401


@pytest.mark.parametrize("path", ["/ws/nope/", "/ws/"])
def test_an_unknown_socket_path_is_404(service, path):
    # The record has a 500 here.
    with pytest.raises(InvalidStatus) as refused:
        connect(service.ws_url + path).close()
    assert refused.value.response.status_code == 404
