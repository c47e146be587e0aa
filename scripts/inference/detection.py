"""How well anomaly maps find lesions in a cohort, beside what the intensity alone finds, with intervals over scans.

In all voxels, and at thresholds that were fixed on healthy scans: Dice, precision, recall, lesions by size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scripts.inference.lesions import DETECTORS, GRIDS, LesionCounts, edges, ordered
from scripts.inference.masks import NO_KIND
from scripts.inference.tables import markdown_lines

FALSE_SHARE = 1e-3  # of the healthy scans' voxels that a threshold marks
NUMBERS = {"average_precision": "average precision of voxels", "dice": "Dice of voxels", "auroc": "AUROC of scans"}
GRID_NAMES = {"network": "the network's grid", "scan": "the scans' own grid"}
RATES = (0.005, 0.01, 0.05)  # of the healthy scans that may have a voxel above the threshold
SIZES = {"below 1 ml": (0, 1), "1 to 10 ml": (1, 10), "above 10 ml": (10, math.inf)}
OF_VOXELS = ("dice", "precision", "recall")


class Detection(NamedTuple):
    """How well one of ``DETECTORS`` finds the lesions of a group of scans on one grid.

    Attributes:
        group, grid, what, order: which scans, where, and by what.
        lesions, healthy: how many scans there are of each.
        share: of the voxels that are in lesions.
        threshold: for Dice; NaN without healthy scans.
        numbers: by the names in ``NUMBERS``, ``[1 + repeats]``: the number itself, then those of resampled cohorts.
    """

    group: str
    grid: str
    what: str
    order: str
    lesions: int
    healthy: int
    share: float
    threshold: float
    numbers: dict[str, np.ndarray]


def interval(numbers: np.ndarray) -> tuple[float, float]:
    """Between which 95 % of all but the first number lie."""
    others = numbers[1:][np.isfinite(numbers[1:])]
    low, high = np.quantile(others, (0.025, 0.975)) if len(others) else (np.nan, np.nan)
    return float(low), float(high)


def average_precision(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """The average precision, as scikit-learn defines it, of counts ``[..., bins]`` from the least to the most
    suspicious: ``[...]``, NaN where nothing is positive.
    """
    hits, alarms = (np.cumsum(counts[..., ::-1], -1, dtype=float) for counts in (positive, negative))
    precision = hits / np.maximum(hits + alarms, 1e-12)
    return divide((precision * positive[..., ::-1]).sum(-1), hits[..., -1])


def roc_area(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """The area under the ROC curve, likewise; NaN where nothing is positive, or nothing negative."""
    below = np.cumsum(negative, -1, dtype=float) - negative / 2  # ties count half
    return divide((below * positive).sum(-1), positive.sum(-1, dtype=float) * negative.sum(-1))


def dice(positive: np.ndarray, negative: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """The Dice coefficient of what is positive and the bins that are marked."""
    hits, alarms = (positive * marked).sum(-1, dtype=float), (negative * marked).sum(-1)
    return divide(2 * hits, hits + alarms + positive.sum(-1))


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient; NaN where the denominator is not above 0."""
    result = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=result, where=np.asarray(denominator) > 0)


def marked_bins(healthy: np.ndarray) -> np.ndarray:
    """The most suspicious bins that hold at most a thousandth of healthy voxels, ``[..., bins]``; none without any."""
    above, total = np.cumsum(healthy[..., ::-1], -1)[..., ::-1], healthy.sum(-1, keepdims=True)
    return (above <= FALSE_SHARE * total) & (total > 0)


def resampled(sick: np.ndarray, repeats: int) -> np.ndarray:
    """How often each scan is in resampled cohorts, ``[1 + repeats, scans]``; once in the first, the cohort itself.

    Scans with lesions and healthy ones are each drawn from their own, so that no cohort lacks either.
    """
    weights, rng = np.ones((1 + repeats, len(sick))), np.random.default_rng(0)
    for group in (sick, ~sick):
        if count := int(group.sum()):
            weights[1:, group] = rng.multinomial(count, np.full(count, 1 / count), size=repeats)
    return weights


def by_kind(scans: Sequence[LesionCounts]) -> dict[str, list[bool]]:
    """Groups for :func:`detect`: the scans of each kind together with the healthy ones, and all of them."""
    of_scans = [
        {kind.strip() for kind in scan.kind.split(";")} - {"", NO_KIND} if scan.mask == "lesions" else None
        for scan in scans
    ]
    kinds = sorted(set().union(*(own for own in of_scans if own is not None)))
    groups = {kind: [own is None or kind in own for own in of_scans] for kind in kinds}
    one_for_all = len(groups) == 1 and all(groups[kinds[0]])
    return groups if one_for_all else groups | {"all": [True] * len(scans)}


def detect(scans: Sequence[LesionCounts], groups: Mapping[str, Sequence[bool]], repeats: int = 1000) -> list[Detection]:
    """Measure all ``DETECTORS`` on each grid that was counted.

    Average precision is of the voxels of all scans of a group together. Dice is of those of its scans with lesions, at
    a threshold that a thousandth of the healthy scans' voxels exceeds. The area under the ROC curve tells scans with
    lesions from healthy ones by their 99.9th percentile. Without healthy scans the last two are NaN.

    Args:
        scans: what was counted; ``mask`` tells those with lesions from others, which count as healthy.
        groups: by name, which of the scans belong to it.
        repeats: resampled cohorts, for the intervals.
    """
    found = []
    for group, members in groups.items():
        own, sick, weights = _group(scans, members, repeats)
        for grid in own[0].voxels:
            for number, (what, order) in enumerate(DETECTORS):
                counts = ordered(np.stack([scan.voxels[grid][what] for scan in own]), order)
                negative, positive = counts[:, 0].astype(float), counts[:, 1].astype(float)
                marked = marked_bins(weights[:, ~sick] @ negative[~sick])
                own_weights = weights[:, sick]
                ranked = _in_order(np.array([scan.scores[grid][number] for scan in own]), sick, weights)
                numbers = {
                    "average_precision": average_precision(weights @ positive, weights @ negative),
                    "dice": dice(own_weights @ positive[sick], own_weights @ negative[sick], marked),
                    "auroc": roc_area(*ranked),
                }
                if sick.all():
                    numbers["dice"][:] = np.nan
                limits, first = edges(what, order), int(np.argmax(marked[0]))
                found.append(
                    Detection(
                        *(group, grid, what, order, int(sick.sum()), int((~sick).sum())),
                        share=positive.sum() / max(positive.sum() + negative.sum(), 1),
                        threshold=float(limits[first - 1]) if marked[0].any() and first > 0 else np.nan,
                        numbers=numbers,
                    )
                )
    return found


def _group(
    scans: Sequence[LesionCounts], members: Sequence[bool], repeats: int
) -> tuple[list[LesionCounts], np.ndarray, np.ndarray]:
    """Its scans, which of them have lesions, and how often each is in resampled cohorts."""
    own = [scan for scan, member in zip(scans, members, strict=True) if member]
    sick = np.array([scan.mask == "lesions" for scan in own], bool)
    return own, sick, resampled(sick, repeats)


def _in_order(scores: np.ndarray, sick: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scans with lesions and healthy ones in bins of their scores, one for each score that occurs."""
    order = np.argsort(scores)
    _, starts = np.unique(scores[order], return_index=True)
    return tuple(np.add.reduceat((weights * group)[:, order], starts, axis=1) for group in (sick, ~sick))


def scan_rows(scans: Sequence[LesionCounts]) -> tuple[list[str], list[list[str | int]]]:
    """One row per scan, grid and detector: the columns of a table, and its cells.

    Average precision and Dice are of the scan's own voxels, and empty where there are no lesions; the threshold is the
    same for all, that of the cohort.
    """
    rows = []
    for grid in GRIDS:
        for number, (what, order) in enumerate(DETECTORS):
            normal = [ordered(scan.voxels[grid][what][0], order) for scan in scans if scan.mask != "lesions"]
            marked = marked_bins(np.sum(normal, axis=0)) if normal else None
            for scan in scans:
                negative, positive = ordered(scan.voxels[grid][what], order)
                overlap = np.nan if marked is None else dice(positive, negative, marked)
                values = [average_precision(positive, negative), overlap, scan.scores[grid][number]]
                if not positive.any():
                    values[:2] = [np.nan, np.nan]
                sizes = [int(positive.sum()), int((positive + negative).sum())]
                cells = ["" if np.isnan(value) else f"{float(value):.6g}" for value in values]
                rows.append([scan.name, scan.mask, scan.kind, grid, what, order, *sizes, *cells])
    sizes, measures = ["lesion_voxels", "voxels"], ["average_precision", "dice", "score"]
    return ["image", "mask", "kind", "grid", "map", "order", *sizes, *measures], rows


def best(found: Sequence[Detection]) -> list[Detection]:
    """Of each group and grid the order by which the anomaly map has its best average precision, and the intensity's."""
    chosen: dict[tuple[str, str, str], Detection] = {}
    for d in found:
        before = chosen.setdefault((d.group, d.grid, d.what), d)
        if d.numbers["average_precision"][0] > before.numbers["average_precision"][0]:
            chosen[d.group, d.grid, d.what] = d
    return list(chosen.values())


def sentences(found: Sequence[Detection]) -> list[str]:
    """Of each group and grid: whether the anomaly map or the intensity finds voxels of lesions better, and scans.

    Average precision decides, each in its best order.
    """
    said, pairs = [], iter(best(found))
    for ours, baseline in zip(pairs, pairs, strict=True):
        where = f"{ours.group}, on {GRID_NAMES[ours.grid]}:"
        if ours.share == 0:
            said.append(f"{where} no voxel is in a lesion, so that nothing can be found.")
            continue
        values = [d.numbers["average_precision"] for d in (ours, baseline)]
        low, high = interval(values[0] - values[1])
        better = values[0][0] > values[1][0]
        if low <= 0 <= high:
            tools = ("the anomaly map", "intensity alone") if better else ("intensity alone", "the anomaly map")
            verdict = f"{tools[0]} is ahead of {tools[1]}, but the interval of the difference includes 0"
        elif better:
            verdict = "the anomaly map finds lesions better than intensity alone"
        else:
            verdict = "intensity alone finds lesions better than the anomaly map: use intensity"
        numbers = [f"{v[0]:.3f} ({d.order})" for v, d in zip(values, (ours, baseline), strict=True)]
        said.append(
            f"{where} {verdict}. Average precision {' against '.join(numbers)}, by chance {ours.share:.4f}; difference "
            f"{values[0][0] - values[1][0]:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}."
        )
        if max(v[0] for v in values) < 0.1:
            said[-1] += " Neither is of much use: on average fewer than one in ten voxels that they mark are lesions."
        area, (low, high) = ours.numbers["auroc"][0], interval(ours.numbers["auroc"])
        if low <= 0.5 <= high:
            said[-1] += f" The map does not tell scans with lesions from healthy ones (AUROC {area:.3f}, chance 0.5)."
    return said


def _with_interval(numbers: np.ndarray) -> str:
    """A number with its 95 % interval in brackets."""
    low, high = interval(numbers)
    return "-" if np.isnan(numbers[0]) else f"{numbers[0]:.3f} [{low:.3f}, {high:.3f}]"


def _threshold(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3g}"


def table(found: Sequence[Detection]) -> str:
    """All numbers as a Markdown table, with their 95 % intervals in brackets."""
    rows = (
        [
            *(f"{d.group} ({d.lesions} scans, {d.healthy} healthy)", d.grid, f"{d.what}, {d.order}"),
            *(*(_with_interval(d.numbers[name]) for name in NUMBERS), _threshold(d.threshold)),
        ]
        for d in found
    )
    return "\n".join(markdown_lines(["lesions", "grid", "map", *NUMBERS.values(), "threshold"], rows)) + "\n"


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
) -> list[OperatingPoint]:
    """Of each detection, of these scans and groups, the numbers at each of ``RATES``; none without healthy scans."""
    found = []
    for detection in (d for d in detections if d.healthy and d.lesions):
        own, sick, weights = _group(scans, groups[detection.group], repeats)
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
                "dice": dice(positive, negative, marked),
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
    names = [*OF_VOXELS, *SIZES]
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
    columns = ["lesions", "grid", "map", "healthy scans with any voxel above", "threshold", *OF_VOXELS]
    rows = []
    for point in points:
        d, shares = point.detection, [(point.numbers[name][0], count) for name, count in point.lesions.items()]
        cells = [d.group, GRID_NAMES[d.grid], f"{d.what}, {d.order}"]
        cells += [f"{point.rate:.1%}: {point.allowed} of {d.healthy}", _threshold(point.threshold)]
        cells += [_with_interval(point.numbers[name]) for name in OF_VOXELS]
        rows.append([*cells, *("-" if np.isnan(share) else f"{share:.0%} of {count}" for share, count in shares)])
    return "\n".join(markdown_lines([*columns, *(f"lesions {size}" for size in SIZES)], rows)) + "\n"
