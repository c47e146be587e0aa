"""2D scans and scans of two channels, from training to every job, with the default augmentation."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import TINY, inference_config, run_bundle, save
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose

from scripts.data.transforms import ScanError
from scripts.inference.engine import ScanEvaluator
from scripts.inference.latent_files import LoadLatentsd
from scripts.inference.layouts import SampleLayout, ScanLayout
from scripts.inference.outputs import file_names, split_channels
from scripts.utils import figures
from scripts.utils.names import CHANNEL_FILES
from scripts.webpage.jobs import Jobs

CHANNELS = ("T1w", "FLAIR")
INFERENCE = ["configs/inference.json", "tests/tiny.json"]
KINDS = {
    "slices": ("--network_def#spatial_dims", 2, "--spatial_shape", "[8,8]"),
    "channels": ("--network_def#in_channels", 2, "--scan_pattern", "['*_T1w.nii.gz','*_FLAIR.nii.gz']"),
    "slices of two channels": (
        *("--network_def#spatial_dims", 2, "--spatial_shape", "[8,8]", "--network_def#in_channels", 2),
        *("--scan_pattern", "['*_T1w.nii.gz','*_FLAIR.nii.gz']"),
    ),
}


def make_scans(folder: Path, kind: str) -> Path:
    shape = (12, 12) if "slices" in kind else (12, 12, 12)
    names = ("T1w", "FLAIR") if "channels" in kind else ("T1w",)
    generator = np.random.default_rng(0)
    folder.mkdir()
    axes = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    inside = sum(axis**2 for axis in axes) < 0.7
    for number in range(6):
        for name in names:
            tissue = np.maximum(100 + 30 * generator.standard_normal(shape), 1)
            save(folder / f"sub-{number:02d}_{name}.nii.gz", np.where(inside, tissue, 0), np.diag([2.0, 2, 2, 1]))
    return folder


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Of a kind of scans: four of its six subjects, and the folder of a run on all with the default augmentation.

    For the voxel-wise statistics each scan is drawn 512 times, in the kind in which that is quick; in others once.
    """

    @functools.cache
    def train_once(kind: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("kinds")
        scans = make_scans(folder / "scans", kind)
        words = ("--dataset_dir", scans, "--output_dir", folder / "run", "--batch_size", 2, *KINDS[kind])
        configs = TINY[:2] if kind == "slices of two channels" else TINY
        result = run_bundle(*words, "--figure_interval", 2, configs=configs)
        assert result.returncode == 0, result.stderr
        (folder / "few").mkdir()
        for path in scans.glob("sub-0[0-3]_*"):
            shutil.copy(path, folder / "few")
        return folder / "few", folder / "run"

    return train_once


@pytest.fixture(scope="module", params=KINDS)
def trained(request, train):
    """The kind of scans, a folder of four, and that of a run on such."""
    return request.param, *train(request.param)


def test_a_run_trains_and_draws_figures(trained):
    kind, _, run = trained
    weights = torch.load(run / "checkpoints" / "model.pt", weights_only=True)
    assert weights["template_mean"].shape == (1, 2 if "channels" in kind else 1, *[8] * (2 if "slices" in kind else 3))
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert (run / "figures" / "reconstructions_epoch=0002.png").stat().st_size > 3000


JOBS = ("reconstruct", "encode", "sample", "score", "interpolate")


@pytest.mark.parametrize(
    ("trained", "job"),
    [
        *((kind, job) for kind in ("slices", "channels") for job in JOBS),
        *(("slices of two channels", job) for job in ("reconstruct", "sample")),
    ],
    indirect=["trained"],
)
def test_every_job_takes_them(trained, job, tmp_path):
    kind, scans, run = trained
    words = ("--dataset_dir", scans, "--output_dir", tmp_path, "--ckpt", run / "checkpoints" / "model.pt")
    result = run_bundle(
        *words, *KINDS[kind], "--samples", 2, "--steps", 2, "--figures", True, run_id=job, configs=INFERENCE
    )
    assert result.returncode == 0, result.stderr
    key = {"reconstruct": "recon", "score": "anomaly", "sample": "sample", "interpolate": "step01"}.get(job)
    if key is None:
        path, *others = tmp_path.glob("*_latents.npz")
        assert len(others) == 3
        with np.load(path) as content:  # as decode reads them
            grids = [content[name].shape for name in sorted(content.files) if name[0] == "z"]
        fit = LoadLatentsd("image", grids, 2 if kind == "channels" else 1)({"image": path})["fit"]
        assert fit.scan_shape == [12] * (2 if kind == "slices" else 3)
        return
    results = sorted(tmp_path.glob(f"*_{key}.nii.gz"))
    channels = 2 if "channels" in kind else 1
    assert len(results) == {"sample": 2, "interpolate": 1}.get(job, 4) * channels
    size = 12 if job in ("reconstruct", "score") else 8
    grid = (size, size) if "slices" in kind else (size,) * 3
    assert all(nib.load(path).shape == grid for path in results)
    assert all(np.isfinite(nib.load(path).get_fdata()).all() for path in results)


def test_the_page_shows_a_slice(train):
    scans, run = train("slices")
    changes = {"network_def#spatial_dims": 2, "spatial_shape": [8, 8], "ckpt": str(run / "checkpoints" / "model.pt")}
    *_, result = Jobs(inference_config(**changes, dataset_dir=str(scans))).view(0)
    assert len(result.content["peak"]) == 3 and result.files["scan.nii.gz"]


NAMING = {"join": ("--join_channels", True), "bids": ("--bids_derivatives", True)}


@pytest.fixture(scope="module")
def decoded(two_channels, tmp_path_factory):
    """Folders of ``reconstruct``, ``encode`` and ``decode``, as is, with channels joined, and with names by BIDS."""
    scans, run = two_channels
    words = ("--ckpt", run / "checkpoints" / "model.pt", *KINDS["channels"])
    folder = tmp_path_factory.mktemp("decoded")
    for name, more in {"plain": (), **NAMING}.items():
        for job in ("reconstruct", "encode", "decode"):
            source = folder / name / "encode" if job == "decode" else scans
            output = folder / name / job
            result = run_bundle(
                *("--dataset_dir", source, "--output_dir", output, *words, *more), run_id=job, configs=INFERENCE
            )
            assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def two_channels(train):
    return train("channels")


def values(path: Path) -> np.ndarray:
    return nib.load(path).get_fdata(dtype=np.float32)


@pytest.mark.parametrize("job", ["reconstruct", "decode"])
def test_each_channel_has_its_own_file(decoded, job):
    names = [f"sub-{n:02d}_{channel}_{key}" for n in range(4) for channel in CHANNELS for key in ("recon", "scale")]
    found = {path.name.removesuffix(".nii.gz") for path in (decoded / "plain" / job).glob("*.nii.gz")}
    assert set(names) == {name for name in found if not name.endswith("zscore")}
    for number in range(4):
        both = [values(decoded / "plain" / job / f"sub-{number:02d}_{channel}_recon.nii.gz") for channel in CHANNELS]
        joined = values(decoded / "join" / job / f"sub-{number:02d}_T1w_recon.nii.gz")
        assert joined.shape == (12, 12, 12, 2)
        assert np.array_equal(np.stack(both, -1), joined)
        for name, channel in zip(CHANNELS, both, strict=True):
            bids = decoded / "bids" / job / f"sub-{number:02d}" / "anat" / f"sub-{number:02d}_desc-recon_{name}.nii.gz"
            assert np.array_equal(values(bids), channel)


def test_decoded_channels_are_those_reconstructed(decoded):
    for path in (decoded / "plain" / "decode").glob("*_recon.nii.gz"):
        before = values(decoded / "plain" / "reconstruct" / path.name)
        assert np.abs(values(path) - before).max() <= 1e-5 * np.ptp(before)


def test_bids_results_are_described(decoded):
    for job in ("reconstruct", "encode", "decode"):
        volumes = sorted((decoded / "bids" / job).rglob("*.nii.gz"))
        assert all(path.with_name(path.name.replace(".nii.gz", ".json")).is_file() for path in volumes)
        assert bool(volumes) == (job != "encode")
        content = json.loads((decoded / "bids" / job / "dataset_description.json").read_text())
        assert [entry["Description"].split(",")[0] for entry in content["GeneratedBy"]] == [job]


def run_in(folder: Path, scans: Path, run: Path, *words: object, job: str):
    common = ("--ckpt", run / "checkpoints" / "model.pt", *KINDS["channels"])
    return run_bundle(*("--dataset_dir", scans, "--output_dir", folder, *common, *words), run_id=job, configs=INFERENCE)


def test_latents_without_names_give_one_file_and_renamed_ones_carry_their_name(decoded, two_channels, tmp_path):
    with np.load(decoded / "plain" / "encode" / "sub-00_T1w_latents.npz") as file:
        latents = dict(file)
    assert latents["channel_names"].tolist() == ["sub-00_T1w", "sub-00_FLAIR"]
    folder = tmp_path / "latents"
    folder.mkdir()
    np.savez(folder / "sub-00_T1w_minus_latents.npz", **latents)
    np.savez(folder / "plus_latents.npz", **latents)
    np.savez(folder / "old_latents.npz", **{name: array for name, array in latents.items() if name != "channel_names"})
    result = run_in(tmp_path / "out", folder, two_channels[1], job="decode")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("*_recon.nii.gz")) == [
        "old_recon.nii.gz",
        "plus_sub-00_FLAIR_recon.nii.gz",
        "plus_sub-00_T1w_recon.nii.gz",
        "sub-00_FLAIR_minus_recon.nii.gz",
        "sub-00_T1w_minus_recon.nii.gz",
    ]
    assert nib.load(tmp_path / "out" / "old_recon.nii.gz").shape == (12, 12, 12, 2)


def test_a_channel_that_is_missing_is_made_again_and_the_others_are_kept(decoded, two_channels, tmp_path):
    scans, run = two_channels
    assert run_in(tmp_path, scans, run, job="reconstruct").returncode == 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.nii.gz")}
    missing = tmp_path / "sub-03_FLAIR_recon.nii.gz"
    missing.unlink()
    result = run_in(tmp_path, scans, run, job="reconstruct")
    assert result.returncode == 0 and missing.is_file(), result.stderr
    again = {path.name[:6] for path, time in written.items() if path.stat().st_mtime_ns != time}
    assert again == {"sub-03"}
    refused = run_in(tmp_path, scans, run, "--join_channels", True, job="reconstruct")
    assert refused.returncode != 0 and "made with another join_channels" in refused.stderr


def test_a_file_of_several_channels_gives_one_file(two_channels, tmp_path):
    scans, run = two_channels
    folder = tmp_path / "scans"
    folder.mkdir()
    both = [nib.load(scans / f"sub-00_{channel}.nii.gz") for channel in CHANNELS]
    save(folder / "sub-00_both.nii.gz", np.stack([image.get_fdata() for image in both], -1), both[0].affine)
    words = ("--scan_pattern", "*.nii.gz")
    result = run_in(tmp_path / "out", folder, run, *words, job="reconstruct")
    assert result.returncode == 0, result.stderr
    assert nib.load(tmp_path / "out" / "sub-00_both_recon.nii.gz").shape == (12, 12, 12, 2)


def test_scans_without_bids_names_are_refused_before_anything_is_made(two_channels, tmp_path):
    scans, run = two_channels
    folder = tmp_path / "scans"
    folder.mkdir()
    for channel in CHANNELS:
        (folder / f"brain7_{channel}.nii.gz").write_bytes((scans / f"sub-00_{channel}.nii.gz").read_bytes())
    result = run_in(tmp_path / "out", folder, run, "--bids_derivatives", True, job="reconstruct")
    assert result.returncode != 0 and "'brain7_T1w' has no BIDS name" in result.stderr
    assert not list((tmp_path / "out").rglob("*.nii.gz"))


def test_channels_whose_results_would_have_one_name_are_refused(tmp_path):
    layout = ScanLayout(tmp_path, tmp_path / "out", "recon")
    same = [str(tmp_path / "sub-01.nii.gz"), str(tmp_path / "sub-01.mha")]
    evaluator = ScanEvaluator.__new__(ScanEvaluator)  # of which nothing else is asked
    evaluator.layouts, evaluator.dataset = [layout], SimpleNamespace(data=[{"image": same}])
    evaluator.results_of = Compose([])
    with pytest.raises(ValueError, match="would both be written to"):
        evaluator.check_names()
    evaluator.layouts = [ScanLayout(tmp_path, tmp_path / "out", "recon", join_channels=True)]
    evaluator.check_names()


def test_files_of_several_channels_each_are_refused_with_what_to_do():
    names = ["a_T1w.nii.gz", "a_FLAIR.nii.gz"]
    assert [part.shape for part in split_channels(torch.zeros(2, 3, 3), names).values()] == [(1, 3, 3)] * 2
    with pytest.raises(ScanError, match=r"hold 4 channels.*--join_channels True"):
        split_channels(torch.zeros(4, 3, 3), names)


PATTERNS = [
    (["*_T1w.nii.gz", "*_FLAIR.nii.gz"], ["T1w", "FLAIR"]),
    (["sub-*/anat/*_T1w.nii*", "sub-*/anat/*_T2w.nii*"], ["T1w", "T2w"]),
    (["T1/*.nii.gz", "FLAIR/*.nii.gz"], ["T1", "FLAIR"]),
    (["*_T1w.nii.gz", "*_T1w_masked.nii.gz"], ["channel1", "channel2"]),
]


@pytest.mark.parametrize(("patterns", "labels"), PATTERNS)
def test_samples_are_named_after_the_patterns_of_the_channels(tmp_path, patterns, labels):
    layout = SampleLayout(tmp_path, "sample", patterns, channels=2)
    names = [path.name for path in layout.paths({"image": str(tmp_path / "0001")})]
    assert names == [f"0001_{label}_sample.nii.gz" for label in labels]
    # without a pattern for each channel there are no names for them
    assert len(SampleLayout(tmp_path, "sample", "*.nii*", channels=2).paths({"image": str(tmp_path / "0001")})) == 1


def test_figures_say_which_channel_is_which():
    image = MetaTensor(torch.zeros(2, 4, 4), meta={CHANNEL_FILES: ["scans/a_T1w.nii.gz", "scans/a_FLAIR.nii.gz"]})
    assert file_names(image) == ["a_T1w.nii.gz", "a_FLAIR.nii.gz"]
    assert figures._channel_titles(file_names(image), 2) == file_names(image)
    assert figures._channel_titles("a.nii.gz", 2) == ["a.nii.gz, channel 1", "a.nii.gz, channel 2"]


def test_training_figures_name_each_channel(trained, monkeypatch):
    kind, _, run = trained
    parser = ConfigParser(ConfigParser.load_config_files(str(run / "config.json")))
    parser.update({"device": torch.device("cpu"), "cache_dir": str(run / "cache")})
    drawn = {}
    monkeypatch.setattr(figures, "reconstructions", lambda *args, **kwargs: drawn.update(names=args[4]))
    parser.get_parsed_content("train#figures")._draw_reconstructions("x")
    subject = parser.get_parsed_content("datalist")["validation"][0]["subject"]
    assert drawn["names"][0] == [f"{subject}_{name}" for name in ("T1w", "FLAIR")[: 2 if "channels" in kind else 1]]
