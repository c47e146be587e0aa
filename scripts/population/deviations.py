"""How far held-out scans deviate from what a population prior expects of them, beside how far its own draws do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from monai.networks.layers.factories import Pool
from scripts.layers.gaussian import LatentSampler
from scripts.layers.output import foreground, foreground_percentile
from scripts.networks import VDVAE
from scripts.population.prior import PopulationPrior
from torch import Tensor

DRAWS = 16  # of what is expected of each scan
DEVIATION_PERCENTILE = 99


class Deviations(NamedTuple):
    """Of some scans.

    Attributes:
        squares, counts: sums of squares and their numbers, of voxels and of blocks, ``[2]`` each.
        scores: the 99th percentile of each scan's absolute deviation where brain is expected, ``[batch]``, without any
            dispersion.
    """

    squares: Tensor
    counts: Tensor
    scores: Tensor


def deviations(
    network: VDVAE, prior: PopulationPrior, scans: Tensor, features: Tensor, sampler: LatentSampler
) -> Deviations:
    """How far scans, ``[batch, channels, *spatial]``, deviate, in standard deviations of draws for their covariates,
    which become ``[batch, features]``.

    Of voxels, and of the means of blocks of an eighth of the grid, which stand for regions; of those that are brain in
    most draws.
    """
    pool = Pool["AVG", network.spatial_dims](max(1, min(network.spatial_shape) // 8))
    squares, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    drawn = [prior.sample(network, features, sampler) for _ in range(DRAWS)]
    means = torch.stack([loc.cpu() for loc, _ in drawn])
    noise = torch.stack([scale.cpu().square() for _, scale in drawn]).mean(0)
    brain = foreground(means, network).float().mean(0)
    blocks = pool(means.flatten(0, 1)).unflatten(0, means.shape[:2])
    inside = brain > 0.5, pool(brain) > 0.5
    for place, (values, of_draws, rest) in enumerate(((scans, means, noise), (pool(scans), blocks, torch.zeros(())))):
        # the mean of few draws is itself off by its variance over their number
        between = of_draws.var(0)
        z2 = ((values - of_draws.mean(0)).square() - between / DRAWS) / (between + rest)
        # the inverse of a variance over few draws is too large in the mean; the noise is known
        z2 = z2 * (1 - 2 / (DRAWS - 1) * (between / (between + rest)).square())
        within = z2[inside[place]].double()
        squares[place] += within.sum()
        counts[place] += len(within)
    expected = means.mean(0)
    far = (scans - expected).abs() / (means.var(0) + noise).sqrt()
    return Deviations(squares, counts, foreground_percentile(far, expected, network, DEVIATION_PERCENTILE))
