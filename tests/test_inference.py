"""What a trained network can be asked for: the bundle's words as users run them, and from Python."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import textwrap
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, bundle_command, fitted_scans, inference_config, run_bundle, run_bundle_process
from groups import run_bundle_group
from monai.bundle import ConfigParser, create_workflow
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from scripts.data.scan_grid import ScanGrid
from scripts.data.transforms import ScanError
from scripts.inference import inferers, jobs, scoring
from scripts.inference.common import list_scans
from scripts.inference.engine import ScanEvaluator, read_item, scan_generator
from scripts.inference.inferers import Reconstruction, Sampling, level_temperatures, prior_where_missing
from scripts.inference.layouts import ScanLayout
from scripts.inference.outputs import report_latents
from scripts.inference.records import made_of
from scripts.inference.scoring import Scoring
from scripts.layers.gaussian import LatentSampler
from scripts.layers.output import foreground, quantile
from scripts.networks import OUTPUT_RANGES, VDVAEOutput, VDVAEReconstruction
from scripts.training.losses import ELBOLoss, bits_per_dim, discretised_nll, negative_log_likelihood

CONFIGS = ["configs/inference.json", "tests/tiny.json"]
ORIENTATIONS = ("RAS", "LPS", "PIR", "SAL", "ILA")


@pytest.fixture(scope="session")
def scans(cohort, tmp_path_factory):
    """Five phantoms in a tree, each stored in another orientation."""
    folder = tmp_path_factory.mktemp("oriented")
    for codes, path in zip(ORIENTATIONS, sorted(cohort.glob("*.nii.gz")), strict=False):
        image = nib.load(path)
        turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(codes))
        array = nib.orientations.apply_orientation(np.asarray(image.dataobj), turn)
        (folder / codes).mkdir()
        nib.save(
            nib.Nifti1Image(array, image.affine @ inv_ornt_aff(turn, image.shape)), folder / codes / f"{codes}.nii.gz"
        )
    return folder


@pytest.fixture(scope="session")
def network(cohort):
    """A small network, trained for a moment."""
    x, affine = fitted_scans(cohort)
    torch.manual_seed(0)
    net = inference_config().get_parsed_content("network_def")
    net.set_voxel_gaussian(x.mean(0), x.std(0), affine)
    # a fiftieth of the KL, so that all latents have something to say so early
    loss, optimizer = ELBOLoss(), torch.optim.Adamax(net.parameters(), lr=0.02)
    for _ in range(70):
        output = VDVAEOutput(*super(VDVAEReconstruction, net).forward(x))
        optimizer.zero_grad()
        loss(output, x, beta=0.02)[0].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 100.0)
        optimizer.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def weights(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(network.state_dict(), path)
    return path


def run(word, scans, output, weights, *arguments, code=0, start=run_bundle):
    words = ["--dataset_dir", scans, "--output_dir", output, "--ckpt", weights, *arguments]
    result = start(*words, run_id=word, configs=CONFIGS)
    assert result.returncode == code, result.stderr
    return result.stderr


def load(folder, name):
    return nib.load(folder / name).get_fdata(dtype=np.float32)


def upright(scans):
    """One of the scans as the network gets it, [1, 8, 8, 8]."""
    preprocess = inference_config().get_parsed_content("preprocessing")
    return preprocess({"image": str(scans / "RAS" / "RAS.nii.gz")})["image"].as_tensor()


def files(folder, pattern="*"):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob(pattern) if path.is_file())


@pytest.fixture(scope="session")
def reconstructed(scans, weights, tmp_path_factory):
    output = tmp_path_factory.mktemp("reconstructed")
    return output, run(
        *("reconstruct", scans, output, weights, "--levels", "each", "--figures", True), start=run_bundle_process
    )


@pytest.fixture(scope="session")
def encoded(scans, weights, tmp_path_factory):
    output = tmp_path_factory.mktemp("encoded")
    return output, run("encode", scans, output, weights)


# Reconstructing


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_reconstructions_lie_on_the_scans_own_grid(scans, reconstructed, codes):
    original = nib.load(scans / codes / f"{codes}.nii.gz")
    for name in ("recon", "scale", "zscore", "recon_to2", "recon_to8"):
        result = nib.load(reconstructed[0] / codes / f"{codes}_{name}.nii.gz")
        assert result.shape == original.shape
        assert np.allclose(result.affine, original.affine, atol=1e-3)
    image, recon = original.get_fdata(), load(reconstructed[0], f"{codes}/{codes}_recon.nii.gz")
    assert np.corrcoef(image.ravel(), recon.ravel())[0, 1] > 0.8
    assert recon.max() == pytest.approx(image.max(), rel=0.4)  # its units
    # the deviation is in the same units, and the z-score has none
    scale, zscore = (load(reconstructed[0], f"{codes}/{codes}_{name}.nii.gz") for name in ("scale", "zscore"))
    assert scale.min() == pytest.approx(0.01 / 2 * (image.max() - image.min()), rel=0.3)
    assert abs(zscore).max() < 50
    assert abs(zscore[0, 0, 0]) < 1


def test_everything_is_named_after_its_scan(reconstructed):
    output, log = reconstructed
    names = ("levels.png", "recon.nii.gz", "recon.png", "scale.nii.gz", "zscore.nii.gz")
    levels = [f"recon_to{n}.nii.gz" for n in (2, 4, 8)]
    expected = [f"{codes}/{codes}_{name}" for codes in ORIENTATIONS for name in (*names, *levels)]
    assert files(output) == sorted([*expected, "reconstruct.json", "report_reconstruct.html"])
    assert f"Results of 5 of 5 scan(s): '{output}'" in log


def test_the_last_level_is_the_whole_reconstruction_and_the_first_is_coarser(reconstructed):
    full, third, first = (load(reconstructed[0], f"RAS/RAS_{n}.nii.gz") for n in ("recon", "recon_to8", "recon_to2"))
    assert np.allclose(full, third, atol=1e-3)
    assert not np.allclose(full, first, atol=0.1)


def test_levels_and_temperatures_are_named_by_grids_that_exist(network):
    scans = torch.zeros(1, 1, 8, 8, 8)
    with pytest.raises(ValueError, match="levels names the grid 16: this network's levels have the grids 2, 4, 8"):
        Reconstruction(levels=16)(scans, network)
    assert Reconstruction(levels="4³").images(network) == ["recon", "scale", "zscore"]
    with pytest.raises(ValueError, match="sample_temperature names the grid '3'"):
        Sampling({"3": 0.5})(1, network)
    with pytest.raises(ValueError, match=r"temperature is \[0.5\]: give a number, or numbers by grid"):
        Reconstruction([0.5])(scans, network)
    assert level_temperatures(network, "temperature", {8: 0.25, "2³": 0}) == [0.25, 1.0, 0.0]


class Perfect(torch.nn.Module):
    """A network that reconstructs every scan exactly."""

    arguments: ClassVar[dict] = {}
    output_activation, scan_grid = "tanh", ScanGrid().as_tensor()

    def grids(self):
        return []

    def infer(self, x, temperature, keep_posteriors=True, sampler=None):
        return VDVAEOutput(x, torch.full_like(x, 0.1), torch.zeros(len(x), 1)), []


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_a_perfect_network_gives_the_scan_back(scans, tmp_path, codes):
    tiny = inference_config(
        dataset_dir=str(scans / codes), output_dir=str(tmp_path), spatial_shape=[64, 64, 64], batch_size=1
    )
    tiny["network"] = Perfect()
    tiny.get_parsed_content("evaluator").run()
    image, recon = load(scans, f"{codes}/{codes}.nii.gz"), load(tmp_path, f"{codes}_recon.nii.gz")
    # the grid is finer than the scan: what is left is the interpolation there and back, and the clipped percentiles
    assert np.corrcoef(image.ravel(), recon.ravel())[0, 1] > 0.99
    assert np.abs(image - recon).mean() < 0.02 * image.max()
    assert np.allclose(load(tmp_path, f"{codes}_zscore.nii.gz"), 0, atol=1e-3)
    gain = np.percentile(image, 99.95) / 2  # of the network's range
    assert np.allclose(load(tmp_path, f"{codes}_scale.nii.gz"), 0.1 * gain, rtol=0.1)


# Encoding and decoding


def test_encode_then_decode_is_reconstruct(encoded, reconstructed, weights, tmp_path):
    run("decode", encoded[0], tmp_path / "decoded", weights)
    for codes in ORIENTATIONS:
        for name in ("recon", "scale"):
            decoded, direct = (
                load(f, f"{codes}/{codes}_{name}.nii.gz") for f in (tmp_path / "decoded", reconstructed[0])
            )
            assert np.abs(decoded - direct).max() < 1e-5 * np.abs(direct).max()


def test_latents_are_all_there_with_a_table_of_the_coarsest(encoded, network, scans):
    output, log = encoded
    with np.load(output / "RAS" / "RAS_latents.npz") as content:
        for index, grid in enumerate(network.latent_grids()):
            for name in ("z", "mean", "std"):
                assert content[f"{name}{index:02d}"].shape == grid
        first = content["mean00"].ravel()
    with (output / "latents.csv").open() as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == files(scans, "*.nii.gz")
    table = [float(value) for name, value in rows["RAS/RAS.nii.gz"].items() if name.startswith("m")]
    assert np.allclose(table, first, rtol=1e-4)
    numbers = sum(math.prod(grid) for grid in network.latent_grids())
    assert f"{numbers} numbers per scan, compression {512 / numbers:.3g} : 1 (of 512 voxels)" in log
    assert f"{len(rows)} scan(s): 'latents.csv' has the means of the coarsest latent, one row per scan." in log


def test_coarse_latents_can_be_written_alone(scans, reconstructed, network, weights, tmp_path):
    log = run("encode", scans / "RAS", tmp_path / "coarse", weights, "--levels", 2)
    run("decode", tmp_path / "coarse", tmp_path / "decoded", weights)
    coarse = sum(level == 2 for level in network.latent_levels)
    with np.load(tmp_path / "coarse" / "RAS_latents.npz") as content:
        written = sorted(name for name in content.files if name[0] == "z")
    assert written == [f"z{index:02d}" for index in range(coarse)]
    assert f"{coarse} of {network.num_latents} latents of each scan are written" in log
    results = load(tmp_path / "decoded", "RAS_recon.nii.gz"), load(reconstructed[0], "RAS/RAS_recon_to2.nii.gz")
    assert np.abs(results[0] - results[1]).max() < 1e-5 * results[1].max()


def test_latents_may_be_edited_and_cut_short(encoded, reconstructed, network, weights, tmp_path):
    with np.load(encoded[0] / "RAS" / "RAS_latents.npz") as content:
        latents = dict(content)
    coarse = sum(level == 2 for level in network.latent_levels)
    for index in range(coarse, len(network.latent_grids())):
        del latents[f"z{index:02d}"]
    (tmp_path / "latents").mkdir()
    cut = dict(latents)
    np.savez(tmp_path / "latents" / "cut_latents.npz", **cut)
    np.savez(tmp_path / "latents" / "edited_latents.npz", **{**latents, "z00": latents["z00"] + 3})
    del latents["z00"]
    np.savez(tmp_path / "latents" / "gap_latents.npz", **latents)
    np.savez(tmp_path / "latents" / "strange_latents.npz", a=1)
    whole = (tmp_path / "latents" / "cut_latents.npz").read_bytes()
    (tmp_path / "latents" / "torn_latents.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "latents" / "empty_latents.npz").write_bytes(b"")
    (tmp_path / "latents" / "text_latents.npz").write_text("no latents")
    np.savez(tmp_path / "latents" / "small_latents.npz", **{**cut, "z00": cut["z00"][:, :1, :1, :1]})
    log = run("decode", tmp_path / "latents", tmp_path / "out", weights, code=1)
    assert np.allclose(
        load(tmp_path / "out", "cut_recon.nii.gz"), load(reconstructed[0], "RAS/RAS_recon_to2.nii.gz"), atol=1e-2
    )
    assert not np.allclose(
        load(tmp_path / "out", "edited_recon.nii.gz"), load(tmp_path / "out", "cut_recon.nii.gz"), atol=1
    )
    assert "6 scan(s) failed" in log
    failed = (tmp_path / "out" / "failed.csv").read_text()
    assert all(f"\n{name}_latents.npz,it cannot be read as latents" in failed for name in ("torn", "empty", "text"))
    assert "z00 has shape [8, 1, 1, 1], but the network has [8, 2, 2, 2]: decode with the weights" in failed
    assert "lacks z00 but has later latents" in failed
    assert "lacks affine, b_min" in failed


def test_of_several_channels_voxels_are_said_to_be_in_each(caplog):
    content = inference_config()
    content["network_def"]["in_channels"] = 2
    with caplog.at_level("INFO"):
        report_latents(content.get_parsed_content("network_def"), 5)
    *levels, written = caplog.messages
    assert len(levels) == 3 and all("(of 512 voxels in 2 channels)" in message for message in levels)
    assert written.startswith("5 of 5 latents")


# Sampling


def test_samples_depend_on_the_seed_alone(weights, network, tmp_path):
    for name, arguments in (
        ("one", ("--batch_size", 1)),
        ("three", ("--batch_size", 3)),
        ("other", ("--seed", 1)),
        ("cold", ("--sample_temperature", "{2: 0.0, 4: 0.7, '8': 0.7}")),
    ):
        log = run("sample", tmp_path, tmp_path / name, weights, "--samples", 4, *arguments)
        drawn = [f"000{i}_sample.nii.gz" for i in range(1, 5)]
        assert files(tmp_path / name) == [*drawn, "report_sample.html", "sample.json", "samples.png"]
    one, three, other, cold = (load(tmp_path / n, "0002_sample.nii.gz") for n in ("one", "three", "other", "cold"))
    assert "Samples are drawn from the network's own prior." in log
    assert np.allclose(one, three, atol=1e-5)
    assert not np.allclose(one, other, atol=1e-2)
    assert not np.allclose(one, cold, atol=1e-2)
    assert not np.allclose(one, load(tmp_path / "one", "0003_sample.nii.gz"), atol=1e-2)
    sample = nib.load(tmp_path / "one" / "0002_sample.nii.gz")
    assert np.allclose(sample.affine, network.scan_affine)
    assert 0 <= sample.get_fdata().min() < 0.01 < 0.3 < sample.get_fdata().max() <= 1
    # an evaluation compares the same samples with scans
    config = inference_config(network=network, output_dir=str(tmp_path / "images"))
    sampling = jobs.sample(config.get_parsed_content("common"), 4)
    compared = sampling.compute([read_item(sampling.dataset, 1)])["sample"][0, 0]
    assert np.allclose((compared.clip(-1, 1) + 1) / 2, one, atol=1e-5)
    loc, noisy = (Sampling(0.0, voxel_noise=noise)(1, network)["sample"] for noise in (False, True))
    scale = network.decode([], 0.0)[1].square().mean().sqrt()
    assert float((noisy - loc).std()) == pytest.approx(float(scale), rel=0.3)


# Scoring


@pytest.mark.parametrize("count", [1, 2, 1000, 1001])
@pytest.mark.parametrize("q", [0.0, 0.3, 0.999, 1.0])
def test_quantiles_are_those_of_pytorch(count, q):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    inside = torch.ones(2, count, dtype=torch.bool)
    inside[1, : count // 2] = False
    found = quantile(torch.stack([values, values]), inside, q)
    expected = torch.stack([torch.quantile(part, q) for part in (values, values[count // 2 :])])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_quantiles_of_more_values_than_pytorch_takes():
    values = torch.arange(17_000_001, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.999)
    inside = torch.ones(1, len(values), dtype=torch.bool)
    assert quantile(values[None], inside, 0.999).item() == pytest.approx(16_983_000, abs=1)


@pytest.mark.parametrize(("count", "is_large"), [(3, False), (150, True)])
def test_a_restored_scan_is_the_reconstruction_of_one_without_what_is_unusual(
    scans, network, monkeypatch, count, is_large
):
    """Voxels that are off by too much, and those next to them, are replaced; many of them together count as missing."""
    low, high = OUTPUT_RANGES[network.output_activation]
    x = (upright(scans)[None] + torch.linspace(0, 0.5, 8)).clamp(low, high)
    loc, scale, _ = network.infer(x, temperature=0.0)[0]
    off = (x - loc).abs() / (scale**2 + (0.02 * (high - low)) ** 2).sqrt()
    threshold = off.flatten().sort().values[-count - 1 : -count + 1].mean().item()  # so many voxels exceed it
    odd = torch.nn.functional.max_pool3d((off > threshold).float(), 3, 1, 1) > 0
    assert count < odd.sum() < odd.numel()
    monkeypatch.setattr(scoring, "ROUNDS", 1)
    scored = Scoring(restore=threshold, smoothing=1e-3)(x, network)
    large = torch.nn.functional.avg_pool3d(odd.float(), 5, 1, 2) > 0.5
    assert bool(large.any()) == is_large
    missing = torch.nn.functional.max_pool3d(large.float(), 3, 1, 1) > 0
    rule = prior_where_missing(network, missing, 0.0)
    expected, _ = network.infer(torch.where(odd | missing, loc, x), 0.0, sampler=rule)
    torch.testing.assert_close(scored["restored"], expected.loc, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scored["restored"], loc, atol=1e-4)
    # more is unusual beside what is expected without that
    monkeypatch.setattr(scoring, "ROUNDS", 2)
    again = Scoring(restore=threshold, smoothing=1e-3)(x, network)
    assert not torch.allclose(again["restored"], scored["restored"], atol=1e-4)
    usual = Scoring(restore=1e6, smoothing=1e-3)(x, network)
    torch.testing.assert_close(usual["restored"], loc)


def test_the_map_is_of_the_scan_before_it_is_clipped_and_all_else_of_what_the_network_sees(scans, network):
    low, high = OUTPUT_RANGES[network.output_activation]
    x = upright(scans)[None].clamp(low, high)
    x[0, 0, 3, 3, 3] = high
    bright = x.clone()
    bright[0, 0, 3, 3, 3] = high + 2
    clipped, unclipped = (Scoring(smoothing=1e-3)(scan, network) for scan in (x, bright))
    assert all(torch.equal(clipped[name], unclipped[name]) for name in ("psnr", "ssim"))
    more = unclipped["anomaly"] - clipped["anomaly"]
    assert more.argmax() == 3 * 64 + 3 * 8 + 3
    assert more.max() > 1


def rows_of(path):
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {row["image"]: {k: float(v) for k, v in row.items() if k not in ("image", "subject")} for row in rows}


def test_scores_are_the_elbo_and_do_not_depend_on_the_batch(scans, weights, network, tmp_path):
    log = run("score", scans, tmp_path / "1", weights, "--batch_size", 1, "--figures", True)
    assert re.search(r"5 scan\(s\): -?\d\.\d+ bits per dim in the mean, .* Highest anomaly_score: \w+/", log)
    run("score", scans, tmp_path / "3", weights, "--batch_size", 3)
    one, three = (rows_of(tmp_path / str(size) / "scores.csv") for size in (1, 3))
    assert sorted(one) == files(scans, "*.nii.gz")
    for name, row in one.items():
        assert row == pytest.approx(three[name], rel=1e-4, abs=1e-3)
        assert row["elbo"] == pytest.approx(-row["nll"] - row["kl"], rel=1e-5)
        assert row["bits_per_dim"] == pytest.approx(-row["elbo"] / 512 / math.log(2), rel=1e-5)
        assert row["kl"] == pytest.approx(sum(v for k, v in row.items() if k.startswith("kl_z")), rel=1e-4)
    # the same numbers from the network itself
    x = (
        inference_config()
        .get_parsed_content("preprocessing")({"image": str(scans / "RAS" / "RAS.nii.gz")})["image"]
        .as_tensor()
    )
    sampler = LatentSampler([scan_generator(0, "RAS/RAS.nii.gz")])
    with torch.no_grad():
        output = super(VDVAEReconstruction, network).forward(x[None], sampler=sampler)
    nll = negative_log_likelihood(output.loc, output.scale, x[None])
    assert one["RAS/RAS.nii.gz"]["nll"] == pytest.approx(float(nll), rel=1e-4)
    assert one["RAS/RAS.nii.gz"]["kl"] == pytest.approx(float(output.kl.sum()), rel=1e-4)
    for bits in (8, 12):
        rounded = discretised_nll(output.loc, output.scale, x[None], (-1, 1), 2**bits)
        expected = float(bits_per_dim(rounded.sum() + output.kl.sum(), x[None]))
        assert one["RAS/RAS.nii.gz"][f"bits_per_voxel_{bits}bit"] == pytest.approx(expected, rel=1e-4)
    inside = x[None] > -0.9
    nats = discretised_nll(output.loc, output.scale, x[None], (-1, 1))[inside].sum() + output.kl.sum()
    assert one["RAS/RAS.nii.gz"]["bits_per_voxel_8bit_brain"] == pytest.approx(
        float(nats / inside.sum() / math.log(2)), rel=1e-4
    )
    assert len(files(tmp_path / "1", "*_anomaly.nii.gz")) == len(files(tmp_path / "1", "*_anomaly.png")) == 5


def test_the_bound_tightens_with_importance_samples(cohort, network):
    x, _ = fitted_scans(cohort)
    bounds = []
    for samples in (1, 4, 16):
        torch.manual_seed(0)
        repeats = [Scoring(samples)(x, network)["elbo"].mean() for _ in range(16 // samples)]
        bounds.append(float(torch.stack(repeats).mean()))
    assert bounds[0] < bounds[1] < bounds[2]
    with pytest.raises(ValueError, match="importance_samples is 0"):
        Scoring(0)


def test_what_is_planted_shows_in_the_anomaly_map(scans, network):
    x = (
        inference_config()
        .get_parsed_content("preprocessing")({"image": str(scans / "RAS" / "RAS.nii.gz")})["image"]
        .as_tensor()
    )
    planted = x[None].clone()
    planted[0, 0, 1, 6, 6] = 0.0  # half as bright as can be, where there is background
    plain, odd = (Scoring(smoothing=0.7)(scan, network) for scan in (x[None], planted))
    assert odd["anomaly"].argmax() == torch.arange(512).reshape(8, 8, 8)[1, 6, 6]
    assert odd["anomaly"].max() > 3 * plain["anomaly"].max()
    inside = plain["anomaly"][foreground(x[None], network)]
    torch.testing.assert_close(plain["anomaly_score"][0], torch.quantile(inside, 0.999), rtol=0, atol=1e-4)
    assert odd["elbo"] < plain["elbo"]
    # smoothing spreads it: without, its neighbours stay as they are
    sharp = Scoring(smoothing=0.01)(planted, network)["anomaly"]
    assert sharp[0, 0, 2, 6, 6] < 0.5 * odd["anomaly"][0, 0, 2, 6, 6]


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan")])
def test_what_to_restore_must_be_more_than_nothing(threshold):
    with pytest.raises(ValueError, match="more than 0 standard deviations; None restores nothing"):
        Scoring(restore=threshold)


def test_nothing_is_restored_where_that_is_asked_for(scans, network):
    x = upright(scans)[None]
    loc = network.infer(x.clamp(*OUTPUT_RANGES[network.output_activation]), temperature=0.0)[0].loc
    assert torch.equal(Scoring(restore=None)(x, network)["restored"], loc)


# Many scans


def test_a_scan_that_cannot_be_read_is_reported_and_stops_nothing(scans, weights, tmp_path):
    shutil.copytree(scans, tmp_path / "scans")
    (tmp_path / "scans" / "RAS" / "broken.nii.gz").write_text("no scan")
    output = tmp_path / "out"
    log = run("reconstruct", tmp_path / "scans", output, weights, code=1)
    assert "1 scan(s) failed" in log
    with (output / "failed.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["image"] == "RAS/broken.nii.gz"
    assert row["reason"].startswith("it cannot be read as an image")
    assert "The first, 'RAS/broken.nii.gz': it cannot be read as an image" in log
    assert f"Results of 5 of 6 scan(s): '{output}'." in log
    assert len(files(output, "*_recon.nii.gz")) == 5
    (tmp_path / "scans" / "RAS" / "broken.nii.gz").unlink()
    run("reconstruct", tmp_path / "scans", output, weights)
    assert not (output / "failed.csv").exists()


def test_a_killed_job_leaves_nothing_torn_and_is_finished_by_the_next(cohort, weights, tmp_path):
    scans, output = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for copy in range(3):
        for path in cohort.glob("*.nii.gz"):
            shutil.copy(path, scans / f"{copy}_{path.name}")
    words = ["--dataset_dir", scans, "--output_dir", output, "--ckpt", weights, "--batch_size", 1, "--num_workers", 2]
    command, environment = bundle_command(*words, run_id="reconstruct", configs=CONFIGS)
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as job:
        while len(files(output, "*_recon.nii.gz") if output.exists() else []) < 5:
            assert job.poll() is None
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
    done = {name: (output / name).stat().st_mtime_ns for name in files(output, "[!.]*_zscore.nii.gz")}
    assert 0 < len(done) < 36
    for name in files(output, "[!.]*.nii.gz"):
        nib.load(output / name).get_fdata()
    log = run("reconstruct", scans, output, weights, "--batch_size", 4)
    assert f"Of 36 scans, {len(done)} are finished already" in log
    assert len(files(output, "[!.]*_zscore.nii.gz")) == 36
    assert {name: (output / name).stat().st_mtime_ns for name in done} == done


def test_the_results_of_a_scan_that_changed_are_made_again(scans, weights, tmp_path):
    shutil.copytree(scans, tmp_path / "scans")
    run("reconstruct", tmp_path / "scans", tmp_path / "out", weights)
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in files(tmp_path / "out", "*_recon.nii.gz")}
    shutil.copy2(scans / "LPS" / "LPS.nii.gz", tmp_path / "scans" / "PIR" / "PIR.nii.gz")  # with an old time of change
    log = run(None, tmp_path / "scans", tmp_path / "out", weights)  # without a word it reconstructs
    assert "Of 5 scans, 4 are finished already" in log
    changed = [name for name, time in before.items() if (tmp_path / "out" / name).stat().st_mtime_ns != time]
    assert changed == ["PIR/PIR_recon.nii.gz"]


@pytest.mark.parametrize("changed", ["a.raw", "series/1.dcm", "b.nii"])
def test_a_change_of_any_file_that_results_are_made_of_is_seen(tmp_path, changed):
    (tmp_path / "series").mkdir()
    for name in ("a.mhd", "a.raw", "series/1.dcm", "b.nii", "result.nii"):
        (tmp_path / name).touch()
    item = {"image": [str(tmp_path / "a.mhd"), str(tmp_path / "series")], "second": str(tmp_path / "b.nii")}
    job = SimpleNamespace(common=SimpleNamespace(overwrite=False), _has_results=bool, _place=lambda item: "a")
    job._result_paths = lambda item: [tmp_path / "result.nii"]
    assert ScanEvaluator.finished(job, item, {"a": made_of(item)})
    os.utime(tmp_path / changed, (time.time() + 60,) * 2)
    assert not ScanEvaluator.finished(job, item, {"a": made_of(item)})


def test_scans_whose_results_would_have_one_name_are_refused(scans, weights, tmp_path):
    (tmp_path / "scans").mkdir()
    shutil.copy(scans / "RAS" / "RAS.nii.gz", tmp_path / "scans" / "a.nii.gz")
    nib.save(nib.load(scans / "LPS" / "LPS.nii.gz"), tmp_path / "scans" / "a.nii")
    log = run("reconstruct", tmp_path / "scans", tmp_path / "out", weights, code=1)
    assert "a.nii' and '" in log.splitlines()[-1] and "would both be written to" in log.splitlines()[-1]
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_scans_of_one_name_in_two_folders_have_noise_of_their_own(scans, weights, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "scans" / folder).mkdir(parents=True)
        shutil.copy(scans / "RAS" / "RAS.nii.gz", tmp_path / "scans" / folder / "T1.nii.gz")
    run("reconstruct", tmp_path / "scans", tmp_path / "out", weights, "--temperature", 1.0)
    first, second = (load(tmp_path / "out" / folder, "T1_recon.nii.gz") for folder in ("a", "b"))
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.8
    assert not np.allclose(first, second)


def test_results_of_other_settings_are_not_mixed(scans, reconstructed, weights, tmp_path):
    shutil.copytree(reconstructed[0], tmp_path / "out")

    def again(*arguments, code=0):
        return run("reconstruct", scans, tmp_path / "out", weights, *arguments, code=code)

    log = again("--levels", "each", "--temperature", 0.5, code=1)
    assert "holds results of 'reconstruct' made with another temperature: set --output_dir" in log
    again("--levels", "each", "--temperature", 0.5, "--overwrite", True)
    before, after = (load(f, "RAS/RAS_recon.nii.gz") for f in (reconstructed[0], tmp_path / "out"))
    assert not np.allclose(before, after)
    for change, value in (
        ("keep_aspect", False),
        ("network_def", "sigmoid"),
        ("amp_dtype", "$torch.bfloat16"),
        ("seed", 1),
    ):
        key = "network_def#output_activation" if change == "network_def" else change
        words = ("--levels", "each", "--temperature", 0.5, f"--{key}", value)
        log = run("reconstruct", scans, tmp_path / "out", weights, *words, code=1)
        assert f"holds results of 'reconstruct' made with another {change}: set --output_dir" in log
    step = {"_target_": "GaussianSmoothd", "keys": "image", "sigma": 1.0}
    (tmp_path / "smoothed.json").write_text(json.dumps({"+preprocessing#transforms": [step]}))
    log = again(
        "--levels",
        "each",
        "--temperature",
        0.5,
        "--config_file",
        str([*CONFIGS, str(tmp_path / "smoothed.json")]),
        code=1,
    )
    assert "holds results of 'reconstruct' made with another transforms: set --output_dir" in log
    told = (tmp_path / "out" / "reconstruct.json").read_bytes()
    log = again("--levels", "[9]", "--overwrite", True, code=1)
    assert "levels" in log.splitlines()[-1]
    assert (tmp_path / "out" / "reconstruct.json").read_bytes() == told


def test_the_job_that_the_docs_add(cohort, network, tmp_path):
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", (ROOT / "docs" / "code.md").read_text(), re.MULTILINE)
    names = {**vars(inferers), **vars(jobs)}
    for start in ("class Smoothing", "def smooth("):
        (block,) = (text for text in map(textwrap.dedent, blocks) if text.strip().startswith(start))
        exec(block, names)
    config = inference_config(network=network, dataset_dir=str(cohort), output_dir=str(tmp_path))
    names["smooth"](config.get_parsed_content("common"), 2).run()
    names["smooth"](config.get_parsed_content("common"), 2).run()  # nothing is left
    smooth = load(tmp_path, "sub-0001_FLAIR_smooth.nii.gz")
    scan = nib.load(cohort / "sub-0001_FLAIR.nii.gz").get_fdata()
    assert np.corrcoef(smooth.ravel(), scan.ravel())[0, 1] > 0.8


def test_of_a_datalist_the_testing_side_alone_is_taken_where_it_has_one(tmp_path):
    sides = {"training": [{"image": "a.nii"}], "validation": [{"image": "b.nii"}], "testing": [{"image": "c.nii"}]}
    for expected in (["c.nii"], ["a.nii", "b.nii"]):
        (tmp_path / "datalist.json").write_text(json.dumps(sides))
        assert [Path(item["image"]).name for item in list_scans(tmp_path / "datalist.json")] == expected
        sides.pop("testing", None)


def test_results_stay_inside_the_output_folder(tmp_path):
    layout = ScanLayout(tmp_path / "scans", tmp_path / "out", "recon")
    assert layout.path(tmp_path / "scans" / "a" / "b.nii.gz") == tmp_path / "out" / "a" / "b_recon.nii.gz"
    for outside in (tmp_path / "scans" / ".." / "x.nii", tmp_path / "other" / "x.nii"):
        with pytest.raises(ScanError, match="is not under"):
            layout.path(outside)


def test_memory_does_not_grow_with_the_number_of_scans(scans, network, tmp_path):
    """No result is held on to once it is written."""
    tiny = inference_config(dataset_dir=str(scans), output_dir=str(tmp_path), batch_size=1)
    tiny["network"] = network
    evaluator: ScanEvaluator = tiny.get_parsed_content("evaluator")
    seen = []
    inferer = evaluator.inferer

    def watched(*args, **kwargs):
        results = inferer(*args, **kwargs)
        seen.append(weakref.ref(results["recon"]))
        assert sum(ref() is not None for ref in seen) <= 2
        return results

    evaluator.inferer = watched
    evaluator.run()
    assert len(seen) == 5


# From Python, and together with training


def test_the_code_of_the_docs_runs(scans, encoded, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/inference.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    (tmp_path / "edited").mkdir()
    places = {
        "RESULTS/sub-01_latents.npz": encoded[0] / "RAS" / "RAS_latents.npz",
        "EDITED/sub-01_latents.npz": tmp_path / "edited" / "RAS_latents.npz",
        "models/model.pt": weights,
        '"scan.nii.gz"': f'"{scans / "RAS" / "RAS.nii.gz"}"',
        '"DIR"': f'"{scans}"',
        '"RESULTS"': f'"{tmp_path / "results"}"',
        '"configs/inference.json"': str(CONFIGS),  # with the tiny network
    }
    for block in blocks:
        for before, after in places.items():
            block = block.replace(before, str(after))
        exec(compile(block, "docs/inference.md", "exec"), {})
    assert (tmp_path / "edited" / "RAS_latents.npz").is_file()
    assert (tmp_path / "results" / "scores.csv").is_file()


def test_encode_and_decode_an_array_from_python(weights):
    config = ConfigParser.load_config_file(ROOT / "configs" / "inference.json")
    bundle = ConfigParser(config)
    bundle.update(json.loads((ROOT / "tests" / "tiny.json").read_text()))
    bundle["ckpt"] = str(weights)
    network = bundle.get_parsed_content("network").eval()
    array = torch.rand(1, 1, 8, 8, 8) * 2 - 1
    with torch.no_grad():
        latents = network.encode(array, temperature=0.0)
        loc, scale = network.decode(latents)
        assert torch.allclose(loc, network(array), atol=1e-6)
    assert loc.shape == scale.shape == array.shape


def test_a_job_as_a_workflow(scans, weights, tmp_path):
    job = create_workflow(
        config_file=[str(ROOT / name) for name in CONFIGS],
        workflow_type="infer",
        run_id="score",
        bundle_root=str(ROOT),
        ckpt=str(weights),
        dataset_dir=str(scans),
        output_dir=str(tmp_path),
        figures=False,
    )
    assert not job.check_properties()
    job.run()
    job.finalize()
    assert len(rows_of(tmp_path / "scores.csv")) == 5


def test_training_and_inference_prepare_scans_alike(scans):
    grid = {"grid": ScanGrid([[0.0, -18.0, 20.0], [210.0, 230.0, 190.0]])}
    train = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "train.json") | {"augment": False} | grid)
    files = [str(ROOT / "configs" / name) for name in ("inference.json", "lean_32.json")]  # train.json is of this size
    infer = ConfigParser(ConfigParser.load_config_files(files) | grid)
    path = {"image": str(scans / "PIR" / "PIR.nii.gz")}
    trained = train.get_parsed_content("train#preprocessing")(train.get_parsed_content("preprocessing")(path))["image"]
    inferred = infer.get_parsed_content("preprocessing")(path)["image"]
    assert torch.allclose(trained.as_tensor(), inferred.as_tensor(), atol=1e-6)
    assert torch.equal(trained.affine, inferred.affine)
    assert train["spatial_shape"] == infer["spatial_shape"]
    for key in ("keep_aspect", "percentiles", "scan_pattern"):
        assert infer.get_parsed_content("training_run").get(key, infer[key]) == train[key]
    own = {key: value for key, value in infer["network_def"].items() if key != "_target_" and value is not None}
    assert own == {key: value for key, value in train["network_def"].items() if key != "_target_"}


@pytest.mark.parametrize("word", ["reconstruct", "score", "sample"])
def test_two_processes_give_what_one_gives(scans, weights, tmp_path, word):
    """Each scan once, none missing, one list of failures, and the same numbers."""
    shutil.copytree(scans, tmp_path / "scans")
    (tmp_path / "scans" / "broken.nii.gz").write_text("no scan")
    words = ["--dataset_dir", tmp_path / "scans", "--ckpt", weights, "--batch_size", 2, "--samples", 5]
    words += ["--figures", word == "score"]
    outputs = [tmp_path / "1", tmp_path / "2"]
    results = [run_bundle(*words, "--output_dir", outputs[0], run_id=word, configs=CONFIGS)]
    configs = [*CONFIGS, "configs/multi_gpu_inference.json"]
    results += run_bundle_group(*words, "--output_dir", outputs[1], run_id=word, configs=configs)
    for result in results:
        assert (result.returncode != 0) == (word != "sample"), result.stderr
    assert files(outputs[0]) == files(outputs[1])
    assert ("failed.csv" in files(outputs[0])) == (word != "sample")
    for name in files(outputs[0], "*.nii.gz"):
        assert np.allclose(load(outputs[0], name), load(outputs[1], name), rtol=1e-4, atol=1e-2)
    if word == "score":
        one, two = (rows_of(output / "scores.csv") for output in outputs)
        assert list(one) == list(two)
        for name, row in one.items():
            assert row == pytest.approx(two[name], rel=1e-4, abs=1e-3)
