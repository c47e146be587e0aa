"""The population prior that belongs to weights: found beside them, checked, and on their device."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from scripts.networks import VDVAE
from scripts.population.fit import prior_path
from scripts.population.prior import PopulationPrior, fingerprint
from scripts.training.checkpoints import CheckpointError, read_archive
from scripts.utils.errors import InputError, NotFoundError

logger = logging.getLogger(__name__)

CHOICES = (None, "population", "network")
FIT_IT = "fit one by the run fit_prior of configs/inference.json"


def prior_file(prior: str | None, ckpt: str | os.PathLike) -> Path:
    """The file of the population prior: the one that ``prior`` names (``.pt``), else the one beside the weights."""
    return Path(prior).expanduser() if isinstance(prior, str) and prior.endswith(".pt") else prior_path(ckpt)


def find_population_prior(prior: str | None, ckpt: str | os.PathLike, network: VDVAE) -> PopulationPrior | None:
    """The population prior of a ``model.pt``.

    Args:
        prior: ``"population"`` for the one beside the weights, or its path; ``"network"`` for the network's own, which
            needs no file; None takes the one beside the weights where there is one that was fitted to them.
        ckpt: the weights.
        network: with these weights.

    Raises:
        ValueError: ``prior`` is none of these.
        FileNotFoundError: it is asked for, and there is none.
        CheckpointError: its file is damaged; or, where it is asked for, of other weights.
    """
    path = prior_file(prior, ckpt)
    if prior not in CHOICES and prior != str(prior_file(prior, ckpt)):
        raise InputError(
            f"prior is {prior!r}: set --prior to population, network or a population_prior.pt, or leave it out."
        )
    if prior == "network" or (prior is None and not path.is_file()):
        return None
    if not path.is_file():
        raise NotFoundError(f"'{path}' does not exist: {FIT_IT}, or set --prior network.")
    content = read_archive(path)
    if not isinstance(content, dict) or "population_prior" not in content:
        raise CheckpointError(f"'{path}' holds no population prior: {FIT_IT}.")
    if content["weights"] != fingerprint(network):
        what = f"'{path}' was fitted to other weights than '{ckpt}'"
        if prior is None:
            logger.warning("%s, and is not used: %s.", what, FIT_IT)
            return None
        raise CheckpointError(f"{what}: {FIT_IT}, or set --prior network.")
    found = PopulationPrior.load(content).to(next(network.parameters()).device)
    found.path = path
    return found
