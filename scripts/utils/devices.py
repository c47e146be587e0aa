"""The host and the device that computes: who waits for whom, and how numbers come to the host without waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scripts.utils.errors import InputError
from torch import Tensor


def is_async(device: torch.device) -> bool:
    """Whether the host queues work for a device and goes on, so that reading a value would wait for all that is queued.

    True of CUDA and its like. MPS counts as a CPU here: PyTorch's optimizers keep their counters on the host for it.
    """
    return device.type not in ("cpu", "mps")


def tune(device: torch.device, tf32: bool) -> None:
    """Let cuDNN choose the fastest convolutions, for all that follows in this process. Nothing changes on a CPU.

    Args:
        device: on which the network runs.
        tf32: whether convolutions of single precision round their factors to 10 bits of mantissa.
    """
    if device.type == "cuda":
        # every batch has one shape, so that trying the algorithms once pays
        torch.backends.cudnn.benchmark = True
        # of convolutions alone: products of matrices, which fit the population prior, keep single precision
        torch.backends.cudnn.allow_tf32 = tf32


def free_memory() -> int | None:
    """Bytes of the host's memory that are free or would be on demand; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    group = Path("/sys/fs/cgroup")  # of a container that may have less
    try:
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # there is none, or it says "max"
        return free
    return min(free, max(0, limit - used))


class Block(NamedTuple):
    """Vectors that were copied together, the lengths of each, what belongs to each, and the event after the copy."""

    values: Tensor
    sizes: list[int]
    notes: list[Any]
    copied: torch.Event | None


class DelayedScalars:
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
            raise InputError(f"log_interval is {interval}: set it to 1 or more updates.")
        self.interval = interval
        self._waiting: list[tuple[Tensor, Any]] = []
        self._block: Block | None = None

    def add(self, values: Tensor, note: Any) -> list[tuple[list[float], Any]]:
        """Send one vector on its way; returns those that have arrived, in order."""
        self._waiting.append((values, note))
        if not is_async(values.device):
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
            copied = torch.Event(device) if is_async(device) else None
            if copied is not None:
                copied.record()
            self._block = Block(values, [len(vector) for vector in vectors], list(notes), copied)
        return [] if arrived is None else _read(arrived)


def _read(block: Block) -> list[tuple[list[float], Any]]:
    if block.copied is not None:
        block.copied.synchronize()
    vectors = block.values.split(block.sizes)
    return [(vector.tolist(), note) for vector, note in zip(vectors, block.notes, strict=True)]


def on_device(loader: Any, device: torch.device | str) -> Any:
    """A loader whose batches are on the device when they are needed: :class:`Prefetched`, or on a CPU the same one."""
    device = torch.device(device)
    return loader if device.type == "cpu" else Prefetched(loader, device)


class Prefetched:
    """The batches of a loader on a device, each copied while the device works on the one before.

    Copies are made on a stream of their own, where they wait for nothing that is computed, out of pinned memory: a
    batch whose tensors are not pinned yet, by the loader's ``pin_memory``, is pinned here, once. Everything else that
    is asked of the loader, such as its length, it answers itself.

    MONAI's ``ThreadDataLoader`` copies in a thread, which PyTorch's loader has for pinning already, and ends an epoch
    without a word where the loader raises an error.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet, in a copy that is being made
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        if not is_async(self.device):
            yield from (_each_tensor(batch, self._copy) for batch in self.loader)
            return
        aside = torch.Stream(self.device)
        ahead = deque[tuple[Any, torch.Event]]()
        for batch in self.loader:
            with aside:
                ahead.append((_each_tensor(batch, self._copy), aside.record_event()))
            if len(ahead) > 1:
                yield self._arrived(*ahead.popleft())
        while ahead:
            yield self._arrived(*ahead.popleft())

    def _copy(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _arrived(self, batch: Any, copied: torch.Event) -> Any:
        """A batch that what is computed next may use, and whose memory is not given to the next copy before that."""
        current = torch.accelerator.current_stream(self.device)
        current.wait_event(copied)
        if self.device.type == "cuda":
            _each_tensor(batch, lambda tensor: tensor.record_stream(current))
        return batch


def to_host(values: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Start copies of tensors to the host; what is returned waits for them, and gives them."""
    copies = {name: value.to("cpu", non_blocking=True) for name, value in values.items()}
    devices = {value.device for value in values.values() if is_async(value.device)}
    events = []
    for device in devices:
        events.append(torch.Event(device))
        events[-1].record()

    def wait() -> dict[str, Tensor]:
        for event in events:
            event.synchronize()
        return copies

    return wait


def _each_tensor(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A batch with what a function makes of each tensor in dictionaries, lists and tuples; all else stays as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _each_tensor(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_each_tensor(item, function) for item in value)
    return value
