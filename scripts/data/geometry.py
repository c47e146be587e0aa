"""Where a scan's voxels lie in the world: what its header says, and whether that is what is expected."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing, to_affine_nd
from monai.utils import ensure_tuple, ensure_tuple_rep
from nibabel.orientations import aff2axcodes, io_orientation

from scripts.utils.formats import NIFTI_SUFFIXES

__all__ = [
    "HeaderError",
    "describe",
    "differences",
    "header_problems",
    "mixed_voxel_sizes",
    "usual_voxel_size",
    "world_axes",
]

TOLERANCE = 0.02  # relative: scanners write 0.9375 as 0.94


class HeaderError(ValueError):
    """A header that cannot be true; the message continues a sentence that begins with the file's name."""


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


def header_problems(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """What the headers of a scan's NIfTI files do not say, or contradict. Other formats have one affine, always.

    Args:
        paths: the file, or one for each channel.

    Returns:
        Half sentences, for people.

    Raises:
        HeaderError: when the affine is singular, or the voxels are complex numbers.
    """
    problems = []
    for path in map(Path, ensure_tuple(paths)):
        if not path.name.endswith(NIFTI_SUFFIXES):
            continue
        image = nib.load(path)
        # MONAI's reader replaces a singular affine, and drops imaginary parts, with no more than a warning
        if not np.isfinite(image.affine).all() or np.linalg.matrix_rank(image.affine[:3, :3]) < 3:
            raise HeaderError("has a singular affine in its header, so its voxel size is unknown")
        if np.issubdtype(image.get_data_dtype(), np.complexfloating):
            raise HeaderError("holds complex numbers, of which only the real part would be read")
        zooms = image.header.get_zooms()[:3]
        sform, qform = (matrix for matrix, _ in (image.get_sform(coded=True), image.get_qform(coded=True)))
        if sform is None and qform is None:
            problems.append("its header has neither an sform nor a qform, so its orientation and place are guesses")
        elif sform is not None and qform is not None:
            corners = np.indices((2, 2, 2)).reshape(3, -1) * (np.array((*image.shape, 1, 1)[:3])[:, None] - 1)
            corners = np.vstack([corners, np.ones(8)])
            apart = float(np.linalg.norm((sform - qform) @ corners, axis=0).max())
            if apart > 0.5 * affine_to_spacing(sform).min():
                # MONAI's reader takes the one whose voxel size the header has too
                used, other = ("sform", "qform") if _same_size(sform, zooms) else ("qform", "sform")
                problems.append(f"its {used} (which is used) and its {other} disagree by up to {apart:.3g} mm")
        elif sform is not None and not _same_size(sform, zooms):
            problems.append("its sform is not used, since its voxel size contradicts the header's (pixdim)")
    return problems


def _same_size(affine: np.ndarray, zooms: Sequence[float]) -> bool:
    return np.allclose(affine_to_spacing(affine)[: len(zooms)], zooms)


def differences(
    geometry: dict[str, Any],
    spacing: Sequence[float] | float | None = None,
    field_of_view: Sequence[float] | float | None = None,
    orientation: str | None = None,
    tolerance: float = TOLERANCE,
) -> list[str]:
    """Say where a scan's geometry is not what is expected. What is None is not compared.

    Args:
        geometry: of the scan, see :py:func:`describe`.
        spacing: the voxel size in mm along each axis (right, anterior, superior), or one for all.
        field_of_view: the extent of the scan in mm, likewise.
        orientation: of the stored axes, such as ``RAS``.
        tolerance: the relative difference of sizes that still counts as equal.

    Returns:
        Half sentences, for people.
    """
    found = []
    for name, expected in (("spacing", spacing), ("field_of_view", field_of_view)):
        actual = geometry[name]
        if expected is not None:
            expected = ensure_tuple_rep(expected, len(actual))
            if not np.allclose(actual, expected, rtol=tolerance, atol=0):
                what = "voxels" if name == "spacing" else "a field of view"
                found.append(f"it has {what} of {_millimetres(actual)} where {_millimetres(expected)} are expected")
    if orientation is not None and geometry["orientation"] != orientation:
        found.append(f"its axes are stored as {geometry['orientation']} where {orientation} is expected")
    return found


def usual_voxel_size(geometries: Sequence[dict[str, Any]]) -> list[float]:
    """The voxel size (right, anterior, superior; mm) that most scans of a cohort have."""
    sizes = Counter(tuple(np.round(geometry["spacing"], 3)) for geometry in geometries)
    return list(max(sizes, key=lambda size: (sizes[size], size)))


def mixed_voxel_sizes(geometries: Sequence[dict[str, Any]], tolerance: float = TOLERANCE) -> list[int]:
    """Indices of the scans whose voxels differ from those that most of the cohort has."""
    if not geometries:
        return []
    usual = usual_voxel_size(geometries)
    return [i for i, geometry in enumerate(geometries) if differences(geometry, spacing=usual, tolerance=tolerance)]


def _millimetres(sizes: Sequence[float]) -> str:
    return "×".join(f"{size:.4g}" for size in sizes) + " mm"
