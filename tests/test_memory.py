"""The memory of an update is known before it, and where it is too much, what would fit is said."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common import network_def
from benchmarks.memory import estimate_step
from scripts.networks import VDVAE
from scripts.training import memory
from scripts.training.memory import update_bytes, warn_of_memory
from scripts.utils.devices import free_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("name", "precision", "levels"), [("default", "fp32", 0), ("lean_64", "bf16", 3)])
def test_it_is_what_the_benchmark_counts(name, precision, levels):
    counted = update_bytes(network_def(name, levels), 2, precision == "bf16")
    step = estimate_step(name, 2, precision, levels)
    assert counted == pytest.approx(step["peak"] + step["parameters"], rel=0.1)  # training keeps an average


@pytest.mark.parametrize("name", ["default", "lean_64", 64])
def test_the_bound_that_spares_counting_is_one(name):
    arguments = network_def(name, 0)
    with torch.device("meta"):
        network = VDVAE(**arguments)
    assert memory._bound(network, 2) > update_bytes(arguments, 2)


def default(batch_norm: bool = False) -> VDVAE:
    with torch.device("meta"):
        return VDVAE(**network_def("default") | {"batch_norm": batch_norm})


@pytest.mark.parametrize(
    ("room", "device", "amp", "batch_norm", "words"),
    [
        (250, GPU, False, False, "take --amp True, which needs 0.2."),
        (260, CPU, False, False, "take --network_def#checkpoint_levels 3, which needs 0.2."),
        (190, GPU, True, False, "take --network_def#checkpoint_levels 2, which needs 0.2."),
        (100, CPU, False, True, "take --batch_size 2, which needs 0.1."),
        (100, CPU, False, False, "take --network_def#checkpoint_levels 6 --batch_size 2, which needs 0.1."),
        (12, GPU, False, False, "take a smaller network, such as that of configs/lean_64.json, or a larger machine."),
    ],
)
def test_what_would_fit_is_said(monkeypatch, caplog, room, device, amp, batch_norm, words):
    """Of eight scans; what an update needs in MiB is told from the settings here, since counting takes seconds."""

    def needs(arguments, batch_size, half):
        levels = arguments["checkpoint_levels"]
        assert not (levels and arguments["batch_norm"])  # the network refuses both
        return (20 + batch_size * (30 if levels == 6 else 40 - 4 * levels) * (0.6 if half else 1)) * 2**20

    monkeypatch.setattr(memory, "update_bytes", needs)
    monkeypatch.setattr(memory, "_room", lambda device: room * 2**20)
    monkeypatch.setattr(memory, "cpu_has_bfloat16", lambda: False)
    warn_of_memory(default(batch_norm), 8, device, amp)
    (record,) = caplog.records
    said = record.getMessage()
    needed = "0.2" if amp else "0.3"
    assert said.startswith(f"An update of 8 scan(s) needs about {needed} GiB of memory, and '{device}' has")
    assert said.endswith(words), said


def test_what_fits_is_not_spoken_of(monkeypatch, caplog):
    monkeypatch.setattr(memory, "update_bytes", lambda *_: pytest.fail("it was counted"))
    warn_of_memory(default(), 1, CPU)
    assert caplog.text == ""


def test_room_is_the_machine_s(monkeypatch):
    assert 2**20 < memory._room(CPU) <= free_memory() * 1.5
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (4 * 2**30, 8 * 2**30))
    assert memory._room(GPU) == 2.5 * 2**30
    assert memory._room(torch.device("mps")) is None
