"""From one scan to another: the two that interpolation starts and ends with, and where its steps go."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.transforms import Transform
from monai.utils import ensure_tuple
from scripts.inference.engine import list_scans
from scripts.inference.inferers import moving_levels
from scripts.inference.outputs import ScanLayout, from_zero_to_one, scan_stem
from scripts.layers.levels import grid_name
from scripts.networks import VDVAE
from scripts.utils import figures
from scripts.utils.names import image_path, item_path
from scripts.utils.nifti import save_nifti
from torch import Tensor

__all__ = ["BothScans", "SaveStepsd", "list_pair", "pair_layout", "report_levels", "stack_pairs"]

logger = logging.getLogger(__name__)


def list_pair(
    scans_between: Sequence[Any] | None, dataset_dir: str | os.PathLike, scan_pattern: str | Sequence[str]
) -> list[dict[str, Any]]:
    """The two scans to interpolate between, as the one item of a data set: ``[{"image": first, "second": second}]``.

    Args:
        scans_between: paths of the two, each a list of paths where a scan has several channels. None: the first two of
            ``dataset_dir``.
        dataset_dir, scan_pattern: see :func:`scripts.inference.engine.list_scans`.

    Raises:
        ValueError: when there are not two.
        FileNotFoundError: when one does not exist.
    """
    if scans_between is None:
        scans = [scan["image"] for scan in list_scans(dataset_dir, scan_pattern)[:2]]
        if len(scans) < 2:
            raise ValueError(f"dataset_dir '{dataset_dir}' holds one scan alone: set --scans_between to two scans.")
    elif isinstance(scans_between, str) or len(scans_between) != 2:
        raise ValueError(
            f"scans_between is {scans_between!r}: give the paths of two scans, as in "
            "--scans_between \"['a.nii.gz','b.nii.gz']\"."
        )
    else:
        scans = list(scans_between)
        for path in (path for scan in scans for path in ensure_tuple(scan)):
            if not Path(path).expanduser().exists():
                raise FileNotFoundError(f"scans_between: '{path}' does not exist: give the paths of two scans.")
    return [{"image": scans[0], "second": scans[1]}]


def pair_layout(pair: Sequence[Mapping[str, Any]], output_dir: str | os.PathLike) -> Callable[..., ScanLayout]:
    """Makes the layout of a pair's results: ``output_dir/a_to_b_step00.nii.gz`` for ``a.nii.gz`` and ``b.nii.gz``."""
    (item,) = pair
    root = Path(item_path(item)).expanduser().absolute().parent
    second = scan_stem(ensure_tuple(item["second"])[0])
    return lambda postfix, extension=".nii.gz": ScanLayout(root, output_dir, f"to_{second}_{postfix}", extension)


class BothScans(Transform):
    """Apply a preprocessing to both scans of an item.

    Args:
        preprocessing: takes and returns ``{"image": ...}``.
    """

    def __init__(self, preprocessing: Callable[[Mapping], Mapping]) -> None:
        self.preprocessing = preprocessing

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        first, second = (self.preprocessing({"image": data[key]})["image"] for key in ("image", "second"))
        if not np.allclose(first.affine, second.affine, atol=1e-2 * float(first.pixdim.min())):
            logger.warning(
                "The two scans have other fields of view, so that equal voxels of the network's grid are not equal "
                "places in the world; results have the affine of '%s'.",
                image_path(first),
            )
        return {**data, "image": first, "second": second}


def stack_pairs(items: Sequence[Mapping[str, Any]]) -> Tensor:
    """Both scans of each item, ``[batch, 2, channels, *spatial]``."""
    return torch.stack([torch.stack([item[key].as_tensor() for key in ("image", "second")]) for item in items])


class SaveStepsd(Transform):
    """Write the steps from one scan to another: each as NIfTI on the first scan's fitted grid, its intensities from 0
    (background) to 1, and all in one figure.

    Args:
        layout: makes the layout of a step's file by its key.
        keys: of the steps.
        value_range: of what the network predicts.
        figure: False draws nothing.
    """

    def __init__(
        self, layout: Callable[..., ScanLayout], keys: Sequence[str], value_range: Sequence[float], figure: bool = True
    ) -> None:
        self.layout, self.keys, self.figure = layout, tuple(keys), figure
        self.value_range = value_range

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        name = ensure_tuple(data["name"])[0]
        images = {key: torch.as_tensor(data[key]).as_subclass(Tensor) for key in ("image", *self.keys, "second")}
        scans = {key: from_zero_to_one(image, self.value_range) for key, image in images.items()}
        for key in self.keys:
            save_nifti(self.layout(key).filename(name), scans[key], data["image"].affine)
        if self.figure:
            labels = ["first scan", *(f"{i / (len(self.keys) - 1):.0%}" for i in range(len(self.keys))), "second scan"]
            path = self.layout("steps", ".png").filename(name)
            figures.strip(path, list(scans.values()), labels, (0.0, 1.0))
        return data


def report_levels(network: VDVAE, levels_between: Sequence[int | str] | None) -> None:
    """Log of each level, by its grid, whether its latents go over."""
    moving = moving_levels(network, levels_between)
    for level in sorted(set(network.latent_levels), reverse=True):
        whose = "go over to the second scan" if level in moving else "stay those of the first scan"
        logger.info("Grid %s: its latents %s.", grid_name(network.grids()[level]), whose)
