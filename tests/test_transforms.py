"""Reading, checking, fitting and scaling scans, and the way back."""

import gzip
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import brain, save
from monai.data import MetaTensor
from monai.transforms import Compose

from scripts.data.reading import as_reason
from scripts.data.scan_grid import Fit, to_scan
from scripts.data.transforms import CheckScand, FitShaped, LoadScand, RobustScaled, ScanError, unscaled


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
    ("scan.nrrd", lambda path: path.write_text("a letter, not a scan"), r"\(.*"),
]


@pytest.mark.parametrize(("name", "make", "reason"), UNREADABLE)
def test_unreadable_scan(tmp_path, name, make, reason):
    make(tmp_path / name)
    sentence = rf"'.*{name}' cannot be read as an image {reason}.*\): it is truncated or not an image; replace it or"
    with pytest.raises(ScanError, match=sentence) as caught:
        LoadScand("image")({"image": str(tmp_path / name)})
    assert "\n" not in str(caught.value)


def test_files_that_are_not_what_they_seem(tmp_path):
    save(tmp_path / "good.nii.gz", np.random.rand(8, 8, 8))
    save(tmp_path / "plain.nii", np.random.rand(8, 8, 8))
    (tmp_path / "empty.nii").touch()
    (tmp_path / "gone.nii").symlink_to("nowhere.nii")
    (tmp_path / "zipped.nii").write_bytes((tmp_path / "good.nii.gz").read_bytes())
    (tmp_path / "unzipped.nii.gz").write_bytes((tmp_path / "plain.nii").read_bytes())
    for name, sentence in (
        ("empty.nii", r"empty.nii' is an empty file \(0 bytes\): replace it"),
        ("gone.nii", r"gone.nii' is a link to 'nowhere.nii', which does not exist: repair the link"),
        ("zipped.nii", r"zipped.nii' holds .gz data, which its name hides: rename it to end in .nii.gz"),
        ("unzipped.nii.gz", r"unzipped.nii.gz' holds .nii data, which its name hides: rename it to end in .nii"),
    ):
        with pytest.raises(ScanError, match=sentence):
            LoadScand("image")({"image": str(tmp_path / name)})


def test_channels_on_different_grids(tmp_path):
    paths = [save(tmp_path / f"{s}.nii", np.random.rand(8, 8, 8), np.diag([s, s, s, 1.0])) for s in (1, 2)]
    with pytest.raises(ScanError, match="cannot be the channels of one scan, since their grids or affines differ"):
        LoadScand("image")({"image": paths})


def test_of_two_channels_the_broken_one_is_named(tmp_path):
    good = save(tmp_path / "good.nii", brain()[0].numpy())
    (tmp_path / "bad.nii").touch()
    truncated_nii(tmp_path / "torn.nii")
    constant, hole = np.ones((16, 16, 16)), brain()[0].numpy()
    hole[3, 4, 5] = np.nan
    for name, array in (("constant.nii", constant), ("hole.nii", hole)):
        save(tmp_path / name, array)
    for name, reason in (
        ("bad.nii", "is an empty file"),
        ("torn.nii", "cannot be read as an image"),
        ("constant.nii", "is constant"),
        ("hole.nii", "has 1 NaN or infinite voxel"),
    ):
        with pytest.raises(ScanError) as error:
            CheckScand("image", 2)(LoadScand("image")({"image": [good, str(tmp_path / name)]}))
        assert str(error.value).startswith(f"'{tmp_path / name}' {reason}")
        assert good not in str(error.value)
        assert as_reason(str(error.value), [good, tmp_path / name]).startswith(f"'{name}' {reason}")


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


def z_scored():
    """A ball of tissue with zero mean in an empty background of zero."""
    image = np.asarray(brain(16)[0])
    return np.where(image > 0, (image - image[image > 0].mean()) / image[image > 0].std(), 0)


BAD = [
    (z_scored(), r"has a background \(0\) that is not its lowest value \(-"),
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
def test_scan_with_a_singular_affine(value):
    image = MetaTensor(torch.rand(1, 8, 8, 8), affine=torch.diag(torch.tensor([value, 1.0, 1.0, 1.0])))
    with pytest.raises(ScanError, match="'image' has a singular affine in its header"):
        CheckScand("image")({"image": image})


@pytest.mark.parametrize("channels", [1, 2])
def test_good_scan_passes_unchanged(channels):
    image = brain(8, channels=channels)
    assert CheckScand("image", channels=channels)({"image": image})["image"] is image


def differences(image, **expected):
    return CheckScand("image", **expected)({"image": image})["image"].meta["differences"]


def test_geometry_is_held_against_what_is_expected():
    # stored as A, S, L with voxels of 3 mm to the right, 1 to the front and 2 to the top
    affine = torch.tensor([[0.0, 0, -3, 0], [1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]])
    image = MetaTensor(torch.rand(1, 4, 5, 6), affine)
    assert differences(image, spacing=(3, 1, 2), field_of_view=(18, 4, 10), orientation="ASL") == []
    assert differences(image) == []
    assert differences(image, spacing=1) == ["it has voxels of 3×1×2 mm where 1×1×1 mm are expected"]
    assert differences(image, spacing=(3, 1.01, 2)) == []
    assert differences(image, field_of_view=(18, 4, 12)) == [
        "it has a field of view of 18×4×10 mm where 18×4×12 mm are expected"
    ]
    assert differences(image, orientation="RAS") == ["its axes are stored as ASL where RAS is expected"]


def header(path, sform=None, qform=None):
    image = nib.Nifti1Image(np.random.rand(8, 8, 8).astype(np.float32), None)
    image.header.set_zooms((2, 2, 2))
    image.set_sform(sform, 0 if sform is None else 1)
    image.set_qform(qform, 0 if qform is None else 1)
    nib.save(image, path)
    return differences(LoadScand("image")({"image": str(path)})["image"])


def test_odd_headers_are_named(tmp_path):
    assert header(tmp_path / "e.nii", np.diag([3.0, 3, 3, 1])) == [
        "its sform is not used, since its voxel size contradicts the header's (pixdim)"
    ]
    plain, moved = np.diag([2.0, 2, 2, 1]), np.diag([2.0, 2, 2, 1])
    moved[0, 3] = 5
    assert header(tmp_path / "a.nii", plain, plain) == []
    assert header(tmp_path / "b.nii", plain) == []
    assert header(tmp_path / "c.nii") == [
        "its header has neither an sform nor a qform, so its orientation and place are guesses"
    ]
    assert header(tmp_path / "d.nii", plain, moved) == [
        "its sform (which is used) and its qform disagree by up to 5 mm"
    ]


@pytest.mark.parametrize(
    ("name", "offset", "value", "said"),
    [
        ("b.nii", 256, np.float32(1.00002), ["its qform is no rotation; its sform is used"]),
        ("c.nii", 256, np.float32(1.00002), "qform that is no rotation, and no sform to use instead"),
        ("b.nii", 123, np.uint8(5), []),  # units that NIfTI does not have
    ],
)
def test_bytes_of_a_header_that_mean_nothing(tmp_path, name, offset, value, said):
    path, affine = tmp_path / name, np.diag([2.0, 2, 2, 1])
    header(path, affine if name == "b.nii" else None, affine)
    data = bytearray(path.read_bytes())
    data[offset : offset + value.nbytes] = value.tobytes()
    path.write_bytes(data)
    if isinstance(said, str):
        with pytest.raises(ScanError, match=said):
            LoadScand("image")({"image": str(path)})
    else:
        assert differences(LoadScand("image")({"image": str(path)})["image"]) == said


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
    before = MetaTensor(torch.zeros(1, *shape), affine=oblique(spacing))
    before[(0, *(n // 2 for n in shape))] = 1
    after = FitShaped("image", target)({"image": before})["image"]
    assert after.shape == (1, *target)
    assert after.dtype == torch.float32
    assert np.allclose(after.affine[:3, :3], np.diag(np.diag(after.affine[:3, :3])))  # upright
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


def test_a_fitted_scan_goes_back_to_its_own_grid():
    before = MetaTensor(brain(16).as_tensor() * 2 - 1, affine=oblique((1.0, 1.0, 1.2)))
    after = RobustScaled("image", 0, 100)(FitShaped("image", 20)({"image": before}))["image"]
    back = to_scan(after, Fit.of(after), "intensity")
    assert back.shape == before.shape
    assert np.allclose(back.affine, before.affine, atol=1e-5)
    assert (back - before).abs().mean() < 0.05
    assert back.amin() >= -1 - 1e-6  # nothing fades to zero at the edge
    assert torch.allclose(back[:, 0], torch.tensor(-1.0))


def test_fit_in_2d_and_with_channels():
    assert FitShaped("image", (8, 8))({"image": MetaTensor(torch.rand(1, 20, 12))})["image"].shape == (1, 8, 8)
    assert FitShaped("image", 8)({"image": brain(12, channels=2)})["image"].shape == (2, 8, 8, 8)


def test_a_scan_at_an_angle_is_turned_upright_and_keeps_its_whole_foreground():
    full = MetaTensor(torch.ones(1, 20, 20, 20), affine=oblique((1.0, 1.0, 1.0), degrees=30))
    full[0, 10, 10, 10] = 0
    after = FitShaped("image", 20)({"image": full})["image"]
    side = 20 * (math.cos(math.radians(30)) + math.sin(math.radians(30)))
    assert after.affine[0, 0] * 20 > side
    small = MetaTensor(brain(20).as_tensor(), affine=full.affine)  # a ball needs no larger voxels
    assert FitShaped("image", 20)({"image": small})["image"].affine[0, 0] == pytest.approx(1.0)


# Scaling


def test_scaling_takes_the_background_to_the_lowest_value_and_outliers_to_the_highest():
    image = brain(32) * 700
    image[0, 16, 16, 16] = 1e6
    after = RobustScaled("image", b_min=-1, b_max=1)({"image": image})["image"]
    assert (after[image == 0] == -1).all()
    assert after.max() == 1
    assert (after[image > 0] > -1).all()
    assert after.as_tensor().median() == -1
    assert after[image > 0].median() > 0


def test_scaling_is_undone_by_what_the_metadata_say():
    image = torch.cat([brain(16), 50 + 900 * brain(16)])
    after = RobustScaled("image", 0, 100, b_min=-1, b_max=1)({"image": image})["image"]
    assert [float(after[c].min()) for c in (0, 1)] == [-1, -1]
    assert torch.allclose(unscaled(after, after.meta["scaling"]), image, atol=1e-3)
    background = unscaled(torch.full((2, 16, 16, 16), -1.0), after.meta["scaling"])
    assert torch.allclose(background[:, 0, 0, 0], torch.tensor([0.0, 50.0]), atol=1e-4)


def test_scaling_refuses_what_shows_nothing():
    image = torch.zeros(1, 20, 20, 20)
    image[0, 0, 0, 0] = 1
    with pytest.raises(ScanError, match=r"has the same value at its 0\.05 and 99\.95 percentiles"):
        RobustScaled("image")({"image": MetaTensor(image)})


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"spacing": "banana"}, "expected_spacing is 'banana': give one number of mm"),
        ({"spacing": [1, 1, -1]}, r"expected_spacing is \[1, 1, -1\]"),
        ({"field_of_view": [0, 200, 200]}, "expected_field_of_view"),
        ({"orientation": "LPX"}, "expected_orientation is 'LPX': give one letter per axis"),
        ({"orientation": "RLS"}, "expected_orientation is 'RLS'"),
    ],
)
def test_what_cannot_be_expected_is_refused(expected, words):
    with pytest.raises(ValueError, match=words):
        CheckScand("image", **expected)
