"""Reading the files of a scan, and saying in a sentence why one cannot be read."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection
from monai.data.utils import affine_to_spacing
from monai.transforms import LoadImaged
from monai.utils import ensure_tuple
from scripts.utils.errors import InputError
from scripts.utils.formats import NIFTI_SUFFIXES, content_suffix
from scripts.utils.names import CHANNEL_FILES, expanded

__all__ = ["ADVICE", "HeaderError", "LoadScand", "ScanError", "as_reason", "header_problems", "why_unreadable"]

ADVICE = "replace it or leave it out with --scan_pattern"


class HeaderError(InputError):
    """A header that cannot be true; the message continues a sentence that begins with the file's name."""


class ScanError(InputError):
    """A scan that cannot be used; the message is one sentence that names its file."""


class LoadScand(LoadImaged):
    """MONAI's ``LoadImaged``, with errors that name the file and the likely cause.

    The reader is chosen by the file's suffix.

    Args:
        keys: the keys that hold a path, a list of paths (one for each channel) or a DICOM folder.
        ensure_channel_first: put the channel axis first; adds one where there is none.
        kwargs: what else ``LoadImaged`` takes.

    Raises:
        ScanError: when a file is missing or no reader can read it; of several channels the broken one is named.
    """

    def __init__(self, keys: KeysCollection, ensure_channel_first: bool = True, **kwargs: Any) -> None:
        super().__init__(keys, image_only=True, ensure_channel_first=ensure_channel_first, **kwargs)

    def __call__(self, data: Mapping[Hashable, Any], reader: Any = None) -> dict[Hashable, Any]:
        paths = {key: expanded(data[key]) for key in self.key_iterator(dict(data))}
        try:
            d = super().__call__(data, reader)
            for key, files in paths.items():
                d[key].meta |= {"header_problems": header_problems(files), CHANNEL_FILES: files}
            return d
        except MemoryError:
            raise
        except Exception as error:
            files = [file for files in paths.values() for file in files]
            broken = self._broken(files) if len(files) > 1 else None
            raise ScanError(why_unreadable(*(broken or (list(map(Path, files)), error)))) from error

    def _broken(self, files: Sequence[str]) -> tuple[list[Path], Exception] | None:
        """The first of several files that cannot be read by itself, and why; None where all can."""
        for file in files:
            try:
                super().__call__({self.keys[0]: file})
                header_problems(file)
            except Exception as error:
                return [Path(file)], error
        return None


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
        if not path.name.endswith(NIFTI_SUFFIXES):
            continue
        image = nib.load(path)
        # MONAI's reader replaces a singular affine, and drops imaginary parts, with no more than a warning
        if not np.isfinite(image.affine).all() or np.linalg.matrix_rank(image.affine[:3, :3]) < 3:
            raise HeaderError("has a singular affine in its header, so its voxel size is unknown")
        if np.issubdtype(image.get_data_dtype(), np.complexfloating):
            raise HeaderError("holds complex numbers, of which only the real part would be read")
        zooms = image.header.get_zooms()[:3]
        sform, qform = (matrix for matrix, _ in (image.get_sform(coded=True), image.get_qform(coded=True)))
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
    """A sentence on a scan as half of one, without its file's path and without advice.

    Args:
        sentence: such as an error's.
        paths: of the scan; of several, its channels, the file's name is kept.
    """
    for path in paths:
        name = Path(path).name
        sentence = sentence.replace(f"'{path}'", "it" if len(paths) == 1 else f"'{name}'").replace(str(path), name)
    return re.sub(rf"(?:[:;]|, or) {re.escape(ADVICE)}\.$", "", sentence).rstrip(".")


def why_unreadable(paths: Sequence[Path], error: Exception) -> str:
    """One sentence on files that no reader could read.

    Args:
        paths: of the scan's files, or of the broken one where that is known.
        error: what a reader said.
    """
    for path in paths:
        if path.is_symlink() and not path.exists():
            return f"'{path}' is a link to '{path.readlink()}', which does not exist: repair the link, or {ADVICE}."
        if not path.exists():
            return f"'{path}' does not exist: it was moved or deleted after the scans were listed."
        if not os.access(path, os.R_OK):
            return f"'{path}' may not be read by this user: change its permissions, or {ADVICE}."
        if path.is_dir():
            return f"'{path}' holds no readable DICOM series itself ({_reason(error)}): {ADVICE}."
        if path.stat().st_size == 0:
            return f"'{path}' is an empty file (0 bytes): {ADVICE}."
        found, suffix = content_suffix(path), "".join(path.suffixes[-2:])
        if found is not None and not suffix.lower().endswith(found.lstrip(".")):  # .mgz is gzip too
            ending = f"{path.suffix}.gz" if found == ".gz" else found
            return f"'{path}' holds {found} data, which its name hides: rename it to end in {ending}, or {ADVICE}."
    names = ", ".join(f"'{path}'" for path in paths)
    if "channel-wise concatenation" in str(error):
        return (
            f"{names} cannot be the channels of one scan, since their grids or affines differ: "
            "resample them to one grid first."
        )
    if isinstance(error, HeaderError):
        return f"{names} {error}: {ADVICE}."
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
