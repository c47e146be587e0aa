"""Memory of a training step, measured in a process of its own or estimated without allocating, and of inference.

python -m benchmarks.memory --network 128
python -m benchmarks.memory --network 256 --estimate
python -m benchmarks.memory --table
python -m benchmarks.memory --network 256 --jobs
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import time

import torch
from torch._subclasses import FakeTensorMode

from benchmarks.common import SIZES, TrainingStep, network_def, print_table
from scripts.inference.inferers import Imputation, Reconstruction, Sampling
from scripts.inference.scoring import Scoring
from scripts.layers.levels import grid_name
from scripts.networks import VDVAE
from scripts.population.sketch import fit_bytes, latents_within
from scripts.training.memory import GPU_OVERHEAD, PeakMemory, fake_parameters
from scripts.utils.command_line import run

GIB = 2**30
TABLE = ("default", "lean_64", "lean_128", *SIZES)
CARDS = (8, 12, 16, 24, 40, 80)
PRIOR_GIB = (4, 16, 64)
# inferers as inference.json has them; what is done again and again needs the memory of one time
JOBS = {
    "reconstruct": Reconstruction,
    "score": Scoring,
    "impute": lambda: Imputation(iterations=2, draws=2),
    "sample": Sampling,
}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000"}


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def estimate_step(name: int | str, batch_size: int, precision: str, checkpoint_levels: int | None) -> dict[str, int]:
    """Bytes at the peak of a training step, from fake tensors.

    Args:
        name: of the network, see :func:`benchmarks.common.training_config`.
        batch_size: scans.
        precision: ``"fp32"`` or ``"bf16"``.
        checkpoint_levels: of the network; None: as its config has it.

    Returns:
        ``parameters``; ``gradients`` of all of them; ``optimizer``, its state; ``activations``, all else that lives at
        the peak; and the sum, ``peak``. Where the peak comes before the last gradients exist, they count here in full
        and the activations are that much less.
    """
    with torch.device("meta"):
        network = VDVAE(**network_def(name, checkpoint_levels))
    with FakeTensorMode():
        fake_parameters(network)
        step = TrainingStep(network, torch.empty(batch_size, 1, *network.spatial_shape), precision)
        step.fill_optimizer_state()
        state = [value for values in step.optimizer.state.values() for value in values.values()]
        memory = PeakMemory()
        for tensor in (*step.parameters, *state, step.scans):
            memory.track(tensor)
        with memory:
            step()
    weights = _bytes(step.parameters)
    optimizer = _bytes(state)
    return {
        "parameters": weights,
        "gradients": weights,
        "optimizer": optimizer,
        "activations": memory.peak - 2 * weights - optimizer,
        "peak": memory.peak,
    }


def estimate_job(job: str, name: int | str, precision: str) -> int:
    """Bytes at the peak of an inference job's inferer, of one scan, from fake tensors; weights and results included."""
    with torch.device("meta"):
        network = VDVAE(**network_def(name)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake_parameters(network)
        scan = torch.empty(1, 1, *network.spatial_shape)
        memory = PeakMemory()
        for tensor in (*network.parameters(), *network.buffers(), scan):
            memory.track(tensor)
        with memory, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            JOBS[job]()(1 if job == "sample" else scan, network, mask=scan > 0)
    return memory.peak


def print_jobs(name: int | str) -> None:
    """Print as Markdown what each job needs for one scan."""
    peaks = ([f"{estimate_job(job, name, precision) / GIB:.1f}" for precision in ("fp32", "bf16")] for job in JOBS)
    print_table(("job", "fp32", "bf16"), ([f"`{job}`", *found] for job, found in zip(JOBS, peaks, strict=True)))


def _resident() -> int:
    """The most memory this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_here(
    name: int | str, batch_size: int, precision: str, checkpoint_levels: int | None, threads: int
) -> dict[str, float]:
    """Run one training step in this process: bytes held at most `before` the network was made, and at its `peak`;
    `seconds`.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    before = _resident()
    network = VDVAE(**network_def(name, checkpoint_levels))
    step = TrainingStep(network, torch.rand(batch_size, 1, *network.spatial_shape), precision)
    step.fill_optimizer_state()
    start = time.perf_counter()
    step()
    return {"before": before, "peak": _resident(), "seconds": time.perf_counter() - start}


def measure_step(*args) -> dict[str, float]:
    """:func:`measure_here` in a process of its own.

    Blocks of 1 MB or more go back to the system when they are freed, unless the environment says otherwise: by itself
    glibc keeps those below 32 MB, and 64³ then holds 2.7 GiB for 1.0 GiB of tensors.
    """
    environment = {**MALLOC, **os.environ}
    code = f"import json; from benchmarks.memory import measure_here; print(json.dumps(measure_here{args!r}))"
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment
    )
    return json.loads(run.stdout.splitlines()[-1])


def print_cards(names: tuple[int | str, ...]) -> None:
    """Print as Markdown which network trains on which card, batch 1."""

    def row(name: int | str, precision: str, checkpoint_levels: int) -> list[str]:
        peak = estimate_step(name, 1, precision, checkpoint_levels)["peak"]
        fits = ["yes" if peak + GPU_OVERHEAD <= card * GIB else "-" for card in CARDS]
        shown = f"{name}³" if isinstance(name, int) else name
        return [shown, precision, "on" if checkpoint_levels else "off", f"{peak / GIB:.1f}", *fits]

    settings = ((n, p, c) for n in names for p in ("fp32", "bf16") for c in (0, len(network_def(n)["channels"])))
    columns = ["network", "precision", "checkpointing", "GiB", *(f"{card} GB" for card in CARDS)]
    print_table(columns, (row(*setting) for setting in settings))


def print_priors(names: tuple[int | str, ...], factors: int = 64, held_out: int = 128) -> None:
    """Print as Markdown what the fit of a population prior needs, and which grids it takes of less memory."""

    def row(name: int | str) -> list[str]:
        with torch.device("meta"):
            network = VDVAE(**network_def(name))
        needed = fit_bytes(factors, 0, 4, held_out)
        dimensions = sum(map(math.prod, network.latent_grids()))
        taken = [network.latent_grids()[max(latents_within(network, gib * GIB, needed))][1:] for gib in PRIOR_GIB]
        shown = f"{name}³" if isinstance(name, int) else name
        return [shown, f"{dimensions:,}", f"{dimensions * needed / GIB:.1f}", *map(grid_name, taken)]

    columns = ["network", "dimensions", "GiB", *(f"grids up to, within {gib} GiB" for gib in PRIOR_GIB)]
    print_table(columns, map(row, names))


def main(
    network: int | str | None = None,
    batch_size: int = 1,
    precision: str = "fp32",
    checkpoint_levels: int | None = None,
    threads: int = 2,
    estimate: bool = False,
    table: bool = False,
    jobs: bool = False,
    prior: bool = False,
) -> None:
    """Print the peak memory of a training step, the optimizer's state of an earlier step included.

    Args:
        network: 32, 64, 128 or 256, the published one of that size; default; or the name of an overlay, such as
            lean_64. Without it the default, and with --table all.
        batch_size: scans per step.
        precision: fp32, or bf16 for autocast.
        checkpoint_levels: of how many of the finest levels to recompute the activations; default the config's.
        threads: that PyTorch may use.
        estimate: from fake tensors, without allocating, instead of measured.
        table: print as Markdown which network fits which GPU instead.
        jobs: print as Markdown what inference needs instead.
        prior: print as Markdown what the fit of a population prior of 64 factors needs, with 128 held-out scans and
            batches of 4, instead.
    """
    if prior:
        print_priors(TABLE if network is None else (network,))
        return
    if table:
        print_cards(TABLE if network is None else (network,))
        return
    network = network or "default"
    if jobs:
        print_jobs(network)
    elif estimate:
        parts = estimate_step(network, batch_size, precision, checkpoint_levels)
        for name, amount in parts.items():
            print(f"{name:<12}{amount / 2**20:>10,.0f} MiB")
    else:
        arguments = network_def(network, checkpoint_levels)
        shown, shape = arguments["checkpoint_levels"], arguments["spatial_shape"]
        step = measure_step(network, batch_size, precision, checkpoint_levels, threads)
        peak, above = step["peak"] / GIB, (step["peak"] - step["before"]) / GIB
        print(f"peak resident memory {peak:.2f} GiB, {above:.2f} GiB more than before the network was made")
        print(f"{batch_size} x {shape[0]}³, {precision}, {shown} levels checkpointed: {step['seconds']:.1f} s")
        print(" ".join(f"{name}={os.environ.get(name, value)}" for name, value in MALLOC.items()))


if __name__ == "__main__":
    run("python -m benchmarks.memory", main)
