"""The anatomy of phantom brains: the ICBM152 2009a symmetric tissue maps, bent by a random diffeomorphism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial.transform import Rotation
from scripts.phantoms.fields import CONTROL_SHAPE, CONTROL_SPACING, EXTENT, grid_points, sample_maps, smooth_fields
from scripts.phantoms.people import Person

# Length scale (Gaussian sigma, mm) and standard deviation (mm along each axis) of the parts of the random warp: the
# shape of the head, of the lobes, of the gyri.
WARP_SCALES = ((36.0, 3.5), (15.0, 2.4), (7.0, 1.6))


class Anatomy(NamedTuple):
    """The tissue of one brain, before any scanner has measured it.

    Attributes:
        brain: bool ``[X, Y, Z]``, the brain mask.
        tissues: float32 ``[3, N]``, fractions of CSF, gray and white matter in the brain's N voxels, in the order of
            ``brain.nonzero()``; they sum to 1.
        atlas_points: float32 ``[N, 3]``, where each voxel lies in the undeformed atlas, in ``grid_sample`` coordinates.
    """

    brain: np.ndarray
    tissues: np.ndarray
    atlas_points: torch.Tensor


class _Atlas(NamedTuple):
    """The ICBM152 tissue maps made ready for one spacing, each float32 ``[1, C, x, y, z]`` over the field of view."""

    brain: torch.Tensor  # C = 1
    tissues: torch.Tensor  # C = 3: CSF, gray matter, white matter
    ventricle_pull: torch.Tensor  # C = 3: unit of velocity (mm) that widens the ventricles by up to about 1 mm
    near_ventricles: torch.Tensor  # C = 1: 1 at the ventricles' wall, falling to 1/e in 8 mm


class Streams(NamedTuple):
    """Where the random numbers of a phantom come from: independent generators, so that none affects the others."""

    anatomy: np.random.Generator
    contrast: np.random.Generator
    scanner: np.random.Generator
    lesions: np.random.Generator
    kind: np.random.Generator
    person: np.random.Generator
    hyperintensities: np.random.Generator


def random_streams(index: int, seed: int) -> Streams:
    """The generators of a phantom, each at its start."""
    sequences = np.random.SeedSequence([seed, index]).spawn(len(Streams._fields))
    return Streams(*map(np.random.default_rng, sequences))


def brain_anatomy(
    index: int,
    seed: int = 0,
    spacing: float = 2.0,
    person: Person | None = None,
    displace: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Anatomy:
    """Brain mask and tissue fractions behind :py:func:`scripts.phantoms.images.brain_phantom`.

    Args:
        index, seed, spacing: of that phantom.
        person: whose brain it is; None: atrophy is drawn, and nothing depends on age or sex.
        displace: where in this brain the tissue of each voxel comes from, given where the voxel lies: both float32
            ``[N, 3]``, in ``grid_sample`` coordinates. The brain mask is not displaced.
    """
    with one_thread():
        shape_stream = random_streams(index, seed).anatomy
        atlas = _atlas(_atlas_stride(spacing), spacing)

        # A stationary velocity, integrated by scaling and squaring: smooth, invertible, so no tissue folds or tears.
        velocity = smooth_fields(shape_stream, 3, WARP_SCALES)
        atrophy = shape_stream.normal()  # one number widens ventricles and sulci together, as age does
        if person is not None:
            atrophy = 0.35 * atrophy + person.atrophy
        velocity += (1.0 + 1.5 * atrophy + 0.7 * shape_stream.normal()) * atlas.ventricle_pull
        half = torch.from_numpy(EXTENT / 2).float()
        control = grid_points(np.indices(CONTROL_SHAPE).reshape(3, -1).T, CONTROL_SPACING)
        displacement = velocity / 2**4
        for _ in range(4):
            ahead = control + displacement.flatten(2)[0].T / half
            displacement = displacement + sample_maps(displacement, ahead).reshape(displacement.shape)

        shape = _brain_shape(spacing)
        linear, shift = _residual_affine(shape_stream)
        if person is not None:
            linear = linear @ torch.diag(torch.from_numpy(1 / person.stretch).float())

        def to_atlas(points: torch.Tensor, moved_by: torch.Tensor) -> torch.Tensor:
            return ((points * half) @ linear.T + shift + moved_by) / half

        # Only voxels near the brain, a third of the grid, are computed; 4 mm is enough to find them.
        step = int(CONTROL_SPACING) // _atlas_stride(spacing)
        coarse = atlas.brain[:, :, ::step, ::step, ::step].contiguous()
        near = torch.from_numpy(sample_maps(coarse, to_atlas(control, displacement.flatten(2)[0].T))[0] > 0.05)
        near = near.float().reshape(1, *CONTROL_SHAPE)
        near = F.max_pool3d(near, kernel_size=3, stride=1, padding=1)[0].numpy() > 0
        nearest = [np.rint(np.arange(n) * spacing / CONTROL_SPACING).astype(int) for n in shape]
        voxels = np.argwhere(near[np.ix_(*nearest)])
        points = grid_points(voxels, spacing)
        moved = to_atlas(points, torch.from_numpy(sample_maps(displacement, points)).T)
        inside = sample_maps(atlas.brain, moved)[0] > 0.5
        moved = moved[torch.from_numpy(inside)]
        if displace is not None:
            points = displace(points[torch.from_numpy(inside)])
            moved = to_atlas(points, torch.from_numpy(sample_maps(displacement, points)).T)
        brain = np.zeros(shape, bool)
        brain[tuple(voxels[inside].T)] = True

        # Sulci and the cortex's thickness differ by more than a smooth warp can: shift the tissues' log odds as well.
        odds = smooth_fields(shape_stream, 3, ((5.0, 0.35), (20.0, 0.25)))
        odds[:, 0] += 0.7 + 0.35 * atrophy
        if person is not None:
            odds[:, 1] -= person.thinning
        tissues = sample_maps(atlas.tissues, moved) * np.exp(sample_maps(odds, moved))
        tissues /= tissues.sum(axis=0) + 1e-6
    return Anatomy(brain, tissues, moved)


def near_ventricles(anatomy: Anatomy, spacing: float) -> np.ndarray:
    """How near the ventricles each of a brain's N voxels is: ``[N]``, 1 at their wall, falling to 1/e in 8 mm."""
    return sample_maps(_atlas(_atlas_stride(spacing), spacing).near_ventricles, anatomy.atlas_points)[0]


@lru_cache(maxsize=2)
def _atlas(stride: int, spacing: float) -> _Atlas:
    """The template's maps, low-passed for ``spacing`` and kept every ``stride`` mm. Up to 1 s, 140 MB at stride 1."""
    # pandas and scikit-learn come with it, 840 modules: not before a brain is made
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    loaders = (load_mni152_gm_template, load_mni152_wm_template, load_mni152_template)
    gray, white, t1 = (np.asarray(load(resolution=1).dataobj) for load in loaders)
    brain = (t1 > 0).astype(np.float32)
    fluid = np.clip(brain - gray - white, 0, 1)

    # The maps average 152 people; one person's tissue is purer than that.
    tissues = np.stack([fluid, gray, white])
    tissues *= np.sqrt(tissues)
    tissues /= np.maximum(tissues.sum(axis=0), 1e-6)
    tissues *= brain
    # A voxel of the spacing asked for sees a blur about as wide as itself (full width at half maximum).
    sigma = np.sqrt(max(spacing**2 - 1, 0)) / 2.355
    maps = torch.from_numpy(np.stack([_blurred(m, sigma, stride, truncate=3) for m in (brain, *tissues)]))[None]

    coarse = int(CONTROL_SPACING)
    depth = ndimage.distance_transform_edt(brain[::coarse, ::coarse, ::coarse]) * CONTROL_SPACING
    ventricles = _blurred(fluid, 1.5, coarse) * (depth > 22)
    pull = np.stack(np.gradient(ndimage.gaussian_filter(ventricles, 1.5))).astype(np.float32)
    pull /= np.linalg.norm(pull, axis=0).max()
    distance = ndimage.distance_transform_edt(ventricles < 0.3) * CONTROL_SPACING
    near = np.exp(-distance / 8).astype(np.float32)
    return _Atlas(
        maps[:, :1], maps[:, 1:].contiguous(), torch.from_numpy(pull)[None], torch.from_numpy(near)[None, None]
    )


def _blurred(volume: np.ndarray, sigma: float, stride: int, truncate: float = 4.0) -> np.ndarray:
    """Every ``stride``-th voxel of a blurred volume: what one axis leaves out is not blurred along the next."""
    for axis in range(3):
        volume = ndimage.gaussian_filter1d(volume, sigma, axis, truncate=truncate) if sigma else volume
        volume = volume[(slice(None),) * axis + (slice(None, None, stride),)]
    return volume


def _atlas_stride(spacing: float) -> int:
    """A blurred map needs fewer samples; 1, 2 and 4 mm all fit the field of view exactly."""
    return 4 if spacing >= 8 else 2 if spacing >= 4 else 1


def _residual_affine(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """What affine registration does not correct: ``[3, 3]`` and a shift in mm."""
    turn = Rotation.from_rotvec(rng.normal(0, np.deg2rad(1.2), 3)).as_matrix()
    stretch = np.diag(np.exp(rng.normal(0, 0.02, 3)))
    return torch.from_numpy(turn @ stretch).float(), torch.from_numpy(rng.normal(0, 1.0, 3)).float()


def _brain_shape(spacing: float) -> tuple[int, ...]:
    return tuple(int(n) for n in np.floor(EXTENT / spacing + 1e-6) + 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, without gradients.

    Processes share the cores, and sums come out the same however many cores there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)
