"""Who may talk to the demo, how much they may send, and the headers every reply carries."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("interlace.demo")

COOKIE = "interlace_token"
LOOPBACK = ["localhost", "127.0.0.1", "[::1]"]
FIELDS = 256_000  # bytes a form may take beside its picture: words, filter, question, boundaries

HEADERS = {
    # blob: is the preview of a picture that has not left the browser. trusted-types turns any innerHTML into an error.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; object-src 'none'; require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


HANG_UP = {"Connection": "close"}  # else the server goes on reading what it refused


def fail(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status, headers=headers)


class LimitBody:
    """Refuses a request body over `limit` bytes with 413, whatever its Content-Length claims, before anything of it is
    parsed or spooled to disk."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limit:
            # A client still writing when the connection closes never sees the reply: let it finish, within reason.
            left = self.limit * 4
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    break
            return await fail(413, self.message(), HANG_UP if left <= 0 else None)(scope, receive, send)

        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise HTTPException(413, self.message(), headers=HANG_UP)
            return message

        await self.app(scope, counted, send)

    def message(self) -> str:
        return f"The upload is larger than {(self.limit - FIELDS) / 1e6:g} MB. Send a smaller picture."


def stamp(token: str) -> str:
    """What the cookie holds: proof of the token, not the token."""
    return hashlib.sha256(b"interlace demo:" + token.encode()).hexdigest()


def same(given: str, wanted: str, encoding: str = "utf-8") -> bool:
    return hmac.compare_digest(given.encode(encoding, "replace"), wanted.encode("utf-8", "replace"))


def allowed(request: Request, token: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # headers arrive as bytes and are shown as latin-1, whatever they were written in
    if scheme.lower() == "bearer" and same(given.strip(), token, "latin-1"):
        return True
    return same(request.cookies.get(COOKIE, ""), stamp(token)) or same(request.query_params.get("token", ""), token)


def guard(app: FastAPI, token: str | None, max_bytes: int) -> None:
    """Puts the checks around `app`. Without a token only this machine's own names are accepted as Host, so that a page
    from elsewhere cannot reach the demo by pointing its name at 127.0.0.1 (DNS rebinding)."""
    app.add_middleware(LimitBody, limit=max_bytes + FIELDS)
    locked = (resources.files(__package__) / "static" / "locked.html").read_text("utf-8")

    async def check(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.method not in ("GET", "HEAD") and request.headers.get("sec-fetch-site") == "cross-site":
            return fail(403, "This request comes from another site's page. Use the demo's own page or a program.")
        if token is None or request.url.path.startswith("/static/"):
            return await call_next(request)
        if not allowed(request, token):
            if "text/html" in request.headers.get("accept", ""):
                return HTMLResponse(locked, status_code=401)
            refused = fail(
                401, "A token is needed: send 'Authorization: Bearer TOKEN', or open the page with ?token=TOKEN."
            )
            refused.headers["WWW-Authenticate"] = "Bearer"
            return refused
        reply = await call_next(request)
        if request.query_params.get("token"):
            # and no redirect to hide it: after a link from elsewhere that request would go without the Strict cookie
            reply.set_cookie(
                COOKIE,
                stamp(token),
                httponly=True,
                samesite="strict",
                secure=request.url.scheme == "https",
                max_age=30 * 24 * 3600,
            )
        return reply

    @app.middleware("http")
    async def checked(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            reply = await check(request, call_next)
        except Exception:
            log.exception("%s %s failed", request.method, request.url.path)
            reply = fail(500, "Something went wrong in the demo itself. The terminal it runs in says what.")
        for name, value in HEADERS.items():
            reply.headers.setdefault(name, value)
        static = request.url.path.startswith("/static/")
        reply.headers.setdefault("Cache-Control", "no-cache" if static else "no-store")
        return reply

    if token is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK, www_redirect=False)
