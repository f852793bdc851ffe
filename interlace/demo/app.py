"""The demo: one page and a typed JSON API over the same functions as the command line.

interlace demo runs/furniture          # http://127.0.0.1:7860, the API's description at /docs
"""

from __future__ import annotations

import errno
import secrets
import socket
import threading
import time
import webbrowser
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI, File, Form, HTTPException, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from PIL import Image
from starlette.exceptions import HTTPException as StarletteHTTPException

from interlace.data.pictures import BadPicture, open_picture
from interlace.demo.facets import facets, look_around, propose_queries, propose_questions, scores
from interlace.demo.guard import fail, guard
from interlace.demo.schemas import AnswerChance, Answered, Failure, Found, Hit, Info, Item, Items, Limits
from interlace.errors import UserError
from interlace.run import Run
from interlace.search import Index, search
from interlace.search import Item as IndexItem

STATIC = Path(str(resources.files(__package__))) / "static"
MAX_K, MAX_TEXT = 200, 2000
SHOWN_AS = {"127.0.0.1": "localhost", "localhost": "localhost", "::1": "[::1]"}  # what only this machine can reach
THUMBNAIL, LARGE = 400, 1600  # longest side in pixels: a card is at most 200 CSS pixels wide, at two device pixels each
DECODING = threading.BoundedSemaphore(2)  # pictures at once: each may take 4 bytes a pixel, a quarter of a gigabyte
ERRORS: dict[int | str, dict] = {code: {"model": Failure} for code in (404, 413, 415, 422)}
JPEG: dict[int | str, dict] = {404: ERRORS[404], 200: {"content": {"image/jpeg": {}}}}

Text = Annotated[str | None, Form(max_length=MAX_TEXT)]
LIKE, ITEM = "An indexed item's id, in place of a picture.", "An indexed item's id."
ALLOWED = "Answers to choose among; repeat the field. All of them when it is left out."
Upload = Annotated[UploadFile | None, File(description="A picture file.")]


def create_app(
    run: Run,
    index: Index,
    token: str | None = None,
    max_bytes: int = 10_000_000,
    max_pixels: int = 64_000_000,
    examples: Sequence[str] | None = None,
    questions: Sequence[str] | None = None,
) -> FastAPI:
    """The demo as an ASGI application.

    Args:
        run: encodes, matches and answers.
        index: what is searched.
        token: when given, every request needs it (Bearer header, or `?token=` once in a browser).
        max_bytes: largest upload; more is refused with 413 before it is parsed.
        max_pixels: largest picture, read from its header before it is decoded; more is refused with 413.
        examples: queries the page proposes; by default captions from the index.
        questions: questions the page proposes; by default the run's own, when it names any.
    """
    app = FastAPI(
        title="interlace",
        version="1",
        docs_url=None,
        redoc_url=None,
        description="Search pictures by words, by a picture or by both, and ask about them.",
    )
    guard(app, token or None, max_bytes)  # an empty token would be everybody's
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    one_at_a_time = threading.Lock()  # the model's calls; FastAPI runs the plain functions below in its thread pool
    columns, exact_counts = facets(index)
    info_examples = list(examples) if examples is not None else propose_queries(index)
    info_questions = list(questions) if questions is not None else propose_questions(run)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return fail(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def wrong_field(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return fail(422, f"{first['loc'][-1]}: {first['msg']}.")

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> JSONResponse:
        return fail(422, str(error))

    def find(item_id: str) -> IndexItem:
        item = index.get(item_id)
        if item is None:
            raise HTTPException(404, f"No item {item_id!r} in this index.")
        return item

    def uploaded(picture: UploadFile | None) -> Image.Image | None:
        if picture is None or (picture.size == 0 and not picture.filename):  # an empty file field of an HTML form
            return None
        data = picture.file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise HTTPException(413, f"The picture is larger than {max_bytes / 1e6:g} MB. Send a smaller one.")
        return decode(data, max_pixels)

    @lru_cache(maxsize=1000)  # about 20 kB each
    def thumbnail_bytes(item_id: str) -> bytes:
        item = find(item_id)
        return item.thumbnail or jpeg(item, THUMBNAIL, max_pixels)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    def docs() -> FileResponse:
        return FileResponse(STATIC / "docs.html", headers={"Cache-Control": "no-cache"})

    @app.get("/api/info")
    def info() -> Info:
        """What is served: the run, the index and its columns, and what the run can do."""
        answers = list(run.answers) if run.can_answer else []
        return Info(
            run=run.folder.name,
            count=len(index),
            metrics=scores(run),
            columns=columns,
            exact_counts=exact_counts,
            can_match=run.can_match,
            can_answer=run.can_answer,
            answers=answers[:500],
            n_answers=len(answers),
            examples=info_examples,
            questions=info_questions if run.can_answer else [],
            limits=Limits(max_bytes=max_bytes, max_pixels=max_pixels, max_k=MAX_K, max_text=MAX_TEXT),
        )

    @app.post("/api/search", responses=ERRORS)
    def search_(
        text: Text = None,
        picture: Upload = None,
        where: Text = None,
        k: Annotated[int, Form(ge=1, le=MAX_K)] = 24,
        weight: Annotated[float, Form(ge=0, le=1)] = 0.5,
        mode: Annotated[Literal["vector", "text", "hybrid"], Form()] = "vector",
        rerank: Annotated[bool | None, Form()] = None,
        like: Annotated[str | None, Form(max_length=MAX_TEXT, description=LIKE)] = None,
    ) -> Found:
        """Find pictures by words, by a picture (a file, or an indexed item's: like), or by both; where filters them."""
        image = uploaded(picture)
        if like:
            find(like)
        with one_at_a_time:
            result = search(
                index,
                run,
                text=text,
                picture=image,
                where=where,
                k=k,
                weight=weight,
                mode=mode,
                rerank=rerank,
                like=like or None,
            )
        hits = [
            Hit(id=h.id, name=h.name, caption=h.caption, attributes=h.attributes, score=h.score, match=h.match)
            for h in result
        ]
        return Found(
            hits=hits,
            count=len(index),
            milliseconds=round(result.seconds * 1000, 1),
            reranked=any(h.match is not None for h in hits),
            hint=result.note or None,
            hopeless=result.hopeless,
        )

    @app.get("/api/items", responses=ERRORS)
    def items(
        limit: Annotated[int, Query(ge=1, le=MAX_K)] = 24,
        where: Annotated[str | None, Query(max_length=MAX_TEXT)] = None,
    ) -> Items:
        """A few of the indexed items, to look around; where filters them."""
        return Items(items=look_around(index, limit, (where or "").strip() or None), count=len(index))

    # An id may contain slashes, sent as they are or as %2F, so the longer paths come first.
    @app.get("/api/items/{item_id:path}/picture", responses=JPEG, response_class=Response)
    def item_picture(item_id: str) -> Response:
        """The item's picture as JPEG, at most 1600 pixels on its longer side."""
        if index.get(item_id) is None and (whole := index.get(f"{item_id}/picture")):
            return JSONResponse(as_item(whole).model_dump())  # the id itself ends like that
        return image_reply(jpeg(find(item_id), LARGE, max_pixels))

    @app.get("/api/items/{item_id:path}/thumbnail", responses=JPEG, response_class=Response)
    def item_thumbnail(item_id: str) -> Response:
        """The item's picture as JPEG, at most 400 pixels on its longer side."""
        if index.get(item_id) is None and (whole := index.get(f"{item_id}/thumbnail")):
            return JSONResponse(as_item(whole).model_dump())
        return image_reply(thumbnail_bytes(item_id))

    @app.get("/api/items/{item_id:path}", responses=ERRORS)
    def item(item_id: str) -> Item:
        """One item with all its attributes."""
        return as_item(find(item_id))

    @app.post("/api/answer", responses=ERRORS)
    def answer(
        question: Annotated[str, Form(min_length=1, max_length=MAX_TEXT)],
        item: Annotated[str | None, Form(max_length=MAX_TEXT, description=ITEM)] = None,
        picture: Upload = None,
        allowed: Annotated[list[str] | None, Form(description=ALLOWED)] = None,
    ) -> Answered:
        """Ask about an indexed item or an uploaded picture. The answer comes from the run's closed list."""
        if not run.can_answer:
            raise HTTPException(422, "This run was trained without questions, so it cannot answer any.")
        if not question.strip():
            raise HTTPException(422, "question: write one, for example 'what is this?'.")
        image = uploaded(picture)
        if (item is None) == (image is None):
            raise HTTPException(422, "Send either 'item' (an id) or 'picture' (a file).")
        if image is None:
            image = open_stored(find(item or ""), max_pixels)
        allowed = [a for a in allowed or [] if a.strip()] or None
        started = time.perf_counter()
        with one_at_a_time:
            ranked = run.answer(image, question.strip(), allowed=allowed)
        took = (time.perf_counter() - started) * 1000
        top = [AnswerChance(answer=a, probability=p) for a, p in ranked[:20]]
        return Answered(
            question=question.strip(),
            answers=top,
            rest=max(0.0, sum(p for _, p in ranked[20:])),
            n_answers=len(ranked),
            milliseconds=round(took, 1),
        )

    return app


def as_item(item: IndexItem) -> Item:
    return Item(id=item.id, name=item.name, caption=item.caption, attributes=item.attributes)


def image_reply(data: bytes) -> Response:
    return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The upload as a picture: 413 when it is too large, 415 when it is not a picture we can read."""
    try:
        with DECODING:
            return open_picture(data, max_pixels=max_pixels)
    except BadPicture as error:
        large = "pixels" in error.reason
        raise HTTPException(
            413 if large else 415,
            f"This file cannot be used as a picture: {error.reason}. "
            + ("Send a smaller one." if large else "Send a JPEG, PNG, WebP or GIF."),
        ) from None


def open_stored(item: IndexItem, max_pixels: int, side: int | None = None) -> Image.Image:
    """An item's picture, or its thumbnail when the original has gone or gone bad since. 404 when there is neither."""
    try:
        with DECODING:
            return open_picture(item.picture, size_hint=side, max_pixels=max_pixels)
    except (BadPicture, OSError) as error:
        if item.thumbnail:
            return open_picture(item.thumbnail)
        reason = error.reason if isinstance(error, BadPicture) else error.strerror or "unreadable"
        raise HTTPException(404, f"The item's picture can no longer be read: {reason}.") from None


def jpeg(item: IndexItem, side: int, max_pixels: int) -> bytes:
    """Always decoded and written anew, so that whatever is in the file, a browser receives a plain JPEG."""
    image = open_stored(item, max_pixels, side)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = BytesIO()
    image.save(out, "JPEG", quality=88)
    return out.getvalue()


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, or UserError when the address is taken, forbidden or not this machine's."""
    if not 0 <= port < 65536:
        raise UserError(f"A port is a number from 1 to 65535, got {port}. Try --port 7860.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host.strip("[]"), port))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"Port {port} on {host} is in use by another program, perhaps another demo. "
                f"Try --port {free_port(host, port)}."
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(f"Port {port} needs special rights. Take one above 1023, such as --port 7860.") from None
        raise UserError(
            f"Cannot listen on {host}:{port}: {error.strerror or error}. Expected an address of this machine, "
            "such as --host 127.0.0.1."
        ) from None
    return sock


def free_port(host: str, after: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in [*range(after + 1, min(after + 50, 65536)), 0]:  # 0: any port the system has left
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            try:
                sock.bind((host.strip("[]"), port))
                return sock.getsockname()[1]
            except OSError:
                continue
    return 0


class Server(uvicorn.Server):
    """Calls `ready` once requests are accepted."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()


def check_token(host: str, token: str | None) -> None:
    """Raises UserError when other machines could reach the demo without a token."""
    if host not in SHOWN_AS and not token:
        raise UserError(
            f"--host {host} lets other machines reach the demo, so it needs a token that they must know: "
            f"add --token {secrets.token_hex(10)} (or any long word of your own), "
            "or leave --host out to serve this machine only."
        )


def check_address(host: str, port: int, token: str | None) -> None:
    """What `serve` would refuse, for callers who have a model to load first. Raises UserError as `serve` does."""
    check_token(host, token)
    listen(host, port).close()


def serve(
    run: Run,
    index: Index,
    host: str = "127.0.0.1",
    port: int = 7860,
    token: str | None = None,
    open_browser: bool = True,
) -> None:
    """Serves the demo until it is interrupted, and prints its address.

    Raises:
        UserError: the port is taken (the message names a free one), or `host` is reachable from other machines and no
            token was given.
    """
    check_token(host, token)
    app = create_app(run, index, token=token)
    with listen(host, port) as sock:
        shown = "localhost" if host in ("0.0.0.0", "::") else SHOWN_AS.get(host, f"[{host}]" if ":" in host else host)
        address = f"http://{shown}:{sock.getsockname()[1]}/" + (f"?token={quote(token, safe='')}" if token else "")

        def ready() -> None:
            print(f"The demo is at {address}  (Ctrl+C stops it)", flush=True)
            if host in ("0.0.0.0", "::"):
                print("From other machines: the same with this machine's name or address.", flush=True)
            if open_browser:
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

        # The access log stays off: it would write the token of ?token= to the terminal.
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        try:
            Server(config, ready).run(sockets=[sock])
        except KeyboardInterrupt:
            print("Stopped.")
