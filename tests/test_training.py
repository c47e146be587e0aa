"""Training as users run it: the bundle's commands on a tiny network and twelve phantoms."""

from __future__ import annotations

import csv
import gzip
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run_bundle, run_bundle_process
from monai.bundle import ConfigParser, create_workflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.networks import VDVAE


def checkpoint(output) -> dict:
    return torch.load(output / "checkpoints" / "checkpoint.pt", weights_only=True)


@pytest.fixture(scope="session")
def trained(cohort, tmp_path_factory):
    """A run of two epochs, with figures and a preview, and what it printed."""
    output = tmp_path_factory.mktemp("trained")
    words = ("--dataset_dir", cohort, "--output_dir", output, "--figure_interval", 1, "--preview", True)
    result = run_bundle(*words)
    assert result.returncode == 0, result.stderr
    return output, result.stderr


def test_a_run_says_how_it_goes_and_where_its_results_are(trained):
    output, log = trained
    assert log.count("Epoch 0 (before the first update), validation: bits per dim") == 1
    assert log.count("Epoch 1 validation: bits per dim") == 1
    assert "Epoch 2 training: bits per dim" in log
    assert "Epoch 2 validation: bits per dim" in log
    assert "scans_per_second=" in log
    assert "Training: 11 scans of 11 subjects." in log
    assert "2 update(s) per epoch of 4 scans each (3 scan(s) that fill no batch are left out, others in each" in log
    assert "4 update(s) are few, and end before the KL warm-up (150)" in log
    assert f"Weights (averaged): {output}/checkpoints/model.pt" in log
    assert "WARNING" not in log.replace("WARNING - Not all config files are in", "")


def test_the_weights_are_those_of_the_average(trained):
    output, _ = trained
    model = torch.load(output / "checkpoints" / "model.pt", weights_only=True)
    saved = checkpoint(output)
    assert all(torch.equal(model[name], tensor) for name, tensor in saved["average"].items())
    assert any(not torch.equal(model[name], tensor) for name, tensor in saved["network"].items())
    assert (output / "checkpoints" / "best_model.pt").is_file()


def test_the_checkpoint_holds_the_split_and_the_config(trained, cohort):
    output, _ = trained
    saved = checkpoint(output)
    assert saved["epoch"] == 2
    assert saved["updates"] == 2 * (11 // 4)
    assert saved["datalist"] == json.loads((output / "datalist.json").read_text())
    assert len(saved["datalist"]["training"]) == 11
    assert saved["config"]["dataset_dir"] == str(cohort)
    assert saved["config"] == json.loads((output / "config.json").read_text())


def test_figures_samples_and_preview_are_drawn(trained, cohort):
    output, _ = trained
    for name in ("reconstructions", "progressive", "samples", "curves", "kl_per_latent"):
        for epoch in (1, 2):
            assert (output / "figures" / f"{name}_epoch={epoch:04d}.png").stat().st_size > 5000
    sample = nib.load(output / "figures" / "sample_temperature=0.7_0.nii.gz")
    assert sample.shape == (8, 8, 8)
    # its grid covers the scans' field of view, about the same centre
    scan = nib.load(cohort / "sub-0001_FLAIR.nii.gz")
    centres = [image.affine @ [*((size - 1) / 2 for size in image.shape), 1] for image in (scan, sample)]
    assert np.allclose(*centres, atol=1e-3)
    assert np.allclose(np.multiply(sample.header.get_zooms(), 8), max(np.multiply(scan.header.get_zooms(), scan.shape)))
    assert len(list((output / "preview").glob("preview_*.nii.gz"))) == 8
    assert (output / "preview" / "preview.png").stat().st_size > 5000


def test_every_quantity_is_recorded(trained):
    output, _ = trained
    rows = list(csv.DictReader((output / "history.csv").open()))
    recorded = {(row["part"], name) for row in rows for name, value in row.items() if value}
    both = {"bits_per_dim", "nll", "kl", "mse", "kl_z00", "kl_z04", "kl_per_dim_z04"}
    training = both | {"loss", "grad_norm", "skipped", "learning_rate", "beta"}
    assert {("training", name) for name in training} | {("validation", name) for name in both} <= recorded
    places = [(row["part"], row["epoch"], row["update"]) for row in rows]
    sides = [(part, str(epoch), str(2 * epoch)) for epoch in (1, 2) for part in ("training", "validation")]
    assert places == [("validation", "0", "0"), *sides]


def test_tensorboard_shows_the_figures(trained):
    output, _ = trained
    events = EventAccumulator(str(output / "tensorboard" / "figures"), {"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"curves", "kl_per_latent", "progressive", "reconstructions", "samples"}
    assert [event.step for event in events.Images("samples")] == [2, 4]


def test_tensorboard_shows_training_and_validation(trained):
    output, _ = trained
    tags = {}
    for part in ("training", "validation"):
        events = EventAccumulator(str(output / "tensorboard" / part))
        events.Reload()
        tags[part] = set(events.Tags()["scalars"])
    shared = {"bits_per_dim", "nll", "kl", "mse", "kl_z00", "kl_per_dim_z00"}
    assert shared <= tags["validation"]
    assert shared <= tags["training"]
    assert {f"update/{name}" for name in ("loss", "grad_norm", "skipped", "learning_rate")} <= tags["training"]


def test_a_resumed_run_ends_as_one_that_was_not_stopped(trained, cohort, tmp_path):
    whole, _ = trained
    common = ("--dataset_dir", cohort, "--output_dir", tmp_path)
    assert run_bundle(*common, "--epochs", 1).returncode == 0
    result = run_bundle(*common, "--epochs", 2, "--resume", True)
    assert result.returncode == 0, result.stderr
    assert "after epoch 1, update 2" in result.stderr
    expected, resumed = checkpoint(whole), checkpoint(tmp_path)
    for part in ("network", "average"):
        assert all(torch.equal(expected[part][name], tensor) for name, tensor in resumed[part].items())
    moments = [c["optimizer"]["state"][0]["exp_inf"] for c in (expected, resumed)]
    assert torch.equal(*moments)
    assert expected["history"] == resumed["history"]


def test_restore_optimizer_false_starts_anew_from_the_weights(trained, cohort, tmp_path):
    whole, _ = trained
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    result = run_bundle(
        *("--dataset_dir", cohort, "--output_dir", tmp_path, "--resume", True, "--restore_optimizer", False),
        *("--epochs", 1, "--learning_rate", 0.0, "--average_momentum", 0.9),
    )
    assert result.returncode == 0, result.stderr
    saved = checkpoint(tmp_path)
    assert (saved["epoch"], saved["updates"]) == (1, 2)
    # with a learning rate of zero the weights are still those that the run started from
    started = checkpoint(whole)["network"]
    assert all(torch.equal(started[name], tensor) for name, tensor in saved["network"].items())
    # the KL counted in full, and does when such a run is resumed
    assert train(cohort, tmp_path, epochs=2, resume=True)["kl_warmup"] == saved["kl_warmup"] == 0


# what holds of a run with such keys, of which none changes what another one does
KNOBS = [
    {
        "max_scans": (8, lambda saved, folder: len(saved["datalist"]["training"]) == 7),
        "batch_size": (2, lambda saved, folder: saved["batches"] == 3),
        "accumulation_steps": (3, lambda saved, folder: saved["updates"] == 1),
        "ckpt_dir": ("CKPT", lambda saved, folder: (folder.parent / "CKPT" / "model.pt").is_file()),
    },
    {
        "train_fraction": (0.5, lambda saved, folder: len(saved["datalist"]["validation"]) == 6),
        "seed": (5, lambda saved, folder: saved["seed"] == 5),
        "keep_checkpoints": (True, lambda saved, folder: (folder / "checkpoint_epoch=1.pt").is_file()),
    },
    {
        "scan_pattern": ("sub-000*", lambda saved, folder: len(saved["datalist"]["training"]) == 8),
        "save_interval": (7, lambda saved, folder: saved["epoch"] == 1),
    },
]


@pytest.fixture(scope="session")
def one_epoch(cohort, tmp_path_factory):
    """The weights after one epoch with every key at its default."""
    output = tmp_path_factory.mktemp("one_epoch")
    assert run_bundle("--dataset_dir", cohort, "--output_dir", output, "--epochs", 1).returncode == 0
    return output


def test_keys_do_what_they_say(cohort, tmp_path):
    """In this process, for speed."""
    for number, knobs in enumerate(KNOBS):
        keys = {key: value for key, (value, _) in knobs.items()}
        folder = tmp_path / str(number) / keys.get("ckpt_dir", "checkpoints")
        train(cohort, folder.parent, epochs=1, **keys | ({"ckpt_dir": str(folder)} if "ckpt_dir" in keys else {}))
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        for key, (_, holds) in knobs.items():
            assert holds(saved, folder), key


def train(cohort, output, **keys) -> dict:
    """Train in this process, with one cache for all runs; returns the checkpoint, where it is in its usual place."""
    workflow = create_workflow(
        config_file=[str(ROOT / name) for name in TINY],
        workflow_type="train",
        bundle_root=str(ROOT),
        dataset_dir=str(cohort),
        output_dir=str(output),
        cache_dir=f"{cohort}_cache",
        logging_file=False,
        meta_file=str(ROOT / "configs" / "metadata.json"),
        run_id="training",
        **keys,
    )
    workflow.run()
    workflow.finalize()
    path = output / "checkpoints" / "checkpoint.pt"
    return torch.load(path, weights_only=True) if path.is_file() else {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0.1),
        ("learning_rate_warmup", 0),
        ("kl_warmup", 0),
        ("weight_penalty", 1e4),
        ("max_grad_norm", 1e-9),
        ("augment", False),
        ("amp", True),
        ("seed", 1),
        ("network_def#rezero", True),
    ],
)
def test_keys_change_the_weights(key, value, cohort, one_epoch, tmp_path):
    # a CPU without bfloat16 uses it only where it is asked for
    precision = {"amp_dtype": "$torch.bfloat16"} if key == "amp" else {}
    changed = train(cohort, tmp_path, epochs=1, **{key: value}, **precision)
    default = checkpoint(one_epoch)
    assert any(
        not torch.equal(default["network"][name], tensor)
        for name, tensor in changed["network"].items()
        if name in default["network"]
    )


def test_the_same_keys_give_the_same_weights(cohort, one_epoch, tmp_path):
    again = train(cohort, tmp_path, epochs=1)
    assert all(torch.equal(again["network"][name], t) for name, t in checkpoint(one_epoch)["network"].items())


def test_skips_end_the_run_only_in_a_row(cohort, tmp_path):
    saved = train(cohort, tmp_path, epochs=1, skip_grad_norm=1e-9, skip_warmup=1)
    assert (saved["updates"], saved["skipped"]) == (2, 1)


def test_validation_augments_only_when_asked(cohort, tmp_path):
    values = []
    for flag in (False, True):
        train(cohort, tmp_path / str(flag), epochs=1, augment_validation=flag, train_fraction=0.5)
        rows = csv.DictReader((tmp_path / str(flag) / "history.csv").open())
        values.append([row["mse"] for row in rows if row["part"] == "validation"])
    assert values[0] != values[1]


def test_val_interval_figure_interval_and_figure_scans(cohort, tmp_path):
    train(cohort, tmp_path, epochs=2, val_interval=2, figure_interval=2, figure_scans=1)
    rows = csv.DictReader((tmp_path / "history.csv").open())
    assert [row["epoch"] for row in rows if row["part"] == "validation"] == ["0", "2"]
    drawn = sorted(path.name for path in (tmp_path / "figures").glob("reconstructions*"))
    assert drawn == ["reconstructions_epoch=0002.png"]


def test_weights_start_a_run(trained, cohort, tmp_path):
    whole, _ = trained
    model = whole / "checkpoints" / "model.pt"
    saved = train(cohort, tmp_path / "out", epochs=1, learning_rate=0.0, weights=str(model))
    started = torch.load(model, weights_only=True)
    assert all(torch.equal(started[name], tensor) for name, tensor in saved["network"].items())
    with pytest.raises(Exception) as error:
        train(cohort, tmp_path / "out2", weights=str(tmp_path / "none.pt"))
    assert "set --weights" in reason(error)


def test_average_momentum_one_is_no_average(cohort, tmp_path):
    saved = train(cohort, tmp_path, epochs=1, average_momentum=0.999999)
    # from 0.5 towards 1 over 300 updates: after two updates still an average
    assert any(not torch.equal(saved["average"][name], t) for name, t in saved["network"].items())


def test_published_settings_are_an_overlay():
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / "train.json"), str(ROOT / "configs" / "published.json")])
    parser.parse()
    network = parser.get_parsed_content("network_def")
    assert not network.template
    assert parser["learning_rate"] == 1e-3
    assert parser.get_parsed_content("loss").beta(0) == 1


@pytest.mark.parametrize(("size", "parameters"), [(32, 10_335_682), (64, 19_267_582), (128, 32_749_282), (256, None)])
def test_size_overlays_are_the_published_networks(size, parameters):
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / "train.json"), str(ROOT / "configs" / f"size_{size}.json")])
    assert parser["spatial_shape"] == [size] * 3
    arguments = {k: v for k, v in parser["network_def"].items() if not k.startswith("_")}
    arguments["spatial_shape"] = parser["spatial_shape"]
    with torch.device("meta"):
        network = VDVAE(**arguments)
    if parameters:
        assert sum(p.numel() for p in network.parameters()) == parameters
    assert 2 ** (network.levels - 1) == size
    assert (network.arguments["checkpoint_levels"] > 0) == (size > 64)


def reason(error: pytest.ExceptionInfo) -> str:
    """All that an error and its causes say."""
    said, link = "", error.value
    while link is not None:
        said, link = f"{said}\n{link}", link.__cause__
    return said


def faulty(kind: str, folder) -> None:
    """Put one bad scan in a folder of good ones."""
    good = next(iter(sorted(folder.glob("*.nii.gz"))))
    image = nib.load(good)
    data = np.asarray(image.dataobj, dtype=np.float32)
    bad = folder / "sub-bad_FLAIR.nii.gz"
    if kind == "truncated":
        bad.write_bytes(good.read_bytes()[:2000])
    elif kind == "text":
        bad.write_bytes(gzip.compress(b"not an image"))
    elif kind == "4D":
        nib.save(nib.Nifti1Image(np.stack([data] * 3, -1), image.affine), bad)
    elif kind == "constant":
        nib.save(nib.Nifti1Image(np.full_like(data, 7), image.affine), bad)
    else:
        data[3, 3, 3] = {"NaN": np.nan, "infinite": np.inf}[kind]
        nib.save(nib.Nifti1Image(data, image.affine), bad)


@pytest.mark.parametrize("kind", ["truncated", "text", "4D", "constant", "NaN", "infinite"])
def test_a_bad_scan_is_named_before_training(kind, cohort, tmp_path):
    shutil.copytree(cohort, tmp_path / "scans")
    faulty(kind, tmp_path / "scans")
    with pytest.raises(Exception) as error:
        train(tmp_path / "scans", tmp_path / "out")
    assert "sub-bad_FLAIR.nii.gz" in reason(error)
    assert not (tmp_path / "out" / "checkpoints").exists()


COMMAND_ERRORS = [
    (("--dataset_dir", "nowhere"), ["dataset_dir 'nowhere' does not exist"]),
    (("--scan_pattern", "*.mgz"), ["scan_pattern", "*.mgz"]),
    (("--batch_size", 50), ["batch_size"]),
    (("--train_fraction", 2), ["train_fraction"]),
    (("--spatial_shape", "[8,8,10]"), ["spatial_shape [8, 8, 10]: axis 2 is 10", "multiple of 4"]),
    (("--network_def#kernel_sizes", "[4,3,2]"), ["kernel_sizes", "[4, 3, 2]"]),
    (("--network_def#num_latents", "[1,2]"), ["num_latents has 2 entries but channels has 3"]),
    (("--resume", True), ["does not exist", "--ckpt_dir"]),
    (("--epoch", 3), ["--epoch", "nearest that exists is 'epochs'"]),
]


LAST_LINES = [
    (run_bundle_process, *COMMAND_ERRORS[0]),
    (run_bundle, *COMMAND_ERRORS[4]),
    (run_bundle, *COMMAND_ERRORS[-1]),
]


@pytest.mark.parametrize(("run", "arguments", "words"), LAST_LINES)
def test_the_last_line_of_a_failed_command_is_a_sentence(run, arguments, words, cohort, tmp_path):
    given = () if "--dataset_dir" in arguments else ("--dataset_dir", cohort)
    result = run(*given, "--output_dir", tmp_path / "out", *arguments)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert all(word in last for word in words)


@pytest.mark.parametrize(("arguments", "words"), COMMAND_ERRORS[1:-1])
def test_bad_keys_are_refused_before_training(arguments, words, cohort, tmp_path):
    key, value = arguments
    value = json.loads(value) if str(value).startswith("[") else value
    with pytest.raises(Exception) as error:
        train(cohort, tmp_path / "out", **{key.removeprefix("--"): value})
    assert all(word in reason(error) for word in words)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_checkpoint_of_another_architecture_is_refused(trained, cohort, tmp_path):
    whole, _ = trained
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    before = (tmp_path / "checkpoints" / "checkpoint.pt").read_bytes()
    with pytest.raises(Exception) as error:
        train(cohort, tmp_path, resume=True, epochs=3, **{"network_def#channels": [4, 8, 8]})
    assert "of another architecture than network_def" in reason(error)
    assert (tmp_path / "checkpoints" / "checkpoint.pt").read_bytes() == before


def test_a_run_that_has_all_its_epochs_is_not_trained_again(trained, cohort, tmp_path, caplog):
    whole, _ = trained
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    before = (tmp_path / "checkpoints" / "checkpoint.pt").read_bytes()
    with caplog.at_level("INFO", logger="scripts.training.trainer"):
        train(cohort, tmp_path, resume=True, epochs=2)
    assert "All 2 epochs are done: set --epochs above that" in caplog.text
    assert (tmp_path / "checkpoints" / "checkpoint.pt").read_bytes() == before
