"""The service's pages in a real browser: a whole session in Swagger UI, and no request to another
host."""

import contextlib
import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import PASSWORD, client, embedded, make_user
from running_service import Service, wait_until

pytestmark = embedded

PAGES = ["/", "/docs", "/docs/", "/redoc", "/redoc/", "/schema", "/schema/", "/healthz", "/metrics", "/nowhere"]

# What each page shows when its scripts have built it.
SHOWN = {"/": "Prompt Service", "/docs": "Post a prompt", "/redoc": "Post a prompt", "/schema": '"openapi": "3.1.0"', "/nowhere": "Not found."}


class Prefixed(BaseHTTPRequestHandler):
    """A proxy that serves a service under a path, as `location /prompts/ { proxy_pass …/; }` of
    nginx does: it removes the path."""

    protocol_version = "HTTP/1.1"

    def forward(self):
        prefix, host, port = self.server.prefix, *self.server.service.host_and_port
        if not self.path.startswith(f"{prefix}/"):
            # Another application of the same host.
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection(host, port, timeout=60)
        with contextlib.closing(upstream):
            upstream.request(self.command, self.path.removeprefix(prefix), body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "content-length", "date", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = forward

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def behind_prefix(service, prefix="/some/prompts"):
    """The address of a service behind a proxy that serves it under a path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Prefixed)
    server.service, server.prefix = service, prefix
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{prefix}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("path", PAGES)
def test_a_page_requests_no_other_host_and_logs_no_error(page, service, path, width):
    page.resize(width, 900)
    page.open(service.url + path)
    page.wait_for_text(SHOWN.get(path.rstrip("/") or "/", ""))
    assert page.hosts() == {service.address}
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is beyond the edge of the window"
    errors = page.errors()
    if path == "/nowhere":
        # The console shows each response that is an error, also that of the page itself.
        errors = [error for error in errors if "status of 404" not in error]
    assert errors == []


def operation(page, name):
    """Opens an operation of Swagger UI and makes its fields writable; returns the element that
    closes it."""
    arrow = page.get("button", name).click()
    page.get("button", "Try it out").click()
    return arrow


def execute(page, status):
    """Sends the open operation's request; returns the body that Swagger UI shows below that
    status."""
    page.get("button", "Execute").click()

    def answered():
        # Code and body stand in the first row of "Server response".
        return page.evaluate("document.querySelector('.live-responses-table tbody .response-col_status')?.innerText")

    got = wait_until(answered, 60, "Swagger UI shows an answer", interval=0.05)
    body = page.evaluate("document.querySelector('.live-responses-table tbody .highlight-code').innerText")
    assert got.split()[0] == str(status), body
    return json.loads(body.removeprefix("Download").strip())


def log_in(page, name, password):
    page.get("button", "Authorize").click()
    page.get("textbox", "username:").fill(name)
    page.get("textbox", "password:").fill(password)
    page.get("button", "Apply given OAuth2 credentials").click()


def session(page, url, name):
    """A new user registers, logs in through "Authorize", posts a prompt and finds it."""
    page.open(f"{url}/docs")
    opened = operation(page, "post /api/auth/register/")
    account = {"username": name, "email": "a@b.c", "password": PASSWORD}
    # The only open field without a name: the request's body.
    page.get("textbox", "").fill(json.dumps(account))
    assert execute(page, 201)["username"] == name
    opened.click()

    log_in(page, name, PASSWORD)
    page.get("button", "Remove authorization").wait()
    # The cross of the dialog has no name either.
    page.evaluate("document.querySelector('.close-modal').click()")

    opened = operation(page, "post /api/prompts")
    # The defaults: the example body, and the selected media type.
    posted = execute(page, 201)
    assert posted["response"] == f"[mock] You said: {posted['prompt']}"
    opened.click()

    opened = operation(page, "get /api/prompts/similar")
    found = execute(page, 200)
    assert [result["id"] for result in found["results"]] == [posted["id"]]
    opened.click()


def test_a_newcomer_registers_logs_in_posts_and_searches_in_swagger_ui(page):
    with Service() as service:
        session(page, service.url, "alice")
        assert page.errors() == [] and page.hosts() == {service.address}
        # The browser stores no credential that could be stolen later.
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_the_same_session_works_behind_a_path_prefix(page):
    with Service() as service, behind_prefix(service) as url:
        session(page, url, "alice")
        assert page.errors() == []
        assert all(address.startswith((f"{url}/", "data:", "blob:", "about:")) for address in page.requests()), page.requests()


@pytest.mark.parametrize("path", ["/", "/docs", "/docs/", "/redoc", "/redoc/"])
def test_every_page_works_behind_a_path_prefix(page, service, path):
    with behind_prefix(service) as url:
        page.open(url + path)
        page.wait_for_text(SHOWN[path.rstrip("/") or "/"])
        assert page.errors() == []
        for link in page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)"):
            if link.startswith("http://127.0.0.1"):
                assert link.startswith(f"{url}/"), link


def test_the_dialog_shows_a_wrong_password_and_then_accepts_the_right_one(page, service):
    with client(service) as http:
        user = make_user(http)
    page.open(f"{service.url}/docs")
    log_in(page, user.username, "a wrong one")
    page.wait_for_text("No active account found with the given credentials")
    page.get("textbox", "password:").fill(PASSWORD)
    page.get("button", "Apply given OAuth2 credentials").click()
    page.get("button", "Remove authorization").wait()


def test_authorize_offers_a_token_and_the_login_and_opens_on_the_login(page, service, user):
    page.open(f"{service.url}/docs")
    page.get("button", "Authorize").click()
    page.get("textbox", "username:").wait()
    offered = page.evaluate("[...document.querySelectorAll('.auth-container h4')].map(each => each.innerText.trim().replace(/\\s+/g, ' '))")
    assert offered == ["api_key (http, Bearer)", "bearer (http, Bearer)", "login (OAuth2, password)"]
    assert page.evaluate("document.activeElement.id") == "oauth_username"
    # Parts of OAuth 2 that this service does not have are not shown.
    for field in ("client_id:", "client_secret:"):
        assert page.get("textbox", field).count() == 0
    # The other way: a token, and Enter. Swagger UI gives the field of API keys, which comes first,
    # the same name.
    page.evaluate("document.querySelectorAll('[aria-label=auth-bearer-value]')[1].setAttribute('aria-label', 'access token')")
    page.get("textbox", "access token").fill(user.access)
    page.press("Enter")
    page.get("button", "Remove authorization").wait()
    page.evaluate("document.querySelector('.close-modal').click()")
    operation(page, "get /api/auth/me/")
    assert execute(page, 200)["username"] == user.username


def test_an_operation_fits_into_a_narrow_window(page, service):
    page.resize(400, 900)
    page.open(f"{service.url}/docs")
    page.get("button", "post /api/prompts").click()
    page.wait_for_text("The prompt with its answer.")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_the_socket_cannot_be_tried_out(page, service):
    page.open(f"{service.url}/docs")
    page.get("button", "get /ws/prompts/").click()
    page.wait_for_text("Opens the socket on which the user's events arrive.")
    assert page.get("button", "Try it out").count() == 0
