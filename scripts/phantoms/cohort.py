"""Cohorts of phantoms in folders, by command or when a run needs its default data set.

    python -m scripts.phantoms brains --output_dir phantoms --count 256
    python -m scripts.phantoms ellipsoids --output_dir ellipsoids --count 64 --size 32

``brains`` are FLAIR- or T1-like (``--contrast T1w``), skull-stripped and affine-aligned to ICBM152. Their anatomy is
the ICBM152 2009a symmetric tissue maps that the nilearn wheel ships, bent by a random diffeomorphism; contrast, bias
field, noise and lesions are drawn per scan. ``ellipsoids`` are the simplest learnable stand-in: one randomly turned
and sized bright ellipsoid on filtered noise.

    python -m scripts.phantoms brains --output_dir sick --count 64 --lesions 0.5 \\
        --lesion_kinds "['bright','dark','mass','atrophy']"

gives half of the brains lesions, with masks, among them such as intensity alone does not show.

A phantom depends only on its seed and its index, never on how many are made, in which order or by how many processes.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from joblib import delayed
from scripts.phantoms.anatomy import random_streams
from scripts.phantoms.images import (
    Phantom,
    brain_phantom,
    check_brain_phantom,
    check_ellipsoid_phantom,
    ellipsoid_phantom,
    lesion_kind,
)
from scripts.phantoms.people import Cohort
from scripts.utils.command_line import check_integer
from scripts.utils.errors import ExistsError, InputError
from scripts.utils.files import as_folder, expand, write_bytes, write_csv, write_text
from scripts.utils.formats import nifti_bytes
from scripts.utils.parallel import choose_workers, run_parallel

logger = logging.getLogger(__name__)

DEFAULTS = {
    "lesion_kinds": ["bright"],
    "covariates": None,
    "contrast": "FLAIR",
}  # what a phantoms.json that says nothing of a key stands for


def make_brains(
    output_dir: str | os.PathLike,
    count: int,
    seed: int = 0,
    start: int = 1,
    spacing: float = 2.0,
    lesions: float = 0.0,
    lesion_kinds: str | Sequence[str] = ("bright",),
    mask_dir: str | os.PathLike | None = None,
    covariates: bool = False,
    age: float | None = None,
    sex: str | None = None,
    site: str | None = None,
    contrast: str = "FLAIR",
    workers: int | None = None,
) -> str:
    """Write a cohort of brains in ICBM152 space as ``sub-0001_FLAIR.nii.gz`` and so on.

    Safe to call again: existing scans are kept, an interrupted cohort is continued, a larger ``count`` adds scans. A
    folder that holds other scans is refused. Scans are written whole or not at all.

    Args:
        output_dir: folder for the scans, created if needed.
        count: how many scans, 1 or more.
        seed: seed of the cohort, 0 or more.
        start: number of the first scan, 0 or more.
        spacing: edge of a voxel in mm, between 0.5 and 16.
        lesions: probability that a scan has lesions, 0 to 1. If it is more than 0, each scan gets a lesion mask, empty
            ones included, and ``kinds.csv`` beside the masks says of what kind each scan's lesions are.
        lesion_kinds: some of ``bright`` (white-matter hyperintensities), ``dark``, ``mass`` and ``atrophy``, see
            :py:func:`scripts.phantoms.images.brain_phantom`; each scan with lesions has one of them.
        mask_dir: folder for the lesion masks, ``sub-0001_lesions.nii.gz`` and so on; ``<output_dir>_masks`` if not
            given. It is not the scans' folder, so that no pattern for scans matches a mask.
        covariates: give the phantoms ages from 45 to 85 years, a sex and one of three sites, with their effects, and
            write ``participants.tsv``.
        age, sex, site: fix one of these for the whole cohort (years; F or M; A, B or C), which stands for
            ``covariates``: the same seed and number are then the same person at that age, of that sex or at that site.
        workers: processes to use; as many as there are cores, fewer for a small cohort, if not given.

    Returns:
        ``output_dir``.

    Raises:
        ValueError: an argument is outside the limits above.
        NotADirectoryError: ``output_dir`` or ``mask_dir`` is a file.
        FileExistsError: ``output_dir`` holds scans that are not of this cohort.
    """
    _check_cohort(count, start, workers)
    fixed = {"age": age, "sex": sex, "site": site}
    cohort = Cohort(**fixed) if covariates or any(value is not None for value in fixed.values()) else None
    kinds = check_brain_phantom(start, seed, spacing, lesions, lesion_kinds, cohort, contrast)
    if mask_dir is None and lesions > 0:
        mask_dir = _beside(output_dir)
    recipe = {"kind": "brains", "seed": seed, "spacing": float(spacing), "lesions": float(lesions)}
    how = {"lesions": lesions, "lesion_kinds": kinds, "cohort": cohort, "contrast": contrast}
    phantom = partial(brain_phantom, seed=seed, spacing=spacing, **how)
    indices = range(start, start + count)
    masks = ("lesions", mask_dir) if lesions > 0 else None
    if masks:
        recipe["lesion_kinds"] = list(kinds)
    recipe |= {"covariates": fixed if cohort else None, "contrast": contrast}
    made = _make_cohort(phantom, recipe, output_dir, contrast, masks, "mni", indices, workers)
    if masks:
        kind_rows = ((f"sub-{index:04d}", lesion_kind(index, seed, lesions, kinds) or "none") for index in indices)
        write_csv(as_folder("mask_dir", mask_dir) / "kinds.csv", ("scan", "kind"), kind_rows)
        logger.info(
            'score and impute take their masks by --scan_pattern "*_%s.nii.gz" --mask_dir %s --mask_pattern '
            '"*_lesions.nii.gz".',
            *(contrast, mask_dir),
        )
    if cohort:
        people = (cohort.person(random_streams(index, seed).person) for index in indices)
        rows = ((f"sub-{i:04d}", f"{p.age:.2f}", p.sex, p.site) for i, p in zip(indices, people, strict=True))
        columns = ("participant_id", "age", "sex", "site")
        write_csv(as_folder("output_dir", output_dir) / "participants.tsv", columns, rows, delimiter="\t")
    return made


def ensure_cohort(dataset_dir: str | os.PathLike, phantom_dir: str | os.PathLike, count: int, **cohort: Any) -> str:
    """The data set of a run, after making the default one: ``count`` brains, if ``dataset_dir`` is ``phantom_dir``.

    Of several processes rank 0 makes them, and the others wait. ``cohort`` is what else :py:func:`make_brains` takes.
    """
    if expand(dataset_dir) != expand(phantom_dir):
        return expand(dataset_dir)
    from scripts.utils.distributed import from_rank_zero  # Ignite comes with it, 700 modules, and no command needs it

    return from_rank_zero(make_brains, phantom_dir, count, **cohort)


def make_ellipsoids(
    output_dir: str | os.PathLike,
    count: int,
    seed: int = 0,
    start: int = 1,
    size: int | Sequence[int] = 32,
    spacing: float = 2.0,
    mask_dir: str | os.PathLike | None = None,
    workers: int | None = None,
) -> str:
    """Write a cohort of bright ellipsoids on filtered noise as ``sub-0001_ellipsoid.nii.gz`` and so on.

    Args:
        output_dir: folder for the phantoms, created if needed.
        count: how many phantoms, 1 or more.
        seed: seed of the cohort, 0 or more.
        start: number of the first phantom, 0 or more.
        size: voxels along each axis, one number or three, each 4 or more.
        spacing: edge of a voxel in mm, more than 0.
        mask_dir: folder for masks of the ellipsoids, ``sub-0001_mask.nii.gz`` and so on; none are written if not given.
        workers: processes to use; as many as there are cores, fewer for a small cohort, if not given.

    Returns:
        ``output_dir``.

    Raises:
        As :py:func:`make_brains`.
    """
    _check_cohort(count, start, workers)
    shape = check_ellipsoid_phantom(start, seed, size, spacing)
    recipe = {"kind": "ellipsoids", "seed": seed, "spacing": float(spacing), "size": list(shape)}
    phantom = partial(ellipsoid_phantom, seed=seed, size=shape, spacing=spacing)
    masks = ("mask", mask_dir) if mask_dir is not None else None
    return _make_cohort(
        phantom, recipe, output_dir, "ellipsoid", masks, "scanner", range(start, start + count), workers
    )


def _make_cohort(
    phantom: Callable[[int], Phantom],
    recipe: dict[str, Any],
    output_dir: str | os.PathLike,
    suffix: str,
    masks: tuple[str, str | os.PathLike] | None,
    world: str,
    indices: range,
    workers: int | None,
) -> str:
    folder = as_folder("output_dir", output_dir)
    mask_suffix, mask_folder = (masks[0], as_folder("mask_dir", masks[1])) if masks else (None, None)
    if mask_folder is not None and mask_folder.resolve() == folder.resolve():
        raise InputError(
            f"mask_dir is the folder of the scans, {folder}: give another, so that masks are never taken for scans."
        )
    _claim(folder, recipe, indices, suffix)

    jobs = []
    for index in indices:
        image_path = folder / f"sub-{index:04d}_{suffix}.nii.gz"
        mask_path = mask_folder / f"sub-{index:04d}_{mask_suffix}.nii.gz" if mask_folder else None
        if not image_path.exists() or (mask_path and not mask_path.exists()):
            jobs.append(delayed(_write_phantom)(phantom, index, image_path, mask_path, world))
    if not jobs:
        logger.info("%s: all %d phantoms (%s) are there already.", folder, len(indices), recipe["kind"])
        return str(folder)

    logger.info("Making %d of %d phantoms (%s) in %s.", len(jobs), len(indices), recipe["kind"], folder)
    if mask_folder is not None:
        mask_folder.mkdir(parents=True, exist_ok=True)
    for _ in run_parallel(jobs, workers or choose_workers(len(jobs)), f"phantoms ({recipe['kind']})", in_order=False):
        pass
    return str(folder)


def _claim(folder: Path, recipe: dict[str, Any], indices: range, suffix: str) -> None:
    """Check that a folder belongs to this cohort, or claim it.

    ``phantoms.json`` says which cohort a folder belongs to. It is written before the first scan: each scan appears
    whole, by a rename, so with the same recipe a scan that exists is right, and the cohort is complete when none is
    missing.

    Raises:
        FileExistsError: the folder holds other scans.
    """
    path = folder / "phantoms.json"
    request = {**recipe, "start": indices.start, "count": len(indices)}
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            start, end = found["start"], found["start"] + found["count"]
        except (ValueError, TypeError, KeyError):
            raise ExistsError(f"output_dir {folder} has a phantoms.json that cannot be read: give another.") from None
        same = all(found.get(key, DEFAULTS.get(key)) == value for key, value in recipe.items())
        if not same or start < indices.start or end > indices.stop:
            raise ExistsError(
                f"output_dir {folder} holds another cohort of phantoms, {json.dumps(found)}, than the one asked for, "
                f"{json.dumps(request)}: give another output_dir, or remove that one."
            )
        if found == request:
            return
    elif folder.is_dir() and next(folder.rglob("*.nii*"), None) is not None:
        raise ExistsError(
            f"output_dir {folder} holds scans but no phantoms.json: give a folder of its own for the phantoms, "
            "so that they never mix with other scans."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(request, indent=2) + "\n")


def _write_phantom(
    phantom: Callable[[int], Phantom], index: int, image_path: Path, mask_path: Path | None, world: str
) -> None:
    image, affine, mask = phantom(index)
    # The mask is written first, so that every scan that exists has its mask.
    if mask_path is not None:
        write_bytes(mask_path, nifti_bytes(mask, affine, world, compresslevel=1))
    write_bytes(image_path, nifti_bytes(image, affine, world, compresslevel=1))


def _beside(output_dir: str | os.PathLike) -> Path:
    folder = Path(expand(output_dir)).resolve()
    return folder.with_name(folder.name + "_masks")


def _check_cohort(count: int, start: int, workers: int | None) -> None:
    check_integer("count", count, 1)
    check_integer("start", start, 0)
    if workers is not None:
        check_integer("workers", workers, 1)
