"""Ignite metrics of the ELBO, exact over uneven batches and over processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from ignite.metrics import Average, Metric, MetricsLambda

from scripts.networks import VDVAE

PER_SCAN = ("bits_per_dim", "nll", "kl", "mse")


def elbo_metrics(network: VDVAE, device: torch.device | str = "cpu") -> dict[str, Metric]:
    """Means over all scans of what a trainer or evaluator of this bundle reports.

    The first, ``bits_per_dim``, is the key metric; lower is better. ``nll`` and ``kl`` are in nats a scan, ``mse`` in
    squared units of the network. ``kl_z00``, ``kl_z01``, ... are the nats a scan of each latent, top first, and
    ``kl_per_dim_z00``, ... the same divided by the number of the latent's dimensions.

    Args:
        network: says how many latents there are and how large they are; it needs a ``spatial_shape``.
        device: where the sums are kept.
    """
    metrics = {name: _mean(itemgetter(name), device) for name in PER_SCAN}
    for index, grid in enumerate(network.latent_grids()):
        kl = _mean(lambda output, index=index: output["kl_per_latent"][:, index], device)
        metrics[f"kl_z{index:02d}"] = kl
        metrics[f"kl_per_dim_z{index:02d}"] = kl / math.prod(grid)
    return metrics


def _mean(values: Callable[[dict[str, Any]], torch.Tensor], device: torch.device | str) -> Metric:
    """The mean over scans, a float, of ``values(output)``, ``[batch]``."""
    # ignite counts the rows of a matrix, and a vector as one
    mean = Average(lambda output: values(output).double().unsqueeze(1), device=device)
    return MetricsLambda(torch.Tensor.item, mean)


def key_metric(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """The first of ``metrics`` alone, as MONAI's engines want it."""
    name = next(iter(metrics))
    return {name: metrics[name]}


def additional_metrics(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """All of ``metrics`` but the first."""
    return dict(list(metrics.items())[1:])
