"""The update of the weights: taken or left out, without asking the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scripts.utils.devices import runs_ahead
from torch import Tensor, nn
from torch.optim import Optimizer


def place_counters(optimizer: Optimizer) -> None:
    """Let an optimizer count its steps where its parameters are, also after its state was loaded.

    With counters on the host each update would wait for the device once for each tensor. PyTorch's name for counters on
    the device is ``capturable``; not every optimizer has them.
    """
    for group in optimizer.param_groups:
        if "capturable" not in group:
            continue
        group["capturable"] = runs_ahead(group["params"][0].device)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                device = parameter.device if group["capturable"] else "cpu"
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(device, non_blocking=True)


class GuardedStep:
    """An optimizer's step that is taken or left out as a value on the device says.

    Where the host runs ahead of the device it is always computed, and weights and optimizer's state become the new or
    the old ones on the device: reading the value would make the host wait for the whole update.

    Args:
        network: in training; where a step is left out its batch statistics become those of the last that was taken.
        optimizer: of its parameters.
        on_device: whether the choice is made there; by default where the host runs ahead.
    """

    def __init__(self, network: nn.Module, optimizer: Optimizer, on_device: bool | None = None) -> None:
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.on_device = runs_ahead(self.parameters[0].device) if on_device is None else on_device
        norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        self._running = [(b, b.clone()) for m in norms for b in m.buffers()]  # statistics, and those of the last step

    @torch.no_grad()
    def __call__(self, take: Tensor) -> None:
        """Make the step where ``take``, a scalar, is true."""
        for buffer, kept in self._running:
            kept.copy_(torch.where(take, buffer, kept))
            buffer.copy_(kept)
        if self.on_device:
            self._step_on_device(take)
        elif take:
            self.optimizer.step()

    def _step_on_device(self, take: Tensor) -> None:
        tensors = self._tensors()
        flat = as_vectors(tensors)
        before = torch.cat(flat)
        self.optimizer.step()
        known = {id(tensor) for tensor in tensors}
        made = [tensor for tensor in self._tensors() if id(tensor) not in known]  # the state, by the first step
        flat += as_vectors(made)
        after = torch.cat(flat)
        before = torch.cat([before, before.new_zeros(len(after) - len(before))]) if made else before
        chosen = torch.where(take, after, before)
        torch._foreach_copy_(flat, list(chosen.split([len(tensor) for tensor in flat])))

    def _tensors(self) -> list[Tensor]:
        """All that a step changes."""
        states = [self.optimizer.state.get(p, {}).values() for p in self.parameters]
        return self.parameters + [value for state in states for value in state if isinstance(value, Tensor)]


def as_vectors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same memory as vectors, of tensors that have no gaps in it, whatever the order of their axes."""
    return [tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in tensors]
