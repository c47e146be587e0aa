"""How much faster two processes train than one, each with one thread and a batch of its own, and what exchange costs.

    python -m benchmarks.scaling --size 32 --batch_size 8

In turn: one process trains alone while the other waits; both train together and share their gradients (DDP over Gloo);
both train without sharing; both add up tensors of the gradients' size and do nothing else. The ratio is scans per
second of both over scans per second of one, from the same minutes.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.step import TrainingStep, network_def
from scripts.networks import VDVAE
from scripts.utils.command_line import run
from scripts.utils.distributed import parallel_network

PROCESSES = 2


def seconds(call: Callable[[], object], times: int, alone: bool = False) -> float:
    """Mean time of a call, made on both processes at once, or on the first while the other waits."""
    dist.barrier()
    start = time.perf_counter()
    if not alone or dist.get_rank() == 0:
        for _ in range(times):
            call()
    dist.barrier()
    return (time.perf_counter() - start) / times


def measure(rank: int, folder: str, size: int, batch_size: int, updates: int, rounds: int, precision: str) -> None:
    """What one of the processes does; the first writes the times of each round."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    scans = torch.rand(batch_size, 1, *[size] * 3) * 2 - 1
    own = TrainingStep(VDVAE(**network_def(size)).train(), scans, precision)
    network = parallel_network(lambda network: network, VDVAE(**network_def(size)).train())
    shared = TrainingStep(network, scans, precision)
    gradients = torch.zeros(sum(parameter.numel() for parameter in own.parameters))

    def unshared() -> None:
        with network.no_sync():
            shared()

    for step in (own, shared, unshared):  # the first of each makes its buffers
        step()
    times = [
        [
            seconds(own, updates, alone=True),
            seconds(shared, updates),
            seconds(unshared, updates),
            seconds(lambda: dist.all_reduce(gradients), updates),
        ]
        for _ in range(rounds)
    ]
    if rank == 0:
        torch.save(times, Path(folder) / "times.pt")
    dist.destroy_process_group()


def main(
    size: int = 32, batch_size: int = 8, updates: int = 3, rounds: int = 3, precision: str = "fp32"
) -> dict[str, float]:
    """Print scans per second of one and of two processes, their ratio, and the share of a step that exchange takes.

    Args:
        size: voxels an axis, one that has a config, or 8 for a tiny network.
        batch_size: of each process.
        updates: steps of each kind in a round.
        rounds: how often all is repeated; medians are printed.
        precision: fp32 or bf16.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder, size, batch_size, updates, rounds, precision), nprocs=PROCESSES)
        times = torch.load(Path(folder) / "times.pt", weights_only=True)
    ratios = [PROCESSES * alone / shared for alone, shared, _, _ in times]
    alone, shared, unshared, exchange = (statistics.median(column) for column in zip(*times, strict=True))
    results = {
        "scans/s, one process": batch_size / alone,
        "scans/s, two processes": PROCESSES * batch_size / shared,
        "ratio": statistics.median(ratios),
        "lowest ratio of a round": min(ratios),
        "exchange by itself, share of a step": exchange / shared,
        "exchange that the step waits for, share of a step": max(0.0, (shared - unshared) / shared),
    }
    for name, value in results.items():
        print(f"{name}: {value:.3g}")
    return results


if __name__ == "__main__":
    run("python -m benchmarks.scaling", main)
