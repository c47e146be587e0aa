"""Volumes of regions in samples are measured beside people's, by a U-Net that learns their labels."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT
from test_covariates import save_weights_with_prior

from benchmarks.regions import compare, main
from scripts.phantoms import make_brains


def test_distances_are_in_standard_deviations_of_people():
    people = np.random.default_rng(0).normal(100, 10, 400)
    same = compare(np.random.default_rng(1).normal(100, 10, 400), people, 0)
    far = compare(people + 20, people, 0)
    assert same["distance"] < 0.2 and same["halves_95"] < 0.3
    assert far["distance"] == pytest.approx(20 / people.std(), rel=0.01)


def test_volumes_of_samples_stand_beside_those_of_people(cohort, tmp_path, capsys):
    make_brains(tmp_path / "scans", 16, spacing=16, covariates=True, contrast="T1w", workers=1)
    scans = [{"image": str(path)} for path in sorted((tmp_path / "scans").glob("*.nii.gz"))]
    sides = {"training": scans[:10], "validation": scans[10:12], "testing": scans[12:]}
    (tmp_path / "list.json").write_text(json.dumps(sides), encoding="utf-8")
    (tmp_path / "labels").mkdir()
    for number in (*range(1, 9), 11, 13):  # not of everybody
        one = nib.load(scans[number - 1]["image"])
        labels = (np.asarray(one.dataobj) > 0).astype(np.int16)
        labels[..., : labels.shape[2] // 2] *= 2  # both sides alike
        nib.save(nib.Nifti1Image(labels, one.affine), tmp_path / "labels" / f"sub-{number:04d}_dseg.nii.gz")
    save_weights_with_prior(cohort, one, tmp_path)
    found = main(
        *(str(tmp_path / name) for name in ("list.json", "labels", "out")),
        ckpt=str(tmp_path / "model.pt"),
        config_file=[str(ROOT / "configs/inference.json"), str(ROOT / "tests/tiny.json")],
        samples=4,
        ages=[60],
        updates=60,
        regions={"lower": [2]},
    )
    assert found == json.loads((tmp_path / "out" / "regions.json").read_text(encoding="utf-8"))
    assert found["dice"]["lower"] > 0.6 and found["ages"]["60"]["people"] > 0
    assert 200 < found["volumes"]["lower"]["people_mean"] < 2000  # ml
    assert "| lower | " in capsys.readouterr().out
