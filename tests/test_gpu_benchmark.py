"""``benchmarks.gpu`` is written for a machine with a GPU; all of it but that runs on a CPU too."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import ROOT, run_bundle
from in_process import run_module

from benchmarks import gpu

TRAINING = {"config_file": ["configs/train.json", "tests/tiny.json", "tests/quick_start.json"], "prior_factors": 0}
INFERENCE = {"config_file": ["configs/inference.json", "tests/tiny.json"]}
INFERENCE |= {"iterations": 1, "draws": 2, "samples": 2}


def in_process(self, words, **settings):
    """Each process of the benchmark as a call in this one."""
    if words[1] != "unittest":
        run = run_module(words[1], *words[2:], json.dumps(settings), cwd=ROOT)
        lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"')]
        return {"seconds": 1.0, "rc": run.returncode, "lines": lines, "said": run.stderr[-2000:]}
    return {"seconds": 1.0, "rc": 0, "lines": [], "said": "OK (skipped=9)"}


def one_after_the_other(self, commands):
    return {name: self.run(words, **settings) for name, (words, settings) in commands.items()}


def test_everything_runs_without_a_gpu(cohort, tmp_path, monkeypatch, capsys):
    run = run_bundle("--dataset_dir", cohort, "--output_dir", tmp_path / "run", "--prior_factors", 2)
    assert run.returncode == 0, run.stderr
    monkeypatch.setattr(gpu.Clock, "run", in_process)
    monkeypatch.setattr(gpu.Clock, "side_by_side", one_after_the_other)
    monkeypatch.setattr(gpu, "SETTINGS", [["bf16", "eager"], ["fp32", "graph"]])
    inference = {**INFERENCE, "ckpt": str(tmp_path / "run/checkpoints/model.pt")}
    packed = shutil.make_archive(str(tmp_path / "brains"), "zip", cohort)
    found = gpu.main(packed, str(tmp_path / "out"), device="cpu", networks=[8], inference=inference, training=TRAINING)
    assert [(row["precision"], row["mode"]) for row in found["training"]] == [tuple(one) for one in gpu.SETTINGS]
    for row in found["training"]:
        assert row["scans_per_second"] > 0 and row["batch_size"] == 8, row
    assert {name: run["rc"] for name, run in found["jobs"].items()} == dict.fromkeys(found["jobs"], 0), found["jobs"]
    assert len(found["jobs"]) == 8
    assert {name: run["rc"] for name, run in found["runs"].items()} == dict.fromkeys(found["runs"], 0), found["runs"]
    assert found["runs"]["resumed"]["largest_difference"] == 0
    assert json.loads((tmp_path / "out/gpu.json").read_text()) == found
    assert "| 8 | 8 | bf16, eager |" in capsys.readouterr().out


def test_what_the_minutes_do_not_reach_is_said(tmp_path):
    late = gpu.Clock(0).run(["-c", "print(1)"])
    assert (late["rc"], late["said"]) == (None, "The minutes were over.")
    clock = gpu.Clock(1)
    run = clock.run(["-c", "import sys; print('{\"a\": 1}'); sys.exit('Error: no.')"])
    assert (run["rc"], run["lines"], run["said"]) == (1, [{"a": 1}], "Error: no.\n")
    assert gpu.reason(run) == "Error: no."


def test_commands_run_side_by_side_and_find_what_python_found(tmp_path, monkeypatch):
    """Packages may lie where PYTHONPATH says; each command waits for a file that the other writes."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "there.py").write_text("import pathlib, sys, time\nhere = pathlib.Path(__file__).parent\n")
    program = (
        "import there; (there.here / '{}').touch()\nwhile not (there.here / '{}').exists(): there.time.sleep(0.01)"
    )
    commands = {"one": (["-c", program.format("a", "b")], {}), "two": (["-c", program.format("b", "a")], {})}
    found = gpu.Clock(1).side_by_side(commands)
    assert {name: run["rc"] for name, run in found.items()} == {"one": 0, "two": 0}, found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    run = run_module("benchmarks.gpu", "--dataset_dir", "x", "--output_dir", "y", cwd=ROOT)
    assert (run.returncode, run.stderr) == (
        1,
        "Error: PyTorch sees no GPU here: --device cpu tries all of it without one.\n",
    )
