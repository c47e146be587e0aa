"""What the jobs of one command share, and the scans of which nothing came."""

from __future__ import annotations

import itertools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import torch
from monai.transforms import Compose
from scripts.data.reading import as_reason
from scripts.data.scan_grid import ScanGrid
from scripts.data.transforms import FitShaped, RobustScaled
from scripts.inference.bids import DatasetDescription
from scripts.inference.cohort import Cohort
from scripts.inference.layouts import ScanLayout
from scripts.inference.outputs import SaveFigured
from scripts.networks import OUTPUT_RANGES, VDVAE
from scripts.population.prior import PopulationPrior
from scripts.utils import distributed
from scripts.utils.errors import BundleError, InputError, ResourceError, root_cause, sentence
from scripts.utils.files import write_csv
from scripts.utils.names import item_files, item_path

__all__ = ["Common", "Failure", "Failures"]

logger = logging.getLogger(__name__)

UNFAMILIAR = ("warn", "refuse", "allow")


class Failure(NamedTuple):
    """A scan without results, and why, as half a sentence; ``image`` is relative to the data set in the end."""

    image: str
    reason: str

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
        path: of a CSV file that lists them.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.found: list[Failure] = []

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
            if failed:
                write_csv(self.path, Failure._fields, failed)
                image, reason = failed[0]
                reason = reason.removeprefix(f"'{image}': ").rstrip(".")
                logger.error("%d scan(s) failed, see '%s'. The first, '%s': %s.", len(failed), self.path, image, reason)
            else:
                self.path.unlink(missing_ok=True)
        distributed.stop()
        if failed:
            sys.exit(1)


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
        self.output_dir = Path(self.output_dir).expanduser()
        if self.unfamiliar not in UNFAMILIAR:
            raise InputError(f"unfamiliar is {self.unfamiliar!r}: choose one of {', '.join(UNFAMILIAR)}.")

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
