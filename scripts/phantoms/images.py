"""Phantom scans in memory: FLAIR- or T1-like brains of a random anatomy, lesions, and ellipsoids on filtered noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from scripts.phantoms.anatomy import Anatomy, brain_anatomy, near_ventricles, one_thread, random_streams
from scripts.phantoms.fields import EXTENT, ORIGIN, grid_points, sample_maps, smooth_fields
from scripts.phantoms.people import SITES, Cohort, Scanner, hyperintensities
from scripts.utils.command_line import check_integer, check_number
from scripts.utils.errors import InputError

# white-matter hyperintensities; hypointensities alike; a mass of normal intensity; local atrophy
KINDS = ("bright", "dark", "mass", "atrophy")
CHANGED = 0.4  # of a voxel's tissue: what a reader would outline of displaced or shrunken tissue
REACH = 2.6  # radii of a mass within which it displaces tissue


class Phantom(NamedTuple):
    """One phantom in memory.

    Attributes:
        image: int16 ``[X, Y, Z]``, RAS+, arbitrary units; in brains the background is 0 and the brain is at least 1.
        affine: float64 ``[4, 4]``, voxel indices to world millimetres.
        mask: uint8 ``[X, Y, Z]``, 1 in the lesions (of an ellipsoid phantom: in the ellipsoid).
    """

    image: np.ndarray
    affine: np.ndarray
    mask: np.ndarray


class Contrast(NamedTuple):
    """Signals of tissues, each uniform between two ends.

    Attributes:
        white: white matter's.
        gray, fluid: gray matter's and CSF's, over white matter's.
    """

    white: tuple[float, float]
    gray: tuple[float, float]
    fluid: tuple[float, float]

    def draw(self, rng: np.random.Generator) -> tuple[float, float, float]:
        """The signal of a scan's white matter, gray matter and CSF."""
        white = rng.uniform(*self.white)
        return white, white * rng.uniform(*self.gray), white * rng.uniform(*self.fluid)


CONTRASTS = {
    "FLAIR": Contrast((0.50, 0.60), (1.15, 1.4), (0.22, 0.42)),
    "T1w": Contrast((0.75, 0.85), (0.62, 0.74), (0.18, 0.30)),
}


def brain_phantom(
    index: int,
    seed: int = 0,
    spacing: float = 2.0,
    lesions: float = 0.0,
    lesion_kinds: str | Sequence[str] = ("bright",),
    cohort: Cohort | None = None,
    contrast: str = "FLAIR",
) -> Phantom:
    """One skull-stripped brain in ICBM152 space, as FLAIR or as T1w.

    CSF is dark; in FLAIR gray matter is somewhat brighter than white matter, in T1w it is darker. Lesions of one scan
    are of one kind:

    - ``bright``: white-matter hyperintensities, periventricular and deep, brighter than any tissue.
    - ``dark``: the same, between CSF and white matter.
    - ``mass``: tissue as bright as the brain's own that pushes the anatomy around it aside. The mask is of the mass and
      of displaced tissue where at least 0.4 of a voxel became another tissue.
    - ``atrophy``: tissue that has shrunk within some 3 cm, so that sulci or ventricles are wider there. The mask is
      where CSF fills at least 0.4 of a voxel more.

    The person and the scanner are the same whatever ``spacing``, ``lesions`` and ``lesion_kinds`` are, so a pair with
    and without lesions differs in the lesions alone. What age, sex and site change: :mod:`scripts.phantoms.people`.

    Args:
        index: number of the scan, 0 or more.
        seed: seed of the cohort, 0 or more.
        spacing: edge of a voxel in mm, between 0.5 and 16. The grid covers 196 x 232 x 188 mm, so 2 mm gives
            ``[99, 117, 95]`` and 1 mm ``[197, 233, 189]``.
        lesions: probability that a scan has lesions, 0 to 1.
        lesion_kinds: of which one is drawn, all being as likely.
        cohort: gives the phantom age, sex and site, with their effects; None: it has none.
        contrast: ``FLAIR`` or ``T1w``, of the same person.

    Raises:
        ValueError: an argument is outside the limits above.
    """
    kinds = check_brain_phantom(index, seed, spacing, lesions, lesion_kinds, cohort, contrast)
    kind = lesion_kind(index, seed, lesions, kinds)
    streams = random_streams(index, seed)
    person = cohort and cohort.person(streams.person)
    with one_thread():
        anatomy = brain_anatomy(index, seed, spacing, person)
        lesion = streams.lesions
        lesion.random()  # said whether there are any
        outlined = np.zeros(anatomy.brain.sum(), bool)
        if kind == "mass":
            anatomy, outlined = grow_mass(
                lesion, anatomy, partial(brain_anatomy, index, seed, spacing, person), spacing
            )
        elif kind == "atrophy":
            anatomy, outlined = shrink_tissue(lesion, anatomy, spacing)

        site = SITES["A"] if person is None else person.scanner
        white, gray, fluid = CONTRASTS[contrast].draw(streams.contrast)
        gray, fluid = gray * site.gray, fluid * site.fluid
        signal = np.array([fluid, gray, white], np.float32) @ anatomy.tissues
        # Iron, myelin and T2 differ from place to place within a tissue.
        local = smooth_fields(streams.contrast, 1, ((20.0, 0.03), (6.0, 0.03)))
        signal *= 1 + sample_maps(local, anatomy.atlas_points)[0]
        if person is not None:
            near, where = near_ventricles(anatomy, spacing), anatomy.atlas_points
            aged = hyperintensities(streams.hyperintensities, near, anatomy.tissues[2], where, person.aged)
            # what is bright in FLAIR is about as dark as gray matter in T1w
            signal += aged * ((1.35 if contrast == "FLAIR" else 1.0) * gray - signal)

        if kind in ("bright", "dark"):
            opacity = lesion_opacity(lesion, anatomy, spacing)
            brightest = max(white, gray)
            target = brightest * lesion.uniform(1.35, 1.8) if kind == "bright" else white * lesion.uniform(0.45, 0.7)
            signal += opacity * (target - signal)
            outlined = opacity >= 0.5
        mask = np.zeros(anatomy.brain.shape, np.uint8)
        mask[anatomy.brain] = outlined

        image = _measured(signal, anatomy.brain, streams.scanner, site, spacing, whole_grid=person is not None)
    return Phantom(image, _affine(spacing, ORIGIN), mask)


def _measured(
    signal: np.ndarray, brain: np.ndarray, rng: np.random.Generator, site: Scanner, spacing: float, whole_grid: bool
) -> np.ndarray:
    """What a scanner makes of the signal of the brain's voxels ``[N]``: bias field, blur, Rician noise, gain; int16.

    Args:
        signal: it is changed.
        brain: bool ``[X, Y, Z]``.
        rng: of the scanner.
        site: its scanner.
        spacing: edge of a voxel in mm.
        whole_grid: draw noise for every voxel of the grid, so that it is the same when the brain has another size.
    """
    # The bias field belongs to the scanner: it is sampled where the voxel is, not where it came from in the atlas.
    points = grid_points(np.argwhere(brain), spacing)
    bias = smooth_fields(rng, 1, ((45.0, 0.08),))
    signal *= np.exp(sample_maps(bias, points)[0] + site.bias / 2 * points[:, 1].numpy())
    if site.blur > 0:
        signal = _blurred(signal, brain, site.blur / spacing)
    noise = site.noise * rng.uniform(0.008, 0.025)
    drawn = rng.standard_normal((2, *(brain.shape if whole_grid else signal.shape)), dtype=np.float32)
    real, imaginary = noise * (drawn[:, brain] if whole_grid else drawn)
    signal = np.hypot(signal + real, imaginary)
    gain = 1000 * np.exp(rng.uniform(-0.7, 0.7))
    image = np.zeros(brain.shape, np.int16)
    # At least 1, so that the brain mask is what is not 0.
    image[brain] = np.clip(np.rint(gain * signal), 1, np.iinfo(np.int16).max)
    return image


def _blurred(signal: np.ndarray, brain: np.ndarray, sigma: float) -> np.ndarray:
    """The brain's voxels ``[N]`` after a Gaussian blur of so many voxels, of the brain alone."""
    volume, inside = np.zeros(brain.shape, np.float32), brain.astype(np.float32)
    volume[brain] = signal
    blurred, share = (ndimage.gaussian_filter(v, sigma)[brain] for v in (volume, inside))
    return blurred / share


def ellipsoid_phantom(index: int, seed: int = 0, size: int | Sequence[int] = 32, spacing: float = 2.0) -> Phantom:
    """One bright ellipsoid, randomly turned, sized and placed, on spatially filtered noise.

    Args:
        index: number of the phantom, 0 or more.
        seed: seed of the cohort, 0 or more.
        size: voxels along each axis, one number or three, each 4 or more.
        spacing: edge of a voxel in mm, more than 0. World zero is the centre of the grid.

    Raises:
        ValueError: an argument is outside the limits above.
    """
    shape = check_ellipsoid_phantom(index, seed, size, spacing)
    rng = np.random.default_rng([seed, index])
    radii = rng.uniform(0.15, 0.4, 3) * min(shape)
    centre = (np.array(shape) - 1) / 2 + rng.uniform(-0.08, 0.08, 3) * shape
    voxels = np.moveaxis(np.indices(shape, np.float32), 0, -1) - centre
    distance = np.linalg.norm(voxels @ Rotation.random(random_state=rng).as_matrix() / radii, axis=-1)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma=1.5)
    # An edge two voxels wide, as of voxels that the surface crosses.
    inside = np.clip((1 - distance) * radii.min() / 2 + 0.5, 0, 1)
    image = 300 + 60 * noise / noise.std() + inside * rng.uniform(400, 700)
    affine = _affine(spacing, -spacing * (np.array(shape) - 1) / 2)
    return Phantom(np.clip(np.rint(image), 0, None).astype(np.int16), affine, (inside >= 0.5).astype(np.uint8))


def check_brain_phantom(
    index: int,
    seed: int,
    spacing: float,
    lesions: float,
    lesion_kinds: str | Sequence[str],
    cohort: Cohort | None = None,
    contrast: str = "FLAIR",
) -> tuple[str, ...]:
    """Refuse invalid arguments of :py:func:`brain_phantom`; return the kinds of lesions, in their usual order."""
    check_integer("index", index, 0)
    check_integer("seed", seed, 0)
    check_number("spacing (mm)", spacing, 0.5, 16)
    if contrast not in CONTRASTS:
        raise InputError(f"contrast is {contrast!r}: choose one of {', '.join(CONTRASTS)}.")
    check_number("lesions (a probability)", lesions, 0, 1)
    if cohort is not None:
        cohort.check()
    given: Any = [lesion_kinds] if isinstance(lesion_kinds, str) else lesion_kinds
    if not isinstance(given, list | tuple) or not given or any(kind not in KINDS for kind in given):
        raise InputError(f"lesion_kinds is {lesion_kinds!r}: give one or more of {', '.join(KINDS)}.")
    return tuple(kind for kind in KINDS if kind in given)


def check_ellipsoid_phantom(index: int, seed: int, size: int | Sequence[int], spacing: float) -> tuple[int, ...]:
    """Refuse invalid arguments of :py:func:`ellipsoid_phantom`; return the shape that ``size`` stands for."""
    check_integer("index", index, 0)
    check_integer("seed", seed, 0)
    check_number("spacing (mm)", spacing, 1e-3, 1e3)
    shape: tuple[Any, ...] = tuple(size) if isinstance(size, list | tuple) else (size,) * 3
    if len(shape) != 3:
        raise InputError(f"size is {size!r}, but must be one whole number or three, the voxels along each axis.")
    for n in shape:
        check_integer("size", n, 4)
    return shape


def _affine(spacing: float, origin: np.ndarray) -> np.ndarray:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def lesion_kind(index: int, seed: int, lesions: float, kinds: Sequence[str]) -> str | None:
    """The kind of a phantom's lesions, one of ``kinds``; None for a healthy one."""
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
    from the brain. Tissue is displaced the less the farther away it is, and not at all at the surface of the brain;
    ``displaced`` makes the same brain with its points displaced, see :py:func:`scripts.phantoms.anatomy.brain_anatomy`.

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
