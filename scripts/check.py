"""Read a whole data set before anyone trains on it, and say which scans cannot or should not be used.

    python -m scripts.check DIR
    python -m scripts.check DIR --scan_pattern "*_FLAIR.nii.gz" --spacing 1 --orientation RAS --strict True

Writes `report.csv` (a row a scan) and `contact_sheet.png`, and prints what is worst. Each scan is compared with what is
asked for, and with what most of the cohort has; nobody says beforehand how a scan should look.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import math
import numbers
import os
import random
import re
import shutil
import sys
import tempfile
import textwrap
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import itk
import nibabel as nib
import numpy as np
import SimpleITK
from joblib import delayed
from monai.data import MetaTensor
from monai.transforms import Orientation
from monai.utils import ensure_tuple

from scripts.data.datalist import find_scans, subject_names
from scripts.data.geometry import describe, differences, mixed_voxel_sizes, usual_voxel_size
from scripts.data.transforms import ADVICE, CheckScand, FitShape, LoadScand, ScanError, content_suffix
from scripts.utils import figures
from scripts.utils.command_line import run
from scripts.utils.files import write_csv
from scripts.utils.parallel import choose_workers, run_parallel

__all__ = ["Report", "Scan", "check"]

# ----------------------------------------------------------------------------------------------------------- limits
# All of them. They are wide on purpose: a list of false alarms is read once and never again.

# Below this, the middle of a cohort is a matter of chance, and no scan is compared with the others.
MIN_COHORT = 10
# What nine tenths share is usual, and the rest differ from it. Less than that is a cohort of several protocols, in
# which no voxel size and no orientation is wrong.
USUAL = 0.9
# A value is far from the others when it lies REACH times further from the median than the outer TAIL of the cohort
# begins. For a normal distribution that is 5.1 standard deviations. Because it is measured in the tail, a second kind
# of scan that makes up more than a tenth of a cohort moves the limit beyond itself.
TAIL, REACH = 0.1, 4.0
# And however alike the others are, it must be at least this far from their median.
LEAST = {
    "similarity": 0.05,  # correlation; turned heads differ by more, and other heads by less (docs/checking.md)
    "contrast": 0.2,  # correlation; gray and white matter alone decide it, so it varies more
    "background": 0.15,  # share of voxels; a neck more or less moves it by less
    "range": 2.0,  # powers of ten: MR units are arbitrary, but 0 to 1 among 0 to 4000 is another processing
    "coarsest voxel": math.log10(2),  # powers of ten: twice as thick
    "field of view": math.log10(1.3),  # powers of ten; 256 mm against 220 mm is one protocol's freedom
}
# A share of a scan's range. Resampling by splines dips a little below zero at edges, in less than 1 % of voxels.
NEGATIVE = 0.05
# A share of voxels at the very maximum. Scaling to 8 bits clips 0.1 % to 1 %; a clipped head or a mask has more.
CLIPPED = 0.03

# ---------------------------------------------------------------------------------------------------------- reports

THUMBNAIL = 24  # voxels along each axis of what is compared; 27 kB a scan, on disk
PICTURE = 64  # voxels along each axis of what the contact sheet shows
SAMPLE = 500  # scans whose median is the cohort's
SHEET, SHEET_RANDOM = 96, 24  # scans on the contact sheet, and how many of them are a random sample at least
TABLE = 40  # rows on the terminal

VERDICTS = ("unusable", "suspicious", "passed over", "good")
IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm", ".ima", ".hdr", ".mgz", ".mgh", ".mnc")
NAMED_OTHERWISE = {".nhdr": ".nrrd", ".mhd": ".mha"}  # headers, whose voxels are in another file
PASSED_OVER = "passed over, since scan_pattern does not match it"
PIXEL_TYPES = {
    getattr(SimpleITK, f"sitk{kind}{bits}"): f"{kind.lower()}{bits}"
    for kind, sizes in {"Int": (8, 16, 32, 64), "UInt": (8, 16, 32, 64), "Float": (32, 64)}.items()
    for bits in sizes
}


@dataclass
class Scan:
    """
    What is known of one scan: a row of the report. What could not be found out is None.

    Attributes:
        path: relative to the data set, the channels' paths joined by ";".
        subject: as :py:mod:`scripts.data.datalist` reads it from the path.
        verdict: `unusable`, `suspicious`, `passed over` (an image that `scan_pattern` does not match) or `good`.
        reasons: half sentences.
        shape, orientation: of the stored axes.
        spacing, field_of_view: in mm along the world's axes (right, anterior, superior).
        oblique: the largest angle in degrees between a stored axis and the world's axis nearest to it.
        dtype: of the numbers on disk.
        minimum, percentile_1, median, percentile_99, maximum: of the finite voxels.
        background: the share of voxels in the lowest 5 % of the range from minimum to 99th percentile.
        finite: the share of voxels that are neither NaN nor infinite.
        similarity: correlation with the cohort's median scan, everywhere.
        contrast: correlation with the cohort's median scan, in the foreground of that one.
        duplicate_of: path of the first scan with the same voxels.
    """

    path: str
    subject: str = ""
    verdict: str = "good"
    reasons: list[str] = field(default_factory=list)
    shape: list[int] | None = None
    spacing: list[float] | None = None
    orientation: str | None = None
    oblique: float | None = None
    field_of_view: list[float] | None = None
    dtype: str | None = None
    minimum: float | None = None
    percentile_1: float | None = None
    median: float | None = None
    percentile_99: float | None = None
    maximum: float | None = None
    background: float | None = None
    finite: float | None = None
    similarity: float | None = None
    contrast: float | None = None
    duplicate_of: str | None = None

    def flag(self, verdict: str, reason: str) -> None:
        """Add a reason; the worst verdict stays."""
        self.verdict = min(self.verdict, verdict, key=VERDICTS.index)
        self.reasons.append(reason)

    @property
    def geometry(self) -> dict[str, Any]:
        return {"spacing": self.spacing, "field_of_view": self.field_of_view, "orientation": self.orientation}


class Report(NamedTuple):
    """
    What :py:func:`check` found.

    Attributes:
        scans: a row for each scan that `scan_pattern` matches, in order of their paths.
        passed_over: a row for each image that it does not match.
        suffixes: how many files of each suffix it does not match, images and others.
        folder: where `report.csv` and `contact_sheet.png` are.
        passed: whether nothing is unusable and, if `strict`, nothing suspicious.
    """

    scans: list[Scan]
    passed_over: list[Scan]
    suffixes: Counter
    folder: Path
    passed: bool


class Found(NamedTuple):
    """What reading one scan yields: its row, a hash of its voxels, and a small copy of it, float16."""

    scan: Scan
    digest: bytes = b""
    thumbnail: np.ndarray | None = None


def check(
    dataset_dir: str | os.PathLike,
    scan_pattern: str | Sequence[str] = "*.nii*",
    output_dir: str | os.PathLike | None = None,
    workers: int | None = None,
    spacing: float | Sequence[float] | None = None,
    field_of_view: float | Sequence[float] | None = None,
    orientation: str | None = None,
    channels: int = 1,
    spatial_dims: int = 3,
    strict: bool = False,
) -> Report:
    """
    Read every scan of a data set; write `report.csv` and `contact_sheet.png`.

    Args:
        dataset_dir: the folder that holds the scans. Nothing in it is changed.
        scan_pattern: a glob on the files' names, or a list of them, one a channel; see
            :py:func:`scripts.data.datalist.find_scans`.
        output_dir: folder for the report, made if need be; `check` in the current folder if not given.
        workers: processes to use; as many as there are cores, fewer for few scans, if not given.
        spacing: the voxel size in mm that is expected along each axis (right, anterior, superior), or one for all; what
            most of the cohort has if not given.
        field_of_view: the extent in mm that is expected, likewise.
        orientation: the stored axes that are expected, such as `RAS`; what most of the cohort has if not given.
        channels: how many channels a scan must have.
        spatial_dims: how many spatial axes a scan must have, 2 or 3.
        strict: whether something suspicious is a failure too.

    Raises:
        FileNotFoundError: when `dataset_dir` does not exist, or nothing in it matches.
        NotADirectoryError: when `dataset_dir` or `output_dir` is a file.
        ValueError: when an argument makes no sense.
        OSError: when a worker process was killed.
    """
    _check_arguments(workers, spacing, field_of_view, orientation, channels, spatial_dims, strict)
    root = Path(str(dataset_dir)).expanduser()
    files = [[Path(path) for path in ensure_tuple(found)] for found in find_scans(root, scan_pattern)]
    output = _output_folder(output_dir, root)

    names = [[path.relative_to(root).as_posix() for path in paths] for paths in files]
    suffixes, passed_over = _passed_over(root, {name for scan in names for name in scan})
    if workers is None:
        workers = choose_workers(len(files))
    checks = CheckScand("image", channels, spatial_dims, spacing, field_of_view, orientation)
    shape = (len(files), channels, *(THUMBNAIL,) * spatial_dims)
    scans, seen = [], {}
    with tempfile.TemporaryFile(dir=output) as file:
        thumbnails = np.memmap(file, np.float16, "w+", shape=shape)
        inspect = partial(_inspect, checks=checks)
        subjects = subject_names([scan[0] for scan in names])
        for i, found in enumerate(run_parallel([delayed(inspect)(scan) for scan in files], workers, "reading scans")):
            scan = found.scan
            scan.path, scan.subject = _printable(";".join(names[i])), _printable(subjects[i])
            if found.thumbnail is not None:
                thumbnails[i] = found.thumbnail
                _note_duplicate(scan, seen.setdefault(found.digest, scan))
            scans.append(scan)
        usable = [i for i, scan in enumerate(scans) if scan.verdict != "unusable"]
        if len(usable) >= MIN_COHORT:
            _compare_looks([scans[i] for i in usable], thumbnails, usable)
            _compare_geometry([scans[i] for i in usable], spacing, field_of_view, orientation)
        del thumbnails

    rows = [*scans, *passed_over]
    _write_report(output / "report.csv", rows)
    shown = _choose(scans)
    picture = partial(_picture, spatial_dims=spatial_dims)
    jobs = [delayed(picture)(files[i]) for i in shown]
    pictures = list(run_parallel(jobs, min(workers, 1 + len(shown) // 8), "drawing scans"))
    if pictures:
        figures.batch(output / "contact_sheet.png", pictures, [_caption(scans[i]) for i in shown], (0.0, 1.0))
    else:
        (output / "contact_sheet.png").unlink(missing_ok=True)  # of an earlier report
    bad = {"unusable", "suspicious"} if strict else {"unusable"}
    return Report(scans, passed_over, suffixes, output, not any(row.verdict in bad for row in rows))


# ---------------------------------------------------------------------------------------------------------- a scan


def _inspect(paths: list[Path], checks: CheckScand) -> Found:
    """Read one scan; nothing that is wrong with it raises."""
    scan = Scan("")
    try:
        # A user who may read everything (root) would not notice otherwise.
        if any(path.exists() and not path.stat().st_mode & 0o444 for path in paths):
            raise ScanError("its permissions let nobody read it")
        image = _load(paths)
        _describe(scan, paths, image)
        checks({"image": image})
        _check_files(paths)
        for difference in image.meta["differences"]:
            scan.flag("suspicious", difference)
        _note_series(scan, paths)
        _note_values(scan, image)
        upright = _upright(image)
        return Found(scan, _digest(upright), _scaled(FitShape(THUMBNAIL)(upright)).astype(np.float16))
    except ScanError as error:
        scan.flag("unusable", _without_name(str(error), paths))
    except MemoryError:
        scan.flag("unusable", "its header asks for more memory than there is, so it is damaged, or far too large")
    except Exception as error:  # one scan in 40,000 must not end the reading of the others
        scan.flag("unusable", f"it cannot be checked ({type(error).__name__}: {error})")
    return Found(scan)


def _load(paths: list[Path]) -> MetaTensor:
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    logging.getLogger("nibabel").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return LoadScand("image")({"image": [str(path) for path in paths]})["image"]


def _describe(scan: Scan, paths: list[Path], image: MetaTensor) -> None:
    """Fill in what can be said of any scan that could be read."""
    scan.shape = list(image.shape[1:])
    scan.dtype = _dtype(paths[0])
    pixels = image.as_tensor().numpy()
    finite = pixels[np.isfinite(pixels)]
    if not pixels.size:
        return
    scan.finite = finite.size / pixels.size
    if finite.size:
        quantiles = np.percentile(finite, (0, 1, 50, 99, 100))
        low, _, _, high, _ = quantiles
        scan.minimum, scan.percentile_1, scan.median, scan.percentile_99, scan.maximum = map(float, quantiles)
        scan.background = float(np.mean(finite <= low + 0.05 * (high - low)))
    affine = image.affine.numpy()
    if np.isfinite(affine).all() and np.linalg.matrix_rank(affine) == len(affine):
        geometry = describe(image)
        for name in ("spacing", "field_of_view", "orientation", "oblique"):
            setattr(scan, name, geometry[name])


def _dtype(path: Path) -> str | None:
    if path.name.endswith((".nii", ".nii.gz")):
        return str(nib.load(path).get_data_dtype())
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(next(iter(sorted(path.iterdir()))) if path.is_dir() else path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return PIXEL_TYPES.get(reader.GetPixelID())


def _check_files(paths: list[Path]) -> None:
    """Readers stop at the last voxel; the checksum, which tells damaged voxels from whole ones, comes after it."""
    for path in paths:
        if path.name.endswith(".gz"):
            try:
                with gzip.open(path) as file:
                    while file.read(1 << 20):
                        pass
            except (OSError, EOFError, zlib.error):
                raise ScanError("it can be read, but its gzip checksum is wrong or missing: it was damaged") from None


def _note_series(scan: Scan, paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            series = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
            if len(series) > 1:
                scan.flag("suspicious", f"its folder holds {len(series)} DICOM series, of which one is read")


def _note_values(scan: Scan, image: MetaTensor) -> None:
    pixels = image.as_tensor().numpy()
    highest = pixels == scan.maximum
    if (highest | (pixels == scan.minimum)).all():
        scan.flag("suspicious", "it holds two values only, as a mask does")
    elif highest.mean() > CLIPPED:
        scan.flag("suspicious", f"{highest.mean():.0%} of its voxels have its highest value, {scan.maximum:g}: clipped")


def _upright(image: MetaTensor) -> MetaTensor:
    return Orientation("RAS"[: image.ndim - 1], labels=None)(image)


def _digest(upright: MetaTensor) -> bytes:
    """The same for the same voxels along the same axes of the world, however they are stored."""
    pixels = np.ascontiguousarray(upright.as_tensor().numpy(), np.float32)
    return hashlib.blake2b(pixels, digest_size=16, salt=str(pixels.shape).encode()[:16]).digest()


def _note_duplicate(scan: Scan, first: Scan) -> None:
    if first is not scan:
        scan.duplicate_of = first.path
        other = "" if scan.subject == first.subject else ", which is named as another subject's"
        scan.flag("suspicious", f"it has the same voxels as '{first.path}'{other}")


def _scaled(image: MetaTensor) -> np.ndarray:
    """Each channel from its minimum to its 99.5th percentile, as 0 to 1."""
    pixels = image.as_tensor().numpy().astype(np.float32)
    axes = tuple(range(1, pixels.ndim))
    low, high = pixels.min(axes, keepdims=True), np.percentile(pixels, 99.5, axis=axes, keepdims=True)
    high = np.where(high > low, high, pixels.max(axes, keepdims=True))  # nearly all of it is background
    return np.clip((pixels - low) / np.maximum(high - low, np.finfo(np.float32).tiny), 0, 1)


def _without_name(sentence: str, paths: list[Path]) -> str:
    """A loader's sentence as a reason: the row names the file already."""
    if len(paths) == 1:
        sentence = sentence.replace(f"'{paths[0]}'", "it").replace(str(paths[0]), paths[0].name)
    return re.sub(rf"(?:[:;]|, or) {re.escape(ADVICE)}\.$", "", sentence).rstrip(".")


def _picture(paths: list[Path], spatial_dims: int) -> np.ndarray:
    return _scaled(FitShape((PICTURE,) * spatial_dims)(_upright(_load(paths))))


# ------------------------------------------------------------------------------------------------------- the cohort


def _limits(values: Sequence[float], least: float) -> tuple[float, float]:
    """Between which values a cohort's good scans lie, see TAIL, REACH and LEAST."""
    # The inner neighbour, so that a single outlier among ten never moves its own limit.
    low = np.quantile(values, TAIL, method="higher")
    high = np.quantile(values, 1 - TAIL, method="lower")
    middle = np.median(values)
    return middle - max(least, REACH * (middle - low)), middle + max(least, REACH * (high - middle))


def _compare_looks(scans: list[Scan], thumbnails: np.memmap, indices: list[int]) -> None:
    """Compare thumbnails with their median, and intensities with each other's."""
    sample = sorted(random.Random(0).sample(indices, min(SAMPLE, len(indices))))
    template = np.median(thumbnails[sample].astype(np.float32), axis=0).ravel()
    inside = template > 0.1 * template.max()
    for scan, i in zip(scans, indices, strict=True):
        thumbnail = np.asarray(thumbnails[i], np.float32).ravel()
        scan.similarity = _correlation(thumbnail, template)
        scan.contrast = _correlation(thumbnail[inside], template[inside])

    lowest = {name: _limits([getattr(s, name) for s in scans], LEAST[name])[0] for name in ("similarity", "contrast")}
    emptiest, fullest = _limits([scan.background for scan in scans], LEAST["background"])
    # a scan that is nearly all background has its 99th percentile there
    spans = [(scan.percentile_99 - scan.minimum) or (scan.maximum - scan.minimum) for scan in scans]
    ranges = [math.log10(span) for span in spans]
    narrowest, widest = _limits(ranges, LEAST["range"])
    depths = [-scan.percentile_1 / ((scan.percentile_99 - scan.percentile_1) or 1) for scan in scans]
    non_negative = np.quantile(depths, USUAL) <= 0
    for scan, extent, depth in zip(scans, ranges, depths, strict=True):
        unlike = [
            f"{getattr(scan, name):.2f} {where} (limit {limit:.2f})"
            for (name, limit), where in zip(lowest.items(), ("everywhere", "inside the head"), strict=True)
            if getattr(scan, name) < limit
        ]
        if unlike:
            scan.flag(
                "suspicious", f"it is unlike the others: its correlation with their median is {', '.join(unlike)}"
            )
        if not emptiest <= scan.background <= fullest:
            usual = f"{max(emptiest, 0):.0%} to {min(fullest, 1):.0%}"
            scan.flag("suspicious", f"{scan.background:.0%} of it is background, where {usual} is usual")
        if not narrowest <= extent <= widest:
            usual = f"{10 ** np.median(ranges):.3g}"
            scan.flag("suspicious", f"its intensities span {10**extent:.3g}, where some {usual} is usual")
        if non_negative and depth > NEGATIVE:
            scan.flag("suspicious", f"it has negative voxels (down to {scan.minimum:.4g}), which the others have not")


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return round(float(a @ b) / size, 4) if size else 0.0


def _compare_geometry(scans: list[Scan], spacing: Any, field_of_view: Any, orientation: str | None) -> None:
    """Compare with what most of the cohort has, where nothing is asked for."""
    if orientation is None:
        usual, count = Counter(scan.orientation for scan in scans).most_common(1)[0]
        if count >= USUAL * len(scans):
            _accuse_differences(scans, "is usual", orientation=usual)
    if spacing is None:
        geometries = [scan.geometry for scan in scans]
        if len(mixed_voxel_sizes(geometries)) <= (1 - USUAL) * len(scans):
            _accuse_differences(scans, "are usual", spacing=usual_voxel_size(geometries))
        else:
            _accuse_sizes(scans, "coarsest voxel", lambda scan: max(scan.spacing))
    if field_of_view is None:
        _accuse_sizes(scans, "field of view", lambda scan: max(scan.field_of_view))
        _accuse_sizes(scans, "field of view", lambda scan: min(scan.field_of_view))


def _accuse_differences(scans: list[Scan], words: str, **expected: Any) -> None:
    for scan in scans:
        for difference in differences(scan.geometry, **expected):
            scan.flag("suspicious", re.sub(r"(is|are) expected$", words, difference))


def _accuse_sizes(scans: list[Scan], name: str, size: Callable[[Scan], float]) -> None:
    """Accuse a scan one of whose sizes (mm) is far from the others'."""
    sizes = [math.log10(size(scan)) for scan in scans]
    low, high = _limits(sizes, LEAST[name])
    for scan, value in zip(scans, sizes, strict=True):
        if not low <= value <= high:
            usual = f"{10 ** np.median(sizes):.3g} mm"
            scan.flag("suspicious", f"its {name} measures {10**value:.3g} mm, where some {usual} is usual")


# --------------------------------------------------------------------------------------------- what is passed over


def _passed_over(root: Path, scans: set[str]) -> tuple[Counter, list[Scan]]:
    """Files that are no part of a scan: how many of each suffix, and a row for each image among them."""
    suffixes, rows, dicom = Counter(), [], defaultdict(int)
    companions = {str(Path(name).with_suffix("")) for name in scans if name.endswith((".hdr", ".mhd", ".nhdr"))}
    try:
        everything = find_scans(root, "*")
    except FileNotFoundError:  # only folders
        everything = []
    for path in everything:
        name = path.relative_to(root).as_posix()
        folder = name.rpartition("/")[0]
        if name in scans or folder in scans or str(Path(name).with_suffix("")) in companions:
            continue
        suffix = ".nii.gz" if name.lower().endswith(".nii.gz") else path.suffix.lower()
        suffixes[suffix or "no suffix"] += 1
        try:
            content = _content(path)
            empty = path.stat().st_size == 0
        except OSError as error:
            if suffix in IMAGE_SUFFIXES:
                reason = "it leads to no file" if path.is_symlink() else f"it cannot be read ({error.strerror})"
                rows.append(Scan(_printable(name), verdict="suspicious", reasons=[f"{PASSED_OVER}: {reason}"]))
            continue
        named = content in (None, ".gz", NAMED_OTHERWISE.get(suffix)) or name.lower().endswith(content)
        if suffix in (".dcm", ".ima") or (content == ".dcm" and suffix not in IMAGE_SUFFIXES):
            dicom[folder] += 1  # a series has hundreds of files
        elif not named:
            reason = f"{PASSED_OVER}: it holds {content} data, which its name hides"
            rows.append(Scan(_printable(name), verdict="suspicious", reasons=[reason]))
        elif suffix in IMAGE_SUFFIXES:
            verdict, reason = (
                ("suspicious", "it is empty (0 bytes)") if empty else ("passed over", "an image by its name")
            )
            rows.append(Scan(_printable(name), verdict=verdict, reasons=[f"{PASSED_OVER}: {reason}"]))
    for folder, count in dicom.items():
        reason = f"{PASSED_OVER}: {count} DICOM file(s)"
        rows.append(Scan(_printable(folder or ".") + "/", verdict="passed over", reasons=[reason]))
    return suffixes, rows


def _content(path: Path) -> str | None:
    """The suffix that belongs to what a file holds, also within gzip, where its first bytes tell."""
    content = content_suffix(path)
    if content == ".gz":
        try:
            with gzip.open(path) as file:
                head = file.read(540)
        except (OSError, EOFError, zlib.error):
            return content
        if any(header.may_contain_header(head) for header in (nib.Nifti1Header, nib.Nifti2Header)):
            return ".nii.gz"
    return content


def _printable(name: str) -> str:
    """A file's name as text that can be written, whatever bytes it is made of."""
    return os.fsencode(name).decode("utf-8", "replace")


# ----------------------------------------------------------------------------------------------------------- output


def _choose(scans: list[Scan]) -> list[int]:
    """Which scans the contact sheet shows: the suspicious, most unlike first, then a random sample of the good."""

    def unlikeness(i: int) -> float:
        return scans[i].similarity if scans[i].similarity is not None else 1.0

    suspicious = sorted((i for i, scan in enumerate(scans) if scan.verdict == "suspicious"), key=unlikeness)
    good = [i for i, scan in enumerate(scans) if scan.verdict == "good"]
    suspicious = suspicious[: SHEET - min(SHEET_RANDOM, len(good))]
    sample = random.Random(0).sample(good, min(SHEET - len(suspicious), len(good)))
    return suspicious + sorted(sample)


def _caption(scan: Scan) -> str:
    similarity = "" if scan.similarity is None else f" ({scan.similarity:.2f})"
    name = scan.path.split(";")[0].rstrip("/").rsplit("/", 1)[-1]
    return f"{'' if scan.verdict == 'good' else scan.verdict.upper() + ' '}{name}{similarity}"


def _write_report(path: Path, scans: Iterable[Scan]) -> None:
    names = [f.name for f in fields(Scan)]
    write_csv(path, names, ([_cell(name, getattr(scan, name)) for name in names] for scan in scans))


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "reasons":
        return "; ".join(value)
    if isinstance(value, list):
        return "x".join(f"{v:.6g}" for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(scans: list[Scan]) -> str:
    """What is unusable or suspicious, worst first, in as many columns as the terminal has."""
    bad = sorted((s for s in scans if s.verdict in VERDICTS[:2]), key=lambda s: VERDICTS.index(s.verdict))
    if not bad:
        return ""
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    verdict_width = max(map(len, VERDICTS[:2])) + 2
    path_width = min(max(len(scan.path) for scan in bad[:TABLE]), (width - verdict_width) // 2)
    lines = []
    for scan in bad[:TABLE]:
        path = scan.path if len(scan.path) <= path_width else "…" + scan.path[1 - path_width :]
        head = f"{scan.verdict:<{verdict_width}}{path:<{path_width}}  "
        reasons = textwrap.wrap("; ".join(scan.reasons), width - len(head))
        lines += [head + reasons[0], *(" " * len(head) + line for line in reasons[1:])]
    if len(bad) > TABLE:
        lines.append(f"and {len(bad) - TABLE} more, see report.csv")
    return "\n".join(lines) + "\n"


def _summary(report: Report) -> str:
    counts = Counter(scan.verdict for scan in report.scans)
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("unusable", "suspicious", "good"))
    lines = [f"{len(report.scans)} scan(s): {verdicts}."]
    if report.suffixes:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in report.suffixes.most_common())
        images = f" {len(report.passed_over)} of the report's rows are images among them." if report.passed_over else ""
        lines.append(f"Passed over by scan_pattern: {kinds}.{images}")
    if len(report.scans) < MIN_COHORT:
        lines.append(f"Fewer than {MIN_COHORT} scans: they were not compared with each other.")
    lines.append(f"Report: '{report.folder / 'report.csv'}'. Look at '{report.folder / 'contact_sheet.png'}'.")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- checks


def _check_arguments(
    workers: Any, spacing: Any, field_of_view: Any, orientation: Any, channels: Any, spatial_dims: Any, strict: Any
) -> None:
    for name, value in (("workers", workers), ("channels", channels)):
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not (whole and value >= 1) and not (name == "workers" and value is None):
            raise ValueError(f"{name} is {value!r}, but must be a whole number, 1 or more.")
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims is {spatial_dims!r}, but must be 2 or 3.")
    if not isinstance(strict, bool):
        raise ValueError(f"strict is {strict!r}, but must be True or False.")
    for name, value in (("spacing", spacing), ("field_of_view", field_of_view)):
        sizes = ensure_tuple(value)
        if value is not None and not (
            (isinstance(value, numbers.Real) or len(sizes) == spatial_dims)
            and all(isinstance(s, numbers.Real) and not isinstance(s, bool) and 0 < s < math.inf for s in sizes)
        ):
            raise ValueError(f"{name} is {value!r}, but must be a size in mm, or {spatial_dims} of them.")
    if orientation is not None:
        letters = str(orientation)
        pairs = [pair for letter in letters for pair in ("LR", "PA", "IS") if letter in pair]
        if not len(letters) == len(pairs) == len(set(pairs)) == spatial_dims:
            raise ValueError(f"orientation is {orientation!r}, but must name {spatial_dims} axes, such as 'RAS'.")


def _output_folder(output_dir: str | os.PathLike | None, root: Path) -> Path:
    output = Path("check" if output_dir is None else str(output_dir)).expanduser()
    if output_dir is None and output.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"The report would go to '{output}', which lies in dataset_dir '{root}': "
            "set --output_dir to another folder."
        )
    for place in (output, *output.parents):
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(f"output_dir is '{output}', but '{place}' is a file: give the name of a folder.")
    output.mkdir(parents=True, exist_ok=True)
    return output


# ----------------------------------------------------------------------------------------------------- command line


def main() -> None:
    """The command line of this module."""
    try:
        report = run("python -m scripts.check", check)
    except KeyboardInterrupt:
        sys.exit("Stopped; no report was written.")
    print(_table([*report.scans, *report.passed_over]))
    print(_summary(report))
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    # Worker processes find functions by their module's name, which `python -m` hides behind __main__.
    from scripts import check as this

    this.main()
