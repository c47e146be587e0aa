"""Tables of results, one row per scan, all with the same columns that say which scan it is."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scripts.data.covariate_tables import Covariates
from scripts.data.datalist import check_sides, list_sides
from scripts.data.tables import read_table
from scripts.inference.layouts import ScanLayout
from scripts.inference.outputs import read_rows
from scripts.inference.training_run import NO_RUN, TrainingRun
from scripts.population.files import FIT_IT
from scripts.population.prior import PopulationPrior
from scripts.utils.errors import InputError, NotFoundError
from scripts.utils.files import absolute, expand, write_csv
from scripts.utils.names import UNUSABLE, item_path
from torch import Tensor

logger = logging.getLogger(__name__)


class ScanColumns:
    """Which scan a row is of: ``image``, ``subject``, ``session``, ``trained_on``, and its covariates.

    ``image`` is the scan's path, relative to the data set; ``session`` is left out where no scan has one, and
    ``trained_on`` without a training run. What tables such as ``participants.tsv`` say of the scan is joined.

    Args:
        items: of the data set, with ``image`` and as far as they are known ``subject`` and ``session``.
        root: the folder that paths are relative to.
        covariates: of the items; None: what tables of the data set say.
        training_run: tells which scans it was trained on.

    Attributes:
        marks: further columns by the scan's path, the same for all scans.
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        root: str | os.PathLike,
        covariates: Covariates | None = None,
        training_run: TrainingRun = NO_RUN,
    ) -> None:
        self.marks: dict[str, dict[str, str]] = {}
        self.root = absolute(root)
        self.items = {item_path(item): item for item in items}
        self.training_run = training_run
        self.covariates = Covariates(items, self.root) if covariates is None else covariates
        known = {name for item in items for name in ("subject", "session") if item.get(name)}
        self.names = [name for name in ("subject", "session") if name in known]

    def __call__(self, scan: str) -> dict[str, Any]:
        """The first columns of the row of a scan, by the path of its first file."""
        item = self.items.get(scan, {"image": scan})
        path = absolute(scan)
        image = path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)
        columns = {"image": image} | {name: item.get(name, "") for name in self.names}
        if self.training_run.trained is not None:
            columns["trained_on"] = self.training_run.knows(item)
        return columns | self.marks.get(scan, {})

    def details(self, scan: str) -> dict[str, str]:
        """What :class:`scripts.data.covariate_tables.Covariates` has of the scan; empty texts where it lacks it."""
        return self.covariates.of(scan)

    def write(self, path: str | os.PathLike, rows: Iterable[tuple[str, Mapping[str, Any]]], last: bool = False) -> None:
        """Write a table of the numbers of each scan by their columns, which are the same for all; ``last`` puts what is
        said of the scan, but its path, after them.
        """
        rows = iter(rows)
        first = list(itertools.islice(rows, 1))  # the others stay where they are: there may be many
        cells = (self._row(scan, numbers, last) for scan, numbers in itertools.chain(first, rows))
        header = list(self._row(*first[0], last)) if first else ["image"]
        write_csv(path, header, ([row.get(name, "") for name in header] for row in cells))

    def _row(self, scan: str, numbers: Mapping[str, Any], last: bool) -> dict[str, Any]:
        own, details = self(scan), self.details(scan)
        details = {f"participant_{name}" if name in {*own, *numbers} else name: v for name, v in details.items()}
        image = {"image": own.pop("image")}
        return image | dict(numbers) | own | details if last else image | own | details | dict(numbers)


def row_table(path: str | os.PathLike, layout: ScanLayout, columns: ScanColumns, scans: Iterable[str]) -> None:
    """Put the numbers of these scans, see :func:`scripts.inference.outputs.scan_numbers`, together, a row each."""
    columns.write(path, read_rows(layout, scans))


def latent_tables(
    output_dir: str | os.PathLike,
    layout: ScanLayout,
    columns: ScanColumns,
    prior: PopulationPrior | None,
    scans: Sequence[str],
) -> None:
    """Put latents of these scans together, as CSV with one row per scan.

    ``latents.csv`` has the coarsest latent's posterior means. With a population prior ``coordinates.csv`` has the
    scans' coordinates, and ``factors.csv`` says how much of what is explained each factor explains.
    """

    def rows(array: str, column: str) -> Iterator[tuple[str, dict[str, str]]]:
        for scan in scans:
            file = layout.path(scan)
            if file.exists():
                with np.load(file, allow_pickle=False) as content:
                    values = content[array].ravel()
                yield scan, {f"{column}{i:03d}": f"{value:.6g}" for i, value in enumerate(values)}

    folder = Path(output_dir)
    columns.write(folder / "latents.csv", rows("mean00", "m"), last=True)
    if prior is not None:
        columns.write(folder / "coordinates.csv", rows("coordinates", "c"), last=True)
        shares = zip(prior.explained.tolist(), prior.explained.cumsum(0).tolist(), strict=True)
        cells = ((f"c{i:03d}", f"{share:.4g}", f"{so_far:.4g}") for i, (share, so_far) in enumerate(shares))
        write_csv(folder / "factors.csv", ["factor", "explained", "explained_so_far"], cells)
    logger.info(
        "%d scan(s): 'latents.csv' has the means of the coarsest latent%s, one row per scan.",
        sum(layout.path(scan).exists() for scan in scans),
        "" if prior is None else f", 'coordinates.csv' {prior.factors} coordinates of the population prior",
    )


def markdown_lines(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table, as the rows come."""
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


LARGEST = 1e6  # coordinate; they are standard deviations of the cohort


def scans_to_fit(dataset_dir: str | os.PathLike, scan_pattern: str | Sequence[str]) -> tuple[list[dict], list[dict]]:
    """The scans to fit a population prior to, and those to choose its size by, where a datalist has them.

    Args:
        dataset_dir, scan_pattern: see :func:`scripts.data.datalist.make_datalist`. Of a folder all scans are fitted to.

    Raises:
        InputError: a person is on two sides.
    """
    sides, _, _ = list_sides(dataset_dir, scan_pattern)
    check_sides(sides, dataset_dir)
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
    """A row as an item; of one that cannot be used, why. Results keep the folders of a relative path."""
    name = Path(row["image"])
    inside = name if not name.is_absolute() and ".." not in name.parts else name.name
    item = {"image": str(Path(output_dir) / (inside if name.name else "unnamed"))}
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
