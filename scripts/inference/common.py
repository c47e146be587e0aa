"""What the jobs of one command share: network, settings, the cohort, and the scans of which nothing came."""

from __future__ import annotations

import itertools
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from monai.transforms import Compose
from scripts.data.covariate_tables import Covariates
from scripts.data.covariates import CovariateCoding, Value
from scripts.data.datalist import common_root, list_sides
from scripts.data.reading import as_reason
from scripts.data.scan_grid import ScanGrid
from scripts.data.tables import read_table
from scripts.data.transforms import FitShaped, RobustScaled
from scripts.inference.layouts import DatasetDescription, ScanLayout
from scripts.inference.masks import pair_masks
from scripts.inference.outputs import SaveFigured
from scripts.inference.tables import ScanColumns
from scripts.inference.training_run import NO_RUN, TrainingRun
from scripts.networks import OUTPUT_RANGES, VDVAE
from scripts.population.prior import PopulationPrior
from scripts.utils import distributed
from scripts.utils.errors import BundleError, InputError, ResourceError, root_cause, sentence
from scripts.utils.files import as_folder, write_csv
from scripts.utils.names import UNUSABLE, item_files, item_path

logger = logging.getLogger(__name__)
UNFAMILIAR = ("warn", "refuse", "allow")


class Failure(NamedTuple):
    """A scan of which a job has no results, and why, as half a sentence; ``image`` is relative to the data set in the
    end.
    """

    image: str
    reason: str
    job: str = ""

    @classmethod
    def of(cls, item: Mapping[str, Any], error: BaseException) -> Failure:
        """That of a datalist's item, by the error that came of it.

        Raises:
            ResourceError: the error again, where it is the machine's, such as a full disk.
        """
        if isinstance(root_cause(error), ResourceError):
            raise error
        if not isinstance(root_cause(error), BundleError):
            logger.debug("'%s' failed.", item_path(item), exc_info=error)
        return cls(item_path(item), as_reason(sentence(error), item_files(item)))


class Failures:
    """The scans of this run of which nothing came, with their reasons.

    Args:
        path: of a CSV file that lists them, with those of other jobs in the same folder.

    Attributes:
        found: by this process.
        jobs: of this run.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.found: list[Failure] = []
        self.jobs: set[str] = set()

    def add(self, failure: Failure) -> None:
        self.found.append(failure)

    def gather(self) -> list[Failure]:
        """Those of all processes, which all have to ask."""
        return sorted(set(itertools.chain(*idist.all_gather(self.found))))

    def finish(self) -> None:
        """Write the list and say what is in it, on rank 0 for all of them, and destroy the process group.

        Raises:
            SystemExit: with code 1, on every process, when there are any.
        """
        failed = self.gather()
        if idist.get_rank() == 0:
            listed = [*(failure for failure in self._listed() if failure.job not in self.jobs), *failed]
            if listed:
                write_csv(self.path, Failure._fields, listed)
            else:
                self.path.unlink(missing_ok=True)
            if failed:
                image, reason, _ = failed[0]
                reason = reason.removeprefix(f"'{image}': ").rstrip(".")
                logger.error("%d scan(s) failed, see '%s'. The first, '%s': %s.", len(failed), self.path, image, reason)
        distributed.stop()
        if failed:
            sys.exit(1)

    def _listed(self) -> list[Failure]:
        """What the file has of earlier runs; nothing of versions that did not say of which job."""
        columns, rows = read_table(self.path) if self.path.exists() else ([], [])
        return [Failure(**row) for row in rows] if set(columns) == set(Failure._fields) else []


@dataclass
class Common:
    """What all jobs of one command share: the network, how scans are read, and where and how results are written.

    Attributes:
        network: trained.
        prior: its population prior, if there is one.
        preprocessing: of scans; begins with loading.
        cohort: the scans.
        output_dir: folder of the results, made if need be.
        ckpt: the weights' file.
        failures: where scans that failed are noted.
        device: of the network.
        loading: ``batch_size`` and ``num_workers``; as many processes write results.
        precision: ``amp`` and ``amp_dtype``.
        seed: of the noise; each scan has its own, whatever its batch or process.
        overwrite: make results again that are there.
        figures: draw PNGs.
        naming: of results: ``join_channels`` and ``bids``, see :class:`scripts.inference.layouts.ScanLayout`.
        describe: is called at the start of a job, on rank 0, with its name, and writes volumes' sidecars; None: results
            are no BIDS data set.
        unfamiliar: what becomes of scans of a kind that the network does not know, where the prior says it: ``"warn"``,
            ``"refuse"`` (nothing is written of them) or ``"allow"`` (nobody asks).
    """

    network: VDVAE
    prior: PopulationPrior | None
    preprocessing: Compose
    cohort: Cohort
    output_dir: str | os.PathLike
    ckpt: str | os.PathLike
    failures: Failures
    device: torch.device | str = "cpu"
    loading: Mapping[str, int] = field(default_factory=lambda: {"batch_size": 1, "num_workers": 0})
    precision: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    overwrite: bool = False
    figures: bool = True
    naming: Mapping[str, bool] = field(default_factory=dict)
    describe: DatasetDescription | None = None
    unfamiliar: str = "warn"

    def __post_init__(self) -> None:
        self.output_dir = as_folder("output_dir", self.output_dir)
        if self.unfamiliar not in UNFAMILIAR:
            raise InputError(f"unfamiliar is {self.unfamiliar!r}: choose one of {', '.join(UNFAMILIAR)}.")
        for name in ("overwrite", "figures"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {getattr(self, name)!r}: it must be True or False.")

    @property
    def value_range(self) -> tuple[float, float]:
        """What scans are scaled to, and the network predicts."""
        return OUTPUT_RANGES[self.network.output_activation]

    @property
    def grid(self) -> ScanGrid:
        """How the training scans lay on the network's grid."""
        return ScanGrid.from_tensor(self.network.scan_grid)

    @property
    def prior_file(self) -> str | None:
        """Where the population prior is, for the record of a job."""
        return str(self.prior.path) if self.prior is not None and self.prior.path is not None else None

    def replace(self, **changes: Any) -> Common:
        """The same but for some attributes."""
        return replace(self, **changes)

    def layout(self, root: str | os.PathLike) -> Callable[..., ScanLayout]:
        """Makes the layout of a result, by its postfix, of scans under a folder."""
        return partial(ScanLayout, root, self.output_dir, **self.naming, description=self.describe)

    def figure(self, layout: ScanLayout, draw: Callable[..., object]) -> SaveFigured:
        """A transform that draws a scan's results, where figures are wanted."""
        return SaveFigured(layout, draw, self.value_range, self.figures)

    def settings(self) -> dict[str, Any]:
        """On which the results of every job depend."""
        settings = {"network_def": self.network.arguments, "seed": self.seed, "ckpt": self.ckpt, **self.precision}
        settings["transforms"] = [type(step).__name__ for step in self.preprocessing.transforms]
        for step in self.preprocessing.transforms:
            if isinstance(step, FitShaped):
                settings["keep_aspect"] = step.fit.keep_aspect
            if isinstance(step, RobustScaled):
                settings["percentiles"] = [step.lower, step.upper]
        return {**settings, "join_channels": self.naming.get("join_channels", False)}


def list_scans(
    dataset_dir: str | os.PathLike, scan_pattern: str | Sequence[str] = "*.nii*", training_run: TrainingRun = NO_RUN
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
    if dataset_dir == training_run.datalist:
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
        training_run: TrainingRun = NO_RUN,
        covariates_file: str | os.PathLike | None = None,
        unseen: str = "error",
        items: list[dict[str, Any]] | None = None,
    ) -> None:
        self._dataset_dir, self.pattern, self.training_run = dataset_dir, scan_pattern, training_run
        self.covariates_file, self.unseen, self._items = covariates_file, unseen, items

    def of(self, items: list[dict[str, Any]], folder: str | os.PathLike | None = None) -> Cohort:
        """Other scans, of the same data set or of that of another folder or datalist."""
        folder = self.folder if folder is None else folder
        return Cohort(folder, self.pattern, self.training_run, self.covariates_file, self.unseen, items)

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
        """The scans with their masks, see :func:`scripts.inference.masks.pair_masks`."""
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
        outside = self.covariates.warn_of_unknown(coding, values, any_refused=bool(refused))
        return values, refused, outside
