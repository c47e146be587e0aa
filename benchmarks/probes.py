"""What do a scan's coordinates know? Linear probes of what phantoms are made of.

    python -m scripts.phantoms brains --output_dir brains --count 1280
    python -m benchmarks.probes --dataset_dir brains --output_dir OUT

encodes phantoms of another seed with the weights that come with the bundle (``--ckpt`` names others), and predicts
from a few numbers per phantom, by ridge regression, the contrast of its tissues, the size of its ventricles and of
its brain, and the volume of its lesions. The numbers are the population prior's coordinates, the scores of as many
principal components of the training scans, and the means of the coarse latents. It prints a Markdown table of R² in
phantoms that the regression has not seen (10-fold cross-validation, the mean and the standard error over the folds):
1 is perfect, 0 no better than the mean.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

from benchmarks.peers import cohort_scans, stack
from scripts.inference.inferers import Encoding
from scripts.phantoms import make_brains
from scripts.phantoms.anatomy import brain_anatomy, near_ventricles, random_streams
from scripts.phantoms.images import draw_contrast
from scripts.utils.command_line import run

PENALTIES = np.logspace(-1, 5, 13)
FOLDS = 10
COARSE = 4  # grids up to 4³
VENTRICLES = 0.6  # of scripts.phantoms.anatomy.near_ventricles: inside, and up to 4 mm beyond the wall


def phantom_facts(index: int, seed: int, spacing: float) -> dict[str, float]:
    """What a phantom is made of: contrasts as ratios to white matter, volumes in ml."""
    anatomy = brain_anatomy(index, seed, spacing)
    white, gray, fluid = draw_contrast(random_streams(index, seed).contrast)
    inside = near_ventricles(anatomy, spacing) > VENTRICLES
    voxel = spacing**3 / 1000
    return {
        "gray matter's contrast": gray / white,
        "CSF's contrast": fluid / white,
        "ventricles": float(anatomy.tissues[0][inside].sum()) * voxel,
        "CSF": float(anatomy.tissues[0].sum()) * voxel,
        "brain": float(anatomy.brain.sum()) * voxel,
    }


def probe(features: np.ndarray, target: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """R² of a ridge regression, ``[scans, numbers]`` to ``[scans]``, in folds that it has not seen: mean and error."""
    regression = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
    folds = KFold(min(FOLDS, len(target) // 4), shuffle=True, random_state=seed)
    scores = cross_val_score(regression, features, target, cv=folds, scoring="r2")
    return scores.mean(), scores.std(ddof=1) / np.sqrt(len(scores))


@torch.no_grad()
def encode(parser: ConfigParser, scans: Tensor, batch_size: int) -> dict[str, np.ndarray]:
    """Coordinates, and the means of the latents of coarse grids, ``[scans, numbers]`` each."""
    network, prior = parser.get_parsed_content("network").eval(), parser.get_parsed_content("population_prior")
    encoding, grids = Encoding(prior=prior), network.latent_grids()
    coarse = [f"mean{index:02d}" for index, grid in enumerate(grids) if max(grid[1:]) <= COARSE]
    rows = [encoding(x.to(next(network.parameters()).device), network) for x in scans.split(batch_size)]
    found = {} if prior is None else {"coordinates": torch.cat([row["coordinates"] for row in rows])}
    found[f"latents up to {COARSE}³"] = torch.cat([torch.cat([row[k].flatten(1) for k in coarse], 1) for row in rows])
    return {name: values.cpu().double().numpy() for name, values in found.items()}


def main(
    dataset_dir: str,
    output_dir: str,
    ckpt: str = "models/model.pt",
    config_file: str | Sequence[str] = "configs/inference.json",
    count: int = 1024,
    seed: int = 11,
    spacing: float = 2.0,
    batch_size: int = 8,
) -> None:
    """Probe, and print.

    Args:
        dataset_dir: the scans that the network was trained on, for PCA.
        output_dir: for the phantoms that are probed, half of them with bright lesions, and the cache.
        ckpt: weights, with the population prior beside them.
        config_file: of the network, one or a list.
        count: phantoms to probe.
        seed: of these.
        spacing: of these, in mm.
        batch_size: of encoding.
    """
    folder = Path(output_dir)
    parser = ConfigParser()
    parser.read_config(list(ensure_tuple(config_file)))
    parser.update({"ckpt": ckpt})
    lesions = folder / "probed_lesions"
    make_brains(folder / "probed", count, seed=seed, spacing=spacing, lesions=0.5, mask_dir=lesions)
    preprocess = parser.get_parsed_content("preprocessing")
    paths = sorted((folder / "probed").glob("*.nii.gz"))
    scans = stack([preprocess({"image": str(path)}) for path in tqdm(paths, "reading", unit="scan")])
    indices = [int(re.search(r"sub-(\d+)", path.name)[1]) for path in paths]
    facts = [phantom_facts(index, seed, spacing) for index in tqdm(indices, "phantoms' facts", unit="scan")]
    targets = {name: np.array([fact[name] for fact in facts]) for name in facts[0]}
    masks = [lesions / f"sub-{index:04d}_lesions.nii.gz" for index in indices]
    load = preprocess.transforms[0]
    targets["lesions"] = np.array([float(load({"image": str(m)})["image"].sum()) * spacing**3 / 1000 for m in masks])

    features = encode(parser, scans, batch_size)
    training, _ = cohort_scans(dataset_dir, str(folder / "cache"), scans.shape[2:], seed=0)
    components = features.get("coordinates", next(iter(features.values()))).shape[1]
    pca = PCA(min(components, len(training) - 1), svd_solver="randomized", random_state=0)
    features["PCA"] = pca.fit(training.flatten(1).numpy()).transform(scans.flatten(1).numpy())
    print("| from | numbers | " + " | ".join(targets) + " |\n|" + "---|" * (2 + len(targets)))
    for name, values in features.items():
        found = (probe(values, target) for target in targets.values())
        cells = " | ".join(f"{mean:.3f} ± {error:.3f}" for mean, error in found)
        print(f"| {name} | {values.shape[1]} | {cells} |")


if __name__ == "__main__":
    run("python -m benchmarks.probes", main)
