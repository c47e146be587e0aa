"""Do anomaly maps find lesions? Phantoms with planted lesions, the bundle's map beside two baselines.

    python -m benchmarks.lesions --config_file "['configs/inference.json']" --ckpt models/model.pt

Voxel by voxel the average precision, in the foreground of all scans together; scan by scan the area under the ROC curve
of each map's 99.9th percentile in the foreground. Chance is the share of lesion voxels, and 0.5. The baselines are the
intensity itself and the distance, in standard deviations, to the mean of the training scans (the network's template).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import fire
import torch
from monai.bundle import ConfigParser
from monai.transforms import LoadImage, SpatialResample
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from tqdm import tqdm

from scripts.checkpoints import load_weights
from scripts.inferers import Scoring, foreground_percentile
from scripts.networks import OUTPUT_RANGES, VDVAE
from scripts.phantoms import make_brains

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
    scoring, preprocess = parser.get_parsed_content("scoring#inferer"), parser.get_parsed_content("preprocessing")
    load, resample = LoadImage(ensure_channel_first=True), SpatialResample(mode="bilinear", padding_mode="zeros")
    scans, lesions = [], []
    with tempfile.TemporaryDirectory() as folder:
        make_brains(
            f"{folder}/scans", count, seed=seed, spacing=spacing, lesions=prevalence, mask_dir=f"{folder}/masks"
        )
        for path in sorted(Path(folder, "scans").glob("*.nii.gz")):
            scan = preprocess({"image": str(path)})["image"]
            mask = load(Path(folder, "masks", path.name.replace("FLAIR", "lesions")))
            mask = resample(mask, dst_affine=scan.affine, spatial_size=scan.shape[1:])
            scans.append(scan.as_tensor())
            lesions.append(mask.as_tensor() > LESION)
    x, truth = torch.stack(scans), torch.stack(lesions)
    low, high = OUTPUT_RANGES[network.output_activation]
    foreground = x > low + 0.05 * (high - low)
    with torch.no_grad():
        batches = [lesion_maps(network, batch, scoring) for batch in tqdm(x.split(batch_size), unit="batch")]
    maps = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    sick = truth.flatten(1).any(1)
    share = truth[foreground].float().mean()
    print(f"{count} phantoms, {int(sick.sum())} with lesions, which are {share:.2%} of the foreground's voxels")
    print(f"{'map':<32}{'average precision':>20}{'AUROC of scans':>18}")
    for name, values in maps.items():
        precision = average_precision_score(truth[foreground], values[foreground])
        area = roc_auc_score(sick, foreground_percentile(values, x, network))
        print(f"{name:<32}{precision:>20.3f}{area:>18.3f}")


if __name__ == "__main__":
    fire.Fire(main)
