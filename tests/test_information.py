"""The information that scans hold on covariates: that of a model of which it is known, and its bounds for any model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from scripts.data.covariates import CovariateCoding
from scripts.inference.measures import information
from scripts.population.prior import PopulationPrior

GRID = (2, 3, 2, 2)
KINDS = {"age": "continuous", "sex": "categorical", "site": "categorical"}


def people(count: int, seed: int = 0) -> list[dict]:
    draws = np.random.default_rng(seed)
    return [
        {"age": float(draws.normal(60, 10)), "sex": "FM"[draws.integers(2)], "site": "AAB"[draws.integers(3)]}
        for _ in range(count)
    ]


def model(rows, age: float, sex: float, site: float, sharpness: float = 1.0) -> PopulationPrior:
    """A prior whose mean moves so many standard deviations with a standard deviation of age, and between categories."""
    coding = CovariateCoding.learn(KINDS, rows)
    directions = torch.zeros(1, *GRID)
    directions[0, 0] = 0.2  # a factor beside the covariates
    effects = torch.zeros(coding.size, *GRID)
    for name, size, place in (("age", age, 0), ("sex", sex, 1), ("site", site, 2)):
        effects[coding.slices()[name].start, 1, place, 0, 0] = size
    parts = ({0: torch.zeros(GRID)}, {0: torch.ones(GRID)}, {0: directions})
    return PopulationPrior(*parts, effects={0: effects}, coding=coding, sharpness=sharpness)


def scores_of(prior: PopulationPrior, rows) -> torch.Tensor:
    """What scans that the model itself draws say of their covariates."""
    torch.manual_seed(0)
    features = torch.stack([prior.coding.numbers(row) for row in rows])
    drawn = prior.innovations(torch.randn(len(rows), prior.factors), features=features)
    return prior.effect_scores([drawn[0]])


def of_two(apart: float) -> float:
    """Bits that a number holds on which of two equally frequent normal distributions it is of."""
    x = np.linspace(-10, 10, 20001)
    ends = stats.norm.pdf(x, -apart / 2), stats.norm.pdf(x, apart / 2)
    return 1 + sum(np.trapezoid(0.5 * p * np.log2(np.maximum(p, 1e-300) / sum(ends)), x) for p in ends)


def test_a_true_model_finds_the_mutual_information():
    rows = people(500)
    prior = model(rows, 1.0, 2.0, 0.0)
    found = information(prior, scores_of(prior, rows), rows)
    spread = np.std([row["age"] for row in rows])
    assert found["age_information"] == pytest.approx(0.5 * np.log2(1 + 1.0), abs=0.1)
    assert spread == pytest.approx(10, rel=0.05)
    assert found["sex_information"] == pytest.approx(of_two(2.0), abs=0.08)
    assert found["site_information"] < 0.02
    assert found["sex_information_low"] < found["sex_information"] < found["sex_information_high"]
    # they are independent of each other, and so is what is said of them
    both = found["age_information"] + found["sex_information"] + found["site_information"]
    assert found["covariates_information"] == pytest.approx(both, abs=0.1)
    assert found["sex_information_most"] == pytest.approx(1, abs=0.01)
    assert found["site_information_most"] == pytest.approx(stats.entropy([2 / 3, 1 / 3], base=2), abs=0.05)


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("said", ["the truth", "the opposite", "noise", "all too much"])
def test_no_model_finds_less_than_nothing_or_more_than_there_is(sharpness, said):
    rows = people(60)
    prior = model(rows, 1.0, 2.0, 3.0, sharpness)
    scores = scores_of(prior, rows)
    scores = {
        "the truth": scores,
        "the opposite": -scores,
        "noise": torch.randn(scores.shape, generator=torch.Generator().manual_seed(1)),
        "all too much": 1e4 * scores,
    }[said]
    found = information(prior, scores, rows)
    for name in (*KINDS, "covariates"):
        assert 0 <= found[f"{name}_information"] <= found[f"{name}_information_most"] + 1e-9, name
    assert found["covariates_information_most"] == pytest.approx(np.log2(60))
    if said == "the opposite":
        assert found["sex_information"] == 0


def test_covariates_of_others_are_told_by_nothing():
    rows = people(200)
    prior = model(rows, 1.0, 2.0, 3.0)
    scores = scores_of(prior, rows)
    right = information(prior, scores, rows)
    wrong = information(prior, scores, rows[100:] + rows[:100])
    for name in (*KINDS, "covariates"):
        limit = wrong[f"{name}_information_shuffled_95"]
        assert limit < 0.05
        assert wrong[f"{name}_information"] <= max(limit, 0.02)
        assert right[f"{name}_information"] > 5 * right[f"{name}_information_shuffled_95"]


def test_a_scan_counts_for_what_is_known_of_it():
    rows = people(80)
    prior = model(rows, 1.0, 2.0, 3.0)
    scores = scores_of(prior, rows)
    part = [{**row, "age": None} if place < 20 else row for place, row in enumerate(rows)]
    found = information(prior, scores, part)
    assert found["age_information_most"] == pytest.approx(np.log2(60))
    assert found["sex_information_most"] == information(prior, scores, rows)["sex_information_most"]
    nothing = information(prior, scores, [{**row, "site": None} for row in rows])
    assert "site_information" not in nothing and "covariates_information" not in nothing
