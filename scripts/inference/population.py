"""The population prior that belongs to weights: found beside them, checked, and on their device."""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scripts.layers.population_prior import PopulationPrior, fingerprint
from scripts.networks import VDVAE
from scripts.training.checkpoints import CheckpointError, read_archive
from scripts.training.population_fit import prior_path
from torch import Tensor

logger = logging.getLogger(__name__)

CHOICES = (None, "population", "network")


def find_population_prior(prior: str | None, ckpt: str | os.PathLike, network: VDVAE) -> PopulationPrior | None:
    """The population prior beside a ``model.pt``.

    Args:
        prior: ``"population"``; ``"network"`` for the network's own, which needs no file; None takes the population
            prior where there is one that was fitted to these weights.
        ckpt: the weights.
        network: with these weights.

    Raises:
        ValueError: ``prior`` is none of the three.
        FileNotFoundError: it is ``"population"``, and there is none.
        CheckpointError: its file is damaged; or, where ``prior`` is ``"population"``, of other weights.
    """
    if prior not in CHOICES:
        raise ValueError(f"prior is {prior!r}: set --prior to population or network, or leave it out.")
    path = prior_path(ckpt)
    if prior == "network" or (prior is None and not path.is_file()):
        return None
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist: fit it with the run fit_prior, or set --prior network.")
    content = read_archive(path)
    if not isinstance(content, dict) or "population_prior" not in content:
        raise CheckpointError(f"'{path}' holds no population prior: fit it anew with the run fit_prior.")
    if content["weights"] != fingerprint(network):
        what = f"'{path}' was fitted to other weights than '{ckpt}'"
        if prior is None:
            logger.warning("%s, and is not used: fit one to these with the run fit_prior.", what)
            return None
        raise CheckpointError(f"{what}: fit one to these with the run fit_prior, or set --prior network.")
    return PopulationPrior.load(content).to(next(network.parameters()).device)


def list_coordinates(
    path: str | os.PathLike | None, output_dir: str | os.PathLike, prior: PopulationPrior | None
) -> list[dict[str, Any]]:
    """The rows of a table such as ``coordinates.csv``.

    Args:
        path: of a CSV file whose columns are ``image``, a name, and ``c000``, ``c001``, ..., as many as factors.
        output_dir: the folder of the results.
        prior: to which they belong.

    Returns:
        ``[{"image": path of the result without its ending, "coordinates": [...]}, ...]``.

    Raises:
        ValueError: there is no population prior, no file is named, or a row cannot be used.
    """
    if prior is None:
        raise ValueError("decode_coordinates needs a population prior beside --ckpt: fit it by configs/fit_prior.json.")
    if path is None:
        raise ValueError("coordinates is not set: set --coordinates to a table such as the coordinates.csv of encode.")
    names = [f"c{i:03d}" for i in range(prior.factors)]
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        if not {"image", *names} <= columns or f"c{prior.factors:03d}" in columns:
            raise ValueError(
                f"'{path}': its columns must be image and {names[0]} to {names[-1]}, one per factor of the prior."
            )
        return [_row(row, names, path, output_dir) for row in reader]


def _row(row: Mapping[str, str], names: Sequence[str], path: str | os.PathLike, output_dir: str | os.PathLike) -> dict:
    try:
        values = [float(row[name]) for name in names]
    except (TypeError, ValueError):
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"'{path}': the row of '{row['image']}' has a cell that is no number: mend it.")
    return {"image": str(Path(output_dir) / Path(row["image"]).name), "coordinates": values}


def stack_coordinates(items: Sequence[Mapping[str, Any]]) -> Tensor:
    """The coordinates of some items, ``[batch, factors]``."""
    return torch.tensor([item["coordinates"] for item in items])
