"""The pictures of a run and of single predictions, drawn with Pillow alone.

    draw_matrices({"test images": confusion}, rank_names, ("predicted", "true")).save("c.png")

Dims: B images, R ranks, S image size; positions are in pixels. Read in order: the pictures
(draw_matrices, draw_error_by_rank, draw_curves, draw_sheet, explain), then what they share.
Copy together with: nothing; needs torch>=2.4, numpy, pillow.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LIGHT_BAR, DARK_BAR, INK, GRID = "#a9bfd6", "#1d3a5f", "#111111", "#d5d5d5"  # differ in grey, too
MAX_EXPLAINED = 6  # images in one picture of `explain`
MAX_NAMED = 6  # ranks that are all named along an axis
Box = tuple[float, float, float, float]  # left, top, right, bottom of a chart


def draw_matrices(
    matrices: dict[str, Tensor],
    rank_names: Sequence[str],
    axes: tuple[str, str],
    span: tuple[float, float] | None = None,
) -> Image.Image:
    """Matrices {title: (R, R)} side by side on one colour scale: the darker, the larger.

    axes: titles of the (columns, rows). span: lowest and highest value of the scale, by default of
    all matrices. Up to 12 ranks are drawn with the values in their cells.
    """
    side, step, top = 400, 550, 56
    values = [value for matrix in matrices.values() for value in matrix.flatten().tolist()]
    low, high = span or (min(values), max(values))
    picture, draw = _canvas(step * len(matrices) + 110, side + 150)
    for i, (title, matrix) in enumerate(matrices.items()):
        left = 120 + i * step
        shades = (matrix.double() - low) / max(high - low, 1e-12)  # (R, R)
        _draw_shades(picture, shades.clamp(0, 1).numpy(), left, top, side, side)
        _draw_text(draw, (left, 14), title, 20, max_width=side + 40)
        xs, ys = (_centers(start, side, len(matrix)) for start in (left, top))
        for row, column in np.ndindex(*matrix.shape) if len(matrix) <= 12 else ():
            value, ink = matrix[row, column].item(), "white" if shades[row, column] > 0.55 else INK
            text = f"{value:.2f}" if isinstance(value, float) else str(value)
            _draw_text(draw, (xs[column], ys[row]), text, 14, "mm", ink)
        _draw_rank_axis(draw, rank_names, left, side, top + side)
        for y, name in _named(rank_names, top, side, 26):
            draw.line((left - 4, y, left, y), INK)
            _draw_text(draw, (left - 8, y), name, 14, "rm", max_width=92)
        _draw_text(draw, (left + side / 2, top + side + 32), axes[0], 16, "ma")
        _draw_text(draw, (left - 112, top - 22), axes[1], 14)
    left = step * len(matrices) + 26
    _draw_shades(picture, np.linspace(1, 0, side)[:, None], left, top, 18, side)
    for share in (0, 0.5, 1):
        value = f"{low + share * (high - low):.3g}"
        _draw_text(draw, (left + 24, top + side * (1 - share)), value, 14, "lm")
    return picture


def draw_error_by_rank(rows: Sequence[dict[str, Any]]) -> Image.Image:
    """MAE (most probable rank) of the test images of each rank, above its training images.

    rows: dicts of rank (name), train_images, mae_argmax (in ranks), for the ranks with test images.
    """
    picture, draw = _canvas(1000, 580)
    names = [row["rank"] for row in rows]
    for key, title, top, bottom in (
        ("mae_argmax", "MAE of the most probable rank, test images", 50, 290),
        ("train_images", "training images", 400, 510),
    ):
        values, inks = [row[key] for row in rows], [DARK_BAR] * len(rows)
        _draw_text(draw, (80, top - 34), title, 18)
        _draw_bars(draw, (80, top, 970, bottom), values, inks, names, ".3g")
        _draw_text(draw, (525, bottom + 32), "true rank", 16, "ma")
    return picture


def draw_curves(log: Sequence[dict[str, float]]) -> Image.Image:
    """The losses, and the validation MAE of the expected and the most probable rank, by epoch.

    log: one dict per epoch, at least one, of epoch, i2t, t2i, val_mae_expected, val_mae_argmax.
    """
    losses = ("i2t", "image to text"), ("t2i", "text to image")
    if not any(row["t2i"] for row in log):  # of regression
        losses = (("i2t", "mean"),)
    errors = ("val_mae_expected", "expected rank"), ("val_mae_argmax", "most probable")
    picture, draw = _canvas(1000, 420)
    first, last = log[0]["epoch"], log[-1]["epoch"]
    for title, lines, left in (("loss", losses, 80), ("validation MAE, in ranks", errors, 570)):
        right, top, bottom = left + 400, 84, 360
        highest = max(row[key] for row in log for key, _ in lines) or 1
        _draw_text(draw, (left, 12), title, 20)
        _draw_grid(draw, (left, top, right, bottom), highest, ".3g")
        xs = [left + (row["epoch"] - first) / max(last - first, 1) * (right - left) for row in log]
        styles = (left, DARK_BAR, 3), (left + 200, "#7fa6cc", 5)  # differ in width, too
        for (key, name), (legend, ink, width) in zip(lines, styles):
            points = [(x, bottom - row[key] / highest * (bottom - top)) for x, row in zip(xs, log)]
            draw.line(points, ink, width)
            for x, y in points if len(points) < 30 else ():
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), ink)
            draw.line((legend, 54, legend + 30, 54), ink, width)
            _draw_text(draw, (legend + 38, 54), name, 15, "lm")
        for x, epoch, anchor in ((left, first, "la"), (right, last, "ra"))[: len(log)]:
            _draw_text(draw, (x, bottom + 8), f"epoch {epoch:.0f}", 14, anchor)
    return picture


def draw_sheet(rows: Sequence[tuple[str, Sequence[tuple[Tensor, str]]]]) -> Image.Image:
    """Rows of images. rows: [(title, [(uint8 image (3, S, S), caption of two lines)])]."""
    size, gap = 150, 14
    columns = max(3, *(len(images) for _, images in rows))
    picture, draw = _canvas(gap + columns * (size + gap), len(rows) * (size + 90) + gap)
    for i, (title, images) in enumerate(rows):
        top = i * (size + 90) + gap
        _draw_text(draw, (gap, top), title, 20)
        for j, (image, caption) in enumerate(images):
            left = gap + j * (size + gap)
            _draw_photo(picture, image, left, top + 32, size)
            for k, line in enumerate(caption.split("\n")):
                _draw_text(draw, (left, top + size + 36 + 18 * k), line, 15, max_width=size)
    return picture


def explain(
    images: Tensor, rows: Sequence[dict[str, Any]], rank_names: Sequence[str]
) -> Image.Image:
    """Each image as the model sees it, beside its distribution over the ranks; 1000 pixels wide.

    images: uint8 (B, 3, S, S), of which the first MAX_EXPLAINED are drawn. rows: one dict each, as
    in predict.py's --json: file, rank (name), expected_rank_index, value, probs (R,).
    """
    images, num_ranks, height = images[:MAX_EXPLAINED], len(rank_names), 330
    left, right, width = 390, 970, 580
    picture, draw = _canvas(1000, height * len(images))
    for i, (image, row) in enumerate(zip(images, rows)):
        start = i * height
        top, bottom = start + 84, start + 276
        probs = [float(prob) for prob in row["probs"]]
        _draw_photo(picture, image, 30, start + 14, 270)
        _draw_text(draw, (30, start + 290), Path(row["file"]).name, 16, max_width=270)
        _draw_text(draw, (left, start + 12), f"{row['rank']}: {max(probs):.0%}", 24, max_width=380)
        _draw_text(draw, (right, start + 16), f"expected {row['value']:.2f}", 20, "ra")
        inks = [DARK_BAR if prob == max(probs) else LIGHT_BAR for prob in probs]
        _draw_bars(draw, (left, top, right, bottom), probs, inks, rank_names, ".1%", gap=24)
        x = left + (row["expected_rank_index"] + 0.5) * width / num_ranks
        draw.line((x, top, x, bottom), "white", 2)  # black and white show on any bar
        for y in range(top, bottom, 8):
            draw.line((x, y, x, y + 4), INK, 2)
        draw.polygon([(x - 7, top - 14), (x + 7, top - 14), (x, top - 2)], INK)
    return picture


# ------------------------------------------------------------------------------ what they share


def printable(text: str) -> str:
    """The text with escapes for what is no UTF-8, as in some file names."""
    return text.encode("utf-8", "backslashreplace").decode()


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (width, height), "white")
    return picture, ImageDraw.Draw(picture)


def _draw_text(draw, xy, text, size, anchor="la", ink=INK, max_width=math.inf):
    """Text, cut with ... where it is wider than max_width."""
    text = printable(text)
    font, end = ImageFont.load_default(size), ""
    while draw.textlength(text + end, font) > max_width:
        text, end = text[:-1], "..."
    draw.text(xy, text + end, ink, font, anchor)


def _draw_photo(picture, image, left, top, size):
    photo = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())  # (S, S, 3)
    picture.paste(photo.resize((size, size), Image.Resampling.BICUBIC), (left, top))


def _draw_shades(picture, shades, left, top, width, height):
    """Shades (H, W), 0 .. 1, from white to dark blue; lightness falls all the way, also in grey."""
    stops = [(255, 255, 255), (190, 211, 232), (107, 155, 199), (40, 92, 145), (12, 32, 66)]
    positions = np.linspace(0, 1, len(stops))
    rgb = np.stack([np.interp(shades, positions, channel) for channel in zip(*stops)], -1)
    pixels = Image.fromarray(rgb.round().astype(np.uint8))
    picture.paste(pixels.resize((width, height), Image.Resampling.NEAREST), (left, top))
    ImageDraw.Draw(picture).rectangle((left, top, left + width, top + height), outline=INK)


def _draw_grid(draw, box: Box, highest: float, number_format: str):
    """Lines and values at 0, half and all of `highest`."""
    left, top, right, bottom = box
    for share in (1, 0.5, 0):
        y = bottom - share * (bottom - top)
        draw.line((left, y, right, y), GRID if share else INK)
        _draw_text(draw, (left - 8, y), f"{share * highest:{number_format}}", 14, "rm")


def _draw_bars(draw, box: Box, values, inks, names, number_format, gap=14):
    """A bar per rank, above the ranks' names."""
    left, top, right, bottom = box
    highest, half = max(values) or 1, max(1, 0.4 * (right - left) / len(values))
    _draw_grid(draw, box, highest, number_format)
    for x, value, ink in zip(_centers(left, right - left, len(values)), values, inks):
        draw.rectangle((x - half, bottom - value / highest * (bottom - top), x + half, bottom), ink)
    draw.line((left, bottom, right, bottom), INK)
    _draw_rank_axis(draw, names, left, right - left, bottom, gap)


def _draw_rank_axis(draw, names, start, length, y, gap=14):
    """Rank names below a chart."""
    font, edge, longest = ImageFont.load_default(14), draw.im.size[0] - 2, 110
    widest = min(longest, max(draw.textlength(name, font) for name in names))
    max_width = length / len(names) - 4 if len(names) <= MAX_NAMED else longest
    for x, name in _named(names, start, length, widest + gap):
        draw.line((x, y, x, y + 4), INK)
        _draw_text(draw, (min(x, edge - widest / 2), y + 8), name, 14, "ma", max_width=max_width)


def _named(names, start, length, room):
    """[(position, name)] along an axis: all of up to MAX_NAMED ranks, of more every n-th, so that
    each has `room` pixels."""
    step, num_ranks = 1, len(names)
    if num_ranks > MAX_NAMED:
        steps = (1, 2, 5, 10, 20, 50, 100, 200, 500)
        step = next((step for step in steps if step * length / num_ranks >= room), num_ranks)
    return list(zip(_centers(start, length, num_ranks), names))[::step]


def _centers(start, length, count):
    cell = length / count
    return [start + (i + 0.5) * cell for i in range(count)]
