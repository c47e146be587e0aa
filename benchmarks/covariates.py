"""How true is what a population prior with covariates says? Counterfactuals, samples, ages and deviations of phantoms.

    python -m scripts.phantoms brains --output_dir brains --count 1536 --covariates True
    python -m benchmarks.covariates --ckpt OUT/model.pt --dataset_dir brains --output_dir OUT/measured

makes phantoms of another seed, and the same people at another age, at another site, and with the brain of an older
person, and prints a Markdown table of what is measured on the network's grid. ``--dataset_dir`` is what the prior was
fitted to: PCA and the mean age difference are taken from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import print_table, read_config, stack
from scripts.data.covariate_tables import Covariates
from scripts.data.covariates import CovariateCoding
from scripts.data.datalist import list_sides
from scripts.inference.covariates import Counterfactual, CovariatePosterior, Deviation, need_covariates, summary
from scripts.inference.inferers import Reconstruction, Sampling
from scripts.inference.scoring import Scoring
from scripts.networks import VDVAE
from scripts.phantoms.anatomy import random_streams
from scripts.phantoms.images import brain_phantom
from scripts.phantoms.people import AGES, SITES, Cohort, Person
from scripts.population.prior import PopulationPrior, innovation
from scripts.utils.command_line import run
from scripts.utils.files import write_bytes
from scripts.utils.formats import nifti_bytes

YEARS = 20.0  # of a counterfactual
BANDS = ((45, 58), (58, 72), (72, 86))  # of ages, years
PROBED = 512  # training scans that the classifier of sites and the probe of coordinates are fitted to
PENALTIES = np.logspace(-1, 5, 13)
STILL = 0.02  # 1 % of the range: a difference between two ages that is none
PARTS = ("counterfactuals", "axioms", "samples", "brain_ages", "coordinates", "deviations", "sites")
Rows = list[tuple[str, str, str]]


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
    """What an inferer that takes covariates finds in scans, `[scans, 1, *spatial]`: `[scans, ...]` by name."""
    found = []
    for start in range(0, len(scans), batch_size):
        part = known[start : start + batch_size]
        features = torch.stack([coding.numbers(values) for values in part])
        found.append(job(scans[start : start + batch_size], network, features=features, known=part))
    return {name: torch.cat([results[name] for results in found]) for name in found[0]}


def brain_age(coding: CovariateCoding, likely: Tensor, ages: np.ndarray) -> tuple[float, float]:
    """How far the ages that scans tell, by their posteriors `[scans, values]`, are off in years, and the share of the
    90 % intervals that hold the truth.
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


class Measurement:
    """What is measured; each method gives rows of the table: the measure, what is found, and what stands beside it.

    The prior knows age, sex and site. `training` are scans of the fit, `[scans, 1, *spatial]`, and `rows` their
    covariates; measured is on `count` of `people`, with `draws` of each expectation.
    """

    def __init__(
        self,
        network: VDVAE,
        prior: PopulationPrior,
        training: Tensor,
        rows: Sequence[Mapping[str, Any]],
        people: People,
        count: int,
        draws: int,
        batch_size: int,
    ) -> None:
        self.network, self.prior, self.people = network, prior, people
        self.training, self.rows, self.draws, self.batch_size = training, rows, draws, batch_size
        self.own = [people.person(index) for index in range(1, count + 1)]
        self.known = [{"age": p.age, "sex": p.sex, "site": p.site} for p in self.own]
        self.scans = people.scans([(i + 1, Cohort()) for i in range(count)], "people")
        self.ages, self.own_ages = np.array([row["age"] for row in rows]), np.array([p.age for p in self.own])
        self.brain = (training > -0.9).float().mean(0)[0] > 0.5
        self.where = ventricles(training, self.ages, self.brain)
        self.nothing = dict.fromkeys(prior.coding.variables)

    def batches(self, job: Callable, x: Tensor, values: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return in_batches(job, self.network, self.prior.coding, x, values, self.batch_size)

    def aged(self, shifts: Sequence[float], what: str) -> Tensor:
        """The same people, so many years older."""
        ages = self.own_ages + shifts
        return self.people.scans([(i + 1, Cohort(age=float(age))) for i, age in enumerate(ages)], what)

    def under(self, scans: Tensor, ages: np.ndarray, to: np.ndarray) -> Tensor:
        """Scans of the people, who are of these ages, as they would look at others."""
        changed = []
        for scan, known, age, other in zip(scans.split(1), self.known, ages, to, strict=True):
            job = Counterfactual(self.prior, {"": {"age": float(other)}})
            changed.append(scan + self.batches(job, scan, [{**known, "age": float(age)}])["change"])
        return torch.cat(changed).clamp(-1, 1)

    @cached_property
    def pairs(self) -> tuple[np.ndarray, Tensor, Tensor]:
        """Other ages, the same people at these, and the prior's counterfactuals."""
        ages = self.own_ages + year_shifts(self.own)
        return ages, self.aged(ages - self.own_ages, "at another age"), self.under(self.scans, self.own_ages, ages)

    def axioms(self) -> Rows:
        """What a counterfactual should keep and change (Monteiro et al. 2023), in the brain, as shares of the range."""
        ages, others, changed = self.pairs
        same, back = self.under(self.scans, self.own_ages, self.own_ages), self.under(changed, ages, self.own_ages)
        plain = self.batches(Reconstruction(), self.scans, self.known)["recon"]
        apart = [(x - self.scans).abs()[:, 0][:, self.brain].mean().item() / 2 for x in (same, plain, changed, back)]
        steps = PCA(min(64, len(self.ages) // 4)), StandardScaler(), RidgeCV(PENALTIES)
        told = make_pipeline(*steps).fit(self.training.flatten(1).numpy(), self.ages)
        off = [np.abs(told.predict(x.flatten(1).numpy()) - ages).mean() for x in (changed, others, self.scans)]
        still, moved = spill(self.scans, others, changed, self.brain)
        return [
            ("composition: change under a scan's own age", f"{apart[0]:.4f}", f"without the residual: {apart[1]:.4f}"),
            ("reversibility: there and back, over there", f"{apart[3] / apart[2]:.3f}", "0"),
            (
                "effectiveness: age by a regression on scans, off the age that was asked for",
                f"{off[0]:.1f} years",
                f"true scans of that age: {off[1]:.1f}, the scans before: {off[2]:.1f}",
            ),
            ("minimality: change where age changes nothing, over that where it does", f"{still / moved:.3f}", "0"),
        ]

    def counterfactuals(self) -> Rows:
        """The same people, older or younger: as the prior says, and as they are."""
        ages, others, changed = self.pairs
        shifts = ages - self.own_ages
        slope = LinearRegression().fit(self.ages[:, None], self.training.flatten(1).numpy()).coef_[:, 0]
        mean = torch.from_numpy(slope * shifts[:, None]).float().reshape(self.scans.shape)
        bare, error, added = (
            (x - others).abs()[:, 0][:, self.brain].mean().item()
            for x in (self.scans, changed, (self.scans + mean).clamp(-1, 1))
        )
        nearest = torch.cdist(changed.flatten(1), others.flatten(1)).argmin(1)
        right = (nearest == torch.arange(len(nearest))).float().mean().item()
        return [
            ("counterfactual: error over that of doing nothing", f"{error / bare:.3f}", "0.5 or less"),
            ("the same of adding the mean age difference", f"{added / bare:.3f}", ""),
            ("counterfactual is nearest to its own person", f"{right:.0%}", "90 %"),
        ]

    def samples(self) -> Rows:
        """Ventricles of samples against the age that was asked for."""
        ages, sampled, true = np.arange(AGES[0], AGES[1] + 1, 5.0), [], []
        for age in ages:
            sampling = Sampling(prior=self.prior, covariates={"age": float(age)})
            parts = [sampling(self.batch_size, self.network)["sample"] for _ in range(self.draws // self.batch_size)]
            sampled.append(fluid(torch.cat(parts), self.where).mean())
            wanted = [(i + 1, Cohort(age=float(age))) for i in range(self.draws)]
            true.append(fluid(self.people.scans(wanted, f"at {age:.0f}"), self.where).mean())
        ratio = np.polyfit(ages, sampled, 1)[0] / np.polyfit(ages, true, 1)[0]
        r = np.corrcoef(sampled, true)[0, 1]
        return [
            ("ventricles of samples and of people, over ages: r", f"{r:.3f}", "0.97"),
            ("their slopes' ratio", f"{ratio:.2f}", "0.9 to 1.1"),
        ]

    def brain_ages(self) -> Rows:
        """How old is the brain?"""
        unknown = [{**values, "age": None} for values in self.known]
        posteriors = self.batches(CovariatePosterior(self.prior), self.scans, unknown)["posterior_age"]
        off, inside = brain_age(self.prior.coding, posteriors, self.own_ages)
        x, own = (scans.flatten(1).numpy() for scans in (self.training, self.scans))
        pca = PCA(min(64, len(x) - 1), svd_solver="randomized", random_state=0).fit(x)
        ridge = make_pipeline(StandardScaler(), RidgeCV(PENALTIES)).fit(pca.transform(x), self.ages)
        beside = np.abs(ridge.predict(pca.transform(own)) - self.own_ages).mean()
        return [
            ("age: mean absolute error, years", f"{off:.2f}", f"ridge on PCA scores: {beside:.2f}"),
            ("its 90 % interval holds the truth", f"{inside:.0%}", "85 to 95 %"),
        ]

    def coordinates(self) -> Rows:
        """What the coordinates say of age beside the covariates."""

        def job(x: Tensor, network: VDVAE, features: Tensor, known: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
            _, posteriors = network.infer(x, temperature=0.0)
            return {"": self.prior.coordinates([innovation(q) for q in posteriors], features)}

        some, probed = slice(0, PROBED), []
        bare = [self.nothing] * len(self.training)
        for values, own in ((self.rows[some], self.known), (bare[some], [self.nothing] * len(self.known))):
            probe = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
            probe.fit(self.batches(job, self.training[some], values)[""].numpy(), self.ages[some])
            probed.append(probe.score(self.batches(job, self.scans, own)[""].numpy(), self.own_ages))
        return [("age told by coordinates, R²", f"{probed[0]:.2f}", f"covariates not taken off: {probed[1]:.2f}")]

    def deviations(self) -> Rows:
        """Deviations of healthy people, and of brains that are older than their age or have lesions."""
        deviation = Deviation(self.prior, self.draws)
        z, results = self.batches(deviation, self.scans, self.known)["deviation"][:, 0][:, self.brain], []
        for low, high in BANDS:
            band = z[(self.own_ages >= low) & (self.own_ages < high)]
            what = f"z of healthy people of {low} to {high}: mean, sd"
            results.append((what, f"{band.mean():.2f}, {band.std():.2f}", "0 ± 0.1, 1 ± 0.1"))
        older = np.minimum(self.own_ages + YEARS, AGES[1] + 10) - self.own_ages
        everyone = [(i + 1, Cohort()) for i in range(len(self.own))]
        sick = self.people.scans(everyone, "with lesions", lesions=1.0, lesion_kinds="bright")
        unusual = {"ventricles wider than at their age": self.aged(older, "older than their age"), "lesions": sick}
        labels = np.repeat([0, 1], len(self.own))
        for what, scans in unusual.items():
            both = torch.cat([self.scans, scans])
            with_it = self.batches(Scoring(prior=self.prior), both, self.known * 2)
            without = self.batches(Scoring(prior=self.prior), both, [self.nothing] * len(both))
            for name in ("bits_per_dim_population", "typicality"):
                pair = [roc_auc_score(labels, found[name].numpy()) for found in (with_it, without)]
                results.append((f"AUROC of {name}, {what}", f"{pair[0]:.3f}", f"without covariates: {pair[1]:.3f}"))
            unusual_z = self.batches(deviation, scans, self.known)["deviation"][:, 0][:, self.brain]
            largest = [v.abs().topk(v.shape[1] // 50, 1).values.mean(1) for v in (z, unusual_z)]
            area = roc_auc_score(labels, torch.cat(largest).numpy())
            results.append((f"AUROC of the 2 % largest |z|, {what}", f"{area:.3f}", ""))
        return results

    def sites(self) -> Rows:
        """All scans as if they came from one site: a classifier fitted to training scans, as they are or changed."""
        job, some = Counterfactual(self.prior, {"": {"site": min(SITES)}}), slice(0, PROBED)
        moved, moved_training = (
            (x + self.batches(job, x, values)["change"]).clamp(-1, 1)
            for x, values in ((self.scans, self.known), (self.training[some], self.rows[some]))
        )
        sites, own_sites = [row["site"] for row in self.rows[some]], [p.site for p in self.own]
        chance, results = max(map(own_sites.count, SITES)) / len(self.own), []
        for what, fitted, x in (
            ("as they are", self.training[some], self.scans),
            ("harmonised", moved_training, moved),
        ):
            steps = PCA(min(64, len(sites) // 4)), LogisticRegression(C=0.1, max_iter=2000)
            classifier = make_pipeline(StandardScaler(), *steps).fit(fitted.flatten(1).numpy(), sites)
            accuracy = classifier.score(x.flatten(1).numpy(), own_sites)
            effect = np.polyfit(self.own_ages, fluid(x, self.where), 1)[0]
            measure = f"scans {what}: site classifier; slope of ventricles"
            results.append((measure, f"{accuracy:.2f}; {effect:.5f}", f"chance is {chance:.2f}"))
        return results


@torch.no_grad()
def main(
    ckpt: str,
    dataset_dir: str,
    output_dir: str,
    config_file: str | Sequence[str] = ("configs/inference.json", "configs/phantoms_32.json"),
    count: int = 64,
    seed: int = 9,
    spacing: float = 2.0,
    draws: int = 32,
    batch_size: int = 8,
    parts: Sequence[str] = PARTS,
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
        batch_size: of all passes.
        parts: which, the methods of :class:`Measurement`.
    """
    torch.manual_seed(0)
    parser = read_config(config_file, ckpt=ckpt)
    network, preprocess = parser.get_parsed_content("network").eval(), parser.get_parsed_content("preprocessing")
    prior = need_covariates(parser.get_parsed_content("population_prior"))
    items = list_sides(dataset_dir)[0]["training"]
    rows = Covariates(items, dataset_dir).values(prior.coding)
    training = stack(preprocess(dict(item)) for item in tqdm(items, "training scans", unit="scan"))
    people = People(Path(output_dir) / "people", preprocess, seed, spacing)
    measured = Measurement(network, prior, training, rows, people, count, draws, batch_size)
    results = [row for part in parts for row in getattr(measured, part)()]
    print_table(("measure", "found", "beside it"), results)


def spill(scans: Tensor, others: Tensor, changed: Tensor, brain: Tensor) -> tuple[float, float]:
    """The mean absolute change of counterfactuals where a person's own scans at both ages hardly differ, and elsewhere.

    All scans are `[people, 1, *spatial]`, of the same people; `brain` is bool `[*spatial]`.
    """
    true, made = ((x - scans).abs()[:, 0][:, brain] for x in (others, changed))
    still = true < STILL
    return made[still].mean().item(), made[~still].mean().item()


def year_shifts(people: Sequence[Person]) -> np.ndarray:
    """By how many years each is made older or, near the highest age, younger."""
    return np.array([YEARS if person.age + YEARS <= AGES[1] else -YEARS for person in people])


def ventricles(training: Tensor, ages: np.ndarray, brain: Tensor) -> Tensor:
    """Where the training scans darken most with age, bool ``[*spatial]``: the 2 % of the brain's voxels."""
    centred = torch.from_numpy(ages - ages.mean()).float()
    slope = torch.einsum("s,s...->...", centred, training[:, 0]) / centred.square().sum()
    threshold = slope[brain].kthvalue(max(1, int(0.02 * brain.sum()))).values
    return brain & (slope <= threshold)


if __name__ == "__main__":
    run("python -m benchmarks.covariates", main)
