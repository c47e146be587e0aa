"""The published strengths of augmentation, which are for a grid of 128 voxels, as arguments of transforms for any grid.

Each function takes the grid's ``spatial_shape``; MONAI's random affine transforms want one value per axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["blur", "each_axis", "haircut", "rotations", "shares", "shears", "spikes", "voxels"]

PUBLISHED = 128  # voxels along each axis of the grid


def each_axis(value: Any, spatial_shape: Sequence[int]) -> list[Any]:
    """The same value for each axis."""
    return [value] * len(spatial_shape)


def rotations(degrees: float, spatial_shape: Sequence[int]) -> list[float]:
    """Angles about each axis, in radians."""
    return each_axis(math.radians(degrees), spatial_shape)


def shears(degrees: float, spatial_shape: Sequence[int]) -> list[float]:
    """Shear factors, one for each ordered pair of axes."""
    axes = len(spatial_shape)
    return [math.tan(math.radians(degrees))] * (axes * (axes - 1))


def voxels(published: float, spatial_shape: Sequence[int]) -> list[float]:
    """So many voxels of the published grid, along each axis."""
    return [size * published / PUBLISHED for size in spatial_shape]


def shares(share: float, spatial_shape: Sequence[int]) -> list[float]:
    """A share of each axis, in voxels."""
    return [size * share for size in spatial_shape]


def haircut(published: int, spatial_shape: Sequence[int]) -> tuple[int, int]:
    """From 1 voxel to so many of the published grid, at least 1."""
    return 1, max(1, round(published * min(spatial_shape) / PUBLISHED))


def blur(spatial_shape: Sequence[int]) -> tuple[float, float]:
    """Standard deviations in voxels: from 0.25 to 1 of the published grid, at least 0.5."""
    return 0.25, max(0.5, min(spatial_shape) / PUBLISHED)


def spikes(amplitudes: Sequence[float], spatial_shape: Sequence[int]) -> list[float]:
    """Logarithms of spikes in k-space that make stripes of these amplitudes, shares of the intensity range."""
    return [math.log(amplitude * math.prod(spatial_shape)) for amplitude in amplitudes]
