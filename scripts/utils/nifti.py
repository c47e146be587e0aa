"""Writing images as NIfTI."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
from scripts.utils.files import write_whole
from torch import Tensor

__all__ = ["nifti_bytes", "save_nifti"]


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


def save_nifti(path: str | os.PathLike, image: Tensor, affine: np.ndarray | Tensor) -> Path:
    """Write an image in the format of the path's suffix, whole or not at all.

    Args:
        path: ends in ``.nii`` or ``.nii.gz``; the folder must exist.
        image: ``[channels, *spatial]``; several channels become the file's fourth axis, also in 2D.
        affine: voxel indices to world mm, RAS.
    """
    array = np.moveaxis(image.as_subclass(Tensor).numpy(), 0, -1)
    if array.shape[-1] == 1:
        array = array[..., 0]
    elif array.ndim == 3:  # the third axis of a NIfTI file is a spatial one
        array = array[:, :, None]
    return write_whole(path, lambda temporary: nib.save(nib.Nifti1Image(array, np.asarray(affine)), temporary))
