"""Work on many scans in parallel processes, which end with the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from joblib import Parallel, cpu_count, parallel_config
from scripts.utils.errors import ResourceError
from tqdm import tqdm

JOBS_PER_PROCESS = 24  # fewer are not worth the several seconds that a process takes to start
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def choose_workers(jobs: int, workers: int | None = None) -> int:
    """How many processes to start for so many short jobs, at most ``workers``; None: as many as there are cores."""
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
    """Let Linux kill this process when its parent, which may have ended already, does. Other systems do nothing.

    Neither Python nor joblib has a call for it; that of PyTorch is private.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os._exit(1)
