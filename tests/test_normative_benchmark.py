"""Models of what is usual in regions are what they are called, and a population prior is measured beside them."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from test_covariates import save_weights_with_prior

from benchmarks.normative import main, spline_regression
from scripts.phantoms import make_brains


def test_the_regression_finds_what_is_usual_for_age_and_sex():
    generator = np.random.default_rng(0)
    people = pd.DataFrame({"age": generator.uniform(20, 80, 4000), "sex": generator.choice(["F", "M"], 4000)})
    truth = np.stack([0.01 * (people.age / 10 - 5) ** 3, 0.5 * (people.sex == "M")], 1)
    values = truth + generator.normal(size=truth.shape) * [0.1, 0.3]
    mean, std = spline_regression(people[:3000], values[:3000], people[3000:], ["age"])
    assert np.sqrt(np.square(mean - truth[3000:]).mean(0)).max() < 0.03
    assert std[0] == pytest.approx([0.1, 0.3], rel=0.05) and std.shape == mean.shape
    # straight beyond the people who are known
    far = pd.DataFrame({"age": [80.0, 90.0, 100.0], "sex": "F"})
    above = spline_regression(people, values, far, ["age"])[0][:, 0]
    assert above[2] - above[1] == pytest.approx(above[1] - above[0])


def test_a_population_prior_is_measured_beside_the_regression(cohort, tmp_path, capsys):
    make_brains(tmp_path / "scans", 30, spacing=16, covariates=True, workers=1)
    scans = [{"image": str(path)} for path in sorted((tmp_path / "scans").glob("*.nii.gz"))]
    sides = {"training": scans[:26], "validation": scans[26:]}
    (tmp_path / "list.json").write_text(json.dumps(sides), encoding="utf-8")
    table = pd.read_csv(tmp_path / "scans" / "participants.tsv", sep="\t")
    table.loc[27, "age"] = np.nan
    table.to_csv(tmp_path / "scans" / "participants.tsv", sep="\t", index=False, na_rep="n/a")
    one = nib.load(scans[0]["image"])
    save_weights_with_prior(cohort, one, tmp_path)
    halves = np.ones(one.shape, np.int16)
    halves[: len(halves) // 2] = 2
    nib.save(nib.Nifti1Image(halves, one.affine), tmp_path / "atlas.nii.gz")
    configs = [str(ROOT / "configs/inference.json"), str(ROOT / "tests/tiny.json")]
    paths = [str(tmp_path / name) for name in ("list.json", "atlas.nii.gz", "out")]
    found = main(*paths, ckpt=str(tmp_path / "model.pt"), config_file=configs, draws=4)
    written = json.loads((tmp_path / "out" / "normative.json").read_text(encoding="utf-8"))
    assert (written["training"], written["measured"], written["regions"]) == (26, 3, 2)
    assert written["models"] == found and {"population prior", "training mean", "splines"} <= found.keys()
    assert [found["training mean"][name] for name in ("msll", "smse")] == pytest.approx([0, 1], abs=1e-3)
    # random effects are no match for a regression on such people
    assert found["splines"]["msll"] < found["population prior"]["msll"]
    assert "| splines |" in capsys.readouterr().out
