from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from shapes import Shapes, draw, pairs

from interlace.search import Index


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shapes, Index]:
    """A run and the real index over its sixty-four pictures."""
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
