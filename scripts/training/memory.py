"""Memory that an update needs, counted without computing anything, and a warning where the machine has less."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Mapping
from typing import Any

import ignite.distributed as idist
import torch
from scripts.networks import VDVAE
from scripts.training.losses import ELBOLoss
from scripts.training.precision import cpu_has_bfloat16
from scripts.utils.devices import free_memory
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["GPU_OVERHEAD", "PeakMemory", "fake_parameters", "update_bytes", "warn_of_memory"]

logger = logging.getLogger(__name__)

# CUDA context, cuDNN workspace and fragmentation; a card of n GB offers about n GiB
GPU_OVERHEAD = 1.5 * 2**30
TENSORS = 40  # of a level, that an update keeps of each of its blocks; fewer in all networks of configs/


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes that the tensors seen by operations held at one time.

    Works on fake tensors. What an operation needs inside itself is not seen.
    ``torch.distributed._tools.mem_tracker.MemTracker`` gives the same peak and takes several times as long.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._live: set[int] = set()

    def track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            self._live.add(key)
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._free, key, storage.nbytes()).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.current -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.track(value)
        return result


def fake_parameters(network: nn.Module, device: torch.device | str = "cpu") -> None:
    """Give a network that was made on the meta device parameters and buffers of the active fake mode.

    ``Module.to_empty`` cannot: it fails to swap fake tensors.
    """
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty_strided(parameter.shape, parameter.stride(), device=device)
            module.register_parameter(name, nn.Parameter(fake))
        for name, buffer in module.named_buffers(recurse=False):
            fake = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device=device)
            module.register_buffer(name, fake)


def update_bytes(arguments: Mapping[str, Any], batch_size: int, half: bool = False) -> int:
    """Bytes at the peak of an update, from fake tensors: the moving average and the optimizer's state included."""
    with torch.device("meta"):
        network = VDVAE(**arguments)
    with FakeTensorMode():
        fake_parameters(network)
        scans = torch.empty(batch_size, network.in_channels, *network.spatial_shape)
        memory = PeakMemory()
        for tensor in (*network.parameters(), *network.buffers(), scans):
            memory.track(tensor)
        with memory:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                output = network(scans)
            loss, _ = ELBOLoss()(output, scans)
            loss.backward()
    weights = 4 * sum(p.numel() for p in network.parameters())
    # Adamax has two numbers for each weight, and a step as many again
    return max(memory.peak, 3 * weights) + 3 * weights


def warn_of_memory(
    network: VDVAE, batch_size: int, device: torch.device, amp: bool = False, amp_dtype: torch.dtype | None = None
) -> None:
    """Say, before anything is read, that an update will not fit into memory, and with which settings it would."""
    device = torch.device(device)
    room = _room(device)
    if idist.get_rank() > 0 or room is None or _bound(network, batch_size) <= room:
        return
    arguments = dict(network.arguments)
    half = amp and (amp_dtype is not None or device.type != "cpu" or cpu_has_bfloat16())
    needed = update_bytes(arguments, batch_size, half)
    if needed <= room:
        return
    found = _what_fits(arguments, batch_size, half, room, device.type == "cuda")
    what = "a smaller network, such as that of configs/lean_64.json, or a larger machine"
    if found is not None:
        what = f"{' '.join(found[0])}, which needs {found[1] / 2**30:.1f}"
    logger.warning(
        "An update of %d scan(s) needs about %.1f GiB of memory, and '%s' has %.1f to offer: take %s.",
        *(batch_size, needed / 2**30, device, max(room, 0) / 2**30, what),
    )


def _what_fits(
    arguments: dict[str, Any], batch_size: int, half: bool, room: float, on_gpu: bool
) -> tuple[list[str], float] | None:
    """The first settings with which an update fits, as the command line says them, and the bytes that it then needs.

    What changes least comes first: precision, recomputed levels, then scans in a batch. Each count takes seconds.
    """
    settings: list[str] = []
    if on_gpu and not half:
        settings, half = ["--amp True"], True
        if (needed := update_bytes(arguments, batch_size, half)) <= room:
            return settings, needed

    def needs(levels: int, scans: int = batch_size) -> int:
        return update_bytes(arguments | {"checkpoint_levels": levels}, scans, half)

    low = high = arguments["checkpoint_levels"]
    if not arguments["batch_norm"]:  # which takes no recomputed levels
        high = len(arguments["channels"])
    needed = needs(high)
    if needed <= room:
        while high - low > 1:
            middle = (low + high) // 2
            if (found := needs(middle)) <= room:
                high, needed = middle, found
            else:
                low = middle
        return [*settings, f"--network_def#checkpoint_levels {high}"], needed
    if batch_size == 1 or (one := needs(high, 1)) > room:
        return None
    a_scan = (needed - one) / (batch_size - 1)
    scans = 1 + int((room - one) / a_scan)
    levels = [f"--network_def#checkpoint_levels {high}"] if high > low else []
    return [*settings, *levels, f"--batch_size {scans}"], one + (scans - 1) * a_scan


def _bound(network: VDVAE, batch_size: int) -> int:
    """More bytes than an update takes, at once: small networks need not be counted."""
    blocks = [len(level) for level in network.encoder.levels]
    sizes = zip(network.arguments["channels"], network.grids(), blocks, network.arguments["num_latents"], strict=True)
    values = sum(width * math.prod(grid) * (count + 2 * latents + 1) for width, grid, count, latents in sizes)
    return 4 * (batch_size * TENSORS * values + 6 * sum(p.numel() for p in network.parameters()))


def _room(device: torch.device) -> float | None:
    """Bytes that this process may take on a device; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] - GPU_OVERHEAD
    free = free_memory() if device.type == "cpu" else None
    return None if free is None else free / idist.get_nproc_per_node()
