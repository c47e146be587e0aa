"""The objective, negative ELBO in nats per scan, the weight penalty, and what is reported of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from ignite.metrics import Metric, MetricsLambda
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from scripts.networks import VDVAE, VDVAEOutput
from scripts.utils.errors import InputError
from torch import Tensor, nn

PER_SCAN = ("bits_per_dim", "nll", "kl", "mse")


def negative_log_likelihood(loc: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """Of scans under independent Gaussians, one per voxel, in nats per scan: ``[batch]``.

    It is computed in fp32; without gradients summed in double precision, since fp32 has steps of a nat at 128³.

    Args:
        loc, scale, target: ``[batch, channels, *spatial]``.
    """
    z = (target.float() - loc.float()) / scale.float()
    nll = 0.5 * z.square() + scale.float().log() + 0.5 * math.log(2 * math.pi)
    return nll.flatten(1).sum(1, dtype=None if torch.is_grad_enabled() else torch.float64)


@torch.no_grad()
def discretised_nll(
    loc: Tensor, scale: Tensor, target: Tensor, value_range: tuple[float, float], levels: int = 256
) -> Tensor:
    """Of scans rounded to whole numbers, in nats per voxel, shaped like them; never below 0.

    A voxel's probability is its Gaussian's mass in the voxel's bin; the first and the last bin reach to infinity, so
    that the masses of all sum to one. With the KL this bounds the length of a file that holds the rounded scan.

    Args:
        loc, scale, target: ``[batch, channels, *spatial]``.
        value_range: what becomes the first and the last of the numbers.
        levels: how many numbers there are: 256 for 8 bits.
    """
    low, high = value_range
    half = (high - low) / (levels - 1) / 2
    bins = ((target.float() - low) / (2 * half)).round().clamp(0, levels - 1)
    z = (low + 2 * half * bins - loc.float()) / scale.float()
    # from the side of the nearer tail, where differences of distribution functions keep their digits
    upper = half / scale.float() - z.abs()
    lower = upper - 2 * half / scale.float()
    upper[((bins == 0) & (z > 0)) | ((bins == levels - 1) & (z <= 0))] = math.inf
    lower[((bins == 0) & (z <= 0)) | ((bins == levels - 1) & (z > 0))] = -math.inf
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    log_mass = log_upper + (-torch.expm1(log_lower - log_upper)).log()
    return -log_mass


def bits_per_dim(nats: Tensor, scan: Tensor) -> Tensor:
    """Nats per scan as bits per voxel and channel.

    Args:
        nats: any shape.
        scan: ``[batch, channels, *spatial]``, for the number of its voxels.
    """
    return nats / (scan[0].numel() * math.log(2))


class WeightPenalty:
    """The sum over weight tensors (two or more dimensions) of the mean square, times a factor.

    Its gradient is known, and is added to those of a backward pass: for all tensors at once, where autograd would take
    a dozen operations for each.

    Args:
        parameters: of the network; biases and scalars are left alone.
        factor: what the sum is multiplied by.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        self.weights = [p for p in parameters if p.ndim >= 2]
        self.factor = factor
        self._counts: Tensor | None = None

    @torch.no_grad()
    def value(self) -> Tensor:
        """The penalty, a scalar."""
        norms = torch.stack(torch._foreach_norm(self.weights))
        if self._counts is None or self._counts.device != norms.device:
            self._counts = torch.tensor([p.numel() for p in self.weights]).to(norms.device, non_blocking=True)
        return self.factor * (norms.square() / self._counts).sum()

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to those of the weights."""
        for p in self.weights:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = torch._foreach_mul(self.weights, [2 * self.factor / p.numel() for p in self.weights])
        torch._foreach_add_([p.grad for p in self.weights], gradients)


class ELBOLoss(nn.Module):
    """``mean over batch [ NLL + beta * sum of the latents' KL ]``, in nats.

    ``beta`` rises linearly from 0 to 1 over the first ``kl_warmup`` updates. While the decoder cannot yet read the
    latents, the full KL makes the posterior equal the prior, from which it takes thousands of updates to recover.

    Args:
        kl_warmup: updates until the KL counts in full; 0 (the published objective) counts it in full from the start.
    """

    def __init__(self, kl_warmup: int = 0) -> None:
        super().__init__()
        if kl_warmup < 0:
            raise InputError(f"kl_warmup is {kl_warmup}: it must be 0 or more updates.")
        self.kl_warmup = kl_warmup

    def beta(self, update: int) -> float:
        """Weight of the KL for update number ``update``, counted from 0."""
        return min(1.0, update / self.kl_warmup) if self.kl_warmup else 1.0

    def forward(self, output: VDVAEOutput, target: Tensor, beta: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """Args:
            output: of the network.
            target: the scans, ``[batch, channels, *spatial]``.
            beta: weight of the KL, see :meth:`beta`.

        Returns:
            the loss, a scalar in nats per scan, and the negative log-likelihoods, ``[batch]``.
        """
        nll = negative_log_likelihood(output.loc, output.scale, target)
        return (nll + beta * output.kl.sum(1)).mean(), nll


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
