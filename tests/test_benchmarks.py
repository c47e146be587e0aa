"""The benchmarks run on the smallest network; numbers are checked where they do not depend on the machine."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, inference_config, run_command, run_command_process
from groups import start_processes

from benchmarks import probes, step_ops
from benchmarks.loader import main as loader
from benchmarks.memory import PeakMemory, estimate_job, estimate_step
from benchmarks.memory import main as memory
from benchmarks.scaling import main as scaling
from benchmarks.step import TrainingStep, network_def
from benchmarks.throughput import forward_costs, seconds
from benchmarks.throughput import main as throughput
from benchmarks.trials import trial
from scripts.networks import VDVAE
from scripts.phantoms.images import brain_phantom


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_unknown_size():
    with pytest.raises(ValueError, match="choose one of 32, 64, 128, 256, default"):
        network_def(48)


def test_forward_flops():
    gflop, counts = forward_costs(32)
    assert gflop == pytest.approx(28.2, abs=0.05)
    assert sum(count * shape.gflop(1) for shape, count in counts.items()) == pytest.approx(gflop)


def test_throughput_prints_rates_and_share(capsys):
    throughput(network=8, batch_size=2, threads=1, updates=2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("forward 0.0 GFLOP per scan; 2 updates of 2 scans of 8³")
    assert [line[:18].strip() for line in lines[2:]] == ["scans per second", "matmul GFLOP/s", "share of matmul"]
    for line in lines[2:]:
        low, median, high = numbers(line)
        assert 0 <= low <= median <= high


def test_shapes_prints_a_row_a_shape(capsys, monkeypatch):
    # one call each instead of 0.2 s of them
    monkeypatch.setattr("benchmarks.throughput.seconds", lambda function, at_least: seconds(function))
    throughput(network=8, batch_size=1, threads=1, shapes=True)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "→" in line]
    assert len(rows) == len(forward_costs(8)[1])
    assert lines[-1].startswith("all convolutions of a step:")


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
    memory(network=8, batch_size=64, ema=True, estimate=True)
    parts = dict(line.removesuffix(" MiB").split() for line in capsys.readouterr().out.splitlines())
    assert list(parts) == ["parameters", "gradients", "optimizer", "ema", "activations", "peak"]
    assert int(parts["peak"]) > 0


def test_compare_prints_the_ratio(capsys):
    memory(network=8, threads=1, updates=1, compare=True)
    assert re.search(r"^ratio \d+\.\d\d \(", capsys.readouterr().out, re.MULTILINE)


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


def test_jobs_say_what_inference_needs(capsys):
    memory(network=8, jobs=True)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| `reconstruct`", "| `score`", "| `impute`", "| `sample`"]
    weights = sum(parameter.numel() for parameter in VDVAE(**network_def(8)).parameters()) * 4
    assert weights < estimate_job("score", 8, "bf16") < estimate_job("score", 8, "fp32")


def test_unknown_precision():
    with pytest.raises(ValueError, match="choose fp32 or bf16"):
        memory(network=8, precision="fp8", estimate=True)


def test_loader_prints_what_it_gives_and_what_the_step_takes(capsys):
    loader(size=8, count=3, draws=6, batch_size=2, updates=1, spacing=8)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8³ from 8 mm, one worker, scans per second"
    first, cached, step, *ratios = [numbers(line)[0] for line in lines[1:]]
    assert cached > first > 0
    assert ratios == pytest.approx([first / step, cached / step], rel=0.1)


def test_loader_times_a_job(capsys):
    loader(size=8, count=3, spacing=8, job=True, workers=1)
    lines = capsys.readouterr().out.splitlines()
    found = {line[:32].strip(): numbers(line[32:]) for line in lines[1:]}
    reading, writing, network, between, beside = (found[name][0] for name in found)
    assert network == writing > 0
    assert between > 0 and beside > 0
    half = max(reading + writing, network)
    assert found["results written in between"][1] == pytest.approx(between / half, rel=0.3)


def test_loader_profile_names_every_transform(capsys):
    loader(size=8, count=1, profile=True, spacing=8)
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[1:-1]]
    assert names[:5] == ["LoadScand", "CheckScand", "Orientationd", "FitShaped", "RobustScaled"]
    assert len(names) == 5 + 13
    total = sum(numbers(line)[-1] for line in lines[6:-1])
    assert numbers(lines[-1])[0] == pytest.approx(total, abs=1)


def test_scaling_compares_two_processes_with_one(capfd, monkeypatch):
    monkeypatch.setattr("benchmarks.scaling.mp.spawn", start_processes)
    results = scaling(size=8, batch_size=2, updates=1, rounds=1)
    assert results["ratio"] == pytest.approx(results["scans/s, two processes"] / results["scans/s, one process"])
    assert 0 < results["exchange by itself, share of a step"] < 1
    assert "ratio: " in capfd.readouterr().out


def test_a_killed_run_goes_on_and_ends_with_the_same_weights():
    """The process that writes a checkpoint is killed; torchrun starts both again."""
    words = ("kills", "--count", 1, "--epochs", 3, "--first", "while saving")
    run = run_command("benchmarks.survival", *words)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 of 1 ended with the weights of the undisturbed run, bit for bit" in run.stdout
    assert "| torchrun's restart | identical |" in run.stdout


def test_a_trial_trains_and_its_rows_are_printed(cohort, tmp_path, capsys):
    config = ["configs/train.json", "tests/tiny.json"]
    for name, warmup in (("own", 150), ("no_warmup", 0)):
        changes = {"kl_warmup": warmup, "network_def#init": "informative"}
        trial(str(cohort), str(tmp_path), name, config, updates=2, measure_at=[1], **changes)
    capsys.readouterr()
    trial(str(cohort), str(tmp_path), "own", table=True)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[:3] for row in rows[2:]] == [[f"| {name}", "0", n] for name in ("own", "no_warmup") for n in ("1", "2")]
    assert rows[3][3:7] != rows[5][3:7]  # the loss is another one
    with pytest.raises(SystemExit, match="no key 'learning_rat'"):
        trial(str(cohort), str(tmp_path), "own", config, learning_rat=1)


def test_an_iteration_of_the_default_network_has_few_operations(capsys):
    step_ops.count(str(ROOT / "configs/train.json"))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ops"] == sum(found["parts"].values()) <= 3500
    assert found["ops"] - found["parts"]["forward"] - found["parts"]["backward"] <= 1000
    assert found["syncs"] <= 557  # counters on the host, which a GPU keeps itself: test_no_waiting.py


def test_a_probe_finds_what_is_in_the_numbers_and_nothing_else():
    generator = np.random.default_rng(0)
    features = generator.standard_normal((80, 5))
    known = features @ [1, 2, 0, 0, 1] + 0.1 * generator.standard_normal(80)
    assert probes.probe(features, known)[0] > 0.95
    assert probes.probe(features, generator.standard_normal(80))[0] < 0.2


def test_a_phantoms_facts_are_what_it_shows():
    facts, phantom = probes.phantom_facts(3, 0, 4.0), brain_phantom(3, 0, 4.0)
    assert facts["brain"] == pytest.approx((phantom.image > 0).sum() * 0.064)
    assert 5 < facts["ventricles"] < facts["CSF"] < facts["brain"]
    assert 1.15 <= facts["gray matter's contrast"] <= 1.4


def test_probes_print_a_row_for_each_kind_of_number(cohort, tmp_path, capsys):
    network = inference_config().get_parsed_content("network_def")
    torch.save(network.state_dict(), tmp_path / "model.pt")
    configs = [str(ROOT / "configs/inference.json"), str(ROOT / "tests/tiny.json")]
    arguments = {"ckpt": str(tmp_path / "model.pt"), "config_file": configs, "count": 12, "spacing": 8.0}
    probes.main(str(cohort), str(tmp_path), **arguments)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows] == ["| from", "| latents up to 4³", "| PCA"]
    assert rows[0].count("|") == 9
