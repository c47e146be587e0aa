"""The published networks of 64³ and 128³, as deep but narrow: training with all that is on by default, to its end."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from conftest import run_bundle, save

NARROW = {64: (7, 23), 128: (8, 30)}  # levels, latents


@pytest.mark.parametrize("size", NARROW)
def test_a_published_size_ends(cohort, tmp_path, size):
    levels, latents = NARROW[size]
    scans, dims = cohort, 3
    if size == 128:  # as deep in 2D, of which the volume takes minutes
        scans, dims = tmp_path / "slices", 2
        scans.mkdir()
        inside = np.hypot(*np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64))) < 0.8
        for number in range(6):
            tissue = np.maximum(100 + 30 * np.random.default_rng(number).standard_normal((64, 64)), 1)
            save(scans / f"sub-{number}_T1w.nii.gz", np.where(inside, tissue, 0), np.diag([2.0, 2, 2, 1]))
    words = ["--dataset_dir", scans, "--max_scans", 6, "--batch_size", 4, "--train_fraction", 0.85, "--num_workers", 0]
    words += ["--spatial_shape", [size] * dims, "--network_def#spatial_dims", dims, "--augment", dims == 2]
    words += ["--network_def#channels", [2] * levels, "--network_def#latent_channels", [1] * levels]
    words += ["--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--network#augmented", False]
    words += ["--epochs", 1, "--figure_interval", int(dims == 2)]  # slices are quick
    done = run_bundle(*words, run_id="training", configs=["configs/train.json", f"configs/size_{size}.json"])
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run" / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert max(int(row["epoch"]) for row in rows) == 1
    assert f"kl_z{latents - 1:02d}" in rows[-1] and f"kl_z{latents:02d}" not in rows[-1]
    prior = torch.load(tmp_path / "run" / "checkpoints" / "population_prior.pt", weights_only=True)
    assert prior["scans"] == 5
    assert (tmp_path / "run" / "figures" / "samples_epoch=0001.png").is_file() == (dims == 2)
    words = ["--run_dir", tmp_path / "run", "--samples", 1, "--output_dir", tmp_path / "samples"]
    done = run_bundle(*words, run_id="sample", configs=["configs/inference.json"])
    assert done.returncode == 0 and (tmp_path / "samples" / "0001_sample.nii.gz").is_file(), done.stderr
