"""The page, in Chromium."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from playwright import sync_api

pytestmark = pytest.mark.slow
sync_api.expect.set_options(timeout=300_000)
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as driver:
        found = shutil.which("chromium") or shutil.which("google-chrome") or driver.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("there is no Chromium here: install it, or run `playwright install chromium`")
        started = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser, server):
    opened, faults = [], []

    def begin(url=server.url, viewport=WIDE, scheme="light"):
        page = browser.new_page(viewport=viewport, color_scheme=scheme)
        page.set_default_timeout(300_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        page.on("request", lambda asked: None if asked.url.startswith((url, "data:")) else faults.append(asked.url))
        page.goto(url)
        opened.append(page)
        return page

    yield begin
    for page in opened:
        page.close()
    assert not [fault for fault in faults if "401" not in fault], faults


def ready(page, tokens="20", endless=False):
    """Wait for the page; an answer without end writes all tokens that it may."""
    if endless:
        page.route("**/v1/chat/completions", without_end)
    page.locator("#mb", has_text="MB").wait_for()
    page.locator("#limit").evaluate(f"field => field.value = {tokens}")
    return page


def without_end(route):
    route.continue_(post_data=json.dumps({**json.loads(route.request.post_data), "logit_bias": {"2": -100}}))


def until(page, condition):
    """Wait; the page's policy forbids Playwright's own way."""
    deadline = time.monotonic() + 300
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(50)


def answered(page, count=1):
    page.locator("#send", has_text="Send").wait_for()
    answers = page.locator(".message.assistant")
    sync_api.expect(answers).to_have_count(count)
    return answers.nth(count - 1).locator(".text").inner_text()


def test_a_conversation(open_page):
    page = ready(open_page())
    page.keyboard.type("the river")  # the field has the focus
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("the house")
    page.keyboard.press("Enter")
    assert answered(page)
    assert page.locator(".message.user .text").inner_text() == "the river\nthe house"
    assert re.search(r"[1-9]\d* of 1,024 tokens", page.inner_text("#context"))
    page.click("text=Again")
    assert answered(page)
    page.fill("#prompt", "the town")
    page.click("#send")
    assert answered(page, 2)
    page.locator("text=Edit").first.click()
    page.locator(".edit").fill("the stone")
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator(".message.user .text").inner_text() == "the stone"
    page.locator("text=Edit").first.click()
    page.locator(".edit").fill("  ")
    page.keyboard.press("Enter")  # nothing to send: all stays
    page.keyboard.press("Escape")
    assert page.locator(".message.user .text").inner_text() == "the stone" and answered(page)
    # What was said before keeps its elements, and only the last answer can be made anew.
    page.locator(".message").first.evaluate("element => element.dataset.kept = 1")
    page.fill("#prompt", "the town")
    page.keyboard.press("Enter")
    answered(page, 2)
    assert page.locator("[data-kept]").count() == 1 == page.locator("text=Again").count()
    ready(page, "900", endless=True)
    page.fill("#prompt", "the house")
    page.keyboard.press("Enter")
    page.locator("#send", has_text="Stop").wait_for()
    page.click("#new")  # while an answer runs
    sync_api.expect(page.locator(".message")).to_have_count(0)
    page.locator("#send", has_text="Send").wait_for()


def test_stopping_and_the_slider_while_a_text_runs(open_page):
    page = ready(open_page(), "900", endless=True)
    full, cells = page.inner_text("#mb"), page.locator("#stack i.in").count()
    page.fill("#prompt", "the river")
    page.keyboard.press("Enter")
    page.locator("#send", has_text="Stop").wait_for()
    page.locator("#size").focus()
    page.keyboard.press("Home")
    sync_api.expect(page.locator("#stack i.in")).to_have_count(1)
    page.keyboard.press("End")
    sync_api.expect(page.locator("#stack i.in")).to_have_count(cells)
    assert page.inner_text("#mb") == full
    page.keyboard.press("Escape")
    answered(page)


def test_the_answer_is_followed_in_a_window_that_becomes_lower(open_page):
    page = ready(open_page(viewport=NARROW), "900", endless=True)
    page.fill("#prompt", "the river")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('main').scrollHeight > 1200")
    page.set_viewport_size({"width": 390, "height": 500})
    until(page, "document.getElementById('main').scrollHeight > 1600")
    until(page, "(m => m.scrollHeight - m.scrollTop - m.clientHeight < 80)(document.getElementById('main'))")
    page.locator("#send").click()
    answered(page)
    page.set_viewport_size({"width": 390, "height": 300})  # and after it
    until(page, "(m => m.scrollHeight - m.scrollTop - m.clientHeight < 80)(document.getElementById('main'))")


def test_steps_of_the_slider(open_page):
    """Each key goes on to another size, and following no more keeps the size."""
    page = ready(open_page())
    page.locator("#size").focus()

    def press(key, wanted):
        before = page.input_value("#size")
        with page.expect_response("**/v1/budget"):
            page.keyboard.press(key)
        until(page, f"!pending && Number(document.getElementById('size').value) {wanted} {before}")

    press("ArrowLeft", "<")
    press("ArrowLeft", "<")
    press("ArrowRight", ">")
    page.keyboard.press("Home")
    sync_api.expect(page.locator("#stack i.in")).to_have_count(1)
    sync_api.expect(page.locator("#size")).to_have_attribute("aria-valuetext", re.compile("megabytes"))
    press("ArrowRight", ">")
    page.keyboard.press("Home")
    sync_api.expect(page.locator("#stack i.in")).to_have_count(1)
    small = page.inner_text("#mb")
    with page.expect_response("**/v1/budget"):
        page.evaluate("resize(size.min_mb)")
    with page.expect_response("**/v1/budget") as answer:
        page.evaluate("resize(size.budget_mb)")  # as unticking does
    assert answer.value.status == 200 and page.inner_text("#mb") == small
    page.keyboard.press("End")
    until(page, "size.mb === size.target_mb && size.budget_mb === size.max_mb")


def test_what_a_model_writes_is_text(open_page):
    """Markdown becomes elements, and HTML stays text."""
    page = ready(open_page())
    raw = (
        "# Head\n\nSome **bold** and `code` <img src=x onerror=alert(1)>\n\n- one\n- two\n\n```py\nprint('<b>')\n```\n"
        "[good](https://example.org) [bad](javascript:alert(1))\n\n  # a comment\n > quoted\n- a\n  > b\n#no head\n>\n"
        "\n| a | b |\n|---|:-:|\n| 1 | `2` |\n\n1. x\n   - y\n     more\n\n2. z\n- no number"
    )
    choice = {"index": 0, "delta": {"content": raw, "reasoning_content": "I <i>think</i>"}, "finish_reason": "stop"}
    event = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=event, headers={"content-type": "text/event-stream"})
    )
    page.fill("#prompt", "x")
    page.keyboard.press("Enter")
    answered(page)
    text = page.locator(".message.assistant .text")
    for tag, count in (
        ("h3", 2),
        ("blockquote", 3),
        ("strong", 1),
        ("li", 7),
        ("ol", 1),
        ("ol > li", 2),
        ("li li", 1),
        ("th", 2),
        ("td code", 1),
        ("pre", 1),
        ("a", 1),
        ("img", 0),
        ("b", 0),
    ):
        sync_api.expect(text.locator(tag)).to_have_count(count)
    text.locator("summary").click()
    assert "I <i>think</i>" in text.inner_text()
    assert "<img src=x" in text.inner_text() and "print('<b>')" in text.locator("pre").inner_text()


def test_a_page_that_asks_for_a_key(open_page, start):
    server = start("--api-key", "secret")
    page = open_page(server.url)
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.locator("#why-key", has_text="does not take that key").wait_for()
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    assert ready(page).inner_text("#name") == "tiny"
    page.close()  # before its server ends


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_fits(open_page, viewport, scheme):
    page = ready(open_page(viewport=viewport, scheme=scheme))
    if viewport is NARROW:
        page.click("#open")
    for name in ("#size", "#stack", "#context", "#prompt", "#send", "#new"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"], name
        assert box["y"] + box["height"] <= viewport["height"], name
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.search(r"\d+", ground)[0]) < 128) == (scheme == "dark")
