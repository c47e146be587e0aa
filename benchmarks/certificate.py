"""Does a certificate of deviations keep what it promises, and what does it find? By random splits of healthy people.

    python -m benchmarks.certificate --dataset_dir HEALTHY --output_dir OUT --sick SICK --masks MASKS
    python -m benchmarks.certificate --dataset_dir LIST.json --output_dir OUT --shapes SHAPES --error_rate 0.1

What is largest in each healthy person is computed once, `findings.jsonl`. Then some are drawn for the calibration and
some are judged by them, many times. `SICK` holds scans of the first people again, in the order of their names, with
lesions that `MASKS` mark; or shapes of lesions in MNI space are darkened into all of them. Regions are cubes, of an
eighth of the grid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import ndimage, stats
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import print_table, read_config
from benchmarks.people import write_strokes
from scripts.data.covariates import CovariateCoding
from scripts.data.tables import read_table
from scripts.inference import jobs
from scripts.inference.certificate import Certificate
from scripts.inference.certified import find_clusters
from scripts.inference.covariates import Deviation, normal_score
from scripts.inference.engine import ScanEvaluator, read_item
from scripts.layers.output import foreground
from scripts.utils.command_line import run
from scripts.utils.errors import InputError
from scripts.utils.files import write_text
from scripts.utils.names import item_path

PLAIN = 3.0  # absolute z of clusters that nothing but their extent judges
CAP = 6.0  # of z, in clusters that no single voxel can make large
KINDS = {
    "cluster": "clusters, by mass",
    "capped": "by mass, z cut off at 6",
    "peak": "by the largest z",
    "extent": "clusters of |z| > 3, by extent",
    "region": "regions",
}
Row = Mapping[str, Any]


def cubes(evaluator: ScanEvaluator) -> Tensor:
    """A number for each cube of an eighth of the grid in which half of the voxels or more are brain, 0 elsewhere."""
    network = evaluator.network
    loc, _ = network.decode([], temperature=0.0, batch_size=1)
    inside = foreground(loc, network)[0, 0].cpu()
    of_axes = [torch.arange(size) * 8 // size for size in inside.shape]
    numbers = sum(place * 8**axis for axis, place in enumerate(torch.meshgrid(*of_axes, indexing="ij"))) + 1
    share = torch.zeros(8**inside.ndim + 1)
    share = share.scatter_reduce(0, numbers.flatten(), inside.flatten().float(), "mean", include_self=False)
    return torch.where(share[numbers] >= 0.5, numbers, 0)


def largest(z: np.ndarray, inside: np.ndarray, regions: np.ndarray, labels: np.ndarray, at: np.ndarray) -> Row:
    """What is largest among what touches a place, by kind.

    Args:
        z, inside: `[1, *spatial]`.
        regions: z of each.
        labels: of the regions, `[*spatial]`.
        at: of the place, `[1, *spatial]`.
    """
    found = {}
    for kind, values in (("cluster", z), ("capped", z.clip(-CAP, CAP))):
        clusters, numbers = find_clusters(values, inside, np.eye(4))
        touched = set(np.unique(numbers[at]))
        found[kind] = max((cluster["mass"] for cluster in clusters if cluster["label"] in touched), default=0.0)
    names = np.unique(labels[labels > 0])
    extents = [0]
    for values in (z, -z):
        plain, count = ndimage.label((values > PLAIN) & inside, np.ones((3,) * z.ndim))
        sizes = np.bincount(plain.ravel(), minlength=count + 1)
        extents += [int(sizes[place]) for place in np.unique(plain[at]) if place]
    return {
        **found,
        "peak": float(np.abs(z[inside & at]).max(initial=0.0)),
        "region": float(np.abs(regions[np.isin(names, labels[at[0]])]).max(initial=0.0)),
        "extent": max(extents),
    }


def compute(
    evaluator: ScanEvaluator, labels: Tensor, sick: Sequence[tuple[Path, Path]], path: Path, batch: int
) -> list[Row]:
    """A row for each person: covariates, what is `largest`, and with a lesion what is largest at it, `hit`.

    Args:
        evaluator: of the deviation.
        labels: of the regions.
        sick: scan and mask of the first people.
        path: of the rows; what is there is not computed again.
        batch: people at once.
    """
    network, inferer = evaluator.network, evaluator.inferer
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    everywhere, count = np.ones((1, *network.spatial_shape), bool), len(evaluator.dataset.data)

    def seen(scan: Tensor, usual: Row, at: np.ndarray) -> Row:
        inside = foreground(scan, network) | foreground(usual["expected"], network)
        _, expected, std, _ = usual["regions"].unbind(1)
        regions = normal_score((inferer.region_means(scan[None])[0] - expected) / std, inferer.draws - 1)
        z = (scan - usual["expected"]) / usual["spread"]
        return largest(*(each.numpy() for each in (z, inside, regions, labels)), at)

    for start in tqdm(range(len(rows), count, batch), "deviations", unit="batch"):
        items = [read_item(evaluator.dataset, place) for place in range(start, min(start + batch, count))]
        found = {name: values.cpu() for name, values in evaluator.compute(items).items()}
        for place, item in enumerate(items):
            usual = {name: values[place] for name, values in found.items()}
            row = {"image": Path(item["name"]).name, "covariates": item["covariates"]}
            row["largest"] = seen(item["image"].as_tensor(), usual, everywhere)
            if start + place < len(sick):
                scan, mask = sick[start + place]
                image = evaluator.dataset.transform({"image": str(scan)})["image"]
                at, row["lesion_ml"] = lesion(nib.load(mask), np.asarray(image.affine), network.spatial_shape)
                row["hit"] = seen(image.as_tensor(), usual, at)
            rows.append(row)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def lesion(mask: nib.Nifti1Image, affine: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, float]:
    """The voxels of the network's grid in which there is any of it, `[1, *spatial]`, and its volume in ml."""
    marked = np.argwhere(np.asarray(mask.dataobj) > 0)
    places = nib.affines.apply_affine(np.linalg.inv(affine) @ mask.affine, marked).round().astype(int)
    places = places[((places >= 0) & (places < shape)).all(1)]
    at = np.zeros((1, *shape), bool)
    at[(0, *places.T)] = True
    return at, len(marked) * abs(np.linalg.det(mask.affine)) / 1000


class Splits:
    """Random splits of people into those of a calibration and those who are judged by it.

    Args:
        rows: of all people, see `compute`; `lesion` may say of what kind it is.
        coding: of their covariates.
        error_rate: of the certificate.
        calibrate: how many are drawn for a calibration, and judged, at most.
        repeats: how many splits.
    """

    def __init__(
        self, rows: Sequence[Row], coding: CovariateCoding, error_rate: float, calibrate: int, repeats: int
    ) -> None:
        self.rows, self.coding, self.error_rate = rows, coding, error_rate
        self.calibrate, self.repeats = calibrate, repeats
        self.people = pd.DataFrame([{"lesion_ml": np.nan, "lesion": "", **row["covariates"], **row} for row in rows])
        self.people["band"] = pd.qcut(self.people.age, 3, precision=0).astype(str)

    def judge(self, given: Any, judged: Any, **settings: Any) -> pd.DataFrame:
        """P of what is largest in each person who is judged, by kind, and of what is at the lesion, `hit_KIND`.

        Args:
            given, judged: how likely each person is drawn for the calibration, and for being judged by it.
            settings: of the certificate.
        """
        given, judged, found = np.array(given, float), np.array(judged, float), []
        generator, everyone = np.random.default_rng(0), np.arange(len(self.rows))
        part = 0.5 if (given * judged).any() else 0.75  # of those who may be on either side
        for split in range(self.repeats):
            count = min(self.calibrate, int((given > 0).sum() * part))
            people = generator.choice(everyone, count, replace=False, p=given / given.sum())
            rest = np.where(np.isin(everyone, people), 0, judged)
            scans = generator.choice(
                everyone, min(self.calibrate, (rest > 0).sum()), replace=False, p=rest / rest.sum()
            )
            certificate = Certificate(self.coding, self.error_rate, **settings)
            certificate.take([self.rows[k] for k in people], [self.rows[k]["covariates"] for k in scans])
            for place in scans:
                row, known = self.rows[place], self.rows[place]["covariates"]
                p = partial(certificate.p, certificate.group(known), weight=certificate.weight(known))
                ps = {kind: p(kind, size) for kind, size in row["largest"].items()}
                ps |= {f"hit_{kind}": p(kind, size) for kind, size in row.get("hit", {}).items()}
                found.append({"split": split, "person": place, **ps})
        return pd.DataFrame(found).join(self.people[["band", "lesion_ml", "lesion"]], on="person")

    def share(self, judged: pd.DataFrame, kind: str) -> str:
        """How many per cent are significant: the mean over splits, and the middle 95 % of splits."""
        shares = 100 * (judged[kind] <= self.error_rate).groupby(judged.split).mean()
        return "{:.1f} ({:.1f} to {:.1f})".format(shares.mean(), *shares.quantile([0.025, 0.975]))

    def tables(self) -> Iterator[tuple[Sequence[str], list[list[str]]]]:
        """All that is measured: columns and rows of each table."""
        people, alike = self.people, np.ones(len(self.rows))
        ways = {"all": {"groups": []}, "groups": {}}
        found = {way: self.judge(alike, alike, **settings) for way, settings in ways.items()}
        bands = sorted(people.band.unique())
        rows = [
            [
                *(way, words, self.share(judged, kind), f"{stats.kstest(judged[kind], 'uniform').statistic:.3f}"),
                *(self.share(judged[judged.band == band], kind) for band in bands),
            ]
            for way, judged in found.items()
            for kind, words in KINDS.items()
        ]
        yield (
            ("beside", "judged by", "% significant", "KS distance of p", *(f"of {band} years" for band in bands)),
            rows,
        )
        older = (people.age.rank(pct=True)).fillna(0.5)
        shifts = {"more of the young: of the old": (1.01 - older, older)}
        shifts[f"{bands[0]} years: {bands[2]}"] = people.band == bands[0], people.band == bands[2]
        shifts |= {
            f"{site}: others": (people.site == site, people.site != site) for site in sorted(people.site.unique())
        }
        rows = []
        for shift, sides in shifts.items():
            for way, settings in (ways | {"weighted": {"weighted": True}}).items():
                try:
                    judged = self.judge(*sides, **settings)
                    rows.append([shift, way, *(self.share(judged, kind) for kind in KINDS)])
                except InputError as error:
                    rows.append([shift, way, f"refused: {error}"])
        yield ("calibrated on: judged", "beside", *KINDS.values()), rows
        sick = found["all"].dropna(subset="lesion_ml")
        if len(sick):
            of = dict(tuple(sick.groupby(pd.qcut(sick.lesion_ml, 3, precision=1).astype(str) + " ml")))
            of |= dict(tuple(sick[sick.lesion != ""].groupby("lesion")))
            yield (
                ("found at the lesion, %", *of),
                [[words, *(self.share(rows, f"hit_{kind}") for rows in of.values())] for kind, words in KINDS.items()],
            )
            any_of = [
                np.mean([row[key]["extent"] > 0 for row in self.rows if key in row]) for key in ("largest", "hit")
            ]
            yield ("any |z| > 3, %: of healthy people", "at the lesion"), [[f"{100 * share:.1f}" for share in any_of]]


@torch.no_grad()
def main(
    dataset_dir: str,
    output_dir: str,
    sick: str | None = None,
    masks: str | None = None,
    shapes: str | None = None,
    ckpt: str | None = None,
    config_file: str | Sequence[str] = "configs/inference.json",
    covariates_file: str | None = None,
    draws: int = 32,
    batch_size: int = 10,
    error_rate: float = 0.05,
    calibrate: int = 200,
    repeats: int = 200,
) -> list[Row]:
    """Compute the findings that are missing, and print tables.

    Args:
        dataset_dir, covariates_file, ckpt, config_file: of healthy people, and of the network.
        output_dir: for results.
        sick, masks: the first people again, with lesions, and their masks; `kinds.csv` may say of what kind they are.
        shapes: of lesions in MNI space, instead.
        draws: of what is usual for a person.
        batch_size: people at once.
        error_rate, calibrate, repeats: see `Splits`.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"dataset_dir": dataset_dir, "covariates_file": covariates_file, "ckpt": ckpt, "unfamiliar": "allow"}
    config = read_config(config_file, **{name: value for name, value in settings.items() if value is not None})
    common = config.get_parsed_content("common")
    items = sorted(common.cohort.items, key=item_path)
    evaluator = jobs.deviation(common.replace(cohort=common.cohort.of(items)), draws)
    labels = cubes(evaluator)
    evaluator.inferer = Deviation(common.prior, draws, labels)
    if shapes is not None:
        write_strokes(items, shapes, folder, seed=0, healthy=False)
        sick, masks = str(folder / "scans"), str(folder / "masks")
    pairs = [] if sick is None else list(zip(*(sorted(Path(f).glob("*.nii*")) for f in (sick, masks)), strict=True))
    rows = compute(evaluator, labels, pairs, folder / "findings.jsonl", batch_size)
    if masks is not None and (table := Path(masks) / "kinds.csv").is_file():
        for row, kind in zip(rows, read_table(table)[1], strict=False):
            row["lesion"] = kind["kind"]
    print(f"{len(rows)} people, {labels.unique().numel() - 1} regions")
    for columns, cells in Splits(rows, common.prior.coding, error_rate, calibrate, repeats).tables():
        print_table(columns, cells)
        print()
    return rows


if __name__ == "__main__":
    run("python -m benchmarks.certificate", main)
