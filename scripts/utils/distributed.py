"""Several processes on one job, as torchrun starts them, and the signals by which launchers ask a run to end.

Every function also works in a single process.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
import torch.distributed as dist
from scripts.utils.errors import InputError, LaunchError
from scripts.utils.parallel import die_with_parent
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

T = TypeVar("T")

STORE_TIMEOUT = timedelta(seconds=10)
# the others wait while rank 0 reads a cohort; when one process fails, torchrun ends all at once
RANK_ZERO_TIMEOUT = timedelta(days=1)
# of a collective operation, such as the sum of gradients; rank 0 draws figures and saves checkpoints in between
COLLECTIVE_TIMEOUT = timedelta(hours=1)
EXIT_DELAY = 30  # seconds that the others leave rank 0 to show its error
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
ONCE = 1.0  # seconds in which signals are one: at Ctrl-C torchrun and the terminal send one each

_calls = itertools.count()  # of from_rank_zero and of wait_for_all, in the same order on all processes
_running: list[Callable] = []  # what from_rank_zero is calling


def local_device() -> torch.device:
    """The device of this process: a GPU of its own, or the CPU where there are none.

    Raises:
        LaunchError: when torchrun did not start this process, or started more than there are GPUs.
    """
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        raise LaunchError(
            "A multi_gpu config needs torchrun: start with `torchrun --standalone --nnodes=1 --nproc_per_node=N -m "
            "monai.bundle run ...`, or leave that config out."
        )
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if int(rank) >= torch.cuda.device_count():
        raise LaunchError(f"Each process needs a GPU: lower --nproc_per_node to {torch.cuda.device_count()}.")
    return torch.device("cuda", int(rank))


def start(multi_gpu: bool = True) -> None:
    """Join the process group of torchrun's processes, over NCCL with GPUs and Gloo without; only rank 0 logs infos.

    Args:
        multi_gpu: False does nothing, for a process that is alone.

    Raises:
        LaunchError: torchrun started several processes, and ``multi_gpu`` is False.
    """
    if not multi_gpu:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1:
            raise LaunchError(
                f"torchrun started {processes} processes, which would all do the same: add a multi_gpu config, such as "
                "configs/multi_gpu_train.json, to --config_file."
            )
        return
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # under SLURM Ignite takes the task's local ID for the local rank, but torchrun is the only task of its node
    os.environ["SLURM_LOCALID"] = os.environ["LOCAL_RANK"]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # without torchrun it would train on, beside the run's next start
        die_with_parent(os.getppid())
    # a store that torchrun itself holds is there before this process starts, unless torchrun was killed
    torchrun_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    timeout = STORE_TIMEOUT if torchrun_has_it else RANK_ZERO_TIMEOUT
    store, rank, processes = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=own_store(store, rank, processes),
        rank=rank,
        world_size=processes,
        timeout=COLLECTIVE_TIMEOUT,
    )
    if rank > 0:
        logging.getLogger().setLevel(logging.WARNING)


def own_store(store: dist.Store, rank: int, processes: int) -> dist.Store:
    """A store, here under a prefix, without what an earlier start of these processes has left in it.

    torchrun keeps one store for all its restarts, in which a restarted process finds the addresses at which the others
    listened before they were killed. Here each process writes a new name, and rank 0 makes a prefix of all names, until
    each process has found its own name in it.

    Measured with two Gloo processes (PyTorch 2.13), one of them killed: with torchrun's store the restarted two never
    joined, with this one they did within 6 s. ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` does the same in 4 s, but only
    in the environment of torchrun itself, which nothing here can set.
    """
    store.set_timeout(RANK_ZERO_TIMEOUT)
    name = uuid.uuid4().hex
    store.set(f"name {rank}", name)
    prefix = ""
    while not (name in prefix and store.check([f"{prefix} is used"])):
        if rank == 0:
            prefix = " ".join(store.get(f"name {other}").decode() for other in range(processes))
            store.set("prefix", prefix)
            if store.check([f"{prefix} suits {other}" for other in range(1, processes)]):
                store.set(f"{prefix} is used", "")
        else:
            prefix = store.get("prefix").decode()
            if name in prefix:
                store.set(f"{prefix} suits {rank}", "")
        time.sleep(0.05)
    return dist.PrefixStore(prefix, store)


def stop() -> None:
    """Destroy the process group, when all processes have arrived here."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def from_rank_zero(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function on rank 0 only, while the other processes wait.

    Args:
        function: its result must be what JSON can hold, and small: compressed, less than 8 MB, the store's limit per
            value.
        args, kwargs: of the function.

    Returns:
        What the function returned, on every process as JSON gives it back: a path is a text, a tuple a list.

    Raises:
        Exception: what the function raises, on rank 0.
        SystemExit: on the other processes then.
    """
    if idist.get_world_size() == 1:
        return _call_alone(function, *args, **kwargs)
    # through the store, not by a broadcast: the store waits as long as it takes, and leaves no tensor with Gloo's
    # threads, which abort if they release one while Python shuts down
    store, key = dist.distributed_c10d._get_default_store(), f"from rank zero {next(_calls)}"
    if dist.get_rank() == 0:
        message = b""
        try:
            text = json.dumps(_call_alone(function, *args, **kwargs), default=os.fspath)
            message = zlib.compress(text.encode())
        finally:
            store.set(key, message)
        return json.loads(text)
    store.wait([key], RANK_ZERO_TIMEOUT)
    message = store.get(key)
    if not message:
        time.sleep(EXIT_DELAY)  # rank 0 shows its error, and torchrun ends all processes when one has ended
        sys.exit(1)
    return json.loads(zlib.decompress(message))


def _call_alone(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    if _running:
        raise RuntimeError(f"{function} is to be called on rank 0 within {_running[0]}: the others don't wait for it.")
    _running.append(function)
    try:
        return function(*args, **kwargs)
    finally:
        _running.pop()


def wait_for_all() -> None:
    """A barrier at which processes may arrive hours apart."""
    if idist.get_world_size() > 1:
        store, here = dist.distributed_c10d._get_default_store(), f"here {next(_calls)}"
        store.set(f"{here} {dist.get_rank()}", "")
        store.wait([f"{here} {rank}" for rank in range(dist.get_world_size())], RANK_ZERO_TIMEOUT)


def parallel_network(start_network: Callable[..., nn.Module], network: nn.Module, **kwargs: Any) -> nn.Module:
    """Wrap a network for training on all processes, with the mean of their gradients; a process alone needs no wrapper.

    Args:
        start_network: is called on every process with ``network`` and ``kwargs``, and says how training starts; the
            weights and buffers of rank 0 count, which the others get.
        network: on its device. Its batch norms become synchronised ones, which PyTorch has for GPUs only.
        kwargs: of ``start_network``.

    Raises:
        ValueError: batch norm on CPUs.
    """
    network = start_network(network=network, **kwargs)
    if idist.get_world_size() == 1:
        return network
    device = next(network.parameters()).device
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    if norms and device.type != "cuda":
        raise InputError("network_def: batch_norm over several processes needs GPUs: set it to false.")
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network) if norms else network
    # once is enough: the voxel statistics never change, and synchronised batch norms have the same buffers everywhere
    for buffer in network.buffers():
        dist.broadcast(buffer, src=0)
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(network, devices, forward_sync_buffers=False, gradient_as_bucket_view=True)


def batch_share(count: int, batch_size: int) -> range:
    """Indices of this process's scans: consecutive ones, in the same batches as in a run of one process.

    No scan is in two shares, and none is left out. A share is empty where there are fewer batches than processes.
    """
    batches, rank, processes = -(-count // batch_size), idist.get_rank(), idist.get_world_size()
    first, end = (batches * r // processes * batch_size for r in (rank, rank + 1))
    return range(min(first, count), min(end, count))


def shared_out(count: int, batch_size: int, make: Callable[[Sequence[int]], Sequence[T]], what: str) -> list[T]:
    """What is made of the numbers from 0 on, in their order, on every process; each makes its share by batches.

    Args:
        count: of numbers.
        batch_size: of how many ``make`` is asked at once.
        make: gives a result for each; on the host, since processes exchange them.
        what: the bar of progress on standard error says, of rank 0.
    """
    numbers = range(idist.get_rank(), count, idist.get_world_size())
    batches = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
    made: list[tuple[int, T]] = []
    for batch in tqdm(batches, desc=what, file=sys.stderr, disable=idist.get_rank() > 0):
        made += zip(batch, make(batch), strict=True)
    return [one for _, one in sorted(itertools.chain(*idist.all_gather(made)), key=lambda pair: pair[0])]


class SignalWatch:
    """A context in which the first SIGTERM, SIGUSR1 or Ctrl-C is noted instead of ending the process.

    Ctrl-C once more, a second later, raises ``KeyboardInterrupt``. Outside of the main thread, which alone gets signals
    in Python, nothing is noted.

    Attributes:
        received: the number of the first signal, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> SignalWatch:
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            # a shell lets what it starts in the background ignore Ctrl-C
            watched = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, self._note) for number in watched}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
            if number == signal.SIGINT and idist.get_world_size() == 1:
                # not by a stream: the signal may have come while one was being written to
                os.write(2, b"\nEnding after this update; press Ctrl-C again to end without a checkpoint.\n")
        elif number == signal.SIGINT and time.monotonic() - self._since > ONCE:
            raise KeyboardInterrupt


def ignore_signals(worker_id: int = 0) -> None:
    """Let a data loader's worker survive the signals that :class:`SignalWatch` notes, so that the update can be ended.

    Terminals, launchers and schedulers send them to all processes of a job. The training process tells its workers when
    to end, and they end without it too.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
