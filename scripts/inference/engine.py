"""Running a trained network over many scans: each once, over any number of processes, whatever some of them hold."""

from __future__ import annotations

import itertools
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import Evaluator
from monai.inferers import Inferer
from monai.transforms import Compose
from scripts.data.scan_grid import field_of_view_differences, place_differences
from scripts.data.transforms import ScanError
from scripts.inference.common import Common, Failure
from scripts.inference.familiar import ANOTHER_SCANNER, Examiner
from scripts.inference.job_report import Report, write_job_report
from scripts.inference.layouts import ScanLayout
from scripts.inference.outputs import ResultWriters, SaveFigured
from scripts.inference.records import ASKED, SCANS, STRANGERS, identity, made_of, read_record, sources
from scripts.layers.gaussian import LatentSampler
from scripts.population.familiarity import FALSE_ALARMS, LEAST_ALIKE, Familiarity, look
from scripts.training.precision import autocast
from scripts.utils import distributed
from scripts.utils.devices import is_async, on_device, to_host
from scripts.utils.errors import BundleError, InputError, root_cause
from scripts.utils.files import write_text
from scripts.utils.formats import file_states
from scripts.utils.names import UNUSABLE, image_files, image_path, item_files, item_path
from torch import Tensor
from tqdm import tqdm

logger = logging.getLogger(__name__)

UNFAMILIARITY = "unfamiliarity"  # in a scan's results: its distance from what is usual, over the limit
# in errors of the machine, which end a job: no other scan would fare better
MACHINES = ("out of memory", "not enough memory", "CUDA error")


def scan_generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers of a scan that depend on the run's seed and the scan's path in its data set alone.

    They are drawn on the device: by one CPU core they would take longer than the network does on a GPU. Devices of two
    kinds draw other numbers.
    """
    state = np.random.SeedSequence([seed, zlib.crc32(os.fsencode(name))]).generate_state(1)
    return torch.Generator(device).manual_seed(int(state[0]))


def _stack_images(items: Sequence[Mapping[str, Any]]) -> Tensor:
    """The images of some items, ``[batch, channels, *spatial]``."""
    return torch.stack([item["image"].as_tensor() for item in items])


def read_item(dataset: Dataset, index: int) -> dict[str, Any]:
    """An item of a data set after its transforms, with its ``name``."""
    item = dataset.data[index]
    if UNUSABLE in item:
        raise ScanError(item[UNUSABLE])
    return {**dataset[index], "name": item_path(item)}


class ReadOrFail(torch.utils.data.Dataset):
    """Items of a data set, each with its ``name``, or a :class:`Failure` where one cannot be read."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any] | Failure:
        index = self.indices[position]
        try:
            return read_item(self.dataset, index)
        except Exception as error:  # whatever a scan holds, the others are done
            return Failure.of(self.dataset.data[index], error)


@dataclass
class Scans:
    """The scans of a batch, which stay on the host, and those that could not be read."""

    items: list[dict[str, Any]]
    failures: list[Failure]


Batch = tuple[Scans, Any, dict[str, Any]]  # the inferer's inputs and further arguments beside the scans


class ScanEvaluator(Evaluator):
    """A MONAI evaluator for one job: it applies an inferer to every scan and a postprocessing to each result.

    A scan whose results are there already is left alone. One that cannot be read, or whose results cannot be made, is
    noted and the others continue. With several processes each takes its share.

    Args:
        common: what all jobs share.
        job: its name; ``<job>.json`` in ``output_dir`` says with what its results were made.
        dataset: with preprocessing; its items hold ``image``, ``[channels, *spatial]``.
        inferer: see :mod:`scripts.inference.inferers`; takes a batch of images and gives a dictionary of batches.
        postprocessing: takes the item of one scan, the inferer's results among it, and saves what is wanted.
        layouts: of the results; a scan is finished when all of them exist.
        settings: on which the results of this job depend beside :meth:`Common.settings`; files by their content.
        inputs: makes the inferer's inputs of a list of items; the stack of their images by default.
        arguments: makes further arguments of the inferer by name, likewise.
        asks: whether the network knows such scans as the inferer gets: what becomes of others, ``common`` says.
        summary: is called at the end, on rank 0, with the names of all scans.
        report: what the page about the results shows.
    """

    def __init__(
        self,
        common: Common,
        job: str,
        dataset: Dataset,
        inferer: Inferer,
        postprocessing: Callable | Sequence[Callable],
        layouts: Sequence[ScanLayout],
        settings: Mapping[str, Any] | None = None,
        inputs: Callable[[Sequence[dict]], Any] = _stack_images,
        arguments: Callable[[Sequence[dict]], dict[str, Any]] = lambda items: {},
        asks: bool = False,
        summary: Callable[[Sequence[str]], object] = lambda scans: None,
        report: Report | None = None,
    ) -> None:
        # which scans are left to do is known when the job starts
        super().__init__(common.device, (), epoch_length=0, amp=common.precision.get("amp", False), decollate=False)
        self.common, self.job = common, job
        self.settings = {**common.settings(), **(settings or {})}
        self.dataset, self.network, self.inferer = dataset, common.network, inferer
        self.results_of = postprocessing if isinstance(postprocessing, Compose) else Compose(postprocessing)
        self.layouts, self.inputs, self.arguments = layouts, inputs, arguments
        self.summary, self.report = summary, report or Report()
        self.asks = asks
        self.familiarity = Familiarity.of(common.prior) if asks and common.unfamiliar != "allow" else None
        self._computed: tuple[list[dict], Callable[[], dict[str, Tensor]]] | None = None
        self._writers: ResultWriters | None = None
        self._strangers: dict[str, float] = {}
        self._told: dict[str, str] = {}  # of strangers that are not refused, what they may be
        self._record, self._asked = dict[str, Any](), dict[str, str]()
        self._bar = tqdm(disable=True)

    # what is left to do

    def finished(self, item: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
        """Whether all results of a scan are there, made of its files and covariates, none older than a file; ``record``
        says what each of the earlier ones was made of.
        """
        if self.common.overwrite or not self._has_results(item) or record.get(self._place(item)) != made_of(item):
            return False
        # copying a file keeps one of its two times; the folder of a series changes where a slice is removed
        paths = [path for path in map(Path, sources(item)) if path.exists()]
        states = [state for path in paths for state in file_states(path)]
        times = [*(max(state[2:]) for state in states), *(path.stat().st_mtime_ns for path in paths)]
        return min(path.stat().st_mtime_ns for path in self._result_paths(item)) >= max(times, default=0)

    def _unasked(self, item: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
        """Whether a scan has results of another --unfamiliar that this run's may not have, or says nothing of."""
        how = record.get(ASKED, {}).get(self._place(item), "warn")
        stays = how == self.common.unfamiliar or item_path(item) not in record.get(STRANGERS, {})
        return self.familiarity is not None and (how == "allow" or (self.common.unfamiliar == "refuse" and not stays))

    def _result_paths(self, item: Mapping[str, Any]) -> list[Path]:
        """The paths of all results of a scan; none where it has no place, as will be said when it is its turn."""
        return self._paths(item, [*self.layouts, *self._pictures(enabled=True)])

    def _paths(self, item: Mapping[str, Any], layouts: Sequence[ScanLayout]) -> list[Path]:
        try:
            return [path for layout in layouts for path in layout.paths(item)]
        except ScanError:
            return []

    def _pictures(self, enabled: bool) -> list[ScanLayout]:
        """Of a scan's figures, as far as they are drawn, or of all that an earlier run may have drawn."""
        drawn = [step for step in self.results_of.transforms if isinstance(step, SaveFigured)]
        return [step.layout for step in drawn if step.enabled or not enabled]

    def _has_results(self, item: Mapping[str, Any]) -> bool:
        paths = self._result_paths(item)
        return bool(paths) and all(path.exists() for path in paths)

    def _place(self, item: Mapping[str, Any]) -> str:
        """By what the record knows a scan: where its first result is in the folder of results."""
        return "".join(os.path.relpath(path, self.common.output_dir) for path in self._result_paths(item)[:1])

    def check_names(self) -> None:
        """Refuse scans whose results would have one name, as those of ``a.nii`` and ``a.mha``, or a scan's name."""
        scans = {os.path.realpath(file): file for item in self.dataset.data for file in sources(item)}
        layout, seen = self.layouts[0], dict[Path, str]()
        for item in self.dataset.data:
            results = map(os.path.realpath, self._result_paths(item))
            taken = next((scans[path] for path in results if path in scans), None)
            if taken is not None:
                raise InputError(
                    f"'{taken}' is one of the scans, and a result of '{item_path(item)}' would be written over it: set "
                    "--output_dir to another folder, or choose the scans by --scan_pattern."
                )
            for name in layout.names(item_files(item)):
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

    # the job

    def run(self) -> None:
        """Go over the scans that are not finished, then make the summary.

        Raises:
            FileExistsError: when there are results made with other settings.
            InputError: when results of two scans would have one name.
        """
        self.check_names()
        self.common.failures.jobs.add(self.job)
        # one process says what is left to do: another might begin to write while this one still looks
        pending = distributed.from_rank_zero(self._begin)
        total, share = len(self.dataset.data), pending[idist.get_rank() :: idist.get_world_size()]
        if idist.get_rank() == 0 and len(pending) < total:
            logger.info("Of %d scans, %d are finished already.", total, total - len(pending))
        if idist.get_rank() == 0 and pending:
            prior = getattr(self.common.prior, "path", None)
            logger.info(
                "%s: %d scan(s), by '%s'%s, on %s.",
                *(self.job, len(pending), self.common.ckpt, f" and '{prior}'" if prior else "", self.state.device),
            )
        if share:
            self._go_over(share)
        failed = [failure for failure in self.common.failures.gather() if failure.job == self.job]  # a barrier, too
        strangers = dict(itertools.chain(*idist.all_gather([*self._strangers.items()])))
        if idist.get_rank() == 0:
            items = [item for item in self.dataset.data if self._has_results(item)]
            scans = [item_path(item) for item in items]
            done = set(scans)
            strangers = {name: far for name, far in strangers.items() if name in done}
            self._write_record(self._record, strangers)
            self.summary(scans)
            if len(strangers) >= LEAST_ALIKE and 2 * len(strangers) > len(scans):
                logger.warning(
                    "The network does not know %d of the %d scans: another scanner or protocol than its cohort's? "
                    "scripts.check says whether they are unlike it in the same way, which the job adapt learns.",
                    *(len(strangers), len(scans)),
                )
            reasons = [(failure.image, failure.reason) for failure in failed]
            drawn = self._pictures(enabled=True)
            write_job_report(self.job, self.report, self.layouts, drawn, scans, self.settings, reasons, strangers)
            logger.info("Results of %d of %d scan(s): '%s'.", total - len(failed), total, self.common.output_dir)

    def _go_over(self, indices: Sequence[int]) -> None:
        """Read, compute and write these scans."""
        batch_size, workers = self.common.loading["batch_size"], self.common.loading["num_workers"]
        loader = DataLoader(
            ReadOrFail(self.dataset, indices), batch_size=batch_size, num_workers=workers, collate_fn=list
        )
        self.data_loader = on_device(_Batches(loader, self.batch), self.state.device)
        self.state.epoch_length = len(loader)
        # where something is computed: a command that is refused starts without it
        from tqdm.contrib.logging import logging_redirect_tqdm

        writers = ResultWriters(self._write, min(workers, len(indices)), self._note)
        try:
            with logging_redirect_tqdm(), writers as self._writers:
                # after the writers' processes, which are forked and must not have its lock
                self._bar = tqdm(total=len(indices), desc=self.job, unit="scan", disable=idist.get_rank() > 0)
                super().run()
                self._write_computed()
        finally:
            self._bar.close()

    def batch(self, items: Sequence[dict[str, Any] | Failure]) -> Batch:
        """What was read of some scans, and what the inferer gets of them, on the host."""
        read = [item for item in items if not isinstance(item, Failure)]
        failures = [item for item in items if isinstance(item, Failure)]
        inputs, arguments = (self.inputs(read), self.arguments(read)) if read else (None, {})
        return Scans(read, failures), inputs, arguments

    def compute(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The inferer's results of scans that were read, ``name`` and ``image`` among their keys, on the device."""
        (batch,) = on_device([self.batch(items)], self.state.device)
        return self._infer(batch)

    def sampler(self, items: Sequence[Mapping[str, Any]]) -> LatentSampler:
        """Noise of each scan's own."""
        seed, device = self.common.seed, self.state.device
        return LatentSampler([scan_generator(seed, self.relative(item["name"]), device) for item in items])

    def _infer(self, batch: Batch) -> dict[str, Tensor]:
        scans, inputs, arguments = batch
        cast = autocast(self.state.device, self.amp, self.common.precision.get("amp_dtype"))
        with self.mode(self.network), cast:
            results = self.inferer(inputs, self.network, sampler=self.sampler(scans.items), **arguments)
            if self.familiarity is not None and UNFAMILIARITY not in results:
                seen = look(self.network, inputs, self.common.prior)
                results[UNFAMILIARITY] = self.familiarity.unfamiliarity(seen.statistics)
        return results

    def relative(self, name: str) -> str:
        """A scan's path in its data set."""
        try:
            return self.layouts[0].relative(name)
        except ScanError:  # it has no place, as will be said when its results are written
            return name

    @cached_property
    def _identities(self) -> dict[str, Any]:
        """The settings as the record has them, of files the content, which is read once."""
        return {name: identity(value) for name, value in self.settings.items()}

    def _begin(self) -> list[int]:
        """Refuse to mix results of different settings; leave those of this run beside its results. Which scans are not
        finished.
        """
        folder = self.common.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        before = read_record(folder, self.job, self._identities, self.common.overwrite)
        record, strangers, asked = (before.get(name, {}) for name in (SCANS, STRANGERS, ASKED))
        left = [not self.finished(item, record) or self._unasked(item, before) for item in self.dataset.data]
        pending, items = ([*itertools.compress(all_of, left)] for all_of in (range(len(left)), self.dataset.data))
        # results of other files, covariates or settings: they would pass for these, should this run fail or be stopped
        again = [item for item in items if self._has_results(item)]
        layouts = [*self.layouts, *self._pictures(enabled=False)]
        for path in itertools.chain(*(self._paths(item, layouts) for item in items)):
            path.unlink(missing_ok=True)
        if again and not self.common.overwrite:
            logger.warning(
                "Results of %d scan(s), such as '%s', were made of other files or covariates, before these changed, or "
                "by another --unfamiliar: they are made again.",
                *(len(again), item_path(again[0])),
            )
        names = set(map(item_path, items))
        self._strangers = {name: far for name, far in strangers.items() if name not in names}
        self._record = record | {self._place(item): made_of(item) for item in items}
        asked |= {self._place(item): self.common.unfamiliar for item in items if self.asks}
        self._asked = {place: how for place, how in asked.items() if how != "warn"}
        self._write_record(self._record, self._strangers)
        if self.common.describe is not None:
            self.common.describe(self.job)
        return pending

    def _write_record(self, scans: Mapping[str, Any], strangers: Mapping[str, float]) -> None:
        """Leave the settings beside the results, and what else they depend on or what was said of their scans."""
        said = {SCANS: dict(scans), STRANGERS: dict(strangers), ASKED: self._asked}
        content = self._identities | {name: values for name, values in said.items() if values}
        write_text(self.common.output_dir / f"{self.job}.json", json.dumps(content, indent=2) + "\n")

    def _iteration(self, engine: Engine, batchdata: Batch) -> dict[str, Any]:
        scans, _, _ = batchdata
        for failure in scans.failures:
            self._fail(failure)
        for item in scans.items:
            for key in ("image", "second"):
                self._warn_of_place(item.get(key))
        for items, results in self._results(batchdata):
            # written while a GPU computes what is next
            results = {name: v if v.dtype == torch.float64 else v.float() for name, v in results.items()}
            before, self._computed = self._computed, (items, to_host(results))
            if before is not None:
                self._add(*before)
            if not is_async(self.state.device):
                self._write_computed()
        return {}

    def _results(self, batch: Batch) -> Iterator[tuple[list[dict], dict[str, Tensor]]]:
        """The results of a batch; where they cannot be computed, of each scan by itself, but for those that fail."""
        items = batch[0].items
        if not items:
            return
        try:
            results = self._infer(batch)
        except Exception as error:
            if len(items) == 1 and any(words in str(error) for words in MACHINES):
                raise
            if len(items) == 1:
                self._fail(Failure.of({"image": items[0]["name"]}, error))
                return
        else:
            yield items, results
            return
        for item in items:
            (alone,) = on_device([self.batch([item])], self.state.device)
            yield from self._results(alone)

    # writing

    def _write_computed(self) -> None:
        """Let the last batch's results be written."""
        computed, self._computed = self._computed, None
        if computed is not None:
            self._add(*computed)

    def _add(self, items: Sequence[dict], results: Callable[[], dict[str, Tensor]]) -> None:
        values = results()
        for position, item in enumerate(items):
            # a copy: what is sent to another process would else be the whole batch
            item = {**item, **{key: value[position].clone() for key, value in values.items()}}
            refused = self._refused(item)
            if refused is None:
                self._writers.add(item)
            else:
                self._fail(refused)

    def _write(self, item: Mapping[str, Any]) -> tuple[Failure | None, tuple[str, float] | None]:
        """Write a scan's results, perhaps in another process: why that failed, or a stranger and its unfamiliarity."""
        try:
            self.results_of(item)
        except Exception as error:
            return self._failure(item, error), None
        return None, (item["name"], float(item[UNFAMILIARITY])) if self._is_stranger(item) else None

    def _failure(self, item: Mapping[str, Any], error: Exception) -> Failure:
        files = image_files(item["image"]) if isinstance(item.get("image"), MetaTensor) else None
        return Failure.of({"image": files or item["name"]}, error)._replace(image=item["name"])

    def _note(self, written: tuple[Failure | None, tuple[str, float] | None]) -> None:
        failure, stranger = written
        if stranger is not None:
            self._strangers[stranger[0]] = stranger[1]
            said = self._told.pop(stranger[0], self._unknown(stranger[1]))
            logger.warning("'%s': %s; no result of it means much.", stranger[0], said)
        if failure is not None:
            self._fail(failure)
        else:
            self._bar.update()

    def _fail(self, failure: Failure) -> None:
        self.common.failures.add(failure._replace(image=self.relative(failure.image), job=self.job))
        self._bar.update()

    def _warn_of_place(self, image: Any) -> None:
        """Name a scan that does not lie on the network's grid as the training scans did."""
        geometry = image.meta.get("geometry") if isinstance(image, MetaTensor) else None
        if geometry is not None:
            grid = self.common.grid
            place = place_differences(grid, geometry, image.affine.numpy(), image.shape[1:])
            for difference in [*place, *field_of_view_differences(grid, geometry)]:
                logger.warning("'%s': %s.", image_path(image), difference)

    def _is_stranger(self, item: Mapping[str, Any]) -> bool:
        """Whether the network does not know such scans as this one, where it is asked."""
        return self.familiarity is not None and bool(item[UNFAMILIARITY] > 1)

    def _refused(self, item: Mapping[str, Any]) -> Failure | None:
        """Why a scan gets no results where strangers are refused; those of another scanner are not."""
        if self.common.unfamiliar != "refuse" or not self._is_stranger(item):
            return None
        far = float(item[UNFAMILIARITY])
        said = self._unknown(far)
        if far <= ANOTHER_SCANNER:
            try:
                found = self._examiner.examine(self._examiner.load(image_files(item["image"])))
            except BundleError as error:  # such as that of a preprocessing whose steps it does not know
                said += f"; that could not be done here: {root_cause(error)}"
            else:
                said = found.sentence()
                if found.scanner:
                    self._told[item["name"]] = said
                    return None
        return self._failure(item, InputError(f"{said}; --unfamiliar warn makes results of it"))

    @cached_property
    def _examiner(self) -> Examiner:
        return Examiner(self.network, self.common.prior, self.common.preprocessing)

    def _unknown(self, far: float) -> str:
        return (
            f"the network does not know such scans: it is {far:.2f} times as far from what is usual as all but 1 in "
            f"{1 / FALSE_ALARMS:.0f} of its cohort. `python -m scripts.check DIR --ckpt {self.common.ckpt}` looks for "
            "the reason"
        )


class _Batches:
    """Batches of a loader, as the job makes them."""

    def __init__(self, loader: DataLoader, make: Callable[[list], Batch]) -> None:
        self.loader, self.make = loader, make

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.make, self.loader)
