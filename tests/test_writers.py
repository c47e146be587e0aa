"""Results written by processes of their own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import inference_config, run_bundle
from monai.data import MetaTensor

from scripts.inference.outputs import WAITING, ResultWriters

CONFIGS = ["configs/inference.json", "tests/tiny.json"]


def write(result: dict) -> tuple[str, int]:
    """Write a file, and say who did it."""
    time.sleep(result.get("seconds", 0))
    if result.get("error") is not None:
        raise result["error"]
    if result.get("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    Path(result["path"]).write_text(str(float(result["image"].sum())))
    return Path(result["path"]).name, os.getpid()


def result(folder: Path, name: int, **more) -> dict:
    return {"image": MetaTensor(torch.full((1, 4, 4, 4), float(name))), "path": folder / str(name), **more}


@pytest.mark.parametrize("workers", [0, 2])
def test_all_is_written_when_the_context_ends_and_reported_in_order(workers, tmp_path):
    done = []
    with ResultWriters(write, workers, done.append) as writers:
        for name in range(9):
            writers.add(result(tmp_path, name, seconds=0.1 if name == 0 else 0))
            assert len(list(tmp_path.iterdir())) >= name - 1 - WAITING * workers
    assert [name for name, _ in done] == [str(name) for name in range(9)]
    assert {(tmp_path / str(name)).read_text() for name in range(9)} == {f"{64.0 * name}" for name in range(9)}
    assert (os.getpid() in {process for _, process in done}) == (workers == 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_ends_the_work_and_is_the_same_in_another_process(workers, tmp_path):
    with (
        pytest.raises(OSError, match="No space left") as raised,
        ResultWriters(write, workers, lambda _: None) as writers,
    ):
        writers.add(result(tmp_path, 0))
        writers.add(result(tmp_path, 1, error=OSError(28, "No space left", "a.nii.gz")))
        for name in range(2, 9):
            writers.add(result(tmp_path, name))
    assert (raised.value.errno, raised.value.filename) == (28, "a.nii.gz")
    assert (tmp_path / "0").exists()
    assert len(list(tmp_path.iterdir())) < 8


def test_a_killed_process_is_a_sentence(tmp_path):
    with pytest.raises(OSError, match="lower --num_workers"), ResultWriters(write, 1, lambda _: None) as writers:
        for name in range(6):
            writers.add(result(tmp_path, name, killed=name == 1))


def test_a_job_writes_the_same_by_processes_of_their_own(cohort, tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    for path in sorted(cohort.glob("*.nii.gz"))[:5]:
        (scans / path.name).symlink_to(path)
    (scans / "sub-bad.nii.gz").write_bytes(b"no scan")
    run = ("--dataset_dir", scans, "--batch_size", 2, "--figures", True)
    ckpt, found = tmp_path / "model.pt", {}
    torch.save(inference_config().get_parsed_content("network_def").state_dict(), ckpt)
    for workers in (0, 2):
        output = tmp_path / str(workers)
        job = run_bundle(
            *run, "--output_dir", output, "--ckpt", ckpt, "--num_workers", workers, run_id="score", configs=CONFIGS
        )
        assert job.returncode == 1, job.stderr  # of one scan nothing came
        found[workers] = {path.name: path.read_bytes() for path in output.iterdir() if path.suffix != ".html"}
    assert len([name for name in found[0] if name.endswith("_anomaly.nii.gz")]) == 5
    assert "sub-bad.nii.gz" in found[0]["failed.csv"].decode()
    assert found[0] == found[2]
