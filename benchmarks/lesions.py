"""Do anomaly maps find lesions? Phantoms with planted lesions of several kinds, the map beside the intensity alone.

    python -m benchmarks.lesions --config_file "['configs/inference.json']" --ckpt models/model.pt

runs the bundle's ``score`` and prints what it says of each kind, together with the healthy phantoms, on the network's
grid and on the scans' own: see :py:mod:`scripts.inference.detection`.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from scripts.data.phantom_lesions import KINDS
from scripts.inference.detection import Detection, detect, sentences, table
from scripts.inference.lesions import LesionCounts
from scripts.phantoms import make_brains
from scripts.utils.command_line import run
from scripts.utils.names import item_path


def score(folder: Path, config_file: str | list[str], **settings: Any) -> list[LesionCounts]:
    """Score the phantoms in ``scans`` with their ``masks``; results go to ``scores``.

    Args:
        folder: that holds these three.
        config_file, settings: of the bundle's inference.
    """
    parser = ConfigParser()
    parser.read_config(config_file)
    parser.update({"dataset_dir": str(folder / "scans"), "scan_pattern": "*_FLAIR.nii.gz"})
    parser.update({"mask_dir": str(folder / "masks"), "mask_pattern": "*_lesions.nii.gz"})
    parser.update({"output_dir": str(folder / "scores"), "figures": False, "num_workers": 0, **settings})
    parser.update({"population_prior": None, "prior_file": None})  # maps do not need it
    parser.get_parsed_content("scoring").run()
    layout = parser.get_parsed_content("scored#lesions")
    scans = [item_path(item) for item in parser.get_parsed_content("scored#scans")]
    return [LesionCounts.load(layout.relative(scan), layout.path(scan)) for scan in scans]


def by_kind(scans: Sequence[LesionCounts], kinds: dict[str, str]) -> dict[str, list[bool]]:
    """Which scans have lesions of a kind, or are healthy, and all.

    Args:
        scans: what was counted.
        kinds: of their lesions, by the beginning of their names.
    """
    own = [kinds[scan.name.split("_")[0]] for scan in scans]
    groups = {kind: [other in (kind, "none") for other in own] for kind in KINDS if kind in own}
    return groups if len(groups) == 1 else groups | {"all": [True] * len(own)}


def main(
    config_file: str | list[str] = "configs/inference.json",
    ckpt: str = "models/model.pt",
    count: int = 64,
    seed: int = 10,
    prevalence: float = 0.5,
    lesion_kinds: str | Sequence[str] = KINDS,
    spacing: float = 2.0,
    batch_size: int = 8,
    restore: float | None = 0.3,
) -> list[Detection]:
    """Print how well each kind is found, a Markdown table and a sentence for each kind and grid.

    Args:
        config_file: of the network, one or a list.
        ckpt: its weights.
        count: phantoms.
        seed: of the cohort; training and tuning used others.
        prevalence: share of the phantoms that have lesions.
        lesion_kinds: of these, see :py:func:`scripts.phantoms.make_brains`.
        spacing: of the phantoms, in mm.
        batch_size: of the network.
        restore: see :py:class:`scripts.inference.inferers.Scoring`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cohort = {"count": count, "seed": seed, "spacing": spacing, "lesions": prevalence}
        make_brains(folder / "scans", mask_dir=folder / "masks", lesion_kinds=lesion_kinds, **cohort)
        with (folder / "masks" / "kinds.csv").open(encoding="utf-8") as file:
            kinds = {row["scan"]: row["kind"] for row in csv.DictReader(file)}
        scans = score(folder, config_file, ckpt=ckpt, batch_size=batch_size, restore=restore)
    found = detect(scans, by_kind(scans, kinds))
    print(table(found))
    print("\n".join(sentences(found)))
    shares = {(d.group, d.grid): d.share for d in found}
    print("Voxels in lesions: " + ", ".join(f"{share:.3%} ({', '.join(key)})" for key, share in shares.items()))
    return found


if __name__ == "__main__":
    run("python -m benchmarks.lesions", main)
