"""What is found of lesions at thresholds that were fixed on healthy scans: Dice, precision, recall, lesions by size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scripts.inference.detection import GRID_NAMES, Detection, divide, interval, resampled
from scripts.inference.lesions import DETECTORS, LesionCounts, edges, ordered

__all__ = ["OperatingPoint", "operating_points", "threshold_rows", "threshold_table"]

RATES = (0.005, 0.01, 0.05)  # of the healthy scans that may have a voxel above the threshold
SIZES = {"below 1 ml": (0, 1), "1 to 10 ml": (1, 10), "above 10 ml": (10, math.inf)}
NUMBERS = ("dice", "precision", "recall")


class OperatingPoint(NamedTuple):
    """What one of ``DETECTORS`` finds in the scans with lesions at one threshold.

    Attributes:
        detection: of which scans, where, and by what.
        rate: the share of the healthy scans that may have any voxel above the threshold.
        allowed: how many of them that is.
        threshold: NaN where even the most suspicious bin is too frequent among healthy scans.
        numbers: ``dice``, ``precision`` and ``recall`` of voxels, and the share of lesions of each of ``SIZES`` that
            have any voxel above it: ``[1 + repeats]``, as in :class:`scripts.inference.detection.Detection`.
        lesions: how many there are of each size.
    """

    detection: Detection
    rate: float
    allowed: int
    threshold: float
    numbers: dict[str, np.ndarray]
    lesions: dict[str, int]


def operating_points(
    scans: Sequence[LesionCounts],
    groups: Mapping[str, Sequence[bool]],
    detections: Sequence[Detection],
    repeats: int = 1000,
    seed: int = 0,
) -> list[OperatingPoint]:
    """Of each detection the numbers at each of ``RATES``; none without healthy scans.

    Args:
        scans, groups, repeats, seed: see :func:`scripts.inference.detection.detect`.
        detections: of these scans and groups.
    """
    found = []
    for detection in (d for d in detections if d.healthy and d.lesions):
        own = [scan for scan, member in zip(scans, groups[detection.group], strict=True) if member]
        sick = np.array([scan.mask == "lesions" for scan in own], bool)
        weights = resampled(sick, repeats, seed)
        counts = ordered(np.stack([scan.voxels[detection.grid][detection.what] for scan in own]), detection.order)
        bins = counts.shape[-1]
        highest = np.eye(bins, dtype=bool)[bins - 1 - (counts[~sick].sum(1)[:, ::-1] > 0).argmax(1)]
        above = np.cumsum((weights[:, ~sick] @ highest)[:, ::-1], 1)[:, ::-1]
        negative, positive = (weights[:, sick] @ counts[sick, row].astype(float) for row in (0, 1))
        lesions = _lesions([scan for scan, ill in zip(own, sick, strict=True) if ill], detection)
        for rate in RATES:
            allowed = math.floor(rate * detection.healthy + 1e-9)
            marked = above <= allowed
            first = np.where(marked.any(1), marked.argmax(1), bins)
            hits, alarms = (positive * marked).sum(1), (negative * marked).sum(1)
            numbers = {
                "dice": divide(2 * hits, hits + alarms + positive.sum(1)),
                "precision": divide(hits, hits + alarms),
                "recall": divide(hits, positive.sum(1)),
            }
            for name, (low, high) in SIZES.items():
                those = lesions[(lesions[:, 1] >= low) & (lesions[:, 1] < high)]
                of_each = weights[:, sick][:, those[:, 0].astype(int)]
                numbers[name] = divide((of_each * (those[:, 2] >= first[:, None])).sum(1), of_each.sum(1))
            limits = edges(detection.what, detection.order)
            threshold = float(limits[first[0] - 1]) if 0 < first[0] < bins else np.nan
            sizes = {n: int(((lesions[:, 1] >= a) & (lesions[:, 1] < b)).sum()) for n, (a, b) in SIZES.items()}
            found.append(OperatingPoint(detection, rate, allowed, threshold, numbers, sizes))
    return found


def _lesions(sick: Sequence[LesionCounts], detection: Detection) -> np.ndarray:
    """Of each lesion the place of its scan, its size in ml, and the bin of its most suspicious voxel: ``[n, 3]``."""
    column = 1 + DETECTORS.index((detection.what, detection.order))
    rows = [
        (place, row[0], row[column])
        for place, scan in enumerate(sick)
        for row in (scan.lesions or {}).get(detection.grid, ())
    ]
    return np.array(rows).reshape(-1, 3)


def threshold_rows(points: Sequence[OperatingPoint]) -> tuple[list[str], list[list[Any]]]:
    """The columns of a table, and a row for each point: numbers with their 95 % intervals."""
    names = [*NUMBERS, *SIZES]
    columns = ["lesions", "grid", "map", "order", "rate", "healthy", "allowed", "threshold"]
    columns += [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    rows = []
    for point in points:
        d = point.detection
        values = [v for name in names for v in (point.numbers[name][0], *interval(point.numbers[name]))]
        cells = ["" if np.isnan(value) else f"{float(value):.6g}" for value in (point.threshold, *values)]
        rows.append([d.group, d.grid, d.what, d.order, point.rate, d.healthy, point.allowed, *cells])
    return columns, rows


def threshold_table(points: Sequence[OperatingPoint]) -> str:
    """The same as Markdown, with the intervals of voxels' numbers in brackets."""
    columns = ["lesions", "grid", "map", "healthy scans with any voxel above", "threshold", *NUMBERS]
    lines = ["| " + " | ".join([*columns, *(f"lesions {size}" for size in SIZES)]) + " |"]
    lines.append("|" + "---|" * (len(columns) + len(SIZES)))
    for point in points:
        d = point.detection
        cells = [d.group, GRID_NAMES[d.grid], f"{d.what}, {d.order}"]
        cells.append(f"{point.rate:.1%}: {point.allowed} of {d.healthy}")
        cells.append("-" if np.isnan(point.threshold) else f"{point.threshold:.3g}")
        for name in NUMBERS:
            value, (low, high) = point.numbers[name][0], interval(point.numbers[name])
            cells.append("-" if np.isnan(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]")
        for name, count in point.lesions.items():
            share = point.numbers[name][0]
            cells.append("-" if np.isnan(share) else f"{share:.0%} of {count}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
