"""Evaluation as users run it, in one process and in two, and what its numbers say of models that are known."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import TINY, bundle_words, inference_config, run_bundle, run_command_process
from groups import run_bundle_group
from monai.inferers import Inferer
from monai.metrics import FIDMetric
from torch import nn

from scripts.inference import jobs
from scripts.inference.evaluation import held_out
from scripts.inference.inferers import Sampling
from scripts.inference.privacy import draw_samples, one_per_subject
from scripts.inference.sample_comparison import (
    compare_features,
    compare_images,
    compare_regions,
    gaussian_kernel,
    kernel_features,
    mean_of_pairs,
    mmd,
    ms_ssim_metric,
    random_halves,
    read_feature_network,
)
from scripts.layers.gaussian import gaussian_noise
from scripts.networks import VDVAE

EVALUATE = [*TINY, "configs/evaluate.json"]
EVALUATE_BY_TWO = [*EVALUATE, "configs/multi_gpu_evaluate.json"]
HALF = ("--train_fraction", 0.5)  # six of the twelve phantoms are held out: a batch of four and one of two


def contents(folder) -> dict[str, str]:
    """The checksum of each file, those of an evaluation left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and "evaluation" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def last_validation(run) -> dict[str, float]:
    rows = [row for row in csv.DictReader((run / "history.csv").open()) if row["part"] == "validation"]
    return {name: float(value) for name, value in rows[-1].items() if value and name != "part"}


@pytest.fixture(scope="session")
def run(cohort, tmp_path_factory):
    """A training run of one epoch."""
    output = tmp_path_factory.mktemp("run")
    result = run_bundle("--dataset_dir", cohort, "--output_dir", output, "--epochs", 1, *HALF)
    assert result.returncode == 0, result.stderr
    return output


class Features(nn.Module):
    """Numbers of an image on a grid, four channels of them."""

    def forward(self, images):
        pooled = nn.functional.adaptive_avg_pool3d(images, 2)
        return torch.cat([pooled, pooled.square(), images.amax((2, 3, 4), True).expand_as(pooled), pooled.sqrt()], 1)


@pytest.fixture(scope="session")
def beside(cohort, tmp_path_factory) -> tuple:
    """Options that name a network of features, and an atlas of two halves."""
    folder = tmp_path_factory.mktemp("beside")
    torch.jit.script(Features()).save(str(folder / "features.pt"))
    scan = nib.load(next(cohort.glob("*.nii.gz")))
    halves = np.ones(scan.shape, np.uint8)
    halves[scan.shape[0] // 2 :] = 2
    nib.save(nib.Nifti1Image(halves, scan.affine), folder / "atlas.nii.gz")
    return ("--fid_network", folder / "features.pt", "--atlas", folder / "atlas.nii.gz")


@pytest.fixture(scope="session")
def evaluated(cohort, run, beside):
    """That run, evaluated in its own folder; what the folder held before, and what was printed."""
    before = contents(run)
    ckpt = run / "checkpoints" / "model.pt"
    words = ("--ckpt", ckpt, "--dataset_dir", cohort, "--output_dir", run, *HALF, "--samples", 5, *beside)
    words = bundle_words(*words, run_id=None, configs=EVALUATE)
    result = run_command_process("monai.bundle", *words, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    return json.loads((run / "evaluation" / "evaluation.json").read_text()), before, result.stderr


def test_the_elbo_is_what_training_reported(run, evaluated):
    summary, _, _ = evaluated
    reported = last_validation(run)
    shared = [name for name in reported if name in summary]
    assert {"bits_per_dim", "nll", "kl", "mse", "kl_z00", "kl_z04"} <= set(shared)
    for name in shared:
        assert summary[name] == pytest.approx(reported[name], rel=1e-6), name


def test_each_held_out_scan_has_a_row(run, evaluated):
    summary, _, _ = evaluated
    rows = list(csv.DictReader((run / "evaluation" / "evaluation.csv").open()))
    split = json.loads((run / "datalist.json").read_text())
    assert [row["image"] for row in rows] == [Path(item["image"]).name for item in split["validation"]]
    assert [row["subject"] for row in rows] == [item["subject"] for item in split["validation"]]
    assert summary["held_out_scans"] == len(rows) == 6
    for name in ("bits_per_dim", "kl_z00", "bits_per_voxel_8bit", "psnr_brain", "file_gzip", "file_linear"):
        values = [float(row[name]) for row in rows]
        assert summary[name] == pytest.approx(np.mean(values), rel=1e-6)
        assert summary[f"{name}_std"] == pytest.approx(np.std(values, ddof=1), rel=1e-4)
        assert summary[f"{name}_low"] <= summary[name] <= summary[f"{name}_high"]
    for row in rows:
        latents = sum(float(row[f"kl_z{index:02d}"]) for index in range(5))
        assert float(row["kl"]) == pytest.approx(latents, rel=1e-5)
        nats = float(row["nll"]) + float(row["kl"])
        assert float(row["bits_per_dim"]) == pytest.approx(nats / (512 * np.log(2)), rel=1e-5)


def test_training_people_are_compared_with_held_out_ones(evaluated):
    summary, _, _ = evaluated
    assert summary["training_scans"] == 6
    assert 0 <= summary["membership_auroc_low"] <= summary["membership_auroc"] <= summary["membership_auroc_high"] <= 1
    assert abs(summary["membership_gap"]) < 1
    assert 0 < summary["nearest_training_ratio"] < 10
    assert summary["variance_1_5"] > 0


def test_samples_are_compared_by_features_and_in_regions(evaluated):
    summary, _, _ = evaluated
    for name in ("fid", "region_distance"):
        assert summary[name] > 0
        assert 0 < summary[f"{name}_halves_mean"] < summary[f"{name}_halves_95"]


def test_nothing_of_the_training_run_is_touched(run, evaluated):
    _, before, log = evaluated
    assert before.items() <= contents(run).items()
    added = contents(run).keys() - before.keys()
    assert {Path(path).parent for path in added} <= {run / "cache"}
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == [
        "evaluation.csv",
        "evaluation.json",
        "report.html",
    ]
    assert "bits_per_dim" in log
    assert "mmd_halves_95" in log
    assert "held-out scans: 100%" in log
    assert "drawing samples: 100%" in log


@pytest.fixture(scope="session")
def by_two(cohort, run, beside, tmp_path_factory):
    """The same by two processes, the cache still to be filled; what they printed."""
    output = tmp_path_factory.mktemp("by_two")
    ckpt = run / "checkpoints" / "model.pt"
    arguments = ("--ckpt", ckpt, "--dataset_dir", cohort, "--output_dir", output, *HALF, "--samples", 5, *beside)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        results = run_bundle_group(*arguments, run_id=None, configs=EVALUATE_BY_TWO)
    log = "".join(result.stderr for result in results)
    assert [result.returncode for result in results] == [0, 0], log
    return output, log


def test_two_processes_find_what_one_finds(run, evaluated, by_two):
    output, log = by_two
    summary, _, _ = evaluated
    assert log.count("Evaluation:") == 1
    assert log.count("reading validation scans, 2 processes:   0%") == 1
    same({**json.loads((output / "evaluation" / "evaluation.json").read_text())}, summary)
    one, two = (list(csv.DictReader((p / "evaluation" / "evaluation.csv").open())) for p in (run, output))
    assert [row["image"] for row in one] == [row["image"] for row in two]


def same(found, expected, rel=1e-5):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            same(found[key], value, rel)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rel, abs=1e-9)
    else:
        assert found == expected


def test_a_bad_scan_ends_both_processes_with_one_sentence(cohort, run, tmp_path):
    shutil.copytree(cohort, tmp_path / "scans")
    split = json.loads((run / "datalist.json").read_text())
    bad = tmp_path / "scans" / Path(split["validation"][0]["image"]).name
    bad.write_bytes(b"not an image")
    ckpt = run / "checkpoints" / "model.pt"
    arguments = ("--ckpt", ckpt, "--dataset_dir", bad.parent, "--output_dir", tmp_path / "out", *HALF)
    # torchrun, which would end the other process, is not there
    patches = {"scripts.utils.distributed.EXIT_DELAY": 0.1}
    results = run_bundle_group(*arguments, run_id=None, configs=EVALUATE_BY_TWO, patches=patches)
    assert [result.returncode for result in results] == [1, 1]
    log = "".join(result.stderr for result in results)
    errors = [line for line in log.splitlines() if "Error: '" in line]
    assert len(errors) == 1, log
    assert bad.name in errors[0]
    assert not list((tmp_path / "out" / "evaluation").iterdir())


def test_without_weights_it_says_so(cohort, tmp_path):
    words = ("--ckpt", tmp_path / "none.pt", "--dataset_dir", cohort, "--output_dir", tmp_path / "out")
    result = run_bundle(*words, run_id=None, configs=EVALUATE)
    assert result.returncode == 1
    assert "none.pt' does not exist: set --ckpt" in result.stderr.splitlines()[-1]
    assert "under --bundle_root" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_testing_side_comes_before_validation():
    sides = {"training": [{"image": "a"}], "validation": [{"image": "b"}]}
    assert held_out(sides, "nowhere") == {"validation": [{"image": "b"}]}
    assert held_out({**sides, "testing": [{"image": "c"}]}, "nowhere") == {"validation": [{"image": "c"}]}


def test_scans_that_were_trained_on_are_refused(tmp_path):
    record = {
        "training": [{"image": str(tmp_path / "a.nii.gz")}],
        "validation": [{"image": str(tmp_path / "b.nii.gz")}],
    }
    (tmp_path / "datalist.json").write_text(json.dumps(record))
    other_seed = {"training": record["validation"], "validation": record["training"]}
    with pytest.raises(ValueError, match=r"1 of the 1 scans to evaluate on.*were trained on.*set --run_dir to it"):
        held_out(other_seed, tmp_path)
    # another session of a subject that was trained on; a subject of that name in another data set is somebody else
    record["training"][0]["subject"] = "sub-1"
    (tmp_path / "datalist.json").write_text(json.dumps(record))
    session = {"image": str(tmp_path / "c.nii.gz"), "subject": "sub-1"}
    with pytest.raises(ValueError, match=r"c\.nii\.gz', or other scans of their subjects, were trained on"):
        held_out({"training": [], "validation": [session]}, tmp_path)
    elsewhere = {"image": "/another/c.nii.gz", "subject": "sub-1"}
    assert held_out({"training": [], "validation": [elsewhere]}, tmp_path)["validation"] == [elsewhere]
    assert held_out(record, tmp_path)["validation"] == record["validation"]


def network() -> VDVAE:
    torch.manual_seed(0)
    sizes = {"channels": [4, 6], "num_latents": [1, 2], "latent_channels": [2, 3], "kernel_sizes": [3, 2]}
    return VDVAE(3, 1, spatial_shape=[8, 8, 8], **sizes)


def blobs(count: int, shift: float = 0.0) -> torch.Tensor:
    """Images of a random brightness and a little noise."""
    brightness = torch.randn(count, 1, 1, 1, 1, generator=torch.Generator().manual_seed(count))
    noise = torch.randn(count, 1, 8, 8, 8, generator=torch.Generator().manual_seed(count + 1))
    return 0.3 * brightness + 0.1 * noise + shift


class Blobs(Inferer):
    """A model that is known: it draws what `blobs` draws, moved by `shift`, as varied as `spread` says."""

    def __init__(self, shift: float = 0.0, spread: float = 1.0) -> None:
        self.shift, self.spread = shift, spread

    def __call__(self, inputs, network, *args, sampler=None, **kwargs):
        noise = gaussian_noise(torch.zeros(inputs, 1, 8, 8, 9), sampler)
        brightness = noise[..., :1, :1, -1:]
        return {"sample": self.spread * (0.3 * brightness + 0.1 * noise[..., :-1]) + self.shift}


def compare(inferer: Inferer, folder, samples: int = 24, scans: int = 40, batch_size: int = 8) -> dict:
    config = inference_config(network=network(), population_prior=None, output_dir=str(folder), batch_size=batch_size)
    sampling = jobs.sample(config.get_parsed_content("common"), samples)
    sampling.inferer = inferer
    return compare_images(draw_samples(sampling), blobs(scans)[:samples], (-1.0, 1.0), batch_size)


def test_a_perfect_model_is_within_the_sampling_error(tmp_path):
    found = compare(Blobs(), tmp_path)
    for name in ("mmd", "mmd_linear"):
        assert abs(found[name]) < found[f"{name}_halves_95"], name
        # halves of the same scans differ by nothing but chance
        assert abs(found[f"{name}_halves_mean"]) < found[f"{name}_halves_std"] / 4
    error = np.hypot(found["ms_ssim_standard_error"], found["ms_ssim_held_out_standard_error"])
    assert abs(found["ms_ssim"] - found["ms_ssim_held_out"]) < 3 * error
    assert not list(tmp_path.iterdir())  # they are compared in memory


def test_a_wrong_mean_is_seen_by_both_mmds(tmp_path):
    found = compare(Blobs(shift=0.5), tmp_path)
    for name in ("mmd", "mmd_linear"):
        assert found[name] > 2 * found[f"{name}_halves_95"], name
    # the squared distance of the mean images, 0.5 in each of 512 voxels
    assert found["mmd_linear"] == pytest.approx(512 * 0.25, abs=4 * found["mmd_linear_standard_error"])


def test_a_model_that_draws_the_mean_alone_is_seen_by_the_gaussian_kernel_and_by_diversity(tmp_path):
    found = compare(Blobs(spread=0.05), tmp_path)
    assert found["mmd_linear"] < found["mmd_linear_halves_95"]
    assert found["mmd"] > found["mmd_halves_95"]
    assert found["ms_ssim"] > found["ms_ssim_held_out"] + 0.2
    assert found["recall"] < 0.3


def test_samples_do_not_depend_on_their_batch(tmp_path):
    one, many = (compare(Sampling(1.0), tmp_path, samples=7, batch_size=size) for size in (1, 7))
    same(one, many, rel=1e-4)
    assert one["samples"] == one["scans_compared"] == 7


def test_few_scans_leave_open_what_they_cannot_tell(tmp_path):
    found = compare(Blobs(), tmp_path, samples=6, scans=3)
    assert found["scans_compared"] == 3
    assert found["mmd"] is not None
    assert found["mmd_standard_error"] is None
    assert found["ms_ssim_held_out_standard_error"] is None
    assert found["ms_ssim_standard_error"] > 0
    alone = compare(Blobs(), tmp_path, samples=6, scans=1)
    assert alone["mmd_linear"] is None and alone["precision"] is None


def test_the_fid_is_of_the_means_over_the_grid_of_images_from_0_to_1():
    samples, scans = (blobs(12, shift).clamp(-1, 1) for shift in (0.3, 0.0))
    found = compare_features(samples, scans, Features(), (-1.0, 1.0), batch_size=5)
    features = [Features()((x + 1) / 2).mean((2, 3, 4)) for x in (samples, scans)]
    assert found["fid"] == pytest.approx(FIDMetric()(*features).item(), rel=1e-3)
    same = compare_features(scans, scans, Features(), (-1.0, 1.0))
    assert same["fid"] == pytest.approx(0, abs=1e-6) and found["fid"] > found["fid_halves_95"]


def test_samples_that_differ_in_a_region_are_seen():
    labels = torch.zeros(8, 8, 8, dtype=torch.long)
    labels[:4], labels[4:, :4] = 1, 7
    scans = blobs(40)
    samples = blobs(41)[:40]
    honest = compare_regions(samples, scans, labels)
    changed = samples.clone()
    changed[:, :, :4] += 0.6
    found = compare_regions(changed, scans, labels)
    assert honest["region_distance"] < honest["region_distance_halves_95"] < found["region_distance"]
    # 0.6 in one of two regions, where people's brightness has a deviation of 0.3
    assert found["region_distance"] - honest["region_distance"] == pytest.approx(1, abs=0.4)


def test_what_gives_no_features_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_feature_network(tmp_path / "none.pt", "cpu")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match="cannot be read as TorchScript"):
        read_feature_network(tmp_path / "text.pt", "cpu")
    torch.jit.script(nn.Linear(3, 2)).save(str(tmp_path / "linear.pt"))
    linear = read_feature_network(tmp_path / "linear.pt", "cpu")
    with pytest.raises(ValueError, match=r"does not take images of shape \(1, 8, 8, 8\)"):
        compare_features(blobs(4), blobs(4), linear, (-1.0, 1.0))
    with pytest.raises(ValueError, match="must give one tensor"):
        compare_features(blobs(4), blobs(4), lambda x: x.mean(), (-1.0, 1.0))


def test_mmd_is_the_unbiased_estimate_of_its_kernel():
    images = blobs(10).flatten(1).double()
    first, second = [0, 1, 2, 3], [4, 5, 6, 7]
    distances = torch.cdist(images, images)
    median = torch.pdist(images[second]).median()
    kernel = torch.exp(-distances.square() / (2 * median**2))
    assert torch.allclose(gaussian_kernel(images @ images.T, second), kernel)
    between = kernel[first][:, second].mean().item()
    expected = mean_of_pairs(kernel, first) + mean_of_pairs(kernel, second) - 2 * between
    assert mmd(kernel_features(kernel), first, second) == pytest.approx(expected, abs=1e-9)


def test_the_deviation_over_halves_is_the_standard_error_of_the_whole():
    values = np.random.default_rng(0).normal(size=64)
    halves = random_halves(range(64), 2000, seed=0)
    assert all(len(a) == len(b) == 32 and not set(a) & set(b) for a, b in halves)
    spread = np.std([values[a].mean() for a, _ in halves])
    assert spread == pytest.approx(values.std(ddof=1) / 8, rel=0.05)


@pytest.mark.parametrize(("size", "scales"), [(4, 1), (8, 1), (16, 2), (32, 3), (56, 3), (64, 4), (112, 5), (256, 5)])
def test_ms_ssim_has_as_many_scales_as_fit(size, scales):
    metric = ms_ssim_metric([256, size], (-1, 1))
    assert len(metric.weights) == scales
    assert sum(metric.weights) == pytest.approx(1)
    images = torch.rand(2, 1, 256, size)
    assert metric(images, images).flatten().tolist() == pytest.approx([1, 1])


def test_sessions_of_a_subject_are_not_compared_with_each_other():
    items = [{"subject": f"sub-{index // 3}"} for index in range(12)]
    chosen = one_per_subject(items, 8, seed=0)
    assert sorted(items[index]["subject"] for index in chosen) == ["sub-0", "sub-1", "sub-2", "sub-3"]
    assert len(one_per_subject(items, 2, seed=0)) == 2
    assert one_per_subject([{}] * 5, 8, seed=0) == [0, 1, 2, 3, 4]
    assert {tuple(one_per_subject(items, 8, seed)) for seed in range(5)} != {tuple(chosen)}
