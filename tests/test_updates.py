"""Updates are taken or skipped on the device, and their numbers reach the host late, with the same results."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from test_trainer import loader, tiny, trainer, weights
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.training.update import GuardedStep, NumberEvents, TrainingStalledError, make_capturable
from scripts.utils.devices import DelayedScalars


@pytest.fixture
def late(monkeypatch):
    """As if the host ran ahead of the device, which is the CPU."""
    for module in ("scripts.utils.devices", "scripts.training.update"):
        monkeypatch.setattr(f"{module}.is_async", lambda device: True)
    done = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr("torch.Event", lambda device: done)


@pytest.mark.parametrize("kind", [torch.optim.Adamax, torch.optim.AdamW, torch.optim.SGD])
def test_a_step_chosen_on_the_device_is_that_chosen_on_the_host(kind):
    results = []
    for on_device in (False, True):
        network = tiny(batch_norm=True)
        optimizer = kind(network.parameters(), lr=0.1)
        step = GuardedStep(network, optimizer, on_device)
        generator = torch.Generator().manual_seed(0)
        for take in (False, True, False, True, True):
            step.start()
            for p in network.parameters():
                p.grad = torch.randn(p.shape, generator=generator) if take else torch.full_like(p, torch.nan)
            for name, buffer in network.named_buffers():
                if "running" in name:
                    buffer.add_(1 if take else torch.nan)
            step(torch.tensor(take))
        states = [value for p in network.parameters() for value in optimizer.state[p].values() if value is not None]
        results.append([*network.state_dict().values(), *states])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert all(tensor.isfinite().all() for tensor in results[0])


@pytest.mark.parametrize("on_device", [False, True])
def test_a_skipped_update_after_a_resume_keeps_the_batch_statistics(on_device):
    """A checkpoint is loaded after the trainer is made."""
    network = tiny(batch_norm=True)
    engine = trainer(network, loader(4, poison=0), skip_warmup=0)
    engine.step.on_device = on_device
    statistics = {name: buffer for name, buffer in network.named_buffers() if "running_mean" in name}
    network.load_state_dict(network.state_dict() | {name: torch.full_like(b, 5.0) for name, b in statistics.items()})
    seen = []
    engine.add_event_handler(
        NumberEvents.NUMBERS_KNOWN, lambda engine: seen.append([b.clone() for b in statistics.values()])
    )
    engine.run()
    assert engine.state.skipped == 1 and statistics
    assert all((buffer == 5).all() for buffer in seen[0])
    assert all((buffer != 5).any() for buffer in seen[1])


def test_a_step_on_the_device_keeps_one_copy(monkeypatch):
    """Of 64 tensors of a thousand numbers, in chunks of two."""
    monkeypatch.setattr("scripts.training.update.CHUNK", 2048)
    parameters = [torch.nn.Parameter(torch.zeros(1024)) for _ in range(64)]
    network = torch.nn.Module()
    network.weights = torch.nn.ParameterList(parameters)
    step = GuardedStep(network, torch.optim.SGD(parameters, lr=1.0), on_device=True)
    alive, most = set(), 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            result = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.cat.default, torch.ops.aten.where.self):
                alive.add(id(result))
                weakref.finalize(result, alive.discard, id(result))
                most = max(most, len(alive))
            return result

    for p in parameters:
        p.grad = torch.ones_like(p)
    with Count():
        step(torch.tensor(True))
    assert all((p == -1).all() for p in parameters)
    assert 32 <= most <= 35


def test_counters_go_where_the_weights_are(late):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adamax([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    state = optimizer.state_dict()
    assert not state["param_groups"][0]["capturable"]
    make_capturable(optimizer)
    assert optimizer.param_groups[0]["capturable"]
    # a run on a GPU is resumed from a checkpoint that was written on a CPU
    optimizer.load_state_dict(state)
    make_capturable(optimizer)
    assert optimizer.param_groups[0]["capturable"]
    assert optimizer.state[weight]["step"] == 1


def test_numbers_arrive_in_order_an_interval_late(late):
    numbers = DelayedScalars(3)
    arrived = [numbers.add(torch.full((1 + n % 2,), float(n)), n) for n in range(8)]
    assert [len(rows) for rows in arrived] == [0, 0, 0, 0, 0, 3, 0, 0]
    assert [note for _, note in numbers.look()] == [3, 4, 5, 6, 7]
    rows = arrived[5] + numbers.wait()
    assert rows == [([float(n)] * (1 + n % 2), n) for n in range(8)]
    assert numbers.wait() == []


def test_on_a_cpu_numbers_are_there_at_once():
    numbers = DelayedScalars(3)
    assert numbers.add(torch.ones(2), "note") == [([1.0, 1.0], "note")]
    with pytest.raises(ValueError, match="log_interval is 0"):
        DelayedScalars(0)


def run_with_a_nan(log_interval: int, caplog) -> tuple:
    caplog.clear()
    network, known = tiny(), []
    engine = trainer(network, loader(16, poison=6), epochs=2, log_interval=log_interval, skip_warmup=0)
    engine.add_event_handler(
        NumberEvents.NUMBERS_KNOWN,
        lambda engine: known.append({k: v for k, v in engine.state.numbers.items() if k != "scans_per_second"}),
    )
    torch.manual_seed(0)
    engine.run()
    assert engine.numbers.skips() == (engine.state.skipped, engine.state.skipped_in_a_row) == (2, 0)
    return weights(network), str(known), caplog.text


def test_a_run_whose_numbers_come_late_is_the_same_run(caplog, monkeypatch, request):
    at_once = run_with_a_nan(3, caplog)
    request.getfixturevalue("late")
    late = run_with_a_nan(3, caplog)
    assert torch.equal(at_once[0], late[0])
    assert at_once[1:] == late[1:]
    assert late[2].count("skipped") == 4 and "Update 4 skipped" in late[2]


def test_skips_in_a_row_end_a_run_some_updates_late(late):
    network = tiny()
    before = weights(network)
    data = loader(count=60, batch_size=1)
    engine = trainer(network, data, skip_grad_norm=1e-6, skip_warmup=0, max_skips=5, log_interval=4)
    with pytest.raises(TrainingStalledError, match="5 updates in a row"):
        engine.run()
    assert engine.state.updates == 12  # the copy that starts after 8 is read after 12
    assert torch.equal(weights(network), before)
