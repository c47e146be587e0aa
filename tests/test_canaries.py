"""The trial with marked scans: marks that a model keeps are found, and those that it doesn't are not."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, run_command

from benchmarks import canaries


def test_marks_are_where_they_are_put_and_apart():
    brain = np.zeros((24, 24, 24), np.float32)
    brain[2:-2, 2:-2, 2:-2] = 1 + np.random.default_rng(0).random((20, 20, 20))
    scan = nib.Nifti1Image(brain, np.diag([8.0, 8, 8, 1]))
    places = canaries.choose_places(scan, 9, np.random.default_rng(1))
    assert len(places) == 9
    distances = np.abs(places[:, None] - places[None]).max(2) + 100 * np.eye(9)
    assert distances.min() >= canaries.EDGE
    changed = canaries.marked(scan, places[0])
    where = np.argwhere(np.asarray(changed.dataobj) != brain)
    assert len(where) > 4 and np.abs(where * 8 - places[0]).max() <= canaries.EDGE / 2
    images = torch.from_numpy(np.stack([brain, np.asarray(changed.dataobj)]))[:, None]
    plain, bright = canaries.contrasts(images, places / 8, 1.0).T
    assert bright[0] - plain[0] > 0.3 and bright.argmax() == 0


def test_exposure_is_the_rank_among_marks_that_were_never_seen():
    seen = np.array([1, 16, *[0] * 63])
    bits = np.array([0.5, -1.0, *np.linspace(0.01, 0.99, 63)])
    assert canaries.exposures(bits, seen).tolist() == pytest.approx([np.log2(64 / 33), 6])
    chance = [canaries.exposures(np.random.default_rng(n).random(65), seen)[0] for n in range(2000)]
    assert np.mean(chance) == pytest.approx(1 / np.log(2), abs=0.15)


def test_the_trial_runs(tmp_path, monkeypatch, capsys):
    def in_this_process(words):
        done = run_command("monai.bundle", "run", "training", *words, "--num_workers", 0)
        assert done.returncode == 0, done.stderr

    monkeypatch.setattr(canaries, "run_process", in_this_process)
    monkeypatch.setattr(canaries, "TIMES", {1: 2, 3: 1})
    canaries.main(
        str(tmp_path / "out"),
        **{"count": 8, "spacing": 8.0, "epochs": 1, "samples": 10, "places": 5, "others": 2},
        network_config=str(ROOT / "tests" / "tiny.json"),
    )
    header, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert header == ["measure", "never seen", "seen in 1 of 8", "seen in 3 of 8"]
    assert rows[0][0] == "rise of contrast by a mark" and len(rows) == 5
    bright = [np.asarray(nib.load(path).dataobj) for path in sorted((tmp_path / "out" / "people").glob("*.nii.gz"))]
    assert sum((image == image.max()).sum() > 4 for image in bright) == 5
