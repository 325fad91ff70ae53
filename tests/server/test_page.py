"""The chat page in headless Chromium; skipped where there is none."""

from __future__ import annotations

import importlib.util

import pytest
import requests

from tests.conftest import ROOT

pytest.importorskip("playwright")
from playwright.sync_api import expect, sync_playwright

_SPEC = importlib.util.spec_from_file_location("make_page_picture", ROOT / "docs" / "make_page_picture.py")
pictures = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pictures)


def test_the_page_runs_its_own_script_and_no_other(server):
    response = requests.get(server.url, timeout=60)
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'sha256-" in policy
    assert "unsafe" not in policy
    for foreign in ("src=", "http://", "@import", "cdn"):
        assert foreign not in response.text.replace("http://www.w3.org/2000/svg", "").replace("https?:", "")


@pytest.fixture(scope="module")
def browser():
    path = pictures.chromium()
    if path is None:
        pytest.skip("no Chromium: make browser installs Debian's")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")
    opened = context.new_page()
    opened.wrong = []
    opened.on("pageerror", lambda error: opened.wrong.append(str(error)))
    opened.on("console", lambda said: opened.wrong.append(said.text) if said.type == "error" else None)
    opened.goto(server.url)
    expect(opened.locator("#model")).to_have_text("tiny-chat")
    opened.locator("#settings summary").click()
    opened.locator("#max_tokens").fill("12")
    yield opened
    assert opened.wrong == []
    context.close()


def ask(page, text: str) -> None:
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")
    page.locator("#send:not(.stop)").wait_for()
    expect(page.locator(".foot").last).to_contain_text("tokens")


def test_a_question_is_answered_and_what_was_read_is_shown(page, server):
    ask(page, "hi")
    expected = server.chat("hi", max_tokens=12)["choices"][0]["message"]["content"]
    shown = page.locator(".theirs .text").inner_text()
    assert [c for c in shown if c.isalnum()][:4] == [c for c in expected if c.isalnum()][:4]
    assert page.evaluate("state.tokens.length") == 12
    assert page.evaluate("state.tokens.every((token) => token.layers.length === 6)")
    expect(page.locator("#map-share")).to_contain_text("% of the FFNs")
    expect(page.locator("#map")).to_have_attribute("aria-label", page.locator("#map").get_attribute("aria-label"))
    for place in ("#speed", "#bytes", "#memory", "#loss"):
        assert any(c.isdigit() for c in page.locator(place).inner_text())
    ask(page, "and")
    assert page.evaluate("state.messages.map((message) => message.role)") == ["user", "assistant"] * 2


def test_stop_and_regenerate(page):
    page.locator("#max_tokens").fill("200")
    page.locator("#temperature").fill("3")
    page.locator("#prompt").fill("hi")
    page.locator("#prompt").press("Enter")
    page.wait_for_function("state.tokens.length > 2")
    page.keyboard.press("Escape")
    expect(page.locator(".foot").last).to_contain_text("stopped")
    first = page.locator(".theirs .text").inner_text()
    page.locator("#max_tokens").fill("12")
    page.locator(".again").click()
    page.locator("#send:not(.stop)").wait_for()
    assert page.locator(".theirs").count() == 1
    assert page.locator(".theirs .text").inner_text() != first
    page.locator("#new").click()
    expect(page.locator("#hello")).to_be_visible()
    assert page.evaluate("state.messages.length") == 0


def test_the_slider_says_what_an_answer_may_cost(page):
    page.locator("#bound").focus()
    page.keyboard.press("End")
    expect(page.locator("#bound-text")).to_contain_text("40 % of the FFN bytes. Answers may break.")
    ask(page, "hi")
    assert page.locator("#loss").inner_text().startswith("0.500")
    page.locator("#bound").focus()
    page.keyboard.press("Home")
    expect(page.locator("#bound-value")).to_have_text("0")


def test_comparing_shows_both_and_an_answers_own_picture(page):
    page.locator(".switch").click()
    ask(page, "hi")
    expect(page.locator(".sides .answer")).to_have_count(2)
    expect(page.locator(".side-name.is-dense")).to_have_text("Dense")
    expect(page.locator(".foot").last).to_contain_text("100 % of the FFNs")
    assert page.evaluate("mean(state.tokens.at(-1).layers)") < 1
    page.locator(".sides .answer").last.click()
    assert page.evaluate("mean(state.tokens.at(-1).layers)") == 1


def test_errors_are_said_where_the_answer_would_be(page):
    page.locator("#prompt").fill("x" * 300)
    page.locator("#prompt").press("Enter")
    expect(page.locator(".error")).to_contain_text("the model's context is 256: shorten it")
    page.wrong.clear()  # Chromium itself writes about the status 400
    ask(page, "hi")
    assert page.evaluate("state.messages.length") == 2


@pytest.mark.parametrize(
    ("source", "made"),
    [
        ("a *b* **c** `d`", "<p>a <em>b</em> <strong>c</strong> <code>d</code></p>"),
        ("# T\n- a\n- b\n  1. c", '<h3>T</h3><ul><li>a</li><li>b<ol start="1"><li>c</li></ol></li></ul>'),
        ("```py\n<b>\n", "<pre><code>&#60;b&#62;\n</code></pre>"),
        (
            "|a|b|\n|-|-|\n|1|2|",
            "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>",
        ),
        ("<script>alert(1)</script>", "<p>&#60;script&#62;alert(1)&#60;/script&#62;</p>"),
        ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>"),
        ("2 * 3 * 4 and a_b_c", "<p>2 * 3 * 4 and a_b_c</p>"),
        ("> q\n\n---", "<blockquote><p>q</p></blockquote><hr>"),
    ],
)
def test_markdown(page, source, made):
    assert page.evaluate("(source) => markdown(source)", source) == made


def test_markdown_lets_no_code_through(page):
    attacks = [
        '<img src=x onerror="window.hit=1">',
        '[a](https://x.y/"onmouseover=window.hit=1)',
        "`<svg onload=window.hit=1>`",
    ]
    attacks += [
        "[<img src=x onerror=window.hit=1>](https://x.y)",
        "https://x.y/\"'><script>window.hit=1</script>",
        "\u0000 0\u0000",
    ]
    attacks += [
        "[a](https://x.y/)" + "**`" * 50,
        "| <b>x | y |\n|--|--|\n| <i onclick=window.hit=1> | z |",
        "1. " * 200,
    ]
    for attack in attacks:
        page.evaluate("(source) => { $('turns').innerHTML = markdown(source); }", attack)
        allowed = [
            "p",
            "a",
            "strong",
            "em",
            "code",
            "pre",
            "ul",
            "ol",
            "li",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "blockquote",
            "hr",
            "br",
            "h3",
            "h4",
            "h5",
            "del",
        ]
        tags = page.evaluate("[...$('turns').querySelectorAll('*')].map((e) => e.localName)")
        assert set(tags) <= set(allowed)
        names = page.evaluate("[...$('turns').querySelectorAll('*')].flatMap((e) => e.getAttributeNames())")
        assert set(names) <= {"href", "rel", "target", "start"}
    assert page.evaluate("window.hit") is None


def test_dark_light_and_phone(browser, server):
    context = browser.new_context(viewport={"width": 375, "height": 700}, color_scheme="dark", has_touch=True)
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text("tiny-chat")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    expect(page.locator("#panel")).not_to_be_visible()
    page.locator("#panel-button").tap()
    expect(page.locator("#bound")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).not_to_be_visible()
    page.locator("#theme").tap()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    context.close()


def test_every_control_has_a_name_and_can_be_reached(page):
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter((e) => !(e.getAttribute('aria-label')"
        " || e.textContent.trim() || e.labels?.length)).map((e) => e.id)"
    )
    assert nameless == []
    reached = set()
    page.locator("#prompt").fill("x")
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"prompt", "send", "compare", "bound", "system", "new", "theme"} <= reached
