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
from scripts.inference.common import Cohort
from scripts.inference.inferers import moving_levels
from scripts.inference.layouts import VOLUME, ScanLayout, scan_stem
from scripts.inference.outputs import file_names, from_zero_to_one, split_channels
from scripts.layers.levels import grid_name
from scripts.networks import VDVAE
from scripts.utils import figures
from scripts.utils.errors import InputError, NotFoundError
from scripts.utils.files import absolute, expand
from scripts.utils.names import image_files, image_path, item_files
from torch import Tensor

logger = logging.getLogger(__name__)


def list_pair(scans_between: Sequence[Any] | None, cohort: Cohort) -> list[dict[str, Any]]:
    """The two scans to interpolate between, as the one item of a data set: ``[{"image": first, "second": second}]``.

    Args:
        scans_between: paths of the two, each a list of paths where a scan has several channels. None: the first two of
            the cohort, which is not looked at otherwise.
        cohort: of scans.

    Raises:
        InputError: when there are not two.
        NotFoundError: when one does not exist.
    """
    if scans_between is None:
        scans = [scan["image"] for scan in cohort.items[:2]]
        if len(scans) < 2:
            run = cohort.training_run
            held_out = " that was held out" if cohort.folder == run.datalist else ""
            raise InputError(
                f"dataset_dir '{cohort.folder}' holds one scan alone{held_out}: set --scans_between to two scans."
            )
    elif isinstance(scans_between, str) or len(scans_between) != 2:
        raise InputError(
            f"scans_between is {scans_between!r}: give the paths of two scans, as in "
            "--scans_between \"['a.nii.gz','b.nii.gz']\"."
        )
    else:
        scans = [list(map(expand, scan)) if isinstance(scan, list | tuple) else expand(scan) for scan in scans_between]
        for path in (path for scan in scans for path in ensure_tuple(scan)):
            if not Path(path).exists():
                raise NotFoundError(f"scans_between: '{path}' does not exist: give the paths of two scans.")
    return [{"image": scans[0], "second": scans[1]}]


def pair_files(pair: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The files of the ``first`` and the ``second`` scan of a pair, as settings: by where they are, since the results
    of a scan that changed are made again.
    """
    ends = {"first": pair[0]["image"], "second": pair[0]["second"]}
    return {name: [str(absolute(path)) for path in ensure_tuple(scan)] for name, scan in ends.items()}


class PairLayout(ScanLayout):
    """Names of a pair's results, see :func:`list_pair`: ``output_dir/a_to_b_step00.nii.gz`` for ``a.nii.gz`` and
    ``b.nii.gz``.

    A channel's results are named after that channel's two files.
    """

    def __init__(
        self,
        pair: Sequence[Mapping[str, Any]],
        output_dir: str | os.PathLike,
        postfix: str,
        extension: str = VOLUME,
        **naming: bool,
    ) -> None:
        (item,) = pair
        first, second = _matched(item_files(item), ensure_tuple(item["second"]))
        root = os.path.commonpath([absolute(file).parent for file in first])
        super().__init__(root, output_dir, postfix, extension, **naming)
        self.seconds = {self.relative(file): scan_stem(other) for file, other in zip(first, second, strict=True)}

    def _postfix(self, scan: str | os.PathLike) -> str:
        return f"to_{self.seconds[self.relative(scan)]}_{self.postfix}"


def _matched(first: Sequence[str], second: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The files of two scans, as many of each; where they are not, the second scan's first one stands for all."""
    return first, second if len(second) == len(first) else list(second[:1]) * len(first)


class BothScans(Transform):
    """Apply a preprocessing, which takes and returns ``{"image": ...}``, to both scans of an item."""

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
    """Write the steps from one scan to another, each as NIfTI on the first scan's fitted grid, its intensities from 0
    (background) to 1.

    Args:
        layout: makes the layout of a step's file by its key.
        keys: of the steps.
        value_range: of what the network predicts.
    """

    def __init__(self, layout: Callable[..., ScanLayout], keys: Sequence[str], value_range: Sequence[float]) -> None:
        self.layout, self.keys, self.value_range = layout, tuple(keys), value_range

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        files = image_files(data["image"])
        for key in self.keys:
            layout = self.layout(key)
            image = from_zero_to_one(torch.as_tensor(data[key]).as_subclass(Tensor), self.value_range)
            for name, part in split_channels(image, layout.names(files)).items():
                layout.save(name, part, data["image"].affine, [*files, *image_files(data["second"])])
        return data


def draw_steps(path: str, data: Mapping[Hashable, Any], value_range: tuple[float, float]) -> None:
    """Two scans, and between them the steps from one to the other."""
    keys = [key for key in map(str, data) if key.startswith("step")]
    labels = ["first scan", *(f"{i / (len(keys) - 1):.0%}" for i in range(len(keys))), "second scan"]
    both = zip(*_matched(file_names(data["image"]), file_names(data["second"])), strict=True)
    titles = [f"{first} to {second}" for first, second in both]
    figures.strip(path, [data[key] for key in ("image", *keys, "second")], labels, value_range, titles=titles)


def report_levels(network: VDVAE, levels_between: Sequence[int | str] | None) -> None:
    """Log of each level, by its grid, whether its latents go over."""
    moving = moving_levels(network, levels_between)
    for level in sorted(set(network.latent_levels), reverse=True):
        whose = "go over to the second scan" if level in moving else "stay those of the first scan"
        logger.info("Grid %s: its latents %s.", grid_name(network.grids()[level]), whose)
