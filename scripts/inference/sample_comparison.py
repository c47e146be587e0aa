"""How samples compare with held-out scans: MMD, and MS-SSIM of pairs."""

from __future__ import annotations

import itertools
import logging
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.metrics import MMDMetric, MultiScaleSSIMMetric
from monai.utils.enums import CommonKeys as Keys
from scripts.inference.engine import ScanEvaluator, read_item
from scripts.utils.errors import InputError
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

__all__ = ["compare_images", "compare_samples", "one_per_subject"]

logger = logging.getLogger(__name__)

HALVES = 200  # random divisions, for the sampling errors
VOXELS = 2**22  # of all images together, in double precision at once

Summary = dict[str, Any]


def compare_samples(
    sampling: ScanEvaluator | None, dataset: Dataset, items: Sequence[Mapping[str, Any]], seed: int = 0
) -> Summary | None:
    """Draw samples and compare them with held-out scans, see :func:`compare_images`.

    All processes take part; each has all images in memory in the end, 0.13 MB each at 32³ and 8.4 MB at 128³.

    Args:
        sampling: the job that draws, see :func:`scripts.inference.jobs.sample`; None compares nothing.
        dataset: of held-out scans; as many as there are samples are chosen at random, or all, but one per subject.
        items: of a datalist, those of ``dataset``; scans without a ``subject`` are of a subject each.
        seed: of all choices.

    Returns:
        What is found, the same on every process; None without samples.

    Raises:
        InputError: there is one sample alone.
    """
    if sampling is None:
        return None
    count = len(sampling.dataset.data)
    if count == 1:
        raise InputError("samples is 1: set --samples to 2 or more, or to 0 to compare none.")
    batch_size, chosen = sampling.common.loading["batch_size"], one_per_subject(items, count, seed)

    def draw(numbers: Sequence[int]) -> list[Tensor]:
        return list(sampling.compute([read_item(sampling.dataset, number) for number in numbers])["sample"])

    def read(numbers: Sequence[int]) -> list[Tensor]:
        return [torch.as_tensor(dataset[chosen[number]][Keys.IMAGE]).as_subclass(Tensor) for number in numbers]

    samples = _of_all_processes(count, batch_size, draw, "drawing samples")
    scans = _of_all_processes(len(chosen), batch_size, read, "reading held-out scans")
    return compare_images(samples, scans, sampling.common.value_range, batch_size, sampling.state.device, seed)


def compare_images(
    samples: Tensor,
    scans: Tensor,
    value_range: tuple[float, float],
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Summary:
    """Do samples look like scans, and do they vary as scans do?

    Squared maximum mean discrepancies (MMD; Gretton et al. 2012), unbiased, of whole images: ``mmd_gaussian`` with a
    Gaussian kernel as wide as the median distance between scans, ``mmd_linear`` of the dot product (MONAI's own), which
    sees the mean image alone. ``ms_ssim`` is the mean MS-SSIM of all pairs of samples, and of all pairs of scans.

    Args:
        samples, scans: ``[images, channels, *spatial]``, not more scans than samples.
        value_range: lowest and highest intensity.
        batch_size: of pairs.
        device: on which pairs are compared.
        seed: of random halves, for the sampling errors.
    """
    metric = ms_ssim_metric(samples.shape[2:], value_range)
    similarity = [_similarities(images, metric, torch.device(device), batch_size) for images in (samples, scans)]
    return {
        "count": len(samples),
        "held_out_scans": len(scans),
        **_discrepancies(samples, scans, seed),
        "ms_ssim": {
            "scales": len(metric.weights),
            "kernel_size": metric.kernel_size[0],
            "samples": _diversity(similarity[0], seed),
            "held_out": _diversity(similarity[1], seed),
        },
    }


def _of_all_processes(count: int, batch_size: int, make: Callable[[Sequence[int]], list[Tensor]], what: str) -> Tensor:
    """Images with the numbers from 0 on, ``[count, channels, *spatial]``; each process makes its share by batches."""
    numbers = range(idist.get_rank(), count, idist.get_world_size())
    made: list[tuple[int, Tensor]] = []
    for start in _progress(range(0, len(numbers), batch_size), what):
        batch = numbers[start : start + batch_size]
        made += zip(batch, (image.float().cpu() for image in make(batch)), strict=True)
    return torch.stack([image for _, image in sorted(itertools.chain(*idist.all_gather(made)), key=lambda n: n[0])])


def _similarities(images: Tensor, metric: MultiScaleSSIMMetric, device: torch.device, batch_size: int) -> Tensor:
    """MS-SSIM of every image with every other, ``[images, images]``; each process takes some rows."""
    count, rows = len(images), range(idist.get_rank(), len(images), idist.get_world_size())
    found = []
    for row in _progress(rows, "MS-SSIM of pairs"):
        image = images[row : row + 1].to(device)
        for start in range(row + 1, count, batch_size):
            others = images[start : start + batch_size].to(device)
            values = metric(others, image.expand_as(others)).flatten().tolist()
            found += [(row, start + offset, value) for offset, value in enumerate(values)]
    matrix = torch.zeros(count, count, dtype=torch.float64)
    for row, column, value in itertools.chain(*idist.all_gather(found)):
        matrix[row, column] = matrix[column, row] = value
    return matrix


def _diversity(similarity: Tensor, seed: int) -> Summary:
    indices = range(len(similarity))
    if len(indices) < 2:
        return {"mean": None, "standard_error": None}
    halves = random_halves(indices, HALVES, seed) if len(indices) >= 4 else []
    return {
        "mean": mean_of_pairs(similarity, indices),
        "standard_error": _std([mean_of_pairs(similarity, half) for half, _ in halves]),
    }


def _discrepancies(samples: Tensor, scans: Tensor, seed: int) -> Summary:
    """The MMD of as many samples as scans, with the reference: halves of the scans against each other."""
    count = len(scans)
    if count < 2:
        logger.warning("One held-out subject: MMD and MS-SSIM need 2, and their sampling errors 4.")
        return dict.fromkeys(("mmd_gaussian", "mmd_linear"))
    of_samples, of_scans = range(count), range(count, 2 * count)
    dots = _dot_products(torch.cat([samples[:count], scans]).flatten(1))
    summaries = {}
    for name, kernel in (("mmd_gaussian", gaussian_kernel(dots, of_scans)), ("mmd_linear", dots)):
        features = kernel_features(kernel)
        sample_halves, scan_halves = (
            random_halves(indices, HALVES, seed) if count >= 4 else []
            for indices, seed in ((of_samples, seed), (of_scans, seed + 1))
        )
        halves = [mmd(features, a, b) for (a, _), (b, _) in zip(sample_halves, scan_halves, strict=True)]
        reference = [mmd(features, a, b) for a, b in scan_halves]
        summaries[name] = {
            "value": mmd(features, of_samples, of_scans),
            "standard_error": _std(halves),
            "scan_halves_mean": float(np.mean(reference)) if reference else None,
            "scan_halves_std": _std(reference),
            "scan_halves_95th_percentile": float(np.quantile(reference, 0.95)) if reference else None,
        }
    return summaries


def one_per_subject(items: Sequence[Mapping[str, Any]], count: int, seed: int) -> list[int]:
    """Indices of at most so many scans, chosen at random, no two of one subject, whose scans are alike."""
    generator, subjects, chosen = random.Random(seed), set(), []
    for index in generator.sample(range(len(items)), len(items)):
        subject = items[index].get("subject") or f"scan {index}"
        if subject not in subjects and len(chosen) < count:
            chosen.append(index)
        subjects.add(subject)
    return sorted(chosen)


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _dot_products(images: Tensor) -> Tensor:
    """Of all images with each other, ``[images, images]``, in double precision; a part of each at a time."""
    dots = torch.zeros(len(images), len(images), dtype=torch.float64)
    for part in images.split(max(1, VOXELS // len(images)), dim=1):
        dots += part.double() @ part.double().T
    return dots


def _progress(values: Iterable[int], what: str) -> Iterable[int]:
    """A progress bar on standard error, of rank 0."""
    return tqdm(values, desc=what, file=sys.stderr, disable=idist.get_rank() > 0)


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
