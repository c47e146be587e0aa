"""Phantom cohorts: synthetic scans to train on, test with and learn from, where no scans of people are at hand.

    python -m scripts.phantoms brains --output_dir phantoms --count 256
    python -m scripts.phantoms ellipsoids --output_dir ellipsoids --count 64 --size 32

``brains`` are FLAIR-like, skull-stripped and affine-aligned to ICBM152. Their anatomy is the ICBM152 2009a symmetric
tissue maps that the nilearn wheel ships, bent by a random diffeomorphism; contrast, bias field, noise and white-matter
hyperintensities are drawn per scan. ``ellipsoids`` are the simplest learnable stand-in: one randomly turned and sized
bright ellipsoid on filtered noise.

A phantom depends on its seed and its index alone, never on how many are made, in which order or by how many processes.
"""

from __future__ import annotations

import gzip
import json
import logging
import numbers
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import nilearn
import numpy as np
import torch
import torch.nn.functional as F
from joblib import delayed
from scipy import ndimage
from scipy.spatial.transform import Rotation

from scripts.utils.command_line import run
from scripts.utils.distributed import from_rank_zero
from scripts.utils.files import write_bytes, write_text
from scripts.utils.parallel import choose_workers, run_parallel

__all__ = ["Phantom", "brain_anatomy", "brain_phantom", "ellipsoid_phantom", "make_brains", "make_ellipsoids"]

logger = logging.getLogger(__name__)

# The field of view of the ICBM152 templates: first voxel centre, and millimetres from the first to the last one.
ORIGIN = np.array([-98.0, -134.0, -72.0])
EXTENT = np.array([196.0, 232.0, 188.0])
# Everything smooth (warps, bias, tissue variation) is drawn on this grid. It fits EXTENT exactly, and because it does
# not depend on the spacing asked for, a scan has the same anatomy at every spacing.
CONTROL_SPACING = 4.0
CONTROL_SHAPE = tuple(int(n) for n in EXTENT / CONTROL_SPACING + 1)  # 50, 59, 48

# Length scale (Gaussian sigma, mm) and standard deviation (mm along each axis) of the parts of the random warp: the
# shape of the head, of the lobes, of the gyri.
WARP_SCALES = ((36.0, 3.5), (15.0, 2.4), (7.0, 1.6))

MNI, SCANNER = 4, 1  # NIfTI codes: what the world coordinates of an affine refer to


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


class Anatomy(NamedTuple):
    """What the tissue of one brain is, before any scanner saw it.

    Attributes:
        brain: bool ``[X, Y, Z]``, the brain mask.
        tissues: float32 ``[3, N]``, fractions of CSF, gray and white matter in the brain's N voxels, in the order of
            ``brain.nonzero()``; they sum to 1.
        atlas_points: float32 ``[N, 3]``, where each voxel lies in the undeformed atlas, in ``grid_sample`` coordinates.
    """

    brain: np.ndarray
    tissues: np.ndarray
    atlas_points: torch.Tensor


class Atlas(NamedTuple):
    """The ICBM152 tissue maps made ready for one spacing, each float32 ``[1, C, x, y, z]`` over the field of view."""

    brain: torch.Tensor  # C = 1
    tissues: torch.Tensor  # C = 3: CSF, gray matter, white matter
    ventricle_pull: torch.Tensor  # C = 3: unit of velocity (mm) that widens the ventricles by up to about 1 mm
    near_ventricles: torch.Tensor  # C = 1: 1 at the ventricles' wall, falling to 1/e in 8 mm


def brain_phantom(index: int, seed: int = 0, spacing: float = 2.0, lesions: float = 0.0) -> Phantom:
    """One FLAIR-like, skull-stripped brain in ICBM152 space.

    CSF is dark, white matter in the middle, gray matter somewhat brighter, lesions (white-matter hyperintensities,
    periventricular and deep) brighter still. The anatomy is the same whatever ``spacing`` and ``lesions`` are, so a
    pair with and without lesions differs in the lesions alone.

    Args:
        index: number of the scan, 0 or more.
        seed: seed of the cohort, 0 or more.
        spacing: edge of a voxel in mm, between 0.5 and 16. The grid covers 196 x 232 x 188 mm, so 2 mm gives
            ``[99, 117, 95]`` and 1 mm ``[197, 233, 189]``.
        lesions: probability that a scan has lesions, 0 to 1.

    Raises:
        ValueError: an argument is outside what is said above.
    """
    _check_brains(index, seed, spacing, lesions)
    with _one_thread():
        anatomy = brain_anatomy(index, seed, spacing)
        _, contrast, scanner, lesion = _streams(index, seed)

        white = contrast.uniform(0.50, 0.60)
        gray = white * contrast.uniform(1.15, 1.4)
        fluid = white * contrast.uniform(0.22, 0.42)
        signal = np.array([fluid, gray, white], np.float32) @ anatomy.tissues
        # Iron, myelin and T2 differ from place to place within a tissue.
        local = _smooth_fields(contrast, 1, ((20.0, 0.03), (6.0, 0.03)))
        signal *= 1 + _sample(local, anatomy.atlas_points)[0]

        mask = np.zeros(anatomy.brain.shape, np.uint8)
        if lesion.random() < lesions:
            opacity = _lesion_opacity(lesion, anatomy, spacing)
            signal += opacity * (gray * lesion.uniform(1.35, 1.8) - signal)
            mask[anatomy.brain] = opacity >= 0.5

        # The bias field belongs to the scanner: it is sampled where the voxel is, not where it came from in the atlas.
        bias = _smooth_fields(scanner, 1, ((45.0, 0.08),))
        signal *= np.exp(_sample(bias, _grid_points(np.argwhere(anatomy.brain), spacing))[0])
        noise = scanner.uniform(0.008, 0.025)
        real, imaginary = noise * scanner.standard_normal((2, signal.size), dtype=np.float32)
        signal = np.hypot(signal + real, imaginary)
        gain = 1000 * np.exp(scanner.uniform(-0.7, 0.7))

        image = np.zeros(anatomy.brain.shape, np.int16)
        # At least 1, so that the brain mask is what is not 0.
        image[anatomy.brain] = np.clip(np.rint(gain * signal), 1, np.iinfo(np.int16).max)
    return Phantom(image, _affine(spacing, ORIGIN), mask)


def brain_anatomy(index: int, seed: int = 0, spacing: float = 2.0) -> Anatomy:
    """Brain mask and tissue fractions of :func:`brain_phantom` with the same arguments: the truth behind its image."""
    _check_brains(index, seed, spacing)
    with _one_thread():
        shape_stream = _streams(index, seed)[0]
        atlas = _atlas(_atlas_stride(spacing), spacing)

        # A stationary velocity, integrated by scaling and squaring: smooth, invertible, so no tissue folds or tears.
        velocity = _smooth_fields(shape_stream, 3, WARP_SCALES)
        atrophy = shape_stream.normal()  # one number widens ventricles and sulci together, as age does
        velocity += (1.0 + 1.5 * atrophy + 0.7 * shape_stream.normal()) * atlas.ventricle_pull
        half = torch.from_numpy(EXTENT / 2).float()
        control = _grid_points(np.indices(CONTROL_SHAPE).reshape(3, -1).T, CONTROL_SPACING)
        displacement = velocity / 2**4
        for _ in range(4):
            ahead = control + displacement.flatten(2)[0].T / half
            displacement = displacement + _sample(displacement, ahead).reshape(displacement.shape)

        shape = _brain_shape(spacing)
        linear, shift = _residual_affine(shape_stream)

        def to_atlas(points: torch.Tensor, moved_by: torch.Tensor) -> torch.Tensor:
            return ((points * half) @ linear.T + shift + moved_by) / half

        # Only voxels near the brain are worth the work, a third of the grid; 4 mm is enough to find them.
        step = int(CONTROL_SPACING) // _atlas_stride(spacing)
        coarse = atlas.brain[:, :, ::step, ::step, ::step].contiguous()
        near = torch.from_numpy(_sample(coarse, to_atlas(control, displacement.flatten(2)[0].T))[0] > 0.05)
        near = near.float().reshape(1, *CONTROL_SHAPE)
        near = F.max_pool3d(near, kernel_size=3, stride=1, padding=1)[0].numpy() > 0
        nearest = [np.rint(np.arange(n) * spacing / CONTROL_SPACING).astype(int) for n in shape]
        voxels = np.argwhere(near[np.ix_(*nearest)])
        points = _grid_points(voxels, spacing)
        moved = to_atlas(points, torch.from_numpy(_sample(displacement, points)).T)
        inside = _sample(atlas.brain, moved)[0] > 0.5
        moved = moved[torch.from_numpy(inside)]
        brain = np.zeros(shape, bool)
        brain[tuple(voxels[inside].T)] = True

        # Sulci and the cortex's thickness differ by more than a smooth warp can say: shift the tissues' log odds too.
        odds = _smooth_fields(shape_stream, 3, ((5.0, 0.35), (20.0, 0.25)))
        odds[:, 0] += 0.7 + 0.35 * atrophy
        tissues = _sample(atlas.tissues, moved) * np.exp(_sample(odds, moved))
        tissues /= tissues.sum(axis=0) + 1e-6
    return Anatomy(brain, tissues, moved)


def ellipsoid_phantom(index: int, seed: int = 0, size: int | Sequence[int] = 32, spacing: float = 2.0) -> Phantom:
    """One bright ellipsoid, randomly turned, sized and placed, on spatially filtered noise.

    Args:
        index: number of the phantom, 0 or more.
        seed: seed of the cohort, 0 or more.
        size: voxels along each axis, one number or three, each 4 or more.
        spacing: edge of a voxel in mm, more than 0. World zero is the centre of the grid.

    Raises:
        ValueError: an argument is outside what is said above.
    """
    shape = _check_ellipsoids(index, seed, size, spacing)
    rng = np.random.default_rng([seed, index])
    radii = rng.uniform(0.15, 0.4, 3) * min(shape)
    centre = (np.array(shape) - 1) / 2 + rng.uniform(-0.08, 0.08, 3) * shape
    voxels = np.moveaxis(np.indices(shape, np.float32), 0, -1) - centre
    distance = np.linalg.norm(voxels @ Rotation.random(random_state=rng).as_matrix() / radii, axis=-1)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma=1.5)
    # An edge two voxels wide: what a voxel that the surface crosses would measure.
    inside = np.clip((1 - distance) * radii.min() / 2 + 0.5, 0, 1)
    image = 300 + 60 * noise / noise.std() + inside * rng.uniform(400, 700)
    affine = _affine(spacing, -spacing * (np.array(shape) - 1) / 2)
    return Phantom(np.clip(np.rint(image), 0, None).astype(np.int16), affine, (inside >= 0.5).astype(np.uint8))


def make_brains(
    output_dir: str | os.PathLike,
    count: int,
    seed: int = 0,
    start: int = 1,
    spacing: float = 2.0,
    lesions: float = 0.0,
    mask_dir: str | os.PathLike | None = None,
    workers: int | None = None,
) -> str:
    """Write a cohort of FLAIR-like brains in ICBM152 space as ``sub-0001_FLAIR.nii.gz`` and so on.

    Safe to call again: scans that stand there are kept, an interrupted cohort is continued, a larger ``count`` adds
    scans. A folder that holds anything else is refused. Scans are written whole or not at all.

    Args:
        output_dir: folder for the scans, made if need be.
        count: how many scans, 1 or more.
        seed: seed of the cohort, 0 or more.
        start: number of the first scan, 0 or more.
        spacing: edge of a voxel in mm, between 0.5 and 16.
        lesions: probability that a scan has white-matter hyperintensities, 0 to 1. If it is more than 0, each scan
            gets a lesion mask, empty ones included.
        mask_dir: folder for the lesion masks, ``sub-0001_lesions.nii.gz`` and so on; ``<output_dir>_masks`` if not
            given. Apart from the scans, so that no pattern for scans matches a mask.
        workers: processes to use; as many as there are cores, fewer for a small cohort, if not given.

    Returns:
        ``output_dir``.

    Raises:
        ValueError: an argument is outside what is said above.
        NotADirectoryError: ``output_dir`` or ``mask_dir`` is a file.
        FileExistsError: ``output_dir`` holds scans that are not of this cohort.
    """
    _check_cohort(count, start, workers)
    _check_brains(start, seed, spacing, lesions)
    if mask_dir is None and lesions > 0:
        mask_dir = _beside(output_dir)
    recipe = {"kind": "brains", "seed": seed, "spacing": float(spacing), "lesions": float(lesions)}
    phantom = partial(brain_phantom, seed=seed, spacing=spacing, lesions=lesions)
    masks = ("lesions", mask_dir) if lesions > 0 else None
    return _make_cohort(phantom, recipe, output_dir, "FLAIR", masks, MNI, range(start, start + count), workers)


def ensure_cohort(dataset_dir: str | os.PathLike, phantom_dir: str | os.PathLike, count: int) -> str:
    """The data set of a run, after making the default one: ``count`` brains, if ``dataset_dir`` is ``phantom_dir``.

    Of several processes rank 0 makes them, and the others wait.
    """
    if dataset_dir != phantom_dir:
        return str(dataset_dir)
    return from_rank_zero(make_brains, phantom_dir, count)


def make_ellipsoids(
    output_dir: str | os.PathLike,
    count: int,
    seed: int = 0,
    start: int = 1,
    size: int | Sequence[int] = 32,
    spacing: float = 2.0,
    mask_dir: str | os.PathLike | None = None,
    workers: int | None = None,
) -> str:
    """Write a cohort of bright ellipsoids on filtered noise as ``sub-0001_ellipsoid.nii.gz`` and so on.

    Args:
        output_dir: folder for the phantoms, made if need be.
        count: how many phantoms, 1 or more.
        seed: seed of the cohort, 0 or more.
        start: number of the first phantom, 0 or more.
        size: voxels along each axis, one number or three, each 4 or more.
        spacing: edge of a voxel in mm, more than 0.
        mask_dir: folder for masks of the ellipsoids, ``sub-0001_mask.nii.gz`` and so on; none are written if not given.
        workers: processes to use; as many as there are cores, fewer for a small cohort, if not given.

    Returns and raises as :func:`make_brains` does.
    """
    _check_cohort(count, start, workers)
    shape = _check_ellipsoids(start, seed, size, spacing)
    recipe = {"kind": "ellipsoids", "seed": seed, "spacing": float(spacing), "size": list(shape)}
    phantom = partial(ellipsoid_phantom, seed=seed, size=shape, spacing=spacing)
    masks = ("mask", mask_dir) if mask_dir is not None else None
    return _make_cohort(phantom, recipe, output_dir, "ellipsoid", masks, SCANNER, range(start, start + count), workers)


# ---------------------------------------------------------------------------------------------------------- anatomy


@lru_cache(maxsize=2)
def _atlas(stride: int, spacing: float) -> Atlas:
    """The template's maps, low-passed for ``spacing`` and kept every ``stride`` mm. About 1 s, 140 MB at stride 1."""
    gray, white, t1 = (_template(name) for name in ("gm", "wm", "t1"))
    brain = (t1 > 0).astype(np.float32)
    fluid = np.clip(brain - gray - white, 0, 1)

    # The maps average 152 people; one person's tissue is purer than that.
    tissues = np.stack([fluid, gray, white])
    tissues *= np.sqrt(tissues)
    tissues /= np.maximum(tissues.sum(axis=0), 1e-6)
    tissues *= brain
    # A voxel of the spacing asked for sees a blur about as wide as itself (full width at half maximum).
    sigma = np.sqrt(max(spacing**2 - 1, 0)) / 2.355
    maps = [ndimage.gaussian_filter(m, sigma, truncate=3) if sigma else m for m in (brain, *tissues)]
    maps = torch.from_numpy(np.stack([m[::stride, ::stride, ::stride] for m in maps]))[None]

    coarse = int(CONTROL_SPACING)
    depth = ndimage.distance_transform_edt(brain[::coarse, ::coarse, ::coarse]) * CONTROL_SPACING
    ventricles = ndimage.gaussian_filter(fluid, 1.5)[::coarse, ::coarse, ::coarse] * (depth > 22)
    pull = np.stack(np.gradient(ndimage.gaussian_filter(ventricles, 1.5))).astype(np.float32)
    pull /= np.linalg.norm(pull, axis=0).max()
    distance = ndimage.distance_transform_edt(ventricles < 0.3) * CONTROL_SPACING
    near = np.exp(-distance / 8).astype(np.float32)
    return Atlas(
        maps[:, :1], maps[:, 1:].contiguous(), torch.from_numpy(pull)[None], torch.from_numpy(near)[None, None]
    )


def _template(name: str) -> np.ndarray:
    path = Path(nilearn.__file__).parent / "datasets" / "data" / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    if not path.is_file():
        raise FileNotFoundError(
            f"The ICBM152 tissue map {path.name} is not in the installed nilearn {nilearn.__version__}: "
            "install a version that ships it (0.14 does)."
        )
    return np.asarray(nib.load(path).dataobj, np.float32) / 255


def _atlas_stride(spacing: float) -> int:
    """A blurred map needs fewer samples; 1, 2 and 4 mm all fit the field of view exactly."""
    return 4 if spacing >= 8 else 2 if spacing >= 4 else 1


def _residual_affine(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """What affine registration leaves over: ``[3, 3]`` and a shift in mm."""
    turn = Rotation.from_rotvec(rng.normal(0, np.deg2rad(1.2), 3)).as_matrix()
    stretch = np.diag(np.exp(rng.normal(0, 0.02, 3)))
    return torch.from_numpy(turn @ stretch).float(), torch.from_numpy(rng.normal(0, 1.0, 3)).float()


def _smooth_fields(rng: np.random.Generator, channels: int, scales: tuple[tuple[float, float], ...]) -> torch.Tensor:
    """Gaussian random fields ``[1, channels, *CONTROL_SHAPE]``: a sum over (length scale in mm, standard deviation)."""
    noise = torch.from_numpy(rng.standard_normal((channels, *CONTROL_SHAPE), dtype=np.float32))
    spectrum = torch.fft.rfftn(noise, dim=(1, 2, 3)) * _spectrum(scales)
    return torch.fft.irfftn(spectrum, s=CONTROL_SHAPE, dim=(1, 2, 3))[None]


@lru_cache
def _spectrum(scales: tuple[tuple[float, float], ...]) -> torch.Tensor:
    """The filter that turns white noise into such a field, over the half spectrum of a real transform."""
    frequencies = np.meshgrid(*[np.fft.fftfreq(n, CONTROL_SPACING) for n in CONTROL_SHAPE], indexing="ij")
    squared = sum(f**2 for f in frequencies)
    gaussians = [(np.exp(-((2 * np.pi * scale) ** 2) * squared), deviation) for scale, deviation in scales]
    power = sum(deviation**2 * gaussian / gaussian.mean() for gaussian, deviation in gaussians)
    return torch.from_numpy(np.sqrt(power[..., : CONTROL_SHAPE[2] // 2 + 1])).float()


def _grid_points(voxels: np.ndarray, spacing: float) -> torch.Tensor:
    """Where voxel indices ``[N, 3]`` lie in the field of view, -1 to 1 along each axis."""
    return torch.from_numpy((voxels * (2 * spacing / EXTENT) - 1).astype(np.float32))


def _sample(maps: torch.Tensor, points: torch.Tensor) -> np.ndarray:
    """Read ``[1, C, x, y, z]`` maps of the field of view at ``[N, 3]`` points, -1 to 1 along each axis: ``[C, N]``."""
    grid = points.flip(-1)[None, None, None]
    # Border padding: the template ends in the brain stem, which goes on below it.
    return F.grid_sample(maps, grid, padding_mode="border", align_corners=True)[0, :, 0, 0].numpy()


def _lesion_opacity(rng: np.random.Generator, anatomy: Anatomy, spacing: float) -> np.ndarray:
    """How much of each brain voxel is lesion, ``[N]``, 0 to 1: blobs of a few ellipsoids in the white matter."""
    near = _sample(_atlas(_atlas_stride(spacing), spacing).near_ventricles, anatomy.atlas_points)[0]
    white = anatomy.tissues[2]
    # Most hyperintensities hug the ventricles; the rest lie in the deep white matter.
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
        # However coarse the grid, a lesion fills the voxel it was put in.
        opacity[tuple(centre)] = 1
    return opacity[anatomy.brain] * np.clip(2 * white, 0, 1)


def _streams(index: int, seed: int) -> list[np.random.Generator]:
    """Independent generators for anatomy, contrast, scanner and lesions: a draw more in one leaves the others alone."""
    return [np.random.default_rng(s) for s in np.random.SeedSequence([seed, index]).spawn(4)]


def _brain_shape(spacing: float) -> tuple[int, ...]:
    return tuple(int(n) for n in np.floor(EXTENT / spacing + 1e-6) + 1)


def _affine(spacing: float, origin: np.ndarray) -> np.ndarray:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = origin
    return affine


@contextmanager
def _one_thread():
    """Torch on one thread: processes share the cores, and sums come out the same however many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------------------------- cohort


def _make_cohort(
    phantom: Callable[[int], Phantom],
    recipe: dict[str, Any],
    output_dir: str | os.PathLike,
    suffix: str,
    masks: tuple[str, str | os.PathLike] | None,
    code: int,
    indices: range,
    workers: int | None,
) -> str:
    folder = _folder(output_dir, "output_dir")
    mask_suffix, mask_folder = (masks[0], _folder(masks[1], "mask_dir")) if masks else (None, None)
    if mask_folder is not None and mask_folder.resolve() == folder.resolve():
        raise ValueError(f"mask_dir is the folder of the scans, {folder}: give another, so that masks are never scans.")
    _claim(folder, recipe, indices, suffix)

    jobs = []
    for index in indices:
        image_path = folder / f"sub-{index:04d}_{suffix}.nii.gz"
        mask_path = mask_folder / f"sub-{index:04d}_{mask_suffix}.nii.gz" if mask_folder else None
        if not image_path.exists() or (mask_path and not mask_path.exists()):
            jobs.append(delayed(_write_phantom)(phantom, index, image_path, mask_path, code))
    if not jobs:
        logger.info("%s: all %d phantoms (%s) are there already.", folder, len(indices), recipe["kind"])
        return str(output_dir)

    logger.info("Making %d of %d phantoms (%s) in %s.", len(jobs), len(indices), recipe["kind"], folder)
    if mask_folder is not None:
        mask_folder.mkdir(parents=True, exist_ok=True)
    for _ in run_parallel(jobs, workers or choose_workers(len(jobs)), f"phantoms ({recipe['kind']})", in_order=False):
        pass
    return str(output_dir)


def _claim(folder: Path, recipe: dict[str, Any], indices: range, suffix: str) -> None:
    """Make the folder this cohort's own, or refuse it.

    ``phantoms.json`` says whose the folder is. It is written before the first scan: each scan appears whole, by a
    rename, so with the same recipe a scan that exists is right, and the cohort is complete when none is missing.
    """
    path = folder / "phantoms.json"
    request = {**recipe, "start": indices.start, "count": len(indices)}
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            start, end = found["start"], found["start"] + found["count"]
        except (ValueError, TypeError, KeyError):
            raise FileExistsError(
                f"output_dir {folder} has a phantoms.json that can't be read: give another."
            ) from None
        same = all(found.get(key) == value for key, value in recipe.items())
        if not same or start < indices.start or end > indices.stop:
            raise FileExistsError(
                f"output_dir {folder} holds another cohort of phantoms, {json.dumps(found)}, than the one asked for, "
                f"{json.dumps(request)}: give another output_dir, or remove that one."
            )
        if found == request:
            return
    elif folder.is_dir() and next(folder.rglob("*.nii*"), None) is not None:
        raise FileExistsError(
            f"output_dir {folder} holds scans but no phantoms.json: give a folder of its own for the phantoms, "
            "so that they never mix with other scans."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(request, indent=2) + "\n")


def _write_phantom(
    phantom: Callable[[int], Phantom], index: int, image_path: Path, mask_path: Path | None, code: int
) -> None:
    image, affine, mask = phantom(index)
    # The mask goes first: a scan that exists then has its mask.
    if mask_path is not None:
        write_bytes(mask_path, _nifti(mask, affine, code))
    write_bytes(image_path, _nifti(image, affine, code))


def _nifti(array: np.ndarray, affine: np.ndarray, code: int) -> bytes:
    nifti = nib.Nifti1Image(array, affine)
    nifti.set_sform(affine, code)
    nifti.set_qform(affine, code)
    nifti.header.set_xyzt_units("mm")
    # No time stamp: the same phantom is the same file, byte for byte.
    return gzip.compress(nifti.to_bytes(), compresslevel=1, mtime=0)


# ----------------------------------------------------------------------------------------------------------- checks


def _folder(path: str | os.PathLike, name: str) -> Path:
    folder = Path(str(path)).expanduser()
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(f"{name} is {path}, but {place} is a file: give the name of a folder.")
    return folder


def _beside(output_dir: str | os.PathLike) -> Path:
    folder = Path(str(output_dir)).expanduser().resolve()
    return folder.with_name(folder.name + "_masks")


def _check_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be a whole number, {least} or more.")


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, but must be a number from {least} to {most}.")


def _check_cohort(count: int, start: int, workers: int | None) -> None:
    _check_integer("count", count, 1)
    _check_integer("start", start, 0)
    if workers is not None:
        _check_integer("workers", workers, 1)


def _check_brains(index: int, seed: int, spacing: float, lesions: float = 0.0) -> None:
    _check_integer("index", index, 0)
    _check_integer("seed", seed, 0)
    _check_number("spacing (mm)", spacing, 0.5, 16)
    _check_number("lesions (a probability)", lesions, 0, 1)


def _check_ellipsoids(index: int, seed: int, size: int | Sequence[int], spacing: float) -> tuple[int, ...]:
    _check_integer("index", index, 0)
    _check_integer("seed", seed, 0)
    _check_number("spacing (mm)", spacing, 1e-3, 1e3)
    shape = tuple(size) if isinstance(size, list | tuple) else (size,) * 3
    if len(shape) != 3:
        raise ValueError(f"size is {size!r}, but must be one whole number or three, the voxels along each axis.")
    for n in shape:
        _check_integer("size", n, 4)
    return shape


# ----------------------------------------------------------------------------------------------------- command line


def main() -> None:
    """The command line of this module."""
    print(run("python -m scripts.phantoms", {"brains": make_brains, "ellipsoids": make_ellipsoids}))


if __name__ == "__main__":
    # Worker processes find functions by their module's name, which `python -m` hides behind __main__.
    from scripts import phantoms

    phantoms.main()
