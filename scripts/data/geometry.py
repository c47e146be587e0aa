"""Where a scan's voxels lie in the world: what its header says, and whether that is what is expected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing, to_affine_nd
from monai.utils import ensure_tuple
from nibabel.orientations import aff2axcodes, io_orientation
from scripts.utils.errors import InputError

TOLERANCE = 0.02  # relative: scanners write 0.9375 as 0.94
FOREGROUND_VOXELS = 250_000  # of a scan, about, in which its foreground is looked for: every third of 190 a side


def world_axes(affine: np.ndarray) -> np.ndarray:
    """The signed permutation nearest to an affine: which axis of the world each stored axis runs along, and which way.

    Args:
        affine: ``[rank + 1, rank + 1]``, voxel indices to world millimetres.

    Returns:
        ``[rank, rank]``, of 0, 1 and -1; one entry per column, which is a stored axis.
    """
    rank = len(affine) - 1
    axes = np.zeros((rank, rank))
    for stored, (world, sign) in enumerate(io_orientation(affine)):
        axes[int(world), stored] = sign
    return axes


def describe(image: MetaTensor) -> dict[str, Any]:
    """The geometry of a loaded scan, as plain numbers and strings.

    Args:
        image: ``[channels, *spatial]`` as it was stored, with its affine.

    Returns:
        ``spacing`` and ``field_of_view`` in mm along the world's axes (right, anterior, superior), ``shape`` and
        ``orientation`` of the stored axes (such as ``LPS``), ``oblique``, the largest angle in degrees between a stored
        axis and the world's axis nearest to it, and ``affine``.
    """
    rank = image.ndim - 1
    affine = to_affine_nd(rank, image.affine.numpy().astype(float))
    axes = world_axes(affine)
    spacing = affine_to_spacing(affine, r=rank)
    cosines = (affine[:rank, :rank] / spacing * axes).sum(axis=0)
    shape = np.array(image.shape[1:])
    return {
        "spacing": (np.abs(axes) @ spacing).round(6).tolist(),
        "field_of_view": (np.abs(axes) @ (spacing * shape)).round(4).tolist(),
        "shape": shape.tolist(),
        "orientation": "".join(aff2axcodes(to_affine_nd(3, affine))[:rank]),
        "oblique": round(float(np.degrees(np.arccos(np.clip(cosines, -1, 1)).max())), 3),
        "affine": affine.tolist(),
    }


def grid_box(affine: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The box that a grid's voxels fill: its centre in the world, and its size along the stored axes, in mm."""
    rank, shape = len(shape), np.array(shape)
    return affine[:rank, :rank] @ ((shape - 1) / 2) + affine[:rank, rank], shape * affine_to_spacing(affine, r=rank)


def box_margins(image: MetaTensor, box: Sequence[Sequence[float]]) -> np.ndarray:
    """How many voxels a box of the world reaches beyond an image before and after each of its axes, ``[2, rank]``.

    Args:
        image: ``[channels, *spatial]`` with its affine.
        box: its centre and size along the axes of the world, in mm.
    """
    shape = np.array(image.shape[1:])
    rank = len(shape)
    to_voxels = np.linalg.inv(to_affine_nd(rank, image.affine.numpy().astype(float)))
    centre, size = (np.array(values[:rank]) for values in box)
    centre, half = to_voxels[:rank, :rank] @ centre + to_voxels[:rank, rank], np.abs(to_voxels[:rank, :rank]) @ size / 2
    beyond = np.stack([half - centre - 0.5, centre + half - shape + 0.5])
    return np.ceil(beyond - 1e-3).clip(0).astype(int)


def foreground_extent(image: MetaTensor, affine: np.ndarray, axes: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """How large (mm) a box about ``centre``, along the world's axes, holds all above 5 % of the brightest voxel."""
    step = 3  # every third voxel is enough, with three voxels' margin
    rank = len(centre)
    pixels = image.as_tensor().amax(0).cpu().numpy()
    voxels = step * np.argwhere(pixels[(slice(None, None, step),) * rank] > 0.05 * pixels.max())
    if not len(voxels):
        return np.zeros(rank)
    world = voxels @ affine[:rank, :rank].T + affine[:rank, rank] - centre
    margin = step * affine_to_spacing(affine, r=rank).max()
    return 2 * (np.abs(world @ axes).max(axis=0) + margin)


def foreground_place(image: MetaTensor) -> dict[str, list[float]] | None:
    """Where the foreground of a scan lies in the world: the voxels above their channel's mean, of any channel.

    Args:
        image: ``[channels, *spatial]`` with its affine.

    Returns:
        ``centre``, the mean of the voxels' places, and ``lower`` and ``upper``, between which all but a thousandth of
        them lie along each axis of the world (right, anterior, superior; mm). None for a scan of one value.
    """
    rank = image.ndim - 1
    affine = to_affine_nd(rank, image.affine.numpy().astype(float))
    pixels = image.as_tensor()
    step = max(1, round((pixels[0].numel() / FOREGROUND_VOXELS) ** (1 / rank)))
    pixels = pixels[(slice(None), *[slice(None, None, step)] * rank)].float()
    above = pixels > pixels.flatten(1).mean(1).reshape(-1, *[1] * rank)
    voxels = step * above.any(0).nonzero().numpy()
    if not len(voxels):
        return None
    places = voxels @ affine[:rank, :rank].T + affine[:rank, rank]
    lower, upper = np.quantile(places, (0.0005, 0.9995), axis=0)
    return {name: v.round(4).tolist() for name, v in (("centre", places.mean(0)), ("lower", lower), ("upper", upper))}


def fill_outside(image: MetaTensor, affine: np.ndarray, shape: Sequence[int], values: Sequence[float]) -> MetaTensor:
    """Give the voxels of an image whose centres lie outside of a grid's voxels a value.

    Args:
        image: ``[channels, *spatial]`` with its affine; it is changed.
        affine, shape: of the grid.
        values: one per channel.
    """
    rank = image.ndim - 1
    to_grid = np.linalg.inv(to_affine_nd(rank, affine)) @ to_affine_nd(rank, image.affine.numpy().astype(float))
    indices = np.ogrid[tuple(slice(size) for size in image.shape[1:])]
    outside = np.zeros((1,) * rank, bool)
    for row, size in zip(to_grid[:rank], shape, strict=True):
        # where the axes are parallel, which is nearly always, this is one line of numbers
        place = sum(step * index for step, index in zip(row, indices, strict=False) if step) + row[rank]
        outside = outside | (place < -0.5 - 1e-3) | (place > size - 0.5 + 1e-3)
    if outside.any():
        outside = torch.from_numpy(np.broadcast_to(outside, image.shape[1:]).copy()).to(image.device)
        for channel, value in zip(image.as_tensor(), values, strict=True):
            channel[outside] = value
    return image


def per_axis(name: str, sizes: Sequence[float] | float, rank: int) -> tuple[float, ...]:
    """A number for each of a scan's ``rank`` axes: ``sizes`` is one of each, or one for all.

    Raises:
        ValueError: there are neither one nor ``rank``; the sentence calls the setting ``name``.
    """
    numbers = ensure_tuple(sizes)
    if len(numbers) not in (1, rank):
        raise InputError(f"{name} is {sizes!r}, but scans have {rank} axes: give one number per axis, or one for all.")
    return numbers if len(numbers) == rank else numbers * rank


def differences(
    geometry: dict[str, Any],
    spacing: Sequence[float] | float | None = None,
    field_of_view: Sequence[float] | float | None = None,
    orientation: str | None = None,
) -> list[str]:
    """Say where a scan's geometry is not what is expected. What is None is not compared.

    Args:
        geometry: of the scan, see :py:func:`describe`.
        spacing: the voxel size in mm along each axis (right, anterior, superior), or one for all.
        field_of_view: the extent of the scan in mm, likewise.
        orientation: of the stored axes, such as ``RAS``.

    Returns:
        Half sentences, for people.

    Raises:
        ValueError: what is expected has another number of axes than the scan.
    """
    found = []
    for name, expected in (("spacing", spacing), ("field_of_view", field_of_view)):
        actual = geometry[name]
        if expected is not None:
            expected = per_axis(f"expected_{name}", expected, len(actual))
            if not np.allclose(actual, expected, rtol=TOLERANCE, atol=0):
                what = "voxels" if name == "spacing" else "a field of view"
                found.append(f"it has {what} of {_millimetres(actual)} where {_millimetres(expected)} are expected")
    if orientation is not None and geometry["orientation"] != orientation:
        found.append(f"its axes are stored as {geometry['orientation']} where {orientation} is expected")
    return found


def usual_voxel_size(geometries: Sequence[dict[str, Any]]) -> list[float]:
    """The voxel size (right, anterior, superior; mm) that most scans of a cohort have."""
    sizes = Counter(tuple(np.round(geometry["spacing"], 3)) for geometry in geometries)
    return list(max(sizes, key=lambda size: (sizes[size], size)))


def mixed_voxel_sizes(geometries: Sequence[dict[str, Any]]) -> list[int]:
    """Indices of the scans whose voxels differ from those that most of the cohort has."""
    if not geometries:
        return []
    usual = usual_voxel_size(geometries)
    return [i for i, geometry in enumerate(geometries) if differences(geometry, spacing=usual)]


def _millimetres(sizes: Sequence[float]) -> str:
    return "×".join(f"{size:.4g}" for size in sizes) + " mm"
