"""Image files on disk: the suffixes of their formats, what they hold, whether they have changed; and writing NIfTI."""

from __future__ import annotations

import glob
import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from scripts.utils.files import write_whole

if TYPE_CHECKING:  # commands look at their arguments before they import PyTorch
    from torch import Tensor

SPACE_CODE = "sform_code"  # in a loaded NIfTI file's metadata

NIFTI_SUFFIXES = (".nii.gz", ".nii")
# headers whose voxels are in a second file beside them
DETACHED_HEADERS = (".hdr", ".mhd", ".nhdr")
IMAGE_SUFFIXES = (
    *NIFTI_SUFFIXES,
    *DETACHED_HEADERS,
    *(".img", ".nrrd", ".mha", ".mgz", ".mgh", ".mnc", ".dcm", ".ima"),
)


def image_suffix(name: str) -> str:
    """The suffix of an image format that a file's name ends in, as it is spelt there; empty if it ends in none."""
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[len(name) - len(suffix) :]


def without_image_suffix(name: str) -> str:
    """A file's name or path without the suffix of its image format."""
    return name[: len(name) - len(image_suffix(name))]


def content_suffix(path: Path) -> str | None:
    """The suffix that belongs to a file's content, by its first bytes; None if they do not tell."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(352)
    if head.startswith(b"\x1f\x8b"):
        return ".gz"
    if head[344:347] == b"n+1" or head[4:7] == b"n+2":
        return ".nii"
    if head.startswith(b"NRRD"):
        return ".nrrd"
    if head.startswith(b"ObjectType"):
        return ".mha"
    if head[128:132] == b"DICM":
        return ".dcm"
    return None


def unzipped_content_suffix(path: Path) -> str | None:
    """As :py:func:`content_suffix`, but ``.nii.gz`` where gzip holds NIfTI."""
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


def file_states(path: Path) -> list[tuple[str, int, int, int]]:
    """What changes when an image's files change: of a DICOM series all slices, of a detached header its voxels too.

    Returns:
        Name, size in bytes, time of the last modification and of the last change of the inode in nanoseconds, of each
        file. The last one also changes where ``cp -p`` and ``rsync -t`` keep the other.
    """
    if path.is_dir():
        files: Sequence[Path] = sorted(entry for entry in path.iterdir() if entry.is_file())
    elif path.suffix in (*DETACHED_HEADERS, ".img"):
        files = sorted(path.parent.glob(f"{glob.escape(path.stem)}.*"))
    else:
        files = [path]
    status = [(file.name, file.stat()) for file in files if file.exists()]
    return [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in status]


def nifti_bytes(array: np.ndarray, affine: np.ndarray, world: str, compresslevel: int) -> bytes:
    """An image as the bytes of a ``.nii.gz``; the same image gives the same bytes.

    Args:
        array: ``[*spatial]``.
        affine: ``[4, 4]``, voxel indices to world mm, RAS; written as sform and as qform.
        world: what the world coordinates refer to, one of NIfTI's codes, such as ``scanner`` or ``mni``.
        compresslevel: of gzip, 1 (fast) to 9 (small).
    """
    nifti = nib.Nifti1Image(array, affine)
    nifti.set_sform(affine, world)
    nifti.set_qform(affine, world)
    nifti.header.set_xyzt_units("mm")
    return gzip.compress(nifti.to_bytes(), compresslevel, mtime=0)  # without the time of writing


def save_nifti(
    path: str | os.PathLike, image: Tensor, affine: np.ndarray | Tensor, space_code: int | None = None
) -> Path:
    """Write an image in the format of the path's suffix, whole or not at all.

    Args:
        path: ends in ``.nii`` or ``.nii.gz``; the folder must exist.
        image: ``[channels, *spatial]``; several channels become the file's fourth axis, also in 2D.
        affine: voxel indices to world mm, RAS.
        space_code: which space the world is, NIfTI's ``sform_code`` (4 is MNI); None: an aligned one (2).
    """
    array = np.moveaxis(np.asarray(image), 0, -1)
    if array.shape[-1] == 1:
        array = array[..., 0]
    elif array.ndim == 3:  # the third axis of a NIfTI file is a spatial one
        array = array[:, :, None]
    written = nib.Nifti1Image(array, np.asarray(affine))
    written.header.set_xyzt_units("mm")
    written.set_sform(written.affine, code=2 if space_code is None else int(space_code))
    return write_whole(path, lambda temporary: nib.save(written, temporary))
