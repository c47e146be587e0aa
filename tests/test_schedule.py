"""The learning rate over a run, and what the log says of the schedule at the start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine
from torch.utils.data import DataLoader

from scripts.training.losses import ELBOLoss
from scripts.training.schedule import (
    LearningRate,
    TimeEstimate,
    duration,
    learning_rate_factor,
    log_plan,
    updates_per_epoch,
)


def rates(warmup: int, decay: float, updates: int) -> list[float]:
    """The learning rates that an optimizer's updates have, at a rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = LearningRate(optimizer, warmup, decay, updates)
    found = []
    for _ in range(updates):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_the_rate_rises_stays_and_falls():
    found = rates(warmup=4, decay=0.5, updates=20)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[4:11] == [1.0] * 7
    assert found[10:] == pytest.approx([1 - place / 10 for place in range(10)])


def test_without_decay_it_stays():
    assert rates(warmup=0, decay=0.0, updates=6) == [1.0] * 6


def test_a_finished_run_that_goes_on_has_the_schedule_of_its_new_length():
    assert learning_rate_factor(0, 0.5, 10)(10) == 0.0
    assert learning_rate_factor(0, 0.5, 30)(10) == 1.0


@pytest.mark.parametrize("factor", [4, 1, 0.25])
def test_the_rate_falls_until_the_end_with_batches_of_another_size(factor):
    """A run of 40 updates goes on after 24 of them, with 16 or as many as the same scans make by other batches."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = LearningRate(optimizer, 4, 0.5, int(40 / factor))
    scheduler.last_epoch = 24
    scheduler.resume(int(24 / factor))
    for left in range(int(16 / factor), 0, -1):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(left / (20 / factor))
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize(
    ("warmup", "decay", "message"), [(-1, 0.0, "learning_rate_warmup is -1"), (0, 1.5, "learning_rate_decay is 1.5")]
)
def test_what_cannot_be_is_refused(warmup, decay, message):
    with pytest.raises(ValueError, match=message):
        learning_rate_factor(warmup, decay, 10)


def test_the_last_update_of_an_epoch_may_have_fewer_batches():
    assert updates_per_epoch(7, 3) == 3


def test_the_log_says_whom_a_run_trains_on_and_how_long(caplog):
    with caplog.at_level("INFO"):
        log_plan(planned(5, 2, 3000, 150), 20, 0.5, from_nothing=False)
    assert caplog.messages == [
        "1 update(s) per epoch of 4 scans each (1 scan(s) that fill no batch are left out, others in each epoch), "
        "3000 in 3000 epoch(s).",
        "Learning rate 0.01 from update 20 on, falling to 0 from update 1500 on; the KL divergence counts in full from "
        "update 150 on: until then the training's bits per dim, in which it always counts in full, may rise while the "
        "network learns.",
    ]


def planned(scans: int, accumulation_steps: int, epochs: int, kl_warmup: int) -> SimpleNamespace:
    """A trainer, as far as the plan is concerned."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    return SimpleNamespace(
        data_loader=DataLoader([0] * scans, batch_size=2, drop_last=True),
        state=SimpleNamespace(max_epochs=epochs),
        loss_function=ELBOLoss(kl_warmup),
        optimizer=optimizer,
        accumulation_steps=accumulation_steps,
    )


def own_messages(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("scripts.")]


def test_a_run_says_how_long_it_will_take(caplog, monkeypatch):
    clock = iter((0, 120))
    monkeypatch.setattr("scripts.training.schedule.time", SimpleNamespace(monotonic=lambda: next(clock)))
    trainer = Engine(lambda engine, batch: None)
    TimeEstimate().attach(trainer)
    with caplog.at_level("INFO"):
        trainer.run([0] * 300, max_epochs=5)
    assert own_messages(caplog) == ["Epoch 1 took 2 min, with all that is done at its end: about 8 min to go."]


def test_a_resumed_run_says_it_after_what_is_left_of_an_epoch(caplog, monkeypatch):
    clock = iter((0, 3600))
    monkeypatch.setattr("scripts.training.schedule.time", SimpleNamespace(monotonic=lambda: next(clock)))
    trainer = Engine(lambda engine, batch: None)
    trainer.load_state_dict({"iteration": 6, "epoch_length": 4, "max_epochs": 4})
    TimeEstimate().attach(trainer)
    with caplog.at_level("INFO"):
        trainer.run([0] * 4, max_epochs=4)
    assert own_messages(caplog) == ["Epoch 2 took 60 min, with all that is done at its end: about 4.0 h to go."]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5400, "1.5 h"), (172800, "2.0 days")]
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_a_run_that_is_too_short_is_told_how_long_to_be(caplog):
    with caplog.at_level("INFO"):
        log_plan(planned(8, 1, 10, 150), 30, 0.5)
    assert caplog.messages[1].startswith(
        "Learning rate 0.01 from update 30 on, which this run does not reach: a smaller --learning_rate_warmup lets it "
        "learn faster, falling to 0 from update 20 on;"
    )
    assert caplog.messages[2].startswith("8 scans are few to begin with nothing")
    assert caplog.messages[3] == (
        "40 update(s) are few, and end before the KL warm-up (150); the default network of 32³ takes some 2000: "
        "--epochs 500 makes as many."
    )
