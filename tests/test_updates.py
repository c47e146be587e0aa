"""Updates are taken or skipped on the device, and their numbers reach the host late, with the same results."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_trainer import loader, tiny, trainer, weights

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
