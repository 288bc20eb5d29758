"""Ranks of images, from the file that train.py exports: no text tower, no vocabulary, no network.

    python predict.py runs/NAME/exported.pt photo.jpg folder list.csv    # a table; --csv, --json keep it
    python predict.py runs/NAME/exported.pt photo.jpg --explain why.png  # images beside their distributions

    predictor = load("runs/NAME/exported.pt")
    answers = predictor(["photo.jpg", Image.open("other.png")])
    answers["name"], answers["value"]                                    # ['31', '8'], tensor([30.4, 8.9])

Images are prepared as in the evaluation. Letters: B images, R ranks, S image size, D joint dim.
Contents: load, Predictor, prototypes alone, export_onnx, explain; command line; reading, writing, drawing; the
pictures that train.py makes of a run (draw_matrices, draw_error_by_rank, draw_curves, draw_sheet).

Copy-paste: needs ordinalclip.py, kernels/, torch>=2.4, numpy, pillow; clip_model.py or backbones.py, whichever the
image encoder is from; data.py to read and prepare images (without it: predictor.model on tensors of one's own).
"""

import argparse
import contextlib
import csv
import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader

from kernels import match, which_impl
from ordinalclip import FixedPrototypes, OrdinalCLIP

FORMAT, PROTOTYPES_FORMAT = "ordinalclip-1", "ordinalclip-prototypes-1"
KEYS = ("image_encoder", "state_dict", "rank_names", "rank_values", "preprocess")
PROTOTYPES_KEYS = ("prototypes", "rank_names", "rank_values", "logit_scale")
LISTS = {".txt": None, ".csv": ",", ".tsv": "\t"}
EXPLAINED = 6  # images in one picture


def load(path, device="cpu"):
    """The Predictor in an exported.pt, in float32.

    Raises FileNotFoundError where there is none, ValueError for any other file, ImportError where the image
    encoder is timm's or torchvision's and that package is absent.
    """
    content = _read_file(path, FORMAT, KEYS, "the exported.pt that train.py writes")
    name, names, values = content["image_encoder"], content["rank_names"], content["rank_values"]
    state = content["state_dict"]
    prototypes = state.get("prototypes.prototypes", torch.empty(0, 0))  # (R, D)
    if not len(prototypes) == len(names) == len(values):
        raise ValueError(
            f"{path} holds {len(prototypes)} prototypes, {len(values)} values and {len(names)} names of "
            "ranks; expected as many of each (a regression run has no prototypes: it cannot be used here)"
        )
    try:
        encoder = _image_encoder(path, content, prototypes.shape[1])
        model = OrdinalCLIP(encoder, FixedPrototypes(prototypes), 0.0)
        model.load_state_dict(state, assign=True)  # the encoder may have no memory of its own yet
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} holds no whole image encoder {name!r} ({error!r}); export anew"
        ) from error
    return Predictor(model.float(), names, values, content["preprocess"], device)


class Predictor:
    """Images -> ranks. Attributes: model (OrdinalCLIP), rank_names, rank_values, preprocess, device."""

    def __init__(self, model, rank_names, rank_values, preprocess, device="cpu"):
        self.model = (
            model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        )
        self.rank_names, self.rank_values = list(rank_names), list(rank_values)
        self.preprocess, self.device = dict(preprocess), torch.device(device)

    def __call__(self, images, *, batch_size=32, workers=0):
        """Paths or PIL images (B) -> dict, on the CPU:

            name [B] and rank (B,), the most probable; expected (B,), the mean rank index;
            value (B,), the mean of rank_values (an age, say); probs (B, R)

        Raises ValueError for no image and for one that cannot be read, FileNotFoundError for one not there.
        """
        images = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else list(images)
        if not images:
            raise ValueError("got no image; expected paths or PIL images")
        parts = []
        for _, answers, failed in self.batches(images, batch_size, workers):
            if failed:
                raise failed[0][1]
            parts.append(answers)
        return _joined(parts)

    def batches(self, images, batch_size=32, workers=0):
        """Yields (indices read, their answers or None, [(index, error)]): a bad file stops nothing."""
        read = partial(_read_batch, self.preprocess)  # in the workers
        loader = DataLoader(
            list(enumerate(images)), batch_size, collate_fn=read, num_workers=workers
        )
        for pixels, indices, failed in loader:
            yield indices, self.predict(pixels) if indices else None, failed

    def predict(self, pixels):
        """uint8 images (B, 3, S, S) -> dict as above."""
        import data

        images = data.normalize(
            pixels.to(self.device), self.preprocess["mean"], self.preprocess["std"]
        )
        images = images.contiguous(memory_format=torch.channels_last)
        found = self.model.predict(images, impl=which_impl(self.device)[0])
        found = {key: value.cpu() for key, value in found.items()}
        names = [self.rank_names[rank] for rank in found["rank"].tolist()]
        value = found["probs"] @ found["probs"].new_tensor(
            self.rank_values
        )  # (B, R) x (R,) -> (B,)
        return dict(name=names, value=value, **found)


def save_prototypes(path, prototypes, rank_names, logit_scale, rank_values=None):
    """The prototypes (R, D) alone, for who has their image encoder: a few hundred KB.

    They fit the encoder they were trained with: the public CLIP only where that was not trained along.
    logit_scale is a log, as in CLIP; rank_values are 0 .. R-1 by default. Raises ValueError for other sizes.
    """
    values = range(len(rank_names)) if rank_values is None else rank_values
    if prototypes.dim() != 2 or not len(prototypes) == len(rank_names) == len(values):
        raise ValueError(
            f"got prototypes {tuple(prototypes.shape)}, {len(rank_names)} rank_names and {len(values)} "
            "rank_values; expected (R, D), R and R"
        )
    prototypes = prototypes.detach().float().cpu().clone()
    found = (prototypes, list(rank_names), [float(value) for value in values], float(logit_scale))
    write(
        path,
        lambda part: torch.save(dict(zip(PROTOTYPES_KEYS, found), format=PROTOTYPES_FORMAT), part),
    )


def load_prototypes(path):
    """-> dict(prototypes (R, D), rank_names, rank_values, logit_scale) that save_prototypes wrote.

        saved = load_prototypes("ranks.pt")
        model = OrdinalCLIP(encoder, FixedPrototypes(saved["prototypes"]), saved["logit_scale"])

    Raises FileNotFoundError where there is none, ValueError for any other file.
    """
    content = _read_file(
        path, PROTOTYPES_FORMAT, PROTOTYPES_KEYS, "a file that save_prototypes writes"
    )
    return {key: content[key] for key in PROTOTYPES_KEYS}


def export_onnx(predictor, path):
    """Writes ONNX: `images` (B, 3, S, S) float32, normalised -> `probs` (B, R), `expected` (B,); B is free.

    The file gets its name once its answers are PyTorch's. Raises ImportError without onnx and onnxscript,
    ValueError where the answers differ.
    """
    try:
        import onnx.reference
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise ImportError(
            f"--onnx needs two packages ({error}): pip install onnx onnxscript"
        ) from error
    model, size = predictor.model, predictor.preprocess["image_size"]

    class Answers(torch.nn.Module):  # torch.onnx takes a module only
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            features = model.image_encoder(images)  # (B, D)
            return match(features, model.prototypes(), model.logit_scale.exp(), impl="torch")[:2]

    def save(part):
        images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
        answers = Answers().eval().cpu()
        free = ({0: torch.export.Dim("batch")},)  # also in len(images), if strict
        graph = torch.export.export(answers, (images[:2],), dynamic_shapes=free, strict=True)
        names = dict(input_names=["images"], output_names=["probs", "expected"])
        torch.onnx.export(graph, **names, dynamo=True, verbose=False).save(part)
        theirs = onnx.reference.ReferenceEvaluator(onnx.load(part)).run(
            None, dict(images=images.numpy())
        )
        for mine, other in zip(answers(images), map(torch.from_numpy, theirs)):
            if not torch.allclose(mine, other, atol=1e-3, rtol=1e-3):
                raise ValueError(f"the ONNX model answers {other}; PyTorch {mine}")

    write(path, save)
    model.to(predictor.device)


def explain(images, answers, rank_names):
    """-> a picture, 1000 wide: each image as the model sees it beside its distribution over the ranks.

    images: uint8 (B, 3, S, S), of which the first 6 are drawn. answers: what the Predictor gives for them,
    with `file` [B] for the captions.
    """
    count = min(len(images), EXPLAINED)
    picture = Image.new("RGB", (_WIDTH, _ROW * count), "white")
    for i in range(count):
        _draw_row(
            picture,
            i * _ROW,
            images[i],
            {key: value[i] for key, value in answers.items()},
            rank_names,
        )
    return picture


# ------------------------------------------------------------------------------------------ command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("exported", metavar="EXPORTED", help="runs/NAME/exported.pt")
    add(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="images, folders (with all below), .txt .csv .tsv lists",
    )
    add("--csv", metavar="FILE", help="write the predictions as a table")
    add("--json", metavar="FILE", help="write the predictions with all probabilities")
    add(
        "--explain",
        metavar="FILE",
        help=f"draw the first {EXPLAINED} images and their distributions (PNG)",
    )
    add("--save-prototypes", metavar="FILE", help="write the rank prototypes alone")
    add("--onnx", metavar="FILE", help="write the model as ONNX; needs onnx and onnxscript")
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--batch-size", type=int, default=32, help="images at once (default: 32)")
    add(
        "--workers",
        type=int,
        help="processes that read images (default: none for a few, else up to 8)",
    )
    args = parser.parse_args(argv)
    if not (args.images or args.save_prototypes or args.onnx):
        parser.error("give images, a folder or a list")
    if args.batch_size < 1 or (args.workers or 0) < 0:
        parser.error("--batch-size must be at least 1, --workers at least 0")
    return args


def main(argv=None):
    """-> exit code: 0, or 1 where an image could not be read."""
    args = parse_args(argv)
    try:
        paths = find_images(args.images)
        predictor = load(
            args.exported, args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        if args.save_prototypes:
            model, names, values = predictor.model, predictor.rank_names, predictor.rank_values
            save_prototypes(
                args.save_prototypes, model.prototypes(), names, model.logit_scale, values
            )
        if args.onnx:
            export_onnx(predictor, args.onnx)
        return report(args, predictor, *predict_all(args, predictor, paths)) if paths else 0
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"predict.py: {error}") from error


def find_images(arguments):
    """The image paths behind files, folders and lists. Raises ValueError for a place without any."""
    import data

    paths = []
    for place in map(Path, arguments):
        found = [place]
        if place.is_dir():
            found = [
                file for file in sorted(place.rglob("*")) if file.suffix.lower() in data.IMAGE_TYPES
            ]
            found = [file for file in found if not file.name.startswith(".")]
        elif place.suffix.lower() in LISTS:
            found = _read_list(place)
        if not found:
            raise ValueError(f"no images in {place}; expected {' '.join(data.IMAGE_TYPES)}")
        paths += map(str, found)
    return paths


def predict_all(args, predictor, paths):
    """-> answers, with `file` for the paths that could be read (None: no one), and [(path, error)]."""
    workers = args.workers
    if workers is None:  # starting them takes longer than reading a few images
        workers = min(8, (os.cpu_count() or 1) - 1) if len(paths) > 2 * args.batch_size else 0
    parts, failed, done, began, tty = [], [], 0, time.time(), sys.stderr.isatty()
    for indices, answers, errors in predictor.batches(paths, args.batch_size, workers):
        parts += [dict(answers, file=[paths[i] for i in indices])] if indices else []
        failed += [(paths[i], str(error)) for i, error in errors]
        done += len(indices) + len(errors)
        line = f"\r  {done}/{len(paths)}  {done / (time.time() - began):.0f} images/s "
        print(line if tty else "", end="", file=sys.stderr, flush=True)
    print("\r\033[K" if tty else "", end="", file=sys.stderr, flush=True)
    return _joined(parts) if parts else None, failed


def report(args, predictor, answers, failed):
    """The table, the files that were asked for, what failed -> exit code."""
    names = predictor.rank_names
    rows = _rows(answers, names) if answers else []
    print_table(rows)
    if args.csv:
        write(args.csv, partial(_write_csv, rows))
    if args.json:
        probs = answers["probs"].tolist() if answers else []
        images = [dict({key: row[key] for key in COLUMNS}, probs=p) for row, p in zip(rows, probs)]
        content = dict(rank_names=names, rank_values=predictor.rank_values, images=images)
        content["not_predicted"] = [dict(file=path, error=error) for path, error in failed]
        write(args.json, lambda part: part.write_text(json.dumps(content, indent=1) + "\n"))
    if args.explain and rows:
        pixels, _, _ = _read_batch(
            predictor.preprocess, list(enumerate(answers["file"][:EXPLAINED]))
        )
        write(args.explain, lambda part: explain(pixels, answers, names).save(part, "PNG"))
    for path, error in failed:
        print(
            _printable(f"not predicted: {error if path in error else f'{path}: {error}'}"),
            file=sys.stderr,
        )
    return 1 if failed else 0


def print_table(rows):
    cells = [("file", "rank", "expected", "prob", "top 3")] if rows else []
    for row in rows:
        top = "  ".join(f"{name} {prob:.0%}" for name, prob in row["top"])
        cells.append(
            (_printable(row["file"]), row["rank"], f"{row['value']:.2f}", f"{row['prob']:.1%}", top)
        )
    a, b, c, d, _ = (max(map(len, column)) for column in zip(*cells)) if rows else (0,) * 5
    for file, rank, value, prob, top in cells:
        print(f"{file:{a}}  {rank:{b}}  {value:>{c}}  {prob:>{d}}  {top}")


# ------------------------------------------------------------------------------------------- reading


def _read_file(path, form, keys, expected):
    """What torch.save wrote to a file of that `format`, tensors on the CPU."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; expected {expected}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have errors of their own
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}); expected {expected}"
        ) from error
    content = content if isinstance(content, dict) else {}
    missing = [key for key in keys if key not in content]
    if content.get("format") != form or missing:
        got = f"format {content.get('format')!r} with {', '.join(map(str, [*content][:9])) or 'no entries'}"
        expected += f": {form!r} with {', '.join(keys)}"
        raise ValueError(f"{path} is another file: got {got}; expected {expected}")
    return content


def _image_encoder(path, content, dim):
    """The encoder that the weights of the file are for, not yet with them."""
    name, state = content["image_encoder"], content["state_dict"]
    if name != "clip":
        from backbones import build_image_encoder

        # timm's and torchvision's may have constants that no state dict holds
        with contextlib.nullcontext() if ":" in name else torch.device("meta"):
            return build_image_encoder(name, dim)
    from clip_model import image_tower

    with torch.device("meta"):  # no time spent on initial values
        resnet = "image_encoder.attnpool.positional_embedding" in state  # which has no GELU
        return image_tower(state, dim, resnet or _quick_gelu(path, content), "image_encoder.")


def _quick_gelu(path, content):
    """The activation of a ViT, which shapes cannot tell: as the file says, or as its run was told."""
    from clip_model import MODELS

    settings = content.get("results", {}).get("settings", {})
    said = content.get("quick_gelu", settings.get("quick_gelu"))
    if said is None and settings.get("clip") not in (*MODELS, "tiny"):
        print(f"{path} does not say its activation; taking QuickGELU, OpenAI's", file=sys.stderr)
    return True if said is None else said


def _read_batch(preprocess, items):
    """[(index, path or PIL image)] -> uint8 (B, 3, S, S) of what can be read, indices, [(index, error)]."""
    pixels, indices, failed = [], [], []
    for index, image in items:
        try:
            pixels.append(_read_pixels(preprocess, image))
            indices.append(index)
        except (ValueError, OSError) as error:
            failed.append((index, error))
    return torch.stack(pixels) if pixels else None, indices, failed


def _read_pixels(preprocess, image):
    """A path or PIL image -> uint8 (3, S, S), as the evaluation prepares it."""
    import data

    settings = {
        key: preprocess[key] for key in ("image_size", "squash", "resample") if key in preprocess
    }
    images = data.ImageList([(image, 0)], "", **settings)
    if isinstance(image, (str, os.PathLike)):
        return images[0][0]
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"got a {type(image).__name__} for an image; expected a path or a PIL image"
        )
    if image.getexif().get(0x0112, 1) != 1:  # a copy loses TIFF's tags, so only where it must turn
        image = ImageOps.exif_transpose(image)
    return images.prepare(data.to_rgb(image))


def _read_list(path):
    """Image paths of a list, relative to its folder; a label behind them is ignored."""
    import data

    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    lines = [line for line in lines if line and not line.startswith("#")]
    if delimiter := LISTS[path.suffix.lower()]:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
    else:  # paths may hold spaces, labels none
        rows = [
            [x] if Path(x).suffix.lower() in data.IMAGE_TYPES else x.rsplit(None, 1) for x in lines
        ]
    header = [cell.lower() for cell in rows[0]] if rows else []
    column = next((header.index(name) for name in data.PATH_COLUMNS if name in header), None)
    rows = rows if column is None else rows[1:]
    return [path.parent / row[column or 0] for row in rows if len(row) > (column or 0)]


# ------------------------------------------------------------------------------------------- writing

COLUMNS = ("file", "rank", "rank_index", "expected_rank_index", "value", "prob")


def _joined(parts):
    """Dicts of lists or tensors -> one dict."""
    columns = {key: [part[key] for part in parts] for key in parts[0]}
    return {
        key: torch.cat(v) if torch.is_tensor(v[0]) else sum(v, []) for key, v in columns.items()
    }


def _rows(answers, rank_names):
    """One dict per image, of words and plain numbers: COLUMNS and top."""
    probs, ranks = answers["probs"].topk(min(3, len(rank_names)))  # (B, 3) each
    tops = [
        [(rank_names[r], p) for r, p in zip(*row)] for row in zip(ranks.tolist(), probs.tolist())
    ]
    found = (answers[key].tolist() for key in ("rank", "expected", "value"))
    cells = zip(answers["file"], answers["name"], *found, probs[:, 0].tolist())
    return [dict(zip(COLUMNS, row), top=top) for row, top in zip(cells, tops)]


def _write_csv(rows, part):
    with open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for row in rows:
            cells = (row[key] for key in COLUMNS)
            table.writerow(f"{cell:.4f}" if isinstance(cell, float) else cell for cell in cells)


def write(path, writer):
    """A file appears under its name only when it is whole."""
    part = Path(f"{path}.part")
    try:
        writer(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _printable(text):
    return text.encode("utf-8", "backslashreplace").decode()  # file names may be no UTF-8


# ------------------------------------------------------------------------------------------- drawing

_WIDTH, _ROW, _PHOTO = 1000, 330, 270  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 390, 970, 84, 276  # of the chart, in its row
_BAR, _BEST, _INK, _FAINT = "#a9bfd6", "#1d3a5f", "#111111", "#d5d5d5"  # told apart in grey, too


def _draw_row(picture, top, image, answer, rank_names):
    photo = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture.paste(photo.resize((_PHOTO, _PHOTO), Image.Resampling.BICUBIC), (30, top + 14))
    draw, probs = ImageDraw.Draw(picture), answer["probs"].tolist()
    _text(draw, (30, top + 290), Path(answer["file"]).name, 16, room=_PHOTO)
    _text(draw, (_LEFT, top + 12), f"{answer['name']}: {max(probs):.0%}", 24, room=380)
    _text(draw, (_RIGHT, top + 16), f"expected {answer['value']:.2f}", 20, "ra")
    _draw_bars(draw, top, probs)
    _draw_names(draw, top, rank_names)
    x, y = _place(answer["expected"].item(), len(probs)), top + _TOP
    draw.line((x, y, x, top + _BOTTOM), "white", 2)  # black and white show on any bar
    for dash in range(y, top + _BOTTOM, 8):
        draw.line((x, dash, x, dash + 4), _INK, 2)
    draw.polygon([(x - 7, y - 14), (x + 7, y - 14), (x, y - 2)], _INK)


def _draw_bars(draw, top, probs):
    highest, half = max(probs), max(1, 0.4 * (_RIGHT - _LEFT) / len(probs))
    heights = [p / highest * (_BOTTOM - _TOP) for p in probs]
    for share in (1, 0.5, 0):
        y = top + _BOTTOM - share * (_BOTTOM - _TOP)
        for rank, height in enumerate(heights if not share else ()):
            x = _place(rank, len(probs))
            draw.rectangle(
                (x - half, y - height, x + half, y), _BEST if probs[rank] == highest else _BAR
            )
        draw.line((_LEFT, y, _RIGHT, y), _FAINT if share else _INK)
        _text(draw, (_LEFT - 8, y), f"{share * highest:.1%}", 14, "rm")


def _draw_names(draw, top, names):
    """Below the axis, as many as do not touch."""
    widest = min(150, max(draw.textlength(name, ImageFont.load_default(14)) for name in names))
    needed = (widest + 24) * len(names) / (_RIGHT - _LEFT)
    step = next(
        (step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if step >= needed), len(names)
    )
    for rank in range(0, len(names), step):
        x = _place(rank, len(names))
        draw.line((x, top + _BOTTOM, x, top + _BOTTOM + 4), _INK)
        _text(
            draw,
            (min(x, _WIDTH - 2 - widest / 2), top + _BOTTOM + 8),
            names[rank],
            14,
            "ma",
            room=150,
        )


def _place(rank, num_ranks):
    return _LEFT + (rank + 0.5) * (_RIGHT - _LEFT) / num_ranks


def _text(draw, xy, text, size, anchor="la", room=math.inf):
    text, font, end = _printable(text), ImageFont.load_default(size), ""
    while draw.textlength(text + end, font) > room:
        text, end = text[:-1], "..."
    draw.text(xy, text + end, _INK, font, anchor)


# ------------------------------------------------------------------------------- pictures of a whole run

_SIDE = 400  # pixels of a matrix


def draw_matrices(matrices, titles, rank_names, axes, span=None):
    """-> a picture of matrices (R, R) side by side on one colour scale; the darker, the larger.

    axes: what (columns, rows) are. span: the scale's (lowest, highest) value, default theirs. Up to 12 ranks carry
    their figures.
    """
    low, high = span or (
        min(float(m.min()) for m in matrices),
        max(float(m.max()) for m in matrices),
    )
    step = _SIDE + 150
    picture = Image.new("RGB", (step * len(matrices) + 110, _SIDE + 150), "white")
    draw = ImageDraw.Draw(picture)
    for i, (matrix, title) in enumerate(zip(matrices, titles)):
        left, top = 120 + i * step, 56
        shades = (matrix.double() - low) / max(high - low, 1e-12)  # (R, R)
        pixels = Image.fromarray(_ramp(shades.clamp(0, 1).numpy()))
        picture.paste(pixels.resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (left, top))
        draw.rectangle((left, top, left + _SIDE, top + _SIDE), outline=_INK)
        _text(draw, (left, 14), title, 20, room=_SIDE + 40)
        if len(matrix) <= 12:
            _draw_figures(draw, left, top, matrix, shades)
        _name_axis(draw, rank_names, left, top + _SIDE, _SIDE, axes[0])
        _name_axis(draw, rank_names, left, top, _SIDE, axes[1], upright=True)
    _draw_scale(picture, step * len(matrices) + 26, 56, low, high)
    return picture


def draw_error_by_rank(rows):
    """-> bars of the MAE (most probable rank) of each rank, over bars of its training images.

    rows: dicts of rank, train_images, test_images, mae_argmax, for the ranks that were tested.
    """
    names = [row["rank"] for row in rows]
    picture = Image.new("RGB", (1000, 580), "white")
    draw = ImageDraw.Draw(picture)
    mae, images = "MAE of the most probable rank, test images", "training images"
    charts = (("mae_argmax", mae, 50, 290), ("train_images", images, 400, 510))
    for key, title, top, bottom in charts:
        values = [row[key] for row in rows]
        _text(draw, (80, top - 34), title, 18)
        _draw_columns(draw, values, 80, 970, top, bottom)
        _name_axis(draw, names, 80, bottom, 890, "true rank")
    return picture


def draw_curves(log):
    """-> losses, and validation MAE of the expected and the most probable rank, epoch by epoch.

    log: rows of log.csv as numbers.
    """
    picture = Image.new("RGB", (1000, 420), "white")
    draw = ImageDraw.Draw(picture)
    charts = (
        ("loss", (("i2t", "image to text"), ("t2i", "text to image")), 80),
        (
            "validation MAE, in ranks",
            (("val_mae_expected", "expected rank"), ("val_mae_argmax", "most probable")),
            570,
        ),
    )
    for title, lines, left in charts:
        _text(draw, (left, 12), title, 20)
        _draw_lines(
            draw,
            [row["epoch"] for row in log],
            [([row[key] for row in log], name) for key, name in lines],
            left,
            left + 400,
            84,
            360,
        )
    return picture


def draw_sheet(rows):
    """-> rows of images with captions. rows: [(title, [(uint8 image (3, S, S), caption of two lines)])]."""
    size, gap = 150, 14
    most = max(len(images) for _, images in rows)
    picture = Image.new(
        "RGB", (gap + max(3, most) * (size + gap), len(rows) * (size + 90) + gap), "white"
    )
    draw = ImageDraw.Draw(picture)
    for i, (title, images) in enumerate(rows):
        top = i * (size + 90) + gap
        _text(draw, (gap, top), title, 20)
        for j, (image, caption) in enumerate(images):
            photo = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            left = gap + j * (size + gap)
            picture.paste(photo.resize((size, size), Image.Resampling.BICUBIC), (left, top + 32))
            for k, line in enumerate(caption.split("\n")):
                _text(draw, (left, top + size + 36 + 18 * k), line, 15, room=size)
    return picture


def _ramp(shades):
    """0 .. 1 -> white to dark blue, (..., 3) uint8; lightness falls all the way, so it reads in grey."""
    stops = np.array(
        [(255, 255, 255), (190, 211, 232), (107, 155, 199), (40, 92, 145), (12, 32, 66)]
    )
    at = [
        np.interp(shades, np.linspace(0, 1, len(stops)), stops[:, channel]) for channel in range(3)
    ]
    return np.stack(at, -1).round().astype(np.uint8)


def _draw_figures(draw, left, top, matrix, shades):
    cell = _SIDE / len(matrix)
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            text = f"{value:.2f}" if isinstance(value, float) else str(value)
            ink = "white" if shades[i, j] > 0.55 else _INK
            draw.text(
                (left + (j + 0.5) * cell, top + (i + 0.5) * cell),
                text,
                ink,
                ImageFont.load_default(14),
                "mm",
            )


def _draw_scale(picture, left, top, low, high):
    shades = np.repeat(np.linspace(1, 0, _SIDE)[:, None], 18, 1)
    picture.paste(Image.fromarray(_ramp(shades)), (left, top))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, left + 18, top + _SIDE), outline=_INK)
    for share in (0, 0.5, 1):
        _text(
            draw,
            (left + 24, top + _SIDE * (1 - share)),
            f"{low + share * (high - low):.3g}",
            14,
            "lm",
        )


def _name_axis(draw, names, left, top, length, title, upright=False):
    """Rank names along an axis, as many as do not touch, and what the axis is."""
    font, cell = ImageFont.load_default(14), length / len(names)
    room = 26 if upright else min(110, max(draw.textlength(name, font) for name in names)) + 14
    step = next(
        (step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if step * cell >= room), len(names)
    )
    step, room = (1, cell - 4) if len(names) <= 6 else (step, 110)  # of few ranks none is left out
    for rank in range(0, len(names), step):
        middle = (rank + 0.5) * cell
        if upright:
            draw.line((left - 4, top + middle, left, top + middle), _INK)
            _text(draw, (left - 8, top + middle), names[rank], 14, "rm", room=92)
        else:
            draw.line((left + middle, top, left + middle, top + 4), _INK)
            _text(draw, (left + middle, top + 8), names[rank], 14, "ma", room=room)
    if upright:
        _text(draw, (left - 112, top - 22), title, 14)
    else:
        _text(draw, (left + length / 2, top + 32), title, 16, "ma")


def _draw_columns(draw, values, left, right, top, bottom):
    highest, cell = max(values) or 1, (right - left) / len(values)
    for share in (0, 0.5, 1):
        y = bottom - share * (bottom - top)
        draw.line((left, y, right, y), _FAINT)
        _text(draw, (left - 8, y), f"{share * highest:.3g}", 14, "rm")
    for i, value in enumerate(values):
        x, half = left + (i + 0.5) * cell, max(0.5, 0.4 * cell)
        draw.rectangle(
            (x - half, bottom - value / highest * (bottom - top), x + half, bottom), _BEST
        )
    draw.line((left, bottom, right, bottom), _INK)


def _draw_lines(draw, epochs, lines, left, right, top, bottom):
    """Lines over epochs, told apart by shade and width; the y axis starts at 0."""
    highest = max(max(values) for values, _ in lines) or 1
    for share in (0, 0.5, 1):
        y = bottom - share * (bottom - top)
        draw.line((left, y, right, y), _FAINT if share else _INK)
        _text(draw, (left - 8, y), f"{share * highest:.3g}", 14, "rm")
    first, last = epochs[0], max(epochs[-1], epochs[0] + 1)
    for i, ((values, name), ink, width) in enumerate(zip(lines, (_BEST, "#7fa6cc"), (3, 5))):
        points = [
            (
                left + (epoch - first) / (last - first) * (right - left),
                bottom - value / highest * (bottom - top),
            )
            for epoch, value in zip(epochs, values)
        ]
        draw.line(points, ink, width)
        for x, y in points if len(points) < 30 else ():
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), ink)
        draw.line((left + i * 200, 54, left + i * 200 + 30, 54), ink, width)
        _text(draw, (left + i * 200 + 38, 54), name, 15, "lm")
    for epoch, anchor in ((first, "la"), (last, "ra"))[: len(epochs)]:
        _text(
            draw, (left if epoch == first else right, bottom + 8), f"epoch {epoch:.0f}", 14, anchor
        )


if __name__ == "__main__":
    sys.exit(main())
