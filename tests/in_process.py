"""Programs run in the test's own process, with what they leave of a process of their own: output and exit code."""

from __future__ import annotations

import gc
import logging
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO
from unittest import mock

import pytest

OUT, ERR = sys.stdout, sys.stderr  # to which loggers write that were made while modules were imported
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


def run_module(module: str, *words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """What ``python -m module words`` does, without the seconds in which a process of its own would import MONAI.

    What such a program changes of its process is put back: streams, logging, warnings, signal handlers, random states,
    threads, folder, environment and the locks of runs that failed.

    Args:
        cwd: folder to run in.
        environment: variables to add.

    Returns:
        Exit code, standard output and standard error; a traceback is in there as Python would print it.
    """
    arguments = [module, *map(str, words)]
    with ExitStack() as stack:
        out, err = stack.enter_context(_captured_output())
        for context in (_fresh_logging(out, err), _fresh_warnings(), _kept_random_states(), _kept_signal_handlers()):
            stack.enter_context(context)
        stack.enter_context(mock.patch.dict(os.environ, environment))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.chdir(cwd)
        patch.setattr(sys, "argv", arguments)
        patch.setattr(sys, "path", [str(cwd), *sys.path])
        patch.setattr(sys, "excepthook", sys.__excepthook__)
        stack.enter_context(_released_locks())
        code = _exit_code(module)
        if code != 0:
            _end_leftovers()
        for stream in (out, err):
            stream.flush()
            stream.seek(0)
        return subprocess.CompletedProcess(arguments, code, out.read(), err.read())


def _exit_code(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def _end_leftovers() -> None:
    """End what a program that failed leaves running: TensorBoard's threads, and loaders' processes."""
    from torch.utils.tensorboard import SummaryWriter

    for found in gc.get_objects():
        if type(found) is SummaryWriter:
            found.close()
    gc.collect()  # loaders end their processes when they are deleted, but are parts of cycles of references


@contextmanager
def _captured_output() -> Iterator[tuple[TextIO, TextIO]]:
    """Files that take what Python, libraries and processes that are started write to the standard streams."""
    with ExitStack() as stack:
        files = []
        for number, redirect in ((1, redirect_stdout), (2, redirect_stderr)):
            file = stack.enter_context(tempfile.TemporaryFile("w+", buffering=1, encoding="utf-8"))
            before = os.dup(number)
            stack.callback(os.close, before)
            os.dup2(file.fileno(), number)
            stack.callback(os.dup2, before, number)
            stack.enter_context(redirect(file))
            files.append(file)
        yield tuple(files)


@contextmanager
def _fresh_logging(out: TextIO, err: TextIO) -> Iterator[None]:
    """Logging as when a process starts: the root logger has no handler, and others write to the new streams."""
    root = logging.getLogger()
    named = [logger for logger in root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    loggers = {root, logging.getLogger("ignite"), *named}  # configs/logging.conf changes these two
    before = [(logger, logger.handlers[:], logger.level, logger.propagate, logger.disabled) for logger in loggers]
    moved = {OUT: out, sys.__stdout__: out, ERR: err, sys.__stderr__: err}
    handlers = {handler for logger in loggers for handler in logger.handlers}
    streams = {h: h.stream for h in handlers if isinstance(h, logging.StreamHandler) and h.stream in moved}
    for handler, stream in streams.items():
        handler.setStream(moved[stream])
    root.handlers = []
    root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for handler, stream in streams.items():
            handler.setStream(stream)
        for logger, handlers, level, propagate, disabled in before:
            logger.handlers, logger.propagate, logger.disabled = handlers, propagate, disabled
            if logger.level != level:  # to set it clears caches of all loggers
                logger.setLevel(level)


@contextmanager
def _fresh_warnings() -> Iterator[None]:
    """Warnings are printed, as Python does by default; pytest would collect them."""

    def show(message, category, filename, lineno, file=None, line=None):
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        # that a module runs as a program which has been imported before
        warnings.filterwarnings("ignore", ".* found in sys.modules after import of package", RuntimeWarning)
        warnings.showwarning = show
        yield


@contextmanager
def _kept_random_states() -> Iterator[None]:
    import numpy as np
    import torch

    threads, numpy_state, python_state = torch.get_num_threads(), np.random.get_state(), random.getstate()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            np.random.set_state(numpy_state)
            random.setstate(python_state)


@contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _released_locks() -> Iterator[None]:
    """A run that fails holds the lock of its folder until its process ends."""
    from scripts.utils import locks

    before = set(locks._locks)
    try:
        yield
    finally:
        for folder in set(locks._locks) - before:
            locks.release_output_dir(folder)
