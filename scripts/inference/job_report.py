"""What the page about a job's results shows: its tables, pictures and volumes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.inference.layouts import VOLUME, ScanLayout
from scripts.utils.report import write_report
from scripts.utils.volumes import ShownVolume

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
        job,
        f"{len(scans) - len(failed)} of {len(scans)} scan(s) have results in this folder.",
        [folder / name for name in TABLES.get(job, ())],
        [folder / name for name in SHEETS.get(job, ())] + [layout.path(scan) for scan in placed for layout in figures],
        settings,
        failed,
        [_shown(layout, scan) for scan in placed for layout in layouts if _kind(layout)],
    )


def _kind(layout: ScanLayout) -> str:
    """Which of the volumes that are shown a layout is of; empty for others."""
    kinds = (name for name in (*IMAGES, *MAPS) if layout.postfix == name or layout.postfix.startswith(f"{name}_"))
    return next(kinds, "") if layout.extension == VOLUME else ""


def _shown(layout: ScanLayout, scan: str) -> ShownVolume:
    kind = _kind(layout)
    path = layout.paths({"image": scan})[0]
    return ShownVolume(path, scan, MAPS[kind]) if kind in MAPS else ShownVolume(path)
