"""Deviations with a guarantee: p values by healthy people kept apart, and what a certificate says of them."""

from __future__ import annotations

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import informative_network, run_bundle
from test_covariates import prior_with_effects

from scripts.data.covariates import CovariateCoding
from scripts.data.scan_grid import ScanGrid
from scripts.inference.certificate import Certificate, discovery_level, find_clusters
from scripts.phantoms import make_brains
from scripts.population.prior import fingerprint

INFERENCE = ["configs/inference.json", "tests/tiny.json"]
ROWS = [{"age": 40.0 + k, "site": "AB"[k % 2]} for k in range(42)]


@pytest.fixture(scope="module")
def coding() -> CovariateCoding:
    return CovariateCoding.learn({"age": "continuous", "site": "categorical"}, ROWS)


def calibrated(coding, tmp_path, people, rate=0.05, **settings) -> Certificate:
    """With people whose largest cluster is given, all of site A unless it is said."""
    files = []
    for place, (size, *site) in enumerate(people):
        content = {"largest": {"cluster": size, "peak": size}, "covariates": {"age": 60.0, "site": (site or ["A"])[0]}}
        files.append(tmp_path / f"{place}.json")
        files[-1].write_text(json.dumps(content), encoding="utf-8")
    certificate = Certificate(coding, rate, **settings)
    certificate.read(files)
    return certificate


def test_p_is_the_share_of_people_with_as_large_a_finding(coding, tmp_path):
    certificate = calibrated(coding, tmp_path, [(float(size),) for size in range(99)])
    group = certificate.group({"age": 60.0, "site": "A"})
    assert certificate.p(group, "cluster", 1000.0) == 0.01  # with 99 people nothing is below
    assert certificate.p(group, "cluster", 98.0) == 0.02
    assert certificate.p(group, "cluster", 0.0) == 1
    assert certificate.people[group] == certificate.people["all"]


def test_of_healthy_people_no_more_are_flagged_than_promised(coding, tmp_path):
    rng = np.random.default_rng(0)
    flagged = []
    for repeat in range(40):
        (folder := tmp_path / str(repeat)).mkdir()
        certificate = calibrated(coding, folder, [(float(size),) for size in rng.lognormal(size=39)], rate=0.1)
        group = certificate.group({"age": 60.0, "site": "A"})
        flagged += [certificate.p(group, "cluster", size) <= 0.1 for size in rng.lognormal(size=50)]
    assert 0.07 < np.mean(flagged) <= 0.115  # of 40 calibrations, whose shares have a standard deviation of 0.045


def test_people_are_compared_with_their_like_where_there_are_enough(coding, tmp_path):
    people = [(1.0, "A")] * 30 + [(9.0, "B")] * 25 + [(5.0, None)] * 3
    certificate = calibrated(coding, tmp_path, people)
    assert certificate.group({"age": 60.0, "site": "A"}) == "site A, age 54.35 to 66.65"
    assert certificate.group({"age": 50.0, "site": "B"}) == "site B"  # of that age there are none
    assert certificate.group({"age": 60.0, "site": None}) == "all"
    assert certificate.p("site B", "cluster", 5.0) == 1 and certificate.p("site A", "cluster", 5.0) == 1 / 31
    found = certificate.content({}, {})
    assert found["people"] == 58 and found["smallest_p"] == 1 / 59
    rows = {"one": [{"kind": "cluster", "significant": "yes"}], "two": []}
    found = certificate.content(rows, {"one": "site B", "two": "site B"})
    assert found["groups"]["site B"]["expected"] == pytest.approx(2 / 26) and found["observed"]["cluster"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"error_rate": 1}, "error_rate is 1, but must be a number from"),
        ({"error_rate": 0.05, "correction": "none"}, "set --correction to family or discovery"),
        ({"error_rate": 0.05, "groups": ["sex"]}, "give a list of some of the prior's"),
    ],
)
def test_settings_that_make_no_sense_are_refused(coding, settings, message):
    with pytest.raises(ValueError, match=message):
        Certificate(coding, **settings)


def test_discoveries_are_those_of_benjamini_and_hochberg():
    assert discovery_level([0.01, 0.02, 0.03, 0.9], 0.05) == pytest.approx(0.05 * 3 / 4)
    assert discovery_level([0.2, 0.9], 0.05) == 0 and discovery_level([], 0.05) == 0


def test_clusters_have_mass_size_and_place():
    z = np.zeros((1, 8, 8, 8), np.float32)
    z[0, 1:3, 1:3, 1:3], z[0, 1, 1, 1], z[0, 6, 6, 6], z[0, 7, 0, 0] = 3.0, 4.0, -3.5, 9.0
    inside = np.ones(z.shape, bool)
    inside[0, 7, 0, 0] = False
    found, numbers = find_clusters(z, inside, np.diag([2.0, 2.0, 2.0, 1.0]))
    assert [(c["direction"], c["size_ml"]) for c in found] == [("brighter", 0.064), ("darker", 0.008)]
    assert found[0]["mass"] == pytest.approx(7 * 0.5 + 1.5) and found[1]["peak"] == 3.5
    assert [found[1][f"{axis}_mm"] for axis in "xyz"] == [12, 12, 12]
    assert (numbers == found[0]["label"]).sum() == 8 and not find_clusters(0 * z, inside, np.eye(4))[0]


@pytest.fixture(scope="module")
def people(cohort, tmp_path_factory):
    """Weights and a prior, 9 people for a calibration, 3 scans, one of which has a fault; an atlas."""
    folder = tmp_path_factory.mktemp("people")
    network = informative_network(cohort)
    one = nib.load(next(cohort.glob("*.nii.gz")))
    size = np.array(one.shape) * 8.0
    network.scan_grid.copy_(ScanGrid([(one.affine[:3, 3] + size / 2 - 4).tolist(), size.tolist()]).as_tensor())
    torch.save(network.state_dict(), folder / "model.pt")
    rows = [{"age": 40.0 + k, "sex": "FM"[k % 2], "site": "ABC"[k % 3]} for k in range(42)]
    kinds = {"age": "continuous", "sex": "categorical", "site": "categorical"}
    prior = prior_with_effects(network, CovariateCoding.learn(kinds, rows), size=0.1)
    prior.save(folder / "population_prior.pt", {"weights": fingerprint(network)})
    make_brains(folder / "healthy", 9, spacing=8.0, workers=1, covariates=True)
    make_brains(folder / "scans", 3, spacing=8.0, workers=1, covariates=True, seed=1)
    path = folder / "scans" / "sub-0002_FLAIR.nii.gz"
    scan = nib.load(path)
    values = scan.get_fdata()
    middle = tuple(slice(size // 2 - 4, size // 2 + 4) for size in values.shape)
    values[middle] = 0  # half of the brain is gone
    nib.save(nib.Nifti1Image(values.astype(np.float32), scan.affine), path)
    labels = np.zeros(values.shape, np.float32)
    labels[middle] = 1
    nib.save(nib.Nifti1Image(labels, scan.affine), folder / "atlas.nii.gz")
    return folder


def certified(people, output, *words):
    words = ("--dataset_dir", people / "scans", "--ckpt", people / "model.pt", "--draws", 4, *words)
    return run_bundle("--output_dir", output, *words, run_id="deviation", configs=INFERENCE)


def test_deviation_with_a_certificate_as_a_user_types_it(people, tmp_path):
    words = ("--error_rate", 0.1, "--calibration", people / "healthy", "--atlas", people / "atlas.nii.gz")
    done = certified(people, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "certificate.json").read_text(encoding="utf-8"))
    assert found["people"] == 9 and found["smallest_p"] == 0.1 and found["groups"]["all"]["scans"] == 3
    assert found["expected"] == pytest.approx(0.3)
    rows = list(csv.DictReader((tmp_path / "findings.csv").open(encoding="utf-8")))
    significant = {row["image"] for row in rows if row["significant"] == "yes"}
    assert "sub-0002_FLAIR.nii.gz" in significant  # others by chance
    assert found["groups"]["all"]["observed"] == len(significant)
    assert all((float(row["p"]) <= 0.1) == (row["significant"] == "yes") for row in rows)
    assert {row["kind"] for row in rows} == {"cluster", "region"}
    maps = {path.name[:8]: nib.load(path).get_fdata() for path in tmp_path.glob("*_significant.nii.gz")}
    assert len(maps) == 3
    clusters = {row["image"][:8] for row in rows if row["significant"] == "yes" and row["kind"] == "cluster"}
    assert {name for name, values in maps.items() if values.any()} == clusters
    assert np.abs(maps["sub-0002"]).max() == pytest.approx(1)  # -log10 of 0.1
    assert "certificate.csv" in (tmp_path / "report_deviation.html").read_text(encoding="utf-8")
    again = certified(people, tmp_path, *words)
    assert "Of 3 scans, 3 are finished already" in again.stderr and "Of 9 scans, 9 are" in again.stderr
    assert len(clusters) < 3  # of three scans Benjamini and Hochberg ask for 0.067 or less unless all are discoveries
    other = certified(people, tmp_path / "fdr", *words, "--correction", "discovery")
    assert other.returncode == 0, other.stderr
    assert json.loads((tmp_path / "fdr" / "certificate.json").read_text(encoding="utf-8"))["observed"]["cluster"] == 0
    assert not nib.load(tmp_path / "fdr" / "sub-0002_FLAIR_significant.nii.gz").get_fdata().any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--error_rate", 0.05), "needs --error_rate, such as 0.05, and --calibration"),
        (("--error_rate", 0.05, "--calibration", "healthy"), "of 9 people the smallest p is 0.1; for an error_rate of"),
        (("--error_rate", 0.1, "--calibration", "scans"), "is one of the scans, too: keep healthy people apart"),
    ],
)
def test_calibrations_that_say_nothing_are_refused(people, tmp_path, words, message):
    words = [people / word if word in ("healthy", "scans") else word for word in words]
    done = certified(people, tmp_path, *words)
    assert done.returncode == 1 and message in done.stderr
