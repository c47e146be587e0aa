"""Covariates: reading and coding them, the population prior that knows them, and the jobs that use it."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, informative_network, run_bundle
from matplotlib.image import imread
from monai.data import Dataset
from scipy.stats import norm

from scripts.check import check
from scripts.data.check_report import summary as summary_of_check
from scripts.data.covariate_tables import CohortCovariates
from scripts.data.covariates import Categorical, Continuous, CovariateCoding
from scripts.data.scan_grid import ScanGrid
from scripts.inference.common import Cohort, Common, Failures
from scripts.inference.covariate_results import RegionCurves, fit_atlas, region_names, region_table
from scripts.inference.covariates import (
    Counterfactual,
    CovariatePosterior,
    Deviation,
    _combinations,
    need_covariates,
    posterior,
    stack_features,
    summary,
    targets,
)
from scripts.inference.inferers import Sampling
from scripts.inference.layouts import ScanLayout
from scripts.inference.prior_jobs import adapt
from scripts.inference.scoring import Scoring
from scripts.inference.tables import ScanColumns
from scripts.layers.gaussian import LatentSampler
from scripts.networks import VDVAE
from scripts.phantoms import make_brains
from scripts.population import effects
from scripts.population.deviations import deviations
from scripts.population.effects import Adaptation, EffectPlane, Effects, mechanism_std, private_mean, rows_of
from scripts.population.familiarity import Familiarity
from scripts.population.files import load_prior, save_prior
from scripts.population.fit import PopulationFit
from scripts.population.joint import correlation_of, draw_values
from scripts.population.prior import PopulationPrior, fingerprint, given_innovations

KINDS = {"age": "continuous", "sex": "categorical", "site": "categorical"}
INFERENCE = ["configs/inference.json", "tests/tiny.json"]


@pytest.fixture(scope="module")
def coding() -> CovariateCoding:
    rows = [{"age": str(40 + k), "sex": "FM"[k % 2], "site": "ABC"[k % 3]} for k in range(42)]
    return CovariateCoding.learn(KINDS, rows)


@pytest.fixture(scope="module")
def network(cohort):
    return informative_network(cohort)


def prior_with_effects(network, coding, size=1.0) -> PopulationPrior:
    grids = network.latent_grids()
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    return PopulationPrior(
        {i: 0.1 * randn(*grid) for i, grid in enumerate(grids)},
        {i: 0.5 + 0.1 * randn(*grid).abs() for i, grid in enumerate(grids)},
        {i: 0.3 * randn(2, *grid) for i, grid in enumerate(grids)},
        effects={i: size * 0.3 * randn(coding.size, *grid) for i, grid in enumerate(grids)},
        coding=coding,
    )


def save_weights_with_prior(cohort, scan, folder) -> None:
    """Weights of 8 voxels whose scans lie as a phantom of 16 mm does, and their prior with covariates."""
    size = np.array(scan.shape) * 16.0
    network = informative_network(cohort)
    network.scan_grid.copy_(ScanGrid([(scan.affine[:3, 3] + size / 2 - 8).tolist(), size.tolist()]).as_tensor())
    torch.save(network.state_dict(), folder / "model.pt")
    rows = [{"age": 40.0 + k, "sex": "FM"[k % 2], "site": "ABC"[k % 3]} for k in range(42)]
    prior = prior_with_effects(network, CovariateCoding.learn(KINDS, rows), size=0.1)
    save_prior(prior, folder / "population_prior.pt", {"weights": fingerprint(network)})


def test_numbers_have_a_mean_of_zero_and_are_zero_where_nothing_is_known(coding):
    rows = [{"age": 40 + k, "sex": "FM"[k % 2], "site": "ABC"[k % 3]} for k in range(42)]
    numbers = torch.stack([coding.numbers(row) for row in rows])
    assert numbers.shape == (42, coding.size) and coding.size == 3 + 1 + 2
    torch.testing.assert_close(numbers.mean(0), torch.zeros(coding.size), atol=1e-6, rtol=0)
    assert not coding.numbers({}).any()
    assert not coding.numbers({"age": None, "sex": None}).any()
    again = CovariateCoding.from_plain(json.loads(json.dumps(coding.plain())))
    torch.testing.assert_close(again.numbers(rows[5]), numbers[5])


def test_a_spline_is_straight_beyond_its_outer_knots_and_bends_between():
    age = Continuous.learn("age", [float(a) for a in range(20, 90)])
    curve = np.array([age.numbers(a) for a in (95.0, 100.0, 105.0, 5.0, 10.0, 15.0, 40.0, 50.0, 60.0)])
    second = np.diff(curve.reshape(3, 3, -1), 2, axis=1)[:, 0]
    assert np.abs(second[:2]).max() < 1e-9
    assert np.abs(second[2]).max() > 1e-3
    assert len(Continuous.learn("dose", [1.0, 2.0, 1.0, 2.0]).numbers(1.5)) == 1  # two values carry no curve


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"age": "old"}, "age is 'old': it must be a number"),
        ({"site": "D"}, "site is 'D': the cohort that the model was fitted to has A, B, C"),
        ({"weight": 80}, "knows no 'weight'; it knows age, sex, site"),
        ({}, "give values by names"),
        ("age", "give values by names"),
        ({"age": [50, 60], "site": ["A", "B"]}, "one of them can be a list"),
        ({"age": None}, "age is None: give the value to change to"),
        ({"age": [60, "n/a"]}, "age is .*: give the value to change to"),
    ],
)
def test_values_that_make_no_sense_are_refused(coding, value, message):
    with pytest.raises(ValueError, match=message):
        targets(coding, value)


def test_targets_name_results(coding):
    assert targets(coding, {"age": 80, "sex": "M"}) == {"": {"age": 80.0, "sex": "M"}}
    assert list(targets(coding, {"age": [50, 60.5]})) == ["_age-50", "_age-60.5"]
    with pytest.raises(ValueError, match="categorical alone"):
        targets(coding, {"age": 80}, only="categorical")


def test_check_says_what_participants_are_like(tmp_path):
    make_brains(tmp_path / "people", count=4, spacing=16.0, covariates=True, workers=1)
    table = tmp_path / "people" / "participants.tsv"
    lines = table.read_text().splitlines()
    lines[2] = lines[2].split("\t")[0] + "\tn/a\tF\tA"
    table.write_text("\n".join(lines) + "\n")
    report = check(tmp_path / "people", output_dir=tmp_path / "out", workers=1)
    age, sex, _ = report.covariates
    assert age.startswith("age: ") and "mean" in age and age.endswith("1 of 4 missing")
    assert sex.startswith("sex: ") and "F" in sex
    assert age in summary_of_check(report)


def test_scores_say_all_of_the_likelihood(network, coding):
    prior = prior_with_effects(network, coding)
    u = [torch.randn(3, *grid) for grid in network.latent_grids()]
    values = torch.stack([coding.numbers({"age": age, "sex": "M"}) for age in (45, 60, 75)])
    whole = torch.stack([prior.log_ratio(u, value.expand(3, -1)) for value in values], dim=1)
    short = prior.covariate_likelihoods(prior.effect_scores(u), values)
    torch.testing.assert_close(short - short[:, :1], (whole - whole[:, :1]).float(), rtol=1e-3, atol=1e-2)


def test_the_file_keeps_effects_and_coding(network, coding, tmp_path):
    prior = prior_with_effects(network, coding)
    prior.sharpness = 0.5
    save_prior(prior, tmp_path / "p.pt")
    again = load_prior(torch.load(tmp_path / "p.pt", weights_only=True))
    assert again.coding.plain() == coding.plain() and again.sharpness == 0.5
    torch.testing.assert_close(again.effects_1, prior.effects_1, atol=0.01, rtol=0.05)
    with pytest.raises(ValueError, match="fitted with covariates"):
        need_covariates(None)


@torch.no_grad()
def test_a_scan_under_its_own_covariates_is_itself(network, coding):
    prior = prior_with_effects(network, coding)
    scans = torch.rand(2, 1, 8, 8, 8) * 2 - 1
    items = [{"covariates": {"age": 50.0, "sex": "F", "site": "A"}}, {"covariates": dict.fromkeys(KINDS)}]
    arguments = stack_features(prior, items)
    same = Counterfactual(prior, {"": {"age": 50.0, "sex": "F"}})(scans, network, **arguments)["change"]
    assert same[0].abs().max() < 1e-4
    other = Counterfactual(prior, {"": {"age": 70.0}})(scans, network, **arguments)["change"]
    assert other[0].abs().max() > 1e-3


@torch.no_grad()
def test_samples_follow_their_covariates(network, coding):
    prior = prior_with_effects(network, coding)
    young, old = (Sampling(0.0, prior=prior, covariates={"age": age})(1, network)["sample"] for age in (45, 80))
    assert not torch.allclose(young, old)
    with pytest.raises(ValueError, match="knows none"):
        Sampling(covariates={"age": 45})


def test_the_posterior_of_a_covariate_is_bayes_rule(network, coding):
    prior = prior_with_effects(network, coding, size=0.2)
    truth = {"age": 66.0, "sex": "M", "site": "B"}
    innovations = prior.innovations(torch.randn(1, 2), 1.0, coding.numbers(truth)[None])
    scores = prior.effect_scores([innovations[i] for i in range(len(innovations))])[0]
    known = {"age": None, "sex": "M", "site": None}
    grid, likely = posterior(prior, scores, known, "age")
    # by hand: the mean over the sites, each as likely
    by_hand = torch.zeros(len(grid))
    for site in "ABC":
        values = torch.stack([coding.numbers({"age": age, "sex": "M", "site": site}) for age in grid])
        by_hand += prior.covariate_likelihoods(scores[None], values)[0].double().exp().float()
    torch.testing.assert_close(likely, by_hand / by_hand.sum(), rtol=1e-3, atol=1e-5)
    numbers = summary(coding, "age", likely)
    assert float(numbers["age_low"]) < float(numbers["age_mean"]) < float(numbers["age_high"])
    # of many that are not known some combinations are drawn, evenly
    rows = [{f"x{place}": float(10 * k + place) for place in range(6)} for k in range(9)]
    many = CovariateCoding.learn(dict.fromkeys(rows[0], "continuous"), rows)
    drawn, of_each = (_combinations(many, tuple(names)) for names in (rows[0], ["x3"]))
    assert len(drawn) == 4096 and len(of_each) == 9
    own = many.slices()["x3"]
    torch.testing.assert_close(drawn[:, own].mean(0), of_each[:, own].mean(0), atol=0.1, rtol=0)
    flat = summary(coding, "age", torch.full((81,), 1 / 81))
    span = coding.variables["age"].high - coding.variables["age"].low
    assert float(flat["age_high"]) - float(flat["age_low"]) == pytest.approx(0.9 * span, rel=0.02)


@torch.no_grad()
def test_deviation_is_in_units_of_the_draws(network, coding):
    prior = prior_with_effects(network, coding)
    labels = torch.zeros(8, 8, 8, dtype=torch.long)
    labels[:4], labels[4:] = 3, 7
    scans = torch.rand(1, 1, 8, 8, 8) * 2 - 1
    found = Deviation(prior, draws=4, labels=labels)(scans, network, coding.numbers({"age": 60})[None])
    torch.testing.assert_close(found["deviation"], (scans - found["expected"]) / found["spread"])
    assert found["regions"].shape == (1, 2, 4)
    torch.testing.assert_close(found["regions"][0, 0, 0], scans[0, 0, :4].mean())
    with pytest.raises(ValueError, match="draws is 1"):
        Deviation(prior, draws=1)


@torch.no_grad()
@pytest.mark.parametrize("inferer", [Scoring, Deviation, Counterfactual, CovariatePosterior])
def test_mixed_precision_is_the_networks_alone(network, coding, inferer, monkeypatch):
    """Where it gives the same output in mixed precision, all else is the same."""
    for name in ("infer", "decode"):
        monkeypatch.setattr(VDVAE, name, torch.autocast("cpu", enabled=False)(getattr(VDVAE, name)))
    prior = prior_with_effects(network, coding)
    prior.offset, labels = 0.1 * torch.rand(coding.size, 1, 8, 8, 8), torch.ones(8, 8, 8, dtype=torch.long)
    arguments = {
        Scoring: {"prior": prior},
        Deviation: {"prior": prior, "draws": 3, "labels": labels},
        Counterfactual: {"prior": prior, "targets": {"": {"age": 70.0}}},
        CovariatePosterior: {"prior": prior},
    }
    scans = torch.rand(2, 1, 8, 8, 8) * 2 - 1
    items = stack_features(prior, [{"covariates": {"age": 50.0}}, {"covariates": dict.fromkeys(KINDS)}])
    found = []
    for half in (False, True):
        sampler = LatentSampler([torch.Generator().manual_seed(seed) for seed in (0, 1)])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(inferer(**arguments[inferer])(scans, network, **items, sampler=sampler))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_regions_of_people_like_the_draws_are_as_usual(network, coding):
    """Of people whom the prior draws, |z| exceeds 1.96 in 5 %, however few draws there are to compare with."""
    prior = prior_with_effects(network, coding)
    labels = torch.ones(8, 8, 8, dtype=torch.long)
    labels[4:] = 2
    features = coding.numbers({"age": 60})[None].repeat(2000, 1)
    torch.manual_seed(0)
    people, _ = prior.sample(network, features)
    for wide, count in ((1.0, 2000), (2.0, 400)):
        prior.region_dispersion = wide
        z = Deviation(prior, draws=5, labels=labels)(people[:count], network, features[:count])["regions"][..., 3]
        share = float((z.abs() > 1.96).float().mean())
        assert 0.035 < share < 0.065 if wide == 1.0 else share < 0.02, (wide, share)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no place", "mend its header"),
        ("fractions", "holds other values than whole numbers"),
        ("negative", "holds other values than whole numbers"),
        ("two volumes", "give one volume"),
        ("text", "cannot be read"),
        ("elsewhere", "has no region where the scans lie"),
    ],
)
def test_an_atlas_is_checked_as_a_scan_is(kind, said, tmp_path):
    labels, affine = np.ones((8, 8, 8), np.float32), np.diag([2.0, 2, 2, 1])
    labels[4:] = {"fractions": 1.3, "negative": -2}.get(kind, 2)
    labels = np.stack([labels] * 2, -1) if kind == "two volumes" else labels
    image = nib.Nifti1Image(labels, affine)
    if kind == "no place":
        image.set_sform(None, 0)
        image.set_qform(None, 0)
    if kind == "elsewhere":
        image = nib.Nifti1Image(labels, np.diag([2.0, 2, 2, 1]) + 500 * np.eye(4, k=3))
    nib.save(image, tmp_path / "atlas.nii.gz")
    if kind == "text":
        (tmp_path / "atlas.nii.gz").write_text("no image")
    grid = ScanGrid(box=[[7.0] * 3, [16.0] * 3])
    with pytest.raises(ValueError, match=r"atlas\.nii\.gz'.*" + said):
        fit_atlas(tmp_path / "atlas.nii.gz", grid, (8, 8, 8), affine)


def test_curves_of_regions_do_not_depend_on_the_batch(network, coding, capsys):
    labels = torch.ones(8, 8, 8, dtype=torch.long)
    labels[4:] = 2
    deviation = Deviation(prior_with_effects(network, coding), draws=5, labels=labels)
    passes, found = [], []
    hook = network.output.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    for batch_size in (1, 2, 9):
        passes.clear()
        found.append(RegionCurves(deviation, network, [], seed=3, batch_size=batch_size).moments("age", [50.0, 70.0]))
        assert passes == {1: [1] * 10, 2: [2, 2, 1] * 2, 9: [5, 5]}[batch_size]
    hook.remove()
    for means, spreads in found:
        assert means.shape == spreads.shape == (2, 2) and (spreads > 0).all()
        torch.testing.assert_close(means, found[0][0])
        torch.testing.assert_close(spreads, found[0][1])
    assert "regions over age: 100%" in capsys.readouterr().err
    other = RegionCurves(deviation, network, [], seed=4).moments("age", [50.0, 70.0])
    assert not torch.allclose(other[0], found[0][0])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A tiny network trained on 24 phantoms with covariates for one epoch, and its population prior."""
    folder = tmp_path_factory.mktemp("covariates")
    make_brains(folder / "people", count=24, spacing=16.0, covariates=True, workers=1)
    run_bundle(
        *("--dataset_dir", folder / "people", "--output_dir", folder / "run", "--covariates", KINDS, "--epochs", 1),
        *("--prior_factors", 4, "--augment", False, "--network_def#init", "informative"),
    )
    return folder


def test_training_fits_a_prior_that_knows_covariates(fitted):
    content = torch.load(fitted / "run" / "checkpoints" / "population_prior.pt", weights_only=True)
    assert [variable["name"] for variable in content["covariates"]] == list(KINDS)
    assert all("effects" in latent for latent in content["latents"].values())
    prior = load_prior(content)
    assert prior.offset.shape == (prior.features, 1, 8, 8, 8)
    assert 0.3 < prior.dispersion < 3 and prior.dispersion != 1
    assert prior.region_dispersion == content["region_dispersion"] != prior.dispersion
    numbers = torch.zeros(2, prior.features)
    numbers[1, 0] = 2.0
    torch.testing.assert_close(prior.added(numbers)[1], 2 * prior.offset[0])


NINE = ("--scan_pattern", "sub-000*")  # of the 24 people


def job(word, fitted, output_dir, *arguments):
    words = ("--run_dir", fitted / "run", "--dataset_dir", fitted / "people", "--output_dir", output_dir, *arguments)
    return run_bundle(*words, run_id=word, configs=["configs/inference.json"])


def test_counterfactual_keeps_the_scans_own_grid(fitted, tmp_path):
    job("counterfactual", fitted, tmp_path, *NINE, "--covariates", {"age": [50, 80]})
    scan = nib.load(fitted / "people" / "sub-0001_FLAIR.nii.gz")
    for end in ("age-50", "age-80"):
        changed, difference = (
            nib.load(tmp_path / f"sub-0001_FLAIR_{word}_{end}.nii.gz") for word in ("counterfactual", "difference")
        )
        assert changed.shape == scan.shape
        np.testing.assert_allclose(changed.affine, scan.affine, atol=1e-4)
        total = scan.get_fdata() + difference.get_fdata()
        np.testing.assert_allclose(changed.get_fdata(), total, atol=0.1)
    assert (tmp_path / "sub-0001_FLAIR_counterfactual.png").is_file()


def test_harmonise_changes_the_site_alone(fitted, tmp_path):
    job("harmonise", fitted, tmp_path, *NINE, "--covariates", {"site": "A"}, "--figures", False)
    assert (tmp_path / "sub-0001_FLAIR_harmonised.nii.gz").is_file()
    assert (tmp_path / "report_harmonise.html").is_file()
    refused = job("harmonise", fitted, tmp_path / "age", "--covariates", {"age": 50})
    assert "categorical alone" in refused.stderr


def test_deviation_writes_a_table_of_regions(fitted, tmp_path):
    scan = nib.load(fitted / "people" / "sub-0001_FLAIR.nii.gz")
    halves = np.where(np.arange(scan.shape[0])[:, None, None] < scan.shape[0] // 2, 1, 2)
    atlas = tmp_path / "halves.nii.gz"
    nib.save(nib.Nifti1Image(np.broadcast_to(halves, scan.shape).astype(np.int16), scan.affine), atlas)
    (tmp_path / "halves.tsv").write_text("index\tname\n1\tleft\n2\tright\n")
    done = job("deviation", fitted, tmp_path / "out", *NINE, "--atlas", atlas, "--draws", 4)
    rows = list(csv.DictReader((tmp_path / "out" / "deviation.csv").open()))
    assert len(rows) == 18 and {row["region"] for row in rows} == {"left", "right"}
    assert {"image", "subject", "age", "value", "expected", "std", "z", "centile", "q"} <= set(rows[0])
    scores = list(csv.DictReader((tmp_path / "out" / "deviation_scores.csv").open()))
    assert len(scores) == 9
    worst = max(scores, key=lambda row: float(row["deviation_score"]))["image"]
    page = (tmp_path / "out" / "report_deviation.html").read_text(encoding="utf-8")
    assert page.split("<tr><td>")[1].startswith(worst) and '<tr class="beside"><td>usual</td>' in page
    wide = list(csv.DictReader((tmp_path / "out" / "deviation_z.csv").open()))
    assert "shows regions over age" in done.stderr and imread(tmp_path / "out" / "regions.png").shape[2] == 4
    assert len(wide) == 9 and wide[0]["left"] == rows[0]["z"]
    assert nib.load(tmp_path / "out" / "sub-0001_FLAIR_deviation.nii.gz").shape == scan.shape
    (tmp_path / "halves.tsv").write_text("index\tname\n1\thalf\n2\thalf\n")
    refused = job("deviation", fitted, tmp_path / "out", *NINE, "--atlas", atlas, "--draws", 4)
    assert "holds results of 'deviation' made with another regions" in refused.stderr
    job("deviation", fitted, tmp_path / "out", *NINE, "--draws", 4, "--overwrite", True)  # without an atlas now
    assert (tmp_path / "out" / "deviation_scores.csv").exists() and not list((tmp_path / "out").glob("*regions*"))
    refused = job("deviation", fitted, tmp_path / "none", "--atlas", tmp_path / "none.nii.gz")
    assert "none.nii.gz' does not exist" in refused.stderr


def test_regions_of_one_name_are_told_apart(tmp_path):
    """Such as those of both sides, of which one would be lost."""
    (tmp_path / "atlas.tsv").write_text("index\tname\n3\tputamen\n17\tputamen\n4\tpons\n")
    names = region_names(tmp_path / "atlas.nii.gz", torch.tensor([0, 3, 4, 5, 17]))
    assert names == ["putamen 3", "pons", "5", "putamen 17"]


def test_covariates_says_what_scans_say_of_them(fitted, tmp_path):
    done = job("predict_covariates", fitted, tmp_path, "--scan_pattern", "sub-001*")
    assert "age: mean absolute error" in done.stderr and "always saying the training people's mean" in done.stderr
    rows = list(csv.DictReader((tmp_path / "covariates.csv").open()))
    assert len(rows) == 10
    assert float(rows[0]["age_low"]) <= float(rows[0]["age_mean"]) <= float(rows[0]["age_high"])
    assert float(rows[0]["sex_F"]) + float(rows[0]["sex_M"]) == pytest.approx(1, abs=1e-3)
    assert rows[0]["site_likeliest"] in "ABC"
    ages, gaps, corrected = (
        np.array([float(row[f"age_{end}"]) for row in rows]) for end in ("own", "gap", "gap_corrected")
    )
    assert gaps == pytest.approx([float(row["age_mean"]) - float(row["age_own"]) for row in rows], abs=0.02)
    # what is left of gaps has nothing to do with the age any more
    assert corrected.mean() == pytest.approx(0, abs=0.01)
    assert np.corrcoef(ages, corrected)[0, 1] == pytest.approx(0, abs=0.01)
    assert (tmp_path / "sub-0010_FLAIR_covariates.png").is_file()
    page = (tmp_path / "report_predict_covariates.html").read_text(encoding="utf-8")
    worst = rows[int(np.abs(corrected).argmax())]["image"]
    assert page.split("<tr><td>")[1].startswith(worst) and "_covariates.png" in page


def test_evaluation_measures_what_scans_say_of_covariates(fitted, tmp_path):
    make_brains(tmp_path / "others", count=6, spacing=16.0, seed=1, covariates=True, workers=1)
    people = pd.read_csv(tmp_path / "others" / "participants.tsv", sep="\t")
    people.loc[0, "site"] = "D"
    people.to_csv(tmp_path / "others" / "participants.tsv", sep="\t", index=False)
    words = ("--run_dir", fitted / "run", "--dataset_dir", tmp_path / "others", "--output_dir", tmp_path)
    scan = nib.load(next((tmp_path / "others").rglob("*.nii.gz")))
    halves = np.ones(scan.shape, np.int16)
    halves[: len(halves) // 2] = 2
    nib.save(nib.Nifti1Image(halves, scan.affine), tmp_path / "atlas.nii.gz")
    words = (*words, "--samples", 0, "--draws", 2, "--atlas", tmp_path / "atlas.nii.gz")
    configs = ["configs/train.json", "configs/evaluate.json"]
    refused = run_bundle(*words, run_id=None, configs=configs)
    assert refused.returncode == 0, refused.stderr
    assert "1 scan(s) can't be read and are left out" in refused.stderr
    assert "no training scan has site 'D'" in refused.stderr
    left = pd.read_csv(tmp_path / "evaluation" / "evaluation.csv", index_col="image")
    words = (*words, "--unseen_categories", "unknown")
    result = run_bundle(*words, run_id=None, configs=configs)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert {"age_mae", "sex_accuracy", "mace", "msll", "mace_voxels", "region_mace_regions"} <= found.keys()
    assert found["expv"] < 1 and found["region_expv"] < 1 and found["region_smse"] > 0
    assert imread(tmp_path / "evaluation" / "pit.png").shape[1] > 1000
    assert "pit.png" in (tmp_path / "evaluation" / "report.html").read_text(encoding="utf-8")
    for name in (*KINDS, "covariates"):
        assert 0 <= found[f"{name}_information"] <= found[f"{name}_information_most"] + 1e-9
    assert found["covariates_information_most"] == pytest.approx(np.log2(5))  # those whose site is known
    assert "age_information" in result.stderr
    assert "Categories that no training scan has count as not known: site 'D' (1 scan(s))" in result.stderr
    assert found["held_out_scans"] == 6
    rows = pd.read_csv(tmp_path / "evaluation" / "evaluation.csv", index_col="image")
    assert len(left) == 5 and left["nll"].equals(rows["nll"][left.index])
    assert "Not known is the age" not in result.stderr  # of those who were trained on, in another folder, neither


@torch.no_grad()
def test_how_far_a_scan_deviates_does_not_depend_on_its_batch(network, coding):
    prior, scans = prior_with_effects(network, coding), torch.rand(3, 1, 8, 8, 8) * 2 - 1
    features = torch.stack([coding.numbers({"age": age}) for age in (45, 60, 75)])

    def scores(*places: int) -> torch.Tensor:
        noise = LatentSampler([torch.Generator().manual_seed(place) for place in places])
        return deviations(network, prior, scans[list(places)], features[list(places)], noise).scores

    torch.testing.assert_close(scores(0, 1, 2), torch.cat([scores(place) for place in range(3)]))


@pytest.mark.parametrize("noise", [0.0, 1.0, 2.0])
def test_scans_like_the_draws_have_a_dispersion_of_1(network, noise):
    """However much of their variance is the noise of voxels, which is known, rather than of draws, of which 16 tell."""
    generator = torch.Generator().manual_seed(0)

    def images(std: float) -> torch.Tensor:
        return 0.5 + std * torch.randn(64, 1, 8, 8, 8, generator=generator)

    prior = SimpleNamespace(sample=lambda *_: (images(0.05), torch.full((64, 1, 8, 8, 8), 0.05 * noise)))
    found = deviations(network, prior, images(0.05 * (1 + noise**2) ** 0.5), torch.zeros(64, 0), None)
    assert (found.squares[0] / found.counts[0]).sqrt() == pytest.approx(1, abs=0.01)


def test_what_is_not_given_of_samples_is_drawn_as_the_cohort_had_it():
    generator = np.random.default_rng(0)
    ages = generator.gamma(4, 8, 2000) + 18
    age, site = Continuous.learn("age", ages.tolist()), Categorical.learn("site", ["A"] * 70 + ["B"] * 30)
    shares = (np.arange(1000) + 0.5) / 1000
    drawn = np.array([age.quantile(share) for share in shares])
    assert drawn.mean() == pytest.approx(ages.mean(), rel=0.05) and drawn.std() == pytest.approx(ages.std(), rel=0.15)
    assert (age.quantile(0), age.quantile(1)) == (ages.min(), ages.max())
    assert [site.quantile(share) for share in (0, 0.69, 0.71, 1)] == ["A", "A", "B", "B"]
    assert Continuous.learn("dose", [0.0, 1.0, 1.0, 2.0]).quantile(0.5) == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("knots", [[50, 55, 60, 65], [20, 50, 80], [20, 40, 60, 80]])
@pytest.mark.parametrize("earlier", [False, True])
def test_samples_have_the_cohorts_ages_wherever_the_knots_are(knots, earlier):
    """Of a file of an earlier version, which has no quantiles, by its mean, standard deviation and range."""
    ages = np.random.default_rng(0).beta(1.3, 1.1, 500) * 40 + 45
    age = Continuous.learn("age", ages.tolist(), knots)
    age = replace(age, quantiles=()) if earlier else age
    drawn = np.array([age.quantile(share) for share in (np.arange(1000) + 0.5) / 1000])
    assert (np.diff(drawn) >= 0).all() and drawn.min() >= ages.min() and drawn.max() <= ages.max()
    assert drawn.mean() == pytest.approx(ages.mean(), abs=1) and drawn.std() == pytest.approx(ages.std(), rel=0.1)
    assert age.interval(age.quantile(0.3)) == pytest.approx((0.3, 0.3))


def test_quantiles_of_an_earlier_file_are_its_knots():
    age = Continuous.learn("age", (np.random.default_rng(0).gamma(4, 8, 2000) + 18).tolist())
    assert replace(age, quantiles=())._distribution() == age._distribution()


def test_covariates_of_samples_go_together_as_the_cohorts_do():
    people = torch.distributions.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, -0.6], [-0.6, 1.0]]))
    torch.manual_seed(0)
    pairs = enumerate(people.sample((4000,)).tolist())
    sites = {False: "HH", True: "NSK"}
    rows = [{"age": 50 + 10 * x, "site": sites[y > 0.5], "sex": "FM"[k % 2]} for k, (x, y) in pairs]
    coding = CovariateCoding.learn(KINDS, rows)
    features = torch.stack([coding.numbers(row) for row in rows])
    correlation = correlation_of(coding, features.T @ features, torch.full((3, 3), 4000))
    known = torch.rand(3, 4000) < 0.5  # whatever is missing of either
    fewer = (
        features
        * known.repeat_interleave(torch.tensor([own.stop - own.start for own in coding.slices().values()]), 0).T
    )
    apart = correlation_of(coding, fewer.T @ fewer, known.double() @ known.double().T)
    torch.testing.assert_close(apart, correlation, atol=0.1, rtol=0)
    assert list(coding.variables) == ["age", "sex", "site"]
    assert correlation[0, 2].item() == pytest.approx(-0.6, abs=0.05) and abs(correlation[0, 1]) < 0.05
    drawn = draw_values(coding, correlation, {}, torch.randn(4000, 3))

    def mean_age(people, site):
        return np.mean([person["age"] for person in people if person["site"] == site])

    for site in ("HH", "NSK"):
        assert mean_age(drawn, site) == pytest.approx(mean_age(rows, site), abs=1.5)
    # what is given says something of what is not
    old = draw_values(coding, correlation, {"age": 65.0, "sex": None}, torch.randn(4000, 3))
    assert {person["age"] for person in old} == {65.0} and {person["sex"] for person in old} == {None}
    among = [row["site"] == "NSK" for row in rows if 63 < row["age"] < 67]
    assert np.mean([person["site"] == "NSK" for person in old]) == pytest.approx(np.mean(among), abs=0.05)
    there = draw_values(coding, correlation, {"site": "NSK"}, torch.randn(4000, 3))
    assert mean_age(there, "NSK") == pytest.approx(mean_age(rows, "NSK"), abs=1.5)


@torch.no_grad()
def test_drawn_scans_differ_by_covariates_as_people_do(network, coding, tmp_path):
    prior = prior_with_effects(network, coding)
    ages = [{"age": 40.0 + k, "sex": "FM"[k % 2], "site": "ABC"[k % 3]} for k in range(42)]
    cohort = CohortCovariates.coded(coding, ages, [])
    torch.manual_seed(0)
    means = 0.05 * torch.randn(coding.size, 1, 8, 8, 8)
    people = [{"image": (cohort.training[k] @ means.flatten(1)).view(1, 8, 8, 8)} for k in range(42)]
    fit = PopulationFit(network, Dataset(people), Dataset([]), tmp_path / "p.pt", covariates=cohort)
    gained = fit._gained_by_drawing(prior)
    fit.batch_size = 5  # which changes no draw
    torch.testing.assert_close(fit._gained_by_drawing(prior), gained)
    fit._add_offsets(prior, means, fit.training)
    draws = Effects(coding.size, [1, 8, 8, 8])
    for seed in range(1000, 1020):
        drawn = []
        for features in (cohort.training, torch.zeros(42, coding.size)):
            torch.manual_seed(seed)
            drawn.append(prior.sample(network, features)[0])
        draws.add(cohort.training, drawn[0] - drawn[1])
    gained = draws.fit() - prior.drawn_offset
    left, by_moving, without = ((gained + added - means).norm() for added in (prior.drawn_offset, prior.offset, 0.0))
    assert left < by_moving and left < 0.4 * without
    prior.correlation = torch.eye(3)
    save_prior(prior, tmp_path / "prior.pt")
    again = load_prior(torch.load(tmp_path / "prior.pt", weights_only=True))
    for name in ("offset", "drawn_offset", "correlation"):
        torch.testing.assert_close(getattr(again, name), getattr(prior, name), atol=1e-3, rtol=1e-2)


def test_samples_and_scores_use_covariates(fitted, tmp_path):
    job("sample", fitted, tmp_path / "s", "--samples", 2, "--covariates", {"age": 80})
    assert (tmp_path / "s" / "0001_sample.nii.gz").is_file()
    job("score", fitted, tmp_path / "known", *NINE, "--figures", False)
    bare = tmp_path / "bare"
    bare.mkdir()
    for scan in (fitted / "people").glob("sub-000*.nii.gz"):
        shutil.copy(scan, bare)
    words = ("--run_dir", fitted / "run", "--dataset_dir", bare, "--output_dir", tmp_path / "unknown")
    run_bundle(*words, "--figures", False, run_id="score", configs=["configs/inference.json"])
    known, unknown = (
        [float(row["bits_per_dim_population"]) for row in csv.DictReader((tmp_path / name / "scores.csv").open())]
        for name in ("known", "unknown")
    )
    assert max(abs(a - b) for a, b in zip(known, unknown, strict=True)) > 1e-6


def test_a_new_site_is_learnt_from_its_scans(fitted, tmp_path):
    done = job("adapt", fitted, tmp_path, "--covariates", {"site": "D"})
    assert done.returncode == 0, done.stderr
    content = torch.load(tmp_path / "population_prior.pt", weights_only=True)
    before = torch.load(fitted / "run" / "checkpoints" / "population_prior.pt", weights_only=True)
    assert content["covariates"][2]["categories"] == ("A", "B", "C", "D")
    prior, old = load_prior(content), load_prior(before)
    assert prior.features == old.features + 1
    (seen,) = Familiarity.of(prior).added  # such scans are familiar, too
    assert seen[2] == 24 and seen[0].shape == Familiarity.of(old).mean.shape and not Familiarity.of(old).added
    index = old.latents[0]
    # of sex and age as they were; the scans at hand are those of the fit, so that their mean is no one's
    torch.testing.assert_close(
        getattr(prior, f"effects_{index}")[:-1], getattr(old, f"effects_{index}"), atol=0.02, rtol=0.05
    )
    drawn = job(
        "sample",
        fitted,
        tmp_path / "s",
        "--samples",
        1,
        "--covariates",
        {"site": "D"},
        "--prior",
        tmp_path / "population_prior.pt",
    )
    assert drawn.returncode == 0, drawn.stderr
    for covariates, message in (({"site": "A"}, "known already"), ({"age": 50}, "no categorical covariate")):
        refused = job("adapt", fitted, tmp_path / "none", "--covariates", covariates)
        assert message in refused.stderr


@torch.no_grad()
def test_scans_of_a_new_site_are_expected_as_they_are(network, coding, tmp_path):
    prior = prior_with_effects(network, coding, 0.3)
    prior.offset, prior.drawn_offset = torch.zeros(2, coding.size, 1, 8, 8, 8)
    prior.region_dispersion = 1.7

    def drawn(prior: PopulationPrior, count: int, **covariates: str) -> torch.Tensor:
        torch.manual_seed(count)
        features = prior.coding.numbers(covariates)[None].expand(count, -1)
        sampler = given_innovations(prior.innovations(torch.randn(count, 2), 1.0, features))
        return network.decode([], batch_size=count, sampler=sampler)[0] + prior.added(features, drawn=True)

    scans = drawn(prior, 20) + torch.linspace(-0.2, 0.2, 8)  # a bias field from left to right
    dataset = Dataset(
        [{"image": str(tmp_path / f"{index}.nii.gz")} for index in range(20)],
        lambda item: {"image": scans[int(Path(item["image"]).name.split(".")[0])]},
    )
    path = tmp_path / "prior" / "adapted.pt"
    adapted = Adaptation(network, prior, dataset, {"site": "D"}, tmp_path, path).run()
    before, after = (
        (drawn(usual, 200, site=site).mean(0) - scans.mean(0)).square().mean()
        for usual, site in ((prior, None), (adapted, "D"))
    )
    assert after < 0.3 * before
    again = load_prior(torch.load(path, weights_only=True))
    for name in ("offset", "drawn_offset"):
        torch.testing.assert_close(getattr(again, name), getattr(adapted, name), atol=1e-3, rtol=1e-2)
    assert again.region_dispersion == prior.region_dispersion == 1.7
    other = Adaptation(network, prior, dataset, {"site": "D"}, tmp_path, path, seed=1).run()  # by other draws
    assert torch.equal(rows_of(other, "effects"), rows_of(adapted, "effects"))
    assert not torch.equal(other.offset, adapted.offset)
    same = Adaptation(network, prior, dataset, {"site": "D"}, tmp_path, path, batch_size=3).run()
    torch.testing.assert_close(same.offset, adapted.offset)
    # two scans of each person say as much as one
    twice = Dataset([{**item, "subject": item["image"]} for item in dataset.data for _ in "ab"], dataset.transform)
    same = Adaptation(network, prior, twice, {"site": "D"}, tmp_path, path, batch_size=3).run()
    torch.testing.assert_close(rows_of(same, "effects"), rows_of(adapted, "effects"))
    with pytest.raises(ValueError, match="of one person nothing tells what is the category's"):
        Adaptation(network, prior, Dataset(dataset.data[:1]), {"site": "D"}, tmp_path, path)


def test_adapt_takes_the_seed_and_says_that_it_takes_no_mixed_precision(network, coding, tmp_path, caplog):
    cohort = Cohort(tmp_path, items=[{"image": "a.nii"}, {"image": "b.nii"}])
    common = (network, prior_with_effects(network, coding), None, cohort, tmp_path, "model.pt", Failures("failed.csv"))
    assert adapt(Common(*common, seed=3, precision={"amp": True}), {"site": "D"}).seed == 3
    assert caplog.messages == ["Nothing of 'adapt' depends on --amp, which changes nothing: it needs single precision."]


@torch.no_grad()
def test_a_site_of_which_nothing_is_learnt_is_said(network, coding, tmp_path, caplog, monkeypatch):
    prior = prior_with_effects(network, coding, 0.3)
    items = [{"image": str(tmp_path / f"{index}.nii.gz")} for index in range(2)]
    dataset = Dataset(items, lambda item: {"image": torch.zeros(1, 8, 8, 8)})
    monkeypatch.setattr(effects, "shrunk_mean", lambda total, squares, scans: (0 * total, 0.0))
    with caplog.at_level("INFO"):
        Adaptation(network, prior, dataset, {"site": "D"}, tmp_path, tmp_path / "adapted.pt").run()
    assert "Nothing was learnt of site 'D'" in caplog.text and "is taken for its effect" not in caplog.text


def dataset_of(scans, folder) -> Dataset:
    """Scans that are at hand, under names of files that are not."""
    items = [{"image": str(folder / f"sub-{index}.nii.gz"), "subject": f"sub-{index}"} for index in range(len(scans))]
    return Dataset(items, lambda item: {"image": scans[int(item["subject"][4:])]})


@torch.no_grad()
def test_a_site_is_learnt_privately_as_far_as_covariates_can_tell(network, coding, tmp_path, caplog):
    prior = prior_with_effects(network, coding, 0.3)
    prior.offset, prior.drawn_offset = torch.zeros(2, coding.size, 1, 8, 8, 8)
    prior.familiarity = {"names": ["as it was"]}
    torch.manual_seed(0)
    features = coding.numbers({"site": "B"})[None].expand(60, -1)
    sampler = given_innovations(prior.innovations(torch.randn(60, 2), 1.0, features))
    scans = network.decode([], batch_size=60, sampler=sampler)[0]
    options = (network, prior, dataset_of(scans, tmp_path), {"site": "D"}, tmp_path)
    plane, place = EffectPlane(prior), prior.features

    def learnt(epsilon) -> torch.Tensor:
        adapted = Adaptation(*options, tmp_path / "private.pt", epsilon=epsilon).run()
        assert adapted.familiarity == prior.familiarity and not adapted.offset[place].any()
        row = rows_of(adapted, "effects")[place][None]
        # it says nothing that the known effects do not span
        torch.testing.assert_close(plane.shift(plane.coordinates(row)[0])[None], row, atol=1e-4, rtol=1e-3)
        return plane.coordinates(row)[0]

    with caplog.at_level("INFO"):
        nearly_all = learnt(1000.0)
    assert "differentially private towards each person (epsilon 1000)" in caplog.text
    assert torch.load(tmp_path / "private.pt", weights_only=True)["epsilon"] == 1000
    prior.familiarity = None
    whole = Adaptation(*options, tmp_path / "whole.pt").run()
    told = plane.coordinates(rows_of(whole, "effects")[place][None])[0]
    assert torch.nn.functional.cosine_similarity(nearly_all, told, dim=0) > 0.95
    first, second = learnt(1.0), learnt(1.0)
    assert not torch.equal(first, second)  # noise of no seed
    for wrong in (0, -1, "much", float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"epsilon is .*: give a number above 0"):
            Adaptation(*options, tmp_path / "private.pt", epsilon=wrong)
    without = prior_with_effects(network, coding, 0.0)
    with pytest.raises(ValueError, match="covariates have no effect in this prior"):
        Adaptation(network, without, *options[2:], tmp_path / "none.pt", epsilon=1.0).run()


@torch.no_grad()
def test_no_person_moves_what_is_private_further_than_the_noise_allows(network, coding, tmp_path, monkeypatch):
    """However far off, however many scans: the sum without noise changes by twice the longest contribution at most."""
    prior, sums, standards = prior_with_effects(network, coding, 0.3), [], torch.rand(10, 1, 8, 8, 8)

    def without_noise(total, people, longest, epsilon):
        sums.append((total, people, longest))
        return total / people, 1.0

    monkeypatch.setattr(effects, "private_mean", without_noise)
    others = standards.clone()
    others[3] = 100 * torch.randn(1, 8, 8, 8)
    for scans in (standards, others):
        dataset = dataset_of(torch.cat([scans, scans]), tmp_path)
        for item in dataset.data[10:]:  # two scans of each person
            item["subject"] = f"sub-{int(item['subject'][4:]) - 10}"
        Adaptation(network, prior, dataset, {"site": "D"}, tmp_path, tmp_path / "p.pt", epsilon=1.0).run()
    (first, people, longest), (second, *_) = sums
    assert people == 10
    assert 0 < (first - second).norm() <= 2 * longest * (1 + 1e-5)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-5), (1.0, 1e-5), (8.0, 1e-6), (1000.0, 1e-5)])
def test_the_noise_is_that_of_the_analytic_gaussian_mechanism(epsilon, delta):
    std = mechanism_std(epsilon, delta)
    # the condition of theorem 8 of Balle and Wang, an equality at the least noise
    lost = norm.logcdf(0.5 / std - epsilon * std), epsilon + norm.logcdf(-0.5 / std - epsilon * std)
    assert np.exp(lost[0]) - np.exp(lost[1]) == pytest.approx(delta, rel=1e-3)


def test_the_private_mean_has_such_noise():
    total, people, longest = torch.full((3,), 1e7), 10_000, 30.0
    drawn = torch.stack([private_mean(total, people, longest, 0.5)[0] for _ in range(2000)])
    expected = mechanism_std(0.5, 1e-5) * 2 * longest / people
    assert drawn.std(0) == pytest.approx(expected, rel=0.08)
    assert drawn.mean(0) == pytest.approx(1000.0, abs=5 * expected / 2000**0.5)
    assert private_mean(torch.zeros(3), 20, 5.0, 0.1)[1] <= 0.9  # little is kept of what is noise


@torch.no_grad()
def test_what_a_new_site_is_learnt_without_is_said(network, coding, tmp_path, caplog):
    """The effect of ages that are not known would be taken for the site's, and another site's scans for its own."""
    prior = prior_with_effects(network, coding, 0.3)
    items = [{"image": str(tmp_path / f"sub-0{k}.nii.gz"), "subject": f"sub-0{k}"} for k in range(3)]
    dataset = Dataset(items, lambda item: {"image": torch.zeros(1, 8, 8, 8)})
    (tmp_path / "participants.tsv").write_text("participant_id\tAge\tsex\tsite\nsub-00\t50\tF\tB\nsub-01\t60\tF\tD\n")
    Adaptation(network, prior, dataset, {"site": "D"}, tmp_path, tmp_path / "adapted.pt").run()
    assert "All scans are taken for those of site 'D'; tables say B (1), D (1)." in caplog.messages
    assert any("age of 3 and sex of 1 of 3 scan(s)" in m and "found are Age, sex, site" in m for m in caplog.messages)
    assert any(m.startswith("1 of 3 scan(s) have no row in") for m in caplog.messages)


def test_the_likeliest_category_is_empty_where_nothing_is_known(coding):
    even = torch.full((3,), 1 / 3)
    assert summary(coding, "site", even)["site_likeliest"] == ""
    assert summary(coding, "site", torch.tensor([0.3, 0.4, 0.3]))["site_likeliest"] == "B"


def test_the_p_values_of_regions_are_corrected_for_their_number(tmp_path):
    scan = tmp_path / "a.nii.gz"
    layout = ScanLayout(tmp_path, tmp_path, "regions", ".json")
    z = [3.5, 0.1, -0.3, 0.2, 1.0, float("nan")]  # the last lies where no scan has anything
    layout.path(str(scan)).write_text(json.dumps({f"r{place}": [0, 0, 1, value] for place, value in enumerate(z)}))
    curves = SimpleNamespace(draw=lambda path, scores: None)
    region_table(tmp_path, layout, ScanColumns([{"image": str(scan)}], tmp_path), curves, [str(scan)])
    q = [float(row["q"]) for row in csv.DictReader((tmp_path / "deviation.csv").open())]
    assert q[0] == pytest.approx(6 * 2 * norm.sf(3.5), rel=1e-3)
    assert min(q[1:]) > 0.5 and q[-1] == 1


def test_jobs_without_such_a_prior_say_what_they_need(cohort, tmp_path):
    arguments = ("--dataset_dir", cohort, "--output_dir", tmp_path, "--covariates", {"age": 50})
    words = (*arguments, "--ckpt", ROOT / "models/model.pt", "--prior", "network")
    refused = run_bundle(*words, run_id="counterfactual", configs=["configs/inference.json"])
    assert "population prior that was fitted with covariates" in refused.stderr
