"""Inference on a device: one process of benchmarks.gpu.

    python -m benchmarks.gpu_jobs '{"network": "default", "precision": "bf16", "device": "cuda"}'
    python -m benchmarks.gpu_jobs '{"run_id": "sample", "config_file": "configs/inference.json"}'

times the network's part of each job, on random scans, or runs a job of the bundle as ``python -m monai.bundle run``
does, which needs the package fire besides.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from benchmarks.common import network_def, synchronize
from benchmarks.gpu_training import PRECISIONS
from benchmarks.memory import JOBS, estimate_job
from scripts.networks import VDVAE
from scripts.training.precision import autocast


@torch.no_grad()
def measure(network: int | str, precision: str, device: torch.device, seconds: float = 1.0) -> list[dict[str, Any]]:
    """Time each job's inferer on one scan.

    Returns:
        for each ``job``: ``seconds`` of a scan and, where the device is a GPU, ``peak`` and ``estimate`` of the memory
        in bytes; or ``error``.
    """
    torch.manual_seed(0)
    amp, dtype = PRECISIONS[precision]
    model = VDVAE(**network_def(network)).eval().to(device)
    scan = torch.rand(1, 1, *model.spatial_shape, device=device) * 2 - 1
    rows = []
    for job, make in JOBS.items():
        row: dict[str, Any] = {"network": network, "precision": precision, "job": job}
        inferer, inputs = make(), 1 if job == "sample" else scan
        try:
            calls, start = -1, 0.0  # the first is not timed
            while calls < 1 or time.perf_counter() - start < seconds:
                if calls == 0:
                    start = time.perf_counter()
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                with autocast(device, amp, dtype):
                    inferer(inputs, model, mask=scan > 0)
                synchronize(device)
                calls += 1
            row["seconds"] = (time.perf_counter() - start) / calls
            if device.type == "cuda":
                row |= {"peak": torch.cuda.max_memory_allocated()}
                row |= {"estimate": estimate_job(job, network, "fp32" if precision == "fp32" else "bf16")}
        except RuntimeError as error:  # memory that is not there
            row["error"] = str(error).strip().split("\n")[0][:200]
        rows.append(row)
    return rows


def main(**settings: Any) -> None:
    """Measure, or run a job of the bundle, by what is asked."""
    if "run_id" in settings:
        from monai.bundle import run  # takes seconds

        run(**settings)
        return
    for row in measure(**settings | {"device": torch.device(settings["device"])}):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
