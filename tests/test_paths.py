"""Paths are taken as people write them: with a ``~``, relative, by the command line, an overlay or Python."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, inference_config, run_bundle
from monai.bundle import ConfigParser, ConfigWorkflow

from scripts.data.datalist import write_datalist
from scripts.inference.training_run import TrainedScans, TrainingRun
from scripts.utils.files import expand

TRAIN = ["configs/train.json", "tests/tiny.json", "tests/quick_start.json"]
INFERENCE = ["configs/inference.json", "tests/tiny.json"]
EVALUATE = [*TRAIN, "configs/evaluate.json"]
USERS = {  # keys of paths that somebody gives, by the config that has them
    "train": ("dataset_dir", "output_dir", "ckpt_dir", "cache_dir", "covariates_file", "weights", "grow_from"),
    "inference": (
        *("run_dir", "dataset_dir", "output_dir", "ckpt"),
        *("coordinates", "covariates_file", "atlas", "mask_dir"),
    ),
    "evaluate": ("run_dir", "ckpt"),
}


@pytest.fixture
def home(tmp_path, monkeypatch, cohort):
    """A home folder with a datalist of the cohort."""
    monkeypatch.setenv("HOME", str(tmp_path))
    scans = [{"image": str(path)} for path in sorted(Path(cohort).glob("*.nii.gz"))]
    (tmp_path / "list.json").write_text(json.dumps({"training": scans[:-2], "validation": scans[-2:]}))
    table = ["participant_id\tage", *(f"{Path(s['image']).name.split('_')[0]}\t{50 + i}" for i, s in enumerate(scans))]
    (tmp_path / "people.tsv").write_text("\n".join(table) + "\n")
    return tmp_path


@pytest.mark.parametrize("config", list(USERS))
def test_every_path_is_expanded_at_one_place(config):
    """What uses one reads it from ``paths``; the keys themselves are used nowhere else."""
    content = json.loads((ROOT / f"configs/{config}.json").read_text())
    for key in USERS[config]:
        if f"paths#{key}" in content:
            assert content.pop(f"paths#{key}") == f"$files.expand(@{key})"
        else:
            assert content["paths"].pop(key) == f"$files.expand(@{key})"
    allowed = {"ckpt_dir": "$str(@output_dir) + '/checkpoints'"}  # which is itself expanded
    rest = json.dumps({key: value for key, value in content.items() if value != allowed.get(key)})
    assert re.findall(rf"@(?:{'|'.join(USERS[config])})\b", rest) == []


def test_a_folder_above_is_a_folder_too(cohort, tmp_path):
    """With ``..`` in the paths of scans, weights, tables and a pair."""
    network = inference_config().get_parsed_content("network_def")
    torch.save(network.state_dict(), tmp_path / "model.pt")
    here, scans = Path(os.path.relpath(tmp_path, ROOT)), Path(os.path.relpath(cohort, ROOT))
    assert here.parts[0] == scans.parts[0] == ".."
    (tmp_path / "ages.csv").write_text("image,age\nsub-0003_FLAIR.nii.gz,61\n")
    words = ("--ckpt", here / "model.pt", "--dataset_dir", scans, "--covariates_file", here / "ages.csv")
    scored = run_bundle(*words, "--output_dir", here / "score", run_id="score", configs=INFERENCE)
    assert scored.returncode == 0 and not (tmp_path / "score" / "failed.csv").exists(), scored.stderr
    rows = list(csv.DictReader((tmp_path / "score" / "scores.csv").open(encoding="utf-8")))
    assert rows[2]["image"] == "sub-0003_FLAIR.nii.gz" and rows[2]["age"] == "61"
    words = ("--ckpt", here / "model.pt", "--scans_between", [str(path) for path in sorted(scans.glob("*.nii.gz"))[:2]])
    words = (*words, "--figures", True, "--output_dir", here / "pair")
    between = run_bundle(*words, run_id="interpolate", configs=INFERENCE)
    assert between.returncode == 0 and len(list((tmp_path / "pair").glob("*_step*.nii.gz"))) == 7, between.stderr
    assert "_steps.png" in (tmp_path / "pair" / "report_interpolate.html").read_text(encoding="utf-8")


def test_scans_that_were_trained_on_are_known_by_any_path(tmp_path):
    """As files of a DataLad data set, which are links, or by a path with ``..``."""
    for folder in ("store", "scans/sub-1", "linked"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "store" / "abc").write_bytes(b"scan")
    (tmp_path / "scans/sub-1/T1w.nii").symlink_to(tmp_path / "store" / "abc")
    (tmp_path / "scans/sub-1/FLAIR.nii").write_bytes(b"other")
    (tmp_path / "linked" / "T1w.nii").symlink_to(tmp_path / "scans/sub-1/T1w.nii")
    trained = [{"image": f"{tmp_path}/linked/../scans/sub-1/T1w.nii", "subject": "sub-1"}]
    write_datalist({"training": trained}, tmp_path / "datalist.json")
    known = TrainedScans(tmp_path / "datalist.json")
    found = [known.knows({"image": str(tmp_path / name), "subject": "sub-1"}) for name in PLACES]
    assert found == list(PLACES.values())


PLACES = {
    **{"scans/sub-1/T1w.nii": "yes", "store/../scans/sub-1/T1w.nii": "yes", "linked/T1w.nii": "yes"},
    **{"scans/sub-1/../sub-1/FLAIR.nii": "subject", "linked/FLAIR.nii": "no"},
}


@pytest.fixture
def trained(home):
    words = {"dataset_dir": "~/list.json", "cache_dir": "~/cache", "covariates_file": "~/people.tsv"}
    words |= {"covariates": "{'age': 'continuous'}", "prior_factors": 2}
    result = run_bundle("--output_dir=~/run", *(f"--{key}={value}" for key, value in words.items()))
    assert result.returncode == 0, result.stderr
    return result


def test_a_run_is_where_its_owner_lives(trained, home):
    for name in ("history.csv", "datalist.json", "config.json", "checkpoints/model.pt", "tensorboard"):
        assert (home / "run" / name).exists(), name
    assert list((home / "cache").glob("*.pt"))
    assert torch.load(home / "run/checkpoints/population_prior.pt", weights_only=True)["covariates"][0]["name"] == "age"
    assert not (ROOT / "~").exists()
    # its weights in all ways, in all that takes them
    again = run_bundle(
        *("--output_dir", "~/again", "--dataset_dir", "~/list.json", "--weights", "~/run/checkpoints/model.pt"),
        *("--cache_dir", "~/cache", "--figure_interval", 0, "--prior_factors", 0),
    )
    assert again.returncode == 0, again.stderr
    (home / "run/checkpoints").rename(home / "weights")
    assert (home / "again/checkpoints/model.pt").exists()
    common = ("--ckpt", "~/weights/model.pt", "--prior", "~/weights/population_prior.pt")
    scans = ("--dataset_dir", "~/list.json", "--covariates_file", "~/people.tsv")
    scored = run_bundle(*common, *scans, "--output_dir=~/eval", run_id="score", configs=INFERENCE)
    assert scored.returncode == 0, scored.stderr
    assert (home / "eval/scores.csv").exists() and not (ROOT / "~").exists()
    assert ",age" in (home / "eval/scores.csv").read_text().splitlines()[0]
    evaluated = run_bundle(
        *(*common, "--dataset_dir", "~/list.json", "--output_dir", "~/run", "--samples", 2),
        run_id="run",
        configs=EVALUATE,
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert (home / "run/evaluation").is_dir() and not (ROOT / "~").exists()
    # the folder of its checkpoints as its config says it
    config = json.loads((home / "run/config.json").read_text())
    (home / "run/config.json").write_text(json.dumps(config | {"ckpt_dir": "~/weights"}))
    assert TrainingRun("~/run").ckpt == str(home / "weights/model.pt")


@pytest.mark.parametrize("given", ["~/x", Path("~/x")])
def test_from_python_too(home, given, monkeypatch):
    monkeypatch.chdir(ROOT)
    files = [str(ROOT / file) for file in TRAIN]
    settings = {key: given for key in USERS["train"] if key != "ckpt_dir"}
    workflow = ConfigWorkflow(config_file=files, workflow_type="train", **settings)
    found = {key: workflow.parser.get_parsed_content(f"paths#{key}") for key in settings}
    assert found == dict.fromkeys(settings, str(home / "x"))
    assert workflow.parser.get_parsed_content("history").path == home / "x/history.csv"
    assert workflow.parser.get_parsed_content("paths#ckpt_dir") == str(home / "x/checkpoints")
    parser = inference_config(**{key: given for key in USERS["inference"] if key not in ("run_dir", "ckpt")})
    found = {key: parser.get_parsed_content(f"paths#{key}") for key in USERS["inference"][1:] if key != "ckpt"}
    assert set(found.values()) == {str(home / "x")}
    assert parser.get_parsed_content("failures").path == home / "x/failed.csv"


def test_by_an_overlay(home, tmp_path):
    overlay = tmp_path / "mine.json"
    overlay.write_text(json.dumps({"output_dir": "~/y", "weights": "~/m.pt"}))
    parser = ConfigParser(ConfigParser.load_config_files([*(str(ROOT / file) for file in TRAIN), str(overlay)]))
    assert parser.get_parsed_content("paths#weights") == str(home / "m.pt")
    assert parser.get_parsed_content("history").path == home / "y/history.csv"


def test_the_default_phantoms_may_be_in_the_home_folder(home):
    parser = inference_config(phantom_dir="~/phantoms", phantom_count=1)
    made = parser.get_parsed_content("cohort").items
    assert len(made) == 1 and made[0]["image"].startswith(str(home / "phantoms"))


def test_what_is_no_path_stays():
    assert expand(None) is None
