"""What each job of inference takes per scan: processor time, peak memory of the process, size of its results.

    python -m benchmarks.jobs --dataset_dir DIR --config_file "['configs/inference.json','configs/people_128.json']"

Jobs run one after another in this process, which reads and writes too (no workers), so that processor time and memory
are all that a job takes. The peak is of the resident memory, which is reset before each job (Linux).
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from benchmarks.common import print_table, read_config
from scripts.data.datalist import list_sides
from scripts.utils.command_line import run
from scripts.utils.files import write_text

JOBS = (
    "reconstruct",
    "encode",
    "decode",
    "sample",
    "interpolate",
    "score",
    "impute",
    "counterfactual",
    "deviation",
    "predict_covariates",
)
MASKED = 30.0  # mm, the edge of the cube that impute fills


def cpu_seconds() -> float:
    """Processor time of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def reset_peak() -> None:
    """Let the peak of the resident memory be that of now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_gib() -> float:
    """The largest resident memory since :func:`reset_peak`, in GiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def write_masks(scans: Sequence[str], folder: Path) -> None:
    """A cube in the middle of each scan, as its mask."""
    folder.mkdir()
    for path in scans:
        image = nib.load(path)
        mask = np.zeros(image.shape[:3], np.uint8)
        half = [round(MASKED / 2 / size) for size in image.header.get_zooms()[:3]]
        mask[tuple(slice(n // 2 - h, n // 2 + h) for n, h in zip(mask.shape, half, strict=True))] = 1
        nib.save(nib.Nifti1Image(mask, image.affine), folder / Path(path).name)


def measure(job: str, config_file: str | Sequence[str], folder: Path, count: int, **settings: Any) -> list[str]:
    """A row of the table: processor seconds, GiB, and MB of results per scan."""
    parser = read_config(config_file, output_dir=str(folder), num_workers=0, batch_size=1, **settings)
    parser.get_parsed_content("common")  # the network is read, as it is once for a job
    reset_peak()
    start, wall = cpu_seconds(), time.perf_counter()
    parser.get_parsed_content(job)
    used, wall = cpu_seconds() - start, time.perf_counter() - wall
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return [job, f"{used / count:.3g}", f"{wall / count:.3g}", f"{peak_gib():.1f}", f"{written / count / 1e6:.3g}"]


def main(
    dataset_dir: str,
    config_file: str | Sequence[str] = "configs/inference.json",
    scans: int = 2,
    jobs: Sequence[str] = JOBS,
    **settings: Any,
) -> None:
    """Print a table.

    Args:
        dataset_dir: a folder or a datalist, whose first scans are taken.
        config_file: of the bundle, one or a list.
        scans: how many.
        jobs: some of them; decode needs encode before it.
        settings: other values of keys of the config.
    """
    sides = list_sides(dataset_dir)[0].values()
    paths = [str(Path(item["image"]).resolve()) for side in sides for item in side][:scans]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_masks(paths, folder / "masks")
        write_text(folder / "list.json", json.dumps({"training": [{"image": path} for path in paths]}))
        own = {
            "sample": {"samples": len(paths)},
            "decode": {"dataset_dir": str(folder / "encode")},
            "impute": {"mask_dir": str(folder / "masks")},
            "counterfactual": {"covariates": {"age": 75}},
        }
        given = {job: {"dataset_dir": str(folder / "list.json"), **own.get(job, {}), **settings} for job in jobs}
        rows = (measure(job, config_file, folder / job, len(paths), **given[job]) for job in jobs)
        print_table(("job", "processor seconds per scan", "seconds", "peak GiB", "MB written per scan"), rows)


if __name__ == "__main__":
    run("python -m benchmarks.jobs", main)
