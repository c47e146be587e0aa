"""What a training run left in its folder, for jobs that go on with it: settings, weights, and which scans it saw."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from scripts.networks import VDVAE
from scripts.utils.errors import InputError, NotFoundError
from scripts.utils.names import item_path
from scripts.utils.settings import given_keys

__all__ = ["TrainedScans", "TrainingRun"]

FROM_THE_RUN = ("network_def", "spatial_shape")  # keys that cannot be given beside run_dir
TRANSFORMS = ("LoadScand", "CheckScand", "Orientationd", "FitShaped", "RobustScaled")  # of inference's preprocessing


class TrainedScans:
    """The scans that a run was trained on, and their subjects.

    Args:
        datalist: path of the run's ``datalist.json``.
    """

    def __init__(self, datalist: str | os.PathLike) -> None:
        training = json.loads(Path(datalist).read_text(encoding="utf-8"))["training"]
        self._paths = {absolute_path(item) for item in training}
        # a subject's name tells who it is within one data set alone
        self._root = os.path.commonpath([Path(path).parent for path in self._paths])
        self._subjects = {item["subject"] for item in training if "subject" in item}

    def knows(self, item: Mapping[str, Any]) -> str:
        """``"yes"`` for a scan that was trained on, ``"subject"`` for another scan of such a subject, else ``"no"``."""
        path = absolute_path(item)
        if path in self._paths:
            return "yes"
        return "subject" if item.get("subject") in self._subjects and Path(path).is_relative_to(self._root) else "no"


def absolute_path(item: Mapping[str, Any]) -> str:
    """The absolute path of a datalist item's first file."""
    return str(Path(item_path(item)).expanduser().absolute())


class TrainingRun:
    """A finished or running training run, as its folder tells of it; or none, which leaves every setting as it is.

    Args:
        run_dir: the ``output_dir`` of the run; None for no run.

    Raises:
        FileNotFoundError: there is no run in that folder.
        ValueError: ``config.json`` is damaged, or the command line gives what the run says.
    """

    def __init__(self, run_dir: str | os.PathLike | None) -> None:
        self.folder = None if run_dir is None else Path(run_dir).expanduser()
        self.datalist: str | None = None
        self.trained: TrainedScans | None = None
        if self.folder is None:
            return
        path = self.folder / "config.json"
        if not path.is_file():
            raise NotFoundError(
                f"run_dir '{self.folder}' holds no config.json: set --run_dir to the output_dir of a training run."
            )
        both = [key for key in given_keys() if key.split("#")[0] in FROM_THE_RUN]
        if both:
            raise InputError(f"--{both[0]}: the run in run_dir '{self.folder}' says it; leave out one of the two.")
        try:
            config = ConfigParser.load_config_files(str(path))  # with keys such as network_def#channels in their place
            config.pop("imports", None)  # its modules need not be those of today
            self._parser = ConfigParser(config)
        except (ValueError, AttributeError) as error:
            raise InputError(f"'{path}' is damaged ({error}): give the run's settings without --run_dir.") from error
        self._check_preprocessing()
        datalist = self.folder / "datalist.json"
        if datalist.is_file():
            self.datalist, self.trained = str(datalist), TrainedScans(datalist)

    def _check_preprocessing(self) -> None:
        steps = self._parser.get("preprocessing#transforms", [])
        # by a reference to what has a name, since version 0.10.0
        transforms = [self._parser.get(step[1:], {}) if isinstance(step, str) else step for step in steps]
        names = tuple(str(transform.get("_target_", "")).rpartition(".")[2] for transform in transforms)
        if names != TRANSFORMS:
            raise InputError(
                f"The run in run_dir '{self.folder}' preprocessed its scans by {', '.join(names)}, not by "
                f"{', '.join(TRANSFORMS)}: leave out --run_dir, and give weights, network and preprocessing by an "
                "overlay."
            )

    @property
    def ckpt(self) -> str | None:
        """The weights that the run keeps, their moving average; None without a run.

        Raises:
            FileNotFoundError: it has saved none.
        """
        if self.folder is None:
            return None
        usual = self.folder / "checkpoints"
        folder = usual if usual.is_dir() else Path(self._parser.get_parsed_content("ckpt_dir"))
        path = folder / "model.pt"
        if not path.is_file():
            raise NotFoundError(
                f"The run in run_dir '{self.folder}' has left no weights in '{folder}': has it come to the end of an "
                "epoch? --ckpt names weights elsewhere."
            )
        return str(path)

    def get(self, key: str, default: Any) -> Any:
        """The run's value of a key of the config; ``default`` without a run, or where the command line gives the key.

        Args:
            key: such as ``scan_pattern`` or ``preprocessing#transforms#4#lower``.
        """
        if self.folder is None or key in given_keys():
            return default
        return self._parser.get_parsed_content(key) if self._parser.get(key) is not None else default

    def network(self, default: VDVAE) -> VDVAE:
        """An untrained network of the run's architecture and the class of ``default``; that one without a run."""
        if self.folder is None:
            return default
        arguments = self._parser.get_parsed_content("network_def", instantiate=False).resolve_args()
        return type(default)(**arguments)

    def knows(self, item: Mapping[str, Any]) -> str:
        """Whether the run was trained on a scan, see :meth:`TrainedScans.knows`; empty where that is not known."""
        return "" if self.trained is None else self.trained.knows(item)
