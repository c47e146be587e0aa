"""Filling in what is missing from a scan, and going from one scan to another."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import brain, fitted_scans, inference_config, run_bundle, save
from groups import run_bundle_group
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy import ndimage
from torch.nn.functional import adaptive_avg_pool3d

from scripts.data.transforms import FitShaped, RobustScaled, ScanError
from scripts.inference.common import Cohort, list_scans
from scripts.inference.imputation import MISSING_FRACTION, FillInd, FitMaskd, HideMissingd, filling_errors
from scripts.inference.inferers import Imputation, Interpolation, Reconstruction, prior_where_missing
from scripts.inference.interpolation import BothScans, list_pair
from scripts.inference.jobs import impute as impute_job
from scripts.inference.jobs import interpolate
from scripts.inference.masks import pair_masks
from scripts.layers.gaussian import LatentSampler

CONFIGS = ["configs/inference.json", "tests/tiny.json"]
PAIRING = {"scan_pattern": "*_FLAIR.nii.gz", "mask_pattern": "*_mask.nii.gz"}
RESULTS = ("imputed_00", "imputed_01", "imputed_mean", "imputed_std")


def parser(**changes) -> ConfigParser:
    return inference_config(**{"iterations": 3, "draws": 2, **changes})


@pytest.fixture(scope="module")
def network(cohort):
    """A small network whose latents follow the scan and show in what it makes of it, though nothing is learnt."""
    scans, affine = fitted_scans(cohort)
    torch.manual_seed(0)
    net = parser().get_parsed_content("network_def")
    net.set_voxel_gaussian(scans.mean(0), scans.std(0), affine)
    with torch.no_grad():
        for weights in net.parameters():
            if weights.ndim > 1 and not weights.any():  # training starts from zeros that say nothing
                weights.normal_(0, 3 * weights[0].numel() ** -0.5)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def fitted(cohort):
    """Two scans as the network gets them, [2, 1, 8, 8, 8]."""
    return fitted_scans(cohort)[0][:2]


def cut(image: nib.Nifti1Image) -> np.ndarray:
    """A slab through the brain, as a mask."""
    mask = np.zeros(image.shape, np.uint8)
    mask[:, image.shape[1] // 2 : image.shape[1] // 2 + 5] = 1
    return mask


@pytest.fixture(scope="module")
def damaged(cohort, tmp_path_factory):
    """Three scans, stored in three orientations, and their masks in a folder beside."""
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("scans", "masks"):
        (folder / name).mkdir()
    for codes, path in zip(("RAS", "LPS", "PIR"), sorted(cohort.glob("*.nii.gz")), strict=False):
        image = nib.load(path)
        turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(codes))
        affine = image.affine @ inv_ornt_aff(turn, image.shape)
        for where, array in (("scans", np.asarray(image.dataobj)), ("masks", cut(image))):
            array = nib.orientations.apply_orientation(array, turn)
            suffix = "FLAIR" if where == "scans" else "mask"
            nib.save(nib.Nifti1Image(array, affine), folder / where / f"{codes}_{suffix}.nii.gz")
    return folder


def impute(folder: Path, output: Path, weights: str, **changes) -> dict[str, np.ndarray]:
    """Every result, by its file's name."""
    settings = {"dataset_dir": str(folder / "scans"), "mask_dir": str(folder / "masks"), "ckpt": weights, **PAIRING}
    content = parser(**{**settings, "output_dir": str(output), **changes})
    common = content.get_parsed_content("common")
    settings = {key: content[key] for key in ("mask_dir", "mask_pattern", "iterations", "draws", "voxel_noise")}
    impute_job(common, **settings).run()
    assert not common.failures.found
    return {path.name: nib.load(path).get_fdata() for path in output.glob("*.nii.gz")}


@pytest.fixture(scope="module")
def imputed(damaged, weights, tmp_path_factory):
    return impute(damaged, tmp_path_factory.mktemp("imputed"), weights)


# Interpolating


def test_steps_go_from_one_reconstruction_to_the_other(network, fitted):
    steps = Interpolation(steps=5)(fitted[None], network)
    recon = Reconstruction()(fitted, network)["recon"]
    assert list(steps) == [f"step{n:02d}" for n in range(5)]
    assert torch.allclose(steps["step00"][0], recon[0], atol=1e-5)
    assert torch.allclose(steps["step04"][0], recon[1], atol=1e-5)
    far = [(step[0] - recon[0]).square().mean() for step in steps.values()]
    assert far == sorted(far)
    assert (recon[1] - recon[0]).abs().max() > 1e-2


@pytest.mark.parametrize("grids", [(2,), ("4³", 8), ("8x8x8",)])
def test_any_levels_go_over_and_the_others_stay(network, fitted, grids):
    last = Interpolation(steps=2, levels=grids)(fitted[None], network)["step01"]
    both = network.encode(fitted, temperature=0.0)
    moved = {int(str(grid)[0]) for grid in grids}
    mixed = [z[[int(z.shape[2] in moved)]] for z in both]
    assert torch.allclose(last, network.decode(mixed, temperature=0.0)[0], atol=1e-5)
    assert not torch.allclose(last, network.decode([z[:1] for z in both], temperature=0.0)[0], atol=1e-4)


def test_steps_and_levels_that_cannot_be_are_refused(network, fitted):
    with pytest.raises(ValueError, match=r"levels_between names the grid 3: this network's levels have .* 2, 4, 8"):
        Interpolation(levels=[2, 3])(fitted[None], network)
    with pytest.raises(ValueError, match="steps is 1: both ends are steps"):
        Interpolation(steps=1)


def test_a_pair_is_two_scans(cohort, tmp_path, monkeypatch):
    first, second = sorted(str(path) for path in cohort.glob("*.nii.gz"))[:2]
    assert list_pair(None, Cohort(cohort)) == [{"image": first, "second": second}]
    assert list_pair([second, first], Cohort("nowhere")) == [{"image": second, "second": first}]
    monkeypatch.setenv("HOME", str(cohort))
    home = [f"~/{Path(path).name}" for path in (first, second)]
    assert list_pair([home, home[1]], Cohort("nowhere")) == [{"image": [first, second], "second": second}]
    for wrong in (first, [first], [first] * 3):
        with pytest.raises(ValueError, match="give the paths of two scans"):
            list_pair(wrong, Cohort(cohort))
    save(tmp_path / "only.nii.gz", np.eye(4))
    with pytest.raises(ValueError, match="holds one scan alone"):
        list_pair(None, Cohort(tmp_path))


def test_a_pair_of_other_fields_of_view_is_named(tmp_path, caplog):
    image = brain(16)[0].numpy()
    paths = [save(tmp_path / f"{name}.nii.gz", array) for name, array in (("a", image), ("b", np.pad(image, 2)))]
    for second in (paths[0], paths[1]):
        assert caplog.text == ""
        BothScans(parser().get_parsed_content("preprocessing"))({"image": paths[0], "second": second})
    assert "The two scans have other fields of view" in caplog.text


def test_interpolate_writes_the_steps_and_a_strip(cohort, network, weights, fitted, tmp_path):
    first, second = (str(cohort / f"sub-000{n}_FLAIR.nii.gz") for n in (1, 2))
    words = ["--ckpt", weights, "--output_dir", tmp_path / "out", "--steps", 3, "--figures", True]
    words += ["--scans_between", str([first, second]), "--levels_between", "[2, 4]"]
    result = run_bundle(*words, run_id="interpolate", configs=CONFIGS)
    assert result.returncode == 0, result.stderr
    name = "sub-0001_FLAIR_to_sub-0002_FLAIR"
    expected = [f"{name}_step00.nii.gz", f"{name}_step01.nii.gz", f"{name}_step02.nii.gz", f"{name}_steps.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "interpolate.json",
        "report_interpolate.html",
        *expected,
    ]
    assert "Grid 4³: its latents go over" in result.stderr
    assert "Grid 8³: its latents stay those of the first" in result.stderr
    steps = Interpolation(steps=3, levels=[2, 4])(fitted[None], network)
    grid = parser().get_parsed_content("preprocessing")({"image": first})["image"].affine
    for file, step in zip(expected, steps.values(), strict=False):
        image = nib.load(tmp_path / "out" / file)
        assert np.allclose(image.affine, grid, atol=1e-3)
        assert np.allclose(image.get_fdata(), ((step[0, 0] + 1) / 2).clamp(0, 1), atol=1e-4)

    changes = {"steps": 3, "levels_between": [2, 4], "output_dir": str(tmp_path / "out")}
    other = parser(scans_between=[second, first], ckpt=weights, **changes)
    with pytest.raises(FileExistsError, match="made with another first, second: set --output_dir"):
        words = {key: other[key] for key in ("scans_between", "steps", "levels_between")}
        interpolate(other.get_parsed_content("common"), **words).run()


# Imputing: the inferer


def test_a_chain_keeps_what_was_observed_and_never_sees_what_is_missing(network, fitted):
    mask = torch.zeros(2, 1, 8, 8, 8, dtype=torch.bool)
    mask[:, :, 2:5] = True

    def draws(scans):
        noise = LatentSampler([torch.Generator().manual_seed(n) for n in (1, 2)])
        return Imputation(iterations=3, draws=2)(scans, network, mask, sampler=noise)

    found = draws(fitted)
    assert list(found) == ["imputed_00", "imputed_01"]
    for draw in found.values():
        assert torch.equal(draw[~mask], fitted[~mask])
    assert (found["imputed_00"] - found["imputed_01"]).abs().max() > 1e-3
    other = draws(torch.where(mask, torch.nan, fitted))
    assert all(torch.equal(found[key], other[key]) for key in found)
    # what is put in follows from what was observed
    brighter = draws(torch.where(mask, fitted, (fitted + 0.3).clamp(-1, 1)))
    assert (brighter["imputed_00"] - found["imputed_00"])[mask].abs().mean() > 1e-3


def test_each_iteration_starts_from_the_last(network, fitted):
    mask = torch.ones(2, 1, 8, 8, 8, dtype=torch.bool)
    mask[..., 0] = False
    inferer = Imputation(iterations=4, voxel_noise=True)
    torch.manual_seed(0)
    chain = inferer.chain(fitted, network, mask)
    states = [next(chain) for _ in range(4)]
    torch.manual_seed(0)
    assert torch.equal(inferer(fitted, network, mask)["imputed_00"], states[3])
    assert not torch.equal(states[3], states[2])
    # voxels' noise belongs to the chain whether or not the draws show it
    torch.manual_seed(0)
    smooth = next(Imputation().chain(fitted, network, mask))
    assert not torch.equal(smooth, states[0])
    _, scale = network.decode([], 1.0, batch_size=2)
    assert float((states[0] - smooth)[mask].std()) == pytest.approx(float(scale[mask].square().mean().sqrt()), rel=0.5)


def test_the_prior_says_what_lies_where_a_scan_is_missing(network, fitted):
    mask = torch.zeros(2, 1, 8, 8, 8, dtype=torch.bool)
    mask[:, :, :5] = True
    _, known = network.infer(fitted, 0.0)
    _, found = network.infer(fitted, 0.0, sampler=prior_where_missing(network, mask, 0.0))
    grids = [tuple(q.mean.shape[2:]) for q in found]
    assert {(8, 8, 8), (4, 4, 4), (2, 2, 2)} <= {*grids}
    for grid, whole, q in zip(grids, known, found, strict=True):
        missing = adaptive_avg_pool3d(mask.float(), grid).expand_as(q.z) > 0.3
        mean = torch.zeros_like(q.z) if q.prior_mean is None else q.prior_mean
        assert torch.equal(q.z[missing], mean[missing]) and torch.equal(q.z[~missing], q.mean[~missing])
        assert not torch.equal(q.z, whole.z)


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"draws": 1}])
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is {next(iter(wrong.values()))}: it must be"):
        Imputation(**wrong)


def test_no_draws_are_not_the_usual_number(damaged, weights, tmp_path):
    with pytest.raises(ValueError, match="draws is 0: it must be 2 or more"):
        impute(damaged, tmp_path, weights, draws=0)


# Imputing: scans and masks


def test_masks_are_paired_with_scans_by_what_the_wildcards_stand_for(tmp_path, caplog):
    for name in ("scans/a/sub-1_T1w.nii.gz", "scans/b/sub-1_T1w.nii.gz", "scans/b/sub-2_T1w.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / name, np.eye(4))
    (tmp_path / "masks" / "b").mkdir(parents=True)
    mask = save(tmp_path / "masks" / "b" / "sub-1_label-lesion.nii.gz", np.eye(4))
    scans = list_scans(tmp_path / "scans", "*_T1w.nii.gz")
    pair = partial(pair_masks, scans, tmp_path / "scans", "*_T1w.nii.gz")
    items = pair(tmp_path / "masks", "*_label-lesion.nii.gz")
    assert [item["mask"] for item in items] == [None, mask, None]
    with caplog.at_level("WARNING"):
        (item,) = pair(tmp_path / "masks", "*_label-lesion.nii.gz", masked_only=True)
    assert item == {**scans[1], "mask": mask}
    assert "2 of 3 scan(s) have no mask" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"wildcards, such as '.*/masks/a/sub-1-lesion.nii.gz': set both"):
        pair(tmp_path / "masks", "*-lesion.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"mask_pattern .* matches none of the 1 file.* under mask_dir"):
        pair(tmp_path / "masks")
    with pytest.raises(NotADirectoryError, match=r"mask_dir .* is not a folder"):
        pair(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="mask_dir is not set"):
        pair(None)


def hide(tmp_path, mask, affine=None, image=None):
    image = brain() if image is None else image
    image.meta["filename_or_obj"] = "scan.nii"
    path = save(tmp_path / "mask.nii.gz", mask, image.affine.numpy() if affine is None else affine)
    return HideMissingd("image")({"image": image, "mask": path})


def test_masks_that_say_nothing_are_refused(tmp_path):
    some = np.zeros((16, 16, 16))
    some[4:8] = 1
    hide(tmp_path, some)
    for mask, affine, reason in (
        (some[:15], None, "lies on another grid than 'scan.nii'"),
        (some, np.diag([2, 1, 1, 1]), "or its affine differs: resample it to the scan's grid"),
        (np.ones_like(some), None, r"is full \(every voxel is above 0\)"),
        (np.stack([some, some], -1), None, "has 2 channels"),
    ):
        with pytest.raises(ScanError, match=reason):
            hide(tmp_path, mask, affine)


def test_a_mask_counts_for_all_channels(tmp_path):
    mask = np.zeros((16, 16, 16))
    mask[4:8] = 1
    image = brain(channels=2) + torch.tensor([1.0, 5.0])[:, None, None, None]
    hidden = hide(tmp_path, mask, image=image.clone())["image"]
    assert [float(channel[4:8].min()) for channel in hidden] == [float(channel[4:8].max()) for channel in hidden]
    assert [float(channel[5, 8, 8]) for channel in hidden] == [1.0, 5.0]
    assert torch.equal(hidden[:, 8:], image[:, 8:])


@pytest.mark.parametrize("angle", [0, 20])
def test_the_fitted_mask_covers_what_the_hidden_background_bleeds_into(tmp_path, angle):
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(np.radians(angle)), -np.sin(np.radians(angle))], [np.sin(np.radians(angle))] * 2]
    turn[1, 1] = np.cos(np.radians(angle))
    image = brain(size=32)
    image.affine = torch.as_tensor(turn @ np.diag([-1.0, 1.5, 1.0, 1.0]))
    mask = np.zeros((32, 32, 32))
    mask[10:15, 14:20, 8:20] = 1
    item = hide(tmp_path, mask, image=image)
    fit = FitShaped("image", (8, 8, 8))
    plain, hidden = fit({"image": image.clone()})["image"], fit({"image": item["image"]})["image"]
    difference = (plain - hidden).as_tensor().abs() / image.max().item()
    fitted = FitMaskd("image")(RobustScaled("image")(item | {"image": hidden}))["missing_fitted"]
    assert fitted.shape == (1, 8, 8, 8)
    assert difference[fitted].max() > 0.2
    assert difference[~fitted].max() <= MISSING_FRACTION
    assert 0.01 < fitted.float().mean() < 0.2


def test_even_a_single_voxel_is_filled_without_the_hidden_background(tmp_path):
    mask = np.zeros((64, 64, 64))
    mask[31, 30, 33] = 1
    item = FitShaped("image", (8, 8, 8))(hide(tmp_path, mask, image=brain(size=64)))
    assert FitMaskd("image")(RobustScaled("image")(item))["missing_fitted"].sum() >= 8


def test_a_mask_that_leaves_nothing_is_refused(tmp_path):
    mask = np.ones((16, 16, 16))
    mask[0, 0, 0] = 0
    image = brain()
    image[0, 0, 0, 0] = 0.5
    item = hide(tmp_path, mask, image=image)
    item["image"][0, 0, 0, 0] = 1.0  # so that there is something to scale
    with pytest.raises(ScanError, match="leaves no voxel of the network's grid"):
        FitMaskd("image")(RobustScaled("image")(FitShaped("image", (4, 4, 4))(item)))


def test_mean_and_spread_are_those_of_the_draws():
    missing = torch.tensor([[True, False]])
    data = {"missing": missing, "observed": MetaTensor(torch.tensor([[9.0, 5.0]]), affine=torch.eye(2))}
    filled = FillInd(["a", "b"])(data | {"a": torch.tensor([[1.0, 1.0]]), "b": torch.tensor([[3.0, 3.0]])})
    assert filled["a"].tolist() == [[1.0, 5.0]]
    assert filled["imputed_mean"].tolist() == [[2.0, 5.0]]
    assert filled["imputed_std"].tolist() == [[pytest.approx(2**0.5), 0.0]]


# Imputing: the word


def test_errors_of_a_filling_are_those_of_its_missing_voxels():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(1, 16, 16, 16, generator=generator)
    missing = torch.zeros(1, 16, 16, 16, dtype=torch.bool)
    missing[:, 4:12] = True
    # truth and draws are of one distribution, which differs from voxel to voxel
    noise = 0.1 * torch.randn(4, 1, 16, 16, 16, generator=generator)
    centre = truth + 0.1 * torch.randn(truth.shape, generator=generator)
    draws = torch.where(missing, centre + noise, truth)
    found = filling_errors(draws, truth, missing)
    errors = (draws.mean(0) - truth)[missing]
    assert float(found["mse"]) == pytest.approx(float(errors.square().mean()))
    assert float(found["mse"]) == pytest.approx(0.01 * (1 + 1 / 4), rel=0.1)
    assert float(found["psnr"]) == pytest.approx(-10 * np.log10(float(found["mse"])))
    assert float(found["coverage_50"]) == pytest.approx(0.5, abs=0.03)
    assert float(found["coverage_90"]) == pytest.approx(0.9, abs=0.03)
    sure = torch.where(missing, centre + 0.1 * noise, truth)
    assert float(filling_errors(sure, truth, missing)["coverage_90"]) < 0.5
    # the SSIM of a window is (2 m m' + c)(2 s + d) / ((m^2 + m'^2 + c)(v + v' + d)), here of a Gaussian of 1.5 voxels
    x, y = (image[0].numpy().astype(float) for image in (draws.mean(0), truth))
    smooth = partial(ndimage.gaussian_filter, sigma=1.5, radius=5, mode="nearest")
    mx, my = smooth(x), smooth(y)
    vx, vy, cxy = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    ssim = (2 * mx * my + 1e-4) * (2 * cxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert float(found["ssim"]) == pytest.approx(ssim[missing[0].numpy()].mean(), abs=1e-3)
    nothing = filling_errors(truth.expand(4, -1, -1, -1, -1), truth, torch.zeros_like(missing))
    assert all(np.isnan(float(value)) for value in nothing.values())


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_observed_voxels_stay_exactly_and_missing_ones_are_drawn(damaged, imputed, codes):
    scan = nib.load(damaged / "scans" / f"{codes}_FLAIR.nii.gz").get_fdata()
    missing = nib.load(damaged / "masks" / f"{codes}_mask.nii.gz").get_fdata() > 0
    first, second, mean, std = (imputed[f"{codes}_FLAIR_{name}.nii.gz"] for name in RESULTS)
    for result in (first, second, mean):
        assert np.array_equal(result[~missing], scan[~missing])
        assert scan.min() - 1 <= result.min() <= result.max() <= scan.max()
        # as in the scan, most of the slab is brain
        inside = missing & (scan > 0)
        assert result[inside].mean() == pytest.approx(scan[inside].mean(), rel=0.5)
    assert not np.array_equal(first[missing], second[missing])
    assert np.allclose(mean, (first + second) / 2, rtol=1e-5, atol=1e-2)
    assert np.allclose(std, np.std([first, second], axis=0, ddof=1), rtol=1e-3, atol=1e-2)
    assert std[missing].max() > 0
    assert not std[~missing].any()


def test_impute_writes_the_same_from_the_command_line(damaged, imputed, weights, tmp_path):
    folders = ["--dataset_dir", damaged / "scans", "--mask_dir", damaged / "masks", "--output_dir", tmp_path]
    pairing = [word for key, value in PAIRING.items() for word in (f"--{key}", value)]
    words = [*folders, *pairing, "--ckpt", weights, "--iterations", 3, "--draws", 2]
    result = run_bundle(*words, "--known_truth", True, run_id="impute", configs=CONFIGS)
    assert result.returncode == 0, result.stderr
    assert "3 scan(s) filled, mean +- deviation: mse" in result.stderr
    with (tmp_path / "imputed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    for row in rows:
        scan, filled = (
            nib.load(path).get_fdata()
            for path in (
                damaged / "scans" / row["image"],
                tmp_path / row["image"].replace(".nii.gz", "_imputed_mean.nii.gz"),
            )
        )
        mask = nib.load(damaged / "masks" / row["image"].replace("FLAIR", "mask")).get_fdata() > 0
        gain = float(row["mse"]) / np.square(filled - scan)[mask].mean()  # of the scan's units to the range
        assert gain**-0.5 == pytest.approx(np.percentile(scan[~mask], 99.95), rel=0.2)
        assert float(row["psnr"]) == pytest.approx(-10 * np.log10(float(row["mse"])), rel=1e-3)
        assert 0 <= float(row["coverage_50"]) <= float(row["coverage_90"]) <= 1
    results = {path.name: nib.load(path).get_fdata() for path in tmp_path.glob("*.nii.gz")}
    assert results.keys() == imputed.keys()
    for name, array in imputed.items():
        assert np.allclose(results[name], array, rtol=1e-4, atol=0.05), name


def test_nothing_under_a_mask_reaches_a_result(damaged, imputed, weights, tmp_path):
    (tmp_path / "scans").mkdir()
    for path in (damaged / "scans").iterdir():
        scan = nib.load(path)
        mask = nib.load(damaged / "masks" / path.name.replace("FLAIR", "mask")).get_fdata() > 0
        noise = np.random.default_rng(0).normal(0, 1e5, scan.shape)
        noise[::2] = np.nan
        nib.save(
            nib.Nifti1Image(np.where(mask, noise, scan.get_fdata()).astype(np.float32), scan.affine),
            tmp_path / "scans" / path.name,
        )
    (tmp_path / "masks").symlink_to(damaged / "masks")
    changed = impute(tmp_path, tmp_path / "out", weights, figures=True)
    assert changed.keys() == imputed.keys()
    for name, array in changed.items():
        assert np.array_equal(array, imputed[name]), name
    assert len(list((tmp_path / "out").glob("*_imputed.png"))) == 3


def test_draws_do_not_depend_on_the_batch_but_on_the_seed(damaged, imputed, weights, tmp_path):
    alone = impute(damaged, tmp_path / "alone", weights, batch_size=1)
    other = impute(damaged, tmp_path / "other", weights, seed=1)
    for name, array in imputed.items():
        assert np.allclose(alone[name], array, rtol=1e-4, atol=0.05)
        assert not np.allclose(other[name], array, rtol=1e-4, atol=0.05)


def test_impute_over_two_processes_tells_which_scans_failed(damaged, imputed, cohort, weights, tmp_path):
    for name in ("scans", "masks"):
        (tmp_path / name).mkdir()
        for path in (damaged / name).iterdir():
            (tmp_path / name / path.name).symlink_to(path)
    scan = nib.load(cohort / "sub-0004_FLAIR.nii.gz")
    empty = np.zeros(scan.shape, np.uint8)
    for name, mask in (("bare", None), ("empty", empty), ("full", empty + 1), ("other", empty[1:] + 1)):
        nib.save(scan, tmp_path / "scans" / f"{name}_FLAIR.nii.gz")
        if mask is not None:
            nib.save(nib.Nifti1Image(mask, scan.affine), tmp_path / "masks" / f"{name}_mask.nii.gz")
    pairing = [word for key, value in PAIRING.items() for word in (f"--{key}", value)]
    folders = ["--dataset_dir", tmp_path / "scans", "--mask_dir", tmp_path / "masks", "--output_dir", tmp_path / "out"]
    words = [*folders, *pairing, "--ckpt", weights, "--iterations", 3, "--draws", 2]
    runs = run_bundle_group(*words, run_id="impute", configs=[*CONFIGS, "configs/multi_gpu_inference.json"])
    log = "".join(run.stderr for run in runs)
    assert [run.returncode for run in runs] == [1, 1], log
    with (tmp_path / "out" / "failed.csv").open() as file:
        failed = {row["image"].removesuffix("_FLAIR.nii.gz"): row["reason"] for row in csv.DictReader(file)}
    assert "1 of 7 scan(s) have no mask, such as" in log
    parts = {"full": "is full", "other": "another grid"}
    assert failed.keys() == parts.keys()
    assert all(parts[name] in reason for name, reason in failed.items())
    results = {path.name: nib.load(path).get_fdata() for path in (tmp_path / "out").glob("*.nii.gz")}
    healthy = {name: results.pop(name) for name in list(results) if name.startswith("empty")}
    assert results.keys() == imputed.keys()
    assert np.array_equal(healthy["empty_FLAIR_imputed_mean.nii.gz"], scan.get_fdata())
    assert not healthy["empty_FLAIR_imputed_std.nii.gz"].any()
    for name, array in imputed.items():
        assert np.allclose(results[name], array, rtol=1e-4, atol=0.05), name
