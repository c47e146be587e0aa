"""Work on many scans in processes of their own, which end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from joblib import Parallel, cpu_count, parallel_config
from tqdm import tqdm

__all__ = ["choose_workers", "die_with_parent", "run_parallel"]

JOBS_PER_PROCESS = 24  # a process takes several seconds to start
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def choose_workers(jobs: int, workers: int | None = None) -> int:
    """How many processes to start for a number of short jobs: at most ``workers``, or as many as there are cores."""
    return max(1, min(workers or cpu_count(), cpu_count(), 1 + jobs // JOBS_PER_PROCESS))


def run_parallel(
    jobs: Sequence[Any], workers: int, what: str, in_order: bool = True, quiet: bool = False
) -> Iterator[Any]:
    """
    What the jobs return, each done by one thread, with a progress bar.

    Args:
        jobs: made by joblib's ``delayed``.
        workers: processes to use; 1 does the jobs in this one.
        what: is done, for the bar.
        in_order: of the jobs; else as they are done.
        quiet: show no bar.

    Raises:
        OSError: a process was killed.
    """
    # killed, this process could not end its workers, and they would wait for work for another five minutes
    with parallel_config("loky", inner_max_num_threads=1, initializer=die_with_parent, initargs=(os.getpid(),)):
        order = "generator" if in_order else "generator_unordered"
        done = Parallel(n_jobs=max(1, min(workers, len(jobs))), return_as=order)(jobs)
    try:
        yield from tqdm(done, total=len(jobs), desc=what, unit="scan", file=sys.stderr, disable=quiet or not jobs)
    except BrokenProcessPool as error:
        raise OSError(
            "A worker process was killed, most likely for want of memory: lower --workers (in training --num_workers). "
            "With 1, the progress bar shows at which scan it happens."
        ) from error


def die_with_parent(parent: int) -> None:
    """Let Linux kill this process when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended meanwhile
            os._exit(1)
