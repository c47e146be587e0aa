"""What the tests share: a small cohort of phantoms, and the bundle's commands run as users run them.

MONAI is imported where it is needed: the process that hands out the tests reads this file too, and needs none of it.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported: the tests run in several processes

import numpy as np
import pytest
from in_process import run_module
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    import torch
    from monai.bundle import ConfigParser
    from monai.data import MetaTensor
    from xdist.remote import Producer

    from scripts.networks import VDVAEReconstruction

gc.disable()  # while the tests are imported, which makes a million objects that stay

ROOT = Path(__file__).parent.parent
TINY = ["configs/train.json", "tests/tiny.json", "tests/quick_start.json"]
STARTUP = ROOT / "tests" / "startup"
# what is added to the environment of a test's processes
PROCESS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(STARTUP), str(ROOT)])}
# Files that stay together on one of pytest-xdist's workers, since they share processes that take seconds to start: that
# of groups.py from which others are forked, and joblib's (test_parallel comes last: it kills some).
TOGETHER = {
    "forked": (
        *("killed_runs", "distributed", "benchmarks", "inference", "evaluate", "lesions", "impute_interpolate"),
        *("population_prior", "no_waiting", "collectives", "certificate"),
    ),
    "joblib": ("check", "cache", "phantoms", "errors", "parallel"),
}
# other files of more than ten seconds, the longest first: both workers then end at about the same time
SLOW = (
    *("prepare", "docs_in_order", "covariates", "training", "export", "checkpoints", "published_sizes", "familiar"),
    *("explore", "slices_and_channels", "clients", "gpu_benchmark", "tour"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [*itertools.chain(*TOGETHER.values()), *SLOW]
    order = {f"test_{name}": place for place, name in enumerate(names)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


class FilesTogether(LoadScopeScheduling):
    """Gives each file to one worker, as ``--dist loadfile`` does, and those that belong together to the same."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        name = Path(file).stem.removeprefix("test_")
        return next((group for group, names in TOGETHER.items() if name in names), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FilesTogether:
    return FilesTogether(config, log)


def pytest_collection_finish() -> None:
    gc.freeze()  # what has been imported is not looked through again
    gc.set_threshold(100_000)
    gc.enable()
    # for processes that are started in other ways than by the functions below
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STARTUP), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> Path:
    """Twelve brains at 8 mm."""
    from scripts.phantoms import make_brains

    return Path(make_brains(tmp_path_factory.mktemp("data") / "brains", 12, spacing=8.0, workers=1))


def run_command(module: str, *words: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """``python -m module words`` in this process, which is quick. Has ``returncode``, ``stdout`` and ``stderr``."""
    return run_module(module, *words, cwd=cwd, **environment)


def run_command_process(
    module: str, *words: object, cwd: Path = ROOT, timeout: int = 300, **environment: str
) -> subprocess.CompletedProcess:
    """The same in a process of its own, as users type it: once for each command, and where the process matters."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=cwd,
        env=os.environ | PROCESS | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
    )


def bundle_words(*arguments: object, run_id: str | None = "training", configs=TINY) -> list[str]:
    """What follows ``python -m monai.bundle``."""
    job = [] if run_id is None else [run_id]
    return ["run", *job, "--config_file", str([str(c) for c in configs]), *map(str, arguments)]


def bundle_command(*arguments: object, **settings) -> tuple[list[str], dict[str, str]]:
    """``python -m monai.bundle run ...`` with a tiny network, and the environment to run it in."""
    return [sys.executable, "-m", "monai.bundle", *bundle_words(*arguments, **settings)], os.environ | PROCESS


def run_bundle(*arguments: object, cwd: Path = ROOT, **settings) -> subprocess.CompletedProcess:
    """:func:`run_command` of the bundle, with a tiny network.

    Args:
        arguments: ``--key value`` pairs.
        settings: ``run_id`` and ``configs``.
    """
    return run_command("monai.bundle", *bundle_words(*arguments, **settings), cwd=cwd)


def run_bundle_process(*arguments: object, cwd: Path = ROOT, **settings) -> subprocess.CompletedProcess:
    """:func:`run_command_process` of the same."""
    return run_command_process("monai.bundle", *bundle_words(*arguments, **settings), cwd=cwd)


def inference_config(**changes) -> ConfigParser:
    """configs/inference.json with a tiny network, on the CPU."""
    import torch
    from monai.bundle import ConfigParser

    from scripts.data.scan_grid import ScanGrid

    content = ConfigParser(ConfigParser.load_config_files(str(ROOT / "configs" / "inference.json")))
    content.update(json.loads((ROOT / "tests" / "tiny.json").read_text()))
    content.update({"device": torch.device("cpu"), "grid": ScanGrid(), **changes})
    return content


def fitted_scans(cohort: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All scans of a cohort as the tiny network gets them, [scans, 1, 8, 8, 8], and the affine of their grid."""
    import torch

    preprocess = inference_config().get_parsed_content("preprocessing")
    images = [preprocess({"image": str(path)})["image"] for path in sorted(cohort.glob("*.nii.gz"))]
    return torch.stack([image.as_tensor() for image in images]), images[0].affine


def informative_network(cohort: Path) -> VDVAEReconstruction:
    """The tiny network with a cohort's template, whose posteriors and output tell scans apart from the start."""
    import torch

    scans, affine = fitted_scans(cohort)
    torch.manual_seed(0)
    network = inference_config(**{"network_def#init": "informative"}).get_parsed_content("network_def")
    network.set_voxel_gaussian(scans.mean(0), scans.std(0), affine)
    return network.eval()


def brain(size=16, spacing=1.0, channels=1) -> MetaTensor:
    """A ball of smooth tissue on an empty background, in [0, 1]."""
    import torch
    from monai.data import MetaTensor

    axis = (np.arange(size) - (size - 1) / 2) / (size / 2)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    tissue = 0.6 + 0.3 * np.sin(4 * x) * np.cos(3 * y) + 0.1 * z
    image = np.where(x**2 + y**2 + z**2 < 0.7**2, tissue, 0).astype(np.float32)
    return MetaTensor(np.repeat(image[None], channels, 0), affine=torch.diag(torch.tensor([spacing] * 3 + [1.0])))


def save(path, array, affine=None):
    import nibabel as nib

    nib.save(nib.Nifti1Image(np.asarray(array, dtype=np.float32), np.eye(4) if affine is None else affine), path)
    return str(path)
