"""Raw heads prepared for training: bias-corrected, aligned to ICBM152, skull-stripped, resampled once; and judged."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK
from matplotlib.image import imsave
from monai.data import MetaTensor
from scipy import ndimage
from scipy.spatial.transform import Rotation
from scipy.stats import median_abs_deviation
from scripts.data.registration import (
    FLIP,
    ON_SCALP,
    align_brain,
    align_head,
    array_and_affine,
    brain_centre,
    brain_mask,
    foreground,
    log_bias_field,
    smooth_for,
    template,
    template_brain,
    to_sitk,
)
from scripts.data.transforms import CheckScand, LoadScand, ScanError
from scripts.utils.files import write_bytes, write_text, write_whole
from scripts.utils.formats import file_states, nifti_bytes
from scripts.utils.sheets import plane

METHOD = 3  # raised whenever the same scan and settings give another result, so that old results are replaced
STRIPPED = 0.8  # Dice of a scan's foreground with the template's brain; that of a head with its scalp is about 0.6

# What no brain that is aligned well goes beyond; see docs/preparing.md for how these were chosen.
LIMITS = {
    "similarity": (0.15, math.inf),
    "overlap": (0.9, 1.0),
    "scalp_inside": (0.0, ON_SCALP),
    "volume_ratio": (0.85, 2.2),
    "stretch": (1.0, 1.35),
    "rotation": (0.0, 45.0),
}
# How far from the cohort's median, in robust standard deviations, and the least that such a deviation is taken to be.
OUTLYING, MIN_COHORT = 4.0, 8
FLOORS = {"similarity": 0.02, "overlap": 0.02, "log_volume_ratio": 0.1, "stretch": 0.02}


class Job(NamedTuple):
    """One scan: where it is, where its results go, how they are made.

    Attributes:
        name: posix path relative to the data set.
        scan: its file, or the folder of a DICOM series.
        mask: a brain mask of the user's own.
        stem: path of the results, without any ending.
        settings: ``method``, ``spacing`` (mm), ``keep_skull`` and ``bias_correction``.
    """

    name: str
    scan: Path
    mask: Path | None
    stem: Path
    settings: dict[str, Any]

    def result(self, ending: str) -> Path:
        """The path of one result, such as that with the ending ``.nii.gz``."""
        return self.stem.with_name(self.stem.name + ending)


def prepare_scan(job: Job) -> tuple[str, str | None]:
    """Make the results of one scan; the record is written last, and shows that they are complete.

    Returns:
        The scan's name, and the reason if that failed.
    """
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    identity = _identity(job)
    for ending in (".json", ".nii.gz", ".tfm", ".png"):
        job.result(ending).unlink(missing_ok=True)
    try:
        image = _read(job.scan)
        _check_extent(image, job.scan)
        voxels = SimpleITK.GetArrayViewFromImage(image)
        lowest, highest = float(voxels.min()), float(voxels.max())
        head = _read_mask(job.mask, image) if job.mask else foreground(image)
        # A bias field is a factor; scans with negative values (CT, z-scores) have none to find.
        corrected = job.settings["bias_correction"] and np.count_nonzero(voxels < 0) <= 0.01 * voxels.size
        if corrected:
            image = SimpleITK.Clamp(image, SimpleITK.sitkFloat32, 0.0, highest)
            lowest = max(lowest, 0.0)
            image = image / SimpleITK.Exp(log_bias_field(image, head))
        shown = SimpleITK.Mask(image, head, lowest) if job.mask else image
        (transform, similarity), scalp = align_head(shown, head)

        dice, overlap = _overlap(head, transform)
        stripped = bool(dice >= STRIPPED and scalp <= ON_SCALP)
        whole = job.mask or stripped
        if not whole and scalp <= ON_SCALP:
            transform = align_brain(image, transform)
        row = {
            "scan": job.name,
            "similarity": similarity,
            "overlap": overlap,
            "dice": dice,
            "scalp_inside": scalp,
            **_movement(transform),
            "skull_stripped": stripped,
            "bias_corrected": bool(corrected),
        }
        values = (lowest, float(SimpleITK.GetArrayViewFromImage(image).max()))
        result = _resample(image, transform, job.settings["spacing"], values)
        mask = None
        if not job.settings["keep_skull"]:
            brain, place = (head, transform) if whole else (brain_mask(image, transform), SimpleITK.Transform())
            brain = SimpleITK.Cast(brain, SimpleITK.sitkFloat32)
            mask = SimpleITK.Resample(brain, result, place, SimpleITK.sitkLinear) >= 0.5
            result = SimpleITK.Mask(result, mask)
        job.stem.parent.mkdir(parents=True, exist_ok=True)
        write_whole(job.result(".tfm"), lambda path: SimpleITK.WriteTransform(transform, path))
        write_whole(job.result(".png"), lambda path: imsave(path, _picture(image, transform, mask)))
        write_bytes(job.result(".nii.gz"), nifti_bytes(*array_and_affine(result), world="mni", compresslevel=4))
        record = {"input": identity, "settings": job.settings, "row": row}
        write_text(job.result(".json"), json.dumps(record, indent=2) + "\n")
    except MemoryError:
        return job.name, "out of memory: lower --workers"
    except Exception as error:  # one scan must not end the preparation of the others
        return job.name, " ".join(str(error).split()) or type(error).__name__
    return job.name, None


def read_record(job: Job) -> dict[str, Any] | None:
    """The record of a scan's results; None if they are not complete, or of another input or other settings."""
    try:
        record = json.loads(job.result(".json").read_text(encoding="utf-8"))
        same = record["input"] == _identity(job) and record["settings"] == job.settings
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if same and all(job.result(e).is_file() for e in (".nii.gz", ".tfm", ".png")) else None


def _identity(job: Job) -> dict[str, Any]:
    """What changes when a scan or its mask changes."""
    return {"scan": _fingerprint(job.scan), "mask": _fingerprint(job.mask) if job.mask else None}


def _fingerprint(path: Path) -> str:
    """A hash of names, sizes and times of modification: a study that ``cp -p`` moved need not be prepared again."""
    return hashlib.sha256(json.dumps([state[:3] for state in file_states(path)]).encode()).hexdigest()


def _read(path: Path) -> SimpleITK.Image:
    """A scan, float32. Raises ScanError."""
    scan: MetaTensor = CheckScand("image")(LoadScand("image")({"image": str(path)}))["image"]
    return to_sitk(scan[0].numpy(), scan.affine.numpy().astype(float))


def _check_extent(image: SimpleITK.Image, path: Path) -> None:
    extent = [n * s for n, s in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    if min(image.GetSize()) < 8 or min(extent) < 60 or max(extent) > 1000:
        raise ScanError(
            f"'{path}' has {'x'.join(map(str, image.GetSize()))} voxels over {'x'.join(f'{e:.0f}' for e in extent)} "
            "mm, which is no scan of a whole brain: correct its header or leave it out with --scan_pattern."
        )


def _read_mask(path: Path, image: SimpleITK.Image) -> SimpleITK.Image:
    """A brain mask on the grid of a scan, uint8."""
    mask = SimpleITK.Resample(_read(path) > 0, image, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor)
    litres = np.count_nonzero(SimpleITK.GetArrayViewFromImage(mask)) * math.prod(image.GetSpacing()) / 1e6
    if litres < 0.1:
        raise ScanError(
            f"the mask '{path}' covers {litres:.2f} l of its scan, too little for a brain: "
            "make sure that both have the same world coordinates."
        )
    return mask


def _overlap(head: SimpleITK.Image, transform: SimpleITK.Transform) -> tuple[float, float]:
    """Dice of the scan's foreground with the template's brain, and the share of the latter that it covers."""
    brain = template_brain()
    found = SimpleITK.Resample(head, brain, transform, SimpleITK.sitkNearestNeighbor)
    ours, theirs = (SimpleITK.GetArrayViewFromImage(mask) > 0 for mask in (found, brain))
    both = np.count_nonzero(ours & theirs)
    return float(2 * both / (ours.sum() + theirs.sum())), float(both / theirs.sum())


def _movement(transform: SimpleITK.AffineTransform) -> dict[str, float]:
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


def _resample(
    image: SimpleITK.Image, transform: SimpleITK.Transform, spacing: float, values: tuple[float, float]
) -> SimpleITK.Image:
    """The scan on cubic voxels over the template's field of view: cubic splines, kept within the scan's own values."""
    grid = template()
    extent = [(n - 1) * s for n, s in zip(grid.GetSize(), grid.GetSpacing(), strict=True)]
    size = [math.floor(e / spacing + 1e-6) + 1 for e in extent]
    smooth = smooth_for(image, spacing)
    result = SimpleITK.Resample(
        smooth, size, transform, SimpleITK.sitkBSpline, grid.GetOrigin(), [spacing] * 3, grid.GetDirection(), 0.0
    )
    return SimpleITK.Clamp(result, SimpleITK.sitkFloat32, min(values[0], 0.0), values[1])


def _picture(image: SimpleITK.Image, transform: SimpleITK.Transform, mask: SimpleITK.Image | None = None) -> np.ndarray:
    """Three slices of the scan, skull and all: uint8 ``[rows, columns, 3]``.

    The template's outline is orange, that of the brain mask in the template's space blue.
    """
    grid = template()
    panels = []
    for axis, mm in ((2, 8.0), (1, -18.0), (0, 4.0)):
        index = round(abs(mm - FLIP[axis, axis] * grid.GetOrigin()[axis]))
        start, size = [0, 0, 0], list(grid.GetSize())
        start[axis], size[axis] = index, 1
        cut = SimpleITK.RegionOfInterest(grid, size, start)
        scan = _slice(SimpleITK.Resample(image, cut, transform, SimpleITK.sitkLinear), axis)
        brain = _slice(SimpleITK.RegionOfInterest(template_brain(), size, start), axis) > 0
        low, high = np.percentile(scan, 1), np.percentile(scan[brain], 99.5)
        gray = np.clip((scan - low) / max(high - low, 1e-6), 0, 1)
        colours = np.repeat((255 * gray).astype(np.uint8)[..., None], 3, -1)
        colours[_outline(brain)] = (255, 140, 0)
        if mask is not None:
            nearest = SimpleITK.Resample(mask, cut, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor)
            colours[_outline(_slice(nearest, axis) > 0)] = (0, 190, 255)
        panels.append(colours)
    tallest = max(len(panel) for panel in panels)
    return np.hstack([np.pad(p, ((0, tallest - len(p)), (0, 4), (0, 0))) for p in panels])


def _slice(cut: SimpleITK.Image, axis: int) -> np.ndarray:
    return plane(SimpleITK.GetArrayFromImage(cut).T, axis)


def _outline(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)


def flag_alignments(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
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
            deviation = max(float(median_abs_deviation(values, scale="normal")), floor)
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
