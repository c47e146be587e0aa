"""What is measured of a network: the ELBO, exact over uneven batches and over processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from ignite.metrics import Metric, MetricsLambda
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from scripts.networks import VDVAE
from torch import Tensor

PER_SCAN = ("bits_per_dim", "nll", "kl", "mse")


class Means(Metric):
    """Means of several quantities over scans, ``[width]``, summed on the device; NaN where there is none.

    Args:
        values: gives them of an engine's output, ``[batch, width]``.
        width: how many they are.
        device: where the sums are kept.
        finite_only: leave out what is not finite, of each quantity by itself.
    """

    def __init__(
        self,
        values: Callable[[dict[str, Any]], Tensor],
        width: int,
        device: torch.device | str = "cpu",
        finite_only: bool = False,
    ) -> None:
        self.width, self.finite_only = width, finite_only
        super().__init__(values, device)

    @reinit__is_reduced
    def reset(self) -> None:
        self._sums = torch.zeros(self.width, dtype=torch.float64, device=self._device)
        self._counts = torch.zeros_like(self._sums)

    @reinit__is_reduced
    def update(self, output: Tensor) -> None:
        values = output.double()
        counted = values.isfinite() if self.finite_only else torch.ones_like(values, dtype=torch.bool)
        self._sums += torch.where(counted, values, 0.0).sum(0)
        self._counts += counted.sum(0)

    @sync_all_reduce("_sums", "_counts")
    def compute(self) -> Tensor:
        return self._sums / self._counts


def elbo_metrics(network: VDVAE, device: torch.device | str = "cpu", finite_only: bool = False) -> dict[str, Metric]:
    """Means over all scans of what a trainer or evaluator of this bundle reports.

    The first, ``bits_per_dim``, is the key metric; lower is better. ``nll`` and ``kl`` are in nats per scan, ``mse`` in
    squared units of the network. ``kl_z00``, ``kl_z01``, ... are the nats per scan of each latent, top first, and
    ``kl_per_dim_z00``, ... the same divided by the number of the latent's dimensions.

    Args:
        network: says how many latents there are and how large they are; it needs a ``spatial_shape``.
        device: where the sums are kept.
        finite_only: leave out scans whose number is not finite, which training skips; NaN if there is no other.
    """

    def columns(output: dict[str, Any]) -> Tensor:
        return torch.column_stack([*(output[name] for name in PER_SCAN), output["kl_per_latent"]])

    grids = network.latent_grids()
    means = Means(columns, len(PER_SCAN) + len(grids), device, finite_only)

    def mean(column: int) -> Metric:
        return MetricsLambda(lambda values: values[column].item(), means)

    metrics = {name: mean(column) for column, name in enumerate(PER_SCAN)}
    for index, grid in enumerate(grids):
        kl = mean(len(PER_SCAN) + index)
        metrics[f"kl_z{index:02d}"] = kl
        metrics[f"kl_per_dim_z{index:02d}"] = kl / math.prod(grid)
    return metrics


def key_metric(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """The first of ``metrics`` alone, as MONAI's engines want it."""
    name = next(iter(metrics))
    return {name: metrics[name]}


def additional_metrics(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """All of ``metrics`` but the first."""
    return dict(list(metrics.items())[1:])
