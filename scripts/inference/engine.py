"""Running a trained network over many scans: each once, over any number of processes, whatever some of them hold."""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers.tqdm_logger import ProgressBar
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import Evaluator
from monai.inferers import Inferer
from monai.transforms import Compose
from monai.utils import ensure_tuple
from scripts.data.datalist import list_sides
from scripts.data.reading import as_reason
from scripts.data.scan_grid import ScanGrid, field_of_view_differences, place_differences
from scripts.data.transforms import ScanError
from scripts.inference.job_report import write_job_report
from scripts.inference.layouts import ScanLayout
from scripts.inference.outputs import SaveFigured
from scripts.inference.reading import Failure, JobBatches, ReadOrFail, Scans
from scripts.inference.training_run import TrainingRun
from scripts.inference.writers import ResultWriters
from scripts.layers.gaussian import noise_from
from scripts.training.losses import bits_per_dim, negative_log_likelihood
from scripts.training.precision import autocast
from scripts.utils import distributed
from scripts.utils.devices import on_device, runs_ahead, to_host
from scripts.utils.errors import ExistsError, InputError
from scripts.utils.files import write_csv, write_text
from scripts.utils.names import image_files, image_path, item_files, item_path
from torch import Tensor

__all__ = ["Failures", "ScanEvaluator", "list_samples", "list_scans", "scan_generator"]

logger = logging.getLogger(__name__)


class Failures:
    """The scans of this run of which nothing came, with their reasons.

    Args:
        path: of a CSV file that lists them.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.found: list[Failure] = []

    def add(self, failure: Failure) -> None:
        self.found.append(failure)

    def everyone(self) -> list[Failure]:
        """Those of all processes, which all have to ask."""
        return sorted(set(itertools.chain(*idist.all_gather(self.found))))

    def finish(self) -> None:
        """Write the list and say what is in it, on rank 0 for all of them, and destroy the process group.

        Raises:
            SystemExit: with code 1, on every process, when there are any.
        """
        found = self.everyone()
        if idist.get_rank() == 0:
            if found:
                write_csv(self.path, Failure._fields, found)
                logger.error("%d scan(s) failed, see '%s'. The first, '%s': %s.", len(found), self.path, *found[0])
            else:
                self.path.unlink(missing_ok=True)
        distributed.stop()
        if found:
            sys.exit(1)


def list_scans(
    dataset_dir: str | os.PathLike,
    scan_pattern: str | Sequence[str] = "*.nii*",
    training_run: TrainingRun | None = None,
) -> list[dict[str, Any]]:
    """The scans of a folder, or all of a datalist's; its ``testing`` ones alone where it has such.

    Args:
        dataset_dir, scan_pattern: see :func:`scripts.data.datalist.make_datalist`.
        training_run: of whose own datalist the held-out scans are taken alone.

    Returns:
        ``[{"image": path, "subject": name, "session": name}, ...]``, the last where their names tell it.
    """
    sides, _, _ = list_sides(dataset_dir, scan_pattern)
    if sides.get("testing"):
        return sides["testing"]
    if training_run is not None and dataset_dir == training_run.datalist:
        return sides.get("validation", [])
    return [item for side in sides.values() for item in side]


def list_samples(output_dir: str | os.PathLike, count: int) -> list[dict[str, str]]:
    """Names for scans to be drawn, numbered from 1; their noise follows from the name.

    Raises:
        ValueError: when ``count`` is less than 1.
    """
    if count < 1:
        raise InputError(f"samples is {count}: set --samples to 1 or more.")
    return [{"image": str(Path(output_dir) / f"{number:04d}")} for number in range(1, count + 1)]


def scan_generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers of a scan that depend on the run's seed and the scan's path in its data set alone.

    They are drawn on the device: by one CPU core they would take longer than the network does on a GPU. Devices of two
    kinds draw other numbers.
    """
    state = np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))


def _identity(value: Any) -> Any:
    """A setting as JSON can hold it; a file is its checksum."""
    if isinstance(value, str | os.PathLike) and Path(value).is_file():
        return f"crc32 {zlib.crc32(Path(value).read_bytes()):08x}"
    return json.loads(json.dumps(value, default=str))


class _Written(NamedTuple):
    """What came of writing a scan's results: why that failed, and what is to be said of them."""

    failure: Failure | None
    warning: str | None


class ScanEvaluator(Evaluator):
    """A MONAI evaluator for one job: it applies an inferer to every scan and a postprocessing to each result.

    A scan whose results are there already is left alone. One that cannot be read, or whose results cannot be made, is
    noted and the others continue. With several processes each takes its share.

    Args:
        job: its name; ``<job>.json`` in ``output_dir`` says with what its results were made.
        output_dir: folder of the results, made if need be.
        settings: on which the results of this job depend; files among them by their content. The arguments of the
            network, ``seed``, ``amp`` and ``amp_dtype`` are added.
        shared_settings: on which those of every job depend, such as the checkpoint.
        device: of the network.
        dataset: with preprocessing; its items hold ``image``, ``[channels, *spatial]``.
        network: the network.
        inferer: see :mod:`scripts.inference.inferers`; takes a batch of images and gives a dictionary of batches.
        postprocessing: takes the item of one scan, the inferer's results among it, and saves what is wanted.
        layouts: of the results; a scan is finished when all of them exist.
        failures: where scans that failed are noted.
        inputs: makes the inferer's inputs of a list of items; the stack of their images by default.
        arguments: makes further arguments of the inferer by name, likewise.
        grid: how the training scans lay on the network's grid; a warning names scans that lie otherwise.
        unlikely_above: bits per dim above which a warning names a scan; None: not known.
        summary: is called at the end, on one process, with the names of all scans.
        describe: is called at the start, on one process, with the name of the job.
        batch_size, num_workers: of the data loader.
        writers: processes that write results while the network goes on; 0 writes them in between.
        overwrite: make results again that are there.
        seed: of the noise; each scan has its own, whatever its batch or process.
        amp, amp_dtype: mixed precision.
        val_handlers: Ignite handlers.
    """

    def __init__(
        self,
        job: str,
        output_dir: str | os.PathLike,
        settings: Mapping[str, Any],
        device: torch.device | str,
        dataset: Dataset,
        network: torch.nn.Module,
        inferer: Inferer,
        postprocessing: Callable,
        layouts: Sequence[ScanLayout],
        failures: Failures,
        inputs: Callable[[Sequence[dict]], Any] | None = None,
        arguments: Callable[[Sequence[dict]], dict[str, Any]] | None = None,
        grid: ScanGrid | None = None,
        unlikely_above: float | None = None,
        summary: Callable[[Sequence[str]], object] | None = None,
        describe: Callable[[str], object] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        writers: int = 0,
        overwrite: bool = False,
        seed: int = 0,
        amp: bool = False,
        amp_dtype: torch.dtype | None = None,
        val_handlers: Sequence | None = None,
        shared_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.job, self.output_dir = job, Path(output_dir)
        own = {"network_def": network.arguments, "seed": seed, "amp": amp, "amp_dtype": amp_dtype}
        self.settings = {**(shared_settings or {}), **settings, **own}
        self.dataset, self.layouts, self.overwrite = dataset, layouts, overwrite
        self._check_names()
        # one process says what is left to do: another might begin to write while this one still looks
        pending = distributed.from_rank_zero(
            lambda: [i for i, item in enumerate(dataset.data) if not self.finished(item)]
        )
        share = pending[idist.get_rank() :: idist.get_world_size()]
        loader = DataLoader(ReadOrFail(dataset, share), batch_size=batch_size, num_workers=num_workers, collate_fn=list)
        batches = on_device(JobBatches(loader, inputs, arguments), device)
        super().__init__(device, batches, epoch_length=len(loader), amp=amp, decollate=False, val_handlers=val_handlers)
        self.pending, self.remaining = len(pending), len(share)
        self.network, self.inferer = network, inferer
        self.results_of = postprocessing if isinstance(postprocessing, Compose) else Compose(postprocessing)
        self.failures, self.summary, self.describe = failures, summary, describe
        self.writers = ResultWriters(self._write, min(writers, len(share)), self._note)
        self._computed: tuple[list[dict], Callable[[], dict[str, Tensor]]] | None = None
        self.grid, self.unlikely_above = grid, unlikely_above
        self.seed, self.amp_dtype = seed, amp_dtype
        if idist.get_rank() == 0:
            bar = ProgressBar(
                persist=True, bar_format="{desc}[{n_fmt}/{total_fmt}] {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
            )
            bar.attach(self, event_name=Events.ITERATION_COMPLETED)

    def finished(self, item: Mapping[str, Any]) -> bool:
        """Whether all results of a scan are there, and none is older than a file of the scan or its mask."""
        if self.overwrite:
            return False
        try:
            results = [path for layout in self.layouts for path in layout.paths(item)]
        except ScanError:
            return False  # that it has no place will be said when it is its turn
        if not all(path.exists() for path in results):
            return False
        # copying a file keeps one of its two times
        sources = [path for path in (*ensure_tuple(item["image"]), item.get("mask")) if path is not None]
        scans = [Path(path).stat() for path in sources if Path(path).exists()]
        changed = max((max(status.st_mtime, status.st_ctime) for status in scans), default=0.0)
        return min(path.stat().st_mtime for path in results) >= changed

    def _check_names(self) -> None:
        """Refuse scans whose results would have one name, such as those of ``a.nii`` and ``a.mha``."""
        layout, seen = self.layouts[0], dict[Path, str]()
        for name in (name for item in self.dataset.data for name in layout.names(item_files(item))):
            try:
                path = layout.path(name)
            except ScanError:
                continue
            if path in seen:
                raise InputError(
                    f"'{seen[path]}' and '{name}' would both be written to '{path}': choose one of them by "
                    "--scan_pattern, or rename one."
                )
            seen[path] = name

    def run(self) -> None:
        """Go over the scans that are not finished, then make the summary.

        Raises:
            FileExistsError: when there are results made with other settings.
        """
        if idist.get_rank() == 0:
            self._note_settings()
            if self.describe is not None:
                self.describe(self.job)
        idist.barrier()
        total = len(self.dataset.data)
        if idist.get_rank() == 0 and self.pending < total:
            logger.info("Of %d scans, %d are finished already.", total, total - self.pending)
        if self.remaining:
            with self.writers:
                super().run()
                self._write_computed()
        failed = self.failures.everyone()  # a barrier, too
        if idist.get_rank() == 0:
            scans = [item_path(item) for item in self.dataset.data]
            if self.summary is not None:
                self.summary(scans)
            self._report(scans, failed)
            logger.info("Results of %d of %d scan(s): '%s'.", total - len(failed), total, self.output_dir)

    def _report(self, scans: Sequence[str], failed: Sequence[Failure]) -> None:
        """Write the page about the results."""
        drawn = [t.layout for t in self.results_of.transforms if isinstance(t, SaveFigured) and t.enabled]
        write_job_report(self.job, self.output_dir, scans, self.layouts, drawn, self.settings, failed)

    def _relative(self, name: str) -> str:
        try:
            return self.layouts[0].relative(name)
        except ScanError:  # it has no place, as will be said when its results are written
            return name

    def _note_settings(self) -> None:
        """Refuse to mix results of different settings; leave those of this run beside its results."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        path = self.output_dir / f"{self.job}.json"
        known = {name: _identity(value) for name, value in self.settings.items()}
        if path.exists() and not self.overwrite:
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in known if name in before and before[name] != known[name]]
            if changed:
                raise ExistsError(
                    f"output_dir '{self.output_dir}' holds results of '{self.job}' made with another "
                    f"{', '.join(changed)}: set --output_dir to another folder, or --overwrite True to make them again."
                )
        write_text(path, json.dumps(known, indent=2) + "\n")

    def _iteration(self, engine: Engine, batchdata: tuple[Scans, Any, dict[str, Any]]) -> dict[str, Any]:
        scans, inputs, arguments = batchdata
        for failure in scans.failures:
            self.failures.add(failure._replace(image=self._relative(failure.image)))
        if not scans.items:
            return {}
        for item in scans.items:
            for key in ("image", "second"):
                self._warn_of_place(item.get(key))
        device = self.state.device
        generators = [scan_generator(self.seed, self._relative(item["name"]), device) for item in scans.items]
        with self.mode(self.network), autocast(device, self.amp, self.amp_dtype), noise_from(generators):
            results = self.inferer(inputs, self.network, **arguments)
        before, self._computed = self._computed, (scans.items, to_host({k: v.float() for k, v in results.items()}))
        if before is not None:
            self._add(*before)  # while a GPU computes this batch
        if not runs_ahead(device):
            self._write_computed()
        return {}

    def _write_computed(self) -> None:
        """Let the last batch's results be written."""
        computed, self._computed = self._computed, None
        if computed is not None:
            self._add(*computed)

    def _add(self, items: Sequence[dict], results: Callable[[], dict[str, Tensor]]) -> None:
        values = results()
        for position, item in enumerate(items):
            # a copy: what is sent to another process would else be the whole batch
            own = {key: _like(value[position].clone(), item.get("image")) for key, value in values.items()}
            self.writers.add({**item, **own})

    def _write(self, item: Mapping[str, Any]) -> _Written:
        """Write the results of a scan, perhaps in another process."""
        warning = self._unlikely(item)
        try:
            self.results_of(item)
        except RuntimeError as error:
            if not isinstance(error.__cause__, ScanError):
                raise
            reason = as_reason(str(error.__cause__), image_files(item.get("image")))
            return _Written(Failure(self._relative(item["name"]), reason), warning)
        return _Written(None, warning)

    def _note(self, written: _Written) -> None:
        if written.warning is not None:
            logger.warning("%s", written.warning)
        if written.failure is not None:
            self.failures.add(written.failure)

    def _warn_of_place(self, image: Any) -> None:
        """Name a scan that does not lie on the network's grid as the training scans did."""
        geometry = image.meta.get("geometry") if isinstance(image, MetaTensor) else None
        if geometry is not None:
            found = place_differences(self.grid, geometry, image.affine.numpy(), image.shape[1:])
            for difference in [*found, *field_of_view_differences(self.grid, geometry)]:
                logger.warning("'%s': %s.", image_path(image), difference)

    def _unlikely(self, item: Mapping[str, Any]) -> str | None:
        """A sentence that names a scan which is far less likely than the cohort's."""
        if self.unlikely_above is None:
            return None
        if "bits_per_dim" in item:
            found = float(item["bits_per_dim"])
        elif self.job == "reconstruct" and self.settings["levels"] in (None, "each"):
            # without the KL divergence, which would only add to it
            image, loc, scale = (item[key].as_tensor() for key in ("image", "recon", "scale"))
            nll = negative_log_likelihood(loc[None], scale[None], image[None])
            found = float(bits_per_dim(nll, image[None]))
        else:
            return None
        if found <= self.unlikely_above:
            return None
        return (
            f"'{item['name']}' is unlike the scans that the network was trained on ({found:.2f} bits per dim; above "
            f"{self.unlikely_above:.2f} is far outside), so that no result of it means much. Is it another contrast, "
            "not skull-stripped, or not aligned as they are? `python -m scripts.check` looks at it, `python -m "
            "scripts.prepare` mends it."
        )


def _like(value: Tensor, image: Any) -> Tensor:
    """A result that lies on the scan's grid, with the scan's affine, name and trace."""
    if not isinstance(image, MetaTensor) or value.shape[1:] != image.shape[1:] or value.ndim != image.ndim:
        return value
    return MetaTensor(value).copy_meta_from(image)
