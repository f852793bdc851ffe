from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from browser import chromium, ready
from shapes import Shapes, draw, pairs

from interlace.search import Index


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shapes, Index]:
    """A run whose results can be predicted, and the real index over its sixty-four pictures."""
    folder = tmp_path_factory.mktemp("shapes")
    run = Shapes(folder)
    rows = pairs(folder)
    kinds = {"shape": "text", "colour": "text", "size": "number", "warm": "boolean", "price": "number"}
    index = Index.create(folder / "index", run, kinds)
    index.upsert(rows)
    Path(rows[-1].picture.path or "").unlink()  # an original that went missing after indexing
    return run, index


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


@pytest.fixture(scope="session")
def red_circle() -> bytes:
    return encoded(draw("circle", "red"))


@pytest.fixture(scope="session")
def serving() -> Iterator:
    """`serving(app)` -> its address, served by a real server until the tests end."""
    import threading

    import uvicorn

    from interlace.demo.app import listen

    running = []

    def start(app) -> str:
        sock = listen("127.0.0.1", 0)
        sock.listen(64)  # from here on connections wait until the server takes them
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        running.append((server, thread, sock))
        return f"http://localhost:{sock.getsockname()[1]}"

    yield start
    for server, thread, sock in running:
        server.should_exit = True
        thread.join(10)
        sock.close()


@pytest.fixture(scope="module")  # not longer: its event loop would be in the way of other tests'
def browser() -> Iterator:
    with chromium() as found:
        yield found


@pytest.fixture
def open_page(browser, address) -> Iterator:
    """`open_page(path, **context options)` -> a page in a context of its own. At the end: no request left this machine,
    nothing was written to the console, no script failed, the policy was not violated."""
    contexts, requests, problems = [], [], []
    expected: list[str] = []

    def start(path: str = "/", **options):
        context = browser.new_context(**{"reduced_motion": "reduce", **options})
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.expected = expected
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda problem: problems.append(str(problem)))
        page.goto(address + path)
        ready(page)
        return page

    yield start
    for context in contexts:
        context.close()
    away = [url for url in requests if urlsplit(url).scheme != "blob" and urlsplit(url).hostname != "localhost"]
    assert requests and not away
    assert [p for p in problems if not any(word in p for word in expected)] == []
