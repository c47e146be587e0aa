"""The benchmarks run on the smallest network; numbers are checked where they do not depend on the machine."""

import functools
import json
import re

import pytest
import torch
from conftest import ROOT, run_command_process

from benchmarks import step_ops
from benchmarks.common import TrainingStep, network_def
from benchmarks.memory import PeakMemory, estimate_job, estimate_step
from benchmarks.memory import main as memory
from benchmarks.throughput import forward_gflop
from benchmarks.throughput import main as throughput
from scripts.networks import VDVAE


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_unknown_size():
    with pytest.raises(ValueError, match="choose one of 32, 64, 128, 256, default"):
        network_def(48)


def test_forward_flops():
    assert forward_gflop(32) == pytest.approx(28.2, abs=0.05)


def test_throughput_prints_rates_and_share(capsys):
    throughput(network=8, batch_size=2, threads=1, updates=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("forward 0.0 GFLOP per scan; 2 updates of 2 scans of 8³")
    assert [line[:18].strip() for line in lines[2:]] == ["scans per second", "matmul GFLOP/s", "share of matmul"]
    for line in lines[2:]:
        low, median, high = numbers(line)
        assert 0 <= low <= median <= high


def test_measured_memory():
    run = run_command_process("benchmarks.memory", "--network", 8, "--checkpoint_levels", 4, "--threads", 1)
    assert run.returncode == 0, run.stderr
    peak, above = numbers(run.stdout.splitlines()[0])
    assert 0.1 < peak < 4
    assert above < peak
    assert "4 levels checkpointed" in run.stdout


@pytest.mark.parametrize(("checkpoint_levels", "precision"), [(0, "fp32"), (4, "bf16")])
def test_fake_tensors_hold_what_real_ones_do(checkpoint_levels, precision):
    network = VDVAE(**network_def(8, checkpoint_levels))
    step = TrainingStep(network, torch.rand(32, 1, 8, 8, 8), precision)
    step.fill_optimizer_state()
    state = [value for values in step.optimizer.state.values() for value in values.values()]
    real = PeakMemory()
    for tensor in (*step.parameters, *state, step.scans):
        real.track(tensor)
    with real:
        step()
    assert estimate_step(8, 32, precision, checkpoint_levels)["peak"] == pytest.approx(real.peak, rel=0.05)


def test_estimate_prints_the_parts(capsys):
    memory(network=8, batch_size=64, estimate=True)
    parts = dict(line.removesuffix(" MiB").split() for line in capsys.readouterr().out.splitlines())
    assert list(parts) == ["parameters", "gradients", "optimizer", "activations", "peak"]
    assert int(parts["peak"]) > 0


def test_table_says_which_cards_a_size_fits(capsys, monkeypatch):
    # without checkpointing 11 GiB, with 4
    monkeypatch.setattr("benchmarks.memory.estimate_step", lambda *args: {"peak": (4 if args[3] else 11) * 2**30})
    memory(network=8, table=True)
    assert capsys.readouterr().out.splitlines() == [
        "| network | precision | checkpointing | GiB | 8 GB | 12 GB | 16 GB | 24 GB | 40 GB | 80 GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| 8³ | fp32 | off | 11.0 | - | - | yes | yes | yes | yes |",
        "| 8³ | fp32 | on | 4.0 | yes | yes | yes | yes | yes | yes |",
        "| 8³ | bf16 | off | 11.0 | - | - | yes | yes | yes | yes |",
        "| 8³ | bf16 | on | 4.0 | yes | yes | yes | yes | yes | yes |",
    ]


def test_jobs_say_what_inference_needs(capsys, monkeypatch):
    estimate = functools.cache(estimate_job)
    monkeypatch.setattr("benchmarks.memory.estimate_job", estimate)
    memory(network=8, jobs=True)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| `reconstruct`", "| `score`", "| `impute`", "| `sample`"]
    weights = sum(parameter.numel() for parameter in VDVAE(**network_def(8)).parameters()) * 4
    assert weights < estimate("score", 8, "bf16") < estimate("score", 8, "fp32")


def test_unknown_precision():
    with pytest.raises(ValueError, match="choose fp32 or bf16"):
        memory(network=8, precision="fp8", estimate=True)


def test_an_iteration_of_the_default_network_has_few_operations(capsys):
    step_ops.count(str(ROOT / "configs/train.json"))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ops"] == sum(found["parts"].values()) <= 3500
    assert found["ops"] - found["parts"]["forward"] - found["parts"]["backward"] <= 1000
    assert found["syncs"] <= 557  # counters on the host, which a GPU keeps itself: test_no_waiting.py
