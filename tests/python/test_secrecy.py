"""No log line, metric or error response contains a password, a token, a ticket or a prompt, at any
log level."""

import json
import socket
from urllib.parse import urlsplit

import pytest
from conftest import LOGIN, PASSWORD, PROMPTS, REFRESH, REGISTER, SIMILAR, SOCKET, client, make_user, post_prompt
from running_service import THROTTLES_OFF
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=B"}

# Part of every secret here.
MARK = "x9secret7q"
LOGOUT, TICKET = "/api/auth/logout/", "/api/auth/ws-ticket/"


def open_websocket(service, query="", **options):
    """Opens a socket and sends secrets; a refusal is fine too."""
    try:
        with connect(f"{service.ws_url}{SOCKET}{query}", **options) as events:
            events.recv(timeout=10)
            events.send(json.dumps({"type": "auth", "token": f"{MARK}.in.frame"}))
            events.send(f"{MARK} in a frame of no known kind")
            events.ping().wait(10)
            return True
    except InvalidStatus as refused:
        assert MARK.encode() not in (refused.response.body or b"")
        return False


def exercise(service, http):
    """Sends each secret in every place where a client can put it, well-formed and malformed;
    returns the secrets and the error responses."""
    user = make_user(http)
    password = f"{MARK}-Password-1"
    errors = []

    def send(method, path, **options):
        answer = http.request(method, path, **options)
        if answer.status_code >= 400:
            errors.append(answer)
        return answer

    # Registering and logging in, right and wrong.
    name = f"log{user.id}"
    assert send("POST", REGISTER, json={"username": name, "email": "a@b.c", "password": password}).status_code == 201
    send("POST", REGISTER, json={"username": name, "email": "a@b.c", "password": password})
    send("POST", REGISTER, json={"username": password, "email": password, "password": password})
    send("POST", REGISTER, json={"username": "bad name", "email": MARK, "password": MARK})
    for content, headers in [
        (f'{{"password": "{password}" {MARK}', JSON), (f'["{password}"]', JSON), (f'{{"password": "{password}\\ud800"}}', JSON),
        (f"username={name}&password={password}&%", FORM), (f'--B\r\nContent-Disposition: {MARK}\r\n\r\n{password}\r\n', MULTIPART),
        (password, {"Content-Type": f"text/{MARK}"}), (password, {}),
    ]:
        for path in (REGISTER, LOGIN, REFRESH, LOGOUT):
            send("POST", path, content=content, headers=headers)
    send("POST", LOGIN, json={"username": name, "password": f"{password}-wrong"})
    send("POST", LOGIN, json={"username": password, "password": password})
    pair = send("POST", LOGIN, json={"username": name, "password": password, "session": True})
    cookie = pair.cookies["session"]
    http.cookies.clear()
    access, refresh = pair.json()["access"], pair.json()["refresh"]
    auth = {"Authorization": f"Bearer {access}"}

    # Tokens, in their places and in other places.
    send("POST", REFRESH, json={"refresh": refresh})
    for token in (f"{refresh}x", access, f"{MARK}.{MARK}.{MARK}", MARK):
        send("POST", REFRESH, json={"refresh": token})
        for scheme in ("Bearer", "Basic", "Bearer x"):
            send("GET", PROMPTS, headers={"Authorization": f"{scheme} {token}x"})
        send("GET", f"{PROMPTS}?token={token}&ticket={token}")
        send("GET", f"/{token}", headers={"X-Request-Id": f"{token} {MARK}", "Cookie": f"session={token}"})
    tickets = [send("POST", TICKET, headers=auth).json()["ticket"] for _ in range(2)]
    assert open_websocket(service, f"?ticket={tickets[0]}")
    assert not open_websocket(service, f"?ticket={tickets[0]}")
    assert open_websocket(service, f"?token={access}")
    assert open_websocket(service, additional_headers=auth)
    assert open_websocket(service, subprotocols=["bearer", access])
    assert open_websocket(service, additional_headers={"Cookie": f"session={cookie}"}, origin=service.url)
    assert not open_websocket(service, additional_headers={"Cookie": f"session={cookie}"}, origin=f"http://{MARK}.example")
    assert not open_websocket(service, f"?token={MARK}")
    assert not open_websocket(service, f"?ticket={MARK}")

    # Prompts and queries.
    text = f"{MARK} is what I asked"
    author = type(user)(user.id, name, access, refresh)
    posted = post_prompt(http, author, text, websocket=True)
    assert posted.status_code == 201
    send("GET", SIMILAR, params={"q": text}, headers=auth)
    send("GET", SIMILAR, params={"q": text, "k": MARK}, headers=auth)
    send("GET", SIMILAR, params={"q": text * 1500}, headers=auth)
    send("GET", PROMPTS, params={"cursor": MARK, "limit": MARK}, headers=auth)
    send("GET", f"{PROMPTS}/{MARK}", headers=auth)
    send("DELETE", f"{PROMPTS}/{posted.json()['id']}", headers=auth)
    send("BREW", PROMPTS, content=text, headers=auth)
    send("PATCH", f"{PROMPTS}?q={MARK}", content=text, headers=auth)
    for body in ({"prompt": text, "websocket": text}, {"prompt": [text]}, {"prompt": f"{text}\0"}, {"prompt": text * 1500}, {text: text}):
        send("POST", PROMPTS, json=body, headers=auth)
    for content, headers in [(f'{{"prompt": "{text}"', JSON), (text, MULTIPART), (text, {"Content-Type": MARK})]:
        send("POST", PROMPTS, content=content, headers={**auth, **headers})
    send("POST", PROMPTS, json={"prompt": text}, headers={**auth, "Accept": f"text/{MARK}"})
    send("POST", LOGOUT, json={"refresh": refresh}, headers={"Cookie": f"session={cookie}"})
    send("POST", REFRESH, json={"refresh": refresh})
    for line in (f"GET /{MARK} {MARK} HTTP/1.1", f"{MARK}\0 / HTTP/1.1", f"GET / HTTP/1.1\r\nHost: x\r\n{MARK}", "GET / HTTP/1.1\r\nContent-Length: " + MARK):
        with socket.create_connection(service.host_and_port, timeout=30) as connection:
            connection.sendall(f"{line}\r\n\r\n".encode())
            assert MARK.encode() not in connection.recv(65536)
    assert len(errors) > 50
    secrets = [MARK, PASSWORD, service.secret_key, access, refresh, user.access, user.refresh, cookie, *tickets]
    servers = [urlsplit(service.environment[name]).password for name in ("DATABASE_URL", "REDIS_URL") if name in service.environment]
    return secrets + servers + [part for token in (access, refresh) for part in token.split(".")[1:]], errors


def told(text, secrets):
    """The first secret in the text, with the text around it."""
    for secret in secrets:
        place = text.find(secret)
        if place >= 0:
            return text[max(0, place - 300) : place + 100]
    return None


@pytest.mark.parametrize("form", ["json", "pretty"])
@pytest.mark.parametrize("level", ["info", "debug", "trace"])
def test_no_secret_is_in_logs_metrics_or_responses(serve, form, level):
    with serve(LOG_FORMAT=form, RUST_LOG=level, **THROTTLES_OFF) as service, client(service) as http:
        secrets, errors = exercise(service, http)
        metrics = http.get("/metrics").text
        assert service.stop() == 0
        log = service.written("stdout") + service.written("stderr")
    assert log.count("request_id") > 80, "the requests were logged"
    assert told(log, secrets) is None
    assert told(metrics, secrets) is None
    for answer in errors:
        assert told(answer.text, secrets) is None, answer.request.url
        assert told(str(answer.headers), secrets) is None, answer.request.url
