"""The page that a job writes beside its results."""

from __future__ import annotations

import re
import shutil

import nibabel as nib
import numpy as np
import torch
from browser import Window, chromium
from conftest import brain, inference_config, run_bundle, save
from matplotlib.figure import Figure

from scripts.utils.report import (
    MOST_COLUMNS,
    MOST_ROWS,
    MOST_VOLUMES,
    MOST_VOXELS,
    OPEN,
    ShownTable,
    ShownVolume,
    read_shown,
    read_volume,
    write_report,
)

# of a canvas: the sum of its colours, each at its place, and how many of its pixels are orange to yellow
SEEN = """canvas => {
    const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    let sum = 0, orange = 0;
    for (let i = 0; i < data.length; i += 4) {
        sum += (i % 9973) * (data[i] + data[i + 1] + data[i + 2]);
        orange += data[i] > 200 && data[i + 1] > 60 && data[i + 2] < 60;
    }
    return [sum, orange];
}"""


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
    assert "5 more rows or columns: see t.csv" in text


def test_the_worst_comes_first_beside_what_is_usual(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("image,subject,bits,score,note\na,1,-4.5,2,\nb,2,-4.1,11,x\nc,3,-4.4,,\nd,4,-4.6,3.5,\n")
    table = read_shown(ShownTable(path, ("score", "bits", "none"), "score", {"bits": "-5 to -4"}))
    assert table.columns == ["image", "score", "bits", "subject", "note"]
    assert [row[0] for row in table.rows] == ["b", "d", "a", "c"]
    usual, median = table.beside
    assert usual == ["usual", "", "-5 to -4", "", ""]
    assert median == ["median of these", "3.5", "-4.45", "2.5", ""]
    assert [row[0] for row in read_shown(ShownTable(path)).rows] == ["a", "b", "c", "d"]
    assert read_shown(ShownTable(path)).beside == []
    path.write_text("image,session,bits\n1.10,2020.10,4.10\n")
    assert read_shown(ShownTable(path)).rows == [["1.10", "2020.10", "4.1"]]


def test_many_scans_are_folded_away_and_long_cells_are_wrapped(tmp_path):
    pictures = [tmp_path / f"{number}.png" for number in range(OPEN + 3)]
    for picture in pictures:
        Figure((1, 1)).savefig(picture)
    (tmp_path / "t.csv").write_text(f"image,reasons\na.nii,{'the scan has a reason; ' * 9}\n")
    text = write_report(tmp_path, "score", "", [tmp_path / "t.csv"], pictures[:1], scans=pictures[1:]).read_text()
    assert "<summary>2 more scans</summary>" in text
    assert text.index(f"{OPEN}.png") < text.index("2 more scans") < text.index(f"{OPEN + 1}.png")
    assert '<td class="long">the scan has' in text


def test_columns_of_each_latent_stay_in_the_file(tmp_path):
    (tmp_path / "scores.csv").write_text("image,kl,kl_z00,kl_z01,psnr\na.nii,1,2,3,30\n")
    text = write_report(tmp_path, "score", "", [tmp_path / "scores.csv"], legend="kl: in nats.").read_text()
    assert re.findall(r'scope="col">(\w+)', text) == ["image", "kl", "psnr"]
    assert "<td>a.nii</td><td>1</td><td>30</td>" in text
    assert "2 more rows or columns" in text and "kl: in nats." in text


def test_volumes_are_in_the_page_and_can_be_moved_through(tmp_path):
    scan = brain(size=16)[0].numpy()
    paths = [save(tmp_path / f"{number}.nii.gz", scan) for number in range(MOST_VOLUMES + 2)]
    anomaly = np.zeros_like(scan)
    anomaly[4:7, 8:11, 8:11] = 5
    volumes = [ShownVolume(save(tmp_path / "anomaly.nii.gz", anomaly), paths[0], 6.0), *map(ShownVolume, paths)]
    volumes.insert(1, ShownVolume(save(tmp_path / "flat.nii.gz", scan[0])))  # a scan of 2D has pictures alone
    path = write_report(tmp_path, "score", "", volumes=[*volumes, ShownVolume(tmp_path / "none.nii.gz")])
    text = path.read_text()
    assert text.count("<iframe") == MOST_VOLUMES and "4 more volumes are beside this file" in text
    assert "anomaly.nii.gz: click" in text and "flat.nii.gz" not in text
    assert not re.search(r'(src|href)=(?:"|&#34;)(?!data:)', text)  # nothing is loaded from elsewhere
    assert len(text) < 1_500_000
    with chromium() as browser:
        window = Window(browser, path.as_uri())
        frame = window.page.locator("iframe").first
        frame.scroll_into_view_if_needed()
        canvas = frame.content_frame.locator("canvas").first
        canvas.wait_for()
        window.until(lambda: canvas.evaluate(SEEN)[1] > 100)  # voxels of the map are on the scan
        before = canvas.evaluate(SEEN)[0]
        box = canvas.bounding_box()
        window.page.mouse.click(box["x"] + box["width"] * 0.12, box["y"] + box["height"] * 0.6)
        window.until(lambda: canvas.evaluate(SEEN)[0] != before)
    assert window.elsewhere == [] and window.failures == []


def test_large_volumes_are_thinned_out(tmp_path):
    path = save(tmp_path / "large.nii.gz", np.ones((2 * MOST_VOXELS + 1, 8, 8)), np.diag([1.0, 2, 3, 1]))
    image = read_volume(path)
    assert image.shape == (86, 3, 3) and image.header.get_zooms() == (3.0, 6.0, 9.0)
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8, 2), np.float32), np.eye(4)), tmp_path / "channels.nii.gz")
    assert read_volume(tmp_path / "channels.nii.gz").shape == (8, 8, 8)


def test_each_job_writes_one(cohort, tmp_path):
    (tmp_path / "scans").mkdir()
    for number, path in enumerate(sorted(cohort.glob("*.nii.gz"))[:2]):
        shutil.copy(path, tmp_path / "scans" / f"sub-{number}_T1w.nii.gz")
    (tmp_path / "scans" / "sub-9_T1w.nii.gz").write_bytes(b"no scan")
    torch.manual_seed(0)
    torch.save(inference_config().get_parsed_content("network_def").state_dict(), tmp_path / "model.pt")
    words = ("--dataset_dir", tmp_path / "scans", "--ckpt", tmp_path / "model.pt", "--output_dir", tmp_path / "out")
    configs = ["configs/inference.json", "tests/tiny.json"]
    done = run_bundle(*words, "--figures", True, run_id="score", configs=configs)
    assert done.returncode == 1
    for words in ("input summary", "Setting logging"):  # what somebody has just typed, and how MONAI begins
        assert words not in done.stdout + done.stderr
    text = (tmp_path / "out" / "report_score.html").read_text(encoding="utf-8")
    assert "2 of 3 scan(s) have results" in text
    assert "Scans that failed" in text and "sub-9_T1w.nii.gz" in text
    assert text.count("<img ") == 3  # two scans, and the most unusual ones
    assert "bits_per_dim" in text and "<h2>scores.csv</h2>" in text
    assert text.count("<iframe") == 2 and "sub-0_T1w_anomaly.nii.gz: click" in text
