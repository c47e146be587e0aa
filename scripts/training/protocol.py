"""What a handler may ask of the trainer, :class:`scripts.training.trainer.VDVAETrainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from scripts.training.losses import ELBOLoss
    from scripts.training.update import BatchNumbers
    from scripts.utils.parallel import SignalWatch


class TrainerState(Protocol):
    """Where a run is, as Ignite's engines count it, and what this bundle's trainer adds.

    Attributes:
        epoch, max_epochs, iteration, epoch_length: Ignite's own; iterations are batches, counted over all epochs.
        metrics: of the epoch, by name, at its end.
        output: of the step, see :meth:`scripts.training.trainer.VDVAETrainer.batch`; a handler may keep it, since later
            steps leave it alone.
        updates: tried so far, skipped ones included.
        skipped, skipped_in_a_row: updates that were skipped, as far as the host knows.
        numbers: what is reported of the last batch that the host knows of, by name: ``loss``, ``bits_per_dim``,
            ``nll``, ``kl``, ``mse``, ``learning_rate``, ``skipped``, ``scans_per_second``, ``iteration``;
            ``grad_norm`` where the batch ended an update.
    """

    epoch: int
    max_epochs: int
    iteration: int
    epoch_length: int
    metrics: dict[str, float]
    output: Any
    updates: int
    skipped: int
    skipped_in_a_row: int
    numbers: dict[str, float]


class Trainer(Protocol):
    """The trainer, as handlers see it.

    Of MONAI's events within a step, ``MODEL_COMPLETED`` fires for each. ``FORWARD_COMPLETED``, ``LOSS_COMPLETED`` and
    ``BACKWARD_COMPLETED`` cannot fire where a GPU repeats the update as a CUDA graph: with a handler for one of them
    updates are launched operation by operation, and ``cuda_graph`` True is refused.

    Attributes:
        state: where the run is.
        data_loader: of this process's share of the training scans.
        optimizer, lr_scheduler: of the network's weights; ``lr_scheduler`` is None where the rate stays.
        loss_function: says the weight of the KL of each update.
        scaler: of the loss, under float16.
        accumulation_steps: batches whose gradients make one update.
        numbers: what the host learns of each batch; it fires ``NumberEvents.NUMBERS_KNOWN``.
        signals: which signal to stop has come.
        between_updates: whether no batch waits for others to make an update with.
        epoch_ends: whether the last batch was the epoch's last.
    """

    state: TrainerState
    data_loader: DataLoader
    optimizer: Optimizer
    lr_scheduler: LRScheduler | None
    loss_function: ELBOLoss
    scaler: GradScaler
    accumulation_steps: int
    numbers: BatchNumbers
    signals: SignalWatch

    @property
    def between_updates(self) -> bool: ...

    @property
    def epoch_ends(self) -> bool: ...

    def add_event_handler(self, event: Any, handler: Callable, *args: Any, **kwargs: Any) -> Any: ...

    def terminate(self) -> None: ...
