"""Turn a checkpoint of the published 3D very deep VAE into weights and a config for this bundle.

    python -m scripts.convert CHECKPOINT --output_dir D

writes ``D/model.pt``, a state dict for ``scripts.networks.VDVAE``, and ``D/network.json``, an overlay with the
``network_def`` (and the scans' shape, where the file says it) for the configs ``train.json`` and ``inference.json``.
The architecture is read off the tensors; the options stored in the file only fill in what no tensor shows.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from scripts.layers.blocks import ResidualBlock
from scripts.layers.gaussian import LATENT_STD_RANGE
from scripts.layers.output import OUTPUT_STD_RANGE
from scripts.networks import VDVAE
from scripts.utils.command_line import run
from scripts.utils.errors import InputError, NotFoundError
from scripts.utils.files import as_folder, expand, write_tensors, write_text
from torch import Tensor

ENCODER, DECODER, OUTPUT = (
    "bottom_up_graph_1_state_dict",
    "top_down_generative_graph_state_dict",
    "top_down_x_mu_graph_state_dict",
)
# by the names that files hold: Python 3.13 has its paths elsewhere, and only Windows can make a WindowsPath
PATH_TYPES = [
    torch.device,
    *(
        (kind, f"{module}.{prefix}{system}Path")
        for system, kind in (("Posix", PurePosixPath), ("Windows", PureWindowsPath))
        for module in ("pathlib", "pathlib._local")
        for prefix in ("Pure", "")
    ),
]


class ConversionError(InputError):
    """The checkpoint cannot be turned into a network of this bundle; the sentence says why."""


def load_published_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Load a checkpoint of the published code without running anything that it may hold.

    Paths and devices, which that code stores with the options, are the only types allowed besides tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: not a checkpoint, a damaged one, or one that holds other Python objects.
    """
    path = Path(expand(path))
    if not path.is_file():
        raise NotFoundError(f"checkpoint '{path}' does not exist: give the file that the published code saved.")
    try:
        with torch.serialization.safe_globals(PATH_TYPES):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"'{path}' cannot be loaded as weights ({reason}): "
            "it is damaged, or holds Python objects that could run code."
        ) from error
    if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("checkpoint"), Mapping):
        checkpoint = checkpoint["checkpoint"]
    missing = [k for k in (ENCODER, DECODER, OUTPUT) if not isinstance(checkpoint, Mapping) or k not in checkpoint]
    if missing:
        raise ConversionError(f"'{path}' is not a checkpoint of the published code: it lacks {', '.join(missing)}.")
    return checkpoint


def convert(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and constructor arguments of the ``VDVAE`` that computes what a published checkpoint computes.

    Returns:
        the state dict, and the arguments of :class:`scripts.networks.VDVAE`.

    Raises:
        ConversionError: a variant that the published code pads oddly (separate heads), or tensors left over.
    """
    encoder, decoder, output = (_strip(checkpoint[key]) for key in (ENCODER, DECODER, OUTPUT))
    for name in _check_copies(decoder):
        del decoder[name]
    options = checkpoint.get("hyper_params") or {}
    if any("convs_p_mu" in name or "convs_q_mu" in name for name in decoder) or options.get(
        "separate_hidden_loc_scale_convs"
    ):
        raise ConversionError(
            "this checkpoint has separate nets for mean and variance of each latent, whose variance nets the published "
            "code pads differently from all others: it cannot be converted to a network that computes the same."
        )
    for name, bounds in (
        ("scale_hidden_clamp_bounds", LATENT_STD_RANGE),
        ("scale_output_clamp_bounds", OUTPUT_STD_RANGE),
    ):
        if tuple(options.get(name, bounds)) != bounds:
            raise ConversionError(f"this checkpoint has {name} {options[name]}: only {list(bounds)} can be converted.")
    try:
        args = _read_architecture(encoder, decoder, output, options)
        network = VDVAE(**args)
    except ConversionError:
        raise
    except KeyError as error:
        raise ConversionError(f"the checkpoint lacks {error}, from which the architecture is read.") from error
    except ValueError as error:
        raise ConversionError(f"the checkpoint's architecture cannot be built: {error}") from error
    state = _translate(network, encoder, decoder, output)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ConversionError(f"the checkpoint does not fit the architecture read from it: {error}") from error
    return network.state_dict(), args


def _strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"^(module\.)+", "", name): tensor for name, tensor in state.items()}


def _indices(names: Mapping[str, Tensor], prefix: str) -> list[int]:
    """The whole numbers that follow ``prefix`` in the names, sorted."""
    found = {m.group(1) for name in names if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    return sorted(map(int, found))


def _read_architecture(encoder, decoder, output, options: Mapping[str, Any]) -> dict[str, Any]:
    levels = len(_indices(encoder, ""))
    first = encoder["0.0.convolutions.0.weight"]
    spatial_dims = first.ndim - 2
    plain = len(_indices(encoder, "0.0.convolutions.")) == 2
    args: dict[str, Any] = {
        "spatial_dims": spatial_dims,
        "in_channels": first.shape[1],
        "channels": [],
        "hidden_channels": [],
        "kernel_sizes": [],
        "encoder_blocks": [],
        "plain_encoder": plain,
        "strided": any(".resampler." in name for name in encoder),
        "rezero": any(name.endswith("rezero_alpha") for name in (*encoder, *decoder)),
        "batch_norm": any(".batch_norm." in name for name in (*encoder, *decoder)),
    }
    for k in range(levels):
        last = len(_indices(encoder, f"{k}.0.convolutions.")) - 1
        middle = encoder[f"{k}.0.convolutions.{0 if plain else 1}.weight"]
        args["channels"].append(encoder[f"{k}.0.convolutions.{last}.weight"].shape[0])
        args["hidden_channels"].append(middle.shape[0])
        args["kernel_sizes"].append(middle.shape[-1])
        args["encoder_blocks"].append(
            len([b for b in _indices(encoder, f"{k}.") if f"{k}.{b}.convolutions.0.weight" in encoder])
        )
    # rows of the published options run finest first too; latent_channels is capped by the width, so keep the real one
    widths, hidden, kernels, counts, latent_channels, shared, off = [], [], [], [], [], [], []
    index = 0
    for group in range(levels):
        k = levels - 1 - group
        positions = _indices(decoder, f"{group}.")
        blocks = [i for i in positions if f"{group}.{i}.convolutions.0.weight" in decoder]
        stochastic = [i for i in positions if f"{group}.{i}.convs_q.0.weight" in decoder]
        if not blocks:
            raise ConversionError(f"level {k} of the decoder has no residual block.")
        start = 0 if group == 0 else 1
        # stochastic and residual blocks alternate, so that a lone residual block at the start means no latent
        count = 0 if blocks == [start] else len(blocks)
        for i in range(count):
            if start + 2 * i not in stochastic:
                off.append(index + i)
        index += count
        middle = decoder[f"{group}.{blocks[0]}.convolutions.1.weight"]
        widths.append(decoder[f"{group}.{blocks[0]}.convolutions.3.weight"].shape[0])
        hidden.append(middle.shape[0])
        kernels.append(middle.shape[-1])
        counts.append(count)
        latent_channels.append(decoder[f"{group}.{stochastic[0]}.conv_z.weight"].shape[1] if stochastic else 1)
        shared.append(_is_shared(decoder, group, [i for i in stochastic if i > start]))
    args |= {
        "decoder_channels": widths[::-1],
        "decoder_hidden_channels": hidden[::-1],
        "decoder_kernel_sizes": kernels[::-1],
        "num_latents": counts[::-1],
        "latent_channels": latent_channels[::-1],
        "shared": shared[::-1],
        "latents_off": off,
        "std_form": "sigmoid" if options.get("predict_x_scale_with_sigmoid", True) else "exp",
        "output_activation": str(options.get("output_activation_function", "tanh")),
        "predict_scale": output["0.convolutions.0.weight"].shape[0] == 2 * args["in_channels"],
    }
    if isinstance(resolution := options.get("resolution"), int):
        args["spatial_shape"] = [resolution] * spatial_dims
    return args


def _is_shared(decoder, group: int, later: list[int]) -> bool:
    """Whether the later latents of a group hold the same tensors."""
    if len(later) < 2:
        return False
    parts = ("convs_p.", "convs_q.", "conv_z.")
    first, *others = (
        {name.removeprefix(block): t for name, t in decoder.items() if name.startswith(tuple(block + p for p in parts))}
        for block in (f"{group}.{i}." for i in later)
    )
    return all(first.keys() == other.keys() and all(torch.equal(first[n], other[n]) for n in first) for other in others)


def _translate(network: VDVAE, encoder, decoder, output) -> dict[str, Tensor]:
    """Every tensor of ``network``, taken from its published name."""
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    own = network.state_dict()

    def take(graph: str, source: Mapping[str, Tensor], name: str, target: str) -> None:
        if name not in source:
            raise ConversionError(f"the checkpoint lacks '{name}' in its {graph}.")
        used.add(f"{graph}/{name}")
        state[target] = source[name].reshape(own[target].shape) if target.endswith("alpha") else source[name]

    for target in own:
        if target.startswith("encoder.downsamples."):
            level, rest = re.match(r"encoder\.downsamples\.(\d+)\.(.*)", target).groups()
            last = max(_indices(encoder, f"{level}."))
            take("encoder", encoder, f"{level}.{last}.resampler.{rest}", target)
        elif target.startswith("encoder.levels."):
            level, block, rest = re.match(r"encoder\.levels\.(\d+)\.(\d+)\.(.*)", target).groups()
            take("encoder", encoder, f"{level}.{block}.{_published_name(rest, 'skip_con')}", target)
        elif target.startswith("decoder."):
            group, position, rest = re.match(r"decoder\.groups\.(\d+)\.(\d+)\.(.*)", target).groups()
            # in the published decoder the doubling takes index 0 of every group but the first
            index = int(position) + (int(group) > 0)
            block = network.decoder.groups[int(group)][int(position)]
            skip = "skip_con" if isinstance(block, ResidualBlock) else "skip_con_conv"
            take("decoder", decoder, f"{group}.{index}.{_published_name(rest, skip)}", target)
        elif target.startswith("output."):  # how scans are fitted to the grid (scan_grid) is not in such a file
            take("output", output, target.replace("output.", "0.convolutions.0."), target)
    _refuse_leftovers(used, {"encoder": encoder, "decoder": decoder, "output": output})
    return state


def _published_name(name: str, skip: str) -> str:
    """A parameter of one of this network's blocks, by the name that it has in the published code."""
    for ours, theirs in (
        (r"^convs\.", "convolutions."),
        (r"^norm\.", "batch_norm."),
        (r"^alpha$", "rezero_alpha"),
        (r"^prior\.trunk\.convs\.", "convs_p."),
        (r"^prior\.mean\.", "convs_p.3."),
        (r"^prior\.std\.", "convs_p.4."),
        (r"^posterior\.trunk\.convs\.", "convs_q."),
        (r"^posterior\.mean\.", "convs_q.3."),
        (r"^posterior\.std\.", "convs_q.4."),
        (r"^residual\.", "convs_p_skip_conv_after_prior."),
        (r"^z_projection\.", "conv_z."),
        (r"^skip\.", f"{skip}."),
    ):
        if re.match(ours, name):
            return re.sub(ours, theirs, name)
    return name


def _check_copies(decoder: Mapping[str, Tensor]) -> set[str]:
    """The tensors that a level's third and later latents hold once more, as copies of the second one's.

    Raises:
        ConversionError: one differs from what it should be a copy of.
    """
    copies = {name for name in decoder if ".shared_group_ops." in name}
    for name in copies:
        block, rest = name.split(".shared_group_ops.")
        group = block.split(".")[0]
        nets = [i for i in _indices(decoder, f"{group}.") if f"{group}.{i}.convs_p.0.weight" in decoder]
        # the first stochastic block of a level is not shared; on the coarsest level that is the first latent of all
        second = nets[0] if group == "0" else nets[1]
        original = decoder.get(f"{group}.{second}.{rest}")
        if original is None or not torch.equal(original, decoder[name]):
            raise ConversionError(f"'{name}' is not a copy of '{group}.{second}.{rest}', as shared latents have it.")
    return copies


def _refuse_leftovers(used: set[str], graphs: Mapping[str, Mapping[str, Tensor]]) -> None:
    left = [f"{graph}/{name}" for graph, source in graphs.items() for name in source if f"{graph}/{name}" not in used]
    # a block without a skip, as the decoder's are on level 0, has no ReZero product, whatever the file holds for it
    finest = max(int(name.split(".")[0]) for name in graphs["decoder"])
    left = [name for name in left if not re.fullmatch(rf"decoder/{finest}\.\d+\.rezero_alpha", name)]
    if left:
        raise ConversionError(
            f"the checkpoint holds tensors that this network has no place for: {', '.join(left[:5])}."
        )


def write_bundle_weights(checkpoint: str | os.PathLike, output_dir: str | os.PathLike) -> None:
    """Write ``model.pt`` and ``network.json`` for a checkpoint of the published code."""
    state, args = convert(load_published_checkpoint(checkpoint))
    folder = as_folder("output_dir", output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    shape = args.pop("spatial_shape", None)
    overlay: dict[str, Any] = {} if shape is None else {"spatial_shape": shape}
    args["spatial_shape"] = "@spatial_shape"
    overlay["network_def"] = {"_target_": "scripts.networks.VDVAE", **args}
    write_tensors(folder / "model.pt", state)
    write_text(folder / "network.json", json.dumps(overlay, indent=4) + "\n")
    print(f"Wrote '{folder / 'model.pt'}' ({len(state)} tensors) and '{folder / 'network.json'}'.")


if __name__ == "__main__":
    run("python -m scripts.convert", write_bundle_weights)
