"""Pictures of scans, written as PNG files.

Scans are arrays or tensors ``[channels, *spatial]`` in 2D or 3D whose axes run to the right, to the front and to the
top of the head (RAS). A 3D scan is shown in three planes through the middle of its foreground: axial slices with the
front of the head up, coronal and sagittal ones with its top up; the brain's left is on the left.

``value_range`` is what black and white stand for, usually the range of the network's output activation; an infinite
end (identity) becomes the smallest or largest value shown.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap
from scripts.utils.sheets import (
    PLANES,
    Group,
    as_array,
    columns,
    contact_sheet,
    foreground_box,
    marks_of,
    middle,
    plane,
    save,
)

# Black where a scan is as expected, bright at 3 standard deviations and saturated from 6 on, the same in all pictures.
ANOMALY_STYLE = {
    "cmap": LinearSegmentedColormap.from_list("anomaly", ["white", "deepskyblue", "black", "orangered", "yellow"]),
    "vmin": -6.0,
    "vmax": 6.0,
}
ANOMALY_LABEL = "standard deviations from expected"


def reconstructions(
    path: str | os.PathLike,
    images: Sequence,
    locs: Sequence,
    scales: Sequence,
    names: Sequence[str | Sequence[str]],
    value_range: tuple[float, float],
) -> Path:
    """Draw scans beside their reconstruction, the predicted standard deviation and the absolute difference.

    Args:
        path: of the PNG.
        images, locs, scales: of each scan ``[channels, *spatial]``, in the network's units; every channel gets a group
            of rows, one row per plane.
        names: of each scan, or of its channels.
        value_range: what black and white stand for.
    """
    images, locs, scales = ([as_array(values) for values in scans] for scans in (images, locs, scales))
    box = foreground_box([volume for image in images for volume in image])
    groups = []
    for image, loc, scale, name in zip(images, locs, scales, names, strict=True):
        groups += _groups(name, [image, loc, scale, np.abs(image - loc)], image[0], box)
    gray = _gray(value_range, [volume for _, row, _ in groups for volume in row[:2]])
    styles = [gray, gray, *({"cmap": cmap, "vmin": 0.0} for cmap in ("viridis", "magma"))]
    for column in (2, 3):
        styles[column]["vmax"] = _robust_max([row[column] for _, row, _ in groups])
    headings = ["scan", "reconstruction", "predicted standard deviation", "absolute difference"]
    return save(path, columns(groups, headings, styles, bars={2: headings[2], 3: headings[3]}))


def strip(
    path: str | os.PathLike,
    scans: Sequence,
    labels: Sequence[str],
    value_range: tuple[float, float],
    guide: Any = None,
    titles: Sequence[str] = (),
) -> Path:
    """Draw scans side by side, cut at the same places.

    Args:
        path: of the PNG.
        scans: each ``[channels, *spatial]``, on one grid.
        labels: of the scans.
        value_range: what black and white stand for.
        guide: the scan whose foreground is shown; if not given, that of all is shown, cut where the first one says.
        titles: of the channels; without, they are numbered where there are several.
    """
    scans = [as_array(scan) for scan in scans]
    guides = scans if guide is None else [as_array(guide)]
    box = foreground_box([volume for scan in guides for volume in scan])
    groups = _groups(titles, scans, guides[0][0], box)
    gray = _gray(value_range, [volume for _, row, _ in groups for volume in row])
    return save(path, columns(groups, labels, [gray] * len(scans)))


def anomaly(
    path: str | os.PathLike,
    image: Any,
    restored: Any,
    score: Any,
    title: str | Sequence[str],
    value_range: tuple[float, float],
    headings: tuple[str, str] = ("restored", "anomaly"),
) -> Path:
    """Draw a scan beside its restoration by the model and its anomaly map, cut where that is largest in the foreground.

    A ring marks that place. Scan and map are shown in slices through the middle as well.

    Args:
        path: of the PNG.
        image, restored: ``[channels, *spatial]``, in the network's units; every channel gets a group of rows.
        score: standard deviations by which each voxel is brighter (above 0) or darker, shaped like ``image``.
        title: says what is shown, for all channels or for each.
        value_range: what black and white stand for.
        headings: what ``restored`` and ``score`` are called.
    """
    # a scan that is not clipped may have a few voxels beside which all others are background
    image, restored, score = np.clip(as_array(image), *value_range), as_array(restored), as_array(score)
    peak = np.ravel_multi_index(peak_of(image, score)[1:], image[0].shape)
    groups = _groups(title, [image, restored, score], _mark(peak, image[0].shape), foreground_box(list(image)))
    groups = [(name, [*row, row[0], row[2]], guide) for name, row, guide in groups]
    gray = _gray(value_range, [volume for _, row, _ in groups for volume in row[:2]])
    names = ["scan, at the ring", *headings, "scan, in its middle", f"{headings[1]}, there"]
    styles = [gray, gray, ANOMALY_STYLE, gray, ANOMALY_STYLE]
    return save(path, columns(groups, names, styles, {2: ANOMALY_LABEL}, marked=(0, 2), in_middle=(3, 4)))


def peak_of(image: np.ndarray, score: np.ndarray) -> tuple[int, ...]:
    """The channel and the voxel of a scan's foreground where its anomaly is largest."""
    inside = image > image.min() + 0.05 * np.ptp(image)
    return tuple(map(int, np.unravel_index(np.argmax(np.where(inside, np.abs(score), 0)), image.shape)))


def imputation(
    path: str | os.PathLike,
    image: Any,
    missing: Any,
    mean: Any,
    std: Any,
    draw: Any,
    title: str | Sequence[str],
    value_range: tuple[float, float],
) -> Path:
    """Draw a scan and what is missing of it, cut where most of the brain is missing, beside what a model puts there.

    Args:
        path: of the PNG.
        image, mean, std, draw: ``[channels, *spatial]``: the scan, the mean and standard deviation of several draws,
            and one of them; every channel gets a group of rows.
        missing: ``[1, *spatial]``, true where the scan is missing.
        title: says what is shown, for all channels or for each.
        value_range: what black and white stand for.
    """
    image, missing, mean, std, draw = map(as_array, (image, missing, mean, std, draw))
    where = missing[0] if missing.any() else np.ones_like(missing[0])
    weight = where * (mean[0] - mean[0].min() + 1e-6)  # of what is missing, brain counts
    axes = range(weight.ndim)
    most = tuple(int(weight.sum(tuple(set(axes) - {axis})).argmax()) for axis in axes)
    guide = _mark(np.ravel_multi_index(most, weight.shape), weight.shape)
    seen = np.where(missing > 0, np.nan, image)
    box = foreground_box([*image, *mean, missing[0]])
    groups = _groups(title, [image, seen, mean, std, draw], guide, box)
    gray = _gray(value_range, [volume for _, row, _ in groups for volume in (row[0], row[2], row[4])])
    hole = {**gray, "cmap": colormaps["gray"].with_extremes(bad="tab:red")}
    spread = {"cmap": "viridis", "vmin": 0.0, "vmax": max(float(std.max()), 1e-6)}
    headings = ["scan", "missing (red)", "mean of draws", "spread of draws", "one draw"]
    bars = {3: "standard deviation of draws"}
    return save(path, columns(groups, headings, [gray, hole, gray, spread, gray], bars=bars))


def _mark(place: int, shape: Sequence[int]) -> np.ndarray:
    """A volume of zeros but for one voxel, by its number: scans are cut there."""
    volume = np.zeros(shape, np.float32)
    volume.flat[place] = 1
    return volume


def batch(
    path: str | os.PathLike, images: Sequence, names: Sequence[str], value_range: tuple[float, float] | None = None
) -> Path:
    """Draw a contact sheet of a batch as the network gets it.

    Args:
        path: of the PNG.
        images: of each scan ``[channels, *spatial]``; channels are shown below each other.
        names: of the scans.
        value_range: what black and white stand for; by default the smallest and largest value.
    """
    images = [as_array(image) for image in images]
    box = foreground_box([volume for image in images for volume in image])
    images = [image[(slice(None), *box)] for image in images]
    volumes = [volume for image in images for volume in image]
    low, high = _finite_range(value_range or (-math.inf, math.inf), volumes)
    gray = {"cmap": "gray", "vmin": low, "vmax": high}
    cells = [[_planes(volume, middle(image[0])) for volume in image] for image in images]
    return save(path, contact_sheet(cells, names, [gray] * max(map(len, images))))


def anomalies(path: str | os.PathLike, scans: Iterable[tuple[Any, Any]], titles: Sequence[str | Sequence[str]]) -> Path:
    """Draw a contact sheet of scans above their anomaly maps, cut where these are largest in the foreground: a ring.

    Args:
        path: of the PNG.
        scans: of each scan, one at a time, itself and its map, each ``[channels, *spatial]``. Of several channels the
            one with the largest anomaly is shown, its intensities from the least to the 99.95th percentile.
        titles: of each scan, or of its channels.
    """
    cells, marks, channels = [], [], []
    for image, score in scans:
        image, score = as_array(image), as_array(score)
        channel, *centre = peak_of(image, score)
        box = foreground_box(list(image))
        low, high = image[channel].min(), np.percentile(image[channel], 99.95)
        shown = (image[channel] - low) / max(high - low, 1e-6)
        place = [int(index) - (cut.start or 0) for index, cut in zip(centre, box, strict=True)]
        cells.append([_planes(volume[box], place) for volume in (shown, score[channel])])
        marks.append(marks_of(place, shown[box].shape))
        channels.append((channel, len(image)))
    names = [_channel_titles(title, count)[c] for title, (c, count) in zip(titles, channels, strict=True)]
    styles = [{"cmap": "gray", "vmin": 0.0, "vmax": 1.0}, ANOMALY_STYLE]
    return save(path, contact_sheet(cells, names, styles, ANOMALY_LABEL, marks))


def _planes(volume: np.ndarray, centre: Sequence[int]) -> list[np.ndarray]:
    """Copies of the slices of a scan through one voxel, so that the scan itself need not be kept."""
    return [plane(volume, axis, 0 if axis is None else centre[axis]).copy() for _, axis in PLANES[volume.ndim]]


def _groups(
    title: str | Sequence[str], scans: Sequence[np.ndarray], guide: np.ndarray, box: tuple[slice, ...]
) -> list[Group]:
    """A group of rows for each channel of scans that stand side by side, cropped to a box, cut where ``guide`` says."""
    titles = _channel_titles(title, len(scans[0]))
    return [(name, [scan[c][box] for scan in scans], guide[box]) for c, name in enumerate(titles)]


def _channel_titles(title: str | Sequence[str], channels: int) -> list[str]:
    """A title for each channel: those given, or one for all, to which the channel's number is added."""
    titles = [title] if isinstance(title, str) else list(title)
    if len(titles) == channels:
        return titles
    start = f"{titles[0]}, " if titles and titles[0] else ""
    return [f"{start}channel {c + 1}" for c in range(channels)] if channels > 1 else [start.removesuffix(", ")]


def _gray(value_range: tuple[float, float], volumes: Sequence[np.ndarray]) -> dict[str, Any]:
    """The style of intensities."""
    low, high = _finite_range(value_range, volumes)
    return {"cmap": "gray", "vmin": low, "vmax": high}


def _finite_range(value_range: tuple[float, float], volumes: Sequence[np.ndarray]) -> tuple[float, float]:
    low, high = value_range
    if not math.isfinite(low):
        low = min(float(np.min(v, where=np.isfinite(v), initial=math.inf)) for v in volumes)
    if not math.isfinite(high):
        high = max(float(np.max(v, where=np.isfinite(v), initial=-math.inf)) for v in volumes)
    return (low, high) if math.isfinite(low) and low < high < math.inf else (0.0, 1.0)


def _robust_max(volumes: Sequence[np.ndarray]) -> float:
    """A largest value that a few voxels don't decide."""
    values = np.concatenate([v.ravel() for v in volumes])
    values = values[np.isfinite(values)]
    return float(np.quantile(values, 0.998)) or 1e-6 if len(values) else 1.0
