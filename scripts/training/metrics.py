"""What is measured: the ELBO, exact over uneven batches and over processes, and how samples differ from scans."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ignite.metrics import Metric, MetricsLambda
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from monai.metrics import MMDMetric, MultiScaleSSIMMetric
from scripts.networks import VDVAE
from torch import Tensor

PER_SCAN = ("bits_per_dim", "nll", "kl", "mse")

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first (Wang et al. 2003)
MS_SSIM_KERNEL = 7  # voxels; the usual 11 would leave 32 voxels two scales


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
        return MetricsLambda(lambda found: found[column].item(), means)

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


def ms_ssim_metric(spatial_shape: Sequence[int], value_range: Sequence[float]) -> MultiScaleSSIMMetric:
    """MONAI's MS-SSIM with as many scales as a grid has room for: 3 at 32 voxels, 4 at 64, 5 from 112 on.

    At each scale the kernel fits into the grid. The weights are those of the finest scales, scaled to a sum of 1.

    Args:
        spatial_shape: of the scans.
        value_range: lowest and highest intensity.
    """
    smallest = min(spatial_shape)
    kernel = min(MS_SSIM_KERNEL, smallest if smallest % 2 else smallest - 1)
    # the second condition is MONAI's own check
    fitting = (
        n
        for n in range(len(MS_SSIM_WEIGHTS), 0, -1)
        if smallest >> (n - 1) >= kernel and smallest // max(1, n - 1) ** 2 >= kernel
    )
    weights = MS_SSIM_WEIGHTS[: next(fitting)]
    return MultiScaleSSIMMetric(
        len(spatial_shape),
        data_range=value_range[1] - value_range[0],
        kernel_size=kernel,
        weights=[weight / sum(weights) for weight in weights],
        reduction="none",
    )


def gaussian_kernel(dots: Tensor, reference: Sequence[int]) -> Tensor:
    """``exp(-d^2 / (2 m^2))`` of images' distances d, where m is the median distance between those of ``reference``.

    Args:
        dots: dot products of all images with each other, ``[images, images]``.
    """
    squares = dots.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * dots).clamp_min(0)
    own = distances[reference][:, reference]
    pairs = torch.triu_indices(len(own), len(own), offset=1)
    return torch.exp(-distances / (2 * own[pairs[0], pairs[1]].median()))


def kernel_features(kernel: Tensor) -> Tensor:
    """``[images, features]`` whose dot products are a kernel's values: what MONAI's ``MMDMetric`` needs for it."""
    values, vectors = torch.linalg.eigh(kernel)
    return vectors * values.clamp_min(0).sqrt()


def mmd(features: Tensor, samples: Sequence[int], scans: Sequence[int]) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy of as many samples as scans.

    Args:
        features: of all images, ``[images, features]``.
        samples, scans: which of them are which, two or more each.
    """
    return MMDMetric()(features[scans], features[samples]).item()


def mean_of_pairs(values: Tensor, images: Sequence[int]) -> float:
    """The mean over all pairs of some images of a symmetric matrix, ``[images, images]``."""
    own = values[images][:, images]
    return ((own.sum() - own.diagonal().sum()) / (len(own) * (len(own) - 1))).item()


def random_halves(indices: Sequence[int], repeats: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Random divisions in two halves of one size; of an odd number one is left out, another each time.

    A mean over half of the values, taken at random, scatters about the mean of all as much as that scatters about the
    truth: the standard deviation over halves is the standard error of the whole.
    """
    generator, size = random.Random(seed), len(indices) // 2
    shuffled = [generator.sample(indices, len(indices)) for _ in range(repeats)]
    return [(order[:size], order[size : 2 * size]) for order in shuffled]
