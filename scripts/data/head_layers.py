"""Brain, skull and scalp of a head that lies in the template: where the brain ends, and whether the template fits it.

From the inside out a head is bright (brain), dark (skull, with the fluid beneath it in many contrasts) and bright again
(scalp). All is measured on voxels of 2 mm over the template's field of view.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import SimpleITK
from scipy import ndimage
from scripts.data.registration import Alignment, align, like, refine, smooth_for, template, template_brain

__all__ = ["ON_SCALP", "align_head", "brain_mask", "scalp_inside"]

SPACING = 2.0  # mm
# All distances are mm from the surface of the template's brain, those inside are below 0.
DEEP = -15.0  # where every aligned head has brain: says how bright that is
CORE, OUTSIDE = -6.0, 7.0  # what is brain, and what is not, whatever the scan shows
DARK = 0.25  # of the brain's intensity: what is darker at its edge is not brain
OPENING, CLOSING = 4.0, 6.0  # mm, of the mask: bridges to what is around it are cut, sulci are filled

ABOVE = 10.0  # mm above the middle of the template's coordinates: below are face and neck
NORMALS = 7  # every seventh voxel of the surface sends one out
STEPS = np.arange(-30.0, 21.0)  # along a normal
INSIDE, BEYOND = range(-18, 3), range(11)  # where a dark rim is looked for
DEPTH_INSIDE, DEPTH_BEYOND = 0.35, 0.25  # of the brain's intensity, by which it is darker than what is around it
ON_SCALP = 0.2  # share of the normals from which on the template is said to lie on the scalp
SCALP = 9.0  # mm: scalp, and most of the skull


def align_head(image: SimpleITK.Image, head: SimpleITK.Image) -> tuple[Alignment, float]:
    """Align a scan, and where the template comes to lie on a bright scalp, once more without scalp.

    Args:
        image: a scan of a whole head or of a brain, float32.
        head: uint8 on the grid of ``image``, 1 in the head or brain.

    Returns:
        The alignment, and its :func:`scalp_inside`.
    """
    found = align(image, head)
    share = scalp_inside(image, found.transform)
    if share <= ON_SCALP:
        return found, share
    depth = SimpleITK.SignedMaurerDistanceMap(head, squaredDistance=False, useImageSpacing=True)
    inner = SimpleITK.Cast(depth < -SCALP, SimpleITK.sitkUInt8)
    darkest = float(SimpleITK.GetArrayViewFromImage(image).min())
    again = refine(image, head, align(SimpleITK.Mask(image, inner, darkest), inner).transform)
    share_again = scalp_inside(image, again.transform)
    return (again, share_again) if share_again < share else (found, share)


def scalp_inside(image: SimpleITK.Image, transform: SimpleITK.Transform) -> float:
    """On which share of its upper surface the template's brain reaches the scalp instead of ending at the skull.

    There a dark rim with brightness on both of its sides lies within the template's brain, and none lies beyond it.
    Near 0 of a head that is aligned well, and of a skull-stripped scan.

    Args:
        image: a scan, float32.
        transform: maps points of the template to points of the scan (LPS, mm).
    """
    head = _on_template(image, transform)
    darkest, level = _brightness(head)
    if level <= 0:
        return 0.0
    points, normals = _surface()
    places = points[..., None] + normals[..., None] * STEPS / SPACING
    profiles = ndimage.map_coordinates(head, places, order=1, mode="nearest")
    profiles = np.minimum((profiles - darkest) / level, 1)
    inside, beyond = np.zeros(len(profiles), bool), np.zeros(len(profiles), bool)
    for place in INSIDE:
        around = np.minimum(_part(profiles, place + 1, place + 10).max(1), _median(profiles, place - 8, place - 3))
        inside |= around - _part(profiles, place, place)[:, 0] > DEPTH_INSIDE
    for place in BEYOND:
        outer = _part(profiles, place + 2, place + 10).max(1)
        beyond |= outer - _part(profiles, place, place)[:, 0] > DEPTH_BEYOND
    return float((inside & ~beyond).mean())


def brain_mask(image: SimpleITK.Image, transform: SimpleITK.Transform) -> SimpleITK.Image:
    """The brain of a head that is aligned to the template: uint8 on voxels of 2 mm over the template's field of view.

    A watershed between what is brain for certain and what lies 7 mm or more outside of the template's brain ends in
    the darkest rim between both, the skull. What is dark at the edge of that is taken away, thin bridges are cut, and
    sulci are filled.

    Args:
        image: a scan with its skull, float32.
        transform: maps points of the template to points of the scan (LPS, mm).
    """
    distance, grid = _distance(), _grid()
    head, core = _on_template(image, transform), _distance() < CORE
    darkest, level = _brightness(head)
    head = np.clip((head - darkest) / max(level, 1e-6), 0, 1)
    relief = SimpleITK.GetImageFromArray((1000 * (1 - ndimage.gaussian_filter(head, 1 / SPACING))).astype(np.uint16))
    marked = SimpleITK.GetImageFromArray(np.where(core, 1, np.where(distance > OUTSIDE, 2, 0)).astype(np.uint8))
    basins = SimpleITK.MorphologicalWatershedFromMarkers(relief, marked, markWatershedLine=False)
    basin = SimpleITK.GetArrayFromImage(basins) == 1
    parts, _ = ndimage.label(_eroded(basin & (head > DARK) | core, OPENING))
    brain = parts == np.bincount(parts[core & (parts > 0)]).argmax()
    brain = ~_eroded(~brain, OPENING) & basin
    brain |= _eroded(~_eroded(~brain, CLOSING), CLOSING)
    return like(ndimage.binary_fill_holes(brain).astype(np.uint8), grid)


def _on_template(image: SimpleITK.Image, transform: SimpleITK.Transform) -> np.ndarray:
    """A scan on voxels of 2 mm over the template's field of view, ``[z, y, x]``, 0 outside of its own."""
    return SimpleITK.GetArrayFromImage(
        SimpleITK.Resample(smooth_for(image, SPACING), _grid(), transform, SimpleITK.sitkLinear, 0.0)
    )


def _brightness(head: np.ndarray) -> tuple[float, float]:
    """The intensity of air, and how much brighter the brain is: most of it, so that dark tissue does not count."""
    darkest = float(np.percentile(head, 1))
    return darkest, float(np.median(head[_distance() < DEEP])) - darkest


def _eroded(mask: np.ndarray, radius: float) -> np.ndarray:
    """What of a mask lies more than ``radius`` mm within it; its complement's is the mask grown by as much."""
    return ndimage.distance_transform_edt(mask) * SPACING > radius


def _part(profiles: np.ndarray, first: int, last: int) -> np.ndarray:
    """What profiles are from one distance to another, ``[normals, steps]``."""
    return profiles[:, first - int(STEPS[0]) : last - int(STEPS[0]) + 1]


def _median(profiles: np.ndarray, first: int, last: int) -> np.ndarray:
    return np.median(_part(profiles, first, last), axis=1)


@lru_cache(maxsize=1)
def _grid() -> SimpleITK.Image:
    """Voxels of 2 mm over the template's field of view."""
    step = int(SPACING)
    return template()[::step, ::step, ::step]


@lru_cache(maxsize=1)
def _distance() -> np.ndarray:
    """How far each voxel lies outside of the template's brain, mm; below 0 inside; ``[z, y, x]``."""
    step = int(SPACING)
    distance = SimpleITK.SignedMaurerDistanceMap(template_brain(), squaredDistance=False, useImageSpacing=True)
    return SimpleITK.GetArrayFromImage(distance[::step, ::step, ::step])


@lru_cache(maxsize=1)
def _surface() -> tuple[np.ndarray, np.ndarray]:
    """Voxels of the upper surface of the template's brain and the normals there, outwards: ``[3, N]`` each, z y x."""
    distance = _distance()
    height = np.arange(len(distance)) * SPACING + template().GetOrigin()[2]
    points = np.argwhere((np.abs(distance) < SPACING / 2) & (height > ABOVE)[:, None, None])[::NORMALS].T
    slope = np.stack(np.gradient(ndimage.gaussian_filter(distance, 4 / SPACING)))[(slice(None), *points)]
    return points.astype(float), slope / np.linalg.norm(slope, axis=0)
