"""What the page about a job's results shows: its tables, pictures and volumes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.inference.layouts import VOLUME, ScanLayout
from scripts.utils.report import ShownVolume, write_report

__all__ = ["write_job_report"]

TABLES = {
    "score": ("scores.csv", "lesions.csv"),
    "encode": ("coordinates.csv", "factors.csv", "latents.csv"),
    "deviation": ("deviation_z.csv", "deviation.csv"),
    "covariates": ("covariates.csv",),
}
SHEETS = {
    "deviation": ("regions.png",),
    "score": ("most_unusual.png",),
    "sample": ("samples.png",),
    "decode_coordinates": ("decoded.png",),
}
LEGENDS = {
    "score": "bits_per_dim: how well the network predicts the scan, lower is likelier (elbo = -(nll + kl), nats). "
    "bits_per_dim_population: the same under the prior of the cohort. typicality: how far the scan's coordinates lie "
    "from the cohort's mean; typicality_tail: the share of held-out scans that lie at least so far. psnr (dB), ssim: "
    "of the reconstruction, higher is nearer. anomaly_score: the 99.9th percentile of the anomaly map in the brain, in "
    "standard deviations, higher is more unusual.",
    "deviation": "z: standard deviations from what is expected at this scan's covariates; centile: the same in per "
    "cent. Maps are in standard deviations, and brightest at 6.",
    "covariates": "_mean, _low, _high: mean and 90 % interval of what the scan itself says; _own: what is known of it.",
}
# results that are shown by themselves; and maps that lie on their scans, with the value of the brightest colour
IMAGES = ("recon", "imputed_mean", "sample", "decoded")
MAPS = {"anomaly": 6.0, "deviation": 6.0, "difference": None}


def write_job_report(
    job: str,
    output_dir: str | os.PathLike,
    scans: Sequence[str],
    layouts: Sequence[ScanLayout],
    figures: Sequence[ScanLayout],
    settings: Mapping[str, Any],
    failed: Sequence[tuple[str, str]],
) -> Path:
    """Write ``report.html`` beside the results.

    Args:
        job: its word.
        output_dir: the folder of the results.
        scans: all of the data set.
        layouts, figures: of the results and of the pictures of each scan.
        settings: with what the results were made.
        failed: scans of which there are no results, and why.
    """
    folder = Path(output_dir)
    placed = [scan for scan in scans if layouts[0].has_place(scan)]
    return write_report(
        folder,
        f"Results of {job}",
        f"{len(scans) - len(failed)} of {len(scans)} scan(s) have results in this folder.",
        [folder / name for name in TABLES.get(job, ())],
        [folder / name for name in SHEETS.get(job, ())] + [layout.path(scan) for scan in placed for layout in figures],
        settings,
        failed,
        [_shown(layout, scan) for scan in placed for layout in layouts if _kind(layout)],
        LEGENDS.get(job, ""),
    )


def _kind(layout: ScanLayout) -> str:
    """Which of the volumes that are shown a layout is of; empty for others."""
    kinds = (name for name in (*IMAGES, *MAPS) if layout.postfix == name or layout.postfix.startswith(f"{name}_"))
    return next(kinds, "") if layout.extension == VOLUME else ""


def _shown(layout: ScanLayout, scan: str) -> ShownVolume:
    kind = _kind(layout)
    path = layout.paths({"image": scan})[0]
    return ShownVolume(path, scan, MAPS[kind]) if kind in MAPS else ShownVolume(path)
