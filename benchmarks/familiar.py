"""Are scans with a fault found, and is the fault named? And how many untouched ones are refused?

    python -m benchmarks.familiar --dataset_dir LIST.json --output_dir OUT --testing validation --each 8 --pairs 4

Of each scan of one side of a datalist, itself and with some of the faults below at one of three strengths, drawn at
random, alone and two at once, `check --ckpt` says whether the network knows it, and why not. Beside it an isolation
forest on plain statistics of the training scans. Writes `faults.csv`, a row per scan, and prints the shares and a table
of fault against reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from sklearn.ensemble import IsolationForest
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import print_table, read_config
from scripts.data.datalist import list_sides
from scripts.inference.familiar import Examiner
from scripts.population.familiarity import FALSE_ALARMS, parts, reference, roughness, tissue_quantiles
from scripts.utils.command_line import run

STRENGTHS = ("weak", "middle", "strong")
Image = np.ndarray
# of voxels [x, y, z] and their affine, by how much: others of both
Fault = Callable[[Image, np.ndarray, float], tuple[Image, np.ndarray]]


def header(matrix: Callable[[float], np.ndarray]) -> Fault:
    """A movement of the world about the middle of the brain, by the affine alone."""

    def fault(image: Image, affine: np.ndarray, by: float) -> tuple[Image, np.ndarray]:
        centre, move = np.eye(4), np.eye(4)
        centre[:3, 3] = affine[:3, :3] @ np.argwhere(image > 0).mean(0) + affine[:3, 3]
        moved = matrix(by)
        move[: len(moved), : moved.shape[1]] = moved
        return image, centre @ move @ np.linalg.inv(centre) @ affine

    return fault


def voxels(change: Callable[[Image, float, np.ndarray], Image]) -> Fault:
    """A change of the voxels alone; it gets their size, mm, too."""

    def fault(image: Image, affine: np.ndarray, by: float) -> tuple[Image, np.ndarray]:
        return change(image, by, np.linalg.norm(affine[:3, :3], axis=0)), affine

    return fault


def turn(degrees: float) -> np.ndarray:
    """About the axis from left to right, and half as far about that from bottom to top."""
    nod, shake = np.radians(degrees), np.radians(degrees / 2)
    about_x = np.array([[1, 0, 0], [0, np.cos(nod), -np.sin(nod)], [0, np.sin(nod), np.cos(nod)]])
    about_z = np.array([[np.cos(shake), -np.sin(shake), 0], [np.sin(shake), np.cos(shake), 0], [0, 0, 1]])
    return about_x @ about_z


def shift(mm: float) -> np.ndarray:
    """To the front, and half as far down."""
    return np.array([[1, 0, 0, 0], [0, 1, 0, mm], [0, 0, 1, -mm / 2], [0, 0, 0, 1.0]])


def tissue(curve: Callable[[Image, float], Image]) -> Fault:
    """A curve of the brain's intensities, which run from 0 to 1."""

    def change(image: Image, by: float, spacing: np.ndarray) -> Image:
        top = np.percentile(image[image > 0], 99.9)
        return np.where(image > 0, top * (0.02 + 0.98 * curve(np.clip(image / top, 0, 1), by)), 0)

    return voxels(change)


def clipped(image: Image, share: float, spacing: np.ndarray) -> Image:
    """The brightest share of the brain has one value."""
    return np.minimum(image, np.quantile(image[image > 0], 1 - share))


def outlying(image: Image, times: float, spacing: np.ndarray) -> Image:
    """A blot of 24 mm in the brain that is so many times as bright as the brightest."""
    deep = ndimage.distance_transform_edt(image > 0, sampling=spacing)
    apart = (
        np.indices(image.shape) - np.reshape(np.unravel_index(deep.argmax(), image.shape), (3, 1, 1, 1))
    ).T * spacing
    return np.where((np.square(apart).sum(-1).T < 144), times * image.max(), image)


def cut(axis: int, end: int) -> Fault:
    """A share of the brain's slices at one end of an axis is missing."""

    def change(image: Image, share: float, spacing: np.ndarray) -> Image:
        filled = np.flatnonzero((image > 0).any(tuple(a for a in range(3) if a != axis)))
        lost = filled[: int(share * len(filled))] if end == 0 else filled[len(filled) - int(share * len(filled)) :]
        image = image.copy()
        image[(slice(None),) * axis + (lost,)] = 0
        return image

    return voxels(change)


def blurred(axes: Sequence[int]) -> Fault:
    """By a Gaussian of so many mm, full width at half maximum, within the brain, as thick slices are."""

    def change(image: Image, mm: float, spacing: np.ndarray) -> Image:
        widths = [mm / 2.355 / spacing[axis] if axis in axes else 0 for axis in range(3)]
        return ndimage.gaussian_filter(image, widths)

    return voxels(change)


def shell(image: Image, mm: float, spacing: np.ndarray) -> Image:
    """Scalp: bright, so thick, behind a dark gap of 5 mm around the brain."""
    apart = ndimage.distance_transform_edt(image <= 0, sampling=spacing)
    scalp = (apart > 5) & (apart <= 5 + mm)
    texture = ndimage.gaussian_filter(np.random.default_rng(0).random(image.shape), 1)
    return np.where(scalp, np.percentile(image[image > 0], 95) * (0.7 + 0.6 * texture), image)


def shaded(image: Image, by: float, spacing: np.ndarray) -> Image:
    """Brighter from left to right, by so much of the mean."""
    ramp = np.linspace(-1, 1, image.shape[0]).reshape(-1, 1, 1)
    return image * np.clip(1 + by * ramp, 0.05, None)


def noisy(image: Image, by: float, spacing: np.ndarray) -> Image:
    """Noise of so much of the brain's median, in the brain."""
    noise = np.random.default_rng(0).normal(size=image.shape) * by * np.median(image[image > 0])
    return np.where(image > 0, np.maximum(image + noise, 0.01 * image.max()), 0)


# by name: the reason that `check` should give, and each strength
FAULTS: Mapping[str, tuple[str, Fault, tuple[float, ...]]] = {
    "axes exchanged": ("orientation", lambda image, affine, by: (image.transpose(1, 2, 0), affine), (1,)),
    "front is back": ("orientation", voxels(lambda image, by, spacing: image[:, ::-1]), (1,)),
    "top is bottom": ("orientation", voxels(lambda image, by, spacing: image[:, :, ::-1]), (1,)),
    "turned, °": ("alignment", header(turn), (8, 15, 30)),
    "moved, mm": ("alignment", header(shift), (8, 15, 30)),
    "voxel size, times": ("voxel_size", header(lambda by: by * np.eye(3)), (1.1, 1.2, 1.4)),
    "inverted": ("contrast", tissue(lambda image, by: 1 - image), (1,)),
    "darkened, power": ("contrast", tissue(lambda image, by: image**by), (1.4, 2, 3)),
    "brightened, power": ("contrast", tissue(lambda image, by: image**by), (0.7, 0.5, 0.33)),
    "clipped, share": ("range", voxels(clipped), (0.1, 0.25, 0.5)),
    "a bright blot, times": ("range", voxels(outlying), (1.5, 2, 4)),
    "top cut, share": ("crop", cut(2, 1), (0.1, 0.2, 0.35)),
    "front cut, share": ("crop", cut(1, 1), (0.1, 0.2, 0.35)),
    "thick slices, mm": ("resolution", blurred([2]), (5, 8, 12)),
    "smoothed, mm": ("resolution", blurred([0, 1, 2]), (5, 8, 12)),
    "scalp, mm": ("skull", voxels(shell), (3, 6, 10)),
    "shaded": ("unknown", voxels(shaded), (0.2, 0.4, 0.8)),
    "noise": ("unknown", voxels(noisy), (0.1, 0.2, 0.4)),
}


def damaged(scan: nib.Nifti1Image, *faults: tuple[str, str]) -> nib.Nifti1Image:
    """A scan with faults, each with its strength, one after the other; a fault of a single strength is strong."""
    image, affine = np.asarray(scan.dataobj, dtype=np.float32), scan.affine
    for fault, strength in faults:
        _, change, amounts = FAULTS[fault]
        image, affine = change(image, affine, amounts[STRENGTHS.index(strength) if len(amounts) > 1 else 0])
    return nib.Nifti1Image(np.ascontiguousarray(image, dtype=np.float32), affine)


def draw(count: int, generator: np.random.Generator) -> list[tuple[str, str]]:
    """So many faults, none twice, each with a strength."""
    names = generator.choice(list(FAULTS), min(count, len(FAULTS)), replace=False)
    one = {name: len(FAULTS[name][2]) == 1 for name in names}
    return [(str(name), "strong" if one[name] else str(generator.choice(STRENGTHS))) for name in names]


def plain(examiner: Examiner, scans: Iterable[Tensor]) -> np.ndarray:
    """What a forest sees of scans: quantiles, roughness, how full they are and how like the mean one."""
    mean, brain = reference(examiner.network)[0][0], parts(examiner.network)["brain"]
    rows = []
    for scan in scans:
        alike = torch.corrcoef(torch.stack([scan.flatten(), mean.flatten()]))[0, 1]
        rough = torch.cat(roughness(scan[None])).log()
        full = (scan > scan.min()).float().mean()
        rows.append(torch.cat([tissue_quantiles(scan, brain).flatten(), rough, torch.stack([alike, full])]).numpy())
    return np.stack(rows)


def main(
    dataset_dir: str,
    output_dir: str,
    ckpt: str = "models/model.pt",
    config_file: str | Sequence[str] = "configs/inference.json",
    testing: str = "testing",
    each: int = 8,
    pairs: int = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure, print, and write `faults.csv`.

    Args:
        dataset_dir: the datalist.
        output_dir: for results.
        ckpt: weights, with their population prior beside them.
        config_file: of the network, one or a list.
        testing: the side to measure on; `validation` while choosing.
        each: faults for each scan, drawn at random.
        pairs: pairs of two faults at once for each scan, drawn at random.
        seed: of the draw.
    """
    parser = read_config(config_file, ckpt=ckpt)
    words = (parser.get_parsed_content(name) for name in ("network", "population_prior", "preprocessing"))
    examiner, generator = Examiner(*words), np.random.default_rng(seed)
    sides, folder = list_sides(dataset_dir)[0], Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    def fitted(image: Tensor) -> Tensor:
        return examiner.scale(examiner.fit({"image": image}))["image"].as_tensor()

    known = plain(examiner, (fitted(examiner.load(item["image"])) for item in tqdm(sides["training"], "training")))
    forest = IsolationForest(contamination=FALSE_ALARMS, random_state=seed).fit(known)
    rows: list[dict[str, Any]] = []
    for item in tqdm(sides[testing], testing, unit="person"):
        cases = [(), *((fault,) for fault in draw(each, generator)), *(draw(2, generator) for _ in range(pairs))]
        for faults in cases:
            path = item["image"]
            if faults:
                path = folder / "damaged.nii.gz"
                nib.save(damaged(nib.load(item["image"]), *faults), path)
            image, start = examiner.load(str(path)), time.perf_counter()
            found = examiner.examine(image)
            row = {"image": Path(item["image"]).name, "faults": len(faults)}
            row |= {"fault": " + ".join(fault for fault, _ in faults) or "none"}
            row |= {"strength": max((strength for _, strength in faults), key=STRENGTHS.index, default="")}
            row |= {"familiar": found.familiar, "distance": found.distance / found.limit, "reason": found.reason}
            row |= {"reasons": " ".join(step.reason for step in found.steps)}
            row |= {"expected": " ".join(FAULTS[fault][0] for fault, _ in faults)}
            row |= {"gain": found.gain, "said": found.sentence()}
            row |= {"seconds": time.perf_counter() - start}
            row |= {"forest": forest.predict(plain(examiner, [fitted(image)]))[0] > 0}
            rows.append(row)
            pd.DataFrame(rows).to_csv(folder / "faults.csv", index=False)
    (folder / "damaged.nii.gz").unlink(missing_ok=True)
    table = pd.DataFrame(rows)
    show(table)
    return table


def show(table: pd.DataFrame) -> None:
    """Print what was refused, found and named, and which fault was given which reason."""
    fine, faulty, pairs = (table[table.faults == count] for count in range(3))
    seconds = f"{table.seconds[~table.familiar].median():.1f} s to explain one"
    print(f"{len(fine)} untouched: {(~fine.familiar).sum()} refused, {(~fine.forest).sum()} by the forest; {seconds}\n")
    nameable = faulty[(faulty.expected != "unknown") & ~faulty.familiar]
    right = nameable.reason == nameable.expected
    lines = [
        [*found_shares(those, strength), share(right[nameable.strength == strength])]
        for strength, those in ((strength, faulty[faulty.strength == strength]) for strength in STRENGTHS)
    ]
    print_table(("strength", "scans", "found", "found by the forest", "named right, of those found"), lines)
    print()
    if len(pairs):
        show_pairs(pairs)
    given = faulty.assign(reason=faulty.reason.where(~faulty.familiar, "(familiar)"))
    counts = pd.crosstab([given.fault, given.strength], given.reason)
    print_table(
        ("fault", "strength", *counts.columns),
        (
            [*index, *(str(count) if count else "" for count in row)]
            for index, row in zip(counts.index, counts.values, strict=True)
        ),
    )


def share(those: pd.Series) -> str:
    """Of a column of booleans; a dash where there is none."""
    return f"{100 * those.mean():.0f} %" if len(those) else "-"


def found_shares(those: pd.DataFrame, strength: str) -> list[str]:
    """The first cells of a line: how many scans, and which shares of them the network and the forest found."""
    return [strength, str(len(those)), share(~those.familiar), share(~those.forest)]


def show_pairs(pairs: pd.DataFrame) -> None:
    """Print what was found and named of scans with two faults; those without a name are not asked for."""
    wanted = [[set(words.split()) - {"unknown"} for words in pairs[name]] for name in ("expected", "reasons")]
    named = pairs.assign(
        nameable=[len(expected) for expected in wanted[0]],
        one=[len(expected & said) > 0 for expected, said in zip(*wanted, strict=True)],
        both=[expected <= said for expected, said in zip(*wanted, strict=True)],
    )
    lines = []
    for strength in STRENGTHS:
        those = named[named.strength == strength]
        of = those[~those.familiar & (those.nameable > 0)]
        lines.append([*found_shares(those, strength), share(of.one), share(of.both)])
    columns = ("stronger of two", "scans", "found", "found by the forest", "one named, of those found", "all named")
    print_table(columns, lines)
    print()


if __name__ == "__main__":
    run("python -m benchmarks.familiar", main)
