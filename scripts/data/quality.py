"""What is wrong with scans of a data set: each by itself, and beside the rest of the cohort.

The limits of the comparison follow from the cohort itself. They are wide on purpose: people read a list of false alarms
only once.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import itk
import nibabel as nib
import numpy as np
import SimpleITK
from monai.data import MetaTensor
from monai.transforms import Orientation
from scripts.data.geometry import describe, differences, mixed_voxel_sizes, usual_voxel_size
from scripts.data.reading import as_reason
from scripts.data.scan_grid import usual_field_of_view
from scripts.data.transforms import CheckScand, FitShape, LoadScand, ScanError
from scripts.utils.formats import NIFTI_SUFFIXES

# A share of voxels at the very maximum. Scaling to 8 bits clips 0.1 % to 1 %; a clipped head or a mask has more.
CLIPPED = 0.03
THUMBNAIL = 24  # voxels along each axis of what is compared; 27 kB per scan and channel
PICTURE = 64  # voxels along each axis of what the contact sheet shows

VERDICTS = ("unusable", "suspicious", "passed over", "good")  # worst first
PIXEL_TYPES = {
    getattr(SimpleITK, f"sitk{kind}{bits}"): f"{kind.lower()}{bits}"
    for kind, sizes in {"Int": (8, 16, 32, 64), "UInt": (8, 16, 32, 64), "Float": (32, 64)}.items()
    for bits in sizes
}

# In a smaller cohort the median is a matter of chance, and no scan is compared with the others.
MIN_COHORT = 10
# A voxel size or orientation that nine tenths share is usual, and the rest differ from it. With less than that, the
# cohort has several protocols, and none of them is wrong.
USUAL = 0.9
# A value is far from the others when it lies TAIL_FACTOR times further from the median than the outer TAIL of the
# cohort begins. For a normal distribution that is 5.1 standard deviations. Because it is measured in the tail, a second
# kind of scan that makes up more than a tenth of a cohort moves the limit beyond itself.
TAIL, TAIL_FACTOR = 0.1, 4.0
# It must also be at least this far from the median, however similar the others are.
MIN_DISTANCE = {
    "similarity": 0.05,  # correlation; turned heads differ by more, and other heads by less (docs/checking.md)
    "contrast": 0.2,  # correlation; only gray and white matter count, so it varies more
    "background": 0.15,  # share of voxels; a neck more or less moves it by less
    "range": 2.0,  # powers of ten: MR units are arbitrary, but 0 to 1 among 0 to 4000 is another processing
    "coarsest voxel": math.log10(2),  # powers of ten: twice as thick
    "field of view": math.log10(1.3),  # powers of ten; 256 mm against 220 mm is one protocol's freedom
}
# A share of a scan's range. Resampling by splines dips a little below zero at edges, in less than 1 % of voxels.
NEGATIVE = 0.05
SAMPLE = 500  # scans whose median is the cohort's


@dataclass
class Scan:
    """What is known of one scan: a row of the report. What could not be found out is None.

    Attributes:
        path: relative to the data set, the channels' paths joined by ";".
        subject: as :py:mod:`scripts.data.datalist` reads it from the path.
        verdict: ``unusable``, ``suspicious``, ``passed over`` (an image that ``scan_pattern`` does not match) or
            ``good``.
        reasons: half sentences.
        shape, orientation: of the stored axes.
        spacing, field_of_view: in mm along the world's axes (right, anterior, superior).
        oblique: the largest angle in degrees between a stored axis and the world's axis nearest to it.
        foreground: the centre of its foreground in the world, mm.
        sform_code: of its NIfTI header, which says what the world is: 1 the scanner's, 2 another file's, 3 and 4 a
            template's; 0 for other formats.
        dtype: of the numbers on disk.
        minimum, percentile_1, median, percentile_99, maximum: of the finite voxels.
        background: the share of voxels in the lowest 5 % of the range from minimum to 99th percentile.
        finite: the share of voxels that are neither NaN nor infinite.
        similarity: correlation with the cohort's median scan, everywhere.
        contrast: correlation with the cohort's median scan, in the foreground of that one.
        duplicate_of: path of the first scan with the same voxels.
        familiar: whether a network knows such scans, ``yes`` or ``no``; empty where none was asked.
        reason, gain: why it does not, and the bits per dim that this explains.
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
    foreground: list[float] | None = None
    sform_code: int | None = None
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
    familiar: str = ""
    reason: str = ""
    gain: float | None = None

    def flag(self, verdict: str, reason: str) -> None:
        """Add a reason; the worst verdict is kept."""
        self.verdict = min(self.verdict, verdict, key=VERDICTS.index)
        self.reasons.append(reason)

    @property
    def geometry(self) -> dict[str, Any]:
        return {"spacing": self.spacing, "field_of_view": self.field_of_view, "orientation": self.orientation}


class Inspection(NamedTuple):
    """What reading one scan yields.

    Attributes:
        scan: its row, without path and subject.
        digest: a hash of its voxels; empty for a scan that is unusable.
        thumbnail: a small copy, float16 ``[channels, *spatial]``; None for a scan that is unusable.
    """

    scan: Scan
    digest: bytes = b""
    thumbnail: np.ndarray | None = None


def inspect_scan(paths: list[Path], checks: CheckScand) -> Inspection:
    """Read one scan, the files of its channels, and note what is wrong with it; never raises."""
    scan = Scan("")
    try:
        # root can read such a file, and would find it good (measured); other users cannot train on it
        hidden = [path for path in paths if path.exists() and not path.stat().st_mode & 0o444]
        if hidden:
            raise ScanError(f"'{hidden[0]}' has permissions that let nobody read it")
        image = _load(paths)
        _describe(scan, paths, image)
        checks({"image": image})
        foreground = image.meta["geometry"]["foreground"]
        scan.foreground = None if foreground is None else foreground["centre"]
        scan.sform_code = int(image.meta.get("sform_code", 0))
        for difference in image.meta["differences"]:
            scan.flag("suspicious", difference)
        _flag_values(scan, image)
        upright = _upright(image)
        return Inspection(scan, _digest(upright), _scaled(FitShape(THUMBNAIL)(upright)).astype(np.float16))
    except ScanError as error:
        scan.flag("unusable", as_reason(str(error), paths))
    except Exception as error:  # one scan in 40,000 must not end the reading of the others
        scan.flag("unusable", f"it cannot be checked ({type(error).__name__}: {error})")
    return Inspection(scan)


def scan_picture(paths: list[Path], spatial_dims: int) -> np.ndarray:
    """A scan for the contact sheet: ``[channels, *spatial]``, RAS, from 0 to 1."""
    return _scaled(FitShape((PICTURE,) * spatial_dims)(_upright(_load(paths))))


def _load(paths: list[Path]) -> MetaTensor:
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    logging.getLogger("nibabel").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return LoadScand("image")({"image": [str(path) for path in paths]})["image"]


def _describe(scan: Scan, paths: list[Path], image: MetaTensor) -> None:
    """Fill in what is known of any scan that could be read."""
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
    if path.name.lower().endswith(NIFTI_SUFFIXES):
        return str(nib.load(path).get_data_dtype())
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(next(iter(sorted(path.iterdir()))) if path.is_dir() else path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return PIXEL_TYPES.get(reader.GetPixelID())


def _flag_values(scan: Scan, image: MetaTensor) -> None:
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


def _scaled(image: MetaTensor) -> np.ndarray:
    """Each channel from its minimum to its 99.5th percentile, as 0 to 1."""
    pixels = image.as_tensor().numpy().astype(np.float32)
    axes = tuple(range(1, pixels.ndim))
    low, high = pixels.min(axes, keepdims=True), np.percentile(pixels, 99.5, axis=axes, keepdims=True)
    high = np.where(high > low, high, pixels.max(axes, keepdims=True))  # nearly all of it is background
    return np.clip((pixels - low) / np.maximum(high - low, np.finfo(np.float32).tiny), 0, 1)


def compare_looks(scans: list[Scan], thumbnails: np.ndarray, indices: list[int]) -> None:
    """Compare scans' thumbnails with their median, and their intensities with each other's; flag what is far off.

    Args:
        scans: at least one; their ``similarity`` and ``contrast`` are filled in.
        thumbnails: ``[n, channels, *spatial]``.
        indices: of the scans' thumbnails.
    """
    sample = sorted(random.Random(0).sample(indices, min(SAMPLE, len(indices))))
    median = np.median(thumbnails[sample].astype(np.float32), axis=0).ravel()
    inside = median > 0.1 * median.max()
    for scan, i in zip(scans, indices, strict=True):
        thumbnail = np.asarray(thumbnails[i], np.float32).ravel()
        scan.similarity = _correlation(thumbnail, median)
        scan.contrast = _correlation(thumbnail[inside], median[inside])

    names = ("similarity", "contrast")
    lowest = {name: _limits([getattr(s, name) for s in scans], MIN_DISTANCE[name])[0] for name in names}
    emptiest, fullest = _limits([scan.background for scan in scans], MIN_DISTANCE["background"])
    # a scan that is nearly all background has its 99th percentile there
    spans = [(scan.percentile_99 - scan.minimum) or (scan.maximum - scan.minimum) for scan in scans]
    ranges = [math.log10(span) for span in spans]
    narrowest, widest = _limits(ranges, MIN_DISTANCE["range"])
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


def compare_geometry(
    scans: list[Scan],
    spacing: float | Sequence[float] | None,
    field_of_view: float | Sequence[float] | None,
    orientation: str | None,
) -> None:
    """Compare scans' geometry with what most of the cohort has, and flag what differs where nothing is asked for."""
    if orientation is None:
        usual, count = Counter(scan.orientation for scan in scans).most_common(1)[0]
        if count >= USUAL * len(scans):
            _flag_differences(scans, "is usual", orientation=usual)
    if spacing is None:
        geometries = [scan.geometry for scan in scans]
        if len(mixed_voxel_sizes(geometries)) <= (1 - USUAL) * len(scans):
            _flag_differences(scans, "are usual", spacing=usual_voxel_size(geometries))
        else:
            _flag_sizes(scans, "coarsest voxel", lambda scan: max(scan.spacing))
    if field_of_view is None:
        usual_view = usual_field_of_view([scan.geometry for scan in scans])
        if usual_view is not None:
            _flag_differences(scans, "are usual", field_of_view=usual_view)
        else:
            _flag_sizes(scans, "field of view", lambda scan: max(scan.field_of_view))
            _flag_sizes(scans, "field of view", lambda scan: min(scan.field_of_view))


def _limits(values: Sequence[float], least: float) -> tuple[float, float]:
    """Between which values a cohort's good scans lie, see TAIL, TAIL_FACTOR and MIN_DISTANCE."""
    # The inner neighbour, so that a single outlier among ten never moves its own limit.
    low = np.quantile(values, TAIL, method="higher")
    high = np.quantile(values, 1 - TAIL, method="lower")
    middle = np.median(values)
    return middle - max(least, TAIL_FACTOR * (middle - low)), middle + max(least, TAIL_FACTOR * (high - middle))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return round(float(a @ b) / size, 4) if size else 0.0


def _flag_differences(scans: list[Scan], words: str, **expected: Any) -> None:
    for scan in scans:
        for difference in differences(scan.geometry, **expected):
            scan.flag("suspicious", re.sub(r"(is|are) expected$", words, difference))


def _flag_sizes(scans: list[Scan], name: str, size: Callable[[Scan], float]) -> None:
    """Flag a scan one of whose sizes (mm) is far from the others'."""
    sizes = [math.log10(size(scan)) for scan in scans]
    low, high = _limits(sizes, MIN_DISTANCE[name])
    for scan, value in zip(scans, sizes, strict=True):
        if not low <= value <= high:
            usual = f"{10 ** np.median(sizes):.3g} mm"
            scan.flag("suspicious", f"its {name} measures {10**value:.3g} mm, where some {usual} is usual")
