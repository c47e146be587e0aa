"""What a training run left in its folder, for jobs that go on with it: settings, weights, and which scans it saw."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from scripts.data.datalist import check_item
from scripts.networks import VDVAE
from scripts.utils.errors import InputError, NotFoundError
from scripts.utils.files import expand, read_json
from scripts.utils.names import item_path

INFERENCE = Path(__file__).parents[2] / "configs" / "inference.json"
TRAINING = INFERENCE.with_name("train.json")
DEFAULTS = {"scan_pattern": "*.nii*", "keep_aspect": True, "percentiles": [0.05, 99.95]}  # without a run


class TrainedScans:
    """The scans that a run was trained on, and their subjects.

    Args:
        datalist: path of the run's ``datalist.json``.

    Attributes:
        items: of the datalist's ``training`` side.
    """

    def __init__(self, datalist: str | os.PathLike) -> None:
        training = read_json(datalist, "the datalist of a run").get("training")
        if not isinstance(training, list) or not training:
            raise InputError(f"'{datalist}' does not say which scans were trained on: take that of the run.")
        for place, item in enumerate(training):
            check_item(item, f"'{datalist}', item {place} (from 0) of 'training'")
        self.items: list[dict[str, Any]] = training
        self._files = {os.path.realpath(expand(item_path(item))) for item in training}
        # a subject's name tells who it is within one data set alone
        self._root = os.path.commonpath([_folder(item) for item in training])
        self._subjects = {item["subject"] for item in training if "subject" in item}

    def knows(self, item: Mapping[str, Any]) -> str:
        """``"yes"`` for a scan that was trained on, ``"subject"`` for another scan of such a subject, else ``"no"``."""
        if os.path.realpath(expand(item_path(item))) in self._files:
            return "yes"
        return "subject" if item.get("subject") in self._subjects and _folder(item).is_relative_to(self._root) else "no"


def _folder(item: Mapping[str, Any]) -> Path:
    """The folder of an item's first file, which may be a link to one elsewhere, as in a DataLad data set."""
    return Path(os.path.realpath(Path(expand(item_path(item))).parent))


class TrainingRun:
    """A finished or running training run, as its folder tells of it; or none, which leaves every setting as it is.

    Args:
        run_dir: the ``output_dir`` of the run; None for no run.

    Raises:
        NotFoundError: there is no run in that folder.
        InputError: ``config.json`` is damaged, or the run's preprocessing is not that of inference.
    """

    def __init__(self, run_dir: str | os.PathLike | None) -> None:
        self.folder = None if run_dir is None else Path(expand(run_dir))
        self.datalist: str | None = None
        self.trained: TrainedScans | None = None
        if self.folder is None:
            return
        path = self.folder / "config.json"
        if not path.is_file():
            raise NotFoundError(
                f"run_dir '{self.folder}' holds no config.json: set --run_dir to the output_dir of a training run."
            )
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
        names, expected = _transforms(self._parser), _transforms(ConfigParser.load_config_file(str(INFERENCE)))
        if names != expected:
            raise InputError(
                f"The run in run_dir '{self.folder}' preprocessed its scans by {', '.join(names)}, not by "
                f"{', '.join(expected)}, as configs/inference.json does: leave out --run_dir, and give weights, "
                "network and preprocessing by an overlay."
            )

    @property
    def ckpt(self) -> str | None:
        """The weights that the run keeps, their moving average; None without a run.

        Raises:
            FileNotFoundError: it has saved none.
        """
        if self.folder is None:
            return None
        default = self.folder / "checkpoints"
        folder = default if default.is_dir() else Path(expand(self._parser.get_parsed_content("ckpt_dir")))
        path = folder / "model.pt"
        if not path.is_file():
            raise NotFoundError(
                f"The run in run_dir '{self.folder}' has left no weights in '{folder}': has it come to the end of an "
                "epoch? --ckpt names weights elsewhere."
            )
        return str(path)

    def get(self, key: str, given: Any) -> Any:
        """A setting, such as ``scan_pattern``: the value that was given, else the run's, else the default."""
        if given is not None:
            return given
        of_run = None if self.folder is None else self._parser.get(key)
        return DEFAULTS[key] if of_run is None else self._parser.get_parsed_content(key)

    def network(self, given: VDVAE) -> VDVAE:
        """An untrained network of the run's architecture and the class of ``given``, which must be the run's or that of
        the bundle; that one without a run.
        """
        if self.folder is None:
            return given
        network = type(given)(**_arguments(self._parser))
        defaults = [_default_arguments(type(given), config) for config in (INFERENCE, TRAINING)]
        if given.arguments not in (network.arguments, *defaults):
            raise InputError(
                f"network_def or spatial_shape is given, but the run in run_dir '{self.folder}' says them: leave out "
                "one of the two."
            )
        return network

    def knows(self, item: Mapping[str, Any]) -> str:
        """Whether the run was trained on a scan, see :meth:`TrainedScans.knows`; empty where that is not known."""
        return "" if self.trained is None else self.trained.knows(item)


NO_RUN = TrainingRun(None)


def _transforms(config: ConfigParser | dict[str, Any]) -> list[str]:
    """The classes of a config's preprocessing."""
    parser = config if isinstance(config, ConfigParser) else ConfigParser(config)
    steps = parser.get("preprocessing#transforms", [])
    # by a reference to what has a name, since version 0.10.0
    transforms = [parser.get(step[1:], {}) if isinstance(step, str) else step for step in steps]
    return [str(transform.get("_target_", "")).rpartition(".")[2] for transform in transforms]


def _arguments(parser: ConfigParser) -> dict[str, Any]:
    """Those of a config's network."""
    return parser.get_parsed_content("network_def", instantiate=False).resolve_args()


def _default_arguments(kind: type[VDVAE], config: Path) -> dict[str, Any]:
    """Those of the network that a config of the bundle has where nothing is said."""
    content = ConfigParser.load_config_file(str(config))
    shown = {key: content[key] for key in ("spatial_shape", "network_def")}
    return kind(**_arguments(ConfigParser(shown))).arguments
