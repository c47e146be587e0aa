"""Convolutions after a GELU, with the published padding and little memory, and the resampling between two grids."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

# standard deviation, at the start, of posterior means and of the output for each ``init`` that sets it
HEAD_SCALES = {"variance_preserving": 0.0, "informative": 0.3}


class _GELUConv(Function):
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


def make_skip(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Module:
    """The identity where it fits, else a convolution of kernel 1."""
    return nn.Identity() if in_channels == out_channels else make_conv(spatial_dims, in_channels, out_channels)


def preserve_variance(conv: nn.Module, after_gelu: bool = True, scale: float = 1.0) -> None:
    """Draw the weights so that an input of unit variance gives an output of unit variance (times ``scale`` squared).

    A GELU leaves 0.425 of the mean square of a standard normal input, which the gain of 1.53 makes good.
    """
    fan_in = conv.weight[0].numel()
    nn.init.normal_(conv.weight, std=scale * (1.53 if after_gelu else 1.0) / math.sqrt(fan_in))


def preserve_skip(skip: nn.Module) -> None:
    """The same for what :func:`make_skip` gives."""
    if not isinstance(skip, nn.Identity):
        preserve_variance(skip, after_gelu=False)


def upsample(x: Tensor) -> Tensor:
    """Double every spatial axis, nearest neighbour, with the channels as the last axis in memory as before."""
    if x.is_cuda and x.ndim == 5:
        return repeat_voxels(x)
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def repeat_voxels(x: Tensor) -> Tensor:
    """Double the three spatial axes of a volume in one copy.

    In 3D, ``F.interpolate`` for CUDA works with the channels first: it would copy its input there and its result back,
    and so would its backward pass. On a CPU it does not, and takes half the time of this.
    """
    batch, channels, depth, height, width = x.shape
    voxels = x.permute(0, 2, 3, 4, 1)[:, :, None, :, None, :, None]
    repeated = voxels.expand(batch, depth, 2, height, 2, width, 2, channels)
    return repeated.reshape(batch, 2 * depth, 2 * height, 2 * width, channels).permute(0, 4, 1, 2, 3)


def to_patches(x: Tensor, size: int) -> Tensor:
    """Patches of so many voxels along each axis as channels: ``[batch, channels * size^d, *spatial / size]``.

    A patch's voxels are the inner of the channels' two indices.
    """
    if size == 1:
        return x
    b, c = x.shape[0], x.shape[1]
    if x.ndim == 5:
        d, h, w = x.shape[2] // size, x.shape[3] // size, x.shape[4] // size
        patches = x.reshape(b, c, d, size, h, size, w, size).permute(0, 1, 3, 5, 7, 2, 4, 6)
        return patches.reshape(b, c * size * size * size, d, h, w)
    h, w = x.shape[2] // size, x.shape[3] // size
    return x.reshape(b, c, h, size, w, size).permute(0, 1, 3, 5, 2, 4).reshape(b, c * size * size, h, w)


def from_patches(x: Tensor, size: int) -> Tensor:
    """What :func:`to_patches` was made of."""
    if size == 1:
        return x
    b, d, h = x.shape[0], x.shape[2], x.shape[3]
    if x.ndim == 5:
        c, w = x.shape[1] // (size * size * size), x.shape[4]
        voxels = x.reshape(b, c, size, size, size, d, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return voxels.reshape(b, c, d * size, h * size, w * size)
    c = x.shape[1] // (size * size)
    return x.reshape(b, c, size, size, d, h).permute(0, 1, 4, 2, 5, 3).reshape(b, c, d * size, h * size)


class Downsample(nn.Module):
    """Halve every spatial axis, nearest neighbour: the even indices are kept."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2, ::2, ::2] if x.ndim == 5 else x[:, :, ::2, ::2]


def channels_last(x: Tensor) -> Tensor:
    """The same values with the channels as the last axis in memory: on CPUs and GPUs alike fast for convolutions."""
    if x.ndim == 5:
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x.contiguous(memory_format=torch.channels_last)
