"""Pictures of the demo page, for the documentation and for looking at one's changes.

python tests/demo/screenshots.py http://localhost:7860 shots/
python tests/demo/screenshots.py runs/furniture shots/           # serves the run and its index itself
python tests/demo/screenshots.py runs/furniture shots/ --words "a red chair" --question "which room is it for?"
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from browser import chromium

DESK, PHONE = {"width": 1360, "height": 900}, {"width": 360, "height": 740}


@contextmanager
def served(run: Path) -> Iterator[str]:
    import uvicorn

    from interlace.demo.app import create_app, listen
    from interlace.run import Run
    from interlace.search import Index

    loaded = Run.load(run)
    app = create_app(loaded, Index.open(run / "index", loaded))
    with listen("127.0.0.1", 0) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        yield f"http://localhost:{sock.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def settle(page) -> None:
    """Until no search runs and every picture in view has arrived. (`wait_for_function` would need eval, which the page
    forbids.)"""
    page.locator("body:not(.busy) #grid:not([aria-busy])").wait_for(state="attached")
    page.evaluate("""() => Promise.all([...document.images]
        .filter(i => i.getBoundingClientRect().top < innerHeight && i.checkVisibility())
        .map(i => i.complete ? null : new Promise(done => { i.onload = i.onerror = done; })))""")


def shoot(address: str, out: Path, words: str, question: str) -> list[Path]:
    """Writes the PNGs into `out` and returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []

    def snap(page, name: str) -> None:
        settle(page)
        written.append(out / f"{name}.png")
        page.screenshot(path=written[-1])
        print(written[-1])

    def ask(page) -> None:
        page.locator("#grid a.card").first.click()
        page.locator("#panel .row a.card").first.wait_for()
        if page.locator("#question").count():
            page.locator("#question").fill(question)
            page.locator("#question").press("Enter")
            page.locator(".bars, .reply .wrong").first.wait_for()

    with chromium() as browser:
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport=DESK, color_scheme=scheme)
            page.goto(address)
            snap(page, f"start-{scheme}")
            page.locator("#words").fill(words)
            page.locator("#words").press("Enter")
            page.locator(".searched").wait_for()
            snap(page, f"search-{scheme}")
            ask(page)
            snap(page, f"item-{scheme}")
            page.keyboard.press("Escape")
            page.close()

        page = browser.new_page(viewport=DESK)
        page.goto(address)
        settle(page)
        picture = page.request.get(page.locator("#grid img").first.evaluate("i => i.src")).body()
        page.set_input_files("#file", {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": picture})
        page.locator("#words").fill(words)
        page.locator("#words").press("Enter")
        page.locator("#balance").wait_for()
        snap(page, "both-light")
        pills = page.locator("details[data-column]:visible > summary")
        if pills.count():
            pills.first.click()
            snap(page, "filter-light")
            page.keyboard.press("Escape")
        page.locator("#options > summary").click()
        page.locator("#where").fill("no such column = 1")
        page.locator("#where").press("Enter")
        page.locator("#alert p").wait_for()
        snap(page, "error-light")
        page.goto(f"{address}/docs")
        page.locator(".doc section").first.wait_for()
        written.append(out / "api-light.png")
        page.screenshot(path=written[-1])
        page.close()

        page = browser.new_page(viewport=PHONE, device_scale_factor=2)
        page.goto(address)
        snap(page, "phone-start")
        page.locator("#words").fill(words)
        page.locator("#words").press("Enter")
        page.locator(".searched").wait_for()
        snap(page, "phone-search")
        page.locator("#options > summary").click()
        snap(page, "phone-options")
        page.keyboard.press("Escape")
        ask(page)
        snap(page, "phone-item")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="address of a running demo, or a run's folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--words", default="red chair")
    parser.add_argument("--question", default="which room is it for?")
    given = parser.parse_args()
    if given.what.startswith(("http://", "https://")):
        shoot(given.what.rstrip("/"), given.out, given.words, given.question)
    else:
        with served(Path(given.what)) as address:
            shoot(address, given.out, given.words, given.question)


if __name__ == "__main__":
    main()
