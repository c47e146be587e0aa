"""Raw heads become what the model expects: bias-corrected, aligned to ICBM152, skull-stripped, on one grid.

    python -m scripts.prepare raw --output_dir prepared

See docs/preparing.md for how to read what it writes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import math
import numbers
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from joblib import cpu_count, delayed
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave
from monai.data import MetaTensor
from scipy import ndimage
from scipy.spatial.transform import Rotation

from scripts.data.datalist import find_scans
from scripts.data.registration import (
    align,
    brain_centre,
    foreground,
    log_bias_field,
    smooth_for,
    template,
    template_brain,
)
from scripts.data.transforms import CheckScand, LoadScand, ScanError
from scripts.utils.command_line import run
from scripts.utils.figures import plane
from scripts.utils.files import write_bytes, write_csv, write_text, write_whole
from scripts.utils.parallel import run_parallel

__all__ = ["Prepared", "judge", "prepare"]

logger = logging.getLogger(__name__)

METHOD = 1  # raised whenever the same scan and settings give another result, so that old results are made again
SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".img", ".hdr", ".dcm")
STRIPPED = 0.8  # Dice of a scan's foreground with the template's brain; that of a head with its scalp is about 0.6
SHOWN = 48  # scans on the contact sheet
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # between RAS (nibabel, NIfTI) and LPS (ITK)

# What no brain that is aligned well goes beyond; see docs/preparing.md for how these were chosen.
LIMITS = {
    "similarity": (0.15, math.inf),
    "overlap": (0.9, 1.0),
    "volume_ratio": (0.6, 2.2),
    "stretch": (1.0, 1.35),
    "rotation": (0.0, 45.0),
}
# How far from the cohort's median, in robust standard deviations, and the least that such a deviation is taken to be.
OUTLYING, MIN_COHORT = 4.0, 8
FLOORS = {"similarity": 0.02, "overlap": 0.02, "log_volume_ratio": 0.1, "stretch": 0.02}


class Prepared(NamedTuple):
    """What :func:`prepare` did.

    Attributes:
        rows: one a scan, the lines of ``alignment.csv``, those that look wrong first.
        failures: the reason for each scan that could not be prepared, by its path relative to ``dataset_dir``.
    """

    rows: list[dict[str, Any]]
    failures: dict[str, str]


class _Job(NamedTuple):
    """One scan: where it is, where it goes, how it is made."""

    name: str  # posix path relative to dataset_dir
    scan: Path
    mask: Path | None
    stem: Path  # of the results, without any ending
    settings: dict[str, Any]

    def result(self, ending: str) -> Path:
        return self.stem.with_name(self.stem.name + ending)


def prepare(
    dataset_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    scan_pattern: str = "*.nii*",
    spacing: float = 1.0,
    mask_dir: str | os.PathLike | None = None,
    keep_skull: bool = False,
    bias_correction: bool = True,
    workers: int | None = None,
) -> Prepared:
    """Align every scan under a folder to ICBM152, correct its bias field, strip its skull, resample it once.

    Safe to call again: what was made from the same file with the same settings is kept.

    Args:
        dataset_dir: the folder that holds the scans.
        output_dir: the folder for the results, which keep the scans' relative paths; outside of ``dataset_dir``.
        scan_pattern: which files are scans, as for training; one that ends in a slash matches DICOM folders.
        spacing: edge of a voxel of the results in mm, 0.5 to 8. The grid covers 196 x 232 x 188 mm.
        mask_dir: a folder of brain masks of your own, each with the relative path of its scan; the suffix may differ.
            A mask may have another grid, not another world.
        keep_skull: leave in what is outside of the brain.
        bias_correction: correct the bias field (N4).
        workers: processes to use, each with one thread; as many as there are cores if not given.

    Raises:
        ValueError: an argument is outside what is said above, or two scans would get the same name.
        OSError: a folder does not exist or holds no scan, or a worker process was killed; what is done is kept.
    """
    _check(spacing, workers)
    scans = find_scans(dataset_dir, scan_pattern)
    root, folder = Path(dataset_dir).expanduser(), Path(output_dir).expanduser()
    inner, outer = folder.resolve(), root.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise ValueError(f"output_dir '{folder}' and dataset_dir '{root}' lie within each other: give a folder apart.")
    settings = {
        "method": METHOD,
        "spacing": float(spacing),
        "keep_skull": bool(keep_skull),
        "bias_correction": bool(bias_correction),
    }
    names = [scan.relative_to(root).as_posix() for scan in scans]
    stems = _stems(names)
    masks = _masks(names, mask_dir) if mask_dir is not None else [None] * len(names)
    jobs, failures = [], {}
    for name, scan, stem, mask in zip(names, scans, stems, masks, strict=True):
        if mask_dir is not None and mask is None:
            failures[name] = f"mask_dir '{mask_dir}' has no mask for it, or several: '{stem}' with an image's suffix"
        else:
            jobs.append(_Job(name, scan, mask, folder / stem, settings))
    folder.mkdir(parents=True, exist_ok=True)
    failures |= _run([job for job in jobs if _record(job) is None], workers, len(jobs))
    records = {job.name: _record(job) for job in jobs if job.name not in failures}
    rows = judge([record["row"] for record in records.values()])
    _report(folder, rows, failures, {job.name: job for job in jobs})
    return Prepared(rows, failures)


# ------------------------------------------------------------------------------------------------------------ a scan


def _prepare_scan(job: _Job) -> str | None:
    """Make the results of one scan; returns the reason if that fails. The record comes last: with it they are whole."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    identity = _identity(job)
    for ending in (".json", ".nii.gz", ".tfm", ".png"):
        job.result(ending).unlink(missing_ok=True)
    try:
        image = _read(job.scan)
        _check_extent(image, job.scan)
        voxels = sitk.GetArrayViewFromImage(image)
        lowest, highest = float(voxels.min()), float(voxels.max())
        head = _read_mask(job.mask, image) if job.mask else foreground(image)
        # A bias field is a factor; scans with negative values (CT, z-scores) have none to find.
        corrected = job.settings["bias_correction"] and np.count_nonzero(voxels < 0) <= 0.01 * voxels.size
        if corrected:
            image = sitk.Clamp(image, sitk.sitkFloat32, 0.0, highest)
            lowest = max(lowest, 0.0)
            image = image / sitk.Exp(log_bias_field(image, head))
        alone = sitk.Mask(image, head, lowest) if job.mask else image
        transform, similarity = align(alone, head)

        dice, overlap = _overlap(head, transform)
        stripped = bool(dice >= STRIPPED)
        row = {
            "scan": job.name,
            "similarity": similarity,
            "overlap": overlap,
            "dice": dice,
            **_geometry(transform),
            "skull_stripped": stripped,
            "bias_corrected": bool(corrected),
        }
        values = (lowest, float(sitk.GetArrayViewFromImage(image).max()))
        result = _resample(image, transform, job.settings["spacing"], values)
        if not job.settings["keep_skull"]:
            inside = sitk.Resample(
                sitk.Cast(head if job.mask or stripped else template_brain(), sitk.sitkFloat32),
                result,
                transform if job.mask or stripped else sitk.Transform(),
                sitk.sitkLinear,
            )
            result = sitk.Mask(result, inside >= 0.5)
        job.stem.parent.mkdir(parents=True, exist_ok=True)
        write_whole(job.result(".tfm"), lambda path: sitk.WriteTransform(transform, path))
        write_whole(job.result(".png"), lambda path: imsave(path, _picture(image, transform)))
        write_bytes(job.result(".nii.gz"), _nifti(result))
        record = {"input": identity, "settings": job.settings, "row": row}
        write_text(job.result(".json"), json.dumps(record, indent=2) + "\n")
    except MemoryError:
        return "out of memory: lower --workers"
    except Exception as error:  # whatever is wrong with one scan, the others go on
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _read(path: Path) -> sitk.Image:
    """A scan as a SimpleITK image, float32. Raises ScanError."""
    scan: MetaTensor = CheckScand("image")(LoadScand("image")({"image": str(path)}))["image"]
    affine = FLIP @ scan.affine.numpy().astype(float)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(scan[0].numpy().T, dtype=np.float32))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def _check_extent(image: sitk.Image, path: Path) -> None:
    extent = [n * s for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    if min(image.GetSize()) < 8 or min(extent) < 60 or max(extent) > 1000:
        raise ScanError(
            f"'{path}' has {'x'.join(map(str, image.GetSize()))} voxels over {'x'.join(f'{e:.0f}' for e in extent)} "
            "mm, which is no scan of a whole brain: correct its header or leave it out with --scan_pattern."
        )


def _read_mask(path: Path, image: sitk.Image) -> sitk.Image:
    """A brain mask on the grid of a scan, uint8."""
    mask = sitk.Resample(_read(path) > 0, image, sitk.Transform(), sitk.sitkNearestNeighbor)
    litres = np.count_nonzero(sitk.GetArrayViewFromImage(mask)) * math.prod(image.GetSpacing()) / 1e6
    if litres < 0.1:
        raise ScanError(
            f"the mask '{path}' covers {litres:.2f} l of its scan, too little for a brain: "
            "make sure that both have the same world coordinates."
        )
    return mask


def _overlap(head: sitk.Image, transform: sitk.Transform) -> tuple[float, float]:
    """Dice of the scan's foreground with the template's brain, and the share of the latter that it covers."""
    brain = template_brain()
    found = sitk.Resample(head, brain, transform, sitk.sitkNearestNeighbor)
    ours, theirs = (sitk.GetArrayViewFromImage(mask) > 0 for mask in (found, brain))
    both = np.count_nonzero(ours & theirs)
    return float(2 * both / (ours.sum() + theirs.sum())), float(both / theirs.sum())


def _geometry(transform: sitk.AffineTransform) -> dict[str, float]:
    """What is done to the scan, in RAS: volume, the largest over the smallest stretch, degrees and mm of its brain."""
    matrix = np.array(transform.GetMatrix()).reshape(3, 3)
    scan_to_template = FLIP[:3, :3] @ np.linalg.inv(matrix) @ FLIP[:3, :3]
    left, stretches, right = np.linalg.svd(scan_to_template)
    angles = Rotation.from_matrix(left @ right).as_euler("xyz", degrees=True)
    moved = FLIP[:3, :3] @ (np.array(brain_centre()) - transform.TransformPoint(brain_centre()))
    return {
        "volume_ratio": float(np.linalg.det(scan_to_template)),
        "stretch": float(stretches[0] / stretches[-1]),
        **{f"rotation_{axis}": float(angle) for axis, angle in zip("xyz", angles, strict=True)},
        **{f"translation_{axis}": float(mm) for axis, mm in zip("xyz", moved, strict=True)},
    }


def _resample(image: sitk.Image, transform: sitk.Transform, spacing: float, values: tuple[float, float]) -> sitk.Image:
    """The scan on cubic voxels over the template's field of view: cubic splines, kept within the scan's own values."""
    grid = template()
    extent = [(n - 1) * s for n, s in zip(grid.GetSize(), grid.GetSpacing(), strict=True)]
    size = [math.floor(e / spacing + 1e-6) + 1 for e in extent]
    smooth = smooth_for(image, spacing)
    result = sitk.Resample(
        smooth, size, transform, sitk.sitkBSpline, grid.GetOrigin(), [spacing] * 3, grid.GetDirection(), 0.0
    )
    return sitk.Clamp(result, sitk.sitkFloat32, min(values[0], 0.0), values[1])


def _nifti(image: sitk.Image) -> bytes:
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    nifti = nib.Nifti1Image(sitk.GetArrayViewFromImage(image).T, FLIP @ affine)
    nifti.set_sform(nifti.affine, 4)  # 4: ICBM152
    nifti.set_qform(nifti.affine, 4)
    nifti.header.set_xyzt_units("mm")
    # No time stamp: the same scan gives the same file, byte for byte.
    return gzip.compress(nifti.to_bytes(), compresslevel=4, mtime=0)


def _picture(image: sitk.Image, transform: sitk.Transform) -> np.ndarray:
    """Three slices of the scan, skull and all, with the template's outline: uint8 ``[rows, columns, 3]``."""
    grid = template()
    panels = []
    for axis, mm in ((2, 8.0), (1, -18.0), (0, 4.0)):
        index = round(abs(mm - FLIP[axis, axis] * grid.GetOrigin()[axis]))
        start, size = [0, 0, 0], list(grid.GetSize())
        start[axis], size[axis] = index, 1
        cut = sitk.RegionOfInterest(grid, size, start)
        scan = plane(sitk.GetArrayFromImage(sitk.Resample(image, cut, transform, sitk.sitkLinear)).T, axis)
        brain = plane(sitk.GetArrayFromImage(sitk.RegionOfInterest(template_brain(), size, start)).T, axis) > 0
        low, high = np.percentile(scan, 1), np.percentile(scan[brain], 99.5)
        gray = np.clip((scan - low) / max(high - low, 1e-6), 0, 1)
        colours = np.repeat((255 * gray).astype(np.uint8)[..., None], 3, -1)
        colours[brain & ~ndimage.binary_erosion(brain)] = (255, 140, 0)
        panels.append(colours)
    tallest = max(len(panel) for panel in panels)
    return np.hstack([np.pad(p, ((0, tallest - len(p)), (0, 4), (0, 0))) for p in panels])


# ------------------------------------------------------------------------------------------------------- the cohort


def _run(jobs: Sequence[_Job], workers: int | None, total: int) -> dict[str, str]:
    """Do the jobs in parallel; returns the failures."""
    if not jobs:
        logger.info("All %d scans are prepared already.", total)
        return {}
    logger.info("Preparing %d of %d scans.", len(jobs), total)
    done = run_parallel([delayed(_named)(job) for job in jobs], workers or cpu_count(), "preparing", in_order=False)
    return {name: reason for name, reason in done if reason is not None}


def _named(job: _Job) -> tuple[str, str | None]:
    return job.name, _prepare_scan(job)


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Say which alignments look wrong: beyond absolute limits, or far from the rest of the cohort.

    Far is more than 4 robust standard deviations (1.4826 times the median absolute deviation) from the median, to
    either side in volume and to the worse side in the others, in a cohort of 8 scans or more.

    Args:
        rows: of each scan ``scan`` (its name), ``similarity``, ``overlap``, ``volume_ratio``, ``stretch`` and
            ``rotation_x``, ``_y``, ``_z``.

    Returns:
        The rows with a ``verdict``, ``ok`` or ``check``, and its ``reasons``, those to check first, worst first.
    """
    judged = [(dict(row), _beyond_limits(row)) for row in rows]
    if len(rows) >= MIN_COHORT:
        for name, floor in FLOORS.items():
            values = np.array([_value(row, name) for row in rows])
            deviation = max(1.4826 * float(np.median(np.abs(values - np.median(values)))), floor)
            scores = (values - np.median(values)) / deviation
            scores = {"similarity": -scores, "overlap": -scores, "stretch": scores}.get(name, np.abs(scores))
            label = name.removeprefix("log_")
            for (row, reasons), score in zip(judged, scores, strict=True):
                if score > OUTLYING:
                    reasons.append(f"{label} {row[label]:.3g} is {score:.1f} deviations from the cohort's median")
    verdicts = [
        {"scan": row["scan"], "verdict": "check" if reasons else "ok", "reasons": "; ".join(reasons)} | row
        for row, reasons in judged
    ]
    order = sorted(range(len(rows)), key=lambda i: (-len(judged[i][1]), rows[i]["similarity"], rows[i]["scan"]))
    return [verdicts[i] for i in order]


def _beyond_limits(row: dict[str, Any]) -> list[str]:
    return [
        f"{name} {_value(row, name):.3g} is outside {low:g} to {high:g}"
        for name, (low, high) in LIMITS.items()
        if not low <= _value(row, name) <= high
    ]


def _value(row: dict[str, Any], name: str) -> float:
    if name == "rotation":
        return max(abs(row[f"rotation_{axis}"]) for axis in "xyz")
    return math.log(max(row["volume_ratio"], 1e-9)) if name == "log_volume_ratio" else row[name]


def _report(folder: Path, rows: list[dict[str, Any]], failures: dict[str, str], jobs: dict[str, _Job]) -> None:
    """Write what concerns the whole cohort, and log what a person should look at."""
    if failures:
        write_csv(folder / "failed.csv", ("scan", "reason"), sorted(failures.items()))
        logger.error("%d scan(s) failed, see %s:", len(failures), folder / "failed.csv")
        for name in sorted(failures):
            logger.error("  %s: %s", name, failures[name])
    else:
        (folder / "failed.csv").unlink(missing_ok=True)
    expected = {job.result(".nii.gz") for job in jobs.values()}
    unexpected_files = sorted(p for p in folder.rglob("*.nii.gz") if p not in expected and not p.name.startswith("."))
    if unexpected_files:
        logger.warning(
            "%d file(s) in %s come from none of the scans, such as %s: remove them if they are left over.",
            len(unexpected_files),
            folder,
            unexpected_files[0],
        )
    if not rows:
        for name in ("alignment.csv", "contact_sheet.png", "datalist.json"):
            (folder / name).unlink(missing_ok=True)
        return
    columns = list(rows[0])
    cells = ([row.get(name, "") for name in columns] for row in rows)
    rounded = ([round(v, 4) if isinstance(v, float) else v for v in row] for row in cells)
    write_csv(folder / "alignment.csv", columns, rounded)
    suspects = [row for row in rows if row["verdict"] != "ok"]
    for row in suspects:
        logger.warning("Check %s: %s.", row["scan"], row["reasons"])
    good = sorted(jobs[row["scan"]].result(".nii.gz") for row in rows if row["verdict"] == "ok")
    listed = {"training": [{"image": path.relative_to(folder).as_posix()} for path in good]}
    write_text(folder / "datalist.json", json.dumps(listed, indent=1) + "\n")
    _contact_sheet(folder / "contact_sheet.png", rows[:SHOWN], jobs)
    logger.info(
        "%d scan(s) are in %s, %d of them to check, see alignment.csv and contact_sheet.png.",
        len(rows),
        folder,
        len(suspects),
    )


def _contact_sheet(path: Path, rows: Sequence[dict[str, Any]], jobs: dict[str, _Job]) -> None:
    """The pictures of these scans, three a line."""
    across = min(3, len(rows))
    down = math.ceil(len(rows) / across)
    figure = Figure((6.3 * across, 2.75 * down), dpi=100, facecolor="black", layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, row in zip(grid, rows, strict=False):
        axes.imshow(imread(jobs[row["scan"]].result(".png")))
        name = row["scan"] if len(row["scan"]) <= 60 else "…" + row["scan"][-59:]
        ok = row["verdict"] == "ok"
        axes.set_title(
            name if ok else f"CHECK {name}", fontsize=9, color="0.9" if ok else "tab:orange", parse_math=False
        )
    write_whole(path, lambda temporary: figure.savefig(temporary))


# ------------------------------------------------------------------------------------------------ names and records


def _stem(name: str) -> str:
    """A path without the suffix of its image format."""
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _stems(names: Sequence[str]) -> list[str]:
    """Paths of the results, without their endings. Scans whose names differ in the suffix alone keep it as a word."""
    often = Counter(map(_stem, names))
    stems = []
    for name in names:
        stem = _stem(name)
        stems.append(stem if often[stem] == 1 else stem + "_" + name[len(stem) :].replace(".", ""))
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise ValueError(
            f"two scans would both be written as '{twice[0]}.nii.gz': rename one, or narrow --scan_pattern."
        )
    return stems


def _masks(names: Sequence[str], mask_dir: str | os.PathLike) -> list[Path | None]:
    """The mask of each scan: the same relative path, whatever the suffix; None where there is none or several."""
    root = Path(mask_dir).expanduser()
    if not root.is_dir():
        raise NotADirectoryError(f"mask_dir '{root}' is not a folder: set --mask_dir to the folder of the masks.")
    found = []
    for name in names:
        exact = root / name
        if exact.is_file():
            found.append(exact)
            continue
        candidates = [root / (_stem(name) + suffix) for suffix in SUFFIXES]
        candidates = [path for path in candidates if path.is_file()]
        found.append(candidates[0] if len(candidates) == 1 else None)
    return found


def _identity(job: _Job) -> dict[str, Any]:
    """What tells whether a scan or its mask changed: names, sizes, times of change."""
    return {"scan": _fingerprint(job.scan), "mask": _fingerprint(job.mask) if job.mask else None}


def _fingerprint(path: Path) -> str:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = [(file.name, status.st_size, status.st_mtime_ns) for file in files for status in [file.stat()]]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def _record(job: _Job) -> dict[str, Any] | None:
    """The record of a scan's results if these are whole and of the same input and settings, None otherwise."""
    try:
        record = json.loads(job.result(".json").read_text(encoding="utf-8"))
        same = record["input"] == _identity(job) and record["settings"] == job.settings
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if same and all(job.result(e).is_file() for e in (".nii.gz", ".tfm", ".png")) else None


def _check(spacing: float, workers: int | None) -> None:
    if isinstance(spacing, bool) or not isinstance(spacing, numbers.Real) or not 0.5 <= spacing <= 8:
        raise ValueError(f"spacing is {spacing!r}: it must be a number of mm from 0.5 to 8.")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        raise ValueError(f"workers is {workers!r}: it must be a whole number, 1 or more.")


# ----------------------------------------------------------------------------------------------------- command line


def main() -> None:
    """The command line of this module."""
    if run("python -m scripts.prepare", prepare).failures:
        sys.exit(1)


if __name__ == "__main__":
    # Worker processes find functions by their module's name, which `python -m` hides behind __main__.
    from scripts import prepare as module

    module.main()
