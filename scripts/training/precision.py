"""How updates are made fast: numbers of fewer bits where a device has them, and whole updates as a CUDA graph."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from monai.engines.utils import IterationEvents
from scripts.training.update import as_vectors
from scripts.utils.errors import InputError
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

logger = logging.getLogger(__name__)
# which fire while Python goes through an update; of one that is replayed it sees nothing
WITHIN_UPDATES = (IterationEvents.FORWARD_COMPLETED, IterationEvents.LOSS_COMPLETED, IterationEvents.BACKWARD_COMPLETED)
WARMUP = 3  # updates before the graph is captured, in which libraries choose their algorithms and states are made


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


def check_graph(device: torch.device, cuda_graph: bool | None, **obstacles: Any) -> bool:
    """Whether updates are captured as a CUDA graph.

    Args:
        device: that is trained on; one that has no graphs runs updates as they are, and says so if a graph is wanted.
        cuda_graph: the setting; None: where it can be.
        obstacles: settings that a graph cannot honour, by name; None or False where they are not set.

    Raises:
        ValueError: a graph is wanted and one of these is set.
    """
    if cuda_graph is False:
        return False
    if device.type != "cuda":
        if cuda_graph:
            logger.warning("cuda_graph is True, but the device is '%s': updates are run as they are.", device)
        return False
    for name, value in obstacles.items():
        if not value:
            continue
        reason = f"{name} is {value}: a graph is one fixed update of one process."
        if cuda_graph:
            raise InputError(f"cuda_graph is True, and {reason} Set one of the two otherwise.")
        logger.info("Updates are launched operation by operation, not as one CUDA graph, since %s", reason)
        return False
    return True


class GraphedUpdate:
    """An update whose inputs and results always lie in the same memory, so that a CUDA graph can repeat it.

    The first updates run as they are, on a stream of their own; then one is captured, and from there on repeated by a
    single launch. What changes from update to update is copied to where the graph reads it. Noise is drawn by PyTorch's
    own generator, which the graph reads its seed from. On a CPU each update runs as it is, from the same memory.

    Args:
        update: of scans ``[batch, channels, *spatial]`` and scalar tensors by name; returns tensors by name. It makes
            its gradients anew, and asks no value of the device.
        optimizer: whose learning rates are copied in too.
    """

    def __init__(self, update: Callable[..., dict[str, Any]], optimizer: Optimizer) -> None:
        self.update, self.optimizer = update, optimizer
        self.scans: Tensor | None = None
        self.settings: dict[str, Tensor] = {}
        self.learning_rates: list[Tensor] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None
        self.results: dict[str, Any] = {}
        self.updates = 0

    def __call__(self, scans: Tensor, **settings: float) -> dict[str, Any]:
        """Update once. What is returned is the caller's own: the next update leaves it alone.

        Args:
            scans: on the device, of one shape at all times.
            settings: what ``update`` takes besides.

        Raises:
            ValueError: the scans have another shape than before.
        """
        self._copy_in(scans, settings)
        self.updates += 1
        if scans.device.type != "cuda":
            self.results = self._run()
        elif self.updates <= WARMUP:
            self._run_aside()
        else:
            if self.graph is None:
                self._capture()
            self.graph.replay()
        return {name: _copy(value) for name, value in self.results.items()}

    def _copy_in(self, scans: Tensor, settings: dict[str, float]) -> None:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        if self.scans is None:
            self.scans = torch.empty_like(scans)
            self.settings = {name: scans.new_empty(()) for name in settings}
            self.learning_rates = [scans.new_empty(()) for _ in rates]
        if self.scans.shape != scans.shape:
            raise InputError(
                f"cuda_graph is True, and a batch is {list(scans.shape)} after batches of {list(self.scans.shape)}: "
                "all must be alike."
            )
        self.scans.copy_(scans)
        for name, tensor in self.settings.items():
            tensor.fill_(settings[name])
        for tensor, rate in zip(self.learning_rates, rates, strict=True):
            tensor.fill_(rate)

    def _run(self) -> dict[str, Any]:
        with self._learning_rates_on_the_device():
            return self.update(self.scans, **self.settings)

    @contextmanager
    def _learning_rates_on_the_device(self) -> Iterator[None]:
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]
        for group, tensor in zip(groups, self.learning_rates, strict=True):
            group["lr"] = tensor
        try:
            yield
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate

    def _run_aside(self) -> None:
        """On another stream than PyTorch's default one, which cannot be captured."""
        current = torch.cuda.current_stream()
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self.results = self._run()
        current.wait_stream(self.stream)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # the loader's thread, which pins memory, goes on meanwhile
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.results = self._run()
        self.graph = graph
        logger.info("The update is captured as a CUDA graph.")


def _copy(value: Any) -> Any:
    """A tensor, or a named tuple of tensors, in memory of its own."""
    return value.clone() if isinstance(value, Tensor) else type(value)(*(part.clone() for part in value))
