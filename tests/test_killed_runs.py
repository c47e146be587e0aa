"""A run of two processes by torchrun, one of which is killed while it saves, ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PROCESS, ROOT, TINY
from groups import run_bundle_group

from scripts.phantoms import make_brains

CONFIGS = [*TINY, "configs/multi_gpu_train.json"]
LIMIT = 600  # seconds that a run may take


def start(output: Path, log: Path, *words: object) -> subprocess.Popen:
    """A training run whose processes torchrun starts again when one of them ends."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2", "--max-restarts=3"]
    command = [sys.executable, *launcher, "-m", "monai.bundle", "run", "training", "--config_file", str(CONFIGS)]
    command += [*map(str, words), "--output_dir", str(output)]
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | PROCESS, stdout=file, stderr=file)


def wait_for(process: subprocess.Popen, happened: Callable[[], object], interval: float) -> None:
    """Until something is true; the process must not end before."""
    until = time.monotonic() + LIMIT
    while not happened():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(interval)


def children(process: subprocess.Popen) -> list[int]:
    """The processes that another one has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == process.pid:
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return sorted(found)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(tmp_path):
    words = ("--dataset_dir", make_brains(tmp_path / "brains", 12, spacing=8.0, workers=1), "--resume", "auto")
    words += ("--cache_dir", tmp_path / "cache", "--batch_size", 2, "--epochs", 3, "--num_workers", 1)
    words += ("--save_updates", 1)
    for whole in run_bundle_group(*words, "--output_dir", tmp_path / "whole", configs=CONFIGS):
        assert whole.returncode == 0, whole.stderr
    log = tmp_path / "killed.log"
    killed = start(tmp_path / "killed", log, *words)
    wait_for(killed, lambda: log.read_text(errors="replace").count("Saved '") > 1, 0.05)
    # a file that is being written is there for some milliseconds
    wait_for(killed, lambda: list((tmp_path / "killed" / "checkpoints").glob(".*.checkpoint.pt")), 0.001)
    os.kill(children(killed)[0], signal.SIGKILL)
    assert killed.wait(LIMIT) == 0, log.read_text(errors="replace")
    assert "Resuming from" in log.read_text(errors="replace")
    whole, parts = (
        torch.load(tmp_path / name / "checkpoints" / "checkpoint.pt", weights_only=True) for name in ("whole", "killed")
    )
    for part in ("network", "average"):
        assert all(torch.equal(tensor, parts[part][name]) for name, tensor in whole[part].items())
