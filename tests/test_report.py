"""The page that a job writes beside its results."""

from __future__ import annotations

import re
import shutil

import torch
from conftest import inference_config, run_bundle
from matplotlib.figure import Figure

from scripts.utils.report import MOST_COLUMNS, MOST_ROWS, write_report


def test_a_page_holds_all_that_it_shows(tmp_path):
    Figure((1, 1)).savefig(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("image,value\n<b>.nii,1\n")
    path = write_report(
        tmp_path, "score", "1 scan.", [tmp_path / "t.csv", tmp_path / "none.csv"], [tmp_path / "a.png"], {"seed": 3}
    )
    text = path.read_text()
    assert "&lt;b&gt;.nii" in text  # names of files are no HTML
    assert "data:image/png;base64," in text
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing is loaded from elsewhere
    assert "<script" not in text
    assert "Scans that failed" not in text


def test_long_tables_are_cut_and_say_so(tmp_path):
    header = ",".join(f"c{i}" for i in range(MOST_COLUMNS + 2))
    row = ",".join(["1"] * (MOST_COLUMNS + 2))
    (tmp_path / "t.csv").write_text("\n".join([header, *[row] * (MOST_ROWS + 3)]) + "\n")
    text = write_report(tmp_path, "score", "", [tmp_path / "t.csv"]).read_text()
    assert text.count("<tr><td>") == MOST_ROWS
    assert "5 more rows and columns: see t.csv" in text


def test_each_job_writes_one(cohort, tmp_path):
    (tmp_path / "scans").mkdir()
    for number, path in enumerate(sorted(cohort.glob("*.nii.gz"))[:2]):
        shutil.copy(path, tmp_path / "scans" / f"sub-{number}_T1w.nii.gz")
    (tmp_path / "scans" / "sub-9_T1w.nii.gz").write_bytes(b"no scan")
    torch.manual_seed(0)
    torch.save(inference_config().get_parsed_content("network_def").state_dict(), tmp_path / "model.pt")
    words = ("--dataset_dir", tmp_path / "scans", "--ckpt", tmp_path / "model.pt", "--output_dir", tmp_path / "out")
    configs = ["configs/inference.json", "tests/tiny.json"]
    assert run_bundle(*words, run_id="score", configs=configs).returncode == 1
    text = (tmp_path / "out" / "report.html").read_text()
    assert "2 of 3 scan(s) have results" in text
    assert "Scans that failed" in text and "sub-9_T1w.nii.gz" in text
    assert text.count("data:image/png;base64,") == 3  # two scans, and the most unusual ones
    assert "bits_per_dim" in text and "<h2>scores.csv</h2>" in text
