"""The update of the weights, taken or left out without asking the device, and what the host learns of it, late."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import ignite.distributed as idist
import torch
from ignite.engine import EventEnum
from scripts.utils.devices import DelayedScalars, is_async
from scripts.utils.errors import BundleError
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from scripts.training.trainer import VDVAETrainer

logger = logging.getLogger(__name__)

SHOWN = ("loss", "bits_per_dim", "nll", "kl", "mse")  # the mean over the batch of each
NAMED = 8  # scans, in one sentence
CHUNK = 2**23  # numbers that are chosen from at once, where a step is taken or left out on the device


@dataclass(frozen=True)
class StepLimits:
    """What the weights and the gradients are held to, and when a run that cannot recover ends.

    Attributes:
        weight_penalty: factor of the mean squares of the weight tensors; 0 leaves them out.
        max_grad_norm: gradients are clipped to this norm.
        skip_grad_norm: an update whose gradients' norm is above this is skipped, after ``skip_warmup`` updates.
        skip_warmup: number of first updates that are clipped but not skipped for their size.
        max_skips: so many skipped updates in a row end the run.
    """

    weight_penalty: float = 1e-4
    max_grad_norm: float = 100.0
    skip_grad_norm: float = 1e12
    skip_warmup: int = 50
    max_skips: int = 50

    def largest_norm(self, updates: int) -> float:
        """Of the gradients, up to which the update after so many is made; in any case it must be finite."""
        largest = torch.finfo(torch.float32).max
        return min(largest, self.skip_grad_norm) if updates >= self.skip_warmup else largest


def make_capturable(optimizer: Optimizer) -> None:
    """Let an optimizer count its steps where its parameters are, also after its state was loaded.

    With counters on the host each update would wait for the device once for each tensor. PyTorch's name for counters on
    the device is ``capturable``; not every optimizer has them.
    """
    for group in optimizer.param_groups:
        if "capturable" not in group:
            continue
        group["capturable"] = is_async(group["params"][0].device)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                device = parameter.device if group["capturable"] else "cpu"
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(device, non_blocking=True)


class GuardedStep:
    """An optimizer's step that is taken or left out as a value on the device says.

    Where the host runs ahead of the device it is always computed, and weights and optimizer's state become the new or
    the old ones on the device: reading the value would make the host wait for the whole update. That takes one copy of
    the weights and of the state.

    Args:
        network: in training; where a step is left out its batch statistics become those that :meth:`start` kept.
        optimizer: of its parameters.
        on_device: whether the choice is made there; by default where the host runs ahead.
    """

    def __init__(self, network: nn.Module, optimizer: Optimizer, on_device: bool | None = None) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.on_device = is_async(self.parameters[0].device) if on_device is None else on_device
        norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        self._running = [buffer for m in norms for buffer in m.buffers()]  # statistics
        self._kept = [buffer.clone() for buffer in self._running]  # those before the update

    @torch.no_grad()
    def start(self) -> None:
        """Keep the batch statistics as they are before the scans of an update."""
        for buffer, kept in zip(self._running, self._kept, strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def __call__(self, take: Tensor) -> None:
        """Make the step where ``take``, a scalar, is true."""
        for buffer, kept in zip(self._running, self._kept, strict=True):
            buffer.copy_(torch.where(take, buffer, kept))
        if self.on_device:
            self._step_on_device(take)
        elif take:
            self.optimizer.step()

    def _step_on_device(self, take: Tensor) -> None:
        tensors = self._tensors()
        chunks = _chunks(as_vectors(tensors))
        before = [torch.cat(chunk) for chunk in chunks]
        self.optimizer.step()
        before_ids = {id(tensor) for tensor in tensors}
        made = [tensor for tensor in self._tensors() if id(tensor) not in before_ids]  # the state, by the first step
        for chunk, old in zip(chunks, before, strict=True):
            _put(chunk, torch.where(take, torch.cat(chunk), old))
        for chunk in _chunks(as_vectors(made)):
            _put(chunk, torch.where(take, torch.cat(chunk), 0.0))

    def _tensors(self) -> list[Tensor]:
        """All that a step changes."""
        states = [self.optimizer.state.get(p, {}).values() for p in self.parameters]
        return self.parameters + [value for state in states for value in state if isinstance(value, Tensor)]


def as_vectors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same memory as vectors, of tensors that have no gaps in it, whatever the order of their axes."""
    return [tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in tensors]


def _chunks(vectors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Vectors by such groups as are copied at once: few launches, and little memory beside what is kept."""
    chunks: list[list[Tensor]] = []
    room = 0
    for vector in vectors:
        if not chunks or len(vector) > room:
            chunks.append([])
            room = CHUNK
        chunks[-1].append(vector)
        room -= len(vector)
    return chunks


def _put(vectors: Sequence[Tensor], values: Tensor) -> None:
    """Copy values to the vectors, one after the other."""
    torch._foreach_copy_(list(vectors), list(values.split([len(vector) for vector in vectors])))


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
        limits: which updates are skipped, and how many skipped ones in a row end the run.
    """

    def __init__(self, engine: VDVAETrainer, log_interval: int, limits: StepLimits) -> None:
        self.engine, self.log_interval, self.limits = engine, log_interval, limits
        self._delayed = DelayedScalars(log_interval)
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
        self._take_in(self._delayed.add(values, note))

    def end(self) -> None:
        """Wait until all is known. All processes together: they tell each other what is skipped.

        Raises:
            TrainingStalledError: ``max_skips`` updates in a row were skipped.
        """
        self._take_in(self._delayed.wait())
        self._looked = None

    def skips(self) -> tuple[int, int]:
        """How many updates were skipped, and how many in a row up to the last one. Waits for the device."""
        skipped, in_a_row = self.engine.state.skipped, self.engine.state.skipped_in_a_row
        for values, note in self._delayed.look():
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
        if state.skipped_in_a_row >= self.limits.max_skips:
            raise TrainingStalledError(
                f"{self.limits.max_skips} updates in a row (max_skips) were skipped because the gradients were not "
                f"finite or their norm was above skip_grad_norm ({self.limits.skip_grad_norm:g}; the last was "
                f"{norm:g}). Look at the scans that are named above; lower --learning_rate, raise --skip_grad_norm, or "
                "train without --amp, and resume by --resume True from the last checkpoint, which was saved before."
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
