"""The benchmark of certificates, on a few phantoms with a tiny network, and its splits, where the answer is known."""

from __future__ import annotations

import importlib.util
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, informative_network
from test_covariates import KINDS as KINDS_OF_COVARIATES
from test_covariates import prior_with_effects

from benchmarks.certificate import KINDS, Splits, add_regression, cubes, lesion, main
from scripts.data.covariates import CovariateCoding
from scripts.phantoms import make_brains
from scripts.population.files import save_prior
from scripts.population.prior import fingerprint


def test_it_measures_certificates_of_phantoms(cohort, tmp_path, capsys):
    how = {"spacing": 16.0, "covariates": True, "workers": 1}
    make_brains(tmp_path / "healthy", 24, **how)
    make_brains(tmp_path / "sick", 6, lesions=1.0, lesion_kinds=["mass", "dark"], **how)
    network = informative_network(cohort)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    rows = [{"age": 40.0 + k, "sex": "FM"[k % 2], "site": "ABC"[k % 3]} for k in range(42)]
    prior = prior_with_effects(network, CovariateCoding.learn(KINDS_OF_COVARIATES, rows), size=0.1)
    save_prior(prior, tmp_path / "population_prior.pt", {"weights": fingerprint(network)})
    names = {"dataset_dir": "healthy", "output_dir": "out", "sick": "sick", "masks": "sick_masks", "ckpt": "model.pt"}
    settings = {name: str(tmp_path / path) for name, path in names.items()}
    sides = {"training": [{"image": str(path)} for path in sorted((tmp_path / "healthy").glob("*.nii.gz"))]}
    (tmp_path / "list.json").write_text(json.dumps(sides), encoding="utf-8")
    settings["training"] = str(tmp_path / "list.json")
    settings["config_file"] = [str(ROOT / "configs/inference.json"), str(ROOT / "tests/tiny.json")]
    found = main(**settings, draws=4, error_rate=0.2, calibrate=12, repeats=3)
    assert len(found) == 24 and [("hit" in row) for row in found] == [True] * 6 + [False] * 18
    assert all(row["hit"][kind] >= 0 for row in found[:6] for kind in KINDS)
    assert {row["lesion"] for row in found[:6]} <= {"mass", "dark"}
    assert max(row["largest"]["peak"] for row in found) > 1
    printed = capsys.readouterr().out
    assert "regions are judged by splines, too" in printed or importlib.util.find_spec("pcntoolkit")
    assert "| all | cluster |" in printed and "| A: others | all |" in printed and "found at the lesion" in printed
    before = (tmp_path / "out" / "findings.jsonl").read_text(encoding="utf-8")
    main(**settings, draws=5, error_rate=0.2, calibrate=12, repeats=1)  # nothing is computed again
    assert (tmp_path / "out" / "findings.jsonl").read_text(encoding="utf-8") == before
    assert json.loads(before.splitlines()[0])["image"] == "sub-0001_FLAIR.nii.gz"


def test_regions_are_judged_by_what_is_usual_at_their_covariates():
    rng = np.random.default_rng(0)
    ages = rng.uniform(30, 80, 200)
    means = np.stack([ages / 100, 1 - ages / 50], axis=1) + rng.normal(size=(200, 2)) * [0.01, 0.1]
    known = [{"age": age, "sex": str(rng.choice(["F", "M"]))} for age in ages.tolist()]
    coding = CovariateCoding.learn({"age": "continuous", "sex": "categorical"}, known)
    usual, old = {"age": 50.0, "sex": "F"}, {"age": None, "sex": "F"}
    rows = [
        {"covariates": usual, "means": [0.5, 0.0], "hit_means": [0.55, 0.5], "touched": [False, True]},
        {"covariates": old, "means": [0.5, 0.0]},
    ]
    for row in rows:
        row |= {"largest": {}} | ({"hit": {}} if "touched" in row else {})
    add_regression(rows, [(old, [9.0, 9.0]), *zip(known, means.tolist(), strict=True)], coding)
    assert rows[0]["largest"]["regression"] < 0.5 and rows[0]["hit"]["regression"] == pytest.approx(5, rel=0.15)
    assert rows[1]["largest"] == {"regression": 0.0} and "hit" not in rows[1]


def test_splits_count_what_is_promised():
    rng = np.random.default_rng(0)
    rows = []
    for age in rng.uniform(40, 80, 400):
        sizes = rng.exponential(size=2) * [1, 30]
        largest, hit = (dict.fromkeys(KINDS, float(size)) for size in sizes)
        known = {"age": float(age), "sex": "F", "site": str(rng.choice(["A", "B"]))}
        rows.append({"covariates": known, "largest": largest, "hit": hit, "lesion_ml": 1.0})
        largest["region"] *= 1 + (known["site"] == "B")  # on one scanner regions vary twice as much
    coding = CovariateCoding.learn(KINDS_OF_COVARIATES, [row["covariates"] for row in rows])
    splits = Splits(rows, coding, 0.05, 100, 40)
    everyone = np.ones(400)
    judged = splits.judge(everyone, everyone, groups=[])
    assert abs((judged["cluster"] <= 0.05).mean() - 0.05) < 0.012 and (judged["hit_cluster"] <= 0.05).mean() > 0.8
    of_a = np.array([row["covariates"]["site"] == "A" for row in rows])
    judged = splits.judge(of_a, ~of_a, groups=[])
    assert set(judged.person) <= set(np.flatnonzero(~of_a)) and (judged["region"] <= 0.05).mean() > 0.15


def test_a_lesion_lies_where_its_mask_says(cohort):
    values = np.zeros((20, 20, 20), np.uint8)
    values[4:8, 4:6, 4:6] = 1
    at, ml = lesion(nib.Nifti1Image(values, np.diag([2.0, 2, 2, 1])), np.diag([4.0, 4, 4, 1]), (8, 8, 8))
    assert ml == pytest.approx(16 * 8 / 1000) and at[0, 2:4, 2, 2].all() and at.sum() <= 16
    network = informative_network(cohort)

    class Evaluator:
        pass

    evaluator = Evaluator()
    evaluator.network = network
    labels = cubes(evaluator)
    assert labels.shape == (8, 8, 8) and 50 < labels.unique().numel() < 513  # at 8³ a cube is a voxel
