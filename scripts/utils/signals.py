"""The signals by which terminals, launchers and schedulers ask a run to end."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

import ignite.distributed as idist

__all__ = ["SignalWatch", "ignore_signals"]

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
ONCE = 1.0  # seconds in which signals are one: at Ctrl-C torchrun and the terminal send one each


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
