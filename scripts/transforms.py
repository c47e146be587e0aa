"""Reading a scan, checking it, fitting it to the network's grid; and the augmentations MONAI and TorchIO lack."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing, to_affine_nd
from monai.transforms import (
    InvertibleTransform,
    LoadImaged,
    MapTransform,
    RandomizableTransform,
    RandTorchIOd,
    SpatialResample,
)
from monai.utils import ImageMetaKey, TraceKeys, ensure_tuple, ensure_tuple_rep
from nibabel.orientations import io_orientation
from scipy import ndimage

__all__ = ["CheckScand", "FitShape", "FitShaped", "LoadScand", "RandHaircutd", "RandTorchIOScand", "ScanError"]

logger = logging.getLogger(__name__)


class ScanError(ValueError):
    """A scan that cannot be used; the message is one sentence that names its file."""


class LoadScand(LoadImaged):
    """
    MONAI's `LoadImaged` (the reader is chosen by the file's suffix), whose failures name the file and the likely cause.

    Args:
        keys: the keys that hold a path, a list of paths (one for each channel) or a DICOM folder.
        ensure_channel_first: put the channel axis first; adds one where there is none.
        kwargs: what else `LoadImaged` takes.

    Raises:
        ScanError: when a file is missing or no reader can read it.
    """

    def __init__(self, keys: KeysCollection, ensure_channel_first: bool = True, **kwargs: Any) -> None:
        super().__init__(keys, image_only=True, ensure_channel_first=ensure_channel_first, **kwargs)

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        try:
            return super().__call__(data, reader)
        except MemoryError:
            raise
        except Exception as error:
            paths = [path for key in self.key_iterator(dict(data)) for path in ensure_tuple(data[key])]
            missing = [path for path in paths if not Path(path).expanduser().exists()]
            names = ", ".join(f"'{path}'" for path in missing or paths)
            if missing:
                raise ScanError(
                    f"{names} does not exist: it was moved or deleted after the scans were listed."
                ) from error
            raise ScanError(
                f"{names} cannot be read as an image ({_reason(error)}): it is truncated or not an image; "
                "replace it or leave it out with --scan_pattern."
            ) from error


def _reason(error: BaseException) -> str:
    """The first line of an error's message, short enough for a sentence. Readers (ITK above all) write paragraphs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # ITK begins with the place in its own source and ends with what went wrong.
    line = next((line for line in lines if not line.startswith(("/", "The file couldn't"))), type(error).__name__)
    return (line if len(line) <= 120 else line[:117] + "...").rstrip(".")


class CheckScand(MapTransform):
    """
    Refuse a scan that would poison training: wrong number of channels or axes, empty, NaN or infinite voxels, constant.

    It belongs before `Orientationd`, which fails obscurely on some of these. Input and output:
    `[channels, *spatial]`, unchanged.

    Args:
        keys: the keys that hold a loaded scan, channel first.
        channels: how many channels a scan must have; a 4D file arrives with its time points as channels.
        spatial_dims: how many spatial axes a scan must have. None accepts any.
        spacing: the voxel size in mm expected along each axis (right, anterior, superior, whatever the order they are
            stored in), or one for all. None expects nothing.
        spacing_policy: `warn` or `fail`, for a scan whose spacing differs from `spacing`.
        spacing_tolerance: the relative difference that still counts as equal.

    Raises:
        ScanError: when the scan is refused.
        ValueError: when `spacing_policy` is neither `warn` nor `fail`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        channels: int = 1,
        spatial_dims: int | None = 3,
        spacing: Sequence[float] | float | None = None,
        spacing_policy: str = "warn",
        spacing_tolerance: float = 0.01,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if spacing_policy not in ("warn", "fail"):
            raise ValueError(f"spacing_policy is '{spacing_policy}': it must be 'warn' or 'fail'.")
        self.channels = channels
        self.spatial_dims = spatial_dims
        self.spacing = spacing
        self.spacing_policy = spacing_policy
        self.spacing_tolerance = spacing_tolerance

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            name = _scan_name(d[key], key)
            self._check_shape(d[key].shape, name)
            self._check_voxels(d[key], name)
            self._check_spacing(d[key], name)
        return d

    def _check_shape(self, shape: torch.Size, name: str) -> None:
        found = tuple(shape)
        if math.prod(found) == 0:
            raise ScanError(f"'{name}' is empty (shape {found[1:]}): replace it or leave it out with --scan_pattern.")
        if found[0] != self.channels:
            raise ScanError(
                f"'{name}' has {found[0]} channels or time points of shape {found[1:]} where {self.channels} is "
                "expected, as a 4D file does: give one volume a scan, or leave it out with --scan_pattern."
            )
        if self.spatial_dims is not None and len(found) - 1 != self.spatial_dims:
            raise ScanError(
                f"'{name}' has {len(found) - 1} spatial axes (shape {found[1:]}) where {self.spatial_dims} are "
                "expected: leave it out with --scan_pattern."
            )

    def _check_voxels(self, image: torch.Tensor, name: str) -> None:
        pixels = image.as_tensor() if isinstance(image, MetaTensor) else torch.as_tensor(image)
        advice = "replace it or leave it out with --scan_pattern."
        low, high = (pixels.flatten(1).amin(1), pixels.flatten(1).amax(1))  # NaN and infinity both show in these
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            bad = int(pixels.numel() - torch.isfinite(pixels).sum())
            raise ScanError(f"'{name}' has {bad} NaN or infinite voxel(s) of {pixels.numel()}: {advice}")
        if (low == high).any():
            value = float(low[low == high][0])
            raise ScanError(f"'{name}' is constant (every voxel is {value:g}): {advice}")

    def _check_spacing(self, image: torch.Tensor, name: str) -> None:
        rank = image.ndim - 1
        affine = to_affine_nd(rank, image.affine.numpy()) if isinstance(image, MetaTensor) else np.eye(rank + 1)
        if not (np.isfinite(affine).all() and np.linalg.matrix_rank(affine) == rank + 1):
            raise ScanError(
                f"'{name}' has no usable affine in its header, so its voxel size is unknown: "
                "replace it or leave it out with --scan_pattern."
            )
        if self.spacing is None:
            return
        found = np.asarray(affine_to_spacing(affine, r=rank), dtype=float)
        axes = io_orientation(affine)[:, 0].astype(int)  # the RAS axis each stored axis runs along
        found = found[np.argsort(axes)]
        expected = np.asarray(ensure_tuple_rep(self.spacing, rank), dtype=float)
        if not np.allclose(found, expected, rtol=self.spacing_tolerance, atol=0):
            message = (
                f"'{name}' has voxels of {_millimetres(found)} where {_millimetres(expected)} are expected: "
                "check its header, or set the expected spacing to match."
            )
            if self.spacing_policy == "fail":
                raise ScanError(message)
            logger.warning(message)


def _scan_name(image: torch.Tensor, key: Hashable) -> str:
    meta = image.meta if isinstance(image, MetaTensor) else {}
    return str(meta.get(ImageMetaKey.FILENAME_OR_OBJ, key))


def _millimetres(spacing: np.ndarray) -> str:
    return "×".join(f"{s:.3g}" for s in spacing) + " mm"


class FitShape(SpatialResample):
    """
    Fit a scan to a grid of `spatial_shape` voxels without distorting the anatomy.

    The new voxels are cubes, as small as lets the whole scan into the grid; the scan sits in the grid's centre and what
    lies outside it takes the channel's lowest value, which is the background's. It is one resampling, tracked as
    MONAI's `SpatialResample`: the affine stays true (a voxel keeps its place in the world) and `inverse` returns the
    scan's own grid. Before an axis loses resolution the scan is smoothed along it, or detail finer than the new voxels
    would come back as aliasing.

    Input: `[channels, *spatial]`. Output: `[channels, *spatial_shape]`, float32.

    Args:
        spatial_shape: voxels along each axis of the result, or one number for all.
        mode: the interpolation, `bilinear` (trilinear in 3D) or `nearest`.
        keep_aspect: False stretches each axis by itself to fill the grid, as the published code does.
    """

    def __init__(self, spatial_shape: Sequence[int] | int, mode: str = "bilinear", keep_aspect: bool = True) -> None:
        # Zeros outside, on an image shifted to a minimum of zero, is the one padding that paints no streaks.
        super().__init__(mode=mode, padding_mode="zeros")
        self.spatial_shape = spatial_shape
        self.keep_aspect = keep_aspect

    def __call__(self, img: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        image = img if isinstance(img, MetaTensor) else MetaTensor(img)
        rank = image.ndim - 1
        shape = np.array(ensure_tuple_rep(self.spatial_shape, rank))
        affine, zoom = self._destination(image, shape)
        # Each new voxel spans `zoom` old ones; (zoom - 1) / 2 is the width scikit-image and MONAI's Resize use.
        sigma = np.maximum((zoom - 1) / 2, 0)
        background = image.as_tensor().flatten(1).amin(1).reshape(-1, *[1] * rank)  # each channel has its own
        shifted = image - background
        if sigma.any() and self.mode != "nearest":
            # SciPy's is separable and ten times faster here than MONAI's convolution, which runs on one channel.
            pixels = shifted.float().cpu().numpy()
            pixels = ndimage.gaussian_filter(pixels, (0, *sigma), mode="nearest", truncate=3)
            shifted = MetaTensor(torch.from_numpy(pixels).to(image.device)).copy_meta_from(image)
        return super().__call__(shifted, dst_affine=affine, spatial_size=shape.tolist()) + background

    def _destination(self, image: MetaTensor, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The affine of the new grid, and how many old voxels one new voxel spans along each axis."""
        rank = len(shape)
        old_shape = np.array(image.shape[1:])
        old = to_affine_nd(rank, image.affine.numpy().astype(float))
        spacing = affine_to_spacing(old, r=rank)
        new_spacing = old_shape * spacing / shape
        if self.keep_aspect:
            new_spacing = np.full(rank, new_spacing.max())
        zoom = new_spacing / spacing
        new = np.eye(rank + 1)
        new[:rank, :rank] = old[:rank, :rank] * zoom
        centre = old[:rank, :rank] @ ((old_shape - 1) / 2) + old[:rank, rank]
        new[:rank, rank] = centre - new[:rank, :rank] @ ((shape - 1) / 2)
        return new, zoom

    def inverse(self, data: torch.Tensor) -> torch.Tensor:
        # On the way back every voxel lies within the grid, to half a voxel: its edge must not fade to zero.
        data.applied_operations[-1][TraceKeys.EXTRA_INFO]["padding_mode"] = "border"
        return super().inverse(data)


class FitShaped(MapTransform, InvertibleTransform):
    """
    Dictionary form of :py:class:`FitShape`.

    Args:
        keys: the keys that hold `[channels, *spatial]` scans.
        spatial_shape: voxels along each axis of the result, or one number for all.
        mode: the interpolation, `bilinear` or `nearest`.
        keep_aspect: False stretches each axis by itself to fill the grid.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_shape: Sequence[int] | int,
        mode: str = "bilinear",
        keep_aspect: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.fit = FitShape(spatial_shape, mode, keep_aspect)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.fit(d[key])
        return d

    def inverse(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.fit.inverse(d[key])
        return d


class RandHaircutd(RandomizableTransform, MapTransform):
    """
    Shave a few voxels off the edge of the brain, as a tighter skull-strip would.

    The background is what lies near the image's lowest value and reaches the border of the volume; dark voxels enclosed
    by the brain are not an edge. An image without background is returned as it is.

    Input and output: `[channels, *spatial]`. All keys and channels lose the same number of voxels.

    Args:
        keys: the keys that hold skull-stripped scans.
        prob: how often a scan is shaved.
        width: the fewest and the most voxels to shave off.
        threshold: how far above the lowest value, as a share of the image's range, still counts as background.
            Resampling leaves a faint rim around the brain; without this the haircut would take that rim alone.

    Raises:
        ValueError: when `width` is not a pair of whole numbers, the first at least 1 and at most the second.
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.1,
        width: tuple[int, int] = (1, 3),
        threshold: float = 0.05,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        if len(width) != 2 or not 1 <= width[0] <= width[1]:
            raise ValueError(f"width is {width}: it must be the fewest and the most voxels to shave, from 1 up.")
        self.width = (int(width[0]), int(width[1]))
        self.threshold = threshold

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        d = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return d
        width = int(self.R.randint(self.width[0], self.width[1] + 1))
        for key in self.key_iterator(d):
            d[key] = self._shave(d[key], width)
        return d

    def _shave(self, image: torch.Tensor, width: int) -> torch.Tensor:
        pixels = image.as_tensor() if isinstance(image, MetaTensor) else image
        lowest = pixels.amin()
        dark = pixels <= lowest + self.threshold * (pixels.amax() - lowest)
        brain = ~_reaching_border(dark.all(dim=0).cpu().numpy())
        # Steps to neighbours that share a face or an edge shave a ball more evenly than a cross or a cube would. What
        # lies past the border of the volume is unknown, so a scan cut off there keeps that face.
        step = ndimage.generate_binary_structure(brain.ndim, min(2, brain.ndim))
        brain = ndimage.binary_erosion(brain, step, iterations=width, border_value=1)
        return torch.where(torch.from_numpy(brain).to(pixels.device), image, lowest)


def _reaching_border(mask: np.ndarray) -> np.ndarray:
    """The connected parts of a mask that touch the border of the volume."""
    parts, count = ndimage.label(mask)
    touching = np.zeros(count + 1, dtype=bool)
    for axis in range(mask.ndim):
        for end in (0, -1):
            touching[np.take(parts, end, axis=axis)] = True
    touching[0] = False  # label 0 is what is not in the mask
    return touching[parts]


class RandTorchIOScand(RandTorchIOd):
    """
    MONAI's `RandTorchIOd` that keeps the scan's metadata.

    Some TorchIO transforms return a bare tensor; then the affine and the file name would be lost, and a batch of scans
    of which some were transformed could not be collated. TorchIO sees the scan without its affine: what it takes in mm
    are voxels here. It draws from PyTorch's own generator, which `monai.utils.set_determinism` seeds.

    Input and output: `[channels, x, y, z]`; a 2D scan (`[channels, x, y]`) is returned as it is.

    Args:
        keys: the keys that hold scans.
        name: the TorchIO transform, such as `RandomMotion`.
        prob: how often it is applied.
        kwargs: what the TorchIO transform takes.
    """

    def __init__(self, keys: KeysCollection, name: str, prob: float = 0.1, **kwargs: Any) -> None:
        super().__init__(keys, name=name, p=prob, **kwargs)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        d = dict(data)
        images = {key: d[key] for key in self.key_iterator(d) if d[key].ndim == 4}
        if not images:
            return d
        bare = {key: image.as_tensor() if isinstance(image, MetaTensor) else image for key, image in images.items()}
        for key, changed in self.trans(bare).items():
            image = images[key]
            d[key] = MetaTensor(changed).copy_meta_from(image) if isinstance(image, MetaTensor) else changed
        return d
