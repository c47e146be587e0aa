"""The page about a job's results: its tables, pictures and volumes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.data.covariates import CovariateCoding
from scripts.inference.layouts import VOLUME, ScanLayout
from scripts.population.prior import PopulationPrior
from scripts.utils.names import printable
from scripts.utils.report import ShownTable, ShownVolume, read_shown, write_report
from torch import Tensor

__all__ = ["Report", "deviation_report", "prediction_report", "score_report", "write_job_report"]

# results that are shown by themselves; and maps that lie on their scans, with the value of the brightest colour
MOST_NAMED = 10
IMAGES = ("recon", "imputed_mean", "sample", "decoded")
MAPS = {"anomaly": 6.0, "deviation": 6.0, "difference": None, "significant": 2.0}


SCORES = (
    "bits_per_dim: how well the network predicts the scan, lower is likelier (elbo = -(nll + kl), nats). "
    "bits_per_voxel_8bit: likewise of 256 grey values, in the bits of a file. "
    "bits_per_dim_population: the same under the prior of the cohort. typicality: how far the scan's coordinates lie "
    "from the cohort's mean; typicality_tail: the share of held-out scans that lie at least so far. psnr (dB), ssim: "
    "of the reconstruction, higher is nearer. anomaly_score: the 99.9th percentile of the anomaly map in the brain, in "
    "standard deviations, of what is too bright; anomaly_score_dark: of what is too dark. usual: 90 % of the held-out "
    "scans of the cohort that the network was trained on. The most anomalous scans come first."
)
DEVIATIONS = (
    "deviation_score: the 99th percentile of the absolute deviation in the brain; usual: 90 % of the held-out people "
    "to whom no prior was fitted. unfamiliarity: how many times as far from what the network knows as the limit. z: "
    "standard deviations from what is expected at this scan's covariates; centile: the same in per cent. Maps are in "
    "standard deviations, and brightest at 6."
)
CERTIFICATES = (
    " Of the certificate: people: of the calibration, in each group; expected: scans that would have a significant "
    "cluster if all were healthy; observed: those that have a finding that is; p: the share of healthy people whose "
    "largest finding is as large. _significant: -log10 p of each significant cluster, below 0 where it is darker."
)
PREDICTIONS = (
    "_mean, _low, _high: mean and 90 % interval of what the scan itself says; _own: what is known of it; _gap: the "
    "mean less that, and _gap_corrected without what people of this value have in the mean. The largest gaps come "
    "first."
)


class Report(NamedTuple):
    """What a job's page shows beside the pictures and volumes of each scan.

    Attributes:
        tables, sheets: names of CSV files and of pictures of many scans, in the folder of the results.
        legend: what the columns mean.
        first, worst: of the first table, see :class:`scripts.utils.report.ShownTable`; its order is that of the scans.
        usual: likewise.
    """

    tables: Sequence[str] = ()
    sheets: Sequence[str] = ()
    legend: str = ""
    first: Sequence[str] = ()
    worst: str = ""
    usual: Mapping[str, str] = {}


def deviation_report(prior: PopulationPrior, certified: bool) -> Report:
    """The page of ``deviation``, with a certificate or without."""
    scores = prior.deviation_scores
    usual = {"deviation_score": _middle(scores)} if len(scores) else {}
    certificate = ("certificate.csv", "findings.csv") if certified else ()
    return Report(
        ("deviation_scores.csv", *certificate, "deviation_z.csv", "deviation.csv"),
        ("regions.png",),
        DEVIATIONS + (CERTIFICATES if certified else "") + " The scans that deviate most come first.",
        ("deviation_score", "unfamiliarity"),
        "deviation_score",
        usual | _usual_distance(prior),
    )


def score_report(prior: PopulationPrior | None) -> Report:
    """The page of ``score``."""
    return Report(
        ("scores.csv", "lesions.csv", "lesions_thresholds.csv"),
        ("most_unusual.png",),
        SCORES,
        (
            "familiar",
            "unfamiliarity",
            "anomaly_score",
            "anomaly_score_dark",
            "typicality",
            "typicality_tail",
            "bits_per_dim",
        ),
        "anomaly_score",
        _usual_scores(prior),
    )


def prediction_report(coding: CovariateCoding) -> Report:
    """The page of ``predict_covariates``: scans whose first number is told least rightly come first."""
    first, worst, usual = [], "", {}
    for name, variable in coding.variables.items():
        if variable.kind == "continuous":
            worst = worst or f"{name}_gap_corrected"
            first += [f"{name}_{end}" for end in ("gap_corrected", "gap", "own", "mean", "low", "high")]
            usual[f"{name}_own"] = "from _low to _high in 90 %"
    return Report(("covariates.csv",), (), PREDICTIONS, first, worst, usual)


def _usual_scores(prior: PopulationPrior | None) -> dict[str, str]:
    """Between what 90 % of the held-out scans lie that a population prior remembers, by the columns of ``score``."""
    if prior is None:
        return {}
    known = {"bits_per_dim": prior.bits_per_dim, "typicality": prior.distances}
    return _usual_distance(prior) | {name: _middle(values) for name, values in known.items() if len(values)}


def _usual_distance(prior: PopulationPrior) -> dict[str, str]:
    return {} if prior.familiarity is None else {"unfamiliarity": "below 1"}


def _middle(values: Tensor) -> str:
    low, high = values.double().quantile(values.new_tensor([0.05, 0.95]).double()).tolist()
    return f"{low:.4g} to {high:.4g}"


def write_job_report(
    job: str,
    report: Report,
    layouts: Sequence[ScanLayout],
    figures: Sequence[ScanLayout],
    scans: Sequence[str],
    settings: Mapping[str, Any],
    failed: Sequence[tuple[str, str]],
    strangers: Mapping[str, float],
) -> Path:
    """Write ``report_JOB.html`` beside the results: jobs may share a folder.

    Args:
        layouts, figures: of the results and of the pictures of each scan.
        scans: those of which there are results.
        failed: scans of which there are no results, and why.
        strangers: scans that the network does not know, with how many times as far from what is usual as the limit.
    """
    folder = layouts[0].output_dir
    tables = [ShownTable(folder / name) for name in report.tables]
    if tables:
        tables[0] = tables[0]._replace(first=report.first, worst=report.worst, usual=report.usual)
        if report.worst and tables[0].path.is_file():
            places = {row[0]: place for place, row in enumerate(read_shown(tables[0]).rows)}
            scans = sorted(scans, key=lambda scan: places.get(layouts[0].relative(scan), math.inf))
    return write_report(
        folder,
        f"Results of {job}",
        f"{len(scans)} of {len(scans) + len(failed)} scan(s) have results in this folder."
        + _said_of(strangers, layouts[0]),
        tables,
        [folder / name for name in report.sheets],
        {"scans": str(layouts[0].root), **settings},
        failed,
        [_shown(layout, scan) for scan in scans for layout in layouts if _kind(layout)],
        report.legend,
        f"report_{job}.html",
        [layout.path(scan) for scan in scans for layout in figures],
    )


def _said_of(strangers: Mapping[str, float], layout: ScanLayout) -> str:
    if not strangers:
        return ""
    farthest = sorted(strangers, key=strangers.get, reverse=True)[:MOST_NAMED]
    named = ", ".join(f"{printable(layout.relative(name))} ({strangers[name]:.1f})" for name in farthest)
    more = f", and {len(strangers) - MOST_NAMED} more" if len(strangers) > MOST_NAMED else ""
    return (
        f" {len(strangers)} of them are of a kind that the network does not know, so that their results mean little "
        f"(in brackets how many times as far from what is usual as the limit): {named}{more}."
    )


def _kind(layout: ScanLayout) -> str:
    """Which of the volumes that are shown a layout is of; empty for others."""
    kinds = (name for name in (*IMAGES, *MAPS) if layout.postfix == name or layout.postfix.startswith(f"{name}_"))
    return next(kinds, "") if layout.extension == VOLUME else ""


def _shown(layout: ScanLayout, scan: str) -> ShownVolume:
    kind = _kind(layout)
    path = layout.paths({"image": scan})[0]
    return ShownVolume(path, scan, MAPS[kind]) if kind in MAPS else ShownVolume(path)
