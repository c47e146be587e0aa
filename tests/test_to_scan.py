"""Results on the scan's own grid: one function, for every unit."""

import numpy as np
import pytest
import torch
from conftest import brain, inference_config, save

from scripts.data.scan_grid import Fit, ToScand, to_scan


@pytest.fixture(params=["RAS", "oblique", "PIR"])
def scan(request, tmp_path):
    """A scan as the network gets it; the file is read from another orientation, or lies at an angle."""
    array, affine = brain()[0].numpy(), np.diag([2.0, 2.5, 3.0, 1.0])
    if request.param == "PIR":
        affine = affine[:, [2, 0, 1, 3]]
    if request.param == "oblique":
        angle = np.radians(10)
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        affine = turn @ affine
    save(tmp_path / "a.nii.gz", array, affine=affine)
    config = inference_config(spatial_shape=[32, 32, 32])
    return config.get_parsed_content("preprocessing")({"image": str(tmp_path / "a.nii.gz")})["image"], array, affine


def test_intensities_come_back_in_the_scans_units_and_place(scan):
    image, array, affine = scan
    fit = Fit.of(image)
    back = to_scan(image, fit, "intensity")
    assert back.shape[1:] == array.shape and np.allclose(back.affine, affine, atol=1e-4)
    assert np.corrcoef(back[0].numpy().ravel(), array.ravel())[0, 1] > 0.95
    assert abs(back[0].numpy().mean() - array.mean()) < 0.05 * np.ptp(array)
    assert back.meta["filename_or_obj"].endswith("a.nii.gz")
    lowest = torch.tensor(fit.offset)
    assert float(fit.scaled(lowest[:, None])) == pytest.approx(fit.b_min)


def test_a_deviation_has_no_offset_and_a_number_no_unit(scan):
    image, array, _ = scan
    ones, fit = torch.ones(image.shape), Fit.of(image)
    deviation, number = to_scan(ones, fit, "deviation"), to_scan(ones, fit, "number")
    middle = tuple(size // 2 for size in array.shape)
    assert float(number[0][middle]) == pytest.approx(1, abs=1e-5)
    assert float(deviation[0][middle]) == pytest.approx(1 / fit.gain[0], rel=1e-5)
    whole = to_scan(ones, fit, "intensity")
    assert float(whole[0][middle] - deviation[0][middle]) == pytest.approx(1 / fit.gain[0] + fit.offset[0], rel=1e-4)


def test_a_label_is_the_nearest_one(scan):
    image, _, _ = scan
    labels = torch.randint(0, 9, image.shape).float()
    back = to_scan(labels, Fit.of(image), "label")
    assert set(back.unique().tolist()) <= set(range(9))
    assert len(to_scan(labels, Fit.of(image), "number").unique()) > 9


def test_where_the_grid_does_not_reach_there_is_background(scan):
    image, _, _ = scan
    fit = Fit.of(image)
    far = fit._replace(affine=fit.affine @ np.array([[1, 0, 0, 20], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    assert float(to_scan(image, far, "intensity")[0].flatten()[0]) == fit.background[0]
    assert (to_scan(torch.ones(image.shape), far, "number") == 0).any()


def test_a_word_for_each_result_or_one_for_all(scan):
    image, _, _ = scan
    ones = torch.ones(image.shape)
    data = {"image": image, "a": ones, "b": ones}
    each = ToScand(["a", "b"], ["number", "deviation"])(data)
    both = ToScand(["a", "b"], "number", scan="fit")({**data, "fit": Fit.of(image)})
    assert torch.equal(each["a"], both["a"]) and torch.equal(both["a"], both["b"])
    assert not torch.equal(each["a"], each["b"])
    with pytest.raises(ValueError, match="as_ is 'colour': choose one of 'intensity'"):
        to_scan(ones, Fit.of(image), "colour")
