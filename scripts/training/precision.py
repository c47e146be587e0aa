"""Mixed precision: what a device can compute in fewer bits at speed."""

from __future__ import annotations

import functools
import logging

import torch

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
