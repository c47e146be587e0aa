"""What jobs write, and the processes that do: volumes on a scan's own grid, figures, tables; whole or not at all."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, SplitDim, Transform
from scripts.data.transforms import ScanError
from scripts.inference.inferers import latents_up_to
from scripts.inference.layouts import ScanLayout
from scripts.layers.levels import grid_name
from scripts.networks import VDVAE
from scripts.utils import figures
from scripts.utils.distributed import ignore_signals
from scripts.utils.errors import ResourceError
from scripts.utils.files import write_text
from scripts.utils.formats import SPACE_CODE, save_nifti
from scripts.utils.names import image_files, image_path, printable
from scripts.utils.parallel import die_with_parent

logger = logging.getLogger(__name__)
ON_SHEET = 64  # samples
WAITING = 2  # results per process that may wait to be written
_OF_PROCESS: dict[str, Callable[[Any], Any]] = {}  # what a process of a pool writes with


class SaveScansd(MapTransform):
    """Write images as NIfTI, each named after its scan and its key.

    Args:
        keys: of the images, ``[channels, *spatial]``.
        layout: makes the layout of a key's files, which also says whether each channel has its own.

    Raises:
        ScanError: when each channel should have its own file, but the scan's files hold several channels.
    """

    def __init__(self, keys: KeysCollection, layout: Callable[[str], ScanLayout]) -> None:
        super().__init__(keys)
        self.layouts = {key: layout(key) for key in self.keys}

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            image, layout = data[key], self.layouts[key]
            files = image_files(image)
            for name, part in split_channels(image, layout.names(files)).items():
                layout.save(name, part, image.affine, files, image.meta.get(SPACE_CODE) or None)
        return data


def split_channels(image: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """An image, ``[channels, *spatial]``, by the name of its only file, or its channels by those of theirs."""
    if len(names) > 1 and len(names) != len(image):
        raise ScanError(
            f"The {len(names)} files of the scan of '{names[0]}' hold {len(image)} channels, so that results cannot be "
            "written one per file: set --join_channels True for one file with all of them."
        )
    parts = [image] if len(names) == 1 else SplitDim(dim=0)(image)
    return dict(zip(names, parts, strict=True))


class SaveFigured(Transform):
    """Draw a scan's result as PNG, on the network's grid.

    Args:
        layout: says where.
        draw: ``draw(path, data, value_range)``, such as the functions of this module.
        value_range: what black and white stand for.
        enabled: False draws nothing.
    """

    def __init__(
        self, layout: ScanLayout, draw: Callable[..., object], value_range: Sequence[float], enabled: bool = True
    ) -> None:
        self.layout, self.draw, self.value_range, self.enabled = layout, draw, tuple(value_range), enabled

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        if self.enabled:
            self.draw(self.layout.filename(image_path(data["image"])), data, self.value_range)
        return data


def draw_reconstruction(path: str, data: Mapping[Hashable, Any], value_range: tuple[float, float]) -> None:
    """A scan beside its reconstruction, the predicted standard deviation and the difference."""
    titles = file_names(data["image"])
    figures.reconstructions(path, [data["image"]], [data["recon"]], [data["scale"]], [titles], value_range)


def file_names(image: MetaTensor) -> list[str]:
    """The name of a scan's file, or of its channels' files, for figures."""
    return [printable(Path(file).name) for file in image_files(image)]


def draw_levels(path: str, data: Mapping[Hashable, Any], value_range: tuple[float, float]) -> None:
    """A scan's reconstructions from the coarsest level alone to all of them."""
    keys = [key for key in map(str, data) if key.startswith("recon_to")]  # in the order in which they were made
    dims = data["image"].ndim - 1
    grids = [key.removeprefix("recon_to").split("x") for key in keys]
    labels = [f"to {grid_name(grid if len(grid) > 1 else grid * dims)}" for grid in grids]
    scans, guide = [*(data[key] for key in keys), data["image"]], data["image"]
    figures.strip(path, scans, [*labels, "scan"], value_range, guide, file_names(guide))


def draw_anomaly(path: str, data: Mapping[Hashable, Any], value_range: tuple[float, float]) -> None:
    """A scan beside its restoration and its anomaly map."""
    numbers = f"{float(data['bits_per_dim']):.3f} bits per dim, score {float(data['anomaly_score']):.1f}"
    titles = [f"{name}, {numbers}" for name in file_names(data["image"])]
    figures.anomaly(path, data["image"], data["restored"], data["anomaly"], titles, value_range)


TRUE_OR_FALSE = ("familiar",)  # numbers of a scan that are 0 or 1, and words in tables


class SaveJson(Transform):
    """Write something of a scan as JSON, which :func:`read_rows` reads.

    Args:
        layout: says where.
        content: of a scan's results, plain values; None writes nothing, and removes what an earlier run wrote.
    """

    def __init__(self, layout: ScanLayout, content: Callable[[Mapping[Hashable, Any]], Mapping | None]) -> None:
        self.layout, self.content = layout, content

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        content, scan = self.content(data), image_path(data["image"])
        if content is None:
            self.layout.path(scan).unlink(missing_ok=True)
        else:
            write_text(self.layout.filename(scan), json.dumps(content) + "\n")
        return data


def read_rows(layout: ScanLayout, scans: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What :class:`SaveJson` wrote of these scans, of those of which there is something, one at a time."""
    files = ((scan, layout.path(scan)) for scan in scans)
    return ((scan, json.loads(file.read_text(encoding="utf-8"))) for scan, file in files if file.exists())


def scan_numbers(data: Mapping[Hashable, Any]) -> dict[str, float | str]:
    """The numbers of a scan by name, and words for what is true or not; a row of a table."""
    numbers = {k: v for k, v in data.items() if isinstance(v, torch.Tensor) and v.ndim == 0}
    # as many digits as there are: nats of large scans come in double precision
    digits = {k: 12 if v.dtype == torch.float64 else 7 for k, v in numbers.items()}
    return {
        k: ("no", "yes")[int(v)] if k in TRUE_OR_FALSE else float(f"{v.item():.{digits[k]}g}")
        for k, v in numbers.items()
    }


class SaveSampled(Transform):
    """Write a scan that was drawn from the model, whose grid has this affine, as NIfTI, its intensities from 0
    (background) to 1.
    """

    def __init__(self, layout: ScanLayout, affine: torch.Tensor, value_range: Sequence[float]) -> None:
        self.layout, self.affine, self.value_range = layout, affine, value_range

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        sample = from_zero_to_one(data["sample"], self.value_range)
        for name, part in split_channels(sample, self.layout.names([data["image"]])).items():
            save_nifti(self.layout.filename(name), part, self.affine)
        return data


def from_zero_to_one(scan: torch.Tensor, value_range: Sequence[float]) -> torch.Tensor:
    """What the network predicts as intensities from 0 (background) to 1."""
    low, high = value_range
    return ((scan - low) / (high - low)).clamp(0, 1)


def sample_sheet(path: str | os.PathLike, layout: ScanLayout, scans: Sequence[str]) -> None:
    """Show the first samples on one sheet, channels below each other in the order of their names."""
    images, titles = [], []
    for scan in scans[:ON_SHEET]:
        files = layout.paths({"image": scan})
        if not all(file.exists() for file in files):
            continue
        arrays = [np.atleast_3d(nib.load(file).get_fdata(dtype=np.float32)) for file in files]
        images.append(np.concatenate([np.moveaxis(a, -1, 0) if a.ndim == 4 else a[None] for a in arrays]))
        titles.append(" above ".join(file.name.split(".")[0] for file in files))
    figures.batch(path, images, titles, value_range=(0, 1))


def report_latents(network: VDVAE, written: int) -> None:
    """Log how many numbers the latents of a scan are, level by level, beside those of its voxels; how large files are
    that have so many latents, the coarsest first, each with its mean and standard deviation.
    """
    voxels, channels = math.prod(network.spatial_shape), network.in_channels
    numbers, of = channels * voxels, f"{voxels} voxels" + (f" in {channels} channels" if channels > 1 else "")
    for level in sorted(set(network.latent_levels), reverse=True):
        count = sum(map(math.prod, network.latent_grids()[: latents_up_to(network, level)]))
        logger.info(
            "Latents of grids up to %s: %d numbers per scan, compression %.3g : 1 (of %s).",
            *(grid_name(network.grids()[level]), count, numbers / count, of),
        )
    values = sum(map(math.prod, network.latent_grids()[:written]))
    logger.info(
        "%d of %d latents of each scan are written, with their means and standard deviations: %.1f MB a scan.",
        *(written, network.num_latents, 3 * 4 * values / 1e6),
    )


class ResultWriters:
    """A context in which results are written by other processes, at its end all of them.

    Inverting the preprocessing and compressing a scan's results takes seconds on one core, of which much is Python:
    threads would share one core, and drawing and MONAI's inverse transforms are not made for them. The processes are
    forked, as those of a data loader are, so that nothing is sent but the results. On other systems than Linux, which
    cannot fork safely, results are written in this process.

    When an error ends the context, what is being written is finished, and what waits is not begun.

    Args:
        write: what is called on each result; it must not use a GPU.
        workers: processes; 0 writes in this one.
        done: is called in this process, in the order of the results, with what ``write`` returned.
    """

    def __init__(self, write: Callable[[Any], Any], workers: int, done: Callable[[Any], object]) -> None:
        self.write, self.done = write, done
        self.workers = workers if sys.platform == "linux" else 0
        self._pool: ProcessPoolExecutor | None = None
        self._begun: deque[Future] = deque()

    def add(self, result: Any) -> None:
        """Let a result be written, once fewer than ``WAITING`` per process wait; raises what writing it or an earlier
        one raised.
        """
        if self._pool is None:
            self.done(self.write(result))
            return
        while len(self._begun) >= WAITING * self.workers:
            self._finish_first()
        try:
            self._begun.append(self._pool.submit(_call, result))
        except BrokenProcessPool as error:
            raise _killed() from error

    def _finish_first(self) -> None:
        try:
            self.done(self._begun.popleft().result())
        except BrokenProcessPool as error:
            raise _killed() from error

    def __enter__(self) -> ResultWriters:
        if self.workers:
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(self.workers, context, _start, (self.write, os.getpid()))
            self._pool.submit(int)  # all are forked now, before a data loader has threads
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            while self._begun and kind is None:
                self._finish_first()
        finally:
            self._begun.clear()
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None


def _start(write: Callable[[Any], Any], parent: int) -> None:
    """Make a forked process ready: on one thread, since those of OpenMP do not survive a fork."""
    _OF_PROCESS["write"] = write
    torch.set_num_threads(1)
    ignore_signals()
    die_with_parent(parent)


def _call(result: Any) -> Any:
    return _OF_PROCESS["write"](result)


def _killed() -> OSError:
    return ResourceError(
        "A process that writes results was killed, most likely for want of memory: lower --num_workers. With 0, "
        "results are written by the process that runs the network."
    )
