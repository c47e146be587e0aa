"""The augmentations, alone and in the chain of transforms that configs/train.json writes."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, brain, save
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose
from monai.utils import set_determinism

from scripts.data.augmentations import RandElasticd, RandHaircutd, RandTorchIOScand, chosen, try_augmentations
from scripts.data.scan_grid import ScanGrid
from scripts.training.seeding import SeededDataset

CONFIG = json.loads((ROOT / "configs" / "train.json").read_text())
AUGMENTATIONS = list(CONFIG["augmentation"])


@pytest.fixture(autouse=True)
def _seeded():
    set_determinism(0)
    yield
    set_determinism(None)


def parse(**changes):
    """configs/train.json at another size or with other augmentations; nothing is made until it is asked for."""
    return ConfigParser(copy.deepcopy({**CONFIG, "spatial_shape": [16, 16, 16], "grid": ScanGrid(), **changes}))


def augmentation(name, prob, size=16):
    """One of the config's random transforms, with another probability."""
    parser = parse(spatial_shape=[size] * 3)
    parser[f"augmentation#{name}#prob"] = prob
    return parser.get_parsed_content(f"augmentation#{name}")


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_changes_the_image_when_it_is_sure_to(name, size):
    before = brain(size)
    after = augmentation(name, 1.0, size)({"image": before.clone()})["image"]
    assert isinstance(after, MetaTensor)
    assert after.shape == before.shape
    assert after.dtype == torch.float32
    assert torch.isfinite(after).all()
    difference = (after - before).abs().mean()
    assert difference > 1e-5
    assert difference < 0.35 * before.mean() + 0.1  # and does not destroy it


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_at_prob_0_changes_nothing(name):
    before = brain()
    transform = augmentation(name, 0.0)
    for _ in range(3):
        assert torch.equal(transform({"image": before.clone()})["image"].as_tensor(), before.as_tensor())


@pytest.mark.parametrize("name", ["affine", "elastic", "crop", "haircut", "histogram_shift", "scale", "bias_field"])
def test_geometry_and_contrast_leave_the_background_empty(name):
    after = augmentation(name, 1.0)({"image": brain()})["image"]
    assert after.min() == 0
    assert (after[:, 0, 0, 0] == 0).all()


def test_haircut_shaves_the_edge_and_nothing_else():
    image = MetaTensor(torch.zeros(2, 16, 16, 16))
    image[:, 3:13, 3:13, 3:13] = 1
    image[:, 8, 8, 8] = 0  # enclosed, as a dark ventricle is: not an edge
    after = RandHaircutd("image", prob=1, width=(2, 2))({"image": image})["image"]
    expected = torch.zeros_like(image)
    expected[:, 5:11, 5:11, 5:11] = 1
    expected[:, 8, 8, 8] = 0
    # The corners of a cube are rounded off, its faces lose exactly two voxels.
    assert (after <= expected).all()
    assert torch.equal(after[:, :, 7, 7], expected[:, :, 7, 7])
    assert torch.equal(after[:, 5:11, 5:11, 8], expected[:, 5:11, 5:11, 8])


def test_haircut_works_on_any_background_in_2d_and_without_background():
    image = MetaTensor(torch.full((1, 12, 12), -1.0))
    image[:, 3:9, 3:9] = 0.5
    assert (RandHaircutd("image", prob=1, width=(1, 1))({"image": image})["image"] > 0).sum() == 16
    full = MetaTensor(1 + torch.rand(1, 8, 8, 8))
    full[0, 4, 4, 4] = 0
    assert torch.equal(RandHaircutd("image", prob=1)({"image": full})["image"], full)


def test_haircut_cuts_through_the_faint_rim_that_resampling_leaves():
    image = MetaTensor(torch.zeros(1, 16, 16, 16))
    image[:, 3:13, 3:13, 3:13] = 0.02
    image[:, 4:12, 4:12, 4:12] = 1
    after = RandHaircutd("image", prob=1, width=(1, 1))({"image": image})["image"]
    assert after[0, :, 7, 7].nonzero().flatten().tolist() == list(range(5, 11))


@pytest.mark.parametrize("width", [(0, 2), (3, 1), (1,)])
def test_haircut_width_out_of_range(width):
    with pytest.raises(ValueError, match="width is"):
        RandHaircutd("image", width=width)


@pytest.mark.parametrize("name", ["RandomMotion", "RandomAnisotropy", "RandomGhosting"])
def test_torchio_keeps_the_metadata_and_the_rest_of_the_dictionary(name):
    image = brain(spacing=2.0)
    image.meta["filename_or_obj"] = "scan.nii"
    data = RandTorchIOScand("image", name, prob=1.0)({"image": image, "subject": "a"})
    assert data["subject"] == "a"
    assert data["image"].meta["filename_or_obj"] == "scan.nii"
    assert torch.equal(data["image"].affine, image.affine)


def test_torchio_passes_over_2d():
    image = torch.rand(1, 8, 8)
    assert RandTorchIOScand("image", "RandomMotion", prob=1.0)({"image": image})["image"] is image


def test_torchio_follows_the_seed():
    transform = RandTorchIOScand("image", "RandomMotion", prob=1.0)
    results = []
    for _ in range(2):
        set_determinism(7)
        results.append(transform({"image": brain()})["image"].as_tensor())
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", [(20, 16), (12, 16, 14)])
def test_elastic_moves_what_monais_moves(shape):
    """Displacements of the same size as MONAI's (measured on a ramp), in 2D and 3D, and none on average."""
    ramp = torch.linspace(1, 2, shape[0]).reshape(1, -1, *[1] * (len(shape) - 1)).expand(1, *shape).contiguous()
    bend = RandElasticd("image", prob=1.0, sigma_range=(1, 1), magnitude_range=(4, 4))
    inner = (0, *[slice(3, -3)] * len(shape))
    bend.set_random_state(0)
    moved = torch.stack([(bend({"image": ramp})["image"] - ramp)[inner] for _ in range(20)]) * (shape[0] - 1)
    # the standard deviation of uniform noise after a Gaussian of sigma 1
    expected = 4 / math.sqrt(3) * (2 * math.sqrt(math.pi)) ** (-len(shape) / 2)
    assert moved.std() == pytest.approx(expected, rel=0.1)
    assert abs(moved.mean()) < 0.1 * expected


def test_elastic_bends_all_keys_alike_and_keeps_the_metadata():
    image = brain(spacing=2.0)
    bend = RandElasticd(["image", "mask"], prob=1.0)
    data = bend({"image": image, "mask": image.clone()})
    assert torch.equal(data["image"].as_tensor(), data["mask"].as_tensor())
    assert torch.equal(data["image"].affine, image.affine)


# The chain


def chain(parser, side="train"):
    """The whole of it: what is deterministic, then `train#preprocessing` or `validate#preprocessing`."""
    return Compose([parser.get_parsed_content(f"{part}preprocessing") for part in ("", f"{side}#")])


@pytest.fixture
def scans(tmp_path):
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    return [{"image": save(tmp_path / f"{i}.nii.gz", 900 * brain(16 + i)[0].numpy(), affine)} for i in range(3)]


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_unaugmented_scan_fills_the_output_range_on_a_clean_background(scans, activation):
    network = {**CONFIG["network_def"], "output_activation": activation}
    image = chain(parse(augment=False, network_def=network))(scans[2])["image"]
    low = -1.0 if activation == "tanh" else 0.0
    assert image.shape == (1, 16, 16, 16)
    assert [image.min(), image.max()] == [low, 1.0]
    assert (image == low).float().mean() > 0.5
    assert (image[:, 0, 0, 0] == low).all()


@pytest.mark.parametrize("size", [8, 16])
def test_fully_augmented_scan_stays_in_the_output_range(scans, size):
    parser = parse(spatial_shape=[size] * 3)
    for name in AUGMENTATIONS:
        parser[f"augmentation#{name}#prob"] = 1.0
    transforms = chain(parser)
    for scan in scans:
        image = transforms(scan)["image"]
        assert image.shape == (1, size, size, size)
        assert torch.isfinite(image).all()
        assert image.min() >= -1
        assert image.max() <= 1


def names_in(parser, side="train"):
    transforms = parser.get_parsed_content(f"{side}#preprocessing").transforms
    return [type(transform).__name__ for transform in transforms]


def test_augment_switches_the_random_part_alone():
    assert names_in(parse(augment=False)) == names_in(parse(), "validate") == ["ScaleIntensityRanged"]
    assert len(names_in(parse())) == len(AUGMENTATIONS)  # but for mirror, with the scaling
    assert names_in(parse(augment_validation=True), "validate") == names_in(parse())


def test_some_augmentations_are_chosen_by_name():
    names = names_in(parse(augment=["mirror", "blur"]))
    assert names == ["RandGaussianSmoothd", "RandLambdad", "ScaleIntensityRanged"]
    assert chosen(CONFIG["augmentation"], None) == {}
    for wrong in ("mirror", ["mirrors"], 3, {"mirror": True}, [["mirror"]]):
        with pytest.raises(ValueError, match=r"augment has .*: set it to True, False or a list of some of aff"):
            chosen(CONFIG["augmentation"], wrong)


def test_a_mirrored_scan_stays_where_it_was():
    before = brain()
    after = augmentation("mirror", 1.0)({"image": before.clone()})["image"]
    torch.testing.assert_close(after.as_tensor(), before.as_tensor().flip(1))
    torch.testing.assert_close(after.affine, before.affine)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_augmentation_can_be_left_out_by_its_name(name):
    parser = parse(augment=AUGMENTATIONS)
    assert len(names_in(parser)) == len(AUGMENTATIONS) + 1
    parser = parse()
    parser[f"augmentation#{name}#_disabled_"] = True
    assert len(names_in(parser)) == len(AUGMENTATIONS) - (name != "mirror")
    assert name not in parser.get_parsed_content("augmentation")


def test_affine_and_crop_are_one_resampling():
    """Two interpolations would blur more: an edge stays as sharp as one leaves it."""
    parser = parse()
    for name in AUGMENTATIONS:
        parser[f"augmentation#{name}#prob"] = 1.0 if name in ("affine", "crop") else 0.0
    fused, image = parser.get_parsed_content("train#preprocessing"), brain(16)
    apart = Compose(fused.transforms)
    results = [transform.set_random_state(3)({"image": image.clone()})["image"] for transform in (fused, apart)]
    sharpness = [float(result.diff(dim=1).square().mean()) for result in results]
    assert sharpness[0] > 1.05 * sharpness[1]
    assert (results[0] - results[1]).abs().mean() < 0.1


def test_augmented_scans_batch_and_leave_the_cached_ones_alone(scans):
    parser = parse()
    preprocessed = [parser.get_parsed_content("preprocessing")(scan) for scan in scans]
    before = preprocessed[0]["image"].clone()
    dataset = Dataset(preprocessed, parser.get_parsed_content("train#preprocessing"))
    for _ in range(5):
        (batch,) = DataLoader(dataset, batch_size=3)
        assert batch["image"].shape == (3, 1, 16, 16, 16)
        assert batch["image"].dtype == torch.float32
    assert torch.equal(preprocessed[0]["image"], before)


def test_slices_are_augmented_whichever_transforms_act():
    """Also where an affine acts and the crop behind it does not, which MONAI's own cannot join in 2D."""
    parser = parse(spatial_shape=[16, 16], network_def={**CONFIG["network_def"], "spatial_dims": 2})
    dataset = SeededDataset(
        [{"image": MetaTensor(torch.rand(1, 16, 16))}] * 512, parser.get_parsed_content("train#preprocessing")
    )
    acted = [parser.get_parsed_content("augmentation")[name] for name in ("affine", "crop")]
    seen = set()
    for index in range(512):
        image = dataset[index]["image"]
        assert image.shape == (1, 16, 16) and torch.isfinite(image).all()
        seen.add(tuple(transform._do_transform for transform in acted))
    assert len(seen) == 4


def test_which_scans_move_is_known_before():
    parser = parse()
    for name in AUGMENTATIONS[2:]:
        parser[f"augmentation#{name}#prob"] = 0.0
    scan = MetaTensor(torch.rand(1, 16, 16, 16))
    dataset = SeededDataset([{"image": scan}] * 40, parser.get_parsed_content("train#preprocessing"), seed=2)
    dataset.epoch = 3
    still = dataset.transform.transforms[-1]({"image": scan.clone()})["image"]
    moved = [not torch.equal(item["image"].as_tensor(), still.as_tensor()) for item in dataset]
    assert [dataset.moves(3, index) for index in range(40)] == moved
    assert 0 < sum(moved) < 20


@pytest.mark.parametrize("shape", [[16, 16], [16, 12]])
def test_slices_are_augmented_too(shape):
    parser = parse(spatial_shape=shape, network_def={**CONFIG["network_def"], "spatial_dims": 2})
    for name in AUGMENTATIONS:
        parser[f"augmentation#{name}#prob"] = 1.0
    image = parser.get_parsed_content("train#preprocessing")({"image": MetaTensor(torch.rand(1, *shape))})["image"]
    assert image.shape == (1, *shape)
    assert torch.isfinite(image).all()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("affine", {"rotate_range": "a"}, "augmentation#affine cannot be applied"),
        ("elastic", {"sigma_range": 5}, "augmentation#elastic cannot be applied"),
        ("blur", {"sigma_x": [1]}, r"augmentation#blur cannot be applied \(list index out of range\)"),
        ("noise", {"std": -1}, r"augmentation#noise cannot be applied \(scale < 0\)"),
    ],
)
def test_wrong_arguments_are_found_before_training(name, change, words):
    parser = parse()
    parser["augmentation"][name].update(change)
    with pytest.raises(ValueError, match=words):
        try_augmentations(parser.get_parsed_content("augmentation"), 1, 3)


@pytest.mark.parametrize("axes", [2, 3])
def test_a_trial_leaves_augmentations_and_random_numbers_as_they_are(axes):
    transforms = parse(spatial_shape=[32] * axes).get_parsed_content("augmentation")
    state = torch.get_rng_state()
    try_augmentations(transforms, 2, axes)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: transform.prob for name, transform in transforms.items() if transform.prob != 0.1} == {"mirror": 0.5}
