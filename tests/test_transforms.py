"""Reading, checking and fitting scans; the augmentations; and the chain of them all as a config writes it."""

import copy
import gzip
import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.transforms import Compose, Invertd, Orientationd
from monai.utils import set_determinism

from scripts.transforms import CheckScand, FitShaped, LoadScand, RandHaircutd, RandTorchIOScand, ScanError

# The transforms as configs/train.json writes them.
CONFIG = r"""
{
    "spatial_shape": [32, 32, 32],
    "augment": true,
    "augment_validation": false,
    "output_range": [-1.0, 1.0],
    "preprocessing": [
        {"_target_": "scripts.transforms.LoadScand", "keys": "image"},
        {"_target_": "scripts.transforms.CheckScand", "keys": "image", "channels": 1},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": null},
        {"_target_": "scripts.transforms.FitShaped", "keys": "image", "spatial_shape": "@spatial_shape"},
        {
            "_target_": "ScaleIntensityRangePercentilesd",
            "keys": "image",
            "lower": 0.05,
            "upper": 99.95,
            "b_min": 0.0,
            "b_max": 1.0,
            "clip": true,
            "channel_wise": true
        },
        {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32"}
    ],
    "augmentation": [
        {
            "_target_": "RandAffined",
            "_desc_": "5 degrees, shear of 5 degrees, 10 voxels of a 128 grid, 10 %",
            "keys": "image",
            "prob": 0.1,
            "rotate_range": "$[math.radians(5)] * len(@spatial_shape)",
            "shear_range": "$[math.tan(math.radians(5))] * (len(@spatial_shape) * (len(@spatial_shape) - 1))",
            "translate_range": "$[size * 10 / 128 for size in @spatial_shape]",
            "scale_range": "$[0.1] * len(@spatial_shape)",
            "padding_mode": "zeros"
        },
        {
            "_target_": "OneOf",
            "_desc_": "Rand3DElasticd resamples every scan whatever its prob: here it runs on a tenth of them",
            "weights": [0.1, 0.9],
            "transforms": [
                {
                    "_target_": "Rand3DElasticd",
                    "keys": "image",
                    "prob": 1.0,
                    "sigma_range": [1, 3],
                    "magnitude_range": [3, 5],
                    "padding_mode": "zeros"
                },
                {"_target_": "Identityd", "keys": "image"}
            ]
        },
        {
            "_target_": "RandAffined",
            "_desc_": "a random crop to 95 %, resized: one resampling instead of two",
            "keys": "image",
            "prob": 0.1,
            "scale_range": "$[(-0.05, -0.05)] * len(@spatial_shape)",
            "translate_range": "$[size * 0.025 for size in @spatial_shape]",
            "padding_mode": "border"
        },
        {
            "_target_": "scripts.transforms.RandTorchIOScand",
            "_desc_": "one axis at 0.8 to 0.95 of its resolution",
            "keys": "image",
            "prob": 0.1,
            "name": "RandomAnisotropy",
            "downsampling": "$(1 / 0.95, 1 / 0.8)"
        },
        {
            "_target_": "scripts.transforms.RandHaircutd",
            "_desc_": "1 to 3 voxels of a 128 grid",
            "keys": "image",
            "prob": 0.1,
            "width": "$(1, max(1, round(3 * min(@spatial_shape) / 128)))"
        },
        {"_target_": "RandHistogramShiftd", "keys": "image", "prob": 0.1, "num_control_points": [10, 15]},
        {"_target_": "RandScaleIntensityd", "keys": "image", "prob": 0.1, "factors": 0.1},
        {
            "_target_": "RandGaussianSmoothd",
            "keys": "image",
            "prob": 0.1,
            "sigma_x": "$(0.25, max(0.5, min(@spatial_shape) / 128))",
            "sigma_y": "$(0.25, max(0.5, min(@spatial_shape) / 128))",
            "sigma_z": "$(0.25, max(0.5, min(@spatial_shape) / 128))"
        },
        {"_target_": "RandGaussianNoised", "keys": "image", "prob": 0.1, "std": 0.05},
        {
            "_target_": "scripts.transforms.RandTorchIOScand",
            "keys": "image",
            "prob": 0.1,
            "name": "RandomGhosting",
            "num_ghosts": [4, 10],
            "intensity": [0.2, 0.6]
        },
        {"_target_": "RandBiasFieldd", "keys": "image", "prob": 0.1, "degree": 3, "coeff_range": [-0.1, 0.1]},
        {
            "_target_": "scripts.transforms.RandTorchIOScand",
            "_desc_": "translation in voxels, up to 1/64 of the grid",
            "keys": "image",
            "prob": 0.1,
            "name": "RandomMotion",
            "degrees": 3,
            "translation": "$min(@spatial_shape) / 64",
            "num_transforms": 2
        },
        {
            "_target_": "RandKSpaceSpikeNoised",
            "_desc_": "stripes of 2 to 10 % of the intensity range: a spike of log(amplitude x voxels) in k-space",
            "keys": "image",
            "prob": 0.1,
            "intensity_range": "$[math.log(a * math.prod(@spatial_shape)) for a in (0.02, 0.1)]"
        }
    ],
    "scaling": [
        {
            "_target_": "ScaleIntensityRanged",
            "_desc_": "from the working range, whose background of 0 is what resampling pads with, to the network's",
            "keys": "image",
            "a_min": 0.0,
            "a_max": 1.0,
            "b_min": "$@output_range[0]",
            "b_max": "$@output_range[1]",
            "clip": true
        }
    ],
    "train_transforms": {
        "_target_": "Compose",
        "transforms": "$@preprocessing + (@augmentation if @augment else []) + @scaling"
    },
    "val_transforms": {
        "_target_": "Compose",
        "transforms": "$@preprocessing + (@augmentation if @augment_validation else []) + @scaling"
    }
}
"""

AUGMENTATIONS = {
    "affine": 0,
    "elastic": 1,
    "crop": 2,
    "anisotropy": 3,
    "haircut": 4,
    "histogram": 5,
    "scale": 6,
    "blur": 7,
    "noise": 8,
    "ghosting": 9,
    "bias": 10,
    "motion": 11,
    "spike": 12,
}


@pytest.fixture(autouse=True)
def _seeded():
    set_determinism(0)
    yield
    set_determinism(None)


def parse(**changes):
    config = {**json.loads(CONFIG), "imports": ["$import math", "$import torch"], **changes}
    return ConfigParser(config)


def augmentation(name, prob, size=16):
    """One of the config's random transforms, with another probability."""
    config = json.loads(CONFIG)["augmentation"][AUGMENTATIONS[name]]
    config.update({"prob": prob} if "prob" in config else {"weights": [prob, 1 - prob]})
    return parse(spatial_shape=[size] * 3, augmentation=[config]).get_parsed_content("augmentation")[0]


def brain(size=16, spacing=1.0, channels=1):
    """A ball of smooth tissue on an empty background, in [0, 1]."""
    axis = (np.arange(size) - (size - 1) / 2) / (size / 2)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    tissue = 0.6 + 0.3 * np.sin(4 * x) * np.cos(3 * y) + 0.1 * z
    image = np.where(x**2 + y**2 + z**2 < 0.7**2, tissue, 0).astype(np.float32)
    return MetaTensor(np.repeat(image[None], channels, 0), affine=torch.diag(torch.tensor([spacing] * 3 + [1.0])))


def save(path, array, affine=None):
    nib.save(nib.Nifti1Image(np.asarray(array, dtype=np.float32), np.eye(4) if affine is None else affine), path)
    return str(path)


def oblique(spacing, translation=(-20.0, 7.0, 31.0), degrees=8):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag(spacing)
    affine[:3, 3] = translation
    return affine


# Reading


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_load_puts_the_channel_first_and_keeps_affine_and_name(tmp_path, suffix):
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    path = tmp_path / f"scan{suffix}"
    if suffix in (".nrrd", ".mha"):
        import itk

        image = itk.image_from_array(np.random.rand(7, 6, 5).astype(np.float32))
        image.SetSpacing([1.0, 2.0, 3.0])
        itk.imwrite(image, str(path))
        affine = np.diag([-1.0, -2.0, 3.0, 1.0])  # ITK's axes run to the left and the back
    else:
        save(path, np.random.rand(5, 6, 7), affine)
    image = LoadScand("image")({"image": str(path)})["image"]
    assert image.shape == (1, 5, 6, 7)
    assert np.allclose(image.affine, affine)
    assert image.meta["filename_or_obj"] == str(path)


def test_load_stacks_a_list_of_files_as_channels(tmp_path):
    paths = [save(tmp_path / f"{name}.nii.gz", np.random.rand(8, 8, 8)) for name in ("t1", "flair")]
    data = LoadScand("image")({"image": paths})
    assert data["image"].shape == (2, 8, 8, 8)
    assert CheckScand("image", channels=2)(data) is not None


def truncated_gz(path):
    save(path, np.random.rand(16, 16, 16))
    path.write_bytes(path.read_bytes()[:8000])


def truncated_nii(path):
    save(path, np.random.rand(16, 16, 16))
    path.write_bytes(path.read_bytes()[:8000])


UNREADABLE = [
    ("scan.nii.gz", truncated_gz, r"\(Compressed file ended"),
    ("scan.nii", truncated_nii, r"\(Expected 16384 bytes, got"),
    ("scan.nii", lambda path: path.write_text("a letter, not a scan" * 50), r"\(Cannot work out file type"),
    ("scan.nii.gz", lambda path: path.write_bytes(gzip.compress(b"letter" * 99)), r"\(Cannot work out file type"),
    ("scan.nii.gz", lambda path: path.write_text("a letter, not a scan" * 50), r"\(.*not a gzip file"),
    ("scan.nii", lambda path: path.write_bytes(b""), r"\(Empty file"),
    ("scan.nrrd", lambda path: path.write_text("a letter, not a scan"), r"\(.*"),
]


@pytest.mark.parametrize(("name", "make", "reason"), UNREADABLE)
def test_unreadable_scan(tmp_path, name, make, reason):
    make(tmp_path / name)
    sentence = rf"'.*{name}' cannot be read as an image {reason}.*\): it is truncated or not an image; replace it or"
    with pytest.raises(ScanError, match=sentence) as caught:
        LoadScand("image")({"image": str(tmp_path / name)})
    assert "\n" not in str(caught.value)


def test_scan_that_is_gone(tmp_path):
    with pytest.raises(ScanError, match=r"gone.nii.gz' does not exist: it was moved or deleted"):
        LoadScand("image")({"image": str(tmp_path / "gone.nii.gz")})


def test_the_sentence_is_the_cause_of_what_compose_raises(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        Compose([LoadScand("image")])({"image": str(tmp_path / "gone.nii.gz")})
    assert isinstance(caught.value.__cause__, ScanError)


# Checking


def with_voxel(value):
    image = np.random.rand(8, 8, 8)
    image[3, 4, 5] = value
    return image


BAD = [
    (np.random.rand(8, 8, 8, 4), "has 4 channels or time points of shape .* where 1 is expected"),
    (np.random.rand(8, 8, 8, 1, 3), "has 3 channels or time points"),
    (np.random.rand(8, 8), r"has 2 spatial axes \(shape \(8, 8\)\) where 3 are expected"),
    (np.random.rand(0, 8, 8), r"is empty \(shape \(0, 8, 8\)\)"),
    (with_voxel(np.nan), r"has 1 NaN or infinite voxel\(s\) of 512"),
    (with_voxel(np.inf), r"has 1 NaN or infinite voxel\(s\) of 512"),
    (with_voxel(-np.inf), r"has 1 NaN or infinite voxel\(s\) of 512"),
    (np.full((8, 8, 8), 7), r"is constant \(every voxel is 7\)"),
]


@pytest.mark.parametrize(("array", "sentence"), BAD)
def test_bad_scan_is_refused_by_name(tmp_path, array, sentence):
    data = LoadScand("image")({"image": save(tmp_path / "bad.nii", array)})
    with pytest.raises(ScanError, match=rf"bad.nii' {sentence}"):
        CheckScand("image")(data)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_scan_without_a_usable_affine(value):
    image = MetaTensor(torch.rand(1, 8, 8, 8), affine=torch.diag(torch.tensor([value, 1.0, 1.0, 1.0])))
    with pytest.raises(ScanError, match="'image' has no usable affine in its header"):
        CheckScand("image")({"image": image})


@pytest.mark.parametrize("channels", [1, 2])
def test_good_scan_passes_unchanged(channels):
    image = brain(8, channels=channels)
    assert CheckScand("image", channels=channels)({"image": image})["image"] is image


def test_spacing_policy(caplog):
    data = {"image": brain(8, spacing=2.0)}
    CheckScand("image", spacing=2.0, spacing_policy="fail")(data)
    CheckScand("image", spacing=1.0)(data)
    assert "voxels of 2×2×2 mm where 1×1×1 mm are expected" in caplog.text
    with pytest.raises(ScanError, match="voxels of 2×2×2 mm where 1×1×3 mm are expected"):
        CheckScand("image", spacing=(1, 1, 3), spacing_policy="fail")(data)
    with pytest.raises(ValueError, match="spacing_policy is 'ignore'"):
        CheckScand("image", spacing_policy="ignore")


def test_spacing_is_compared_in_ras_order():
    affine = torch.tensor([[0.0, 0, -3, 0], [1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]])  # stored as A, S, L
    CheckScand("image", spacing=(3, 1, 2), spacing_policy="fail")({"image": MetaTensor(torch.rand(1, 4, 4, 4), affine)})


# Fitting

GRIDS = [  # the scan's shape and spacing, the grid asked for, the spacing to expect
    ((16, 20, 12), (1.0, 1.0, 1.0), (8, 8, 8), 2.5),
    ((16, 20, 12), (1.0, 1.0, 3.0), (8, 8, 8), 4.5),
    ((10, 10, 10), (1.0, 1.0, 1.0), (16, 16, 16), 0.625),
    ((16, 16, 16), (1.0, 1.0, 1.0), (16, 8, 12), 2.0),
    ((16, 16, 16), (2.0, 2.0, 2.0), (16, 16, 16), 2.0),
]


@pytest.mark.parametrize(("shape", "spacing", "target", "expected"), GRIDS)
def test_fit_gives_cubes_and_keeps_the_centre_in_place(shape, spacing, target, expected):
    before = MetaTensor(torch.rand(1, *shape), affine=oblique(spacing))
    after = FitShaped("image", target)({"image": before})["image"]
    assert after.shape == (1, *target)
    assert after.dtype == torch.float32
    assert np.allclose(np.linalg.norm(after.affine[:3, :3], axis=0), expected)
    centre = before.affine.numpy() @ [*(np.array(shape) - 1) / 2, 1]
    assert np.allclose(after.affine.numpy() @ [*(np.array(target) - 1) / 2, 1], centre, atol=1e-4)


def test_a_landmark_keeps_its_place_in_the_world():
    """The centre of mass of a blob, in mm, is the same before and after."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in (24, 30, 18)), indexing="ij"))
    blob = np.exp(
        -(((index - np.array([9, 18, 8])[:, None, None, None]) / [[[[3]]], [[[3]]], [[[2]]]]) ** 2).sum(0) / 2
    )
    before = MetaTensor(blob[None].astype(np.float32), affine=oblique((1.0, 0.8, 1.5)))
    after = FitShaped("image", 16)({"image": before})["image"]

    def centre_of_mass(image):
        weight = image[0].numpy()
        at = [(weight * axis).sum() / weight.sum() for axis in np.indices(weight.shape)]
        return image.affine.numpy() @ [*at, 1]

    assert np.allclose(centre_of_mass(after), centre_of_mass(before), atol=0.15)


def test_a_ball_stays_a_ball_unless_aspect_is_given_up():
    index = np.stack(np.meshgrid(np.arange(32), np.arange(16), np.arange(8), indexing="ij"))
    ball = ((index - np.array([15.5, 7.5, 3.5])[:, None, None, None]) * [[[[1]]], [[[1]]], [[[2]]]]) ** 2
    data = {"image": MetaTensor((ball.sum(0) < 36)[None].astype(np.float32), affine=np.diag([1.0, 1, 2, 1]))}

    def extents(image):
        return [int((image[0].amax(dim=[a for a in range(3) if a != axis]) > 0.5).sum()) for axis in range(3)]

    ball = FitShaped("image", 16)(data)["image"]
    assert max(extents(ball)) - min(extents(ball)) <= 1
    stretched = FitShaped("image", 16, keep_aspect=False)(data)["image"]
    assert extents(stretched)[1] >= 1.8 * extents(stretched)[0]
    assert np.allclose(np.diag(stretched.affine), [2, 1, 1, 1])


@pytest.mark.parametrize("background", [0.0, -1.0, 5.0])
def test_fit_pads_with_the_background(background):
    image = MetaTensor(brain(12).as_tensor()[:, :, :, 4:8] + background)
    after = FitShaped("image", 8)({"image": image})["image"]
    assert (after[..., :2] == background).all()
    assert (after[..., -2:] == background).all()
    assert after.min() == background


def test_fit_pads_each_channel_with_its_own_background():
    image = MetaTensor(torch.cat([torch.rand(1, 12, 12, 4), 100 + torch.rand(1, 12, 12, 4)]))
    after = FitShaped("image", 12)({"image": image})["image"]
    assert torch.equal(after[:, 0, 0, 0].as_tensor(), image.as_tensor().flatten(1).amin(1))


def test_fit_smooths_before_it_drops_voxels():
    """A checkerboard finer than the new voxels comes back grey, not as a coarser pattern."""
    index = np.indices((32, 32, 32)).sum(0) % 2
    after = FitShaped("image", 8)({"image": MetaTensor(index[None].astype(np.float32))})["image"]
    assert (after[:, 1:-1, 1:-1, 1:-1] - 0.5).abs().max() < 0.05


def test_inverse_returns_to_the_scans_own_grid():
    before = MetaTensor(brain(16).as_tensor() * 2 - 1, affine=oblique((1.0, 1.0, 1.2)))
    fit = FitShaped("image", 20)
    after = fit({"image": before})
    back = fit.inverse(after)["image"]
    assert back.shape == before.shape
    assert np.allclose(back.affine, before.affine, atol=1e-5)
    assert not back.applied_operations
    assert (back - before).abs().mean() < 0.05
    assert back.amin() >= -1  # nothing fades to zero at the edge
    assert (back[:, 0] == -1).all()


def test_inverse_of_the_whole_preprocessing(tmp_path):
    affine = oblique((-1.0, 1.2, 1.5))  # stored right to left, as many scanners do
    path = save(tmp_path / "scan.nii.gz", brain(16)[0].numpy()[:, :14], affine)
    chain = Compose([LoadScand("image"), Orientationd("image", axcodes="RAS", labels=None), FitShaped("image", 8)])
    data = chain({"image": path})
    back = Invertd("image", transform=chain, orig_keys="image", nearest_interp=False)(data)["image"]
    assert back.shape == (1, 16, 14, 16)
    assert np.allclose(back.affine, affine, atol=1e-4)


def test_fit_in_2d_and_with_channels():
    assert FitShaped("image", (8, 8))({"image": MetaTensor(torch.rand(1, 20, 12))})["image"].shape == (1, 8, 8)
    assert FitShaped("image", 8)({"image": brain(12, channels=2)})["image"].shape == (2, 8, 8, 8)


# Augmenting


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


@pytest.mark.parametrize("name", ["affine", "elastic", "crop", "haircut", "histogram", "scale", "bias"])
def test_geometry_and_contrast_leave_the_background_empty(name):
    after = augmentation(name, 1.0)({"image": brain()})["image"]
    assert after.min() == 0
    assert (after[:, 0, 0, 0] == 0).all()


def test_haircut_shaves_the_edge_and_nothing_else():
    image = torch.zeros(2, 16, 16, 16)
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
    image = torch.full((1, 12, 12), -1.0)
    image[:, 3:9, 3:9] = 0.5
    assert (RandHaircutd("image", prob=1, width=(1, 1))({"image": image})["image"] > 0).sum() == 16
    full = 1 + torch.rand(1, 8, 8, 8)
    full[0, 4, 4, 4] = 0
    assert torch.equal(RandHaircutd("image", prob=1)({"image": full})["image"], full)


def test_haircut_cuts_through_the_faint_rim_that_resampling_leaves():
    image = torch.zeros(1, 16, 16, 16)
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
    data = RandTorchIOScand("image", name=name, prob=1.0)({"image": image, "subject": "a"})
    assert data["subject"] == "a"
    assert data["image"].meta["filename_or_obj"] == "scan.nii"
    assert torch.equal(data["image"].affine, image.affine)


def test_torchio_passes_over_2d():
    image = torch.rand(1, 8, 8)
    assert RandTorchIOScand("image", name="RandomMotion", prob=1.0)({"image": image})["image"] is image


def test_torchio_follows_the_seed():
    transform = RandTorchIOScand("image", name="RandomMotion", prob=1.0)
    results = []
    for _ in range(2):
        set_determinism(7)
        results.append(transform({"image": brain()})["image"].as_tensor())
    assert torch.equal(*results)


# The chain


@pytest.fixture
def scans(tmp_path):
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    return [{"image": save(tmp_path / f"{i}.nii.gz", 900 * brain(16 + i)[0].numpy(), affine)} for i in range(3)]


@pytest.mark.parametrize("output_range", [[-1.0, 1.0], [0.0, 1.0]])
def test_unaugmented_scan_fills_the_output_range_on_a_clean_background(scans, output_range):
    parser = parse(spatial_shape=[16, 16, 16], output_range=output_range, augment=False)
    image = parser.get_parsed_content("train_transforms")(scans[2])["image"]
    assert image.shape == (1, 16, 16, 16)
    assert [image.min(), image.max()] == output_range
    assert (image == output_range[0]).float().mean() > 0.5
    assert (image[:, 0, 0, 0] == output_range[0]).all()


@pytest.mark.parametrize("size", [8, 16])
def test_fully_augmented_scan_stays_in_the_output_range(scans, size):
    config = copy.deepcopy(json.loads(CONFIG)["augmentation"])
    for transform in config:
        transform.update({"prob": 1.0} if "prob" in transform else {"weights": [1.0, 0.0]})
    transforms = parse(spatial_shape=[size] * 3, augmentation=config).get_parsed_content("train_transforms")
    for scan in scans:
        image = transforms(scan)["image"]
        assert image.shape == (1, size, size, size)
        assert torch.isfinite(image).all()
        assert image.min() >= -1
        assert image.max() <= 1


def test_augment_switches_the_random_part_alone():
    counts = {
        augment: len(parse(augment=augment).get_parsed_content("train_transforms").transforms)
        for augment in (True, False)
    }
    assert counts[True] - counts[False] == len(AUGMENTATIONS)
    assert len(parse().get_parsed_content("val_transforms").transforms) == counts[False]


def test_deterministic_part_is_cached_and_augmented_scans_batch(scans):
    transforms = parse(spatial_shape=[16, 16, 16]).get_parsed_content("train_transforms")
    dataset = CacheDataset(scans, transforms, num_workers=1, progress=False)
    (cached,) = (item["image"] for item in dataset._cache[:1])
    assert cached.shape == (1, 16, 16, 16)
    assert [cached.min(), cached.max()] == [0, 1]
    before = cached.clone()
    for _ in range(5):
        (batch,) = DataLoader(dataset, batch_size=3)
        assert batch["image"].shape == (3, 1, 16, 16, 16)
        assert batch["image"].dtype == torch.float32
    assert torch.equal(dataset._cache[0]["image"], before)
