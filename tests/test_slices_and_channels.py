"""2D scans and scans of two channels, from training to every job, with the default augmentation."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import TINY, run_bundle, save

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


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """The kind of scans, their folder, and that of a run with the default augmentation.

    For the voxel-wise statistics each scan is drawn 512 times, in the kind in which that is quick; in others once.
    """
    folder = tmp_path_factory.mktemp("kinds")
    scans = make_scans(folder / "scans", request.param)
    words = ("--dataset_dir", scans, "--output_dir", folder / "run", "--batch_size", 2, *KINDS[request.param])
    configs = TINY[:2] if request.param == "slices of two channels" else TINY
    result = run_bundle(*words, "--figure_interval", 2, configs=configs)
    assert result.returncode == 0, result.stderr
    return request.param, scans, folder / "run"


def test_a_run_trains_and_draws_figures(trained):
    kind, _, run = trained
    weights = torch.load(run / "checkpoints" / "model.pt", weights_only=True)
    assert weights["template_mean"].shape == (1, 2 if "channels" in kind else 1, *[8] * (2 if "slices" in kind else 3))
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert (run / "figures" / "reconstructions_epoch=0002.png").stat().st_size > 3000


@pytest.mark.parametrize("job", ["reconstruct", "encode", "sample", "score", "interpolate"])
def test_every_job_takes_them(trained, job, tmp_path):
    kind, scans, run = trained
    words = ("--dataset_dir", scans, "--output_dir", tmp_path, "--ckpt", run / "checkpoints" / "model.pt")
    result = run_bundle(*words, *KINDS[kind], "--samples", 2, "--steps", 2, run_id=job, configs=INFERENCE)
    assert result.returncode == 0, result.stderr
    key = {"reconstruct": "recon", "score": "anomaly", "sample": "sample", "interpolate": "step01"}.get(job)
    if key is None:
        assert len(list(tmp_path.glob("*_latents.npz"))) == 6
        return
    results = sorted(tmp_path.glob(f"*_{key}.nii.gz"))
    assert len(results) == {"sample": 2, "interpolate": 1}.get(job, 6)
    size = 12 if job in ("reconstruct", "score") else 8
    grid = (size, size) if "slices" in kind else (size,) * 3
    # channels are a file's fourth axis, in samples as in reconstructions
    expected = (*grid, *[1] * (3 - len(grid)), 2) if "channels" in kind else grid
    assert all(nib.load(path).shape == expected for path in results)
    assert all(np.isfinite(nib.load(path).get_fdata()).all() for path in results)
