"""What is usual in regions: a population prior beside a spline regression and PCNtoolkit's Bayesian linear regression.

    python -m benchmarks.normative --dataset_dir LIST.json --atlas ATLAS.nii.gz --output_dir OUT

`LIST.json` is a datalist by whose training side the weights and their prior were fitted, with a `participants.tsv`
beside its scans. All models are of the same people's mean intensity in each region of the atlas, on the network's grid,
and know the prior's covariates; people of whom one is missing are left out. PCNtoolkit has a row if it is
installed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, SplineTransformer
from tqdm import tqdm

from benchmarks.common import print_table, read_config, stack
from scripts.data.datalist import list_sides
from scripts.inference import jobs
from scripts.inference.engine import read_item
from scripts.inference.measures import NormativeErrors
from scripts.utils.command_line import run
from scripts.utils.files import write_text

KNOTS = 4  # of the regression's cubic splines, at quantiles
Usual = tuple[np.ndarray, np.ndarray]  # mean and standard deviation, `[people, regions]` each


def spline_regression(
    training: pd.DataFrame, values: np.ndarray, measured: pd.DataFrame, continuous: Sequence[str]
) -> Usual:
    """Least squares on splines of the continuous covariates and on categories; one standard deviation per region.

    Args:
        training, measured: covariates, a row for each person.
        values: of training people, `[people, regions]`.
        continuous: which of the covariates are numbers; the others are categories.
    """
    categories = [name for name in training if name not in continuous]
    columns = make_column_transformer(
        (SplineTransformer(KNOTS, knots="quantile", extrapolation="linear", include_bias=False), list(continuous)),
        (OneHotEncoder(drop="first", sparse_output=False), categories),
    )
    model = make_pipeline(columns, LinearRegression()).fit(training, values)
    freedom = len(values) - 1 - model[-1].rank_
    deviation = np.sqrt(np.square(values - model.predict(training)).sum(0) / freedom)
    return model.predict(measured), np.broadcast_to(deviation, (len(measured), values.shape[1]))


def bayesian_regression(
    training: pd.DataFrame, values: np.ndarray, measured: pd.DataFrame, continuous: Sequence[str]
) -> Usual:
    """PCNtoolkit's BLR with its B-splines of the first number, and a fixed effect of each category."""
    from pcntoolkit import BLR, NormativeModel, NormData
    from pcntoolkit.math_functions.basis_function import BsplineBasisFunction

    regions = [f"region_{number}" for number in range(values.shape[1])]
    kinds = {"covariates": list(continuous), "batch_effects": [n for n in training if n not in continuous]}

    def data(name: str, covariates: pd.DataFrame, numbers: np.ndarray) -> Any:
        frame = covariates.reset_index(drop=True).join(pd.DataFrame(numbers, columns=regions))
        return NormData.from_dataframe(name, frame, response_vars=regions, **kinds)

    # it wants values of the people to predict, too; the centiles do not depend on them
    people = data("measured", measured, np.zeros((len(measured), len(regions))))
    with TemporaryDirectory() as folder:
        quiet = dict.fromkeys(("savemodel", "evaluate_model", "saveresults", "saveplots"), False)
        model = BLR(fixed_effect=True, basis_function_mean=BsplineBasisFunction())
        NormativeModel(model, save_dir=folder, **quiet).fit_predict(data("training", training, values), people)
    low, middle, high = (people.centiles.sel(centile=c, response_vars=regions).values for c in (0.05, 0.5, 0.95))
    return middle, (high - low) / (2 * stats.norm.ppf(0.95))


@torch.no_grad()
def main(
    dataset_dir: str,
    atlas: str,
    output_dir: str,
    ckpt: str = "models/model.pt",
    config_file: str | Sequence[str] = "configs/inference.json",
    measured: str = "validation",
    draws: int = 32,
) -> dict[str, dict[str, float]]:
    """Measure, print a table, and write `normative.json`.

    Args:
        dataset_dir: the datalist.
        atlas: of region numbers.
        output_dir: for results.
        ckpt: weights with a population prior that knows covariates.
        config_file: of the network, one or a list.
        measured: the side to measure on.
        draws: of what is usual for a person.
    """
    common = read_config(config_file, ckpt=ckpt, dataset_dir=dataset_dir).get_parsed_content("common")
    sides, _, _ = list_sides(dataset_dir)
    of_training, of_measured = (
        jobs.deviation(common.replace(cohort=common.cohort.of(sides[side])), draws, atlas)
        for side in ("training", measured)
    )
    rows, values, of_people, found = [], [], [], []
    for place, item in enumerate(tqdm(of_training.dataset.data, "training", unit="scan")):
        if None not in item["covariates"].values():
            rows.append(item["covariates"])
            values.append(of_training.inferer.region_means(stack([read_item(of_training.dataset, place)])))
    for place, item in enumerate(tqdm(of_measured.dataset.data, measured, unit="scan")):
        if None not in item["covariates"].values():
            of_people.append(item["covariates"])
            found.append(of_measured.compute([read_item(of_measured.dataset, place)])["regions"].cpu())
    rows, of_people, values, found = pd.DataFrame(rows), pd.DataFrame(of_people), torch.cat(values), torch.cat(found)
    continuous = [name for name, each in common.prior.coding.variables.items() if each.kind == "continuous"]
    own, *usual = found.unbind(2)
    deviation, mean = (each.expand_as(own) for each in torch.std_mean(values, 0))
    models = {"population prior": usual, "training mean": (mean, deviation, (own - mean) / deviation)}
    regressions = {"splines": spline_regression}
    if importlib.util.find_spec("pcntoolkit"):
        regressions["PCNtoolkit, BLR"] = bayesian_regression
    for name, regression in regressions.items():
        mean, std = map(torch.tensor, regression(rows, values.double().numpy(), of_people, continuous))
        models[name] = mean, std, (own - mean) / std
    numbers: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        errors = NormativeErrors(values.shape[1], values)
        for person in zip(own, *model, strict=True):
            errors.add(*person)
        numbers[name] = errors.numbers("regions") | {"z_mean": float(model[2].mean()), "z_std": float(model[2].std())}
    sizes = {"training": len(rows), "measured": len(of_people), "regions": values.shape[1]}
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    write_text(Path(output_dir) / "normative.json", json.dumps({**sizes, "models": numbers}, indent=2) + "\n")
    columns = list(next(iter(numbers.values())))
    print_table(("model", *columns), ([name, *(f"{row[c]:.3f}" for c in columns)] for name, row in numbers.items()))
    return numbers


if __name__ == "__main__":
    run("python -m benchmarks.normative", main)
