"""How a run starts: from which weights, from which update on, and on which grid its scans lie.

A network of a finer grid can grow from the weights of one that was trained on a coarser grid.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping

import ignite.distributed as idist
import torch
from scripts.data.scan_grid import ScanGrid
from scripts.layers.blocks import RefiningBlock, ResidualBlock
from scripts.layers.levels import grid_name
from scripts.networks import VDVAE
from scripts.training.checkpoints import load_checkpoint, load_weights, read_weights
from scripts.training.seeding import SeededDataset
from scripts.training.voxel_statistics import start_from_scans
from scripts.utils.errors import InputError
from torch import Tensor

logger = logging.getLogger(__name__)

LEVEL = re.compile(r"^encoder\.(levels|downsamples)\.(\d+)")
OF_THE_GRID = ("output.", "template_", "scan_grid")  # what is not taken from a coarser one
# the weights that see the scan
ENTRIES = ("encoder.levels.0.0.convs.0.weight", "encoder.levels.0.0.skip.weight")
# those that give latents or take them, and those of a posterior that see two parts
LATENTS = re.compile(r"\.(mean|std|z_projection)\.(weight|bias)$")
POSTERIOR = re.compile(r"^decoder\.groups\.(\d+)\..*posterior\.(std_)?trunk\.convs\.0\.weight$")


def start_network(
    network: VDVAE,
    dataset: SeededDataset,
    augmented: bool = False,
    weights: str | os.PathLike | None = None,
    checkpoint: str | os.PathLike | None = None,
    grid: ScanGrid | None = None,
    grow_from: str | os.PathLike | None = None,
    workers: int = 0,
    renew_template: bool = False,
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
        grow_from: weights of a network with fewer levels, see :func:`grow_network`.
        workers: of each process, which read scans.
        renew_template: the mean scan and the voxels' deviations are those of these scans where weights are given, too:
            what a network knows is how scans differ from these.

    Raises:
        ValueError: both ``weights`` and ``grow_from`` are given.
    """
    if weights is not None and grow_from is not None:
        raise InputError("weights and grow_from are both given: a run starts from one of them.")
    first = idist.get_rank() == 0
    if checkpoint is not None:
        return network
    if weights is not None:
        network = load_weights(network, weights) if first else network
        return start_from_scans(network, dataset, augmented, workers) if renew_template else network
    if grid is not None:
        network.scan_grid.copy_(grid.as_tensor())
    network = start_from_scans(network, dataset, augmented, workers)
    return grow_network(network, grow_from, renew_template) if grow_from is not None and first else network


def starts_untrained(
    weights: str | os.PathLike | None, checkpoint: str | os.PathLike | None, restore_optimizer: bool = True
) -> bool:
    """Whether a run's updates are counted from those of an untrained network.

    They are not where it starts from trained weights: a ``model.pt``, or a checkpoint without its optimizer. What a
    checkpoint says of its run counts for more, see :meth:`CheckpointHandler.resume`.
    """
    return weights is None and (checkpoint is None or restore_optimizer)


def stored_grid(weights: str | os.PathLike | None, checkpoint: str | os.PathLike | None = None) -> ScanGrid | None:
    """How scans were fitted to the network's grid when weights were trained; None for a run that starts untrained.

    Of a run that is resumed its ``checkpoint`` counts alone. Weights of earlier versions, which do not say it, were
    trained with each scan fitted to its own box.
    """
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, mmap=True)["network"]
    elif weights is not None:
        state = read_weights(weights)
    else:
        return None
    return ScanGrid.from_tensor(state["scan_grid"]) if "scan_grid" in state else ScanGrid()


@torch.no_grad()
def grow_network(network: VDVAE, weights: str | os.PathLike, renew_template: bool = False) -> VDVAE:
    """Start a network from the weights of a coarser or a narrower one.

    Both count levels from the coarsest: level 16³ of one is level 16³ of the other. New finest levels pass the scan on
    to the levels that are taken, so that these see what they have learnt to see, at the even voxels. How the new levels
    refine it, and the output, are learnt anew; so is the decoder of what was the finest level, if it had no latents
    there and gets some.

    A network of as many levels takes all of them, but with ``renew_template`` not the voxel-wise Gaussian. With patches
    where the weights have voxels, a patch is seen as the mean of its voxels, each of which starts from what was
    predicted of all.

    A level may be wider than in the weights (Net2Net: Chen et al. 2016, arXiv:1511.05641): what is added starts as
    features that nothing looks at, so that the same is predicted.

    Raises:
        ValueError: it has fewer levels than the weights, a level that both have differs in more than its width, or the
            last new level is as wide as the next.
    """
    state = read_weights(weights)
    matches = [match for match in map(LEVEL.match, state) if match and match[1] == "levels"]
    trained = 1 + max((int(match[2]) for match in matches), default=-1)
    if not 0 < trained <= network.levels:
        raise InputError(
            f"grow_from '{weights}' has {trained} levels and network_def {network.levels}: give the latter as many, or "
            "more at the fine end of every list."
        )
    if trained < network.levels:
        _add_levels(network, state, weights, network.levels - trained)
    else:
        _take_all(network, state, weights, renew_template)
    logger.info("Levels up to %s start from '%s'.", grid_name(network.grids()[network.levels - trained]), weights)
    return network


def _add_levels(network: VDVAE, state: Mapping[str, Tensor], weights: str | os.PathLike, new: int) -> None:
    """See :func:`grow_network`: all is taken but what belongs to the grid."""
    tensors, finest = network.state_dict(keep_vars=True), f"decoder.groups.{network.levels - new - 1}."
    if isinstance(network.encoder.levels[new][0].skip, torch.nn.Identity):
        raise InputError(
            f"network_def: level {grid_name(network.grids()[new])} and the next finer one are as wide as each other: "
            "give the finer one another number of channels, so that it can hand on the scan to one grown from "
            f"'{weights}'."
        )
    anew = OF_THE_GRID
    if _has_latents(tensors, finest) and not _has_latents(state, finest):
        anew = (*OF_THE_GRID, finest)
    for name, tensor in state.items():
        if not name.startswith(anew):
            target = LEVEL.sub(lambda m: f"encoder.{m[1]}.{int(m[2]) + new}", name)
            _take(network, state, tensors.get(target), target, tensor, weights)
    for level in range(new):
        for block in network.encoder.levels[level]:
            _pass_on(block, network.in_channels)
    for block in network.decoder.groups[network.levels - new - 1]:
        # on the finest level, which this was, such a block adds to nothing
        if isinstance(block, RefiningBlock) and not isinstance(block.skip, torch.nn.Identity):
            block.skip.weight.zero_()


def _take_all(network: VDVAE, state: Mapping[str, Tensor], weights: str | os.PathLike, renew_template: bool) -> None:
    """See :func:`grow_network`: all is taken, of a coarser grid without its Gaussian, the two ends for each voxel."""
    tensors = network.state_dict(keep_vars=True)
    lacking = [name for name in tensors if name not in state and not name.startswith(OF_THE_GRID)]
    if lacking:
        raise InputError(
            f"grow_from '{weights}' lacks {lacking[0]}: give all levels the kernels and latents that they were trained "
            "with, and widths that are equal where those were."
        )
    # a patch for each of the weights' voxels, where these had none
    voxels = max(1, len(tensors["output.bias"]) // len(state["output.bias"]))
    mean = "template_mean"
    if voxels == 1 and mean in state and mean in tensors and state[mean].shape != tensors[mean].shape:
        raise InputError(
            f"grow_from '{weights}' has as many levels as network_def, but another grid: give the latter at least one "
            "level more, at the fine end of every list, or a patch_size."
        )
    anew = OF_THE_GRID[1:] if voxels > 1 else ("template_",) if renew_template else ()
    for name, tensor in state.items():
        if name.startswith(anew):
            continue
        if name.startswith("output."):
            tensor = tensor.repeat_interleave(voxels, 0)
        elif name in ENTRIES:
            tensor = tensor.repeat_interleave(voxels, 1) / voxels
        _take(network, state, tensors.get(name), name, tensor, weights)


def _has_latents(state: Mapping[str, Tensor], level: str) -> bool:
    """Whether a level of the decoder has latents, by the names of its weights."""
    return any(name.startswith(level) and "z_projection" in name for name in state)


def _take(
    network: VDVAE,
    state: Mapping[str, Tensor],
    place: Tensor | None,
    name: str,
    tensor: Tensor,
    weights: str | os.PathLike,
) -> None:
    """Copy a tensor of the weights to its place, which may be wider: what is known sees nothing of what is added."""
    fits = place is not None and place.ndim == tensor.ndim and place.shape[2:] == tensor.shape[2:]
    fits = fits and all(wide >= narrow for wide, narrow in zip(place.shape, tensor.shape, strict=True))
    if fits and name.startswith(OF_THE_GRID[1:]):
        fits = place.shape == tensor.shape
    if fits and LATENTS.search(name):  # their number of channels
        axis = 1 if name.endswith("z_projection.weight") else 0
        fits = name.endswith("z_projection.bias") or place.shape[axis] == tensor.shape[axis]
    if not fits:
        raise InputError(
            f"grow_from '{weights}': its {name} has shape {list(tensor.shape)}, but network_def makes it "
            f"{'none' if place is None else list(place.shape)}: give the levels that both have the kernels and latents "
            "that they were trained with, and no smaller widths."
        )
    if tensor.ndim < 2 or place.shape == tensor.shape:
        place[(slice(0, len(tensor)),) if tensor.ndim else ()] = tensor
        return
    place[: len(tensor)] = 0
    place[: len(tensor), _columns(network, state, name, tensor)] = tensor.to(place)


def _columns(network: VDVAE, state: Mapping[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    """Where a wider network has what each column of a weight sees."""
    columns = torch.arange(tensor.shape[1])
    match = POSTERIOR.match(name)
    if match:  # the encoder's features first, then the decoder's
        level = network.levels - 1 - int(match[1])
        wide = network.encoder.levels[level][0].convs[-1].weight.shape[0]
        trained = 1 + max(int(found[2]) for found in map(LEVEL.match, state) if found and found[1] == "levels")
        blocks = f"encoder.levels.{trained - 1 - int(match[1])}.0.convs."
        narrow = len([tensor for key, tensor in sorted(state.items()) if key.startswith(blocks)][-1])
        columns[narrow:] += wide - narrow
    return columns


def _pass_on(block: ResidualBlock, channels: int) -> None:
    """Let a block hand on its first channels, which are the scan's, as they are."""
    last = block.convs[-1]
    last.weight[:channels].zero_()
    last.bias[:channels].zero_()
    if not isinstance(block.skip, torch.nn.Identity):
        block.skip.weight[:channels].zero_()
        block.skip.bias[:channels].zero_()
        for channel in range(channels):
            block.skip.weight[channel, channel] = 1.0
