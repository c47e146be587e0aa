"""Scans that are missing in places: hiding what lies under a mask, and putting back the rest.

What is hidden is gone before anything is computed from the scan, so that no value under a mask can reach a result:
neither through the smoothing of the fit to the network's grid, nor through the percentiles of the scaling.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.metrics.regression import compute_ssim_and_cs
from monai.transforms import MapTransform, Transform
from monai.utils import ensure_tuple
from scipy import stats
from scripts.data.scan_grid import Fit
from scripts.data.transforms import FitShape, ScanError
from scripts.inference.layouts import ScanLayout
from scripts.inference.masks import read_mask
from scripts.inference.measures import mean_interval, ssim_window
from scripts.inference.outputs import file_names, read_rows
from scripts.inference.tables import ScanColumns, row_table
from scripts.utils import figures
from scripts.utils.names import image_path
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# A voxel of the network's grid is missing when more than this share of what it averages is.
MISSING_FRACTION = 0.01


class HideMissingd(MapTransform):
    """Give what a scan's mask marks the scan's background, and keep a copy of the scan as it was.

    It belongs right after loading; ``mask`` is the mask's path. Adds ``missing``, bool ``[1, *spatial]``, true where
    the mask is above 0, and ``observed``, the scan as loaded. The background is the lowest value outside the mask, of
    each channel.

    Args:
        keys: of the loaded scan, ``[channels, *spatial]``.

    A mask that marks nothing, as those of healthy scans do, leaves the scan as it is.

    Raises:
        ScanError: when the mask cannot be read, lies on another grid than its scan, or marks everything.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            scan = d[key]
            missing = self._read(d["mask"], scan)
            observed_values = scan.as_tensor().masked_fill(missing, torch.inf)
            background = observed_values.flatten(1).amin(1).reshape(-1, *[1] * (scan.ndim - 1))
            d |= {"missing": missing, "observed": scan.clone()}
            if not missing.any():
                logger.info(
                    "'%s': its mask '%s' marks nothing, so that nothing is filled in.", image_path(scan), d["mask"]
                )
            d[key] = MetaTensor(torch.where(missing, background, scan.as_tensor())).copy_meta_from(scan)
        return d

    def _read(self, path: str, scan: MetaTensor) -> Tensor:
        name = image_path(scan)
        missing = read_mask(path, scan)
        if missing.all():
            raise ScanError(f"The mask '{path}' is full (every voxel is above 0): nothing of '{name}' was observed.")
        return missing


class FitLike(FitShape):
    """A fit to the grid of an image that was fitted before."""

    def __init__(self, image: MetaTensor) -> None:
        super().__init__(image.shape[1:])
        self.affine = to_affine_nd(image.ndim - 1, image.affine.numpy().astype(float))

    def _destination(self, image: MetaTensor, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rank = len(shape)
        steps = np.linalg.inv(self.affine) @ to_affine_nd(rank, image.affine.numpy().astype(float))
        return self.affine, 1 / np.abs(steps[:rank, :rank]).max(axis=0)

    def neighbours(self, missing: Tensor, affine: Tensor) -> Tensor:
        """The voxels of the new grid from which a missing voxel of the old one, ``[1, *spatial]``, is interpolated."""
        rank = missing.ndim - 1
        to_new = np.linalg.inv(self.affine) @ to_affine_nd(rank, affine.numpy().astype(float))
        voxels = np.argwhere(missing[0].numpy())
        places = np.floor(voxels @ to_new[:rank, :rank].T + to_new[:rank, rank] + 1e-6).astype(int)
        places = places[((places >= -1) & (places < self.spatial_shape)).all(1)]  # others lie outside of the grid
        found = np.zeros(self.spatial_shape, bool)
        for corner in itertools.product((0, 1), repeat=rank):
            found[tuple(np.clip(places + corner, 0, np.array(self.spatial_shape) - 1).T)] = True
        return torch.from_numpy(found)[None]


class FitMaskd(MapTransform):
    """Bring what :class:`HideMissingd` added to the network's grid, as the scan was brought there.

    It belongs last. Adds ``missing_fitted``, bool ``[1, *spatial_shape]``: every voxel of which the hidden background
    makes up more than a hundredth, and those between which a missing voxel of the scan lies; and ``shown``, the scan
    with nothing hidden, for figures.

    Args:
        keys: of the fitted and scaled scan.

    Raises:
        ScanError: when no voxel of the network's grid is left.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image, missing, observed = d[key], d["missing"], d["observed"]
            fit = FitLike(image)
            averaged = fit(MetaTensor(missing.float(), affine=observed.affine)).as_tensor()
            fitted = (averaged > MISSING_FRACTION) | fit.neighbours(missing, observed.affine)
            if fitted.all():
                name = image_path(image)
                raise ScanError(f"The mask of '{name}' leaves no voxel of the network's grid: use a smaller one.")
            d["missing_fitted"] = fitted
            shown = fit(MetaTensor(observed.as_tensor().nan_to_num(), affine=observed.affine)).as_tensor()
            d["shown"] = Fit.of(image).scaled(shown)
        return d


class FillInd(MapTransform):
    """Put draws into a scan where it is missing, and keep what was observed; add their mean and spread.

    Adds ``imputed_mean``, and ``imputed_std``, the standard deviation over the draws, 0 where the scan was observed.

    Args:
        keys: of the draws, ``[channels, *spatial]`` on the scan's own grid and in its units.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        missing, observed = d["missing"], d["observed"].as_tensor().float()
        draws = [torch.where(missing, torch.as_tensor(d[key]).as_subclass(Tensor), observed) for key in self.keys]
        stack = torch.stack(draws)
        results = dict(zip(self.keys, draws, strict=True))
        results["imputed_mean"] = torch.where(missing, stack.mean(0), observed)
        results["imputed_std"] = torch.where(missing, stack.std(0), torch.zeros_like(observed))
        return d | {key: MetaTensor(value).copy_meta_from(d["observed"]) for key, value in results.items()}


class MeasureFilled(Transform):
    """How good a filling is, of scans that hold the truth under their masks: numbers of the missing voxels.

    Adds ``mse``, ``psnr`` (dB) and ``ssim`` of the draws' mean, in units of the range that scans are scaled to, and
    ``coverage_50`` and ``coverage_90``, the shares of voxels that lie within the 50 and 90 % intervals of a further
    draw (Student's t). All are NaN where nothing is missing.

    Args:
        keys: of the draws, on the scan's own grid and in its units.
        value_range: what scans are scaled to.
    """

    def __init__(self, keys: KeysCollection, value_range: tuple[float, float]) -> None:
        self.keys, self.value_range = ensure_tuple(keys), value_range

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        low, high = self.value_range
        fit, plain = Fit.of(data["image"]), [torch.as_tensor(data[key]).as_subclass(Tensor) for key in self.keys]
        truth, *draws = (
            (fit.scaled(values.float()) - low) / (high - low) for values in (data["observed"].as_tensor(), *plain)
        )
        return {**data, **filling_errors(torch.stack(draws), truth, data["missing"])}


def filling_errors(draws: Tensor, truth: Tensor, missing: Tensor) -> dict[str, Tensor]:
    """See :class:`MeasureFilled`: of two or more draws, ``[draws, channels, *spatial]``, equal to the truth where
    nothing is missing, both from 0 to 1; ``missing`` is bool ``[1, *spatial]``.
    """
    inside, mean, dims = missing.expand_as(truth), draws.mean(0), truth.ndim - 1
    errors = (mean - truth)[inside]
    mse = errors.square().mean()
    window = ssim_window(truth.shape[1:])
    padded = [nn.functional.pad(x[None], (window // 2,) * (2 * dims), mode="replicate") for x in (mean, truth)]
    similarity, _ = compute_ssim_and_cs(*padded, dims, [window] * dims, [1.5] * dims)
    found = {"mse": mse, "psnr": -10 * mse.log10(), "ssim": similarity[0][inside].mean()}
    spread = draws.std(0)[inside] * (1 + 1 / len(draws)) ** 0.5
    for share in (0.5, 0.9):
        reach = float(stats.t.ppf((1 + share) / 2, len(draws) - 1))
        held = (errors.abs() <= reach * spread).float().mean()  # of nothing it is NaN
        found[f"coverage_{100 * share:.0f}"] = held
    return found


def filling_table(path: str | os.PathLike, layout: ScanLayout, columns: ScanColumns, scans: Sequence[str]) -> None:
    """Put what :class:`MeasureFilled` found of these scans together, one row per scan, and log the means."""
    row_table(path, layout, columns, scans)
    rows = [row for _, row in read_rows(layout, scans) if not math.isnan(row["mse"])]
    if rows:
        found = {name: mean_interval(name, [row[name] for row in rows]) for name in rows[0]}
        shown = [f"{name} {n[name]:.4g} +- {(n[f'{name}_std'] or 0):.2g}" for name, n in found.items()]
        logger.info("%d scan(s) filled, mean +- deviation: %s. '%s'.", len(rows), ", ".join(shown), path)


def draw_imputation(
    keys: Sequence[str], path: str, data: Mapping[Hashable, Any], value_range: tuple[float, float]
) -> None:
    """A scan, what of it is missing, and the mean, spread and first of the draws ``keys``, as ``SaveFigured`` does."""
    draws = torch.stack([data[key] for key in keys])
    titles = file_names(data["image"])
    figures.imputation(
        path, data["shown"], data["missing_fitted"], draws.mean(0), draws.std(0), draws[0], titles, value_range
    )


def stack_missing(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """``mask`` for :class:`scripts.inference.inferers.Imputation`, bool ``[batch, 1, *spatial]``."""
    return {"mask": torch.stack([item["missing_fitted"] for item in items])}
