"""How a run starts: with which weights, from which update on, and on which grid its scans lie."""

from __future__ import annotations

import os

import ignite.distributed as idist
from scripts.data.scan_grid import ScanGrid
from scripts.networks import VDVAE
from scripts.training.checkpoints import load_checkpoint, load_weights, read_weights
from scripts.training.growth import grow_network
from scripts.training.seeding import SeededDataset
from scripts.training.voxel_statistics import start_from_scans
from scripts.utils.errors import InputError

__all__ = ["start_network", "starts_untrained", "stored_grid"]


def start_network(
    network: VDVAE,
    dataset: SeededDataset,
    augmented: bool = False,
    weights: str | os.PathLike | None = None,
    checkpoint: str | os.PathLike | None = None,
    grid: ScanGrid | None = None,
    grow_from: str | os.PathLike | None = None,
    workers: int = 0,
) -> VDVAE:
    """A network as training starts with it: from given weights, or from the statistics of the scans.

    All processes call it, since they share the reading of the scans; weights are read by rank 0 alone, whose network
    is the one that counts.

    Args:
        network: before it is wrapped for several processes.
        dataset: what it will see.
        augmented: whether the dataset's transforms are random.
        weights: a ``model.pt``.
        checkpoint: leave the network alone, since this will be loaded.
        grid: how the scans are fitted to the network's grid, which it keeps; given weights have their own.
        grow_from: weights of a network with fewer levels, see :func:`scripts.training.growth.grow_network`.
        workers: of each process, which read scans.

    Raises:
        ValueError: both ``weights`` and ``grow_from`` are given.
    """
    if weights is not None and grow_from is not None:
        raise InputError("weights and grow_from are both given: a run starts from one of them.")
    first = idist.get_rank() == 0
    if checkpoint is not None:
        return network
    if weights is not None:
        return load_weights(network, weights) if first else network
    if grid is not None:
        network.scan_grid.copy_(grid.as_tensor())
    network = start_from_scans(network, dataset, augmented, workers)
    return grow_network(network, grow_from) if grow_from is not None and first else network


def starts_untrained(
    weights: str | os.PathLike | None, checkpoint: str | os.PathLike | None, restore_optimizer: bool = True
) -> bool:
    """Whether a run's updates are counted from those of an untrained network.

    They are not where it starts anew from trained weights: a ``model.pt``, or a checkpoint without its optimizer.
    """
    if checkpoint is not None:
        return restore_optimizer
    return weights is None


def stored_grid(weights: str | os.PathLike | None, checkpoint: str | os.PathLike | None = None) -> ScanGrid | None:
    """How scans were fitted to the network's grid when weights were trained; None for a run that starts untrained.

    Weights of earlier versions, which do not say it, were trained with each scan fitted to its own box.

    Args:
        weights: a ``model.pt``.
        checkpoint: of the run that is resumed, which counts alone.
    """
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, mmap=True)["network"]
    elif weights is not None:
        state = read_weights(weights)
    else:
        return None
    return ScanGrid.from_tensor(state["scan_grid"]) if "scan_grid" in state else ScanGrid()
