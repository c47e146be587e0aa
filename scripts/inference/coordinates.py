"""Tables of coordinates in a population prior, and the scans that a prior is fitted to."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scripts.data.datalist import list_sides
from scripts.data.tables import read_table
from scripts.inference.cohort import UNUSABLE
from scripts.population.files import FIT_IT
from scripts.population.prior import PopulationPrior
from scripts.utils.errors import InputError, NotFoundError
from scripts.utils.files import expand
from torch import Tensor

LARGEST = 1e6  # coordinate; they are standard deviations of the cohort

__all__ = ["list_coordinates", "scans_to_fit", "stack_coordinates"]


def scans_to_fit(dataset_dir: str | os.PathLike, scan_pattern: str | Sequence[str]) -> tuple[list[dict], list[dict]]:
    """The scans to fit a population prior to, and those to choose its size by, where a datalist has them.

    Args:
        dataset_dir, scan_pattern: see :func:`scripts.data.datalist.make_datalist`. Of a folder all scans are fitted to.
    """
    sides, _, _ = list_sides(dataset_dir, scan_pattern)
    return sides["training"], sides.get("validation", [])


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
        ValueError: there is no population prior, no file is named, or the table lacks columns.
        FileNotFoundError: there is no such file.
    """
    if prior is None:
        raise InputError(f"decode_coordinates needs a population prior beside --ckpt, or by --prior: {FIT_IT}.")
    if path is None:
        raise InputError("coordinates is not set: set --coordinates to a table such as the coordinates.csv of encode.")
    names = [f"c{i:03d}" for i in range(prior.factors)]
    place = Path(expand(path))
    if not place.is_file():
        raise NotFoundError(f"coordinates '{path}' does not exist: set --coordinates to a table of encode's.")
    columns, rows = read_table(place)
    if not {"image", *names} <= set(columns) or f"c{prior.factors:03d}" in columns:
        raise InputError(
            f"'{path}': its columns must be image and {names[0]} to {names[-1]}, one per factor of the prior."
        )
    return [_row(row, names, path, output_dir) for row in rows]


def _row(row: Mapping[str, str], names: Sequence[str], path: str | os.PathLike, output_dir: str | os.PathLike) -> dict:
    """A row as an item; of one that cannot be used, why."""
    item = {"image": str(Path(output_dir) / (Path(row["image"]).name or "unnamed"))}
    try:
        values = [float(row[name]) for name in names]
    except ValueError:
        values = [math.nan]
    if not all(abs(value) <= LARGEST for value in values):
        return item | {UNUSABLE: f"'{path}': the row of '{row['image'][:80]}' has a cell that is no number: mend it."}
    return item | {"coordinates": values}


def stack_coordinates(items: Sequence[Mapping[str, Any]]) -> Tensor:
    """The coordinates of some items, ``[batch, factors]``."""
    return torch.tensor([item["coordinates"] for item in items])
