"""Building blocks of the very deep VAE: what happens on one level, at one place of the network.

TorchScript compiles ``reconstruct`` of the blocks and all that it calls; what it cannot compile is marked as unused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.layers.factories import Conv, Norm
from torch import Tensor
from torch.autograd.function import once_differentiable

LATENT_STD_RANGE = (1e-3, 1.0)


class Posterior(NamedTuple):
    """One latent of a batch, ``z ~ N(mean, std^2)``; each tensor is ``[batch, latent_channels, *grid]``.

    ``prior_mean`` and ``prior_std`` are those of the prior given the latents above; None for the first: N(0, I).
    """

    z: Tensor
    mean: Tensor
    std: Tensor
    prior_mean: Tensor | None = None
    prior_std: Tensor | None = None


class _GELUConv(torch.autograd.Function):
    """``conv(gelu(x))`` for several convolutions of one input, keeping ``x`` alone for the backward pass.

    Autograd by itself keeps the input of the GELU and that of the convolution: twice the memory. Computing the GELU
    once more in the backward pass costs about 2 % of the time of the 3x3x3 convolution behind it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, padding: int, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *params[::2])
        ctx.padding = padding
        conv = F.conv3d if x.ndim == 5 else F.conv2d
        activated = F.gelu(x)
        return tuple(conv(activated, w, b, padding=padding) for w, b in zip(params[::2], params[1::2], strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        dims = x.ndim - 2
        needs_x, needs_params = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:])
        activated = F.gelu(x)
        grad_x, grad_params = None, []
        for weight, grad in zip(weights, grads, strict=True):
            grad_in, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad,
                activated,
                weight,
                [weight.shape[0]],
                [1] * dims,
                [ctx.padding] * dims,
                [1] * dims,
                False,
                [0] * dims,
                1,
                [needs_x, needs_params, needs_params],
            )
            if needs_x:
                grad_x = grad_in if grad_x is None else grad_x.add_(grad_in)
            grad_params += [grad_weight, grad_bias]
        if needs_x:
            grad_x = torch.ops.aten.gelu_backward(grad_x, x)
        return grad_x, None, *grad_params


def gelu_convs(x: Tensor, params: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """Apply a GELU and then, in parallel, convolutions of one kernel size.

    A kernel of 3 is zero-padded by 1 on both sides, a kernel of 2 by 1 on the low side of each axis.

    Args:
        x: ``[batch, channels, *spatial]``.
        params: weight and bias of each convolution.
    """
    kernel = params[0][0].shape[-1]
    if kernel == 2:
        # gelu(0) = 0, so that padding before the activation is padding after it
        x = F.pad(x, [1, 0] * (x.ndim - 2))
    padding = 1 if kernel == 3 else 0
    if not torch.jit.is_scripting():
        x, params = _as_autocast(x, params)
        if torch.is_grad_enabled() and not torch.compiler.is_exporting():
            return _recomputing(x, params, padding)
    activated = F.gelu(x)
    results: list[Tensor] = []
    for weight, bias in params:
        if x.ndim == 5:
            results.append(F.conv3d(activated, weight, bias, padding=padding))
        else:
            results.append(F.conv2d(activated, weight, bias, padding=padding))
    return results


def _as_autocast(x: Tensor, params: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return x, params
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), [(w.to(dtype), b.to(dtype)) for w, b in params]


def _recomputing(x: Tensor, params: list[tuple[Tensor, Tensor]], padding: int) -> list[Tensor]:
    return list(_GELUConv.apply(x, padding, *(tensor for pair in params for tensor in pair)))


def gelu_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One convolution after a GELU, padded as in :func:`gelu_convs`."""
    return gelu_convs(x, [(weight, bias)])[0]


def make_conv(spatial_dims: int, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1):
    """A 2D or 3D convolution with PyTorch's default weights and a bias of zero."""
    conv = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, kernel_size, stride)
    nn.init.zeros_(conv.bias)
    return conv


def preserve_variance(conv: nn.Module, after_gelu: bool = True, scale: float = 1.0) -> None:
    """Draw the weights so that an input of unit variance gives an output of unit variance (times ``scale`` squared).

    A GELU leaves 0.425 of the mean square of a standard normal input, which the gain of 1.53 makes good.
    """
    fan_in = conv.weight[0].numel()
    nn.init.normal_(conv.weight, std=scale * (1.53 if after_gelu else 1.0) / math.sqrt(fan_in))


def make_skip(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """The identity where it fits, else a convolution of kernel 1."""
    return nn.Identity() if in_channels == out_channels else make_conv(spatial_dims, in_channels, out_channels)


def preserve_skip(skip: nn.Module) -> None:
    if not isinstance(skip, nn.Identity):
        preserve_variance(skip, after_gelu=False)


def standard_deviation(s: Tensor, bounds: tuple[float, float], form: str) -> Tensor:
    """Map a network's unbounded ``s`` to a standard deviation, in fp32.

    Args:
        s: any shape.
        bounds: ``(lo, hi)``.
        form: ``"sigmoid"``: between lo and hi; ``"exp"``: ``s`` clipped to [lo, hi] is the log-variance.
    """
    lo, hi = bounds
    s = s.float()
    return lo + (hi - lo) * torch.sigmoid(s) if form == "sigmoid" else torch.exp(0.5 * s.clamp(lo, hi))


_scan_generators: ContextVar[Sequence[torch.Generator] | None] = ContextVar("scan_generators", default=None)


@contextmanager
def noise_from(generators: Sequence[torch.Generator] | None) -> Iterator[None]:
    """Draw the noise of each scan of a batch from a generator (on the CPU) of its own.

    What a scan draws then does not depend on which others are in its batch. None leaves it to PyTorch's own generator.
    """
    token = _scan_generators.set(generators)
    try:
        yield
    finally:
        _scan_generators.reset(token)


def gaussian_noise(like: Tensor) -> Tensor:
    """Standard normal noise shaped like a channels-last tensor.

    Drawn with the channels as the last axis in memory: on a CPU eight times faster than ``randn_like`` of such a one.
    """
    shape = (*like.shape[2:], like.shape[1])
    generators = _scan_generators.get()
    if generators is None:
        return torch.randn((like.shape[0], *shape), device=like.device, dtype=torch.float32).movedim(-1, 1)
    if len(generators) != like.shape[0]:
        raise ValueError(f"{len(generators)} generators for a batch of {like.shape[0]}: give one for each scan.")
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return noise.to(like.device, non_blocking=True).movedim(-1, 1)


def memory_order(x: Tensor) -> Tensor:
    """``[batch, values]`` of a channels-last tensor, in the order of its memory."""
    return x.movedim(1, -1).flatten(1)


def upsample(x: Tensor) -> Tensor:
    """Nearest-neighbour doubling of every spatial axis."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def downsample(x: Tensor) -> Tensor:
    """Nearest-neighbour halving of every spatial axis: the even indices are kept."""
    return x[:, :, ::2, ::2, ::2] if x.ndim == 5 else x[:, :, ::2, ::2]


def channels_last(x: Tensor) -> Tensor:
    """The same values with the channels as the last axis in memory: on CPUs and GPUs alike fast for convolutions."""
    if x.ndim == 5:
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x.contiguous(memory_format=torch.channels_last)


class ResidualBlock(nn.Module):
    """``skip(x) + y``, where y is a bottleneck of four convolutions (kernels 1, k, k, 1), each after a GELU.

    Args:
        in_channels, out_channels, hidden_channels, kernel_size: widths, and the k above.
        init_scale: the weights of the last convolution are multiplied by this at the start.
        plain: two convolutions of kernel k instead, in -> out -> out.
        rezero: multiply y by a learnt scalar that starts at 0.
        skip: without it the result is y alone, its last convolution not scaled, and no ReZero.
        batch_norm: batch norm on y.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        kernel_size: int,
        init_scale: float = 1.0,
        plain: bool = False,
        rezero: bool = False,
        skip: bool = True,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
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
        self.norm = Norm[Norm.BATCH, spatial_dims](out_channels) if batch_norm else nn.Identity()
        self.skip = make_skip(spatial_dims, in_channels, out_channels) if skip else None
        self.alpha = nn.Parameter(torch.zeros(())) if rezero and skip else None
        if skip:
            with torch.no_grad():
                self.convs[-1].weight.mul_(init_scale)

    def preserve_variance(self, scale: float) -> None:
        """Start from signals of unit size, and from a block that adds a little (``scale``) to its input."""
        for conv in self.convs:
            preserve_variance(conv)
        if self.skip is not None:
            with torch.no_grad():
                self.convs[-1].weight.mul_(scale)
            preserve_skip(self.skip)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convs:
            y = gelu_conv(y, conv.weight, conv.bias)
        y = self.norm(y)
        if self.alpha is not None:
            y = self.alpha * y
        return y if self.skip is None else y + self.skip(x)

    def reconstruct(self, x: Tensor, features: Tensor) -> Tensor:
        """As :meth:`forward`: the encoder's features play no part here."""
        return self(x)


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

    def preserve_variance(self, scale: float) -> None:
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
    """Predict the mean and the unbounded standard deviation ``s`` of a latent.

    Args:
        separate_heads: a trunk of its own for ``s``.
        zero_init: start the two last convolutions at zero, so that mean = s = 0.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int,
        latent_channels: int,
        separate_heads: bool = False,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        trunk = (spatial_dims, in_channels, hidden_channels, kernel_size)
        self.trunk = Trunk(*trunk)
        self.std_trunk = Trunk(*trunk) if separate_heads else None
        self.mean = make_conv(spatial_dims, hidden_channels, latent_channels)
        self.std = make_conv(spatial_dims, hidden_channels, latent_channels)
        if zero_init:
            self.zero_heads()

    def zero_heads(self) -> None:
        """Start from mean = s = 0."""
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.std.weight)

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


class LatentBlock(nn.Module):
    """What the first latent and the stochastic blocks share: drawing z, and the posterior's distance from the prior."""

    def __init__(self, std_form: str) -> None:
        super().__init__()
        self.std_form = std_form

    def draw(self, mean: Tensor, s: Tensor, temperature: float) -> Posterior:
        std = standard_deviation(s, LATENT_STD_RANGE, self.std_form)
        mean = mean.float()
        z = mean if temperature == 0 else mean + temperature * std * gaussian_noise(mean)
        return Posterior(z, mean, std)

    def kl_divergence(self, q: Posterior) -> Tensor:
        """KL(q || p) in nats, summed over the latent: ``[batch]``."""
        # on views in the order of their memory: else the gradients, which begin as one value expanded, are not
        # channels-last, and every operation on them and the convolutions behind copy
        mean, std = memory_order(q.mean), memory_order(q.std)
        variance = std.square()
        if q.prior_mean is None:
            kl = 0.5 * (variance + mean.square() - 1) - std.log()
        else:
            p_std = memory_order(q.prior_std)
            denominator = p_std.square()
            if self.std_form == "sigmoid":
                denominator = denominator.clamp_min(1e-5)
            distance = variance + (mean - memory_order(q.prior_mean)).square()
            kl = 0.5 * (distance / denominator - 1) + p_std.log() - std.log()
        return kl.sum(1)


class FirstLatent(LatentBlock):
    """The coarsest latent: prior N(0, I), posterior from the encoder's last features, result ``conv(z)``."""

    def __init__(
        self,
        spatial_dims: int,
        feature_channels: int,
        out_channels: int,
        hidden_channels: int,
        kernel_size: int,
        latent_channels: int,
        separate_heads: bool,
        std_form: str,
        batch_norm: bool,
    ) -> None:
        super().__init__(std_form)
        self.latent_channels = latent_channels
        self.posterior = ParameterNet(
            spatial_dims,
            feature_channels,
            hidden_channels,
            kernel_size,
            latent_channels,
            separate_heads,
        )
        self.z_projection = make_conv(spatial_dims, latent_channels, out_channels)
        self.norm = Norm[Norm.BATCH, spatial_dims](out_channels) if batch_norm else nn.Identity()

    def preserve_variance(self, scale: float) -> None:
        """Start with a latent that shows in full, and a posterior that does not depend on the scan yet."""
        preserve_variance(self.z_projection, after_gelu=False)
        self.posterior.zero_heads()

    def infer(self, features: Tensor, temperature: float) -> tuple[Posterior, Tensor]:
        mean, s, _ = self.posterior(features)
        q = self.draw(mean, s, temperature)
        return q, self.kl_divergence(q)

    def project(self, z: Tensor) -> Tensor:
        return self.norm(self.z_projection(z))

    def reconstruct(self, x: Tensor, features: Tensor) -> Tensor:
        """The result for the posterior's mean, which depends on the encoder's features alone."""
        return self.project(self.posterior(features)[0].float())


class StochasticBlock(LatentBlock):
    """One further latent: ``z_projection(z) + residual + skip(x)``.

    The prior net sees x, the posterior net the encoder's features of the level and x.

    Args:
        share: take the prior net, posterior net and z projection of this other block; only the residual is own.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        feature_channels: int,
        out_channels: int,
        hidden_channels: int,
        kernel_size: int,
        latent_channels: int,
        separate_heads: bool,
        std_form: str,
        rezero: bool,
        batch_norm: bool,
        share: StochasticBlock | None = None,
    ) -> None:
        super().__init__(std_form)
        if share is None:
            widths = (hidden_channels, kernel_size, latent_channels, separate_heads)
            self.prior = ParameterNet(spatial_dims, in_channels, *widths, zero_init=True)
            self.posterior = ParameterNet(spatial_dims, feature_channels + in_channels, *widths)
            self.z_projection = make_conv(spatial_dims, latent_channels, out_channels)
        else:
            self.prior, self.posterior, self.z_projection = share.prior, share.posterior, share.z_projection
        self.residual = make_conv(spatial_dims, hidden_channels, out_channels)
        nn.init.zeros_(self.residual.weight)
        self.skip = make_skip(spatial_dims, in_channels, out_channels)
        self.alpha = nn.Parameter(torch.zeros(())) if rezero else None
        self.norm = Norm[Norm.BATCH, spatial_dims](out_channels) if batch_norm else nn.Identity()

    def preserve_variance(self, scale: float) -> None:
        """Start with a latent that shows a little (``scale``) and whose posterior equals its prior."""
        preserve_variance(self.z_projection, after_gelu=False, scale=scale)
        preserve_skip(self.skip)
        self.posterior.zero_heads()

    @torch.jit.unused
    def forward(
        self, x: Tensor, features: Tensor | None, z: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor | None, Posterior | None]:
        """Use ``z`` where given, else draw it from the posterior where there are ``features``, else from the prior.

        Returns:
            the block's result, the KL divergence ``[batch]`` and the posterior (None where none was computed).
        """
        p_mean, p_s, residual = self._prior(x)
        kl = q = None
        if z is None and features is not None:
            q_mean, q_s, _ = self.posterior(features, x)
            p_std = standard_deviation(p_s, LATENT_STD_RANGE, self.std_form)
            q = self.draw(q_mean, q_s, temperature)._replace(prior_mean=p_mean.float(), prior_std=p_std)
            kl = self.kl_divergence(q)
            z = q.z
        elif z is None:
            z = self.draw(p_mean, p_s, temperature).z
        return self._add(x, z, residual), kl, q

    def reconstruct(self, x: Tensor, features: Tensor) -> Tensor:
        """The result alone, with z the mean of the posterior."""
        return self._add(x, self.posterior(features, x)[0].float(), self._prior(x)[2])

    def _prior(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and s of the prior, and the residual."""
        mean, s, residual = self.prior(x, residual=(self.residual.weight, self.residual.bias))
        assert residual is not None
        return mean, s, residual

    def _add(self, x: Tensor, z: Tensor, residual: Tensor) -> Tensor:
        y = self.z_projection(z.to(x.dtype)) + residual
        if self.alpha is not None:
            y = self.alpha * y
        return self.norm(y + self.skip(x))


class DisabledLatent(nn.Module):
    """A latent that is switched off: its stochastic block is replaced by ``skip(x)``."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.skip = make_skip(spatial_dims, in_channels, out_channels)

    def preserve_variance(self, scale: float) -> None:
        preserve_skip(self.skip)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x)

    def reconstruct(self, x: Tensor, features: Tensor) -> Tensor:
        """As :meth:`forward`: the encoder's features play no part here."""
        return self(x)
