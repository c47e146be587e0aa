"""How fast do runs learn, beside a Gaussian a voxel?

    python -m benchmarks.learning published=output/published default=output/default --output_dir docs/figures

reads the ``history.csv`` of each training run and fits, to the training scans of the first, the mean and standard
deviation of each voxel (the latter floored at 0.01), which it then scores on the validation scans. It prints a Markdown
table and draws ``learning.png``: bits per dim and mean squared error against updates.
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from torch import Tensor

from scripts.training.losses import bits_per_dim, negative_log_likelihood
from scripts.utils.command_line import run
from scripts.utils.files import write_whole

UPDATES = (0, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def voxel_gaussian(run: Path) -> dict[str, float]:
    """Bits per dim and mean squared error of the Gaussian on the run's validation scans."""
    parser = ConfigParser()
    parser.read_config(run / "config.json")
    parser.update({"augment": False, "augment_validation": False, "num_workers": 0})
    parts = {}
    for name, key in (("training", "train#dataset"), ("validation", "validate#dataset")):
        dataset = parser.get_parsed_content(key)
        parts[name] = torch.stack([item["image"].as_subclass(Tensor) for item in dataset])
    mean = parts["training"].mean(0, keepdim=True)
    std = parts["training"].std(0, keepdim=True).clamp_min(0.01)
    scans = parts["validation"]
    nll = negative_log_likelihood(mean.expand_as(scans), std.expand_as(scans), scans)
    return {"bits_per_dim": bits_per_dim(nll, scans).mean().item(), "mse": (scans - mean).square().mean().item()}


def validation_series(run: Path, quantity: str) -> dict[int, float]:
    """``{update: value}`` of a run's validation."""
    with (run / "history.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "validation" and row[quantity]]
    return {int(row["update"]): float(row[quantity]) for row in rows}


def main(*runs: str, output_dir: str | None = None) -> None:
    """Compare training runs, each given as NAME=FOLDER.

    Args:
        runs: name and ``output_dir`` of each run.
        output_dir: where ``learning.png`` goes; without it none is drawn.
    """
    folders = {name: Path(folder) for name, _, folder in (run.partition("=") for run in runs)}
    if not folders or any(not (folder / "history.csv").is_file() for folder in folders.values()):
        raise SystemExit("Error: give each run as NAME=FOLDER, the folder its --output_dir, with a history.csv in it.")
    gaussian = voxel_gaussian(next(iter(folders.values())))
    table = {
        name: {q: validation_series(folder, q) for q in ("bits_per_dim", "mse", "kl")}
        for name, folder in folders.items()
    }
    print("| updates | " + " | ".join(f"{name}: bits per dim, MSE, KL" for name in table) + " |")
    print("|---" * (len(table) + 1) + "|")
    for update in UPDATES:
        cells = [
            f"{series['bits_per_dim'][update]:.3f}, {series['mse'][update]:.4f}, {series['kl'][update]:.0f}"
            if update in series["mse"]
            else ""
            for series in table.values()
        ]
        if any(cells):
            print(f"| {update} | " + " | ".join(cells) + " |")
    print(f"\nA Gaussian a voxel: {gaussian['bits_per_dim']:.3f} bits per dim, MSE {gaussian['mse']:.4f}.")
    if output_dir is not None:
        print(f"Drew '{draw(table, gaussian, Path(output_dir))}'.")


def draw(table: dict[str, dict[str, dict[int, float]]], gaussian: dict[str, float], folder: Path) -> Path:
    """Draw bits per dim, error and KL of the runs against updates."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    labels = {"bits_per_dim": "bits per dim", "mse": "mean squared error", "kl": "KL, nats per scan"}
    for axes, (quantity, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for name, series in table.items():
            axes.plot(*zip(*sorted(series[quantity].items()), strict=True), marker="o", markersize=3, label=name)
        if quantity in gaussian:
            axes.axhline(gaussian[quantity], color="grey", linestyle="--", label="Gaussian a voxel")
        axes.set(xlabel="updates", title=f"validation: {label}")
        axes.grid(alpha=0.3)
        axes.legend()
        if quantity != "bits_per_dim":
            axes.set_yscale("log")
    folder.mkdir(parents=True, exist_ok=True)
    return write_whole(folder / "learning.png", lambda path: figure.savefig(path, dpi=100))


if __name__ == "__main__":
    run("python -m benchmarks.learning", main)
