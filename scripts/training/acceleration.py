"""Fewer launches from Python on a GPU: a whole update as one CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from monai.engines.utils import IterationEvents
from scripts.utils.errors import InputError
from torch import Tensor
from torch.optim import Optimizer

logger = logging.getLogger(__name__)

# which fire while Python goes through an update; of one that is replayed it sees nothing
WITHIN_UPDATES = (IterationEvents.FORWARD_COMPLETED, IterationEvents.LOSS_COMPLETED, IterationEvents.BACKWARD_COMPLETED)
WARMUP = 3  # updates before the graph is captured, in which libraries choose their algorithms and states are made


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
