"""The networks that are measured, and one step of their training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scripts.losses import ELBOLoss, weight_penalty
from scripts.networks import VDVAE

# finest level first; 8 is for tests
SIZES = {
    8: {"channels": [4, 6, 8, 10], "num_latents": [1, 2, 2, 1], "kernel_sizes": [3, 3, 2, 1]},
    32: {
        "channels": [20, 40, 60, 80, 100, 120],
        "num_latents": [2, 5, 4, 3, 2, 1],
        "kernel_sizes": [3, 3, 3, 3, 2, 1],
    },
    64: {
        "channels": [20, 40, 60, 80, 100, 120, 140],
        "num_latents": [2, 6, 5, 4, 3, 2, 1],
        "kernel_sizes": [3, 3, 3, 3, 3, 2, 1],
    },
    128: {
        "channels": [20, 40, 60, 80, 100, 120, 140, 160],
        "num_latents": [2, 7, 6, 5, 4, 3, 2, 1],
        "kernel_sizes": [3, 3, 3, 3, 3, 3, 2, 1],
    },
    256: {
        "channels": [20, 40, 60, 80, 100, 120, 140, 160, 180],
        "num_latents": [2, 8, 7, 6, 5, 4, 3, 2, 1],
        "kernel_sizes": [3, 3, 3, 3, 3, 3, 3, 2, 1],
    },
}


def network_def(size: int) -> dict:
    """Arguments of :class:`scripts.networks.VDVAE` for scans of ``size`` voxels an axis.

    Raises:
        ValueError: there is no such size.
    """
    if size not in SIZES:
        raise ValueError(f"size is {size}: choose one of {', '.join(map(str, SIZES))}.")
    levels = len(SIZES[size]["channels"])
    return {
        "spatial_dims": 3,
        "in_channels": 1,
        "spatial_shape": [size] * 3,
        "latent_channels": [20] * (levels - 1) + [200],
        **SIZES[size],
    }


class TrainingStep:
    """Updates of a network with the published objective and optimizer, on random scans.

    Args:
        network: in training mode.
        scans: ``[batch, channels, *spatial]``.
        precision: ``"fp32"``, or ``"bf16"`` for autocast.
    """

    def __init__(self, network: VDVAE, scans: Tensor, precision: str = "fp32") -> None:
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {precision!r}: choose fp32 or bf16.")
        self.network = network
        self.scans = scans
        self.bfloat16 = precision == "bf16"
        self.loss_function = ELBOLoss()
        self.parameters = list(network.parameters())
        self.optimizer = torch.optim.Adamax(self.parameters, lr=1e-3)

    def fill_optimizer_state(self) -> None:
        """Make the optimizer's state as an earlier step would; zero gradients leave the weights as they are."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> Tensor:
        """Negative ELBO in nats a scan, plus the weight penalty."""
        with torch.autocast(self.scans.device.type, torch.bfloat16, enabled=self.bfloat16):
            output = self.network(self.scans)
        loss, _ = self.loss_function(output, self.scans, update=0)
        return loss + 1e-4 * weight_penalty(self.parameters)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.parameters, 100.0)
        self.optimizer.step()
