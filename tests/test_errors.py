"""What people read when a command fails, and how soon."""

import errno
import logging
import re
import subprocess
import sys

import pytest
import torch
from conftest import PROCESS, ROOT, STARTUP, brain, bundle_words, run_bundle, run_command, run_command_process, save
from joblib import delayed
from monai.bundle import ConfigParser
from monai.transforms import Compose

from scripts.data.transforms import CheckScand, ScanError
from scripts.utils.errors import is_refusal, root_cause, sentence, show_root_cause
from scripts.utils.parallel import run_parallel


def raised(function, *arguments, **keywords):
    with pytest.raises(Exception) as error:
        function(*arguments, **keywords)
    return error.value


def parsed(content, **more):
    return raised(ConfigParser({"it": content, **more}).get_parsed_content, "it")


def sentences(result):
    return [line for line in result.stderr.splitlines() if line.startswith("Error: ")]


def test_a_refusal_is_one_sentence_and_the_last_line(tmp_path):
    result = run_bundle("--dataset_dir", tmp_path / "no", "--output_dir", tmp_path / "out")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert len(sentences(result)) == 1
    assert result.stderr.splitlines()[-1].startswith(f"Error: dataset_dir '{tmp_path / 'no'}' does not exist")


def test_debug_lets_monai_log_what_it_was_given(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    logger = logging.getLogger("monai.bundle.scripts")
    monkeypatch.setattr(logger, "level", logger.level)
    for debug in (False, True):
        logger.setLevel(logging.WARNING)  # as configs/logging.conf has it
        show_root_cause(debug)
        assert logger.isEnabledFor(logging.INFO) == debug
    logger.setLevel(logging.INFO)


def test_debug_shows_the_traceback_between_two_copies_of_the_sentence(tmp_path):
    result = run_bundle("--dataset_dir", tmp_path / "no", "--output_dir", tmp_path / "out", "--debug", True)
    first, last = sentences(result)
    assert first == last == result.stderr.splitlines()[-1]
    between = result.stderr.split(first)[1]
    assert "Traceback" in between and "find_scans" in between


def test_the_traceback_of_an_error_of_the_program_is_never_lost(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", None)
    show_root_cause()
    error = raised([].pop)
    sys.excepthook(type(error), error, error.__traceback__)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == lines[-1] == "Error: IndexError: pop from empty list"
    assert "Traceback (most recent call last):" in lines


def test_ctrl_c_is_no_error(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", None)
    show_root_cause()
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "\nStopped before the end; what was saved before is whole.\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"_target_": "torch.nn.Linear", "in_features": 1, "out": 2},
            "torch.nn.Linear: TypeError: .*unexpected keyword argument 'out'",
        ),
        ("$@size / 0", r"in the config, \$@size / 0: ZeroDivisionError: division by zero"),
        ("$" + " + ".join(["@net#size"] * 12) + " + nothing", r"@net#size \+ nothing: NameError: name 'nothing'"),
        ("@nothing", "ValueError: the referring item `@nothing` is not defined"),
    ],
)
def test_an_error_of_a_config_names_its_part(content, words):
    error = parsed(content, size=3, net={"size": 4})
    assert is_refusal(error)
    assert re.search(words, sentence(error))


def test_an_error_in_what_a_config_calls_keeps_its_traceback():
    error = parsed("$torch.zeros(2).reshape(3)")
    assert "in the config, $torch.zeros(2).reshape(3): RuntimeError: shape" in sentence(error)
    error = parsed({"_target_": "torch.optim.SGD", "params": [], "lr": 1})
    assert not is_refusal(error)
    assert sentence(error) == "in the config, torch.optim.SGD: ValueError: optimizer got an empty parameter list"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "'/scans/a.nii' must not be read or written by you (permission denied): name another"),
        (errno.ENOENT, "'/scans/a.nii' does not exist: check the path."),
        (errno.EIO, "'/scans/a.nii' cannot be used (broken)."),
    ],
)
def test_what_the_system_says_of_a_file_is_a_sentence(number, words):
    def read():
        raise OSError(number, "broken", "/scans/a.nii")

    assert sentence(raised(read)).startswith(words)


def test_a_transform_is_not_named_by_its_address():
    error = raised(Compose([CheckScand("image")]), {"image": torch.zeros(1, 0, 2, 2)})
    assert "object at 0x" in str(error)
    assert isinstance(root_cause(error), ScanError)
    assert is_refusal(error)
    assert sentence(error).startswith("'image' is empty")


def test_an_error_of_a_loaders_process_is_found_in_its_traceback():
    message = (
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        "  File \"x.py\", line 1, in f\nscripts.data.transforms.ScanError: 'a.nii' is empty.\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "RuntimeError: applying transform <scripts.data.transforms.FitShaped object at 0x7f>\n"
    )
    assert sentence(RuntimeError(message)) == "'a.nii' is empty."
    assert is_refusal(RuntimeError(message))


def test_a_shape_of_too_few_axes_is_named(cohort, tmp_path):
    result = run_bundle("--dataset_dir", cohort, "--output_dir", tmp_path, "--spatial_shape", "[8,8]")
    assert sentences(result) == [
        "Error: spatial_shape [8, 8] has 2 axes, but network_def has spatial_dims 3: give one size for each axis."
    ]
    assert "scan" not in result.stderr.split("Error: ")[0].splitlines()[-1]  # none was read


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["--network_def#output_activation", "relu"], "network_def: output_activation is 'relu': choose one of 'tanh'"),
        (
            ["--scan_pattern", "['*_T1w.nii','*_FLAIR.nii']"],
            "gives scans of 2 channels, such as '{0}/a_T1w.nii', but network_def has in_channels 1: set "
            "--network_def#in_channels 2",
        ),
        (
            ["--scan_pattern", "*_T1w.nii", "--network_def#in_channels", "2"],
            "_T1w.nii' has 1 channel(s) where network_def has in_channels 2: set --network_def#in_channels 1, or "
            "give --scan_pattern one pattern for each channel.",
        ),
    ],
)
def test_a_training_that_is_refused_says_so_before_it_reads_scans_and_leaves_nothing(tmp_path, words, refusal):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("a", "b", "c", "d", "e"):
        for channel in ("T1w", "FLAIR"):
            save(scans / f"{name}_{channel}.nii", brain()[0].numpy())
    output = tmp_path / "out"
    words = ("--dataset_dir", scans, "--output_dir", output, "--cache_dir", tmp_path / "cache", *words)
    result = run_bundle(*words, "--scan_policy", "skip")
    (said,) = sentences(result)
    assert refusal.format(scans) in said
    assert "reading training scans" not in result.stderr
    assert [path.name for path in output.glob("*")] == []


def in_processes(jobs):
    return list(run_parallel(jobs, 2, "checking"))


def test_a_refusal_in_a_process_of_joblibs_is_one_too():
    error = raised(in_processes, [delayed(CheckScand)("image", spacing=-1.0)] * 2)
    assert is_refusal(error)
    assert sentence(error) == "expected_spacing is -1.0: give one number of mm above 0, or one per axis."
    assert not is_refusal(raised(in_processes, [delayed(int)("x")] * 2))


def test_an_expected_size_of_too_few_axes_is_named(cohort, tmp_path):
    result = run_bundle("--dataset_dir", cohort, "--output_dir", tmp_path, "--expected_spacing", "[1,1]")
    assert sentences(result)[0].startswith("Error: expected_spacing is [1, 1], but scans have 3 axes")


def test_a_file_in_the_place_of_the_cache_is_refused(cohort, tmp_path):
    (tmp_path / "file").write_text("")
    result = run_bundle("--dataset_dir", cohort, "--output_dir", tmp_path, "--cache_dir", tmp_path / "file")
    assert sentences(result)[0].startswith(f"Error: cache_dir is '{tmp_path / 'file'}', but")


def test_scans_to_interpolate_between_must_exist(cohort, tmp_path):
    words = ("--dataset_dir", cohort, "--output_dir", tmp_path, "--scans_between", "['a.nii','b.nii']")
    result = run_bundle(*words, run_id="interpolate", configs=["configs/inference.json"])
    assert sentences(result) == ["Error: scans_between: 'a.nii' does not exist: give the paths of two scans."]


def test_a_table_of_coordinates_must_exist(cohort, tmp_path):
    words = ("--dataset_dir", cohort, "--output_dir", tmp_path, "--coordinates", tmp_path / "no.csv")
    result = run_bundle(*words, run_id="decode_coordinates", configs=["configs/inference.json"])
    assert sentences(result)[0].startswith(f"Error: coordinates '{tmp_path / 'no.csv'}' does not exist")


def test_a_bundle_that_is_not_on_the_path_says_so(tmp_path):
    words = bundle_words("--bundle_root", ROOT, run_id="sample", configs=[ROOT / "configs" / "inference.json"])
    result = run_command_process("monai.bundle", *words, cwd=tmp_path, PYTHONPATH=str(STARTUP))
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: the modules of the bundle are not found") and "PYTHONPATH" in last


def test_a_command_refuses_without_a_traceback(tmp_path):
    result = run_command("scripts.check", tmp_path / "no")
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: dataset_dir '{tmp_path / 'no'}' does not exist")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("scripts.prepare", ("raw", "--output_dir", "out", "--bias_correction", "false")),
        ("scripts.phantoms", ("brains", "--output_dir", "out", "--count", 1, "--covariates", "false")),
    ],
)
def test_a_text_is_no_truth_value(tmp_path, monkeypatch, module, words):
    monkeypatch.chdir(tmp_path)
    result = run_command(module, *words)
    assert result.returncode == 1 and f"{words[-2][2:]} is 'false': it must be True or False" in result.stderr
    assert not (tmp_path / "out").exists()


def modules_after(program):
    """The modules that a process of its own has imported at the end of a program."""
    result = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys; print('modules', *sys.modules)"],
        cwd=ROOT, env=PROCESS, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return next(line.split()[1:] for line in result.stdout.splitlines() if line.startswith("modules"))


def test_commands_look_at_their_arguments_before_they_import_monai():
    modules = modules_after("import scripts.check, scripts.prepare")
    assert not {"monai", "torch", "SimpleITK", "itk", "matplotlib", "nilearn", "pandas", "ignite"} & set(modules)
    assert len(modules) < 700  # 532 with NumPy, joblib and nibabel; with MONAI 5400


def test_phantoms_need_no_ignite_and_their_atlas_when_a_brain_is_made():
    modules = modules_after("import scripts.phantoms")
    assert not {"monai", "ignite", "nilearn", "pandas", "sklearn"} & set(modules)


def test_a_misspelt_key_costs_no_import_beyond_monais_own():
    program = """
import runpy, sys
import fire, monai.bundle.__main__
for words in (["training", "--config_file", "configs/train.json"],
              ["reconstruct", "--config_file", "configs/inference.json"]):
    before = set(sys.modules)
    sys.argv = ["monai.bundle", "run", *words, "--agument", "False"]
    try:
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
    except Exception as error:
        assert "agument" in str(error.__cause__), error
    print("own", *(set(sys.modules) - before))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=PROCESS, capture_output=True, text=True, check=True
    )
    lines = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("own")]
    assert len(lines) == 2
    others = [name for line in lines for name in line if name.split(".")[0] != "scripts"]
    assert others == []
