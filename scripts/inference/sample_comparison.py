"""How samples compare with held-out scans: MMD, and MS-SSIM of pairs."""

from __future__ import annotations

import itertools
import logging
import os
import random
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.inferers import Inferer
from monai.networks.utils import eval_mode
from monai.utils.enums import CommonKeys as Keys
from scripts.inference.engine import list_samples, scan_generator
from scripts.inference.sample_metrics import (
    gaussian_kernel,
    kernel_features,
    mean_of_pairs,
    mmd,
    ms_ssim_metric,
    random_halves,
)
from scripts.layers.gaussian import Draws
from scripts.networks import VDVAE
from scripts.training.precision import autocast
from scripts.utils.errors import InputError
from scripts.utils.names import item_path
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

__all__ = ["SampleComparison", "one_per_subject"]

logger = logging.getLogger(__name__)

HALVES = 200  # random divisions, for the sampling errors
VOXELS = 2**22  # of all images together, in memory at once

Summary = dict[str, Any]


class SampleComparison:
    """Draws samples and compares them with held-out scans: do they look like scans, and do they vary as scans do?

    Squared maximum mean discrepancies (MMD; Gretton et al. 2012), unbiased, of whole images: ``mmd_gaussian`` with a
    Gaussian kernel as wide as the median distance between scans, ``mmd_linear`` of the dot product (MONAI's own), which
    sees the mean image alone. ``ms_ssim`` is the mean MS-SSIM of all pairs of samples, and of all pairs of scans.

    Samples and scans are kept on disk meanwhile, so that memory does not grow with their number. Each sample has noise
    of its own, the same that the bundle's ``sample`` gives to the sample of this number.

    Args:
        network: the network.
        dataset: of held-out scans; as many as there are samples are chosen at random, or all, but one per subject.
        items: of a datalist, those of ``dataset``; scans without a ``subject`` are of a subject each.
        inferer: draws samples, see :class:`scripts.inference.inferers.Sampling`.
        samples: how many; 0 compares nothing.
        value_range: of the intensities.
        scratch_dir: a folder for images, removed at the end.
        batch_size: of samples, and of pairs.
        seed: of the noise and of all choices.

    Raises:
        ValueError: when ``samples`` is negative or 1.
    """

    def __init__(
        self,
        network: VDVAE,
        dataset: Dataset,
        items: Sequence[Mapping[str, Any]],
        inferer: Inferer,
        samples: int,
        value_range: Sequence[float],
        scratch_dir: str | os.PathLike,
        device: torch.device | str = "cpu",
        batch_size: int = 1,
        seed: int = 0,
        amp: bool = False,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        if samples < 0 or samples == 1:
            raise InputError(f"samples is {samples}: set --samples to 2 or more, or to 0 to compare none.")
        self.network, self.dataset, self.inferer = network, dataset, inferer
        self.chosen = one_per_subject(items, samples, seed)
        self.samples, self.scans = samples, len(self.chosen)
        self.scratch_dir, self.device = Path(scratch_dir), torch.device(device)
        self.batch_size, self.seed = batch_size, seed
        self.amp, self.amp_dtype = amp, amp_dtype
        self.metric = ms_ssim_metric(network.spatial_shape, value_range)

    def run(self) -> Summary | None:
        """Compare.

        Returns:
            What is found, the same on every process; None without samples.
        """
        if self.samples == 0:
            return None
        with _scratch(self.scratch_dir):
            self._keep_samples()
            self._keep_scans()
            idist.barrier()
            similarity = {kind: self._similarities(kind) for kind in ("sample", "scan")}
            return {
                "count": self.samples,
                "held_out_scans": self.scans,
                **self._discrepancies(),
                "ms_ssim": {
                    "scales": len(self.metric.weights),
                    "kernel_size": self.metric.kernel_size[0],
                    "samples": self._diversity(similarity["sample"]),
                    "held_out": self._diversity(similarity["scan"]),
                },
            }

    def _path(self, kind: str, number: int) -> Path:
        return self.scratch_dir / f"{kind}_{number:04d}.npy"

    def _keep_samples(self) -> None:
        names = [Path(item_path(item)).name for item in list_samples(self.scratch_dir, self.samples)]
        numbers = range(1 + idist.get_rank(), self.samples + 1, idist.get_world_size())
        for start in _progress(range(0, len(numbers), self.batch_size), "drawing samples"):
            batch = numbers[start : start + self.batch_size]
            draws = Draws([scan_generator(self.seed, names[number - 1], self.device) for number in batch])
            with eval_mode(self.network), autocast(self.device, self.amp, self.amp_dtype):
                drawn = self.inferer(len(batch), self.network, draws=draws)["sample"]
            for number, image in zip(batch, drawn.float().cpu().numpy(), strict=True):
                np.save(self._path("sample", number), image)

    def _keep_scans(self) -> None:
        numbers = range(idist.get_rank(), self.scans, idist.get_world_size())
        for number in _progress(numbers, "reading held-out scans"):
            image = torch.as_tensor(self.dataset[self.chosen[number]][Keys.IMAGE]).as_subclass(Tensor)
            np.save(self._path("scan", number + 1), image.float().numpy())

    def _similarities(self, kind: str) -> Tensor:
        """MS-SSIM of every sample (or scan) with every other, ``[images, images]``; each process takes some rows."""
        count = self.samples if kind == "sample" else self.scans
        found = []
        for row in _progress(range(idist.get_rank(), count, idist.get_world_size()), f"MS-SSIM of pairs of {kind}s"):
            image = self._load(kind, [row])
            for start in range(row + 1, count, self.batch_size):
                others = self._load(kind, range(start, min(start + self.batch_size, count)))
                values = self.metric(others, image.expand_as(others)).flatten().tolist()
                found += [(row, start + offset, value) for offset, value in enumerate(values)]
        matrix = torch.zeros(count, count, dtype=torch.float64)
        for row, column, value in itertools.chain(*idist.all_gather(found)):
            matrix[row, column] = matrix[column, row] = value
        return matrix

    def _load(self, kind: str, indices: Sequence[int]) -> Tensor:
        images = [np.load(self._path(kind, index + 1)) for index in indices]
        return torch.from_numpy(np.stack(images)).to(self.device)

    def _diversity(self, similarity: Tensor) -> Summary:
        indices = range(len(similarity))
        if len(indices) < 2:
            return {"mean": None, "standard_error": None}
        halves = random_halves(indices, HALVES, self.seed) if len(indices) >= 4 else []
        return {
            "mean": mean_of_pairs(similarity, indices),
            "standard_error": _std([mean_of_pairs(similarity, half) for half, _ in halves]),
        }

    def _discrepancies(self) -> Summary:
        """The MMD of as many samples as scans, with the reference: halves of the scans against each other."""
        count = self.scans
        samples, scans = range(count), range(count, 2 * count)
        if count < 2:
            logger.warning("One held-out subject: MMD and MS-SSIM need 2, and their sampling errors 4.")
            return dict.fromkeys(("mmd_gaussian", "mmd_linear"))
        paths = [self._path(kind, number) for kind in ("sample", "scan") for number in range(1, count + 1)]
        dots = _dot_products(paths)
        summaries = {}
        for name, kernel in (("mmd_gaussian", gaussian_kernel(dots, scans)), ("mmd_linear", dots)):
            features = kernel_features(kernel)
            sample_halves, scan_halves = (
                random_halves(indices, HALVES, seed) if count >= 4 else []
                for indices, seed in ((samples, self.seed), (scans, self.seed + 1))
            )
            halves = [mmd(features, a, b) for (a, _), (b, _) in zip(sample_halves, scan_halves, strict=True)]
            reference = [mmd(features, a, b) for a, b in scan_halves]
            summaries[name] = {
                "value": mmd(features, samples, scans),
                "standard_error": _std(halves),
                "scan_halves_mean": float(np.mean(reference)) if reference else None,
                "scan_halves_std": _std(reference),
                "scan_halves_95th_percentile": float(np.quantile(reference, 0.95)) if reference else None,
            }
        return summaries


def one_per_subject(items: Sequence[Mapping[str, Any]], count: int, seed: int) -> list[int]:
    """Indices of at most so many scans, chosen at random, no two of one subject, whose scans are alike."""
    generator, subjects, chosen = random.Random(seed), set(), []
    for index in generator.sample(range(len(items)), len(items)):
        subject = items[index].get("subject") or f"scan {index}"
        if subject not in subjects and len(chosen) < count:
            chosen.append(index)
        subjects.add(subject)
    return sorted(chosen)


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _dot_products(paths: Sequence[Path]) -> Tensor:
    """Of all images with each other, ``[images, images]``, in double precision; a part of each in memory at a time."""
    size = np.load(paths[0], mmap_mode="r").size
    dots = torch.zeros(len(paths), len(paths), dtype=torch.float64)
    step = max(1, VOXELS // len(paths))
    for start in range(0, size, step):
        part = np.stack([np.load(path, mmap_mode="r").reshape(-1)[start : start + step] for path in paths])
        part = torch.from_numpy(part).double()
        dots += part @ part.T
    return dots


@contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    """An empty folder that all processes share, removed at the end."""
    if idist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    idist.barrier()
    try:
        yield
        idist.barrier()
    finally:
        if idist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _progress(values: Sequence[int], what: str) -> Iterator[int]:
    """A progress bar on standard error, of rank 0."""
    return tqdm(values, desc=what, file=sys.stderr, disable=idist.get_rank() > 0)
