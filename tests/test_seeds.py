"""Random numbers follow from the seed and from what they are drawn for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose, RandScaleIntensityd

from scripts.data.augmentations import RandTorchIOScand
from scripts.training.seeding import EpochSampler, EpochSeeds, SeededDataset, derive_seed


def dataset(seed=0):
    """Scans under a MONAI transform and under one of TorchIO, which draws from PyTorch's generator."""
    transforms = [
        RandScaleIntensityd("image", factors=0.5, prob=1.0),
        RandTorchIOScand("image", name="RandomNoise", prob=1.0, std=1.0),
    ]
    return SeededDataset([{"image": torch.ones(1, 4, 4, 4)} for _ in range(6)], Compose(transforms), seed)


def scans(data):
    return torch.stack([item["image"] for item in data])


def test_a_scan_is_augmented_alike_in_any_order_and_by_any_worker():
    data = dataset()
    expected = scans(data)
    backwards = torch.stack([data[index]["image"] for index in reversed(range(6))]).flip(0)
    loaded = torch.cat([batch["image"] for batch in DataLoader(data, batch_size=2, num_workers=2)])
    assert torch.equal(expected, backwards)
    assert torch.equal(expected, loaded)


def test_each_scan_epoch_and_seed_has_its_own():
    data = dataset()
    first = scans(data)
    data.epoch = 1
    second = scans(data)
    for others in (first[1:], second, scans(dataset(seed=1))):
        assert not any(torch.equal(first[0], other) for other in others)


def test_augmentation_leaves_the_noise_of_the_latents_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    dataset()[0]
    assert torch.equal(torch.rand(1), expected)


def test_an_epoch_can_begin_in_its_middle_once():
    sampler = EpochSampler(dataset(), seed=3)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.skip = 4
    assert list(sampler) == whole[4:]
    assert list(sampler) == whole
    assert len(sampler) == 6
    sampler.set_epoch(3)
    assert sorted(sampler) == sorted(whole) == list(range(6))
    assert list(sampler) != whole


def test_each_batch_and_process_has_noise_of_its_own_the_same_when_resumed(monkeypatch):
    def noise(iteration, rank, seed=0):
        monkeypatch.setattr("scripts.training.seeding.idist.get_rank", lambda: rank)
        torch.rand(iteration)  # whatever was drawn before
        EpochSeeds(seed, None, None)._start_batch(SimpleNamespace(state=SimpleNamespace(iteration=iteration)))
        return float(torch.rand(1))

    assert len({noise(iteration, rank, seed) for iteration in (1, 2, 3) for rank in (0, 1) for seed in (0, 1)}) == 12
    assert noise(3, 1) == noise(3, 1)


def test_persistent_workers_are_refused():
    data = dataset()
    engine = SimpleNamespace(data_loader=DataLoader(data, num_workers=1, persistent_workers=True))
    with pytest.raises(ValueError, match="persistent_workers would never learn of a new epoch"):
        EpochSeeds(0, data, EpochSampler(data)).attach(engine)


def test_neighbouring_numbers_give_unrelated_seeds():
    seeds = {derive_seed(seed, stream, epoch) for seed in range(10) for stream in range(2) for epoch in range(50)}
    assert len(seeds) == 1000
    assert max(seeds) < 2**32
