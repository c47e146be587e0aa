"""The host and the device that computes: who waits for whom, and how numbers come to the host without waiting."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def runs_ahead(device: torch.device) -> bool:
    """Whether the host queues work for a device and goes on, so that reading a value would wait for all that is queued.

    True of CUDA and its like. MPS counts as a CPU here: PyTorch's optimizers keep their counters on the host for it.
    """
    return device.type not in ("cpu", "mps")


class Block(NamedTuple):
    """Vectors that were copied together, the lengths of each, what belongs to each, and the event after the copy."""

    values: Tensor
    sizes: list[int]
    notes: list[Any]
    copied: torch.Event | None


class NumbersOnTheWay:
    """Brings vectors from a device to the host, each with a note of the host's own.

    So many vectors at a time are copied together, into pinned memory, while the device works on. They are handed out
    when the next ones start, by when the copy is long done. So the numbers of an update are known after ``interval`` to
    ``2 * interval - 1`` further ones, the same on every process. On a CPU, where nothing is waited for, they are known
    at once.

    Args:
        interval: how many vectors are copied together.

    Raises:
        ValueError: ``interval`` is less than 1.
    """

    def __init__(self, interval: int) -> None:
        if interval < 1:
            raise ValueError(f"log_interval is {interval}: set it to 1 or more updates.")
        self.interval = interval
        self._waiting: list[tuple[Tensor, Any]] = []
        self._block: Block | None = None

    def add(self, values: Tensor, note: Any) -> list[tuple[list[float], Any]]:
        """Send one vector on its way; returns those that have arrived, in order."""
        self._waiting.append((values, note))
        if not runs_ahead(values.device):
            return self.wait()
        return self._start_copy() if len(self._waiting) == self.interval else []

    def wait(self) -> list[tuple[list[float], Any]]:
        """All that is on its way, in order."""
        return [*self._start_copy(), *self._start_copy()]

    def look(self) -> list[tuple[list[float], Any]]:
        """The same, without taking it off its way."""
        before = [] if self._block is None else _read(self._block)
        return before + [(values.tolist(), note) for values, note in self._waiting]

    def _start_copy(self) -> list[tuple[list[float], Any]]:
        """Copy what waits; returns what was copied before."""
        arrived, self._block = self._block, None
        if self._waiting:
            vectors, notes = zip(*self._waiting, strict=True)
            device, self._waiting = vectors[0].device, []
            # a copy to the host that need not be waited for goes into pinned memory
            values = torch.cat(vectors).to("cpu", non_blocking=True)
            copied = torch.Event(device) if runs_ahead(device) else None
            if copied is not None:
                copied.record()
            self._block = Block(values, [len(vector) for vector in vectors], list(notes), copied)
        return [] if arrived is None else _read(arrived)


def _read(block: Block) -> list[tuple[list[float], Any]]:
    if block.copied is not None:
        block.copied.synchronize()
    vectors = block.values.split(block.sizes)
    return [(vector.tolist(), note) for vector, note in zip(vectors, block.notes, strict=True)]
