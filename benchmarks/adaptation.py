"""What is it worth to let a population prior learn a new site from a few scans? Adapting beside other ways.

    python -m scripts.phantoms brains --output_dir people --count 1024 --covariates True
    python -m benchmarks.adaptation --ckpt models/model.pt --dataset_dir people --output_dir OUT

takes the people of all sites but one for the cohort, and the first 50 of that one for the scans of a new site. The
bundle's own jobs, each in a process, then make a prior of the cohort that is used as it is, the new site unknown
(``as it is``); adapt it (``adapt``); fit it anew to both (``fit_prior``); and train the network on from its weights on
the new scans, of which a fifth say which epoch is best, and fit the prior anew (``train on``). It prints a Markdown
table of what each way says of people of another seed, on the network's grid. ``--ckpt`` should not know the sites.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.utils import ensure_tuple
from torch import Tensor

from benchmarks.common import CONFIGS, print_table, read_config
from benchmarks.covariates import KINDS, People, brain_age, in_batches
from scripts.data.covariate_tables import Covariates
from scripts.data.datalist import list_sides
from scripts.inference.covariates import CovariatePosterior, Deviation
from scripts.inference.scoring import Scoring
from scripts.networks import VDVAE
from scripts.phantoms.people import Cohort
from scripts.population.prior import PopulationPrior
from scripts.utils.command_line import run

CHOOSING = 16  # each such scan of the cohort chooses the number of factors


class Jobs:
    """The bundle's jobs, each in a process of its own.

    Args:
        folder: for what they read and write.
        networks: configs that say another network, after those of the bundle.
    """

    def __init__(self, folder: Path, networks: Sequence[str]) -> None:
        self.folder, self.networks = folder.absolute(), [str(Path(path).absolute()) for path in networks]
        self.folder.mkdir(parents=True, exist_ok=True)

    def datalist(self, name: str, **sides: Sequence[Mapping[str, Any]]) -> Path:
        """A datalist of scans with their covariates, by its sides."""
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(sides), encoding="utf-8")
        return path

    def __call__(self, job: str, name: str, config: str = "inference", **settings: Any) -> tuple[Path, float]:
        """Run a job with some settings; the folder of its results, and the seconds that processors worked for it."""
        output_dir = self.folder / name
        words = {"config_file": [f"configs/{config}.json", *self.networks], "output_dir": output_dir, **settings}
        before = os.times()
        run_process([word for key, value in words.items() for word in (f"--{key}", str(value))], job)
        after = os.times()
        return output_dir, sum(after[2:4]) - sum(before[2:4])  # of processes that have ended, user and system


def run_process(words: Sequence[str], job: str) -> None:
    """``python -m monai.bundle run JOB ...``."""
    subprocess.run([sys.executable, "-m", "monai.bundle", "run", job, *words], cwd=CONFIGS.parent, check=True)


class Way(NamedTuple):
    """A way to treat a new site: the weights and the prior that it ends with, and the seconds that it took."""

    ckpt: Path
    prior: Path
    seconds: float


class Tested(NamedTuple):
    """People to test with: scans ``[people, 1, *spatial]``, ages ``[people]`` and covariates."""

    scans: Tensor
    ages: np.ndarray
    known: list[dict[str, Any]]


def main(
    ckpt: str,
    dataset_dir: str,
    output_dir: str,
    site: str = "C",
    adapt_to: int = 50,
    count: int = 64,
    seed: int = 9,
    spacing: float = 2.0,
    draws: int = 32,
    epochs: int = 24,
    learning_rate: float = 0.0003,
    network_config: str | Sequence[str] = (),
) -> None:
    """Measure, and print.

    Args:
        ckpt: weights to start from.
        dataset_dir: phantoms with covariates.
        output_dir: for what the jobs write, and for the phantoms that are measured on.
        site: the new one.
        adapt_to: how many of its scans there are.
        count: people of the new site, and of the others, to measure on.
        seed: of these.
        spacing: of these, in mm.
        draws: of each expectation.
        epochs, learning_rate: of training on.
        network_config: config or configs of another network.
    """
    networks = list(ensure_tuple(network_config))
    jobs = Jobs(Path(output_dir), networks)
    items = list_sides(Path(dataset_dir).absolute())[0]["training"]
    rows = Covariates(items, dataset_dir).rows
    everyone = [{**item, **{name: row[name] for name in KINDS}} for item, row in zip(items, rows, strict=True)]
    cohort, new = ([item for item in everyone if (item["site"] == site) == own] for own in (False, True))
    ways = treat(jobs, Path(ckpt).absolute(), cohort, new[:adapt_to], site, epochs, learning_rate)

    parser = read_config([CONFIGS / "inference.json", *networks], ckpt=ckpt)
    people = People(Path(output_dir) / "people", parser.get_parsed_content("preprocessing"), seed, spacing)
    of_new = _tested(people, [(index, Cohort(site=site)) for index in range(1, count + 1)])
    others = [index for index in range(1, 20 * count) if people.person(index).site != site][:count]
    of_others = _tested(people, [(index, Cohort()) for index in others])
    columns = {}
    for name, way in ways.items():
        parser = read_config([CONFIGS / "inference.json", *networks], ckpt=str(way.ckpt), prior=str(way.prior))
        network, prior = (parser.get_parsed_content(key) for key in ("network", "population_prior"))
        asked = site if site in prior.coding.variables["site"].categories else None
        known = [{**values, "site": asked} for values in of_new.known]
        columns[name] = measure(network.eval(), prior, of_new._replace(known=known), of_others, draws)
        columns[name]["seconds of computing"] = f"{way.seconds:.0f}"
    names = next(iter(columns.values()))
    print_table(["measure", *columns], ([name, *(column[name] for column in columns.values())] for name in names))


def treat(
    jobs: Jobs,
    ckpt: Path,
    cohort: Sequence[Mapping[str, Any]],
    new: Sequence[Mapping[str, Any]],
    site: str,
    epochs: int,
    learning_rate: float,
) -> dict[str, Way]:
    """Fit the prior to a cohort, and treat the scans of a new site in each way; items have their covariates."""
    rest = [item for place, item in enumerate(cohort) if place % CHOOSING]
    choosing, fifth = cohort[::CHOOSING], -(len(new) // -5)
    of_cohort = jobs.datalist("cohort", training=rest, validation=choosing)
    both = jobs.datalist("both", training=[*rest, *new], validation=choosing)
    alone = jobs.datalist("new", training=new)
    split = jobs.datalist("split", training=new[:-fifth], validation=new[-fifth:])
    file = "population_prior.pt"
    fitted, _ = jobs("fit_prior", "fitted", ckpt=ckpt, dataset_dir=of_cohort, covariates=KINDS)
    ways = {"as it is": Way(ckpt, fitted / file, 0.0)}
    adapted, seconds = jobs(
        "adapt", "adapted", ckpt=ckpt, prior=fitted / file, dataset_dir=alone, covariates={"site": site}
    )
    ways["`adapt`"] = Way(ckpt, adapted / file, seconds)
    again, seconds = jobs("fit_prior", "fitted_again", ckpt=ckpt, dataset_dir=both, covariates=KINDS)
    ways["`fit_prior`"] = Way(ckpt, again / file, seconds)
    training = {"epochs": epochs, "learning_rate": learning_rate, "augment": False, "amp": True, "num_workers": 0}
    training |= {"prior_factors": 0, "figure_interval": 0, "save_interval": epochs, "cache_dir": jobs.folder / "cache"}
    trained, seconds = jobs("training", "trained", "train", weights=ckpt, dataset_dir=split, **training)
    tuned = trained / "checkpoints" / "best_model.pt"
    again, more = jobs("fit_prior", "trained_fitted", ckpt=tuned, dataset_dir=both, covariates=KINDS)
    ways["train on"] = Way(tuned, again / file, seconds + more)
    return ways


def _tested(people: People, wanted: Sequence[tuple[int, Cohort]]) -> Tested:
    who = [people.person(index)._replace(**({"site": cohort.site} if cohort.site else {})) for index, cohort in wanted]
    known = [{"age": p.age, "sex": p.sex, "site": p.site} for p in who]
    return Tested(people.scans(wanted, "people"), np.array([p.age for p in who]), known)


@torch.no_grad()
def measure(network: VDVAE, prior: PopulationPrior, new: Tested, others: Tested, draws: int) -> dict[str, str]:
    """What a network and its prior say of people of the new site and of others, by what is measured."""
    results = {}
    for who, (scans, ages, known) in (("new site", new), ("others", others)):
        torch.manual_seed(0)
        bits = in_batches(Scoring(prior=prior), network, prior.coding, scans, known)["bits_per_dim_population"]
        results[f"{who}: bits per dim"] = f"{bits.mean():.4f}"
        unknown = [{**values, "age": None} for values in known]
        likely = in_batches(CovariatePosterior(prior), network, prior.coding, scans, unknown)["posterior_age"]
        off, inside = brain_age(prior.coding, likely, ages)
        results[f"{who}: age from the scan, mean absolute error; its 90 % interval holds the truth"] = (
            f"{off:.1f} years; {inside:.0%}"
        )
    scans, _, known = new
    torch.manual_seed(0)
    found = in_batches(Deviation(prior, draws), network, prior.coding, scans, known)["deviation"]
    z = found[:, 0][:, (scans > -0.9).float().mean(0)[0] > 0.5]
    results["new site: z of healthy people, mean, standard deviation"] = f"{z.mean():.2f}, {z.std():.2f}"
    means = z.mean(0).square().mean().sqrt()
    results["new site: the voxels' mean z, root mean square"] = f"{means:.2f}"
    return results


if __name__ == "__main__":
    run("python -m benchmarks.adaptation", main)
