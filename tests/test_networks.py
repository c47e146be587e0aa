"""The network: the published sizes, every constructor argument, and what its passes promise."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from torch.autograd.graph import saved_tensors_hooks
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step_ops import OperationCounter
from scripts.layers.blocks import DisabledLatent, FirstLatent, ResidualBlock, StochasticBlock
from scripts.layers.convolutions import from_patches, gelu_convs, repeat_voxels, to_patches, upsample
from scripts.layers.gaussian import LatentSampler, Posterior, draw, kl_divergence
from scripts.layers.levels import find_level, grid_name
from scripts.layers.output import OUTPUT_STD_RANGE
from scripts.networks import VDVAE, VDVAEReconstruction

CONFIGS = Path(__file__).parent.parent / "configs"

SMALL = {
    "spatial_dims": 3,
    "in_channels": 1,
    "channels": [4, 6, 8],
    "num_latents": [1, 2, 2],
    "latent_channels": [3, 4, 9],
    "kernel_sizes": [3, 2, 1],
}


def make(seed=0, **changes) -> VDVAE:
    torch.manual_seed(seed)
    return VDVAE(**{**SMALL, **changes})


def randomise(network, seed=1):
    """Weights, biases and alphas that are all alive, so that nothing is hidden behind a zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.3 if p.ndim < 2 else 1.2 / math.sqrt(p[0].numel()))
    return network


def scans(*shape, channels=1, batch=2, seed=2):
    return torch.rand(batch, channels, *(shape or (8, 8, 8)), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def blocks_of(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


# ---------------------------------------------------------------------------------------------------------- the sizes

WIDTHS = [20, 40, 60, 80, 100, 120, 140, 160]
SIZES = [
    (32, [2, 5, 4, 3, 2, 1], 10_335_682, 28.2),
    (64, [2, 6, 5, 4, 3, 2, 1], 19_267_582, 250.4),
    (128, [2, 7, 6, 5, 4, 3, 2, 1], 32_749_282, 2197.8),
]


@pytest.mark.parametrize(("size", "num_latents", "parameters", "gflops"), SIZES)
def test_published_sizes(size, num_latents, parameters, gflops):
    levels = len(num_latents)
    with torch.device("meta"):
        network = VDVAE(
            3,
            1,
            channels=WIDTHS[:levels],
            num_latents=num_latents,
            latent_channels=[20] * (levels - 1) + [200],
            kernel_sizes=[3] * (levels - 2) + [2, 1],
        )
        x = torch.empty(1, 1, size, size, size)
    assert sum(p.numel() for p in network.parameters()) == parameters
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = network(x)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, abs=0.05)
    assert output.loc.shape == output.scale.shape == x.shape
    assert output.kl.shape == (1, sum(num_latents))


# ------------------------------------------------------------------------------------------- the constructor arguments


def shapes(network):
    return {name: tuple(p.shape) for name, p in network.named_parameters()}


def changed(**changes):
    """Parameters whose shape differs from those of the small network, or that only one of the two has."""
    a, b = shapes(make()), shapes(make(**changes))
    return {name: (a.get(name), b.get(name)) for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


# argument, what one parameter of the network then looks like, and whose shapes must stay as they are
WIDTH_CASES = [
    ({"in_channels": 2}, "encoder.levels.0.0.convs.0.weight", (4, 2, 1, 1, 1), "decoder"),
    ({"in_channels": 2}, "output.weight", (4, 4, 1, 1, 1), "decoder"),
    ({"hidden_channels": [5, 7, 9]}, "encoder.levels.1.0.convs.1.weight", (7, 7, 2, 2, 2), "decoder"),
    ({"decoder_channels": [5, 7, 9]}, "decoder.groups.1.0.posterior.trunk.convs.0.weight", (7, 15, 1, 1, 1), "encoder"),
    ({"decoder_channels": [5, 7, 9]}, "output.weight", (2, 5, 1, 1, 1), "encoder"),
    ({"decoder_hidden_channels": [5, 7, 9]}, "decoder.groups.2.1.convs.1.weight", (5, 5, 3, 3, 3), "encoder"),
    ({"decoder_hidden_channels": [5, 7, 9]}, "decoder.groups.1.0.residual.weight", (6, 7, 1, 1, 1), "encoder"),
    ({"kernel_sizes": [1, 3, 3]}, "encoder.levels.0.0.convs.1.weight", (4, 4, 1, 1, 1), "output"),
    ({"kernel_sizes": [1, 3, 3]}, "decoder.groups.0.1.convs.2.weight", (8, 8, 3, 3, 3), "output"),
    ({"decoder_kernel_sizes": [2, 1, 3]}, "decoder.groups.2.0.prior.trunk.convs.1.weight", (4, 4, 2, 2, 2), "encoder"),
    ({"latent_channels": [2, 4, 5]}, "decoder.groups.2.0.z_projection.weight", (4, 2, 1, 1, 1), "encoder"),
    ({"latent_channels": [2, 4, 5]}, "decoder.groups.0.0.posterior.mean.weight", (5, 8, 1, 1, 1), "encoder"),
    ({"encoder_blocks": 1}, "encoder.levels.0.1.convs.0.weight", None, "decoder"),
    ({"encoder_blocks": [1, 2, 3]}, "encoder.levels.2.2.convs.0.weight", (8, 8, 1, 1, 1), "decoder"),
    ({"plain_encoder": True}, "encoder.levels.1.0.convs.0.weight", (6, 4, 2, 2, 2), "decoder"),
    ({"plain_encoder": True}, "encoder.levels.1.0.convs.2.weight", None, "decoder"),
    ({"strided": True}, "encoder.downsamples.1.weight", (6, 6, 2, 2, 2), "decoder"),
    ({"rezero": True}, "encoder.levels.0.0.alpha", (), "output"),
    ({"rezero": True}, "decoder.groups.1.0.alpha", (), "output"),
    ({"rezero": True}, "decoder.groups.2.1.alpha", None, "output"),  # a block without a skip has no ReZero
    ({"batch_norm": True}, "encoder.levels.1.0.norm.weight", (6,), "output"),
    ({"batch_norm": True}, "decoder.groups.1.0.norm.weight", (6,), "output"),
    ({"separate_heads": True}, "decoder.groups.1.0.prior.std_trunk.convs.1.weight", (6, 6, 2, 2, 2), "encoder"),
    ({"predict_scale": False}, "output.weight", (1, 4, 1, 1, 1), "encoder"),
    ({"num_latents": [3, 2, 2]}, "decoder.groups.2.4.residual.weight", (4, 4, 1, 1, 1), "encoder"),
]


@pytest.mark.parametrize(("changes", "name", "shape", "untouched"), WIDTH_CASES)
def test_arguments_change_the_parameters_they_name(changes, name, shape, untouched):
    different = changed(**changes)
    touched = set(different)
    after = shapes(make(**changes))
    assert after.get(name) == shape
    assert name in touched or name in shapes(make()) or shape is None
    assert touched and not any(n.startswith(untouched) for n in touched)


RUNNABLE = [
    {},
    {"spatial_dims": 2},
    {"spatial_dims": 2, "in_channels": 3, "strided": True},
    {"in_channels": 2},
    {"hidden_channels": [5, 7, 9], "decoder_channels": [3, 10, 7], "decoder_hidden_channels": [6, 5, 4]},
    {"kernel_sizes": [2, 3, 1], "decoder_kernel_sizes": [1, 2, 3]},
    {"encoder_blocks": [1, 3, 2]},
    {"plain_encoder": True, "rezero": True},
    {"strided": True},
    {"rezero": True},
    {"batch_norm": True},
    {"separate_heads": True},
    {"shared": True},
    {"shared": [False, True, True], "num_latents": [2, 3, 3], "separate_heads": True, "rezero": True},
    {"latents_off": [1, 2, 4]},
    {"num_latents": [0, 0, 3]},
    {"std_form": "exp"},
    {"output_activation": "sigmoid"},
    {"output_activation": "identity"},
    {"predict_scale": False},
    {"template": True, "spatial_shape": [8, 8, 8]},
    {"init": "variance_preserving", "shared": True, "strided": True},
    {"checkpoint_levels": 3},
]


@pytest.mark.parametrize("changes", RUNNABLE, ids=str)
def test_every_variant_runs_learns_and_agrees_with_itself(changes):
    network = randomise(make(**changes)).train()
    x = scans(*[8] * network.spatial_dims, channels=network.in_channels)
    output = network(x)
    assert output.loc.shape == output.scale.shape == x.shape
    assert output.kl.shape == (2, network.num_latents) and output.kl.dtype == torch.float32
    (output.loc.sum() + output.scale.sum() + output.kl.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())

    network.eval()
    with torch.no_grad():
        loc, scale, _ = network(x, temperature=0)
        latents = network.encode(x, temperature=0)
        assert len(latents) == network.num_latents == len(network.latent_levels)
        for decoded, expected in zip(network.decode(latents, temperature=0), (loc, scale), strict=True):
            torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)
        for z, level in zip(latents, network.latent_levels, strict=True):
            assert z.shape[2:] == (8 // 2**level,) * network.spatial_dims


def test_defaults_follow_the_other_arguments():
    widths = [5, 7, 9]
    assert shapes(make(channels=widths)) == shapes(
        make(
            channels=widths,
            hidden_channels=widths,
            decoder_channels=widths,
            decoder_hidden_channels=widths,
            decoder_kernel_sizes=SMALL["kernel_sizes"],
        )
    )


def test_2d_is_3d_without_an_axis():
    network = make(spatial_dims=2)
    assert all(p.ndim in (0, 1, 4) for p in network.parameters())
    assert network(scans(8, 16)).loc.shape == (2, 1, 8, 16)


def test_unequal_axes_and_fewer_levels_than_the_size_allows():
    network = make()
    x = scans(4, 8, 16)
    assert [tuple(z.shape[2:]) for z in network.encode(x)][:2] == [(1, 2, 4)] * 2
    assert network(x).loc.shape == x.shape
    assert network.decode([], spatial_shape=(12, 4, 8))[0].shape == (1, 1, 12, 4, 8)


def test_a_level_without_latents_has_one_residual_block():
    network = make(num_latents=[0, 2, 1])
    assert network.latent_levels == (2, 1, 1)
    (block,) = network.decoder.groups[2]
    assert isinstance(block, ResidualBlock) and block.convs[0].in_channels == 6 and block.convs[3].out_channels == 4


def test_level_0_has_no_skips_in_the_decoder_and_all_others_have():
    for k, group in enumerate(reversed(make().decoder.groups)):
        for block in group:
            if isinstance(block, ResidualBlock):
                assert (block.skip is None) == (k == 0)


def test_latents_of_one_level_are_capped_by_its_width():
    channels = {level: z.shape[1] for level, z in zip((2, 2, 1, 1, 0), make().encode(scans()), strict=True)}
    assert channels == {2: 8, 1: 4, 0: 3}


def test_encoder_keeps_even_indices_or_halves_by_a_convolution():
    x = scans()
    network = randomise(make())
    shifted = x.clone()
    # with kernels of 1 level 1 sees the voxels with even indices and no others
    network = randomise(make(kernel_sizes=[1, 1, 1]))
    shifted[:, :, 1::2] += 1
    before, after = network.encoder(x), network.encoder(shifted)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    strided = randomise(make(kernel_sizes=[1, 1, 1], strided=True))
    before, after = strided.encoder(x), strided.encoder(shifted)
    assert not torch.equal(before[1], after[1])
    down = strided.encoder.downsamples[0]
    block = strided.encoder.levels[1]
    expected = block[1](block[0](F.conv3d(before[0], down.weight, down.bias, stride=2)))
    torch.testing.assert_close(before[1], expected)


def test_rezero_starts_as_the_identity_with_one_scalar_to_learn():
    network = make(rezero=True)
    for block in blocks_of(network, (ResidualBlock, StochasticBlock)):
        if isinstance(block, ResidualBlock) and block.skip is None:
            assert block.alpha is None
            continue
        assert block.alpha.shape == () and block.alpha == 0 and block.alpha.requires_grad
    x = torch.randn(1, 8, 4, 4, 4)
    block = network.encoder.levels[2][1]
    assert torch.equal(block(x), x)
    with torch.no_grad():
        block.alpha.fill_(0.5)
    plain = make().encoder.levels[2][1]
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if k != "alpha"})
    torch.testing.assert_close(block(x) - x, 0.5 * (plain(x) - x))

    stochastic = randomise(network).decoder.groups[0][2]
    z = torch.randn(1, 8, 4, 4, 4)
    with torch.no_grad():
        stochastic.alpha.fill_(0)
    torch.testing.assert_close(stochastic(x, None, z, 1.0)[0], x)


def test_rezero_weights_without_an_alpha_of_the_first_latent_load_as_they_were_trained():
    network = randomise(make(rezero=True))
    state = network.state_dict()
    with torch.no_grad():
        state.pop("decoder.groups.0.0.alpha").fill_(1)
    again = make(rezero=True)
    again.load_state_dict(state)
    assert torch.equal(again(scans(), temperature=0).loc, network(scans(), temperature=0).loc)


def test_batch_norm_comes_before_the_skip_of_a_block_and_last_in_a_latent():
    network = randomise(make(batch_norm=True)).train()
    x = torch.randn(4, 6, 4, 4, 4)
    block = network.encoder.levels[1][1]
    with torch.no_grad():
        for norm in (block.norm, network.decoder.groups[1][2].norm):
            norm.weight.fill_(1)
            norm.bias.zero_()
        added = block(x) - x
        result = network.decoder.groups[1][2](x, torch.randn(4, 6, 4, 4, 4), None, 1.0)[0]
    for normed in (added, result):
        torch.testing.assert_close(normed.mean((0, 2, 3, 4)), torch.zeros(6), rtol=0, atol=1e-4)
        torch.testing.assert_close(normed.var((0, 2, 3, 4), correction=0), torch.ones(6), rtol=0, atol=1e-2)


def test_separate_heads_tell_mean_and_deviation_apart():
    network = randomise(make(separate_heads=True))
    prior = network.decoder.groups[1][2].prior
    x = torch.randn(1, 6, 4, 4, 4)
    mean, s, _ = prior(x)
    with torch.no_grad():
        prior.std_trunk.convs[0].weight.zero_()
    mean_after, s_after, _ = prior(x)
    assert torch.equal(mean, mean_after) and not torch.equal(s, s_after)


def test_shared_latents_have_nets_in_common_and_residuals_of_their_own():
    network = make(shared=[False, True, True], num_latents=[3, 4, 3])
    coarse, mid, fine = ([b for b in g if isinstance(b, StochasticBlock)] for g in network.decoder.groups)
    # the first block of a level keeps its own nets
    for first, second, *others in ((network.decoder.groups[0][0], *coarse), mid):
        assert first.posterior is not second.posterior
        for block in others:
            assert block.prior is second.prior
            assert block.posterior is second.posterior
            assert block.z_projection is second.z_projection
            assert block.residual is not second.residual
    assert len({id(block.prior) for block in fine}) == 3
    count = lambda **changes: sum(p.numel() for p in make(num_latents=[1, 4, 1], **changes).parameters())  # noqa: E731
    one = mid[1]
    parts = sum(p.numel() for net in (one.prior, one.posterior, one.z_projection) for p in net.parameters())
    assert count() - count(shared=True) == 2 * parts


@pytest.mark.parametrize("off", [[1], [2], [3], [1, 4]])
def test_latents_off_leave_the_skip_alone(off):
    network = randomise(make(latents_off=off))
    latents = list(blocks_of(network.decoder, (FirstLatent, StochasticBlock, DisabledLatent)))
    assert [i for i, block in enumerate(latents) if isinstance(block, DisabledLatent)] == off
    assert network.num_latents == 5 - len(off) == network(scans()).kl.shape[1]
    for i in off:
        x = torch.randn(1, 8 if i in (1, 2) else 6, 4, 4, 4)
        skip, enters = latents[i].skip, i in (2, 4)
        # only on entering a level does the width change
        assert isinstance(skip, torch.nn.Identity) == (not enters)
        result, kl, posterior = latents[i](x, None, None, 1.0)
        assert torch.equal(result, skip(upsample(x) if enters else x)) and kl is None and posterior is None


def exact_std(s, lo, hi, form):
    return lo + (hi - lo) / (1 + torch.exp(-s)) if form == "sigmoid" else torch.exp(s.clamp(lo, hi)) ** 0.5


@pytest.mark.parametrize("form", ["sigmoid", "exp"])
def test_std_form(form):
    network = randomise(make(std_form=form))
    features = torch.randn(2, 8, 2, 2, 2)
    first = network.decoder.groups[0][0]
    q = first(features, features, None, 1.0)[2]
    torch.testing.assert_close(q.std, exact_std(first.posterior(features)[1], 1e-3, 1.0, form))

    x = 5 * torch.randn(2, 4, 8, 8, 8)
    out = F.conv3d(F.gelu(x), network.output.weight, network.output.bias)
    torch.testing.assert_close(network.output(x, None)[1], exact_std(out[:, 1:], 1e-2, 1.0, form))


@pytest.mark.parametrize(("name", "function"), [("tanh", torch.tanh), ("sigmoid", torch.sigmoid), ("identity", None)])
def test_output_activation(name, function):
    network = randomise(make(output_activation=name))
    x = 5 * torch.randn(2, 4, 8, 8, 8)
    out = F.conv3d(F.gelu(x), network.output.weight, network.output.bias)[:, :1]
    torch.testing.assert_close(network.output(x, None)[0], function(out) if function else out)


def test_without_a_predicted_scale_the_variance_is_one():
    assert torch.equal(randomise(make(predict_scale=False))(scans()).scale, torch.ones(2, 1, 8, 8, 8))


TEMPLATES = [(activation, form) for activation in ("tanh", "sigmoid", "identity") for form in ("sigmoid", "exp")]


@pytest.mark.parametrize(("activation", "form"), TEMPLATES)
@pytest.mark.parametrize("init", ["pytorch", "variance_preserving"])
def test_the_first_prediction_is_the_template(activation, form, init):
    network = make(
        template=True, in_channels=2, spatial_shape=[8, 8, 8], output_activation=activation, std_form=form, init=init
    )
    torch.manual_seed(3)
    mean, std = torch.rand(2, 8, 8, 8) * 0.9 + 0.02, torch.rand(2, 8, 8, 8) * 0.5 + 0.02
    network.set_voxel_gaussian(mean, std)
    loc, scale, _ = network(scans(channels=2))
    torch.testing.assert_close(loc, mean.expand_as(loc), rtol=0, atol=1e-5)
    # as a log-variance within the published bounds, a standard deviation is never below exp(0.005)
    expected = std if form == "sigmoid" else torch.full_like(std, math.exp(0.005))
    torch.testing.assert_close(scale, expected.expand_as(scale), rtol=1e-4, atol=1e-5)

    # one unit of the output convolution moves the mean by about a standard deviation
    with torch.no_grad():
        network.output.bias[:2] = 0.01
    moved = (network(scans(channels=2)).loc - loc) / 0.01
    slope = {"tanh": 1 - mean**2, "sigmoid": mean * (1 - mean), "identity": torch.ones_like(mean)}[activation]
    torch.testing.assert_close(moved, torch.minimum(std, slope).expand_as(moved), rtol=0.02, atol=1e-3)


def test_a_template_is_kept_with_the_weights_and_hidden_from_no_scan():
    changes = {"template": True, "spatial_shape": [8, 8, 8]}
    network = randomise(make(**changes))
    before = network(scans(), temperature=0)
    network.set_voxel_gaussian(torch.full((1, 8, 8, 8), 0.5), torch.full((1, 8, 8, 8), 0.1))
    after = network(scans(), temperature=0)
    assert not torch.equal(before.loc, after.loc) and not torch.equal(before.kl, after.kl)
    again = make(**changes)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(scans(), temperature=0).loc, after.loc)
    # a background that never varies gives finite numbers
    network.set_voxel_gaussian(torch.full((1, 8, 8, 8), -1.0), torch.zeros(1, 8, 8, 8))
    assert all(t.isfinite().all() for t in network(scans()))


def test_variance_preserving_start():
    """Features keep their size, and every latent but the first starts with posterior = prior."""
    changes = {"channels": [8] * 4, "num_latents": [2, 3, 3, 2], "latent_channels": [8] * 4, "kernel_sizes": [3] * 4}
    spread, kls = {}, {}
    torch.manual_seed(5)
    x = torch.randn(4, 1, 16, 16, 16)
    for init in ("pytorch", "variance_preserving"):
        network = make(init=init, **changes)
        spread[init] = [features.std().item() for features in network.encoder(x)]
        kls[init] = network(x).kl
        assert all((c.bias == 0).all() for c in blocks_of(network, torch.nn.Conv3d))
    assert all(0.7 < s < 1.4 for s in spread["variance_preserving"])
    assert all(s < 0.7 for s in spread["pytorch"])
    assert (kls["variance_preserving"][:, 1:] == 0).all()
    assert (kls["variance_preserving"].std(0) == 0).all()
    assert (kls["pytorch"][:, 1:] > 0).all()


# ---------------------------------------------------------------------------------------------------- memory and speed


def loss_and_gradients(network, x, seed=7):
    saved = 0

    def pack(tensor):
        nonlocal saved
        saved += 0 if tensor.is_leaf else tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(seed)
    with saved_tensors_hooks(pack, lambda t: t):
        loc, scale, kl = network(x)
        loss = (-Normal(loc, scale).log_prob(x)).sum() + kl.sum()
    loss.backward()
    return loss.detach(), [p.grad for p in network.parameters()], saved


def test_checkpoint_levels_save_memory_and_change_nothing():
    x = scans()
    results = [loss_and_gradients(randomise(make(checkpoint_levels=levels)), x) for levels in (0, 1, 3)]
    loss, gradients, saved = results[0]
    for other_loss, other_gradients, other_saved in results[1:]:
        torch.testing.assert_close(other_loss, loss)
        for a, b in zip(gradients, other_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert other_saved < 0.6 * saved
        saved = 1.7 * other_saved  # all levels save more than the finest one alone


def test_the_gelu_is_not_kept_for_the_backward_pass():
    x = torch.randn(1, 8, 16, 16, 16, requires_grad=True) * 1.0
    weight, bias = torch.randn(8, 8, 3, 3, 3, requires_grad=True), torch.zeros(8, requires_grad=True)
    sizes = []
    with saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        gelu_convs(x, [(weight, bias)])
    assert sum(n for n in sizes if n >= x.numel()) == x.numel()


@pytest.fixture
def two_threads():
    """On a single CPU thread PyTorch leaves 3D convolutions of kernel 1 to code that knows one layout alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_voxels_are_repeated_in_one_copy_without_leaving_channels_last():
    x = torch.rand(2, 3, 2, 4, 3).contiguous(memory_format=torch.channels_last_3d)
    ways = {way: x.clone().requires_grad_() for way in (upsample, torch.jit.script(repeat_voxels), repeat_voxels)}
    with OperationCounter() as counter:
        results = [way(leaf) for way, leaf in ways.items()]
    assert counter.of() - counter.of(names=["_unsafe_view"]) == 3  # which copies nothing
    assert counter.of(names=["clone"]) == 2
    expected = results[0]
    weights = torch.rand_like(expected)
    for result in results:
        assert torch.equal(result, expected)
        assert result.is_contiguous(memory_format=torch.channels_last_3d)
        result.backward(weights)
    for leaf in ways.values():
        torch.testing.assert_close(leaf.grad, ways[upsample].grad)
        assert leaf.grad.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_volumes_travel_channels_last(spatial_dims, two_threads):
    network = make(spatial_dims=spatial_dims)
    layout = torch.channels_last if spatial_dims == 2 else torch.channels_last_3d
    seen = []
    for block in blocks_of(network, (ResidualBlock, StochasticBlock)):
        block.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    network(scans(*[8] * spatial_dims))
    assert len(seen) == 6 + 5 + 4
    assert all(t.is_contiguous(memory_format=layout) for t in seen)


def test_kl_and_output_are_fp32_under_autocast():
    network = randomise(make())
    x = scans()
    exact = network(x, temperature=0)
    kinds = set()
    network.encoder.levels[0][0].register_forward_hook(lambda _m, _i, out: kinds.add(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(x, temperature=0)
        latents = network.infer(x)[1]
    assert torch.bfloat16 in kinds
    assert all(t.dtype == torch.float32 for t in output)
    assert all(t.dtype == torch.float32 for q in latents for t in q if t is not None)
    torch.testing.assert_close(output.loc, exact.loc, rtol=0, atol=0.1)
    torch.testing.assert_close(output.kl, exact.kl, rtol=0.1, atol=2.0)


# ----------------------------------------------------------------------------------------------------------- the blocks


def reference_conv(x, conv):
    """``conv(gelu(x))`` with the padding spelt out."""
    dims, kernel = x.ndim - 2, conv.weight.shape[-1]
    low, high = {1: (0, 0), 2: (1, 0), 3: (1, 1)}[kernel]
    function = F.conv3d if dims == 3 else F.conv2d
    return function(F.pad(F.gelu(x), (low, high) * dims), conv.weight, conv.bias)


@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("number", [1, 3])
def test_gelu_conv_and_its_gradient_are_those_of_plain_autograd(kernel, dims, number):
    torch.manual_seed(kernel)
    x = torch.randn(2, 2, *[4, 3, 2][:dims], dtype=torch.double, requires_grad=True)
    params = []
    for width in range(1, number + 1):
        weight = torch.randn(width, 2, *[kernel] * dims, dtype=torch.double, requires_grad=True)
        params += [weight, torch.randn(width, dtype=torch.double, requires_grad=True)]

    def convs(x, *params):
        return gelu_convs(x, list(zip(params[::2], params[1::2], strict=True)))

    assert torch.autograd.gradcheck(convs, (x, *params), fast_mode=True)

    class Conv:
        def __init__(self, weight, bias):
            self.weight, self.bias = weight, bias

    expected = [reference_conv(x, Conv(w, b)) for w, b in zip(params[::2], params[1::2], strict=True)]
    found = convs(x, *params)
    with torch.no_grad():
        without_gradient = convs(x, *params)
    upstream = [torch.randn_like(t) for t in expected]
    for a, b, c in zip(found, expected, without_gradient, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, b)
    for a, b in zip(
        torch.autograd.grad(found, [x, *params], upstream),
        torch.autograd.grad(expected, [x, *params], upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_gelu_conv_with_frozen_parts():
    x, weight, bias = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3, requires_grad=True), torch.zeros(3)
    gelu_convs(x, [(weight, bias)])[0].sum().backward()
    expected = torch.autograd.grad(F.conv2d(F.gelu(x), weight, bias, padding=1).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected)
    x.requires_grad_()
    gelu_convs(x, [(weight.detach(), bias)])[0].sum().backward()
    assert x.grad is not None


def test_a_kernel_of_2_pads_the_low_side_only():
    x = torch.zeros(1, 1, 4, 4)
    x[..., 0, 0] = x[..., 3, 3] = 100.0
    y = gelu_convs(x, [(torch.ones(1, 1, 2, 2), torch.zeros(1))])[0]
    assert y.shape == x.shape
    assert (y[0, 0, :2, :2] == 100).all()  # the corner with low indices is seen by four voxels
    assert y[0, 0, 3, 3] == 100 and (y[0, 0, 2, :] == 0).all()  # the one with high indices by one


@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize(("width_in", "width_out", "plain"), [(6, 6, False), (4, 6, False), (4, 6, True), (6, 6, True)])
def test_residual_block_is_what_it_says(kernel, width_in, width_out, plain):
    block = randomise(ResidualBlock(3, width_in, width_out, hidden_channels=5, kernel_size=kernel, plain=plain))
    assert len(block.convs) == (2 if plain else 4)
    x = y = torch.randn(2, width_in, 4, 4, 4)
    for conv in block.convs:
        y = reference_conv(y, conv)
    skip = x if width_in == width_out else F.conv3d(x, block.skip.weight, block.skip.bias)
    torch.testing.assert_close(block(x), y + skip, rtol=1e-4, atol=1e-5)
    widths = {"hidden_channels": 5, "kernel_size": kernel}
    bare = ResidualBlock(3, width_in, width_out, **widths, plain=plain, skip=False)
    bare.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("skip")})
    torch.testing.assert_close(bare(x), y, rtol=1e-4, atol=1e-5)


def reference_parameters(net, x):
    for conv in net.trunk.convs:
        x = reference_conv(x, conv)
    return x, reference_conv(x, net.mean), reference_conv(x, net.std)


@pytest.mark.parametrize(("level", "position"), [(0, 2), (1, 0), (1, 2), (2, 0)])
def test_stochastic_block_against_a_plain_one(level, position):
    """Concatenate features and x, one convolution; the block convolves both apart. The first of a level doubles x."""
    network = randomise(make())
    block = network.decoder.groups[level][position]
    e_width, x_width = [8, 6, 4][level], block.prior.trunk.convs[0].in_channels
    before = torch.randn(2, x_width, 4, 4, 4)
    x = upsample(before) if (level, position) in ((1, 0), (2, 0)) else before
    e = torch.randn(2, e_width, *x.shape[2:])
    p_hidden, p_mean, p_s = reference_parameters(block.prior, x)
    _, q_mean, q_s = reference_parameters(block.posterior, torch.cat([e, x], dim=1))
    p_std, q_std = exact_std(p_s, 1e-3, 1.0, "sigmoid"), exact_std(q_s, 1e-3, 1.0, "sigmoid")
    skip = x if x_width == block.residual.out_channels else F.conv3d(x, block.skip.weight, block.skip.bias)
    extra = reference_conv(p_hidden, block.residual) + skip

    def result(z):
        return F.conv3d(z, block.z_projection.weight, block.z_projection.bias) + extra

    y, kl, q = block(before, e, None, 0.0)
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(y, result(q_mean), **close)
    torch.testing.assert_close(q.mean, q_mean, **close)
    torch.testing.assert_close(q.std, q_std, **close)
    expected = torch_kl(Normal(q_mean, q_std), Normal(p_mean, p_std)).flatten(1).sum(1)
    torch.testing.assert_close(kl, expected, **close)
    z = torch.randn_like(q_mean)
    torch.testing.assert_close(block(before, e, z, 1.0)[0], result(z), **close)
    torch.testing.assert_close(block(before, None, None, 0.0)[0], result(p_mean), **close)


@pytest.mark.parametrize("form", ["sigmoid", "exp"])
def test_kl_is_that_of_torch(form):
    torch.manual_seed(0)
    q = Posterior(None, torch.randn(3, 4, 2, 2), torch.rand(3, 4, 2, 2) * 0.99 + 0.01)
    p_mean, p_s = torch.randn(3, 4, 2, 2), torch.rand(3, 4, 2, 2) * 6 - 3
    p_std = exact_std(p_s, 1e-3, 1.0, form)
    assert (p_std.square() > 1e-5).all()
    expected = torch_kl(Normal(q.mean, q.std), Normal(p_mean, p_std)).flatten(1).sum(1)
    torch.testing.assert_close(kl_divergence(q._replace(prior_mean=p_mean, prior_std=p_std)), expected)
    standard = torch_kl(Normal(q.mean, q.std), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(kl_divergence(q), standard)
    assert (expected >= 0).all() and (standard >= 0).all()


def test_kl_has_a_floor_under_the_variance_of_the_prior():
    q = Posterior(None, torch.ones(1, 1), torch.full((1, 1), 0.5))
    # the square of 1e-3 is below 1e-5
    q = q._replace(prior_mean=torch.zeros(1, 1), prior_std=torch.full((1, 1), 1e-3))
    found = kl_divergence(q, floor=1e-5)
    expected = 0.5 * ((0.25 + 1) / 1e-5 - 1) + math.log(1e-3) - math.log(0.5)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_outside_of_training_the_kl_is_exact_and_never_negative():
    changes = {"num_latents": [1, 1, 1], "kernel_sizes": [1, 1, 1]}
    network = make(**changes, kl_floor=1e-5)
    with torch.no_grad():
        for block in blocks_of(network, StochasticBlock):  # prior and posterior as narrow as they can be
            for net in (block.prior, block.posterior):
                net.std.weight.zero_()
                net.std.bias.fill_(-100)
            block.posterior.mean.weight.zero_()
    exact, floored = network.eval()(scans()).kl, network.train()(scans()).kl
    assert torch.allclose(exact[:, 1:], torch.zeros(1), atol=1e-3)
    assert (floored[:, 1:] < -1).all()  # 1e-6 / 1e-5 in the place of 1


def test_how_a_network_starts():
    for network in (make(), make(plain_encoder=True, strided=True, separate_heads=True)):
        convs = {name: m for name, m in network.named_modules() if isinstance(m, torch.nn.Conv3d)}
        assert all((conv.bias == 0).all() for conv in convs.values())
        for block in blocks_of(network, StochasticBlock):
            for conv in (block.prior.mean, block.prior.std, block.residual):
                assert (conv.weight == 0).all()
            assert (block.posterior.mean.weight != 0).any()
        assert (network.decoder.groups[0][0].posterior.mean.weight != 0).any()
    # sqrt(1/depth), depth = latents + 2 (K - 1); PyTorch draws from +-1/sqrt(fan in)
    network = make(channels=[24, 32, 40], num_latents=[1, 2, 2])
    for block in blocks_of(network, ResidualBlock):
        bound = 1 / math.sqrt(block.convs[-1].weight[0].numel())
        scale = math.sqrt(1 / 9) if block.skip is not None else 1.0
        assert block.convs[-1].weight.abs().max().item() == pytest.approx(scale * bound, rel=0.05)
        assert block.convs[-2].weight.abs().max().item() == pytest.approx(
            1 / math.sqrt(block.convs[-2].weight[0].numel()), rel=0.05
        )


# ------------------------------------------------------------------------------------------------ sampling and decoding


def test_temperature_0_is_deterministic_and_1_is_not():
    network, x = randomise(make()), scans()
    assert torch.equal(network(x, temperature=0).loc, network(x, temperature=0).loc)
    assert not torch.equal(network(x).loc, network(x).loc)
    shape = {"spatial_shape": (8, 8, 8)}
    assert torch.equal(network.decode([], 0, **shape)[0], network.decode([], 0, **shape)[0])
    assert not torch.equal(network.decode([], **shape)[0], network.decode([], **shape)[0])


def test_temperature_scales_the_noise_and_never_the_mean():
    network, x = randomise(make()), scans(batch=1)
    noise = []
    for temperature in (0.5, 1.0):
        torch.manual_seed(0)
        q = network.infer(x, temperature)[1][0]
        noise.append(q.z - q.mean)
    torch.testing.assert_close(2 * noise[0], noise[1])

    # the same of the prior: a block's z is seen through its projection, which is linear
    block = network.decoder.groups[1][2]
    features = torch.randn(1, 6, 4, 4, 4)
    results = []
    for temperature in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        results.append(block(features, None, None, temperature)[0])
    torch.testing.assert_close(2 * (results[1] - results[0]), results[2] - results[0], rtol=1e-3, atol=1e-4)
    torch.manual_seed(0)
    z = draw(torch.full((1, 4, 20, 20, 20), 3.0), torch.full((1, 4, 20, 20, 20), 0.5005), 0.5)
    assert z.mean().item() == pytest.approx(3.0, abs=0.01)
    assert z.std().item() == pytest.approx(0.5 * 0.5005, rel=0.02)
    assert network.decoder.groups[0][0].latent_channels == 8


def test_partial_latents_keep_what_was_given_and_draw_the_rest():
    network, x = randomise(make()), scans()
    latents = network.encode(x, temperature=0)
    full = network.decode(latents, 0)[0]
    for n in range(1, 6):
        partial = network.decode(latents[:n], 0)[0]
        assert partial.shape == x.shape
        assert torch.equal(partial, network.decode(latents[:n], 0)[0])
        assert torch.equal(partial, full) == (n == 5)
        assert torch.equal(network.decode(latents[:n])[0], network.decode(latents[:n])[0]) == (n == 5)
    changed = [latents[0] + 1, *latents[1:]]
    assert not torch.equal(network.decode(changed, 0)[0], full)


def test_samples_take_their_number_and_shape_from_the_call_or_the_network():
    network = make(spatial_shape=[8, 4, 4])
    assert network.decode([], batch_size=3)[0].shape == (3, 1, 8, 4, 4)
    assert network.decode([], spatial_shape=(4, 4, 4))[1].shape == (1, 1, 4, 4, 4)
    with pytest.raises(ValueError, match="needs spatial_shape"):
        make().decode([])
    with pytest.raises(ValueError, match="6 latents, but the network has 5"):
        network.decode([torch.zeros(1, 8, 1, 1, 1)] * 6)


def test_the_first_latent_is_drawn_from_a_standard_normal():
    network = make()
    seen = []
    network.decoder.groups[0][0].z_projection.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    network.decode([], batch_size=64, spatial_shape=(16, 16, 16))
    assert seen[0].mean().item() == pytest.approx(0, abs=0.02)
    assert seen[0].std().item() == pytest.approx(1, abs=0.02)


def test_scale_stays_in_its_bounds():
    network = randomise(make())
    with torch.no_grad():
        network.output.weight.mul_(1000)
    scale = network(scans()).scale
    assert scale.min() >= OUTPUT_STD_RANGE[0] and scale.max() <= OUTPUT_STD_RANGE[1] + 1e-6


# ------------------------------------------------------------------------------------------------------- bad arguments

REFUSED = [
    ("spatial_dims", {"spatial_dims": 1}),
    ("in_channels", {"in_channels": 0}),
    ("channels", {"channels": []}),
    ("channels", {"channels": [4, 0, 8]}),
    ("channels", {"channels": [4, 6.5, 8]}),
    ("num_latents", {"num_latents": [1, 2]}),
    ("num_latents", {"num_latents": [1, 2, 0]}),
    ("num_latents", {"num_latents": [1, -1, 2]}),
    ("latent_channels", {"latent_channels": [3, 4]}),
    ("latent_channels", {"latent_channels": [3, 0, 4]}),
    ("kernel_sizes", {"kernel_sizes": [3, 3, 4]}),
    ("kernel_sizes", {"kernel_sizes": [3, 3, 3, 3]}),
    ("hidden_channels", {"hidden_channels": [4, 6]}),
    ("decoder_channels", {"decoder_channels": [4, 6, True]}),
    ("decoder_hidden_channels", {"decoder_hidden_channels": [4, 6, 8, 10]}),
    ("decoder_kernel_sizes", {"decoder_kernel_sizes": [5, 3, 1]}),
    ("encoder_blocks", {"encoder_blocks": 0}),
    ("encoder_blocks", {"encoder_blocks": [2, 2]}),
    ("shared", {"shared": [True, False]}),
    ("latents_off", {"latents_off": [0]}),
    ("latents_off", {"latents_off": [5]}),
    ("latents_off", {"latents_off": [-1]}),
    ("std_form", {"std_form": "softplus"}),
    ("kl_floor", {"kl_floor": 1.0}),
    ("kl_floor", {"kl_floor": True}),
    ("output_activation", {"output_activation": "relu"}),
    ("init", {"init": "zeros"}),
    ("checkpoint_levels", {"checkpoint_levels": 4}),
    ("checkpoint_levels", {"checkpoint_levels": -1}),
    ("checkpoint_levels", {"checkpoint_levels": 1, "batch_norm": True}),
    ("template", {"template": True}),
    ("spatial_shape", {"spatial_shape": [8, 8]}),
    ("spatial_shape", {"spatial_shape": [8, 8, 6]}),
    ("spatial_shape", {"spatial_shape": [8, 8, 0]}),
]


@pytest.mark.parametrize(("name", "changes"), REFUSED, ids=str)
def test_bad_arguments_are_refused_by_name(name, changes):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        make(**changes)


INPUTS = [
    ({}, (1, 2, 8, 8, 8), r"expected \[batch, 1"),
    ({}, (1, 1, 8, 8), "3 spatial axes"),
    ({}, (1, 1, 8, 8, 10), "axis 2 is 10, which must be a multiple of 4"),
    ({"patch_size": 2}, (1, 1, 8, 8, 12), "axis 2 is 12, which must be a multiple of 8"),
    ({"template": True, "spatial_shape": [8, 8, 8]}, (1, 1, 8, 8, 4), "template has spatial_shape"),
]


@pytest.mark.parametrize(("changes", "shape", "sentence"), INPUTS)
def test_scans_that_do_not_fit_are_refused(changes, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**changes)(torch.zeros(shape))


def test_set_voxel_gaussian_needs_a_template():
    with pytest.raises(ValueError, match="template"):
        make().set_voxel_gaussian(torch.zeros(1, 8, 8, 8), torch.ones(1, 8, 8, 8))


def test_noise_of_a_scan_does_not_depend_on_the_batch():
    network, x = randomise(make()).eval(), scans(batch=3)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    with torch.no_grad():
        together = network(x, sampler=LatentSampler(generators))
        for i, seed in enumerate((5, 6, 7)):
            alone = network(x[i : i + 1], sampler=LatentSampler([torch.Generator().manual_seed(seed)]))
            torch.testing.assert_close(alone.loc[0], together.loc[i], rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="2 generators for a batch of 3"):
            network(x, sampler=LatentSampler(generators[:2]))
        assert not torch.equal(network(x).loc, network(x).loc)


def test_a_rule_chooses_latents_inside_the_decoders_pass():
    network, x = randomise(make()).eval(), scans()
    with torch.no_grad():
        plain = network.infer(x, temperature=0)[1]
        indices = []

        def rule(index, q):
            indices.append(index)
            return q.mean + 1

        (loc, scale, _), chosen = network.infer(x, temperature=0, sampler=LatentSampler(rule=rule))
        assert indices == list(range(network.num_latents))
        assert all(torch.equal(q.z, q.mean + 1) for q in chosen)
        # what is below is conditioned on what was chosen above
        assert torch.equal(plain[0].mean, chosen[0].mean)
        for before, after in zip(plain[1:], chosen[1:], strict=True):
            assert not torch.allclose(before.prior_mean, after.prior_mean)
            assert not torch.allclose(before.mean, after.mean)
        decoded = network.decode([q.z for q in chosen], temperature=0)
        torch.testing.assert_close(decoded, (loc, scale), rtol=1e-4, atol=1e-5)
        assert all(torch.equal(a.z, b.z) for a, b in zip(network.infer(x, temperature=0)[1], plain, strict=True))


def test_levels_are_named_by_their_grids():
    assert [grid_name(grid) for grid in make().grids((8, 8, 8))] == ["8³", "4³", "2³"]
    assert grid_name((4, 4)) == "4²" and grid_name((3, 4, 3)) == "3×4×3"
    grids = make().grids((4, 8, 16))
    assert [find_level("levels", name, grids) for name in ("4x8x16", "2×4×8", "1x2x4")] == [0, 1, 2]
    assert [find_level("levels", name, make().grids((8, 8, 8))) for name in (8, "4", "2³", "4x4x4")] == [0, 1, 2, 1]
    for wrong in (True, 3, "4x4", None):
        with pytest.raises(ValueError, match=r"levels names the grid .*: this network's levels have the grids 2, 4, 8"):
            find_level("levels", wrong, make().grids((8, 8, 8)))


def test_a_temperature_for_each_level():
    network, x = randomise(make()).eval(), scans()
    with torch.no_grad():
        grids = [z.shape[2:] for z in network.encode(x)]  # of the coarsest level first, temperatures finest first
        still = network.infer(x, [1.0, 1.0, 0.0])[1]
        assert [torch.equal(q.z, q.mean) for q in still] == [grid == grids[0] for grid in grids]
        assert torch.equal(network(x, [0.0] * 3).loc, network(x, 0).loc)
    with pytest.raises(ValueError, match="3"):
        network(x, [0.0, 1.0])


def test_infer_gives_the_forward_pass_and_its_latents():
    network, x = randomise(make()).eval(), scans()
    with torch.no_grad():
        output, latents = network.infer(x, temperature=0)
        assert all(torch.equal(a, b) for a, b in zip(output, network(x, temperature=0), strict=True))
        for index, q in enumerate(latents):
            prior = Normal(0.0, 1.0) if index == 0 else Normal(q.prior_mean, q.prior_std)
            kl = torch_kl(Normal(q.mean, q.std), prior).flatten(1).sum(1)
            torch.testing.assert_close(kl, output.kl[:, index], rtol=1e-4, atol=1e-4)


def test_the_reconstruction_alone_has_the_same_weights():
    network = randomise(make()).eval()
    alone = VDVAEReconstruction(**SMALL).eval()
    alone.load_state_dict(network.state_dict())
    x = scans()
    with torch.no_grad():
        assert torch.equal(alone(x), network(x, temperature=0).loc)


def test_the_default_network_is_lean():
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "train.json"))
    with torch.device("meta"):
        network, x = parser.get_parsed_content("network_def"), torch.zeros(1, 1, 32, 32, 32)
    with FlopCounterMode(display=False) as counter:
        network(x)
    assert counter.get_total_flops() / 1e9 == pytest.approx(2.5, abs=0.05)
    assert (network.levels, network.num_latents) == (6, 10)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(2.55, abs=0.05)


@pytest.mark.parametrize("dims", [2, 3])
def test_patches_are_channels_of_a_coarser_grid(dims):
    x = torch.randn(2, 3, *(8, 4, 12)[:dims])
    patches = to_patches(x, 2)
    assert patches.shape == (2, 3 * 2**dims, *(4, 2, 6)[:dims])
    assert torch.equal(from_patches(patches, 2), x)
    first = (slice(None), slice(None), *[slice(2)] * dims)
    assert torch.equal(
        patches[:, :, 0, 0].flatten(2)[..., 0] if dims == 3 else patches[:, :, 0, 0], x[first].reshape(2, -1)
    )
    if dims == 2:
        assert torch.equal(patches, F.pixel_unshuffle(x, 2))
    network = make(patch_size=2, spatial_dims=dims, spatial_shape=[16] * dims)
    output = network(torch.rand(2, 1, *[16] * dims))
    assert output.loc.shape == output.scale.shape == (2, 1, *[16] * dims)
    assert network.latent_grids()[-1] == (3, *[8] * dims)
    with pytest.raises(ValueError, match="patch_size is 0"):
        make(patch_size=0)
