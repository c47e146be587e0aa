"""Latents as files: written by ``encode``, listed and read by ``decode``, whose results go back to the scans' grids."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Transform
from scripts.data.scan_grid import Fit
from scripts.data.transforms import ScanError
from scripts.inference.common import list_scans
from scripts.inference.layouts import ScanLayout, scan_stem
from scripts.utils.files import write_whole
from scripts.utils.names import CHANNEL_FILES, image_files

PATTERN = "*_*latents*.npz"  # x_latents.npz, and by BIDS sub-01_desc-latents_T1w.npz
CHANNEL_NAMES = "channel_names"
MOST_VOXELS = 2**32  # of a scan; the largest that is known, of 100 micrometres, has 2**31
NEEDED = tuple(name for name in Fit._fields if name not in ("files", "space_code"))
AFFINES = ("affine", "scan_affine")  # of slices 3 x 3 or 4 x 4
UNREADABLE = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def list_latents(dataset_dir: str | os.PathLike, per_channel: bool = False) -> list[dict[str, Any]]:
    """The latents' files of a folder or a datalist, see :func:`scripts.inference.common.list_scans`.

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


class SaveLatentsd(Transform):
    """Write a scan's latents as ``.npz``: arrays ``z00``, ``mean00``, ``std00``, ``z01``, ..., ``[channels, *grid]``.

    Top first, and ``coordinates`` where there is a population prior; with them what decoding to the scan's grid and
    units needs: ``affine``, ``scan_affine``, ``scan_shape``, ``background``, ``gain``, ``offset`` and ``b_min``; and
    ``channel_names``, the names of the scan's files without their suffixes, relative to the latents' folder.
    """

    def __init__(self, layout: ScanLayout) -> None:
        self.layout = layout

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        image = data["image"]
        names = ("z", "mean", "std", "coordinates")
        latents = {k: np.asarray(v) for k, v in data.items() if str(k).rstrip("0123456789") in names}
        content = {**Fit.of(image).arrays(), CHANNEL_NAMES: np.asarray(self._names(image_files(image)))}
        path = self.layout.filename(image_files(image)[0])
        write_whole(path, lambda temporary: np.savez(temporary, **latents, **content))
        return data

    def _names(self, files: Sequence[str]) -> list[str]:
        paths = [self.layout.path(file) for file in files]
        names = [os.path.relpath(path.with_name(scan_stem(path)), paths[0].parent) for path in paths]
        return [Path(name).as_posix() for name in names]


class LoadLatentsd(MapTransform):
    """Read what :class:`SaveLatentsd` wrote; latents may be missing from some place on.

    Adds ``latents``, a list of tensors, and ``fit``, see :class:`scripts.data.scan_grid.Fit`.

    Args:
        keys: of the paths.
        grids: of each latent, ``(channels, *grid)``, top first.
        channels: of the scans.

    Raises:
        ScanError: when the file is damaged, not such a file, or of another network.
    """

    def __init__(self, keys: KeysCollection, grids: Sequence[Sequence[int]], channels: int = 1) -> None:
        super().__init__(keys)
        self.grids, self.channels = [tuple(grid) for grid in grids], channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            path = d[key]
            try:
                with np.load(path, allow_pickle=False) as file:
                    content = {name: file[name] for name in file.files}
            except (*UNREADABLE, MemoryError) as error:
                raise ScanError(f"'{path}' cannot be read as latents ({error}): encode the scan again.") from error
            d["latents"] = self._latents(path, content)
            d["fit"] = self._fit(path, content)._replace(files=d.get(CHANNEL_FILES) or [str(path)])
        return d

    def _latents(self, path: str, content: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
        """The latents of a file, checked."""
        count = sum(name[0] == "z" and name[1:].isdigit() for name in content)
        missing = [f"z{i:02d}" for i in range(count) if f"z{i:02d}" not in content]
        if missing:
            raise ScanError(f"'{path}' lacks {missing[0]} but has later latents: leave latents out from the end on.")
        latents = [content[f"z{i:02d}"] for i in range(count)]
        for i, latent in enumerate(latents):
            if i >= len(self.grids) or latent.shape != self.grids[i]:
                expected = list(self.grids[i]) if i < len(self.grids) else "no such latent"
                raise ScanError(
                    f"'{path}': z{i:02d} has shape {list(latent.shape)}, but the network has {expected}: decode with "
                    "the weights and the network_def that it was encoded with."
                )
            _check_numbers(path, f"z{i:02d}", latent)
        return [torch.as_tensor(latent).float() for latent in latents]

    def _fit(self, path: str, content: Mapping[str, np.ndarray]) -> Fit:
        """How the scan was brought to the network's grid, checked."""
        content = {"background": content.get("offset"), **content}  # of earlier versions
        lacking = sorted(set(NEEDED) - {name for name, value in content.items() if value is not None})
        if lacking:
            raise ScanError(f"'{path}' lacks {', '.join(lacking)}: encode the scan again.")
        dims = len(self.grids[0]) - 1
        shapes = {"affine": (4, 4), "scan_affine": (4, 4), "scan_shape": (dims,), "b_min": ()}
        for name in NEEDED:
            value, shape = content[name], shapes.get(name, (self.channels,))
            if value.shape != shape and not (name in AFFINES and value.shape == (dims + 1, dims + 1)):
                raise ScanError(
                    f"'{path}': {name} has shape {list(value.shape)} where {list(shape)} is expected: encode the scan "
                    "again."
                )
            _check_numbers(path, name, value)
        for name in AFFINES:
            if np.linalg.matrix_rank(content[name]) < len(content[name]):
                raise ScanError(f"'{path}': {name} is singular: encode the scan again.")
        if (content["gain"] <= 0).any():
            raise ScanError(f"'{path}': gain is {content['gain'].tolist()}, not above 0: encode the scan again.")
        shape = content["scan_shape"].astype(int).tolist()
        if min(shape) < 1 or math.prod(shape) > MOST_VOXELS:
            raise ScanError(f"'{path}': scan_shape is {shape}: no scan has such a grid; encode the scan again.")
        values = {name: content[name] for name in NEEDED}
        return Fit(**values | {"scan_shape": shape, "b_min": float(content["b_min"])})


def _check_numbers(path: str, name: str, values: np.ndarray) -> None:
    """Refuse an array that holds anything but finite real numbers."""
    if values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise ScanError(
            f"'{path}': {name} holds what is no finite number (type {values.dtype}): mend it, or encode the scan again."
        )


def stack_latents(items: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """The latents of some items, each ``[batch, latent_channels, *grid]``; all items must have as many."""
    return [torch.stack(latents) for latents in zip(*(item["latents"] for item in items), strict=True)]
