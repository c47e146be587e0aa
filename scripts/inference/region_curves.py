"""How a region's mean intensity goes with age (or another number), in centiles, and where scans lie among them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.networks.utils import eval_mode
from scripts.inference.covariates import Deviation
from scripts.networks import VDVAE
from scripts.utils import plots
from scripts.utils.names import item_path
from torch import Tensor

__all__ = ["RegionCurves"]

logger = logging.getLogger(__name__)

STEPS = 9  # values of the covariate
SHOWN = 12  # regions


class RegionCurves:
    """Draws ``regions.png``: a panel per region, its centiles over the first continuous covariate, and the scans.

    The curves are of people whose other covariates are not known. A scan's point lies as far from the middle curve as
    its z score says, so that what its other covariates explain does not count.

    Args:
        deviation: the job's inferer, with an atlas.
        network: whose scans it is about.
        items: of the data set, with ``covariates``.
        seed: of the draws, which are the same people at each value.
    """

    def __init__(self, deviation: Deviation, network: VDVAE, items: Sequence[Mapping[str, Any]], seed: int = 0) -> None:
        self.deviation, self.network, self.seed = deviation, network, seed
        self.known = {item_path(item): item["covariates"] for item in items}

    @torch.no_grad()
    def moments(self, name: str, values: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each region over draws, at values of a covariate: ``[values, regions]``."""
        prior, coding = self.deviation.prior, self.deviation.prior.coding
        means, deviations = [], []
        device = self.network.output.weight.device
        with eval_mode(self.network):
            for value in values:
                features = coding.numbers({name: value})[None].to(device)
                regions = []
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    torch.manual_seed(self.seed)
                    for _ in range(self.deviation.draws):
                        loc, _ = prior.usual(self.network, features)
                        regions.append(self.deviation.region_means(loc)[0].cpu())
                drawn = torch.stack(regions)
                means.append(drawn.mean(0))
                deviations.append(drawn.std(0))
        return torch.stack(means), torch.stack(deviations)

    def draw(self, path: str | os.PathLike, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Draw; nothing where no covariate is continuous.

        Args:
            path: of the PNG.
            scores: of each scan, the z score of each region.
        """
        coding = self.deviation.prior.coding
        covariate = next((name for name, variable in coding.variables.items() if variable.kind == "continuous"), None)
        if covariate is None:
            return
        values = coding.variables[covariate].grid(STEPS)
        means, deviations = self.moments(covariate, values)
        names = list(next(iter(scores.values())))
        largest = [max(abs(scan[name]) for scan in scores.values()) for name in names]
        shown = sorted(sorted(range(len(names)), key=largest.__getitem__)[-SHOWN:])
        panels = {names[region]: (means[:, region].numpy(), deviations[:, region].numpy()) for region in shown}
        placed = {scan: self.known[scan][covariate] for scan in scores}
        points = [
            [(place, scores[scan][names[region]]) for scan, place in placed.items() if place is not None]
            for region in shown
        ]
        plots.centiles(path, covariate, values, panels, points)
        logger.info("'%s' shows regions over %s, with the scans among the centiles.", path, covariate)
