"""The voxel-wise Gaussian of the training scans, from which the network's output starts."""

from __future__ import annotations

import logging
import pickle
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ignite.distributed as idist
import joblib
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from scipy.ndimage import gaussian_filter
from scripts.data.cache import DAMAGE, ScanCache, describe_transforms
from scripts.networks import VDVAE
from scripts.training.seeding import SeededDataset
from scripts.utils.distributed import from_rank_zero, ignore_signals, wait_for_all
from scripts.utils.files import check_archive, write_tensors
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

logger = logging.getLogger(__name__)

READINGS = 512
KEPT = 3  # of the readings that nothing moves one in so many is read, see choose_readings
SMOOTHING = 0.4
NAMES = ("mean", "std", "affine")  # of what is kept
# Voxels are rounded to multiples of this. Sums of 8192 of them, and of their squares, are then exact in double
# precision (up to an absolute value of 1), so that neither their order nor the number of processes matters.
RESOLUTION = 2.0**-20


class Reading(NamedTuple):
    """One reading of a scan, whose augmentation follows from the epoch and the index, and for how many it counts."""

    epoch: int
    index: int
    weight: int = 1


class _Readings(Dataset):
    """Readings of a data set: voxels, ``[channels, *spatial]``, the affine of their grid, ``[4, 4]``, the weight."""

    def __init__(self, dataset: SeededDataset, readings: Sequence[Reading]) -> None:
        self.dataset, self.readings = dataset, readings

    def __len__(self) -> int:
        return len(self.readings)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor, int]:
        reading = self.readings[place]
        self.dataset.epoch = reading.epoch
        scan = self.dataset[reading.index]["image"]
        affine = to_affine_nd(3, scan.affine) if isinstance(scan, MetaTensor) else torch.eye(4)
        return torch.as_tensor(scan).as_subclass(Tensor), torch.as_tensor(affine).double(), reading.weight


def choose_readings(dataset: SeededDataset, readings: int = READINGS, augmented: bool = False) -> list[Reading]:
    """Which scans of a data set are read: a fixed random part of many, each once; few again and again if augmented.

    Of so many ``readings`` of augmented scans those are read that an affine transform moves, since these alone bring
    brain to where no scan has any, and of the others one in three, which counts for three. Measured with 60 phantoms
    at 32 voxels, over eight sets of readings: by the 234 that are read, 36 other scans lie at -2.04 bits per dim in the
    mean and 29 at worst when they are augmented, and at -2.79 as they are; by all 512 at -2.07, 27 and -2.74.
    """
    count = len(dataset)
    if count > readings:
        chosen = [Reading(0, index) for index in random.Random(0).sample(range(count), readings)]
    else:
        chosen = [Reading(*divmod(place, count)) for place in range(readings if augmented else count)]
    if not augmented or not isinstance(dataset, SeededDataset):
        return chosen
    moved, others = [], []
    for reading in chosen:
        (moved if dataset.moves(reading.epoch, reading.index) else others).append(reading)
    return moved + [reading._replace(weight=KEPT) for reading in others[::KEPT]]


def voxel_statistics(
    dataset: SeededDataset,
    readings: int = READINGS,
    augmented: bool = False,
    smoothing: float = SMOOTHING,
    workers: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of each voxel over (a fixed random part of) a data set, and the affine of its grid.

    Each process reads its share of the scans, by workers of its own; all must call this, and get the same result
    whatever their number.

    Args:
        dataset: its items hold ``image``, ``[channels, *spatial]``.
        readings: at most so many scans count; more hardly change the result.
        augmented: items differ each time they are read, and are read again until there are so many ``readings``.
            Augmentation moves brain to where no scan has any: one pass over 60 scans sees too little of that, and
            augmented scans lie at -0.7 bits per dim in the mean and 59 at worst; 512 readings make that -2.1 and 13.
        smoothing: standard deviation in voxels of a Gaussian that smooths the variance. At the rim of the brain the
            variance falls off within a voxel and is poorly known: 0.4 makes new scans more likely (-3.88 against
            -3.83 bits per dim on 64 held-out phantoms at 32 voxels) and halves the largest deviation among them.
        workers: of this process, as those of a data loader; 0 reads in the process itself.

    Returns:
        mean and standard deviation, ``[channels, *spatial]`` each, and the scans' median affine, ``[4, 4]``.
    """
    chosen = choose_readings(dataset, readings, augmented)
    total, squares, affines = _sum_share(dataset, chosen, workers)
    wait_for_all()  # shares take differently long
    total, squares = (idist.all_reduce(sums.to(idist.device())).cpu() for sums in (total, squares))
    affines = [affine for share in idist.all_gather(affines.tolist()) for affine in share]
    weights = sum(reading.weight for reading in chosen)
    mean = total / weights
    variance = (squares / weights - mean.square()).clamp_min(0)
    sigma = (0.0, *[smoothing] * (variance.ndim - 1))
    std = torch.as_tensor(gaussian_filter(variance.numpy(), sigma)).sqrt()
    return mean.float(), std.float(), torch.tensor(affines, dtype=torch.float64).median(0).values


def _sum_share(dataset: SeededDataset, readings: Sequence[Reading], workers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and sum of squares over this process's share of readings, exact, and their affines, ``[readings, 4, 4]``."""
    rank = idist.get_rank()
    share = readings[rank :: idist.get_world_size()]
    epoch = getattr(dataset, "epoch", 0)
    loader = DataLoader(
        _Readings(dataset, share or readings[:1]),  # one that has none reads a scan for its shape
        batch_size=None,
        num_workers=min(workers, len(share)),
        worker_init_fn=ignore_signals if workers else None,
    )
    bar = tqdm(loader, desc="mean and deviation of the scans", unit="scan", file=sys.stderr, disable=rank > 0)
    total, squares, affines = torch.zeros(()), torch.zeros(()), []
    for scan, affine, weight in bar:
        scan = scan.double().div_(RESOLUTION).round_().mul_(RESOLUTION)
        if not affines:
            total, squares = torch.zeros_like(scan), torch.zeros_like(scan)
        total.add_(scan, alpha=weight)
        squares.addcmul_(scan, scan, value=weight)
        affines += [affine] * weight
    dataset.epoch = epoch
    if not share:
        return total.zero_(), squares.zero_(), torch.zeros(0, 4, 4)
    return total, squares, torch.stack(affines)


def start_from_scans(network: VDVAE, dataset: SeededDataset, augmented: bool = False, workers: int = 0) -> VDVAE:
    """The same network, its template (if it has one) that of these scans.

    It is kept beside the preprocessed scans, so that another run with the same scans, preprocessing, augmentation and
    seed reads it. All processes must call this; the template is then that of rank 0, from where the others get it.

    Args:
        network: before it is wrapped for several processes.
        dataset: what the network will see, augmented if training is: an augmented scan lies far outside of what the
            others vary, and its gradients would drown theirs.
        augmented: whether there is any.
        workers: of each process, which read the scans.
    """
    if not network.template:
        return network
    path = _kept_path(dataset, augmented) if idist.get_rank() == 0 else None
    kept = None if path is None else _read(path, [network.in_channels, *network.spatial_shape])
    if not from_rank_zero(lambda: kept is not None):
        computed = voxel_statistics(dataset, augmented=augmented, workers=workers)
        kept = dict(zip(NAMES, computed, strict=True))
        if path is not None:
            write_tensors(path, kept)
    if kept is not None:
        network.set_voxel_gaussian(**kept)
    return network


def _kept_path(dataset: SeededDataset, augmented: bool) -> Path | None:
    """Where the statistics of a data set are kept, a name for each content; None where nothing is."""
    cache = getattr(dataset, "data", None)
    if not isinstance(cache, ScanCache) or cache.cache_dir is None:
        return None
    readings = choose_readings(dataset, augmented=augmented)
    scans = {index: cache.path(index).name for index in {reading.index for reading in readings}}
    code = Path(__file__).read_bytes()
    try:
        steps = [describe_transforms(dataset.transform), dataset.transform.overrides]
        settings = [readings, scans, steps, dataset.seed, code]
        return cache.cache_dir / f"template_{joblib.hash(settings)}.pt"
    except (pickle.PicklingError, AttributeError):  # a transform of a user's own, such as a lambda
        return None


def _read(path: Path, shape: Sequence[int]) -> dict[str, Tensor] | None:
    """What was kept of scans of ``[channels, *spatial]``; None where there is nothing, or where it is damaged."""
    if not path.is_file():
        return None
    try:
        check_archive(path)
        kept = torch.load(path, weights_only=True)
        mean, std, affine = (kept[name] for name in NAMES)
        if mean.shape != torch.Size(shape) or std.shape != mean.shape or affine.shape != (4, 4):
            raise ValueError("it is of other scans")
        if not all(value.is_floating_point() and value.isfinite().all() for value in kept.values()) or (std < 0).any():
            raise ValueError("it holds no statistics")
    except DAMAGE:
        logger.warning("'%s', the mean and deviation of the scans, is damaged: they are computed again.", path)
        return None
    logger.info("Mean and deviation of the scans are those of '%s'.", path)
    return kept
