"""What the command line may say, and what is kept of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from filelock import FileLock, Timeout

from scripts.utils import command_line
from scripts.utils.locks import claim_output_dir, release_output_dir
from scripts.utils.settings import command_line_config, save_config

CONFIG = "configs/train.json"


def test_overrides_are_merged_into_the_config():
    config = command_line_config(["run", "training", "--config_file", CONFIG, "--epochs", "3", "--seed=7"])
    assert config["epochs"] == 3
    assert config["seed"] == 7
    assert config["batch_size"] == 8


def test_overlays_are_merged():
    config = command_line_config(["run", "--config_file", f"['{CONFIG}','configs/size_64.json']"])
    assert config["spatial_shape"] == [64, 64, 64]
    assert len(config["network_def"]["channels"]) == 7
    assert config["network_def"]["template"] is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"epochs": 3,', "is no valid JSON or YAML"),
        ("[1, 2]", "holds no settings by name"),
        ("3", "holds no settings by name"),
        ("", "is no valid JSON or YAML"),
        ("[" * 10**5, "is no valid JSON or YAML"),
        ("\xff\xfe", "is no valid JSON or YAML"),
        (None, "does not exist"),
    ],
)
def test_an_overlay_that_is_none_is_named(tmp_path, text, words):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as refused:
        command_line_config(["run", "--config_file", f"['{CONFIG}','{path}']"])
    assert str(path) in str(refused.value)


def test_another_program_has_no_command_line(monkeypatch):
    assert command_line_config(["serve", "--port", "80"]) == {}
    monkeypatch.setattr(sys, "argv", ["serve", "--config_file", "its_own.json"])
    assert command_line_config() == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--agument", "False"], ["--agument", "nearest", "'augment'"]),
        (["--dataset-dir", "x"], ["--dataset-dir", "'dataset_dir'"]),
        (["--netwrk_def#rezero", "True"], ["netwrk_def", "'network_def'"]),
        (["--augment", "false"], ["--augment false", "write False"]),
        (["--amp=true"], ["--amp true", "write True"]),
        (["--max_scans", "null"], ["--max_scans null", "write None"]),
        (["--cache_half", "Yes"], ["--cache_half Yes", "write True or False"]),
        (["--augmentation#spik#_disabled_", "True"], ["'augmentation' has no 'spik'", "'spike'"]),
        (["--augmentation#spik", "None"], ["'augmentation' has no 'spik'", "'spike'"]),
        (["--train#handlers#40#seed", "1"], ["'train#handlers' is a list of"]),
        (["--epochs#last", "1"], ["'epochs' is no section, it is 100"]),
        (["--batch_size", "many"], ["--batch_size many: write a number, such as 8"]),
        (["--learning_rate=fast"], ["--learning_rate fast: write a number, such as 0.01"]),
        (["--spatial_shape", "32x32x32"], ['--spatial_shape 32x32x32: write a list, such as "[32, 32, 32]"']),
        (["--spatial_shape", "32"], ["spatial_shape is 32: give the voxels along each axis"]),
        (["--spatial_shape", "[32,32,0]"], ["spatial_shape: a size is 0", "1 or more"]),
        (["--batch_size", "0"], ["batch_size is 0", "1 or more"]),
        (["--batch_size", "2.5"], ["batch_size is 2.5", "whole number"]),
        (["--num_workers", "-1"], ["num_workers is -1", "0 or more"]),
        (["--learning_rate", "-0.1"], ["learning_rate is -0.1", "0 or more"]),
        (["--figure_scans", "0"], ["figure_scans is 0", "1 or more"]),
        (["--max_grad_norm", "-1"], ["max_grad_norm is -1", "a number above 0"]),
        (["--max_grad_norm", "0"], ["max_grad_norm is 0", "a number above 0"]),
        (["--skip_grad_norm", "0.0"], ["skip_grad_norm is 0.0", "a number above 0"]),
        (["--max_skips", "0"], ["max_skips is 0", "1 or more"]),
        (["--keep_last", "2.5"], ["keep_last is 2.5", "whole number, 1 or more"]),
        (["--skip_warmup", "-1"], ["skip_warmup is -1", "0 or more"]),
        (["--accumulation_steps", "0"], ["accumulation_steps is 0", "1 or more"]),
        (["--device", "cuda"], ["device is 'cuda'", "$torch.device('cuda:0')"]),
        (["--output_dir", "run#2"], ["--output_dir run#2 would be read as 'run'", """--output_dir "'run#2'"."""]),
        (["--dataset_dir", "Müller,Hans"], ["would be read as ('Müller', 'Hans')"]),
        (["--output_dir=1.10"], ["would be read as 1.1"]),
        (["--amp_dtype", "bfloat16"], ["amp_dtype is 'bfloat16'", "$torch.bfloat16"]),
    ],
)
def test_a_misspelt_key_or_word_is_named(arguments, words):
    with pytest.raises(ValueError) as error:
        command_line_config(["run", "training", "--config_file", CONFIG, *arguments])
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        (("deviation", "--covariates", "{'age': 70}", "--draws", "4"), "--covariates"),
        (("sample", "--covariates", "{'age': 70}", "--atlas", "x.nii", "--network_def#rezero", "True"), "--atlas"),
        (("--steps", "3", "--draws", "4", "--temperature", "1.0"), "--steps and --draws"),
        (("impute", "--mask_dir", "x", "--seed", "1", "--debug", "True", "--output_dir", "x"), None),
    ],
)
def test_an_option_on_which_nothing_depends_is_said(words, idle, caplog):
    """A scan is not compared with people of 70 because its job was told so."""
    command_line_config(["run", *words, "--config_file", "configs/inference.json"])
    job = words[0] if not words[0].startswith("--") else "run"
    assert caplog.messages == ([f"Nothing of '{job}' depends on {idle}, which changes nothing."] if idle else [])


def test_an_expression_may_stand_for_a_number_or_list():
    words = ["--batch_size", "$2 * 4", "--spatial_shape", "$[32] * 3", "--epochs", "@batch_size"]
    config = command_line_config(["run", "--config_file", CONFIG, *words])
    assert [config["batch_size"], config["spatial_shape"], config["epochs"]] == words[1::2]


@pytest.mark.parametrize(
    ("key", "written", "read"),
    [("output_dir", "'run#2'", "run#2"), ("output_dir", "2024", 2024), ("scan_pattern", "[a,b]", ["a", "b"])],
)
def test_values_are_read_as_monai_reads_them(key, written, read):
    assert command_line_config(["run", "--config_file", CONFIG, f"--{key}", written])[key] == read


@pytest.mark.parametrize("path", ["2024_05", "run#2", "Müller,Hans", "1.10", "None"])
def test_paths_of_commands_are_taken_as_they_are_written(monkeypatch, path):
    def command(first: "str | Path", count: "int", second: "str | Path | None" = None):
        return [first, count, second]

    monkeypatch.setattr(command_line, "show_root_cause", lambda: None)
    monkeypatch.setattr(sys, "argv", ["command", path, "1", "--second", path])
    path = None if path == "None" else path
    assert command_line.run("command", command) == [path, 1, path]


@pytest.mark.parametrize("words", [["run", "trainning"], ["run", "--run_id", "trainning"]])
def test_an_unknown_job_is_refused_before_anything_is_read(words):
    with pytest.raises(ValueError, match="no job 'trainning'; those that exist are run, training\\."):
        command_line_config([*words, "--config_file", CONFIG])


def test_resume_is_true_false_or_auto():
    assert command_line_config(["run", "--config_file", CONFIG, "--resume", "auto"])["resume"] == "auto"


@pytest.mark.parametrize(
    "key", ["network_def#rezero", "train#trainer#max_epochs", "network_def::strided", "augmentation#spike#_disabled_"]
)
def test_keys_inside_a_section_may_be_new(key):
    assert command_line_config(["run", "--config_file", CONFIG, f"--{key}", "True"])[key] is True


def test_the_config_is_left_in_the_output_folder(tmp_path):
    save_config(tmp_path, {"epochs": 3})
    assert json.loads((tmp_path / "config.json").read_text()) == {"epochs": 3}


def test_an_output_folder_is_made(tmp_path):
    claim_output_dir(tmp_path / "a" / "b", tmp_path / "c", resume=False)
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(("work", "left"), [("", []), ("(folder / 'history.csv').touch()", ["history.csv"])])
def test_a_run_that_ends_early_leaves_no_lock_and_no_empty_folder(tmp_path, work, left):
    program = f"""
from pathlib import Path
from scripts.utils import command_line
from scripts.utils.locks import claim_output_dir
folder = Path({str(tmp_path / "out")!r})
claim_output_dir(folder, folder / "checkpoints", resume=False)
assert [path.name for path in folder.iterdir()] == [".checkpoints.lock"]
{work}
raise ValueError("refused")
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "ValueError: refused" in result.stderr
    assert [path.name for path in tmp_path.rglob("*")] == [*["out"][: len(left)], *left]


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(NotADirectoryError, match=r"output_dir.*set --output_dir"):
        claim_output_dir(tmp_path / "x", tmp_path, resume=False)


def test_an_output_folder_that_cannot_be_written_to_is_refused(tmp_path):
    with pytest.raises(OSError, match="output_dir '/proc/nothing' cannot be written to"):
        claim_output_dir("/proc/nothing", tmp_path, resume=False)
    with pytest.raises(OSError, match="ckpt_dir '/proc/nothing' cannot be written to"):
        claim_output_dir(tmp_path, "/proc/nothing/checkpoints", resume=False)


def test_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "checkpoint.pt").write_text("")
    with pytest.raises(FileExistsError, match="resume it by --resume True"):
        claim_output_dir(tmp_path, tmp_path, resume=False)
    claim_output_dir(tmp_path, tmp_path, resume=True)


def test_two_runs_do_not_share_a_folder(tmp_path):
    other = FileLock(tmp_path / ".checkpoints.lock")
    with other, pytest.raises(OSError, match="is in use by another run"):
        claim_output_dir(tmp_path, tmp_path / "checkpoints", resume="auto", timeout=0.1)
    claim_output_dir(tmp_path, tmp_path / "checkpoints", resume="auto")
    claim_output_dir(tmp_path, tmp_path / "checkpoints", resume="auto")  # the same process once more
    with pytest.raises(Timeout):
        other.acquire(timeout=0)
    release_output_dir(tmp_path / "checkpoints")
    with other:
        pass
