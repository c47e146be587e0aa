"""Volumes in a page: three slices that follow the mouse, by nilearn, as HTML that needs nothing beside it."""

from __future__ import annotations

import math
import os
import re
import warnings
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

__all__ = ["ShownVolume", "read_volume", "volume_html"]

MOST_VOXELS = 128  # along an axis; of larger volumes every second voxel is shown, or every third, ...
ICON = re.compile(r'<link[^>]*rel="[^"]*icon"[^>]*>')  # nilearn's, which is on the internet
STYLE = "<style>body { background: #000; margin: 0; }</style>"


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
