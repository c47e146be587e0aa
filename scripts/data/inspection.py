"""One scan of a data set that is checked: what its files hold, and what is wrong with it by itself."""

from __future__ import annotations

import gzip
import hashlib
import logging
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import itk
import nibabel as nib
import numpy as np
import SimpleITK
from monai.data import MetaTensor
from monai.transforms import Orientation
from scripts.data.geometry import describe
from scripts.data.reasons import as_reason
from scripts.data.transforms import CheckScand, FitShape, LoadScand, ScanError
from scripts.utils.formats import NIFTI_SUFFIXES

__all__ = ["THUMBNAIL", "VERDICTS", "Inspection", "Scan", "inspect_scan", "scan_picture"]

# A share of voxels at the very maximum. Scaling to 8 bits clips 0.1 % to 1 %; a clipped head or a mask has more.
CLIPPED = 0.03
THUMBNAIL = 24  # voxels along each axis of what is compared; 27 kB per scan, on disk
PICTURE = 64  # voxels along each axis of what the contact sheet shows

VERDICTS = ("unusable", "suspicious", "passed over", "good")  # worst first
PIXEL_TYPES = {
    getattr(SimpleITK, f"sitk{kind}{bits}"): f"{kind.lower()}{bits}"
    for kind, sizes in {"Int": (8, 16, 32, 64), "UInt": (8, 16, 32, 64), "Float": (32, 64)}.items()
    for bits in sizes
}


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
    """Read one scan and note what is wrong with it; never raises.

    Args:
        paths: of its channels.
        checks: what is asked for, under the key ``image``.
    """
    scan = Scan("")
    try:
        # root can read such a file, and would find it good (measured); other users cannot train on it
        hidden = [path for path in paths if path.exists() and not path.stat().st_mode & 0o444]
        if hidden:
            raise ScanError(f"'{hidden[0]}' has permissions that let nobody read it")
        image = _load(paths)
        _describe(scan, paths, image)
        checks({"image": image})
        _check_checksums(paths)
        foreground = image.meta["geometry"]["foreground"]
        scan.foreground = None if foreground is None else foreground["centre"]
        scan.sform_code = int(image.meta.get("sform_code", 0))
        for difference in image.meta["differences"]:
            scan.flag("suspicious", difference)
        _flag_series(scan, paths)
        _flag_values(scan, image)
        upright = _upright(image)
        return Inspection(scan, _digest(upright), _scaled(FitShape(THUMBNAIL)(upright)).astype(np.float16))
    except ScanError as error:
        scan.flag("unusable", as_reason(str(error), paths))
    except MemoryError:
        scan.flag("unusable", "its header asks for more memory than there is, so it is damaged, or far too large")
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
    if path.name.endswith(NIFTI_SUFFIXES):
        return str(nib.load(path).get_data_dtype())
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(next(iter(sorted(path.iterdir()))) if path.is_dir() else path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return PIXEL_TYPES.get(reader.GetPixelID())


def _check_checksums(paths: list[Path]) -> None:
    """Read gzip files to their end: readers stop at the last voxel, and the checksum comes after it."""
    for path in paths:
        if path.name.endswith(".gz"):
            try:
                with gzip.open(path) as file:
                    while file.read(1 << 20):
                        pass
            except (OSError, EOFError, zlib.error):
                raise ScanError(
                    f"'{path}' can be read, but its gzip checksum is wrong or missing: it was damaged"
                ) from None


def _flag_series(scan: Scan, paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            series = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
            if len(series) > 1:
                scan.flag("suspicious", f"its folder holds {len(series)} DICOM series, of which one is read")


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
