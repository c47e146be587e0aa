"""The scans that jobs are about: which they are, where they lie, and what is known of each."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from scripts.data.covariate_tables import Covariates
from scripts.data.covariates import CovariateCoding, Value
from scripts.data.datalist import common_root, list_sides
from scripts.inference.lesions import pair_masks
from scripts.inference.tables import ScanColumns
from scripts.inference.training_run import TrainingRun
from scripts.population.prior import PopulationPrior
from scripts.utils import distributed
from scripts.utils.names import UNUSABLE, item_path

__all__ = ["Cohort", "list_scans"]

logger = logging.getLogger(__name__)


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
            :meth:`scripts.data.covariate_tables.Covariates.values`.
        items: the scans, where they are known; None: all that are found.
    """

    def __init__(
        self,
        dataset_dir: str | os.PathLike | Callable[[], str | os.PathLike],
        scan_pattern: str | Sequence[str] = "*.nii*",
        training_run: TrainingRun | None = None,
        covariates_file: str | os.PathLike | None = None,
        unseen: str = "error",
        items: list[dict[str, Any]] | None = None,
    ) -> None:
        self._dataset_dir, self.pattern, self.training_run = dataset_dir, scan_pattern, training_run
        self.covariates_file, self.unseen, self._items = covariates_file, unseen, items

    def of(self, items: list[dict[str, Any]]) -> Cohort:
        """Other scans of the same data set."""
        return Cohort(self.folder, self.pattern, self.training_run, self.covariates_file, self.unseen, items)

    @cached_property
    def folder(self) -> str | os.PathLike:
        """The folder or the datalist."""
        return self._dataset_dir() if callable(self._dataset_dir) else self._dataset_dir

    @cached_property
    def items(self) -> list[dict[str, Any]]:
        """The scans, as rank 0 lists them; all processes ask."""
        if self._items is not None:
            return self._items
        return distributed.from_rank_zero(list_scans, self.folder, self.pattern, self.training_run)

    @cached_property
    def root(self) -> str:
        """The folder that the scans' names in results are relative to."""
        return common_root(self.items, self.folder)

    @cached_property
    def columns(self) -> ScanColumns:
        """What tables say of each scan."""
        return ScanColumns(self.items, self.root, self.covariates, self.training_run)

    @cached_property
    def covariates(self) -> Covariates:
        """What tables say of the scans' covariates."""
        return Covariates(self.items, self.folder, self.covariates_file)

    def with_masks(
        self, mask_dir: str | os.PathLike | None, mask_pattern: str | None, masked_only: bool = False
    ) -> list[dict[str, Any]]:
        """The scans with their masks, see :func:`scripts.inference.lesions.pair_masks`."""
        arguments = (self.items, self.root, self.pattern, mask_dir, mask_pattern, masked_only)
        return distributed.from_rank_zero(pair_masks, *arguments)

    def with_covariates(
        self, prior: PopulationPrior | None, scans: Sequence[Mapping[str, Any]] | None = None
    ) -> list[dict[str, Any]]:
        """The scans, each with ``covariates``: what is known of it, by name; as they are where the prior has none.

        One whose covariates make no sense, or are unknown to the prior, says why instead and cannot be read. Warnings
        name scans that no table knows, and those outside of the range of the prior's cohort, which tables mark.

        Args:
            prior: with covariates or without.
            scans: the cohort's, with more keys; None: its items.

        Raises:
            InputError: a table cannot be read.
        """
        scans = self.items if scans is None else scans
        if prior is None or prior.coding is None:
            return [dict(item) for item in scans]
        values, refused, outside = self._values_under(prior.coding)
        for item, beyond in zip(self.items, outside, strict=True):
            self.columns.marks[item_path(item)] = {"outside_training_range": "yes" if beyond else "no"}
        return [
            {**item, "covariates": known} | ({UNUSABLE: refused[place]} if place in refused else {})
            for place, (item, known) in enumerate(zip(scans, values, strict=True))
        ]

    @lru_cache(maxsize=1)  # noqa: B019 (a program has one cohort, and asks it often)
    def _values_under(self, coding: CovariateCoding) -> tuple[list[dict[str, Value]], dict[int, str], list[bool]]:
        """The values of all scans, why some are refused, and which lie outside of the range of the prior's cohort."""
        refused: dict[int, str] = {}
        values = self.covariates.values(coding, self.unseen, refused)
        if values and not refused and all(value is None for known in values for value in known.values()):
            logger.warning(
                "Nothing says %s of any scan, so that each is compared with the whole cohort: put a participants.tsv "
                "into dataset_dir, or name a table by --covariates_file.",
                " or ".join(coding.variables),
            )
        outside, sentence = self.covariates.outside_range(coding, values)
        for warning in (*self.covariates.without_rows(), sentence):
            if warning:
                logger.warning("%s", warning)
        return values, refused, outside
