"""How well is filled in what is missing, after how many iterations?

    python -m benchmarks.imputation --ckpt models/model.pt

removes an axial slab of 20 mm and, separately, a sphere of 40 mm across from brain phantoms that the model has not
seen, fills them in, and prints Markdown tables: the error of the missing voxels on the network's grid against the
truth, beside the mean training scan (the network's template) and the prior's mean scan. All are root mean squares over
the missing voxels of a scan, averaged over scans, in percent of the intensity range; the spread is the standard
deviation of draws.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from torch import Tensor

from scripts.inference.engine import scan_generator
from scripts.inference.inferers import Imputation
from scripts.layers.gaussian import Draws
from scripts.networks import OUTPUT_RANGES, VDVAE
from scripts.phantoms import make_brains
from scripts.utils.command_line import run

ITERATIONS = (1, 2, 5, 10, 20, 50)
SLAB, RADIUS = 20.0, 20.0  # mm


def hole(kind: str, brain: np.ndarray, spacing: float, generator: np.random.Generator) -> np.ndarray:
    """What to remove from a brain mask's grid, uint8 `[X, Y, Z]`: a slab or a sphere about a random brain voxel."""
    voxels = np.argwhere(brain)
    if kind == "slab":  # from the middle half of the brain's height
        low, high = np.quantile(voxels[:, 2], (0.25, 0.75))
        distance = np.abs(np.indices(brain.shape)[2] - generator.uniform(low, high)) * spacing
        return (distance <= SLAB / 2).astype(np.uint8)
    centre = voxels[generator.integers(len(voxels))].reshape(3, 1, 1, 1)
    distance = np.linalg.norm(np.indices(brain.shape) - centre, axis=0) * spacing
    return (distance <= RADIUS).astype(np.uint8)


def write_holes(kind: str, scans: Sequence[Path], folder: Path) -> list[dict[str, str]]:
    """A mask for each scan; the items of a data set."""
    folder.mkdir()
    items = []
    for index, path in enumerate(scans):
        scan = nib.load(path)
        brain = np.asarray(scan.dataobj) > 0
        mask = hole(kind, brain, float(scan.header.get_zooms()[0]), np.random.default_rng([index, len(kind)]))
        nib.save(nib.Nifti1Image(mask, scan.affine), folder / path.name)
        items.append({"image": str(path), "mask": str(folder / path.name)})
    return items


@torch.no_grad()
def measure(network: VDVAE, items: Sequence[dict], inferer: Imputation) -> dict[str, list[float]]:
    """`{row: [error of the mean of draws, error of one draw, spread]}`, in percent of the intensity range."""
    scans, truth, missing = (
        torch.stack([torch.as_tensor(item[key]).as_subclass(Tensor) for item in items])
        for key in ("image", "shown", "missing_fitted")
    )
    low, high = OUTPUT_RANGES[network.output_activation]

    def rms(values: Tensor) -> float:
        squares = [v[m.expand_as(v)].square().mean() for v, m in zip(values, missing, strict=True)]
        return 100 / (high - low) * float(torch.stack(squares).sqrt().mean())

    truth = truth.clamp(low, high)
    prior_mean = network.decode([], temperature=0.0, batch_size=len(items))[0]
    rows = {
        "mean training scan": [rms(network.template_mean - truth), math.nan, math.nan],
        "prior's mean scan": [rms(prior_mean - truth), math.nan, math.nan],
    }
    draws: dict[int, list[Tensor]] = {iterations: [] for iterations in ITERATIONS}
    noise = Draws([scan_generator(0, item["image"].meta["filename_or_obj"]) for item in items])
    for _ in range(inferer.draws):
        chain = itertools.islice(inferer.chain(scans, network, missing, noise), max(ITERATIONS))
        for iterations, filled in enumerate(chain, start=1):
            if iterations in draws:
                draws[iterations].append(filled)
    for iterations, found in draws.items():
        stack = torch.stack(found)
        rows[f"{iterations} iteration{'s' * (iterations > 1)}"] = [
            rms(stack.mean(0) - truth),
            sum(rms(draw - truth) for draw in stack) / len(stack),
            rms(stack.std(0)),
        ]
    return rows


def main(
    ckpt: str,
    config_file: str | Sequence[str] = "configs/inference.json",
    count: int = 8,
    draws: int = 4,
    seed: int = 77,
) -> None:
    """Measure imputation on phantoms.

    Args:
        ckpt: weights of the network.
        config_file: the config files of inference, which describe the network.
        count: how many phantoms.
        draws: chains for each.
        seed: of the phantoms; not one that the model was trained on.
    """
    parser = ConfigParser()
    parser.read_config([config_file] if isinstance(config_file, str) else list(config_file))
    parser.update({"ckpt": ckpt})
    network = parser.get_parsed_content("network").eval()
    preprocessing = parser.get_parsed_content("imputed#preprocessing")
    with tempfile.TemporaryDirectory() as folder:
        make_brains(Path(folder) / "scans", count, seed=seed, workers=1)
        scans = sorted((Path(folder) / "scans").glob("*.nii.gz"))
        for kind in ("slab", "sphere"):
            items = [preprocessing(item) for item in write_holes(kind, scans, Path(folder) / kind)]
            rows = measure(network, items, Imputation(draws=draws))
            share = np.mean([float(item["missing_fitted"].float().mean()) for item in items])
            print(f"\nA {kind} is missing, {100 * share:.1f} % of the voxels of the network's grid:\n")
            print("| filled with | mean of draws | one draw | spread |\n|---|---|---|---|")
            for name, values in rows.items():
                print(
                    f"| {name} | " + " | ".join("" if math.isnan(v) else f"{v:.2f}" for v in values) + " |", flush=True
                )


if __name__ == "__main__":
    run("python -m benchmarks.imputation", main)
