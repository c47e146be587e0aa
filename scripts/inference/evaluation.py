"""How good a trained model is: numbers of each held-out scan, and one flat summary that others' can stand beside."""

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
import torch
from ignite.engine import Events
from scripts.data.datalist import make_datalist
from scripts.inference import jobs
from scripts.inference.common import Common, list_scans
from scripts.inference.covariate_results import fit_atlas
from scripts.inference.covariates import summary
from scripts.inference.engine import read_item
from scripts.inference.measures import (
    NormativeErrors,
    Numbers,
    category_numbers,
    file_bits,
    fit_predictor,
    information,
    mean_interval,
    value_numbers,
)
from scripts.inference.privacy import Measured, draw_samples, measure, membership_numbers, one_per_subject
from scripts.inference.sample_comparison import compare_features, compare_images, compare_regions, read_feature_network
from scripts.inference.training_run import TrainedScans, TrainingRun
from scripts.layers.output import foreground
from scripts.training.checkpoints import DEFAULT_WEIGHTS
from scripts.training.losses import PER_SCAN
from scripts.training.trainer import VDVAEEvaluator
from scripts.utils import plots
from scripts.utils.distributed import shared_out
from scripts.utils.errors import InputError, NotFoundError
from scripts.utils.files import write_text
from scripts.utils.names import item_path, people_of
from scripts.utils.report import write_report

logger = logging.getLogger(__name__)

Histograms = dict[str, tuple[np.ndarray, np.ndarray | None]]

SCORED = ("bits_per_voxel_", "bits_per_dim_population", "typicality", "psnr", "ssim")  # how columns of scores begin
INFORMATION_PEOPLE = 512  # at most: each is compared with all others' covariates
GROUPS = {
    "held-out scans": ("bits_per_dim", "bits_per_voxel_", "nll", "kl", "mse", "psnr", "ssim", "file_", "typicality"),
    "samples": (
        "samples",
        "scans_compared",
        "mmd",
        "ms_ssim",
        "fid",
        "region_distance",
        "precision",
        "recall",
        "variance_",
    ),
    "training people": ("membership", "nearest_training"),
}


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
    return {"training": training_run.trained.items, "validation": unseen}


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
                f"{len(known)} of the {len(items)} scans to evaluate on, such as '{item_path(known[0])}', or other "
                f"scans of their subjects, were trained on by the run in '{output_dir}': set --run_dir to it, which "
                "takes the scans that it held out."
            )
    return {"validation": items}


class ELBOTable:
    """Collects for each scan that an evaluator sees what training's validation reports, of drawn latents.

    ``bits_per_dim``, ``nll``, ``kl``, ``mse``, and ``kl_z00``, ``kl_z01``, ...
    """

    def __init__(self) -> None:
        self.numbers: list[dict[str, float]] = []

    def attach(self, engine: VDVAEEvaluator) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: VDVAEEvaluator) -> None:
        output = engine.state.output
        columns = {name: output[name] for name in PER_SCAN}
        columns |= {f"kl_z{index:02d}": kl for index, kl in enumerate(output["kl_per_latent"].T)}
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        self.numbers += [dict(zip(columns, row, strict=True)) for row in values]

    def gather(self) -> None:
        """Bring the rows of all processes together, in the order of the scans."""
        self.numbers = list(itertools.chain(*idist.all_gather(self.numbers)))


def evaluate(
    evaluator: VDVAEEvaluator,
    table: ELBOTable,
    common: Common,
    training: Sequence[Mapping[str, Any]] = (),
    samples: int = 64,
    settings: Mapping[str, Any] | None = None,
    training_scans: int = 256,
    draws: int = 32,
    fid_network: str | None = None,
    atlas: str | None = None,
) -> None:
    """Evaluate, and write ``evaluation.csv`` (one row per scan), ``evaluation.json`` (flat) and ``pit.png``, by rank 0.

    Args:
        evaluator: runs the network on this process's share of the held-out scans.
        table: attached to it.
        common: what jobs share; its folder exists, and its cohort are the held-out scans.
        training: what the network was trained on.
        samples: how many to draw and to compare; 0 compares none.
        settings: ``temperature`` and ``voxel_noise`` of the samples.
        training_scans: of how many people who were trained on a scan is read; 0: of none.
        draws: of what is usual for each held-out scan's covariates, where the prior has such; 0: of none.
        fid_network: a TorchScript file that gives features of images, for the FID; None: there is no FID.
        atlas: a NIfTI file of region numbers, in which samples are compared with scans, and scans with what is usual;
            None: they are not.
    """
    features = None if fid_network is None else read_feature_network(fid_network, common.device)
    labels = fit_atlas(atlas, common.grid, common.network.spatial_shape, common.network.scan_affine)
    for name, value, least in (("samples", samples, 2), ("draws", draws, 2), ("training_scans", training_scans, 1)):
        if value and value < least:
            raise InputError(f"{name} is {value}: set --{name} to {least} or more, or to 0 for none.")
    settings = settings or {}
    evaluator.run()
    table.gather()
    held_out = measure(jobs.score(common, restore=None), "scoring held-out scans")
    if held_out is None:
        raise InputError("None of the held-out scans can be read.")
    trained = _trained_on(common, training, training_scans)
    numbers: dict[str, Any] = {"held_out_scans": len(held_out.items)}
    numbers["training_scans"] = 0 if trained is None else len(trained.items)
    rows = _rows(common, table, held_out, trained)
    for name in rows[0]:
        numbers |= mean_interval(name, [row[name] for row in rows], people_of(held_out.items))
    numbers |= membership_numbers(trained, held_out, common.seed)
    people = one_per_subject(held_out.items, samples or len(held_out.items), common.seed)
    if samples:
        drawn = draw_samples(jobs.sample(common, samples, **settings))
        how = common.value_range, common.loading["batch_size"], common.device, common.seed
        known = None if trained is None else trained.images
        numbers |= compare_images(drawn, held_out.images[people], *how, training=known)
        if features is not None:
            numbers |= compare_features(drawn, held_out.images[people], features, *how)
        if labels is not None:
            numbers |= compare_regions(drawn, held_out.images[people], labels, common.seed)
    covariates, pit = _covariate_numbers(common, held_out, trained, draws, atlas)
    numbers |= covariates
    if idist.get_rank() == 0:
        known = {**settings, "draws": draws, "fid_network": fid_network, "atlas": atlas}
        picture = common.output_dir / "pit.png"
        picture.unlink(missing_ok=True)  # of an evaluation before
        if pit:
            plots.pit(picture, pit)
        _write(common, numbers, known, rows, held_out)


def _trained_on(common: Common, training: Sequence[Mapping[str, Any]], most: int) -> Measured | None:
    """One scan of each of at most so many people who were trained on; None where there is none."""
    chosen = [dict(training[place]) for place in one_per_subject(training, most, common.seed)]
    if not chosen:
        return None
    # of the data set whose own table has their covariates
    cohort = common.cohort.of(chosen, common.cohort.training_run.datalist)
    return measure(jobs.score(common.replace(cohort=cohort), restore=None), "scoring training scans")


def _rows(common: Common, table: ELBOTable, held_out: Measured, trained: Measured | None) -> list[dict[str, float]]:
    """What is known of each held-out scan."""
    drawn = [table.numbers[place] for place in held_out.places]
    scored = [{name: v for name, v in row.items() if name.startswith(SCORED)} for row in held_out.numbers]
    low, high = common.value_range

    def rounded(scan: torch.Tensor) -> np.ndarray:
        return ((scan - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8).numpy()

    weights = (
        None if trained is None else fit_predictor(channel for scan in trained.images for channel in rounded(scan))
    )

    def sizes(places: Sequence[int]) -> list[dict[str, float]]:
        channels = [[file_bits(channel, weights) for channel in rounded(held_out.images[place])] for place in places]
        return [{f"file_{name}": float(np.mean([c[name] for c in scan])) for name in scan[0]} for scan in channels]

    files = shared_out(len(held_out.items), 1, sizes, "sizes of lossless files")
    return [own | more | size for own, more, size in zip(drawn, scored, files, strict=True)]


def _covariate_numbers(
    common: Common, held_out: Measured, trained: Measured | None, draws: int, atlas: str | None
) -> tuple[Numbers, Histograms]:
    """How well the covariates of held-out scans are told, and what is usual for them; nothing without a prior of such.

    Scans of which a covariate is not known count for the others alone.
    """
    if common.prior is None or common.prior.coding is None:
        return {}, {}
    common = common.replace(cohort=common.cohort.of(held_out.items))
    count, batch_size, coding = len(held_out.items), common.loading["batch_size"], common.prior.coding
    telling = jobs.predict_covariates(common)

    def tell(places: Sequence[int]) -> list[dict[str, Any]]:
        found = telling.compute([read_item(telling.dataset, place) for place in places])
        columns = {name: found[f"posterior_{name}"].cpu() for name in coding.variables}
        return [
            {k: v for name, rows in columns.items() for k, v in summary(coding, name, rows[at]).items()}
            | {"effect_scores": found["effect_scores"][at].cpu()}
            for at in range(len(places))
        ]

    said, numbers = shared_out(count, batch_size, tell, "covariates of held-out scans"), {}
    for name, variable in coding.variables.items():
        known = [place for place, item in enumerate(held_out.items) if item["covariates"][name] is not None]
        own = [held_out.items[place]["covariates"][name] for place in known]
        if not own:
            continue
        if variable.kind == "continuous":
            ends = [{end: float(said[place][f"{name}_{end}"]) for end in ("mean", "low", "high")} for place in known]
            numbers |= value_numbers(name, own, ends, variable.mean)
        else:
            commonest = max(zip(variable.shares, variable.categories, strict=True))[1]
            numbers |= category_numbers(name, own, [said[place][f"{name}_likeliest"] for place in known], commonest)
    people = one_per_subject(held_out.items, INFORMATION_PEOPLE, common.seed)
    scores = torch.stack([said[place]["effect_scores"] for place in people])
    numbers |= information(common.prior, scores, [held_out.items[place]["covariates"] for place in people], common.seed)
    normative, pit = _normative(common, held_out, trained, draws, atlas) if draws else ({}, {})
    return numbers | normative, pit


def _normative(
    common: Common, held_out: Measured, trained: Measured | None, draws: int, atlas: str | None
) -> tuple[Numbers, Histograms]:
    """How well it is known what is usual for held-out scans' covariates, of voxels and of regions."""
    job, scans = jobs.deviation(common, draws, atlas), held_out if trained is None else trained
    mask = foreground(scans.images.mean(0), common.network)
    errors = {"voxels": NormativeErrors(int(mask.sum()), None if trained is None else trained.images[:, mask])}
    if atlas is not None:
        training = None if trained is None else job.inferer.region_means(trained.images)
        errors["regions"] = NormativeErrors(len(job.inferer.masks), training)

    def add(places: Sequence[int]) -> list[None]:
        found = {
            name: values.cpu() for name, values in job.compute([read_item(job.dataset, p) for p in places]).items()
        }
        for at, place in enumerate(places):
            errors["voxels"].add(
                *(x[mask] for x in (held_out.images[place], found["expected"][at], found["spread"][at]))
            )
            if atlas is not None:
                errors["regions"].add(*found["regions"][at].T)
        return [None] * len(places)

    shared_out(len(held_out.items), common.loading["batch_size"], add, "what is usual for held-out scans")
    parts = idist.all_gather([errors])
    joined = {unit: NormativeErrors.joined([part[unit] for part in itertools.chain(*parts)]) for unit in errors}
    numbers = joined["voxels"].numbers()
    if atlas is not None:
        numbers |= {f"region_{name}": value for name, value in joined["regions"].numbers("regions").items()}
    return numbers, {unit: each.pit_histogram() for unit, each in joined.items()}


def _write(
    common: Common, numbers: Numbers, settings: Mapping[str, Any], rows: Sequence[dict], held_out: Measured
) -> None:
    folder, table = common.output_dir, common.output_dir / "evaluation.csv"
    known = {"ckpt": str(common.ckpt), "population_prior": common.prior_file, "seed": common.seed, **settings}
    cells = [{name: f"{value:.8g}" for name, value in row.items()} for row in rows]
    common.cohort.columns.write(table, zip(map(item_path, held_out.items), cells, strict=True))
    flat = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in (known | numbers).items()}
    write_text(folder / "evaluation.json", json.dumps(flat, indent=2) + "\n")
    lead, shown = f"{len(rows)} held-out scan(s).", _as_table(numbers)
    write_report(folder, "evaluate", lead, [table], sorted(folder.glob("*.png")), {**known, "summary": shown})
    logger.info("%s", shown)
    logger.info("Results: '%s' and '%s'.", folder / "evaluation.json", table)


def _as_table(numbers: Numbers) -> str:
    """By groups: a value, and its interval or standard error where there is one."""
    lines, left = ["Evaluation:"], dict(numbers)
    for group, begins in (*GROUPS.items(), ("covariates", ("",))):
        mine = {name: left.pop(name) for name in list(left) if name.startswith(begins)}
        ends = ("_std", "_low", "_high", "_standard_error", "_halves_mean", "_halves_std")
        shown = {name: value for name, value in mine.items() if not name.endswith(ends) and not name.endswith("scans")}
        lines += [group] if shown else []
        for name, value in shown.items():
            low, high, error = (mine.get(f"{name}_{end}") for end in ("low", "high", "standard_error"))
            around = f"  ({low:.4g} to {high:.4g})" if low is not None else f"  (+- {error:.2g})" if error else ""
            lines.append(f"  {name:<32}{'-' if value is None else format(value, '.4g'):>12}{around}")
    return "\n".join(lines)
