"""A page about results: tables, pictures, settings and versions in one HTML file that needs nothing beside it.

It can be sent by mail. Every job of inference writes one, and so do check, prepare and evaluate.
"""

from __future__ import annotations

import base64
import csv
import json
import math
import os
import platform
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from scripts.utils.files import read_json, write_text

__all__ = ["ShownTable", "ShownVolume", "read_shown", "write_report"]

MOST_ROWS, MOST_COLUMNS = 500, 40  # of a table
OF_EACH_LATENT = re.compile(r"kl_(per_dim_)?z\d+")  # columns that the file has, and the page has not
NAMES = ("subject", "session")  # columns that stay as they are, as the first one does: 2020.10 is a name
LONG = 40  # characters of a cell from which on it is wrapped
MOST_PICTURES, MOST_BYTES = 40, 15_000_000  # of all pictures
OPEN = 6  # pictures of scans that are not folded away
MOST_VOXELS = 128  # along an axis; of larger volumes every second voxel is shown, or every third, ...
ICON = re.compile(r'<link[^>]*rel="[^"]*icon"[^>]*>')  # nilearn's, which is on the internet
STYLE = "<style>body { background: #000; margin: 0; }</style>"
MOST_VOLUMES, MOST_VOLUME_BYTES = 4, 8_000_000  # of all volumes, as the page holds them
PACKAGES = ("torch", "monai", "nibabel", "numpy")
METADATA = Path(__file__).parents[2] / "configs" / "metadata.json"


class Table(NamedTuple):
    """A table as the page shows it.

    Attributes:
        name: of its file.
        columns, rows: those that are shown.
        left_out: how many are not, rows and columns together.
        beside: rows to compare the others with, such as their median; the first cell says what they are.
    """

    name: str
    columns: list[str]
    rows: list[list[str]]
    left_out: int
    beside: Sequence[Sequence[str]] = ()


class ShownTable(NamedTuple):
    """A CSV file for a page.

    Attributes:
        path: of the file, whose first column says which scan a row is of.
        first: columns that come right after that, as far as there are any.
        worst: the column by which rows are sorted, the number farthest from 0 first; empty: they stay as they are.
        usual: what is usual, in words, by column.
    """

    path: Path
    first: Sequence[str] = ()
    worst: str = ""
    usual: Mapping[str, str] = {}


class ShownVolume(NamedTuple):
    """A volume for a page.

    Attributes:
        path: of a NIfTI file; of several channels the first is shown.
        background: of the scan that a map lies on; None: the volume is shown by itself, in grey.
        most: of a map, the value with the brightest colour; None: its own largest.
    """

    path: str | os.PathLike
    background: str | os.PathLike | None = None
    most: float | None = None


class Picture(NamedTuple):
    """A PNG or a volume as the page holds it: the name of its file, and its bytes in base 64 or its HTML."""

    name: str
    data: str


def write_report(
    output_dir: str | os.PathLike,
    title: str,
    lead: str,
    tables: Iterable[str | os.PathLike | ShownTable] = (),
    pictures: Iterable[str | os.PathLike] = (),
    settings: Mapping[str, Any] | None = None,
    failed: Sequence[tuple[str, str]] = (),
    volumes: Iterable[ShownVolume] = (),
    legend: str = "",
    name: str = "report.html",
    scans: Iterable[str | os.PathLike] = (),
) -> Path:
    """Write a page, whole or not at all.

    Args:
        output_dir: the folder of the results.
        title, lead: of the page; the lead is a sentence.
        tables: CSV files; those that do not exist are left out, and of long ones the first 500 rows are shown.
        pictures: PNG files, likewise.
        settings: with what the results were made.
        failed: scans of which there are no results, and why.
        volumes: likewise; the first 4 or 8 MB, as slices that follow the mouse.
        legend: what the tables' columns mean, in a few sentences.
        name: of the file.
        scans: PNG files of single scans, which are shown smaller, two in a row and folded away after the first 6. Of
            these and the other pictures the first 40 or 15 MB are shown.
    """
    from jinja2 import Environment, FileSystemLoader  # only where a page is written: commands start without it

    folder = Path(output_dir)
    slices, volumes_left_out = _volumes([shown for shown in volumes if Path(shown.path).is_file()], folder)
    sheets, singles = ([path for path in map(Path, paths) if path.is_file()] for paths in (pictures, scans))
    shown, left_out = _pictures([*sheets, *singles], folder)
    tables = [table if isinstance(table, ShownTable) else ShownTable(Path(table)) for table in tables]
    rows = [
        (name, value if isinstance(value, str) else json.dumps(value, default=str))
        for name, value in (settings or {}).items()
    ]
    bundle = read_json(METADATA, "the bundle's metadata")["version"]
    rows += [("bundle", bundle), ("python", platform.python_version())]
    rows += [(name, version(name)) for name in PACKAGES]
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html")
    text = page.render(
        title=title,
        lead=lead,
        legend=legend,
        failed=Table("failed.csv", ["image", "reason"], [list(row) for row in failed], 0),
        tables=[read_shown(table) for table in tables if table.path.is_file()],
        long=LONG,
        pictures=shown[: len(sheets)],
        scans=shown[len(sheets) :],
        open=OPEN,
        pictures_left_out=left_out,
        volumes=slices,
        volumes_left_out=volumes_left_out,
        settings=rows,
    )
    return write_text(folder / name, text)


def read_shown(table: ShownTable) -> Table:
    """A table as a page shows it; with three rows or more, the median of its numbers stands beside it."""
    with table.path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        columns = next(reader, [])
        cells = list(reader)
    if table.worst in columns:
        place = columns.index(table.worst)
        cells.sort(key=lambda row: -abs(_number(row[place], 0)))
    first = {name: number for number, name in enumerate(table.first, 1)}
    order = sorted(
        (place for place, name in enumerate(columns) if not OF_EACH_LATENT.fullmatch(name)),
        key=lambda place: 0 if place == 0 else first.get(columns[place], len(columns) + 1),
    )[:MOST_COLUMNS]
    kept = {0, *(place for place, name in enumerate(columns) if name in NAMES)}
    names = [columns[place] for place in order]
    rows = [[row[place] if place in kept else _short(row[place]) for place in order] for row in cells]
    left_out = len(columns) - len(order) + max(0, len(rows) - MOST_ROWS)
    return Table(table.path.name, names, rows[:MOST_ROWS], left_out, _beside(table, names, rows))


def _short(cell: str) -> str:
    """A number with the digits that one reads; any other cell as it is."""
    number = _number(cell) if "." in cell else math.nan
    return f"{number:.5g}" if math.isfinite(number) else cell


def _beside(table: ShownTable, names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
    beside = []
    if any(name in table.usual for name in names):
        beside.append(["usual", *(table.usual.get(name, "") for name in names[1:])])
    if table.worst in names and len(rows) >= 3:
        numbers = [[_number(row[place]) for row in rows] for place in range(1, len(names))]
        finite = [[value for value in column if math.isfinite(value)] for column in numbers]
        beside.append(
            ["median of these", *(f"{np.median(values):.4g}" if len(values) >= 3 else "" for values in finite)]
        )
    return beside


def _number(cell: str, otherwise: float = math.nan) -> float:
    try:
        value = float(cell)
    except ValueError:
        return otherwise
    return otherwise if math.isnan(value) else value


def _pictures(paths: Sequence[Path], folder: Path) -> tuple[list[Picture], int]:
    """The first pictures, and how many are left out."""
    shown: list[Picture] = []
    size = 0
    for path in paths[:MOST_PICTURES]:
        size += path.stat().st_size
        if size > MOST_BYTES:
            break
        shown.append(Picture(_name(path, folder), base64.b64encode(path.read_bytes()).decode("ascii")))
    return shown, len(paths) - len(shown)


def _volumes(volumes: Sequence[ShownVolume], folder: Path) -> tuple[list[Picture], int]:
    """The first volumes that can be shown, and how many are left out."""
    shown: list[Picture] = []
    left_out, size = 0, 0
    for volume in volumes:
        page = volume_html(volume) if len(shown) < MOST_VOLUMES and size < MOST_VOLUME_BYTES else None
        size += len(page or "")
        if page is None or size > MOST_VOLUME_BYTES:
            left_out += 1
        else:
            shown.append(Picture(_name(Path(volume.path), folder), page))
    return shown, left_out


def volume_html(shown: ShownVolume) -> str | None:
    """A page with slices of a volume; None where it is not one of 3D.

    A map is blue where it is below 0 and orange to yellow where it is above, which colour-blind people can tell apart;
    what is below a third of ``most`` is left out.
    """
    image = read_volume(shown.path)
    if image is None:
        return None
    # only where a volume is shown: commands start without PyTorch, scikit-learn and pandas
    from nilearn.plotting import view_img
    from scripts.utils.figures import ANOMALY_STYLE

    options: dict[str, Any] = {"cmap": "gray", "bg_img": None, "threshold": None, "symmetric_cmap": False}
    background = None if shown.background is None else read_volume(shown.background)
    if background is not None:
        most = shown.most or float(np.quantile(np.abs(image.get_fdata(dtype=np.float32)), 0.999)) or 1e-6
        options = {"cmap": ANOMALY_STYLE["cmap"], "bg_img": background, "threshold": most / 3, "vmax": most}
    with warnings.catch_warnings():  # of constant images
        warnings.simplefilter("ignore")
        view = view_img(image, black_bg=True, resampling_interpolation="nearest", **options)
    return ICON.sub(STYLE, view.html)


def read_volume(path: str | os.PathLike) -> nib.Nifti1Image | None:
    """The first channel of a volume, thinned out where it is large; None where it is not NIfTI or not 3D."""
    try:
        image = nib.load(path)
    except (nib.filebasedimages.ImageFileError, OSError):
        return None
    if len(image.shape) < 3 or min(image.shape[:3]) < 2:
        return None
    by = math.ceil(max(image.shape[:3]) / MOST_VOXELS)
    array = np.asarray(image.dataobj, dtype=np.float32)[::by, ::by, ::by]
    array = np.nan_to_num(array[(..., *[0] * (array.ndim - 3))])
    return nib.Nifti1Image(array, image.affine @ np.diag([by, by, by, 1]))


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
