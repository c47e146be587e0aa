"""A graph of an update is the update, or a sentence says why there is none."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from test_trainer import loader, tiny, weights
from torch.testing import assert_close

from scripts.training.losses import ELBOLoss
from scripts.training.precision import WITHIN_UPDATES, GraphedUpdate, check_graph
from scripts.training.trainer import VDVAETrainer
from scripts.training.update import StepLimits
from scripts.utils.devices import tune

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def train(updates: int = 4, skip_grad_norm: float = 1e12, **arguments) -> VDVAETrainer:
    network = tiny()
    optimizer = torch.optim.Adamax(network.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (1 + update))
    limits = StepLimits(skip_grad_norm=skip_grad_norm, skip_warmup=2)
    engine = VDVAETrainer(
        "cpu", 1, loader(2 * updates), network, optimizer, ELBOLoss(kl_warmup=3), schedule, limits, **arguments
    )
    torch.manual_seed(0)
    engine.run()
    return engine


@pytest.mark.parametrize("skip_grad_norm", [1e12, 1e-6])
def test_an_update_from_fixed_memory_is_the_update(monkeypatch, skip_grad_norm):
    """Learning rate, weight of the KL and the norm up to which updates are made change from one to the next."""
    plain = train(skip_grad_norm=skip_grad_norm)
    monkeypatch.setattr("scripts.training.trainer.check_graph", lambda *args, **kwargs: True)
    fixed = train(skip_grad_norm=skip_grad_norm, cuda_graph=True)
    assert fixed.graphed.updates == 4
    assert plain.state.skipped == fixed.state.skipped == (0 if skip_grad_norm > 1 else 2)
    assert_close(weights(plain.network), weights(fixed.network))
    known = [{k: v for k, v in e.state.numbers.items() if k != "scans_per_second"} for e in (plain, fixed)]
    assert known[0] == pytest.approx(known[1], rel=1e-5)
    assert fixed.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"] == 0.01 / 5


def test_all_batches_of_a_graph_are_alike():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    inputs = []

    def update(scans, factor):
        inputs.append((scans, factor, optimizer.param_groups[0]["lr"]))
        return {"sum": factor * scans.sum() + optimizer.param_groups[0]["lr"]}

    graphed = GraphedUpdate(update, optimizer)
    assert graphed(torch.ones(2, 3), factor=2.0)["sum"] == 12.5
    optimizer.param_groups[0]["lr"] = 0.25
    assert graphed(torch.zeros(2, 3), factor=1.0)["sum"] == 0.25
    assert all(one is other for one, other in zip(*inputs, strict=True))
    with pytest.raises(ValueError, match=r"a batch is \[1, 3\] after batches of \[2, 3\]"):
        graphed(torch.ones(1, 3), factor=1.0)


def test_what_a_handler_keeps_of_a_graphed_update_stays(monkeypatch):
    monkeypatch.setattr("scripts.training.trainer.check_graph", lambda *args, **kwargs: True)
    memory = torch.zeros(2)  # a replay writes to the same results

    def same_memory(self):
        results = run(self)
        return {**results, "nll": memory.copy_(results["nll"]), "pred": results["pred"]._replace(loc=memory)}

    run = GraphedUpdate._run
    monkeypatch.setattr(GraphedUpdate, "_run", same_memory)
    kept, values = [], []

    def keep(engine):
        kept.append(engine.state.output)
        values.append((engine.state.output["nll"].clone(), engine.state.output["pred"].loc.clone()))

    train(3, train_handlers=[Attach(Events.ITERATION_COMPLETED, keep)])
    assert not torch.equal(*(nll for nll, _ in values[:2]))
    for output, (nll, loc) in zip(kept, values, strict=True):
        assert torch.equal(output["nll"], nll) and torch.equal(output["pred"].loc, loc)


class Attach:
    def __init__(self, event, handler):
        self.event, self.handler = event, handler

    def attach(self, engine):
        engine.add_event_handler(self.event, self.handler)


@pytest.mark.parametrize("event", list(WITHIN_UPDATES))
def test_events_within_an_update_fire_for_each(monkeypatch, event, caplog):
    """A replayed graph fires none: a handler for one of them takes the graph out, or is refused."""
    monkeypatch.setattr("scripts.training.trainer.check_graph", on_a_gpu)
    assert train(1).graphed is None and train(1, cuda_graph=None).graphed.updates == 1
    fired = []
    with caplog.at_level("INFO"):
        engine = train(4, cuda_graph=None, train_handlers=[Attach(event, lambda engine: fired.append(1))])
    assert engine.graphed is None and len(fired) == 4
    assert f"since an event that a handler waits for is {event.name}" in caplog.text
    with pytest.raises(ValueError, match=f"cuda_graph is True, and an event that a handler waits for is {event.name}"):
        train(1, cuda_graph=True, train_handlers=[Attach(event, print)])


def on_a_gpu(device, *arguments, **obstacles):
    return check_graph(GPU, *arguments, **obstacles)


def test_on_a_cpu_it_says_that_it_does_nothing(caplog):
    assert train(1, cuda_graph=True).graphed is None
    assert "cuda_graph is True, but the device is 'cpu'" in caplog.text


def test_a_graph_refuses_what_is_not_one_fixed_update():
    assert check_graph(GPU, True, accumulation_steps=False, amp_dtype=None)
    with pytest.raises(ValueError, match="cuda_graph is True, and accumulation_steps is 2"):
        check_graph(GPU, True, accumulation_steps=2)


def test_by_default_a_graph_is_made_where_it_can_be(caplog):
    assert check_graph(GPU, None, accumulation_steps=False)
    assert not check_graph(CPU, None)
    assert not check_graph(GPU, False, accumulation_steps=2)
    assert caplog.text == ""
    with caplog.at_level("INFO"):
        assert not check_graph(GPU, None, accumulation_steps=2)
    assert "not as one CUDA graph, since accumulation_steps is 2" in caplog.text


def test_a_gpu_is_tuned_and_a_cpu_left_alone():
    flags = torch.backends.cudnn.flags
    with flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True):
        tune(torch.device("cpu"), tf32=False)
        assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32) == (False, True)
        tune(torch.device("cuda"), tf32=False)
        assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32) == (True, False)
        assert not torch.backends.cuda.matmul.allow_tf32
