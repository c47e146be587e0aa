"""What each level of the network is, and the checks of the arguments that say so.

Levels are counted from the finest: level 0 is the grid of the scan's patches (by default its voxels), level k that
after k halvings, and every list with one entry per level runs that way. Users know a level by its grid, such as 4³.
Latents are counted from the coarsest ("top first"), the order in which the decoder draws them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from monai.utils import ensure_tuple_rep
from scripts.utils.errors import InputError


@dataclass(frozen=True)
class Level:
    """One level of the encoder and the decoder. What is not said here: see :class:`scripts.networks.VDVAE`.

    Attributes:
        number: 0 is the finest.
        in_channels: what the level's first encoder block takes.
        decoder_in_channels: what the level's first decoder block takes: the width of the next coarser level.
        latents: the level's latents, each with its index among all enabled ones of the network, or None where it is
            disabled.
        coarsest: whether this is the level on which the decoder starts.
        init_scale: the published factor of a block's last convolution at the start, ``sqrt(1 / depth)``.
        recompute: whether activations are recomputed in the backward pass.
    """

    number: int
    spatial_dims: int
    in_channels: int
    channels: int
    hidden_channels: int
    kernel_size: int
    encoder_blocks: int
    decoder_in_channels: int
    decoder_channels: int
    decoder_hidden_channels: int
    decoder_kernel_size: int
    latents: tuple[int | None, ...]
    latent_channels: int
    coarsest: bool
    shared: bool
    plain_encoder: bool
    rezero: bool
    batch_norm: bool
    separate_heads: bool
    std_form: str
    kl_floor: float
    init_scale: float
    recompute: bool


def make_levels(
    spatial_dims: int,
    in_channels: int,
    channels: Sequence[int],
    hidden_channels: Sequence[int] | None,
    decoder_channels: Sequence[int] | None,
    decoder_hidden_channels: Sequence[int] | None,
    num_latents: Sequence[int],
    latent_channels: Sequence[int],
    kernel_sizes: Sequence[int],
    decoder_kernel_sizes: Sequence[int] | None,
    encoder_blocks: int | Sequence[int],
    shared: bool | Sequence[bool],
    latents_off: Sequence[int],
    checkpoint_levels: int,
    std_form: str,
    kl_floor: float,
    batch_norm: bool,
    **variants: Any,
) -> tuple[Level, ...]:
    """Check the arguments of :class:`scripts.networks.VDVAE` that concern levels, and describe each level.

    Returns:
        the levels, finest first.

    Raises:
        ValueError: an argument cannot be honoured; the sentence names it.
    """
    check_list("channels", channels)
    if len(channels) == 0:
        raise InputError("network_def: channels is empty: give one width per level.")
    channels = _per_level("channels", channels, channels)
    number = len(channels)
    _check_numbers(spatial_dims, in_channels, checkpoint_levels, number, kl_floor)
    check_choice("std_form", std_form, ("sigmoid", "exp"))
    if checkpoint_levels and batch_norm:
        raise InputError(
            "network_def: checkpoint_levels with batch_norm would count every batch twice in the running "
            "statistics: set one of them to 0 or false."
        )
    hidden = _per_level("hidden_channels", hidden_channels, channels)
    widths = _per_level("decoder_channels", decoder_channels, channels)
    decoder_hidden = _per_level("decoder_hidden_channels", decoder_hidden_channels, widths)
    latent_channels = _per_level("latent_channels", latent_channels, channels)
    kernels = _kernels("kernel_sizes", kernel_sizes, channels)
    decoder_kernels = _kernels("decoder_kernel_sizes", decoder_kernel_sizes, kernels)
    if isinstance(encoder_blocks, int):
        encoder_blocks = ensure_tuple_rep(encoder_blocks, number)
    blocks = _per_level("encoder_blocks", encoder_blocks, channels)
    shared = _flags("shared", shared, number)
    latents = _latents(_per_level("num_latents", num_latents, channels, minimum=0), latents_off)
    depth = sum(map(len, latents)) + 2 * (number - 1)
    return tuple(
        Level(
            number=k,
            spatial_dims=spatial_dims,
            in_channels=channels[k - 1] if k > 0 else in_channels,
            channels=channels[k],
            hidden_channels=hidden[k],
            kernel_size=kernels[k],
            encoder_blocks=blocks[k],
            decoder_in_channels=widths[min(k + 1, number - 1)],
            decoder_channels=widths[k],
            decoder_hidden_channels=decoder_hidden[k],
            decoder_kernel_size=decoder_kernels[k],
            latents=latents[k],
            latent_channels=min(latent_channels[k], widths[k]),
            coarsest=k == number - 1,
            shared=shared[k],
            std_form=std_form,
            kl_floor=float(kl_floor),
            batch_norm=batch_norm,
            init_scale=math.sqrt(1 / depth),
            recompute=k < checkpoint_levels,
            **variants,
        )
        for k in range(number)
    )


def _check_numbers(spatial_dims: int, in_channels: int, checkpoint_levels: int, levels: int, kl_floor: float) -> None:
    check_whole_number("spatial_dims", spatial_dims)
    check_whole_number("in_channels", in_channels)
    check_whole_number("checkpoint_levels", checkpoint_levels)
    if spatial_dims not in (2, 3):
        raise InputError(f"network_def: spatial_dims is {spatial_dims}: it must be 2 or 3.")
    if in_channels < 1:
        raise InputError(f"network_def: in_channels is {in_channels}: it must be 1 or more.")
    if not 0 <= checkpoint_levels <= levels:
        raise InputError(f"network_def: checkpoint_levels is {checkpoint_levels}: it can be 0 to {levels} (levels).")
    if isinstance(kl_floor, bool) or not isinstance(kl_floor, int | float) or not 0 <= kl_floor < 1:
        raise InputError(f"network_def: kl_floor is {kl_floor!r}: it must be a number from 0 to below 1.")


def _flags(name: str, values: bool | Sequence[bool], levels: int) -> Sequence[bool]:
    """One truth value per level, of one or a list."""
    values = (values,) * levels if isinstance(values, bool) else values
    check_list(name, values)
    if len(values) != levels:
        raise InputError(f"network_def: {name} has {len(values)} entries but channels has {levels}.")
    if any(not isinstance(value, bool) for value in values):
        raise InputError(f"network_def: {name} is {list(values)}: every entry must be true or false.")
    return values


def _latents(counts: Sequence[int], latents_off: Sequence[int]) -> list[tuple[int | None, ...]]:
    """The latents of each level, finest first: the index among those that are on, None for one that is off."""
    if counts[-1] == 0:
        raise InputError("network_def: num_latents ends in 0: the coarsest level needs a latent, the first of all.")
    check_list("latents_off", latents_off)
    total, off = sum(counts), set(latents_off)
    if not off <= set(range(1, total)):
        raise InputError(
            f"network_def: latents_off is {sorted(off)}: it can hold 1 to {total - 1}, "
            "counted from the coarsest latent; latent 0 cannot be switched off."
        )
    # positions among all latents are those of latents_off; indices count those that are on alone
    on = [position for position in range(total) if position not in off]
    indices = {position: index for index, position in enumerate(on)}
    return [tuple(indices.get(sum(counts[k + 1 :]) + i) for i in range(counts[k])) for k in range(len(counts))]


def check_whole_number(name: str, value: object) -> None:
    """Refuse an argument that is no whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"network_def: {name} is {value!r}: it must be a whole number.")


def check_list(name: str, values: object) -> None:
    """Refuse an argument that is no list."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InputError(f"network_def: {name} is {values!r}: it must be a list.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Refuse an argument that is none of several words; return it."""
    if value not in choices:
        raise InputError(f"network_def: {name} is {value!r}: choose one of {', '.join(map(repr, choices))}.")
    return value


def check_shape(shape: list[int], spatial_dims: int, levels: int, patch_size: int = 1) -> list[int]:
    """Refuse a grid whose patches cannot be halved between so many levels; return it."""
    divisor = patch_size << (levels - 1)
    if len(shape) != spatial_dims:
        raise InputError(
            f"spatial_shape {shape} has {len(shape)} axes, but network_def has spatial_dims {spatial_dims}: give one "
            "size for each axis."
        )
    for axis, size in enumerate(shape):
        if size < 1 or size % divisor != 0:
            raise InputError(
                f"spatial_shape {shape}: axis {axis} is {size}, which must be a multiple of {divisor} "
                f"(patch_size 2^(K-1) for K = {levels} levels): change it, or the number of levels in network_def."
            )
    return shape


def _per_level(name: str, values: Sequence[int] | None, default: Sequence[int], minimum: int = 1) -> tuple[int, ...]:
    """Check a list with one entry per level against the number of levels, which ``default`` has."""
    check_list(name, default if values is None else values)
    values = tuple(default if values is None else values)
    if len(values) != len(default):
        raise InputError(
            f"network_def: {name} has {len(values)} entries but channels has {len(default)}: "
            "give every such list one entry per level, finest level first."
        )
    if any(isinstance(v, bool) or not isinstance(v, int) or v < minimum for v in values):
        raise InputError(
            f"network_def: {name} is {list(values)}: every entry must be a whole number, {minimum} or more."
        )
    return values


def _kernels(name: str, values: Sequence[int] | None, default: Sequence[int]) -> tuple[int, ...]:
    values = _per_level(name, values, default)
    if any(v not in (1, 2, 3) for v in values):
        raise InputError(f"network_def: {name} is {list(values)}: kernels can be 1, 2 or 3.")
    return values


def grid_name(grid: Sequence[int]) -> str:
    """How users read of a level: ``4³`` for a grid of 4 × 4 × 4 voxels, ``4²`` in 2D, ``3×4×3`` where axes differ."""
    if len(set(grid)) == 1 and len(grid) in (2, 3):
        return f"{grid[0]}{'²³'[len(grid) - 2]}"
    return "×".join(map(str, grid))


def grid_key(grid: Sequence[int]) -> str:
    """The same in file names and settings: ``4``, or ``3x4x3`` where axes differ."""
    return str(grid[0]) if len(set(grid)) == 1 else "x".join(map(str, grid))


def find_level(setting: str, value: Any, grids: Sequence[Sequence[int]]) -> int:
    """The number of the level that a setting names by its grid: ``4``, ``"4"``, ``"4³"``, ``"4x4x4"`` or ``"3x4x3"``.

    Args:
        setting: for the message.
        value: of it.
        grids: of each level, finest first.

    Raises:
        ValueError: no level has this grid.
    """
    name = str(value).replace("×", "x").removesuffix("³").removesuffix("²")
    for number, grid in enumerate(grids):
        if not isinstance(value, bool) and name in (grid_key(grid), "x".join(map(str, grid))):
            return number
    names = ", ".join(grid_key(grid) for grid in reversed(grids))
    raise InputError(f"{setting} names the grid {value!r}: this network's levels have the grids {names}.")
