"""Listing scans and splitting them by subject."""

import json
import random
import re
import time
from pathlib import Path

import pytest

from scripts.data.datalist import (
    check_batch_size,
    common_root,
    list_sides,
    make_datalist,
    session_name,
    split_by_subject,
    subject_rule,
    write_datalist,
)
from scripts.data.find import find_scans
from scripts.utils.files import as_folder, expand


def make_files(root: Path, names) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def names_of(side, root):
    return [Path(item["image"]).relative_to(root).as_posix() for item in side]


BIDS = [f"sub-{s:02d}/ses-{v}/anat/sub-{s:02d}_ses-{v}_FLAIR.nii.gz" for s in range(10) for v in (1, 2)]

PATTERNS = [
    ("*.nii*", ["a.nii", "b/c/d_FLAIR.nii.gz", "b/e_T1.nii.gz"]),
    ("*.nii.gz", ["b/c/d_FLAIR.nii.gz", "b/e_T1.nii.gz"]),
    ("*_FLAIR.nii.gz", ["b/c/d_FLAIR.nii.gz"]),
    ("**/*.nii", ["a.nii"]),
    ("b/*.nii.gz", ["b/e_T1.nii.gz"]),
    ("b/*/*", ["b/c/d_FLAIR.nii.gz"]),
    ("[de]_*.nii.gz", ["b/c/d_FLAIR.nii.gz", "b/e_T1.nii.gz"]),
    ("c/", ["b/c"]),
]


@pytest.mark.parametrize(("scan_pattern", "expected"), PATTERNS)
def test_find_scans_by_pattern_at_any_depth(tmp_path, scan_pattern, expected):
    make_files(tmp_path, ["a.nii", "b/c/d_FLAIR.nii.gz", "b/e_T1.nii.gz", "b/notes.txt", "b/._a.nii", ".hidden/x.nii"])
    assert find_scans(tmp_path, scan_pattern) == [tmp_path / name for name in expected]


def test_find_scans_follows_a_link_once(tmp_path):
    make_files(tmp_path / "elsewhere", ["a.nii"])
    make_files(tmp_path / "scans", ["b.nii"])
    (tmp_path / "scans/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "scans")
    assert find_scans(tmp_path / "scans") == [tmp_path / "scans/b.nii", tmp_path / "scans/linked/a.nii"]


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dataset_dir '.*nowhere' does not exist: set --dataset_dir"):
        find_scans(tmp_path / "nowhere")


def test_not_a_folder(tmp_path):
    make_files(tmp_path, ["scan.nii"])
    with pytest.raises(NotADirectoryError, match=r"dataset_dir '.*scan.nii' is not a folder: set --dataset_dir"):
        find_scans(tmp_path / "scan.nii")


def test_no_match_counts_the_files_and_shows_one(tmp_path):
    make_files(tmp_path, ["b/x.nii.gz", "c.txt"])
    with pytest.raises(
        FileNotFoundError, match=r"scan_pattern '\*.mha' matches none of the 2 file.*such as 'b/x.nii.gz'"
    ):
        find_scans(tmp_path, "*.mha")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"dataset_dir '.*empty' has no files: set --dataset_dir"):
        find_scans(tmp_path / "empty")


@pytest.mark.parametrize(("pattern", "said"), [("", "names no file"), ("a/**/*.nii", "has \\*\\* after a folder")])
def test_patterns_that_mean_nothing(tmp_path, pattern, said):
    with pytest.raises(ValueError, match=f"scan_pattern '.*' {said}"):
        find_scans(tmp_path, pattern)


SUBJECTS = [
    ("sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-01"),
    ("derivatives/brain_sub-AB2_FLAIR.nii.gz", "sub-AB2"),
    ("mwp1sub-01_ses-1_T1w.nii", "sub-01"),
    ("mri/wsub-02_T1w.nii", "sub-02"),
    ("allsub-a/101.nii", "101"),
    ("sub-UCL-001/ses-1/sub-UCL-001_T1w.nii.gz", "sub-UCL-001"),
    ("sub-01_ses-1/sub-01_ses-1_T1w.nii.gz", "sub-01"),
    ("1234567_20253_2_0.nii.gz", "1234567"),
    ("1234567_20253_3_0/T2_FLAIR/T2_FLAIR_brain.nii.gz", "1234567"),
    ("folder/IXI012-HH-1211.nii.gz", "IXI012-HH-1211"),
    ("scan_3.v2.nii", "scan_3"),
]


@pytest.mark.parametrize(("name", "subject"), SUBJECTS)
def test_subject_name(name, subject):
    assert subject_rule([name])[0] == [subject]


def test_labels_that_bids_does_not_allow_are_named(tmp_path, caplog):
    names = ["sub-UCL-001_T1w.nii", "sub-UCL-002_T1w.nii", "sub-1_ses-2020+05_T1w.nii", "sub-2/ses-2020+05/T1w.nii"]
    items = list_sides(make_files(tmp_path, names))[0]["training"]
    assert [item["subject"] for item in items] == ["sub-1", "sub-2", "sub-UCL", "sub-UCL"]
    assert [item.get("session") for item in items] == ["ses-2020", "ses-2020+05", None, None]
    (said,) = caplog.messages
    assert said.startswith("3 label(s) hold a hyphen or +")
    assert "'sub-1_ses-2020+05_T1w.nii', which is read as 'ses-2020'" in said
    caplog.clear()
    listed = [{"image": name, "subject": name} for name in names]
    (tmp_path / "list.json").write_text(json.dumps({"training": listed}), encoding="utf-8")
    assert list_sides(tmp_path / "list.json")[0]["training"][0]["subject"] == names[0] and not caplog.messages


def test_sessions_of_a_subject_stay_together(tmp_path):
    datalist = make_datalist(make_files(tmp_path, BIDS), train_fraction=0.7)
    sides = [set(subject_rule(names_of(datalist[s], tmp_path))[0]) for s in ("training", "validation")]
    assert [len(side) for side in sides] == [7, 3]
    assert not sides[0] & sides[1]
    assert len(datalist["training"]) == 14


def test_split_depends_on_the_seed_and_the_names_alone(tmp_path):
    shuffled = random.Random(1).sample(BIDS, len(BIDS))
    one, two = make_files(tmp_path / "one", BIDS), make_files(tmp_path / "two", shuffled)

    def sides(root, seed):
        return [names_of(side, root) for side in make_datalist(root, train_fraction=0.7, seed=seed).values()]

    assert sides(one, 3) == sides(two, 3)
    assert len({str(sides(one, seed)) for seed in range(5)}) > 1


def test_one_name_for_all_files_makes_the_folder_the_subject():
    names = [f"cohort/{s}/v{v}/T1.nii.gz" for s in (101, 102) for v in (1, 2)]
    training, validation = split_by_subject(names, subject_rule(names)[0], 0.5)
    assert sorted([training, validation]) == [[0, 1], [2, 3]]


VISITS = [f"{subject}/visit{visit}.nii.gz" for subject in (101, 102, 103) for visit in (1, 2)]
LAYOUTS = [
    (VISITS, ["101", "101", "102", "102", "103", "103"], "by their folders, such as '101'"),
    (["101/101_v1.nii", "101/101_v2.nii", "102/102_v1.nii"], ["101", "101", "102"], "by their folders"),
    (["T1/101.nii", "T1/102.nii", "T1/103.nii", "FLAIR/101.nii"], ["101", "102", "103", "101"], "recur in several"),
    ([f"site{s}/{i}.nii" for s in "ab" for i in range(21 * (s == "b"), 21 + 21 * (s == "b"))], None, "by their file"),
    (["a.nii", "b.nii"], ["a", "b"], "by their file names"),
    ([f"images/{i}.nii" for i in range(9)] + ["more/9.nii"], [str(i) for i in range(10)], "by their file names"),
    (["x/101/s1/T1.nii", "x/101/s2/T1.nii", "x/102/s1/T1.nii"], ["101", "101", "102"], "by their folders"),
    (
        ["sub-1/T1.nii", "7/T1.nii", "8/T1.nii"],
        ["sub-1", "7", "8"],
        "by their BIDS or UK Biobank names, 2 by their folders",
    ),
]


@pytest.mark.parametrize(("names", "subjects", "rule"), LAYOUTS)
def test_where_names_leave_room_for_doubt_more_scans_are_kept_together(names, subjects, rule):
    found, said = subject_rule(names)
    assert found == (subjects or [Path(name).stem for name in names])
    assert rule in said


def test_no_subject_is_on_both_sides_and_the_log_says_how_they_are_told(tmp_path, caplog):
    make_files(tmp_path, VISITS)
    with caplog.at_level("INFO"):
        datalist = make_datalist(tmp_path, train_fraction=0.6)
    assert {item["subject"] for side in datalist.values() for item in side} == {"101", "102", "103"}
    assert "6 scan(s); subjects are recognised by their folders" in caplog.text
    assert caplog.messages[1:] == ["Training: 4 scans of 2 subjects.", "Validation: 2 scans of 1 subject."]
    for number in range(20):
        make_files(tmp_path, [f"2{number:02d}/scan.nii.gz"])
    with caplog.at_level("INFO"):
        make_datalist(tmp_path, train_fraction=0.96)
    assert caplog.messages[-1].endswith("of whom numbers say little: --train_fraction 0.8 holds out 5.")
    content = {"training": [{"image": VISITS[0]}, {"image": VISITS[2]}], "validation": [{"image": VISITS[1]}]}
    (tmp_path / "both.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has 1 subject\\(s\\) both in 'training' and in 'validation', such as '101'"):
        make_datalist(tmp_path / "both.json")
    for number, item in enumerate([*content["training"], *content["validation"]]):
        item["subject"] = str(number)
    (tmp_path / "both.json").write_text(json.dumps(content))
    assert len(make_datalist(tmp_path / "both.json")["training"]) == 2


def test_a_scan_that_a_side_names_twice_is_refused(tmp_path):
    """It would count as two people."""
    images = ["a.nii.gz", "b.nii.gz", str(tmp_path / "a.nii.gz")]
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": image} for image in images]}))
    with pytest.raises(ValueError, match=r"The 'training' of dataset_dir '.*' names '.*a\.nii\.gz' 2 times: leave one"):
        make_datalist(tmp_path / "list.json")


def test_results_among_the_scans_are_no_scans(tmp_path, caplog):
    results = [
        "a_recon.nii.gz",
        "out/a_recon_to4.nii.gz",
        "out/a_anomaly.nii.gz",
        "out/a_deviation.nii.gz",
        "out/a_expected.nii.gz",
        "out/a_counterfactual.nii.gz",
        "out/a_difference_age-80.nii.gz",
        "out/a_harmonised_site-Old town.nii.gz",
        "out/a_desc-counterfactualage80_T1w.nii.gz",
        "run/figures/sample_temperature=1_0.nii.gz",
    ]
    make_files(tmp_path, ["a.nii.gz", "b.nii.gz", "c_reconstructed.nii.gz", *results])
    assert [path.name for path in find_scans(tmp_path)] == ["a.nii.gz", "b.nii.gz", "c_reconstructed.nii.gz"]
    assert (
        "10 file(s) are left out, since they are named as results of this bundle, such as 'a_recon.nii.gz'"
        in caplog.text
    )
    assert [path.name for path in find_scans(tmp_path, "*_recon.nii.gz")] == ["a_recon.nii.gz"]


def test_names_in_capitals_are_not_passed_over_silently(tmp_path, caplog):
    make_files(tmp_path, ["a.nii.gz", "b.NII.GZ", "c.Nii", "d.PNG"])
    assert [path.name for path in find_scans(tmp_path)] == ["a.nii.gz"]
    assert "2 file(s) are left out, since their names end in capitals, such as 'b.NII.GZ': rename them" in caplog.text


def test_neither_side_is_empty():
    assert [len(side) for side in split_by_subject(["a.nii", "b.nii"], "ab", 0.99)] == [1, 1]
    assert [len(side) for side in split_by_subject(["a.nii", "b.nii", "c.nii"], "abc", 0.01)] == [1, 2]


@pytest.mark.parametrize("train_fraction", [0, 1, -0.1, 1.5])
def test_train_fraction_out_of_range(tmp_path, train_fraction):
    with pytest.raises(ValueError, match=r"train_fraction is .* between 0 and 1"):
        make_datalist(make_files(tmp_path, BIDS), train_fraction=train_fraction)


@pytest.mark.parametrize("names", [["a.nii"], ["sub-1/ses-1/sub-1_T1w.nii", "sub-1/ses-2/sub-1_T1w.nii"]])
def test_too_few_subjects(tmp_path, names):
    with pytest.raises(ValueError, match=r"scan\(s\) of 1 subject\(s\) cannot be split"):
        make_datalist(make_files(tmp_path, names))


def test_max_scans_keeps_a_seeded_subset(tmp_path):
    make_files(tmp_path, BIDS)
    kept = make_datalist(tmp_path, max_scans=6, seed=1)
    assert sum(map(len, kept.values())) == 6
    assert kept == make_datalist(tmp_path, max_scans=6, seed=1)
    assert kept != make_datalist(tmp_path, max_scans=6, seed=2)
    assert make_datalist(tmp_path, max_scans=1000) == make_datalist(tmp_path)
    with pytest.raises(ValueError, match="max_scans is 1"):
        make_datalist(tmp_path, max_scans=1)


def test_training_side_must_fill_a_batch(tmp_path):
    make_files(tmp_path, ["a.nii", "b.nii", "c.nii"])
    assert len(make_datalist(tmp_path, batch_size=2)["training"]) == 2
    with pytest.raises(ValueError, match="holds 2 of the 3 scans, fewer than batch_size 4: lower --batch_size"):
        make_datalist(tmp_path, batch_size=4)
    with pytest.raises(ValueError, match=r"holds 1 scan\(s\), fewer than batch_size 2"):
        check_batch_size([{"image": "a.nii"}], 2)


def test_decathlon_datalist_with_its_own_validation(tmp_path):
    path = tmp_path / "dataset.json"
    content = {
        "name": "brains",
        "training": [{"image": f"images/{i}.nii.gz", "label": f"labels/{i}.nii.gz"} for i in range(8)],
        "validation": [{"image": "/elsewhere/8.nii.gz"}, {"image": "images/9.nii.gz"}],
    }
    path.write_text(json.dumps(content))
    datalist = make_datalist(path)
    assert [item["image"] for item in datalist["training"]] == [str(tmp_path / f"images/{i}.nii.gz") for i in range(8)]
    assert [item["image"] for item in datalist["validation"]] == [
        "/elsewhere/8.nii.gz",
        str(tmp_path / "images/9.nii.gz"),
    ]
    kept = make_datalist(path, max_scans=5)
    assert [len(side) for side in kept.values()] == [4, 1]


def test_decathlon_datalist_without_validation_is_split_as_the_folder_is(tmp_path):
    make_files(tmp_path, BIDS)
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"training": [{"image": f"./{name}"} for name in reversed(BIDS)]}))
    assert make_datalist(path, train_fraction=0.7, seed=5) == make_datalist(tmp_path, train_fraction=0.7, seed=5)


def test_bids_entities_are_kept(tmp_path):
    item = make_datalist(make_files(tmp_path, BIDS))["training"][0]
    assert item == {"image": str(tmp_path / BIDS[0]), "subject": "sub-00", "session": "ses-1"}
    assert [session_name(name) for name in ("1234567_20253_3_0.nii.gz", "a.nii")] == ["3", None]


def test_a_datalist_may_name_the_subjects_and_a_testing_side(tmp_path):
    path = tmp_path / "dataset.json"
    training = [{"image": f"{i}.nii", "subject": f"twin {i // 2}"} for i in range(8)]
    path.write_text(json.dumps({"training": training, "testing": [{"image": "t.nii"}]}), encoding="utf-8-sig")
    datalist = make_datalist(path, train_fraction=0.5)
    assert {len(datalist[side]) for side in ("training", "validation")} == {4}
    subjects = [{item["subject"] for item in datalist[side]} for side in ("training", "validation")]
    assert not subjects[0] & subjects[1]
    assert datalist["testing"] == [{"image": str(tmp_path / "t.nii"), "subject": "t"}]


CHANNELS = [
    (["*_T1w.nii.gz", "*_FLAIR.nii.gz"], "sub-{}/anat/sub-{}_T1w.nii.gz", "sub-{}/anat/sub-{}_FLAIR.nii.gz"),
    (["T1/*.nii", "FLAIR/*.nii"], "T1/{}.nii", "FLAIR/{}.nii"),
    (["*_20252_2_0.nii.gz", "*_20253_2_0.nii.gz"], "{}_20252_2_0.nii.gz", "{}_20253_2_0.nii.gz"),
    (["t1/", "flair/"], "{}/t1/1.dcm", "{}/flair/1.dcm"),
]


@pytest.mark.parametrize(("patterns", "t1", "flair"), CHANNELS)
def test_a_pattern_per_channel(tmp_path, patterns, t1, flair, caplog):
    make_files(tmp_path, [name.format(s, s) for name in (t1, flair) for s in ("01", "02", "03")])
    make_files(tmp_path, [t1.format("04", "04")])  # lacks the second
    found = find_scans(tmp_path, patterns)
    assert [len(channels) for channels in found] == [2, 2, 2]
    for s, (one, two) in zip(("01", "02", "03"), found, strict=True):
        assert s in str(one)
        assert str(two).replace("FLAIR", "T1").replace("flair", "t1") == str(one).replace("T1w", "T1") or "2025" in str(
            one
        )
    assert "1 file(s) are left out, since the scan that they belong to lacks another channel" in caplog.text
    datalist = make_datalist(tmp_path, patterns)
    assert all(len(item["image"]) == 2 for side in datalist.values() for item in side)


def test_channels_that_never_meet(tmp_path):
    make_files(tmp_path, ["a_T1.nii", "b_FLAIR.nii"])
    with pytest.raises(
        FileNotFoundError, match=r"No scan .* has all channels: .* match 1, 1 file\(s\), but never with"
    ):
        find_scans(tmp_path, ["*_T1.nii", "*_FLAIR.nii"])


def test_dicom_files_are_pointed_at_their_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"for DICOM series to one of their folders.*such as '\*/'"):
        find_scans(make_files(tmp_path, ["patient/series/1.dcm"]))


def test_decathlon_items_of_several_channels(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"training": [{"image": [f"{i}_t1.nii", f"{i}_flair.nii"]} for i in range(4)]}))
    datalist = make_datalist(path)
    assert len(datalist["training"]) == 3
    assert len(datalist["validation"][0]["image"]) == 2


BAD_DATALISTS = [
    ("{", "is not valid JSON"),
    ("[]", "holds no 'training' list"),
    ('{"training": []}', "holds no 'training' list"),
    ('{"training": ["a.nii"]}', "The 'training' of dataset_dir .* item 0 "),
    ('{"training": [{"image": "a.nii"}], "validation": [{"label": "b.nii"}]}', "The 'validation' of"),
]


@pytest.mark.parametrize(("text", "sentence"), BAD_DATALISTS)
def test_bad_datalist(tmp_path, text, sentence):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        make_datalist(tmp_path / "dataset.json")


def test_written_datalist_is_read_back(tmp_path, monkeypatch):
    make_files(tmp_path / "scans", BIDS)
    monkeypatch.chdir(tmp_path)
    write_datalist(make_datalist("scans"), "run/datalist.json")
    assert make_datalist("run/datalist.json") == make_datalist(tmp_path / "scans")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["datalist.json"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "datalist.json"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_datalist({"training": [{"image": "a.nii"}]}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["datalist.json"]
    assert path.read_text() == "old"


def test_forty_thousand_scans_are_listed_and_split_in_seconds(tmp_path, monkeypatch):
    names = [f"{i:07d}_20253_{visit}_0.nii.gz" for i in range(20_000) for visit in (2, 3)]
    monkeypatch.setattr("os.walk", lambda root, **_: iter([(str(root), [], names)]))
    start = time.perf_counter()
    datalist = make_datalist(tmp_path)
    assert time.perf_counter() - start < 5
    assert len(datalist["training"]) == 38_000


def test_paths_begin_at_the_home_of_the_user_where_they_enter(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("sub-1.nii", "sub-2.nii"):
        (tmp_path / name).touch()
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "~/sub-1.nii"}, {"image": "sub-2.nii"}]}))
    expected = [{"image": str(tmp_path / f"sub-{k}.nii"), "subject": f"sub-{k}"} for k in "12"]
    assert list_sides("~")[0] == list_sides("~/list.json")[0] == {"training": expected}
    assert common_root([], "~/list.json") == str(tmp_path)
    assert expand("~/x") == str(tmp_path / "x") and expand("x/~") == "x/~" and expand(None) is None
    assert as_folder("output_dir", Path("~/x")) == tmp_path / "x"


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"image": 5}, "item 1 (from 0), is {'image': 5}: write"),
        ({"image": ["a.nii", 5]}, "item 1 (from 0), is"),
        ({"image": []}, "item 1 (from 0), is"),
        ({"image": "a\0.nii"}, "item 1 (from 0), is"),
        ({"image": ""}, "item 1 (from 0), is"),
        ({}, "item 1 (from 0), is {}"),
        ("a.nii", "item 1 (from 0), is 'a.nii'"),
        (None, "item 1 (from 0), is None"),
        ({"image": "a.nii", "subject": ["a"]}, "has the subject ['a']: write a text"),
        ({"image": "a.nii", "subject": None}, "has the subject None"),
        ({"image": "a.nii", "session": {}}, "has the session {}"),
    ],
)
def test_an_item_that_is_none_is_named(tmp_path, item, words):
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": [{"image": "b.nii"}, item]}))
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        make_datalist(path)
    assert str(path) in str(refused.value)


def test_a_subject_may_be_a_number(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": [{"image": f"{n}.nii", "subject": n} for n in range(3)]}))
    datalist = make_datalist(path)
    assert sorted(item["subject"] for side in datalist.values() for item in side) == ["0", "1", "2"]


def test_a_datalist_nested_too_deep_is_named(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[" * 10**5)
    with pytest.raises(ValueError, match="is not valid JSON"):
        make_datalist(path)
