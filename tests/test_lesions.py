"""How well anomaly maps find lesions: the numbers, and what `score` says of a cohort with masks."""

from __future__ import annotations

import csv
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import inference_config, run_bundle
from groups import run_bundle_group
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score, roc_auc_score

from scripts.data.transforms import unclipped
from scripts.inference.common import list_scans
from scripts.inference.detection import (
    average_precision,
    best,
    by_kind,
    detect,
    dice,
    interval,
    marked_bins,
    operating_points,
    roc_area,
    sentences,
    table,
    threshold_rows,
    threshold_table,
)
from scripts.inference.lesions import (
    BINS,
    DETECTORS,
    EDGES,
    GRIDS,
    LesionCounts,
    count_voxels,
    edges,
    ordered,
    with_masks,
)
from scripts.inference.masks import pair_masks, read_kinds
from scripts.phantoms import make_brains
from scripts.phantoms.images import KINDS

CONFIGS = ["configs/inference.json", "tests/tiny.json"]
PATTERNS = ("--scan_pattern", "*_FLAIR.nii.gz", "--mask_pattern", "*_lesions.nii.gz")
RNG = np.random.default_rng(0)
# 40 resampled cohorts instead of 1,000, of which each job takes ten seconds
FEWER = {f"scripts.inference.detection.{function}.__defaults__": (40,) for function in ("detect", "operating_points")}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    network = inference_config().get_parsed_content("network_def")
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module", autouse=True)
def fewer_cohorts():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEWER.items():
            patch.setattr(name, value)
        yield


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    """Eight phantoms at 8 mm, some with lesions of each kind."""
    folder = tmp_path_factory.mktemp("sick")
    make_brains(
        folder / "scans", 8, seed=5, spacing=8.0, lesions=0.7, lesion_kinds=KINDS, mask_dir=folder / "masks", workers=1
    )
    return folder


@pytest.fixture(scope="module")
def scored(sick, weights, tmp_path_factory):
    output = tmp_path_factory.mktemp("scored")
    return output, score(sick, output, weights)


def score(cohort, output, weights, *words, code=0):
    folders = ("--dataset_dir", cohort / "scans", "--mask_dir", cohort / "masks", "--output_dir", output)
    result = run_bundle(*folders, *PATTERNS, "--ckpt", weights, *words, run_id="score", configs=CONFIGS)
    assert result.returncode == code, result.stderr
    return result.stderr


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def image(path):
    return nib.load(path).get_fdata(dtype=np.float32)


# Numbers


def test_numbers_of_counts_are_those_of_scikit_learn():
    positive, negative = RNG.integers(0, 5, (3, 40)), RNG.integers(0, 50, (3, 40))
    precisions, areas = average_precision(positive, negative), roc_area(positive, negative)
    for row in range(3):
        values = np.repeat(np.tile(np.arange(40), 2), np.concatenate([positive[row], negative[row]]))
        labels = np.repeat([1, 0], [positive[row].sum(), negative[row].sum()])
        assert precisions[row] == pytest.approx(average_precision_score(labels, values))
        assert areas[row] == pytest.approx(roc_auc_score(labels, values))
    assert np.isnan(average_precision(np.zeros(4), np.ones(4)))
    assert np.isnan(roc_area(np.ones(4), np.zeros(4)))


def test_a_threshold_leaves_a_thousandth_of_healthy_voxels_above():
    healthy = np.array([5000, 4989, 8, 3])
    marked = marked_bins(healthy)
    assert marked.tolist() == [False, False, False, True]  # 11 of 10,000 would be too many
    assert marked_bins(np.zeros(4)).tolist() == [False] * 4
    assert dice(np.array([0, 0, 1, 2]), np.array([9, 9, 1, 1]), marked) == pytest.approx(2 * 2 / (3 + 3))


def lesion_scan(shape=(24, 24, 24), found=True):
    """An anomaly map, an intensity and, if `found`, a lesion: darker than expected, but of ordinary intensity."""
    intensity = RNG.uniform(0.1, 0.9, (1, *shape)).astype(np.float32)
    intensity[:, :4] = 0
    lesion = np.zeros((1, *shape), bool)
    lesion[:, 8:11, 8:12, 8:12] = found
    anomaly = RNG.normal(0, 1, (1, *shape)).astype(np.float32) - 2 * lesion
    return anomaly, intensity, lesion


def test_counts_rank_voxels_as_their_values_do():
    anomaly, intensity, lesion = lesion_scan()
    counts = count_voxels(anomaly, intensity, lesion)
    foreground = intensity > 0.05
    values = {"anomaly": anomaly, "intensity": intensity}
    sign = {"brighter": 1, "darker": -1, "either": 1}
    for number, (what, order) in enumerate(DETECTORS):
        ranked = sign[order] * (np.abs(values[what]) if order == "either" else values[what])[foreground]
        negative, positive = ordered(counts[what], order)
        assert positive.sum() == lesion.sum() and (negative + positive).sum() == foreground.sum()
        expected = average_precision_score(lesion[foreground], ranked)
        assert average_precision(positive, negative) == pytest.approx(expected, rel=0.02), (what, order)
        assert counts["scores"][number] == pytest.approx(np.percentile(ranked, 99.9))
        # bins lie between their edges
        between = np.sum(ranked >= sign[order] * edges(what, order)[-200])
        assert (negative + positive)[-200:].sum() == pytest.approx(between, abs=1)


def test_voxels_of_a_dark_lesion_count_where_the_scan_is_black():
    intensity, lesion = np.zeros((1, 4, 4, 4), np.float32), np.zeros((1, 4, 4, 4), bool)
    intensity[:, :2], lesion[:, 3, 3, 3] = 0.5, True
    counts = count_voxels(intensity - 1, intensity, lesion)
    assert counts["intensity"].sum(1).tolist() == [32, 1]
    empty = count_voxels(intensity, np.zeros_like(intensity), np.zeros_like(lesion))
    assert empty["anomaly"].sum() == 64  # a scan without foreground counts as a whole


def test_of_several_channels_the_largest_anomaly_and_the_mean_intensity_count():
    anomaly = np.stack([np.full((4, 4), -3.0), np.full((4, 4), 2.0)])
    intensity = np.stack([np.full((4, 4), 0.2), np.full((4, 4), 0.6)])
    counts = count_voxels(anomaly, intensity, np.zeros((1, 4, 4), bool))
    for what, value in (("anomaly", -3.0), ("intensity", 0.4)):
        assert np.flatnonzero(counts[what][0]).tolist() == [np.digitize(value, EDGES[what])]


def counted(name, found, intensity_finds=False):
    """A scan whose lesion, if `found`, the anomaly map finds, or the intensity."""
    anomaly, intensity, lesion = lesion_scan(found=found)
    if intensity_finds:
        anomaly[lesion], intensity[lesion] = 0, 1.5
    voxels = count_voxels(anomaly, intensity, lesion)
    scores, _ = voxels.pop("scores"), voxels.pop("lesions")
    return LesionCounts(
        name, "lesions" if found else "empty", dict.fromkeys(GRIDS, voxels), dict.fromkeys(GRIDS, scores)
    )


@pytest.mark.parametrize("intensity_finds", [False, True])
def test_the_better_tool_is_named(intensity_finds):
    scans = [counted(str(number), number < 6, intensity_finds) for number in range(12)]
    found = detect(scans, {"all": [True] * 12})
    assert [(d.grid, d.what, d.order) for d in found] == [(g, *detector) for g in GRIDS for detector in DETECTORS]
    again = detect(scans, {"all": [True] * 12})
    for one, two in zip(found, again, strict=True):
        for name, numbers in one.numbers.items():
            low, high = interval(numbers)
            assert low <= numbers[0] + 1e-9 and numbers[0] <= high + 1e-9
            np.testing.assert_array_equal(numbers, two.numbers[name])
    said = sentences(found)
    assert len(said) == 2
    if intensity_finds:
        assert "intensity alone finds lesions better than the anomaly map: use intensity. Average" in said[1]
        assert found[3].numbers["auroc"][0] == 1
    else:
        assert "the anomaly map finds lesions better than intensity alone. Average precision" in said[0]
        assert "(darker) against" in said[0]
    assert [(d.grid, d.what) for d in best(found)] == [(grid, what) for grid in GRIDS for what in EDGES]
    assert table(found).count("\n") == 2 + len(found)


def test_without_healthy_scans_there_is_no_threshold():
    found = detect([counted(str(number), True) for number in range(3)], {"all": [True] * 3}, repeats=20)
    for d in found:
        assert np.isnan(d.threshold) and np.isnan(d.numbers["dice"]).all() and np.isnan(d.numbers["auroc"]).all()
        assert d.numbers["average_precision"][0] > 0
    assert "| - | - | - |" in table(found)


def test_equal_numbers_are_not_told_apart():
    scans = [counted(str(number), number < 4) for number in range(8)]
    same = [
        scan._replace(voxels=dict.fromkeys(GRIDS, dict.fromkeys(EDGES, RNG.integers(1, 9, (2, BINS)))))
        for scan in scans
    ]
    (said, _) = sentences(detect(same, {"all": [True] * 8}))
    assert "but the interval of the difference includes 0" in said
    assert "The map does not tell scans with lesions from healthy ones" in said
    assert "Neither is of much use" not in said  # half of the voxels are in lesions


def test_scans_with_lesions_are_grouped_by_kind_each_with_the_healthy():
    scans = [counted("a", True)._replace(kind="dark"), counted("b", True), counted("c", False)._replace(kind="none")]
    assert by_kind(scans) == {"dark": [True, False, True], "all": [True] * 3}
    assert by_kind([scans[0], scans[2]]) == {"dark": [True, True]}
    assert by_kind(scans[1:]) == {"all": [True, True]}
    scans[1] = scans[1]._replace(kind="none")
    assert by_kind(scans) == {"dark": [True, False, True], "all": [True] * 3}
    scans[1] = scans[1]._replace(kind="dark; above 60")
    assert by_kind(scans) == {"above 60": [False, True, True], "dark": [True] * 3, "all": [True] * 3}


def test_kinds_are_found_by_what_the_scans_names_begin_with(tmp_path, caplog):
    scans = ["x/sub-1_ses-2_FLAIR.nii.gz", "x/sub-10_FLAIR.nii.gz", "x/sub-2.nii.gz"]
    assert read_kinds(tmp_path, scans) == dict.fromkeys(scans, "")
    (tmp_path / "kinds.csv").write_text("scan,kind\nsub-1,dark\nsub-1_ses-2,mass\nsub-2,none\n")
    assert list(read_kinds(tmp_path, scans).values()) == ["mass", "", "none"]
    (tmp_path / "kinds.csv").write_text("scan;kind\nsub-1;dark\n")
    assert list(read_kinds(tmp_path, scans).values()) == ["dark", "", ""] and not caplog.text
    (tmp_path / "kinds.csv").write_text("scan,kind\nsub-10_FLAIR.nii.gz,dark\nsub-7,mass\n")
    assert list(read_kinds(tmp_path, scans).values()) == ["", "dark", ""]
    assert "1 of 2 rows are of no scan, such as 'sub-7'" in caplog.text
    (tmp_path / "kinds.csv").write_text("Scan,Kind\nsub-1,dark\n")
    with pytest.raises(ValueError, match=r"kinds.csv' has no column 'scan': its first line"):
        read_kinds(tmp_path, scans)


def test_where_neither_finds_anything_that_is_said():
    scans = [counted(str(number), False) for number in range(8)]
    for scan in scans[:4]:  # ordinary voxels are said to be lesions
        for counts in scan.voxels["network"].values():
            counts[1, np.flatnonzero(counts[0])[::40]] += 1
    sick = [scan._replace(mask="lesions") for scan in scans[:4]]
    assert "Neither is of much use" in sentences(detect([*sick, *scans[4:]], {"all": [True] * 8}))[0]


def test_masks_that_no_voxel_is_in_are_said_to_show_nothing():
    scans = [counted(str(number), False) for number in range(3)]
    lost = [scan._replace(mask="lesions") for scan in scans[:1]] + scans[1:]
    assert "no voxel is in a lesion" in sentences(detect(lost, {"all": [True] * 3}, repeats=20))[0]


def test_intensity_on_the_networks_grid_is_its_input_before_it_is_clipped(sick):
    scans = list_scans(sick / "scans", "*_FLAIR.nii.gz")
    (item, *_) = pair_masks(scans, sick / "scans", "*_FLAIR.nii.gz", sick / "masks", "*_lesions.nii.gz")
    preprocessing = inference_config(spatial_shape=[12, 12, 12]).get_parsed_content("preprocessing")
    read = with_masks(unclipped(preprocessing))(item)
    scan, clipped = (image["image"].as_tensor() for image in (read, preprocessing(item)))
    torch.testing.assert_close(scan.clamp(-1, 1), clipped, rtol=0, atol=1e-5)
    assert scan.max() > 1.01
    assert read["lesion_fitted"].any() and read["lesion_fitted"].shape == (1, 12, 12, 12)


def counted_scans(rng, count=40) -> tuple[list[LesionCounts], list[tuple]]:
    """Healthy scans and scans with a small lesion and a large one, the latter brighter; and the voxels themselves."""
    scans, voxels = [], []
    for number in range(count):
        sick = number % 2 == 1
        anomaly = rng.normal(0, 1, (1, 20, 20, 20)).astype(np.float32)
        lesion = np.zeros((1, 20, 20, 20), bool)
        if sick:
            lesion[:, 2:4, 2:4, 2:4] = lesion[:, 10:15, 10:15, 10:15] = True
            anomaly[:, 10:15, 10:15, 10:15] += 4
        found = count_voxels(anomaly, np.ones_like(anomaly), lesion, voxel_ml=0.1)
        scores, lesions = {"network": found.pop("scores")}, {"network": found.pop("lesions")}
        mask = "lesions" if sick else "empty"
        scans.append(LesionCounts(str(number), mask, {"network": found}, scores, lesions=lesions))
        voxels.append((anomaly, lesion, sick))
    return scans, voxels


def test_dice_precision_and_recall_are_at_a_threshold_that_healthy_scans_fix():
    scans, voxels = counted_scans(np.random.default_rng(3))
    groups = by_kind(scans)
    detections = [d for d in detect(scans, groups, 50) if (d.what, d.order) == ("anomaly", "brighter")]
    points = operating_points(scans, groups, detections, 50)
    assert [(point.rate, point.allowed) for point in points] == [(0.005, 0), (0.01, 0), (0.05, 1)]
    healthy = sorted(float(anomaly.max()) for anomaly, _, sick in voxels if not sick)
    for point in points:
        # the largest value that is not allowed lies below, the next one above
        assert healthy[-1 - point.allowed] == pytest.approx(point.threshold, rel=0.01)
        marked = np.concatenate([(anomaly > point.threshold).ravel() for anomaly, _, sick in voxels if sick])
        truth = np.concatenate([lesion.ravel() for _, lesion, sick in voxels if sick])
        expected = precision_score(truth, marked), recall_score(truth, marked), f1_score(truth, marked)
        found = [point.numbers[name][0] for name in ("precision", "recall", "dice")]
        assert found == pytest.approx(expected, rel=0.02)
        assert point.lesions == {"below 1 ml": 20, "1 to 10 ml": 0, "above 10 ml": 20}
        assert point.numbers["above 10 ml"][0] == 1 and point.numbers["below 1 ml"][0] < 0.2
        assert np.isnan(point.numbers["1 to 10 ml"][0])
    columns, rows = threshold_rows(points)
    assert len(rows) == 3 and all(len(row) == len(columns) for row in rows)
    assert "| 5.0%: 1 of 20 |" in threshold_table(points)


def test_a_lesion_is_known_by_its_most_suspicious_voxel():
    anomaly, intensity, lesion = lesion_scan()
    lesion[:, 20, 20, 20] = True
    anomaly[:, 20, 20, 20] = 7.5
    (first, *bins), (second, *others) = count_voxels(anomaly, intensity, lesion, voxel_ml=0.5)["lesions"]
    assert (first, second) == (3 * 4 * 4 * 0.5, 0.5)
    counts = count_voxels(anomaly, intensity, lesion)
    for place, (what, order) in enumerate(DETECTORS):
        of_lesions = ordered(counts[what][1], order)
        assert max(bins[place], others[place]) == np.flatnonzero(of_lesions).max()
    assert others[0] == np.digitize(7.5, EDGES["anomaly"])


def test_without_healthy_scans_no_threshold_is_fixed():
    scans = [scan for scan in counted_scans(np.random.default_rng(3), 6)[0] if scan.mask == "lesions"]
    assert operating_points(scans, by_kind(scans), detect(scans, by_kind(scans), 10), 10) == []


# The job


def test_score_says_how_well_lesions_are_found_on_both_grids(sick, scored):
    output, log = scored
    rows = rows_of(output / "lesions.csv")
    assert len(rows) == 8 * len(GRIDS) * len(DETECTORS)
    masks = {row["image"]: row["mask"] for row in rows}
    kinds = {f"{row['scan']}_FLAIR.nii.gz": row["kind"] for row in rows_of(sick / "masks" / "kinds.csv")}
    assert {name: kind == "none" for name, kind in kinds.items()} == {n: m == "empty" for n, m in masks.items()}
    assert 0 < list(kinds.values()).count("none") < 8
    assert {row["image"]: row["kind"] for row in rows} == kinds
    summary = (output / "lesions.md").read_text()
    fixed = rows_of(output / "lesions_thresholds.csv")
    for kind in set(kinds.values()) - {"none"}:
        assert summary.count(f"\n| {kind} (") == len(GRIDS) * len(DETECTORS)
        assert len([row for row in fixed if row["lesions"] == kind]) == 3 * len(GRIDS) * 2
    assert {row["healthy"] for row in fixed} == {str(list(kinds.values()).count("none"))}
    assert summary.count("\n| all (") == len(GRIDS) * len(DETECTORS)
    sentence = next(line for line in summary.splitlines() if line.startswith("all, on the scans' own grid: "))
    assert f"Lesions: {sentence}" in log
    numbers = {row["image"]: float(row["anomaly_score"]) for row in rows_of(output / "scores.csv")}
    own = {
        r["image"]: float(r["score"]) for r in rows if (r["grid"], r["map"], r["order"]) == ("network", *DETECTORS[0])
    }
    assert own == pytest.approx(numbers, rel=1e-4)


def test_on_the_scans_own_grid_the_map_is_taken_as_it_is_saved(sick, scored):
    rows = rows_of(scored[0] / "lesions.csv")
    checked = 0
    for row in rows:
        if row["grid"] != "scan" or row["mask"] != "lesions":
            continue
        name = row["image"].removesuffix("_FLAIR.nii.gz")
        mask = image(sick / "masks" / f"{name}_lesions.nii.gz") > 0
        scan, anomaly = image(sick / "scans" / row["image"]), image(scored[0] / f"{name}_FLAIR_anomaly.nii.gz")
        values = anomaly if row["map"] == "anomaly" else scan
        values = {"brighter": values, "darker": -values, "either": np.abs(values)}[row["order"]]
        brain = scan > 0.05 * scan.max()
        assert int(row["lesion_voxels"]) == mask.sum()
        assert int(row["voxels"]) == pytest.approx(brain.sum(), rel=0.03)
        expected = average_precision_score(mask[brain], values[brain])
        assert float(row["average_precision"]) == pytest.approx(expected, rel=0.1, abs=0.01)
        checked += 1
    assert checked >= 5


def test_a_changed_mask_is_measured_again_and_other_masks_are_not_mixed(sick, weights, tmp_path):
    shutil.copytree(sick, tmp_path / "sick")
    output = tmp_path / "scored"
    score(tmp_path / "sick", output, weights)
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*_lesions.npz")}
    mask = tmp_path / "sick" / "masks" / "sub-0003_lesions.nii.gz"
    found = nib.load(mask)
    full = np.zeros(found.shape, np.uint8)
    full[10:14, 10:14, 10:14] = 1
    nib.save(nib.Nifti1Image(full, found.affine), mask)
    score(tmp_path / "sick", output, weights)
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("*_lesions.npz")}
    assert [name for name in after if after[name] != before[name]] == ["sub-0003_FLAIR_lesions.npz"]
    own = [row for row in rows_of(output / "lesions.csv") if row["image"] == "sub-0003_FLAIR.nii.gz"]
    assert {row["lesion_voxels"] for row in own if row["grid"] == "scan"} == {"64"}
    shutil.copytree(sick / "masks", tmp_path / "others")
    log = score(tmp_path / "sick", output, weights, "--mask_dir", tmp_path / "others", code=1)
    assert "made with another mask_dir" in log


def test_a_scan_without_a_mask_is_left_out_unless_it_is_said_to_be_healthy(sick, weights, tmp_path):
    shutil.copytree(sick, tmp_path / "sick")
    (tmp_path / "sick" / "masks" / "sub-0002_lesions.nii.gz").unlink()
    (tmp_path / "sick" / "masks" / "sub-0005_lesions.nii.gz").write_text("no mask")
    log = score(tmp_path / "sick", tmp_path / "a", weights, code=1)
    assert "1 scan(s) have no mask, such as 'sub-0002_FLAIR.nii.gz': they are left out" in log
    assert "sub-0005_lesions.nii.gz" in (tmp_path / "a" / "failed.csv").read_text()
    names = {row["image"][:8] for row in rows_of(tmp_path / "a" / "lesions.csv")}
    assert names == {f"sub-000{number}" for number in (1, 3, 4, 6, 7, 8)}
    assert not (tmp_path / "a" / "most_unusual.png").exists()
    log = score(tmp_path / "sick", tmp_path / "a", weights, "--unmasked_healthy", True, code=1)
    assert "they count as healthy" in log
    assert {row["mask"] for row in rows_of(tmp_path / "a" / "lesions.csv")} == {"none", "empty", "lesions"}


def test_two_processes_say_the_same_of_lesions(sick, weights, scored, tmp_path):
    folders = ("--dataset_dir", sick / "scans", "--mask_dir", sick / "masks", "--output_dir", tmp_path)
    configs = [*CONFIGS, "configs/multi_gpu_inference.json"]
    words = (*folders, *PATTERNS, "--ckpt", weights)
    for result in run_bundle_group(*words, run_id="score", configs=configs, patches=FEWER):
        assert result.returncode == 0, result.stderr
    one, two = (rows_of(folder / "lesions.csv") for folder in (scored[0], tmp_path))
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        for name, value in first.items():
            number = name in ("average_precision", "dice", "score") and value
            assert (float(second[name]) == pytest.approx(float(value), rel=0.02)) if number else second[name] == value


def test_without_masks_there_is_a_sheet_of_the_most_unusual_scans_alone(cohort, weights, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "scripts.utils.figures.anomalies", lambda path, scans, titles: shown.append((titles, list(scans)))
    )
    monkeypatch.setattr("scripts.inference.scoring.MOST_UNUSUAL", 5)
    words = ("--dataset_dir", cohort, "--output_dir", tmp_path, "--ckpt", weights, "--figures", True)
    result = run_bundle(*words, run_id="score", configs=CONFIGS)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("*lesions*"))
    scores = {row["image"]: float(row["anomaly_score"]) for row in rows_of(tmp_path / "scores.csv")}
    (titles, pictures), highest = shown[0], sorted(scores, key=scores.get, reverse=True)[:5]
    assert titles == [[f"{name}, score {scores[name]:.1f}"] for name in highest]  # one for each channel
    for name, (scan, anomaly) in zip(highest, pictures, strict=True):
        np.testing.assert_array_equal(scan[0], image(cohort / name))
        np.testing.assert_allclose(anomaly[0], image(tmp_path / name.replace(".nii", "_anomaly.nii")))
