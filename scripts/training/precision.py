"""Mixed precision: what a device can compute in fewer bits at speed, and weights cast to them all at once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from scripts.training.update import as_vectors
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

logger = logging.getLogger(__name__)


def autocast(device: torch.device, enabled: bool, dtype: torch.dtype | None = None) -> torch.autocast:
    """Autocast for a device: bfloat16 where it has it, else float16 on GPUs and none on CPUs.

    A CPU without instructions for bfloat16 takes 10 to 17 times as long for a training step in it as in single
    precision (two networks of 32³, AVX2, one thread), so that it stays in that unless a ``dtype`` is asked for.
    """
    if enabled and dtype is None and device.type == "cpu" and not cpu_has_bfloat16():
        _warn_of_slow_bfloat16()
        enabled = False
    if dtype is None:
        # PyTorch emulates bfloat16 on older GPUs, slowly
        has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def cpu_has_bfloat16() -> bool:
    """Whether oneDNN, which PyTorch computes convolutions with, has instructions for bfloat16 on this processor."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def _warn_of_slow_bfloat16() -> None:
    logger.warning(
        "amp is True, but this processor has no instructions for bfloat16, so that a step would take 10 to 17 times as "
        "long: single precision is used. --amp_dtype '$torch.bfloat16' insists."
    )


class _Cast(Function):
    """Tensors without gaps in their memory in another dtype, all at once; and back, for their gradients."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        return tuple(_parts(torch.cat(as_vectors(tensors)).to(dtype), tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        vectors = [grad.permute(_axes(t)).reshape(-1) for grad, t in zip(grads, tensors, strict=True)]
        return None, *_parts(torch.cat(vectors).to(tensors[0].dtype), tensors)


def _axes(tensor: Tensor) -> list[int]:
    """The axes of a tensor as they follow in its memory, the slowest first."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def _parts(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a vector into tensors of the shapes and strides of others."""
    parts, start = [], 0
    for t in like:
        parts.append(vector.as_strided(t.shape, t.stride(), start))
        start += t.numel()
    return parts


class LowPrecision:
    """A network whose convolutions' weights are cast to fewer bits all at once, before it runs.

    Autocast by itself casts each weight where it is used, and each gradient back: two launches for each on a GPU.

    Args:
        network: all weights of its convolutions must be of one dtype and on one device.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.device = next(network.parameters()).device.type
        convs = [(name, m) for name, m in network.named_modules(remove_duplicate=False) if isinstance(m, _ConvNd)]
        # blocks that share their weights have them under several names
        self.weights = {f"{name}.{which}": p for name, m in convs for which, p in m.named_parameters(recurse=False)}
        self.unique = list(dict.fromkeys(self.weights.values()))

    def cast(self) -> Callable[..., object]:
        """The network with weights of autocast's dtype, to be called once; as it is where autocast is off."""
        if not torch.is_autocast_enabled(self.device):
            return self.network
        dtype = torch.get_autocast_dtype(self.device)
        cast = dict(zip(self.unique, _Cast.apply(dtype, *self.unique), strict=True))
        weights = {name: cast[p] for name, p in self.weights.items()}
        return lambda *args: functional_call(self.network, weights, args, tie_weights=False)
