"""Jobs that take weights, network, preprocessing and split from the folder of a training run."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, run_bundle
from monai.bundle import ConfigParser, create_workflow

from scripts.data.datalist import common_root
from scripts.inference.evaluation import scans_to_evaluate
from scripts.inference.training_run import TrainedScans, TrainingRun
from scripts.networks import VDVAE, VDVAEReconstruction

INFERENCE, EVALUATE = ["configs/inference.json"], ["configs/train.json", "configs/evaluate.json"]


@pytest.fixture(scope="module")
def run_dir(cohort, tmp_path_factory):
    """A run of one epoch on half of twelve phantoms, by settings of its own."""
    output = tmp_path_factory.mktemp("run")
    words = ("--dataset_dir", cohort, "--output_dir", output, "--epochs", 1, "--train_fraction", 0.5)
    words = (*words, "--scan_pattern", "*_FLAIR.nii.gz", "--percentiles", "[1.0, 99.0]")
    result = run_bundle(*words, "--network_def#num_latents", "[1,1,2]")
    assert result.returncode == 0, result.stderr
    return output


def held_out(run_dir) -> list[str]:
    return [item["image"] for item in json.loads((run_dir / "datalist.json").read_text())["validation"]]


def test_evaluate_takes_all_from_the_run(run_dir):
    done = run_bundle("--run_dir", run_dir, "--samples", 0, run_id=None, configs=EVALUATE)
    assert done.returncode == 0, done.stderr
    with (run_dir / "evaluation" / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    with (run_dir / "history.csv").open() as file:
        reported = [float(row["bits_per_dim"]) for row in csv.DictReader(file)][-1]
    # the same batches, and so the same noise
    done = run_bundle("--run_dir", run_dir, "--samples", 0, "--batch_size", 4, run_id=None, configs=EVALUATE)
    assert done.returncode == 0, done.stderr
    found = json.loads((run_dir / "evaluation" / "evaluation.json").read_text())
    assert found["bits_per_dim"] == pytest.approx(reported, rel=1e-6)
    assert found["training_scans"] == 6 and found["membership_auroc"] is not None


def test_scans_of_a_folder_that_were_trained_on_are_left_out(run_dir, cohort, caplog):
    run = TrainingRun(run_dir)
    with caplog.at_level("INFO"):
        sides = scans_to_evaluate(run, str(cohort), "*.nii*", train_fraction=0.95, seed=0)
    assert sorted(item["image"] for item in sides["validation"]) == sorted(held_out(run_dir))
    assert "6 of 12 scans are left out" in caplog.text


def test_a_cohort_that_was_trained_on_is_refused(run_dir, tmp_path):
    split = json.loads((run_dir / "datalist.json").read_text())
    (tmp_path / "list.json").write_text(json.dumps({"training": split["training"]}))
    with pytest.raises(ValueError, match="was trained on the subjects of all 6 scan"):
        scans_to_evaluate(TrainingRun(run_dir), tmp_path / "list.json", "*.nii*", train_fraction=0.5)


def test_reconstruct_takes_all_from_the_run(run_dir):
    done = run_bundle("--run_dir", run_dir, "--figures", False, run_id="reconstruct", configs=INFERENCE)
    assert done.returncode == 0, done.stderr
    assert len(list((run_dir / "eval").glob("*_recon.nii.gz"))) == 6
    one = json.loads((run_dir / "datalist.json").read_text())
    one["validation"] = one["validation"][:1]  # results are named by what all scans share, not by those of one side
    one["validation"][0]["image"] = one["validation"][0]["image"].replace("sub-", "deeper/sub-")
    (run_dir / "one.json").write_text(json.dumps(one))
    assert common_root(one["validation"], run_dir / "one.json") == str(Path(held_out(run_dir)[0]).parent)
    settings = json.loads((run_dir / "eval" / "reconstruct.json").read_text())
    assert settings["network_def"]["spatial_shape"] == [8, 8, 8]
    assert settings["network_def"]["num_latents"] == [1, 1, 2]  # as the run's command line had it


def test_interpolate_and_impute_take_scans_that_were_held_out(run_dir, tmp_path):
    words = ("--run_dir", run_dir, "--figures", False)
    done = run_bundle(*words, "--output_dir", tmp_path / "a", "--steps", 2, run_id="interpolate", configs=INFERENCE)
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "a" / "interpolate.json").read_text())
    assert len({*settings["first"], *settings["second"]} & set(held_out(run_dir))) == 2
    masked = Path(held_out(run_dir)[1])
    scan = nib.load(masked)
    mask = np.zeros(scan.shape, np.uint8)
    mask[8:12, 8:12, 8:12] = 1
    (tmp_path / "masks").mkdir()
    nib.save(nib.Nifti1Image(mask, scan.affine), tmp_path / "masks" / masked.name.replace("FLAIR", "hole"))
    words = (*words, "--mask_dir", tmp_path / "masks", "--mask_pattern", "*_hole.nii.gz", "--draws", 2)
    done = run_bundle(*words, "--output_dir", tmp_path / "b", run_id="impute", configs=INFERENCE)
    assert done.returncode == 0, done.stderr
    assert "5 of 6 scan(s) have no mask" in done.stderr
    stem = masked.name.removesuffix(".nii.gz")
    assert len(list((tmp_path / "b").glob("*.nii.gz"))) == len(list((tmp_path / "b").glob(f"{stem}_imputed_*"))) == 4


def test_preprocessing_is_the_runs(run_dir):
    parser = ConfigParser(ConfigParser.load_config_files("configs/inference.json"))
    parser.update({"run_dir": str(run_dir), "device": torch.device("cpu")})
    preprocessing = parser.get_parsed_content("preprocessing")
    image = preprocessing({"image": held_out(run_dir)[0]})["image"]
    assert image.shape == (1, 8, 8, 8)
    assert preprocessing.transforms[4].lower == 1.0
    assert parser.get_parsed_content("cohort").pattern == "*_FLAIR.nii.gz"


def test_what_is_given_goes_before_the_run_however_it_is_given(run_dir, tmp_path):
    assert TrainingRun(run_dir).get("scan_pattern", "*_T1w.nii.gz") == "*_T1w.nii.gz"
    assert TrainingRun(run_dir).get("percentiles", None) == [1.0, 99.0]
    settings = {"run_dir": str(run_dir), "percentiles": [2.0, 98.0]}
    (tmp_path / "overlay.json").write_text(json.dumps(settings))
    files = [str(ROOT / "configs/inference.json"), str(tmp_path / "overlay.json")]
    by_file = ConfigParser(ConfigParser.load_config_files(files))
    by_workflow = create_workflow(config_file=files[0], workflow_type="infer", bundle_root=str(ROOT), **settings)
    for parser in (by_file, by_workflow.parser):
        assert parser.get_parsed_content("preprocessing").transforms[4].lower == 2.0


def test_the_network_is_the_runs_and_of_the_class_that_is_asked_for(run_dir):
    parser = ConfigParser(ConfigParser.load_config_files("configs/inference.json"))
    default = parser.get_parsed_content("network_def")
    assert default.spatial_shape == (64, 64, 64)
    network = TrainingRun(run_dir).network(default)
    assert type(network) is VDVAEReconstruction and network.spatial_shape == (8, 8, 8)
    assert TrainingRun(None).network(default) is default
    assert type(TrainingRun(run_dir).network(VDVAE(**default.arguments))) is VDVAE


def test_no_run_leaves_what_is_given_and_the_defaults():
    run = TrainingRun(None)
    assert (run.ckpt, run.datalist, run.knows({"image": "a.nii"})) == (None, None, "")
    assert run.get("keep_aspect", False) is False
    assert run.get("keep_aspect", None) is True


def test_scans_are_known_by_path_and_by_subject(tmp_path):
    items = [{"image": str(tmp_path / "data" / f"sub-{i}_ses-1.nii"), "subject": f"sub-{i}"} for i in range(2)]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": items, "validation": []}))
    trained = TrainedScans(tmp_path / "datalist.json")
    assert trained.knows(items[0]) == "yes"
    other = {"image": str(tmp_path / "data" / "sub-1_ses-2.nii"), "subject": "sub-1"}
    assert trained.knows(other) == "subject"
    assert trained.knows({"image": str(tmp_path / "elsewhere" / "sub-1_ses-2.nii"), "subject": "sub-1"}) == "no"
    assert trained.knows({"image": str(tmp_path / "data" / "sub-7.nii"), "subject": "sub-7"}) == "no"


def test_another_network_than_the_runs_is_refused(run_dir):
    parser = ConfigParser(ConfigParser.load_config_files("configs/inference.json"))
    parser.update({"run_dir": str(run_dir), "spatial_shape": [128, 128, 128]})
    with pytest.raises(ValueError, match="network_def or spatial_shape is given, but the run in run_dir"):
        TrainingRun(run_dir).network(parser.get_parsed_content("network_def"))


def test_what_is_no_run_is_named(run_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json: set --run_dir to the output_dir"):
        TrainingRun(tmp_path)
    shutil.copy(run_dir / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="has left no weights"):
        (tmp_path / "checkpoints").mkdir()
        _ = TrainingRun(tmp_path).ckpt
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        TrainingRun(tmp_path)
    config = json.loads((run_dir / "config.json").read_text())
    config["preprocessing"]["transforms"].pop()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="preprocessed its scans by LoadScand, "):
        TrainingRun(tmp_path)
