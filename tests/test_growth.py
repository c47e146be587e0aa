"""A network of a finer grid that starts from one that was trained on a coarser grid."""

from __future__ import annotations

import pytest
import torch
from conftest import run_bundle

from scripts.networks import VDVAE
from scripts.training.start import grow_network

COARSE = {
    "spatial_dims": 3,
    "in_channels": 1,
    "channels": [4, 6, 8],
    "num_latents": [0, 2, 1],
    "latent_channels": [2, 3, 8],
    "kernel_sizes": [3, 3, 2],
    "spatial_shape": [8, 8, 8],
    "template": True,
    "init": "informative",
}
FINE = COARSE | {
    "channels": [3, 4, 6, 8],
    "num_latents": [1, 0, 2, 1],
    "latent_channels": [2, 2, 3, 8],
    "kernel_sizes": [3, 3, 3, 2],
    "spatial_shape": [16, 16, 16],
}


def doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")


@pytest.fixture
def coarse(tmp_path):
    torch.manual_seed(0)
    network = VDVAE(**COARSE)
    network.set_voxel_gaussian(torch.rand(1, 8, 8, 8) - 0.5, torch.rand(1, 8, 8, 8) + 0.1)
    with torch.no_grad():  # as if it had been trained: priors and residuals start at zero
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.save(network.state_dict(), tmp_path / "model.pt")
    return network.eval(), tmp_path / "model.pt"


@pytest.mark.parametrize(
    "further", [{}, {"encoder_blocks": 1}, {"num_latents": [0, 0, 2, 1]}, {"num_latents": [0, 1, 2, 1]}]
)
def test_coarse_latents_are_those_of_the_trained_network(coarse, tmp_path, further):
    network, weights = coarse
    if "encoder_blocks" in further:
        network = VDVAE(**COARSE | further).eval()
        torch.save(network.state_dict(), weights)
    fine = VDVAE(**FINE | further)
    fine.set_voxel_gaussian(*(doubled(buffer)[0] for buffer in network.voxel_gaussian()))
    grow_network(fine, weights).eval()
    x = torch.rand(2, 1, 8, 8, 8) * 2 - 1
    with torch.no_grad():
        known = network.infer(x, temperature=0.0)[1]
        found = fine.infer(doubled(x), temperature=0.0)[1]
    for before, after in zip(known, found, strict=False):
        torch.testing.assert_close(after.mean, before.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after.std, before.std, rtol=1e-5, atol=1e-5)


def test_patches_start_from_what_was_predicted_of_one_voxel(coarse):
    network, weights = coarse
    fine = VDVAE(**COARSE | {"spatial_shape": [16, 16, 16], "patch_size": 2})
    fine.set_voxel_gaussian(*(doubled(buffer)[0] for buffer in network.voxel_gaussian()))
    grow_network(fine, weights).eval()
    assert fine.latent_grids() == network.latent_grids()
    x = torch.rand(2, 1, 8, 8, 8) * 2 - 1
    with torch.no_grad():
        known, found = network.infer(x, 0.0)[0], fine.infer(doubled(x), 0.0)[0]
    assert found.loc.flatten(1).std(1).min() > 0.1
    torch.testing.assert_close(found.loc, doubled(known.loc), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.scale, doubled(known.scale), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.kl, known.kl)
    for latents, message in (([0, 2, 2], "lacks decoder"), ([0, 1, 1], "network_def makes it none")):
        other = VDVAE(**COARSE | {"spatial_shape": [16] * 3, "patch_size": 2, "num_latents": latents})
        with pytest.raises(ValueError, match=message):
            grow_network(other, weights)
    with pytest.raises(ValueError, match=r"its encoder.levels.0.0.convs.0.weight has shape"):
        grow_network(VDVAE(**COARSE | {"spatial_shape": [16] * 3, "patch_size": 2, "channels": [3, 6, 8]}), weights)


@pytest.mark.parametrize(
    "change",
    [
        {"channels": [7, 10, 12]},
        {"hidden_channels": [5, 6, 9], "decoder_hidden_channels": [4, 9, 8]},
        {"channels": [7, 10, 12], "patch_size": 2, "spatial_shape": [16] * 3},
    ],
)
def test_a_wider_network_starts_with_what_the_narrow_one_predicts(coarse, change):
    network, weights = coarse
    state = {name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()}
    network.load_state_dict(state)
    torch.save(state, weights)  # as weights are shipped
    wide = VDVAE(**COARSE | change)
    x = torch.rand(2, 1, 8, 8, 8) * 2 - 1
    bigger = doubled if "patch_size" in change else torch.Tensor.clone
    if "patch_size" in change:
        wide.set_voxel_gaussian(*(doubled(buffer)[0] for buffer in network.voxel_gaussian()))
    grow_network(wide, weights)
    with torch.no_grad():
        known, found = network.infer(x, 0.0)[0], wide.infer(bigger(x), 0.0)[0]
    torch.testing.assert_close(found.loc, bigger(known.loc), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.kl, known.kl)
    output = wide(bigger(x))
    (output.loc.square().mean() + output.kl.sum()).backward()
    learns = [parameter.grad.abs().sum() > 0 for parameter in wide.parameters()]
    assert all(learns[-20:]) and sum(learns) > 0.8 * len(learns)


def test_two_levels_can_be_added_at_once(coarse):
    _, weights = coarse
    longer = {name: [value[0], *value] for name, value in FINE.items() if name in ("channels", "num_latents")}
    longer |= {name: [FINE[name][0], *FINE[name]] for name in ("latent_channels", "kernel_sizes")}
    finest = VDVAE(**FINE | longer | {"spatial_shape": [32, 32, 32]})
    before = finest.encoder.levels[2][0].convs[1].weight.clone()
    grow_network(finest, weights)
    assert not torch.equal(before, finest.encoder.levels[2][0].convs[1].weight)


def test_the_new_levels_learn(coarse):
    _, weights = coarse
    fine = grow_network(VDVAE(**FINE), weights)
    torch.nn.init.normal_(fine.output.weight, std=0.1)
    output = fine(torch.rand(2, 1, 16, 16, 16) * 2 - 1)
    (output.loc.square().mean() + output.kl.sum()).backward()
    entry = fine.encoder.levels[1][0].convs[0].weight
    assert (entry[:, 1:] == 0).all() and (entry.grad[:, 1:] != 0).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (COARSE | {"spatial_shape": [16, 16, 16]}, "has as many levels as network_def, but another grid"),
        (
            {name: value[1:] if isinstance(value, list) else value for name, value in COARSE.items()}
            | {"spatial_shape": [4] * 3},
            "has 3 levels and network_def 2",
        ),
        (FINE | {"channels": [3, 4, 5, 8]}, "and no smaller widths"),
        (FINE | {"latent_channels": [2, 2, 4, 8]}, "and no smaller widths"),
        (FINE | {"num_latents": [1, 0, 1, 1]}, "makes it none"),
        (FINE | {"channels": [4, 4, 6, 8]}, "level 8³ and the next finer one are as wide"),
    ],
)
def test_networks_that_do_not_fit_are_refused(coarse, change, message):
    _, weights = coarse
    with pytest.raises(ValueError, match=message):
        grow_network(VDVAE(**change), weights)


def test_a_run_starts_from_a_run_of_half_the_size(cohort, tmp_path):
    coarse, fine = tmp_path / "coarse", tmp_path / "fine"
    words = ("--dataset_dir", cohort, "--epochs", 1)
    done = run_bundle(*words, "--output_dir", coarse)
    assert done.returncode == 0, done.stderr
    larger = (
        *(
            "--spatial_shape",
            "[16,16,16]",
            "--network_def#channels",
            "[3,4,6,8]",
            "--network_def#num_latents",
            "[1,1,2,2]",
        ),
        *("--network_def#latent_channels", "[2,2,3,8]", "--network_def#kernel_sizes", "[3,3,3,2]"),
    )
    words = (*words, *larger, "--grow_from", coarse / "checkpoints" / "model.pt")
    done = run_bundle(*words, "--output_dir", fine)
    assert done.returncode == 0, done.stderr
    assert "Levels up to 8³ start from" in done.stderr
    states = [torch.load(run / "checkpoints" / "model.pt", weights_only=True) for run in (coarse, fine)]
    assert torch.equal(states[0]["scan_grid"], states[1]["scan_grid"])
    done = run_bundle(*words, "--output_dir", tmp_path / "both", "--weights", coarse / "checkpoints" / "model.pt")
    assert done.returncode == 1 and "weights and grow_from are both given" in done.stderr
