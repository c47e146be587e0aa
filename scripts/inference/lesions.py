"""What an anomaly map and the intensity are in the lesions of one scan and beside them, where a mask outlines these.

Each scan's voxels are counted in bins of their values, on two grids: the network's own, and the scan's own with the
map as it is saved and the mask as it is. So what is kept of a scan, 128 KB in memory and less on disk, does not depend
on its size, and :py:mod:`scripts.inference.detection` needs no more than that.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing, to_affine_nd
from monai.transforms import Compose, MapTransform, SpatialResample, Transform
from monai.utils import ensure_tuple
from scipy import ndimage
from scripts.data.find import compile_pattern, fill_pattern, find_by_wildcards
from scripts.data.scan_grid import Fit
from scripts.data.tables import read_table
from scripts.data.transforms import LoadScand, ScanError
from scripts.inference.layouts import ScanLayout
from scripts.utils.errors import InputError, NotAFolderError, NotFoundError
from scripts.utils.files import expand, write_whole
from scripts.utils.formats import without_image_suffix
from scripts.utils.names import image_path, item_path
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
FOREGROUND = 0.05  # of the range that scans are scaled to
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


logger = logging.getLogger(__name__)

KINDS_FILE = "kinds.csv"  # in the folder of the masks
NO_KIND = "none"  # of a scan whose cell says so, or is empty


def pair_masks(
    scans: Sequence[Mapping[str, Any]],
    root: str | os.PathLike,
    scan_pattern: str | Sequence[str],
    mask_dir: str | os.PathLike | None,
    mask_pattern: str | None = None,
    masked_only: bool = False,
) -> list[dict[str, Any]]:
    """Give each scan the mask for which the same text stands in place of the patterns' wildcards.

    Args:
        scans: items of a data set.
        root: the folder that their names are relative to.
        scan_pattern: see :func:`scripts.data.find.find_scans`; of several patterns (channels) the first names the
            scan.
        mask_dir: the folder that holds the masks.
        mask_pattern: of the masks; None: that of the scans.
        masked_only: leave out scans without a mask, and log how many.

    Returns:
        The items with ``mask``, a path, or None where there is none.

    Raises:
        ValueError: when ``mask_dir`` is None.
        FileNotFoundError, NotADirectoryError: when the folder does not exist, nothing matches, or no scan has a mask.
    """
    if mask_dir is None:
        raise InputError("mask_dir is not set: set --mask_dir to the folder of the masks, and --mask_pattern.")
    masks_root = Path(expand(mask_dir))
    if not masks_root.is_dir():
        raise NotAFolderError(f"mask_dir '{masks_root}' is not a folder: set --mask_dir to that of the masks.")
    scan_pattern = ensure_tuple(scan_pattern)[0]
    mask_pattern = mask_pattern or scan_pattern
    masks = find_by_wildcards(masks_root, mask_pattern, "mask_dir", "mask_pattern")
    texts_of, items, texts = compile_pattern(scan_pattern, "scan_pattern"), [], None
    for scan in scans:
        found = texts_of(Path(os.path.relpath(expand(item_path(scan)), root)).as_posix())
        texts = texts or found
        items.append({**scan, "mask": str(masks_root / masks[found]) if found in masks else None})
    unmasked = [item for item in items if item["mask"] is None]
    if len(unmasked) == len(items):
        sought = f", such as '{masks_root / fill_pattern(mask_pattern, texts)}'" if texts else ""
        raise NotFoundError(
            f"No scan has a mask: scan_pattern '{scan_pattern}' and mask_pattern '{mask_pattern}' match "
            f"'{item_path(items[0])}' and '{masks_root / next(iter(masks.values()))}', but a mask must have its scan's "
            f"text in place of the wildcards{sought}: set both patterns so that they differ from each other as the "
            "names do."
        )
    if masked_only and unmasked:
        logger.warning(
            "%d of %d scan(s) have no mask, such as '%s': they are left out.",
            *(len(unmasked), len(items), item_path(unmasked[0])),
        )
        return [item for item in items if item["mask"] is not None]
    return items


def read_kinds(mask_dir: str | os.PathLike, scans: Sequence[str]) -> dict[str, str]:
    """Of what kind each scan's lesions are, by ``kinds.csv`` beside the masks; an empty text where nothing is said of
    it.

    Its column ``scan`` has the names of the scans' files, or what they begin with before a ``_``; ``kind`` the kind.
    """
    path = Path(expand(mask_dir)) / KINDS_FILE
    if not path.is_file():
        return dict.fromkeys(scans, "")
    columns, rows = read_table(path)
    lacking = [name for name in ("scan", "kind") if name not in columns]
    if lacking:
        raise InputError(f"'{path}' has no column '{lacking[0]}': its first line must name the columns scan and kind.")
    known = {row["scan"]: row["kind"] or NO_KIND for row in rows}
    kinds = {}
    for scan in scans:
        parts = without_image_suffix(Path(scan).name).split("_")
        names = ("_".join(parts[:count]) for count in range(len(parts), 0, -1))
        kinds[scan] = next((known[name] for name in names if name in known), "")
    return kinds


def read_mask(path: str, scan: MetaTensor) -> Tensor:
    """A scan's mask, bool ``[1, *spatial]``: true where the file, on the grid of the scan as loaded, is above 0."""
    mask = LoadScand("mask")({"mask": path})["mask"]
    rank = scan.ndim - 1
    affines = [to_affine_nd(rank, image.affine.numpy().astype(float)) for image in (scan, mask)]
    apart = 1e-2 * affine_to_spacing(affines[0], r=rank).min()
    if mask.shape[1:] != scan.shape[1:] or not np.allclose(*affines, rtol=0, atol=apart):
        raise ScanError(
            f"The mask '{path}' (shape {tuple(mask.shape[1:])}) lies on another grid than "
            f"'{image_path(scan)}' (shape {tuple(scan.shape[1:])}), or its affine differs: resample it to the scan's "
            "grid, nearest neighbour."
        )
    if len(mask) != 1:
        raise ScanError(f"The mask '{path}' has {len(mask)} channels: give one, which counts for all the scan's.")
    return mask.as_tensor() > 0
