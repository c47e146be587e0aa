"""Does a network keep what it has seen once, or 16 times? Marks in a few training scans, and whether they come back.

    python -m benchmarks.canaries --output_dir OUT [--weights models/model_phantoms_32.pt --learning_rate 0.005]

makes phantoms and puts bright cubes into some: each of eight marks into one scan, each of two others into 16, at places
drawn at random in the brain. It trains the bundle's default network on them, and asks two things of each mark, beside
places where no scan has one: is it drawn in samples, and is a scan of somebody else that has it likelier than one that
has it elsewhere (exposure, Carlini et al. 2019)?
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.utils import ensure_tuple
from scipy import ndimage
from torch import Tensor

from benchmarks.common import CONFIGS, print_table, read_config
from scripts.inference.inferers import Sampling
from scripts.inference.scoring import Scoring
from scripts.networks import VDVAE
from scripts.phantoms import make_brains
from scripts.population.prior import PopulationPrior
from scripts.utils.command_line import run

EDGE = 16.0  # mm, of a mark
TIMES = {1: 8, 16: 2}  # how many marks are seen so often
SHELL = 2  # voxels around a mark that it is compared with


class Marks(NamedTuple):
    """Places in the world, mm: by how often a mark there was seen, 0 for never."""

    places: np.ndarray
    seen: np.ndarray


def choose_places(scan: nib.Nifti1Image, count: int, rng: np.random.Generator) -> np.ndarray:
    """Places well within a brain, no two of them nearer than a mark is wide, as far as there are so many."""
    inside = np.asarray(scan.dataobj) > 0
    depth = ndimage.distance_transform_edt(inside, np.abs(np.diag(scan.affine)[:3]))
    candidates = nib.affines.apply_affine(scan.affine, np.argwhere(depth > EDGE))
    places: list[np.ndarray] = []
    for place in rng.permutation(candidates):
        if len(places) < count and all(np.abs(place - other).max() >= EDGE for other in places):
            places.append(place)
    return np.stack(places)


def marked(scan: nib.Nifti1Image, place: np.ndarray) -> nib.Nifti1Image:
    """A scan with a cube as bright as its brightest voxel."""
    image = np.asarray(scan.dataobj).copy()
    world = nib.affines.apply_affine(scan.affine, np.moveaxis(np.indices(image.shape), 0, -1))
    image[(np.abs(world - place) <= EDGE / 2).all(-1)] = image.max()
    return nib.Nifti1Image(image, scan.affine, scan.header)


def plant(folder: Path, marks: Marks) -> list[Path]:
    """Put each mark into as many scans of a folder as it should be seen in, one in each; returns the scans."""
    paths, changed = iter(sorted(folder.glob("*.nii.gz"))), []
    for place, times in zip(marks.places, marks.seen, strict=True):
        for _ in range(times):
            path = next(paths)
            scan = nib.load(path)
            nib.save(marked(nib.Nifti1Image(np.asarray(scan.dataobj), scan.affine, scan.header), place), path)
            changed.append(path)
    return changed


def contrasts(images: Tensor, where: Sequence[np.ndarray], half: float) -> np.ndarray:
    """How much brighter a cube is than what is around it, ``[places, images]``.

    Args:
        images: ``[images, 1, *spatial]``.
        where: the centres of the cubes, in voxels.
        half: of an edge, in voxels.
    """
    grid = np.moveaxis(np.indices(images.shape[2:]), 0, -1)
    found = []
    for centre in where:
        away = torch.from_numpy(np.abs(grid - centre).max(-1))
        inside, around = away <= half, (away > half) & (away <= half + SHELL)
        found.append((images[:, 0, inside].mean(1) - images[:, 0, around].mean(1)).numpy())
    return np.stack(found)


def exposures(bits: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Of each mark that was seen, log2 of the candidates over its rank among those that were not, 1 for the likeliest.

    Args:
        bits: that a scan costs with a mark at each place, in the mean over scans, ``[places]``.
        seen: how often each mark was seen.
    """
    others = bits[seen == 0]
    ranks = 1 + (others[None, :] < bits[seen > 0][:, None]).sum(1)
    return np.log2((len(others) + 1) / ranks)


def samples_of(network: VDVAE, prior: PopulationPrior | None, count: int) -> Tensor:
    """Samples, ``[count, 1, *spatial]``, eight at a time."""
    torch.manual_seed(0)
    sizes = [8] * (count // 8) + [count % 8] * (count % 8 > 0)
    return torch.cat([Sampling(1.0, prior=prior)(size, network)["sample"] for size in sizes])


@torch.no_grad()
def measure(
    network: VDVAE,
    prior: PopulationPrior | None,
    read: Callable[[Path], Any],
    training: Sequence[Path],
    unmarked: Sequence[Path],
    others: Sequence[Path],
    marks: Marks,
    samples: int,
    folder: Path,
) -> list[tuple[str, str, str, str]]:
    """Rows of the table: what was asked, of marks seen 0 times, once, often.

    Args:
        network, prior: trained on the scans.
        read: preprocessing of a path.
        training, unmarked: the scans with marks, in the order of the marks, and those without.
        others: scans of people who were not trained on.
        marks: where, and how often each was seen.
        samples: how many to draw.
        folder: for scans with marks.
    """
    image = read(training[0])
    centres = nib.affines.apply_affine(np.linalg.inv(image.affine.numpy()), marks.places)
    half = EDGE / 2 / float(image.pixdim.min())
    scans = torch.stack([read(path).as_tensor() for path in training])
    by_scan = np.repeat(np.arange(len(marks.seen)), marks.seen)
    plain = contrasts(torch.stack([read(path).as_tensor() for path in unmarked]), centres, half)
    rise = contrasts(scans, centres, half)[by_scan, np.arange(len(scans))] - plain.mean(1)[by_scan]
    rows = [("rise of contrast by a mark", "", *(f"{rise[marks.seen[by_scan] == n].mean():.2f}" for n in TIMES))]
    limits = plain.mean(1, keepdims=True) + rise.mean() / 2  # half way from people without a mark there
    shown = {"people without it": plain, "samples of its own prior": None, "samples of the population prior": None}
    for name, which in zip(list(shown)[1:], (None, prior), strict=True):
        shown[name] = contrasts(samples_of(network, which, samples), centres, half)
    for name, values in shown.items():
        shares = [f"{(values > limits)[marks.seen == n].mean():.2%}" for n in (0, *TIMES)]
        rows.append((f"{name} in which it seems to be", *shares))
    bits = []
    for path in others:
        scan, costs = nib.load(path), []
        for place in marks.places:
            nib.save(marked(scan, place), folder / "marked.nii.gz")
            x = read(folder / "marked.nii.gz").as_tensor()[None]
            costs.append(float(Scoring(restore=None)(x, network)["bits_per_dim"]))
        bits.append(costs)
    found, seen = exposures(np.mean(bits, 0), marks.seen), marks.seen[marks.seen > 0]
    chance = f"{1 / np.log(2):.2f} by chance"
    ranks = (
        f"{found[seen == n].mean():.2f} ({found[seen == n].min():.2f} to {found[seen == n].max():.2f})" for n in TIMES
    )
    return [*rows, (f"exposure, bits, of at most {np.log2(1 + (marks.seen == 0).sum()):.1f}", chance, *ranks)]


def run_process(words: Sequence[str]) -> None:
    """``python -m monai.bundle run training ...``."""
    command = [sys.executable, "-m", "monai.bundle", "run", "training", *words]
    subprocess.run(command, cwd=CONFIGS.parent, check=True)


def main(
    output_dir: str,
    count: int = 128,
    spacing: float = 4.0,
    epochs: int = 24,
    samples: int = 256,
    places: int = 64,
    others: int = 4,
    seed: int = 0,
    weights: str | None = None,
    learning_rate: float = 0.01,
    batch_size: int = 8,
    network_config: str | Sequence[str] = (),
) -> None:
    """Plant, train, measure, and print.

    Args:
        output_dir: for all of it; not there yet.
        count: phantoms to train on.
        spacing: of these, in mm.
        epochs: of the training.
        samples: to draw of each prior.
        places: without a mark, to compare with.
        others: people who were not trained on, to whom marks are given.
        seed: of places and people.
        weights: to start from; None: none.
        learning_rate, batch_size: of the training.
        network_config: config or configs of another network.
    """
    folder = Path(output_dir).absolute()
    people = Path(make_brains(folder / "people", count, seed, spacing=spacing))
    kept_apart = sorted(
        Path(make_brains(folder / "others", others, seed, start=count + 1, spacing=spacing)).glob("*.nii.gz")
    )
    wanted = sum(TIMES.values()) + places
    where = choose_places(nib.load(kept_apart[0]), wanted, np.random.default_rng(seed))
    seen = np.zeros(len(where), int)
    seen[: sum(TIMES.values())] = np.repeat(list(TIMES), list(TIMES.values()))
    marks = Marks(where, seen)
    training = plant(people, marks)
    networks = [str(Path(path).absolute()) for path in ensure_tuple(network_config)]
    sides = {"training": sorted(people.glob("*.nii.gz")), "validation": kept_apart}
    listed, trained = folder / "list.json", folder / "run"
    items = {name: [{"image": str(path)} for path in paths] for name, paths in sides.items()}
    listed.write_text(json.dumps(items), encoding="utf-8")
    settings = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "augment": False}
    if weights is not None:
        settings |= {"weights": Path(weights).absolute(), "kl_warmup": 0, "learning_rate_decay": 0.5}
    settings |= {"config_file": ["configs/train.json", *networks], "dataset_dir": listed, "output_dir": trained}
    run_process([word for key, value in settings.items() for word in (f"--{key}", str(value))])
    ckpt = str(trained / "checkpoints" / "model.pt")
    config = read_config(["configs/inference.json", *networks], run_dir=str(trained), ckpt=ckpt)
    network, preprocess = config.get_parsed_content("network").eval(), config.get_parsed_content("preprocessing")
    prior = config.get_parsed_content("population_prior")
    rows = measure(
        network,
        prior,
        lambda path: preprocess({"image": str(path)})["image"],
        training,
        sorted(set(people.glob("*.nii.gz")) - set(training)),
        kept_apart,
        marks,
        samples,
        folder,
    )
    print_table(("measure", "never seen", *(f"seen in {n} of {count}" for n in TIMES)), rows)


if __name__ == "__main__":
    run("python -m benchmarks.canaries", main)
