"""Our network beside its peers: the same scans, the same machine, the same minutes.

    python -m scripts.phantoms brains --output_dir brains --count 1280
    python -m benchmarks.peers --dataset_dir brains --minutes 45 --output_dir OUT/peers \\
        --ckpt "['OUT/checkpoints/model.pt','models/model.pt']" --ckpt_minutes "[45,180]"

trains the peers (:py:mod:`benchmarks.peer_models`) on the training side of ``dataset_dir``, split and preprocessed as
``configs/train.json`` does, and measures all of them on phantoms of another seed. It prints two Markdown tables, writes
them to ``peers.csv`` and ``samples.csv``, and draws a reconstruction and a sample of each model. Weights are kept in
``output_dir`` as training goes on: the same command goes on with a run that was stopped, and ``--minutes 0`` takes the
weights as they are.

The peers see plain scans, which favours them: our network trains on augmented ones, and has to explain these too. The
number of PCA's components, and which weights an autoencoder keeps, are chosen on the validation side. Minutes are of
processor time of one thread, which is the time on the clock where nothing else runs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.networks.layers import GaussianFilter
from monai.transforms import Compose
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import CONFIGS, print_table, read_config, stack
from benchmarks.lesions import counts_of
from benchmarks.peer_diffusion import LATENTS_PER_BATCH, LatentDiffusion
from benchmarks.peer_models import VAE, LatentDiffusionAutoencoder, Peer, VoxelGaussian, fit_pca, train
from scripts.data.transforms import unclipped
from scripts.inference.cohort import list_scans
from scripts.inference.detection import detect
from scripts.inference.inferers import Sampling
from scripts.inference.lesions import pair_masks, with_masks
from scripts.inference.sample_comparison import compare_images
from scripts.inference.scoring import anomaly_map, image_quality, restored
from scripts.layers.gaussian import Draws
from scripts.layers.output import foreground
from scripts.networks import OUTPUT_RANGES, VDVAE
from scripts.phantoms import make_brains
from scripts.population.prior import PopulationPrior, find_population_prior
from scripts.training.checkpoints import load_weights
from scripts.training.losses import bits_per_dim, negative_log_likelihood
from scripts.utils import figures
from scripts.utils.command_line import run
from scripts.utils.files import write_csv

COLUMNS = {
    "model": "model",
    "bits_per_dim": "bits per dim",
    "likelihood": "which is",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "mmd": "MMD of samples",
    "ms_ssim": "MS-SSIM of samples",
    "average_precision": "lesions: average precision",
    "auroc": "lesions: AUROC of scans",
    "parameters": "parameters",
    "minutes": "minutes of training",
}
EXPLANATION = """\
Of {scans} test phantoms: bits per dim (lower is better) are exact for the two Gaussians, and the negative ELBO, an
upper bound, for the others; PSNR and SSIM are of the reconstruction from the posterior's mean (PCA's projection, the
mean scan). Of {samples} samples beside them: MMD (lower is better; halves of the phantoms have {reference:.4f} among
themselves in the mean, and 95 % of them less than {bound:.4f}) and the mean MS-SSIM of pairs (best where it is the
phantoms' own, {diversity:.3f}). Samples are the mean of the voxels given the latents; the Gaussian, which has none,
draws voxels. AutoencoderKL is made for a diffusion model of its latents: it is trained as for that, but without the
adversarial and the perceptual part, and is sampled and scored with a N(0, I) that it was hardly made to match. The
latent diffusion model was trained on its latents for as many minutes again. Of
{lesions} other phantoms, {sick} of them with lesions ({share:.2%} of the foreground): average precision of the anomaly
map's voxels (chance: that share), and AUROC of its 99.9th percentile (chance: 0.5). A map is how many standard
deviations a scan lies above its reconstruction, ours above its restored one, smoothed alike.

Of the samples in voxels: their variance over the test phantoms', in bands of principal components of the training scans
(1: they vary alike); precision and recall (3 nearest neighbours); and the distance to the nearest training scan, over
that of the test phantoms (far below 1: copies). The last row takes scans of the validation side for samples: what can
be had."""


class Ours(Peer):
    """Our network as the peers are.

    Args:
        network: the network.
        restore: see :py:class:`scripts.inference.scoring.Scoring`.
        temperature: of samples.
        prior: the population prior that samples are drawn from; None: the network's own.
    """

    likelihood = "ELBO"

    def __init__(
        self, network: VDVAE, restore: float | None, temperature: float = 1.0, prior: PopulationPrior | None = None
    ) -> None:
        super().__init__(network.spatial_shape)
        self.network, self.restore, self.sampling = network, restore, Sampling(temperature, prior=prior)

    def nats(self, x: Tensor) -> Tensor:
        (loc, scale, kl), _ = self.network.infer(x)
        return negative_log_likelihood(loc, scale, x) + kl.sum(1)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale, _ = self.network.infer(x, temperature=0.0)[0]
        return loc, scale

    def sample(self, count: int, draws: Draws | None = None) -> Tensor:
        return self.sampling(count, self.network, draws=draws)["sample"]

    def anomaly(self, x: Tensor) -> Tensor:
        expected = self.reconstruct(x.clamp(*OUTPUT_RANGES[self.output_activation]))
        if self.restore is not None:
            expected = restored(x, *expected, self.network, self.restore)
        return anomaly_map(x, *expected, self)


def name_checkpoints(
    ckpt: str | Sequence[str], minutes: float | Sequence[float] | None
) -> list[tuple[str, str, float | None]]:
    """A row's name, its weights, and the minutes that these were trained: `ours`, or of several `ours, 45 minutes`."""
    if isinstance(ckpt, str):
        return [("ours", ckpt, minutes)]
    if not isinstance(minutes, Sequence) or len(set(minutes)) != len(ckpt):
        raise ValueError(
            f"ckpt_minutes is {minutes}: of several ckpt it tells the rows apart. Give {len(ckpt)} different numbers."
        )
    return [(f"ours, {spent:g} minutes", path, spent) for path, spent in zip(ckpt, minutes, strict=True)]


def cohort_scans(dataset_dir: str, cache_dir: str, spatial_shape: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """The plain scans of the training and of the validation side, `[scans, 1, *spatial]` each, in [-1, 1]."""
    settings = {"dataset_dir": dataset_dir, "cache_dir": cache_dir, "spatial_shape": list(spatial_shape)}
    parser = read_config(CONFIGS / "train.json", **settings, seed=seed, augment=False, num_workers=0)
    training, validation = (parser.get_parsed_content(f"{side}#dataset") for side in ("train", "validate"))
    return stack(training), stack(validation)


def held_out_numbers(peer: Peer, scans: Tensor, batch_size: int) -> dict[str, float]:
    """Bits per dim, PSNR and SSIM, the means over scans."""
    found = []
    for x in scans.split(batch_size):
        recon = peer.reconstruct(x)[0].clamp(-1, 1)
        numbers = {"bits_per_dim": bits_per_dim(peer.nats(x), x), **image_quality(recon, x, peer)}
        found.append(numbers)
    return {name: torch.cat([numbers[name] for numbers in found]).mean().item() for name in found[0]}


def lesion_scans(folder: Path, preprocess: Compose, **cohort: Any) -> tuple[Tensor, Tensor]:
    """Phantoms, and which voxels are in a lesion: `[scans, 1, *spatial]` each.

    Args:
        folder: for the phantoms and their masks.
        preprocess: of the bundle's inference, that does not clip.
        cohort: what :py:func:`scripts.phantoms.make_brains` takes.
    """
    make_brains(folder / "scans", mask_dir=folder / "masks", **cohort)
    listed = list_scans(folder / "scans", "*_FLAIR.nii.gz")
    pairs = pair_masks(listed, folder / "scans", "*_FLAIR.nii.gz", folder / "masks", "*_lesions.nii.gz")
    read, scans, lesions = with_masks(preprocess), [], []
    for pair in pairs:
        item = read(pair)
        scans.append(item["image"].as_tensor())
        lesions.append(item["lesion_fitted"])
    return torch.stack(scans), torch.stack(lesions)


def lesion_numbers(peer: Peer, scans: Tensor, lesions: Tensor, smoothing: float, batch_size: int) -> dict[str, float]:
    """How well the anomaly map finds lesions that are brighter than expected: `average_precision` and `auroc`.

    Args:
        peer: the model.
        scans, lesions: `[scans, 1, *spatial]`, the scans not clipped.
        smoothing: standard deviation in voxels of the Gaussian that smooths the map.
        batch_size: of the model.
    """
    smooth = GaussianFilter(peer.spatial_dims, smoothing)
    maps = torch.cat([smooth(peer.anomaly(x)) for x in scans.split(batch_size)])
    value_range = OUTPUT_RANGES[peer.output_activation]
    counts = [counts_of(*parts, value_range) for parts in zip(maps, scans, lesions, strict=True)]
    brighter = detect(counts, {"all": [True] * len(counts)}, repeats=0)[0]
    return {name: float(brighter.numbers[name][0]) for name in ("average_precision", "auroc")}


def compare(
    dataset_dir: str,
    output_dir: str,
    ckpt: str | Sequence[str] = "models/model.pt",
    config_file: str | Sequence[str] = "configs/inference.json",
    cache_dir: str | None = None,
    minutes: float = 45,
    ckpt_minutes: float | Sequence[float] | None = None,
    amp: bool = False,
    samples: int = 64,
    test_count: int = 64,
    test_seed: int = 9,
    lesion_seed: int = 8,
    spacing: float = 2.0,
    batch_size: int = 8,
    seed: int = 0,
) -> None:
    """Train the peers, and print and write how they and our network do.

    Args:
        dataset_dir: the scans that our network was trained on.
        output_dir: for the peers' weights, the test phantoms, the table and the pictures.
        ckpt: weights of our network, one file or several. Samples at 0.7 are of the last.
        config_file: of our network, one or a list.
        cache_dir: of preprocessed scans; by default a folder of output_dir.
        minutes: to train each of the two autoencoders, and the diffusion model; 0 takes them as output_dir has them.
        ckpt_minutes: that each was trained, for the table; needed where there are several.
        amp: train these with bfloat16.
        samples: of each model.
        test_count: phantoms to test on, and as many to find lesions in.
        test_seed, lesion_seed: of these; training used another.
        spacing: of these, in mm.
        batch_size: of training and testing.
        seed: of the training run's split, and of all noise.
    """
    torch.set_num_threads(1)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    parser = read_config(config_file, population_prior=None)  # maps do not need it
    network_def, preprocess = parser.get_parsed_content("network_def"), parser.get_parsed_content("preprocessing")
    shape = network_def.spatial_shape
    smoothing, restore = min(shape) / 128, parser["restore"]
    training, validation = cohort_scans(dataset_dir, cache_dir or str(folder / "cache"), shape, seed)
    models = train_peers(training, validation, folder, minutes, batch_size, amp, seed)
    diffusion = models.pop("latent diffusion on AutoencoderKL")
    for name, path, spent in name_checkpoints(ckpt, ckpt_minutes):
        network = load_weights(copy.deepcopy(network_def), path).eval()
        models[name] = (Ours(network, restore), spent)
    cold = {"ours, samples at 0.7": Ours(network, restore, temperature=0.7)}
    cold["latent diffusion on AutoencoderKL"] = diffusion[0]
    prior = find_population_prior(None, ckpt if isinstance(ckpt, str) else ckpt[-1], network)
    if prior is not None:
        cold["ours, samples of the population prior"] = Ours(network, restore, prior=prior)

    make_brains(folder / f"test_{test_seed}", test_count, seed=test_seed, spacing=spacing)
    paths = sorted((folder / f"test_{test_seed}").glob("*.nii.gz"))
    test = stack(preprocess({"image": str(path)}) for path in paths)
    cohort = {"count": test_count, "seed": lesion_seed, "spacing": spacing, "lesions": 0.5}
    sick, lesions = lesion_scans(folder / f"lesions_{lesion_seed}", unclipped(preprocess), **cohort)
    rows, quality = [], {}
    others = validation[:samples]
    with torch.no_grad():
        everyone = {**models, **{name: (peer, None) for name, peer in cold.items()}}
        for name, (peer, spent) in tqdm(everyone.items(), desc="measuring", unit="model"):
            torch.manual_seed(seed)
            drawn = draw_samples(peer, samples, batch_size)
            compared = quality[name] = compare_images(
                drawn, test[: len(drawn)], OUTPUT_RANGES["tanh"], batch_size, training=training
            )
            row = {"model": name, **compared}
            if name in models:
                row |= {"likelihood": peer.likelihood, "parameters": peer.size(), "minutes": spent}
                row |= held_out_numbers(peer, test, batch_size)
                row |= lesion_numbers(peer, sick, lesions, smoothing, batch_size)
            rows.append(row)
        beside = test[: len(others)], OUTPUT_RANGES["tanh"], batch_size
        quality["scans of the validation side"] = compare_images(others, *beside, training=training)
        draw(folder, {name: peer for name, (peer, _) in models.items()}, cold, test[:1], seed)
    write_table(folder / "peers.csv", COLUMNS, rows)
    found = [name for name in compared if name.startswith(("variance", "precision", "recall", "nearest"))]
    columns = {name: name for name in ("model", *found)}
    write_table(folder / "samples.csv", columns, [{"model": name, **found} for name, found in quality.items()])
    numbers = {"scans": test_count, "samples": samples, "lesions": test_count}
    numbers |= {"reference": compared["mmd_halves_mean"], "bound": compared["mmd_halves_95"]}
    numbers |= {"diversity": compared["ms_ssim_held_out"], "sick": int(lesions.flatten(1).any(1).sum())}
    print(EXPLANATION.format(**numbers, share=lesions[foreground(sick, network_def)].float().mean()))


def train_peers(
    training: Tensor, validation: Tensor, folder: Path, minutes: float, batch_size: int, amp: bool, seed: int
) -> dict[str, tuple[Peer, float | None]]:
    """Every peer by its name, fitted or trained, and the minutes that its training took; None where it needs none."""
    torch.manual_seed(seed)
    gaussian, pca = VoxelGaussian(training), fit_pca(training, validation)
    models: dict[str, tuple[Peer, float | None]] = {"Gaussian per voxel": (gaussian, None)}
    models[f"PCA, {pca.axes.shape[1]} components"] = (pca, None)
    for name, peer in (("VarAutoEncoder", VAE(gaussian)), ("AutoencoderKL", LatentDiffusionAutoencoder(gaussian))):
        path = folder / f"{name}.pt"
        models[name] = (peer, train(peer, training, validation, path, minutes, batch_size, amp, seed))
    diffusion = LatentDiffusion(models["AutoencoderKL"][0], training)
    latents = diffusion.latents(training), diffusion.latents(validation)
    spent = train(diffusion, *latents, folder / "LatentDiffusion.pt", minutes, LATENTS_PER_BATCH, amp, seed)
    return {**models, "latent diffusion on AutoencoderKL": (diffusion, spent)}


def write_table(path: Path, columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    """Write a table as CSV, and print it with the columns' headings."""
    write_csv(path, list(columns), ([row.get(name) for name in columns] for row in rows))
    print_table(list(columns.values()), ([cell(row.get(name)) for name in columns] for row in rows))
    print()


def draw_samples(peer: Peer, count: int, batch_size: int) -> Tensor:
    """`[count, 1, *spatial]`."""
    return torch.cat([peer.sample(min(batch_size, count - start)) for start in range(0, count, batch_size)])


def cell(value: str | int | float | None) -> str:
    """Of the table: a dash where there is no number."""
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else value or "-"


def draw(folder: Path, peers: dict[str, Peer], cold: dict[str, Peer], scan: Tensor, seed: int) -> None:
    """`reconstructions.png` of a scan, `[1, 1, *spatial]`, and `samples.png`, a column a model; `cold` ones sample."""
    torch.manual_seed(seed)
    for name, images in (
        ("reconstructions", {label: peer.reconstruct(scan)[0] for label, peer in peers.items()}),
        ("samples", {label: peer.sample(1) for label, peer in (peers | cold).items()}),
    ):
        columns = {"test scan": scan} | images
        shown = [image[0] for image in columns.values()]
        figures.strip(folder / f"{name}.png", shown, list(columns), OUTPUT_RANGES["tanh"])


if __name__ == "__main__":
    run("python -m benchmarks.peers", compare)
