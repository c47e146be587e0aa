"""Volumes and masks between the page and the network: NIfTI and PNG for the page, painted voxels from it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.image import imsave
from scripts.utils.errors import InputError
from scripts.utils.formats import nifti_bytes
from scripts.utils.sheets import PLANES, as_array, middle, plane
from torch import Tensor

__all__ = ["painted", "picture", "volume"]


def volume(image: Tensor, affine: Any) -> bytes:
    """A volume ``[*spatial]`` as the bytes of a ``.nii.gz``; one of 2D becomes a single slice."""
    array = as_array(image)
    return nifti_bytes(array if array.ndim == 3 else array[..., None], np.asarray(affine, np.float64), "aligned", 1)


def picture(image: Tensor) -> bytes:
    """The axial slice through the middle of a scan ``[*spatial]``, from 0 to 1, as the bytes of a PNG."""
    array = as_array(image)
    _, axis = PLANES[array.ndim][0]
    shown = plane(array, axis, 0 if axis is None else middle(array)[axis])
    buffer = io.BytesIO()
    imsave(buffer, shown, cmap="gray", vmin=0.0, vmax=1.0, format="png")
    return buffer.getvalue()


def painted(runs: Any, shape: Sequence[int]) -> Tensor:
    """A mask that was painted on a volume, bool ``[*shape]``.

    Args:
        runs: ``[start, length, start, length, ...]`` of painted voxels, in the order of a NIfTI file: the first axis
            fastest.
        shape: of the volume.

    Raises:
        ValueError: they are not such, or paint nothing or everything.
    """
    size = int(np.prod(shape))
    whole = isinstance(runs, Sequence) and all(type(value) is int for value in runs) and len(runs) % 2 == 0
    pairs = list(zip(runs[::2], runs[1::2], strict=True)) if whole else [(-1, 0)]
    if any(start < 0 or length < 1 or start + length > size for start, length in pairs):
        raise InputError(f"mask must be whole numbers, [start, length, ...], that lie in the scan's {size} voxels.")
    mask = np.zeros(size, bool)
    for start, length in pairs:
        mask[start : start + length] = True
    if not mask.any():
        raise InputError("Nothing is painted: paint what is to be filled in first.")
    if mask.all():
        raise InputError("Everything is painted: leave some of the scan, from which the rest can be filled in.")
    return torch.from_numpy(mask.reshape(tuple(shape), order="F").copy())
