"""Reading the files of a scan, and saying in a sentence why one cannot be read."""

from __future__ import annotations

import gzip
import itertools
import logging
import math
import os
import re
import zlib
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import LoadImaged
from monai.utils import ensure_tuple
from scipy import ndimage
from scripts.utils.errors import InputError
from scripts.utils.formats import NIFTI_SUFFIXES, content_suffix
from scripts.utils.names import CHANNEL_FILES, expanded

logger = logging.getLogger(__name__)

ADVICE = "replace it or leave it out with --scan_pattern"
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}  # by the names of NIfTI's units
POSITION, ORIENTATION = "0020|0032", "0020|0037"  # of a DICOM slice
SAME_PLACE = 1e-3  # mm
QUATERNION = "w2 should be positive"  # in nibabel's error of a qform that is no rotation
ANNEX = b"/annex/objects/"  # how a pointer of git-annex begins where files are unlocked
LFS = b"version https://git-lfs"  # how a pointer of Git LFS begins


class HeaderError(InputError):
    """A header that cannot be true; the message continues a sentence that begins with the file's name."""


class ScanError(InputError):
    """A scan that cannot be used; the message is one sentence that names its file."""


class LoadScand(LoadImaged):
    """MONAI's ``LoadImaged``, with errors that name the file and the likely cause.

    The reader is chosen by the file's suffix. Sizes in metres or microns become mm. NaN that reaches the border of a
    scan, which some programs write around the brain, becomes the lowest value. Files of gzip are read to their end,
    where their checksum is.

    Args:
        keys: the keys that hold a path, a list of paths (one for each channel) or a DICOM folder.
        max_gib: a scan that takes more memory than that, by its header or when it is unzipped, is refused before it is
            read.
        kwargs: what else ``LoadImaged`` takes.

    Raises:
        ScanError: when a file is missing or no reader can read it; of several channels the broken one is named. When it
            is too large, damaged, or a DICOM folder that does not hold one whole series.
    """

    def __init__(self, keys: KeysCollection, max_gib: float = 2.0, **kwargs: Any) -> None:
        super().__init__(keys, image_only=True, ensure_channel_first=True, **kwargs)
        self.max_gib = max_gib

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        try:
            return self._read(data, reader)
        except Exception as error:  # whatever a reader raises is about this scan
            files = [file for key in self.key_iterator(dict(data)) for file in expanded(data[key])]
            broken = self._broken(files) if len(files) > 1 else None
            raise ScanError(why_unreadable(*(broken or (list(map(Path, files)), error)))) from error

    def _read(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        paths = {key: expanded(data[key]) for key in self.key_iterator(dict(data))}
        for file in itertools.chain(*paths.values()):
            _check_size(Path(file), self.max_gib)
        d = super().__call__(data, reader)
        for key, files in paths.items():
            for file in files:
                _check_gzip(Path(file), self.max_gib)
            d[key].meta |= {"header_problems": header_problems(files), CHANNEL_FILES: files}
            _scale_to_mm(d[key], Path(files[0]))
            _fill_nan(d[key], files[0])
        return d

    def _broken(self, files: Sequence[str]) -> tuple[list[Path], Exception] | None:
        """The first of several files that cannot be read by itself, and why; None where all can."""
        for file in files:
            try:
                self._read({self.keys[0]: file})
            except Exception as error:
                return [Path(file)], error
        return None


def _is_nifti(path: Path) -> bool:
    """Whether nibabel reads a file: NIfTI, in one file or two, whatever the case of its suffix."""
    return path.name.lower().endswith((*NIFTI_SUFFIXES, ".hdr", ".img"))


def _check_size(path: Path, max_gib: float) -> None:
    """Refuse what would take too much memory by its header, and a DICOM folder that is no whole series."""
    if path.is_dir():
        problem = dicom_problem(path)
        if problem is not None:
            raise HeaderError(problem)
        return
    if not path.is_file():
        return
    if _is_nifti(path):
        header = nib.load(path).header
        shape, size = header.get_data_shape(), max(4, header.get_data_dtype().itemsize)
    else:
        import SimpleITK  # most scans are NIfTI

        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        try:
            reader.ReadImageInformation()
        except RuntimeError:  # what no reader reads is said later
            return
        shape, size = reader.GetSize(), 4
    gib = math.prod(map(int, shape)) * size / 2**30
    if gib > max_gib:
        raise HeaderError(
            f"has {'×'.join(map(str, shape))} voxels by its header, {gib:,.0f} GiB in memory, more than the "
            f"{max_gib:g} GiB that a scan may take (max_gib of LoadScand)"
        )


def _check_gzip(path: Path, max_gib: float) -> None:
    """Read a gzip file to its end: readers stop at the last voxel, and the checksum comes after it."""
    if not path.name.lower().endswith(".gz") or not path.is_file():
        return
    size = 0
    try:
        with gzip.open(path) as file:
            while part := file.read(1 << 22):
                size += len(part)
                if size > max_gib * 2**30:
                    raise HeaderError(f"unpacks to more than {max_gib:g} GiB, which its header does not say")
    except (OSError, EOFError, zlib.error):
        raise HeaderError("can be read, but its gzip checksum is wrong or missing: it was damaged") from None


def _scale_to_mm(image: MetaTensor, path: Path) -> None:
    """Correct the affine of a NIfTI file whose sizes are in metres or microns, and note it."""
    header = nib.load(path).header if _is_nifti(path) else None
    code = int(header["xyzt_units"]) % 8 if isinstance(header, nib.Nifti1Header) else 0  # the rest is that of time
    unit = nib.nifti1.unit_codes.label.get(code)  # None where NIfTI has no such code
    if unit in MILLIMETRES:
        affine = image.affine.clone()
        affine[:-1] *= MILLIMETRES[unit]
        image.affine = affine
        image.meta["header_problems"] += [f"its header gives sizes in {unit}s, which are read as such"]


def _fill_nan(image: MetaTensor, name: str) -> None:
    """Give NaN that reaches the border of a scan its channel's lowest value; NaN within the brain stays."""
    pixels = image.as_tensor()
    if not pixels.is_floating_point() or not pixels.isnan().any():
        return
    for channel in pixels:
        missing = channel.isnan().numpy()
        around = reaching_border(missing, diagonal=True)
        if missing.all() or not around.any():
            continue
        channel[torch.from_numpy(around)] = channel[torch.from_numpy(~missing)].min()
        logger.info(
            "'%s': NaN in %.0f %% of its voxels, around the brain, is taken for background.", name, 100 * around.mean()
        )


def reaching_border(mask: np.ndarray, diagonal: bool = False) -> np.ndarray:
    """The connected parts of a mask that touch the border of the volume; voxels may be joined by edges and corners."""
    parts, count = ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, mask.ndim if diagonal else 1))
    touching = np.zeros(count + 1, dtype=bool)
    for axis in range(mask.ndim):
        for end in (0, -1):
            touching[np.take(parts, end, axis=axis)] = True
    touching[0] = False  # label 0 is what is not in the mask
    return touching[parts]


def dicom_problem(folder: Path) -> str | None:
    """Why the DICOM files of a folder are not one whole series, as half a sentence; None where they are.

    Slices may be missing or be there twice, as with two echoes, and a folder may hold several series.
    """
    import SimpleITK  # most scans are NIfTI

    series = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) > 1:
        return (
            f"holds {len(series)} DICOM series ({', '.join(series[:3])}{', ...' if len(series) > 3 else ''}), and "
            "nothing says which one is meant: put each into a folder of its own"
        )
    reader, places = SimpleITK.ImageFileReader(), []
    for file in SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0]) if series else ():
        reader.SetFileName(file)
        reader.ReadImageInformation()
        if not all(reader.HasMetaDataKey(tag) for tag in (POSITION, ORIENTATION)):
            return None  # several slices in one file, say
        position, axes = (np.array(reader.GetMetaData(tag).split("\\"), float) for tag in (POSITION, ORIENTATION))
        places.append(float(np.cross(axes[:3], axes[3:]) @ position))
    places.sort()
    steps = np.diff(places)
    twice = int((steps < SAME_PLACE).sum())
    if twice:
        place = places[int(np.argmin(steps))]
        return f"holds {twice} DICOM slice(s) where another one lies, such as at {place:g} mm: leave one image's slices"
    if len(steps) < 2:
        return None
    usual = float(np.median(steps))
    gaps = [place for place in range(len(steps)) if steps[place] > 1.5 * usual]
    if not gaps:
        return None
    missing = sum(round(steps[place] / usual) - 1 for place in gaps)
    between = ", ".join(f"{places[place]:g} and {places[place + 1]:g} mm" for place in gaps[:3])
    return f"is not evenly spaced: {missing} DICOM slice(s) of {usual:g} mm are missing between {between}"


def header_problems(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """What the headers of a scan's NIfTI files do not say, or contradict. Other formats have one affine, always.

    Args:
        paths: the file, or one for each channel.

    Returns:
        Half sentences, for people.

    Raises:
        HeaderError: when the affine is singular, or the voxels are complex numbers.
    """
    problems = []
    for path in map(Path, ensure_tuple(paths)):
        if not _is_nifti(path):
            continue
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Pair):
            problems.append("it is in the Analyze format, which does not say where left and right are")
            continue
        # MONAI's reader replaces a singular affine, and drops imaginary parts, with no more than a warning
        if not np.isfinite(image.affine).all() or np.linalg.matrix_rank(image.affine[:3, :3]) < 3:
            raise HeaderError("has a singular affine in its header, so its voxel size is unknown")
        if np.issubdtype(image.get_data_dtype(), np.complexfloating):
            raise HeaderError("holds complex numbers, of which only the real part would be read")
        zooms = image.header.get_zooms()[:3]
        sform, _ = image.get_sform(coded=True)
        try:
            qform, _ = image.get_qform(coded=True)
        except ValueError:  # of a quaternion; where there is no other affine MONAI's reader has refused the scan
            qform = None
            problems.append("its qform is no rotation; its sform is used")
        if sform is None and qform is None:
            problems.append("its header has neither an sform nor a qform, so its orientation and place are guesses")
        elif sform is not None and qform is not None:
            corners = np.indices((2, 2, 2)).reshape(3, -1) * (np.array((*image.shape, 1, 1)[:3])[:, None] - 1)
            corners = np.vstack([corners, np.ones(8)])
            apart = float(np.linalg.norm((sform - qform) @ corners, axis=0).max())
            if apart > 0.5 * affine_to_spacing(sform).min():
                # MONAI's reader takes the one whose voxel size the header has too
                used, other = ("sform", "qform") if _same_size(sform, zooms) else ("qform", "sform")
                problems.append(f"its {used} (which is used) and its {other} disagree by up to {apart:.3g} mm")
        elif sform is not None and not _same_size(sform, zooms):
            problems.append("its sform is not used, since its voxel size contradicts the header's (pixdim)")
    return problems


def _same_size(affine: np.ndarray, zooms: Sequence[float]) -> bool:
    return np.allclose(affine_to_spacing(affine)[: len(zooms)], zooms)


def as_reason(sentence: str, paths: Sequence[str | os.PathLike]) -> str:
    """A sentence on a scan as half of one, without advice and path; of several channels the name is kept."""
    for path in paths:
        name = Path(path).name
        sentence = sentence.replace(f"'{path}'", "it" if len(paths) == 1 else f"'{name}'").replace(str(path), name)
    return re.sub(rf"(?:[:;]|, or) {re.escape(ADVICE)}\.$", "", sentence).rstrip(".")


def why_unreadable(paths: Sequence[Path], error: Exception) -> str:
    """One sentence on a scan's files that no reader could read, or on the broken one where it is known."""
    names = ", ".join(f"'{path}'" for path in paths)
    if isinstance(error, HeaderError):
        return f"{names} {error}: {ADVICE}."
    for path in paths:
        unfetched = f"'{path}' has not been fetched by git-annex: fetch it by `git annex get`, or {ADVICE}."
        if path.is_symlink() and not path.exists():
            if "annex/objects" in str(path.readlink()):
                return unfetched
            return f"'{path}' is a link to '{path.readlink()}', which does not exist: repair the link, or {ADVICE}."
        if not path.exists():
            return f"'{path}' does not exist: it was moved or deleted after the scans were listed."
        if not os.access(path, os.R_OK):
            return f"'{path}' may not be read by this user: change its permissions, or {ADVICE}."
        if path.is_dir():
            return f"'{path}' holds no readable DICOM series itself ({_reason(error)}): {ADVICE}."
        if isinstance(error, MemoryError):
            return f"'{path}' needs more memory than there is: it is damaged, or far too large; {ADVICE}."
        start = b""
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(len(LFS))
        if start == LFS:
            return f"'{path}' is a pointer of Git LFS, not the scan itself: fetch that by `git lfs pull`."
        if start.startswith(ANNEX):
            return unfetched
        if path.name.lower().endswith((".mgz", ".mgh")):
            return f"'{path}' is in FreeSurfer's format: convert it by `mri_convert {path.name} {path.stem}.nii.gz`."
        if path.stat().st_size == 0:
            return f"'{path}' is an empty file (0 bytes): {ADVICE}."
        found, suffix = content_suffix(path), "".join(path.suffixes[-2:])
        if found is not None and not suffix.lower().endswith(found.lstrip(".")):  # .mgz is gzip too
            ending = f"{path.suffix}.gz" if found == ".gz" else found
            return f"'{path}' holds {found} data, which its name hides: rename it to end in {ending}, or {ADVICE}."
    if QUATERNION in str(error):
        return f"{names} has a qform that is no rotation, and no sform to use instead: correct its header, or {ADVICE}."
    if "channel-wise concatenation" in str(error):
        return (
            f"{names} cannot be the channels of one scan, since their grids or affines differ: "
            "resample them to one grid first."
        )
    if "dtype([('R'" in str(error):
        return (
            f"{names} is a colour image (RGB), which has no intensity: convert it to one number per voxel, or {ADVICE}."
        )
    return f"{names} cannot be read as an image ({_reason(error)}): it is truncated or not an image; {ADVICE}."


def _reason(error: BaseException) -> str:
    """The first line of an error's message, short enough for a sentence. Readers such as ITK write paragraphs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # ITK begins with the place in its own source and ends with what went wrong.
    line = next((line for line in lines if not line.startswith(("/", "The file couldn't"))), type(error).__name__)
    return (line if len(line) <= 120 else line[:117] + "...").rstrip(".")
