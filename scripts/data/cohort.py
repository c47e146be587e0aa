"""Which scans of a data set differ from the rest of the cohort.

The limits follow from the cohort itself. They are wide on purpose: people read a list of false alarms only once.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scripts.data.geometry import differences, mixed_voxel_sizes, usual_voxel_size
from scripts.data.inspection import Scan
from scripts.data.scan_grid import usual_field_of_view

__all__ = ["MIN_COHORT", "compare_geometry", "compare_looks"]

# In a smaller cohort the median is a matter of chance, and no scan is compared with the others.
MIN_COHORT = 10
# A voxel size or orientation that nine tenths share is usual, and the rest differ from it. With less than that, the
# cohort has several protocols, and none of them is wrong.
USUAL = 0.9
# A value is far from the others when it lies TAIL_FACTOR times further from the median than the outer TAIL of the
# cohort begins. For a normal distribution that is 5.1 standard deviations. Because it is measured in the tail, a second
# kind of scan that makes up more than a tenth of a cohort moves the limit beyond itself.
TAIL, TAIL_FACTOR = 0.1, 4.0
# It must also be at least this far from the median, however similar the others are.
MIN_DISTANCE = {
    "similarity": 0.05,  # correlation; turned heads differ by more, and other heads by less (docs/checking.md)
    "contrast": 0.2,  # correlation; only gray and white matter count, so it varies more
    "background": 0.15,  # share of voxels; a neck more or less moves it by less
    "range": 2.0,  # powers of ten: MR units are arbitrary, but 0 to 1 among 0 to 4000 is another processing
    "coarsest voxel": math.log10(2),  # powers of ten: twice as thick
    "field of view": math.log10(1.3),  # powers of ten; 256 mm against 220 mm is one protocol's freedom
}
# A share of a scan's range. Resampling by splines dips a little below zero at edges, in less than 1 % of voxels.
NEGATIVE = 0.05
SAMPLE = 500  # scans whose median is the cohort's


def compare_looks(scans: list[Scan], thumbnails: np.ndarray, indices: list[int]) -> None:
    """Compare scans' thumbnails with their median, and their intensities with each other's; flag what is far off.

    Args:
        scans: at least one; their ``similarity`` and ``contrast`` are filled in.
        thumbnails: ``[n, channels, *spatial]``, in memory or on disk.
        indices: of the scans' thumbnails.
    """
    sample = sorted(random.Random(0).sample(indices, min(SAMPLE, len(indices))))
    median = np.median(thumbnails[sample].astype(np.float32), axis=0).ravel()
    inside = median > 0.1 * median.max()
    for scan, i in zip(scans, indices, strict=True):
        thumbnail = np.asarray(thumbnails[i], np.float32).ravel()
        scan.similarity = _correlation(thumbnail, median)
        scan.contrast = _correlation(thumbnail[inside], median[inside])

    names = ("similarity", "contrast")
    lowest = {name: _limits([getattr(s, name) for s in scans], MIN_DISTANCE[name])[0] for name in names}
    emptiest, fullest = _limits([scan.background for scan in scans], MIN_DISTANCE["background"])
    # a scan that is nearly all background has its 99th percentile there
    spans = [(scan.percentile_99 - scan.minimum) or (scan.maximum - scan.minimum) for scan in scans]
    ranges = [math.log10(span) for span in spans]
    narrowest, widest = _limits(ranges, MIN_DISTANCE["range"])
    depths = [-scan.percentile_1 / ((scan.percentile_99 - scan.percentile_1) or 1) for scan in scans]
    non_negative = np.quantile(depths, USUAL) <= 0
    for scan, extent, depth in zip(scans, ranges, depths, strict=True):
        unlike = [
            f"{getattr(scan, name):.2f} {where} (limit {limit:.2f})"
            for (name, limit), where in zip(lowest.items(), ("everywhere", "inside the head"), strict=True)
            if getattr(scan, name) < limit
        ]
        if unlike:
            scan.flag(
                "suspicious", f"it is unlike the others: its correlation with their median is {', '.join(unlike)}"
            )
        if not emptiest <= scan.background <= fullest:
            usual = f"{max(emptiest, 0):.0%} to {min(fullest, 1):.0%}"
            scan.flag("suspicious", f"{scan.background:.0%} of it is background, where {usual} is usual")
        if not narrowest <= extent <= widest:
            usual = f"{10 ** np.median(ranges):.3g}"
            scan.flag("suspicious", f"its intensities span {10**extent:.3g}, where some {usual} is usual")
        if non_negative and depth > NEGATIVE:
            scan.flag("suspicious", f"it has negative voxels (down to {scan.minimum:.4g}), which the others have not")


def compare_geometry(
    scans: list[Scan],
    spacing: float | Sequence[float] | None,
    field_of_view: float | Sequence[float] | None,
    orientation: str | None,
) -> None:
    """Compare scans' geometry with what most of the cohort has, and flag what differs.

    Args:
        scans: at least one.
        spacing, field_of_view, orientation: what is asked for; only what is None is compared here.
    """
    if orientation is None:
        usual, count = Counter(scan.orientation for scan in scans).most_common(1)[0]
        if count >= USUAL * len(scans):
            _flag_differences(scans, "is usual", orientation=usual)
    if spacing is None:
        geometries = [scan.geometry for scan in scans]
        if len(mixed_voxel_sizes(geometries)) <= (1 - USUAL) * len(scans):
            _flag_differences(scans, "are usual", spacing=usual_voxel_size(geometries))
        else:
            _flag_sizes(scans, "coarsest voxel", lambda scan: max(scan.spacing))
    if field_of_view is None:
        usual_view = usual_field_of_view([scan.geometry for scan in scans])
        if usual_view is not None:
            _flag_differences(scans, "are usual", field_of_view=usual_view)
        else:
            _flag_sizes(scans, "field of view", lambda scan: max(scan.field_of_view))
            _flag_sizes(scans, "field of view", lambda scan: min(scan.field_of_view))


def _limits(values: Sequence[float], least: float) -> tuple[float, float]:
    """Between which values a cohort's good scans lie, see TAIL, TAIL_FACTOR and MIN_DISTANCE."""
    # The inner neighbour, so that a single outlier among ten never moves its own limit.
    low = np.quantile(values, TAIL, method="higher")
    high = np.quantile(values, 1 - TAIL, method="lower")
    middle = np.median(values)
    return middle - max(least, TAIL_FACTOR * (middle - low)), middle + max(least, TAIL_FACTOR * (high - middle))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return round(float(a @ b) / size, 4) if size else 0.0


def _flag_differences(scans: list[Scan], words: str, **expected: Any) -> None:
    for scan in scans:
        for difference in differences(scan.geometry, **expected):
            scan.flag("suspicious", re.sub(r"(is|are) expected$", words, difference))


def _flag_sizes(scans: list[Scan], name: str, size: Callable[[Scan], float]) -> None:
    """Flag a scan one of whose sizes (mm) is far from the others'."""
    sizes = [math.log10(size(scan)) for scan in scans]
    low, high = _limits(sizes, MIN_DISTANCE[name])
    for scan, value in zip(scans, sizes, strict=True):
        if not low <= value <= high:
            usual = f"{10 ** np.median(sizes):.3g} mm"
            scan.flag("suspicious", f"its {name} measures {10**value:.3g} mm, where some {usual} is usual")
