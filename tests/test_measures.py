"""Measures of samples, on samples of which the answer is known."""

from __future__ import annotations

import gzip
import importlib.util

import numpy as np
import pytest
import torch
from monai.metrics import FIDMetric
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.metrics import explained_variance_score, roc_auc_score

from scripts.inference.measures import (
    NormativeErrors,
    category_numbers,
    distance_ratio,
    file_bits,
    fit_predictor,
    frechet_distance,
    mean_interval,
    membership,
    nearest_training,
    precision_recall,
    region_distance,
    spectrum,
    value_numbers,
)


@pytest.fixture(scope="module")
def cohort():
    """A low-rank cohort: training, held-out, and a function that draws more."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(30, 64, generator=generator) / torch.arange(1, 31)[:, None] ** 0.5

    def draw(count: int, spread: float = 1.0) -> torch.Tensor:
        return (spread * torch.randn(count, 30, generator=generator) @ directions).reshape(count, 1, 4, 4, 4)

    return draw(400), draw(300), draw


BANDS = ((0, 5), (5, 20))


def test_the_spectrum_of_scans_is_one_and_of_half_the_spread_a_quarter(cohort):
    training, scans, draw = cohort
    assert list(spectrum(draw(300), scans, training, BANDS).values()) == pytest.approx([1, 1], abs=0.25)
    assert list(spectrum(draw(300, 0.5), scans, training, BANDS).values()) == pytest.approx([0.25, 0.25], abs=0.07)
    assert list(spectrum(draw(300), scans, training, (*BANDS, (20, 500)))) == ["variance_1_5", "variance_6_20"]


def test_precision_falls_with_too_much_spread_and_recall_with_too_little(cohort):
    _, scans, draw = cohort
    precision, recall = precision_recall(draw(300), scans).values()
    narrow, wide = (list(precision_recall(draw(300, spread), scans).values()) for spread in (0.4, 2.5))
    assert min(precision, recall) > 0.5
    assert narrow[0] > precision and narrow[1] < 0.5 * recall
    assert wide[0] < 0.5 * precision and wide[1] > recall


def test_copies_are_seen(cohort):
    training, scans, draw = cohort
    usual = nearest_training(scans, training)[0].median()
    assert float(nearest_training(draw(300), training)[0].median() / usual) == pytest.approx(1, abs=0.1)
    distances, places = nearest_training(training[:300] + 0.01 * draw(300), training)
    assert float(distances.median() / usual) < 0.1
    assert places.tolist() == list(range(300))
    near, far = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 4.0, 5.0])
    assert distance_ratio(near, far) == 0.5
    assert distance_ratio(near, torch.tensor([0.0, 0.0, 5.0])) is None  # held-out scans that were trained on


def test_an_interval_is_students():
    values = np.random.default_rng(0).normal(3, 2, 20)
    found = mean_interval("x", values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found["x_low"], found["x_high"]) == pytest.approx((expected.low, expected.high))
    assert (found["x"], found["x_std"]) == pytest.approx((values.mean(), values.std(ddof=1)))
    assert mean_interval("x", [1, 3, 5, 3], [[0, 1], [2], [3]]) == mean_interval("x", [2, 5, 3])  # by people
    assert mean_interval("x", [1.0]) == {"x": 1.0, "x_std": None, "x_low": None, "x_high": None}


def test_membership_is_the_area_under_the_curve():
    generator = np.random.default_rng(0)
    training, held_out = generator.normal(-4.6, 0.1, 60), generator.normal(-4.5, 0.1, 40)
    found = membership(training, held_out)
    labels, scores = [1] * 60 + [0] * 40, -np.concatenate([training, held_out])
    assert found["membership_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert found["membership_gap"] == pytest.approx(held_out.mean() - training.mean())
    # the interval holds what other draws give, as often as it says
    truth = stats.norm.cdf(0.1 / (0.1 * 2**0.5))
    held = []
    for _ in range(400):
        one = membership(generator.normal(-4.6, 0.1, 60), generator.normal(-4.5, 0.1, 40))
        held.append(one["membership_auroc_low"] <= truth <= one["membership_auroc_high"])
    assert np.mean(held) == pytest.approx(0.95, abs=0.03)
    assert membership([], held_out)["membership_auroc"] is None


def test_errors_of_ages_stand_beside_those_of_the_mean():
    own = np.linspace(20, 80, 61)
    said = [{"mean": 50 + 0.5 * (age - 50), "low": age - 3, "high": age + 3} for age in own]
    said[0]["low"] = said[0]["high"] = 90.0
    found = value_numbers("age", own, said, 50.0)
    assert found["age_mae"] == pytest.approx(0.5 * np.abs(own - 50).mean())
    assert found["age_mae_mean"] == pytest.approx(np.abs(own - 50).mean())
    assert found["age_slope"] == pytest.approx(0.5)
    assert found["age_correlation"] == pytest.approx(1)
    assert found["age_coverage_90"] == pytest.approx(60 / 61)
    assert value_numbers("age", [64.7] * 61, said, 50.0)["age_slope"] is None  # whose std is not quite 0
    found = category_numbers("sex", ["F", "F", "M", "M"], ["F", "M", "M", "M"], "F")
    assert found == {"sex_accuracy": 0.75, "sex_accuracy_commonest": 0.5}


def normative(expected: float, spread: float, people: int = 300) -> dict:
    """Errors of a model that expects N(expected, spread) of values that are N(2, 0.5)."""
    generator = torch.Generator().manual_seed(0)
    values = 2 + 0.5 * torch.randn(people + 500, 30, generator=generator)
    parts = [NormativeErrors(30, values[people:]) for _ in range(2)]
    for place, own in enumerate(values[:people]):
        parts[place % 2].add(own, torch.full_like(own, expected), torch.full_like(own, spread))
    return NormativeErrors.joined(parts).numbers()


def test_centile_errors_and_losses_of_a_normal_distribution_are_known():
    right, wide, shifted = normative(2, 0.5), normative(2, 1.0), normative(2.5, 0.5)
    assert right["mace"] < 0.005 and abs(right["msll"]) < 0.005
    assert right["mace_voxels"] == pytest.approx(right["mace_voxels_calibrated"], rel=0.1)
    shares = np.arange(1, 100) / 100
    too_wide = np.abs(stats.norm.cdf(2 * stats.norm.ppf(shares)) - shares).mean()
    assert wide["mace"] == pytest.approx(too_wide, abs=0.01)
    # E[log N(x; 2, 0.5) - log N(x; 2, 1)] and E[... N(x; 2.5, 0.5)] for x of N(2, 0.5)
    assert wide["msll"] == pytest.approx(np.log(2) - 0.5 + 0.125, abs=0.01)
    assert shifted["msll"] == pytest.approx(0.5, abs=0.02)
    assert shifted["smse"] == pytest.approx(2, abs=0.05)


def test_explained_variance_is_scikit_learns():
    generator = np.random.default_rng(0)
    expected = generator.normal(size=(40, 5))
    truth = expected * [1, 1, 1, 1, 0] + generator.normal(size=(40, 5)) * [0, 0.5, 1, 2, 1] + [0, 3, 0, 0, 0]
    errors = NormativeErrors(5, None)
    for own, mean in zip(torch.tensor(truth), torch.tensor(expected), strict=True):
        errors.add(own, mean, torch.ones(5))
    found = errors.numbers("regions")
    assert found["expv"] == pytest.approx(explained_variance_score(truth, expected))
    assert found["msll"] is None and "mace_regions" in found
    alone = NormativeErrors(5, None)
    alone.add(torch.ones(5), torch.zeros(5), torch.ones(5))
    assert alone.numbers()["expv"] is None and alone.pit_histogram()[1] is None


def pit_of(spread: float, generator: np.random.Generator, scans: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Of values that are N(0, 1) and alike within a scan."""
    errors = NormativeErrors(200, None)
    for _ in range(scans):
        own = 0.6 * generator.normal() + 0.8 * generator.normal(size=200)
        errors.add(torch.tensor(own), torch.zeros(200), torch.full((200,), spread))
    return errors.pit_histogram()


def test_a_calibrated_pit_is_within_its_band_and_one_too_narrow_is_not():
    generator = np.random.default_rng(0)
    inside = []
    for _ in range(60):
        shares, reach = pit_of(1.0, generator)
        assert shares.sum() == pytest.approx(1)
        inside.append(np.abs(shares - 0.05) <= reach)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.03)
    shares, reach = pit_of(0.5, generator, 400)
    edges = stats.norm.cdf(0.5 * stats.norm.ppf(np.linspace(0, 1, 21)))
    assert shares == pytest.approx(np.diff(edges), abs=0.015)
    assert shares[0] > 0.05 + reach[0] and shares[10] < 0.05 - reach[10]


def test_the_z_score_that_is_given_is_what_centiles_are_of():
    errors = NormativeErrors(2, None)
    errors.add(torch.zeros(2), torch.zeros(2), torch.ones(2), torch.tensor([-9.0, 9.0]))
    assert errors.pit_histogram()[0][[0, -1]].tolist() == [0.5, 0.5]
    errors.add(torch.zeros(2), torch.zeros(2), torch.ones(2), torch.tensor([-9.0, 9.0]))
    # bins that no scan reaches have the error of independent values, four in all
    assert errors.pit_histogram()[1][10] == pytest.approx(stats.t.ppf(0.975, 1) * (0.05 * 0.95 / 4) ** 0.5)


def test_files_are_as_large_as_what_they_hold():
    noise = np.random.default_rng(0).integers(0, 256, (16, 32, 32), dtype=np.uint8)
    assert all(8 <= bits < 9.5 for bits in file_bits(noise).values())
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8), (16, 32, 32)).copy()
    assert all(bits < 0.5 for bits in file_bits(ramp).values())
    assert file_bits(noise)["gzip"] == pytest.approx(8 * len(gzip.compress(noise.tobytes(), 9)) / noise.size)
    installed = {"jxl"} if importlib.util.find_spec("pillow_jxl") else set()
    assert set(file_bits(noise[0])) == {"gzip", "xz", "png", "webp"} | installed


BEFORE = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]  # 1: the voxel's own coordinate


def walk(seed: int) -> np.ndarray:
    """A volume of which each voxel is the one left of it and the one above, less the one before both, and +-1."""
    steps = np.random.default_rng(seed).choice([-1, 1], (8, 24, 24))
    return (128 + steps.cumsum(2).cumsum(1)).astype(np.uint8)


def test_the_fitted_predictor_is_the_regression_on_voxels_before():
    volumes = [walk(seed) for seed in range(3)]
    padded = [np.pad(volume, ((1, 0),) * 3).astype(float) for volume in volumes]
    columns = [np.concatenate([x[a : a + 8, b : b + 24, c : c + 24].ravel() for x in padded]) for a, b, c in BEFORE]
    truth = np.concatenate([volume.ravel() for volume in volumes])
    fitted = LinearRegression(fit_intercept=False).fit(np.stack(columns, 1), truth)
    assert fit_predictor(volumes) == pytest.approx(fitted.coef_, abs=1e-6)
    assert fit_predictor([np.arange(60, dtype=np.uint8).reshape(6, 10)]).shape == (7,)  # of one slice


def test_what_a_predictor_leaves_is_what_is_written():
    weights = np.array([0, 0, 0, -1, 0, 1, 1.0])
    # a coin's toss per voxel, and what xz adds, its 60 bytes among them
    assert 1 <= file_bits(walk(0), weights)["linear"] < 1.6 < 2.5 < file_bits(walk(0))["xz"]


def test_the_frechet_distance_is_monais_and_that_of_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4000, 5, generator=generator) for _ in range(2))
    second = 2 * second + 1
    assert frechet_distance(first, second) == pytest.approx(FIDMetric()(first, second).item(), rel=1e-6)
    assert frechet_distance(first, second) == pytest.approx(5 * (1 + (2 - 1) ** 2), rel=0.1)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    # more features than images: those that are 0 change nothing
    few = torch.randn(6, 50, generator=generator)
    turned = few @ torch.linalg.qr(torch.randn(50, 50, generator=generator))[0]
    assert frechet_distance(few, few + 0.1) == pytest.approx(50 * 0.01, rel=1e-5)
    assert frechet_distance(turned, turned + 0.1) == pytest.approx(50 * 0.01, rel=1e-5)


def test_regions_apart_are_so_many_standard_deviations_apart():
    people = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    spread = torch.tensor([1.0, 0.5])
    assert region_distance(people, people + torch.tensor([1.0, 1.0]), spread) == pytest.approx((1 + 2) / 2)
    assert region_distance(people, people, spread) == 0
