"""Lesions of phantom brains, of kinds that intensity finds and of kinds that it cannot find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from scripts.phantoms.anatomy import Anatomy, near_ventricles, random_streams
from scripts.phantoms.fields import EXTENT
from scripts.utils.errors import InputError

__all__ = ["KINDS", "check_kinds", "grow_mass", "lesion_kind", "lesion_opacity", "shrink_tissue"]

# white-matter hyperintensities; hypointensities alike; a mass of normal intensity; local atrophy
KINDS = ("bright", "dark", "mass", "atrophy")

CHANGED = 0.4  # of a voxel's tissue: what a reader would outline of displaced or shrunken tissue
REACH = 2.6  # radii of a mass within which it displaces tissue


def check_kinds(kinds: str | Sequence[str]) -> tuple[str, ...]:
    """Kinds of lesions in their usual order.

    Args:
        kinds: some of ``KINDS``, or one.

    Raises:
        ValueError: there are none, or others.
    """
    given: Any = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(given, list | tuple) or not given or any(kind not in KINDS for kind in given):
        raise InputError(f"lesion_kinds is {kinds!r}: give one or more of {', '.join(KINDS)}.")
    return tuple(kind for kind in KINDS if kind in given)


def lesion_kind(index: int, seed: int, lesions: float, kinds: Sequence[str]) -> str | None:
    """The kind of a phantom's lesions; None for a healthy one.

    Args:
        index, seed: of the phantom.
        lesions: probability of lesions.
        kinds: one of these is drawn, all being as likely.
    """
    streams = random_streams(index, seed)
    return str(streams.kind.choice(kinds)) if streams.lesions.random() < lesions else None


def lesion_opacity(rng: np.random.Generator, anatomy: Anatomy, spacing: float) -> np.ndarray:
    """How much of each brain voxel is lesion, ``[N]``, 0 to 1: blobs of a few ellipsoids in the white matter."""
    near = near_ventricles(anatomy, spacing)
    white = anatomy.tissues[2]
    # Most white-matter lesions lie beside the ventricles; the rest lie in the deep white matter.
    likely = np.cumsum(white**4 * (near**2 + 0.05 * near**0.5), dtype=np.float64)
    voxels = np.argwhere(anatomy.brain)
    opacity = np.zeros(anatomy.brain.shape, np.float32)
    for _ in range(1 + rng.poisson(rng.uniform(3, 18))):
        centre = voxels[np.searchsorted(likely, rng.random() * likely[-1])]
        size = min(np.exp(rng.normal(np.log(2.8), 0.45)), 8.0)
        for _ in range(rng.integers(1, 4)):
            radii = size * rng.uniform(0.6, 1.4, 3)
            turn = Rotation.random(random_state=rng).as_matrix()
            offset = rng.normal(0, 0.7 * size, 3)
            window = tuple(
                slice(max(int(c - (4 * size / spacing + 1)), 0), int(c + 4 * size / spacing + 2)) for c in centre
            )
            first = np.array([w.start for w in window])
            grid = np.moveaxis(np.indices(opacity[window].shape), 0, -1) + (first - centre)
            distance = np.linalg.norm((grid * spacing - offset) @ turn / radii, axis=-1)
            opacity[window] = np.maximum(opacity[window], np.clip(1.5 - distance, 0, 1))
        # On any grid a lesion fills at least the voxel at its centre.
        opacity[tuple(centre)] = 1
    return opacity[anatomy.brain] * np.clip(2 * white, 0, 1)


def grow_mass(
    rng: np.random.Generator, anatomy: Anatomy, displaced: Callable[[Callable], Anatomy], spacing: float
) -> tuple[Anatomy, np.ndarray]:
    """Put a mass of normal tissue into the white matter, which pushes what is around it aside.

    It is an ellipsoid of some 9 to 18 mm radius, a mixture of gray and white matter, which contrast alone does not tell
    from the brain. Tissue is displaced the less the farther away it is, and not at all at the surface of the brain.

    Args:
        rng: where the mass's place, size and tissue come from.
        anatomy: the brain without it.
        displaced: makes the same brain with its points displaced, see
            :py:func:`scripts.phantoms.anatomy.brain_anatomy`.
        spacing: edge of a voxel in mm.

    Returns:
        The brain with it, and what a reader would outline, bool ``[N]``: the mass, and the displaced tissue around it
        where at least 0.4 of a voxel is another tissue than before.
    """
    voxels = np.argwhere(anatomy.brain)
    depth = _depth(anatomy, spacing)
    centre, most = _choose(rng, voxels, anatomy.tissues[2] ** 4 * (depth > min(28.0, 0.8 * depth.max())), depth)
    radii = min(rng.uniform(11, 16), most / REACH) * rng.uniform(0.85, 1.15, 3)
    turn = Rotation.random(random_state=rng).as_matrix()
    share = rng.uniform(0.3, 0.7)
    to_ball = torch.from_numpy(turn / radii).float()
    half, middle = (torch.from_numpy(v).float() for v in (EXTENT / 2, centre * spacing - EXTENT / 2))

    def pull(points: torch.Tensor) -> torch.Tensor:
        """From where in the brain without the mass the tissue at these points comes."""
        offset = points * half - middle
        distance = torch.linalg.norm(offset @ to_ball, dim=1, keepdim=True).clamp_min(1e-3)
        # what was within 0.3 radii lies at the mass's surface now
        moved = 0.7 * ((REACH - distance).clamp_min(0) / (REACH - 1)).square()
        return points - offset / half * (moved / distance).clamp_max(0.7)

    pushed = displaced(pull)
    distance = np.linalg.norm((voxels - centre) * spacing @ turn / radii, axis=1)
    opacity = np.clip((1 - distance) * radii.mean() / max(spacing, 2.0) + 0.5, 0, 1).astype(np.float32)
    mass = np.array([0, share, 1 - share], np.float32)[:, None]
    tissues = pushed.tissues + opacity * (mass - pushed.tissues)
    changed = np.abs(tissues - anatomy.tissues).max(0) >= CHANGED
    return pushed._replace(tissues=tissues), (opacity >= 0.5) | (changed & (distance < REACH))


def shrink_tissue(rng: np.random.Generator, anatomy: Anatomy, spacing: float) -> tuple[Anatomy, np.ndarray]:
    """Local atrophy: within some 3 cm tissue gives way to CSF where sulci or ventricles border on it.

    Args:
        rng: where its place and size come from.
        anatomy: the brain without it.
        spacing: edge of a voxel in mm.

    Returns:
        The brain with it, and what a reader would outline, bool ``[N]``: where CSF fills at least 0.4 of a voxel more
        than before.
    """
    voxels = np.argwhere(anatomy.brain)
    fluid, gray, _ = anatomy.tissues
    centre, _ = _choose(rng, voxels, gray**2, _depth(anatomy, spacing))
    radius = rng.uniform(18, 30)
    distance = np.linalg.norm((voxels - centre) * spacing, axis=1) / radius
    odds = rng.uniform(3.0, 4.0) * np.exp(-(distance**4))
    tissues = anatomy.tissues * np.stack([np.exp(odds), np.ones_like(odds), np.ones_like(odds)])
    tissues = (tissues / (tissues.sum(0) + 1e-6)).astype(np.float32)
    gained = tissues[0] - fluid
    return anatomy._replace(tissues=tissues), gained >= min(CHANGED, gained.max())


def _depth(anatomy: Anatomy, spacing: float) -> np.ndarray:
    """How far below the brain's surface each of its voxels lies, ``[N]``, mm."""
    return ndimage.distance_transform_edt(anatomy.brain)[anatomy.brain] * spacing


def _choose(
    rng: np.random.Generator, voxels: np.ndarray, weights: np.ndarray, depth: np.ndarray
) -> tuple[np.ndarray, float]:
    """Draw one of the brain's voxels: its indices, and its depth in mm."""
    likely = np.cumsum(weights, dtype=np.float64)
    number = np.searchsorted(likely, rng.random() * likely[-1])
    return voxels[number], float(depth[number])
