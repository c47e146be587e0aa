"""What the documents name exists: commands, their options, keys and their defaults, links, and shared numbers."""

from __future__ import annotations

import ast
import inspect
import json
import re
import runpy
import shlex
from pathlib import Path

import monai.bundle
import pytest
from conftest import ROOT
from monai.bundle import ConfigParser
from torch.distributed.run import get_args_parser

from scripts.networks import VDVAE
from scripts.utils import command_line
from scripts.utils.settings import MONAI_ARGUMENTS, command_line_config

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]  # the notebook names what is gone
TEXT = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
TRAIN, INFERENCE = ["configs/train.json"], ["configs/inference.json"]
EVALUATE = [*TRAIN, "configs/evaluate.json"]
TOOLS = "torchrun|make|cp|mkdir|sbatch|hd-bet|bet|mri_synthstrip|flirt|antsRegistrationSyN.sh"
COMMAND = re.compile(rf"\s*(?:[A-Z]+=\S+ )*(?:\S*python3?|{TOOLS}) ")
TORCHRUN = {option.lstrip("-") for option in get_args_parser()._option_string_actions}

pytestmark = pytest.mark.filterwarnings("ignore:.* found in sys.modules")  # a command that is imported already


@pytest.fixture(autouse=True)
def in_the_bundle(monkeypatch):
    monkeypatch.chdir(ROOT)


def command_lines(text: str) -> list[list[str]]:
    """The words of each command that stands in an indented or a fenced block, in their order."""
    blocks = re.findall(r"(?:^    .*\n)+|^```(?:sh|bash)\n(?:.*\n)*?```$", text, re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    lines = [part for line in lines for part in re.sub(r"\s# .*", "", line).split(" && ")]
    return [shlex.split(line) for line in lines if COMMAND.match(line)]


def commands() -> list[tuple[str, str, list[str]]]:
    """Document, module and words of every ``python -m`` command, in blocks, tables and sentences."""
    found = []
    for name, text in TEXT.items():
        sentences = re.findall(r"`([^`\n]* -m [^`\n]*)`", text)
        lines = [shlex.split(re.sub(r"\s# .*", "", line)) for line in sentences]
        for words in [*command_lines(text), *lines]:
            for place, word in enumerate(words[:-1]):
                if word == "-m" and words[place + 1].split(".")[0] in ("monai", "scripts", "benchmarks"):
                    found.append((name, words[place + 1], words[place + 2 :]))
    return found


def options(words: list[str]) -> set[str]:
    return {word[2:].split("=")[0] for word in words if word.startswith("--")}


def functions_of(module: str, monkeypatch) -> dict[str, object]:
    """What ``python -m module`` calls, by the words that choose it."""
    given = {}

    def note(program, functions):
        given.update(functions if isinstance(functions, dict) else {"": functions})
        raise SystemExit

    monkeypatch.setattr(command_line, "run", note)
    with pytest.raises(SystemExit):
        runpy.run_module(module, run_name="__main__")
    return given


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


RUNS = [(d, w) for d, module, w in commands() if (module, w[:1]) == ("monai.bundle", ["run"]) and "--config_file" in w]
EXPORTS = [(d, w) for d, module, w in commands() if module == "monai.bundle" and w[0] not in ("run", "...")]
# but one that reads its options by argparse: tests/test_gpu_benchmark.py gives it those of the documents
MODULES = sorted({module for _, module, _ in commands()} - {"monai.bundle", "scripts.NAME", "benchmarks.gpu"})


@pytest.mark.parametrize(("document", "words"), RUNS, ids=lambda value: value if isinstance(value, str) else None)
def test_runs_name_keys_and_jobs_that_exist(document, words, caplog):
    words = ["run" if word == "WORD" else word for word in words if word != "..."]
    place = words.index("--config_file") + 1
    files = ast.literal_eval(words[place]) if words[place].startswith("[") else [words[place]]
    words[place] = str([file for file in files if file != "D/network.json"])
    assert command_line_config(words)  # refuses a key or a job that no config file has
    assert not caplog.records  # of options that change nothing


@pytest.mark.parametrize(("document", "words"), EXPORTS, ids=lambda value: value if isinstance(value, str) else None)
def test_exports_name_arguments_that_monai_has(document, words):
    known = parameters(getattr(monai.bundle, words[0]))
    assert [option for option in options(words) if option not in known and not option.startswith("_meta_#")] == []


@pytest.mark.parametrize("module", MODULES)
def test_commands_name_options_that_exist(module, monkeypatch):
    functions = functions_of(module, monkeypatch)
    for document, name, words in commands():
        if name == module and words:
            function = functions.get("") or functions[words[0]]
            given = options(words) - {"help"}
            if "changes" in parameters(function):  # of keys of a config
                config = ConfigParser(ConfigParser.load_config_files(TRAIN))
                given = {option for option in given if option not in config}
            assert given <= parameters(function), document


def keys_of(files: list[str]) -> set[str]:
    return set(ConfigParser.load_config_files(files))


def test_options_in_sentences_exist(monkeypatch):
    known = keys_of(TRAIN) | keys_of(INFERENCE) | keys_of(EVALUATE) | MONAI_ARGUMENTS | TORCHRUN
    for module in MODULES:
        known |= set().union(*map(parameters, functions_of(module, monkeypatch).values()))
    known |= set().union(*(parameters(getattr(monai.bundle, words[0])) for _, words in EXPORTS))
    for document, text in TEXT.items():
        named = set(re.findall(r"(?<=`)--([\w-]+)|(?<= )--([\w-]+)(?=[^`\n]*`)", text))
        assert {a or b for a, b in named} - known <= {"backend-store-uri", "folder"}, (
            document
        )  # of MLflow and of a test


DEFAULTS = [("docs/clusters.md", TRAIN), ("docs/evaluating.md", EVALUATE), ("docs/completing.md", INFERENCE)]


@pytest.mark.parametrize(("document", "files"), DEFAULTS)
def test_tables_give_the_defaults(document, files):
    config = ConfigParser.load_config_files(files)
    rows = re.findall(r"^\| `(\w+)` \| (None|True|False|[\d.]+) \|", TEXT[document], re.MULTILINE)
    assert len(rows) >= 3
    assert {name: config[name] for name, _ in rows} == {name: ast.literal_eval(value) for name, value in rows}


def test_numbers_of_keys_in_sentences_are_the_defaults():
    config = ConfigParser.load_config_file("configs/train.json")
    found = [pair for text in TEXT.values() for pair in re.findall(r"`(\w+)` = (\d+)", text)]
    assert {"max_skips", "log_interval", "kl_warmup", "average_momentum", "max_grad_norm"} == {
        name for name, _ in found
    }
    for name, value in found:
        assert int(value) == (round(1 / config[name]) if name == "average_momentum" else config[name])


def test_the_names_of_the_published_code_lead_to_keys_that_exist():
    first, second = (
        re.findall(r"^\| `.*", part, re.MULTILINE)
        for part in TEXT["docs/published.md"]
        .split("\n| published | here")[1]
        .split("\n| published | in `network_def` |")
    )
    cells = [row.split("|") for row in first]
    here = {name for row in cells for cell in (row[2], row[5]) for name in re.findall(r"`(\w+)`", cell)}
    assert len(here) == 24 and here - keys_of(TRAIN) == {"CUDA_VISIBLE_DEVICES"}
    names = {name for row in second for name in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert names - {"sigmoid", "exp"} <= parameters(VDVAE) and len(second) == 15


@pytest.mark.parametrize("document", TEXT)
def test_links_lead_somewhere(document):
    def anchors(text: str) -> set[str]:
        headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}

    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[document]):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = (ROOT / document).parent / file if file else ROOT / document
            assert path.exists(), target
            assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_files_that_the_documents_name_exist():
    for path in re.findall(r"`(\w+/\w+\.py)`", TEXT["docs/code.md"]):
        assert (ROOT / "scripts" / path).is_file(), path
    for path in re.findall(r"`((?:configs|scripts|docs|benchmarks)/[\w./]*)`", "".join(TEXT.values())):
        assert (ROOT / path).exists(), path


def test_the_numbers_of_the_weights_are_the_same_everywhere():
    metadata = json.loads(Path("configs/metadata.json").read_text())
    table = TEXT["docs/README.md"].split("## Performance")[1].split("### At 128³")[0]

    def numbers(measure: str) -> list[float]:
        (row,) = re.findall(rf"^\| {measure}.*? \| (.*?) \|", table, re.MULTILINE)
        return [float(number) for number in re.findall(r"-?\d+\.\d+", row)]

    assert metadata["eval_metrics"] == {name: numbers(f"`{name}`")[0] for name in metadata["eval_metrics"]}
    assert metadata["network_data_format"]["inputs"]["image"]["spatial_shape"] == [64, 64, 64]
