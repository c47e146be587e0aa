"""What happens around the training step: the average of the weights, records, progress, figures, a preview."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from ignite.handlers.tqdm_logger import ProgressBar
from matplotlib.image import imread
from monai.handlers import TensorBoardStatsHandler
from monai.transforms import Compose, RandomizableTransform
from scripts.layers.levels import grid_name
from scripts.networks import VDVAE
from scripts.training.checkpoints import unwrap
from scripts.training.update import NumberEvents
from scripts.utils import figures, plots
from scripts.utils.files import write_csv
from scripts.utils.formats import save_nifti
from scripts.utils.names import image_captions
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

if TYPE_CHECKING:
    from scripts.training.trainer import VDVAETrainer

logger = logging.getLogger(__name__)
SHOWN = 8  # scans
TEMPERATURES = (0.4, 0.7, 1.0)  # of the samples, 3 each
DRAWS = 8  # of each augmentation, of which the strongest is shown


def update_scalars(output: dict[str, Any]) -> dict[str, float]:
    """The numbers of the last batch, as ``update/loss`` and so on: the plain names are the means over epochs."""
    return {f"update/{name}": value for name, value in output["numbers"].items() if name != "iteration"}


class TrainingTensorBoard(TensorBoardStatsHandler):
    """MONAI's handler for TensorBoard, which writes the numbers of each batch when the host knows them.

    Args:
        log_dir: of TensorBoard's files.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir=log_dir, iteration_log=False)

    def attach(self, engine: VDVAETrainer) -> None:
        """Attach to a :class:`scripts.training.trainer.VDVAETrainer`."""
        super().attach(engine)
        engine.add_event_handler(NumberEvents.NUMBERS_KNOWN, self._write_numbers)

    def _write_numbers(self, engine: VDVAETrainer) -> None:
        numbers = engine.state.numbers
        for name, value in update_scalars({"numbers": numbers}).items():
            self._write_scalar(engine, self._writer, name, value, numbers["iteration"])


class MovingAverage(EMAHandler):
    """Ignite's moving average of the weights, which moves with each update, however many batches make one."""

    def attach(self, engine: VDVAETrainer, name: str = "ema_momentum", warn_if_exists: bool = True) -> None:
        """Attach to a :class:`scripts.training.trainer.VDVAETrainer`."""
        update = Events.ITERATION_COMPLETED(event_filter=lambda engine, _: engine.between_updates)
        super().attach(engine, name, warn_if_exists, update)

    def _update_ema_model(self, engine: VDVAETrainer, name: str) -> None:
        # as Ignite's, for all tensors at once
        momentum = getattr(engine.state, name)
        average, network = ([p.data for p in model.parameters()] for model in (self.ema_model, self.model))
        torch._foreach_mul_(average, 1.0 - momentum)
        torch._foreach_add_(average, network, alpha=momentum)
        for averaged, buffer in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
            averaged.data = buffer.data


class HandlerGroup:
    """Handlers that the config defines under names of their own, attached one after the other; None is one disabled.

    MONAI's check of a workflow reads the ``_target_`` of each entry of the trainer's list of handlers, so that a bare
    reference cannot stand there.
    """

    def __init__(self, handlers: Sequence[Any]) -> None:
        self.handlers = [handler for handler in handlers if handler is not None]

    def attach(self, engine: Engine) -> None:
        for handler in self.handlers:
            handler.attach(engine)


def close(*handlers: Any) -> None:
    """Close the files of handlers, those that are not disabled."""
    for handler in handlers:
        if handler is not None:
            handler.close()


class ListOutput:
    """Leave a step's output as a list of one dictionary, as MONAI's experiment tracking reads it. Attach last."""

    def attach(self, engine: VDVAETrainer) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: VDVAETrainer) -> None:
        engine.state.output = [engine.state.output]


class Progress:
    """A progress bar for each epoch, with loss, bits per dim and scans per second, on standard error."""

    def attach(self, engine: VDVAETrainer) -> None:
        """Attach first, so that the bar's line ends before others write theirs. One process shows it for all."""
        if idist.get_rank() > 0:
            return
        bar = ProgressBar(
            persist=True,
            bar_format="{desc}[{n_fmt}/{total_fmt}] {percentage:3.0f}%|{bar}|{postfix} [{elapsed}<{remaining}]",
            file=sys.stderr,
        )
        shown = ("loss", "bits_per_dim", "scans_per_second")
        bar.attach(engine, output_transform=lambda output: {k: v for k, v in output["numbers"].items() if k in shown})


class History:
    """The record of a run: every quantity against updates, for training and validation.

    It is part of the checkpoint, and written to ``history.csv`` as it grows, one row per epoch and part
    (training, validation), one column per quantity; with several processes by rank 0, the losses those of all.

    Args:
        path: of the CSV file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.rows: list[tuple[str, str, int, int, float]] = []
        self._trainer: VDVAETrainer | None = None
        self._losses: list[float] = []
        self._grad_norms: list[float] = []

    def attach(self, engine: VDVAETrainer) -> None:
        """Attach to the trainer, and through :meth:`watch` to the evaluator."""
        self._trainer = engine
        engine.add_event_handler(NumberEvents.NUMBERS_KNOWN, self._note_batch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._note_training)

    def watch(self, evaluator: Engine) -> None:
        """Record the metrics of each run of an evaluator."""
        evaluator.add_event_handler(Events.COMPLETED, self._note_validation)

    def epoch(self, evaluator_epoch: int) -> int:
        """The trainer's epoch, for handlers of an evaluator, which counts from 1 in each run."""
        return evaluator_epoch if self._trainer is None else self._trainer.state.epoch

    def _note_batch(self, engine: VDVAETrainer) -> None:
        numbers = engine.state.numbers
        self._losses.append(numbers["loss"])
        if "grad_norm" in numbers:
            self._grad_norms.append(numbers["grad_norm"])

    def _note_training(self, engine: VDVAETrainer) -> None:
        state = engine.state
        norms = [norm for norm in self._grad_norms if np.isfinite(norm)]
        scalars = dict(state.metrics)
        scalars |= {
            "loss": _finite_mean(list(itertools.chain(*idist.all_gather(self._losses)))),
            "grad_norm": float(np.median(norms)) if norms else float("nan"),
            "skipped": state.skipped,
            "learning_rate": engine.optimizer.param_groups[0]["lr"],
            "beta": engine.loss_function.beta(state.updates),
        }
        self._note("training", scalars)
        self._losses, self._grad_norms = [], []

    def _note_validation(self, engine: Engine) -> None:
        self._note("validation", engine.state.metrics)

    def _note(self, part: str, scalars: dict[str, float]) -> None:
        state = self._trainer.state
        self.rows += [(part, name, state.epoch, state.updates, float(value)) for name, value in scalars.items()]
        if idist.get_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_csv(self.path, *self.table())

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows of the CSV file; a cell is empty where a part lacks a quantity."""
        quantities = list(dict.fromkeys(name for _, name, *_ in self.rows))
        cells: dict[tuple[str, int, int], dict[str, str]] = {}
        for part, name, epoch, update, value in self.rows:
            cells.setdefault((part, epoch, update), {})[name] = f"{value:.8g}"
        rows = [[*key, *(values.get(name, "") for name in quantities)] for key, values in cells.items()]
        return ["part", "epoch", "update", *quantities], rows

    def series(self) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """``{quantity: {"training": [(update, value)], "validation": ...}}``."""
        series: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for part, name, _, update, value in self.rows:
            series.setdefault(name, {}).setdefault(part, []).append((update, value))
        return series

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = [tuple(row) for row in state["rows"]]


def _finite_mean(values: Sequence[float]) -> float:
    """Of the values that are finite; training skips what is not."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def log_epoch(engine: Engine) -> None:
    """One line on an epoch, for MONAI's ``StatsHandler``: the four numbers that tell whether training goes well."""
    metrics = engine.state.metrics
    numbers = ", ".join(
        f"{name.replace('_', ' ')} {metrics[name]:.4g}" for name in ("bits_per_dim", "nll", "kl", "mse")
    )
    if hasattr(engine, "optimizer"):
        logger.info("Epoch %d training: %s", engine.state.epoch, numbers)
    elif engine.state.global_epoch == 0:
        logger.info("Epoch 0 (before the first update), validation: %s", numbers)
    else:
        logger.info("Epoch %d validation: %s", engine.state.global_epoch, numbers)


class Figures:
    """Draw what the averaged network does, every ``figure_interval`` epochs and at the end.

    Into ``output_dir``: ``reconstructions``, ``progressive`` (from the coarsest level alone to all), ``samples`` at
    several temperatures (also as NIfTI), ``curves`` and ``kl_per_latent``, each a PNG named by its epoch. TensorBoard
    shows the same.

    Args:
        network: the averaged network.
        dataset: of held-out scans, of which the first ``figure_scans`` are drawn.
        history: the run's record.
        log_dir: of TensorBoard; None leaves it out.
        device: to run the network on.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        network: VDVAE,
        dataset: Dataset,
        history: History,
        value_range: Sequence[float],
        figure_interval: int = 1,
        figure_scans: int = 4,
        device: torch.device | str = "cpu",
        seed: int = 0,
        log_dir: str | os.PathLike | None = None,
    ) -> None:
        self.log_dir = log_dir
        self._writer: SummaryWriter | None = None
        self.output_dir = Path(output_dir)
        self.network = unwrap(network)
        self.dataset = dataset
        self.history = history
        self.value_range = tuple(value_range)
        self.figure_interval = figure_interval
        self.figure_scans = figure_scans
        self.device = torch.device(device)
        self.seed = seed

    def attach(self, engine: VDVAETrainer) -> None:
        """Attach after validation, so that the curves are complete. One process draws for all."""
        if self.figure_interval > 0 and idist.get_rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: VDVAETrainer) -> None:
        state = engine.state
        if state.epoch % self.figure_interval and state.epoch != state.max_epochs:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        suffix = f"epoch={state.epoch:04d}"
        self.draw(suffix)
        if self.log_dir is not None:
            self._show(suffix, state.updates)

    def _show(self, suffix: str, update: int) -> None:
        """Give TensorBoard the figures of this ending."""
        self._writer = self._writer or SummaryWriter(self.log_dir)
        for path in sorted(self.output_dir.glob(f"*_{suffix}.png")):
            name = path.name.removesuffix(f"_{suffix}.png")
            self._writer.add_image(name, imread(path), update, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()

    @torch.no_grad()
    def draw(self, suffix: str) -> None:
        """Draw every figure, with this ending to its name."""
        was_training = self.network.training
        self.network.eval()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            self._draw_reconstructions(suffix)
            self._draw_samples(suffix)
        self._draw_record(suffix)
        self.network.train(was_training)

    def _path(self, name: str, suffix: str) -> Path:
        return self.output_dir / f"{name}_{suffix}.png"

    def _draw_reconstructions(self, suffix: str) -> None:
        items = [self.dataset[i]["image"] for i in range(min(self.figure_scans, len(self.dataset)))]
        names = [image_captions(item) for item in items]
        scans = torch.stack([torch.as_tensor(item).as_subclass(Tensor) for item in items])
        # one scan at a time: a figure must not need more memory than a training step
        outputs = [self.network(scan[None].to(self.device), temperature=0.0) for scan in scans]
        locs = torch.cat([output.loc.cpu() for output in outputs])
        scales = torch.cat([output.scale.cpu() for output in outputs])
        figures.reconstructions(
            self._path("reconstructions", suffix), scans, locs, scales, names, value_range=self.value_range
        )
        latents = self.network.encode(scans[:1].to(self.device), temperature=0.0)
        levels, grids = self.network.latent_levels, self.network.grids()
        recons, labels = [], []
        for level in sorted(set(levels), reverse=True):
            count = sum(other >= level for other in levels)
            recons.append(self.network.decode(latents[:count], temperature=0.0)[0][0].cpu())
            labels.append(f"to {grid_name(grids[level])}")
        path = self._path("progressive", suffix)
        figures.strip(path, [*recons, scans[0]], [*labels, "scan"], self.value_range, guide=scans[0])

    def _draw_samples(self, suffix: str) -> None:
        affine = getattr(self.dataset[0]["image"], "affine", torch.eye(4)).cpu().numpy()
        samples, labels = [], []
        for temperature, index in itertools.product(TEMPERATURES, range(3)):
            samples.append(self.network.decode([], temperature)[0][0].cpu())
            labels.append(f"temperature {temperature:g}")
            path = self.output_dir / f"sample_temperature={temperature:g}_{index}.nii.gz"
            save_nifti(path, samples[-1], affine)
        figures.strip(self._path("samples", suffix), samples, labels, self.value_range)

    def _draw_record(self, suffix: str) -> None:
        series = self.history.series()
        scalars = {name: parts for name, parts in series.items() if not name.startswith(("kl_z", "kl_per_dim_z"))}
        if not scalars:
            return
        plots.curves(self._path("curves", suffix), scalars)
        part = "validation" if "validation" in series.get("kl_z00", {}) else "training"
        table = [series[f"kl_z{i:02d}"][part] for i in range(self.network.num_latents)]
        updates = [update for update, _ in table[0]]
        kl = np.array([[value for _, value in row] for row in table]).T
        dims = [int(np.prod(grid)) for grid in self.network.latent_grids()]
        grids = self.network.grids()
        levels = [grid_name(grids[level]) for level in self.network.latent_levels]
        plots.kl_per_latent(self._path("kl_per_latent", suffix), updates, kl, dims, levels)


def report(output_dir: str | os.PathLike, ckpt_dir: str | os.PathLike) -> None:
    """Say where a run's results are, those that there are."""
    for what, path in (
        ("Weights (averaged)", Path(ckpt_dir) / "model.pt"),
        ("Population prior", Path(ckpt_dir) / "population_prior.pt"),
        ("Checkpoint to resume from", Path(ckpt_dir) / "checkpoint.pt"),
        ("Figures", Path(output_dir) / "figures"),
        ("Numbers", Path(output_dir) / "history.csv"),
        ("TensorBoard", Path(output_dir) / "tensorboard"),
    ):
        if path.exists():
            logger.info("%s: %s", what, path)


def save_previews(
    output_dir: str | os.PathLike,
    dataset: Dataset,
    value_range: Sequence[float],
    cache: Dataset,
    augmentation: Mapping[str, RandomizableTransform],
) -> None:
    """Save training scans, augmented, as NIfTI and ``preview.png``, and each augmentation of those in ``cache``."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    items = [dataset[i]["image"] for i in range(min(SHOWN, len(dataset)))]
    for index, item in enumerate(items):
        save_nifti(folder / f"preview_{index}.nii.gz", item, item.affine)
    scans = torch.stack([torch.as_tensor(item).as_subclass(Tensor) for item in items])
    names = [image_captions(item)[0] for item in items]
    figures.batch(folder / "preview.png", scans, names, value_range=tuple(value_range))
    logger.info("Saved a batch of scans as the network will see them: '%s'.", folder / "preview.png")
    save_augmentations(folder, cache, augmentation)


def save_augmentations(
    output_dir: str | os.PathLike, dataset: Dataset, augmentation: Mapping[str, RandomizableTransform]
) -> None:
    """Save one scan under each augmentation alone at its strongest, then under all at once: ``augmentations.png``.

    The strongest is the one of eight draws that changes the scan most (by its mean absolute difference). The transforms
    themselves are left as they are; the data set has none, and its scans lie in [0, 1].
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    certain = {}
    for name, transform in augmentation.items():
        certain[name] = copy.deepcopy(transform)
        certain[name].prob = 1.0
    scan = dataset[0]["image"]
    shown = {"the scan itself": scan}
    # PyTorch's own state is what TorchIO draws from; it is put back as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, transform in certain.items():
            shown[name] = _strongest(Compose([transform]).set_random_state(0), scan)
        chain = Compose(list(certain.values()), lazy=True).set_random_state(0)
        shown["all at once"] = chain({"image": scan.clone()})["image"]
    images = [image.as_tensor().clamp(0, 1) for image in shown.values()]
    figures.batch(folder / "augmentations.png", images, list(shown), value_range=(0, 1))
    logger.info("Saved each augmentation alone at its strongest: '%s'.", folder / "augmentations.png")


def _strongest(transform: Compose, scan: Tensor) -> Tensor:
    draws = [transform({"image": scan.clone()})["image"] for _ in range(DRAWS)]
    return max(draws, key=lambda draw: float((draw - scan).abs().mean()))
