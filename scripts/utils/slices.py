"""Upright slices of scans through the middle of their foreground.

Scans are arrays or tensors ``[channels, *spatial]`` in 2D or 3D whose axes run to the right, to the front and to the
top of the head (RAS).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["PLANES", "as_array", "foreground_box", "longest_axis", "middle", "plane"]

# name of a plane, and the axis that it cuts
PLANES = {3: (("axial", 2), ("coronal", 1), ("sagittal", 0)), 2: (("slice", None),)}
CROP = 0.06  # of the longest axis: what stays of the background around the foreground


def middle(volume: np.ndarray) -> tuple[int, ...]:
    """Indices of the middle of a scan's foreground, one per axis.

    The foreground is what exceeds the darkest value by more than 5 % of the range; a scan without any gives its centre.

    Args:
        volume: ``[*spatial]``.
    """
    return tuple((start + stop) // 2 for start, stop in _foreground_ends(np.asarray(volume)))


def plane(volume: np.ndarray, axis: int | None, index: int = 0) -> np.ndarray:
    """One upright slice of a scan: the front (axial) or the top (coronal, sagittal) of the head is in its first row.

    Args:
        volume: ``[*spatial]``, RAS.
        axis: which axis to cut: 2 gives an axial slice, 1 a coronal, 0 a sagittal one; None for a 2D scan.
        index: where to cut it.
    """
    return np.rot90(volume if axis is None else volume.take(index, axis))


def _foreground_ends(volume: np.ndarray) -> list[tuple[int, int]]:
    """First index of the foreground on each axis, and one past its last."""
    volume = np.where(np.isfinite(volume), volume, np.nan)
    low, high = (np.nanmin(volume), np.nanmax(volume)) if np.isfinite(volume).any() else (0.0, 0.0)
    inside = volume > low + 0.05 * (high - low)
    if not inside.any():
        return [(0, n) for n in volume.shape]
    axes = range(volume.ndim)
    found = [np.flatnonzero(inside.any(tuple(set(axes) - {axis}))) for axis in axes]
    return [(int(i[0]), int(i[-1]) + 1) for i in found]


def foreground_box(volumes: Sequence[np.ndarray]) -> tuple[slice, ...]:
    """A box around the foreground of all scans with a rim of background; everything, where their shapes differ.

    Args:
        volumes: at least one, ``[*spatial]``.
    """
    shape = volumes[0].shape
    if any(v.shape != shape for v in volumes):
        return (slice(None),) * len(shape)
    rim = math.ceil(CROP * max(shape))
    ends = np.array([_foreground_ends(v) for v in volumes])
    starts, stops = ends[..., 0].min(0) - rim, ends[..., 1].max(0) + rim
    return tuple(slice(max(0, int(a)), int(b)) for a, b in zip(starts, stops, strict=True))


def as_array(values: Any) -> np.ndarray:
    """An array or a tensor (on any device, of any precision) as a float32 array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, np.float32)


def longest_axis(volumes: Iterable[np.ndarray]) -> int:
    """The most voxels that any volume has along any axis."""
    return max(n for volume in volumes for n in volume.shape)
