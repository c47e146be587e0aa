"""What the network will see, saved before training starts: a batch, and each augmentation alone at its strongest."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from monai.transforms import Compose, RandomizableTransform
from scripts.utils import figures
from scripts.utils.formats import save_nifti
from scripts.utils.names import image_captions
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["save_augmentations", "save_previews"]

logger = logging.getLogger(__name__)

SHOWN = 8  # scans
DRAWS = 8  # of each augmentation, of which the strongest is shown


def save_previews(
    output_dir: str | os.PathLike,
    dataset: Dataset,
    value_range: Sequence[float],
    cache: Dataset,
    augmentation: Mapping[str, RandomizableTransform],
) -> None:
    """Save training scans as NIfTI and as ``preview.png``, and what augmentation does, see :func:`save_augmentations`.

    Args:
        output_dir: made if needed.
        dataset: with augmentation; its items hold ``image``, ``[channels, *spatial]``, in ``value_range``.
        value_range: of its scans.
        cache: the same scans without augmentation, in [0, 1].
        augmentation: the random transforms by name.
    """
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
    output_dir: str | os.PathLike, dataset: Dataset, augmentation: Mapping[str, RandomizableTransform], seed: int = 0
) -> None:
    """Save one scan under each augmentation alone at its strongest, then under all at once: ``augmentations.png``.

    The strongest is the one of eight draws that changes the scan most (by its mean absolute difference). The transforms
    themselves are left as they are.

    Args:
        output_dir: made if needed.
        dataset: without augmentation, of scans in [0, 1]; its first scan is shown.
        augmentation: the random transforms by name.
        seed: of the draws.
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
        torch.manual_seed(seed)
        for name, transform in certain.items():
            shown[name] = _strongest(Compose([transform]).set_random_state(seed), scan)
        chain = Compose(list(certain.values()), lazy=True).set_random_state(seed)
        shown["all at once"] = chain({"image": scan.clone()})["image"]
    images = [image.as_tensor().clamp(0, 1) for image in shown.values()]
    figures.batch(folder / "augmentations.png", images, list(shown), value_range=(0, 1))
    logger.info("Saved each augmentation alone at its strongest: '%s'.", folder / "augmentations.png")


def _strongest(transform: Compose, scan: Tensor) -> Tensor:
    draws = [transform({"image": scan.clone()})["image"] for _ in range(DRAWS)]
    return max(draws, key=lambda draw: float((draw - scan).abs().mean()))
