"""The scans that jobs are about: which they are, where they lie, and what is known of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from scripts.data.covariate_tables import parse_row, read_rows
from scripts.data.datalist import common_root, list_sides
from scripts.inference.masks import pair_masks
from scripts.inference.tables import ScanColumns
from scripts.inference.training_run import TrainingRun
from scripts.population.prior import PopulationPrior
from scripts.utils import distributed
from scripts.utils.errors import InputError

__all__ = ["UNUSABLE", "Cohort", "list_scans"]

UNUSABLE = "unusable"  # in an item: why it cannot be read


def list_scans(
    dataset_dir: str | os.PathLike,
    scan_pattern: str | Sequence[str] = "*.nii*",
    training_run: TrainingRun | None = None,
) -> list[dict[str, Any]]:
    """The scans of a folder, or all of a datalist's; its ``testing`` ones alone where it has such.

    Args:
        dataset_dir, scan_pattern: see :func:`scripts.data.datalist.make_datalist`.
        training_run: of whose own datalist the held-out scans are taken alone.

    Returns:
        ``[{"image": path, "subject": name, "session": name}, ...]``, the last where their names tell it.
    """
    sides, _, _ = list_sides(dataset_dir, scan_pattern)
    if sides.get("testing"):
        return sides["testing"]
    if training_run is not None and dataset_dir == training_run.datalist:
        return sides.get("validation", [])
    return [item for side in sides.values() for item in side]


class Cohort:
    """The scans of a folder or a datalist, listed when they are first asked for.

    Args:
        dataset_dir: the folder or the datalist, or what gives it when it is called (and may make it first).
        scan_pattern, training_run: see :func:`list_scans`.
        covariates_file: a table of covariates; None: the data set's own.
        unseen: what becomes of categories that a prior does not know, see
            :func:`scripts.data.covariate_tables.parse_rows`.
    """

    def __init__(
        self,
        dataset_dir: str | os.PathLike | Callable[[], str | os.PathLike],
        scan_pattern: str | Sequence[str] = "*.nii*",
        training_run: TrainingRun | None = None,
        covariates_file: str | os.PathLike | None = None,
        unseen: str = "error",
    ) -> None:
        self._dataset_dir, self.pattern, self.training_run = dataset_dir, scan_pattern, training_run
        self.covariates_file, self.unseen = covariates_file, unseen

    @cached_property
    def folder(self) -> str | os.PathLike:
        """The folder or the datalist."""
        return self._dataset_dir() if callable(self._dataset_dir) else self._dataset_dir

    @cached_property
    def items(self) -> list[dict[str, Any]]:
        """The scans, as rank 0 lists them; all processes ask."""
        return distributed.from_rank_zero(list_scans, self.folder, self.pattern, self.training_run)

    @cached_property
    def root(self) -> str:
        """The folder that the scans' names in results are relative to."""
        return common_root(self.items, self.folder)

    @cached_property
    def columns(self) -> ScanColumns:
        """What tables say of each scan."""
        return ScanColumns(self.items, self.root, self.training_run)

    def with_masks(
        self, mask_dir: str | os.PathLike | None, mask_pattern: str | None, masked_only: bool = False
    ) -> list[dict[str, Any]]:
        """The scans with their masks, see :func:`scripts.inference.masks.pair_masks`."""
        arguments = (self.items, self.root, self.pattern, mask_dir, mask_pattern, masked_only)
        return distributed.from_rank_zero(pair_masks, *arguments)

    def with_covariates(
        self, prior: PopulationPrior | None, scans: Sequence[Mapping[str, Any]] | None = None
    ) -> list[dict[str, Any]]:
        """The scans, each with ``covariates``: what is known of it, by name; as they are where the prior has none.

        One whose covariates make no sense, or are unknown to the prior, says why instead and cannot be read.

        Args:
            prior: with covariates or without.
            scans: some of the cohort's; None: all.

        Raises:
            InputError: there is no table, or it cannot be read.
        """
        scans = self.items if scans is None else scans
        if prior is None or prior.coding is None:
            return [dict(item) for item in scans]
        found = []
        for item, row in zip(scans, read_rows(scans, self.folder, self.covariates_file), strict=True):
            try:
                found.append({**item, "covariates": parse_row(prior.coding, item, row, self.unseen)})
            except InputError as error:
                found.append({**item, "covariates": dict.fromkeys(prior.coding.variables), UNUSABLE: str(error)})
        return found
