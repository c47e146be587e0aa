"""Do anomaly maps find lesions? Phantoms with planted lesions of several kinds, the map beside the intensity alone.

    python -m benchmarks.lesions --config_file "['configs/inference.json']" --ckpt models/model.pt

runs the bundle's ``score`` and prints what it says of each kind, together with the healthy phantoms, on the network's
grid and on the scans' own: see :py:mod:`scripts.inference.detection`. Below that stands what a perfect restoration
would reach, whose scans are the same phantoms without their lesions: voxels of a coarse grid are in a lesion in part.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import print_table, read_config
from scripts.data.transforms import unclipped
from scripts.inference.cohort import list_scans
from scripts.inference.detection import Detection, best, by_kind, detect, sentences
from scripts.inference.lesions import LesionCounts, count_voxels, pair_masks, read_kinds, with_masks
from scripts.inference.scoring import anomaly_map
from scripts.phantoms import make_brains
from scripts.phantoms.lesions import KINDS
from scripts.utils.command_line import run
from scripts.utils.names import item_path


def score(folder: Path, config_file: str | list[str], **settings: Any) -> list[LesionCounts]:
    """Score the phantoms in ``scans`` with their ``masks``; results go to ``scores``.

    Args:
        folder: that holds these three.
        config_file, settings: of the bundle's inference.
    """
    parser = read_config(config_file)
    parser.update({"dataset_dir": str(folder / "scans"), "scan_pattern": "*_FLAIR.nii.gz"})
    parser.update({"mask_dir": str(folder / "masks"), "mask_pattern": "*_lesions.nii.gz"})
    parser.update({"output_dir": str(folder / "scores"), "figures": False, "num_workers": 0, **settings})
    parser.update({"population_prior": None})  # maps do not need it
    job = parser.get_parsed_content("scoring")
    job.run()
    layout, scans = job.layouts[-1], [item_path(item) for item in job.dataset.data]
    kinds = read_kinds(folder / "masks", scans)
    return [LesionCounts.load(layout.relative(scan), layout.path(scan))._replace(kind=kinds[scan]) for scan in scans]


def perfect(folder: Path, config_file: str | list[str], cohort: dict[str, Any], **settings: Any) -> list[LesionCounts]:
    """What would be counted on the network's grid if scans were restored to the same phantoms without lesions.

    Args:
        folder: that holds ``scans`` and ``masks``; the phantoms without lesions go to ``twins``.
        config_file, settings: of the bundle's inference.
        cohort: what :py:func:`scripts.phantoms.make_brains` takes, without the lesions.
    """
    make_brains(folder / "twins", **cohort)
    parser = read_config(config_file, **settings)
    network, preprocess = parser.get_parsed_content("network"), unclipped(parser.get_parsed_content("preprocessing"))
    read, value_range = with_masks(preprocess), parser.get_parsed_content("output_range")
    pattern = "*_FLAIR.nii.gz"
    listed = list_scans(folder / "scans", pattern)
    kinds, counts = read_kinds(folder / "masks", [item_path(item) for item in listed]), []
    for pair in pair_masks(listed, folder / "scans", pattern, folder / "masks", "*_lesions.nii.gz"):
        item, path = read(pair), Path(item_path(pair))
        twin = preprocess({"image": str(folder / "twins" / path.name)})["image"].as_tensor()
        scan = item["image"].as_tensor()
        anomaly = anomaly_map(scan, twin, torch.zeros_like(twin), network)
        counted = counts_of(anomaly, scan, item["lesion_fitted"], value_range)
        counts.append(counted._replace(name=path.name, kind=kinds[str(path)]))
    return counts


def counts_of(anomaly: Tensor, scan: Tensor, lesion: Tensor, value_range: tuple[float, float]) -> LesionCounts:
    """Counts of a scan on the network's grid: anomaly map, scan and lesions, ``[channels, *spatial]``."""
    low, high = value_range
    found = count_voxels(anomaly.numpy(), ((scan - low) / (high - low)).numpy(), lesion.numpy())
    scores, _ = found.pop("scores"), found.pop("lesions")
    return LesionCounts("", "lesions" if lesion.any() else "empty", {"network": found}, {"network": scores})


def side_by_side(found: Sequence[Detection]) -> list[list[str]]:
    """Rows of a table, one per kind and grid: the map and the intensity, each in the order that finds most voxels.

    It has average precision of voxels and AUROC of scans, both with their 95 % intervals, and Dice.
    """
    rows = []
    pairs = iter(best(found))
    for pair in zip(pairs, pairs, strict=True):
        cells = [f"{pair[0].group} ({pair[0].lesions} scans, {pair[0].healthy} healthy)", pair[0].grid]
        cells += [f"{cell(d, 'average_precision')} {d.order}" for d in pair]
        cells += [f"{d.numbers['dice'][0]:.3f}" for d in pair]
        cells += [cell(d, "auroc") for d in pair]
        rows.append(cells)
    return rows


def cell(found: Detection, name: str) -> str:
    low, high = found.interval(name)
    return f"{found.numbers[name][0]:.3f} [{low:.3f}, {high:.3f}]"


def main(
    config_file: str | list[str] = "configs/inference.json",
    ckpt: str = "models/model.pt",
    count: int = 64,
    seed: int = 10,
    prevalence: float = 0.7,
    lesion_kinds: str | Sequence[str] = KINDS,
    spacing: float = 2.0,
    batch_size: int = 8,
    restore: float | None = 6.0,
) -> list[Detection]:
    """Print how well each kind is found, as a Markdown table, and a sentence for each kind and grid.

    Args:
        config_file: of the network, one or a list.
        ckpt: its weights.
        count: phantoms.
        seed: of the cohort; training and tuning used others.
        prevalence: share of the phantoms that have lesions.
        lesion_kinds: of these, see :py:func:`scripts.phantoms.make_brains`.
        spacing: of the phantoms, in mm.
        batch_size: of the network.
        restore: see :py:class:`scripts.inference.scoring.Scoring`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cohort = {"count": count, "seed": seed, "spacing": spacing}
        sick = {"mask_dir": folder / "masks", "lesions": prevalence, "lesion_kinds": lesion_kinds}
        make_brains(folder / "scans", **cohort, **sick)
        scans = score(folder, config_file, ckpt=ckpt, batch_size=batch_size, restore=restore)
        restored = perfect(folder, config_file, cohort, ckpt=ckpt)
    found = detect(scans, by_kind(scans))
    columns = ("lesions", "grid", "voxels: map", "voxels: intensity", "Dice: map", "intensity")
    print_table((*columns, "scans: map", "scans: intensity"), side_by_side(found))
    print("", *sentences(found), sep="\n")
    most = [d for d in best(detect(restored, by_kind(restored))) if d.what == "anomaly"]
    reached = ", ".join(f"{d.group} {d.numbers['average_precision'][0]:.3f}" for d in most)
    print(f"Average precision on the network's grid, had scans been restored to themselves without lesions: {reached}.")
    return found


if __name__ == "__main__":
    run("python -m benchmarks.lesions", main)
