"""How true is what a population prior with covariates says? Counterfactuals, samples, ages and deviations of phantoms.

    python -m scripts.phantoms brains --output_dir brains --count 1536 --covariates True
    python -m benchmarks.covariates --ckpt OUT/model.pt --dataset_dir brains --output_dir OUT/measured

makes phantoms of another seed, and the same people at another age, at another site, and with the brain of an older
person, and prints a Markdown table of what is measured on the network's grid. ``--dataset_dir`` is what the prior was
fitted to: PCA and the mean age difference are taken from it. With ``--pairs 448`` so many further people are made at
two ages each, and what counterfactuals can reach at best is told by regressions of these true differences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

from scripts.data.covariate_tables import Covariates
from scripts.data.covariates import CovariateCoding
from scripts.data.datalist import list_sides
from scripts.inference.covariates import Counterfactual, CovariatePosterior, Deviation, need_covariates, summary
from scripts.inference.inferers import Sampling
from scripts.inference.scoring import Scoring
from scripts.networks import VDVAE
from scripts.phantoms.anatomy import random_streams
from scripts.phantoms.images import brain_phantom
from scripts.phantoms.people import AGES, SITES, Cohort, Person
from scripts.population.prior import innovation
from scripts.utils.command_line import run
from scripts.utils.files import write_bytes
from scripts.utils.formats import nifti_bytes

KINDS = {"age": "continuous", "sex": "categorical", "site": "categorical"}  # of what phantoms have
YEARS = 20.0  # of a counterfactual
BANDS = ((45, 58), (58, 72), (72, 86))  # of ages, years
PAIRS_SEED = 31  # of people that no fit and no other measurement has seen
PROBED = 512  # training scans that the classifier of sites and the probe of coordinates are fitted to
PENALTIES = np.logspace(-1, 5, 13)


class People:
    """Phantoms of a seed, made as they are needed, on the network's grid.

    Args:
        folder: where they are kept.
        preprocess: of the bundle's inference.
        seed, spacing: of the phantoms.
    """

    def __init__(self, folder: Path, preprocess: Callable, seed: int, spacing: float) -> None:
        self.folder, self.preprocess, self.seed, self.spacing = folder, preprocess, seed, spacing

    def person(self, index: int) -> Person:
        """Who a phantom is."""
        return Cohort().person(random_streams(index, self.seed).person)

    def scans(self, wanted: Sequence[tuple[int, Cohort]], what: str, **lesions: Any) -> Tensor:
        """Phantoms by their numbers and what is fixed of each, ``[scans, 1, *spatial]``."""
        return torch.stack([self._scan(*one, **lesions) for one in tqdm(wanted, what, unit="scan")])

    def _scan(self, index: int, cohort: Cohort, **lesions: Any) -> Tensor:
        fixed = "_".join(str(value) for value in (*cohort, *lesions.values()))
        path = self.folder / f"sub-{index:04d}_{fixed}.nii.gz"
        if not path.is_file():
            image, affine, _ = brain_phantom(index, self.seed, self.spacing, cohort=cohort, **lesions)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(path, nifti_bytes(image, affine, "mni", compresslevel=1))
        return self.preprocess({"image": str(path)})["image"].as_tensor()


def in_batches(
    job: Callable,
    network: VDVAE,
    coding: CovariateCoding,
    scans: Tensor,
    known: Sequence[Mapping[str, Any]],
    batch_size: int = 8,
) -> dict[str, Tensor]:
    """What a job finds in scans, ``[scans, ...]`` by name.

    Args:
        job: an inferer that takes covariates.
        network: for it.
        coding: of the covariates.
        scans: ``[scans, 1, *spatial]``.
        known: the covariates of each.
        batch_size: of a pass.
    """
    found = []
    for start in range(0, len(scans), batch_size):
        part = known[start : start + batch_size]
        features = torch.stack([coding.numbers(values) for values in part])
        found.append(job(scans[start : start + batch_size], network, features=features, known=part))
    return {name: torch.cat([results[name] for results in found]) for name in found[0]}


def brain_age(coding: CovariateCoding, likely: Tensor, ages: np.ndarray) -> tuple[float, float]:
    """How far the ages that scans tell are off, years, and the share of the 90 % intervals that hold the truth.

    Args:
        coding: of the covariates.
        likely: the posteriors of age, ``[scans, values]``.
        ages: the true ones.
    """
    told = [summary(coding, "age", posterior) for posterior in likely]
    off = np.abs([float(t["age_mean"]) for t in told] - ages).mean()
    inside = [float(t["age_low"]) <= age <= float(t["age_high"]) for t, age in zip(told, ages, strict=True)]
    return float(off), float(np.mean(inside))


def fluid(scans: Tensor, where: Tensor) -> np.ndarray:
    """How much of a region is as dark as fluid, ``[scans]``: the mean of how far its voxels are below half of the
    median of the brain.
    """
    values = (scans + 1) / 2
    middle = torch.stack([v[v > 0.05].median() for v in values]).reshape(-1, 1)
    inside = values[:, 0][:, where]
    return (1 - inside / (0.8 * middle)).clamp(0, 1).mean(1).numpy()


@torch.no_grad()
def main(
    ckpt: str,
    dataset_dir: str,
    output_dir: str,
    config_file: str | Sequence[str] = ("configs/inference.json", "configs/covariates.json"),
    count: int = 64,
    seed: int = 9,
    spacing: float = 2.0,
    draws: int = 32,
    pairs: int = 0,
    batch_size: int = 8,
) -> None:
    """Measure, and print.

    Args:
        ckpt: weights, with a population prior that knows age, sex and site beside them.
        dataset_dir: phantoms with covariates, those of the fit.
        output_dir: for the phantoms that are measured on.
        config_file: of the network, one or a list.
        count: people.
        seed: of these.
        spacing: of these, in mm.
        draws: of each expectation, and samples of each age.
        pairs: people at two ages, to learn true counterfactuals from; 0: none.
        batch_size: of all passes.
    """
    torch.manual_seed(0)
    parser = ConfigParser()
    parser.read_config(list(ensure_tuple(config_file)))
    parser.update({"ckpt": ckpt})
    network = parser.get_parsed_content("network").eval()
    prior = need_covariates(parser.get_parsed_content("population_prior"))
    coding, preprocess = prior.coding, parser.get_parsed_content("preprocessing")
    items, _, _ = list_sides(dataset_dir)
    rows = [coding.parse(row) for row in Covariates(items["training"], dataset_dir).rows]
    training = torch.stack(
        [preprocess(dict(item))["image"].as_tensor() for item in tqdm(items["training"], "training scans", unit="scan")]
    )
    people = People(Path(output_dir) / "people", preprocess, seed, spacing)
    own = [people.person(index) for index in range(1, count + 1)]
    known = [{"age": p.age, "sex": p.sex, "site": p.site} for p in own]
    scans = people.scans([(i + 1, Cohort()) for i in range(count)], "people")

    def batches(job: Callable, x: Tensor, values: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return in_batches(job, network, coding, x, values, batch_size)

    results: list[tuple[str, str, str]] = []
    brain = (training > -0.9).float().mean(0)[0] > 0.5
    pca = PCA(min(64, len(training) - 1), svd_solver="randomized", random_state=0).fit(training.flatten(1).numpy())
    scores, own_scores = (pca.transform(x.flatten(1).numpy()) for x in (training, scans))
    ages, own_ages = np.array([row["age"] for row in rows]), np.array([p.age for p in own])

    # the same people, older or younger
    shifts = year_shifts(own)
    others = people.scans([(i + 1, Cohort(age=float(own_ages[i] + shifts[i]))) for i in range(count)], "at another age")
    asked = [{"age": float(a)} for a in own_ages + shifts]
    changed = torch.cat(
        [
            scans[i : i + 1]
            + batches(Counterfactual(prior, {"": asked[i]}), scans[i : i + 1], known[i : i + 1])["change"]
            for i in range(count)
        ]
    ).clamp(-1, 1)
    slope = LinearRegression().fit(ages[:, None], training.flatten(1).numpy()).coef_[:, 0]
    added = (scans + torch.from_numpy(slope * shifts[:, None]).float().reshape(scans.shape)).clamp(-1, 1)

    def error(x: Tensor) -> float:
        return (x - others).abs()[:, 0][:, brain].mean().item()

    bare = error(scans)
    results.append(("counterfactual: error over that of doing nothing", f"{error(changed) / bare:.3f}", "0.5 or less"))
    results.append(("the same of adding the mean age difference", f"{error(added) / bare:.3f}", ""))
    if pairs:
        further = People(Path(output_dir) / "pairs", preprocess, PAIRS_SEED, spacing)
        for what, predicted in true_differences(further, pairs, scans, own).items():
            results.append((f"the same of {what}", f"{error((scans + predicted).clamp(-1, 1)) / bare:.3f}", ""))
    distance = torch.cdist(changed.flatten(1), others.flatten(1))
    right = (distance.argmin(1) == torch.arange(count)).float().mean().item()
    results.append(("counterfactual is nearest to its own person", f"{right:.0%}", "90 %"))

    # ventricles of samples against the age that was asked for
    where = ventricles(training, ages, brain)
    asked_ages = np.arange(AGES[0], AGES[1] + 1, 5.0)
    sampled, true = [], []
    for age in asked_ages:
        sampling = Sampling(prior=prior, covariates={"age": float(age)})
        sampled.append(
            fluid(
                torch.cat([sampling(batch_size, network)["sample"] for _ in range(draws // batch_size)]), where
            ).mean()
        )
        true.append(
            fluid(people.scans([(i + 1, Cohort(age=float(age))) for i in range(draws)], f"at {age:.0f}"), where).mean()
        )
    results.append(
        ("ventricles of samples and of people, over ages: r", f"{np.corrcoef(sampled, true)[0, 1]:.3f}", "0.97")
    )
    ratio = np.polyfit(asked_ages, sampled, 1)[0] / np.polyfit(asked_ages, true, 1)[0]
    results.append(("their slopes' ratio", f"{ratio:.2f}", "0.9 to 1.1"))

    # how old is the brain?
    posteriors = batches(CovariatePosterior(prior), scans, [{**values, "age": None} for values in known])[
        "posterior_age"
    ]
    off, inside = brain_age(coding, posteriors, own_ages)
    ridge = make_pipeline(StandardScaler(), RidgeCV(PENALTIES)).fit(scores, ages)
    results.append(
        (
            "age: mean absolute error, years",
            f"{off:.2f}",
            f"ridge on PCA scores: {np.abs(ridge.predict(own_scores) - own_ages).mean():.2f}",
        )
    )
    results.append(("its 90 % interval holds the truth", f"{inside:.0%}", "85 to 95 %"))

    # what the coordinates say of age beside the covariates
    def coordinates(
        x: Tensor, network: VDVAE, features: Tensor, known: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        _, posteriors = network.infer(x, temperature=0.0)
        return {"": prior.coordinates([innovation(q) for q in posteriors], features)}

    some = slice(0, min(len(training), PROBED))
    probed = []
    nothing = dict.fromkeys(coding.variables)
    for values, own_values in ((rows[some], known), ([nothing] * len(training), [nothing] * count)):
        probe = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
        probe.fit(batches(coordinates, training[some], values)[""].numpy(), ages[some])
        probed.append(probe.score(batches(coordinates, scans, own_values)[""].numpy(), own_ages))
    results.append(("age told by coordinates, R²", f"{probed[0]:.2f}", f"covariates not taken off: {probed[1]:.2f}"))

    # deviations of healthy people, and of brains that are older than their age
    deviation = Deviation(prior, draws)
    z = batches(deviation, scans, known)["deviation"][:, 0][:, brain]
    for low, high in BANDS:
        band = z[(own_ages >= low) & (own_ages < high)]
        results.append(
            (
                f"z of healthy people of {low} to {high}: mean, sd",
                f"{band.mean():.2f}, {band.std():.2f}",
                "0 ± 0.1, 1 ± 0.1",
            )
        )
    elder = [min(age + YEARS, AGES[1] + 10) for age in own_ages]
    aged = people.scans([(i + 1, Cohort(age=float(elder[i]))) for i in range(count)], "older than their age")
    sick = people.scans([(i + 1, Cohort()) for i in range(count)], "with lesions", lesions=1.0, lesion_kinds="bright")
    for what, unusual in (("ventricles wider than at their age", aged), ("lesions", sick)):
        both, twice = torch.cat([scans, unusual]), known + known
        labels = np.repeat([0, 1], count)
        with_it = batches(Scoring(prior=prior), both, twice)
        without = batches(Scoring(prior=prior), both, [nothing] * len(both))
        for name in ("bits_per_dim_population", "typicality"):
            pair = [roc_auc_score(labels, found[name].numpy()) for found in (with_it, without)]
            results.append((f"AUROC of {name}, {what}", f"{pair[0]:.3f}", f"without covariates: {pair[1]:.3f}"))
        brain_z = batches(deviation, unusual, known)["deviation"][:, 0][:, brain]
        found = [values.abs().topk(values.shape[1] // 50, 1).values.mean(1) for values in (z, brain_z)]
        results.append(
            (f"AUROC of the 2 % largest |z|, {what}", f"{roc_auc_score(labels, torch.cat(found).numpy()):.3f}", "")
        )
    healthy = [
        batches(Scoring(prior=prior), scans, values)["bits_per_dim_population"].mean().item()
        for values in (known, [nothing] * count)
    ]
    results.append(("bits per dim with covariates", f"{healthy[0]:.4f}", f"without: {healthy[1]:.4f}"))

    # all scans as if they came from one site: a classifier fitted to training scans, as they are or changed likewise
    site = sorted(SITES)[0]
    job = Counterfactual(prior, {"": {"site": site}})
    moved, moved_training = (
        (x + batches(job, x, values)["change"]).clamp(-1, 1)
        for x, values in ((scans, known), (training[some], rows[some]))
    )
    sites, own_sites = [row["site"] for row in rows[some]], [p.site for p in own]
    for what, fitted, x in (("as they are", training[some], scans), ("harmonised", moved_training, moved)):
        classifier = make_pipeline(
            StandardScaler(), PCA(min(64, len(sites) // 4)), LogisticRegression(C=0.1, max_iter=2000)
        )
        accuracy = classifier.fit(fitted.flatten(1).numpy(), sites).score(x.flatten(1).numpy(), own_sites)
        effect = np.polyfit(own_ages, fluid(x, where), 1)[0]
        chance = f"chance is {max(map(own_sites.count, SITES)) / count:.2f}"
        results.append((f"scans {what}: site classifier; slope of ventricles", f"{accuracy:.2f}; {effect:.5f}", chance))

    print("| measure | found | beside it |\n|---|---|---|")
    for row in results:
        print("| " + " | ".join(row) + " |")


def year_shifts(people: Sequence[Person]) -> np.ndarray:
    """By how many years each is made older or, near the highest age, younger."""
    return np.array([YEARS if person.age + YEARS <= AGES[1] else -YEARS for person in people])


def true_differences(others: People, count: int, scans: Tensor, people: Sequence[Person]) -> dict[str, Tensor]:
    """What regressions of other people's true differences predict for some people's scans, shaped like these.

    No cohort has such pairs: this is what a counterfactual could reach at best. By the mean difference in each
    direction; by ridge regression on age and 32 PCA scores; and by the same for somebody who also knows how fast each
    brain ages, which one scan does not tell.
    """
    known = [others.person(index + 1) for index in range(count)]
    shifts = year_shifts(known)
    before = others.scans([(i + 1, Cohort()) for i in range(count)], "pairs").flatten(1).numpy()
    moved = [(i + 1, Cohort(age=known[i].age + float(shifts[i]))) for i in range(count)]
    differences = others.scans(moved, "pairs, at another age").flatten(1).numpy() - before
    pca = PCA(min(32, count // 4), svd_solver="randomized", random_state=0, whiten=True).fit(before)
    x = scans.flatten(1).numpy()

    def plain(people: Sequence[Person], shifts: np.ndarray, scores: np.ndarray) -> np.ndarray:
        ages = (np.array([person.age for person in people]) - 65) / YEARS
        parts = np.column_stack([np.ones(len(ages)), ages, ages**2, scores])
        return np.hstack([parts, np.sign(shifts)[:, None] * parts])

    def knowing(people: Sequence[Person], shifts: np.ndarray, scores: np.ndarray) -> np.ndarray:
        older = [person._replace(age=person.age + shift) for person, shift in zip(people, shifts, strict=True)]
        aged = np.array([b.aged - a.aged for a, b in zip(people, older, strict=True)])[:, None]
        return np.hstack([aged, aged * scores])

    own_shifts = year_shifts(people)
    means = {sign: differences[shifts == sign].mean(0) for sign in set(shifts)}
    found = {"the mean true difference of others": np.stack([means[shift] for shift in own_shifts])}
    for what, features in (
        ("a regression of true differences", plain),
        ("one that knows the speed of ageing", knowing),
    ):
        regression = RidgeCV(PENALTIES).fit(features(known, shifts, pca.transform(before)), differences)
        found[what] = regression.predict(features(people, own_shifts, pca.transform(x)))
    return {what: torch.from_numpy(value).float().reshape(scans.shape) for what, value in found.items()}


def ventricles(training: Tensor, ages: np.ndarray, brain: Tensor) -> Tensor:
    """Where the training scans darken most with age, bool ``[*spatial]``: the 2 % of the brain's voxels."""
    centred = torch.from_numpy(ages - ages.mean()).float()
    slope = torch.einsum("s,s...->...", centred, training[:, 0]) / centred.square().sum()
    threshold = slope[brain].kthvalue(max(1, int(0.02 * brain.sum()))).values
    return brain & (slope <= threshold)


if __name__ == "__main__":
    run("python -m benchmarks.covariates", main)
