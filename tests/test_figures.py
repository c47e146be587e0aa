"""Pictures: upright, of sane size, written whole or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from scripts.utils import figures, plots, sheets

RNG = np.random.default_rng(0)


def scan(*shape, channels=1):
    """A bright ball on a background of -1, ``[channels, *shape]``."""
    grids = np.meshgrid(*[np.linspace(-1.4, 1.4, n) for n in shape], indexing="ij")
    ball = np.where(sum(g**2 for g in grids) < 1, 0.5 + 0.1 * RNG.standard_normal(shape), -1.0)
    return torch.tensor(np.stack([ball] * channels), dtype=torch.float32)


def check_picture(path):
    pixels = imread(path)[..., :3]
    height, width = pixels.shape[:2]
    assert 150 <= width <= 2000 and 150 <= height <= 6000
    assert pixels.std() > 0.02
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return pixels


SHAPES = [(16, 16, 16), (12, 20, 8), (16, 16), (8, 24)]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_reconstructions(tmp_path, shape, channels):
    images = [scan(*shape, channels=channels) for _ in range(2)]
    locs, scales = [0.8 * image for image in images], [torch.full_like(image, 0.3) for image in images]
    path = tmp_path / "r.png"
    figures.reconstructions(path, images, locs, scales, ["one", "a very long name " * 20], (-1, 1))
    check_picture(path)


def test_reconstructions_show_scale_and_difference_with_their_own_colours(tmp_path):
    image = scan(16, 16, 16)
    path = tmp_path / "r.png"
    figures.reconstructions(path, [image], [image.roll(3, 1)], [image.abs()], ["scan"], (-1, 1))
    pixels = check_picture(path)[60:-100]
    coloured = np.ptp(pixels, axis=-1).max(0) > 0.1
    middle = coloured.size // 2
    assert not coloured[:middle].any() and coloured[middle:].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("number", [1, 12])
def test_strip(tmp_path, shape, number):
    image = scan(*shape)
    path = tmp_path / "p.png"
    scans, labels = [image * i / 12 for i in range(number)], [f"to {i}" for i in range(number)]
    figures.strip(path, [*scans, image], [*labels, "scan"], (-1, 1), guide=image)
    check_picture(path)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 7, 16])
def test_batch(tmp_path, shape, count):
    path = tmp_path / "b.png"
    figures.batch(path, [scan(*shape) for _ in range(count)], [f"sub-{i:04d}" for i in range(count)])
    check_picture(path)


def test_batch_takes_scans_of_different_shapes(tmp_path):
    path = tmp_path / "b.png"
    figures.batch(path, [scan(16, 16, 16), scan(8, 24, 12)], ["a", "b"], (-1, 1))
    check_picture(path)


@pytest.mark.parametrize("value_range", [(-np.inf, np.inf), (0.0, np.inf)])
@pytest.mark.parametrize("fill", [0.0, np.nan])
def test_blank_and_broken_scans_are_drawn_too(tmp_path, fill, value_range):
    image = torch.full((1, 8, 8, 8), fill)
    path = tmp_path / "r.png"
    figures.reconstructions(path, [image], [image], [image], ["blank"], value_range)
    assert path.stat().st_size > 0


def test_scans_in_half_precision_with_gradients(tmp_path):
    image = scan(8, 8, 8).to(torch.bfloat16).requires_grad_()
    figures.batch(tmp_path / "b.png", image[None], ["one"])
    check_picture(tmp_path / "b.png")


# axis that is cut, voxel that is bright, where it must be seen: (upper half, left half)
SIDES = [
    (2, (4, 7, 4), (True, None)),  # axial: the front is up
    (2, (0, 4, 4), (None, True)),  # axial: left is left
    (1, (4, 4, 7), (True, None)),  # coronal: the top is up
    (1, (0, 4, 4), (None, True)),  # coronal: left is left
    (0, (4, 4, 7), (True, None)),  # sagittal: the top is up
    (0, (4, 0, 4), (None, True)),  # sagittal: the back is left
]


@pytest.mark.parametrize(("axis", "voxel", "sides"), SIDES)
def test_planes_are_upright(axis, voxel, sides):
    volume = np.zeros((8, 8, 8))
    volume[voxel] = 1
    row, column = np.argwhere(sheets.plane(volume, axis, voxel[axis]))[0]
    for place, expected in zip((row, column), sides, strict=True):
        assert expected is None or (place < 4) == expected


def test_a_2d_scan_is_upright():
    image = np.zeros((6, 8))
    image[0, 7] = 1  # left, front
    assert sheets.plane(image, None)[0, 0] == 1


def test_upright_in_the_picture_itself(tmp_path):
    """The front and the top of a scan are bright: in every plane the upper half of the picture is."""
    volume = torch.zeros(1, 16, 16, 16)
    volume[:, 2:14, 8:, 8:] = 1.0
    volume[:, 2:14, 2:14, 2:14] += 0.2
    figures.strip(tmp_path / "p.png", [volume] * 2, ["to 1", "scan"], (0, 1.2))
    gray = check_picture(tmp_path / "p.png").mean(-1)[45:-30]
    for panel in np.array_split(gray, 3):
        upper, lower = np.array_split(panel, 2)
        assert upper.mean() > 1.5 * lower.mean()


def test_cuts_go_through_the_middle_of_the_foreground():
    volume = np.full((20, 20, 20), -1.0)
    volume[2:6, 10:18, 5:6] = 1
    assert sheets.middle(volume) == (4, 14, 5)
    assert sheets.middle(np.zeros((4, 6, 8))) == (2, 3, 4)


HISTORY = {
    "loss": {"training": [(i, 1e4 / (i + 1) - 50) for i in range(400)], "validation": [(100, 90.0), (300, 20.0)]},
    "kl": {"training": [(i, 1.0 + i) for i in range(50)]},
    "grad_norm": {"training": [(0, float("nan")), (1, float("inf")), (2, 3.0)]},
    "skipped": {"training": [(i, 0.0) for i in range(100)]},
    "bits_per_dim": {"validation": [(5, 1.0)]},
    "empty": {"training": []},
}


@pytest.mark.parametrize("names", [["loss"], ["bits_per_dim", "skipped"], list(HISTORY)])
def test_curves(tmp_path, names):
    path = tmp_path / "c.png"
    plots.curves(path, {name: HISTORY[name] for name in names})
    check_picture(path)


@pytest.mark.parametrize("time", [1, 2, 50])
def test_kl_per_latent(tmp_path, time):
    path = tmp_path / "k.png"
    kl = torch.rand(time, 6) * torch.tensor([100.0, 0, 1e-6, 50, 3000, torch.nan])
    plots.kl_per_latent(
        path, range(0, 10 * time, 10), kl, [20, 160, 160, 160, 1280, 1280], ["1³", *["2³"] * 3, "4³", "8³"]
    )
    check_picture(path)


def test_kl_per_latent_is_brighter_where_a_latent_lives(tmp_path):
    kl = np.zeros((2, 2))
    kl[:, 1] = 1000.0
    plots.kl_per_latent(tmp_path / "k.png", [0, 1], kl, [100, 100], ["1³", "2³"])
    pixels = imread(tmp_path / "k.png")[..., :3].mean(-1)
    column = pixels[:, pixels.shape[1] // 2]
    height = len(column)
    assert column[height // 3] < 0.1 < 0.5 < column[2 * height // 3]


def test_cells_around_updates_begin_at_0():
    assert plots._edges(np.array([0.0])).tolist() == [0, 0.5]
    assert plots._edges(np.array([2.0, 8.0, 12.0])).tolist() == [0, 5, 10, 14]


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    def fail_halfway(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    path = tmp_path / "b.png"
    figures.batch(path, [scan(8, 8)], ["first"])
    before = path.read_bytes()
    monkeypatch.setattr(Figure, "savefig", fail_halfway)
    with pytest.raises(OSError, match="disk full"):
        figures.batch(path, [scan(8, 8)], ["second"])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["b.png"]


def test_no_state_is_left_behind(tmp_path):
    """Figures made in a long run must not pile up in pyplot."""
    import matplotlib.pyplot as plt

    figures.batch(tmp_path / "b.png", [scan(8, 8)], ["one"])
    assert plt.get_fignums() == []


def batched(values, size):
    return zip(*[iter(values)] * size, strict=True)


@pytest.mark.parametrize("shape", [(16, 16, 16), (16, 16)])
def test_anomaly_is_cut_through_its_peak(tmp_path, monkeypatch, shape):
    image = np.zeros((1, *shape), np.float32)
    image[0][tuple(slice(3, 13) for _ in shape)] = 1
    score = np.zeros_like(image)
    peak, outside = (5, 11, 4)[: len(shape)], (0, 1, 0)[: len(shape)]
    score[0][peak], score[0][outside] = -7, 9  # outside of the foreground it does not count
    drawn, picture = [], sheets.Sheet.picture

    def draw(self, x, y, box, inch, shown, mark=None, **style):
        drawn.append((shown, mark))
        picture(self, x, y, box, inch, shown, mark, **style)

    monkeypatch.setattr(sheets.Sheet, "picture", draw)
    figures.anomaly(tmp_path / "a.png", image, image, score, "one", (0, 1))
    for scan, restored, anomaly, in_middle, anomaly_in_middle in batched(drawn, 5):
        column, row = scan[1]
        assert anomaly[1] == scan[1] and anomaly[0][row, column] == anomaly[0].min() == -7
        assert restored[1] is in_middle[1] is anomaly_in_middle[1] is None
        assert len(shape) == 2 or anomaly_in_middle[0].min() == 0  # none of the planes through the middle has the peak
    check_picture(tmp_path / "a.png")


@pytest.mark.parametrize("shape", [(16, 16, 16), (16, 16)])
@pytest.mark.parametrize("count", [1, 5])
def test_anomalies_are_a_sheet_of_scans_cut_through_their_peaks(tmp_path, monkeypatch, shape, count):
    drawn, peak = [], (6, 10, 5)[: len(shape)]
    monkeypatch.setattr(
        sheets.Sheet, "picture", lambda self, x, y, box, inch, picture, mark, **style: drawn.append((picture, mark))
    )

    def scans():
        for number in range(count):
            image = scan(*shape, channels=2)
            score = torch.zeros_like(image)
            score[1][peak], score[0][(0,) * len(shape)] = -number - 4, 20  # the latter outside of the foreground
            yield image, score

    figures.anomalies(tmp_path / "a.png", scans(), [f"scan {number}" for number in range(count)])
    cuts = 3 if len(shape) == 3 else 1
    assert len(drawn) == 2 * cuts * count and all(np.isfinite(picture).all() for picture, _ in drawn)
    for number in range(count):
        own = drawn[2 * cuts * number + cuts : 2 * cuts * (number + 1)]
        assert [picture[mark[1], mark[0]] for picture, mark in own] == [-number - 4] * cuts


def test_anomalies_make_a_picture(tmp_path):
    found = [(scan(12, 20, 8), 6 * scan(12, 20, 8)) for _ in range(3)]
    figures.anomalies(tmp_path / "a.png", found, ["one", "two", "three"])
    check_picture(tmp_path / "a.png")


def test_anomaly_colours_are_black_at_zero_and_bright_at_three_standard_deviations():
    style = figures.ANOMALY_STYLE
    shown = [
        np.array(style["cmap"]((value - style["vmin"]) / (style["vmax"] - style["vmin"]))[:3]) for value in (-3, 0, 3)
    ]
    darker, neutral, brighter = shown
    luminance = np.array([0.2126, 0.7152, 0.0722])
    assert neutral.max() < 0.02
    assert min(darker @ luminance, brighter @ luminance) > 0.3
    assert darker[2] > darker[0] + 0.5 and brighter[0] > brighter[2] + 0.5  # blue and red
