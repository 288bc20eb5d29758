"""pytest tests/test_plots.py -- the pictures, from their pixels and texts."""

import numpy as np
import pytest
import torch
from PIL import ImageDraw

from evaluation.plots import (
    draw_curves,
    draw_error_by_rank,
    draw_matrices,
    draw_sheet,
    explain,
    printable,
)

DARK = (29, 58, 95)  # of bars and lines


@pytest.fixture
def texts(monkeypatch):
    """[(text, anchor, box)] of all that is drawn."""
    texts, draw_text = [], ImageDraw.ImageDraw.text

    def record(draw, xy, text, fill, font, anchor):
        texts.append((text, anchor, draw.textbbox(xy, text, font, anchor)))
        draw_text(draw, xy, text, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return texts


def rows_of(probs, file="x.png", name="0"):
    """As predict.py makes them."""
    expected = (probs @ torch.arange(probs.shape[1]).float()).tolist()
    return [
        dict(file=file, rank=name, expected_rank_index=e, value=e, probs=p)
        for p, e in zip(probs, expected)
    ]


@pytest.mark.parametrize(
    "num_ranks, name",
    [(2, "{}"), (101, "{}"), (9, "a rather long name of rank {}"), (3, "w" * 200)],
)
def test_names_of_ranks_do_not_touch(num_ranks, name, texts):
    names = [name.format(rank) for rank in range(num_ranks)]
    probs = torch.rand(1, num_ranks, generator=torch.Generator().manual_seed(0)).softmax(1)
    rows = rows_of(probs, "x" * 300 + ".png", names[0])
    picture = explain(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), rows, names)
    boxes = [box for _, anchor, box in texts if anchor == "ma"]
    assert picture.size == (1000, 330) and boxes
    assert boxes[0][0] > 0 and boxes[-1][2] <= 1000
    assert all(left[2] < right[0] for left, right in zip(boxes, boxes[1:]))


def test_explain_draws_six_images_and_the_most_probable_rank_dark(texts):
    probs = torch.tensor([[0.1, 0.2, 0.6, 0.1]]).repeat(8, 1)
    images = torch.full((8, 3, 64, 64), 7, dtype=torch.uint8)
    picture = explain(images, rows_of(probs, "\udcff.png"), list("abcd"))
    assert picture.size == (1000, 6 * 330)
    first = np.asarray(picture)[:330]
    assert (first[20:280, 40:290] == 7).all()
    columns = np.flatnonzero((first[84:276, 390:970] == DARK).all(2).any(0))
    assert 290 <= columns.min() and columns.max() < 435  # the third of four, 145 pixels each
    assert {"\\udcff.png", "0: 60%", "expected 1.70", "60.0%", "30.0%"} <= {t for t, *_ in texts}


def test_a_matrix_is_drawn_with_its_rows_downwards_and_darker_where_larger():
    matrix = torch.zeros(20, 20)
    matrix[3, 15] = 1  # true rank 3, predicted 15
    picture = np.asarray(
        draw_matrices({"t": matrix}, [str(i) for i in range(20)], ("x", "y")).convert("L")
    )
    area = picture[56:456, 120:520].reshape(20, 20, 20, 20).mean((1, 3))  # cells of 20 x 20 pixels
    assert np.unravel_index(area.argmin(), area.shape) == (3, 15) and area[3, 15] < 60
    assert np.delete(area.ravel(), 3 * 20 + 15).min() > 200


@pytest.mark.parametrize("num_ranks", [12, 13])
def test_matrices_share_one_scale_and_few_ranks_carry_their_values(texts, num_ranks):
    names = [f"rank {i}" for i in range(num_ranks)]
    matrices = dict(one=torch.eye(num_ranks), three=3 * torch.eye(num_ranks))
    picture = draw_matrices(matrices, names, ("predicted", "true"))
    assert picture.size == (2 * 550 + 110, 550)
    labels = [text for text, *_ in texts]
    assert labels.count("3.00") == (12 if num_ranks == 12 else 0)
    assert labels[-3:] == ["0", "1.5", "3"] and labels.count("predicted") == 2
    counts = torch.arange(4).view(2, 2)
    texts.clear()
    draw_matrices(dict(counts=counts), ["a", "b"], ("x", "y"), span=(0, 10))
    labels = [text for text, *_ in texts]
    assert "2" in labels and "2.00" not in labels and labels[-3:] == ["0", "5", "10"]


def test_the_bars_are_as_high_as_the_errors(texts):
    errors, images = (0.0, 1.0, 2.0), (4, 2, 0)
    rows = [
        dict(rank=name, train_images=number, test_images=1, mae_argmax=error)
        for name, error, number in zip("abc", errors, images)
    ]
    pixels = np.asarray(draw_error_by_rank(rows))
    for top, bottom, heights in ((50, 290, (0, 120, 240)), (400, 510, (110, 55, 0))):
        bars = (pixels[top:bottom, 80:970] == DARK).all(2).sum(0)  # dark pixels per column
        for i, height in enumerate(heights):
            assert bars[int((i + 0.5) * 890 / 3)] == pytest.approx(height, abs=1)
    assert {"a", "b", "c", "2", "1", "0", "4"} <= {text for text, *_ in texts}


@pytest.mark.parametrize("epochs", [1, 2, 40])
def test_curves_begin_at_the_first_epoch(texts, epochs):
    row = dict(i2t=2.0, t2i=1.0, val_mae_expected=0.5, val_mae_argmax=0.0)
    log = [dict(row, epoch=float(epoch + 1)) for epoch in range(epochs)]
    pixels = np.asarray(draw_curves(log))
    assert (pixels[84, 82:478] == DARK).all(1).all() == (epochs > 1)  # a constant, the highest
    labels = [text for text, *_ in texts]
    last = [f"epoch {epochs}"] if epochs > 1 else []
    assert [text for text in labels if text.startswith("epoch")] == 2 * ["epoch 1", *last]
    assert {"image to text", "text to image", "expected rank", "most probable"} <= set(labels)


def test_the_sheet_shows_images_above_their_captions(texts):
    images = [
        (torch.full((3, 96, 96), level, dtype=torch.uint8), f"{level}\nw") for level in (0, 9)
    ]
    picture = draw_sheet([("best", images), ("worst", images[::-1])])
    pixels = np.asarray(picture)
    for i, levels in enumerate(((0, 9), (9, 0))):
        for j, level in enumerate(levels):
            top, left = i * 240 + 46, 14 + j * 164
            assert (pixels[top : top + 150, left : left + 150] == level).all()
    assert [text for text, *_ in texts] == ["best", "0", "w", "9", "w", "worst", "9", "w", "0", "w"]


def test_text_that_is_too_wide_ends_in_dots(texts):
    draw_sheet([("t", [(torch.zeros(3, 8, 8, dtype=torch.uint8), "w" * 99)])])
    caption, _, box = texts[-1]
    assert caption.startswith("www") and caption.endswith("w...") and box[2] - box[0] <= 150


def test_names_that_are_no_utf8_can_be_printed():
    assert printable("a\udcffb") == "a\\udcffb" and printable("ä 1") == "ä 1"
