"""Does a certificate of deviations keep what it promises, and what does it find? By random splits of healthy people.

    python -m benchmarks.certificate --dataset_dir HEALTHY --output_dir OUT --sick SICK --masks MASKS
    python -m benchmarks.certificate --dataset_dir LIST.json --output_dir OUT --shapes SHAPES --error_rate 0.1

What is largest in each healthy person is computed once, `findings.jsonl`. Then some are drawn for the calibration and
some are judged by them, many times. `SICK` holds scans of the first people again, in the order of their names, with
lesions that `MASKS` mark; or shapes of lesions in MNI space are darkened into all of them. Regions are cubes, of an
eighth of the grid; with `--training LIST.json` their means are judged by a regression on covariates, too: PCNtoolkit's
if it is installed, else one on splines.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import ndimage, stats
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.common import print_table, read_config
from benchmarks.normative import bayesian_regression, spline_regression
from benchmarks.people import write_strokes
from scripts.data.covariates import CovariateCoding
from scripts.data.datalist import list_sides
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
# mass of clusters, also where no brain is expected; largest z; voxels of a cluster of |z| > 3; z of regions, and by a
# regression of each
KINDS = ("cluster", "wide", "peak", "extent", "region", "regression")
Row = Mapping[str, Any]


def cubes(evaluator: ScanEvaluator) -> Tensor:
    """A number for each cube of an eighth of the grid in which half of the voxels or more are brain, 0 elsewhere."""
    loc, _ = evaluator.network.decode([], temperature=0.0, batch_size=1)
    inside = foreground(loc, evaluator.network).float().cpu()
    share = nn.functional.adaptive_avg_pool3d(inside, 8)
    numbers = torch.where(share >= 0.5, torch.arange(1.0, share.numel() + 1).view_as(share), 0)
    return nn.functional.interpolate(numbers, inside.shape[2:])[0, 0].long()


def largest(
    z: np.ndarray, brain: np.ndarray, wide: np.ndarray, regions: np.ndarray, labels: np.ndarray, at: Any
) -> Row:
    """What is largest among what touches a place, by kind; `regions` are z of each, `at` is shaped like z."""
    found: dict[str, float] = {}
    for kind, inside in (("cluster", brain), ("wide", wide)):
        clusters, numbers = find_clusters(z, inside, np.eye(4))
        touched = set(np.unique(numbers[at]))
        found[kind] = max((cluster["mass"] for cluster in clusters if cluster["label"] in touched), default=0.0)
    names = np.unique(labels[labels > 0])
    for kind, values in (("peak", z[brain & at]), ("region", regions[np.isin(names, labels[at[0]])])):
        found[kind] = float(np.abs(values).max(initial=0.0))
    extents = [0]
    for values in (z, -z):
        plain, _ = ndimage.label((values > PLAIN) & brain, np.ones((3,) * z.ndim))
        extents += [int(np.bincount(plain.ravel())[place]) for place in np.unique(plain[at]) if place]
    return {**found, "extent": max(extents)}


def compute(evaluator: ScanEvaluator, labels: Tensor, sick: Sequence[tuple], path: Path, batch: int) -> list[Row]:
    """A row for each person: covariates, what is `largest`, and with a lesion what is largest at it, `hit`.

    Args:
        evaluator, labels: of the deviation, and of its regions.
        sick: scan and mask of the first people.
        path: of the rows; what is there is not computed again.
        batch: people at once.
    """
    network, inferer = evaluator.network, evaluator.inferer
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    everywhere, count = np.ones((1, *network.spatial_shape), bool), len(evaluator.dataset.data)

    def seen(scan: Tensor, usual: Row, at: np.ndarray) -> tuple[Row, list[float]]:
        brain = foreground(usual["expected"], network)
        _, expected, std, _ = usual["regions"].unbind(1)
        means = inferer.region_means(scan[None])[0]
        regions = normal_score((means - expected) / std, inferer.draws - 1)
        z = (scan - usual["expected"]) / usual["spread"]
        parts = (each.numpy() for each in (z, brain, brain | foreground(scan, network), regions, labels))
        return largest(*parts, at), means.tolist()

    for start in tqdm(range(len(rows), count, batch), "deviations", unit="batch"):
        items = [read_item(evaluator.dataset, place) for place in range(start, min(start + batch, count))]
        found = {name: values.cpu() for name, values in evaluator.compute(items).items()}
        for place, item in enumerate(items):
            usual = {name: values[place] for name, values in found.items()}
            row = {"image": Path(item["name"]).name, "covariates": item["covariates"]}
            row["largest"], row["means"] = seen(item["image"].as_tensor(), usual, everywhere)
            if start + place < len(sick):
                scan, mask = sick[start + place]
                image = evaluator.dataset.transform({"image": str(scan)})["image"]
                at, row["lesion_ml"] = lesion(nib.load(mask), np.asarray(image.affine), network.spatial_shape)
                row["hit"], row["hit_means"] = seen(image.as_tensor(), usual, at)
                touched = set(np.unique(labels.numpy()[at[0]]))
                row["touched"] = [int(label) in touched for label in labels.unique() if label > 0]
            rows.append(row)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def add_regression(
    rows: Sequence[Row], training: Iterable[tuple[Row, Sequence[float]]], coding: CovariateCoding
) -> None:
    """Add to what is largest in `rows` the z of regions' means by a regression on covariates, and print which it is.

    `training` are covariates and regions' means of others. People of whom a covariate is missing have 0.
    """
    given, values = zip(*((known, means) for known, means in training if None not in known.values()), strict=True)
    continuous = [name for name, each in coding.variables.items() if each.kind == "continuous"]
    regression = bayesian_regression if importlib.util.find_spec("pcntoolkit") else spline_regression
    print(f"regions are judged by {'PCNtoolkit' if regression is bayesian_regression else 'splines'}, too")
    complete = [row for row in rows if None not in row["covariates"].values()]
    people = pd.DataFrame([row["covariates"] for row in complete])
    mean, std = regression(pd.DataFrame(given), np.array(values, float), people, continuous)
    for row in rows:
        row["largest"]["regression"] = 0.0
        if "hit" in row:
            row["hit"]["regression"] = 0.0
    for row, expected, spread in zip(complete, mean, std, strict=True):
        row["largest"]["regression"] = float(np.abs((row["means"] - expected) / spread).max())
        if "hit" in row:
            off = np.abs((row["hit_means"] - expected) / spread)[np.array(row["touched"], bool)]
            row["hit"]["regression"] = float(off.max(initial=0.0))


def lesion(mask: nib.Nifti1Image, affine: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, float]:
    """The voxels of the network's grid in which there is any of it, `[1, *spatial]`, and its volume in ml."""
    marked = np.argwhere(np.asarray(mask.dataobj) > 0)
    places = nib.affines.apply_affine(np.linalg.inv(affine) @ mask.affine, marked).round().astype(int)
    at = np.zeros((1, *shape), bool)
    at[(0, *places[((places >= 0) & (places < shape)).all(1)].T)] = True
    return at, len(marked) * abs(np.linalg.det(mask.affine)) / 1000


class Splits:
    """Random splits of people into `calibrate` at most of a calibration and those who are judged by it, `repeats`
    times.

    `rows` are of all people, see `compute`; `lesion` may say of what kind it is.
    """

    def __init__(self, rows: Sequence[Row], coding: CovariateCoding, error_rate: float, calibrate: int, repeats: int):
        self.rows, self.coding, self.error_rate = rows, coding, error_rate
        self.kinds = [kind for kind in KINDS if kind in rows[0]["largest"]]
        self.calibrate, self.repeats = calibrate, repeats
        self.people = pd.DataFrame([{"lesion_ml": np.nan, "lesion": "", **row["covariates"], **row} for row in rows])
        self.people["band"] = pd.qcut(self.people.age, 3, precision=0).astype(str) + " years"
        self.people.loc[self.people.age.isna(), "band"] = np.nan

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
            count = min(self.calibrate, (rest > 0).sum())
            scans = generator.choice(everyone, count, replace=False, p=rest / rest.sum())
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
        people, alike, rows = self.people, np.ones(len(self.rows)), []
        ways: dict[str, Any] = {"all": {"groups": []}, "groups": {}, "weighted": {"weighted": True}}
        found = {way: self.judge(alike, alike, **ways[way]) for way in ("all", "groups")}
        for way, judged in found.items():
            for kind in self.kinds:
                distance = stats.kstest(judged[kind], "uniform").statistic
                of_bands = [self.share(band, kind) for _, band in judged.groupby("band")]
                rows.append([way, kind, self.share(judged, kind), f"{distance:.3f}", *of_bands])
        bands = sorted(people.band.dropna().unique())
        yield ("beside", "judged by", "significant, %", "KS distance of p", *bands), rows
        older = people.age.rank(pct=True).fillna(0.5)
        shifts = [("more of the young: of the old", 1.01 - older, older, ways)]
        shifts.append((f"{bands[0]}: {bands[2]}", people.band == bands[0], people.band == bands[2], ways))
        sites = sorted(people.site.dropna().unique())
        shifts += [(f"{site}: others", people.site == site, people.site != site, ["all"]) for site in sites]
        rows = []
        for shift, given, judged, way in [(*sides, way) for *sides, tried in shifts for way in tried]:
            try:
                of_shift = self.judge(given, judged, **ways[way])
                rows.append([shift, way, *(self.share(of_shift, kind) for kind in self.kinds)])
            except InputError as error:
                rows.append([shift, way, f"refused: {error}"])
        yield ("calibrated on: judged", "beside", *self.kinds), rows
        sick = found["all"].dropna(subset="lesion_ml")
        if len(sick):
            of = dict(tuple(sick.groupby(pd.qcut(sick.lesion_ml, 3, precision=1, duplicates="drop").astype(str))))
            of |= dict(tuple(sick[sick.lesion != ""].groupby("lesion")))
            rows = [[kind, *(self.share(part, f"hit_{kind}") for part in of.values())] for kind in self.kinds]
            plain = (np.mean([r[of]["extent"] > 0 for r in self.rows if of in r]) for of in ("hit", "largest"))
            rows.append(["any |z| > 3", "{:.1%} of all, and in {:.1%} of healthy people".format(*plain)])
            yield ("found at the lesion, %, by", *(f"of {part}" for part in of)), rows


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
    training: str | None = None,
    draws: int = 32,
    batch_size: int = 10,
    error_rate: float = 0.05,
    calibrate: int = 200,
    repeats: int = 200,
) -> list[Row]:
    """Compute the findings that are missing, and print tables.

    Args:
        dataset_dir, covariates_file, ckpt, config_file, output_dir: of healthy people, the network, and results.
        sick, masks: the first people again, with lesions, and their masks; `kinds.csv` may say of what kind they are.
        shapes: of lesions in MNI space, instead.
        training: a datalist to whose training side a regression of each region is fitted; None: no regression.
        draws, batch_size: of what is usual for a person; of people.
        error_rate, calibrate, repeats: see `Splits`.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"dataset_dir": dataset_dir, "covariates_file": covariates_file, "unfamiliar": "allow"}
    config = read_config(config_file, **settings, **({} if ckpt is None else {"ckpt": ckpt}))
    common = config.get_parsed_content("common")
    items = sorted(common.cohort.items, key=item_path)
    evaluator = jobs.deviation(common.replace(cohort=common.cohort.of(items)), draws)
    labels = cubes(evaluator)
    evaluator.inferer = Deviation(common.prior, draws, labels)
    if shapes is not None:
        write_strokes(items, shapes, folder, seed=0, healthy=False)
        sick, masks = folder / "scans", folder / "masks"
    pairs = [] if sick is None else list(zip(*(sorted(Path(f).glob("*.nii*")) for f in (sick, masks)), strict=True))
    rows = compute(evaluator, labels, pairs, folder / "findings.jsonl", batch_size)
    if masks is not None and (table := Path(masks) / "kinds.csv").is_file():
        for row, kind in zip(rows, read_table(table)[1], strict=False):
            row["lesion"] = kind["kind"]
    if training is not None:
        others = jobs.deviation(common.replace(cohort=common.cohort.of(list_sides(training)[0]["training"])), draws)
        items = (read_item(others.dataset, place) for place in tqdm(range(len(others.dataset.data)), "training"))
        region_means = evaluator.inferer.region_means
        seen = ((item["covariates"], region_means(item["image"].as_tensor()[None])[0].tolist()) for item in items)
        add_regression(rows, seen, common.prior.coding)
    print(f"{len(rows)} people, {labels.unique().numel() - 1} regions\n")
    for table in Splits(rows, common.prior.coding, error_rate, calibrate, repeats).tables():
        print_table(*table)
        print()
    return rows


if __name__ == "__main__":
    run("python -m benchmarks.certificate", main)
