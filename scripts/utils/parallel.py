"""Parallel processes that end with the one that started them, and the signals by which a run is asked to end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from types import FrameType
from typing import Any

import ignite.distributed as idist
from joblib import Parallel, cpu_count, parallel_config
from scripts.utils.errors import ResourceError
from tqdm import tqdm

JOBS_PER_PROCESS = 24  # fewer are not worth the several seconds that a process takes to start
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
ONCE = 1.0  # seconds in which signals are one: at Ctrl-C torchrun and the terminal send one each


def choose_workers(jobs: int, workers: int | None = None) -> int:
    """How many processes to start for a number of short jobs.

    Args:
        jobs: how many there are.
        workers: the most processes; as many as there are cores if not given.
    """
    return max(1, min(workers or cpu_count(), cpu_count(), 1 + jobs // JOBS_PER_PROCESS))


def run_parallel(
    jobs: Sequence[Any], workers: int, what: str, in_order: bool = True, quiet: bool = False
) -> Iterator[Any]:
    """Do jobs in parallel, each on one thread, with a progress bar.

    Args:
        jobs: made by joblib's ``delayed``.
        workers: processes to use; 1 does the jobs in this one.
        what: the bar's label.
        in_order: yield the results in the order of the jobs; otherwise as they are done.
        quiet: show no bar.

    Yields:
        What each job returns.

    Raises:
        OSError: a process was killed.
    """
    # A process that is killed cannot end its workers. Measured: joblib's finish the jobs that are queued, and then stay
    # idle for some four minutes, until their timeout.
    with parallel_config("loky", inner_max_num_threads=1, initializer=die_with_parent, initargs=(os.getpid(),)):
        order = "generator" if in_order else "generator_unordered"
        done = Parallel(n_jobs=max(1, min(workers, len(jobs))), return_as=order)(jobs)
    try:
        yield from tqdm(done, total=len(jobs), desc=what, unit="scan", file=sys.stderr, disable=quiet or not jobs)
    except BrokenProcessPool as error:
        raise ResourceError(
            "A worker process was killed, most likely for want of memory: lower --workers (in training --num_workers). "
            "With 1, the progress bar shows at which scan it happens."
        ) from error


def die_with_parent(parent: int) -> None:
    """Let Linux kill this process when its parent ends, however that happens. Other systems do nothing.

    Neither Python nor joblib has a call for it; that of PyTorch is private.

    Args:
        parent: process ID of the parent, which may have ended before this call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os._exit(1)


class SignalWatch:
    """A context in which the first SIGTERM, SIGUSR1 or Ctrl-C is noted instead of ending the process.

    Ctrl-C once more, a second later, raises ``KeyboardInterrupt``. Outside of the main thread, which alone gets signals
    in Python, nothing is noted.

    Attributes:
        received: the number of the first signal, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> SignalWatch:
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            # a shell lets what it starts in the background ignore Ctrl-C
            watched = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._note) for number in watched}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            if number == signal.SIGINT and idist.get_world_size() == 1:
                # not by a stream: the signal may have come while one was being written to
                os.write(2, b"\nEnding after this update; press Ctrl-C again to end without a checkpoint.\n")
        elif number == signal.SIGINT and time.monotonic() - self._since > ONCE:
            raise KeyboardInterrupt


def ignore_signals(worker_id: int = 0) -> None:
    """Let a data loader's worker survive the signals that :class:`SignalWatch` notes, so that the update can be ended.

    Terminals, launchers and schedulers send them to all processes of a job. The training process tells its workers when
    to end, and they end without it too.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
