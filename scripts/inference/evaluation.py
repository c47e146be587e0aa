"""How good a trained model is: numbers of each held-out scan, and how samples compare with held-out scans."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import random
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Events
from monai.inferers import Inferer
from monai.metrics import MSEMetric
from monai.networks.utils import eval_mode
from monai.utils import ensure_tuple
from monai.utils.enums import CommonKeys as Keys
from scripts.data.datalist import make_datalist
from scripts.inference.engine import list_samples, list_scans, scan_generator
from scripts.inference.inferers import image_quality
from scripts.inference.training_run import TrainedScans, TrainingRun, absolute_path
from scripts.layers.gaussian import noise_from
from scripts.networks import VDVAE
from scripts.training.metrics import (
    PER_SCAN,
    gaussian_kernel,
    kernel_features,
    mean_of_pairs,
    mmd,
    ms_ssim_metric,
    random_halves,
)
from scripts.training.trainer import VDVAEEvaluator, autocast
from scripts.utils.files import write_csv, write_text
from scripts.utils.names import item_path
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

__all__ = ["SampleComparison", "ScanTable", "evaluate", "held_out", "prepare", "scans_to_evaluate"]

logger = logging.getLogger(__name__)

HALVES = 200  # random divisions, for the sampling errors
VOXELS = 2**22  # of all images together, in memory at once

NAMES = ("subject", "session")  # of a scan, as its datalist has them

Summary = dict[str, Any]


def prepare(ckpt: str | os.PathLike, evaluation_dir: str | os.PathLike) -> None:
    """Make the folder of the results.

    Raises:
        FileNotFoundError: when there are no weights to evaluate.
    """
    if not Path(ckpt).is_file():
        raise FileNotFoundError(
            f"ckpt '{ckpt}' does not exist: set --ckpt to the weights to evaluate, such as the checkpoints/model.pt of "
            "a training run."
        )
    Path(evaluation_dir).mkdir(parents=True, exist_ok=True)


def scans_to_evaluate(
    training_run: TrainingRun, dataset_dir: str | os.PathLike, scan_pattern: str | Sequence[str], **split: Any
) -> dict[str, list[dict]]:
    """The scans to evaluate on as ``validation``: by a run's record, else as training would split them.

    Args:
        training_run: its own held-out scans, or those of another ``dataset_dir`` that it was not trained on.
        dataset_dir, scan_pattern, split: see :func:`scripts.data.datalist.make_datalist`.

    Raises:
        ValueError: when the run was trained on all of them.
    """
    if training_run.trained is None:
        return make_datalist(dataset_dir, scan_pattern, **split)
    items = list_scans(dataset_dir, scan_pattern, training_run)
    unseen = [item for item in items if training_run.knows(item) == "no"]
    if not unseen:
        raise ValueError(
            f"The run in run_dir '{training_run.folder}' was trained on the subjects of all {len(items)} scan(s) of "
            f"dataset_dir '{dataset_dir}': leave out --dataset_dir for those that it held out."
        )
    if len(unseen) < len(items):
        logger.info(
            "%d of %d scans are left out, whose subjects the run in '%s' was trained on.",
            *(len(items) - len(unseen), len(items), training_run.folder),
        )
    return {"training": [], "validation": unseen}


def held_out(datalist: Mapping[str, list[dict]], output_dir: str | os.PathLike) -> dict[str, list[dict]]:
    """The scans that a model was not trained on: a datalist's ``testing`` side if it has one, else ``validation``.

    Args:
        datalist: see :func:`scripts.data.datalist.make_datalist`.
        output_dir: when it is the folder of a training run, its ``datalist.json`` says what was trained on.

    Returns:
        ``{"validation": [...]}``.

    Raises:
        ValueError: when that run was trained on some of them.
    """
    items = datalist.get("testing") or datalist["validation"]
    record = Path(output_dir) / "datalist.json"
    if record.is_file():
        trained = TrainedScans(record)
        known = [item for item in items if trained.knows(item) != "no"]
        if known:
            raise ValueError(
                f"{len(known)} of the {len(items)} scans to evaluate on, such as '{absolute_path(known[0])}', or other "
                f"scans of their subjects, were trained on by the run in '{output_dir}': set --run_dir to it, which "
                "takes the scans that it held out."
            )
    return {"validation": items}


class ScanTable:
    """Collects a row of numbers for each scan that an evaluator sees.

    ``bits_per_dim``, ``nll``, ``kl``, ``kl_z00``, ... and ``mse`` are what training's validation reports, of drawn
    latents. ``recon_mse``, ``psnr`` and ``ssim`` are of the reconstruction from the posterior's means.

    Args:
        items: all held-out scans, those of other processes among them.
    """

    def __init__(self, items: Sequence[Mapping[str, Any]]) -> None:
        self.items = items
        self.numbers: list[dict[str, float]] = []

    def attach(self, engine: VDVAEEvaluator) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: VDVAEEvaluator) -> None:
        output = engine.state.output
        scans = output[Keys.IMAGE]
        with engine.mode(engine.network), autocast(engine.state.device, engine.amp, engine.amp_dtype):
            recon = engine.network(scans, temperature=0.0).loc.float()
        columns = {name: output[name] for name in PER_SCAN}
        columns["recon_mse"] = MSEMetric()(recon, scans).flatten()
        columns |= image_quality(recon, scans, engine.network)
        columns |= {f"kl_z{index:02d}": kl for index, kl in enumerate(output["kl_per_latent"].T)}
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        self.numbers += [dict(zip(columns, row, strict=True)) for row in values]

    def gather(self) -> None:
        """Bring the rows of all processes together, in the order of the scans."""
        self.numbers = list(itertools.chain(*idist.all_gather(self.numbers)))

    def write(self, path: str | os.PathLike) -> None:
        """As CSV, one row per scan: its path, subject and session, then the numbers."""
        names = [
            {"image": ";".join(map(str, ensure_tuple(item["image"])))} | {k: item.get(k, "") for k in NAMES}
            for item in self.items
        ]
        rows = [name | numbers for name, numbers in zip(names, self.numbers, strict=True)]
        cells = ([f"{v:.8g}" if isinstance(v, float) else v for v in row.values()] for row in rows)
        write_csv(path, list(rows[0]), cells)

    def summary(self) -> Summary:
        """``{quantity: {"mean", "std", "count"}}``; the standard deviation is of scans, not of the mean."""
        columns = {name: np.array([row[name] for row in self.numbers]) for name in self.numbers[0]}
        return {
            name: {"mean": values.mean(), "std": values.std(ddof=1) if len(values) > 1 else None, "count": len(values)}
            for name, values in columns.items()
        }


class SampleComparison:
    """Draws samples and compares them with held-out scans: do they look like scans, and do they vary as scans do?

    Squared maximum mean discrepancies (MMD; Gretton et al. 2012), unbiased, of whole images: ``mmd_gaussian`` with a
    Gaussian kernel as wide as the median distance between scans, ``mmd_linear`` of the dot product (MONAI's own), which
    sees the mean image alone. ``ms_ssim`` is the mean MS-SSIM of all pairs of samples, and of all pairs of scans.

    Samples and scans are kept on disk meanwhile, so that memory does not grow with their number. Each sample has noise
    of its own, the same that the bundle's ``sample`` gives to the sample of this number.

    Args:
        network: the network.
        dataset: of held-out scans; as many as there are samples are chosen at random, or all.
        inferer: draws samples, see :class:`scripts.inference.inferers.Sampling`.
        samples: how many; 0 compares nothing.
        value_range: of the intensities.
        scratch_dir: a folder for images, removed at the end.
        batch_size: of samples, and of pairs.
        seed: of the noise and of all choices.

    Raises:
        ValueError: when ``samples`` is negative or 1.
    """

    def __init__(
        self,
        network: VDVAE,
        dataset: Dataset,
        inferer: Inferer,
        samples: int,
        value_range: Sequence[float],
        scratch_dir: str | os.PathLike,
        device: torch.device | str = "cpu",
        batch_size: int = 1,
        seed: int = 0,
        amp: bool = False,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        if samples < 0 or samples == 1:
            raise ValueError(f"samples is {samples}: set --samples to 2 or more, or to 0 to compare none.")
        self.network, self.dataset, self.inferer = network, dataset, inferer
        self.samples, self.scans = samples, min(samples, len(dataset))
        self.scratch_dir, self.device = Path(scratch_dir), torch.device(device)
        self.batch_size, self.seed = batch_size, seed
        self.amp, self.amp_dtype = amp, amp_dtype
        self.metric = ms_ssim_metric(network.spatial_shape, value_range)

    def run(self) -> Summary | None:
        """Compare.

        Returns:
            What is found, the same on every process; None without samples.
        """
        if self.samples == 0:
            return None
        with _scratch(self.scratch_dir):
            self._keep_samples()
            self._keep_scans()
            idist.barrier()
            similarity = {kind: self._similarities(kind) for kind in ("sample", "scan")}
            return {
                "count": self.samples,
                "held_out_scans": self.scans,
                **self._discrepancies(),
                "ms_ssim": {
                    "scales": len(self.metric.weights),
                    "kernel_size": self.metric.kernel_size[0],
                    "samples": self._diversity(similarity["sample"]),
                    "held_out": self._diversity(similarity["scan"]),
                },
            }

    def _path(self, kind: str, number: int) -> Path:
        return self.scratch_dir / f"{kind}_{number:04d}.npy"

    def _keep_samples(self) -> None:
        names = [Path(item_path(item)).name for item in list_samples(self.scratch_dir, self.samples)]
        numbers = range(1 + idist.get_rank(), self.samples + 1, idist.get_world_size())
        for start in _progress(range(0, len(numbers), self.batch_size), "drawing samples"):
            batch = numbers[start : start + self.batch_size]
            generators = [scan_generator(self.seed, names[number - 1]) for number in batch]
            cast = autocast(self.device, self.amp, self.amp_dtype)
            with eval_mode(self.network), cast, noise_from(generators):
                drawn = self.inferer(len(batch), self.network)["sample"]
            for number, image in zip(batch, drawn.float().cpu().numpy(), strict=True):
                np.save(self._path("sample", number), image)

    def _keep_scans(self) -> None:
        chosen = sorted(random.Random(self.seed).sample(range(len(self.dataset)), self.scans))
        numbers = range(idist.get_rank(), self.scans, idist.get_world_size())
        for number in _progress(numbers, "reading held-out scans"):
            image = torch.as_tensor(self.dataset[chosen[number]][Keys.IMAGE]).as_subclass(Tensor)
            np.save(self._path("scan", number + 1), image.float().numpy())

    def _similarities(self, kind: str) -> Tensor:
        """MS-SSIM of every sample (or scan) with every other, ``[images, images]``; each process takes some rows."""
        count = self.samples if kind == "sample" else self.scans
        found = []
        for row in _progress(range(idist.get_rank(), count, idist.get_world_size()), f"MS-SSIM of pairs of {kind}s"):
            image = self._load(kind, [row])
            for start in range(row + 1, count, self.batch_size):
                others = self._load(kind, range(start, min(start + self.batch_size, count)))
                values = self.metric(others, image.expand_as(others)).flatten().tolist()
                found += [(row, start + offset, value) for offset, value in enumerate(values)]
        matrix = torch.zeros(count, count, dtype=torch.float64)
        for row, column, value in itertools.chain(*idist.all_gather(found)):
            matrix[row, column] = matrix[column, row] = value
        return matrix

    def _load(self, kind: str, indices: Sequence[int]) -> Tensor:
        images = [np.load(self._path(kind, index + 1)) for index in indices]
        return torch.from_numpy(np.stack(images)).to(self.device)

    def _diversity(self, similarity: Tensor) -> Summary:
        indices = range(len(similarity))
        if len(indices) < 2:
            return {"mean": None, "standard_error": None}
        halves = random_halves(indices, HALVES, self.seed) if len(indices) >= 4 else []
        return {
            "mean": mean_of_pairs(similarity, indices),
            "standard_error": _std([mean_of_pairs(similarity, half) for half, _ in halves]),
        }

    def _discrepancies(self) -> Summary:
        """The MMD of as many samples as scans, with the reference: halves of the scans against each other."""
        count = self.scans
        samples, scans = range(count), range(count, 2 * count)
        if count < 2:
            logger.warning("One held-out scan: MMD and MS-SSIM need 2, and their sampling errors 4.")
            return dict.fromkeys(("mmd_gaussian", "mmd_linear"))
        paths = [self._path(kind, number) for kind in ("sample", "scan") for number in range(1, count + 1)]
        dots = _dot_products(paths)
        summaries = {}
        for name, kernel in (("mmd_gaussian", gaussian_kernel(dots, scans)), ("mmd_linear", dots)):
            features = kernel_features(kernel)
            sample_halves, scan_halves = (
                random_halves(indices, HALVES, seed) if count >= 4 else []
                for indices, seed in ((samples, self.seed), (scans, self.seed + 1))
            )
            halves = [mmd(features, a, b) for (a, _), (b, _) in zip(sample_halves, scan_halves, strict=True)]
            reference = [mmd(features, a, b) for a, b in scan_halves]
            summaries[name] = {
                "value": mmd(features, samples, scans),
                "standard_error": _std(halves),
                "scan_halves_mean": float(np.mean(reference)) if reference else None,
                "scan_halves_std": _std(reference),
                "scan_halves_95th_percentile": float(np.quantile(reference, 0.95)) if reference else None,
            }
        return summaries


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _dot_products(paths: Sequence[Path]) -> Tensor:
    """Of all images with each other, ``[images, images]``, in double precision; a part of each in memory at a time."""
    size = np.load(paths[0], mmap_mode="r").size
    dots = torch.zeros(len(paths), len(paths), dtype=torch.float64)
    step = max(1, VOXELS // len(paths))
    for start in range(0, size, step):
        part = np.stack([np.load(path, mmap_mode="r").reshape(-1)[start : start + step] for path in paths])
        part = torch.from_numpy(part).double()
        dots += part @ part.T
    return dots


@contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    """An empty folder that all processes share, removed at the end."""
    if idist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    idist.barrier()
    try:
        yield
        idist.barrier()
    finally:
        if idist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _progress(values: Sequence[int], what: str) -> Iterator[int]:
    """A progress bar on standard error, of rank 0."""
    return tqdm(values, desc=what, file=sys.stderr, disable=idist.get_rank() > 0)


def evaluate(
    evaluator: VDVAEEvaluator,
    table: ScanTable,
    comparison: SampleComparison,
    evaluation_dir: str | os.PathLike,
    settings: Mapping[str, Any],
) -> None:
    """Evaluate, and write ``evaluation.csv`` (one row per scan) and ``summary.json``, by rank 0.

    Args:
        evaluator: runs the network on this process's share of the held-out scans.
        table: attached to it.
        comparison: of samples with the scans.
        evaluation_dir: an existing folder.
        settings: that tell what was evaluated, for the summary.
    """
    evaluator.run()
    table.gather()
    samples = comparison.run()
    if idist.get_rank() > 0:
        return
    folder = Path(evaluation_dir)
    summary = {"settings": dict(settings), "held_out": table.summary(), "samples": samples}
    table.write(folder / "evaluation.csv")
    write_text(folder / "summary.json", json.dumps(_plain(summary), indent=2) + "\n")
    logger.info("%s", _as_table(summary))
    logger.info("Results: '%s' and '%s'.", folder / "summary.json", folder / "evaluation.csv")


def _plain(value: Any) -> Any:
    """As JSON can hold it: no NaN, no infinity, and what is neither number nor text by its name."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, int | str | list | tuple | None) else str(value)


def _as_table(summary: Summary) -> str:
    lines = [f"{'held-out scans':<24}{'mean':>12}{'std':>12}{'scans':>8}"]
    for name, numbers in summary["held_out"].items():
        lines.append(f"{name:<24}{_short(numbers['mean'])}{_short(numbers['std'])}{numbers['count']:>8}")
    samples = summary["samples"]
    if samples is not None:
        lines.append(f"{'samples':<24}{'value':>12}{'error':>12}{'halves: mean':>14}{'95th perc.':>14}")
        for name in ("mmd_gaussian", "mmd_linear"):
            m = samples[name]
            if m is not None:
                lines.append(
                    f"{name:<24}{_short(m['value'])}{_short(m['standard_error'])}"
                    f"{_short(m['scan_halves_mean']):>14}{_short(m['scan_halves_95th_percentile']):>14}"
                )
        for kind in ("samples", "held_out"):
            m = samples["ms_ssim"][kind]
            lines.append(f"{'ms_ssim, ' + kind:<24}{_short(m['mean'])}{_short(m['standard_error'])}")
    return "\n".join(["Evaluation:", *lines])


def _short(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.4g'):>12}"
