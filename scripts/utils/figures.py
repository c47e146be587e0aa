"""Pictures of scans and of training, written as PNG files.

Scans are arrays or tensors ``[channels, *spatial]`` in 2D or 3D whose axes run to the right, to the front and to the
top of the head (RAS). A 3D scan is shown in three planes through the middle of its foreground: axial slices with the
front of the head up, coronal and sagittal ones with its top up; the brain's left is on the left.

``value_range`` is what black and white stand for, usually the range of the network's output activation; an infinite
end (identity) becomes the smallest or largest value shown.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from scripts.utils.files import write_whole

DPI = 100
MAX_WIDTH = 19.5  # inches, so that no picture is wider than 1,950 pixels
MAX_PANEL = 2.4  # inches: the longest axis of a scan is never drawn larger
GAP = 0.06
MARGIN = 0.35
LINE = 0.3  # inches that a line of text takes
BAR = 0.65  # inches that a horizontal colour bar takes, with its numbers and its name

# name of a plane, and the axis that it cuts
PLANES = {3: (("axial", 2), ("coronal", 1), ("sagittal", 0)), 2: (("slice", None),)}
ORIENTATION = "Front up in axial slices, top up in the others; left is left."
CROP = 0.06  # of the longest axis: what stays of the background around the foreground

# what the y axis of a curve says
UNITS = {
    "loss": "nats a scan",
    "nll": "nats a scan",
    "kl": "nats a scan",
    "elbo": "nats a scan",
    "bits_per_dim": "bits a voxel and channel",
    "mse": "squared intensity",
    "psnr": "dB",
    "grad_norm": "nats a scan",
    "skipped": "updates",
    "beta": "weight of the KL",
}
TITLES = {
    "nll": "negative log-likelihood",
    "kl": "KL divergence",
    "bits_per_dim": "bits per dim",
    "mse": "mean squared error",
    "grad_norm": "gradient norm",
    "skipped": "skipped updates",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "elbo": "ELBO",
}
LINEAR = {"beta", "skipped"}
COLOURS = {"training": "tab:blue", "validation": "tab:orange"}
KL_FLOOR = 1e-4  # nats a dimension: below, a latent says as good as nothing


# ------------------------------------------------------------------------------------------------------------ scans


def middle(volume: np.ndarray) -> tuple[int, ...]:
    """Indices of the middle of a scan's foreground, one an axis.

    The foreground is what exceeds the darkest value by more than 5 % of the range; a scan without any gives its centre.

    Args:
        volume: ``[*spatial]``.
    """
    return tuple((start + stop) // 2 for start, stop in _foreground(np.asarray(volume)))


def plane(volume: np.ndarray, axis: int | None, index: int = 0) -> np.ndarray:
    """One upright slice of a scan: the front (axial) or the top (coronal, sagittal) of the head is in its first row.

    Args:
        volume: ``[*spatial]``, RAS.
        axis: which axis to cut: 2 gives an axial slice, 1 a coronal, 0 a sagittal one; None for a 2D scan.
        index: where to cut it.
    """
    return np.rot90(volume if axis is None else volume.take(index, axis))


def reconstructions(
    path: str | os.PathLike,
    images: Sequence,
    locs: Sequence,
    scales: Sequence,
    names: Sequence[str],
    value_range: tuple[float, float],
) -> Path:
    """Scans beside their reconstruction, the predicted standard deviation and the absolute difference.

    Args:
        path: of the PNG.
        images, locs, scales: of each scan ``[channels, *spatial]``, in the network's units; every channel gets a group
            of rows, one row a plane.
        names: of the scans.
        value_range: what black and white stand for.
    """
    _same_length(images=images, locs=locs, scales=scales, names=names)
    groups = []
    for image, loc, scale, name in zip(map(_array, images), map(_array, locs), map(_array, scales), names, strict=True):
        for c in range(len(image)):
            title = name if len(image) == 1 else f"{name}, channel {c + 1}"
            groups.append((title, [image[c], loc[c], scale[c], np.abs(image[c] - loc[c])], image[0]))
    box = _foreground_box([row[0] for _, row, _ in groups])
    groups = [(title, [v[box] for v in row], first[box]) for title, row, first in groups]
    low, high = _finite_range(value_range, [v for _, row, _ in groups for v in row[:2]])
    gray = {"cmap": "gray", "vmin": low, "vmax": high}
    styles = [gray, gray, *({"cmap": cmap, "vmin": 0.0} for cmap in ("viridis", "magma"))]
    for column in (2, 3):
        styles[column]["vmax"] = _robust_max([row[column] for _, row, _ in groups])
    headings = ["scan", "reconstruction", "predicted standard deviation", "absolute difference"]
    return _save(path, _columns(groups, headings, styles, bars={2: headings[2], 3: headings[3]}))


def progressive(
    path: str | os.PathLike,
    image,
    recons: Sequence,
    labels: Sequence[str],
    value_range: tuple[float, float],
) -> Path:
    """Reconstructions of one scan from more and more of its latents, then the scan itself.

    Args:
        path: of the PNG.
        image: the scan, ``[channels, *spatial]``.
        recons: the reconstructions, shaped like ``image``, from the fewest latents (coarsest level alone) on.
        labels: what each was made from, say "to 4³".
        value_range: what black and white stand for.
    """
    _same_length(recons=recons, labels=labels)
    image = _array(image)
    box = _foreground_box(list(image))
    volumes = [_array(v)[(slice(None), *box)] for v in (*recons, image)]
    channels = len(volumes[-1])
    low, high = _finite_range(value_range, volumes)
    titles = [""] if channels == 1 else [f"channel {c + 1}" for c in range(channels)]
    groups = [(title, [v[c] for v in volumes], volumes[-1][0]) for c, title in enumerate(titles)]
    styles = [{"cmap": "gray", "vmin": low, "vmax": high}] * len(volumes)
    return _save(path, _columns(groups, [*labels, "scan"], styles))


def anomaly(path: str | os.PathLike, image, restored, score, title: str, value_range: tuple[float, float]) -> Path:
    """A scan beside what the model would rather have, and how far it is off.

    Args:
        path: of the PNG.
        image, restored: ``[channels, *spatial]``, in the network's units; every channel gets a group of rows.
        score: standard deviations by which each voxel is brighter (above 0) or darker, shaped like ``image``.
        title: says what is shown.
        value_range: what black and white stand for.
    """
    image, restored, score = _array(image), _array(restored), _array(score)
    box = _foreground_box(list(image))
    groups = [
        (
            title if len(image) == 1 else f"{title}, channel {c + 1}",
            [v[c][box] for v in (image, restored, score)],
            image[0][box],
        )
        for c in range(len(image))
    ]
    low, high = _finite_range(value_range, [v for _, row, _ in groups for v in row[:2]])
    gray = {"cmap": "gray", "vmin": low, "vmax": high}
    # what noise gives anywhere stays dark
    most = max(6.0, _robust_max([np.abs(row[2]) for _, row, _ in groups]))
    headings = ["scan", "restored", "anomaly"]
    styles = [gray, gray, {"cmap": "berlin", "vmin": -most, "vmax": most}]
    return _save(path, _columns(groups, headings, styles, bars={2: "standard deviations from expected"}))


def strip(path: str | os.PathLike, scans: Sequence, labels: Sequence[str], value_range: tuple[float, float]) -> Path:
    """Scans side by side, cut at the same places.

    Args:
        path: of the PNG.
        scans: each ``[channels, *spatial]``, on one grid; the first says where to cut.
        labels: of the scans.
        value_range: what black and white stand for.
    """
    _same_length(scans=scans, labels=labels)
    scans = [_array(scan) for scan in scans]
    box = _foreground_box([volume for scan in scans for volume in scan])
    low, high = _finite_range(value_range, [volume for scan in scans for volume in scan])
    channels = len(scans[0])
    titles = [""] if channels == 1 else [f"channel {c + 1}" for c in range(channels)]
    groups = [(title, [scan[c][box] for scan in scans], scans[0][0][box]) for c, title in enumerate(titles)]
    styles = [{"cmap": "gray", "vmin": low, "vmax": high}] * len(scans)
    return _save(path, _columns(groups, labels, styles))


def imputation(
    path: str | os.PathLike, image, missing, mean, std, draw, title: str, value_range: tuple[float, float]
) -> Path:
    """A scan and what of it is missing, cut where most of the brain is missing, beside what a model puts there.

    Args:
        path: of the PNG.
        image, mean, std, draw: ``[channels, *spatial]``: the scan, the mean and standard deviation of several draws,
            and one of them; every channel gets a group of rows.
        missing: ``[1, *spatial]``, true where the scan is missing.
        title: says what is shown.
        value_range: what black and white stand for.
    """
    image, missing, mean, std, draw = map(_array, (image, missing, mean, std, draw))
    box = _foreground_box([*image, *mean, missing[0]])
    shown = missing[0] * (mean[0] - mean[0].min() + 1e-6)  # of what is missing, brain counts
    axes = range(shown.ndim)
    most = tuple(int(shown.sum(tuple(set(axes) - {axis})).argmax()) for axis in axes)
    guide = np.zeros_like(shown)
    guide[most] = 1
    groups = []
    for c in range(len(image)):
        seen = np.where(missing[0] > 0, np.nan, image[c])
        row = [volume[box] for volume in (image[c], seen, mean[c], std[c], draw[c])]
        groups.append((title if len(image) == 1 else f"{title}, channel {c + 1}", row, guide[box]))
    low, high = _finite_range(value_range, [v for _, row, _ in groups for v in (row[0], row[2], row[4])])
    gray = {"cmap": "gray", "vmin": low, "vmax": high}
    hole = {**gray, "cmap": colormaps["gray"].with_extremes(bad="tab:red")}
    spread = {"cmap": "viridis", "vmin": 0.0, "vmax": max(float(std.max()), 1e-6)}
    headings = ["scan", "missing (red)", "mean of draws", "spread of draws", "one draw"]
    bars = {3: "standard deviation of draws"}
    return _save(path, _columns(groups, headings, [gray, hole, gray, spread, gray], bars=bars))


def samples(
    path: str | os.PathLike, samples_by_temperature: Mapping[float, Sequence], value_range: tuple[float, float]
) -> Path:
    """Scans drawn from the prior: a row for each temperature, each sample in an axial and a sagittal slice.

    Args:
        path: of the PNG.
        samples_by_temperature: temperature -> samples ``[n, channels, *spatial]``; the first channel is shown.
        value_range: what black and white stand for.
    """
    rows = {t: [_array(sample)[0] for sample in batch] for t, batch in samples_by_temperature.items()}
    volumes = [volume for row in rows.values() for volume in row]
    if not volumes:
        raise ValueError("samples_by_temperature is empty: there is nothing to draw.")
    box = _foreground_box(volumes)
    rows = {t: [v[box] for v in row] for t, row in rows.items()}
    volumes = [v[box] for v in volumes]
    low, high = _finite_range(value_range, volumes)
    cuts = [cut for cut in PLANES[volumes[0].ndim] if cut[0] != "coronal"]
    across = max(map(len, rows.values()))
    extent = _extent(volumes)
    widths = [max(plane(v, axis).shape[1] for v in volumes) for _, axis in cuts]
    height = max(plane(v, axis).shape[0] for v in volumes for _, axis in cuts)
    left = MARGIN + 0.25
    space = MAX_WIDTH - left - MARGIN - across * GAP * 3
    inch = min(MAX_PANEL / extent, space / (across * sum(widths)))  # of a voxel
    cell = sum(widths) * inch + GAP * 3
    sheet = _Sheet(left + across * cell + MARGIN, len(rows) * (height * inch + GAP) + 2 * LINE)
    for r, (temperature, row) in enumerate(rows.items()):
        y = LINE / 2 + r * (height * inch + GAP)
        sheet.text(left / 2, y + height * inch / 2, f"temperature {temperature:g}", rotation=90)
        for column, volume in enumerate(row):
            x, centre = left + column * cell, middle(volume)
            for (_, axis), width in zip(cuts, widths, strict=True):
                picture = plane(volume, axis, 0 if axis is None else centre[axis])
                sheet.picture(x, y, (width * inch, height * inch), inch, picture, cmap="gray", vmin=low, vmax=high)
                x += width * inch
    sheet.footnote(volumes[0].ndim)
    return _save(path, sheet.figure)


def batch(
    path: str | os.PathLike, images: Sequence, names: Sequence[str], value_range: tuple[float, float] | None = None
) -> Path:
    """Contact sheet of a batch as the network gets it.

    Args:
        path: of the PNG.
        images: of each scan ``[channels, *spatial]``; channels are shown below each other.
        names: of the scans.
        value_range: what black and white stand for; by default the smallest and largest value.
    """
    _same_length(images=images, names=names)
    images = [_array(image) for image in images]
    box = _foreground_box([volume for image in images for volume in image])
    images = [image[(slice(None), *box)] for image in images]
    volumes = [volume for image in images for volume in image]
    low, high = _finite_range(value_range or (-math.inf, math.inf), volumes)
    cuts = PLANES[volumes[0].ndim]
    widths = [max(plane(v, axis).shape[1] for v in volumes) for _, axis in cuts]
    height = max(plane(v, axis).shape[0] for v in volumes for _, axis in cuts)
    channels = max(map(len, images))
    # as square a sheet as can be, with slices no smaller than half the largest size
    wide, high_cell = sum(widths), height * channels
    most = max(1, int(MAX_WIDTH / (wide * MAX_PANEL / 2 / _extent(volumes))))
    across = min(len(images), most, math.ceil(math.sqrt(len(images) * high_cell / wide)))
    down = math.ceil(len(images) / across)
    gap = 4 * GAP
    inch = min(MAX_PANEL / _extent(volumes), (MAX_WIDTH - 2 * MARGIN - across * gap) / (across * wide))
    cell = (wide * inch + gap, high_cell * inch + LINE)
    sheet = _Sheet(2 * MARGIN + across * cell[0] - gap, down * cell[1] + 2 * LINE)
    for i, (image, name) in enumerate(zip(images, names, strict=True)):
        x0, y = MARGIN + i % across * cell[0], LINE / 2 + i // across * cell[1]
        centre = middle(image[0])
        sheet.text(x0, y + LINE / 2, _shorten(name, cell[0] - gap), ha="left")
        for c, volume in enumerate(image):
            x = x0
            for (_, axis), width in zip(cuts, widths, strict=True):
                picture = plane(volume, axis, 0 if axis is None else centre[axis])
                top = y + LINE + c * height * inch
                sheet.picture(x, top, (width * inch, height * inch), inch, picture, cmap="gray", vmin=low, vmax=high)
                x += width * inch
    sheet.footnote(volumes[0].ndim)
    return _save(path, sheet.figure)


# --------------------------------------------------------------------------------------------------------- training


def curves(
    path: str | os.PathLike,
    history: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    references: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Every quantity of a training run against the number of updates, one small panel each.

    What is positive and spans more than a factor of 20 gets a logarithmic axis. On a linear one, the first 5 % of the
    updates may leave the panel: they are often orders of magnitude away from the rest.

    Args:
        path: of the PNG.
        history: quantity -> ``{"training": [(update, value), ...], "validation": [...]}``, either may be missing.
        references: quantity -> label -> value of a horizontal line to compare with.
    """
    panels = {
        name: {side: np.asarray(points, float).reshape(-1, 2) for side, points in sides.items() if len(points)}
        for name, sides in history.items()
    }
    panels = {name: sides for name, sides in panels.items() if sides}
    if not panels:
        raise ValueError("history holds no values: there is nothing to draw.")
    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    figure = Figure((5.2 * across, 3.1 * down), dpi=DPI, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
    for axes, (name, sides) in zip(grid, panels.items(), strict=False):
        _curve(axes, name, sides, (references or {}).get(name, {}))
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(panels) - across) : len(panels)]:
        axes.set_xlabel("updates")
        axes.tick_params(labelbottom=True)
    return _save(path, figure)


def _curve(axes: Axes, name: str, sides: Mapping[str, np.ndarray], lines: Mapping[str, float]) -> None:
    for side, points in sides.items():
        updates, values = points[np.isfinite(points).all(1)].T
        colour = COLOURS.get(side)
        window = len(values) // 50
        if window < 3:
            marker = "o" if len(values) < 30 else None
            axes.plot(updates, values, color=colour, marker=marker, markersize=3, linewidth=1.2, label=side)
            continue
        axes.plot(updates, values, color=colour, alpha=0.3, linewidth=0.7)
        sums = np.cumsum(np.insert(values, 0, 0.0))
        smooth = (sums[window:] - sums[:-window]) / window
        axes.plot(updates[window // 2 :][: len(smooth)], smooth, color=colour, linewidth=1.4, label=side)
    for (label, value), style in zip(lines.items(), ("--", ":", "-.", (0, (6, 2))) * len(lines), strict=False):
        axes.axhline(value, color="0.25", linestyle=style, linewidth=1, label=f"{label}: {value:g}")
    points = np.concatenate(list(sides.values()))
    points = points[np.isfinite(points).all(1)]
    if len(points):
        values = points[:, 1]
        if name not in LINEAR and values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
        elif name not in LINEAR and len(points) >= 20:
            shown = np.concatenate([values[points[:, 0] >= 0.05 * points[:, 0].max()], list(lines.values())])
            margin = 0.06 * (np.ptp(shown) or abs(shown[0]) or 1.0)
            axes.set_ylim(shown.min() - margin, shown.max() + margin)
    axes.set_title(TITLES.get(name, name.replace("_", " ")), fontsize=11)
    axes.set_ylabel(UNITS.get(name, ""), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(sides) + len(lines) > 1 or "training" not in sides:
        axes.legend(fontsize=8, framealpha=0.7)


def kl_per_latent(
    path: str | os.PathLike, updates: Sequence[float], kl, dims: Sequence[int], levels: Sequence[int | str]
) -> Path:
    """Which latents live: the KL divergence of each one over the course of training.

    Args:
        path: of the PNG.
        updates: when the KL was measured, ``[time]``, rising.
        kl: ``[time, latents]`` in nats a scan, top first.
        dims: numbers in each latent (channels times grid), ``[latents]``; the colour is KL over dims.
        levels: of each latent, a number or a name such as "4³", ``[latents]``; latents of one level are bracketed.
    """
    updates, kl = np.asarray(updates, float), _array(kl)
    time, latents = kl.shape
    if time == 0 or latents == 0:
        raise ValueError(f"kl has shape {list(kl.shape)}: there is nothing to draw.")
    if len(updates) != time or len(dims) != latents or len(levels) != latents:
        raise ValueError(
            f"kl has shape {list(kl.shape)}, but there are {len(updates)} updates, {len(dims)} dims and {len(levels)} "
            "levels: kl is [time, latents]."
        )
    density = kl / np.asarray(dims, float)
    labels = [str(level) if isinstance(level, str) else f"level {level}" for level in levels]
    starts = [i for i in range(latents) if i == 0 or labels[i] != labels[i - 1]]
    bounds = [*starts, latents]

    figure = Figure((11.5, max(3.2, 1.6 + 0.2 * latents)), dpi=DPI, layout="constrained")
    axes, bars = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [4, 1.5]})
    top = np.nanmax(np.where(np.isfinite(density), density, np.nan), initial=10 * KL_FLOOR)
    norm = LogNorm(KL_FLOOR, 10 ** math.ceil(math.log10(top)), clip=True)
    shown = np.ma.masked_invalid(np.maximum(density, KL_FLOOR)).T
    mesh = axes.pcolormesh(_edges(updates), np.arange(latents + 1), shown, norm=norm, cmap="magma", rasterized=True)
    colour_bar = figure.colorbar(mesh, ax=axes, location="left", pad=0.02, aspect=30, extend="min")
    colour_bar.set_label(f"KL, nats per dimension (black: {KL_FLOOR:g} or less)")
    axes.set_xlabel("updates")
    axes.set_title("KL divergence of each latent, coarsest on top", fontsize=11)

    last = np.nan_to_num(kl[-1], posinf=0.0)
    bars.barh(np.arange(latents) + 0.5, last, height=0.8, color="tab:purple")
    bars.set_xscale("symlog", linthresh=1, linscale=0.5)
    bars.set_xlim(0, max(10, 1.3 * last.max()))
    bars.set_xlabel("nats a scan")
    bars.set_title(f"at update {updates[-1]:,.0f}, sum {last.sum():,.0f}", fontsize=11)
    bars.grid(axis="x", alpha=0.3)
    bars.spines[["top", "right"]].set_visible(False)
    bars.tick_params(axis="y", left=False, labelleft=False, labelright=True, pad=2)
    for start in starts[1:]:
        axes.axhline(start, color="white", linewidth=0.8)
        bars.axhline(start, color="0.6", linewidth=0.6)
    axes.set_yticks([(a + b) / 2 for a, b in itertools.pairwise(bounds)], [labels[i] for i in starts])
    axes.tick_params(axis="y", left=False, labelsize=9)
    axes.set_ylim(latents, 0)
    return _save(path, figure)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Edges of the cells around rising points."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    between = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[1.5 * centres[0] - 0.5 * centres[1]], between, [1.5 * centres[-1] - 0.5 * centres[-2]]])


# ----------------------------------------------------------------------------------------------------------- layout


class _Sheet:
    """A black page on which pictures are placed in inches, from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure((width, height), dpi=DPI, facecolor="black")

    def text(self, x: float, y: float, text: str, size: float = 9.5, colour: str = "0.9", **kwargs) -> None:
        kwargs = {"ha": "center", "va": "center", **kwargs}
        self.figure.text(x / self.width, 1 - y / self.height, text, color=colour, fontsize=size, **kwargs)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place)

    def picture(self, x, y, box: tuple[float, float], inch: float, picture: np.ndarray, **style) -> None:
        """Centre a slice in a box; a voxel is ``inch`` wide."""
        rows, columns = picture.shape
        width, height = columns * inch, rows * inch
        axes = self.axes(x + (box[0] - width) / 2, y + (box[1] - height) / 2, width, height)
        axes.imshow(picture, aspect="auto", **style)
        axes.set_axis_off()

    def colour_bar(self, x: float, y: float, width: float, label: str, cmap: str, vmin: float, vmax: float) -> None:
        axes = self.axes(x, y + 0.1, width, 0.1)
        bar = self.figure.colorbar(ScalarMappable(Normalize(vmin, vmax), cmap), cax=axes, orientation="horizontal")
        bar.ax.tick_params(colors="0.9", labelsize=8)
        bar.ax.locator_params(nbins=4)
        bar.outline.set_visible(False)
        bar.set_label(label, color="0.9", fontsize=9)

    def footnote(self, dims: int) -> None:
        # some 0.047 inches a character
        if dims == 3 and self.width > 0.047 * len(ORIENTATION) + 2 * MARGIN:
            self.text(MARGIN, self.height - LINE / 2, ORIENTATION, size=7.5, colour="0.55", ha="left")


def _columns(
    groups: Sequence[tuple[str, Sequence[np.ndarray], np.ndarray]],
    headings: Sequence[str],
    styles: Sequence[Mapping],
    bars: Mapping[int, str] | None = None,
) -> Figure:
    """Groups of rows, one row a plane, one column a volume.

    Args:
        groups: title and volumes ``[*spatial]`` of each group, and the volume whose foreground says where to cut them.
        headings, styles: of each column; the style goes to ``imshow``.
        bars: label of the colour bar below a column.
    """
    volumes = [volume for _, row, _ in groups for volume in row]
    cuts = PLANES[volumes[0].ndim]
    extent = _extent(volumes)
    gap = 2 * GAP
    inch = min(MAX_PANEL, (MAX_WIDTH - 2 * MARGIN) / len(headings) - gap) / extent
    width = extent * inch
    heights = [max(plane(v, axis).shape[0] for v in volumes) * inch for _, axis in cuts]
    titles = sum(LINE for title, _, _ in groups if title)
    total = 1.3 * LINE + titles + len(groups) * (sum(heights) + len(cuts) * GAP) + (BAR if bars else 0) + LINE
    sheet = _Sheet(2 * MARGIN + len(headings) * (width + gap) - gap, total)
    lefts = [MARGIN + column * (width + gap) for column in range(len(headings))]
    for x, heading in zip(lefts, headings, strict=True):
        sheet.text(x + width / 2, 0.7 * LINE, _shorten(heading, width))
    y = 1.3 * LINE
    for title, row, guide in groups:
        if title:
            sheet.text(MARGIN, y + LINE / 2, _shorten(title, sheet.width - 2 * MARGIN), ha="left", colour="tab:cyan")
            y += LINE
        centre = middle(guide)
        for (name, axis), height in zip(cuts, heights, strict=True):
            if axis is not None:
                sheet.text(MARGIN / 2, y + height / 2, name, rotation=90, size=8.5, colour="0.7")
            for x, volume, style in zip(lefts, row, styles, strict=True):
                picture = plane(volume, axis, 0 if axis is None else centre[axis])
                sheet.picture(x, y, (width, height), inch, picture, **style)
            y += height + GAP
    for column, label in (bars or {}).items():
        sheet.colour_bar(lefts[column] + 0.1 * width, y, 0.8 * width, label, **styles[column])
    sheet.footnote(volumes[0].ndim)
    return sheet.figure


def _foreground(volume: np.ndarray) -> list[tuple[int, int]]:
    """First index of the foreground on each axis, and one past its last."""
    volume = np.where(np.isfinite(volume), volume, np.nan)
    low, high = (np.nanmin(volume), np.nanmax(volume)) if np.isfinite(volume).any() else (0.0, 0.0)
    foreground = volume > low + 0.05 * (high - low)
    if not foreground.any():
        return [(0, n) for n in volume.shape]
    axes = range(volume.ndim)
    found = [np.flatnonzero(foreground.any(tuple(set(axes) - {axis}))) for axis in axes]
    return [(int(i[0]), int(i[-1]) + 1) for i in found]


def _foreground_box(volumes: Sequence[np.ndarray]) -> tuple[slice, ...]:
    """What holds the foreground of all scans and a rim of background; everything, where their shapes differ."""
    shape = volumes[0].shape
    if any(v.shape != shape for v in volumes):
        return (slice(None),) * len(shape)
    rim = math.ceil(CROP * max(shape))
    ends = np.array([_foreground(v) for v in volumes])
    starts, stops = ends[..., 0].min(0) - rim, ends[..., 1].max(0) + rim
    return tuple(slice(max(0, int(a)), int(b)) for a, b in zip(starts, stops, strict=True))


def _array(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, np.float32)


def _extent(volumes: Iterable[np.ndarray]) -> int:
    return max(n for volume in volumes for n in volume.shape)


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


def _shorten(text: str, width: float) -> str:
    """Text that fits ``width`` inches: its middle is left out where need be."""
    most = max(5, int(width / 0.072))  # a character at 9.5 points
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"


def _same_length(**lists: Sequence) -> None:
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError("there must be as many of each: " + ", ".join(f"{n} {name}" for name, n in lengths.items()))
    if 0 in lengths.values():
        raise ValueError(f"{next(iter(lengths))} is empty: there is nothing to draw.")


def _save(path: str | os.PathLike, figure: Figure) -> Path:
    return write_whole(path, lambda temporary: figure.savefig(temporary, dpi=DPI))
