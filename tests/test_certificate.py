"""Deviations with a guarantee: p values by healthy people kept apart, and what a certificate says of them."""

from __future__ import annotations

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import inference_config, informative_network, run_bundle
from groups import run_bundle_group
from scipy import stats
from test_covariates import prior_with_effects

from scripts.data.covariates import CovariateCoding
from scripts.data.datalist import write_datalist
from scripts.data.scan_grid import ScanGrid
from scripts.inference.certificate import Certificate, discovery_level
from scripts.inference.certified import find_clusters, people_to_calibrate
from scripts.inference.common import Cohort
from scripts.inference.training_run import TrainedScans
from scripts.phantoms import make_brains
from scripts.population.files import save_prior
from scripts.population.prior import fingerprint
from scripts.webpage.jobs import Jobs

INFERENCE = ["configs/inference.json", "tests/tiny.json"]
BY_TWO = [*INFERENCE, "configs/multi_gpu_inference.json"]
ROWS = [{"age": 40.0 + k, "site": "AB"[k % 2]} for k in range(42)]


@pytest.fixture(scope="module")
def coding() -> CovariateCoding:
    return CovariateCoding.learn({"age": "continuous", "site": "categorical"}, ROWS)


def calibrated(coding, people, rate=0.05, **settings) -> Certificate:
    """With people whose largest cluster is given, all of site A unless it is said."""
    certificate = Certificate(coding, rate, **settings)
    certificate.take(
        [
            {"largest": {"cluster": size, "peak": size}, "covariates": {"age": 60.0, "site": (site or ["A"])[0]}}
            for size, *site in people
        ]
    )
    return certificate


def test_p_is_the_share_of_people_with_as_large_a_finding(coding):
    certificate = calibrated(coding, [(float(size),) for size in range(99)])
    group = certificate.group({"age": 60.0, "site": "A"})
    assert certificate.p(group, "cluster", 1000.0) == 0.01  # with 99 people nothing is below
    assert certificate.p(group, "cluster", 98.0) == 0.02
    assert certificate.p(group, "cluster", 0.0) == 1
    assert certificate.members[group] == certificate.members["all"]


def test_of_healthy_people_no_more_are_flagged_than_promised(coding):
    rng = np.random.default_rng(0)
    flagged = []
    for _ in range(40):
        certificate = calibrated(coding, [(float(size),) for size in rng.lognormal(size=39)], rate=0.1)
        group = certificate.group({"age": 60.0, "site": "A"})
        flagged += [certificate.p(group, "cluster", size) <= 0.1 for size in rng.lognormal(size=50)]
    assert 0.07 < np.mean(flagged) <= 0.115  # of 40 calibrations, whose shares have a standard deviation of 0.045


def test_people_are_compared_with_their_like_where_there_are_enough(coding):
    people = [(1.0, "A")] * 30 + [(9.0, "B")] * 25 + [(5.0, None)] * 3
    certificate = calibrated(coding, people)
    assert certificate.group({"age": 60.0, "site": "A"}) == "site A, age 54.35 to 66.65"
    assert certificate.group({"age": 50.0, "site": "B"}) == "site B"  # of that age there are none
    assert certificate.group({"age": 60.0, "site": None}) == "all"
    assert certificate.p("site B", "cluster", 5.0) == 1 and certificate.p("site A", "cluster", 5.0) == 1 / 31
    found = certificate.content({})
    assert found["people"] == 58 and found["smallest_p"] == 1 / 59
    rows = {name: {"group": "site B", "smallest_p": 1 / 26, "findings": []} for name in ("one", "two")}
    rows["one"]["findings"] = [{"kind": "cluster", "significant": "yes"}]
    found = certificate.content(rows)
    assert found["groups"]["site B"]["expected"] == pytest.approx(2 / 26) and found["observed"]["cluster"] == 1


def ages(rng, count, older):
    """Years from 40 to 80, of whom the density rises or falls by the age in a straight line; and findings that do."""
    share = np.sqrt(rng.uniform(size=count))
    years = 40 + 40 * (share if older else 1 - share)
    return years, rng.exponential(size=count) * np.exp((years - 60) / 20)


def test_weights_make_up_for_other_ages(coding):
    """Densities (a - 40) and (80 - a), so that the true weight of an age is (a - 40) / (80 - a)."""
    rng, found = np.random.default_rng(0), {True: [], False: []}
    for _ in range(10):
        people = [
            {"largest": {"cluster": size}, "covariates": {"age": age, "site": "A"}}
            for age, size in zip(*ages(rng, 1500, older=False), strict=True)
        ]
        years, sizes = ages(rng, 200, older=True)
        scans = [{"age": age, "site": "A"} for age in years]
        for weighted, ps in found.items():
            certificate = Certificate(coding, 0.05, groups=None if weighted else [], weighted=weighted)
            certificate.take(people, scans)
            ps += [
                certificate.p("all", "cluster", size, certificate.weight(scan))
                for size, scan in zip(sizes, scans, strict=True)
            ]
        weights = np.array([certificate.weight(scan) for scan in scans])
    assert found[False] and stats.kstest(found[False], "uniform").statistic > 0.15
    assert stats.kstest(found[True], "uniform").statistic < 0.05
    assert np.mean(np.array(found[False]) <= 0.05) > 0.1 and np.mean(np.array(found[True]) <= 0.05) < 0.065
    assert (weights == 1).all()  # the last is without
    certificate = Certificate(coding, 0.05, weighted=True)
    certificate.take(people, scans)
    middle = (years > 45) & (years < 75)
    weights = np.array([certificate.weight(scan) for scan in scans])[middle]
    np.testing.assert_allclose(np.log(weights), np.log((years - 40) / (80 - years))[middle], atol=0.6)
    assert 100 < certificate.effective < 1000  # of 1500
    said = certificate.content({})
    assert said["effective_people"] == certificate.effective and "is approximate" in said["guarantee"]


def test_weights_that_a_calibration_cannot_carry_are_refused(coding):
    rng = np.random.default_rng(0)

    def people(low, high):
        return [{"age": age, "site": "A"} for age in rng.uniform(low, high, 100)]

    young = [{"largest": {"cluster": 1.0}, "covariates": person} for person in people(40, 55)]
    certificate = Certificate(coding, 0.05, weighted=True)
    with pytest.raises(ValueError, match=r"covariates of the scans are too rare among the 100 people .* Add people"):
        certificate.take(young, people(65, 80))
    with pytest.raises(ValueError, match="of 10 scans or more; there are 3"):
        certificate.take(young, people(40, 55)[:3])
    certificate.take(young, people(40, 55))
    assert certificate.effective > 80 and certificate.p("all", "cluster", 1.0, 1.0) == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"error_rate": 1}, "error_rate is 1, but must be a number from"),
        ({"error_rate": 0.05, "correction": "none"}, "set --correction to family or discovery"),
        ({"error_rate": 0.05, "groups": ["sex"]}, "give a list of some of the prior's"),
        ({"error_rate": 0.05, "weighted": True, "correction": "discovery"}, "goes with --correction family alone"),
    ],
)
def test_settings_that_make_no_sense_are_refused(coding, settings, message):
    with pytest.raises(ValueError, match=message):
        Certificate(coding, **settings)


def test_discoveries_are_those_of_benjamini_and_hochberg():
    assert discovery_level([0.01, 0.02, 0.03, 0.9], 0.05) == pytest.approx(0.05 * 3 / 4)
    assert discovery_level([0.2, 0.9], 0.05) == 0 and discovery_level([], 0.05) == 0
    for least, scans in ((20, 43), (100, 29)):  # all at the limit, which rounding puts below them
        assert 1 / least <= discovery_level([1 / least] * scans, 1 / least) == pytest.approx(1 / least)


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
    save_prior(prior, folder / "population_prior.pt", {"weights": fingerprint(network)})
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


def certified(people, output, *words, start=run_bundle, configs=INFERENCE):
    words = ("--dataset_dir", people / "scans", "--ckpt", people / "model.pt", "--draws", 4, *words)
    return start("--output_dir", output, *words, run_id="deviation", configs=configs)


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
    page = (tmp_path / "report_deviation.html").read_text(encoding="utf-8")
    assert "certificate.csv" in page and f"{found['guarantee']} deviation_score" in page
    again = certified(people, tmp_path, *words)
    assert "Of 3 scans, 3 are finished already" in again.stderr and "Of 9 scans, 9 are" in again.stderr
    assert len(clusters) < 3  # of three scans Benjamini and Hochberg ask for 0.067 or less unless all are discoveries
    # the page judges by the same draws and regions
    config = {"ckpt": people / "model.pt", "dataset_dir": people / "scans", "atlas": people / "atlas.nii.gz"}
    config = {name: str(path) for name, path in (config | {"calibration": tmp_path / "calibration.json"}).items()}
    with torch.no_grad():
        *_, shown = Jobs(inference_config(**config, error_rate=0.1, draws=4)).deviation(2)
    assert {found["kind"] for found in shown.content["certificate"]["findings"]} == {"cluster", "region"}
    other = certified(people, tmp_path / "fdr", *words, "--correction", "discovery")
    assert other.returncode == 0, other.stderr
    assert json.loads((tmp_path / "fdr" / "certificate.json").read_text(encoding="utf-8"))["observed"]["cluster"] == 0
    assert not nib.load(tmp_path / "fdr" / "sub-0002_FLAIR_significant.nii.gz").get_fdata().any()
    shutil.copy(tmp_path / "fdr" / "calibration.json", tmp_path)
    words = [tmp_path / "calibration.json" if word == people / "healthy" else word for word in words]
    one = certified(people, tmp_path / "fdr", *words, "--correction", "discovery", "--scan_pattern", "sub-0002*")
    # alone it is a discovery, which its map of before does not show
    assert "p up to 0, now 0.1): maps of before may lack clusters" in one.stderr


def test_a_group_calibrates_once(people, tmp_path):
    words = ("--error_rate", 0.1, "--calibration", people / "healthy")
    for one in certified(people, tmp_path / "first", *words, start=run_bundle_group, configs=BY_TWO):
        assert one.returncode == 0, one.stderr
    file = tmp_path / "first" / "calibration.json"
    text = file.read_text(encoding="utf-8")
    assert len(json.loads(text)["people"]) == 9 and ".nii" not in text and "sub-" not in text
    second = certified(people, tmp_path / "second", "--error_rate", 0.1, "--calibration", file)
    assert second.returncode == 0, second.stderr
    names = ("certificate.json", "findings.csv")
    assert all((tmp_path / "first" / n).read_bytes() == (tmp_path / "second" / n).read_bytes() for n in names)
    assert not (tmp_path / "second" / "calibration").exists()
    for change, message in (
        (("--draws", 5), "was made with another draws than these scans are judged with"),
        (("--atlas", people / "atlas.nii.gz"), "was made with another atlas"),
        (("--percentiles", "[1,99]"), "was made with another percentiles"),
    ):
        done = certified(people, tmp_path / "other", "--error_rate", 0.1, "--calibration", file, *change)
        assert done.returncode == 1 and message in done.stderr, done.stderr
    for words, changed in (
        (("--error_rate", 0.2, "--calibration", file), "error_rate"),
        ((), "error_rate, correction, calibration_people"),
    ):
        done = certified(people, tmp_path / "second", *words)
        assert done.returncode == 1 and f"of 'deviation' made with another {changed}:" in done.stderr, done.stderr
    done = certified(people, tmp_path / "second", "--overwrite", True)
    assert done.returncode == 0, done.stderr
    left = [path.name for path in (tmp_path / "second").iterdir()]
    assert not [name for name in left if any(word in name for word in ("certificate", "findings", "significant"))]
    file.write_text(text.replace('"cluster"', '"clusters"'), encoding="utf-8")
    done = certified(people, tmp_path / "other", "--error_rate", 0.1, "--calibration", file)
    assert done.returncode == 1 and "is damaged, or of another version" in done.stderr
    assert not (tmp_path / "other").exists()


def cohort_of(folder, *subjects) -> Cohort:
    return Cohort(folder, items=[{"image": str(folder / s), "subject": s[:6]} for s in subjects])


def test_people_who_would_spoil_a_calibration(tmp_path, caplog):
    """Copies of a scan that is judged, people who were trained on; a person's scans count once."""
    names = ("sub-01_ses-1.nii", "sub-01_ses-2.nii", "sub-02.nii", "sub-03.nii")
    for folder, number in (("healthy", 0), ("scans", 9)):
        (tmp_path / folder).mkdir()
        for place, name in enumerate(names):
            (tmp_path / folder / name).write_bytes(bytes([place + number] * 5))
    given, healthy = cohort_of(tmp_path / "scans", names[0]), cohort_of(tmp_path / "healthy", *names)
    found = people_to_calibrate(healthy, given, 0)
    assert [item["subject"] for item in found] == ["sub-01", "sub-02", "sub-03"]
    assert "calibration: 4 scans are of 3 people" in caplog.text
    assert "1 people of the calibration are called as people of the scans are, such as 'sub-01'" in caplog.text
    for name in (names[0], names[2]):
        write_datalist(
            {"training": [{"image": str(tmp_path / "healthy" / name), "subject": name[:6]}]}, tmp_path / "l.json"
        )
        given.training_run = TrainedScans(tmp_path / "l.json")
        with pytest.raises(ValueError, match=f"'{tmp_path}/healthy/{name}' is of a person who was trained on"):
            people_to_calibrate(healthy, given, 0)
    shutil.copy(tmp_path / "scans" / names[0], tmp_path / "healthy" / names[3])
    with pytest.raises(ValueError, match=r"sub-03\.nii' is one of the scans, too"):
        people_to_calibrate(healthy, cohort_of(tmp_path / "scans", names[0]), 0)


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
