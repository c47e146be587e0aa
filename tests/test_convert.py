"""Published checkpoints: the same numbers from the same weights, and nothing that a file asks for is run."""

import json
import math
import sys
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest
import torch
from conftest import run_command_process

from scripts.convert import (
    DECODER,
    ENCODER,
    OUTPUT,
    ConversionError,
    convert,
    load_published_checkpoint,
    write_bundle_weights,
)
from scripts.layers.blocks import DisabledLatent, FirstLatent, ResidualBlock, StochasticBlock
from scripts.networks import VDVAE
from scripts.training.losses import negative_log_likelihood

SEED = Path(__file__).with_name("seed_checkpoint_8.pt")
PUBLISHED = [
    SEED,
    Path(__file__).with_name("rezero_checkpoint_8.pt"),
    Path(__file__).with_name("shared_checkpoint_8.pt"),
]

# ----------------------------------------------------------------------------------------- what the published code says


def load_oracle(path):
    """A checkpoint of the published code, an input, and what that code computes from it."""
    with torch.serialization.safe_globals([PurePosixPath, torch.device]):
        return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def seed():
    return load_oracle(SEED)


def check_seed(network, seed):
    with torch.no_grad():
        loc, scale, kl = network.eval()(seed["input"], temperature=0)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(loc, seed["loc"], **close)
    torch.testing.assert_close(scale, seed["scale"], **close)
    torch.testing.assert_close(kl.T, seed["kl_per_latent"], rtol=1e-4, atol=1e-4)
    nll = negative_log_likelihood(loc, scale, seed["input"])
    torch.testing.assert_close(-nll, seed["log_likelihood"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_checkpoint_gives_the_published_numbers(path):
    oracle = load_oracle(path)
    state, args = convert(load_published_checkpoint(path))
    network = VDVAE(**args)
    network.load_state_dict(state)
    assert sum(p.numel() for p in network.parameters()) == oracle["parameters"]
    check_seed(network, oracle)


def test_a_bare_checkpoint_and_one_without_options_do_too(seed, tmp_path):
    checkpoint = {key: value for key, value in seed["checkpoint"].items() if key != "hyper_params"}
    torch.save(checkpoint, tmp_path / "bare.pt")
    state, args = convert(load_published_checkpoint(tmp_path / "bare.pt"))
    network = VDVAE(**args)
    network.load_state_dict(state)
    check_seed(network, seed)


def test_the_command_line_writes_weights_and_an_overlay(seed, tmp_path):
    done = run_command_process("scripts.convert", SEED, "--output_dir", tmp_path / "new/folder")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "new/folder"
    assert sorted(p.name for p in folder.iterdir()) == ["model.pt", "network.json"]
    overlay = json.loads((folder / "network.json").read_text())
    assert overlay["spatial_shape"] == [8, 8, 8]
    args = overlay["network_def"]
    assert args.pop("_target_") == "scripts.networks.VDVAE"
    assert args.pop("spatial_shape") == "@spatial_shape"
    network = VDVAE(**args, spatial_shape=overlay["spatial_shape"])
    network.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    check_seed(network, seed)


# ----------------------------------------------------------------------- variants, written with the published names

BASE = {
    "spatial_dims": 3,
    "in_channels": 1,
    "channels": [4, 6, 8],
    "num_latents": [2, 3, 3],
    "latent_channels": [3, 4, 9],
    "kernel_sizes": [3, 3, 1],
}
VARIANTS = {
    "as published": {},
    "rezero": {"rezero": True},
    "strided": {"strided": True},
    "strided, one block at the last level": {"strided": True, "encoder_blocks": [2, 2, 1]},
    "plain encoder": {"plain_encoder": True},
    "plain encoder, rezero, strided": {"plain_encoder": True, "rezero": True, "strided": True},
    "shared": {"shared": True},
    "shared on one level": {"shared": [False, True, False], "rezero": True},
    "no scale": {"predict_scale": False},
    "exp": {"std_form": "exp"},
    "sigmoid output": {"output_activation": "sigmoid"},
    "one block at the last level": {"encoder_blocks": [2, 2, 1]},
    "batch norm": {"batch_norm": True},
    "batch norm, rezero": {"batch_norm": True, "rezero": True},
    "hidden widths": {"hidden_channels": [5, 7, 9], "decoder_hidden_channels": [6, 3, 11]},
    "decoder widths": {"decoder_channels": [5, 3, 10]},
    "all widths": {
        "hidden_channels": [5, 7, 9],
        "decoder_channels": [7, 5, 3],
        "decoder_hidden_channels": [6, 3, 11],
        "latent_channels": [2, 20, 1],
    },
    "latents off in the middle of levels": {"latents_off": [1, 2, 4, 7]},
    "latents off, shared": {"latents_off": [4], "num_latents": [2, 4, 3], "shared": True},
    "a level without latents": {"num_latents": [2, 0, 2]},
    "no latents but the coarsest": {"num_latents": [0, 0, 1]},
    "small kernels": {"kernel_sizes": [2, 1, 3], "decoder_kernel_sizes": [1, 3, 2]},
    "one level": {"channels": [6], "num_latents": [2], "latent_channels": [4], "kernel_sizes": [3]},
    "two channels": {"in_channels": 2},
    "2d": {"spatial_dims": 2, "strided": True},
}


def published(network, **options):
    """A checkpoint as the published code would save it, by the rules for its names."""
    graphs = {ENCODER: {}, DECODER: {}, OUTPUT: {}}

    def put(graph, name, module):
        for key, tensor in module.state_dict().items():
            graphs[graph][f"module.{name}.{key}"] = tensor.clone()

    def common(graph, name, block):
        if block.alpha is not None:
            graphs[graph][f"module.{name}.rezero_alpha"] = block.alpha.detach().clone()
        if not isinstance(block.norm, torch.nn.Identity):
            put(graph, f"{name}.batch_norm", block.norm)

    def residual(graph, name, block):
        for i, conv in enumerate(block.convs):
            put(graph, f"{name}.convolutions.{i}", conv)
        if block.skip is not None:
            put(graph, f"{name}.skip_con", block.skip)
        common(graph, name, block)

    def net(name, parameters):
        for i, conv in enumerate((*parameters.trunk.convs, parameters.mean, parameters.std)):
            put(DECODER, f"{name}.{i}", conv)

    for k, blocks in enumerate(network.encoder.levels):
        for i, block in enumerate(blocks):
            residual(ENCODER, f"{k}.{i}", block)
        if hasattr(network.encoder.downsamples[k], "weight"):
            put(ENCODER, f"{k}.{len(blocks) - 1}.resampler", network.encoder.downsamples[k])
    for g, group in enumerate(network.decoder.groups):
        for i, block in enumerate(group, start=0 if g == 0 else 1):
            name = f"{g}.{i}"
            if isinstance(block, ResidualBlock):
                residual(DECODER, name, block)
            elif isinstance(block, FirstLatent):
                net(f"{name}.convs_q", block.posterior)
                put(DECODER, f"{name}.conv_z", block.z_projection)
                common(DECODER, name, block)
            elif isinstance(block, StochasticBlock):
                first = next(b for b in group if isinstance(b, StochasticBlock) and b.prior is block.prior)
                copies = [(name, block)] + ([(f"{name}.shared_group_ops", first)] if first is not block else [])
                for place, original in copies:
                    net(f"{place}.convs_p", original.prior)
                    net(f"{place}.convs_q", original.posterior)
                    put(DECODER, f"{place}.convs_p_skip_conv_after_prior", original.residual)
                    put(DECODER, f"{place}.conv_z", original.z_projection)
                put(DECODER, f"{name}.skip_con_conv", block.skip)
                common(DECODER, name, block)
            else:
                assert isinstance(block, DisabledLatent) and isinstance(block.skip, torch.nn.Identity)
    put(OUTPUT, "0.convolutions.0", network.output)
    stored = {
        "output_activation_function": network.output_activation,
        "predict_x_scale_with_sigmoid": network.output.std_form == "sigmoid",
    }
    return {"hyper_params": {**stored, **options}, **graphs}


def build(**changes):
    """A network whose every number is alive."""
    torch.manual_seed(0)
    network = VDVAE(**{**BASE, **changes})
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.3 if p.ndim < 2 else 1.2 / math.sqrt(p[0].numel()))
        for name, buffer in network.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    return network.eval()


def same_function(one, two):
    torch.manual_seed(3)
    x = torch.rand(2, one.in_channels, *[8] * one.spatial_dims) * 2 - 1
    shape = {"spatial_shape": x.shape[2:]}
    with torch.no_grad():
        for a, b in zip(
            (*one(x, 0), *one.decode([], 0, **shape)), (*two(x, 0), *two.decode([], 0, **shape)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def reloaded(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "published.pt")
    state, args = convert(load_published_checkpoint(tmp_path / "published.pt"))
    network = VDVAE(**json.loads(json.dumps(args)))
    network.load_state_dict(state)
    return network.eval(), args


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_variants_come_back(changes, tmp_path):
    network = build(**changes)
    again, args = reloaded(published(network), tmp_path)
    same_function(network, again)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in network.named_parameters()}
    for name in ("num_latents", "encoder_blocks", "channels", "decoder_channels", "latents_off", "rezero", "strided"):
        if name in changes:
            assert args[name] == changes[name]


def test_sharing_is_read_from_the_tensors_and_the_options(tmp_path):
    network = build(shared=[False, True, False])
    for stated in ({}, {"latent_feature_maps_per_resolution_weight_sharing": [False, True, False]}):
        again, args = reloaded(published(network, **stated), tmp_path)
        assert args["shared"] == [False, True, False]
        same_function(network, again)


def test_alphas_may_have_one_dimension_and_level_0_may_hold_unused_ones(tmp_path):
    network = build(rezero=True)
    checkpoint = published(network)
    for graph in (ENCODER, DECODER):
        for name in [n for n in checkpoint[graph] if n.endswith("alpha")]:
            checkpoint[graph][name] = checkpoint[graph][name].reshape(1)
    checkpoint[DECODER]["module.2.2.rezero_alpha"] = torch.zeros(1)
    same_function(network, reloaded(checkpoint, tmp_path)[0])


def test_a_resampler_may_have_a_place_of_its_own(tmp_path):
    network = build(strided=True)
    checkpoint = published(network)
    checkpoint[ENCODER] = {n.replace(".1.resampler", ".2.resampler"): t for n, t in checkpoint[ENCODER].items()}
    same_function(network, reloaded(checkpoint, tmp_path)[0])


# --------------------------------------------------------------------------------------------------------- refusals


def test_shared_copies_must_be_copies():
    checkpoint = load_oracle(PUBLISHED[2])["checkpoint"]
    name = next(n for n in checkpoint[DECODER] if n.endswith("shared_group_ops.conv_z.weight"))
    checkpoint[DECODER][name] = checkpoint[DECODER][name] + 1
    with pytest.raises(ConversionError, match=r"shared_group_ops.conv_z.weight' is not a copy of '1.3.conv_z.weight'"):
        convert(checkpoint)


def test_an_alpha_that_others_lack_is_refused():
    checkpoint = load_oracle(SEED)["checkpoint"]
    checkpoint[DECODER]["module.0.0.rezero_alpha"] = torch.zeros(1)
    with pytest.raises(ConversionError, match=r"lacks '0.0.rezero_alpha' in its encoder"):
        convert(checkpoint)


def test_leftovers_are_refused():
    for graph in (ENCODER, DECODER, OUTPUT):
        checkpoint = published(build())
        checkpoint[graph]["module.0.0.extra.weight"] = torch.zeros(1)
        with pytest.raises(ConversionError, match=r"no place for: .*0\.0\.extra\.weight"):
            convert(checkpoint)


MISSING = [
    (ENCODER, "module.1.1.convolutions.2.bias"),
    (DECODER, "module.1.1.convs_q.4.weight"),
    (DECODER, "module.1.3.convs_p_skip_conv_after_prior.bias"),
    (OUTPUT, "module.0.convolutions.0.bias"),
    # those that the architecture is read from
    (ENCODER, "module.0.0.convolutions.0.weight"),
    (ENCODER, "module.1.0.convolutions.1.weight"),
    (DECODER, "module.1.2.convolutions.1.weight"),
    (DECODER, "module.2.1.conv_z.weight"),
    (OUTPUT, "module.0.convolutions.0.weight"),
]


@pytest.mark.parametrize(("graph", "name"), MISSING)
def test_a_missing_tensor_is_named(graph, name):
    checkpoint = published(build())
    del checkpoint[graph][name]
    with pytest.raises(ConversionError, match=f"lacks '{name.removeprefix('module.')}'"):
        convert(checkpoint)


@pytest.mark.parametrize("graph", [ENCODER, DECODER, OUTPUT])
def test_an_empty_part_is_refused(graph):
    checkpoint = published(build())
    checkpoint[graph] = {}
    with pytest.raises(ConversionError, match=r"lacks|no residual block"):
        convert(checkpoint)


def test_nets_that_differ_are_not_shared_whatever_the_options_say(tmp_path):
    network = build()
    checkpoint = published(network, latent_feature_maps_per_resolution_weight_sharing=[True, True, True])
    same_function(network, reloaded(checkpoint, tmp_path)[0])


@pytest.mark.parametrize("name", ["scale_hidden_clamp_bounds", "scale_output_clamp_bounds"])
def test_other_bounds_of_the_standard_deviations_are_refused(name):
    bounds = {"scale_hidden_clamp_bounds": [0.001, 1], "scale_output_clamp_bounds": [0.01, 1]}
    convert(published(build(), **bounds))
    with pytest.raises(ConversionError, match=name):
        convert(published(build(), **{**bounds, name: [0.1, 1]}))


def test_an_unknown_output_activation_is_refused():
    with pytest.raises(ConversionError, match="output_activation"):
        convert(published(build(), output_activation_function="relu"))


def test_a_tensor_of_another_shape_is_refused():
    checkpoint = published(build())
    checkpoint[DECODER]["module.1.3.convs_q.0.weight"] = torch.zeros(6, 99, 1, 1, 1)
    with pytest.raises(ConversionError, match="does not fit"):
        convert(checkpoint)


@pytest.mark.parametrize("graph", [ENCODER, DECODER, OUTPUT])
def test_a_checkpoint_without_one_of_its_parts_is_refused(graph, tmp_path):
    checkpoint = published(build())
    del checkpoint[graph]
    torch.save(checkpoint, tmp_path / "x.pt")
    with pytest.raises(ConversionError, match=f"lacks {graph}"):
        load_published_checkpoint(tmp_path / "x.pt")


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def damaged(kind, folder):
    path = folder / "x.pt"
    if kind == "cut short":
        path.write_bytes(SEED.read_bytes()[: SEED.stat().st_size // 2])
    elif kind == "text":
        path.write_text("not a checkpoint\n")
    elif kind == "empty":
        path.touch()
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "a tensor":
        torch.save(torch.zeros(3), path)
    return path


@pytest.mark.parametrize("kind", ["cut short", "text", "empty", "a list", "a tensor"])
def test_damaged_files_are_refused_by_name(kind, tmp_path):
    path = damaged(kind, tmp_path)
    with pytest.raises(ConversionError, match=r"'.*x\.pt'"):
        load_published_checkpoint(path)
    with pytest.raises(ConversionError, match=r"x\.pt"):
        write_bundle_weights(str(path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["hyper_params", ENCODER, "epoch"])
def test_code_in_a_file_is_not_run(place, tmp_path):
    ran = tmp_path / "ran"
    checkpoint = published(build())
    if place == "epoch":
        checkpoint[place] = RunsCode(ran)
    else:
        checkpoint[place]["x"] = RunsCode(ran)
    torch.save(checkpoint, tmp_path / "x.pt")
    with pytest.raises(ConversionError, match="could run code"):
        load_published_checkpoint(tmp_path / "x.pt")
    assert not ran.exists()
    # the file would have run it
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert ran.exists()


PATHS = [("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath")]


@pytest.mark.parametrize(("module", "name"), PATHS)
def test_paths_of_every_system_and_python_are_read(module, name, tmp_path, monkeypatch):
    """Python 3.13 keeps its paths in another module, and a path of Windows can't be made elsewhere."""
    path = type(name, (), {"__module__": module, "__reduce__": lambda self: (type(self), ("data",))})
    monkeypatch.setitem(sys.modules, "pathlib._local", sys.modules.get("pathlib._local", ModuleType("pathlib._local")))
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[module], name, path, raising=False)
        torch.save(published(build(), nifti_dir=path()), tmp_path / "x.pt")
    convert(load_published_checkpoint(tmp_path / "x.pt"))


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt' does not exist"):
        load_published_checkpoint(tmp_path / "nowhere.pt")
