"""The commands of each page, run one after the other in a copy of the bundle with a tiny network, as a newcomer does.

Names that stand for a reader's own files (``DIR``, ``HEADS``, ``OUT``) are folders of these names in the copy.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run_command
from test_docs import TEXT, command_lines
from test_prepare import QUICK

from scripts.data import registration
from scripts.inference import detection, familiar

# what the tests cannot run, by a pattern of "page: command"
NOT_RUN = {
    r": make ": "installs from the internet",
    r"sbatch |: (?:hd-bet|bet|mri_synthstrip|flirt|antsReg)": "a cluster's, and other tools'",
    r"torchrun .*nproc_per_node": "several processes: tests/test_distributed.py",
    r"scripts\.explore": "a server: tests/test_explore.py",
    r"benchmarks\.|performance\.md|data/sites|data/people|data/others|output/people": "measures for minutes to days",
    r"phantoms\.md": "256 phantoms: tests/test_phantoms.py",
    r"size_(?:64|128)|[a-z]+_128|published\.md": "a network of hours, and checkpoints that nobody has here",
    r"LIST\.json|NSK\.json": "how weights that are there were made, of scans that are not",
    r"ckpt_export|onnx_export|trt_export|verify_net": "tests/test_export.py, and TensorRT",
    r"scripts\.release|download_large_files": "tests/test_release.py",
    r"mlflow\.json": "a tracking server: tests/test_clients.py",
    r"cohorts\.md": "files and processes of several sites: tests/test_cohorts.py",
    r"ch2\.nii\.gz|inference\.md: .*prepare HEADS": "a head of a Debian package",
    r"README\.md: .*prepare DIR|preparing\.md: .*raw|familiar\.md: .*prepare": "seconds for each scan",
}
WORDS = ("reconstruct", "encode", "sample", "interpolate", "score", "fit_prior")  # that need no option
KINDS = "{'age': 'continuous', 'sex': 'categorical', 'site': 'categorical'}"


def lines(page: str) -> list[list[str]]:
    """The words of a page's commands; README.md's with WORD once for each job, another page's with the first."""
    jobs = WORDS if page == "README.md" else WORDS[:1]
    return [
        [word if other == "WORD" else other for other in words]
        for words in command_lines(TEXT[page])
        for word in (jobs if "WORD" in words else [""])
    ]


def is_run(page: str, words: list[str]) -> bool:
    return not any(re.search(pattern, f"{page}: {' '.join(words)}") for pattern in NOT_RUN)


PAGES = [page for page in TEXT if any(is_run(page, words) for words in lines(page))]


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory) -> Path:
    """The bundle with configs, weights and priors of a tiny network, and scans under the names of the documents."""
    from scripts.phantoms import make_brains

    bundle = tmp_path_factory.mktemp("docs") / "bundle"
    shutil.copytree(ROOT / "configs", bundle / "configs")
    shutil.copytree(ROOT / "docs" / "examples", bundle / "docs" / "examples")
    tiny = json.loads((ROOT / "tests" / "tiny.json").read_text())
    for path in (bundle / "configs").glob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if "network_def" in config:
            config |= {key: value for key, value in tiny.items() if key.split("#")[0] in config}
            config |= {"network#augmented": False} if "epochs" in config else {}  # as in quick_start.json
        elif "network_def#channels" in config:  # an overlay
            config = {key: tiny.get(key, value) for key, value in config.items()}
            config |= {"batch_size": 1} if "weights" in config else {}  # the heads are two
        if "phantom_dir" in config:
            config |= {"cohort#dataset_dir#spacing": 16.0, "phantom_count": 3} if "cohort" in config else {}
        path.write_text(json.dumps(config))
    how = {"contrast": "T1w", "covariates": True, "lesions": 0.5, "mask_dir": bundle / "MASKS"}
    make_brains(bundle / "DIR", 6, spacing=16.0, workers=1, **how)
    table = pd.read_csv(bundle / "DIR" / "participants.tsv", sep="\t")
    table["age"] = [20.0, 35.0, 50.0, 65.0, 80.0, 85.0]  # the pages ask for all of these
    table.to_csv(bundle / "DIR" / "participants.tsv", sep="\t", index=False)
    for name in ("aligned", "prepared"):
        shutil.copytree(bundle / "DIR", bundle / name)
    (bundle / "HEALTHY").mkdir()
    table = (bundle / "DIR" / "participants.tsv").read_text(encoding="utf-8").splitlines()
    for number, row in enumerate(itertools.islice(itertools.cycle(table[1:]), 20)):  # others, of other names
        scan, known = row.split("\t", 1)
        image = nib.load(bundle / "DIR" / f"{scan}_T1w.nii.gz")
        brighter = nib.Nifti1Image(image.get_fdata(dtype=np.float32) * (1.1 + number / 100), image.affine)
        nib.save(brighter, bundle / "HEALTHY" / f"sub-1{number:03d}_T1w.nii.gz")
        table.append(f"sub-1{number:03d}\t{known}")
    (bundle / "HEALTHY" / "participants.tsv").write_text("\n".join([table[0], *table[7:]]) + "\n")
    make_brains(bundle / "HEADS", 2, spacing=8.0, contrast="T1w", covariates=True, workers=1)
    people = (bundle / "HEADS" / "participants.tsv").read_text(encoding="utf-8")
    (bundle / "HEADS" / "participants.tsv").write_text(re.sub(r"\t[ABC]\n", "\tOURS\n", people))
    scans = [{"image": path.name} for path in sorted((bundle / "prepared").glob("*.nii.gz"))]
    (bundle / "prepared" / "datalist.json").write_text(json.dumps({"training": scans[:-1], "validation": scans[-1:]}))
    for name, scan in zip(("a", "b"), scans, strict=False):  # two scans of no folder
        shutil.copy(bundle / "prepared" / scan["image"], bundle / f"{name}.nii.gz")
    atlas = nib.load(bundle / "a.nii.gz")
    regions = np.rint(3 * atlas.get_fdata() / atlas.get_fdata().max())
    nib.save(nib.Nifti1Image(regions, atlas.affine), bundle / "ATLAS.nii.gz")
    training = ["--dataset_dir", "DIR", "--output_dir", "OUT", "--covariates", KINDS]
    ended = run_command("monai.bundle", "run", "training", "--config_file", "configs/train.json", *training, cwd=bundle)
    assert ended.returncode == 0, ended.stderr
    (bundle / "models").mkdir()
    for kind in ("", "_phantoms_32"):
        for name in ("model", "population_prior"):
            shutil.copy(bundle / "OUT" / "checkpoints" / f"{name}.pt", bundle / "models" / f"{name}{kind}.pt")
    return bundle


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_in_its_order(page, tiny_bundle, tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    monkeypatch.setattr(familiar, "INFERENCE", folder / "configs" / "inference.json")  # that beside the code
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)  # heads are aligned in this process, and quickly, to 6 mm
    for name, value in QUICK.items():
        monkeypatch.setattr(registration, name, value)
    monkeypatch.setattr(detection, "resampled", lambda sick, count, draw=detection.resampled: draw(sick, 100))
    shutil.copytree(tiny_bundle, folder)
    if any("OUT" in words and "training" in words for words in lines(page)):
        shutil.rmtree(folder / "OUT")  # the page makes it
    for words in lines(page):
        if is_run(page, words):
            words = ["6" if before == "--spacing" else word for before, word in itertools.pairwise(["", *words])]
            if "-m" in words:
                place = words.index("-m")
                ended = run_command(*words[place + 1 :], cwd=folder)
            else:
                ended = subprocess.run(words, cwd=folder, capture_output=True, text=True, encoding="utf-8")
            assert ended.returncode == 0, f"{' '.join(words)}\n{ended.stdout}\n{ended.stderr}"


def test_what_is_not_run_is_there():
    all_lines = [f"{page}: {' '.join(words)}" for page in TEXT for words in lines(page)]
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in all_lines)] == []
