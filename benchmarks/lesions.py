"""Do anomaly maps find lesions? Phantoms with planted lesions, the bundle's map beside two baselines.

    python -m benchmarks.lesions --config_file "['configs/inference.json']" --ckpt models/model.pt

Voxel by voxel the average precision, in the foreground of all scans together; scan by scan the area under the ROC curve
of each map's 99.9th percentile in the foreground. Chance is the share of lesion voxels, and 0.5. The baselines are the
intensity itself and the distance, in standard deviations, to the mean of the training scans (the network's template).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.transforms import LoadImage, SpatialResample, Transform
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from tqdm import tqdm

from scripts.inference.inferers import Scoring, foreground, foreground_percentile
from scripts.networks import VDVAE
from scripts.phantoms import make_brains
from scripts.training.checkpoints import load_weights
from scripts.utils.command_line import run

LESION = 0.25  # the share of a voxel that makes it one of a lesion


def lesion_maps(network: VDVAE, scans: Tensor, scoring: Scoring) -> dict[str, Tensor]:
    """What is compared, each shaped like the scans: higher is more suspicious."""
    results = scoring(scans, network)
    plain = Scoring(smoothing=scoring.smoothing, restore=None)(scans, network)
    return {
        "intensity": scans,
        "distance to the mean scan": ((scans - network.template_mean) / network.template_std).abs(),
        "brighter than the mean scan": (scans - network.template_mean) / network.template_std,
        "z-score": plain["anomaly"],
        "anomaly (restored)": results["anomaly"],
    }


def lesion_scans(folder: Path, preprocess: Transform, **cohort: Any) -> tuple[Tensor, Tensor]:
    """Phantoms, and which voxels are in a lesion: `[scans, 1, *spatial]` each.

    Args:
        folder: for the phantoms and their masks.
        preprocess: of the bundle's inference.
        cohort: what :py:func:`scripts.phantoms.make_brains` takes.
    """
    make_brains(folder / "scans", mask_dir=folder / "masks", **cohort)
    load, resample = LoadImage(ensure_channel_first=True), SpatialResample(mode="bilinear", padding_mode="zeros")
    scans, lesions = [], []
    for path in sorted((folder / "scans").glob("*.nii.gz")):
        scan = preprocess({"image": str(path)})["image"]
        mask = load(folder / "masks" / path.name.replace("FLAIR", "lesions"))
        scans.append(scan.as_tensor())
        lesions.append(resample(mask, dst_affine=scan.affine, spatial_size=scan.shape[1:]).as_tensor() > LESION)
    return torch.stack(scans), torch.stack(lesions)


def detection(maps: Tensor, scans: Tensor, lesions: Tensor, network: VDVAE) -> dict[str, float]:
    """How well maps find lesions: `average_precision` of voxels, `auroc` of scans."""
    voxels = foreground(scans, network)
    return {
        "average_precision": average_precision_score(lesions[voxels], maps[voxels]),
        "auroc": roc_auc_score(lesions.flatten(1).any(1), foreground_percentile(maps, scans, network)),
    }


def main(
    config_file: str | list[str] = "configs/inference.json",
    ckpt: str = "models/model.pt",
    count: int = 64,
    seed: int = 8,
    prevalence: float = 0.5,
    spacing: float = 2.0,
    batch_size: int = 8,
) -> None:
    """Print average precision and area under the ROC curve of each map.

    Args:
        config_file: of the network, one or a list.
        ckpt: its weights.
        count: phantoms.
        seed: of the cohort; training and tuning used others.
        prevalence: share of the phantoms that have lesions.
        spacing: of the phantoms, in mm.
        batch_size: of the network.
    """
    parser = ConfigParser()
    parser.read_config(config_file)
    network = load_weights(parser.get_parsed_content("network_def"), ckpt).eval()
    parser.update({"population_prior": None})  # maps do not need it
    scoring, preprocess = parser.get_parsed_content("scoring_inferer"), parser.get_parsed_content("preprocessing")
    cohort = {"count": count, "seed": seed, "spacing": spacing, "lesions": prevalence}
    with tempfile.TemporaryDirectory() as folder:
        scans, lesions = lesion_scans(Path(folder), preprocess, **cohort)
    with torch.no_grad():
        batches = [lesion_maps(network, batch, scoring) for batch in tqdm(scans.split(batch_size), unit="batch")]
    maps = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    sick = int(lesions.flatten(1).any(1).sum())
    share = lesions[foreground(scans, network)].float().mean()
    print(f"{count} phantoms, {sick} with lesions, which are {share:.2%} of the foreground's voxels")
    print(f"{'map':<32}{'average precision':>20}{'AUROC of scans':>18}")
    for name, values in maps.items():
        found = detection(values, scans, lesions, network)
        print(f"{name:<32}{found['average_precision']:>20.3f}{found['auroc']:>18.3f}")


if __name__ == "__main__":
    run("python -m benchmarks.lesions", main)
