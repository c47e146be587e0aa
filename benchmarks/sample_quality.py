"""Do samples vary as scans do, look like scans, cover them, and differ from those that were trained on?

    python -m benchmarks.sample_quality --dataset_dir brains --test_dir TEST

says it of the weights that come with the bundle (`--ckpt` names others), by as many samples as `--test_dir` has scans;
`--dataset_dir` is what they were trained on. All of it on voxels, as they are: `[images, *any]`, of any one shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import read_config, stack
from scripts.data.find import find_scans
from scripts.inference.inferers import Sampling
from scripts.utils.command_line import run

BANDS = ((0, 5), (5, 20), (20, 50), (50, 100))  # of principal components, leading first


def spectrum(
    samples: Tensor, scans: Tensor, training: Tensor, bands: Sequence[tuple[int, int]] = BANDS
) -> dict[str, float]:
    """The variance of samples over that of scans, in bands of principal components: 1 where they vary alike.

    Args:
        samples, scans: two or more each.
        training: the components are of these, which are neither of the two, so that neither is favoured.

    Returns:
        `{"1-5": ratio, ...}`, as far as there are components.
    """
    training = training.flatten(1).double()
    mean = training.mean(0)
    count = min(bands[-1][1], len(training) - 1, training.shape[1])
    _, _, components = torch.svd_lowrank(training - mean, q=min(count + 20, *training.shape), niter=4)
    variances = [((x.flatten(1).double() - mean) @ components[:, :count]).var(0) for x in (samples, scans)]
    return {
        f"{first + 1}-{last}": (variances[0][first:last].sum() / variances[1][first:last].sum()).item()
        for first, last in bands
        if last <= count
    }


def precision_recall(samples: Tensor, scans: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Which samples lie among the scans, and which scans among the samples (Kynkäänniemi et al. 2019).

    An image lies among others if it is not farther from one of them than that one's `neighbours`-th nearest.

    Args:
        samples, scans: more than `neighbours` each; of fewer the farthest counts.

    Returns:
        precision and recall, 0 to 1. Of as many scans more, instead of samples, they are what is to be had.
    """
    a, b = samples.flatten(1).double(), scans.flatten(1).double()
    between = torch.cdist(a, b)
    # the nearest of an image is itself
    reach_a, reach_b = (torch.cdist(x, x).kthvalue(min(neighbours + 1, len(x)), dim=1).values for x in (a, b))
    precision = (between <= reach_b[None, :]).any(1).double().mean()
    recall = (between <= reach_a[:, None]).any(0).double().mean()
    return precision.item(), recall.item()


def nearest_training(samples: Tensor, scans: Tensor, training: Tensor) -> float:
    """The median distance of samples to their nearest training scan, over that of held-out scans to theirs.

    Far below 1 where a model gives back what it was trained on; noise, or a blur, moves it too.
    """
    distances = [
        torch.cdist(x.flatten(1).double(), training.flatten(1).double()).amin(1).median() for x in (samples, scans)
    ]
    return (distances[0] / distances[1]).item()


@torch.no_grad()
def main(
    dataset_dir: str,
    test_dir: str,
    ckpt: str = "models/model.pt",
    config_file: str | Sequence[str] = "configs/inference.json",
    most: int = 1024,
    batch_size: int = 8,
    seed: int = 0,
) -> None:
    """Measure, and print.

    Args:
        dataset_dir: training scans.
        test_dir: scans that were not trained on.
        ckpt: weights, with the population prior beside them if they have one.
        config_file: of the network, one or a list.
        most: how many of the training scans to take.
        batch_size: of sampling.
        seed: of the samples.
    """
    parser = read_config(config_file, ckpt=ckpt)
    network, preprocess = parser.get_parsed_content("network").eval(), parser.get_parsed_content("preprocessing")

    def read(folder: str, count: int | None = None) -> Tensor:
        paths = find_scans(folder, "*.nii*")[:count]
        return stack(preprocess({"image": str(path)}) for path in tqdm(paths, folder, unit="scan"))

    training, scans = read(dataset_dir, most), read(test_dir)
    torch.manual_seed(seed)
    sampling = Sampling(prior=parser.get_parsed_content("population_prior"))
    counts = [len(part) for part in scans.split(batch_size)]
    samples = torch.cat([sampling(count, network)["sample"] for count in counts])
    half = len(scans) // 2
    for name, drawn, others in (("samples", samples, scans), ("one half of the scans", scans[:half], scans[half:])):
        bands = ", ".join(f"{band} {ratio:.2f}" for band, ratio in spectrum(drawn, others, training).items())
        precision, recall = precision_recall(drawn, others)
        nearest = nearest_training(drawn, others, training)
        quality = f"precision {precision:.2f}, recall {recall:.2f}, nearest training scan {nearest:.2f}"
        print(f"{name}: variance {bands}; {quality}")


if __name__ == "__main__":
    run("python -m benchmarks.sample_quality", main)
