"""Which alignments of a cohort to the template look wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import median_abs_deviation

__all__ = ["judge"]

# What no brain that is aligned well goes beyond; see docs/preparing.md for how these were chosen.
LIMITS = {
    "similarity": (0.15, math.inf),
    "overlap": (0.9, 1.0),
    "volume_ratio": (0.6, 2.2),
    "stretch": (1.0, 1.35),
    "rotation": (0.0, 45.0),
}
# How far from the cohort's median, in robust standard deviations, and the least that such a deviation is taken to be.
OUTLYING, MIN_COHORT = 4.0, 8
FLOORS = {"similarity": 0.02, "overlap": 0.02, "log_volume_ratio": 0.1, "stretch": 0.02}


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say which alignments look wrong: beyond absolute limits, or far from the rest of the cohort.

    Far is more than 4 robust standard deviations (1.4826 times the median absolute deviation) from the median, to
    either side in volume and to the worse side in the others, in a cohort of 8 scans or more.

    Args:
        rows: of each scan ``scan`` (its name), ``similarity``, ``overlap``, ``volume_ratio``, ``stretch`` and
            ``rotation_x``, ``_y``, ``_z``.

    Returns:
        The rows with a ``verdict``, ``ok`` or ``check``, and its ``reasons``, those to check first, worst first.
    """
    judged = [(dict(row), _beyond_limits(row)) for row in rows]
    if len(rows) >= MIN_COHORT:
        for name, floor in FLOORS.items():
            values = np.array([_value(row, name) for row in rows])
            deviation = max(float(median_abs_deviation(values, scale="normal")), floor)
            scores = (values - np.median(values)) / deviation
            scores = {"similarity": -scores, "overlap": -scores, "stretch": scores}.get(name, np.abs(scores))
            label = name.removeprefix("log_")
            for (row, reasons), score in zip(judged, scores, strict=True):
                if score > OUTLYING:
                    reasons.append(f"{label} {row[label]:.3g} is {score:.1f} deviations from the cohort's median")
    verdicts = [
        {"scan": row["scan"], "verdict": "check" if reasons else "ok", "reasons": "; ".join(reasons)} | row
        for row, reasons in judged
    ]
    order = sorted(range(len(rows)), key=lambda i: (-len(judged[i][1]), rows[i]["similarity"], rows[i]["scan"]))
    return [verdicts[i] for i in order]


def _beyond_limits(row: dict[str, Any]) -> list[str]:
    return [
        f"{name} {_value(row, name):.3g} is outside {low:g} to {high:g}"
        for name, (low, high) in LIMITS.items()
        if not low <= _value(row, name) <= high
    ]


def _value(row: dict[str, Any], name: str) -> float:
    if name == "rotation":
        return max(abs(row[f"rotation_{axis}"]) for axis in "xyz")
    return math.log(max(row["volume_ratio"], 1e-9)) if name == "log_volume_ratio" else row[name]
