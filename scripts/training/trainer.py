"""The training and validation steps of the very deep VAE, on MONAI's engines."""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import EventEnum, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.engines.workflow import Workflow
from monai.utils.enums import CommonKeys as Keys
from scripts.networks import VDVAEOutput
from scripts.training.checkpoints import unwrap
from scripts.training.losses import ELBOLoss, WeightPenalty, bits_per_dim, negative_log_likelihood
from scripts.training.precision import WITHIN_UPDATES, GraphedUpdate, LowPrecision, autocast, check_graph
from scripts.training.update import BatchNote, BatchNumbers, GuardedStep, NumberEvents, StepLimits, make_capturable
from scripts.utils.devices import on_device
from scripts.utils.distributed import SignalWatch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)


def scan_batch(batchdata: dict[str, Any], device=None, non_blocking: bool = False, **kwargs) -> tuple[Tensor, Tensor]:
    """MONAI's ``prepare_batch``: the scans are input and target at once."""
    scans = batchdata[Keys.IMAGE]
    # plain tensors: metadata slows every operation of the network down and is not needed in it
    scans = scans.as_tensor() if hasattr(scans, "as_tensor") else scans
    scans = scans.to(device=device, non_blocking=non_blocking, **kwargs)
    return scans, scans


def is_lower(current: float, best: float) -> bool:
    """MONAI's ``metric_cmp_fn``: the lower bits per dim are, the better; any are better than none."""
    return current < best or (math.isnan(best) and not math.isnan(current))


def step_quantities(output: VDVAEOutput, nll: Tensor, scans: Tensor) -> dict[str, Tensor]:
    """What is reported of a batch, each scan by itself.

    Returns:
        ``nll`` and ``kl`` in nats and ``bits_per_dim`` of their sum, ``mse`` in the network's units: ``[batch]`` each;
        ``kl_per_latent``: ``[batch, latents]`` in nats, top first.
    """
    kl = output.kl.detach()
    nll = nll.detach()
    return {
        "nll": nll,
        "kl": kl.sum(1),
        "bits_per_dim": bits_per_dim(nll + kl.sum(1), scans),
        "mse": (output.loc.detach().float() - scans.float()).square().flatten(1).mean(1),
        "kl_per_latent": kl,
    }


class TrainingEvents(EventEnum):
    """``NOTHING_LEFT``: a run was resumed whose epochs are all done."""

    NOTHING_LEFT = "nothing_left"


class VDVAETrainer(SupervisedTrainer):
    """MONAI's ``SupervisedTrainer`` whose step minimises the negative ELBO and guards every update.

    Updates whose gradients are not finite are skipped always, and with several processes on all of them: they share
    their gradients. Under float16 the loss scaler lowers its scale on each. On a GPU the host learns of a skipped
    update some updates late (``log_interval``), and so late come the sentence about it, and the end of a run that skips
    all.

    Args:
        device, max_epochs, train_data_loader, network, optimizer: see MONAI's.
        loss_function: says the loss, and how the weight of the KL rises.
        lr_scheduler: moves on with every update, not with every batch.
        limits: of weights and gradients; when updates are skipped.
        amp, amp_dtype: mixed precision in ``torch.float16`` or ``torch.bfloat16``; by default what the device can do,
            bfloat16 first.
        accumulation_steps: batches whose gradients make one update.
        log_interval: updates from one look at the numbers to the next, where the host runs ahead of the device (a GPU).
            It would have to wait for them otherwise.
        cuda_graph: let a GPU repeat whole updates as one CUDA graph; None: where nothing speaks against it.
        kwargs: further arguments of MONAI's ``SupervisedTrainer``: inferer, metrics, handlers.

    Handlers may ask of it all that Ignite and MONAI say, and what follows. Of MONAI's events within a step
    ``MODEL_COMPLETED`` fires for each; ``FORWARD_COMPLETED``, ``LOSS_COMPLETED`` and ``BACKWARD_COMPLETED`` cannot
    where a GPU repeats the update as a CUDA graph: with a handler for one of them updates are launched operation by
    operation, and ``cuda_graph`` True is refused.

    Attributes:
        state: also has ``updates``, tried so far, skipped ones included; ``skipped`` and ``skipped_in_a_row``, as far
            as the host knows; ``numbers``, what is reported of the last batch that the host knows of, by name
            (``loss``, ``bits_per_dim``, ``nll``, ``kl``, ``mse``, ``learning_rate``, ``skipped``,
            ``scans_per_second``, ``iteration``, and ``grad_norm`` where the batch ended an update); and as ``output``
            that of :meth:`batch`, which a handler may keep.
        lr_scheduler: None where the rate stays.
        scaler: of the loss, under float16.
        numbers: what the host learns of each batch; it fires ``NumberEvents.NUMBERS_KNOWN``.
        signals: which signal to stop has come.

    Raises:
        TrainingStalledError: ``limits.max_skips`` updates in a row were skipped.
    """

    def __init__(
        self,
        device: torch.device | str,
        max_epochs: int,
        train_data_loader: DataLoader,
        network: torch.nn.Module,
        optimizer: Optimizer,
        loss_function: ELBOLoss,
        lr_scheduler: LRScheduler | None = None,
        limits: StepLimits | None = None,
        amp: bool = False,
        amp_dtype: torch.dtype | None = None,
        accumulation_steps: int = 1,
        log_interval: int = 10,
        cuda_graph: bool | None = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=loss_function,
            prepare_batch=scan_batch,
            non_blocking=True,
            metric_cmp_fn=is_lower,
            decollate=False,
            amp=amp,
            optim_set_to_none=True,
            accumulation_steps=accumulation_steps,
            event_names=[NumberEvents, TrainingEvents],
            **kwargs,
        )
        self.data_loader = on_device(self.data_loader, self.state.device)
        self.lr_scheduler = lr_scheduler
        self.limits = limits or StepLimits()
        self.amp_dtype = amp_dtype
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        factor = self.limits.weight_penalty
        self.penalty = WeightPenalty(self.parameters, factor) if factor else None
        needs_scaling = amp and autocast(self.state.device, True, amp_dtype).fast_dtype == torch.float16
        # a loss in nats is large: starting low saves the first updates from overflow
        self.scaler = torch.amp.GradScaler(self.state.device.type, init_scale=1.0, enabled=needs_scaling)
        self.signals = SignalWatch()
        make_capturable(optimizer)
        self.step = GuardedStep(network, optimizer)
        self.numbers = BatchNumbers(self, log_interval, self.limits)
        self.state.updates = 0
        obstacles = {
            "accumulation_steps": accumulation_steps > 1 and accumulation_steps,
            "amp_dtype": needs_scaling and torch.float16,
            "network_def#checkpoint_levels": unwrap(network).arguments["checkpoint_levels"],
            "the number of processes": isinstance(network, DistributedDataParallel) and idist.get_world_size(),
        }
        self.cuda_graph = cuda_graph
        graphs = check_graph(self.state.device, cuda_graph, **obstacles)
        self.graphed = GraphedUpdate(self.batch, optimizer) if graphs else None
        # several processes send gradients while others are computed
        self.low_precision = LowPrecision(network) if amp and network is unwrap(network) else None

    @property
    def epoch_ends(self) -> bool:
        """Whether the last batch was the epoch's last."""
        return self.state.iteration % self.state.epoch_length == 0

    @property
    def between_updates(self) -> bool:
        """Whether no batch waits for others to make an update with."""
        place = self.state.iteration % self.state.epoch_length
        return place == 0 or place % self.accumulation_steps == 0

    def _iteration(self, engine: VDVAETrainer, batchdata: dict[str, Any]) -> dict[str, Any]:
        state = engine.state
        engine.numbers.start()
        scans, _ = engine.prepare_batch(batchdata, state.device, engine.non_blocking)
        engine.network.train()
        ends_update = engine.between_updates
        learning_rate = engine.optimizer.param_groups[0]["lr"]
        beta, largest_norm = engine.loss_function.beta(state.updates), engine.limits.largest_norm(state.updates)
        engine._check_handlers()
        run = engine.batch if engine.graphed is None else engine.graphed
        state.output = {Keys.IMAGE: scans, **run(scans, beta=beta, largest_norm=largest_norm)}
        if ends_update:
            state.updates += 1
            if engine.lr_scheduler is not None:
                engine.lr_scheduler.step()
        update = state.updates if ends_update else None
        engine.numbers.add(
            state.output, BatchNote(state.iteration, update, _names(batchdata, len(scans)), learning_rate)
        )
        if engine.epoch_ends:
            engine.numbers.end()
        state.output["numbers"] = state.numbers
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return state.output

    def _check_handlers(self) -> None:
        """Leave the CUDA graph, or refuse it, where a handler wants events that do not fire within one."""
        heard = [event.name for event in WITHIN_UPDATES if self._event_handlers[event]]
        if self.graphed is not None and heard:
            check_graph(self.state.device, self.cuda_graph, **{"an event that a handler waits for": heard[0]})
            self.graphed = None

    def batch(self, scans: Tensor, beta: float | Tensor, largest_norm: float | Tensor) -> dict[str, Any]:
        """Gradients of a batch, and the update where it ends one. Asks no value of the device.

        Args:
            scans: ``[batch, channels, *spatial]``.
            beta: weight of the KL.
            largest_norm: of the gradients, up to which the update is made.

        Returns:
            the output, the loss, see :func:`step_quantities`, ``grad_norm`` before clipping and whether the update was
            made, ``taken``: 0 and true where there is none yet.
        """
        place = (self.state.iteration - 1) % self.state.epoch_length
        ends_update = self.between_updates
        # the last update of an epoch may have fewer batches
        batches = min(self.accumulation_steps, self.state.epoch_length - place + place % self.accumulation_steps)
        if place % self.accumulation_steps == 0:
            self.step.start()
            self.optimizer.zero_grad(set_to_none=True)
        # gradients travel between processes once per update, not once per batch
        waits = isinstance(self.network, DistributedDataParallel) and not ends_update
        with self.network.no_sync() if waits else contextlib.nullcontext():
            with autocast(self.state.device, self.amp, self.amp_dtype):
                network = self.network if self.low_precision is None else self.low_precision.cast()
                output = self.inferer(scans, network)
            self.fire_event(IterationEvents.FORWARD_COMPLETED)
            loss, nll = self.loss_function(output, scans, beta)
            self.fire_event(IterationEvents.LOSS_COMPLETED)
            self.scaler.scale(loss / batches).backward()
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)

        loss = loss.detach() if self.penalty is None else loss.detach() + self.penalty.value()
        norm, taken = self._step(largest_norm) if ends_update else (torch.zeros_like(loss), torch.ones_like(loss))
        quantities = step_quantities(output, nll, scans)
        return {Keys.PRED: output, Keys.LOSS: loss, **quantities, "grad_norm": norm, "taken": taken}

    def _step(self, largest_norm: float | Tensor) -> tuple[Tensor, Tensor]:
        """Clip, then step or skip. Returns the norm of the gradients before clipping, and whether the step was taken.

        The gradients are the same on every process, and so is the decision.
        """
        self.scaler.unscale_(self.optimizer)
        if self.penalty is not None:
            self.penalty.add_gradient()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.limits.max_grad_norm)
        taken = norm <= largest_norm
        self.step(taken)
        self.scaler.update()
        return norm, taken

    def run(self) -> None:
        """Train from the current state until ``max_epochs``; signals to stop are noted in ``signals``."""
        if self.state.epoch >= self.state.max_epochs:
            logger.info("All %d epochs are done: set --epochs above that to continue.", self.state.epoch)
            self.fire_event(TrainingEvents.NOTHING_LEFT)
            return
        with self.signals:
            # MONAI's trainer would put a new loss scaler in the place of the one that a checkpoint restored
            Workflow.run(self)


def _names(batchdata: dict[str, Any], count: int) -> list[str]:
    """The files that the scans of a batch came from, as far as they say."""
    names = getattr(batchdata[Keys.IMAGE], "meta", {}).get("filename_or_obj")
    return [str(name) for name in names] if isinstance(names, list | tuple) else ["(unnamed)"] * count


class VDVAEEvaluator(SupervisedEvaluator):
    """MONAI's ``SupervisedEvaluator`` that reports the ELBO and its parts.

    Every run draws the same noise for the latents, so that two epochs differ by the weights alone.

    Args:
        device, val_data_loader, network: see MONAI's.
        seed: of that noise.
        amp, amp_dtype: mixed precision, see :class:`VDVAETrainer`.
        kwargs: further arguments of MONAI's ``SupervisedEvaluator``: inferer, metrics, handlers.
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: DataLoader,
        network: torch.nn.Module,
        seed: int = 0,
        amp: bool = False,
        amp_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            device=device,
            val_data_loader=val_data_loader,
            network=network,
            prepare_batch=scan_batch,
            non_blocking=True,
            metric_cmp_fn=is_lower,
            decollate=False,
            amp=amp,
            **kwargs,
        )
        self.data_loader = on_device(self.data_loader, self.state.device)
        self.seed = seed
        self.amp_dtype = amp_dtype

    def _iteration(self, engine: VDVAEEvaluator, batchdata: dict[str, Any]) -> dict[str, Any]:
        state = engine.state
        scans, _ = engine.prepare_batch(batchdata, state.device, engine.non_blocking)
        devices = [state.device] if state.device.type == "cuda" else []
        with torch.random.fork_rng(devices), engine.mode(engine.network):
            torch.manual_seed(engine.seed + state.iteration)
            with autocast(state.device, engine.amp, engine.amp_dtype):
                output = engine.inferer(scans, engine.network)
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        nll = negative_log_likelihood(output.loc, output.scale, scans)
        state.output = {Keys.IMAGE: scans, Keys.PRED: output} | step_quantities(output, nll, scans)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return state.output

    def run(self, global_epoch: int = 1) -> None:
        """Evaluate once; ``global_epoch`` 0, before any training, does not count for the best metric."""
        self.state.global_epoch = global_epoch
        best = self.state.best_metric, self.state.best_metric_epoch
        if self.state.epoch_length:
            super().run(max(global_epoch, 1))
        else:
            self._join(max(global_epoch, 1))
        if global_epoch == 0:
            self.state.best_metric, self.state.best_metric_epoch = best

    def _join(self, epoch: int) -> None:
        """What is left to a process without scans of its own: the means over all processes are taken together."""
        self.state.epoch = self.state.max_epochs = epoch
        for event in (Events.STARTED, Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED):
            self.fire_event(event)
