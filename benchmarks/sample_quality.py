"""Do samples vary as scans do, look like scans, cover them, and differ from those that were trained on?

All of it on voxels, as they are: `[images, *any]`, of any one shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BANDS = ((0, 5), (5, 20), (20, 50), (50, 100))  # of principal components, leading first


def spectrum(
    samples: Tensor, scans: Tensor, training: Tensor, bands: Sequence[tuple[int, int]] = BANDS
) -> dict[str, float]:
    """The variance of samples over that of scans, in bands of principal components: 1 where they vary alike.

    Args:
        samples, scans: two or more each.
        training: the components are of these, which are neither of the two, so that neither is favoured.

    Returns:
        `{"1-5": ratio, ...}`, as far as there are components.
    """
    training = training.flatten(1).double()
    mean = training.mean(0)
    count = min(bands[-1][1], len(training) - 1, training.shape[1])
    _, _, components = torch.svd_lowrank(training - mean, q=min(count + 20, *training.shape), niter=4)
    variances = [((x.flatten(1).double() - mean) @ components[:, :count]).var(0) for x in (samples, scans)]
    return {
        f"{first + 1}-{last}": (variances[0][first:last].sum() / variances[1][first:last].sum()).item()
        for first, last in bands
        if last <= count
    }


def precision_recall(samples: Tensor, scans: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Which samples lie among the scans, and which scans among the samples (Kynkäänniemi et al. 2019).

    An image lies among others if it is not farther from one of them than that one's `neighbours`-th nearest.

    Args:
        samples, scans: more than `neighbours` each; of fewer the farthest counts.

    Returns:
        precision and recall, 0 to 1. Of as many scans more, instead of samples, they are what is to be had.
    """
    a, b = samples.flatten(1).double(), scans.flatten(1).double()
    between = torch.cdist(a, b)
    # the nearest of an image is itself
    reach_a, reach_b = (torch.cdist(x, x).kthvalue(min(neighbours + 1, len(x)), dim=1).values for x in (a, b))
    precision = (between <= reach_b[None, :]).any(1).double().mean()
    recall = (between <= reach_a[:, None]).any(0).double().mean()
    return precision.item(), recall.item()


def nearest_training(samples: Tensor, scans: Tensor, training: Tensor) -> float:
    """The median distance of samples to their nearest training scan, over that of held-out scans to theirs.

    Far below 1 where a model gives back what it was trained on; noise, or a blur, moves it too.
    """
    distances = [
        torch.cdist(x.flatten(1).double(), training.flatten(1).double()).amin(1).median() for x in (samples, scans)
    ]
    return (distances[0] / distances[1]).item()
