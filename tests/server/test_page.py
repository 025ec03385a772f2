"""The page in headless Chromium: send, stream, stop, reload; a script in an answer does not run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from flashrt.server.page import FILE
from tests.server.conftest import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ATTACK = "<script>document.title = 'attack'</script><img src=x onerror=\"document.title='attack'\"> **bold** `code`\n\n"
FENCED = "```html\n<script>document.title = 'attack'</script>\n```\n"


def test_it_is_served_with_what_it_may_do(server: Server) -> None:
    reply = server.get("/")
    assert reply.status_code == 200
    assert reply.text == FILE.read_text()
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_nothing_is_fetched_from_elsewhere_or_read_as_html() -> None:
    text = FILE.read_text()
    assert not re.search(r"(src|href)=", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)


def test_status(server: Server) -> None:
    found = server.get("/status").json()
    assert found["ready"]
    assert found["model"] == server.name
    assert sum(found["owners"].values()) == found["budget_bytes"]
    assert 0 < found["resident_bytes"] <= found["peak_resident_bytes"]


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        found = browser.new_page(viewport={"width": 1200, "height": 800})
        found.goto(server.base)
        named(found, server)
        yield found
        browser.close()


def send(page: Any, text: str, most: int = 20) -> None:
    page.evaluate("most => { document.getElementById('most').value = most }", most)
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def over(page: Any) -> None:
    page.locator("#stop:disabled").wait_for()


def named(page: Any, server: Server) -> None:
    """The page knows what it talks to."""
    page.locator("#model", has_text=server.name).wait_for()


@pytest.mark.slow
def test_a_message_is_answered_kept_and_answered_again(page: Any, server: Server) -> None:
    send(page, "the thing on and on")
    over(page)
    answer = page.locator(".turn.answer").inner_text()
    assert len(answer) > 5
    page.locator("#owners tr").nth(3).wait_for()
    page.reload()
    assert page.locator(".turn.answer").inner_text() == answer
    assert page.locator(".turn.user").inner_text() == "the thing on and on"
    named(page, server)
    page.get_by_role("button", name="Regenerate").click()
    over(page)
    assert page.locator(".turn").count() == 2
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    page.get_by_label("Conversations").select_option(index=1)
    assert page.locator(".turn").count() == 2


@pytest.mark.slow
def test_a_script_in_an_answer_does_not_run(page: Any) -> None:
    chunks = [{"choices": [{"delta": {"content": part}}]} for part in (ATTACK, FENCED)]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    send(page, "<img src=x onerror=\"document.title='attack'\">")
    over(page)
    page.reload()
    assert page.title() == "flashrt"
    assert page.locator("#log script, #log img").count() == 0
    text = page.locator(".turn.answer").inner_text()
    assert "<script>" in text
    assert page.locator(".turn.answer strong").inner_text() == "bold"
    assert "<script>" in page.locator(".turn.answer pre").inner_text()


@pytest.mark.slow
def test_an_error_is_shown(page: Any) -> None:
    send(page, "on", most=5000)
    over(page)
    assert "do not fit in the context" in page.locator(".error").inner_text()


@pytest.mark.slow
def test_a_phone_has_room_for_it(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 720})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.slow
def test_an_answer_is_stopped(slow_server: Server, page: Any) -> None:
    page.goto(slow_server.base)
    named(page, slow_server)
    send(page, "on and on", most=15000)
    page.get_by_role("button", name="Stop").click()
    over(page)
    assert page.locator(".error").count() == 0
    send(page, "on", most=2)
    over(page)
    assert page.locator(".turn").count() == 4
