"""The page over a run that was really trained: it shows what the library itself returns, no more and no less."""

from __future__ import annotations

import pytest
from browser import names, ready, says, search

from interlace.data.pictures import open_picture
from interlace.data.sources import open_source
from interlace.demo.app import create_app
from interlace.search import Index, build_index
from interlace.search import search as find

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def index(tiny_run, shapes, tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("index") / "index"
    build_index(tiny_run, open_source(shapes), folder, progress=False)
    return Index.open(folder, tiny_run)


@pytest.fixture(scope="module")
def address(tiny_run, index, serving) -> str:
    return serving(create_app(tiny_run, index))


def test_the_page_shows_what_the_library_finds_and_answers(open_page, tiny_run, index):
    page = open_page()
    assert page.locator("#about-count").text_content() == f" · {len(index)} pictures"
    page.locator("#about > summary").click()
    assert page.locator("#about-body dt").count() > 3  # the run's own evaluation

    search(page, "a red circle")
    assert names(page) == [hit.name for hit in find(index, tiny_run, text="a red circle", k=24)]

    page.locator("details[data-column=shape] > summary").click()
    page.get_by_label("bar").check()
    page.locator("#chosen .token").wait_for()
    ready(page)
    wanted = find(index, tiny_run, text="a red circle", where="shape = bar", k=24)
    assert names(page) == [hit.name for hit in wanted]

    mine = index.get(wanted[0].id).picture.read()
    page.set_input_files("#file", {"name": "mine.png", "mimeType": "image/png", "buffer": mine})
    page.locator("#balance").wait_for()
    ready(page)
    both = find(index, tiny_run, text="a red circle", picture=mine, where="shape = bar", k=24)
    assert names(page) == [hit.name for hit in both]

    page.locator("#grid a.card").first.click()
    page.locator("#panel .row a.card").first.wait_for()
    resembling = page.locator("#panel .row .name").all_text_contents()
    assert resembling == [hit.name for hit in find(index, tiny_run, like=both[0].id, k=8)]
    page.locator("#question").fill("what colour is it?")
    page.locator("#question").press("Enter")
    page.locator(".bars").wait_for()
    told = tiny_run.answer(open_picture(index.get(both[0].id).picture), "what colour is it?")
    assert page.locator(".said strong").text_content() == told[0][0]
    shown = page.locator(".bars .chance").first.text_content()
    assert shown in ("> 99 %", f"{100 * told[0][1]:.0f} %")
    says(page, ".bars", "other answers")
