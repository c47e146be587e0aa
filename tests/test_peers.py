"""The peers of the network: that they are what they say, train, go on, and are measured as the network is."""

import copy
import csv
import json

import pytest
import torch
from conftest import ROOT, fitted_scans, inference_config
from torch.distributions import MultivariateNormal

from benchmarks.peer_diffusion import LatentDiffusion
from benchmarks.peer_models import PCA, VAE, LatentDiffusionAutoencoder, VoxelGaussian, fit_pca, train, validation_loss
from benchmarks.peers import COLUMNS, Ours, compare, lesion_numbers, name_checkpoints
from scripts.inference.inferers import Reconstruction
from scripts.inference.scoring import Scoring
from scripts.networks import VDVAE


def correlated_scans(count: int, size: int = 4, rank: int = 3) -> torch.Tensor:
    """Scans that vary along a few axes, and by noise."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(rank, 1, size, size, size, generator=generator)
    scores = 0.2 * torch.randn(count, rank, generator=generator)
    noise = 0.05 * torch.randn(count, 1, size, size, size, generator=generator)
    return torch.einsum("nr,rcxyz->ncxyz", scores, axes) + noise


def test_gaussian_is_the_mean_scan_and_its_samples_vary_as_scans_do():
    scans = correlated_scans(200)
    gaussian = VoxelGaussian(scans)
    loc, std = gaussian.reconstruct(scans[:2])
    assert torch.allclose(loc, scans.mean(0).expand_as(loc))
    torch.manual_seed(0)
    samples = gaussian.sample(2000)
    assert torch.allclose(samples.std(0), std[0], rtol=0.15)
    expected = -torch.distributions.Normal(loc, std).log_prob(scans[:2]).flatten(1).sum(1)
    assert torch.allclose(gaussian.nats(scans[:2]), expected, rtol=1e-5)


def test_pca_likelihood_is_that_of_its_covariance():
    scans = correlated_scans(40)
    pca = PCA(scans, components=3)
    covariance = pca.factor @ pca.factor.T + torch.diag(pca.std.flatten() ** 2)
    expected = -MultivariateNormal(pca.mean, covariance).log_prob(scans.flatten(1))
    assert torch.allclose(pca.nats(scans), expected, rtol=1e-4)


def test_pca_finds_the_axes_along_which_scans_vary():
    scans = correlated_scans(200)
    pca = PCA(scans, components=3)
    recon, std = pca.reconstruct(scans)
    assert (recon - scans).std().item() == pytest.approx(0.05, rel=0.1)
    assert std.mean().item() == pytest.approx(0.05, rel=0.1)
    torch.manual_seed(0)
    wanted = torch.cov(scans.flatten(1).T)
    found = torch.cov(pca.sample(4000).flatten(1).T)
    assert (found - wanted).norm() < 0.2 * wanted.norm()


def test_pca_takes_the_components_that_help():
    scans = correlated_scans(120, rank=8)
    pca = fit_pca(scans[:100], scans[100:])
    assert pca.axes.shape[1] == 16  # of 4, 16 and 64: 4 are too few for 8 axes
    assert pca.nats(scans[100:]).mean() < VoxelGaussian(scans[:100]).nats(scans[100:]).mean()


def test_too_many_components():
    with pytest.raises(ValueError, match="of 5 scans there can be 1 to 3"):
        PCA(correlated_scans(5), components=4)


@pytest.mark.parametrize("kind", [VAE, LatentDiffusionAutoencoder])
def test_autoencoders_learn_and_go_on(kind, tmp_path):
    scans, validation = correlated_scans(40, size=8).split([32, 8])
    torch.manual_seed(0)
    peer = kind(VoxelGaussian(scans))
    path = tmp_path / "peer.pt"
    assert train(peer, scans, validation, path, minutes=0) == 0
    assert not path.exists()
    before = (peer.reconstruct(scans)[0] - scans).square().mean().item()

    first = train(peer, scans, validation, path, minutes=0.06, amp=kind is VAE)
    after = (peer.reconstruct(scans)[0] - scans).square().mean().item()
    assert after < before
    assert torch.isfinite(peer.nats(scans)).all()
    assert peer.sample(3).shape == (3, 1, 8, 8, 8)

    again = kind(VoxelGaussian(scans))
    assert train(again, scans, validation, path, minutes=0) == first
    assert (again.reconstruct(scans)[0] - scans).square().mean().item() == pytest.approx(after, rel=1e-3)
    updates = torch.load(path, weights_only=True)["updates"]
    train(again, scans, validation, path, minutes=first + 0.01)
    assert torch.load(path, weights_only=True)["updates"] > updates


def test_best_weights_are_kept(tmp_path):
    scans, validation = correlated_scans(40, size=8).split([32, 8])
    torch.manual_seed(0)
    peer, path = VAE(VoxelGaussian(scans)), tmp_path / "peer.pt"
    train(peer, scans, validation, path, minutes=0.02)
    state = torch.load(path, weights_only=True)
    assert state["lowest"] == pytest.approx(validation_loss(peer, validation, batch_size=8), rel=1e-4)
    torch.save(state | {"lowest": -1e9, "seconds": 0.0}, path)  # as if what comes now were worse
    train(peer, scans, validation, path, minutes=0.02)
    assert all(torch.equal(value, state["best"][name]) for name, value in peer.state_dict().items())


def test_residuals_are_the_latent_diffusion_autoencoders_deviation():
    scans = correlated_scans(32, size=8)
    peer = LatentDiffusionAutoencoder(VoxelGaussian(scans)).eval()
    peer.finish(scans, batch_size=8)
    torch.manual_seed(0)
    residuals = torch.cat([peer.draw(x)[0] for x in scans.split(8)]) - scans
    assert peer.residual_std.mean().item() == pytest.approx(residuals.square().mean(0).sqrt().mean().item(), rel=0.1)


def test_latent_diffusion_learns_the_latents_and_samples_them(tmp_path):
    scans, validation = correlated_scans(72, size=8).split([64, 8])
    torch.manual_seed(0)
    autoencoder = LatentDiffusionAutoencoder(VoxelGaussian(scans))
    before = copy.deepcopy(autoencoder.state_dict())
    peer = LatentDiffusion(autoencoder, scans, channels=(16, 16))
    latents, held_out = peer.latents(scans), peer.latents(validation)
    assert latents.shape == (64, *autoencoder.latent_shape())
    untrained = validation_loss(peer, held_out, batch_size=8)
    train(peer, latents, held_out, tmp_path / "peer.pt", minutes=0.1, batch_size=32)
    assert validation_loss(peer, held_out, batch_size=8) < 0.9 * untrained
    assert all(torch.equal(before[name], value) for name, value in autoencoder.state_dict().items())
    torch.manual_seed(0)
    samples = peer.sample(3)
    assert samples.shape == (3, 1, 8, 8, 8)
    assert samples.std(0).mean() > 0


def test_ours_is_what_the_bundle_says_of_the_network(cohort):
    scans, _ = fitted_scans(cohort)
    network = inference_config().get_parsed_content("network_def").eval()
    assert isinstance(network, VDVAE)
    ours = Ours(network, restore=0.3)
    torch.manual_seed(0)
    with torch.no_grad():
        nats, (recon, scale) = ours.nats(scans), ours.reconstruct(scans)
        anomaly = ours.anomaly(scans)
        expected = Reconstruction()(scans, network)
        torch.manual_seed(0)
        scored = Scoring(smoothing=0.01, restore=0.3)(scans, network)
    assert torch.allclose(recon, expected["recon"])
    assert torch.allclose(scale, expected["scale"])
    assert torch.allclose(nats, -scored["elbo"], rtol=1e-4)
    assert torch.allclose(anomaly, scored["anomaly"], atol=1e-3)


def test_bright_lesions_are_found():
    scans = correlated_scans(40, size=8).clamp(-0.8, 0.8)
    gaussian = VoxelGaussian(scans)
    lesions = torch.zeros_like(scans, dtype=torch.bool)
    lesions[20:, :, 2:4, 2:4, 2:4] = True
    sick = scans + 2 * lesions
    found = lesion_numbers(gaussian, sick, lesions, smoothing=0.1, batch_size=8)
    assert found["average_precision"] > 0.8
    assert found["auroc"] > 0.95
    assert lesion_numbers(gaussian, scans, lesions, smoothing=0.1, batch_size=8)["average_precision"] < 0.1


def test_table_has_a_row_for_each_model(cohort, tmp_path, capsys):
    overlay = tmp_path / "size_16.json"
    overlay.write_text(json.dumps({"spatial_shape": [16, 16, 16]}))
    configs = [str(ROOT / "configs/inference.json"), str(ROOT / "tests/tiny.json"), str(overlay)]
    changes = {"spatial_shape": [16, 16, 16], "network_def#init": "variance_preserving"}
    network = inference_config(**changes).get_parsed_content("network_def")
    torch.save(network.state_dict(), tmp_path / "short.pt")
    torch.nn.init.normal_(network.output.weight)  # zero at the start: all samples would be the mean scan
    torch.save(network.state_dict(), tmp_path / "long.pt")
    weights = {"ckpt": [str(tmp_path / f"{name}.pt") for name in ("short", "long")], "ckpt_minutes": [1, 2.5]}
    arguments = weights | {"config_file": configs, "samples": 4, "test_count": 6}
    compare(str(cohort), str(tmp_path / "out"), minutes=0.01, batch_size=4, spacing=8.0, **arguments)

    with (tmp_path / "out" / "peers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    names = ["Gaussian per voxel", "PCA, 4 components", "VarAutoEncoder", "AutoencoderKL"]
    names += ["ours, 1 minutes", "ours, 2.5 minutes", "ours, samples at 0.7", "latent diffusion on AutoencoderKL"]
    assert [row["model"] for row in rows] == names
    assert [row["likelihood"] for row in rows] == ["exact"] * 2 + ["ELBO"] * 4 + [""] * 2
    assert [row["minutes"] for row in rows[4:]] == ["1", "2.5", "", ""]
    assert rows[6]["bits_per_dim"] == ""
    assert float(rows[4]["ms_ssim"]) == pytest.approx(1, abs=1e-3)  # an untrained network's are all the mean scan
    assert float(rows[5]["ms_ssim"]) < float(rows[6]["ms_ssim"])  # samples nearer to the mean are more alike
    assert float(rows[0]["psnr"]) < float(rows[1]["psnr"])
    assert all(0 <= float(row["auroc"]) <= 1 for row in rows[:6])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 * (1 + len(names)) + 1  # two tables, and a line before
    with (tmp_path / "out" / "samples.csv").open() as file:
        quality = {row["model"]: row for row in csv.DictReader(file)}
    assert list(quality) == [*names, "scans of the validation side"]
    assert all(0 <= float(quality[name]["precision"]) <= 1 for name in names)
    assert quality["scans of the validation side"]["precision"] == ""  # of one scan nothing can be said
    assert all(float(row["nearest_training_ratio"]) > 0 for row in quality.values())
    assert {"reconstructions.png", "samples.png", "VarAutoEncoder.pt"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_checkpoints_that_the_table_could_not_tell_apart():
    assert name_checkpoints("model.pt", None) == [("ours", "model.pt", None)]
    with pytest.raises(ValueError, match=r"ckpt_minutes is None: .* Give 2 different numbers."):
        name_checkpoints(["a.pt", "b.pt"], None)
    with pytest.raises(ValueError, match=r"ckpt_minutes is \[45, 45\]"):
        name_checkpoints(["a.pt", "b.pt"], [45, 45])
