"""What an anomaly map and the intensity are in the lesions of one scan and beside them, where a mask outlines these.

Each scan's voxels are counted in bins of their values, on two grids: the network's own, and the scan's own with the
map as it is saved and the mask as it is. So what is kept of a scan, 128 KB in memory and less on disk, does not depend
on its size, and :py:mod:`scripts.inference.detection` needs no more than that.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import Compose, MapTransform, SpatialResample, Transform
from scipy import ndimage
from scripts.data.scan_grid import Fit
from scripts.inference.layouts import ScanLayout
from scripts.inference.masks import read_mask
from scripts.layers.output import FOREGROUND
from scripts.utils.files import write_whole
from scripts.utils.names import image_path
from torch import Tensor

GRIDS = ("network", "scan")
DETECTORS = (
    ("anomaly", "brighter"),
    ("anomaly", "darker"),
    ("anomaly", "either"),
    ("intensity", "brighter"),
    ("intensity", "darker"),
)
BINS = 4096
# Between them. An anomaly, in standard deviations, is kept to 0.25 % (0.0025 below 1), an intensity to 0.06 % of the
# range that scans are scaled to; what lies outside counts in the first or last bin.
EDGES = {"anomaly": np.sinh(np.linspace(-5, 5, BINS - 1)), "intensity": np.linspace(-0.5, 2, BINS - 1)}
LESION = 0.25  # what a mask must be, interpolated at the centre of a voxel of the network's grid
PERCENTILE = 99.9  # of the foreground: the score of a scan


class LesionCounts(NamedTuple):
    """What is kept of one scan.

    Attributes:
        name: of the scan.
        mask: ``lesions``, ``empty``, or ``none`` where there is no mask.
        voxels: by grid and by what was counted (``anomaly``, ``intensity``), int32 ``[2, BINS]``: other voxels of the
            foreground, and those of lesions.
        scores: by grid, the 99.9th percentile in the foreground as each of ``DETECTORS`` orders it.
        kind: of its lesions, or several with ``;`` between, ``none`` for a healthy scan; empty where it is not known.
        lesions: by grid, ``[lesions, 1 + len(DETECTORS)]``: the size in ml of each connected lesion, and the bin of its
            most suspicious voxel as each of ``DETECTORS`` orders it; None: not known.
    """

    name: str
    mask: str
    voxels: dict[str, dict[str, np.ndarray]]
    scores: dict[str, np.ndarray]
    kind: str = ""
    lesions: Mapping[str, np.ndarray] | None = None

    @classmethod
    def load(cls, name: str, path: Any) -> LesionCounts:
        """What :py:class:`SaveCounts` wrote."""
        with np.load(path, allow_pickle=False) as file:
            voxels = {grid: {what: file[f"{grid}_{what}"] for what in EDGES} for grid in GRIDS}
            scores = {grid: file[f"{grid}_scores"] for grid in GRIDS}
            lesions = {grid: file[f"{grid}_lesions"] for grid in GRIDS if f"{grid}_lesions" in file.files}
            return cls(name, str(file["mask"]), voxels, scores, lesions=lesions)


def ordered(counts: np.ndarray, order: str) -> np.ndarray:
    """Counts in bins, ``[..., BINS]``, from the least to the most suspicious: the ``brighter`` or ``darker`` values, or
    ``either``, whatever is farther from 0 (half as many bins).
    """
    if order == "either":
        return counts[..., BINS // 2 :] + counts[..., : BINS // 2][..., ::-1]
    return counts if order == "brighter" else counts[..., ::-1]


def _ordered_bins(bins: np.ndarray, order: str) -> np.ndarray:
    """The places that bins get in what :py:func:`ordered` gives."""
    if order == "either":
        return np.where(bins >= BINS // 2, bins - BINS // 2, BINS // 2 - 1 - bins)
    return bins if order == "brighter" else BINS - 1 - bins


def edges(what: str, order: str) -> np.ndarray:
    """The values between bins as :py:func:`ordered` has them."""
    if order == "either":
        return EDGES[what][BINS // 2 :]
    return EDGES[what] if order == "brighter" else EDGES[what][::-1]


def count_voxels(
    anomaly: np.ndarray, intensity: np.ndarray, lesion: np.ndarray, voxel_ml: float = 1.0
) -> dict[str, np.ndarray]:
    """Count a scan's voxels on one grid, as :py:class:`LesionCounts` has them.

    Counted are the foreground, where the intensity of a channel exceeds 5 % of the range, and lesions. Of several
    channels the largest anomaly counts, and the mean intensity. Both are ``[channels, *spatial]``, the intensity as a
    share of the range that scans are scaled to, not clipped; ``lesion`` is bool ``[1, *spatial]``.
    """
    foreground = (intensity > FOREGROUND).any(0)
    if not foreground.any():
        foreground[:] = True
    most = np.abs(anomaly).argmax(0)
    values = {"anomaly": np.take_along_axis(anomaly, most[None], 0)[0], "intensity": intensity.mean(0)}
    found, bins = {}, {what: np.digitize(array, EDGES[what]) for what, array in values.items()}
    for what, of_voxels in bins.items():
        groups = (of_voxels[foreground & ~lesion[0]], of_voxels[lesion[0]])
        found[what] = np.stack([np.bincount(group, minlength=BINS) for group in groups]).astype(np.int32)
    numbers, count = ndimage.label(lesion[0], np.ones((3,) * lesion[0].ndim))
    sizes = np.bincount(numbers.ravel(), minlength=count + 1)[1:] * voxel_ml
    peaks = [ndimage.maximum(_ordered_bins(bins[what], o), numbers, range(1, count + 1)) for what, o in DETECTORS]
    found["lesions"] = np.stack([sizes, *peaks], axis=1).astype(np.float32)
    sign = {"brighter": np.positive, "darker": np.negative, "either": np.abs}
    scores = [np.percentile(sign[order](values[what][foreground]), PERCENTILE) for what, order in DETECTORS]
    return found | {"scores": np.array(scores)}


def with_masks(preprocessing: Compose) -> Compose:
    """A preprocessing, which begins with loading, that also reads the scans' masks, and fits them at its end."""
    load, *others = preprocessing.transforms
    return Compose([load, ReadLesionsd("image"), *others, FitLesionsd("image")])


class ReadLesionsd(MapTransform):
    """Read a scan's mask of lesions, and keep a copy of the scan, ``[channels, *spatial]``, as it was loaded.

    Adds ``lesion``, bool ``[1, *spatial]``, all false where the path in ``mask`` is None, and ``measured``, the scan.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            scan, path = d[key], d["mask"]
            lesion = torch.zeros(1, *scan.shape[1:], dtype=torch.bool) if path is None else read_mask(path, scan)
            d |= {"lesion": lesion, "measured": scan.clone()}
        return d


class FitLesionsd(MapTransform):
    """Bring what :py:class:`ReadLesionsd` added to the network's grid, on which the scan is now.

    Adds ``lesion_fitted``, bool ``[1, *spatial_shape]``, where the mask, interpolated at a voxel's centre, exceeds
    0.25.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        resample = SpatialResample(mode="bilinear", padding_mode="zeros")
        for key in self.key_iterator(d):
            image, measured = d[key], d["measured"]
            mask = MetaTensor(d["lesion"].float(), affine=measured.affine)
            mask = resample(mask, dst_affine=image.affine, spatial_size=image.shape[1:])
            d["lesion_fitted"] = mask.as_tensor() > LESION
        return d


class CountVoxels(Transform):
    """Count the voxels of a scan whose mask was read by :py:class:`ReadLesionsd`; other scans are left as they are.

    Adds what :py:func:`count_voxels` returns under ``("counts", grid)``.

    Args:
        grid: ``network``, before the anomaly map has gone back to the scan's own grid, or ``scan``, after that.
        value_range: what scans are scaled to; they are not clipped to it, so that the brightest voxels differ.
    """

    def __init__(self, grid: str, value_range: Sequence[float]) -> None:
        self.grid = grid
        self.low, self.high = value_range

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        if "lesion" not in data:
            return data
        scan, lesion = data["image"].as_tensor(), data["lesion_fitted"]
        if self.grid == "scan":
            scan, lesion = Fit.of(data["image"]).scaled(data["measured"].as_subclass(Tensor)), data["lesion"]
        intensity = (scan.numpy() - self.low) / (self.high - self.low)
        affine = data["measured" if self.grid == "scan" else "image"].affine
        voxel_ml = float(affine_to_spacing(affine, r=lesion.ndim - 1).prod()) / 1000
        counts = count_voxels(np.asarray(data["anomaly"]), intensity, lesion.numpy(), voxel_ml)
        return {**data, ("counts", self.grid): counts}


class SaveCounts(Transform):
    """Write what :py:class:`CountVoxels` counted of a scan as ``.npz``, which :py:meth:`LesionCounts.load` reads."""

    def __init__(self, layout: ScanLayout) -> None:
        self.layout = layout

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        if "lesion" in data:
            arrays = {f"{grid}_{name}": v for grid in GRIDS for name, v in data["counts", grid].items()}
            mask = "none" if data["mask"] is None else "lesions" if data["lesion"].any() else "empty"
            path = self.layout.filename(image_path(data["image"]))
            write_whole(path, lambda temporary: np.savez_compressed(temporary, mask=mask, **arrays))
        return data
