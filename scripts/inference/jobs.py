"""The jobs of a trained network, one function each: what it reads, what it computes, what it writes.

A job is made by its function and done by its ``run()``. configs/inference.json has a line for each; the page, the
benchmarks and notebooks call the same functions. ``common`` is what all jobs share; its prior must have covariates
where a job is about these, and for :func:`privacy` its data set must say who was trained on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from monai.data import Dataset
from monai.inferers import Inferer
from monai.transforms import Compose
from scripts.data.datalist import common_root
from scripts.data.scan_grid import ToScand
from scripts.data.transforms import reading, unclipped
from scripts.inference import covariate_results, lesions, outputs
from scripts.inference.certificate import SETTINGS as CERTIFICATE_SETTINGS
from scripts.inference.certified import CertifiedEvaluator, certify, remove_certified
from scripts.inference.common import Common
from scripts.inference.covariate_results import RegionCurves
from scripts.inference.covariates import (
    AddChanged,
    Counterfactual,
    CovariatePosterior,
    Deviation,
    KeepScand,
    need_covariates,
    stack_features,
    targets,
)
from scripts.inference.engine import ScanEvaluator
from scripts.inference.imputation import (
    FillInd,
    FitMaskd,
    HideMissingd,
    MeasureFilled,
    draw_imputation,
    filling_table,
    stack_missing,
)
from scripts.inference.inferers import (
    CoordinateDecoding,
    Decoding,
    Encoding,
    Imputation,
    Interpolation,
    Reconstruction,
    Sampling,
    Temperature,
)
from scripts.inference.interpolation import (
    BothScans,
    PairLayout,
    SaveStepsd,
    draw_steps,
    list_pair,
    pair_files,
    report_levels,
    stack_pairs,
)
from scripts.inference.job_report import Report, deviation_report, prediction_report, score_report
from scripts.inference.latent_files import LoadLatentsd, SaveLatentsd, list_latents, stack_latents
from scripts.inference.layouts import SampleLayout, list_samples
from scripts.inference.masks import read_kinds
from scripts.inference.privacy import Privacy, privacy_sides
from scripts.inference.scoring import Scoring, score_summary
from scripts.inference.tables import latent_tables, list_coordinates, row_table, stack_coordinates
from scripts.utils import distributed
from scripts.utils.names import item_path

logger = logging.getLogger(__name__)

FEW_DRAWS = 16


def _with_steps(preprocessing: Compose, after_loading: Callable, *last: Callable) -> Compose:
    """A preprocessing, whose first step loads scans, with one more step after that and others at its end."""
    load, *others = preprocessing.transforms
    return Compose([load, after_loading, *others, *last])


def reconstruction_outputs(common: Common, inferer: Reconstruction) -> Compose:
    """What becomes of a scan's reconstruction: a picture, and volumes on the scan's own grid."""
    layout, images = common.layout(common.cohort.root), inferer.images(common.network)
    units = {"scale": "deviation", "zscore": "number"}
    levels = [common.figure(layout("levels", ".png"), outputs.draw_levels)] if inferer.levels == "each" else []
    return Compose(
        [
            common.figure(layout("recon", ".png"), outputs.draw_reconstruction),
            *levels,
            ToScand(images, [units.get(name, "intensity") for name in images]),
            outputs.SaveScansd(images, layout),
        ]
    )


def reconstruct(
    common: Common, inferer: Reconstruction, postprocessing: Callable | None = None, dataset: Dataset | None = None
) -> ScanEvaluator:
    """Each scan as the network reconstructs it: ``_recon``, ``_scale``, ``_zscore`` on the scan's grid, a picture.

    Args:
        inferer: says from which latents.
        postprocessing: of the results; None: :func:`reconstruction_outputs`.
        dataset: of preprocessed scans; None: the cohort's.
    """
    layout = common.layout(common.cohort.root)
    return ScanEvaluator(
        common,
        "reconstruct",
        dataset or Dataset(common.cohort.items, common.preprocessing),
        inferer,
        postprocessing or reconstruction_outputs(common, inferer),
        [layout(name) for name in inferer.images(common.network)],
        {"temperature": inferer.temperature, "levels": inferer.levels},
        asks=True,
    )


def encode(common: Common, temperature: Temperature = 0.0, levels: int | str | None = None) -> ScanEvaluator:
    """The latents of each scan, ``_latents.npz``, with tables of the coarsest and of the prior's coordinates.

    Args:
        temperature, levels: see :class:`scripts.inference.inferers.Encoding`.
    """
    inferer = Encoding(temperature, common.prior, levels)
    outputs.report_latents(common.network, inferer.count(common.network))
    layout = common.layout(common.cohort.root)("latents", ".npz")
    return ScanEvaluator(
        common,
        "encode",
        Dataset(common.cohort.items, common.preprocessing),
        inferer,
        SaveLatentsd(layout),
        [layout],
        {"population_prior": common.prior_file, "temperature": temperature, "levels": levels},
        asks=True,
        summary=partial(latent_tables, common.output_dir, layout, common.cohort.columns, common.prior),
        report=Report(("coordinates.csv", "factors.csv", "latents.csv")),
    )


def decode(common: Common, dataset_dir: str | os.PathLike, temperature: Temperature = 0.0) -> ScanEvaluator:
    """``_recon`` and ``_scale`` from latents' files, on the grids of the scans that they were encoded from.

    Args:
        dataset_dir: a folder or a datalist of ``_latents.npz``.
        temperature: of latents that are left out of a file.
    """
    network = common.network
    per_channel = network.in_channels > 1 and not common.naming.get("join_channels")
    files = distributed.from_rank_zero(list_latents, dataset_dir, per_channel)
    layout, images = common.layout(common_root(files, dataset_dir)), ["recon", "scale"]
    alone = common.replace(loading={**common.loading, "batch_size": 1})  # files may hold more latents or fewer
    return ScanEvaluator(
        alone,
        "decode",
        Dataset(files, LoadLatentsd("image", network.latent_grids(), network.in_channels)),
        Decoding(temperature),
        [ToScand(images, ["intensity", "deviation"], scan="fit"), outputs.SaveScansd(images, layout)],
        [layout(name) for name in images],
        {"temperature": temperature},
        inputs=stack_latents,
    )


def sample(
    common: Common,
    samples: int = 16,
    temperature: Temperature | None = None,
    voxel_noise: bool = False,
    covariates: Mapping[str, Any] | None = None,
) -> ScanEvaluator:
    """New scans, ``0001_sample`` and so on, and a sheet of them; see :class:`scripts.inference.inferers.Sampling`."""
    if common.prior is None:
        logger.info("Samples are drawn from the network's own prior.")
    else:
        logger.info(
            "Samples are drawn from the population prior '%s', of %d factors.", common.prior_file, common.prior.factors
        )
    settings = {"sample_temperature": temperature, "voxel_noise": voxel_noise, "covariates": covariates}
    return _generated(
        common,
        "sample",
        "sample",
        list_samples(common.output_dir, samples),
        Sampling(temperature, voxel_noise, common.prior, covariates),
        len,
        settings,
        "samples.png",
    )


def decode_coordinates(common: Common, path: str | os.PathLike | None, temperature: Temperature = 0.0) -> ScanEvaluator:
    """``_decoded`` for each row of a table of coordinates in the population prior, and a sheet of them."""
    rows = distributed.from_rank_zero(list_coordinates, path, common.output_dir, common.prior)
    inferer, inputs = CoordinateDecoding(common.prior, temperature), stack_coordinates
    settings = {"coordinates": path, "temperature": temperature}
    return _generated(common, "decode_coordinates", "decoded", rows, inferer, inputs, settings, "decoded.png")


def _generated(
    common: Common,
    job: str,
    word: str,
    items: Sequence[dict],
    inferer: Inferer,
    inputs: Callable,
    settings: Mapping[str, Any],
    sheet: str,
) -> ScanEvaluator:
    """A job whose results come from the model alone."""
    channels, naming = common.network.in_channels, common.naming
    layout = SampleLayout(common.output_dir, word, common.cohort.pattern, channels, **naming)
    return ScanEvaluator(
        common.replace(loading={**common.loading, "num_workers": 0}),
        job,
        Dataset(items),
        inferer,
        outputs.SaveSampled(layout, common.network.scan_affine, common.value_range),
        [layout],
        {"population_prior": common.prior_file, **settings},
        inputs=inputs,
        summary=partial(outputs.sample_sheet, common.output_dir / sheet, layout),
        report=Report(sheets=(sheet,)),
    )


def interpolate(
    common: Common,
    scans_between: Sequence[Any] | None = None,
    steps: int = 7,
    levels_between: Sequence[int | str] | None = None,
) -> ScanEvaluator:
    """Scans between two, ``a_to_b_step00`` and so on, and a film strip.

    Args:
        scans_between: paths of the two; None: the cohort's first two.
        steps, levels_between: see :class:`scripts.inference.inferers.Interpolation`.
    """
    report_levels(common.network, levels_between)
    pair = list_pair(scans_between, common.cohort)
    layout = partial(PairLayout, pair, common.output_dir, **common.naming, description=common.describe)
    inferer = Interpolation(steps, levels_between)
    return ScanEvaluator(
        common,
        "interpolate",
        Dataset(pair, BothScans(common.preprocessing)),
        inferer,
        [SaveStepsd(layout, inferer.images(), common.value_range), common.figure(layout("steps", ".png"), draw_steps)],
        [layout(name) for name in inferer.images()],
        {"steps": steps, "levels_between": levels_between, **pair_files(pair)},
        inputs=stack_pairs,
    )


def impute(
    common: Common,
    mask_dir: str | os.PathLike | None,
    mask_pattern: str | None = None,
    iterations: int = 3,
    draws: int | None = None,
    voxel_noise: bool = False,
    known_truth: bool = False,
) -> ScanEvaluator:
    """What a mask marks of each scan, filled in: ``_imputed_00``, ..., their mean and spread, a picture.

    Args:
        mask_dir, mask_pattern: see :func:`scripts.inference.masks.pair_masks`.
        iterations, draws, voxel_noise: see :class:`scripts.inference.inferers.Imputation`.
        known_truth: scans are whole under their masks: measure how good the filling is, ``imputed.csv``.
    """
    scans = common.cohort.with_masks(mask_dir, mask_pattern, masked_only=True)
    inferer = Imputation(iterations, 4 if draws is None else draws, voxel_noise=voxel_noise)
    layout, images = common.layout(common.cohort.root), inferer.images()
    results = [*images, "imputed_mean", "imputed_std"]
    settings = {"mask_dir": mask_dir, "mask_pattern": mask_pattern, "voxel_noise": voxel_noise}
    measuring, row, measured = [], layout("imputed", ".json"), {}
    if known_truth:
        measuring = [MeasureFilled(images, common.value_range), outputs.SaveJson(row, outputs.scan_numbers)]
        table = partial(filling_table, common.output_dir / "imputed.csv", row, common.cohort.columns)
        measured = {"summary": table, "report": Report(("imputed.csv",))}
    return ScanEvaluator(
        common,
        "impute",
        Dataset(scans, _with_steps(common.preprocessing, HideMissingd("image"), FitMaskd("image"))),
        inferer,
        [
            common.figure(layout("imputed", ".png"), partial(draw_imputation, images)),
            ToScand(images, "intensity"),
            FillInd(images),
            *measuring,
            outputs.SaveScansd(results, layout),
        ],
        [*(layout(name) for name in results), *([row] if known_truth else [])],
        {**settings, "iterations": iterations, "draws": inferer.draws},
        arguments=stack_missing,
        **measured,
    )


def score(
    common: Common,
    importance_samples: int = 1,
    anomaly_smoothing: float | None = None,
    restore: float | None = 6.0,
    mask_dir: str | os.PathLike | None = None,
    mask_pattern: str | None = None,
    unmasked_healthy: bool = False,
) -> ScanEvaluator:
    """How likely each scan is and where it is not: ``scores.csv``, ``_anomaly`` maps, and how well they find lesions.

    Args:
        importance_samples, anomaly_smoothing, restore: see :class:`scripts.inference.scoring.Scoring`; by default maps
            are smoothed by a voxel of a grid of 128.
        mask_dir, mask_pattern: of masks of lesions, see :func:`scripts.inference.masks.pair_masks`; None: there are
            none.
        unmasked_healthy: scans without a mask count as healthy.
    """
    cohort, layout = common.cohort, common.layout(common.cohort.root)
    scans = cohort.items if mask_dir is None else cohort.with_masks(mask_dir, mask_pattern)
    scans = cohort.with_covariates(common.prior, scans)
    preprocessing = unclipped(common.preprocessing)  # the brightest lesions are what clipping hides
    if mask_dir is not None:
        preprocessing = lesions.with_masks(preprocessing)
    if anomaly_smoothing is None:
        anomaly_smoothing = min(common.network.spatial_shape) / 128
    numbers = {"importance_samples": importance_samples, "restore": restore, "anomaly_smoothing": anomaly_smoothing}
    row, counts = layout("score", ".json"), layout("lesions", ".npz")
    kinds = {} if mask_dir is None else read_kinds(mask_dir, list(map(item_path, scans)))
    return ScanEvaluator(
        common,
        "score",
        Dataset(scans, preprocessing),
        Scoring(importance_samples, anomaly_smoothing, restore, common.prior),
        [
            common.figure(layout("anomaly", ".png"), outputs.draw_anomaly),
            lesions.CountVoxels("network", common.value_range),
            ToScand("anomaly", "number"),
            lesions.CountVoxels("scan", common.value_range),
            outputs.SaveScansd("anomaly", layout),
            lesions.SaveCounts(counts),
            outputs.SaveJson(row, outputs.scan_numbers),
        ],
        [layout("anomaly"), row, *([counts] if mask_dir else [])],
        {"population_prior": common.prior_file, **numbers, "mask_dir": mask_dir, "mask_pattern": mask_pattern},
        arguments=partial(stack_features, common.prior),
        asks=True,
        summary=partial(score_summary, common, layout, scans, reading(common.preprocessing), kinds, unmasked_healthy),
        report=score_report(common.prior),
    )


def counterfactual(
    common: Common, covariates: Any, word: str = "counterfactual", only: str | None = None, job: str = "counterfactual"
) -> ScanEvaluator:
    """Each scan as it would look under other covariates: ``_counterfactual``, ``_difference``, a film strip.

    Args:
        covariates: to change to, see :func:`scripts.inference.covariates.targets`.
        word: what the results are called.
        only: the kind of the covariates that may be changed; None: any.
        job: its name.
    """
    prior = need_covariates(common.prior)
    changed_to = targets(prior.coding, covariates, only)
    inferer, layout = Counterfactual(prior, changed_to), common.layout(common.cohort.root)
    changes, add = inferer.images(), AddChanged(inferer.images(), word)
    return ScanEvaluator(
        common,
        job,
        Dataset(common.cohort.with_covariates(prior), _with_steps(common.preprocessing, KeepScand("image"))),
        inferer,
        [
            common.figure(layout(word, ".png"), partial(covariate_results.draw_strip, changed_to)),
            ToScand(changes, "deviation"),
            add,
            outputs.SaveScansd(add.images(), layout),
        ],
        [layout(name) for name in add.images()],
        {"population_prior": common.prior_file, "covariates": covariates},
        arguments=partial(stack_features, prior),
        asks=True,
    )


def harmonise(common: Common, covariates: Any) -> ScanEvaluator:
    """Each scan as it would look had it come from another site, ``_harmonised``: categories alone are changed."""
    return counterfactual(common, covariates, "harmonised", "categorical", "harmonise")


def deviation(
    common: Common, draws: int | None = None, atlas: str | os.PathLike | None = None, **certified: Any
) -> ScanEvaluator | CertifiedEvaluator:
    """How far each voxel is from what is usual for the scan's covariates, and with an atlas each region.

    Args:
        draws: of what is usual; by default 32.
        atlas: a NIfTI file of region numbers.
        certified: ``error_rate``, ``calibration``, ``correction``, ``groups`` and ``weighted``, see
            :func:`scripts.inference.certified.certify`; the first two None: nothing is said to be significant.
    """
    prior, network, layout = need_covariates(common.prior), common.network, common.layout(common.cohort.root)
    labels = covariate_results.fit_atlas(atlas, common.grid, network.spatial_shape, network.scan_affine)
    regions, row = layout("regions", ".json"), layout("deviationscore", ".json")
    scans = common.cohort.with_covariates(prior)
    inferer, images = Deviation(prior, 32 if draws is None else draws, labels), ["expected", "spread", "deviation"]
    if inferer.draws < FEW_DRAWS:
        logger.warning(
            "draws is %d: the spread of so few is poorly known, and deviations look larger than they are; set --draws "
            "to %d or more.",
            *(inferer.draws, FEW_DRAWS),
        )
    names = covariate_results.region_names(atlas, labels)
    settings = {"population_prior": common.prior_file, "draws": inferer.draws, "atlas": atlas}
    certificate = certify(common, inferer, names, settings, **certified)
    shown = {} if certificate is None else {"significant": "label"}
    curves = RegionCurves(inferer, network, scans, common.seed, common.loading["batch_size"])

    def tables(done: Sequence[str]) -> None:
        if certificate is None:
            remove_certified(common, done)
        row_table(common.output_dir / "deviation_scores.csv", row, common.cohort.columns, done)
        covariate_results.region_table(common.output_dir, regions, common.cohort.columns, curves, done)

    evaluator = ScanEvaluator(
        common,
        "deviation",
        Dataset(scans, common.preprocessing),
        inferer,
        [
            partial(covariate_results.score_deviation, network),
            outputs.SaveJson(row, outputs.scan_numbers),
            common.figure(layout("deviation", ".png"), covariate_results.draw_deviation),
            *([] if certificate is None else certificate.steps),
            ToScand([*images, *shown], ["intensity", "deviation", "number", *shown.values()]),
            outputs.SaveScansd([*images, *shown], layout),
            outputs.SaveJson(regions, partial(covariate_results.region_numbers, names)),
        ],
        [
            *map(layout, images),
            row,
            *([regions] if atlas else []),
            *([] if certificate is None else certificate.layouts),
        ],
        {**settings, "regions": names, **dict.fromkeys(CERTIFICATE_SETTINGS)},
        arguments=partial(stack_features, prior),
        asks=True,
        summary=tables if certificate is None else partial(certificate.summary, tables),
        report=deviation_report(prior, certificate is not None),
    )
    return evaluator if certificate is None else certificate.of(evaluator)


def predict_covariates(common: Common) -> ScanEvaluator:
    """What each scan itself says of its covariates, such as its age: ``covariates.csv`` and curves."""
    prior, layout = need_covariates(common.prior), common.layout(common.cohort.root)
    content = layout("covariates", ".json")
    table = common.output_dir / "covariates.csv"
    return ScanEvaluator(
        common,
        "predict_covariates",
        Dataset(common.cohort.with_covariates(prior), common.preprocessing),
        CovariatePosterior(prior),
        [
            outputs.SaveJson(content, partial(covariate_results.posteriors_of, prior.coding)),
            common.figure(layout("covariates", ".png"), partial(covariate_results.draw_posteriors, prior.coding)),
        ],
        [content],
        {"population_prior": common.prior_file},
        arguments=partial(stack_features, prior),
        asks=True,
        summary=partial(covariate_results.covariate_table, table, content, common.cohort.columns, prior.coding),
        report=prediction_report(prior.coding),
    )


def privacy(
    common: Common,
    samples: int = 64,
    temperature: Temperature | None = None,
    covariates: Mapping[str, Any] | None = None,
    training_scans: int = 256,
) -> Privacy:
    """Can people who were trained on be told from others, and are samples copies of them: ``privacy.json``, ``.csv``.

    Args:
        samples, temperature, covariates: of the samples, see :func:`sample`.
        training_scans: of how many people at most, on each side.
    """
    cohort = common.cohort
    sides = distributed.from_rank_zero(privacy_sides, cohort.folder, cohort.pattern, training_scans, common.seed)
    training, held_out = (score(common.replace(cohort=cohort.of(side)), restore=None) for side in sides)
    return Privacy(training, held_out, sample(common, samples, temperature, False, covariates), common.output_dir)
