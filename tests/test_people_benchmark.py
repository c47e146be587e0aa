"""The benchmark of people, run on a few phantoms with a tiny network; and its parts, where the answer is known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, inference_config
from monai.data import MetaTensor
from torch.distributions import MultivariateNormal

from benchmarks.people import PCA, age_by_regression, counterfactuals, darken, fit_pca, main, own_grid_psnr
from scripts.data.covariates import CovariateCoding
from scripts.data.transforms import reading
from scripts.phantoms import make_brains

CONFIGS = [str(ROOT / "configs/inference.json"), str(ROOT / "tests/tiny.json")]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    make_brains(folder / "scans", 12, spacing=8, covariates=True, contrast="T1w", workers=1)
    scans = [{"image": str(path)} for path in sorted((folder / "scans").glob("*.nii.gz"))]
    sides = {"training": scans[:7], "validation": scans[7:9], "testing": scans[9:]}
    (folder / "list.json").write_text(json.dumps(sides), encoding="utf-8")
    return folder


def test_it_measures_plain_models_beside_the_weights(people, capsys):
    torch.manual_seed(0)
    torch.save(inference_config().get_parsed_content("network_def").state_dict(), people / "model.pt")
    mask = np.zeros((40, 40, 40), np.uint8)
    mask[12:26, 12:26, 12:26] = 1
    (people / "shapes").mkdir()
    nib.save(nib.Nifti1Image(mask, np.diag([4.0, 4, 4, 1]) + np.eye(4, k=3) * -80), people / "shapes" / "a.nii.gz")
    paths = {"dataset_dir": str(people / "list.json"), "output_dir": str(people / "out")}
    found = main(
        ckpt=str(people / "model.pt"), config_file=CONFIGS, mask_dir=str(people / "shapes"), batch_size=2, **paths
    )
    assert found["people"] == 3 and found == json.loads((people / "out" / "people.json").read_text())
    # a grid of 8 voxels shows what it shows of a scan, and no model of it shows more
    assert found["grid_own_grid"] > max(found["ours_own_grid"], found["pca_own_grid"]) > 10
    assert found["pca_psnr_low"] < found["pca_psnr"] < found["pca_psnr_high"]
    assert "| pca_bits_per_dim |" in capsys.readouterr().out
    of_kinds = (people / "out" / "scores" / "lesions.md").read_text(encoding="utf-8")
    assert " years" in of_kinds and "all" in of_kinds
    assert found["filled_mse_low"] < found["filled_mse"] < found["filled_mse_high"] and found["filled_psnr"] > 0
    assert 0 <= found["filled_coverage_50"] <= found["filled_coverage_90"] <= 1
    whole = nib.load(people / "scans" / "sub-0010_T1w.nii.gz").get_fdata()
    assert np.array_equal(nib.load(people / "out" / "holes" / "scans" / "sub-000_T1w.nii.gz").get_fdata(), whole)


def test_a_scan_is_its_own_best_on_its_own_grid(people):
    preprocess = inference_config(spatial_shape=[24, 32, 24]).get_parsed_content("preprocessing")
    item = {"image": str(people / "scans" / "sub-0001_T1w.nii.gz")}
    fitted, scan = preprocess(item)["image"], reading(preprocess)(item)
    images = {"same": fitted.as_tensor(), "off": fitted.as_tensor() + 0.2}
    found = own_grid_psnr(scan["image"], fitted, images)
    assert found["same_own_grid"] > 25 > found["off_own_grid"] > 10
    assert isinstance(fitted, MetaTensor) and set(found) == {
        f"{name}_own_grid{end}" for name in images for end in ("", "_brain")
    }


def test_a_regression_reads_the_age_where_it_shows():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 40, generator=generator)
    ages = 50 + 10 * scores[:, 0].numpy()
    ages[3] = np.nan
    found = age_by_regression((scores[:40], scores[40:]), (ages[:40], ages[40:]))
    assert found["ridge_32_mae"] < 3 < found["ridge_32_mae_mean"]
    assert "ridge_64_mae" not in found


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_counterfactuals_are_measured_against_what_age_does(monkeypatch, share):
    """Age darkens one half of the brain, and nothing else in people: as far as it is asked for, or half as far."""
    generator = np.random.default_rng(0)
    pattern = torch.zeros(1, 4, 4, 4)
    pattern[:, :2] = 1
    ages = generator.uniform(30, 80, 60)

    def scans_at(ages: np.ndarray) -> torch.Tensor:
        noise = torch.from_numpy(generator.normal(0, 0.001, (len(ages), 1, 4, 4, 4))).float()
        return noise + torch.stack([0.3 - 0.005 * age * pattern for age in ages.tolist()])

    class Older:
        def __init__(self, prior, covariates):
            self.age = covariates[""]["age"]

        def __call__(self, scan, network, features, known):
            return {"change": (self.age - known[0]["age"]) * -0.005 * share * pattern[None]}

    monkeypatch.setattr("benchmarks.people.Counterfactual", Older)
    coding = CovariateCoding.learn({"age": "continuous"}, [{"age": age} for age in ages.tolist()])
    own, training = np.array([40.0, 50.0, 75.0]), scans_at(ages)
    found = counterfactuals(
        *(SimpleNamespace(coding=coding), SimpleNamespace(output_activation="tanh")),
        *(scans_at(own), [{"age": age} for age in own.tolist()], (training, ages), PCA(training, 4), 20.0),
    )
    assert found["counterfactual_age_moved"] == pytest.approx(share, abs=0.05)
    assert found["counterfactual_age_off_asked"] == pytest.approx(20 * (1 - share), abs=1)
    assert found["counterfactual_age_off_asked_before"] == pytest.approx(20, abs=1)
    assert found["counterfactual_age_off_own"] < 1
    assert found["counterfactual_reversibility"] < 1e-4


def test_a_shape_is_darkened_where_it_lies_in_the_world():
    image = np.zeros((20, 20, 20), np.float32)
    image[4:16, 4:16, 4:16] = np.linspace(50, 100, 12)
    shape = np.zeros((10, 10, 10), np.uint8)
    shape[4:6, 4:6, 4:6] = 1
    lesion, mask = darken(
        nib.Nifti1Image(image, np.eye(4)), nib.Nifti1Image(shape, np.diag([2.0, 2, 2, 1]) + 0.5 * np.eye(4, k=3))
    )
    marked = np.asarray(mask.dataobj)
    assert marked[8:12, 8:12, 8:12].mean() > 0.5 and marked.sum() < 100
    assert (np.asarray(lesion.dataobj)[marked > 0] <= image[marked > 0]).all()
    assert np.array_equal(np.asarray(lesion.dataobj)[:4], image[:4])


def correlated_scans(count: int, size: int = 4, rank: int = 3) -> torch.Tensor:
    """Scans that vary along a few axes, and by noise."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(rank, 1, size, size, size, generator=generator)
    scores = 0.2 * torch.randn(count, rank, generator=generator)
    noise = 0.05 * torch.randn(count, 1, size, size, size, generator=generator)
    return torch.einsum("nr,rcxyz->ncxyz", scores, axes) + noise


def covariance_of(pca: PCA) -> torch.Tensor:
    return pca.factor @ pca.factor.T + torch.diag(pca.std.flatten() ** 2)


def test_pca_likelihood_is_that_of_its_covariance():
    scans = correlated_scans(40)
    pca = PCA(scans, components=3)
    expected = -MultivariateNormal(pca.mean, covariance_of(pca)).log_prob(scans.flatten(1))
    assert torch.allclose(pca.nats(scans), expected, rtol=1e-4)


def test_pca_finds_the_axes_along_which_scans_vary():
    scans = correlated_scans(200)
    pca = PCA(scans, components=3)
    assert (pca.reconstruct(scans) - scans).std().item() == pytest.approx(0.05, rel=0.1)
    assert pca.std.mean().item() == pytest.approx(0.05, rel=0.1)
    wanted, found = torch.cov(scans.flatten(1).T), covariance_of(pca)
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_pca_takes_the_components_that_help():
    scans = correlated_scans(120, rank=8)
    pca = fit_pca(scans[:100], scans[100:])
    assert pca.axes.shape[1] == 16  # of 4, 16 and 64: 4 are too few for 8 axes
    assert pca.nats(scans[100:]).mean() < PCA(scans[:100], 4).nats(scans[100:]).mean()
