"""Short training runs that differ in a setting or two, to choose between these.

    python -m scripts.phantoms brains --output_dir OUT/brains --count 1280
    python -m benchmarks.trials --dataset_dir OUT/brains --output_dir OUT --name informative \\
        --config_file "['configs/train.json']" --network_def#init informative --learning_rate 0.01

trains by the keys of ``configs/train.json`` (network, optimizer, schedule, loss, clipping, ``amp``), on plain scans
which lie in memory, on one thread, and appends a row to ``trials.csv`` after each of some numbers of updates: bits per
dim and mean squared error of the validation side, and the KL divergence of each grid's latents in nats.
``--table True`` prints what the file holds as Markdown.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import Dataset
from monai.utils import ensure_tuple
from torch import Tensor

from benchmarks.peers import cohort_scans
from scripts.layers.levels import grid_name
from scripts.networks import VDVAE
from scripts.training.checkpoints import load_weights
from scripts.training.losses import WeightPenalty, bits_per_dim, negative_log_likelihood
from scripts.training.precision import autocast
from scripts.training.start import grow_network
from scripts.training.voxel_statistics import start_from_scans
from scripts.utils.command_line import run

COLUMNS = ("name", "seed", "update", "bits_per_dim", "mse", "kl", "kl_per_grid", "seconds")
EXPLANATION = """\
KL per grid in nats, coarsest first. Seconds of training, on one thread."""


def trial(
    dataset_dir: str,
    output_dir: str,
    name: str,
    config_file: str | Sequence[str] = "configs/train.json",
    updates: int = 300,
    measure_at: Sequence[int] = (25, 50, 75, 100, 150, 200, 300, 400, 600, 800),
    seed: int = 0,
    weights: str | None = None,
    grow_from: str | None = None,
    table: bool = False,
    **changes: Any,
) -> None:
    """Train, and measure on the way.

    Args:
        dataset_dir: scans, split as a training run splits them.
        output_dir: for ``trials.csv``, the weights (``NAME_SEED.pt``) and the cache of scans.
        name: of the trial.
        config_file: one or a list.
        updates: of the whole trial.
        measure_at: numbers of updates after which to measure; the last is always among them.
        weights: to start from, of an earlier trial; the KL then counts in full from the first update.
        grow_from: weights of a network with fewer levels to grow from.
        seed: of the weights at the start, the order of scans and the noise; the split of the scans is always that of 0.
        table: print the table of all trials instead.
        changes: other values of keys of the config, such as ``--learning_rate 0.01``.
    """
    folder = Path(output_dir)
    if table:
        with (folder / "trials.csv").open(encoding="utf-8") as file:
            rows = list(csv.reader(file))
        for cells in (rows[0], ["---"] * len(COLUMNS), *rows[1:]):
            print("| " + " | ".join(cells) + " |")
        print(f"\n{EXPLANATION}")
        return
    torch.set_num_threads(1)
    parser = ConfigParser()
    parser.read_config(list(ensure_tuple(config_file)))
    unknown = [key for key in changes if key not in parser]
    if unknown:
        raise SystemExit(f"Error: the config has no key '{unknown[0]}' to change.")
    parser.update(changes)
    training, validation = cohort_scans(dataset_dir, str(folder / "cache"), parser["spatial_shape"], seed=0)
    torch.manual_seed(seed)
    network = parser.get_parsed_content("network_def")
    start_from_scans(network, Dataset([{"image": scan} for scan in training]))
    if weights is not None:
        load_weights(network, weights)
    if grow_from is not None:
        grow_network(network, grow_from)
    parser.update({"network": network, "last_checkpoint": None, "weights": weights, "updates": updates})
    optimizer, scheduler, loss_function = (parser.get_parsed_content(k) for k in ("optimizer", "lr_scheduler", "loss"))
    parameters = list(network.parameters())
    penalty = WeightPenalty(parameters, parser["weight_penalty"])
    start = time.perf_counter()
    order = endless_order(len(training), parser["batch_size"])
    for update in range(1, updates + 1):
        scans = training[next(order)]
        network.train()
        optimizer.zero_grad()
        with autocast(torch.device("cpu"), parser["amp"], parser["amp_dtype"]):
            output = network(scans)
        loss, _ = loss_function(output, scans, loss_function.beta(update - 1))
        loss.backward()
        penalty.add_gradient()
        torch.nn.utils.clip_grad_norm_(parameters, parser["max_grad_norm"])
        optimizer.step()
        scheduler.step()
        if update in measure_at or update == updates:
            spent = time.perf_counter() - start
            row = {
                "name": name,
                "seed": seed,
                "update": update,
                **measure(network, validation),
                "seconds": round(spent),
            }
            append(folder / "trials.csv", row, COLUMNS)
            print(row, flush=True)
            torch.save(network.state_dict(), folder / f"{name}_{seed}.pt")
            start = time.perf_counter() - spent


def endless_order(count: int, batch_size: int) -> Iterator[Tensor]:
    """Indices of batches of ``count`` scans, epoch after epoch, each in another random order."""
    while True:
        yield from torch.randperm(count).split(batch_size)


@torch.no_grad()
def measure(network: VDVAE, scans: Tensor, batch_size: int = 8) -> dict[str, Any]:
    """Bits per dim and KL of drawn latents, and the squared error of the reconstruction from these."""
    network.eval()
    found = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for x in scans.split(batch_size):
            output = network(x)
            nll = negative_log_likelihood(output.loc, output.scale, x)
            mse = (output.loc - x).square().flatten(1).mean(1)
            found.append((bits_per_dim(nll + output.kl.sum(1), x), mse, output.kl))
    bits, mse, kl = (torch.cat(parts).mean(0) for parts in zip(*found, strict=True))
    levels, grids = torch.tensor(network.latent_levels), network.grids()
    per_grid = {level: kl[levels == level].sum().item() for level in sorted(set(network.latent_levels), reverse=True)}
    return {
        "bits_per_dim": round(bits.item(), 4),
        "mse": round(mse.item(), 5),
        "kl": round(kl.sum().item(), 1),
        "kl_per_grid": ", ".join(f"{grid_name(grids[level])} {nats:.1f}" for level, nats in per_grid.items()),
    }


def append(path: Path, row: dict[str, Any], columns: Sequence[str]) -> None:
    """Add a row to a CSV file; several trials may write to one."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    run("python -m benchmarks.trials", trial)
