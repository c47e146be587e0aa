"""How fast scans come out of the loader; ``benchmarks.throughput`` says how fast the training step takes them.

    python -m benchmarks.loader --size 64
    python -m benchmarks.loader --size 128 --profile

The scans are brain phantoms at 1 mm, one worker reads them. The first epoch reads, checks, fits and scales each scan,
keeps it on disk, and augments it; later ones read it from there and augment it. The transforms are the configs' own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader
from monai.transforms import Compose

from benchmarks.common import seconds, training_config
from scripts.data.cache import ScanCache
from scripts.data.find import find_scans
from scripts.data.scan_grid import ScanGrid
from scripts.phantoms import make_brains
from scripts.training.seeding import SeededDataset
from scripts.utils.command_line import run

MEASURED = 0.5  # seconds, of each transform


def loader_rates(scans: list[dict], parser: ConfigParser, cache_dir: Path, draws: int, half: bool) -> tuple[float, ...]:
    """Scans per second that one worker gives: of the first epoch, and of the ``draws`` augmented scans that follow."""
    cache = ScanCache(scans, parser.get_parsed_content("preprocessing"), cache_dir, half)
    dataset = SeededDataset(cache, parser.get_parsed_content("train#preprocessing"))
    loader = DataLoader(dataset, batch_size=1, num_workers=1, shuffle=True, persistent_workers=True)
    epochs = max(1, draws // len(scans))
    first, later = (seconds(lambda n=number: [sum(1 for _ in loader) for _ in range(n)]) for number in (1, epochs))
    return len(scans) / first, epochs * len(scans) / later


def milliseconds(call: Callable[[], object]) -> float:
    """Mean CPU time of a call after the first, which other programs change little."""
    call()
    return 1000 * seconds(call, MEASURED, time.process_time)


def print_profile(scan: dict, parser: ConfigParser) -> None:
    """Print what each transform costs; the random ones when they act, and as often as they do."""
    print(f"{'transform':<34}{'ms':>10}{'prob':>8}{'ms a scan':>12}")
    data = scan
    for transform in parser.get_parsed_content("preprocessing").transforms:
        cost = milliseconds(lambda f=transform, x=data: f(x))
        data = transform(data)
        print(f"{type(transform).__name__:<34}{cost:>10.1f}{'':>8}{cost:>12.1f}")
    random: Mapping = parser.get_parsed_content("augmentation")
    chain = parser.get_parsed_content("train#preprocessing")
    total = 0.0
    for name, transform in random.items():
        prob, transform.prob = transform.prob, 1.0
        certain = Compose([transform], lazy=True, overrides=chain.overrides).set_random_state(0)
        cost = milliseconds(lambda f=certain: f({"image": data["image"].clone()}))
        total += prob * cost
        print(f"{name:<34}{cost:>10.1f}{prob:>8g}{prob * cost:>12.1f}")
    print(f"{'all augmentation':<52}{total:>12.1f}")


def main(
    size: int = 32, count: int = 8, draws: int = 64, half: bool = False, profile: bool = False, spacing: float = 1.0
) -> None:
    """Print scans per second of the loader.

    Args:
        size: voxels an axis: 8, 32, 64, 128 or 256, by whose transforms scans are read.
        count: scans read in an epoch.
        draws: augmented scans taken from the cache.
        half: keep 16 bits per voxel in the cache.
        profile: print what each transform costs instead.
        spacing: of the scans, in mm.
    """
    parser = training_config(size)
    parser["grid"] = ScanGrid()
    with tempfile.TemporaryDirectory() as folder:
        make_brains(f"{folder}/scans", count, spacing=spacing)
        scans = [{"image": str(path)} for path in find_scans(f"{folder}/scans")]
        if profile:
            torch.set_num_threads(1)
            print_profile(scans[0], parser)
            return
        first, later = loader_rates(scans, parser, Path(folder) / "cache", draws, half)
    print(f"{size}³ from {spacing:g} mm, one worker, scans per second")
    print(f"{'first epoch':<32}{first:>10.2f}")
    print(f"{'cached, augmented':<32}{later:>10.2f}")


if __name__ == "__main__":
    run("python -m benchmarks.loader", main)
