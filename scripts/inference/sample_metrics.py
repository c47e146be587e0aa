"""How samples differ from scans, and from each other: maximum mean discrepancy and MS-SSIM."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from monai.metrics import MMDMetric, MultiScaleSSIMMetric
from torch import Tensor

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first (Wang et al. 2003)
MS_SSIM_KERNEL = 7  # voxels; the usual 11 would leave 32 voxels two scales


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
    among = distances[reference][:, reference]
    pairs = torch.triu_indices(len(among), len(among), offset=1)
    return torch.exp(-distances / (2 * among[pairs[0], pairs[1]].median()))


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
    among = values[images][:, images]
    return ((among.sum() - among.diagonal().sum()) / (len(among) * (len(among) - 1))).item()


def random_halves(indices: Sequence[int], repeats: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Random divisions in two halves of one size; of an odd number one is left out, another each time.

    A mean over half of the values, taken at random, scatters about the mean of all as much as that scatters about the
    truth: the standard deviation over halves is the standard error of the whole.
    """
    generator, size = random.Random(seed), len(indices) // 2
    shuffled = [generator.sample(indices, len(indices)) for _ in range(repeats)]
    return [(order[:size], order[size : 2 * size]) for order in shuffled]
