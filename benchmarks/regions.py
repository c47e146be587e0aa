"""Volumes of regions in samples beside people's, by a U-Net that is trained on people's labels as a yardstick.

    python -m benchmarks.regions --dataset_dir LIST.json --label_dir LABELS --output_dir OUT

`LIST.json` is a datalist with the sides training, validation and testing, and a `participants.tsv` beside its scans;
`LABELS` has a file `SUBJECT_*.nii.gz` for some of the people, in the space of their scans. The U-Net learns from those
of the training side, and is measured on those of the others. Then it gives the volumes of samples of the population
prior, of the testing people and, for the course with age, of the training people: as it errs alike on all of them,
they can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.networks.utils import one_hot
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.common import print_table, read_config, stack
from scripts.data.covariate_tables import Covariates
from scripts.data.datalist import list_sides
from scripts.data.scan_grid import ScanGrid
from scripts.inference.covariate_results import fit_atlas
from scripts.inference.inferers import Sampling
from scripts.inference.measures import mean_interval
from scripts.utils.command_line import run
from scripts.utils.files import write_text

# numbers of the labels, as MUSE has them
REGIONS = {
    "ventricles": [4, 11, 49, 50, 51, 52],
    "hippocampi": [47, 48],
    "white matter": list(range(81, 96)),
    "cortex": list(range(100, 208)),
    "cerebellum": [38, 39],
}
CHANNELS = (16, 32, 64, 128)  # of the U-Net
RATE = 3e-3
NEAR = 7.5  # years of an age that is asked for: people who are compared with samples of it
HALVES = 200


def classes(path: Path, grid: ScanGrid, shape: Sequence[int], affine: Any, regions: Mapping[str, list[int]]) -> Tensor:
    """A class for each voxel of the network's grid, `[1, *spatial]`: 0 background, 1 any other label, then regions."""
    labels = fit_atlas(path, grid, shape, affine)
    found = (labels > 0).long()
    for number, members in enumerate(regions.values(), 2):
        found[torch.isin(labels, torch.tensor(members))] = number
    return found[None]


def train(network: nn.Module, scans: Tensor, labels: Tensor, updates: int, batch_size: int, seed: int) -> None:
    """Updates by Dice and cross-entropy on scans, half of them mirrored: regions are those of both sides."""
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    generator = torch.Generator().manual_seed(seed)
    network.train()
    for _ in tqdm(range(updates), "training the U-Net", unit="update"):
        chosen = torch.randint(len(scans), (batch_size,), generator=generator)
        x, y = scans[chosen], labels[chosen]
        if torch.rand((), generator=generator) < 0.5:
            x, y = x.flip(2), y.flip(2)
        optimizer.zero_grad()
        loss(network(x), y).backward()
        optimizer.step()
        schedule.step()
    network.eval()


def segment(network: nn.Module, scans: Tensor) -> Tensor:
    """The likeliest class of each voxel, `[scans, 1, *spatial]`."""
    return torch.cat([network(x).argmax(1, keepdim=True) for x in scans.split(4)])


def compare(samples: np.ndarray, people: np.ndarray, seed: int) -> dict[str, float]:
    """Means and deviations of a region's volumes, and how far samples' are from people's.

    ``distance`` is the Wasserstein distance in people's standard deviations, ``halves_95`` what 95 % of halves of the
    people have at most.
    """
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(people)) for _ in range(HALVES)]
    halves = [wasserstein_distance(*np.array_split(people[order], 2)) for order in orders]
    return {
        **{"people_mean": float(people.mean()), "people_std": float(people.std(ddof=1))},
        **{"samples_mean": float(samples.mean()), "samples_std": float(samples.std(ddof=1))},
        "distance": wasserstein_distance(samples, people) / people.std(),
        "halves_95": float(np.quantile(halves, 0.95)) / people.std(),
    }


def main(
    dataset_dir: str,
    label_dir: str,
    output_dir: str,
    ckpt: str = "models/model.pt",
    config_file: str | Sequence[str] = "configs/inference.json",
    samples: int = 64,
    ages: Sequence[float] = (25, 45, 65, 80),
    updates: int = 300,
    batch_size: int = 2,
    regions: Mapping[str, list[int]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train the U-Net, measure, print tables, and write `regions.json`.

    Args:
        dataset_dir: the datalist.
        label_dir: of the labels.
        output_dir: for results.
        ckpt: weights with a population prior, which knows `age` if any are asked for.
        config_file: of the network, one or a list.
        samples: how many.
        ages: samples of these are compared with people near them, a fourth of `samples` each.
        updates, batch_size: of the U-Net.
        regions: numbers of the labels by the region's name.
        seed: of the U-Net and of samples.
    """
    regions = REGIONS if regions is None else regions
    common = read_config(config_file, ckpt=ckpt, dataset_dir=dataset_dir).get_parsed_content("common")
    sides, _, _ = list_sides(dataset_dir)
    where = common.grid, common.network.spatial_shape, common.network.scan_affine
    scans, labels = {}, {}
    for side, items in sides.items():
        scans[side] = stack(common.preprocessing(dict(item)) for item in tqdm(items, f"reading {side}", unit="scan"))
        paths = [next(iter(Path(label_dir).glob(f"{item['subject']}_*.nii.gz")), None) for item in items]
        known = {place: classes(path, *where, regions) for place, path in enumerate(paths) if path is not None}
        labels[side] = list(known), torch.stack(list(known.values()))
    torch.manual_seed(seed)
    channels = CHANNELS[: 4 if min(common.network.spatial_shape) >= 16 else 3]
    strides = [2] * (len(channels) - 1)
    unet = UNet(common.network.spatial_dims, 1, len(regions) + 2, channels, strides, num_res_units=1)
    train(unet, scans["training"][labels["training"][0]], labels["training"][1], updates, batch_size, seed)
    ml = float(torch.linalg.det(torch.as_tensor(common.network.scan_affine)[:3, :3].double()).abs()) / 1000

    @torch.no_grad()
    def volumes(images: Tensor) -> np.ndarray:
        found = one_hot(segment(unet, images), len(regions) + 2).flatten(2).sum(2)[:, 2:]
        return (ml * found).double().numpy()

    @torch.no_grad()
    def drawn(count: int, **covariates: float) -> np.ndarray:
        torch.manual_seed(seed)
        sampling = Sampling(prior=common.prior, covariates=covariates or None)
        parts = [min(4, count - start) for start in range(0, count, 4)]
        said = f"sampling {covariates}" if covariates else "sampling"
        return np.concatenate([volumes(sampling(n, common.network)["sample"]) for n in tqdm(parts, said, unit="batch")])

    dice = DiceMetric(include_background=False, reduction="none")
    for side in ("validation", "testing"):
        with torch.no_grad():
            found = segment(unet, scans[side][labels[side][0]])
        dice(*(one_hot(each, len(regions) + 2) for each in (found, labels[side][1])))
    overlap = dice.aggregate()[:, 1:].numpy()
    numbers: dict[str, Any] = {"dice": {}, "volumes": {}, "ages": {}}
    for name, dices, *both in zip(regions, overlap.T, drawn(samples).T, volumes(scans["testing"]).T, strict=True):
        numbers["dice"] |= mean_interval(name, dices)
        numbers["volumes"][name] = compare(*both, seed)
    others = np.concatenate([volumes(scans[side]) for side in ("training", "validation")])
    trained = [*sides["training"], *sides["validation"]]
    known = Covariates(trained, dataset_dir).values(common.prior.coding) if ages else []
    own = np.array([np.nan if values["age"] is None else values["age"] for values in known])
    for age in ages:
        near, asked = others[np.abs(own - age) <= NEAR], drawn(max(2, samples // 4), age=age)
        means = {name: [float(each[:, place].mean()) for each in (near, asked)] for place, name in enumerate(regions)}
        numbers["ages"][f"{age:g}"] = {"people": len(near), **means}
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "regions.json", json.dumps(numbers, indent=2) + "\n")
    show(numbers)
    return numbers


def show(numbers: Mapping[str, Any]) -> None:
    """Print the tables."""
    rows = []
    for name, v in numbers["volumes"].items():
        both = [f"{v[f'{who}_mean']:.1f} ± {v[f'{who}_std']:.1f}" for who in ("people", "samples")]
        rows.append([name, f"{numbers['dice'][name]:.3f}", *both, f"{v['distance']:.2f}", f"{v['halves_95']:.2f}"])
    print_table(("region", "Dice", "people, ml", "samples, ml", "distance", "95 % of halves below"), rows)
    names = list(numbers["volumes"])
    print_table(
        ("age", "people", *(f"{name}, ml: people, samples" for name in names)),
        (
            [age, str(v["people"]), *(f"{v[name][0]:.1f}, {v[name][1]:.1f}" for name in names)]
            for age, v in numbers["ages"].items()
        ),
    )


if __name__ == "__main__":
    run("python -m benchmarks.regions", main)
