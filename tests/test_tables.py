"""Tables of results: which scan a row is of, and what the data set says of its subject."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest

from scripts.inference.tables import ScanColumns, list_coordinates
from scripts.inference.training_run import TrainedScans, TrainingRun

ITEMS = ("sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz")


@pytest.fixture
def data_set(tmp_path):
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsex\tkl\nsub-01\t63\tF\tx\nsub-03\tn/a\tM\ty\n")
    items = [
        {"image": str(tmp_path / name), "subject": name.split("/")[0], "session": name.split("/")[1]} for name in ITEMS
    ]
    return tmp_path, items


def read(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_says_which_scan_it_is_of(data_set):
    root, items = data_set
    columns = ScanColumns(items, root)
    columns.write(root / "table.csv", ((item["image"], {"kl": 1.5}) for item in items))
    first, second = read(root / "table.csv")
    expected = {"image": ITEMS[0], "subject": "sub-01", "session": "ses-1", "age": "63", "sex": "F"}
    assert first == expected | {"participant_kl": "x", "kl": "1.5"}
    assert (second["subject"], second["age"], second["sex"]) == ("sub-02", "", "")
    assert list(first)[:3] == ["image", "subject", "session"] and list(first)[-1] == "kl"


def test_numbers_may_come_first(data_set):
    root, items = data_set
    ScanColumns(items, root).write(root / "table.csv", [(items[0]["image"], {"c000": 1, "c001": 2})], last=True)
    assert list(read(root / "table.csv")[0])[:4] == ["image", "c000", "c001", "subject"]


def test_a_number_stands_under_its_name(data_set):
    """Though a row, such as one that an earlier version left, has others or has them in another order."""
    root, items = data_set
    rows = zip((item["image"] for item in items), ({"x": 1, "y": 2}, {"y": 4, "z": 5}), strict=True)
    ScanColumns(items, root).write(root / "table.csv", rows)
    assert [(row["x"], row["y"]) for row in read(root / "table.csv")] == [("1", "2"), ("", "4")]


def test_scans_without_subjects_have_their_path_alone(tmp_path):
    ScanColumns([{"image": str(tmp_path / "a.nii")}], tmp_path).write(
        tmp_path / "table.csv", [(str(tmp_path / "a.nii"), {"x": 1})]
    )
    assert read(tmp_path / "table.csv") == [{"image": "a.nii", "x": "1"}]
    ScanColumns([], tmp_path).write(tmp_path / "empty.csv", [])
    assert (tmp_path / "empty.csv").read_text().strip() == "image"


def test_scans_that_were_trained_on_are_marked(data_set, tmp_path):
    root, items = data_set
    run = TrainingRun(None)
    (tmp_path / "datalist.json").write_text(json.dumps({"training": items[:1]}))
    run.trained = TrainedScans(tmp_path / "datalist.json")
    columns = ScanColumns(items, root, training_run=run)
    assert [columns(item["image"])["trained_on"] for item in items] == ["yes", "no"]


def test_coordinates_keep_the_folders_of_their_scans(tmp_path):
    (tmp_path / "c.csv").write_text("image,c000\n101/T1.nii.gz,1\n102/T1.nii.gz,2\n../T1.nii.gz,3\n,4\n")
    rows = list_coordinates(tmp_path / "c.csv", "out", SimpleNamespace(factors=1))
    assert [row["image"] for row in rows] == ["out/101/T1.nii.gz", "out/102/T1.nii.gz", "out/T1.nii.gz", "out/unnamed"]
