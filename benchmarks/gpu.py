"""What this machine's GPU does with the bundle: tests, training steps, memory, jobs, resuming. Ten minutes at most.

    python -m scripts.phantoms brains --output_dir brains --count 16        # where nilearn is, and then
    python -c "import shutil; shutil.make_archive('brains', 'zip', 'brains')"
    python -m benchmarks.gpu --dataset_dir brains.zip --output_dir OUT      # where the GPU is

It asks for no network, and beside PyTorch with its companions (NumPy, SciPy, joblib, matplotlib, tqdm, filelock,
TensorBoard) only for monai, pytorch-ignite and nibabel. What is most important comes first; what the minutes do not
reach is said. ``OUT/gpu.json`` has every number, ``OUT/gpu.md`` tables of them for docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from torch import Tensor

from benchmarks.common import CONFIGS, seconds, synchronize
from benchmarks.memory import GIB
from scripts.inference.tables import markdown_lines
from scripts.utils.files import write_text

ROOT = CONFIGS.parent
NETWORKS = ("default", "lean_64", "lean_128", 256)
# by what a user would choose
SETTINGS = [["bf16", "eager"], ["fp32", "eager"], ["bf16", "graph"], ["fp16", "eager"], ["fp32", "graph"]]
Command = tuple[Sequence[str], dict[str, Any]]  # words after "python", and settings
MODULE = ["-m", "benchmarks.gpu_process"]


class Clock:
    """The minutes that are left, and the processes that are started within them."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def run(self, words: Sequence[str], **settings: Any) -> dict[str, Any]:
        """Start Python with these words, and wait until it ends or the time does.

        Args:
            words: of the command.
            settings: given as JSON after them, if there are any.

        Returns:
            ``seconds``; ``rc``, the exit status, None where time was up; ``lines`` of its output that are JSON; and
            ``said``, the end of what it wrote to standard error.
        """
        left = self.end - time.monotonic()
        if left < 5:
            return {"seconds": 0.0, "rc": None, "lines": [], "said": "The minutes were over."}
        command = [sys.executable, *words, *([json.dumps(settings)] if settings else [])]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        start = time.monotonic()
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as out,
            tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        ):
            try:
                rc = subprocess.run(command, stdout=out, stderr=err, cwd=ROOT, env=environment, timeout=left).returncode
            except subprocess.TimeoutExpired:
                rc = None
            out.seek(0)
            err.seek(0)
            printed, said = out.read(), err.read()
        lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"')]
        return {"seconds": time.monotonic() - start, "rc": rc, "lines": lines, "said": said[-2000:]}

    def side_by_side(self, commands: Mapping[str, Command]) -> dict[str, dict[str, Any]]:
        """What :meth:`run` gives for several commands, words and settings of each, that are started at once."""
        with ThreadPoolExecutor(len(commands)) as pool:
            runs = {name: pool.submit(self.run, words, **settings) for name, (words, settings) in commands.items()}
        return {name: run.result() for name, run in runs.items()}


def describe(device: str) -> dict[str, Any]:
    """The device, its software, and the rate of its matrix products in TFLOP/s by precision."""
    size = 8192 if device == "cuda" else 128
    about: dict[str, Any] = {"device": device, "torch": torch.__version__, "matrices": size}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {"device": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
        about["cudnn"] = torch.backends.cudnn.version()
    rates = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)

        def product(a: Tensor = a, b: Tensor = b) -> None:
            a @ b
            synchronize(a.device)

        rates[precision] = 2e-12 * size**3 / statistics.median(seconds(product) for _ in range(10))
    return about | {"matmul": rates}


def make_masks(scans: str, folder: Path) -> str:
    """Mark a box of each scan as missing."""
    for path in sorted(Path(scans).rglob("*.nii.gz")):
        image = nibabel.load(path)
        mask = np.zeros(image.shape[:3], np.uint8)
        mask[tuple(slice(size // 3, size // 2) for size in mask.shape)] = 1
        target = folder / "masks" / path.relative_to(scans)
        target.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(mask, image.affine), target)
    return str(folder / "masks")


def job_commands(scans: str, folder: Path, device: str, changes: Mapping[str, Any]) -> dict[str, Command]:
    """Each inference job of the bundle as a user starts it, with the weights that come with it."""
    common = {"config_file": "configs/inference.json", "device": f"$torch.device('{device}')", "amp": True, **changes}
    special = {
        "decode": {"dataset_dir": str(folder / "encode")},
        "decode_coordinates": {"coordinates": str(folder / "encode/coordinates.csv")},
        "impute": {"mask_dir": make_masks(scans, folder)},
    }
    jobs = ("reconstruct", "encode", "decode", "decode_coordinates", "sample", "score", "impute", "interpolate")
    settings = {"dataset_dir": scans, **common}
    return {
        job: (MODULE, {**settings, "run_id": job, "output_dir": str(folder / job), **special.get(job, {})})
        for job in jobs
    }


def training_commands(scans: str, folder: Path, device: str, changes: Mapping[str, Any]) -> dict[str, Command]:
    """Two epochs at once, the same with a stop between, and by torchrun."""
    common = {"run_id": "training", "dataset_dir": scans, "num_workers": 2}
    common |= {"device": f"$torch.device('{device}')", "prior_factors": 4, "figure_interval": 0, "augment": False}
    # without augmentations that need TorchIO
    common |= {"augmentation": {}, "config_file": ["configs/train.json"], "train_fraction": 0.75, "batch_size": 2}
    common |= changes

    def settings(run: str, epochs: int, **more: Any) -> dict[str, Any]:
        folders = {"output_dir": str(folder / run), "cache_dir": str(folder / run / "cache")}
        return {**common, **folders, "epochs": epochs, **more}

    commands = {
        "two epochs": (MODULE, settings("whole", 2)),
        "one epoch": (MODULE, settings("parts", 1)),
        "resumed": (MODULE, settings("parts", 2, resume=True)),
    }
    if device == "cuda":
        several = settings("nccl", 1, config_file=[*common["config_file"], "configs/multi_gpu_train.json"])
        several.pop("device")  # each process has its own
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
        commands["torchrun, NCCL"] = ([*torchrun, *MODULE], several)
    return commands


def largest_difference(folder: Path) -> float | None:
    """How much the weights of a run that was stopped and resumed differ at most from those of one that was not."""
    paths = [folder / run / "checkpoints/model.pt" for run in ("whole", "parts")]
    if not all(path.is_file() for path in paths):
        return None
    whole, parts = (torch.load(path, map_location="cpu", weights_only=True) for path in paths)
    return max((whole[name].double() - parts[name].double()).abs().max().item() for name in whole)


def run_checks(
    clock: Clock, scans: str, folder: Path, device: str, inference: Mapping[str, Any], training: Mapping[str, Any]
) -> dict[str, Any]:
    """The tests, each job and training runs, side by side; what goes on from another's results after it."""
    jobs, runs = job_commands(scans, folder, device, inference), training_commands(scans, folder, device, training)
    later = ("decode", "decode_coordinates", "resumed")
    commands = {"tests": (["-m", "unittest", "discover", "-s", "tests/gpu"], {}), **jobs, **runs}
    found = clock.side_by_side({name: command for name, command in commands.items() if name not in later})
    found |= clock.side_by_side({name: commands[name] for name in later})
    found["resumed"]["largest_difference"] = largest_difference(folder)
    return {
        "tests": found["tests"],
        "jobs": {name: found[name] for name in jobs},
        "runs": {name: found[name] for name in runs},
    }


def tables(found: dict[str, Any]) -> str:
    """Everything as Markdown."""
    about = found["about"]
    rates = ", ".join(f"{rate:.1f} TFLOP/s in {name}" for name, rate in about["matmul"].items())
    text = [f"{about['device']}, PyTorch {about['torch']}; products of matrices of {about['matrices']}²: {rates}.", ""]
    rows = []
    for row in found["training"]:
        rows.append([str(row["network"]), str(row.get("batch_size", "")), f"{row['precision']}, {row['mode']}"])
        if "error" in row:
            rows[-1] += [row["error"], "", ""]
            continue
        share = row["tflops"] / about["matmul"][row["precision"]]
        memory = f"{row['peak'] / GIB:.2f}, {row['estimate'] / GIB:.2f}" if "peak" in row else ""
        rows[-1] += [f"{row['scans_per_second']:.1f}", f"{share:.1%}", memory]
    columns = ("network", "scans per update", "precision, mode", "scans per second", "share of matmul")
    text += [*markdown_lines([*columns, "peak, estimate (GiB)"], rows), ""]
    rows = []
    for name, run in {**found["jobs"], **found["runs"]}.items():
        off = run.get("largest_difference")
        more = "" if off is None else f"largest difference of a weight: {off:.2g}"
        more = more if run["rc"] == 0 else reason(run)
        rows.append([name, "-" if run["rc"] is None else str(run["rc"]), f"{run['seconds']:.1f}", more])
    text += markdown_lines(("command, all side by side", "exit status", "seconds, start included", ""), rows)
    text += ["", f"tests/gpu: exit status {found['tests']['rc']}, {reason(found['tests'])}"]
    return "\n".join(text) + "\n"


def main(
    dataset_dir: str,
    output_dir: str,
    device: str = "cuda",
    minutes: float = 10.0,
    networks: Sequence[int | str] = NETWORKS,
    inference: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure all, and write it down.

    Args:
        dataset_dir: 8 scans or more, a folder or a ZIP file.
        output_dir: for ``gpu.json`` and ``gpu.md``.
        device: ``cuda``; ``cpu`` tries all of it without one.
        minutes: after which nothing more is started, and what runs is ended.
        networks: see :func:`benchmarks.common.training_config`.
        inference, training: other settings of the jobs and of the training runs.

    Returns:
        what is written.
    """
    clock, target = Clock(minutes), Path(output_dir)
    target.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"about": describe(device), "training": []}

    def keep() -> None:
        write_text(target / "gpu.json", json.dumps(found, indent=1))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scans = dataset_dir
        if dataset_dir.endswith(".zip"):
            scans = str(folder / "brains")
            shutil.unpack_archive(dataset_dir, scans)
        found |= run_checks(clock, scans, folder, device, inference or {}, training or {})
        keep()
        for network in networks:
            asked = {"network": network, "settings": SETTINGS, "dataset_dir": scans, "device": device}
            asked["seconds"] = 2.0 if device == "cuda" else 0.0
            run = clock.run(MODULE, **asked)
            missing = [
                {"network": network, "precision": precision, "mode": mode, "error": reason(run)}
                for precision, mode in SETTINGS[len(run["lines"]) :]
            ]
            found["training"] += run["lines"] + missing
            keep()
    text = tables(found)
    write_text(target / "gpu.md", text)
    print(text)
    return found


def reason(run: dict[str, Any]) -> str:
    """The last line of what a process wrote: why it did not do all that it was asked for."""
    return (run["said"].strip().split("\n")[-1] or "it ended early")[:200]


if __name__ == "__main__":
    # not Fire, which a machine with a GPU may lack
    arguments = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    arguments.add_argument("--dataset_dir", required=True, help="scans, a folder or a ZIP file")
    arguments.add_argument("--output_dir", required=True, help="for gpu.json and gpu.md")
    arguments.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tries all of it without a GPU"
    )
    arguments.add_argument("--minutes", type=float, default=10.0, help="at most")
    asked = arguments.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("Error: PyTorch sees no GPU here: --device cpu tries all of it without one.")
    main(**vars(asked))
