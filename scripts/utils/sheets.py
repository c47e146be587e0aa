"""Slices of volumes, pages on which they are laid out, and how a page becomes a file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from scripts.utils.files import write_whole

DPI = 100
MAX_WIDTH = 19.5  # inches, so that no picture is wider than 1,950 pixels
MAX_PANEL = 2.4  # inches: the longest axis of a scan is never drawn larger
GAP = 0.06
MARGIN = 0.35
LINE = 0.3  # inches that a line of text takes
RING = 13  # points across
BAR = 0.65  # inches that a horizontal colour bar takes, with its numbers and its name
ORIENTATION = "Front up in axial slices, top up in the others; left is left."
# name of a plane, and the axis that it cuts
PLANES = {3: (("axial", 2), ("coronal", 1), ("sagittal", 0)), 2: (("slice", None),)}
CROP = 0.06  # of the longest axis: what stays of the background around the foreground


class Sheet:
    """A black page on which pictures are placed in inches, from its top left corner.

    Args:
        width, height: in inches.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure((width, height), dpi=DPI, facecolor="black")
        self.page = self.figure.add_axes((0, 0, 1, 1), autoscale_on=False, xlim=(0, width), ylim=(height, 0))
        self.page.set_axis_off()

    def text(self, x: float, y: float, text: str, size: float = 9.5, colour: str = "0.9", **kwargs: Any) -> None:
        """Write text, centred at a place unless ``kwargs`` (of matplotlib's ``text``) say otherwise."""
        kwargs = {"ha": "center", "va": "center", "parse_math": False, **kwargs}  # a name may hold a $
        self.figure.text(x / self.width, 1 - y / self.height, text, color=colour, fontsize=size, **kwargs)

    def picture(
        self,
        x: float,
        y: float,
        box: tuple[float, float],
        inch: float,
        picture: np.ndarray,
        mark: tuple[float, float] | None = None,
        **style: Any,
    ) -> None:
        """Centre a slice in a box of this width and height; a voxel is ``inch`` wide, a ring is at column, row."""
        rows, columns = picture.shape
        width, height = columns * inch, rows * inch
        left, top = x + (box[0] - width) / 2, y + (box[1] - height) / 2
        # axes of their own for each picture would take nearly all of the time
        self.page.imshow(picture, aspect="auto", extent=(left, left + width, top + height, top), **style)
        if mark is not None:
            place = left + (mark[0] + 0.5) * inch, top + (mark[1] + 0.5) * inch
            ring = {"markerfacecolor": "none", "markeredgecolor": "lime", "markeredgewidth": 1}
            self.page.plot(*place, "o", markersize=RING, **ring)

    def colour_bar(
        self, x: float, y: float, width: float, label: str, cmap: str | Colormap, vmin: float, vmax: float
    ) -> None:
        """Draw a horizontal colour bar with its numbers and its label below."""
        place = (x / self.width, 1 - (y + 0.2) / self.height, width / self.width, 0.1 / self.height)
        axes = self.figure.add_axes(place)
        bar = self.figure.colorbar(ScalarMappable(Normalize(vmin, vmax), cmap), cax=axes, orientation="horizontal")
        bar.ax.tick_params(colors="0.9", labelsize=8)
        bar.ax.locator_params(nbins=4)
        bar.outline.set_visible(False)
        bar.set_label(label, color="0.9", fontsize=9)

    def footnote(self, dims: int) -> None:
        """Say how the slices of scans with 3 dimensions lie, where there is room."""
        # some 0.047 inches per character
        if dims == 3 and self.width > 0.047 * len(ORIENTATION) + 2 * MARGIN:
            self.text(MARGIN, self.height - LINE / 2, ORIENTATION, size=7.5, colour="0.55", ha="left")


# the title of rows, their volumes [*spatial], one per column, and the volume whose foreground says where to cut them
Group = tuple[str, Sequence[np.ndarray], np.ndarray]


def columns(
    groups: Sequence[Group],
    headings: Sequence[str],
    styles: Sequence[Mapping[str, Any]],
    bars: Mapping[int, str] | None = None,
    marked: Sequence[int] = (),
    in_middle: Sequence[int] = (),
) -> Figure:
    """Lay out groups of rows, one row per plane, one column per volume.

    Args:
        groups: at least one, of as many volumes as there are headings.
        headings, styles: of each column; the style goes to ``imshow``.
        bars: label of the colour bar below a column.
        marked: columns with a ring at the middle of the guide.
        in_middle: columns that are cut in the middle of the group's first volume, not of the guide.
    """
    volumes = [volume for _, row, _ in groups for volume in row]
    cuts = PLANES[volumes[0].ndim]
    extent = longest_axis(volumes)
    gap = 2 * GAP
    inch = min(MAX_PANEL, (MAX_WIDTH - 2 * MARGIN) / len(headings) - gap) / extent
    width = extent * inch
    heights = [max(plane(v, axis).shape[0] for v in volumes) * inch for _, axis in cuts]
    titles = sum(LINE for title, _, _ in groups if title)
    total = 1.3 * LINE + titles + len(groups) * (sum(heights) + len(cuts) * GAP) + (BAR if bars else 0) + LINE
    sheet = Sheet(2 * MARGIN + len(headings) * (width + gap) - gap, total)
    lefts = [MARGIN + column * (width + gap) for column in range(len(headings))]
    for x, heading in zip(lefts, headings, strict=True):
        sheet.text(x + width / 2, 0.7 * LINE, shorten(heading, width))
    y = 1.3 * LINE
    for title, row, guide in groups:
        if title:
            sheet.text(MARGIN, y + LINE / 2, shorten(title, sheet.width - 2 * MARGIN), ha="left", colour="tab:cyan")
            y += LINE
        places = [middle(guide)] * len(row)
        for column in in_middle:
            places[column] = middle(row[0])
        marks = marks_of(places[0], guide.shape)
        for (name, axis), height, mark in zip(cuts, heights, marks, strict=True):
            if axis is not None:
                sheet.text(MARGIN / 2, y + height / 2, name, rotation=90, size=8.5, colour="0.7")
            for column, (x, volume, style) in enumerate(zip(lefts, row, styles, strict=True)):
                picture = plane(volume, axis, 0 if axis is None else places[column][axis])
                ring = mark if column in marked else None
                sheet.picture(x, y, (width, height), inch, picture, ring, **style)
            y += height + GAP
    for column, label in (bars or {}).items():
        sheet.colour_bar(lefts[column] + 0.1 * width, y, 0.8 * width, label, **styles[column])
    sheet.footnote(volumes[0].ndim)
    return sheet.figure


def marks_of(place: Sequence[int], shape: Sequence[int]) -> list[tuple[int, int]]:
    """Column and row of a voxel in each of the slices through it, as :func:`scripts.utils.sheets.plane` turns them."""
    kept = [[a for a in range(len(shape)) if a != axis] for _, axis in PLANES[len(shape)]]
    return [(int(place[across]), int(shape[up] - 1 - place[up])) for across, up in kept]


def contact_sheet(
    cells: Sequence[Sequence[Sequence[np.ndarray]]],
    names: Sequence[str],
    styles: Sequence[Mapping[str, Any]],
    bar: str = "",
    marks: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> Figure:
    """Lay scans out in rows and columns, as square as can be, with slices no smaller than half the largest size.

    Args:
        cells: the slices of each scan, in rows.
        names: of the scans.
        styles: of the rows.
        bar: label of a colour bar of the last row's style; none if empty.
        marks: column and row of a ring in each slice of each scan; None: no rings.
    """
    cuts = range(len(cells[0][0]))
    widths = [max(row[cut].shape[1] for cell in cells for row in cell) for cut in cuts]
    height = max(picture.shape[0] for cell in cells for row in cell for picture in row)
    longest = max(*widths, height)
    wide, high = sum(widths), height * max(map(len, cells))
    most = max(1, int(MAX_WIDTH / (wide * MAX_PANEL / 2 / longest)))
    across = min(len(cells), most, math.ceil(math.sqrt(len(cells) * high / wide)))
    gap = 4 * GAP
    inch = min(MAX_PANEL / longest, (MAX_WIDTH - 2 * MARGIN - across * gap) / (across * wide))
    size = (wide * inch + gap, high * inch + LINE)
    bottom = LINE / 2 + math.ceil(len(cells) / across) * size[1]
    sheet = Sheet(2 * MARGIN + across * size[0] - gap, bottom + (BAR if bar else 0) + 1.5 * LINE)
    for i, (cell, name) in enumerate(zip(cells, names, strict=True)):
        x0, y = MARGIN + i % across * size[0], LINE / 2 + i // across * size[1]
        sheet.text(x0, y + LINE / 2, shorten(name, size[0] - gap), ha="left")
        for r, (row, style) in enumerate(zip(cell, styles, strict=False)):
            x = x0
            rings = marks[i] if marks else [None] * len(row)
            for picture, width, ring in zip(row, widths, rings, strict=True):
                top, box = y + LINE + r * height * inch, (width * inch, height * inch)
                sheet.picture(x, top, box, inch, picture, ring, **style)
                x += width * inch
    if bar:
        sheet.colour_bar(MARGIN, bottom, size[0] - gap, bar, **styles[-1])
    sheet.footnote(3 if len(cuts) == 3 else 2)
    return sheet.figure


def shorten(text: str, width: float) -> str:
    """Text that fits ``width`` inches: its middle is left out where needed."""
    most = max(5, int(width / 0.072))  # a character at 9.5 points
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"


def save(path: str | os.PathLike, figure: Figure) -> Path:
    """Write a figure in the format of the path's suffix, whole or not at all."""
    return write_whole(path, lambda temporary: figure.savefig(temporary, dpi=DPI))


def middle(volume: np.ndarray) -> tuple[int, ...]:
    """Indices of the middle of a scan's foreground, one per axis.

    The foreground is what exceeds the darkest value by more than 5 % of the range; a scan without any gives its centre.
    """
    return tuple((start + stop) // 2 for start, stop in _foreground_ends(np.asarray(volume)))


def plane(volume: np.ndarray, axis: int | None, index: int = 0) -> np.ndarray:
    """One upright slice of a scan: the front (axial) or the top (coronal, sagittal) of the head is in its first row.

    Args:
        volume: ``[*spatial]``, RAS.
        axis: which axis to cut: 2 gives an axial slice, 1 a coronal, 0 a sagittal one; None for a 2D scan.
        index: where to cut it.
    """
    return np.rot90(volume if axis is None else volume.take(index, axis))


def _foreground_ends(volume: np.ndarray) -> list[tuple[int, int]]:
    """First index of the foreground on each axis, and one past its last."""
    volume = np.where(np.isfinite(volume), volume, np.nan)
    low, high = (np.nanmin(volume), np.nanmax(volume)) if np.isfinite(volume).any() else (0.0, 0.0)
    inside = volume > low + 0.05 * (high - low)
    if not inside.any():
        return [(0, n) for n in volume.shape]
    axes = range(volume.ndim)
    found = [np.flatnonzero(inside.any(tuple(set(axes) - {axis}))) for axis in axes]
    return [(int(i[0]), int(i[-1]) + 1) for i in found]


def foreground_box(volumes: Sequence[np.ndarray]) -> tuple[slice, ...]:
    """A box around the foreground of all scans with a rim of background; everything, where their shapes differ."""
    shape = volumes[0].shape
    if any(v.shape != shape for v in volumes):
        return (slice(None),) * len(shape)
    rim = math.ceil(CROP * max(shape))
    ends = np.array([_foreground_ends(v) for v in volumes])
    starts, stops = ends[..., 0].min(0) - rim, ends[..., 1].max(0) + rim
    return tuple(slice(max(0, int(a)), int(b)) for a, b in zip(starts, stops, strict=True))


def as_array(values: Any) -> np.ndarray:
    """An array or a tensor (on any device, of any precision) as a float32 array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, np.float32)


def longest_axis(volumes: Iterable[np.ndarray]) -> int:
    """The most voxels that any volume has along any axis."""
    return max(n for volume in volumes for n in volume.shape)
