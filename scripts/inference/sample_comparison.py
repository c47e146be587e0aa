"""How samples compare with held-out scans: MMD, MS-SSIM of pairs, FID, spread, and their nearest training scans."""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from monai.metrics import MMDMetric, MultiScaleSSIMMetric
from scripts.inference.measures import (
    Numbers,
    distance_ratio,
    frechet_distance,
    nearest_training,
    precision_recall,
    region_distance,
    spectrum,
    ssim_window,
)
from scripts.utils.distributed import shared_out
from scripts.utils.errors import InputError, NotFoundError
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)

HALVES = 200  # random divisions, for the sampling errors
VOXELS = 2**22  # of all images together, in double precision at once
PAIRED_VOXELS = 2**28  # of the pairs whose MS-SSIM is taken: of 45 images at 64³, of 16 at 128³, some minutes of a core


def compare_images(
    samples: Tensor,
    scans: Tensor,
    value_range: tuple[float, float],
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    seed: int = 0,
    training: Tensor | None = None,
) -> Numbers:
    """Do samples look like scans, and do they vary as scans do?

    Squared maximum mean discrepancies (MMD; Gretton et al. 2012), unbiased, of whole images: ``mmd`` with a Gaussian
    kernel as wide as the median distance between scans, ``mmd_linear`` of the dot product (MONAI's own), which sees the
    mean image alone; ``_halves_mean`` and ``_halves_95`` are those of halves of the scans, for reference. ``ms_ssim``
    is the mean MS-SSIM of pairs of samples, ``ms_ssim_held_out`` of pairs of scans, of the first
    ``ms_ssim_images`` of each (``PAIRED_VOXELS``). ``precision`` and
    ``recall``: see :func:`scripts.inference.measures.precision_recall`. With training scans also the ``variance`` in
    bands of their principal components over that of scans, and ``nearest_training_ratio``, the median distance of
    samples from their nearest training scan over that of scans from theirs: far below 1 for copies.

    All processes take part.

    Args:
        samples, scans: ``[images, channels, *spatial]``, not more scans than samples.
        value_range: lowest and highest intensity.
        batch_size: of pairs.
        device: on which pairs are compared.
        seed: of random halves, for the sampling errors.
        training: ``[images, channels, *spatial]``.
    """
    metric = ms_ssim_metric(samples.shape[2:], value_range)
    paired = min(len(samples), max(4, math.isqrt(2 * PAIRED_VOXELS // samples[0].numel())))
    similarity = [
        _similarities(images[:paired], metric, torch.device(device), batch_size) for images in (samples, scans)
    ]
    found = {"samples": len(samples), "scans_compared": len(scans), **_discrepancies(samples, scans, seed)}
    found |= {"ms_ssim_images": paired}
    found |= {"ms_ssim_scales": len(metric.weights), "ms_ssim_kernel_size": metric.kernel_size[0]}
    found |= _diversity("ms_ssim", similarity[0], seed) | _diversity("ms_ssim_held_out", similarity[1], seed)
    few = len(scans) < 2
    found |= dict.fromkeys(("precision", "recall")) if few else precision_recall(samples[: len(scans)], scans)
    if training is not None:
        distances = [nearest_training(images, training)[0] for images in (samples, scans)]
        found["nearest_training_ratio"] = distance_ratio(*distances)
        found |= {} if few else spectrum(samples, scans, training)
    return found


def _similarities(images: Tensor, metric: MultiScaleSSIMMetric, device: torch.device, batch_size: int) -> Tensor:
    """MS-SSIM of every image with every other, ``[images, images]``; each process takes some rows."""
    count, rows = len(images), range(idist.get_rank(), len(images), idist.get_world_size())
    found = []
    for row in tqdm(rows, desc="MS-SSIM of pairs", file=sys.stderr, disable=idist.get_rank() > 0):
        image = images[row : row + 1].to(device)
        for start in range(row + 1, count, batch_size):
            others = images[start : start + batch_size].to(device)
            values = metric(others, image.expand_as(others)).flatten().tolist()
            found += [(row, start + offset, value) for offset, value in enumerate(values)]
    matrix = torch.zeros(count, count, dtype=torch.float64)
    for row, column, value in itertools.chain(*idist.all_gather(found)):
        matrix[row, column] = matrix[column, row] = value
    return matrix


def _diversity(name: str, similarity: Tensor, seed: int) -> Numbers:
    indices = range(len(similarity))
    if len(indices) < 2:
        return dict.fromkeys((name, f"{name}_standard_error"))
    halves = random_halves(indices, HALVES, seed) if len(indices) >= 4 else []
    error = _std([mean_of_pairs(similarity, half) for half, _ in halves])
    return {name: mean_of_pairs(similarity, indices), f"{name}_standard_error": error}


def _discrepancies(samples: Tensor, scans: Tensor, seed: int) -> Numbers:
    """The MMD of as many samples as scans, with the reference: halves of the scans against each other."""
    count = len(scans)
    if count < 2:
        logger.warning("One held-out subject: MMD and MS-SSIM need 2, and their sampling errors 4.")
        return dict.fromkeys(("mmd", "mmd_linear"))
    of_samples, of_scans = range(count), range(count, 2 * count)
    dots = _dot_products(torch.cat([samples[:count], scans]).flatten(1))
    numbers: Numbers = {}
    for name, kernel in (("mmd", gaussian_kernel(dots, of_scans)), ("mmd_linear", dots)):
        features = kernel_features(kernel)
        sample_halves, scan_halves = (
            random_halves(indices, HALVES, seed) if count >= 4 else []
            for indices, seed in ((of_samples, seed), (of_scans, seed + 1))
        )
        halves = [mmd(features, a, b) for (a, _), (b, _) in zip(sample_halves, scan_halves, strict=True)]
        reference = [mmd(features, a, b) for a, b in scan_halves]
        numbers |= {
            name: mmd(features, of_samples, of_scans),
            f"{name}_standard_error": _std(halves),
            f"{name}_halves_std": _std(reference),
            **_of_halves(name, reference),
        }
    return numbers


def _of_halves(name: str, distances: Sequence[float]) -> Numbers:
    """Mean and 95th percentile of distances of halves of the scans from each other."""
    return {
        f"{name}_halves_mean": float(np.mean(distances)) if distances else None,
        f"{name}_halves_95": float(np.quantile(distances, 0.95)) if distances else None,
    }


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _dot_products(images: Tensor) -> Tensor:
    """Of all images with each other, ``[images, images]``, in double precision; a part of each at a time."""
    dots = torch.zeros(len(images), len(images), dtype=torch.float64)
    for part in images.split(max(1, VOXELS // len(images)), dim=1):
        dots += part.double() @ part.double().T
    return dots


def read_feature_network(path: str | os.PathLike, device: torch.device | str) -> nn.Module:
    """A TorchScript network that takes images, ``[batch, channels, *spatial]``, to features.

    Raises:
        NotFoundError, InputError: there is no such file, or it is no TorchScript.
    """
    if not Path(path).is_file():
        raise NotFoundError(f"fid_network '{path}' does not exist: check the path.")
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"fid_network '{path}' cannot be read as TorchScript ({str(error).strip().splitlines()[0]}): save the "
            "network by torch.jit.script or torch.jit.trace."
        ) from error


def compare_features(
    samples: Tensor,
    scans: Tensor,
    network: nn.Module,
    value_range: tuple[float, float],
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Numbers:
    """``fid``, the Frechet distance of the features of as many samples as scans, with the reference: halves of scans.

    All processes take part. Of features on a grid the mean over it counts.

    Args:
        samples, scans: ``[images, channels, *spatial]``, not more scans than samples.
        network: gives features, ``[batch, features]`` or ``[batch, features, *grid]``, of images from 0 to 1.
        value_range: lowest and highest intensity of the images.
        batch_size, device: of the network.
        seed: of random halves.

    Raises:
        InputError: the network does not take such images, or gives something else.
    """
    low, high = value_range
    images = torch.cat([samples[: len(scans)], scans])

    def describe(places: Sequence[int]) -> list[Tensor]:
        try:
            features = network(((images[places] - low) / (high - low)).to(device))
        except RuntimeError as error:
            raise InputError(
                f"fid_network does not take images of shape {tuple(images.shape[1:])} ({str(error).strip()[-200:]}): "
                "give a network that brings them to its own grid."
            ) from error
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != len(places):
            raise InputError("fid_network must give one tensor, [batch, features]: wrap it so that it does.")
        return list(features.flatten(2).mean(2).cpu() if features.ndim > 2 else features.cpu())

    with torch.no_grad():
        features = torch.stack(shared_out(len(images), batch_size, describe, "features for the FID"))
    return _with_halves("fid", features[: len(scans)], features[len(scans) :], frechet_distance, seed)


def compare_regions(samples: Tensor, scans: Tensor, labels: Tensor, seed: int = 0) -> Numbers:
    """``region_distance``: how far samples' region means are from those of as many scans, with halves of scans.

    Both are ``[images, channels, *spatial]``, of which the first channel counts; ``labels`` is a region's number in
    each voxel, 0 for none, ``[*spatial]``.
    """
    masks = [labels == number for number in labels.unique().tolist() if number]
    means = [torch.stack([x[:, 0][:, mask].mean(1) for mask in masks], 1) for x in (samples[: len(scans)], scans)]
    spread = means[1].std(0)
    return _with_halves("region_distance", *means, lambda a, b: region_distance(a, b, spread), seed)


def _with_halves(
    name: str, samples: Tensor, scans: Tensor, distance: Callable[[Tensor, Tensor], float], seed: int
) -> Numbers:
    """A distance, and that of halves of the scans from each other: mean and 95th percentile."""
    if len(scans) < 2:
        return {name: None}
    halves = random_halves(range(len(scans)), HALVES, seed) if len(scans) >= 4 else []
    reference = [distance(scans[a], scans[b]) for a, b in halves]
    return {name: distance(samples, scans), **_of_halves(name, reference)}


MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first (Wang et al. 2003)
MS_SSIM_KERNEL = 7  # voxels; the usual 11 would leave 32 voxels two scales


def ms_ssim_metric(spatial_shape: Sequence[int], value_range: Sequence[float]) -> MultiScaleSSIMMetric:
    """MONAI's MS-SSIM with as many scales as a grid has room for: 3 at 32 voxels, 4 at 64, 5 from 112 on.

    At each scale the kernel fits into the grid. The weights are those of the finest scales, scaled to a sum of 1.
    """
    smallest = min(spatial_shape)
    kernel = ssim_window(spatial_shape, MS_SSIM_KERNEL)
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
    """``exp(-d^2 / (2 m^2))`` of images' distances d, by all their dot products ``[images, images]``, where m is the
    median distance between those of ``reference``.
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
    """The unbiased estimate of the squared maximum mean discrepancy of as many samples as scans, by the features of all
    images, ``[images, features]``, and which are which.
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
