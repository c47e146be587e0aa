"""Whether scans are fitted to one box of the world or each to its own: decided once, stored, the same ever after."""

from __future__ import annotations

import csv
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import brain, inference_config, run_bundle, save
from monai.data import MetaTensor
from monai.transforms import Orientationd
from scipy.stats import median_abs_deviation, norm

from scripts.check import check
from scripts.data.cache import read_cohort
from scripts.data.check_report import summary
from scripts.data.geometry import fill_outside, foreground_place
from scripts.data.scan_grid import (
    Fit,
    ScanGrid,
    _Scan,
    choose_grid,
    field_of_view_differences,
    find_alignment,
    place_differences,
    to_scan,
)
from scripts.data.transforms import CheckScand, FitShape, FitShaped, LoadScand, RobustScaled, ScanError
from scripts.networks import VDVAE
from scripts.training.start import stored_grid

READING = [LoadScand("image"), CheckScand("image"), Orientationd("image", axcodes="RAS", labels=None)]
INFERENCE = ["configs/inference.json", "tests/tiny.json"]
EVALUATE = ["configs/train.json", "tests/tiny.json", "tests/quick_start.json", "configs/evaluate.json"]


def rebox(path, target, before=(0, 0, 0), after=(0, 0, 0), moved=(0, 0, 0)):
    """Write a scan with background added (or, below 0, cut off) in front of and behind each axis.

    Its voxels stay where they are in the world, but for ``moved`` millimetres.
    """
    image = nib.load(path)
    array = np.asarray(image.dataobj, np.float32)
    array = np.pad(array, [(max(b, 0), max(a, 0)) for b, a in zip(before, after, strict=True)])
    array = array[tuple(slice(max(-b, 0), min(a, 0) or None) for b, a in zip(before, after, strict=True))]
    affine = image.affine.copy()
    affine[:3, 3] += np.array(moved) - affine[:3, :3] @ np.array(before)
    target.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine, dtype=np.float32), target)


BOXES = {  # what is done to a scan's box, and none of it to its brain
    "whole": {},
    "cut": {"before": (0, -3, 0), "after": (-2, -2, -2)},
    "padded": {"before": (4, 7, 0), "after": (1, 0, 9)},
    "shifted": {"before": (-1, -3, 0), "after": (1, 3, 0)},
}


@pytest.fixture(scope="session")
def boxes(cohort, tmp_path_factory):
    """One phantom in boxes of its own."""
    folder = tmp_path_factory.mktemp("boxes")
    for name, change in BOXES.items():
        rebox(sorted(cohort.glob("*.nii.gz"))[0], folder / f"{name}.nii.gz", **change)
    return folder


def scattered(cohort, folder, centimetres=3):
    """The same heads, each put elsewhere in the world, as scanners do."""
    for path in sorted(cohort.glob("*.nii.gz")):
        moved = np.random.default_rng(len(list(folder.glob("*")))).normal(0, 10 * centimetres, 3)
        rebox(path, folder / path.name, moved=moved)
    return folder


def choose(folder, scan_grid="auto", **arguments):
    items = [{"image": str(path)} for path in sorted(folder.glob("*.nii.gz"))]
    return choose_grid(scan_grid, items, READING, **arguments)


def train(dataset_dir, output, *words):
    words = ("--dataset_dir", dataset_dir, "--output_dir", output, "--epochs", 1, *words)
    result = run_bundle(*words)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.fixture(scope="session")
def trained(cohort, tmp_path_factory):
    """A run on an aligned cohort, and what it printed."""
    output = tmp_path_factory.mktemp("aligned")
    return output, train(cohort, output)


@pytest.fixture(scope="session")
def centred(cohort, tmp_path_factory):
    """A run on a cohort that is not aligned, its scans, and what it printed."""
    folder = tmp_path_factory.mktemp("unaligned")
    scattered(cohort, folder / "scans")
    return folder, train(folder / "scans", folder / "run")


def weights(output):
    return output / "checkpoints" / "model.pt"


def run(word, scans, output, ckpt, *words):
    words = ("--dataset_dir", scans, "--output_dir", output, "--ckpt", ckpt, *words)
    result = run_bundle(*words, run_id=word, configs=INFERENCE)
    assert result.returncode == 0, result.stderr
    return result.stderr


# What the box of a file does to the network's input


def fitted(path, grid, **settings):
    steps = inference_config(grid=grid, spatial_shape=[16, 16, 16], **settings).get_parsed_content("preprocessing")
    return steps({"image": str(path)})["image"]


@pytest.mark.parametrize("keep_aspect", [True, False])
def test_in_one_box_the_file_around_a_brain_changes_nothing(boxes, cohort, keep_aspect):
    grid = choose(cohort)
    whole, *others = (fitted(boxes / f"{name}.nii.gz", grid, keep_aspect=keep_aspect) for name in BOXES)
    for other in others:
        assert torch.equal(other.affine, whole.affine)
        assert (other - whole).abs().max() < 1e-4  # of a range of 2
    in_its_own = [fitted(boxes / f"{name}.nii.gz", ScanGrid(), keep_aspect=keep_aspect) for name in BOXES]
    assert min(float((image - in_its_own[0]).abs().max()) for image in in_its_own[1:]) > 0.2


def test_files_of_one_box_give_the_same_voxels_either_way(cohort):
    grid = choose(cohort)
    assert grid.box is not None
    for path in sorted(cohort.glob("*.nii.gz"))[:3]:
        one, other = fitted(path, grid), fitted(path, ScanGrid())
        assert torch.equal(one.as_tensor(), other.as_tensor())
        assert torch.equal(one.affine, other.affine)


def test_a_box_of_the_world_in_another_order_of_axes():
    """The box is along the axes of the world, whatever the order in which a scan's are stored."""
    image = MetaTensor(torch.rand(1, 6, 8, 10), affine=torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0])))
    box = [[5.0, 4.0, 3.0], [16.0, 8.0, 12.0]]
    upright = FitShape((8, 8, 8), keep_aspect=False, box=box)(image)
    turned = MetaTensor(image.as_tensor().permute(0, 3, 1, 2), affine=image.affine[:, [2, 0, 1, 3]])
    assert torch.allclose(FitShape((8, 8, 8), keep_aspect=False, box=box)(turned).permute(0, 2, 3, 1), upright)


def test_in_2d(tmp_path):
    whole = MetaTensor(brain(16).as_tensor()[..., 8])
    cut = MetaTensor(whole.as_tensor()[:, 1:, 1:-1], affine=torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 1]]))
    grid = ScanGrid.from_tensor(ScanGrid([[7.5, 7.5], [16.0, 16.0]], None, [16.0, 16.0]).as_tensor())
    results = [FitShape((8, 8), box=grid.box)(image) for image in (whole, cut)]
    assert torch.allclose(*(result.as_tensor() for result in results), atol=1e-6)
    assert results[0].shape == (1, 8, 8)
    assert field_of_view_differences(grid._replace(box=None), {"field_of_view": [16.0, 16.0], "spacing": [1, 1]}) == []


# What lies outside of the box


def test_what_the_grid_does_not_reach_is_background_in_results():
    image = MetaTensor(torch.cat([brain(16).as_tensor() + 3, 100 * brain(16).as_tensor() - 7]))
    fitted = FitShaped("image", 8, box=[[5.5, 7.5, 7.5], [8.0, 8.0, 8.0]])({"image": image})
    fitted = RobustScaled("image", 0, 100)(fitted)["image"]
    back = to_scan(fitted, Fit.of(fitted), "intensity")
    assert back.shape == image.shape
    inside = torch.zeros(16, 16, 16, dtype=torch.bool)
    inside[2:10, 4:12, 4:12] = True
    for channel, background in zip(back.as_tensor(), (3, -7), strict=True):
        assert (channel[~inside] == background).all()
        assert (channel[inside] > background).float().mean() > 0.8


def test_fill_outside_with_oblique_axes():
    angle = np.radians(30)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    image = fill_outside(MetaTensor(torch.ones(1, 9, 9, 9), affine=affine), np.eye(4), (4, 4, 4), [5.0])
    world = np.argwhere(np.ones((9, 9, 9))) @ affine[:3, :3].T
    inside = ((world > -0.5) & (world < 3.5)).all(1).reshape(9, 9, 9)
    assert np.array_equal(image[0].numpy() == 1, inside)
    assert 0 < inside.sum() < 9**3


def test_results_lie_on_each_files_own_grid_and_in_the_same_place(boxes, trained, tmp_path):
    run("reconstruct", boxes, tmp_path / "recon", weights(trained[0]))
    run("encode", boxes, tmp_path / "latents", weights(trained[0]))
    run("decode", tmp_path / "latents", tmp_path / "decoded", weights(trained[0]))
    rows = {}
    for name in BOXES:  # in folders of their own, since the noise follows from a scan's path in its folder
        (tmp_path / name).mkdir()
        shutil.copy(boxes / f"{name}.nii.gz", tmp_path / name / "scan.nii.gz")
        run("score", tmp_path / name, tmp_path / "score" / name, weights(trained[0]))
        (tmp_path / "score" / name / "scan_anomaly.nii.gz").rename(tmp_path / "score" / f"{name}_anomaly.nii.gz")
        with (tmp_path / "score" / name / "scores.csv").open() as file:
            (rows[name],) = csv.DictReader(file)
    values = {}
    for name in BOXES:
        scan = nib.load(boxes / f"{name}.nii.gz")
        results = {key: nib.load(tmp_path / folder / f"{name}_{key}.nii.gz") for folder, key in RESULTS}
        for result in results.values():
            assert result.shape == scan.shape
            assert np.allclose(result.affine, scan.affine, atol=1e-4)
        # the same place in the world: one voxel of the whole scan's brain
        voxel = np.round(np.linalg.inv(scan.affine) @ [-2, -22, 8, 1]).astype(int)[:3]
        values[name] = [float(result.get_fdata()[tuple(voxel)]) for result in results.values()]
        decoded = nib.load(tmp_path / "decoded" / f"{name}_recon.nii.gz").get_fdata()
        assert np.allclose(decoded, results["recon"].get_fdata(), atol=1e-4 * decoded.max())
    for name in BOXES:
        assert np.allclose(values[name], values["whole"], rtol=1e-3, atol=1e-3)
    # far from the brain and outside of the box there is nothing
    padded = nib.load(boxes / "padded.nii.gz").get_fdata()
    for folder, key in RESULTS:
        result = nib.load(tmp_path / folder / f"padded_{key}.nii.gz").get_fdata()
        assert result[:, 0].max() == result[:, 0].min() == 0 == padded[:, 0].max()
    for name, row in rows.items():
        for quantity in ("bits_per_dim", "nll", "kl", "anomaly_score", "psnr"):
            assert float(row[quantity]) == pytest.approx(float(rows["whole"][quantity]), rel=1e-4), (name, quantity)


RESULTS = (("recon", "recon"), ("recon", "scale"), ("recon", "zscore"), ("score", "anomaly"))


# The decision


def test_an_aligned_cohort_is_fitted_to_one_box_which_the_weights_keep(trained, cohort):
    output, log = trained
    assert "All scans are fitted to one box of the world, of (200, 240, 192) mm about (-2, -18, 20)." in log
    assert "(aligned: up to 5)" in log
    grid = stored_grid(weights(output))
    assert np.allclose(grid.box, [[-2, -18, 20], [200, 240, 192]])
    assert np.allclose(grid.field_of_view, [200, 240, 192])
    assert np.abs(np.array(grid.foreground[1])).max() < 5
    checkpoint = torch.load(output / "checkpoints" / "checkpoint.pt", weights_only=True)
    for part in ("network", "average"):
        assert ScanGrid.from_tensor(checkpoint[part]["scan_grid"]) == grid
    affine = checkpoint["network"]["template_affine"]
    assert torch.allclose(
        affine @ torch.tensor([3.5, 3.5, 3.5, 1.0]).double(), torch.tensor([-2.0, -18, 20, 1]).double()
    )


def test_a_cohort_that_is_not_aligned_is_centred(centred):
    folder, log = centred
    assert "Each scan is fitted to the box of its own file. The centres of their foregrounds spread by " in log
    grid = stored_grid(weights(folder / "run"))
    assert grid.box is None
    assert min(grid.foreground[1]) > 5
    assert np.allclose(grid.field_of_view, [200, 240, 192])


def test_boxes_of_all_sizes_do_not_hide_that_brains_are_aligned(cohort, tmp_path):
    for number, path in enumerate(sorted(cohort.glob("*.nii.gz"))):
        rebox(path, tmp_path / path.name, before=(number % 3, -(number % 4), 0), after=(0, 0, number))
    grid = choose(tmp_path)
    assert grid.box is not None
    assert grid.field_of_view is None


def test_no_brain_is_cut_where_files_are_cut_to_their_brains(cohort, tmp_path):
    for path in sorted(cohort.glob("*.nii.gz")):
        image = nib.load(path).get_fdata() > 0
        inside = np.argwhere(image)
        before, after = -inside.min(0), inside.max(0) + 1 - image.shape
        rebox(path, tmp_path / path.name, before=tuple(before), after=tuple(after))
    grid = choose(tmp_path)
    for path in sorted(tmp_path.glob("*.nii.gz")):
        image = nib.load(path)
        affine = fitted(path, grid).affine.numpy()
        geometry = {"foreground": foreground_place(MetaTensor(image.get_fdata()[None], affine=image.affine))}
        assert place_differences(grid, geometry, affine, (16, 16, 16)) == []


def test_few_scans_are_centred_unless_their_headers_say_that_they_are_aligned(cohort, tmp_path, caplog):
    caplog.set_level("INFO")
    for path in sorted(cohort.glob("*.nii.gz"))[:4]:
        shutil.copy(path, tmp_path)
    assert choose(tmp_path).box is not None  # phantoms lie in the space of MNI152, and say so
    assert "The headers of the 4 scan(s) say that they are in a template's space" in caplog.text
    rebox(tmp_path / path.name, tmp_path / path.name)
    assert choose(tmp_path).box is None
    assert "4 scan(s) are too few to tell whether they are aligned" in caplog.text
    assert choose(tmp_path, "world").box is not None


def test_scans_at_an_angle_are_not_aligned():
    centres = [[0.1 * i, 0, 0] for i in range(20)]
    assert find_alignment(centres, [0.0] * 20, [0] * 20)[0]
    aligned, reason = find_alignment(centres, [12.0] * 5 + [0.0] * 15, [0] * 20)
    assert not aligned
    assert "the axes of 75% are the world's" in reason


@pytest.mark.parametrize(("millimetres", "upright", "answer"), [(4.9, 18, True), (5.1, 18, False), (4.9, 17, False)])
def test_what_counts_as_aligned(millimetres, upright, answer):
    normal = norm.ppf((np.arange(20) + 0.5) / 20)
    centres = np.outer(normal / median_abs_deviation(normal, scale="normal"), [0, millimetres, 0])
    oblique = [2.9] * upright + [3.1] * (20 - upright)
    assert find_alignment(centres, oblique, [0] * 20)[0] == answer


def test_64_scans_of_a_cohort_are_read_always_the_same(monkeypatch):
    read = []
    geometry = {"foreground": None, "oblique": 0.0, "spacing": [1.0] * 3, "field_of_view": [9.0] * 3}
    known = _Scan([[0.0] * 3, [9.0] * 3], geometry, 0)
    monkeypatch.setattr("scripts.data.scan_grid._read", lambda image, transforms: read.append(image) or known)
    items = [{"image": f"{number}.nii"} for number in range(100)]
    for count in (100, 100, 20):
        choose_grid("auto", items[:count], [])
    assert read[:64] == read[64:128] and len(set(read[:64])) == 64
    assert sorted(read[128:]) == sorted(item["image"] for item in items[:20])


@pytest.mark.parametrize(("spread", "millimetres"), [(0.0, 15), (2.0, 15), (10.0, 30)])
def test_how_far_from_the_others_is_elsewhere(spread, millimetres):
    grid = ScanGrid([[0.0] * 3, [400.0] * 3], [[0.0] * 3, [spread] * 3])
    for away in (millimetres - 0.5, millimetres + 0.5):
        place = {"centre": [0, -away, 0], "lower": [-9, -9 - away, -9], "upper": [9, 9 - away, 9]}
        affine = np.diag([25.0, 25.0, 25.0, 1.0])
        affine[:3, 3] = -187.5
        assert len(place_differences(grid, {"foreground": place}, affine, (16, 16, 16))) == (away > millimetres)


def test_the_setting_decides_where_it_is_given(cohort, centred):
    assert choose(cohort, "centred").box is None
    assert choose(centred[0] / "scans", "world").box is not None


def test_an_unknown_word_is_a_sentence(cohort, tmp_path):
    result = run_bundle("--dataset_dir", cohort, "--output_dir", tmp_path, "--scan_grid", "mni")
    assert result.returncode == 1
    assert "scan_grid is 'mni': it must be one of auto, world, centred." in result.stderr.splitlines()[-1]


def test_scans_that_cannot_be_read_do_not_count(cohort, tmp_path):
    shutil.copytree(cohort, tmp_path / "scans")
    (tmp_path / "scans" / "broken.nii.gz").write_bytes(b"")
    assert choose(tmp_path / "scans") == choose(cohort)
    for path in (tmp_path / "scans").glob("*.nii.gz"):
        path.write_bytes(b"")
    with pytest.raises(ScanError, match=r"None of 1\d scan\(s\) can be used. The first: '.*' is an empty file"):
        choose(tmp_path / "scans")


def test_the_choice_is_kept_on_resume_whatever_has_changed(trained, centred, tmp_path):
    shutil.copytree(trained[0] / "checkpoints", tmp_path / "checkpoints")
    scans = centred[0] / "scans"
    log = train(scans, tmp_path, "--epochs", 2, "--resume", True, "--scan_grid", "centred")
    assert "scan_grid is 'centred', but the weights to go on from were trained with 'world', which is kept" in log
    assert stored_grid(weights(tmp_path)) == stored_grid(weights(trained[0]))
    assert "scan(s) differ from what is expected" in log  # those that lie elsewhere
    log = train(scans, tmp_path / "new", "--weights", weights(trained[0]))
    assert "as those of the weights to go on from" in log
    assert stored_grid(weights(tmp_path / "new")) == stored_grid(weights(trained[0]))


# Weights


def test_weights_of_earlier_versions_load_and_are_centred(trained, boxes, tmp_path):
    state = torch.load(weights(trained[0]), weights_only=True)
    grid = state.pop("scan_grid")
    torch.save(state, tmp_path / "old.pt")
    network = inference_config().get_parsed_content("network_def")
    network.scan_grid.copy_(grid)
    network.load_state_dict(state)
    assert not network.scan_grid.any()
    assert stored_grid(tmp_path / "old.pt") == ScanGrid()
    assert "WARNING" not in run("score", boxes, tmp_path / "results", tmp_path / "old.pt").replace("WARNING - Not", "")


def test_a_grid_survives_the_weights():
    network = VDVAE(2, 1, [4, 6], [1, 1], [2, 3], [3, 2])
    grids = [
        ScanGrid(),
        ScanGrid(None, [[1.1, 2, 3], [0.0, 0.1, 0.2]], [200.0, 1, 1]),
        ScanGrid([[0.1, 0.2, 0.3], [1.7, 2.0, 3.0]], [[0.0, 0, 0], [1.0, 0, 0]], None),
    ]
    for grid in grids:
        network.scan_grid.copy_(grid.as_tensor())
        assert ScanGrid.from_tensor(network.state_dict()["scan_grid"]) == grid


# What is said of scans that lie elsewhere


def test_inference_names_a_scan_that_lies_elsewhere(boxes, trained, tmp_path):
    rebox(boxes / "whole.nii.gz", tmp_path / "scans" / "elsewhere.nii.gz", moved=(0, 30, 30))
    shutil.copy(boxes / "padded.nii.gz", tmp_path / "scans")
    log = run("score", tmp_path / "scans", tmp_path / "results", weights(trained[0]))
    (line,) = (line for line in log.splitlines() if "from where that of the training scans lies" in line)
    assert "elsewhere.nii.gz': its foreground lies 4" in line
    assert "mm from where that of the training scans lies: align it as they were (python -m scripts.prepare)." in line
    assert "padded.nii.gz'" not in log


def test_a_scan_without_a_brain_in_the_box_is_a_failure_that_says_so(boxes, trained, tmp_path):
    rebox(boxes / "whole.nii.gz", tmp_path / "scans" / "lost.nii.gz", moved=(0, 0, 500))
    words = ("--dataset_dir", tmp_path / "scans", "--output_dir", tmp_path / "out", "--ckpt", weights(trained[0]))
    result = run_bundle(*words, run_id="score", configs=INFERENCE)
    assert result.returncode == 1
    assert "lost.nii.gz,it has no brain in the box of the world" in (tmp_path / "out" / "failed.csv").read_text()


def test_a_brain_that_the_box_cuts_is_named():
    grid = ScanGrid([[7.5, 7.5, 7.5], [16.0, 16.0, 16.0]])
    image = brain(32)
    geometry = {"foreground": foreground_place(image)}
    image = FitShape(8, box=grid.box)(image)
    (sentence,) = place_differences(grid, geometry, image.affine.numpy(), image.shape[1:])
    assert sentence == "its foreground reaches 10 mm beyond the box that the network sees, and is cut there"


def test_where_each_scan_has_its_own_box_another_field_of_view_is_named(boxes, centred, tmp_path):
    log = run("reconstruct", boxes, tmp_path / "results", weights(centred[0] / "run"))
    named = [line for line in log.splitlines() if "was usual in training, which moves or shrinks its brain" in line]
    assert len(named) == 2
    assert "cut.nii.gz': it has a field of view of 184×200×176 mm where 200×240×192 mm was usual" in "".join(named)
    assert "padded.nii.gz'" in "".join(named)


def test_a_run_treats_scans_that_lie_elsewhere_as_it_treats_odd_geometry(cohort, tmp_path):
    shutil.copytree(cohort, tmp_path / "scans")
    rebox(sorted(cohort.glob("*.nii.gz"))[0], tmp_path / "scans" / "elsewhere.nii.gz", moved=(0, 60, 0))
    paths = [{"image": str(path)} for path in sorted((tmp_path / "scans").glob("*.nii.gz"))]
    grid = choose(tmp_path / "scans")
    steps = inference_config(grid=grid).get_parsed_content("preprocessing")
    arguments = ({"training": paths}, steps, tmp_path / "cache")
    kept = read_cohort(*arguments, policy="skip", skipped_file=tmp_path / "skipped.csv", grid=grid)
    assert len(kept["training"]) == 12
    assert "elsewhere.nii.gz" in (tmp_path / "skipped.csv").read_text()
    with pytest.raises(ScanError, match=r"elsewhere.nii.gz': its foreground lies \d+ mm from where"):
        read_cohort(*arguments, policy="fail", grid=grid)


def test_evaluation_uses_the_grid_of_the_weights(cohort, trained, tmp_path):
    folder = tmp_path / "padded"
    for path in sorted(cohort.glob("*.nii.gz")):
        rebox(path, folder / path.name, before=(2, 3, 0), after=(0, 0, 5))
    found = []
    for scans, output in ((cohort, tmp_path / "one"), (folder, tmp_path / "two")):
        words = ("--ckpt", weights(trained[0]), "--dataset_dir", scans, "--output_dir", output, "--samples", 2)
        result = run_bundle(*words, "--train_fraction", 0.5, run_id=None, configs=EVALUATE)
        assert result.returncode == 0, result.stderr
        with (output / "evaluation" / "evaluation.csv").open() as file:
            found.append([float(row["bits_per_dim"]) for row in csv.DictReader(file)])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_the_check_of_a_data_set_says_what_training_would_do(cohort, centred, tmp_path):
    for scans, answer in (
        (cohort, "training fits all of them to one box of the world."),
        (centred[0] / "scans", "training fits each to the box of its own file."),
    ):
        said = summary(check(scans, output_dir=tmp_path, workers=1))
        (line,) = [line for line in said.splitlines() if line.startswith("The centres of their foregrounds spread by ")]
        assert line.endswith(answer)
        assert ("scripts.prepare" in said) == ("each" in answer)
    with (tmp_path / "report.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert np.std([float(row["foreground"].split()[1]) for row in rows]) > 10
    assert {row["sform_code"] for row in rows} == {"2"}


def test_the_foreground_of_a_scan(tmp_path):
    image = brain(32, spacing=2.0)
    image.affine[:3, 3] = torch.tensor([10.0, -20.0, 30.0])
    place = foreground_place(image)
    assert np.allclose(place["centre"], np.array([10, -20, 30]) + 31, atol=1)
    assert np.allclose(np.subtract(place["upper"], place["lower"]), 2 * 0.7 * 32, atol=4)
    assert foreground_place(MetaTensor(torch.ones(1, 4, 4, 4))) is None
    path = save(tmp_path / "scan.nii", image[0].numpy(), image.affine.numpy())
    geometry = CheckScand("image")(LoadScand("image")({"image": path}))["image"].meta["geometry"]
    assert geometry["foreground"] == place
