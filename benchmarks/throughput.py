"""Scans per second of a training step, and its share of the machine's matrix multiplication rate.

    python -m benchmarks.throughput --network default --batch_size 8

The share is 3 x the GFLOP of a forward pass x scans per second / GFLOP per second of a 2048 x 2048 fp32 product: a
backward pass computes about twice what the forward pass does. Both rates are measured in turn, so that what else the
machine does slows both.
"""

from __future__ import annotations

import statistics

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import TrainingStep, network_def, seconds
from scripts.networks import VDVAE
from scripts.utils.command_line import run


def forward_gflop(name: int | str) -> float:
    """GFLOP of the forward pass of one scan, 2 a multiply-add; computes nothing."""
    with torch.device("meta"):
        network = VDVAE(**network_def(name))
        scan = torch.empty(1, 1, *network.spatial_shape)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        network(scan)
    return flops.get_total_flops() / 1e9


def matmul_rate(matrices: torch.Tensor, at_least: float = 0.5) -> float:
    """GFLOP per second of the product of two square fp32 matrices, ``[2, n, n]``."""
    a, b = matrices
    return 2e-9 * a.shape[0] ** 3 / seconds(lambda: a @ b, at_least)


def main(
    network: int | str = "default",
    batch_size: int = 8,
    threads: int = 2,
    updates: int = 5,
    precision: str = "fp32",
    checkpoint_levels: int | None = None,
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
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    gflop = forward_gflop(network)
    model = VDVAE(**network_def(network, checkpoint_levels))
    step = TrainingStep(model, torch.rand(batch_size, 1, *model.spatial_shape), precision)
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
    shape = f"{model.spatial_shape[0]}³"
    print(f"forward {gflop:.1f} GFLOP per scan; {updates} updates of {batch_size} scans of {shape}, {precision}")
    print(f"{'':<20}{'min':>10}{'median':>10}{'max':>10}")
    names = ("scans per second", "matmul GFLOP/s", "share of matmul")
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        print(f"{name:<20}{min(values):>10.3f}{statistics.median(values):>10.3f}{max(values):>10.3f}")


if __name__ == "__main__":
    run("python -m benchmarks.throughput", main)
