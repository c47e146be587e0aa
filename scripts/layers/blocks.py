"""Building blocks of the very deep VAE: what happens on one level, at one place of the network.

Every block of the decoder has one signature, see :class:`DecoderBlock`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from monai.networks.layers.factories import Norm
from scripts.layers.convolutions import (
    channels_last,
    gelu_conv,
    gelu_convs,
    make_conv,
    make_skip,
    preserve_skip,
    preserve_variance,
    upsample,
)
from scripts.layers.gaussian import LATENT_STD_RANGE, Posterior, choose, draw, kl_divergence, standard_deviation
from scripts.layers.levels import Level
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """A part of the network whose activations may be recomputed in the backward pass instead of being kept.

    Args:
        recompute: whether they are.
    """

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute

    # not in forward, which exporters follow
    def __call__(self, *args):
        if self.recompute and torch.is_grad_enabled() and not torch.compiler.is_exporting():
            return checkpoint(super().__call__, *args, use_reentrant=False)
        return super().__call__(*args)


class ResidualBlock(Block):
    """``skip(x) + y``, where y is a bottleneck of four convolutions (kernels 1, k, k, 1), each after a GELU.

    Args:
        spatial_dims: 2 or 3.
        in_channels, out_channels, hidden_channels, kernel_size: widths, and the k above.
        init_scale: the weights of the last convolution are multiplied by this at the start.
        plain: two convolutions of kernel k instead, in -> out -> out.
        rezero: multiply y by a learnt scalar that starts at 0.
        skip: without it the result is y alone, its last convolution not scaled, and no ReZero.
        batch_norm: batch norm on y.
        recompute: see :class:`Block`.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        hidden_channels: int,
        kernel_size: int,
        init_scale: float = 1.0,
        plain: bool = False,
        rezero: bool = False,
        skip: bool = True,
        batch_norm: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__(recompute)
        if plain:
            steps = [(in_channels, out_channels, kernel_size), (out_channels, out_channels, kernel_size)]
        else:
            steps = [
                (in_channels, hidden_channels, 1),
                (hidden_channels, hidden_channels, kernel_size),
                (hidden_channels, hidden_channels, kernel_size),
                (hidden_channels, out_channels, 1),
            ]
        self.convs = nn.ModuleList(make_conv(spatial_dims, *step) for step in steps)
        self.norm = make_norm(spatial_dims, out_channels, batch_norm)
        self.skip = make_skip(spatial_dims, in_channels, out_channels) if skip else None
        self.alpha = nn.Parameter(torch.zeros(())) if rezero and skip else None
        if skip:
            with torch.no_grad():
                self.convs[-1].weight.mul_(init_scale)

    def preserve_variance(self, scale: float, head_scale: float) -> None:
        """Start from signals of unit size, and from a block that adds a little (``scale``) to its input."""
        for conv in self.convs:
            preserve_variance(conv)
        if self.skip is not None:
            with torch.no_grad():
                self.convs[-1].weight.mul_(scale)
            preserve_skip(self.skip)

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(x)

    def transform(self, x: Tensor) -> Tensor:
        """``skip(x) + y``."""
        y = x
        for conv in self.convs:
            y = gelu_conv(y, conv.weight, conv.bias)
        y = self.norm(y)
        if self.alpha is not None:
            y = self.alpha * y
        return y if self.skip is None else y + self.skip(x)


class Trunk(nn.Module):
    """Three convolutions (kernels 1, k, k), each after a GELU, whose input may come in two parts.

    The parts are what a concatenation along the channels would hold. Convolving each with its columns of the weight and
    adding computes the same, without the wide tensor, which is slow and large on the finest level.
    """

    def __init__(self, spatial_dims: int, in_channels: int, hidden_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                make_conv(spatial_dims, in_channels, hidden_channels),
                make_conv(spatial_dims, hidden_channels, hidden_channels, kernel_size),
                make_conv(spatial_dims, hidden_channels, hidden_channels, kernel_size),
            ]
        )

    def preserve_variance(self, scale: float, head_scale: float) -> None:
        """Start from signals of unit size."""
        for conv in self.convs:
            preserve_variance(conv)

    def forward(self, x: Tensor, second: Tensor | None = None) -> Tensor:
        first = self.convs[0]
        if second is None:
            h = gelu_conv(x, first.weight, first.bias)
        else:
            columns = first.weight.split([x.shape[1], second.shape[1]], dim=1)
            h = gelu_conv(x, columns[0], first.bias)
            h = h + gelu_conv(second, columns[1], first.weight.new_zeros(first.weight.shape[0]))
        for conv in self.convs[1:]:
            h = gelu_conv(h, conv.weight, conv.bias)
        return h


class ParameterNet(nn.Module):
    """Predict the mean and the unbounded standard deviation ``s`` of a level's latents.

    Args:
        level: says the widths, the kernel and whether ``s`` has a trunk of its own (``separate_heads``).
        in_channels: of the input.
        zero_init: start the two last convolutions at zero, so that mean = s = 0.
    """

    def __init__(self, level: Level, in_channels: int, zero_init: bool = False) -> None:
        super().__init__()
        dims, hidden = level.spatial_dims, level.decoder_hidden_channels
        trunk = (dims, in_channels, hidden, level.decoder_kernel_size)
        self.trunk = Trunk(*trunk)
        self.std_trunk = Trunk(*trunk) if level.separate_heads else None
        self.mean = make_conv(dims, hidden, level.latent_channels)
        self.std = make_conv(dims, hidden, level.latent_channels)
        if zero_init:
            self.start_heads(0.0)

    def start_heads(self, scale: float) -> None:
        """Start from s = 0 and from means of this standard deviation; 0 draws nothing."""
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.std.weight)
        if scale:
            preserve_variance(self.mean, scale=scale)

    def forward(
        self, x: Tensor, second: Tensor | None = None, residual: tuple[Tensor, Tensor | None] | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return mean, s and the residual (None without).

        Args:
            x, second: the input, in one part or two.
            residual: weight and bias of one more convolution of the mean's trunk.
        """
        heads = [(self.mean.weight, self.mean.bias)]
        if residual is not None:
            heads.append(residual)
        if self.std_trunk is None:
            heads.append((self.std.weight, self.std.bias))
        outputs = gelu_convs(self.trunk(x, second), heads)
        if self.std_trunk is None:
            s = outputs[-1]
        else:
            s = gelu_conv(self.std_trunk(x, second), self.std.weight, self.std.bias)
        return outputs[0], s, None if residual is None else outputs[1]


class DecoderBlock(Block):
    """A block of the decoder: ``block(x, features, z, temperature, sampler)`` gives ``(x, kl, posterior)``.

    Args of ``forward``:
        x: ``[batch, channels, *grid]``, from the block before.
        features: the encoder's of this level; None to draw from the prior.
        z: the latent; None to draw it.
        temperature: multiplies the standard deviation of what is drawn.
        sampler: how, see :class:`scripts.layers.gaussian.LatentSampler`; None: by PyTorch's own generator.

    Returns:
        the block's result; the KL divergence ``[batch]`` in nats and the posterior, None where none was computed.

    The first block of a level doubles its input's grid: within the block, so that what is kept for recomputing is the
    coarse tensor, an eighth of the memory.

    Args:
        level: on which the block lives.
        enters_level: whether it is the first there, and the level not the coarsest.
        index: of its latent among all enabled ones, coarsest first; -1 without one.
    """

    def __init__(self, level: Level, enters_level: bool = False, index: int = -1) -> None:
        super().__init__(level.recompute)
        self.level, self.enters_level, self.index = level.number, enters_level, index
        self.std_form, self.std_range = level.std_form, LATENT_STD_RANGE
        self.kl_floor = level.kl_floor

    def enter(self, x: Tensor) -> Tensor:
        """``x`` on this level's grid."""
        return upsample(x) if self.enters_level else x

    def moments(self, mean: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, in fp32, of what a parameter net predicts, of a posterior or of a prior."""
        return mean.float(), standard_deviation(s, self.std_range, self.std_form)


class RefiningBlock(ResidualBlock):
    """A residual block as a :class:`DecoderBlock`, which has no latent; on the finest level it has no skip."""

    def __init__(self, level: Level, enters_level: bool) -> None:
        super().__init__(
            level.spatial_dims,
            level.decoder_in_channels if enters_level else level.decoder_channels,
            level.decoder_channels,
            hidden_channels=level.decoder_hidden_channels,
            kernel_size=level.decoder_kernel_size,
            init_scale=level.init_scale,
            rezero=level.rezero,
            skip=level.number > 0,
            batch_norm=level.batch_norm,
            recompute=level.recompute,
        )
        self.level, self.enters_level, self.index = level.number, enters_level, -1

    def forward(
        self, x: Tensor, features: Tensor | None, z: Tensor | None, temperature: float, sampler: Any = None
    ) -> tuple[Tensor, Tensor | None, Posterior | None]:
        return self.transform(upsample(x) if self.enters_level else x), None, None


class FirstLatent(DecoderBlock):
    """The coarsest latent: prior N(0, I), posterior from the encoder's last features, result ``conv(z)``.

    Of ``x`` only the shape of its grid is used. ReZero multiplies the result by a learnt scalar that starts at 0; in
    weights from before version 0.4.0, which lack it, it counts as 1.
    """

    def __init__(self, level: Level) -> None:
        super().__init__(level, index=0)
        self.posterior = ParameterNet(level, level.channels)
        self.z_projection = make_conv(level.spatial_dims, level.latent_channels, level.decoder_channels)
        self.alpha = nn.Parameter(torch.zeros(())) if level.rezero else None
        self.norm = make_norm(level.spatial_dims, level.decoder_channels, level.batch_norm)
        self.latent_channels = level.latent_channels

    def preserve_variance(self, scale: float, head_scale: float) -> None:
        """Start with a latent that shows in full, and posterior means of size ``head_scale``."""
        preserve_variance(self.z_projection, after_gelu=False)
        self.posterior.start_heads(head_scale)

    def forward(
        self, x: Tensor, features: Tensor | None, z: Tensor | None, temperature: float, sampler: Any = None
    ) -> tuple[Tensor, Tensor | None, Posterior | None]:
        q: Posterior | None = None
        kl: Tensor | None = None
        if z is None and features is not None:
            mean, s, _ = self.posterior(features)
            mean, std = self.moments(mean, s)
            q = Posterior(draw(mean, std, temperature, sampler), mean, std, None, None)
            if not torch.jit.is_scripting():
                q = choose(q, self.index, sampler)
            kl, z = kl_divergence(q), q.z
        elif z is None:
            shape = [x.shape[0], self.latent_channels] + list(x.shape[2:])  # noqa: RUF005 (TorchScript unpacks nothing)
            zeros = channels_last(x.new_zeros(shape))
            ones = torch.ones_like(zeros)
            p = Posterior(draw(zeros, ones, temperature, sampler), zeros, ones, None, None)
            if not torch.jit.is_scripting():
                p = choose(p, self.index, sampler)
            z = p.z
        y = self.z_projection(z)
        if self.alpha is not None:
            y = self.alpha * y
        return self.norm(y), kl, q

    @torch.jit.unused
    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        if self.alpha is not None:
            state_dict.setdefault(f"{prefix}alpha", torch.ones(()))
        super()._load_from_state_dict(state_dict, prefix, *args)


class StochasticBlock(DecoderBlock):
    """One further latent: ``z_projection(z) + residual + skip(x)``.

    The prior net sees x, the posterior net the encoder's features of the level and x.

    Args:
        level, enters_level, index: see :class:`DecoderBlock`.
        share: take the prior net, posterior net and z projection of this other block, and add a residual.
    """

    def __init__(self, level: Level, enters_level: bool, index: int, share: StochasticBlock | None = None) -> None:
        super().__init__(level, enters_level, index)
        in_channels = level.decoder_in_channels if enters_level else level.decoder_channels
        dims, out_channels = level.spatial_dims, level.decoder_channels
        if share is None:
            self.prior = ParameterNet(level, in_channels, zero_init=True)
            self.posterior = ParameterNet(level, level.channels + in_channels)
            self.z_projection = make_conv(dims, level.latent_channels, out_channels)
        else:
            self.prior, self.posterior, self.z_projection = share.prior, share.posterior, share.z_projection
        self.residual = make_conv(dims, level.decoder_hidden_channels, out_channels)
        nn.init.zeros_(self.residual.weight)
        self.skip = make_skip(dims, in_channels, out_channels)
        self.alpha = nn.Parameter(torch.zeros(())) if level.rezero else None
        self.norm = make_norm(dims, out_channels, level.batch_norm)

    def preserve_variance(self, scale: float, head_scale: float) -> None:
        """Start with a latent that shows a little (``scale``), and posterior means of size ``head_scale``."""
        preserve_variance(self.z_projection, after_gelu=False, scale=scale)
        preserve_skip(self.skip)
        self.posterior.start_heads(head_scale)

    def forward(
        self, x: Tensor, features: Tensor | None, z: Tensor | None, temperature: float, sampler: Any = None
    ) -> tuple[Tensor, Tensor | None, Posterior | None]:
        x = self.enter(x)
        # one name for what is unbounded and what is bounded: the first is free before the next is made
        p_mean, p_std, residual = self.prior(x, None, (self.residual.weight, self.residual.bias))
        assert residual is not None
        q: Posterior | None = None
        kl: Tensor | None = None
        if z is None:
            p_mean, p_std = self.moments(p_mean, p_std)
            of_prior = 0.0 if features is not None else temperature
            p = Posterior(draw(p_mean, p_std, of_prior, sampler), p_mean, p_std, None, None)
            if features is None and not torch.jit.is_scripting():
                p = choose(p, self.index, sampler)
            z = p.z
            if features is not None:
                q_mean, q_std, _ = self.posterior(features, x)
                q_mean, q_std = self.moments(q_mean, q_std)
                q = Posterior(draw(q_mean, q_std, temperature, sampler), q_mean, q_std, p.mean, p.std)
                if not torch.jit.is_scripting():
                    q = choose(q, self.index, sampler)
                kl, z = kl_divergence(q, self.kl_floor if self.training else 0.0), q.z
        y = self.z_projection(z.to(x.dtype)) + residual
        if self.alpha is not None:
            y = self.alpha * y
        return self.norm(y + self.skip(x)), kl, q


class DisabledLatent(DecoderBlock):
    """A latent that is switched off: its stochastic block is replaced by ``skip(x)``."""

    def __init__(self, level: Level, enters_level: bool) -> None:
        super().__init__(level, enters_level)
        in_channels = level.decoder_in_channels if enters_level else level.decoder_channels
        self.skip = make_skip(level.spatial_dims, in_channels, level.decoder_channels)

    def preserve_variance(self, scale: float, head_scale: float) -> None:
        preserve_skip(self.skip)

    def forward(
        self, x: Tensor, features: Tensor | None, z: Tensor | None, temperature: float, sampler: Any = None
    ) -> tuple[Tensor, Tensor | None, Posterior | None]:
        return self.skip(self.enter(x)), None, None


def make_norm(spatial_dims: int, channels: int, batch_norm: bool) -> nn.Module:
    """Batch norm, or the identity."""
    return Norm[Norm.BATCH, spatial_dims](channels) if batch_norm else nn.Identity()


def encoder_blocks(level: Level) -> list[ResidualBlock]:
    """The encoder's blocks on one level."""

    def block(in_channels: int) -> ResidualBlock:
        return ResidualBlock(
            level.spatial_dims,
            in_channels,
            level.channels,
            hidden_channels=level.hidden_channels,
            kernel_size=level.kernel_size,
            init_scale=level.init_scale,
            plain=level.plain_encoder,
            rezero=level.rezero,
            batch_norm=level.batch_norm,
            recompute=level.recompute,
        )

    return [block(level.in_channels if number == 0 else level.channels) for number in range(level.encoder_blocks)]


def decoder_blocks(level: Level) -> list[nn.Module]:
    """The decoder's blocks on one level: each latent's, followed by a refining block; that one alone without latents.

    The first latent of a level reads another width. So, where latents are shared, the second is the first that others
    can share with.
    """
    blocks: list[nn.Module] = []
    share: StochasticBlock | None = None
    for position, index in enumerate(level.latents):
        enters = position == 0 and not level.coarsest
        if index == 0:
            block: nn.Module = FirstLatent(level)
        elif index is None:
            block = DisabledLatent(level, enters)
        else:
            block = StochasticBlock(level, enters, index, share)
            share = block if level.shared and position > 0 and share is None else share
        blocks += [block, RefiningBlock(level, enters_level=False)]
    return blocks or [RefiningBlock(level, enters_level=True)]
