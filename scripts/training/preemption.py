"""Ending a run in good order when it is told to, as schedulers do before they kill it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType

import ignite.distributed as idist
from ignite.engine import Engine, Events

from scripts.training.checkpoints import CheckpointHandler

__all__ = ["Interruption", "ignore_signals"]

logger = logging.getLogger(__name__)

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
ONCE = 1.0  # seconds in which signals are one: at Ctrl-C torchrun and the terminal send one each


class Interruption:
    """
    At SIGTERM, SIGUSR1 or Ctrl-C: end the running update, save a checkpoint, stop training.

    The signal may reach any of several processes; all stop after the same update. One that comes while an epoch is
    validated counts after that. Ctrl-C once more, a second later, ends this process at once.

    Args:
        checkpoint: what saves the checkpoint.
    """

    def __init__(self, checkpoint: CheckpointHandler) -> None:
        self.checkpoint = checkpoint
        self._signal: int | None = None
        self._since = 0.0

    def attach(self, engine: Engine) -> None:
        """Attach last, so that all else of an update or an epoch is done."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._after_batch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._stop_if_told)

    def run(self, trainer: Engine) -> None:
        """Run the trainer and heed signals meanwhile, if this is the main thread, which alone gets them in Python."""
        if threading.current_thread() is not threading.main_thread():
            trainer.run()
            return
        self._signal = None
        # a shell lets what it starts in the background ignore Ctrl-C
        heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heeded}
        try:
            trainer.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._since = number, time.monotonic()
            if number == signal.SIGINT and idist.get_world_size() == 1:
                # not by a stream: the signal may have come while one was being written to
                os.write(2, b"\nEnding after this update; press Ctrl-C again to end without a checkpoint.\n")
        elif number == signal.SIGINT and time.monotonic() - self._since > ONCE:
            raise KeyboardInterrupt

    def _after_batch(self, engine: Engine) -> None:
        # the end of an epoch comes with its validation, which belongs to it
        if engine.between_updates and not engine.epoch_ends:
            self._stop_if_told(engine)

    def _stop_if_told(self, engine: Engine) -> None:
        number = idist.all_reduce(self._signal or 0, op="MAX")
        all_done = engine.epoch_ends and engine.state.epoch == engine.state.max_epochs
        if not number or all_done:
            return
        self.checkpoint.save(engine)
        if idist.get_rank() == 0:
            logger.warning(
                "Stopped by %s after update %d; the checkpoint is saved, go on by --resume True.",
                signal.Signals(int(number)).name,
                engine.state.updates,
            )
        engine.terminate()


def ignore_signals(worker_id: int = 0) -> None:
    """
    Let a data loader's worker go on at the signals that :class:`Interruption` heeds, so that the update can be ended.

    Terminals, launchers and schedulers send them to all processes of a job. The training process tells its workers when
    to end, and they end without it too.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
