"""What processes exchange comes back to the device that it was on, with GPUs too."""

from __future__ import annotations

import re

import torch
from conftest import ROOT
from fake_gpu import GPU, fake_gpu
from groups import run_group
from ignite import distributed as idist
from ignite.distributed import utils
from ignite.distributed.comp_models.base import ComputationModel, _SerialModel

from scripts.training.losses import Means

SAFE = {"all_reduce", "all_gather"}  # which Ignite brings back


class OnGPUs(_SerialModel):
    """One process, whose collectives run on its GPU as NCCL's do."""

    all_reduce, all_gather, broadcast = (
        ComputationModel.all_reduce,
        ComputationModel.all_gather,
        ComputationModel.broadcast,
    )

    def device(self) -> torch.device:
        return GPU

    def _do_broadcast(self, tensor, src):
        return tensor

    def _do_all_reduce(self, tensor, op="SUM", group=None):
        assert tensor.device.type == "gpu"
        return tensor


def exchange(rank: int) -> dict[str, str]:
    utils._model, utils._need_to_sync = OnGPUs(), False
    with fake_gpu():
        places = {device: torch.zeros(3, device=device) for device in ("cpu", "gpu:0")}
        found = {f"all_reduce of {name}": str(idist.all_reduce(value).device) for name, value in places.items()}
        found |= {f"broadcast of {name}": str(idist.broadcast(value).device) for name, value in places.items()}
        OnGPUs.get_rank = lambda self: 1  # a receiver
        OnGPUs._setup_placeholder = lambda self, tensor, device, source: torch.zeros(3, device=device)
        found["safe broadcast"] = str(idist.broadcast(None, safe_mode=True).device)
        OnGPUs.get_rank = lambda self: 0
        means = Means(lambda output: output, 2, GPU)
        means.update(torch.zeros(4, 2, device=GPU))
        found["means"] = str(means.compute().device)
    return found


def test_what_is_exchanged_comes_back():
    found = run_group(exchange, processes=1)[0]
    assert found.pop("safe broadcast") == "gpu:0"  # receivers get it there, wherever the source has it
    assert found.pop("means") == "gpu:0"
    assert all(name.endswith(f"of {device}") for name, device in found.items()) and len(found) == 4


def test_a_broadcast_says_where_its_tensors_go():
    """A new one must: see ``FactorSketch.merge``."""
    users = {}
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        for call in re.findall(r"\b(?:idist|dist)\.(\w+)\(", path.read_text()):
            if call.startswith(("all_", "broadcast", "gather", "reduce", "scatter")) and call not in SAFE:
                users.setdefault(call, []).append(path.name)
    # that of buffers is in place
    assert users == {"broadcast": ["sketch.py", "distributed.py"]}
