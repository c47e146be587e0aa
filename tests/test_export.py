"""The network in other programs: TorchScript, ONNX and torch.export, as docs/exporting.md says."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command, run_command_process
from monai.bundle import ConfigParser, ckpt_export, verify_net_in_out

from scripts.networks import VDVAEReconstruction
from scripts.training.checkpoints import load_weights

METADATA = ROOT / "configs" / "metadata.json"
INFERENCE = ROOT / "configs" / "inference.json"
CONFIGS = [str(INFERENCE), str(ROOT / "tests" / "tiny.json")]
# what another grid than the default's needs
GRID = {
    "_meta_#network_data_format#inputs#image#spatial_shape": [8, 8, 8],
    "_meta_#network_data_format#outputs#pred#spatial_shape": [8, 8, 8],
}
NAMES = "{'input_names':['image'],'output_names':['pred'],'dynamic_axes':{'image':{0:'batch'}}}"
DOCUMENTED = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "exporting.md").read_text(encoding="utf-8"), re.DOTALL)


def make_alive(network, gain=1.2):
    """Weights, template and running statistics as after training: everything shows in the reconstruction."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.3 if p.ndim < 2 else gain / p[0].numel() ** 0.5)
        if network.template:
            shape = network.template_mean.shape[1:]
            network.set_voxel_gaussian(torch.rand(shape) * 1.6 - 0.8, torch.rand(shape) * 0.5)
        if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in network.modules()):
            for _ in range(20):
                network.train()(make_scans(network))
    return network.eval()


def make_scans(network, batch=3):
    shape = network.spatial_shape or (8,) * network.spatial_dims
    return torch.rand(batch, network.in_channels, *shape) * 2 - 1


def tiny_network():
    parser = ConfigParser()
    parser.read_config(CONFIGS)
    return parser.get_parsed_content("network_def")


def reconstruct(network, scans):
    with torch.no_grad():
        return network(scans)


def assert_same(found, expected):
    """To 1e-4, of reconstructions that differ from scan to scan by ten times that or more."""
    assert expected.std(0).max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------- what is documented


def command(word, *arguments, folder, start=run_command):
    """``python -m monai.bundle WORD ...``, for the tiny network."""
    words = ["network_def", "--meta_file", METADATA, "--config_file", CONFIGS, *arguments]
    words += [word for key, value in GRID.items() for word in ("--" + key, value)]
    result = start("monai.bundle", word, *words, TMPDIR=str(folder))
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder with the three exports of a network in half precision and three scans; and their reconstructions."""
    folder = tmp_path_factory.mktemp("elsewhere")
    network = make_alive(tiny_network())
    half = {name: t.half() if t.dtype == torch.float32 else t for name, t in network.state_dict().items()}
    weights = folder / "model.pt"
    torch.save(half, weights)
    network.load_state_dict({name: t.float() if t.dtype == torch.float16 else t for name, t in half.items()})
    scans = make_scans(network)
    np.save(folder / "scans.npy", scans.numpy())

    arguments = ["--filepath", folder / "model.ts", "--ckpt_file", weights]
    command("ckpt_export", *arguments, folder=folder, start=run_command_process)
    arguments = ["--filepath", folder / "model.onnx", "--ckpt_file", weights, "--converter_kwargs", NAMES]
    command("onnx_export", *arguments, folder=folder)
    (code,) = (code for code in DOCUMENTED if "torch.export.save" in code)
    code = code.replace('"configs/inference.json"', repr(CONFIGS)).replace('"models/', f'"{folder.as_posix()}/')
    exec(compile(code, "docs/exporting.md", "exec"), {})

    # -I: neither the working directory nor PYTHONPATH is searched for modules
    code = "\n".join(code for code in DOCUMENTED if "scripts" not in code)
    code += "\nimport sys\nassert not {'scripts', 'monai'} & set(sys.modules)\nassert metadata['version']"
    loaded = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    return folder, reconstruct(network, scans)


@pytest.mark.parametrize("name", ["from_torchscript.npy", "from_onnx.npy", "from_export.npy"])
def test_exported_networks_run_without_the_bundle(elsewhere, name):
    folder, expected = elsewhere
    assert_same(torch.from_numpy(np.load(folder / name)), expected)


def test_weights_of_half_precision_load(elsewhere):
    folder, expected = elsewhere
    network = load_weights(tiny_network(), folder / "model.pt").eval()
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert_same(reconstruct(network, torch.from_numpy(np.load(folder / "scans.npy"))), expected)


def test_a_network_of_another_grid_needs_other_metadata(tmp_path):
    command("verify_net_in_out", folder=tmp_path)
    files = {"meta_file": str(METADATA), "config_file": CONFIGS}
    with pytest.raises(ValueError, match="template has spatial_shape \\(8, 8, 8\\)"):
        verify_net_in_out("network_def", **files)


def test_the_model_zoo_takes_the_default_network(tmp_path):
    files = {"meta_file": str(METADATA), "config_file": str(INFERENCE), "bundle_root": str(ROOT)}
    verify_net_in_out("network_def", **files)
    parser = ConfigParser()
    parser.read_config(str(INFERENCE))
    network = make_alive(parser.get_parsed_content("network_def"))
    torch.save(network.state_dict(), tmp_path / "model.pt")
    paths = {"filepath": str(tmp_path / "model.ts"), "ckpt_file": str(tmp_path / "model.pt")}
    ckpt_export("network_def", **paths, **files)
    scans = make_scans(network, batch=2)
    assert_same(reconstruct(torch.jit.load(paths["filepath"]), scans), reconstruct(network, scans))


# --------------------------------------------------------------------------------------------------- what can be built

VARIANTS = [
    {
        **{"template": True, "spatial_shape": [8, 8, 8], "shared": True, "latents_off": [2], "num_latents": [2, 2, 2]},
        **{"batch_norm": True, "separate_heads": True, "std_form": "exp", "plain_encoder": True},
        "predict_scale": False,
    },
    {
        **{"spatial_dims": 2, "in_channels": 2, "strided": True, "rezero": True, "output_activation": "sigmoid"},
        "patch_size": 2,
    },
    {
        **{"num_latents": [0, 0, 3], "decoder_channels": [3, 10, 7], "hidden_channels": [5, 7, 9]},
        **{"output_activation": "identity", "template": True, "spatial_shape": [4, 8, 12], "checkpoint_levels": 3},
    },
]


def variant(changes):
    small = {"spatial_dims": 3, "in_channels": 1, "channels": [4, 6, 8], "num_latents": [1, 1, 1]}
    small |= {"latent_channels": [3, 4, 9], "kernel_sizes": [3, 2, 1], "encoder_blocks": 1}
    return make_alive(VDVAEReconstruction(**small | changes), gain=1.4)


def by_script(network, path):
    torch.jit.save(torch.jit.script(network), path)
    return torch.jit.load(path)


def by_export(network, path):
    batch = {0: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(network, (make_scans(network, 2),), dynamic_shapes=(batch,)), path)
    return torch.export.load(path).module()


@pytest.mark.parametrize("export", [by_script, by_export])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_can_be_exported_for_any_batch_size(changes, export, tmp_path):
    network = variant(changes)
    exported = export(network, tmp_path / "model.pt2")
    scans = make_scans(network, batch=4)
    expected = reconstruct(network, scans)
    assert_same(torch.cat([reconstruct(exported, part) for part in scans.split([1, 3])]), expected)
    assert_same(reconstruct(exported, scans), expected)


def test_a_script_keeps_the_names_of_the_weights_and_refuses_wrong_scans(tmp_path):
    network = variant(VARIANTS[0])
    scripted = by_script(network, tmp_path / "model.ts")
    assert list(scripted.state_dict()) == list(network.state_dict())
    for shape, sentence in [
        ((1, 1, 8, 8, 7), "axis 2 is 7, which must be a multiple of 4"),
        ((1, 1, 8, 8, 4), "this network's template has spatial_shape"),
        ((1, 2, 8, 8, 8), "expected \\[batch, 1, ...\\] with 3 spatial axes"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            network(torch.zeros(shape))
        with pytest.raises(torch.jit.Error, match=sentence):
            scripted(torch.zeros(shape))
