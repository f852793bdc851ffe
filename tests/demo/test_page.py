"""The page as people meet it, in headless Chromium."""

from __future__ import annotations

import contextlib
import re
from base64 import b64encode

import pytest
from browser import names, ready, says, search
from conftest import encoded
from playwright.sync_api import Error
from shapes import HOSTILE, draw

from interlace.demo.app import create_app

pytestmark = pytest.mark.browser
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def address(small, serving) -> str:
    return serving(create_app(*small, max_bytes=300_000, questions=["what colour is it?", "what shape is it?"]))


def drop(page, data: bytes, name: str, kind: str) -> None:
    """A file dragged from elsewhere over the page and let go."""
    transfer = page.evaluate_handle(
        """([text, name, type]) => { const t = new DataTransfer();
           t.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name, {type})); return t; }""",
        [b64encode(data).decode(), name, kind],
    )
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    assert page.locator("#veil").is_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    assert not page.locator("#veil").is_visible()


# ---- searching


def test_the_start_shows_some_pictures_and_queries_to_try(open_page):
    page = open_page()
    assert "64" in page.locator("#status").text_content() and len(names(page)) == 24
    page.locator("#examples button").first.click()
    says(page, "#status", r" ms")
    assert page.locator("#words").input_value() and "#q=" in page.url


def test_words(open_page):
    page = open_page()
    search(page, "yellow circle")
    assert names(page)[:2] == ["Yellow circle"] * 2
    assert re.fullmatch(r"24 pictures of 64 in [\d.]+ ms, re-ranked", page.locator("#status").text_content())
    card = page.locator("#grid a.card").first
    assert re.search(r"\d %", card.locator(".match").text_content())
    assert "robability" in card.locator(".match").get_attribute("title")
    assert "imilarity" in card.locator(".score").get_attribute("title")
    assert card.locator(".attributes span").count() == 3
    assert card.locator("img").get_attribute("alt").endswith("yellow circle")
    assert page.title() == "yellow circle · interlace"
    page.locator("#more").click()
    says(page, "#status", r"^48 ")
    assert len(names(page)) == 48


def test_filters_and_their_way_back(open_page):
    page = open_page()
    search(page, "circle")
    page.locator("details[data-column=colour] > summary").click()
    page.get_by_label("green").check()
    page.locator("#chosen .token").wait_for()
    page.get_by_label("blue").check()
    says(page, "#status", r"^16 ")
    ready(page)
    assert {name.split()[0] for name in names(page)} == {"Green", "Blue"}
    page.keyboard.press("Escape")
    page.locator("details[data-column=size] > summary").click()
    page.get_by_label("Size at least").fill("50")
    page.get_by_label("Size at least").press("Enter")
    says(page, "#status", r"^8 ")
    page.locator("details[data-column=warm] > summary").click()
    page.get_by_label("yes").check()
    says(page, "#hint", r"Nothing passes")
    page.go_back()
    says(page, "#status", r"^8 ")
    page.reload()
    says(page, "#status", r"^8 ")
    page.get_by_role("button", name=re.compile("Remove the filter Colour")).click()
    says(page, "#status", r"^24 ")
    page.get_by_role("button", name=re.compile("Remove the filter Size")).click()
    page.locator("#chosen .token").first.wait_for(state="detached")


def test_filters_without_a_query_browse(open_page):
    page = open_page()
    page.locator("details[data-column=shape] > summary").click()
    page.get_by_label("bar").check()
    page.locator("#chosen .token").wait_for()
    says(page, "#status", r"filter")
    ready(page)
    assert {name.split()[-1] for name in names(page)} == {"bar"}


def test_a_value_that_tries_to_be_code_is_only_a_value(open_page):
    page = open_page()
    page.locator("details[data-column=colour] > summary").click()
    page.get_by_label(HOSTILE).check()
    says(page, "#status", r"filter")
    ready(page)
    assert names(page) == [HOSTILE]
    page.locator("#grid a.card").first.click()
    page.locator("#panel .row a.card").first.wait_for()
    assert page.locator("#panel-name").text_content() == HOSTILE
    assert page.locator("img[src=x]").count() == 0 and "broken in" not in page.title()


def test_the_written_filter(open_page):
    page = open_page()
    page.expected.append("422")  # Chromium notes the refused request itself
    search(page, "square")
    page.locator("#options > summary").click()
    page.locator("#where").fill("siez > 100")
    page.locator("#where").press("Enter")
    says(page, "#alert", "Did you mean 'size'")
    assert page.locator("#alert pre").text_content() == "siez > 100\n^"
    page.locator("#options > summary").click()
    page.locator("#where").fill("size > 50 and colour contains 'UR'")
    page.get_by_role("button", name="Apply").click()
    says(page, "#status", r"^4 ")
    ready(page)
    assert not page.locator("#alert").text_content()
    assert {name.split()[0] for name in names(page)} == {"Purple"}


def test_mode_and_rerank(open_page):
    page = open_page()
    search(page, "large pink")
    page.locator("#options > summary").click()
    page.get_by_label("By words in the caption").check()
    page.locator("#rerank").uncheck()
    says(page, "#status", r" ms$")
    ready(page)
    assert page.locator(".grid .match").count() == 0
    assert "mode=text" in page.url and "rerank=false" in page.url
    page.locator("#words").fill("zeppelin")
    page.locator("#words").press("Enter")
    says(page, "#hint", r"caption")
    assert names(page) == []


# ---- by a picture


def test_a_chosen_picture_alone_and_with_words(open_page, red_circle):
    page = open_page()
    page.set_input_files("#file", {"name": "mine.png", "mimeType": "image/png", "buffer": red_circle})
    says(page, "#status", r" ms")
    ready(page)
    assert "Red circle" in names(page)[:2] and not page.locator("#balance").is_visible()
    assert page.locator("#given-picture").get_attribute("src").startswith("blob:")
    search(page, "blue square")
    slider = page.locator("#weight")
    slider.fill("0")
    says(page, "#status", r" ms")
    assert slider.get_attribute("aria-valuetext") == "100 % words, 0 % picture"
    page.locator("#grid .name:text-is('Blue square')").first.wait_for()
    page.go_back()  # the balance before
    page.go_back()  # the picture alone
    page.locator("#balance").wait_for(state="hidden")
    page.locator("#given-remove").click()
    says(page, "#status", r"A few")
    assert not page.locator("#given").is_visible()


def test_a_dropped_picture(open_page):
    page = open_page()
    drop(page, encoded(draw("triangle", "purple", 50)), "dropped.png", "image/png")
    says(page, "#status", r" ms")
    ready(page)
    assert names(page)[:2] == ["Purple triangle"] * 2


def test_a_pasted_picture(open_page):
    page = open_page()
    page.evaluate(
        """(text) => { const t = new DataTransfer();
           t.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], '', {type: 'image/png'}));
           document.body.dispatchEvent(new ClipboardEvent('paste',
             {clipboardData: t, bubbles: true, cancelable: true})); }""",
        b64encode(encoded(draw("bar", "orange"))).decode(),
    )
    says(page, "#status", r" ms")
    ready(page)
    assert names(page)[:2] == ["Orange bar"] * 2


def test_files_that_cannot_be_searched_with(open_page):
    page = open_page()
    page.expected += ["415", "413", "ERR_FILE_NOT_FOUND"]
    drop(page, b"hello", "notes.txt", "text/plain")
    says(page, "#alert", r"not a picture")
    drop(page, bytes(400_000), "big.jpg", "image/jpeg")
    says(page, "#alert", r"at most 0.3 MB")
    drop(page, b"<!doctype html>", "page.jpg", "image/jpeg")
    says(page, "#alert", r"HTML")
    assert names(page) == []
    page.locator("#given-remove").click()  # and on it goes
    says(page, "#status", r"A few")


def test_a_picture_does_not_survive_a_reload_and_the_page_says_so(open_page, red_circle):
    page = open_page()
    page.set_input_files("#file", {"name": "mine.png", "mimeType": "image/png", "buffer": red_circle})
    says(page, "#status", r" ms")
    page.reload()
    says(page, "#alert", r"Choose it again")


# ---- one picture


def test_an_item_its_answers_and_what_resembles_it(open_page):
    page = open_page()
    search(page, "purple square")
    page.locator("#grid a.card").first.click()
    panel = page.locator("#panel")
    panel.locator(".row a.card").first.wait_for()
    assert page.locator("#panel-name").text_content() == "Purple square"
    facts = dict(zip(panel.locator("dt").all_text_contents(), panel.locator("dd").all_text_contents()))
    assert facts["Shape"] == "square" and facts["Warm"] == "no"
    assert panel.locator(".stage img").evaluate("i => i.naturalWidth") == 110

    panel.get_by_role("button", name="what colour is it?").click()
    panel.locator(".bars li").first.wait_for()
    assert panel.locator(".said strong").text_content() == "purple"
    bars = panel.locator(".bars li").all_text_contents()
    assert re.fullmatch(r"purple(\d\d|> 99) %", bars[0]) and "other answers" in bars[-1]
    widths = panel.locator(".bars .fill").evaluate_all("all => all.map(b => b.getBoundingClientRect().width)")
    assert widths[0] == max(widths) > 0
    panel.locator("#question").fill("what shape is it?")
    panel.locator("#question").press("Enter")
    panel.locator(".said strong:text-is('square')").wait_for()

    assert panel.locator(".row .name").first.text_content() == "Purple square"
    panel.locator(".row a.card").nth(2).click()
    panel.locator("#panel-name:not(:text-is('Purple square')):not(:text-is('Loading'))").wait_for()
    page.go_back()
    panel.wait_for(state="hidden")
    assert page.locator("#words").input_value() == "purple square"
    page.go_forward()
    panel.wait_for()
    panel.get_by_role("button", name="Search with this picture").click()
    panel.wait_for(state="hidden")
    page.locator("#given").wait_for()
    says(page, "#status", r"^24 .* ms$")


def test_a_question_about_ones_own_picture(open_page, red_circle):
    page = open_page()
    page.set_input_files("#file", {"name": "mine.png", "mimeType": "image/png", "buffer": red_circle})
    says(page, "#status", r" ms")
    page.locator("#given-open").click()
    page.locator("#question").fill("what colour is it?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".said strong:text-is('red')").wait_for()


def test_a_link_to_an_item_opens_it(open_page):
    page = open_page("/#item=shapes%2Fbar%23green+45")
    page.locator("#panel-name:text-is('Green bar')").wait_for()
    page.keyboard.press("Escape")
    page.locator("#panel").wait_for(state="hidden")
    assert "item=" not in page.url


def test_a_link_to_an_item_that_is_gone(open_page):
    page = open_page()
    page.expected.append("404")
    page.goto(page.url.split("#")[0] + "#item=nobody")
    says(page, "#panel", "No item 'nobody'")
    page.get_by_role("button", name="Close").click()
    page.locator("#panel").wait_for(state="hidden")


# ---- when it goes wrong


def test_an_empty_query_says_what_to_do(open_page):
    page = open_page()
    page.locator("#words").press("Enter")
    says(page, "#alert", r"Write what you are looking for")
    assert page.evaluate("document.activeElement.id") == "words"


def test_a_hopeless_query_says_so_and_still_shows_the_nearest(open_page):
    page = open_page()
    search(page, "zeppelin")
    assert page.locator("#hint").text_content() and len(names(page)) == 24


def test_a_demo_that_stopped(open_page):
    page = open_page()
    page.expected.append("ERR_FAILED")
    page.route("**/api/search", lambda route: route.abort())
    page.locator("#words").fill("red")
    page.locator("#words").press("Enter")
    says(page, "#alert", r"still running")
    page.unroute("**/api/search")
    page.get_by_role("button", name="Try again").click()
    says(page, "#status", r" ms")
    assert not page.locator("#alert").text_content()


def test_only_the_last_of_two_searches_is_shown(open_page):
    """A slow reply that arrives after a newer one does not replace it."""
    page = open_page()
    held = []
    page.route("**/api/search", lambda route: held.append(route) if not held else route.continue_())
    page.locator("#words").fill("red")
    page.locator("#words").press("Enter")
    page.locator("body.busy").wait_for()
    assert page.locator(".skeleton").count()
    search(page, "green bar")
    with contextlib.suppress(Error):  # the page may have given that request up
        held[0].continue_()
    page.locator("#more").wait_for()
    assert names(page)[0] == "Green bar"


# ---- without a mouse, without eyes


def test_the_keyboard_alone(open_page):
    page = open_page()
    page.locator("body").press("/")
    assert page.evaluate("document.activeElement.id") == "words"
    page.keyboard.type("blue")
    page.keyboard.press("Enter")
    says(page, "#status", r" ms")
    ready(page)
    page.keyboard.press("ArrowDown")
    focused = "[...document.querySelectorAll('#grid a.card')].indexOf(document.activeElement)"
    assert page.evaluate(focused) == 0
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == 2
    columns = page.evaluate(
        """() => { const tops = [...document.querySelectorAll('#grid a.card')].map(c => c.getBoundingClientRect().top);
                   return tops.filter(top => top === tops[0]).length; }"""
    )
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == 2 + columns
    page.keyboard.press("End")
    assert page.evaluate(focused) == 23
    page.keyboard.press("Home")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # the focus can be seen
    page.keyboard.press("Enter")
    page.locator("#panel .row a.card").first.wait_for()
    for _ in range(30):  # the focus stays inside, however often Tab is pressed (or is in the browser's own bar)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('#panel')")
    page.keyboard.press("Escape")
    page.locator("#panel").wait_for(state="hidden")
    assert page.evaluate(focused) == 0  # back where it was opened
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.id") == "words"
    page.locator("#options > summary").focus()
    page.keyboard.press("Enter")
    page.locator("#where").wait_for()
    page.keyboard.press("Escape")
    page.locator("#where").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"


AUDIT = """() => {
  const problems = [];
  const seen = (e) => e.checkVisibility() || e.classList.contains('sr');
  const byIds = (ids) => (ids ?? '').split(' ').map((id) => document.getElementById(id)?.textContent ?? '').join('');
  const inner = (e) => e.textContent + [...e.querySelectorAll('img')].map((i) => i.alt).join('');
  const name = (e) => (e.getAttribute('aria-label') || byIds(e.getAttribute('aria-labelledby'))
      || [...(e.labels ?? [])].map((l) => l.textContent).join('') || (e.matches('input') ? '' : inner(e))).trim();
  for (const e of document.querySelectorAll('input, button, a, summary, select, textarea, [role=group], dialog[open]'))
    if (seen(e) && !name(e)) problems.push('no name: ' + e.outerHTML.slice(0, 120));
  for (const e of document.querySelectorAll('img:not([alt])')) problems.push('no alt: ' + e.outerHTML.slice(0, 120));
  if (document.querySelector('svg:not([aria-hidden=true])')) problems.push('an svg is read out');
  const ids = [...document.querySelectorAll('[id]')].map((e) => e.id);
  problems.push(...ids.filter((id, i) => ids.indexOf(id) !== i).map((id) => 'id twice: ' + id));
  for (const e of document.querySelectorAll('[aria-labelledby], [aria-describedby]')) if (e.checkVisibility())
    for (const id of (e.getAttribute('aria-labelledby') || e.getAttribute('aria-describedby')).split(' '))
      if (!document.getElementById(id)) problems.push('no element ' + id);
  const levels = [...document.querySelectorAll('h1, h2, h3')].map((e) => +e.tagName[1]);
  if (levels[0] !== 1) problems.push('first heading is h' + levels[0]);
  for (const tag of ['header', 'main', 'footer', 'nav', '[role=search]', '[role=status][aria-live]', '[role=alert]'])
    if (document.querySelectorAll(tag).length !== 1) problems.push('landmark ' + tag);
  if (!document.documentElement.lang) problems.push('no language');
  return problems;
}"""

CONTRAST = """() => {
  const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const colour = (text) => {
    const c = text.match(/[\\d.]+/g).map(Number);
    return {rgb: c.slice(0, 3), alpha: c[3] ?? 1};
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = colour(getComputedStyle(e).backgroundColor);
      if (c.alpha > 0.99) return c.rgb;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest('.sr, .skip, svg, .match')) continue;
    const [a, b] = [light(colour(getComputedStyle(e).color).rgb), light(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(((a + 0.05) / (b + 0.05)).toFixed(2) + ' ' + e.outerHTML.slice(0, 100));
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_landmarks_and_contrast(open_page, scheme, red_circle):
    page = open_page(color_scheme=scheme)
    assert page.evaluate(AUDIT) == [] and page.evaluate(CONTRAST) == []
    page.set_input_files("#file", {"name": "mine.png", "mimeType": "image/png", "buffer": red_circle})
    search(page, "zeppelin")
    for summary in page.locator("details.pop > summary").all():
        summary.click()
        assert page.evaluate(AUDIT) == [] and page.evaluate(CONTRAST) == []
        page.keyboard.press("Escape")
    page.locator("#grid a.card").first.click()
    page.locator("#panel .row a.card").first.wait_for()
    page.get_by_role("button", name="what colour is it?").click()
    page.locator(".bars").wait_for()
    assert page.evaluate(AUDIT) == [] and page.evaluate(CONTRAST) == []


def test_what_a_screen_reader_is_told(open_page):
    page = open_page()
    search(page, "green bar")
    told = page.locator("main").aria_snapshot()
    assert "- search:" in told and "- status:" in told and "24 pictures of 64" in told
    assert re.search(r'- link ".*green bar Green bar match (> )?\d+ % score [\d.]+ ', told)
    page.locator("#grid a.card").first.click()
    page.locator("#panel .row a.card").first.wait_for()
    panel = page.locator("#panel")
    assert panel.aria_snapshot().startswith('- dialog "Green bar"')
    assert page.evaluate("document.activeElement.id") == "panel-name"


def test_dark_and_light(open_page):
    page = open_page(color_scheme="dark")
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    assert page.evaluate(paper) == "rgb(20, 22, 27)"
    page.locator("#theme").click()
    assert page.evaluate(paper) == "rgb(247, 245, 240)"
    assert page.locator("#theme").get_attribute("aria-pressed") == "false"
    page.reload()
    ready(page)
    assert page.evaluate(paper) == "rgb(247, 245, 240)"  # the choice is kept


def test_a_phone(open_page, red_circle):
    page = open_page(viewport=PHONE, has_touch=True)

    def fits() -> bool:
        wide = "document.documentElement.scrollWidth <= 360 && document.querySelector('#panel').scrollWidth <= 360"
        scrolls = "svg, .filters, .row, .examples, .sr, .skip"  # these may be wider: they scroll, or are not seen
        out = f"""[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && !e.closest('{scrolls}')
                  && e.getBoundingClientRect().right > 361).map(e => e.outerHTML.slice(0, 90))"""
        assert page.evaluate(out) == []
        return page.evaluate(wide)

    assert fits()
    page.set_input_files("#file", {"name": "mine.png", "mimeType": "image/png", "buffer": red_circle})
    search(page, "red")
    assert fits()
    for summary in page.locator("details.pop > summary").all():
        summary.click()
        assert fits()
        page.keyboard.press("Escape")
    page.locator("#grid a.card").first.click()
    page.locator("#panel .row a.card").first.wait_for()
    page.get_by_role("button", name="what shape is it?").click()
    page.locator(".bars").wait_for()
    assert fits()


def test_less_motion_when_asked_for(open_page):
    page = open_page(reduced_motion="no-preference")
    assert page.locator(".tile").first.evaluate("e => getComputedStyle(e).transitionDuration") != "0s"
    page = open_page(reduced_motion="reduce")
    assert page.locator(".tile").first.evaluate("e => getComputedStyle(e).transitionDuration") == "0s"


# ---- the other pages


def test_the_apis_page(open_page, address):
    page = open_page()
    page.goto(address + "/docs")
    page.locator(".doc section h2", has_text="/api/answer").wait_for()
    text = page.locator("#doc").text_content()
    assert "curl" in text and "number, from 0 to 1" in text and "undefined" not in text
    assert page.evaluate(CONTRAST) == []


def test_the_token_in_a_browser(small, serving, browser):
    locked = serving(create_app(*small, token="open sesame"))
    context = browser.new_context()
    page = context.new_page()
    page.goto(locked)
    page.get_by_label("Token").fill("open sesame")
    page.get_by_role("button", name="Open").click()
    ready(page)
    assert len(names(page)) == 24 and "token" not in page.url
    page.reload()
    ready(page)
    assert len(names(page)) == 24
    assert page.evaluate("document.cookie") == ""  # no script can read it
    context.close()
