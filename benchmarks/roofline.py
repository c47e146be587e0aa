"""In which kernels of a training step a GPU would spend its time, by the operations and the bytes of each.

    python -m benchmarks.roofline --network lean_128 --batch_size 8

A kernel takes as long as its arithmetic or as its memory traffic, whichever is more (the roofline of Williams et al.
2009, doi:10.1145/1498765.1498785), and never less than a launch. Counted are the operations of a forward and a backward
pass on fake tensors: nothing is computed, so that the numbers are the same on any machine. Each operation reads its
inputs once and writes its outputs once; a compiler that fuses operations moves less. It is a bound, not a measurement.
What goes over the weights (optimizer, average) is left out: its operations are few, see :mod:`benchmarks.step_ops`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.common import TrainingStep, network_def, print_table
from scripts.layers.levels import grid_name
from scripts.networks import VDVAE
from scripts.training.memory import fake_parameters
from scripts.utils.command_line import run

# an H100's (SXM, NVIDIA's data sheet): operations per second by the element size in bytes, bytes per second
RATES = {2: 989e12, 4: 67e12}
BANDWIDTH = 3.35e12
LAUNCH = 2e-6  # seconds that a kernel takes at least


@dataclass
class Kernels:
    """Operations of one kind on one grid: how many, their floating point operations, bytes and seconds.

    Attributes:
        by_memory, by_launch: the seconds of those that memory, or the launch itself, makes so long.
    """

    launches: int = 0
    flops: float = 0.0
    moved: float = 0.0
    seconds: float = 0.0
    by_memory: float = 0.0
    by_launch: float = 0.0


class Roofline(TorchDispatchMode):
    """Counts what operations on fake tensors would take.

    Args:
        grids: of the network's levels.
        rates: floating point operations per second of convolutions and products, by element size in bytes.
        bandwidth: bytes per second of the card's memory.
        launch: seconds that a kernel takes at least.

    Attributes:
        kernels: by the finest of these grids that an operation touches (none: empty), and by its kind.
    """

    def __init__(
        self,
        grids: Sequence[Sequence[int]],
        rates: dict[int, float] = RATES,
        bandwidth: float = BANDWIDTH,
        launch: float = LAUNCH,
    ) -> None:
        super().__init__()
        self.rates, self.bandwidth, self.launch = rates, bandwidth, launch
        self.grids = [tuple(grid) for grid in grids]
        self.kernels: dict[tuple[tuple[int, ...], str], Kernels] = defaultdict(Kernels)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        name = func._schema.name
        if func.is_view or not name.startswith("aten::") or name in ("aten::detach", "aten::_reshape_alias"):
            return results
        tensors = [leaf for leaf in tree_leaves((args, kwargs, results)) if isinstance(leaf, torch.Tensor)]
        if tensors:
            self._add(func, name, args, kwargs, results, tensors)
        return results

    def _add(self, func: Any, name: str, args: Any, kwargs: Any, results: Any, tensors: list[torch.Tensor]) -> None:
        counted = flop_registry.get(func._overloadpacket)
        flops = counted(*args, **kwargs, out_val=results) if counted else 0
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        # channels may stand before the grid or after it
        shapes = {tuple(tensor.shape[start : start + 3]) for tensor in tensors for start in (0, 1, 2)}
        grid = max(shapes.intersection(self.grids), key=math.prod, default=())
        rate = (
            self.rates[min(tensor.element_size() for tensor in tensors if tensor.is_floating_point())] if flops else 1.0
        )
        times = flops / rate, moved / self.bandwidth
        kernels = self.kernels[grid, name.removeprefix("aten::") if "convolution" in name else "all else"]
        kernels.launches += 1
        kernels.flops += flops
        kernels.moved += moved
        kernels.seconds += max(*times, self.launch)
        kernels.by_memory += times[1] if times[1] > max(times[0], self.launch) else 0.0
        kernels.by_launch += self.launch if self.launch >= max(times) else 0.0


def measure(network: int | str, batch_size: int, precision: str) -> dict[tuple[tuple[int, ...], str], Kernels]:
    """The kernels of a forward and a backward pass of a network, see :class:`Roofline`."""
    with torch.device("meta"):
        model = VDVAE(**network_def(network))
    with FakeTensorMode():
        fake_parameters(model)
        step = TrainingStep(model, torch.empty(batch_size, 1, *model.spatial_shape), precision)
        with Roofline([model.spatial_shape, *model.grids()]) as roofline:
            step.loss().backward()
    return dict(roofline.kernels)


def main(network: int | str = "default", batch_size: int = 8, precision: str = "bf16") -> None:
    """Print a table of the kernels of a training step, by grid and kind.

    Args:
        network: see ``python -m benchmarks.throughput``.
        batch_size: scans an update.
        precision: fp32, or bf16 for autocast.
    """
    kernels = measure(network, batch_size, precision)
    total = Kernels(*(sum(values) for values in zip(*map(astuple, kernels.values()), strict=True)))
    ordered = sorted(kernels.items(), key=lambda item: -item[1].seconds)
    rows = [(grid_name(grid) if grid else "flattened, weights", kind, *_columns(k)) for (grid, kind), k in ordered]
    columns = ("grid", "operation", "kernels", "GFLOP", "GB", "ms", "of it memory", "of it launches")
    print_table(columns, [*rows, ("all", "", *_columns(total))])
    print(f"{batch_size / total.seconds:.0f} scans per second at most.")


def _columns(k: Kernels) -> list[str]:
    numbers = f"{k.launches:,}", f"{k.flops / 1e9:,.1f}", f"{k.moved / 1e9:,.2f}", f"{k.seconds * 1e3:.2f}"
    return [*numbers, f"{k.by_memory / k.seconds:.0%}", f"{k.by_launch / k.seconds:.0%}"]


if __name__ == "__main__":
    run("python -m benchmarks.roofline", main)
