"""The very deep VAE, in 2D or 3D.

Child, "Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images", ICLR 2021
(arXiv:2011.10650). Levels are counted from the finest: level 0 is the input grid, level k the grid after k halvings.
Latents are counted from the coarsest ("top first"), the order in which the decoder draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from monai.utils import ensure_tuple_rep
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scripts.layers.blocks import (
    DisabledLatent,
    FirstLatent,
    Posterior,
    ResidualBlock,
    StochasticBlock,
    channels_last,
    downsample,
    gaussian_noise,
    gelu_conv,
    make_conv,
    standard_deviation,
    upsample,
)

OUTPUT_STD_RANGE = (1e-2, 1.0)
# in a range of 2, as tanh has it; see VDVAE.set_template
TEMPLATE_INPUT_STD = 0.05
# what scans are scaled to for each output activation
OUTPUT_RANGES = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0), "identity": (-1.0, 1.0)}


class VDVAEOutput(NamedTuple):
    """What one pass of the network predicts.

    Attributes:
        loc: mean of each voxel, ``[batch, channels, *spatial]``.
        scale: standard deviation of each voxel, shaped like ``loc``.
        kl: Kullback-Leibler divergence of each latent in nats, ``[batch, latents]``, top first, fp32.
    """

    loc: Tensor
    scale: Tensor
    kl: Tensor


class Encoder(nn.Module):
    """Residual blocks on every level, halving between levels; gives the features of each level, finest first."""

    def __init__(self, levels: Sequence[Sequence[ResidualBlock]], downsamples: Sequence[nn.Module] | None) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.ModuleList(blocks) for blocks in levels)
        self.downsamples = None if downsamples is None else nn.ModuleList(downsamples)

    @torch.jit.unused
    def forward(self, x: Tensor, run: Callable[..., Tensor]) -> list[Tensor]:
        """``run(level, block, x)`` applies a block (and may checkpoint it)."""
        features = []
        for level, blocks in enumerate(self.levels):
            if level > 0:
                x = self._halve(x, level)
            for block in blocks:
                x = run(level, block, x)
            features.append(x)
        return features

    def reconstruct(self, x: Tensor) -> list[Tensor]:
        """The same, as exporters can follow it."""
        features: list[Tensor] = []
        for level, blocks in enumerate(self.levels):
            if level > 0:
                x = self._halve(x, level)
            for block in blocks:
                x = block(x)
            features.append(x)
        return features

    def _halve(self, x: Tensor, level: int) -> Tensor:
        """Bring x from the level before to ``level``."""
        if self.downsamples is None:
            x = downsample(x)
        else:
            # TorchScript indexes modules by literal numbers only
            for number, strided in enumerate(self.downsamples):
                if number == level - 1:
                    x = strided(x)
        return x


class Decoder(nn.Module):
    """The latents from the coarsest on, each followed by a residual block; doubling between levels.

    ``groups[g]`` holds the blocks of one level, coarsest level first.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(nn.ModuleList(blocks) for blocks in groups)

    @torch.jit.unused
    def forward(
        self,
        features: Sequence[Tensor] | None,
        latents: Sequence[Tensor],
        grid: Sequence[int],
        temperature: float | Sequence[float],
        run: Callable[..., tuple],
        keep_posteriors: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[Posterior]]:
        """Draw or take every latent and return the last features.

        Args:
            features: the encoder's, finest first: latents come from the posterior. None: they come from the prior.
            latents: the first of them, already known, top first.
            grid: ``[batch, *coarsest grid]``, the shape of a latent drawn from N(0, I).
            temperature: multiplies the standard deviation of what is drawn; one number, or one a level, coarsest first.
            run: ``run(level, function, *args)`` calls the function (and may checkpoint it).
            keep_posteriors: return z, mean and std of each latent too, which holds on to their memory.
        """
        known = list(latents)
        temperatures = ensure_tuple_rep(temperature, len(self.groups))
        kls: list[Tensor] = []
        posteriors: list[Posterior] = []
        x = None
        for group, blocks in enumerate(self.groups):
            level, temperature = len(self.groups) - 1 - group, temperatures[group]
            feature = None if features is None else features[level]
            for position, block in enumerate(blocks):
                enters_level = group > 0 and position == 0
                if isinstance(block, FirstLatent):
                    q = kl = None
                    if known:
                        z = known.pop(0)
                    elif feature is not None:
                        q, kl = block.infer(feature, temperature)
                        z = q.z
                    else:
                        shape = (grid[0], block.latent_channels, *grid[1:])
                        weight = block.z_projection.weight
                        z = temperature * gaussian_noise(torch.empty(shape, device=weight.device))
                    x = block.project(z)
                elif isinstance(block, StochasticBlock):
                    z = known.pop(0) if known else None
                    x, kl, q = run(
                        level, _stochastic_step, block, x, feature, z, temperature, enters_level, keep_posteriors
                    )
                else:
                    x = run(level, _step, block, x, enters_level)
                    continue
                if kl is not None:
                    kls.append(kl)
                if q is not None and keep_posteriors:
                    posteriors.append(q)
        return x, kls, posteriors

    def reconstruct(self, features: list[Tensor]) -> Tensor:
        """The last features alone, with every latent the mean of its posterior, as exporters can follow it."""
        x = features[-1]
        for group, blocks in enumerate(self.groups):
            for position, block in enumerate(blocks):
                if group > 0 and position == 0:
                    x = upsample(x)
                x = block.reconstruct(x, features[len(features) - 1 - group])
        return x


def _step(block: nn.Module, x: Tensor, enters_level: bool) -> Tensor:
    # doubling belongs inside what is checkpointed: the coarse tensor is an eighth of the memory
    return block(upsample(x) if enters_level else x)


def _stochastic_step(block, x, feature, z, temperature, enters_level, keep_posterior):
    x, kl, q = block(upsample(x) if enters_level else x, feature, z, temperature)
    return x, kl, q if keep_posterior else None


def _sequence(name: str, values: object) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"network_def: {name} is {values!r}: it must be a list.")


def _per_level(name: str, values: Sequence[int] | None, default: Sequence[int], minimum: int = 1) -> tuple[int, ...]:
    """Check a per-level list against the number of levels, which ``default`` has."""
    _sequence(name, default if values is None else values)
    values = tuple(default if values is None else values)
    if len(values) != len(default):
        raise ValueError(
            f"network_def: {name} has {len(values)} entries but channels has {len(default)}: "
            "give every per-level list one entry a level, finest level first."
        )
    if any(isinstance(v, bool) or not isinstance(v, int) or v < minimum for v in values):
        raise ValueError(
            f"network_def: {name} is {list(values)}: every entry must be a whole number, {minimum} or more."
        )
    return values


def _kernels(name: str, values: Sequence[int]) -> None:
    if any(v not in (1, 2, 3) for v in values):
        raise ValueError(f"network_def: {name} is {list(values)}: kernels can be 1, 2 or 3.")


def _choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"network_def: {name} is {value!r}: choose one of {', '.join(map(repr, choices))}.")
    return value


class VDVAE(nn.Module):
    """Very deep variational autoencoder.

    Every per-level list runs from the finest level to the coarsest; their common length is the number of levels K.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of a scan, 1 or more.
        spatial_shape: grid of the scans. Without it any grid that 2^(K-1) divides is taken.
        channels: width of the encoder on each level.
        hidden_channels: width inside the encoder's blocks; default ``channels``.
        decoder_channels: width of the decoder on each level; default ``channels``.
        decoder_hidden_channels: width inside the decoder's blocks; default ``decoder_channels``.
        num_latents: latents on each level; 0 is allowed, but not on the coarsest.
        latent_channels: channels of each level's latents, capped by ``decoder_channels``.
        kernel_sizes: 1, 2 or 3 on each level of the encoder.
        decoder_kernel_sizes: the same for the decoder; default ``kernel_sizes``.
        encoder_blocks: residual blocks on each level of the encoder, one number or a list.
        plain_encoder: encoder blocks of two convolutions instead of a bottleneck of four.
        strided: halve with a convolution of kernel 2 and stride 2 instead of keeping the even indices.
        rezero: multiply what a block adds by a learnt scalar that starts at 0.
        batch_norm: batch norm in every block.
        separate_heads: mean and standard deviation of a latent from two nets instead of one.
        shared: on which levels all latents but the first share their nets; one value or a list.
        latents_off: indices of latents that are switched off, counted from the coarsest; 0 cannot be.
        std_form: how standard deviations come from the network: ``"sigmoid"`` or ``"exp"`` (whose bounds are of the
            log-variance, as published, so that the output's is never below 1).
        output_activation: ``"tanh"``, ``"sigmoid"`` or ``"identity"``; scans should be scaled to its range.
        predict_scale: False: the output has unit variance.
        template: see and predict deviations from a voxel-wise mean and standard deviation (:meth:`set_template`), which
            live in buffers; needs ``spatial_shape``. The published network starts from the output activation of zero.
        init: ``"pytorch"``, the published start, or ``"variance_preserving"``: signals keep their size from the input
            through the latents to the output, every KL divergence but the first starts at zero, and noise from later
            latents starts small. PyTorch's default loses about half the signal at every convolution, so that the
            coarsest latents of a deep network neither see the scan nor show in the reconstruction.
        checkpoint_levels: recompute the activations of this many of the finest levels in the backward pass instead of
            keeping them.

    Raises:
        ValueError: an argument cannot be honoured; the sentence starts with its name.
    """

    # for TorchScript: compile only the branch that a network takes; leave out what no exported network needs
    __constants__ = ("template", "output_activation")
    __jit_unused_properties__ = ("scan_affine",)

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: Sequence[int],
        num_latents: Sequence[int],
        latent_channels: Sequence[int],
        kernel_sizes: Sequence[int],
        spatial_shape: Sequence[int] | None = None,
        hidden_channels: Sequence[int] | None = None,
        decoder_channels: Sequence[int] | None = None,
        decoder_hidden_channels: Sequence[int] | None = None,
        decoder_kernel_sizes: Sequence[int] | None = None,
        encoder_blocks: int | Sequence[int] = 2,
        plain_encoder: bool = False,
        strided: bool = False,
        rezero: bool = False,
        batch_norm: bool = False,
        separate_heads: bool = False,
        shared: bool | Sequence[bool] = False,
        latents_off: Sequence[int] = (),
        std_form: str = "sigmoid",
        output_activation: str = "tanh",
        predict_scale: bool = True,
        template: bool = False,
        init: str = "pytorch",
        checkpoint_levels: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("spatial_dims", spatial_dims),
            ("in_channels", in_channels),
            ("checkpoint_levels", checkpoint_levels),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"network_def: {name} is {value!r}: it must be a whole number.")
        for name, value in (
            ("channels", channels),
            ("latents_off", latents_off),
            ("spatial_shape", spatial_shape or ()),
        ):
            _sequence(name, value)
        if spatial_dims not in (2, 3):
            raise ValueError(f"network_def: spatial_dims is {spatial_dims}: it must be 2 or 3.")
        if in_channels < 1:
            raise ValueError(f"network_def: in_channels is {in_channels}: it must be 1 or more.")
        if len(channels) == 0:
            raise ValueError("network_def: channels is empty: give one width a level.")
        channels = _per_level("channels", channels, channels)
        hidden = _per_level("hidden_channels", hidden_channels, channels)
        widths = _per_level("decoder_channels", decoder_channels, channels)
        decoder_hidden = _per_level("decoder_hidden_channels", decoder_hidden_channels, widths)
        num_latents = _per_level("num_latents", num_latents, channels, minimum=0)
        latent_channels = _per_level("latent_channels", latent_channels, channels)
        kernels = _per_level("kernel_sizes", kernel_sizes, channels)
        decoder_kernels = _per_level("decoder_kernel_sizes", decoder_kernel_sizes, kernels)
        _kernels("kernel_sizes", kernels)
        _kernels("decoder_kernel_sizes", decoder_kernels)
        levels = len(channels)
        blocks = _per_level(
            "encoder_blocks",
            ensure_tuple_rep(encoder_blocks, levels) if isinstance(encoder_blocks, int) else encoder_blocks,
            channels,
        )
        shared = (shared,) * levels if isinstance(shared, bool) else shared
        _sequence("shared", shared)
        if len(shared) != levels:
            raise ValueError(f"network_def: shared has {len(shared)} entries but channels has {levels}.")
        if any(not isinstance(value, bool) for value in shared):
            raise ValueError(f"network_def: shared is {list(shared)}: every entry must be true or false.")
        if num_latents[-1] == 0:
            raise ValueError("network_def: num_latents ends in 0: the coarsest level needs a latent, the first of all.")
        total_latents = sum(num_latents)
        off = set(latents_off)
        if not off <= set(range(1, total_latents)):
            raise ValueError(
                f"network_def: latents_off is {sorted(off)}: it can hold 1 to {total_latents - 1}, "
                "counted from the coarsest latent; latent 0 cannot be switched off."
            )
        if not 0 <= checkpoint_levels <= levels:
            raise ValueError(
                f"network_def: checkpoint_levels is {checkpoint_levels}: it can be 0 to {levels} (levels)."
            )
        if checkpoint_levels and batch_norm:
            raise ValueError(
                "network_def: checkpoint_levels with batch_norm would count every batch twice in the running "
                "statistics: set one of them to 0 or false."
            )
        if template and spatial_shape is None:
            raise ValueError("network_def: template needs spatial_shape, the grid of the mean scan.")

        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.levels = levels
        self.std_form = _choice("std_form", std_form, ("sigmoid", "exp"))
        self.output_activation = _choice("output_activation", output_activation, tuple(OUTPUT_RANGES))
        self.predict_scale = predict_scale
        self.checkpoint_levels = checkpoint_levels
        self.spatial_shape = None if spatial_shape is None else tuple(self._check_shape(spatial_shape))

        depth = total_latents + 2 * (levels - 1)
        scale = math.sqrt(1 / depth)
        variants = {"rezero": rezero, "batch_norm": batch_norm, "init_scale": scale}
        inputs = (in_channels, *channels)
        self.encoder = Encoder(
            [
                [
                    ResidualBlock(
                        spatial_dims,
                        inputs[k] if b == 0 else channels[k],
                        channels[k],
                        hidden[k],
                        kernels[k],
                        plain=plain_encoder,
                        **variants,
                    )
                    for b in range(blocks[k])
                ]
                for k in range(levels)
            ],
            [make_conv(spatial_dims, c, c, kernel_size=2, stride=2) for c in channels[:-1]] if strided else None,
        )

        groups: list[list[nn.Module]] = []
        index = 0
        width = widths[-1]
        for k in reversed(range(levels)):
            group: list[nn.Module] = []
            parent: StochasticBlock | None = None
            latent_args = (decoder_hidden[k], decoder_kernels[k], min(latent_channels[k], widths[k]))
            for i in range(num_latents[k]):
                if index == 0:
                    group.append(
                        FirstLatent(
                            spatial_dims,
                            channels[k],
                            widths[k],
                            *latent_args,
                            separate_heads,
                            std_form,
                            batch_norm,
                        )
                    )
                elif index in off:
                    group.append(DisabledLatent(spatial_dims, width, widths[k]))
                else:
                    block = StochasticBlock(
                        spatial_dims,
                        width,
                        channels[k],
                        widths[k],
                        *latent_args,
                        separate_heads,
                        std_form,
                        rezero,
                        batch_norm,
                        share=parent,
                    )
                    if shared[k] and i > 0 and parent is None:
                        parent = block
                    group.append(block)
                width = widths[k]
                group.append(self._decoder_block(k, width, widths, decoder_hidden, decoder_kernels, variants))
                index += 1
            if num_latents[k] == 0:
                group.append(self._decoder_block(k, width, widths, decoder_hidden, decoder_kernels, variants))
                width = widths[k]
            groups.append(group)
        self.decoder = Decoder(groups)
        self.num_latents = total_latents - len(off)
        latents = [
            (levels - 1 - g, block.z_projection.weight.shape[1])
            for g, group in enumerate(groups)
            for block in group
            if isinstance(block, (FirstLatent, StochasticBlock))
        ]
        self.latent_levels = tuple(level for level, _ in latents)
        self.latent_channels = tuple(channels for _, channels in latents)

        self.output = make_conv(spatial_dims, widths[0], in_channels * (2 if predict_scale else 1))
        if template:
            nn.init.zeros_(self.output.weight)
            shape = (1, in_channels, *self.spatial_shape)
            self.register_buffer("template_mean", torch.zeros(shape))
            self.register_buffer("template_std", torch.ones(shape))
            self.register_buffer("template_affine", torch.eye(4, dtype=torch.float64))
        self.template = template
        if _choice("init", init, ("pytorch", "variance_preserving")) == "variance_preserving":
            for module in self.modules():
                if hasattr(module, "preserve_variance"):
                    module.preserve_variance(scale)
        self.to(memory_format=torch.channels_last_3d if spatial_dims == 3 else torch.channels_last)

    def _decoder_block(self, k, width, widths, hidden, kernels, variants) -> ResidualBlock:
        return ResidualBlock(self.spatial_dims, width, widths[k], hidden[k], kernels[k], skip=k > 0, **variants)

    def latent_grids(self, spatial_shape: Sequence[int] | None = None) -> list[tuple[int, ...]]:
        """``(channels, *grid)`` of each latent, top first.

        Args:
            spatial_shape: of the scans; default the network's.
        """
        shape = spatial_shape or self.spatial_shape
        if shape is None:
            raise ValueError("network_def: give spatial_shape, here or in the constructor.")
        shape = self._check_shape(shape)
        return [
            (channels, *(size // 2**level for size in shape))
            for channels, level in zip(self.latent_channels, self.latent_levels, strict=True)
        ]

    def _check_shape(self, shape: list[int]) -> list[int]:
        shape = [int(size) for size in shape]
        divisor = 1 << (self.levels - 1)
        if len(shape) != self.spatial_dims:
            raise ValueError(f"spatial_shape {shape} has {len(shape)} axes, but spatial_dims is {self.spatial_dims}.")
        for axis, size in enumerate(shape):
            if size < 1 or size % divisor != 0:
                raise ValueError(
                    f"spatial_shape {shape}: axis {axis} is {size}, which must be a multiple of {divisor} "
                    f"(2^(K-1) for K = {self.levels} levels): change it, or the number of levels in network_def."
                )
        return shape

    def _run(self, level: int, function: Callable, *args):
        if level < self.checkpoint_levels and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def _prepare_input(self, x: Tensor, least_std: float = TEMPLATE_INPUT_STD) -> Tensor:
        """Check the shape of scans; give what the encoder sees."""
        if x.ndim != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"input of shape {list(x.shape)}: expected [batch, {self.in_channels}, ...] "
                f"with {self.spatial_dims} spatial axes."
            )
        shape = self._check_shape(x.shape[2:])
        if self.template:
            if shape != list(self.template_mean.shape[2:]):
                raise ValueError(
                    f"input of shape {list(x.shape)}: this network's template has spatial_shape {self.spatial_shape}."
                )
            # what is left to tell is how the scan deviates; where scans hardly vary, noise is not blown up
            x = ((x - self.template_mean) / self.template_std.clamp_min(least_std)).clamp(-5, 5)
        return channels_last(x)

    def _encode_features(self, x: Tensor) -> list[Tensor]:
        return self.encoder(self._prepare_input(x), self._run)

    def _grid(self, batch: int, spatial_shape: Sequence[int]) -> tuple[int, ...]:
        return (batch, *(size // 2 ** (self.levels - 1) for size in spatial_shape))

    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output distribution, in fp32 also under autocast: loc and scale, ``[batch, in_channels, *spatial]``."""
        out = gelu_conv(x, self.output.weight, self.output.bias).float()
        loc = self._predict_loc(out)
        if not self.predict_scale:
            return loc, torch.ones_like(loc)
        s = out[:, self.in_channels :]
        if self.template:
            s = self._template_s() + s
        return loc, standard_deviation(s, OUTPUT_STD_RANGE, self.std_form)

    def _predict_loc(self, out: Tensor) -> Tensor:
        """The mean alone, from what the output convolution gives."""
        loc = out[:, : self.in_channels]
        if self.template:
            offset, gain = self._template_loc()
            loc = offset + gain * loc
        if self.output_activation == "tanh":
            loc = torch.tanh(loc)
        elif self.output_activation == "sigmoid":
            loc = torch.sigmoid(loc)
        return loc

    def _template_loc(self) -> tuple[Tensor, Tensor]:
        """What the output convolution's zero stands for before the activation, and its unit."""
        mean, std = self.template_mean, self.template_std
        if self.output_activation == "tanh":
            mean = mean.clamp(-0.999, 0.999)
            offset, slope = torch.atanh(mean), 1 - mean.square()
        elif self.output_activation == "sigmoid":
            mean = mean.clamp(0.0005, 0.9995)
            offset, slope = torch.logit(mean), mean * (1 - mean)
        else:
            offset, slope = mean, torch.ones_like(mean)
        # where the activation is nearly flat (background) a full gain would make it blow up on the first step
        return offset, (std / slope).clamp_max(1.0)

    def _template_s(self) -> Tensor:
        """What the output convolution's zero stands for, of the unbounded standard deviation."""
        std = self.template_std
        lo, hi = OUTPUT_STD_RANGE
        if self.std_form == "sigmoid":
            # nearer to the bound the sigmoid hardly has a gradient left, and a voxel could never learn to vary more
            return torch.logit(((std - lo) / (hi - lo)).clamp(3e-4, 1 - 3e-4))
        return (2 * std.log()).clamp(lo, hi)

    @torch.no_grad()
    def set_template(self, mean: Tensor, std: Tensor, affine: Tensor | None = None) -> None:
        """Let the network see and predict deviations from a Gaussian for each voxel.

        Its first prediction is this Gaussian, and its output counts in units of about one standard deviation, so that
        voxels that vary much and voxels that vary little pull equally hard on the weights.

        Args:
            mean, std: of the training scans, ``[in_channels, *spatial_shape]``, in the units of the network's input.
            affine: of their grid, ``[4, 4]``, voxel indices to world millimetres.

        Raises:
            ValueError: the network was built without ``template``.
        """
        if not self.template:
            raise ValueError("network_def: set_template needs template: true.")
        self.template_mean.copy_(mean)
        self.template_std.copy_(std).clamp_(*OUTPUT_STD_RANGE)
        if affine is not None:
            self.template_affine.copy_(affine)

    @property
    def scan_affine(self) -> Tensor:
        """Of the grid of the scans, ``[4, 4]``: the template's, or voxels of 1 mm without one."""
        return self.template_affine.cpu() if self.template else torch.eye(4, dtype=torch.float64)

    def forward(self, x: Tensor, temperature: float | Sequence[float] = 1.0) -> VDVAEOutput:
        """Reconstruct scans from latents drawn from the posterior.

        Args:
            x: ``[batch, in_channels, *spatial]``, in the range of ``output_activation``.
            temperature: multiplies the posterior's standard deviations; 0 gives its mean. One number, or one a level,
                coarsest first.

        Raises:
            ValueError: an axis is not a multiple of 2^(K-1), or the shape is not the network's.
        """
        features = self._encode_features(x)
        y, kls, _ = self.decoder(features, [], self._grid(x.shape[0], x.shape[2:]), temperature, self._run)
        return VDVAEOutput(*self._predict(y), torch.stack(kls, dim=1))

    def infer(self, x: Tensor, temperature: float | Sequence[float] = 1.0) -> tuple[VDVAEOutput, list[Posterior]]:
        """What :meth:`forward` gives, and the latents that it was made from, with their distributions, top first.

        Args:
            x, temperature: as for :meth:`forward`.
        """
        features = self._encode_features(x)
        grid = self._grid(x.shape[0], x.shape[2:])
        y, kls, posteriors = self.decoder(features, [], grid, temperature, self._run, keep_posteriors=True)
        return VDVAEOutput(*self._predict(y), torch.stack(kls, dim=1)), posteriors

    def posterior(self, x: Tensor, temperature: float | Sequence[float] = 1.0) -> list[Posterior]:
        """The latents of scans with the mean and standard deviation of their posterior, top first.

        Args:
            x, temperature: as for :meth:`forward`.
        """
        return self.infer(x, temperature)[1]

    def encode(self, x: Tensor, temperature: float | Sequence[float] = 1.0) -> list[Tensor]:
        """The latents of scans, each ``[batch, latent_channels, *grid]``, top first.

        Args:
            x, temperature: as for :meth:`forward`.
        """
        return [q.z for q in self.posterior(x, temperature)]

    def decode(
        self,
        latents: Sequence[Tensor],
        temperature: float | Sequence[float] = 1.0,
        batch_size: int = 1,
        spatial_shape: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scans from their first latents, the rest drawn from the prior.

        Args:
            latents: from the coarsest on, as :meth:`encode` gives them; none gives a sample, all a reconstruction.
            temperature: multiplies the standard deviation of the latents that are drawn; 0 takes the prior's mean.
                One number, or one a level, coarsest first.
            batch_size, spatial_shape: of the scans, where no latent says them; the shape defaults to the network's.

        Returns:
            loc and scale, ``[batch, in_channels, *spatial]``.

        Raises:
            ValueError: more latents than the network has, or no way to know the shape.
        """
        if len(latents) > self.num_latents:
            raise ValueError(f"decode got {len(latents)} latents, but the network has {self.num_latents}.")
        if latents:
            grid = (latents[0].shape[0], *latents[0].shape[2:])
        else:
            shape = spatial_shape or self.spatial_shape
            if shape is None:
                raise ValueError("decode without latents needs spatial_shape, here or in the constructor.")
            grid = self._grid(batch_size, self._check_shape(shape))
        y, _, _ = self.decoder(None, latents, grid, temperature, self._run)
        return self._predict(y)


class VDVAEReconstruction(VDVAE):
    """The same network, with the same weights, whose forward pass is the reconstruction alone.

    Programs that check, export or serve a network expect one tensor. The reconstruction is made from the posterior's
    means, so that it is the same every time. ``torch.jit.script``, ``torch.export`` and ONNX take this class.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct scans: ``[batch, in_channels, *spatial]`` in and out, in the range of ``output_activation``.

        Raises:
            ValueError: an axis is not a multiple of 2^(K-1), or the shape is not the network's.
        """
        y = self.decoder.reconstruct(self.encoder.reconstruct(self._prepare_input(x)))
        return self._predict_loc(gelu_conv(y, self.output.weight, self.output.bias).float())
