"""Random numbers: each follows from the run's seed and from what it is drawn for, so that no state needs storing.

The order of the scans follows from (seed, epoch), a scan's augmentation from (seed, epoch, scan), the latents' noise
from (seed, batch, process). None depends on what ran before, on the number of loader workers or, but for the noise, on
the number of processes: a run resumes in the middle of an epoch as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Events
from monai.data import Dataset
from monai.transforms import Compose, RandomizableTransform
from monai.transforms.traits import LazyTrait
from scripts.utils.errors import InputError
from torch.utils.data.distributed import DistributedSampler

if TYPE_CHECKING:
    from scripts.training.trainer import VDVAETrainer

AUGMENTATION, NOISE = 0, 1  # streams of their own


def derive_seed(*numbers: int) -> int:
    """A seed below 2^32 from whole numbers from 0 up; neighbouring numbers give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class SeededDataset(Dataset):
    """MONAI's ``Dataset`` whose random transforms draw, for each item, from (seed, epoch, index) alone.

    Args:
        data: a sequence of items.
        transform: with or without random transforms.
        seed: of the run.
    """

    def __init__(self, data: Sequence, transform: Compose, seed: int = 0) -> None:
        super().__init__(data, transform)
        self.seed = seed
        self.epoch = 0

    def moves(self, epoch: int, index: int) -> bool:
        """Whether an affine transform, or another that MONAI can do lazily, acts on an item in an epoch.

        It is known without computing the item: whether to act is the first thing that a random transform draws.
        """
        self.transform.set_random_state(derive_seed(self.seed, AUGMENTATION, epoch, index))
        acts = [  # each of them draws, whatever the others drew
            t.R.rand() < t.prob
            for t in self.transform.transforms
            if isinstance(t, RandomizableTransform) and isinstance(t, LazyTrait)
        ]
        return any(acts)

    def _transform(self, index: int) -> Any:
        seed = derive_seed(self.seed, AUGMENTATION, self.epoch, index)
        self.transform.set_random_state(seed)
        # TorchIO draws from PyTorch's own generator; GPUs' generators, which hold the latents' noise, stay as they are
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            return super()._transform(index)


class EpochSampler(DistributedSampler):
    """The scans of an epoch in random order, shared between the processes; it can begin in the middle.

    Processes get equally many. Where they do not divide the scans, a few scans are left out of an epoch, others each
    time.

    Args:
        dataset: whose indices are drawn.
        seed: of the run.
    """

    def __init__(self, dataset: Dataset, seed: int = 0) -> None:
        super().__init__(dataset, idist.get_world_size(), idist.get_rank(), shuffle=True, seed=seed, drop_last=True)
        self.skip = 0

    def __iter__(self) -> Iterator[int]:
        """Leaves out the first ``skip`` indices, once."""
        skip, self.skip = self.skip, 0
        return islice(super().__iter__(), skip, None)


class EpochSeeds:
    """A handler that gives each epoch its augmentation, each batch its noise, and resumes an epoch where it stopped.

    Args:
        seed: of the run.
        dataset: of the trainer's data loader.
        sampler: of the same.

    Raises:
        ValueError: on attaching, where the data loader's workers would outlive an epoch.
    """

    def __init__(self, seed: int, dataset: SeededDataset, sampler: EpochSampler) -> None:
        self.seed = seed
        self.dataset = dataset
        self.sampler = sampler

    def attach(self, engine: VDVAETrainer) -> None:
        if engine.data_loader.persistent_workers:
            raise InputError(
                "train#dataloader: persistent_workers would never learn of a new epoch, and repeat the first one's "
                "augmentation: leave it out."
            )
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self._start_batch)

    def _start_epoch(self, engine: VDVAETrainer) -> None:
        state = engine.state
        self.dataset.epoch = state.epoch
        self.sampler.skip = state.iteration % state.epoch_length * engine.data_loader.batch_size

    def _start_batch(self, engine: VDVAETrainer) -> None:
        torch.manual_seed(derive_seed(self.seed, NOISE, engine.state.iteration, idist.get_rank()))
