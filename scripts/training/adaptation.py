"""A category that a population prior has not seen, such as a new site: its effect, learnt from a few scans."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from monai.networks.utils import eval_mode
from scripts.data.covariate_tables import parse_row, read_rows
from scripts.data.covariates import Categorical, CovariateCoding, Value
from scripts.layers.population_prior import PopulationPrior, fingerprint, innovation
from scripts.networks import VDVAE
from scripts.utils.files import write_whole
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

__all__ = ["Adaptation", "extended"]

logger = logging.getLogger(__name__)


def extended(coding: CovariateCoding, name: str, category: str) -> CovariateCoding:
    """The coding with one more category of a covariate, which none of the cohort's scans had.

    Raises:
        ValueError: the covariate is not categorical, or has this category.
    """
    variable = coding.variables.get(name)
    if not isinstance(variable, Categorical):
        known = [other.name for other in coding.variables.values() if isinstance(other, Categorical)]
        raise ValueError(f"covariates: '{name}' is no categorical covariate of the prior, which has {known}.")
    if category in variable.categories:
        raise ValueError(f"covariates: {name} '{category}' is known already; give the new one another name.")
    longer = replace(variable, categories=(*variable.categories, category), shares=(*variable.shares, 0.0))
    return CovariateCoding([longer if other is variable else other for other in coding.variables.values()])


class Adaptation:
    """Learns the effect of a new category from scans that have it, and nothing else; writes the prior that knows it.

    The effect is the mean of what the scans' other covariates leave of the posteriors' shifts, shrunk as if one more
    scan had none.

    Args:
        network: trained.
        prior: with covariates.
        dataset: of plain scans, as the network gets them, all of the new category.
        covariates: the covariate and its new category, such as ``{"site": "D"}``.
        dataset_dir, covariates_file: where the other covariates are read.
        path: of the file that is written.
        batch_size, num_workers: of the data loader.
        device: of the network.
    """

    def __init__(
        self,
        network: VDVAE,
        prior: PopulationPrior,
        dataset: Dataset,
        covariates: Any,
        dataset_dir: str | os.PathLike,
        path: str | os.PathLike,
        covariates_file: str | os.PathLike | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(covariates, Mapping) or len(covariates) != 1:
            raise ValueError("covariates: give the one covariate and its new category, such as \"{'site': 'D'}\".")
        ((name, category),) = covariates.items()
        self.name, self.category = name, str(category)
        self.coding = extended(prior.coding, self.name, self.category)
        self.network, self.prior, self.dataset, self.path = network, prior, dataset, Path(path)
        self.values = [
            self._others(item, row)
            for item, row in zip(dataset.data, read_rows(dataset.data, dataset_dir, covariates_file), strict=True)
        ]
        self.batch_size, self.num_workers, self.device = batch_size, num_workers, torch.device(device)

    def _others(self, item: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Value]:
        others = {name: value for name, value in row.items() if name != self.name}
        return {**parse_row(self.prior.coding, item, others), self.name: self.category}

    @torch.no_grad()
    def run(self) -> PopulationPrior:
        """Learn, and write; with several processes all take part."""
        # the numbers of the new category are those of none of the known ones, and a 1 of its own at the slice's end
        place = self.coding.slices()[self.name].stop - 1
        features = torch.stack([self.coding.numbers(values) for values in self.values])
        without = torch.cat([features[:, :place], features[:, place + 1 :]], dim=1)
        total = self._total(without)
        scans = len(self.dataset)
        effects = {}
        for index, rest in total.items():
            known = getattr(self.prior, f"effects_{index}")
            row = (rest / (scans + 1)).to(known)[None]
            effects[index] = torch.cat([known[:place], row, known[place:]])
        parts = (
            {i: getattr(self.prior, f"{part}_{i}") for i in self.prior.latents}
            for part in ("mean", "variance", "directions")
        )
        adapted = PopulationPrior(
            *parts,
            self.prior.distances,
            self.prior.bits_per_dim,
            effects=effects,
            offset=self._offset(place),
            coding=self.coding,
            sharpness=self.prior.sharpness,
            dispersion=self.prior.dispersion,
        )
        if idist.get_rank() == 0:
            self._save(adapted, scans)
        return adapted

    def _total(self, features: Tensor) -> dict[int, Tensor]:
        """The sum over scans of what mean and known effects leave of the shifts, ``[channels, *grid]`` by latent."""
        share = range(idist.get_rank(), len(self.dataset), idist.get_world_size())
        loader = DataLoader(Subset(self.dataset, share), self.batch_size, num_workers=self.num_workers, collate_fn=list)
        total = {i: torch.zeros_like(getattr(self.prior, f"mean_{i}")) for i in self.prior.latents}
        indices = iter(share)
        with eval_mode(self.network):
            for items in tqdm(loader, f"{self.name} {self.category}", unit="batch", disable=idist.get_rank() > 0):
                scans = torch.stack([torch.as_tensor(item["image"]).as_subclass(Tensor) for item in items])
                own = features[[next(indices) for _ in items]].to(self.device)
                posteriors = self.network.infer(scans.to(self.device), 0.0)[1]
                for i, usual in self.prior.expected(own).items():
                    total[i] += (innovation(posteriors[i]) - usual).sum(0)
        return {i: idist.all_reduce(rest) for i, rest in total.items()}

    def _offset(self, place: int) -> Tensor | None:
        """The known offsets, and none for the new category."""
        known = self.prior.offset
        return None if known is None else torch.cat([known[:place], torch.zeros_like(known[:1]), known[place:]])

    def _save(self, prior: PopulationPrior, scans: int) -> None:
        def write(path: str) -> None:
            with Path(path).open("wb") as file:
                prior.save(file, {"weights": fingerprint(self.network), "adapted_to": f"{self.name} {self.category}"})

        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, write)
        logger.info(
            "The population prior knows %s '%s' now, from %d scan(s): use it by --prior '%s'.",
            *(self.name, self.category, scans, self.path),
        )
