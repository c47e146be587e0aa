"""A GPU of fake tensors: code runs on it as on a real one, nothing is computed, and what would wait for it is an error.

PyTorch lets a program define one device of its own; here it is ``gpu``. Fake tensors on it have shapes, strides and a
device, so that an operation on tensors of two devices fails as it would there, and so does one that needs a value. The
device stays defined for the rest of the process: use :func:`groups.run_group`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode


class _Module(backend_registration._DummyBackendModule):
    """What ``torch.gpu`` is."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        """For ``torch.random.fork_rng``, which asks a device that is registered, in whatever test."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        """Its counterpart."""


class NoWaiting(TorchDispatchMode):
    """Copies between host and GPU, which must not be waited for once ``strict`` is true."""

    def __init__(self) -> None:
        super().__init__()
        self.strict = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            target = kwargs.get("device") or args[0].device
            if target.type != args[0].device.type:
                self._check(func, kwargs.get("non_blocking", False))
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.empty_strided(args[0].shape, args[0].stride(), dtype=dtype, device=target)
        elif func is torch.ops.aten.copy_.default and args[0].device.type != args[1].device.type:
            self._check(func, (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)) or args[1].ndim == 0)
        return func(*args, **kwargs)

    def _check(self, func, non_blocking: bool) -> None:
        if self.strict and not non_blocking:
            raise AssertionError(f"{func} waits for the GPU")


backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=_Module())
GPU = torch.device("gpu", 0)

# autocast on it: convolutions and products in fewer bits, all else as it is
AUTOCAST = "AutocastPrivateUse1"
REST, CASTS = torch.library.Library("_", "IMPL", AUTOCAST), torch.library.Library("aten", "IMPL", AUTOCAST)
REST.fallback(torch.library.fallthrough_kernel)


def _cast(value):
    return (
        value.to(torch.get_autocast_dtype("gpu")) if isinstance(value, Tensor) and value.is_floating_point() else value
    )


def _in_fewer_bits(operation):
    def kernel(*args):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operation(*map(_cast, args))

    return kernel


for name in ("conv2d", "conv3d", "mm", "bmm"):
    CASTS.impl(name, _in_fewer_bits(getattr(torch.ops.aten, name).default))


@contextmanager
def fake_gpu() -> Iterator[NoWaiting]:
    """Let there be one; gives what watches over it. Reading a value that it holds is an error."""
    with FakeTensorMode(allow_non_fake_inputs=True), NoWaiting() as watch:
        yield watch
