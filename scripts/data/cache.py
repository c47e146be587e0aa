"""Preprocessed scans on disk: each is computed once, and used only while its file and the settings are the same."""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import joblib
import monai
import numpy as np
import torch
from joblib import delayed
from monai.data import ImageReader, MetaTensor, PersistentDataset
from monai.transforms import Compose, Transform
from monai.utils import ensure_tuple
from scripts.data import geometry
from scripts.data.datalist import log_sides
from scripts.data.reading import as_reason
from scripts.data.scan_grid import ScanGrid, field_of_view_differences, place_differences
from scripts.data.transforms import ScanError
from scripts.utils.distributed import from_rank_zero, wait_for_all
from scripts.utils.errors import InputError
from scripts.utils.files import as_folder, check_archive, write_csv, write_tensors
from scripts.utils.formats import file_states
from scripts.utils.names import CHANNEL_FILES, image_path, item_files, item_path
from scripts.utils.parallel import choose_workers, run_parallel

logger = logging.getLogger(__name__)

POLICIES = ("warn", "skip", "fail")
# what reading a file raises that is cut off, has other bytes, or holds something else
DAMAGE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
)
NAMED = 5  # scans that a warning names; the rest are counted


class ScanCache(PersistentDataset):
    """A data set of preprocessed scans, each in a file of its own.

    A file's name is a hash of the scan's path, size and times, of the transforms and their settings, of their source
    code and of MONAI's version. Another scan or another setting has another name, so nothing stale is used. Files
    appear whole, by a rename: a process that is killed while it writes leaves none, and several may write at once. A
    file that cannot be read is computed again.

    Items are ``{"image": image}``, a float32 MetaTensor ``[channels, *spatial]`` with the affine of the grid and the
    scan's path as ``filename_or_obj``.

    Args:
        data: a list of ``{"image": path, ...}``, see :py:func:`scripts.data.datalist.make_datalist`.
        transform: a ``Compose`` of what is deterministic, :py:class:`scripts.data.transforms.CheckScand` among them.
        cache_dir: folder of the files, created if needed. None computes each scan each time.
        half_precision: keep 16 bits per voxel: half the disk space, and intensities in [0, 1] to within 0.00025.
    """

    def __init__(
        self,
        data: Sequence[dict[str, Any]],
        transform: Callable,
        cache_dir: str | os.PathLike | None,
        half_precision: bool = False,
    ) -> None:
        super().__init__(data, transform, None if cache_dir is None else as_folder("cache_dir", cache_dir))
        self.half_precision = half_precision
        self.settings = joblib.hash([*describe_transforms(self.transform), half_precision])

    def path(self, index: int) -> Path | None:
        """The path of a scan's file, which need not exist yet; None without a ``cache_dir``."""
        if self.cache_dir is None:
            return None
        image = self.data[index]["image"]
        state = [file_states(Path(file)) for file in ensure_tuple(image)]
        return self.cache_dir / f"{joblib.hash([image, state, self.settings])}.pt"

    def notes(self, index: int) -> dict[str, Any]:
        """What :py:class:`scripts.data.transforms.CheckScand` noted about a scan: ``geometry`` and ``differences``.

        With them ``affine`` and ``shape`` of the network's grid.

        Raises:
            ScanError: when the scan cannot be used.
        """
        entry = self._entry(index, mmap=True)
        grid = {"affine": entry["affine"].tolist(), "shape": list(entry["image"].shape[1:])}
        return {"geometry": entry["geometry"], "differences": entry["differences"], **grid}

    def _transform(self, index: int) -> dict[str, MetaTensor]:
        entry = self._entry(index)
        meta = {"filename_or_obj": entry["name"]}
        if len(item_files(self.data[index])) > 1:
            meta[CHANNEL_FILES] = item_files(self.data[index])
        return {"image": MetaTensor(entry["image"].float(), affine=entry["affine"], meta=meta)}

    def _entry(self, index: int, mmap: bool = False) -> dict[str, Any]:
        path = self.path(index)
        if path is not None and path.is_file():
            try:
                if not mmap:  # notes alone are read without the voxels
                    check_archive(path)
                return torch.load(path, weights_only=True, mmap=mmap)
            except DAMAGE:
                warnings.warn(f"The cached scan '{path}' is damaged; it is computed again.", stacklevel=2)
        entry = self._compute(index)
        if path is not None:
            write_tensors(path, entry)
        return entry

    def _compute(self, index: int) -> dict[str, Any]:
        try:
            image = self.transform({"image": self.data[index]["image"]})["image"]
        except RuntimeError as error:  # Compose wraps the error in its own
            raise error.__cause__ or error from None
        return {
            "image": image.as_tensor().to(torch.float16 if self.half_precision else torch.float32).contiguous(),
            "affine": image.affine,
            "name": image_path(image),
            "geometry": image.meta["geometry"],
            "differences": image.meta["differences"],
        }


def describe_transforms(transform: Compose) -> list[Any]:
    """What the results of transforms depend on, as joblib can hash it: their settings and their code."""
    steps = transform.flatten().transforms
    # of the bundle's own transforms, and of what they use; that of MONAI's changes with its version
    own = {inspect.getfile(type(step)) for step in steps if type(step).__module__.startswith("scripts.")}
    code = [Path(file).read_bytes() for file in sorted(own | {geometry.__file__})]
    return [list(map(_describe, steps)), code, monai.__version__]


def _describe(value: Any) -> Any:
    """A transform's class and settings, without what its file readers keep of the last file, or its random state."""
    if isinstance(value, ImageReader | np.random.RandomState):
        return type(value).__qualname__
    if isinstance(value, torch.Tensor):  # as it is pickled it would have another hash each time
        return value.numpy()
    if isinstance(value, Transform):
        return [type(value).__qualname__, _describe(value.__reduce_ex__(2)[2])]  # what would be pickled of it
    if isinstance(value, dict):
        return {key: _describe(item) for key, item in value.items()}
    return [_describe(item) for item in value] if isinstance(value, list | tuple) else value


def read_cohort(
    datalist: dict[str, list[dict]],
    transform: Callable,
    cache_dir: str | os.PathLike | None,
    half_precision: bool = False,
    policy: str = "warn",
    workers: int = 1,
    skipped_file: str | os.PathLike | None = None,
    grid: ScanGrid | None = None,
) -> dict[str, list[dict]]:
    """Read every scan of a run once, fill the cache with it, and say which scans cannot or should not be used.

    Several processes (torchrun's) each read a share of the scans into the cache; then rank 0 goes through all of them.

    Args:
        datalist: ``{"training": [{"image": path}, ...], "validation": [...]}``.
        transform, cache_dir, half_precision: see :py:class:`ScanCache`.
        policy: what to do about a scan that cannot be used, and about one whose geometry differs from what is expected.
            ``warn``: the former ends the run, the latter is logged. ``skip``: both are left out, and written to
            ``skipped_file`` with the reason. ``fail``: both end the run.
        workers: processes that read scans, per process of torchrun's.
        skipped_file: a CSV file, written when ``policy`` is ``skip`` and something is left out.
        grid: what ``transform`` fits the scans to. One that lies elsewhere in the world than those that are to be
            fitted to one box of it does not have the expected geometry.

    Returns:
        The datalist without what is skipped.

    Raises:
        ScanError: as ``policy`` says, or when nothing of a side is left.
        ValueError: when ``policy`` is none of the three.
    """
    if policy not in POLICIES:
        raise InputError(f"scan_policy is '{policy}': it must be one of {', '.join(POLICIES)}.")
    rank, processes = idist.get_rank(), idist.get_world_size()
    if processes > 1 and cache_dir is not None:
        for side, items in datalist.items():
            share = ScanCache(items[rank::processes], transform, cache_dir, half_precision)
            _read_missing(share, workers, f"reading {side} scans, {processes} processes")
        wait_for_all()
    return from_rank_zero(_select, datalist, transform, cache_dir, half_precision, policy, workers, skipped_file, grid)


def _select(
    datalist: dict[str, list[dict]],
    transform: Callable,
    cache_dir: str | os.PathLike | None,
    half_precision: bool,
    policy: str,
    workers: int,
    skipped_file: str | os.PathLike | None,
    grid: ScanGrid | None,
) -> dict[str, list[dict]]:
    """The datalist without what is skipped."""
    kept, broken, skipped, geometries, noted, other_views = {}, [], [], [], [], []
    for side, items in datalist.items():
        kept[side] = []
        dataset = ScanCache(items, transform, cache_dir, half_precision)
        for item, notes in zip(items, _read_all(dataset, workers, side), strict=True):
            if isinstance(notes, ScanError):
                if policy != "skip":
                    broken.append(str(notes))
                    continue
                skipped.append((side, item, as_reason(str(notes), item_files(item))))
                continue
            name = item_path(item)
            elsewhere = place_differences(grid, notes["geometry"], notes["affine"], notes["shape"])
            found = [*notes["differences"], *elsewhere]
            sentences = [f"'{name}': {difference}." for difference in found]
            if sentences and policy == "fail":
                raise ScanError(f"{sentences[0]} scan_policy is 'fail'.")
            if sentences and policy == "skip":
                skipped.append((side, item, "; ".join(found)))
                continue
            noted += sentences
            other_views += [f"'{name}': {d}." for d in field_of_view_differences(grid, notes["geometry"])]
            geometries.append((name, notes["geometry"]))
            kept[side].append(item)
    if broken:
        more = f" {len(broken) - 1} more cannot be used either." if len(broken) > 1 else ""
        raise ScanError(f"{broken[0]}{more} --scan_policy skip leaves out all such scans.")
    _warn_of("differ from what is expected, or have odd headers", noted)
    _warn_of_mixed_sizes(geometries)
    _warn_of("have another field of view", other_views)
    for side, items in kept.items():
        if datalist[side] and not items:
            item, reason = next((item, reason) for other, item, reason in skipped if other == side)
            raise ScanError(f"No scan of the {side} side can be used. The first, '{item_path(item)}': {reason}.")
    if skipped:
        _report_skipped(skipped, skipped_file)
        log_sides(kept)
    return kept


def _read_all(dataset: ScanCache, workers: int, side: str) -> Iterator[dict[str, Any] | ScanError]:
    """Yield the notes on each scan, in order, or why it cannot be used; what is not cached is read in parallel."""
    found = _read_missing(dataset, workers, f"reading {side} scans")
    for index in range(len(dataset)):
        yield found[index] if index in found else _try(dataset, index)


def _read_missing(dataset: ScanCache, workers: int, what: str) -> dict[int, dict[str, Any] | ScanError]:
    """Read the scans that are not cached in parallel: the notes on each, or why it cannot be used, by its index."""
    paths = [dataset.path(index) for index in range(len(dataset))]
    missing = [index for index, path in enumerate(paths) if path is None or not path.is_file()]
    jobs = [delayed(_try)(dataset, index) for index in missing]
    done = run_parallel(jobs, choose_workers(len(jobs), workers), what, quiet=idist.get_rank() > 0)
    return dict(zip(missing, done, strict=True))


def _try(dataset: ScanCache, index: int) -> dict[str, Any] | ScanError:
    try:
        return dataset.notes(index)
    except ScanError as error:
        return ScanError(str(error))  # without its causes, which do not all travel between processes


def _warn_of(what: str, sentences: Sequence[str]) -> None:
    if sentences:
        more = f" And {len(sentences) - NAMED} more." if len(sentences) > NAMED else ""
        logger.warning("%d scan(s) %s: %s%s", len(sentences), what, " ".join(sentences[:NAMED]), more)


def _warn_of_mixed_sizes(geometries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    names, described = [name for name, _ in geometries], [g for _, g in geometries]
    mixed = geometry.mixed_voxel_sizes(described)
    if mixed:
        usual = geometry.usual_voxel_size(described)
        sentences = [f"'{names[i]}': {'; '.join(geometry.differences(described[i], spacing=usual))}." for i in mixed]
        _warn_of(f"of {len(names)} have other voxel sizes than most", sentences)


def _report_skipped(skipped: Sequence[tuple[str, dict, str]], path: str | os.PathLike | None) -> None:
    _warn_of("are left out", [f"'{item_path(item)}': {reason}." for _, item, reason in skipped])
    if path is not None:
        rows = ((side, ";".join(item_files(item)), reason) for side, item, reason in skipped)
        write_csv(path, ("side", "image", "reason"), rows)
        logger.warning("All of them, with the reason: '%s'.", path)
