"""Jobs of the page: one thread works on all kinds in turns, a step of each; results are kept while there is room."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from scripts.utils.errors import BundleError, is_refusal, sentence

__all__ = ["BusyError", "Job", "Result", "Results", "Steps", "Worker", "request_key"]

logger = logging.getLogger(__name__)

MOST_WAITING = 256  # jobs that are not finished
MOST_FINISHED = 512  # of which the page can still ask what became of them
ROOM = 512 * 2**20  # bytes of files of results


class BusyError(BundleError):
    """There are too many jobs already."""


@dataclass
class Result:
    """What a job gives: numbers for the page, and files that it can fetch.

    Attributes:
        content: plain values, as JSON can hold them.
        files: ``.nii.gz`` and ``.png`` by their names.
    """

    content: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


# a job, as a generator: it yields how many steps are done, and of how many, after each of them; its result is the last
Steps = Generator[tuple[int, int] | Result, None, None]


def request_key(kind: str, arguments: Mapping[str, Any]) -> str:
    """A name for what is asked for; the same for equal requests."""
    text = json.dumps([kind, arguments], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Results:
    """The results that were used last, by the keys of their requests.

    Args:
        room: bytes of files to keep; the newest result is kept whatever its size.
    """

    def __init__(self, room: int = ROOM) -> None:
        self.room, self.size = room, 0
        self._kept: OrderedDict[str, Result] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, key: str, result: Result) -> None:
        with self._lock:
            self._forget(key)
            self._kept[key] = result
            self.size += _size(result)
            while self.size > self.room and len(self._kept) > 1:
                self._forget(next(iter(self._kept)))

    def get(self, key: str) -> Result | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _forget(self, key: str) -> None:
        if key in self._kept:
            self.size -= _size(self._kept.pop(key))


def _size(result: Result) -> int:
    return sum(map(len, result.files.values())) + 1024


@dataclass
class Job:
    """A job and what became of it.

    Attributes:
        kind: what is to be done.
        key: of the request, see :func:`request_key`.
        state: ``waiting``, ``running``, ``done``, ``failed`` or ``cancelled``.
        done, total: steps.
        error: a sentence, where it failed.
    """

    kind: str
    key: str
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: str = "waiting"
    done: int = 0
    total: int = 1
    error: str = ""

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def plain(self) -> dict[str, Any]:
        """As the page gets it."""
        names = ("id", "kind", "state", "done", "total", "error")
        return {name: getattr(self, name) for name in names}


class Worker:
    """One thread that works on all kinds of jobs in turns, a step of one of each, so that neither a long job nor many
    short ones hold up the others.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._turns: OrderedDict[str, deque[tuple[Job, Steps]]] = OrderedDict()  # by the kind, whose turn is next first
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, kind: str, key: str, steps: Steps) -> Job:
        """Add a job; one whose result is still kept is done at once. Too many are refused."""
        job = Job(kind, key)
        with self._changed:
            if self.results.get(key) is not None:
                job.state, job.done = "done", 1
            elif sum(not other.ended for other in self._jobs.values()) >= MOST_WAITING:
                raise BusyError(f"{MOST_WAITING} jobs are waiting already: wait until some are done, or cancel them.")
            else:
                self._queue(job, steps)
            self._jobs[job.id] = job
            self._forget_old()
            self._changed.notify()
        return job

    def find(self, identity: str) -> Job | None:
        with self._changed:
            return self._jobs.get(identity)

    def active(self) -> list[Job]:
        """The jobs that are not finished, oldest first."""
        with self._changed:
            return [job for job in self._jobs.values() if not job.ended]

    def cancel(self, job: Job) -> None:
        """Give up a job, after its present step; a job that has ended stays as it is."""
        with self._changed:
            if not job.ended:
                job.state = "cancelled"

    def stop(self) -> None:
        """End the thread after the present step."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join(timeout=30)

    def _forget_old(self) -> None:
        ended = [job.id for job in self._jobs.values() if job.ended]
        for identity in ended[: max(0, len(ended) - MOST_FINISHED)]:
            del self._jobs[identity]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._turns or self._stopped)
                if self._stopped:
                    return
                job, steps = self._next()
            if job.state == "cancelled":
                steps.close()
            elif self._step(job, steps):
                with self._changed:
                    self._queue(job, steps)

    def _queue(self, job: Job, steps: Steps) -> None:
        self._turns.setdefault(job.kind, deque()).append((job, steps))

    def _next(self) -> tuple[Job, Steps]:
        kind = next(iter(self._turns))
        job, steps = self._turns[kind].popleft()
        self._turns.move_to_end(kind)
        if not self._turns[kind]:
            del self._turns[kind]
        return job, steps

    def _step(self, job: Job, steps: Steps) -> bool:
        """Do one step; whether there are more."""
        self._set(job, state="running")
        try:
            with torch.inference_mode():
                step = next(steps)
        except Exception as error:  # whatever it is, the page says it and the thread goes on
            if not is_refusal(error):
                logger.exception("The job '%s' of the page failed.", job.kind)
            self._set(job, state="failed", error=sentence(error))
            return False
        if isinstance(step, Result):
            self.results.put(job.key, step)
            self._set(job, state="done", done=job.total)
            return False
        done, total = step
        self._set(job, done=done, total=total)
        return True

    def _set(self, job: Job, **values: Any) -> None:
        with self._changed:
            if job.state != "cancelled":
                for name, value in values.items():
                    setattr(job, name, value)
