"""The browser of the page tests: it finds and uses elements, and it reports the errors of a page.
"""

import urllib.parse

from conftest import embedded
from running_service import wait_until

pytestmark = embedded


def show(page, html):
    return page.open("data:text/html," + urllib.parse.quote(f"<!doctype html><title>Test</title>{html}"))


def test_elements_are_found_by_role_and_name_and_used(page):
    show(page, """
        <section aria-label="left"><button onclick="said.textContent = 'left'">Go&#8203; on</button></section>
        <section aria-label="right"><button onclick="said.textContent = 'right'">Go  on</button></section>
        <button hidden>Go on</button>
        <form onsubmit="said.textContent = word.value; return false"><label>Word <input name="word" value="old"></label></form>
        <p role="status" aria-label="said" id="said"></p>
    """)
    assert page.get("button", "Go on").count() == 2
    for side in ("left", "right"):
        page.get("button", "Go on", within=page.get("region", side)).click()
        assert page.get("status", "said").text() == side
    page.get("textbox", "Word").fill("new")
    page.press("Enter")
    page.wait_for_text("new")
    assert page.get("textbox", "Word").evaluate("e => e.value") == "new"


def test_actions_wait_for_elements_that_a_page_builds_later(page):
    show(page, """<script>
        setTimeout(() => document.body.insertAdjacentHTML("beforeend", "<button onclick='this.textContent = `Done`'>Later</button>"), 300);
    </script>""")
    page.get("button", "Later").click()
    page.get("button", "Done").wait()


def test_errors_and_other_hosts_are_noticed_also_those_of_a_worker(page):
    show(page, """
        <img src="http://picture.example/logo.png" alt="">
        <script>
            console.error("logged", 1);
            setTimeout(() => { throw new Error("thrown"); });
            new Worker(URL.createObjectURL(new Blob(["fetch('http://worker.example/data').catch(() => console.error('in the worker'))"])));
        </script>
    """)
    for part in ("logged 1", "Error: thrown", "picture.example", "in the worker"):
        wait_until(lambda part=part: any(part in error for error in page.errors()), 60, lambda part=part: f"{part} is in {page.errors()}")
    assert {"picture.example", "worker.example"} <= page.hosts()
    # Pages do not share their storage.
    with page.browser.page() as another:
        show(another, "<p>well")
        assert another.errors() == [] and another.hosts() == set()


def test_a_picture_shows_the_whole_page(page, tmp_path):
    page.resize(300, 200)
    show(page, "<body style='margin: 0'><div style='height: 1000px'>")
    page.screenshot(tmp_path / "page.png")
    header = (tmp_path / "page.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert [int.from_bytes(header[at : at + 4]) for at in (16, 20)] == [300, 1000]
