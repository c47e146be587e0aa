"""What benchmarks share: the networks that are measured, a step of their training, configs, scans, times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple
from torch import Tensor, nn

from scripts.inference.tables import markdown_lines
from scripts.networks import VDVAE
from scripts.training.losses import ELBOLoss, WeightPenalty

CONFIGS = Path(__file__).parent.parent / "configs"
SIZES = (32, 64, 128, 256)
# for tests
TINY = {
    "spatial_shape": [8, 8, 8],
    "network_def#channels": [4, 6, 8, 10],
    "network_def#num_latents": [1, 2, 2, 1],
    "network_def#latent_channels": [20, 20, 20, 200],
    "network_def#kernel_sizes": [3, 3, 2, 1],
}


def read_config(config_file: str | Path | Sequence[str | Path], **settings: Any) -> ConfigParser:
    """A config of the bundle, or several merged, with other values of some keys."""
    parser = ConfigParser()
    parser.read_config([str(path) for path in ensure_tuple(config_file)])
    parser.update(settings)
    return parser


def stack(items: Iterable[Any]) -> Tensor:
    """The images of items of a data set, ``[scans, channels, *spatial]``."""
    return torch.stack([torch.as_tensor(item["image"]).as_subclass(Tensor) for item in items])


def seconds(function: Callable[[], object], at_least: float = 0.0) -> float:
    """Time of one call; the mean over calls that take ``at_least`` so many seconds together."""
    calls = 0
    start = time.perf_counter()
    while True:
        function()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed >= at_least:
            return elapsed / calls


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print as Markdown."""
    for line in markdown_lines(columns, rows):
        print(line, flush=True)


def training_config(network: int | str) -> ConfigParser:
    """``configs/train.json`` with a network of a size, or of a name.

    Args:
        network: voxels an axis, for the published network of that size (8: a tiny one, for tests); ``default``; or the
            name of an overlay that says a network, such as ``lean_64``.

    Raises:
        ValueError: there is no such network.
    """
    overlay = CONFIGS / (f"size_{network}.json" if isinstance(network, int) else f"{network}.json")
    if network not in (8, "default") and not overlay.is_file():
        raise ValueError(
            f"There is no network {network}: choose one of {', '.join(map(str, SIZES))}, default, or the name of a "
            "file in configs/, such as lean_64."
        )
    settings = TINY if network == 8 else {}
    return read_config([CONFIGS / "train.json", *([overlay] if overlay.is_file() else [])], **settings)


def network_def(network: int | str, checkpoint_levels: int | None = None) -> dict:
    """Arguments of :class:`scripts.networks.VDVAE`, as the configs give them.

    Args:
        network: see :func:`training_config`.
        checkpoint_levels: another number than the config's.

    Raises:
        ValueError: there is no such network.
    """
    parser = training_config(network)
    arguments = {name: value for name, value in parser["network_def"].items() if not name.startswith("_")}
    if checkpoint_levels is not None:
        arguments["checkpoint_levels"] = checkpoint_levels
    return arguments | {"spatial_shape": parser["spatial_shape"]}


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
        self.penalty = WeightPenalty(self.parameters, 1e-4)
        self.optimizer = torch.optim.Adamax(self.parameters, lr=1e-3, foreach=True)

    def fill_optimizer_state(self) -> None:
        """Make the optimizer's state as an earlier step would; zero gradients leave the weights as they are."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def loss(self) -> Tensor:
        """Negative ELBO in nats per scan, without the weight penalty."""
        with torch.autocast(self.scans.device.type, torch.bfloat16, enabled=self.bfloat16):
            output = self.network(self.scans)
        loss, _ = self.loss_function(output, self.scans)
        return loss

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.penalty.add_gradient()
        nn.utils.clip_grad_norm_(self.parameters, 100.0)
        self.optimizer.step()
