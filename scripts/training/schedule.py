"""How a run goes over its updates: the learning rate, and what the log says of both at the start."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
from torch.utils.data import DataLoader

__all__ = ["learning_rate_factor", "log_plan", "updates_per_epoch"]

logger = logging.getLogger(__name__)

ENOUGH_UPDATES = 2000  # below, networks of 32³ still get better fast: docs/training.md


def updates_per_epoch(batches: int, accumulation_steps: int = 1) -> int:
    """Updates that as many batches make; the last one of an epoch may have fewer batches."""
    return math.ceil(batches / accumulation_steps)


def learning_rate_factor(warmup: int, decay: float, updates: int) -> Callable[[int], float]:
    """The learning rate of each update, as a factor, for ``torch.optim.lr_scheduler.LambdaLR``.

    It rises linearly to 1 over the first updates, and falls linearly towards 0 over the last ones.

    Args:
        warmup: number of first updates over which it rises.
        decay: share of all updates, the last ones, over which it falls, 0 to 1.
        updates: of the whole run.

    Raises:
        ValueError: when ``warmup`` is negative or ``decay`` is not a share.
    """
    if warmup < 0:
        raise ValueError(f"learning_rate_warmup is {warmup}: it must be 0 or more updates.")
    if not 0 <= decay <= 1:
        raise ValueError(
            f"learning_rate_decay is {decay}: it is the share of all updates over which the learning rate falls, from "
            "0 (it stays) to 1."
        )
    falling = round(decay * updates)

    def factor(update: int) -> float:
        rising = min(1.0, (update + 1) / max(1, warmup))
        return min(rising, max(0.0, (updates - update) / falling)) if falling else rising

    return factor


def log_plan(
    datalist: Mapping[str, Sequence[Mapping[str, Any]]],
    dataloader: DataLoader,
    accumulation_steps: int,
    epochs: int,
    learning_rate: float,
    learning_rate_warmup: int,
    learning_rate_decay: float,
    kl_warmup: int,
) -> None:
    """Log, on rank 0, whom a run trains on and over how many updates its schedule goes.

    Args:
        datalist: both sides, of items that may name their ``subject`` and ``session``.
        dataloader: of this process's share of the training scans.
        accumulation_steps: batches that make an update.
        epochs: of the whole run.
        learning_rate, learning_rate_warmup, learning_rate_decay: see :func:`learning_rate_factor`.
        kl_warmup: updates until the KL divergence counts in full; 0 where it does from the start.
    """
    if idist.get_rank() > 0:
        return
    for side in ("training", "validation"):
        logger.info("%s: %s.", side.capitalize(), cohort_summary(datalist[side]))
    scans = len(datalist["training"])
    batch_size = dataloader.batch_size * idist.get_world_size()
    per_epoch = updates_per_epoch(len(dataloader), accumulation_steps)
    updates = epochs * per_epoch
    left_out = scans - len(dataloader) * batch_size
    logger.info(
        "%d update(s) per epoch of %d scans each%s, %d in %d epoch(s).",
        *(per_epoch, batch_size * accumulation_steps),
        f" ({left_out} scan(s) that fill no batch are left out, others in each epoch)" if left_out else "",
        *(updates, epochs),
    )
    sentences = [f"Learning rate {learning_rate:g}"]
    if learning_rate_warmup > 1:
        sentences[0] += f" from update {learning_rate_warmup} on"
    if learning_rate_decay:
        sentences[0] += f", falling to 0 from update {updates - round(learning_rate_decay * updates)} on"
    if kl_warmup:
        sentences.append(
            f"the KL divergence counts in full from update {kl_warmup} on: until then the training's bits per dim, in "
            "which it always counts in full, may rise while the network learns"
        )
    logger.info("%s.", "; ".join(sentences))
    if updates < ENOUGH_UPDATES:
        logger.info(
            "%d updates are few%s; the default network of 32³ takes some %d: --epochs %d makes as many.",
            *(updates, f", and end before the KL warm-up ({kl_warmup})" if updates < kl_warmup else ""),
            *(ENOUGH_UPDATES, math.ceil(ENOUGH_UPDATES / per_epoch)),
        )


def cohort_summary(items: Sequence[Mapping[str, Any]]) -> str:
    """Numbers of scans, subjects and sessions, such as ``96 scans of 40 subjects in 90 sessions``."""
    text = f"{len(items)} scan{'s' * (len(items) != 1)}"
    subjects = {item["subject"] for item in items if item.get("subject") not in (None, "")}
    if not subjects:
        return text
    sessions = {(item["subject"], item["session"]) for item in items if item.get("session") not in (None, "")}
    text += f" of {len(subjects)} subject{'s' * (len(subjects) != 1)}"
    return text + (f" in {len(sessions)} session{'s' * (len(sessions) != 1)}" if sessions else "")
