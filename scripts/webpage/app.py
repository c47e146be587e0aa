"""The routes of the page: its files, and a small JSON interface to the jobs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from scripts.webpage.guard import LOOPBACK, Guard, answer, refusal
from scripts.webpage.jobs import Jobs
from scripts.webpage.work import BusyError, Job, Results, Worker
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

__all__ = ["create_app"]

STATIC = Path(__file__).parent / "static"
TYPES = {".png": "image/png", ".gz": "application/gzip"}
PATIENCE = 120  # seconds that a thumbnail may take


def create_app(jobs: Jobs, token: str, hosts: Collection[str] = LOOPBACK) -> Starlette:
    """The page as an ASGI application, behind a :class:`scripts.webpage.guard.Guard`."""
    endpoints = Endpoints(jobs)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        endpoints.worker.stop()

    guard = Middleware(Guard, token=token, hosts=hosts)
    return Starlette(routes=endpoints.routes(), middleware=[guard], lifespan=lifespan)


class Endpoints:
    """What answers each request of the page."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.results = jobs, Results()
        self.worker = Worker(self.results)

    def routes(self) -> list[Route | Mount]:
        return [
            Route("/", self.index),
            Route("/api/about", self.about),
            Route("/api/scans", self.scans),
            Route("/api/scans/{index:int}/thumbnail.png", self.thumbnail),
            Route("/api/jobs", self.active),
            Route("/api/jobs", self.submit, methods=["POST"]),
            Route("/api/jobs/{id}", self.one, methods=["GET", "DELETE"]),
            Route("/api/results/{key}/{name}", self.file),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]

    async def index(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def about(self, request: Request) -> Response:
        return answer(self.jobs.about())

    async def scans(self, request: Request) -> Response:
        query = request.query_params
        try:
            offset, limit = int(query.get("offset", 0)), int(query.get("limit", 50))
        except ValueError:
            return refusal(422, "offset and limit must be whole numbers.")
        descending = query.get("descending") == "true"
        return answer(self.jobs.cohort.page(offset, limit, query.get("sort", ""), descending, query.get("search", "")))

    async def thumbnail(self, request: Request) -> Response:
        channel = request.query_params.get("channel", "0")
        try:
            job = self._submit("thumbnail", {"index": request.path_params["index"], "channel": int(channel)})
        except ValueError:
            return refusal(422, f"channel is {channel!r}: it must be a whole number.")
        except BusyError as error:
            return refusal(429, str(error))
        for _ in range(PATIENCE * 50):
            if job.ended:
                break
            if await request.is_disconnected():  # its row is no longer shown
                self.worker.cancel(job)
                return refusal(499, "Nobody waits for the picture.")
            await asyncio.sleep(0.02)
        result = self.results.get(job.key)
        if job.state != "done" or result is None:
            self.worker.cancel(job)
            return refusal(422, job.error or "The picture took too long.")
        return Response(result.files["thumbnail.png"], media_type="image/png")

    async def submit(self, request: Request) -> Response:
        try:
            asked = json.loads(await request.body())
            job = self._submit(asked["kind"], asked.get("arguments", {}))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError):
            return refusal(422, 'A job is asked for as {"kind": ..., "arguments": {...}}.')
        except ValueError as error:
            return refusal(422, str(error))
        except BusyError as error:
            return refusal(429, str(error))
        return answer(self._state(job), 202)

    async def active(self, request: Request) -> Response:
        return answer([job.plain() for job in self.worker.active() if job.kind != "thumbnail"])

    async def one(self, request: Request) -> Response:
        job = self.worker.find(request.path_params["id"])
        if job is None:
            return refusal(404, "There is no such job, or it was long ago: ask for it again.")
        if request.method == "DELETE":
            self.worker.cancel(job)
        return answer(self._state(job))

    async def file(self, request: Request) -> Response:
        name = request.path_params["name"]
        result = self.results.get(request.path_params["key"])
        if result is None or name not in result.files:
            return refusal(404, "This file is no longer kept: ask for it again.")
        headers = {"content-disposition": "attachment"}  # the page's links say under which name
        return Response(result.files[name], media_type=TYPES[Path(name).suffix], headers=headers)

    def _submit(self, kind: Any, arguments: Any) -> Job:
        key, steps = self.jobs.prepare(kind, arguments)
        return self.worker.submit(kind, key, steps)

    def _state(self, job: Job) -> dict[str, Any]:
        state = job.plain()
        if job.state == "done":
            result = self.results.get(job.key)
            if result is None:
                return state | {"state": "failed", "error": "The result is no longer kept: ask for it again."}
            state["result"] = result.content
            state["files"] = {name: f"/api/results/{job.key}/{name}" for name in result.files}
        return state
