"""Who may use the page: those that know its token, from a page of this address."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["LOOPBACK", "Guard", "answer", "refusal"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LONGEST = 2**20  # bytes of a request: a mask that is painted on a scan of 256³ has some 100,000
HEADERS = {
    # NiiVue makes its textures and workers from blobs and data addresses of its own
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; connect-src 'self' blob: data:; "
    "worker-src 'self' blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Guard:
    """Refuses requests without the token, of other pages, for other hosts, with odd paths, or that are too long.

    The first request has the token in its address, ``/?token=...``; it is answered with a cookie and without the token.
    Programs can send ``Authorization: Bearer TOKEN`` instead.

    Args:
        app: what is guarded.
        token: a secret.
        hosts: the names that the page is asked for by, without port; empty: any.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Collection[str] = LOOPBACK) -> None:
        self.app, self.token, self.hosts = app, token, hosts
        # cookies do not know ports: two pages on one machine need two names
        self.cookie = f"explore_{hashlib.sha256(token.encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message["headers"]}
                added = ((name.encode(), value.encode()) for name, value in HEADERS.items())
                message["headers"] = [*message["headers"], *(pair for pair in added if pair[0] not in known)]
            await send(message)

        await (self._answer(Request(scope)) or self.app)(scope, receive, send_guarded)

    def _answer(self, request: Request) -> Response | None:
        """What is said instead of passing a request on; None: it is allowed."""
        if self.hosts and _hostname(request.headers.get("host", "")) not in self.hosts:
            return refusal(403, "This page answers to its own address alone: open the one that was printed.")
        if not _same_origin(request.headers, request.url.scheme):
            return refusal(403, "Another page asked for this: open the address that was printed.")
        if ".." in request.scope["path"].replace("\\", "/").split("/"):
            return refusal(400, "A path with '..' is not followed.")
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LONGEST or "transfer-encoding" in request.headers:
            return refusal(413, f"A request must say its length and be no longer than {LONGEST} bytes.")
        given = request.query_params.get("token")
        if given is not None and request.url.path == "/" and self._is_token(given):
            response = RedirectResponse("/", status_code=303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
            return response
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_token(request.cookies.get(self.cookie, "")) or self._is_token(bearer):
            return None
        return refusal(401, "The token is missing or wrong: open the address that was printed, with its token.")

    def _is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode(), self.token.encode())


def _hostname(host: str) -> str:
    """A ``Host`` header without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _same_origin(headers: Headers, scheme: str) -> bool:
    """Whether a request comes from a page of this address, or from no page at all."""
    origin = headers.get("origin")
    return origin is None or origin == f"{scheme}://{headers.get('host', '')}"


def answer(content: Any, status: int = 200) -> JSONResponse:
    """An answer in JSON, which has neither NaN nor infinity (they become null) nor halves of characters."""
    return JSONResponse(_plain(content), status_code=status)


def refusal(status: int, text: str) -> JSONResponse:
    """A sentence as an answer."""
    return answer({"error": text}, status)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value
