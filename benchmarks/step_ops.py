"""How many operations an iteration of training dispatches, and how many of these wait for the device.

    python -m benchmarks.step_ops
    python -m benchmarks.step_ops --config_file "['configs/train.json','configs/size_64.json']"

On a GPU every operation is a launch of some microseconds from Python, whatever its size, and an operation that reads a
value waits until the device has done all before it. Both can be counted without a GPU: the numbers are exact, and the
same on any machine. Counted is one whole iteration of the run that the configs describe, handlers included, its third,
on phantoms at their own size; views are not counted. It prints a table of its parts as Markdown, and as the last line
JSON: ``{"ops": ..., "syncs": ..., "parts": {...}}``.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import print_table, read_config
from scripts.phantoms import make_brains
from scripts.utils.command_line import run

COUNTED = 3  # the iteration; before, optimizer and average make their state
SYNCS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}
# what lies between two events of an iteration, in their order
PARTS = {
    Events.ITERATION_STARTED: "forward",
    IterationEvents.FORWARD_COMPLETED: "loss",
    IterationEvents.LOSS_COMPLETED: "backward",
    IterationEvents.BACKWARD_COMPLETED: "clipping and numbers",
    IterationEvents.MODEL_COMPLETED: "metrics",
    Events.ITERATION_COMPLETED: "handlers",
}
WITHIN = ("penalty", "optimizer", "average")  # parts of these parts


class OperationCounter(TorchDispatchMode):
    """Counts the operations that reach a device: `{(part, name): number}`, by the part that is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[tuple[str, str]] = Counter()
        self.part = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in ("detach", "_reshape_alias"):
            self.operations[self.part, name] += 1
        return func(*args, **(kwargs or {}))

    def within(self, part: str, function: Callable) -> Callable:
        """The function, whose operations belong to a part of their own."""

        @functools.wraps(function)
        def counted(*args, **kwargs):
            before, self.part = self.part, part
            try:
                return function(*args, **kwargs)
            finally:
                self.part = before

        return counted

    def of(self, part: str | None = None, names: Sequence[str] | None = None) -> int:
        """How many: of one part or all, of some names or all."""
        return sum(
            count
            for (where, name), count in self.operations.items()
            if part in (None, where) and (names is None or name in names)
        )


def count_iteration(trainer: Engine, counter: OperationCounter) -> None:
    """Run a trainer to its third iteration, and count that."""
    stack = ExitStack()
    guarded, trainer.step = trainer.step, counter.within("optimizer", trainer.step)
    trainer.step.start = guarded.start
    if trainer.penalty is not None:
        for name in ("value", "add_gradient"):
            setattr(trainer.penalty, name, counter.within("penalty", getattr(trainer.penalty, name)))

    def enter(part: str) -> None:
        if trainer.state.iteration == COUNTED:
            counter.part = part

    def start() -> None:
        if trainer.state.iteration == COUNTED:
            stack.enter_context(counter)

    def end() -> None:
        if trainer.state.iteration == COUNTED:
            stack.close()
            trainer.terminate()

    # before all other handlers of these events
    for event, part in PARTS.items():
        trainer.add_event_handler(event, enter, part)
        trainer._event_handlers[event].insert(0, trainer._event_handlers[event].pop())
    trainer.add_event_handler(Events.ITERATION_STARTED, start)
    trainer._event_handlers[Events.ITERATION_STARTED].insert(0, trainer._event_handlers[Events.ITERATION_STARTED].pop())
    trainer.add_event_handler(Events.ITERATION_COMPLETED, end)
    with stack:
        trainer.run()


def count(config_file: str | Sequence[str] = "configs/train.json", batch_size: int = 1, **changes: Any) -> None:
    """Count, and print.

    Args:
        config_file: of the training run, one or a list.
        batch_size: scans of an update; the number of operations does not depend on it.
        changes: other values of keys of the config, such as ``--amp True``.
    """
    counter = measure(config_file, batch_size, **changes)
    parts = {part: (counter.of(part), counter.of(part, SYNCS)) for part in (*PARTS.values(), *WITHIN)}
    total = counter.of(), counter.of(names=SYNCS)
    rows = ([part, f"{ops:,}", f"{syncs:,}"] for part, (ops, syncs) in {**parts, "all": total}.items())
    print_table(("part", "operations", "of these, waiting for the device"), rows)
    print(json.dumps({"ops": total[0], "syncs": total[1], "parts": {part: ops for part, (ops, _) in parts.items()}}))


def measure(config_file: str | Sequence[str], batch_size: int, **changes: Any) -> OperationCounter:
    """What :func:`count` prints."""
    parser = read_config(config_file)
    unknown = [key for key in changes if key not in parser]
    if unknown:
        raise SystemExit(f"Error: the config has no key '{unknown[0]}' to change.")
    with tempfile.TemporaryDirectory() as folder:
        scans = make_brains(f"{folder}/scans", count=max(12, 4 * batch_size), spacing=8.0)
        settings = {"dataset_dir": scans, "output_dir": f"{folder}/run", "cache_dir": f"{folder}/cache"}
        settings |= {"batch_size": batch_size, "train_fraction": 0.8, "num_workers": 0, "augment": False, "epochs": 1}
        settings |= {"figure_interval": 0, "prior_factors": 0, "device": torch.device("cpu"), **changes}
        parser.update(settings)
        torch.manual_seed(0)
        parser.get_parsed_content("history").watch(parser.get_parsed_content("validate#evaluator"))
        counter, average = OperationCounter(), parser.get_parsed_content("average")
        average._update_ema_model = counter.within("average", average._update_ema_model)
        count_iteration(parser.get_parsed_content("train#trainer"), counter)
        return counter


if __name__ == "__main__":
    run("python -m benchmarks.step_ops", count)
