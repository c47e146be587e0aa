"""Random numbers: one place that seeds all who draw them."""

from __future__ import annotations

import random

import numpy as np
import torch
from monai.data.utils import set_rnd
from torch.utils.data import Dataset


def seed_everything(seed: int, dataset: Dataset | None = None) -> None:
    """Seed Python, NumPy, PyTorch (all devices) and a data set's random transforms.

    Unlike MONAI's ``set_determinism`` it leaves the choice of algorithms alone, which costs speed on GPUs.

    Args:
        seed: 0 to 2^32 - 1.
        dataset: the workers of a data loader seed their own copies, from PyTorch's state.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if dataset is not None:
        set_rnd(dataset, seed)
