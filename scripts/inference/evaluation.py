"""How good a trained model is: numbers of each held-out scan, and the summary with the comparison of samples."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from ignite.engine import Events
from monai.metrics import MSEMetric
from monai.utils.enums import CommonKeys as Keys
from scripts.data.datalist import common_root, make_datalist
from scripts.inference import jobs
from scripts.inference.cohort import list_scans
from scripts.inference.common import Common
from scripts.inference.sample_comparison import compare_samples
from scripts.inference.scoring import image_quality
from scripts.inference.tables import ScanColumns
from scripts.inference.training_run import TrainedScans, TrainingRun, absolute_path
from scripts.training.checkpoints import DEFAULT_WEIGHTS
from scripts.training.metrics import PER_SCAN
from scripts.training.precision import autocast
from scripts.training.trainer import VDVAEEvaluator
from scripts.utils.errors import InputError, NotFoundError
from scripts.utils.files import write_text
from scripts.utils.names import item_path
from scripts.utils.report import write_report
from torch.utils.data import Dataset

__all__ = ["ScanTable", "evaluate", "held_out", "make_folder", "scans_to_evaluate"]

logger = logging.getLogger(__name__)

Summary = dict[str, Any]


def make_folder(ckpt: str | os.PathLike, evaluation_dir: str | os.PathLike) -> None:
    """Make the folder of the results.

    Raises:
        FileNotFoundError: when there are no weights to evaluate.
    """
    if not Path(ckpt).is_file():
        raise NotFoundError(
            f"ckpt '{ckpt}' does not exist: set --ckpt to the weights to evaluate, such as the checkpoints/model.pt of "
            "a training run. "
            f"{DEFAULT_WEIGHTS}"
        )
    Path(evaluation_dir).mkdir(parents=True, exist_ok=True)


def scans_to_evaluate(
    training_run: TrainingRun, dataset_dir: str | os.PathLike, scan_pattern: str | Sequence[str], **split: Any
) -> dict[str, list[dict]]:
    """The scans to evaluate on as ``validation``: by a run's record, else as training would split them.

    Args:
        training_run: its own held-out scans, or those of another ``dataset_dir`` that it was not trained on.
        dataset_dir, scan_pattern, split: see :func:`scripts.data.datalist.make_datalist`.

    Raises:
        ValueError: when the run was trained on all of them.
    """
    if training_run.trained is None:
        return make_datalist(dataset_dir, scan_pattern, **split)
    items = list_scans(dataset_dir, scan_pattern, training_run)
    unseen = [item for item in items if training_run.knows(item) == "no"]
    if not unseen:
        raise InputError(
            f"The run in run_dir '{training_run.folder}' was trained on the subjects of all {len(items)} scan(s) of "
            f"dataset_dir '{dataset_dir}': leave out --dataset_dir for those that it held out."
        )
    if len(unseen) < len(items):
        logger.info(
            "%d of %d scans are left out, whose subjects the run in '%s' was trained on.",
            *(len(items) - len(unseen), len(items), training_run.folder),
        )
    return {"training": [], "validation": unseen}


def held_out(datalist: Mapping[str, list[dict]], output_dir: str | os.PathLike) -> dict[str, list[dict]]:
    """The scans that a model was not trained on: a datalist's ``testing`` side if it has one, else ``validation``.

    Args:
        datalist: see :func:`scripts.data.datalist.make_datalist`.
        output_dir: when it is the folder of a training run, its ``datalist.json`` says what was trained on.

    Returns:
        ``{"validation": [...]}``.

    Raises:
        ValueError: when that run was trained on some of them.
    """
    items = datalist.get("testing") or datalist["validation"]
    record = Path(output_dir) / "datalist.json"
    if record.is_file():
        trained = TrainedScans(record)
        known = [item for item in items if trained.knows(item) != "no"]
        if known:
            raise InputError(
                f"{len(known)} of the {len(items)} scans to evaluate on, such as '{absolute_path(known[0])}', or other "
                f"scans of their subjects, were trained on by the run in '{output_dir}': set --run_dir to it, which "
                "takes the scans that it held out."
            )
    return {"validation": items}


class ScanTable:
    """Collects a row of numbers for each scan that an evaluator sees.

    ``bits_per_dim``, ``nll``, ``kl``, ``kl_z00``, ... and ``mse`` are what training's validation reports, of drawn
    latents. ``recon_mse``, ``psnr`` and ``ssim`` are of the reconstruction from the posterior's means.

    Args:
        items: all held-out scans, those of other processes among them.
        dataset_dir: the folder or the datalist that they come from.
        training_run: tells which of them it was trained on.
    """

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        dataset_dir: str | os.PathLike,
        training_run: TrainingRun | None = None,
    ) -> None:
        self.items = items
        self.columns = ScanColumns(items, common_root(items, dataset_dir), training_run=training_run)
        self.numbers: list[dict[str, float]] = []

    def attach(self, engine: VDVAEEvaluator) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: VDVAEEvaluator) -> None:
        output = engine.state.output
        scans = output[Keys.IMAGE]
        with engine.mode(engine.network), autocast(engine.state.device, engine.amp, engine.amp_dtype):
            recon = engine.network(scans, temperature=0.0).loc.float()
        columns = {name: output[name] for name in PER_SCAN}
        columns["recon_mse"] = MSEMetric()(recon, scans).flatten()
        columns |= image_quality(recon, scans, engine.network)
        columns |= {f"kl_z{index:02d}": kl for index, kl in enumerate(output["kl_per_latent"].T)}
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        self.numbers += [dict(zip(columns, row, strict=True)) for row in values]

    def gather(self) -> None:
        """Bring the rows of all processes together, in the order of the scans."""
        self.numbers = list(itertools.chain(*idist.all_gather(self.numbers)))

    def write(self, path: str | os.PathLike) -> None:
        """As CSV, one row per scan, see :class:`scripts.inference.tables.ScanColumns`."""
        rows = ({name: f"{value:.8g}" for name, value in numbers.items()} for numbers in self.numbers)
        self.columns.write(path, zip(map(item_path, self.items), rows, strict=True))

    def summary(self) -> Summary:
        """``{quantity: {"mean", "std", "count"}}``; the standard deviation is of scans, not of the mean."""
        columns = {name: np.array([row[name] for row in self.numbers]) for name in self.numbers[0]}
        return {
            name: {"mean": values.mean(), "std": values.std(ddof=1) if len(values) > 1 else None, "count": len(values)}
            for name, values in columns.items()
        }


def evaluate(
    evaluator: VDVAEEvaluator,
    table: ScanTable,
    common: Common,
    dataset: Dataset,
    samples: int = 64,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Evaluate, and write ``evaluation.csv`` (one row per scan) and ``summary.json``, by rank 0.

    Args:
        evaluator: runs the network on this process's share of the held-out scans.
        table: attached to it.
        common: what jobs share; its folder exists.
        dataset: of all held-out scans, which samples are compared with.
        samples: how many; 0 compares none.
        settings: ``temperature`` and ``voxel_noise`` of the samples.
    """
    if samples < 0:
        raise InputError(f"samples is {samples}: set --samples to 2 or more, or to 0 to compare none.")
    settings = settings or {}
    evaluator.run()
    table.gather()
    sampling = jobs.sample(common, samples, **settings) if samples else None
    compared = compare_samples(sampling, dataset, table.items, common.seed)
    if idist.get_rank() > 0:
        return
    folder = common.output_dir
    known = {**common.settings(), "population_prior": common.prior_file, **settings}
    summary = {"settings": known, "held_out": table.summary(), "samples": compared}
    table.write(folder / "evaluation.csv")
    write_text(folder / "summary.json", json.dumps(_plain(summary), indent=2) + "\n")
    lead = f"{len(table.items)} held-out scan(s)."
    pictures = sorted(folder.glob("*.png"))
    write_report(
        folder, "evaluate", lead, [folder / "evaluation.csv"], pictures, {**known, "summary": _as_table(summary)}
    )
    logger.info("%s", _as_table(summary))
    logger.info("Results: '%s' and '%s'.", folder / "summary.json", folder / "evaluation.csv")


def _plain(value: Any) -> Any:
    """As JSON can hold it: no NaN, no infinity, and what is neither number nor text by its name."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, int | str | list | tuple | None) else str(value)


def _as_table(summary: Summary) -> str:
    lines = [f"{'held-out scans':<24}{'mean':>12}{'std':>12}{'scans':>8}"]
    for name, numbers in summary["held_out"].items():
        lines.append(f"{name:<24}{_short(numbers['mean'])}{_short(numbers['std'])}{numbers['count']:>8}")
    samples = summary["samples"]
    if samples is not None:
        halves = f"{'halves: mean':>14}{'95th perc.':>14}" if samples["mmd_gaussian"] is not None else ""
        lines.append(f"{'samples':<24}{'value':>12}{'error':>12}{halves}")
        for name in ("mmd_gaussian", "mmd_linear"):
            m = samples[name]
            if m is not None:
                lines.append(
                    f"{name:<24}{_short(m['value'])}{_short(m['standard_error'])}"
                    f"{_short(m['scan_halves_mean']):>14}{_short(m['scan_halves_95th_percentile']):>14}"
                )
        for kind in ("samples", "held_out"):
            m = samples["ms_ssim"][kind]
            lines.append(f"{'ms_ssim, ' + kind:<24}{_short(m['mean'])}{_short(m['standard_error'])}")
    return "\n".join(["Evaluation:", *lines])


def _short(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.4g'):>12}"
