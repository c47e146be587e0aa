"""Tables of covariates: which row is a scan's, what its cells say, and what is said of those that cannot be read."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from scripts.data.covariate_tables import Covariates, read_cohort
from scripts.data.covariates import Categorical, CovariateCoding
from scripts.data.datalist import list_sides, make_datalist, write_datalist
from scripts.data.tables import read_table

TABLES = Path(__file__).parent / "tables"  # as people have them
KINDS = {"age": "continuous", "sex": "categorical"}


def scans(root, *names):
    """Items of scans that are named ``sub-01_ses-1`` or ``sub-01``."""
    items = []
    for name in names:
        subject, _, session = name.partition("_")
        item = {"image": str(root / f"{name}_T1w.nii.gz"), "subject": subject}
        items.append(item | ({"session": session} if session else {}))
    return items


@pytest.fixture
def coding() -> CovariateCoding:
    rows = [{"age": 45 + k, "sex": "FM"[k % 2], "site": "AB"[k % 2]} for k in range(41)]
    return CovariateCoding.learn({**KINDS, "site": "categorical"}, rows)


@pytest.fixture
def tree(tmp_path):
    """Three scans of two subjects, by name alone."""
    items = []
    for subject, session in (("01", "a"), ("01", "b"), ("02", "a")):
        path = tmp_path / f"sub-{subject}" / f"ses-{session}" / f"sub-{subject}_ses-{session}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        path.touch()
        items.append({"image": str(path), "subject": f"sub-{subject}", "session": f"ses-{session}"})
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\tage\nsub-01\tF\t60\nsub-02\tn/a\t70\n")
    return tmp_path, items


def test_tables_of_bids_and_a_table_of_ones_own(tree):
    root, items = tree
    assert Covariates(items, root).rows[0] == {"sex": "F", "age": "60"}
    sessions = "session_id\tage\nses-a\t60.5\nses-b\t62.5\n"
    (root / "sub-01" / "sub-01_sessions.tsv").write_text(sessions)
    rows = Covariates(items, root).rows
    assert [row["age"] for row in rows] == ["60.5", "62.5", "70"]
    assert rows[2]["sex"] == ""
    table = root / "mine.csv"
    table.write_text("subject,session,age\n01,b,63\n02,a,\n")
    assert [row["age"] for row in Covariates(items, root, table).rows] == ["60.5", "63", "70"]
    table.write_text("image,age\nsub-02/ses-a/sub-02_ses-a_T1w.nii.gz,71\n")
    assert [row["age"] for row in Covariates(items, root, table).rows] == ["60.5", "62.5", "71"]
    datalist = root / "list.json"
    entries = [{"image": item["image"], "age": 50 + k} for k, item in enumerate(items)]
    datalist.write_text(json.dumps({"training": entries}), encoding="utf-8-sig")  # with a mark, as Windows writes it
    assert [row["age"] for row in Covariates(items, datalist).rows] == [50, 51, 52]


def test_what_a_table_lacks_is_said(tree):
    root, items = tree
    with pytest.raises(ValueError, match=r"'weight' is in no table.*found are age, sex"):
        read_cohort(items, [], root, {"weight": "continuous"})
    with pytest.raises(ValueError, match="say of what kind each is"):
        read_cohort(items, [], root, {"age": "number"})
    with pytest.raises(FileNotFoundError, match=r"covariates_file .* does not exist"):
        read_cohort(items, [], root, KINDS, root / "none.csv")
    (root / "mine.csv").write_text("name,age\n01,63\n")
    with pytest.raises(ValueError, match="no column image or participant_id"):
        Covariates(items, root, root / "mine.csv")
    (root / "mine.csv").write_text("subject,age\n01,63\nsub-01,64\n")
    with pytest.raises(ValueError, match="two rows for sub-01, which differ"):
        Covariates(items, root, root / "mine.csv")
    found = read_cohort(items[:2], items[2:], root, {"age": "continuous", "sex": "categorical"})
    assert found.coding.variables["sex"] == Categorical("sex", ("F",), (1.0,))
    assert found.training.shape == (2, 1) and found.validation.shape == (1, 1)


def test_a_category_of_the_validation_side_alone_counts_as_not_known(tree, caplog):
    root, items = tree
    (root / "participants.tsv").write_text("participant_id\tsite\nsub-01\tA\nsub-02\tB\n")
    (root / "sub-01" / "sub-01_sessions.tsv").write_text("session_id\tsite\nses-b\tC\n")
    found = read_cohort(items[:2], items[2:], root, {"site": "categorical"})
    assert found.coding.variables["site"].categories == ("A", "C")
    assert not found.validation.any() and found.training.any()
    assert "site 'B' (1 scan(s))" in caplog.text


def test_a_row_per_session_is_that_of_the_sessions_scan(tmp_path):
    shutil.copy(TABLES / "participants_long_format.tsv", tmp_path / "participants.tsv")
    items = scans(tmp_path, "sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-2")
    found = Covariates(items, tmp_path)
    assert [row["age"] for row in found.rows] == ["50", "80", "75"]
    assert found.names == ["age", "sex", "site"] and found.without_rows() == []
    with pytest.raises(ValueError, match=r"two rows for sub-01, and the name of 'sub-01_T1w.nii.gz' does not say"):
        Covariates(scans(tmp_path, "sub-01"), tmp_path)
    (sentence,) = Covariates(scans(tmp_path, "sub-01_ses-1", "sub-01_ses-3"), tmp_path).without_rows()
    assert (
        sentence.startswith("1 of 2 scan(s) have no row in '")
        and "'sub-01 ses-3' (the table has 'sub-01 1')" in sentence
    )


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("session_id\tage\n1\t50\n2\t60\n", "'sub-01 ses-01' (the table has 'sub-01 1')"),
        ("visit\tage\n01\t50\n02\t60\n", "no column that says which scan a row is of, and is not read."),
    ],
)
def test_a_table_of_sessions_of_which_no_row_is_found_is_said(tmp_path, table, said):
    """The ages would be those at the first visit, in participants.tsv, without a word."""
    items = scans(tmp_path, *(f"sub-{who}_ses-{when}" for who in ("01", "02", "03") for when in ("01", "02")))
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t50\nsub-02\t50\nsub-03\t50\n")
    for who in ("01", "02"):
        (tmp_path / f"sub-{who}_sessions.tsv").write_text(table)
    (tmp_path / "sub-03_sessions.tsv").write_text("session_id\tage\nses-01\t50\nses-02\t60\n")
    (sentence,) = Covariates(items, tmp_path).without_rows()
    assert "sub-01_sessions.tsv'" in sentence and said in sentence
    assert sentence.endswith(" So it is with 1 more table(s) of sessions.")


@pytest.mark.parametrize("mark", [";", ","])
def test_a_table_whose_separator_is_not_that_of_its_ending_is_read(tmp_path, mark):
    """As spreadsheets write them where a comma stands before the decimals."""
    rows = ["participant_id\tage\tnotes", "sub-01\t50\t", 'sub-02\t60\t"tired; left, early"']
    for name in ("participants.tsv", "mine.csv"):
        (tmp_path / name).write_text("\n".join(rows).replace("\t", mark))
        found = Covariates(scans(tmp_path, "sub-01", "sub-02"), tmp_path, tmp_path / name)
        assert found.rows == [{"age": "50", "notes": ""}, {"age": "60", "notes": "tired; left, early"}]


@pytest.mark.parametrize(("odd", "said"), [("-9", "age is -9 of 2 scan(s)"), ("600", "age is 600 of 2"), ("25", None)])
def test_values_that_may_stand_for_what_is_not_known_are_said(tmp_path, caplog, odd, said):
    """A prior would be fitted to them."""
    items = scans(tmp_path, *(f"sub-{who:02d}" for who in range(12)))
    rows = [f"sub-{who:02d}\t{odd if who in (3, 7) else 40 + 3 * who}\n" for who in range(12)]
    (tmp_path / "participants.tsv").write_text("participant_id\tage\n" + "".join(rows))
    Covariates(items, tmp_path).learn({"age": "continuous"})
    assert [
        f"{said}" in line and "sub-03_T1w.nii.gz', far from the others (40 to 73)" in line for line in caplog.messages
    ] == ([] if said is None else [True])


def test_covariates_that_no_table_calls_so_are_said_with_what_there_is(tmp_path):
    (tmp_path / "participants.tsv").write_text("participant_id\tAge\tsex\nsub-01\t50\tF\n")
    found = Covariates(scans(tmp_path, "sub-01"), tmp_path)
    assert found.without_column(["age", "sex"]) == ": no table has a column age; found are Age, sex"
    assert found.without_column(["sex"]) == ""


@pytest.mark.parametrize("column", ["session", "ses"])
def test_the_column_of_the_session_may_have_other_names(tmp_path, column):
    (tmp_path / "participants.tsv").write_text(f"participant_id\t{column}\tage\n01\t1\t50\n01\t2\t80\n")
    assert Covariates(scans(tmp_path, "sub-01_ses-2"), tmp_path).rows == [{"age": "80"}]


@pytest.mark.parametrize("rows", ["sub-01\t50\nsub-01\t80\n", "01\t50\nsub-01\t51\n"])
def test_two_rows_of_one_participant_are_refused(tmp_path, rows):
    (tmp_path / "participants.tsv").write_text(f"participant_id\tage\n{rows}")
    with pytest.raises(ValueError, match=r"participants.tsv' has two rows for sub-01, which differ: leave one"):
        Covariates(scans(tmp_path, "sub-01"), tmp_path)


def test_the_same_row_twice_is_one(tmp_path):
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t50\nsub-01\t50\n\t80\n")
    found = Covariates([*scans(tmp_path, "sub-01"), {"image": str(tmp_path / "x.nii")}], tmp_path)
    assert found.rows == [{"age": "50"}, {}]


def test_names_that_match_no_row_are_said_in_both_spellings(tmp_path, caplog):
    shutil.copy(TABLES / "participants_unpadded.tsv", tmp_path / "participants.tsv")
    items = scans(tmp_path, "sub-0002", "sub-0001")
    found = Covariates(items, tmp_path)
    assert found.rows == [{}, {}]
    (sentence,) = found.without_rows()
    assert sentence.startswith("2 of 2 scan(s) have no row in")
    assert "such as 'sub-0002' (the table has '2')" in sentence
    with pytest.raises(ValueError, match=r"no training scan has a value for 'age'. 2 of 2 scan\(s\) have no row in"):
        read_cohort(items, [], tmp_path, KINDS)
    (tmp_path / "mine.csv").write_text("image,age\nsub-0001_T1.nii.gz,50\n")
    sentence = Covariates(items, tmp_path, tmp_path / "mine.csv").without_rows()[1]
    assert "such as 'sub-0002_T1w.nii.gz' (the table has 'sub-0001_T1.nii.gz')" in sentence
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-0001\t50\n")
    read_cohort(items[1:], items[:1], tmp_path, {"age": "continuous"})
    assert "Of the validation side 1 of 1 scan(s) have no row" in caplog.text


@pytest.mark.parametrize("word", ["NA", "NaN", "N/A", "n/a", "none", "None", "-", "", " NULL "])
def test_what_says_nothing_is_missing(tmp_path, coding, word):
    (tmp_path / "participants.tsv").write_text(f"participant_id\tage\tsex\nsub-01\t{word}\t{word}\n")
    found = Covariates(scans(tmp_path, "sub-01"), tmp_path)
    assert found.values(coding) == [{"age": None, "sex": None, "site": None}]
    assert coding.parse({"age": word, "sex": word}) == {"age": None, "sex": None, "site": None}


def test_the_missing_of_r_is_no_category(tmp_path):
    shutil.copy(TABLES / "participants_NA.tsv", tmp_path / "participants.tsv")
    items = scans(tmp_path, *(f"sub-000{k}" for k in range(1, 5)))
    assert read_cohort(items, [], tmp_path, KINDS).coding.variables["sex"].categories == ("F", "M")


def test_2_and_2_0_are_one_category_and_02_another():
    rows = [{"site": word} for word in (2, "2", "2.0", 2.0, "02", "1.5")]
    variable = CovariateCoding.learn({"site": "categorical"}, rows).variables["site"]
    assert variable.categories == ("02", "1.5", "2")
    assert Categorical("site", ("1", "2.0"), (0.5, 0.5)).parse("2") == "2.0"  # of a file that an earlier version wrote


@pytest.mark.parametrize("value", ["89+", "49,64", "1e308", "old", "inf", "1e30"])
def test_a_number_that_is_none_is_refused_by_scan_and_file(tmp_path, coding, value):
    (tmp_path / "participants.tsv").write_text(f"participant_id\tage\tsex\nsub-01\t{value}\tF\n")
    items = scans(tmp_path, "sub-01")
    for read in (lambda: Covariates(items, tmp_path).values(coding), lambda: read_cohort(items, [], tmp_path, KINDS)):
        with pytest.raises(
            ValueError, match=r"'sub-01_T1w.nii.gz': age is .*must be a number alone.* See '.*participants.tsv'"
        ):
            read()


def test_a_long_cell_is_read_and_messages_stay_short(tmp_path, coding, caplog):
    caplog.set_level(logging.INFO)
    long = "x" * 200_000
    (tmp_path / "participants.tsv").write_text(f"participant_id\tage\tsex\nsub-01\t50\t{long}\nsub-02\t51\tF\n")
    items = scans(tmp_path, "sub-01", "sub-02")
    found = Covariates(items, tmp_path)
    assert found.rows[0]["sex"] == long
    with pytest.raises(ValueError, match=r"x{20}\.\.\. \(200000 characters\)") as refused:
        found.values(coding)
    assert len(str(refused.value)) < 500
    assert len(" ".join(found.describe())) < 500
    read_cohort(items, [], tmp_path, KINDS)
    assert len(caplog.text) < 2000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_is_read_with_or_without_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "t.tsv").write_text("participant_id\tsite\nsub-01\tK\u00f6ln\n", encoding=encoding)
    assert read_table(tmp_path / "t.tsv") == (
        ["participant_id", "site"],
        [{"participant_id": "sub-01", "site": "K\u00f6ln"}],
    )


def test_a_table_of_a_spreadsheet_is_read_with_a_warning(tmp_path, caplog):
    shutil.copy(TABLES / "participants_latin1.tsv", tmp_path / "participants.tsv")
    assert Covariates(scans(tmp_path, "sub-0001"), tmp_path).rows == [{"age": "49", "site": "K\u00f6ln"}]
    assert "participants.tsv' is not in UTF-8, as line 2 shows: it is read as Windows-1252" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,\x81\n", "is not in UTF-8, as line 2 shows: save it as UTF-8"),
        ("a,b\n1,2\n".encode("utf-16-le"), "holds zero bytes"),
        (b"a,b\n1,2,3\n", r"cannot be read as a table \(.*line 2"),
        (b'a,b\n1,"2\n', "cannot be read as a table"),
        (b"a,a\n1,2\n", "has several columns 'a'"),
    ],
)
def test_what_is_no_table_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"t.csv' {message}"):
        read_table(tmp_path / "t.csv")


def test_short_rows_are_read_with_a_warning_and_empty_files(tmp_path, caplog):
    (tmp_path / "t.csv").write_text("a, b \n1\n\n")
    assert read_table(tmp_path / "t.csv").rows == [{"a": "1", "b": ""}]
    assert "1 row(s) have fewer cells than there are columns, such as that of '1'" in caplog.text
    caplog.clear()
    (tmp_path / "t.csv").write_text("a,b\n1,\n")
    assert read_table(tmp_path / "t.csv").rows == [{"a": "1", "b": ""}] and not caplog.text
    (tmp_path / "t.csv").write_text("a,b,,\n1,2,, \n")  # of a spreadsheet
    assert read_table(tmp_path / "t.csv") == (["a", "b"], [{"a": "1", "b": "2"}])
    (tmp_path / "t.csv").write_bytes(b"a,b\r1,2\r")  # lines that end as they did on old Macs
    assert read_table(tmp_path / "t.csv").rows == [{"a": "1", "b": "2"}] and not caplog.text
    (tmp_path / "t.csv").write_text("")
    assert read_table(tmp_path / "t.csv") == ([], [])


def test_the_value_that_is_used_is_the_one_that_tables_show(tmp_path, coding):
    shutil.copy(TABLES / "participants_baseline.tsv", tmp_path / "participants.tsv")
    shutil.copy(TABLES / "sub-01_sessions.tsv", tmp_path)
    items = scans(tmp_path, "sub-01_ses-2", "sub-02_ses-1", "sub-01")
    found = Covariates(items, tmp_path)
    assert [found.of(item["image"]) for item in items] == [
        {"age": "80", "sex": "M", "site": "A"},
        {"age": "55", "sex": "F", "site": "B"},
        {"age": "50", "sex": "M", "site": "A"},
    ]
    assert [values["age"] for values in found.values(coding)] == [80.0, 55.0, 50.0]
    (tmp_path / "mine.csv").write_text("participant_id,weight\n01,70\n")
    own = Covariates(items, tmp_path, tmp_path / "mine.csv")
    assert own.of(items[1]["image"]) == {"age": "55", "sex": "F", "site": "B", "weight": ""}
    assert own.of("another.nii") == dict.fromkeys(own.names, "")


def test_covariates_outside_of_the_training_range_are_flagged(tmp_path, coding):
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t5\nsub-02\t60\nsub-03\t-3\nsub-04\t\n")
    found = Covariates(scans(tmp_path, "sub-01", "sub-02", "sub-03", "sub-04"), tmp_path)
    flags, sentence = found.outside_range(coding, found.values(coding))
    assert flags == [True, False, True, False]
    assert sentence.startswith("2 of 4 scan(s) have covariates outside of the range of the training scans, such as ")
    assert "'sub-01_T1w.nii.gz': age 5 (45 to 85)" in sentence
    assert found.outside_range(coding, found.values(coding)[1:2]) == ([False], "")


def test_a_category_that_no_training_scan_has_may_count_as_not_known(tmp_path, coding, caplog):
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsex\tsite\nsub-1\t60\tF\tD\nsub-2\t70\t\tn/a\n")
    found = Covariates(scans(tmp_path, "sub-1", "sub-2"), tmp_path)
    assert found.values(coding, "unknown") == [
        {"age": 60.0, "sex": "F", "site": None},
        {"age": 70.0, "sex": None, "site": None},
    ]
    assert "count as not known: site 'D' (1 scan(s))" in caplog.text
    with pytest.raises(ValueError, match=r"no training scan has site 'D'.*set --unseen_categories unknown"):
        found.values(coding)
    with pytest.raises(ValueError, match="set --unseen_categories to error or unknown"):
        found.values(coding, "drop")


def test_a_datalist_in_the_home_folder_keeps_its_covariates(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    items = scans(tmp_path, "sub-01", "sub-02")
    for item in items:
        Path(item["image"]).touch()
    entries = [{"image": Path(item["image"]).name, "subject": "x", "age": 50} for item in items]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    assert Covariates(items, "~/list.json").rows == [{"age": 50}, {"age": 50}]


def test_covariates_of_a_datalist_are_in_that_of_the_run(tmp_path):
    """Jobs with ``--run_dir`` read it."""
    entries = [{"image": f"sub-{k}.nii", "age": 50 + k, "sex": "F", "label": "no.nii", "box": [1]} for k in range(4)]
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    write_datalist(make_datalist(tmp_path / "list.json", train_fraction=0.5), tmp_path / "run" / "datalist.json")
    sides = list_sides(tmp_path / "run" / "datalist.json")[0]
    known = Covariates([*sides["training"], *sides["validation"]], tmp_path / "run" / "datalist.json")
    assert known.names == ["age", "sex"] and sorted(row["age"] for row in known.rows) == [50, 51, 52, 53]


def test_a_table_of_participants_without_their_names_is_not_joined(tmp_path, caplog):
    (tmp_path / "participants.tsv").write_text("id\tage\n1\t63\n")
    assert Covariates(scans(tmp_path, "sub-1"), tmp_path).rows == [{}]
    assert "has no column participant_id" in caplog.text


def test_participants_of_another_data_set_above_are_not_taken(tmp_path, caplog):
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t63\n")
    (tmp_path / "mine").mkdir()
    assert Covariates(scans(tmp_path / "mine", "sub-01"), tmp_path / "mine").rows == [{"age": "63"}]
    assert [r.levelname for r in caplog.records if "above the data set" in r.message] == ["WARNING"]
    (tmp_path / "mine" / "dataset_description.json").write_text("{}")
    assert Covariates(scans(tmp_path / "mine", "sub-01"), tmp_path / "mine").rows == [{}]
    (tmp_path / "mine" / "dataset_description.json").write_text('{"DatasetType": "derivative"}')
    assert Covariates(scans(tmp_path / "mine", "sub-01"), tmp_path / "mine").rows == [{"age": "63"}]


def test_participants_are_found_above_a_few_scans(tmp_path):
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-01\t63\n")
    folder = tmp_path / "sub-01" / "ses-1" / "anat"
    folder.mkdir(parents=True)
    assert Covariates(scans(folder, "sub-01"), folder).rows == [{"age": "63"}]
