"""What is saved for a look before training starts."""

import copy

import numpy as np
import torch
from conftest import ROOT, brain
from monai.bundle import ConfigParser

from scripts.training.handlers import save_augmentations
from scripts.utils import figures


def test_each_augmentation_is_shown_alone_and_named(tmp_path, monkeypatch):
    config = ConfigParser.load_config_file(ROOT / "configs" / "train.json")
    augmentation = ConfigParser(config | {"spatial_shape": [16] * 3}).get_parsed_content("augmentation")
    shown = {}
    batch = figures.batch
    monkeypatch.setattr(
        figures,
        "batch",
        lambda path, images, names, **style: (
            shown.update(zip(names, images, strict=True)),
            batch(path, images, names, **style),
        ),
    )
    probabilities, state = [t.prob for t in augmentation.values()], torch.get_rng_state()
    scan = brain(16)
    save_augmentations(tmp_path / "preview", [{"image": scan}], augmentation)
    assert (tmp_path / "preview" / "augmentations.png").stat().st_size > 10_000
    assert list(shown) == ["the scan itself", *config["augmentation"], "all at once"]
    changes = {name: float((image - scan).abs().mean()) for name, image in shown.items()}
    assert changes.pop("the scan itself") == 0
    assert min(changes.values()) > 1e-3
    # what training will use is as it was
    assert [t.prob for t in augmentation.values()] == probabilities
    assert torch.equal(torch.get_rng_state(), state)
    first = copy.copy(shown)
    save_augmentations(tmp_path / "again", [{"image": scan}], augmentation)
    assert all(np.array_equal(first[name], shown[name]) for name in first)
