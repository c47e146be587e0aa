"""What the host learns of each batch, on a GPU some updates late: what is reported, and which updates were skipped."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from ignite.engine import Engine, EventEnum
from scripts.utils.devices import NumbersOnTheWay
from scripts.utils.errors import BundleError
from torch import Tensor

logger = logging.getLogger(__name__)

SHOWN = ("loss", "bits_per_dim", "nll", "kl", "mse")  # the mean over the batch of each
NAMED = 8  # scans, in one sentence


class NumberEvents(EventEnum):
    """``NUMBERS_KNOWN``: the host knows the numbers of one more batch, see :class:`BatchNumbers`."""

    NUMBERS_KNOWN = "numbers_known"


class TrainingStalledError(BundleError, RuntimeError):
    """So many updates in a row were skipped that training cannot recover by itself."""


class BatchNote(NamedTuple):
    """What the host knows of a batch before its numbers.

    Attributes:
        iteration: its number.
        update: that of the update that it ends; None where more batches belong to the same.
        names: of its scans.
        learning_rate: of the update.
    """

    iteration: int
    update: int | None
    names: list[str]
    learning_rate: float


class BatchNumbers:
    """Keeps ``numbers``, ``skipped`` and ``skipped_in_a_row`` of a trainer's state, as far as they are known.

    ``numbers`` are those of one batch, a dictionary. ``NumberEvents.NUMBERS_KNOWN`` fires for each batch, in order. On
    a GPU that is some updates late, and so is the sentence that names the scans of a skipped update.

    Args:
        engine: the trainer, which has the events.
        log_interval: updates from one look at the numbers to the next, where the host runs ahead of the device.
        max_skips: so many skipped updates in a row end the run.
    """

    def __init__(self, engine: Engine, log_interval: int, max_skips: int) -> None:
        self.engine, self.log_interval, self.max_skips = engine, log_interval, max_skips
        self._on_the_way = NumbersOnTheWay(log_interval)
        self._scans: list[tuple[str, float]] = []  # of the next update: name, and whether its likelihood is finite
        self._looked: float | None = None  # when numbers were known last, in seconds
        state = engine.state
        state.skipped, state.skipped_in_a_row, state.numbers = 0, 0, {}

    def start(self) -> None:
        """Count the time from here on; every batch may say so."""
        self._looked = self._looked or time.perf_counter()

    def add(self, output: dict[str, Tensor], note: BatchNote) -> None:
        """Send the numbers of a batch on their way, and take in what has arrived.

        Args:
            output: of the step, with ``grad_norm`` and whether the update was made, ``taken``.

        Raises:
            TrainingStalledError: ``max_skips`` updates in a row were skipped.
        """
        means = [output[name].float().mean() for name in SHOWN]
        finite = (output["nll"] + output["kl"]).isfinite()
        update = [output["grad_norm"].float(), output["taken"].float()]
        values = torch.cat([torch.stack([*means, *update]), finite.float()])
        self._take_in(self._on_the_way.add(values, note))

    def end(self) -> None:
        """Wait until all is known. All processes together: they tell each other what is skipped.

        Raises:
            TrainingStalledError: ``max_skips`` updates in a row were skipped.
        """
        self._take_in(self._on_the_way.wait())
        self._looked = None

    def skips(self) -> tuple[int, int]:
        """How many updates were skipped, and how many in a row up to the last one. Waits for the device."""
        skipped, in_a_row = self.engine.state.skipped, self.engine.state.skipped_in_a_row
        for values, note in self._on_the_way.look():
            if note.update is not None:
                taken = values[len(SHOWN) + 1]
                skipped, in_a_row = (skipped, 0) if taken else (skipped + 1, in_a_row + 1)
        return skipped, in_a_row

    def _take_in(self, arrived: Sequence[tuple[list[float], BatchNote]]) -> None:
        """Numbers of batches that have reached the host, in order."""
        if not arrived:
            return
        now, before = time.perf_counter(), self._looked
        rate = sum(len(note.names) for _, note in arrived) / (now - before)
        self._looked = now
        state = self.engine.state
        for values, note in arrived:
            norm, taken, *finite = values[len(SHOWN) :]
            self._scans += zip(note.names, finite, strict=True)
            numbers: dict[str, Any] = dict(zip(SHOWN, values, strict=False)) | {"learning_rate": note.learning_rate}
            if note.update is not None:
                numbers["grad_norm"] = norm
                self._count(note.update, norm, bool(taken))
            state.numbers = numbers | {"skipped": state.skipped, "scans_per_second": rate, "iteration": note.iteration}
            self.engine.fire_event(NumberEvents.NUMBERS_KNOWN)

    def _count(self, update: int, norm: float, taken: bool) -> None:
        """Count an update that was made or skipped."""
        state = self.engine.state
        state.skipped_in_a_row = 0 if taken else state.skipped_in_a_row + 1
        if not taken:
            state.skipped += 1
            self._report_skip(update, norm)
        self._scans = []
        if state.skipped_in_a_row >= self.max_skips:
            raise TrainingStalledError(
                f"{self.max_skips} updates in a row (max_skips) were skipped because the gradients were not finite or "
                f"their norm was above skip_grad_norm ({self.engine.skip_grad_norm:g}; the last was {norm:g}). Look at "
                "the scans that are named above; lower --learning_rate, raise --skip_grad_norm, or train without "
                "--amp, and resume by --resume True from the last checkpoint, which was saved before."
            )

    def _report_skip(self, update: int, norm: float) -> None:
        """Say which scans an update was skipped for."""
        scans = list(itertools.chain(*idist.all_gather(self._scans)))
        broken = [name for name, finite in scans if not finite]
        named = broken or [name for name, _ in scans]
        if idist.get_rank() > 0:  # one tells for all
            return
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        what = "The likelihood is not finite of" if broken else "Its scans were"
        logger.warning(
            "Update %d skipped: the gradients' norm is %g (%d skipped so far). %s %s%s.",
            *(update, norm, self.engine.state.skipped, what, ", ".join(named[:NAMED]), more),
        )
