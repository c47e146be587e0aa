"""What one process of benchmarks.gpu does on a device.

    python -m benchmarks.gpu_process '{"network": "default", "settings": [["bf16", "graph"]], "dataset_dir": "brains"}'
    python -m benchmarks.gpu_process '{"run_id": "sample", "config_file": "configs/inference.json"}'

The first times whole iterations of training, and prints a line of JSON for each setting; the second runs a job of the
bundle as ``python -m monai.bundle run`` does, which needs the package fire besides. Measured is the training run of the
configs, with its loss, optimizer, average, metrics and handlers, on batches in the host's memory: all but reading
scans, validation and checkpoints.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.common import synchronize, training_config
from benchmarks.memory import estimate_step
from benchmarks.throughput import forward_gflop
from scripts.training.trainer import VDVAETrainer

PRECISIONS = {"fp32": (False, None), "bf16": (True, torch.bfloat16), "fp16": (True, torch.float16)}
MODES = {"eager": {"cuda_graph": False}, "graph": {"cuda_graph": True}}
WARMUP = 5  # iterations: a graph is captured at the fourth
# after the first two iterations and after each ten the host waits for the device, so that it does not run far ahead
WAIT = 10
WHOLE_RUN = ("validate", "figures", "checkpoint", "preemption", "TimeEstimate", "prior_fit", "ListOutput")


class Batches:
    """Batches in the host's memory, of the first scans of a dataset, again and again.

    Args:
        dataset: gives ``{"image": [channels, *spatial]}``.
        batch_size: scans of each.
        length: how many batches an epoch has.
        pin: whether their memory is pinned, so that copies to a GPU need not be waited for.
    """

    persistent_workers = False

    def __init__(self, dataset: Dataset, batch_size: int, length: int, pin: bool) -> None:
        self.dataset, self.batch_size, self.length = dataset, batch_size, length
        scans = [dataset[index]["image"].as_tensor() for index in range(min(len(dataset), 2 * batch_size))]
        chosen = [[scans[(batch * batch_size + i) % len(scans)] for i in range(batch_size)] for batch in range(2)]
        self.batches = [torch.stack(batch) for batch in chosen]
        if pin:
            self.batches = [batch.pin_memory() for batch in self.batches]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"image": self.batches[number % 2]} for number in range(self.length))

    def __len__(self) -> int:
        return self.length


class Timer:
    """Ends training when so many seconds of iterations after the first were timed, which is `iterations` in
    `elapsed`.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.iterations, self.elapsed, self.start = 0, 0.0, 0.0

    def __call__(self, engine: Engine) -> None:
        done = engine.state.iteration - WARMUP
        if done < 0 or (done % WAIT and done != 2):
            return
        synchronize(self.device)
        if done == 0:
            self.start = time.perf_counter()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            return
        self.iterations, self.elapsed = done, time.perf_counter() - self.start
        if self.elapsed >= self.seconds:
            engine.terminate()


def make_trainer(
    network: int | str, folder: str, dataset_dir: str, device: torch.device, batch_size: int | None, **changes: Any
) -> VDVAETrainer:
    """The trainer of `configs/train.json`, with changes, with one epoch of batches that does not end, and without what
    ends one; `network` as in `benchmarks.common.training_config`.
    """
    parser: ConfigParser = training_config(network)
    settings = {"dataset_dir": dataset_dir, "output_dir": f"{folder}/run", "cache_dir": f"{folder}/cache"}
    settings |= {"num_workers": 0, "augment": False, "augmentation": {}, "epochs": 1, "device": device}
    if batch_size is not None:
        settings["batch_size"] = batch_size
    parser.update({**settings, **changes})
    handlers = parser["train#handlers"]
    parser["train#handlers"] = [one for one in handlers if not any(word in str(one) for word in WHOLE_RUN)]
    torch.manual_seed(0)
    batches = Batches(
        parser.get_parsed_content("train#dataset"), parser["batch_size"], 10**6, pin=device.type == "cuda"
    )
    parser["train#dataloader"] = batches
    return parser.get_parsed_content("train#trainer")


def measure_training(
    network: int | str,
    precision: str,
    mode: str,
    dataset_dir: str,
    folder: str,
    device: torch.device,
    batch_size: int | None = None,
    seconds: float = 2.0,
) -> dict[str, Any]:
    """Time a setting: `scans_per_second`; `seconds` of an iteration; `gflop` of a scan's forward pass; `tflops`, three
    times that for each scan; on a GPU `peak` and `estimate` of the memory in bytes. Or `error`, if it could not run.
    """
    amp, dtype = PRECISIONS[precision]
    row: dict[str, Any] = {"network": network, "precision": precision, "mode": mode}
    try:
        trainer = make_trainer(
            network, folder, dataset_dir, device, batch_size, amp=amp, amp_dtype=dtype, **MODES[mode]
        )
        size = trainer.data_loader.batch_size
        timer = Timer(device, seconds)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, timer)
        trainer.run()
    except (RuntimeError, ValueError) as error:  # a precision or mode that does not go, or memory that is not there
        return row | {"error": str(error).strip().split("\n")[0][:200]}
    rate = size * timer.iterations / timer.elapsed
    gflop = forward_gflop(network)
    row |= {"batch_size": size, "scans_per_second": rate, "seconds": size / rate, "gflop": gflop}
    row["tflops"] = 3e-3 * gflop * rate
    if device.type == "cuda":
        fewer = "fp32" if precision == "fp32" else "bf16"
        # a graph's own memory counts as free between two of its parts
        peak = torch.cuda.memory_reserved if "graph" in mode else torch.cuda.max_memory_allocated
        row |= {"peak": peak(), "free_after": torch.cuda.mem_get_info()[0]}
        row["estimate"] = estimate_step(network, size, fewer, None)["peak"]
    return row


def train(
    network: int | str,
    settings: Sequence[Sequence[str]],
    dataset_dir: str,
    device: str = "cuda",
    batch_size: int | None = None,
    seconds: float = 2.0,
) -> None:
    """Measure one setting after the other; see :func:`measure_training`. Each is ``[precision, mode]``."""
    with tempfile.TemporaryDirectory() as folder:
        for number, (precision, mode) in enumerate(settings):
            row = measure_training(
                network, precision, mode, dataset_dir, f"{folder}/{number}", torch.device(device), batch_size, seconds
            )
            print(json.dumps(row), flush=True)
            gc.collect()
            if device.startswith("cuda"):
                torch.cuda.empty_cache()


def main(**asked: Any) -> None:
    """Do what is asked, and print what is measured."""
    if "run_id" in asked:
        from monai.bundle import run  # takes seconds

        run(**asked)
    else:
        train(**asked)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
