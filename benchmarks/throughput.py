"""Scans per second of a training step, and its share of the machine's matrix multiplication rate.

    python -m benchmarks.throughput --network default --batch_size 8
    python -m benchmarks.throughput --shapes

The share is 3 x the GFLOP of a forward pass x scans per second / GFLOP per second of a 2048 x 2048 fp32 product: a
backward pass computes about twice what the forward pass does. Both rates are measured in turn, so that what else the
machine does slows both.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step import TrainingStep, network_def
from scripts.networks import VDVAE
from scripts.utils.command_line import run


class ConvShape(NamedTuple):
    """A convolution of stride 1 as it occurs in a network; grid and padding are those of its input."""

    in_channels: int
    out_channels: int
    kernel: int
    padding: int
    grid: tuple[int, ...]

    def gflop(self, batch_size: int) -> float:
        voxels = 1
        for size in self.grid:
            voxels *= size + 2 * self.padding - self.kernel + 1
        return 2e-9 * batch_size * voxels * self.in_channels * self.out_channels * self.kernel ** len(self.grid)


class ConvShapes(TorchDispatchMode):
    """Counts the convolutions of each shape that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[ConvShape] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            x, weight, _, _, padding, *_ = args
            out_channels, in_channels, kernel = weight.shape[:3]
            self.counts[ConvShape(in_channels, out_channels, kernel, padding[0], tuple(x.shape[2:]))] += 1
        return func(*args, **(kwargs or {}))


def forward_costs(name: int | str) -> tuple[float, Counter[ConvShape]]:
    """GFLOP of the forward pass of one scan, 2 a multiply-add, and its convolutions; computes nothing."""
    with torch.device("meta"):
        network = VDVAE(**network_def(name))
        scan = torch.empty(1, 1, *network.spatial_shape)
    with torch.no_grad(), ConvShapes() as shapes, FlopCounterMode(display=False) as flops:
        network(scan)
    return flops.get_total_flops() / 1e9, shapes.counts


def seconds(function: Callable[[], object], at_least: float = 0.0) -> float:
    """Time of one call; the mean over calls that take ``at_least`` so many seconds together."""
    calls = 0
    start = time.perf_counter()
    while True:
        function()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= at_least:
            return elapsed / calls


def matmul_rate(matrices: torch.Tensor, at_least: float = 0.5) -> float:
    """GFLOP per second of the product of two square fp32 matrices, ``[2, n, n]``."""
    a, b = matrices
    return 2e-9 * a.shape[0] ** 3 / seconds(lambda: a @ b, at_least)


def print_throughput(
    name: int | str, batch_size: int, updates: int, precision: str, checkpoint_levels: int | None
) -> None:
    gflop, _ = forward_costs(name)
    network = VDVAE(**network_def(name, checkpoint_levels))
    step = TrainingStep(network, torch.rand(batch_size, 1, *network.spatial_shape), precision)
    matrices = torch.rand(2, 2048, 2048)
    step()  # the first allocates
    before = matmul_rate(matrices)
    rows = []
    for _ in range(updates):
        scans = batch_size / seconds(step)
        after = matmul_rate(matrices)
        matmul = (before + after) / 2
        rows.append((scans, matmul, 3 * gflop * scans / matmul))
        before = after
    print(
        f"forward {gflop:.1f} GFLOP per scan; {updates} updates of {batch_size} scans of {network.spatial_shape[0]}³, "
        f"{precision}"
    )
    print(f"{'':<20}{'min':>10}{'median':>10}{'max':>10}")
    for name, values in zip(
        ("scans per second", "matmul GFLOP/s", "share of matmul"), zip(*rows, strict=True), strict=True
    ):
        print(f"{name:<20}{min(values):>10.3f}{statistics.median(values):>10.3f}{max(values):>10.3f}")


def convolution_rates(shape: ConvShape, batch_size: int, at_least: float = 0.2) -> list[float]:
    """Seconds of the forward pass, the input gradient and the weight gradient, channels-last."""
    dims = len(shape.grid)
    memory_format = torch.channels_last_3d if dims == 3 else torch.channels_last
    weight = torch.rand(shape.out_channels, shape.in_channels, *[shape.kernel] * dims).to(memory_format=memory_format)
    x = torch.rand(batch_size, shape.in_channels, *shape.grid).to(memory_format=memory_format)
    settings = ([1] * dims, [shape.padding] * dims, [1] * dims, False, [0] * dims, 1)
    bias = torch.zeros(shape.out_channels)
    grad = torch.rand_like(torch.ops.aten.convolution(x, weight, bias, *settings))

    def backward(*mask: bool) -> None:
        torch.ops.aten.convolution_backward(grad, x, weight, [shape.out_channels], *settings, mask)

    calls = (
        lambda: torch.ops.aten.convolution(x, weight, bias, *settings),
        lambda: backward(True, False, False),
        lambda: backward(False, True, True),
    )
    for call in calls:
        call()
    return [seconds(call, at_least) for call in calls]


def print_shapes(name: int | str, batch_size: int) -> None:
    """Print the rate of every convolution shape, and the time that all of a step's take."""
    gflop, counts = forward_costs(name)
    matmul = matmul_rate(torch.rand(2, 2048, 2048))
    print(f"{name}, batch {batch_size}, channels-last; matmul {matmul:.0f} GFLOP/s")
    print(f"{'':<28}{'GFLOP/s':>24}{'':>8}{'all of a step':>20}")
    print(
        f"{'channels':>10}{'kernel':>8}{'grid':>6}{'forward':>12}{'input':>8}{'weight':>8}{'count':>8}{'seconds':>10}{'share':>8}"
    )
    total = 0.0
    rows = []
    for shape, count in sorted(counts.items(), key=lambda item: (-item[0].grid[0], item[0])):
        times = convolution_rates(shape, batch_size)
        rows.append((shape, count, times))
        total += count * sum(times)
    for shape, count, times in rows:
        channels = f"{shape.in_channels}→{shape.out_channels}"
        rates = [shape.gflop(batch_size) / t for t in times]
        step = count * sum(times)
        print(
            f"{channels:>10}{shape.kernel:>8}{shape.grid[0]:>6}{rates[0]:>12.0f}{rates[1]:>8.0f}{rates[2]:>8.0f}"
            f"{count:>8}{step:>10.2f}{step / total:>8.1%}"
        )
    share = 3 * gflop * batch_size / total / matmul
    print(f"all convolutions of a step: {total:.2f} s, {share:.2f} of matmul")


def main(
    network: int | str = "default",
    batch_size: int = 8,
    threads: int = 2,
    updates: int = 5,
    precision: str = "fp32",
    checkpoint_levels: int | None = None,
    shapes: bool = False,
) -> None:
    """Print scans per second of full training steps and their share of the matrix multiplication rate.

    Args:
        network: 32, 64, 128 or 256, the published one of that size; default; or the name of an overlay, such as
            lean_64.
        batch_size: scans an update.
        threads: that PyTorch may use.
        updates: measured, after one that is not.
        precision: fp32, or bf16 for autocast.
        checkpoint_levels: of how many of the finest levels to recompute the activations; default the config's.
        shapes: print the rate of each convolution shape of the network instead.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if shapes:
        print_shapes(network, batch_size)
    else:
        print_throughput(network, batch_size, updates, precision, checkpoint_levels)


if __name__ == "__main__":
    run("python -m benchmarks.throughput", main)
