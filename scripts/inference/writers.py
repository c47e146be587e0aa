"""Writing results by processes of their own, so that the network need not wait for gzip."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from scripts.utils.errors import ResourceError
from scripts.utils.parallel import die_with_parent
from scripts.utils.signals import ignore_signals

__all__ = ["ResultWriters"]

WAITING = 2  # results per process that may wait to be written

_write: Callable[[Any], Any]  # of a process of a pool


class ResultWriters:
    """A context in which results are written by other processes, at its end all of them.

    Inverting the preprocessing and compressing a scan's results takes seconds on one core, of which much is Python:
    threads would share one core, and drawing and MONAI's inverse transforms are not made for them. The processes are
    forked, as those of a data loader are, so that nothing is sent but the results. On other systems than Linux, which
    cannot fork safely, results are written in this process.

    When an error ends the context, what is being written is finished, and what waits is not begun.

    Args:
        write: what is called on each result; it must not use a GPU.
        workers: processes; 0 writes in this one.
        done: is called in this process, in the order of the results, with what ``write`` returned.
    """

    def __init__(self, write: Callable[[Any], Any], workers: int, done: Callable[[Any], object]) -> None:
        self.write, self.done = write, done
        self.workers = workers if sys.platform == "linux" else 0
        self._pool: ProcessPoolExecutor | None = None
        self._begun: deque[Future] = deque()

    def add(self, result: Any) -> None:
        """Let a result be written, once fewer than ``WAITING`` per process wait.

        Raises:
            OSError: a process was killed.
            Exception: what ``write`` raised of this result or an earlier one.
        """
        if self._pool is None:
            self.done(self.write(result))
            return
        while len(self._begun) >= WAITING * self.workers:
            self._finish_first()
        try:
            self._begun.append(self._pool.submit(_call, result))
        except BrokenProcessPool as error:
            raise _killed() from error

    def _finish_first(self) -> None:
        try:
            self.done(self._begun.popleft().result())
        except BrokenProcessPool as error:
            raise _killed() from error

    def __enter__(self) -> ResultWriters:
        if self.workers:
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(self.workers, context, _start, (self.write, os.getpid()))
            self._pool.submit(int)  # all are forked now, before a data loader has threads
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            while self._begun and kind is None:
                self._finish_first()
        finally:
            self._begun.clear()
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None


def _start(write: Callable[[Any], Any], parent: int) -> None:
    """Make a forked process ready: on one thread, since those of OpenMP do not survive a fork."""
    global _write
    _write = write
    torch.set_num_threads(1)
    ignore_signals()
    die_with_parent(parent)


def _call(result: Any) -> Any:
    return _write(result)


def _killed() -> OSError:
    return ResourceError(
        "A process that writes results was killed, most likely for want of memory: lower --num_workers. With 0, "
        "results are written by the process that runs the network."
    )
