"""The voxel-wise mean and deviation of the training scans: which are read, by whom, and that they are kept."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose, MapTransform, RandAffined, RandScaleIntensityd
from test_trainer import loader, tiny
from torch.testing import assert_close

from scripts.data.cache import ScanCache
from scripts.data.geometry import describe
from scripts.training.losses import ELBOLoss, elbo_metrics, key_metric
from scripts.training.seeding import SeededDataset
from scripts.training.start import start_network
from scripts.training.trainer import VDVAEEvaluator, VDVAETrainer
from scripts.training.voxel_statistics import choose_readings, start_from_scans, voxel_statistics


def test_the_template_is_the_mean_and_deviation_of_the_scans():
    dataset = loader(count=6).dataset
    scans = torch.stack([item["image"] for item in dataset])
    mean, std, _ = voxel_statistics(dataset, smoothing=0.0)
    assert_close(mean, scans.mean(0))
    assert_close(std, scans.std(0, correction=0))
    network = start_from_scans(tiny(template=True), dataset)
    assert_close(network(scans).loc[0], scans.mean(0), rtol=1e-3, atol=1e-3)
    assert start_from_scans(untouched := tiny(), dataset) is untouched


def test_given_weights_keep_their_template_or_take_that_of_the_scans(tmp_path):
    dataset = loader(count=6).dataset
    trained = tiny(template=True)
    trained.set_voxel_gaussian(torch.full((1, 8, 8, 8), 0.3), torch.full((1, 8, 8, 8), 0.2))
    torch.save(trained.state_dict(), tmp_path / "model.pt")
    kept = start_network(tiny(template=True), dataset, weights=tmp_path / "model.pt")
    new = start_network(tiny(template=True), dataset, weights=tmp_path / "model.pt", renew_template=True)
    assert_close(kept.template_mean, trained.template_mean)
    assert_close(new.template_mean[0], torch.stack([item["image"] for item in dataset]).mean(0))
    for one, other in zip(new.parameters(), trained.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_template_remembers_the_grid_of_the_scans():
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    dataset = Dataset([{"image": MetaTensor(torch.rand(1, 8, 8, 8), affine=affine)} for _ in range(3)])
    network = start_from_scans(tiny(template=True), dataset)
    assert torch.equal(network.scan_affine, affine)
    assert torch.equal(tiny(template=False).scan_affine, torch.eye(4, dtype=torch.float64))


def test_an_augmented_data_set_is_read_until_its_voxels_are_known():
    class Flicker:
        reads = 0

        def __len__(self):
            return 4

        def __getitem__(self, index):
            self.reads += 1
            return {"image": torch.full((1, 8, 8, 8), float(self.reads % 2))}

    data = Flicker()
    mean, std, _ = voxel_statistics(data, readings=100, augmented=True)
    assert data.reads == 100
    assert_close(mean, torch.full((1, 8, 8, 8), 0.5))
    assert_close(std, torch.full((1, 8, 8, 8), 0.5))
    voxel_statistics(data, readings=3)
    assert data.reads == 103


def augmented_cohort(folder, factors=0.5):
    """Five scans, kept in ``folder``, that are scaled at random and shifted one time in two."""
    scans = []
    for number in range(5):
        path = folder / f"{number}.npy"
        scans.append({"image": str(path)})
        if not path.exists():
            np.save(path, np.random.default_rng(number).random((1, 8, 8, 8), dtype=np.float32))

    class Load(MapTransform):
        def __call__(self, data):
            meta = {
                "filename_or_obj": data["image"],
                "geometry": describe(MetaTensor(torch.zeros(1, 8, 8, 8))),
                "differences": [],
            }
            return {"image": MetaTensor(torch.from_numpy(np.load(data["image"])), meta=meta)}

    transforms = [
        RandAffined("image", prob=0.5, translate_range=2.0),
        RandScaleIntensityd("image", factors=factors, prob=1.0),
    ]
    cache = ScanCache(scans, Compose([Load("image")]), folder / "cache")
    return SeededDataset(cache, Compose(transforms, lazy=True), seed=1)


def test_of_augmented_scans_those_that_move_are_read_and_a_third_of_the_others(tmp_path):
    data = augmented_cohort(tmp_path)
    chosen = choose_readings(data, 200, augmented=True)
    moved = [draw for draw in chosen if draw.weight == 1]
    assert all(data.moves(draw.epoch, draw.index) for draw in moved)
    assert 70 < len(moved) < 130
    assert {draw.weight for draw in chosen} == {1, 3}
    assert 200 <= sum(draw.weight for draw in chosen) <= 202
    mean, std, _ = voxel_statistics(data, readings=200, augmented=True, smoothing=0.0)
    images = []
    for draw in chosen:
        data.epoch = draw.epoch
        images += [data[draw.index]["image"].as_tensor()] * draw.weight
    assert_close(mean, torch.stack(images).mean(0), rtol=0, atol=1e-6)
    assert_close(std, torch.stack(images).std(0, correction=0), rtol=0, atol=1e-5)


def test_the_template_is_the_same_by_any_number_of_workers(tmp_path):
    data = augmented_cohort(tmp_path)
    data.epoch = 7
    alone = voxel_statistics(data, readings=30, augmented=True)
    assert data.epoch == 7
    together = voxel_statistics(data, readings=30, augmented=True, workers=2)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_another_run_reads_the_template_from_the_cache(tmp_path, monkeypatch, caplog):
    few = partial(voxel_statistics, readings=20)
    monkeypatch.setattr("scripts.training.voxel_statistics.voxel_statistics", few)

    def start(factors=0.5):
        return start_from_scans(tiny(template=True), augmented_cohort(tmp_path, factors), augmented=True)

    first = start()
    (kept,) = (tmp_path / "cache").glob("template_*.pt")
    with monkeypatch.context() as patch:
        patch.setattr("scripts.training.voxel_statistics.voxel_statistics", None)
        second = start()
    assert all(torch.equal(*pair) for pair in zip(first.buffers(), second.buffers(), strict=True))
    start(factors=0.2)
    assert len(list((tmp_path / "cache").glob("template_*.pt"))) == 2
    kept.write_bytes(kept.read_bytes()[:-100])
    third = start()
    assert "is damaged" in caplog.text
    assert torch.equal(first.template_std, third.template_std)


def test_from_the_template_the_first_update_lowers_the_loss():
    """The output starts as a Gaussian a voxel, and training goes on from there."""
    data = loader(count=16, batch_size=4)
    network = start_from_scans(tiny(template=True, init="variance_preserving"), data.dataset)
    metrics = elbo_metrics(network)
    evaluator = VDVAEEvaluator("cpu", data, network, key_val_metric=key_metric(metrics))
    evaluator.run()
    before = evaluator.state.metrics["bits_per_dim"]
    VDVAETrainer("cpu", 5, data, network, torch.optim.Adamax(network.parameters(), 2e-3), ELBOLoss()).run()
    evaluator.run()
    assert evaluator.state.metrics["bits_per_dim"] < before
