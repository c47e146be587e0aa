"""Latents as files: written by ``encode``, listed and read by ``decode``, whose results go back to the scans' grids."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample, Transform
from monai.utils import ImageMetaKey, ensure_tuple
from scripts.data.geometry import fill_outside
from scripts.data.transforms import OUTSIDE, ScanError, per_channel, unscaled
from scripts.inference.engine import list_scans
from scripts.inference.layouts import ScanLayout, scan_stem
from scripts.inference.outputs import scaling_of
from scripts.utils.files import write_whole
from scripts.utils.names import CHANNEL_FILES, image_files

__all__ = ["FitBackd", "LoadLatentsd", "SaveLatentsd", "list_latents", "stack_latents"]

PATTERN = "*_*latents*.npz"  # x_latents.npz, and by BIDS sub-01_desc-latents_T1w.npz
CHANNEL_NAMES = "channel_names"
UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def list_latents(dataset_dir: str | os.PathLike, per_channel: bool = False) -> list[dict[str, Any]]:
    """The latents' files of a folder or a datalist, see :func:`scripts.inference.engine.list_scans`.

    Args:
        dataset_dir: the folder or the datalist.
        per_channel: the items say by which files' names the results of each channel are named, where the latents'
            file does: ``channel_files``.
    """
    items = list_scans(dataset_dir, PATTERN)
    if not per_channel:
        return items
    return [{**item, CHANNEL_FILES: _channel_files(item["image"])} for item in items]


def _channel_files(path: str) -> list[str] | None:
    """What the files of a scan's channels would be called beside its latents; None where the latents don't tell.

    Where the latents' file was renamed, these names change likewise.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file[CHANNEL_NAMES].tolist() if CHANNEL_NAMES in file.files else []
    except UNREADABLE:
        return None  # why will be said when it is its turn
    if len(names) < 2:
        return None
    folder, stem = Path(path).parent, scan_stem(path)
    places = [Path(name) for name in names]
    first = places[0].name
    renamed = [stem.replace(first, place.name) if first in stem else f"{stem}_{place.name}" for place in places]
    return [os.path.normpath(folder / place.parent / name) for place, name in zip(places, renamed, strict=True)]


def background_of(image: MetaTensor) -> list[float]:
    """What each channel of a scan has around it, in its own units."""
    (background,) = (operation[OUTSIDE] for operation in image.applied_operations if OUTSIDE in operation)
    return background


class FitBackd(MapTransform):
    """Take what was decoded to the grid and the units of the scan that its latents came from.

    Needs what :class:`LoadLatentsd` reads. Input: ``[channels, *spatial]``; output: on the scan's grid.

    Args:
        keys: of the decoded images.
        deviation: keys among them that hold standard deviations.
    """

    def __init__(self, keys: KeysCollection, deviation: KeysCollection = (), allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.deviation = ensure_tuple(deviation)
        self.resample = SpatialResample(mode="bilinear", padding_mode="border")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            values = d[key].as_tensor() if isinstance(d[key], MetaTensor) else d[key]
            values = values / per_channel(d["gain"], values) if key in self.deviation else unscaled(values, d)
            image = MetaTensor(values, affine=torch.as_tensor(d["affine"]))
            fitted = self.resample(
                image, dst_affine=torch.as_tensor(d["scan_affine"]), spatial_size=d["scan_shape"].tolist()
            )
            fitted.meta |= {ImageMetaKey.FILENAME_OR_OBJ: d["path"], CHANNEL_FILES: d.get(CHANNEL_FILES)}
            outside = [0.0] * len(fitted) if key in self.deviation else d.get("background", d["offset"])
            d[key] = fill_outside(fitted, d["affine"], values.shape[1:], outside)
        return d


class SaveLatentsd(Transform):
    """Write a scan's latents as ``.npz``: arrays ``z00``, ``mean00``, ``std00``, ``z01``, ..., ``[channels, *grid]``.

    Top first, and ``coordinates`` where there is a population prior; with them what decoding to the scan's grid and
    units needs: ``affine``, ``scan_affine``, ``scan_shape``, ``background``, ``gain``, ``offset`` and ``b_min``; and
    ``channel_names``, the names of the scan's files without their suffixes, relative to the latents' folder.

    Args:
        layout: says where.
        key: of the preprocessed scan, whose trace tells of its grid and units.
    """

    def __init__(self, layout: ScanLayout, key: str = "image") -> None:
        self.layout, self.key = layout, key

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        image = data[self.key]
        names = ("z", "mean", "std", "coordinates")
        latents = {k: np.asarray(v) for k, v in data.items() if str(k).rstrip("0123456789") in names}
        content = {
            "affine": np.asarray(image.affine),
            "scan_affine": np.asarray(image.meta["geometry"]["affine"]),
            "scan_shape": np.asarray(image.meta["geometry"]["shape"]),
            "background": np.asarray(background_of(image)),
            **{name: np.asarray(value) for name, value in scaling_of(image).items()},
            CHANNEL_NAMES: np.asarray(self._names(image_files(image))),
        }
        path = self.layout.filename(image_files(image)[0])
        write_whole(path, lambda temporary: np.savez(temporary, **latents, **content))
        return data

    def _names(self, files: Sequence[str]) -> list[str]:
        paths = [self.layout.path(file) for file in files]
        names = [os.path.relpath(path.with_name(scan_stem(path)), paths[0].parent) for path in paths]
        return [Path(name).as_posix() for name in names]


class LoadLatentsd(MapTransform):
    """Read what :class:`SaveLatentsd` wrote; latents may be missing from some place on.

    Args:
        grids: of each latent, ``(channels, *grid)``, top first.

    Raises:
        ScanError: when the file is damaged, not such a file, or of another network.
    """

    def __init__(self, keys: KeysCollection, grids: Sequence[Sequence[int]], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.grids = [tuple(grid) for grid in grids]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            path = d[key]
            try:
                with np.load(path, allow_pickle=False) as file:
                    content = {name: file[name] for name in file.files}
            except UNREADABLE as error:
                raise ScanError(f"'{path}' cannot be read as latents ({error}): encode the scan again.") from error
            lacking = {"affine", "scan_affine", "scan_shape", "gain", "offset", "b_min"} - set(content)
            if lacking:
                raise ScanError(f"'{path}' lacks {', '.join(sorted(lacking))}: encode the scan again.")
            count = sum(name[0] == "z" and name[1:].isdigit() for name in content)
            missing = [f"z{i:02d}" for i in range(count) if f"z{i:02d}" not in content]
            if missing:
                raise ScanError(
                    f"'{path}' lacks {missing[0]} but has later latents: leave latents out from the end on."
                )
            shapes = [content[f"z{i:02d}"].shape for i in range(count)]
            wrong = next((i for i in range(count) if i >= len(self.grids) or shapes[i] != self.grids[i]), None)
            if wrong is not None:
                expected = list(self.grids[wrong]) if wrong < len(self.grids) else "no such latent"
                raise ScanError(
                    f"'{path}': z{wrong:02d} has shape {list(shapes[wrong])}, but the network has {expected}: decode "
                    "with the weights and the network_def that it was encoded with."
                )
            d |= content | {"path": str(path)}
            d["latents"] = [torch.as_tensor(content[f"z{i:02d}"]).float() for i in range(count)]
        return d


def stack_latents(items: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """The latents of some items, each ``[batch, latent_channels, *grid]``; all items must have as many."""
    return [torch.stack(latents) for latents in zip(*(item["latents"] for item in items), strict=True)]
