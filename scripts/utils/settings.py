"""The settings of a run: the config files merged with the command line, checked, and saved beside the results."""

from __future__ import annotations

import ast
import difflib
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from scripts.utils.command_line import bundle_words, check_integer
from scripts.utils.errors import InputError, NotFoundError
from scripts.utils.files import write_text

logger = logging.getLogger(__name__)

REFERENCE = re.compile(r"[@%]([A-Za-z_]\w*(?:#\w+)*)")  # to a key, in an expression of a config
# of ``python -m monai.bundle run`` itself
MONAI_ARGUMENTS = {
    "run_id",
    "init_id",
    "final_id",
    "meta_file",
    "config_file",
    "logging_file",
    "tracking",
    "args_file",
    "workflow_type",
    "workflow_name",
    "bundle_root",
    "_meta_",
}
RENAMED = {"covariates": "predict_covariates"}  # jobs, by their names in earlier versions
NO_JOBS = ("imports", "initialize", "finalize")
# whole numbers, and the least that makes sense
LEAST = {
    "accumulation_steps": 1,
    "batch_size": 1,
    "draws": 0,
    "epochs": 0,
    "figure_interval": 0,
    "figure_scans": 1,
    "importance_samples": 1,
    "iterations": 1,
    "keep_last": 1,
    "log_interval": 1,
    "max_skips": 1,
    "num_workers": 0,
    "phantom_count": 1,
    "prior_factors": 0,
    "samples": 0,
    "save_interval": 1,
    "save_updates": 1,
    "seed": 0,
    "skip_warmup": 0,
    "steps": 2,
    "training_scans": 0,
    "val_interval": 1,
}
OBJECTS = {"device": "$torch.device('cuda:0')", "amp_dtype": "$torch.bfloat16"}
NOT_NEGATIVE = ("anomaly_smoothing", "learning_rate", "sample_temperature", "temperature", "weight_penalty")
ABOVE_ZERO = ("max_grad_norm", "skip_grad_norm")


def command_line_config(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Merge the config files of this command with what the command line overrides, unresolved.

    Args:
        arguments: of ``python -m monai.bundle run``; by default those of this program, if it is that one.

    Returns:
        The merged config; empty without a ``--config_file`` among the arguments (in a program that loads the bundle by
        itself).

    Raises:
        ValueError: the command line sets a key that no config file has (MONAI would add it, and nothing would happen),
            gives a text that MONAI would read as something else, a string instead of True or False, such as ``false``,
            which counts as true, or instead of a number or list, or gives a value that makes no sense; or there is no
            such job.
    """
    arguments = bundle_words() if arguments is None else arguments
    options = _options(arguments)
    if "config_file" not in options:
        return {}
    _check_reading("config_file", options["config_file"])
    config = _load(_literal(options["config_file"]))
    job = _named_job(config, arguments, options)
    for key, value in options.items():
        top = key.replace("::", "#").split("#")[0]
        if top in MONAI_ARGUMENTS:
            if top == "bundle_root":
                config[top] = value
            continue
        before = _find(config, key)
        if value in ("true", "false", "null"):
            spelling = {"true": "True", "false": "False", "null": "None"}[value]
            raise InputError(
                f"--{key} {value}: write {spelling}; on the command line '{value}' is a string, which counts as true."
            )
        config[key] = _check_reading(key, value, top in config.get("paths", ()))
        if (key, value) != ("resume", "auto"):
            _check_type(key, before, config[key])
    _check_values(config)
    idle = [f"--{key}" for key in options if key.split("#")[0] not in MONAI_ARGUMENTS | _used_by(config, job)]
    if idle:
        logger.warning("Nothing of '%s' depends on %s, which changes nothing.", job, " and ".join(idle))
    return config


def _used_by(config: dict[str, Any], job: str) -> set[str]:
    """The keys at the top of a config that a job refers to, through others too."""
    used, left = set[str](), [job, "initialize", "finalize"]
    while left:
        key = left.pop()
        if key in used:
            continue
        used.add(key)
        top, *parts = key.split("#")
        node = config.get(top)
        for part in parts:  # of a section that part alone which is referred to
            node = node.get(part, node) if isinstance(node, dict) else node
        left += REFERENCE.findall(json.dumps(node, default=str))
    return {key.split("#")[0] for key in used}


def _load(files: Any) -> dict[str, Any]:
    """The config files, each over those before it."""
    if isinstance(files, str) and not Path(files).is_file() and "," in files:  # as MONAI takes them
        files = files.split(",")
    names = list(files) if isinstance(files, list | tuple) else [files]
    for name in names:
        _check_file(name)
    return ConfigParser.load_config_files(names)


def _check_file(name: Any) -> None:
    """Refuse a config file that is none; MONAI's own sentence names no file."""
    if not isinstance(name, str) or not Path(name).is_file():
        raise NotFoundError(f"config_file '{name}' does not exist: check the path, which starts where you are.")
    try:
        content = ConfigParser.load_config_file(name)
    except Exception as error:  # of many kinds, by the format
        raise InputError(f"config_file '{name}' is no valid JSON or YAML ({error}): correct it there.") from error
    if not isinstance(content, dict):
        raise InputError(f"config_file '{name}' holds no settings by name: write them as {{\"epochs\": 10}}.")


def _named_job(config: dict[str, Any], arguments: Sequence[str], options: dict[str, str]) -> str:
    """The job that a command asks for; what no config file calls one is refused before anything is read, as MONAI would
    only after ``initialize``.
    """
    named = arguments[1] if len(arguments) > 1 and not arguments[1].startswith("--") else "run"
    job = options.get("run_id", named)
    if job in RENAMED and not _is_job(config.get(job)):
        raise InputError(f"The job '{job}' has another name since version 0.10.0: run {RENAMED[job]}.")
    if job not in config:
        jobs = [key for key in config if key not in NO_JOBS and _is_job(config[key])]
        raise InputError(f"The config files have no job '{job}'; those that exist are {', '.join(jobs)}.")
    return job


def _is_job(value: Any) -> bool:
    """Whether a value of a config is a list of expressions, or refers to such a list."""
    return value == "@run" or (isinstance(value, list) and all(str(step).startswith("$") for step in value))


def _check_type(key: str, before: Any, value: Any) -> None:
    """Refuse a text where a config file has a truth value, a number or a list."""
    if not _is_text(value):
        return
    if isinstance(before, bool):
        raise InputError(f"--{key} {value}: write True or False.")
    if isinstance(before, int | float):
        raise InputError(f"--{key} {value}: write a number, such as {before}.")
    if isinstance(before, list):
        raise InputError(f'--{key} {value}: write a list, such as "{before}".')


def _is_text(value: Any) -> bool:
    """Whether a value stays the text that it is, and is no expression, reference or part of another file."""
    return isinstance(value, str) and not value.startswith(("$", "@", "%"))


def _check_values(config: dict[str, Any]) -> None:
    """Refuse values that make no sense where the libraries that get them don't name the key, or accept them."""
    for key, least in LEAST.items():
        if not isinstance(config.get(key), str | None):  # a text was refused before, and expressions are texts
            check_integer(key, config[key], least)
    for key in NOT_NEGATIVE:
        value = config.get(key)
        if _is_text(value) or (isinstance(value, int | float) and value < 0):
            raise InputError(f"{key} is {value!r}, but must be a number, 0 or more.")
    for key in ABOVE_ZERO:
        value = config.get(key)
        if _is_text(value) or (isinstance(value, int | float) and not value > 0):
            raise InputError(f"{key} is {value!r}, but must be a number above 0.")
    for key, example in OBJECTS.items():
        if _is_text(config.get(key)):
            raise InputError(f"{key} is '{config[key]}': write it as Python's, such as \"{example}\".")
    shape = config.get("spatial_shape")
    if isinstance(shape, list):
        for size in shape:
            check_integer("spatial_shape: a size", size, 1)
    elif not isinstance(shape, str | None):
        raise InputError(f'spatial_shape is {shape!r}: give the voxels along each axis, such as "[32, 32, 32]".')


def _find(config: dict[str, Any], key: str) -> Any:
    """The config files' value of a key such as ``train#trainer#amp``; None for an argument that is not given there."""
    parts = key.replace("::", "#").split("#")
    node: Any = config
    for place, part in enumerate(parts):
        section = "#".join(parts[:place])
        if isinstance(node, list):
            if not (part.isdigit() and int(part) < len(node)):
                raise InputError(f"--{key}: '{section}' is a list of {len(node)}: name one by its number, from 0.")
            node = node[int(part)]
            continue
        if not isinstance(node, dict):
            raise InputError(f"--{key}: '{section}' is no section, it is {node!r}.")
        if part not in node:
            may_be_new = section and ("_target_" in node or part.startswith("_"))
            if may_be_new and place == len(parts) - 1:
                return None
            known = [name for name in node if name != "imports"]
            nearest = difflib.get_close_matches(part, known, n=1, cutoff=0.0)[0]
            where = f"'{section}' has no '{part}'" if section else f"no config file has the key '{part}'"
            raise InputError(f"--{key}: {where}; the nearest that exists is '{nearest}'.")
        node = node[part]
    return node


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """The ``--key value`` and ``--key=value`` pairs among the arguments."""
    options: dict[str, str] = {}
    for index, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = arguments[index + 1] if index + 1 < len(arguments) else ""
        options[key] = value
    return options


def _check_reading(key: str, text: str, is_path: bool = False) -> Any:
    """A value as MONAI's command line reads it, which takes ``a,b`` for a list and cuts ``run#2`` short.

    Raises:
        InputError: that is not what was written; of a path, if it became another number, such as 1.1 of 1.10.
    """
    from fire.parser import DefaultParseValue  # MONAI's command line has it; programs of their own need it not

    value = DefaultParseValue(text)
    same = value == _literal(text) and not (is_path and isinstance(value, int | float) and str(value) != text)
    if not same and (is_path or isinstance(value, str)):  # other lists of words need no quotes
        raise InputError(f"--{key} {text} would be read as {value!r}: write it in two quotes, --{key} \"'{text}'\".")
    return value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def save_config(output_dir: str | os.PathLike, config: dict[str, Any]) -> None:
    """Write the config that repeats a run into its folder, as ``config.json``."""
    write_text(Path(output_dir) / "config.json", json.dumps(config, indent=4) + "\n")
