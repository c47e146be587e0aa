"""Reading the scans of a job: what of a batch goes to the device, and which scans cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from monai.data import DataLoader, Dataset
from scripts.data.reading import as_reason
from scripts.data.transforms import ScanError
from scripts.utils.names import item_files, item_path
from torch import Tensor

__all__ = ["Failure", "JobBatches", "ReadOrFail", "Scans"]


class Failure(NamedTuple):
    """A scan that could not be read, and why, as half a sentence; ``image`` is relative to the data set in the end."""

    image: str
    reason: str


@dataclass
class Scans:
    """The scans of a batch, which stay on the host, and those that could not be read."""

    items: list[dict[str, Any]]
    failures: list[Failure]


class ReadOrFail(torch.utils.data.Dataset):
    """Items of a data set, or a :class:`Failure` where a transform raised a :class:`ScanError`."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any] | Failure:
        index = self.indices[position]
        item = self.dataset.data[index]
        try:
            return {**self.dataset[index], "name": item_path(item)}
        except (ScanError, RuntimeError) as error:  # Compose wraps the one in the other
            cause = error if isinstance(error, ScanError) else error.__cause__
            if not isinstance(cause, ScanError):
                raise
            return Failure(item_path(item), as_reason(str(cause), item_files(item)))


class JobBatches:
    """Batches of a loader as the scans, the inferer's inputs and its further arguments."""

    def __init__(self, loader: DataLoader, inputs: Callable | None, arguments: Callable | None) -> None:
        self.loader, self.inputs, self.arguments = loader, inputs or _stack, arguments

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Scans, Any, dict[str, Any]]]:
        for batch in self.loader:
            failures = [item for item in batch if isinstance(item, Failure)]
            items = [item for item in batch if not isinstance(item, Failure)]
            inputs = self.inputs(items) if items else None
            yield Scans(items, failures), inputs, self.arguments(items) if self.arguments and items else {}


def _stack(items: Sequence[dict]) -> Tensor:
    return torch.stack([item["image"].as_tensor() for item in items])
