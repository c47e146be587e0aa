"""Checking a scan that was read, fitting it to the network's grid and scaling it."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing, to_affine_nd
from monai.transforms import Compose, MapTransform, SpatialResample, Transform
from monai.utils import ensure_tuple
from scipy import ndimage
from scripts.data.geometry import (
    box_margins,
    describe,
    differences,
    foreground_extent,
    foreground_place,
    grid_box,
    per_axis,
    world_axes,
)
from scripts.data.reading import ADVICE, LoadScand, ScanError
from scripts.utils.errors import InputError
from scripts.utils.names import image_files, image_path

__all__ = ["CheckScand", "FitShape", "FitShaped", "LoadScand", "RobustScaled", "ScanError", "per_channel", "unscaled"]

MOST_VOXELS = 2**31  # of a scan with the zeros that are put around it
# share of the range by which resampled tissue may dip below the background at an edge
DIP = 0.05
FIT, SCALING = "fit", "scaling"  # keys of the metadata, see FitShape and RobustScaled
# the axis of the body that a letter of an orientation names
_AXES = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}


def border_value(volume: torch.Tensor) -> float | None:
    """The value that most voxels on the faces of a volume have, ``[*spatial]``; None where none has more than half."""
    faces = [volume.select(axis, index).flatten() for axis in range(volume.ndim) for index in (0, -1)]
    border = torch.cat(faces)
    value = border.mode().values
    return float(value) if (border == value).sum() > 0.5 * border.numel() else None


class CheckScand(MapTransform):
    """Refuse a scan that would spoil training, and note where its geometry is not what is expected.

    Refused are: a wrong number of channels or axes, an empty scan, NaN or infinite voxels, a constant channel, a
    background that is not the lowest value, a singular affine. What is noted goes into the scan's metadata:
    ``geometry`` (see :py:func:`scripts.data.geometry.describe`), with ``foreground`` (see
    :py:func:`scripts.data.geometry.foreground_place`), and ``differences``, a list of half sentences;
    :py:func:`scripts.data.cache.read_cohort` acts on them.

    It belongs right after loading, while the geometry is the file's. Input and output: ``[channels, *spatial]``.

    Args:
        keys: the keys that hold a loaded scan, channel first.
        channels: how many channels a scan must have; a 4D file arrives with its time points as channels.
        spatial_dims: how many spatial axes a scan must have. None accepts any.
        spacing: the voxel size in mm expected along each axis (right, anterior, superior, whatever the order they are
            stored in), or one for all. None expects nothing.
        field_of_view: the extent in mm expected, likewise.
        orientation: the stored axes expected, such as ``RAS``. None expects nothing.

    Raises:
        ScanError: when the scan is refused.
        ValueError: when what is expected cannot be, by the names that training gives it.
    """

    def __init__(
        self,
        keys: KeysCollection,
        channels: int = 1,
        spatial_dims: int | None = 3,
        spacing: Sequence[float] | float | None = None,
        field_of_view: Sequence[float] | float | None = None,
        orientation: str | None = None,
    ) -> None:
        super().__init__(keys)
        for name, sizes in (("spacing", spacing), ("field_of_view", field_of_view)):
            if not all(isinstance(size, int | float) and size > 0 for size in ensure_tuple(sizes or ())):
                raise InputError(f"expected_{name} is {sizes!r}: give one number of mm above 0, or one per axis.")
        axes = [] if orientation is None else [_AXES.get(letter) for letter in str(orientation)]
        if None in axes or len(set(axes)) < len(axes):
            raise InputError(f"expected_orientation is {orientation!r}: give one letter per axis, such as RAS or LPI.")
        self.channels = channels
        self.spatial_dims = spatial_dims
        self.expected = {"spacing": spacing, "field_of_view": field_of_view, "orientation": orientation}

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key]
            name = image_path(image, key)
            files = image_files(image)
            self._check_shape(image.shape, name, len(files))
            self._check_voxels(image, files if len(files) == len(image) > 1 else [name] * len(image))
            self._check_affine(image, name)
            geometry = describe(image)
            image.meta["geometry"] = geometry | {"foreground": foreground_place(image)}
            image.meta["differences"] = [
                *image.meta.get("header_problems", []),
                *differences(geometry, **self.expected),
            ]
        return d

    def _check_shape(self, shape: torch.Size, name: str, files: int) -> None:
        found = tuple(shape)
        if math.prod(found) == 0:
            raise ScanError(f"'{name}' is empty (shape {found[1:]}): {ADVICE}.")
        if found[0] < self.channels or (found[0] > self.channels and files > 1):
            whose = f"'{name}'" if files == 1 else f"The scan of '{name}'"
            raise ScanError(
                f"{whose} has {found[0]} channel(s) where network_def has in_channels {self.channels}: set "
                f"--network_def#in_channels {found[0]}, or give --scan_pattern one pattern for each channel."
            )
        if found[0] > self.channels:
            raise ScanError(
                f"'{name}' has {found[0]} channels or time points of shape {found[1:]} where {self.channels} is "
                f"expected, as a 4D file does: give one volume per scan, or {ADVICE}."
            )
        if self.spatial_dims is not None and len(found) - 1 != self.spatial_dims:
            raise ScanError(
                f"'{name}' has {len(found) - 1} spatial axes (shape {found[1:]}) where {self.spatial_dims} are "
                f"expected: {ADVICE}."
            )

    def _check_voxels(self, image: MetaTensor, names: Sequence[str]) -> None:
        pixels = image.as_tensor()
        extremes = pixels.flatten(1).amin(1).tolist(), pixels.flatten(1).amax(1).tolist()
        for name, channel, lowest, highest in zip(names, pixels, *extremes, strict=True):
            if not (math.isfinite(lowest) and math.isfinite(highest)):  # NaN and infinity both show in these
                bad = int(channel.numel() - torch.isfinite(channel).sum())
                raise ScanError(
                    f"'{name}' has {bad} NaN or infinite voxel(s) of {channel.numel()} within the brain: give them a "
                    f"number, {ADVICE}."
                )
            if lowest == highest:
                raise ScanError(f"'{name}' is constant (every voxel is {lowest:g}): {ADVICE}.")
            background = border_value(channel)
            if background is not None and background - lowest > DIP * (highest - lowest):
                raise ScanError(
                    f"'{name}' has a background ({background:g}) that is not its lowest value ({lowest:g}), as "
                    "z-scored brains have, and would be taken for tissue: give it the lowest value of the brain, or "
                    "add a number to the brain that leaves nothing below."
                )

    def _check_affine(self, image: MetaTensor, name: str) -> None:
        rank = image.ndim - 1
        affine = to_affine_nd(rank, image.affine.numpy())
        if not (np.isfinite(affine).all() and np.linalg.matrix_rank(affine) == rank + 1):
            raise ScanError(f"'{name}' has a singular affine in its header, so its voxel size is unknown: {ADVICE}.")


class FitShape(Transform):
    """Fit a scan to a grid of ``spatial_shape`` voxels along the world's axes, without distorting the anatomy.

    The new voxels are cubes, as small as lets a box into the grid's centre: the box of the scan's own voxels, or one of
    the world, so that the same place is the same voxel in all scans. What lies outside the scan takes the channel's
    lowest value, which is the background's. A scan that was acquired at an angle is turned upright, and the voxels for
    its own box grow only if its foreground would not fit otherwise. The scan is resampled once, and the affine stays
    true: a voxel keeps its place in the world. Where an axis loses resolution the scan is smoothed along it first,
    against aliasing.

    Input: ``[channels, *spatial]``. Output: ``[channels, *spatial_shape]``, float32, its axes in the input's order; in
    its metadata, under ``fit``, ``affine`` and ``shape`` of the input and ``background``, the lowest value of each
    channel, for :class:`scripts.data.scan_grid.Fit`.

    Args:
        spatial_shape: voxels along each axis of the result, or one number for all.
        keep_aspect: False stretches each axis by itself to fill the grid, as the published code does.
        box: centre and size of the box along the axes of the world (right, anterior, superior), ``[2, rank]``, in mm,
            see :class:`scripts.data.scan_grid.ScanGrid`. None: each scan's own.
    """

    def __init__(
        self, spatial_shape: Sequence[int] | int, keep_aspect: bool = True, box: Sequence[Sequence[float]] | None = None
    ) -> None:
        # zeros outside, on an image shifted to a minimum of zero, is the only padding without streaks
        self.resample = SpatialResample(mode="bilinear", padding_mode="zeros")
        self.spatial_shape = spatial_shape
        self.keep_aspect = keep_aspect
        self.box = box

    def __call__(self, image: MetaTensor) -> MetaTensor:
        rank = image.ndim - 1
        shape = np.array(per_axis("spatial_shape", self.spatial_shape, rank))
        background = image.as_tensor().flatten(1).amin(1).reshape(-1, *[1] * rank)  # each channel has its own
        shifted = image - background
        affine, zoom = self._destination(shifted, shape)
        # Each new voxel spans ``zoom`` old ones; (zoom - 1) / 2 is the width scikit-image and MONAI's Resize use.
        sigma = np.maximum((zoom - 1) / 2, 0)
        if sigma.any():
            # SciPy's is separable and ten times faster here than MONAI's convolution, which runs on one channel.
            pixels, moved = self._pad(shifted.float().cpu().numpy(), image, np.ceil(3 * sigma) + 1)
            pixels = ndimage.gaussian_filter(pixels, (0, *sigma), mode="nearest", truncate=3)
            shifted = MetaTensor(torch.from_numpy(pixels).to(image.device)).copy_meta_from(image)
            shifted.affine = moved
        fitted = self.resample(shifted, dst_affine=affine, spatial_size=shape.tolist()) + background
        fitted.meta[FIT] = {
            "affine": to_affine_nd(rank, image.affine).tolist(),
            "shape": list(image.shape[1:]),
            "background": background.flatten().tolist(),
        }
        return fitted

    def _pad(self, pixels: np.ndarray, image: MetaTensor, most: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        """Zeros up to the box's bounds, so that what is smoothed beyond the scan's edge is kept; and the affine."""
        if self.box is None:
            return pixels, image.affine
        widths = np.minimum(box_margins(image, self.box), most).astype(int)  # before and after, of each axis
        if math.prod(pixels.shape[1:] + widths.sum(0)) > MOST_VOXELS:
            raise ScanError(
                f"'{image_path(image)}' has voxels far smaller than the network's, by its header: correct that, or "
                "leave it out with --scan_pattern."
            )
        moved = image.affine.clone()
        moved[:-1, -1] -= moved[:-1, : widths.shape[1]] @ torch.from_numpy(widths[0]).to(moved)
        return np.pad(pixels, [(0, 0), *widths.T.tolist()]), moved

    def _destination(self, image: MetaTensor, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The affine of the new grid, and how many old voxels one new voxel spans along each axis."""
        rank = len(shape)
        old_shape = np.array(image.shape[1:])
        old = to_affine_nd(rank, image.affine.numpy().astype(float))
        spacing = affine_to_spacing(old, r=rank)
        axes = world_axes(old)
        centre, extent = grid_box(old, old_shape)
        if self.box is not None:
            centre, extent = (np.array(values[:rank]) for values in self.box)
            extent = np.abs(axes).T @ extent  # along the stored axes
        elif not np.allclose(old[:rank, :rank], axes * spacing, atol=1e-3 * spacing.min()):
            extent = np.maximum(extent, foreground_extent(image, old, axes, centre))
        new_spacing = extent / shape
        if self.keep_aspect:
            new_spacing = np.full(rank, new_spacing.max())
        new = np.eye(rank + 1)
        new[:rank, :rank] = axes * new_spacing
        new[:rank, rank] = centre - new[:rank, :rank] @ ((shape - 1) / 2)
        return new, new_spacing / spacing


class FitShaped(MapTransform):
    """Dictionary form of :py:class:`FitShape`.

    Raises:
        ScanError: when there is nothing of a scan in the box of the world.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_shape: Sequence[int] | int,
        keep_aspect: bool = True,
        box: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__(keys)
        self.fit = FitShape(spatial_shape, keep_aspect, box)

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.fit(d[key])
            if self.fit.box is not None and (d[key].flatten(1).amin(1) == d[key].flatten(1).amax(1)).any():
                raise ScanError(
                    f"'{image_path(d[key], key)}' has no brain in the box of the world in which the training scans "
                    "lie: align it as they were (python -m scripts.prepare)."
                )
        return d


class RobustScaled(MapTransform):
    """Clip each channel to two of its percentiles and scale these to a range.

    Input and output: ``[channels, *spatial]``, float32. Under ``scaling`` of the output's metadata is what
    :py:func:`unscaled` needs. With the attribute ``clip`` False, what lies outside the percentiles stays as it is.

    Args:
        keys: the keys that hold scans.
        lower, upper: the percentiles, 0 to 100. Background becomes ``b_min`` exactly where more than ``lower`` percent
            of a scan's voxels are background.
        b_min, b_max: what the percentiles become.

    Raises:
        ScanError: when the two percentiles of a channel are equal.
    """

    def __init__(
        self, keys: KeysCollection, lower: float = 0.05, upper: float = 99.95, b_min: float = 0.0, b_max: float = 1.0
    ) -> None:
        super().__init__(keys)
        self.lower, self.upper = lower, upper
        self.b_min, self.b_max = b_min, b_max
        self.clip = True  # see unclipped

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = d[key].float()
            # NumPy selects where PyTorch sorts: eight times faster on a volume
            values = image.detach().cpu().numpy().reshape(len(image), -1)
            low, high = np.percentile(values, (self.lower, self.upper), axis=1)
            if not (high > low).all():
                raise ScanError(
                    f"'{image_path(image, key)}' has the same value at its {self.lower} and {self.upper} percentiles: "
                    f"it shows nothing to learn from; {ADVICE}."
                )
            gain, offset = (self.b_max - self.b_min) / (high - low).astype(float), low
            if not (gain < np.finfo(np.float32).max).all():
                raise ScanError(
                    f"'{image_path(image, key)}' has values that differ by {(high - low).min():.3g} only, which cannot "
                    f"be scaled in single precision: multiply them, or {ADVICE}."
                )
            if self.clip:
                image = torch.minimum(torch.maximum(image, per_channel(low, image)), per_channel(high, image))
            d[key] = (image - per_channel(offset, image)) * per_channel(gain, image) + self.b_min
            d[key].meta[SCALING] = {"gain": gain.tolist(), "offset": offset.tolist(), "b_min": self.b_min}
        return d


def reading(preprocessing: Compose) -> Compose:
    """The steps of a preprocessing up to the fit: they give a scan on its own grid and in its own units."""
    return Compose(list(takewhile(lambda step: not isinstance(step, FitShaped), preprocessing.transforms)))


def unclipped(preprocessing: Compose) -> Compose:
    """The same preprocessing, but that :py:class:`RobustScaled` does not clip."""
    steps = [copy.copy(step) for step in preprocessing.transforms]
    for step in steps:
        if isinstance(step, RobustScaled):
            step.clip = False
    return Compose(steps)


def unscaled(image: torch.Tensor, info: Mapping[str, Any]) -> torch.Tensor:
    """Undo :py:class:`RobustScaled` on ``[channels, *spatial]``: ``info`` is what it notes in the metadata."""
    return (image - float(info["b_min"])) / per_channel(info["gain"], image) + per_channel(info["offset"], image)


def per_channel(values: Sequence[float], image: torch.Tensor) -> torch.Tensor:
    """One number per channel, shaped to be broadcast to an image, ``[channels, *spatial]``."""
    return torch.as_tensor(values, dtype=torch.float32, device=image.device).reshape(-1, *[1] * (image.ndim - 1))
