"""Weights of people beside plain models of the same people, on the network's grid, on scans' own, and on real strokes.

    python -m benchmarks.people --dataset_dir LIST.json --output_dir OUT [--mask_dir MASKS]

`LIST.json` is a datalist with the sides training, validation and testing, and a `participants.tsv` beside its scans.
Each figure is of the testing side, with the 95 % interval of its mean over people. `--mask_dir` has masks of lesions
in MNI space, whose shapes are darkened into the testing people, and the bundle's `score` says how well they are found;
and cut out of them as they are, and `impute` fills them in. `--counterfactual_years 20` says what counterfactuals of
the testing people keep and change. What needs no other model is in the bundle's own evaluation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from scipy import ndimage
from sklearn.linear_model import RidgeCV
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal
from tqdm import tqdm

from benchmarks.common import print_table, read_config, stack
from scripts.data.covariate_tables import Covariates
from scripts.data.datalist import list_sides
from scripts.data.scan_grid import Fit, to_scan
from scripts.data.transforms import reading
from scripts.inference import jobs
from scripts.inference.covariates import Counterfactual, need_covariates
from scripts.inference.masks import KINDS_FILE
from scripts.inference.measures import mean_interval, value_numbers
from scripts.inference.scoring import image_quality
from scripts.layers.output import OUTPUT_STD_RANGE, foreground
from scripts.networks import VDVAE
from scripts.population.prior import PopulationPrior
from scripts.training.losses import bits_per_dim, negative_log_likelihood
from scripts.utils.command_line import run
from scripts.utils.files import write_csv, write_text

COMPONENTS = (4, 16, 64, 128, 256, 384, 512)  # of a PCA, from which to choose
SCORES = (32, 64, 128)  # that a regression reads the age from
PENALTIES = np.logspace(-2, 6, 17)  # of it
SMOOTHING = 0.4  # voxels, of variances; what scripts.training.voxel_statistics says of it holds of PCA's residuals too
FLUID = 10  # percentile of the brain that stands for CSF
FILLINGS = 8  # draws of what is filled in
EDGE = 1.0  # mm, standard deviation of what smooths a lesion's edge


def smooth_std(variance: Tensor) -> Tensor:
    """From the variance of each voxel, `[1, *spatial]`: smoothed, and within the bounds of our network's output."""
    sigma = (0, *[SMOOTHING] * (variance.ndim - 1))
    smoothed = torch.as_tensor(ndimage.gaussian_filter(variance.double().clamp_min(0).numpy(), sigma)).float()
    return smoothed.sqrt().clamp(*OUTPUT_STD_RANGE)


class PCA:
    """The scans' principal components, and independent noise in each voxel: covariance `W Wᵀ + diag(std²)`.

    Args:
        scans: `[scans, 1, *spatial]`.
        components: how many; fewer than there are scans less one.
    """

    def __init__(self, scans: Tensor, components: int) -> None:
        count, self.mean = len(scans), scans.flatten(1).mean(0)
        x = scans.flatten(1) - self.mean
        # as the scans are fewer than the voxels, their dot products hold all there is
        values, vectors = torch.linalg.eigh((x @ x.T).double())
        values, vectors = values[-components:], vectors[:, -components:]
        self.axes = x.T @ (vectors / values.sqrt()).float()
        residual = x.square().sum(0) - (self.axes.square() * values.float()).sum(1)
        self.factor = self.axes * (values / (count - 1)).sqrt().float()
        # each component takes a degree of freedom from what is left
        self.std = smooth_std((residual / (count - 1 - components)).view(scans.shape[1:]))

    def nats(self, x: Tensor) -> Tensor:
        """Negative log-likelihood of scans, `[batch]`."""
        covariance = {"cov_factor": self.factor, "cov_diag": self.std.flatten().square()}
        return -LowRankMultivariateNormal(self.mean, **covariance).log_prob(x.flatten(1))

    def reconstruct(self, x: Tensor) -> Tensor:
        """The projection of scans on the components."""
        return (self.mean + (x.flatten(1) - self.mean) @ self.axes @ self.axes.T).view_as(x)


def fit_pca(scans: Tensor, validation: Tensor) -> PCA:
    """A PCA of the scans, with the number of components that makes the validation scans likeliest."""
    best, least = None, math.inf
    for count in (count for count in COMPONENTS if count < len(scans) - 1):
        pca = PCA(scans, count)  # at 128³ each takes gigabytes
        nats = pca.nats(validation).mean().item()
        if nats < least:
            best, least = pca, nats
    return best


def own_grid_psnr(scan: MetaTensor, preprocessed: MetaTensor, images: Mapping[str, Tensor]) -> dict[str, float]:
    """PSNR (dB) of images on the network's grid, in its range, against a scan as it was loaded, `[1, *grid]`, of all
    voxels and in the brain; `preprocessed` is the same scan on the network's grid, whose range is the reference.
    """
    fit = Fit.of(preprocessed)
    truth = fit.scaled(scan.as_tensor().float()).clamp(-1, 1)
    inside, found = scan.as_tensor() > 0, {}
    for name, image in images.items():
        back = fit.scaled(to_scan(image, fit, "intensity").as_tensor()).clamp(-1, 1)
        errors = (back - truth).square()
        for end, values in (("", errors), ("_brain", errors[inside])):
            found[f"{name}_own_grid{end}"] = float(10 * torch.log10(4 / values.mean()))
    return found


def age_by_regression(scores: Sequence[Tensor], ages: Sequence[np.ndarray]) -> dict[str, float | None]:
    """Ridge regression on principal components' scores: `ridge_32_mae` and so on, of the testing side.

    Scores, `[people, components]`, leading first, and ages in years, NaN where not known, are of training and testing.
    """
    found: dict[str, float | None] = {}
    (train, test), (known, kept) = scores, [np.isfinite(values) for values in ages]
    for count in (count for count in SCORES if count <= train.shape[1]):
        model = RidgeCV(PENALTIES).fit(train[known, :count].numpy(), ages[0][known])
        said = model.predict(test[kept, :count].numpy())
        ends = [{"mean": value, "low": value, "high": value} for value in said]
        numbers = value_numbers(f"ridge_{count}", ages[1][kept], ends, float(ages[0][known].mean()))
        found |= {name: value for name, value in numbers.items() if not name.endswith("coverage_90")}
    return found


def counterfactuals(
    prior: PopulationPrior,
    network: VDVAE,
    scans: Tensor,
    known: Sequence[Mapping[str, Any]],
    training: tuple[Tensor, np.ndarray],
    leading: PCA,
    years: float,
) -> dict[str, float | None]:
    """What people at another age keep and change (Monteiro et al. 2023), in the brain: means and intervals over them.

    A regression on training people's scores tells the age that is seen. What should not change in a person is known of
    true pairs alone: see :mod:`benchmarks.covariates`.

    Args:
        prior, network: with covariates.
        scans: `[people, 1, *spatial]`.
        known: their covariates; the age of each.
        training: scans and ages of others.
        leading: components from whose scores the regression reads the age.
        years: more than they are, or fewer where nobody in training is so old.
    """
    (others, ages), own = training, np.array([float(row["age"]) for row in known])
    to = np.where(own + years <= ages.max(), own + years, own - years)
    brain = foreground(others.mean(0)[None], network)[0, 0]

    def scores(x: Tensor) -> np.ndarray:
        return ((x.flatten(1) - leading.mean) @ leading.axes).numpy()

    told = RidgeCV(PENALTIES).fit(scores(others), ages)

    def under(x: Tensor, now: np.ndarray, then: np.ndarray) -> Tensor:
        moved = []
        for scan, row, age, other in zip(x.split(1), known, now, then, strict=True):
            job, values = Counterfactual(prior, {"": {"age": float(other)}}), {**row, "age": float(age)}
            features = prior.coding.numbers(values)[None]
            moved.append((scan + job(scan, network, features=features, known=[values])["change"]).clamp(-1, 1))
        return torch.cat(moved)

    changed = under(scans, own, to)
    back = under(changed, to, own)
    change, left = ((x - scans).abs()[:, 0][:, brain] for x in (changed, back))
    seen = [told.predict(scores(x)) for x in (scans, changed)]
    nearest = torch.cdist(changed.flatten(1), scans.flatten(1)).argmin(1)
    rows = {
        "reversibility": left.mean(1) / change.mean(1),
        "age_off_asked": np.abs(seen[1] - to),
        "age_off_asked_before": np.abs(seen[0] - to),
        "age_off_own": np.abs(seen[0] - own),
        "age_moved": (seen[1] - seen[0]) / (to - own),
        "own_person": (nearest == torch.arange(len(nearest))).float(),
    }
    numbers: dict[str, float | None] = {}
    for name, values in rows.items():
        numbers |= mean_interval(f"counterfactual_{name}", [float(value) for value in values])
    return numbers


def darken(scan: nib.Nifti1Image, mask: nib.Nifti1Image, depth: float = 1.0) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """A lesion's shape, as dark as the person's CSF, in a scan of the same world; and its mask on the scan's grid.

    Args:
        scan, mask: of one world.
        depth: the share of the way to CSF.
    """
    image = np.asarray(scan.dataobj, dtype=np.float32)
    to_mask = np.linalg.inv(mask.affine) @ scan.affine
    shape = ndimage.gaussian_filter(
        np.asarray(mask.dataobj, dtype=np.float32) > 0, EDGE / abs(np.diag(mask.affine)[:3]), output=np.float32
    )
    opacity = ndimage.affine_transform(shape, to_mask[:3, :3], to_mask[:3, 3], image.shape, order=1) * (image > 0)
    fluid = np.percentile(image[image > 0], FLUID)
    lesion = image + depth * opacity * (np.minimum(image, fluid) - image)
    marked = ((opacity >= 0.5) & (image > 0)).astype(np.uint8)
    return nib.Nifti1Image(lesion, scan.affine, scan.header), nib.Nifti1Image(marked, scan.affine)


def fill_in(
    items: Sequence[Mapping[str, Any]], mask_dir: str, config: ConfigParser, folder: Path, seed: int
) -> dict[str, float | None]:
    """How well lesions' shapes, cut out of people as they are, are filled in: means and intervals over people.

    `mask_dir` has masks in MNI space; the folder gets the holes and `imputed.csv`, and the seed is of the holes.
    """
    write_strokes(items, mask_dir, folder, seed, healthy=False, darkened=False)
    places = {"dataset_dir": str(folder / "scans"), "output_dir": str(folder), "scan_pattern": "*_T1w.nii.gz"}
    config.update({"figures": False, "seed": seed, **places})
    common = config.get_parsed_content("common")
    jobs.impute(
        common, str(folder / "masks"), "*_lesions.nii.gz", draws=FILLINGS, voxel_noise=True, known_truth=True
    ).run()
    filled = pd.read_csv(folder / "imputed.csv")
    numbers: dict[str, float | None] = {}
    for name in ("mse", "psnr", "ssim", "coverage_50", "coverage_90"):
        numbers |= mean_interval(f"filled_{name}", filled[name].dropna().tolist())
    return numbers


def kinds(rows: Sequence[Mapping[str, Any]], ages: np.ndarray) -> list[tuple[str, str]]:
    """Rows of a `kinds.csv` for what :func:`write_strokes` writes: sex, and the younger and the older half."""
    middle = np.nanmedian(ages)
    groups = [
        [str(row.get("sex") or ""), "" if np.isnan(age) else f"{'above' if age > middle else 'to'} {middle:.0f} years"]
        for row, age in zip(rows, ages, strict=True)
    ]
    return [(f"sub-{place:03d}", ";".join(filter(None, group))) for place, group in enumerate(groups)]


def write_strokes(
    items: Sequence[Mapping[str, Any]],
    mask_dir: str,
    folder: Path,
    seed: int,
    healthy: bool = True,
    darkened: bool = True,
    depth: float = 1.0,
) -> None:
    """People with a lesion's shape drawn at random, in `scans` (where it is `darkened`) and `masks`; every other one
    `healthy`, as it is.

    Args:
        items, mask_dir, folder, seed: see :func:`fill_in`.
        healthy: whether every other one is.
        darkened: whether lesions are in the scans.
        depth: of these, see :func:`darken`.
    """
    masks, generator = sorted(Path(mask_dir).glob("*.nii*")), np.random.default_rng(seed)
    for place, item in enumerate(tqdm(items, "strokes", unit="scan")):
        scan = nib.load(item["image"])
        empty = nib.Nifti1Image(np.zeros(scan.shape[:3], np.uint8), scan.affine)
        name = f"sub-{place:03d}"
        sick = (
            darken(scan, nib.load(masks[generator.integers(len(masks))]), depth)
            if place % 2 or not healthy
            else (scan, empty)
        )
        for kind, image in zip(("scans", "masks"), sick if darkened else (scan, sick[1]), strict=True):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nib.save(image, folder / kind / f"{name}_{'T1w' if kind == 'scans' else 'lesions'}.nii.gz")


@torch.no_grad()
def main(
    dataset_dir: str,
    output_dir: str,
    ckpt: str = "models/model.pt",
    config_file: str | Sequence[str] = "configs/inference.json",
    mask_dir: str | None = None,
    testing: str = "testing",
    lesion_depth: float = 1.0,
    counterfactual_years: float | None = None,
    batch_size: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure, print a table, and write `people.json`.

    Args:
        dataset_dir: the datalist.
        output_dir: for results.
        ckpt: weights.
        config_file: of the network, one or a list.
        mask_dir: of masks in MNI space; None: no lesions are planted, and nothing is filled in.
        testing: the side to measure on; `validation` while choosing.
        lesion_depth: how dark planted lesions are, as a share of the way to CSF.
        counterfactual_years: by how many years people are made older; None: counterfactuals are left out.
        batch_size: of the network.
        seed: of the lesions.
    """
    parser = read_config(config_file, ckpt=ckpt)
    network, preprocess = parser.get_parsed_content("network").eval(), parser.get_parsed_content("preprocessing")
    load, folder = reading(preprocess), Path(output_dir)
    sides, _, _ = list_sides(dataset_dir)

    def read(side: str) -> Tensor:
        return stack(preprocess(item) for item in tqdm(sides[side], side, unit="scan"))

    training, validation = read("training"), read("validation")
    pca, mean, std = fit_pca(training, validation), training.mean(0)[None], smooth_std(training.var(0))[None]
    rows, scans = [], []
    for item in tqdm(sides[testing], "measuring", unit="scan"):
        preprocessed, scan = preprocess(item), load(item)
        x = preprocessed["image"].as_tensor()[None]
        output = network.infer(x, 0.0, keep_posteriors=False)[0]
        recons = {"ours": output.loc, "pca": pca.reconstruct(x), "gaussian": mean, "grid": x}
        row = own_grid_psnr(scan["image"], preprocessed["image"], {name: image[0] for name, image in recons.items()})
        for name in ("ours", "pca", "gaussian"):
            quality = image_quality(recons[name], x, network)
            row |= {f"{name}_{key}": float(value) for key, value in quality.items()}
        for name, nats in (("pca", pca.nats(x)), ("gaussian", negative_log_likelihood(mean, std, x))):
            row[f"{name}_bits_per_dim"] = float(bits_per_dim(nats, x))
        rows.append(row)
        scans.append(x)
    leading = PCA(training, min(SCORES[-1], len(training) - 2))
    tables = [Covariates(sides[side], dataset_dir) for side in ("training", testing)]
    ages = [np.array([float(row.get("age") or "nan") for row in table.rows]) for table in tables]
    projected = [(x - leading.mean) @ leading.axes.flip(1) for x in (training.flatten(1), torch.cat(scans).flatten(1))]
    numbers: dict[str, Any] = {"people": len(rows), "pca_components": pca.axes.shape[1]}
    for name in rows[0]:
        numbers |= mean_interval(name, [row[name] for row in rows])
    numbers |= age_by_regression(projected, ages)
    numbers["brain_share"] = float(foreground(training, network).float().mean())
    if counterfactual_years is not None:
        prior, dated = need_covariates(parser.get_parsed_content("population_prior")), np.isfinite(ages[1])
        values = tables[1].values(prior.coding)
        some = torch.cat(scans)[dated], [row for row, has_age in zip(values, dated, strict=True) if has_age]
        others = training[np.isfinite(ages[0])], ages[0][np.isfinite(ages[0])]
        numbers |= counterfactuals(prior, network, *some, others, leading, counterfactual_years)
    folder.mkdir(parents=True, exist_ok=True)
    if mask_dir is not None:
        config = read_config(config_file, ckpt=ckpt, batch_size=batch_size)
        numbers |= fill_in(sides[testing], mask_dir, config, folder / "holes", seed)
    write_text(folder / "people.json", json.dumps(numbers, indent=2) + "\n")
    shown = [name for name in numbers if f"{name}_low" in numbers]
    print_table(
        ("number", "mean", "95 % interval"),
        ([n, f"{numbers[n]:.4g}", f"{numbers[f'{n}_low']:.4g} to {numbers[f'{n}_high']:.4g}"] for n in shown),
    )
    if mask_dir is not None:
        at = folder / "strokes"
        write_strokes(sides[testing], mask_dir, at, seed, depth=lesion_depth)
        write_csv(at / "masks" / KINDS_FILE, ("scan", "kind"), kinds(tables[1].rows, ages[1]))
        masks = {"mask_dir": str(at / "masks"), "mask_pattern": "*_lesions.nii.gz", "scan_pattern": "*_T1w.nii.gz"}
        where = {"dataset_dir": str(at / "scans"), "output_dir": str(folder / "scores"), "batch_size": batch_size}
        read_config(config_file, ckpt=ckpt, prior="network", figures=False, **where, **masks).get_parsed_content(
            "scoring"
        ).run()
    return numbers


if __name__ == "__main__":
    run("python -m benchmarks.people", main)
