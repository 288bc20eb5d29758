"""Ranks of images, by a model that train.py exported: no text tower, no vocabulary, no network.

    python predict.py runs/NAME/exported.pt photo.jpg folder list.csv    # a table; --csv, --json
    python predict.py runs/NAME/exported.pt photo.jpg --explain why.png  # distributions, drawn

    predictor = load("runs/NAME/exported.pt")
    answers = predictor(["photo.jpg", Image.open("other.png")])
    answers["name"], answers["value"]                          # ['31', '8'], tensor([30.4, 8.9])

Images are prepared as in the evaluation. Dims: B images, R ranks, S image size, D joint dim.
Read from the top: load, Predictor, ONNX, the command line, how images are read.
Copy together with: exported.py and its files, data/, evaluation/plots.py. exported.py alone gives
the model, for your own tensors.
"""

import csv
import json
import os
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader

import data
from evaluation.plots import MAX_EXPLAINED, explain, printable
from exported import load_model, save_prototypes
from ordinalclip import OrdinalCLIP, Regression

COLUMNS = ("file", "rank", "rank_index", "expected_rank_index", "value", "prob")  # of --csv
ImageLike = str | Path | Image.Image
Answers = dict[str, Any]  # of B images: see Predictor.__call__
Rows = list[dict[str, Any]]  # one per image: COLUMNS and probs (R,), or file and error


def load(path: str | Path, device: str | torch.device = "cpu") -> "Predictor":
    """The Predictor of an exported.pt, in float32.

    Errors: those of `exported.load_model`.
    """
    return Predictor(*load_model(path), device)


@dataclass(eq=False)
class Predictor:
    """Images -> ranks."""

    model: OrdinalCLIP | Regression  # in evaluation mode, on `device`
    rank_names: list[str]  # [R]
    rank_values: list[float]  # [R], an age, say
    preprocess: dict[str, Any]  # image_size, mean, std; perhaps squash, resample, draft
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        self.model.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)

    def __call__(
        self, images: ImageLike | Iterable[ImageLike], *, batch_size: int = 32, workers: int = 0
    ) -> Answers:
        """Paths or PIL images (B) -> dict, on the CPU:

            name [B] and rank (B,), the most probable; expected (B,), the mean rank index;
            value (B,), the mean of rank_values (an age, say); probs (B, R)

        Raises ValueError for no images and unreadable ones, FileNotFoundError for missing ones.
        """
        images = [images] if isinstance(images, (str, os.PathLike, Image.Image)) else list(images)
        if not images:
            raise ValueError("got no image; expected paths or PIL images")
        batches = []
        for _, answers, errors in self.batches(images, batch_size, workers):
            if errors:
                raise errors[0][1]
            batches.append(answers)
        names = [name for batch in batches for name in batch["name"]]
        tensors = {k: torch.cat([b[k] for b in batches]) for k in batches[0] if k != "name"}
        return dict(name=names, **tensors)

    def batches(
        self, images: Sequence[ImageLike], batch_size: int = 32, workers: int = 0
    ) -> Iterator[tuple[list[int], Answers | None, list[tuple[int, Exception]]]]:
        """Yield (indices of the images that were read, their answers or None, [(index, error)])."""
        read = partial(_read_batch, self.preprocess)  # runs in the workers
        images = list(enumerate(images))
        loader = DataLoader(images, batch_size, collate_fn=read, num_workers=workers)
        for pixels, indices, errors in loader:
            yield indices, self.predict(pixels) if indices else None, errors

    def predict(self, pixels: Tensor) -> Answers:
        """uint8 images (B, 3, S, S) -> the dict of __call__."""
        mean, std = self.preprocess["mean"], self.preprocess["std"]
        images = data.normalize(pixels.to(self.device), mean, std)  # (B, 3, S, S)
        images = images.contiguous(memory_format=torch.channels_last)
        impl = "torch" if self.device.type == "cpu" else "auto"  # auto would print why
        outputs = self.model.predict(images, impl=impl)
        outputs = {key: output.cpu() for key, output in outputs.items()}
        if not outputs["probs"].isfinite().all():
            raise ValueError(
                "the model answers nan: its weights are finite, but too large or damaged"
            )
        names = [self.rank_names[rank] for rank in outputs["rank"].tolist()]
        value = outputs["probs"] @ outputs["probs"].new_tensor(self.rank_values)  # (B,)
        return dict(name=names, value=value, **outputs)


def export_onnx(predictor: Predictor, path: str | Path) -> None:
    """Write ONNX: `images` (B, 3, S, S) float32, normalised -> `probs` (B, R), `expected` (B,).

    B is free; preprocessing, rank names and values are JSON in the metadata. The file is moved to
    `path` once its outputs equal PyTorch's. Raises ImportError without onnx and onnxscript,
    ValueError if the outputs differ.
    """
    try:
        import onnx.reference
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        message = f"--onnx needs two packages ({error}): pip install onnx onnxscript"
        raise ImportError(message) from error

    class Outputs(nn.Module):  # torch.export takes modules only
        def forward(self, images):
            outputs = self.model.predict(images, impl="torch")
            return outputs["probs"], outputs["expected"]

    outputs, size = Outputs(), predictor.preprocess["image_size"]
    metadata = dict(rank_names=predictor.rank_names, rank_values=predictor.rank_values)
    metadata = {key: json.dumps(v) for key, v in (metadata | predictor.preprocess).items()}
    outputs.model = predictor.model

    def save(tmp_path):
        images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
        outputs.eval().cpu()
        shapes = ({0: torch.export.Dim("batch")},)  # any B; strict, else it is fixed
        graph = torch.export.export(outputs, (images[:2],), dynamic_shapes=shapes, strict=True)
        names = dict(input_names=["images"], output_names=["probs", "expected"])
        program = torch.onnx.export(graph, **names, dynamo=True, verbose=False)
        program.model.metadata_props.update(metadata)
        program.save(tmp_path)
        session = onnx.reference.ReferenceEvaluator(onnx.load(tmp_path))
        onnx_outputs = map(torch.from_numpy, session.run(None, dict(images=images.numpy())))
        for expected, actual in zip(outputs(images), onnx_outputs):
            if not torch.allclose(expected, actual, atol=1e-3, rtol=1e-3):
                raise ValueError(f"the ONNX model answers {actual}; expected PyTorch's {expected}")

    data.atomic_write(Path(path), save)
    outputs.to(predictor.device)


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("exported", metavar="EXPORTED", help="runs/NAME/exported.pt")
    add("images", nargs="*", metavar="IMAGE", help="images, folders, lists (.txt, .csv, .tsv)")
    add("--csv", metavar="FILE", help="write the predictions as a table")
    add("--json", metavar="FILE", help="write the predictions with all probabilities")
    add("--explain", metavar="FILE", help=f"draw {MAX_EXPLAINED} images and their distributions")
    add("--save-prototypes", metavar="FILE", help="write only the rank prototypes")
    add("--onnx", metavar="FILE", help="write the model as ONNX; needs onnx and onnxscript")
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--batch-size", type=int, default=32, help="images per batch (default: 32)")
    add(
        "--workers", type=int, help="reading processes (default: none for few images, else up to 8)"
    )
    args = parser.parse_intermixed_args(argv)  # images also after options
    for name, value in vars(args).items():  # Path("") would be the current folder
        if any(not str(v).strip() for v in (value if isinstance(value, list) else [value])):
            parser.error(f"{name.replace('_', '-')} is empty; give a value, or leave it out")
    tables = [f"--{name}" for name in ("csv", "json", "explain") if getattr(args, name)]
    if not args.images and (tables or not (args.save_prototypes or args.onnx)):
        what = ", ".join(tables) or "predictions"
        parser.error(f"give images, folders or lists for {what}")
    max_workers = max(64, 2 * (os.cpu_count() or 1))  # as of train.py
    if args.batch_size < 1 or not 0 <= (args.workers or 0) <= max_workers:
        parser.error(f"--batch-size must be at least 1, --workers at least 0 and <= {max_workers}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit code: 0, or 1 if an image could not be read."""
    args = parse_args(argv)
    try:
        paths = find_images(args.images)
        check_outputs(args, paths)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
            message = f"--device {device}: there is none; expected cpu, cuda or cuda:N"
            raise ValueError(message) from error
        predictor = load(args.exported, device)
        if args.save_prototypes and isinstance(predictor.model, Regression):
            raise ValueError(f"{args.exported} is of a regression run, which has no prototypes")
        if args.save_prototypes:
            prototypes, scale = predictor.model.prototypes(), predictor.model.logit_scale
            names, values = predictor.rank_names, predictor.rank_values
            save_prototypes(args.save_prototypes, prototypes, names, scale, values)
        if args.onnx:
            export_onnx(predictor, args.onnx)
        for path in filter(None, (args.save_prototypes, args.onnx)):
            print(f"wrote {path}", file=sys.stderr)
        if not paths:
            return 0
        rows, failed = predict_all(args, predictor, paths)
        write_outputs(args, predictor, rows, failed)
        return 1 if failed else 0
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"predict.py: {error}") from error


def find_images(arguments: Sequence[str | Path]) -> list[str]:
    """Paths of images, of those in folders and lists; ValueError for a folder or list of none."""
    paths = []
    for argument in map(Path, arguments):
        images = [argument]
        if argument.is_dir():
            images, others = data.find_images(argument)
            if others:
                print(data.count_types(others), file=sys.stderr)
        elif argument.suffix.lower() in (".txt", ".csv", ".tsv"):
            if not argument.exists():
                raise ValueError(f"there is no list {argument}; give images, folders, lists")
            try:
                images = data.read_paths(argument)
            except FileNotFoundError as error:  # the images that are there are predicted
                print(printable(f"{error}"), file=sys.stderr)
                images = data.read_paths(argument, allow_missing=True)
            images = [argument.parent / path for path in images]
        if not images:
            raise ValueError(f"no images in {argument}; expected {' '.join(data.IMAGE_TYPES)}")
        paths += map(str, images)
    return paths


def check_outputs(args: Namespace, paths: Sequence[str]) -> None:
    """ValueError for an output that cannot be written, or would replace an input or another one."""
    inputs, flags = [args.exported, *args.images, *paths], {}
    for flag in ("--csv", "--json", "--explain", "--save-prototypes", "--onnx"):
        if (output := getattr(args, flag[2:].replace("-", "_"))) is None:
            continue
        exists = os.path.exists(output)
        if exists and not os.path.isfile(output):
            raise ValueError(f"{flag} {output} is a folder or device; give the name of a file")
        if exists and any(os.path.exists(f) and os.path.samefile(f, output) for f in inputs):
            raise ValueError(f"{flag} {output} is one of the inputs; give another file")
        if (first := flags.setdefault(os.path.realpath(output), flag)) != flag:
            raise ValueError(f"{first} and {flag} are both {output}; give another file")
        try:
            tempfile.TemporaryFile(dir=Path(output).parent).close()
        except OSError as error:
            message = f"{flag} {output} cannot be written ({error.strerror}); give another folder"
            raise ValueError(message) from error


def predict_all(args: Namespace, predictor: Predictor, paths: list[str]) -> tuple[Rows, Rows]:
    """-> rows of the images that could be read, and file and error of the others."""
    workers = args.workers
    if workers is None:  # starting them takes longer than reading a few images
        workers = min(8, (os.cpu_count() or 1) - 1) if len(paths) > 2 * args.batch_size else 0
    rows, failed, start_time = [], [], time.time()
    for indices, answers, errors in predictor.batches(paths, args.batch_size, workers):
        if indices:
            files = [paths[i] for i in indices]
            columns = [answers[key].tolist() for key in ("rank", "expected", "value")]
            columns += [answers["probs"].max(1).values.tolist(), answers["probs"]]
            for row in zip(files, answers["name"], *columns):
                rows.append(dict(zip((*COLUMNS, "probs"), row)))
        failed += [dict(file=paths[i], error=str(error)) for i, error in errors]
        if sys.stderr.isatty():
            num_read = len(rows) + len(failed)
            speed = f"{num_read / (time.time() - start_time):.0f} images/s "
            print(f"\r  {num_read}/{len(paths)}  {speed}", end="", file=sys.stderr, flush=True)
    print("\r\033[K" if sys.stderr.isatty() else "", end="", file=sys.stderr, flush=True)
    return rows, failed


def write_outputs(args: Namespace, predictor: Predictor, rows: Rows, failed: Rows) -> None:
    """Write the files that were asked for, print the table and what failed."""
    if args.csv:
        data.atomic_write(Path(args.csv), partial(_write_csv, rows))
    if args.json:
        content = dict(rank_names=predictor.rank_names, rank_values=predictor.rank_values)
        content["images"] = [dict(row, probs=row["probs"].tolist()) for row in rows]
        text = json.dumps(dict(content, not_predicted=failed), indent=1) + "\n"
        data.atomic_write(Path(args.json), lambda tmp_path: tmp_path.write_text(text))
    if args.explain and rows:
        spread = torch.linspace(0, len(rows) - 1, min(MAX_EXPLAINED, len(rows)))  # over all of them
        chosen = [rows[i] for i in spread.round().long()]
        pixels, *_ = _read_batch(predictor.preprocess, enumerate(row["file"] for row in chosen))
        picture = explain(pixels, chosen, predictor.rank_names)
        data.atomic_write(Path(args.explain), lambda tmp_path: picture.save(tmp_path, "PNG"))
    if rows:  # after the files, which are whole also if the reader of the table goes, as `head`
        print_table(rows, predictor.rank_names)
    for row in failed:
        path, error = row["file"], row["error"]
        message = error if path in error else f"{path}: {error}"
        print(printable(f"not predicted: {message}"), file=sys.stderr)


def print_table(rows: Rows, rank_names: Sequence[str]) -> None:
    """A line per image, with the 3 best ranks."""
    cells = [("file", "rank", "expected", "prob", "top 3")]
    for row in rows:
        ranks = row["probs"].topk(min(3, len(rank_names))).indices.tolist()
        best = "  ".join(f"{rank_names[rank]} {row['probs'][rank]:.0%}" for rank in ranks)
        file, value, prob = printable(row["file"]), f"{row['value']:.2f}", f"{row['prob']:.1%}"
        cells.append((file, row["rank"], value, prob, best))
    w = [max(map(len, column)) for column in zip(*cells)]  # widths
    for file, rank, value, prob, best in cells:
        print(f"{file:{w[0]}}  {rank:{w[1]}}  {value:>{w[2]}}  {prob:>{w[3]}}  {best}")


def _write_csv(rows, tmp_path):
    with open(tmp_path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for row in rows:
            cells = [row[name] for name in COLUMNS]
            table.writerow([f"{x:.4f}" if isinstance(x, float) else x for x in cells])


def _read_batch(preprocess, items):
    """[(index, path or PIL image)] -> readable uint8 (B, 3, S, S), indices, [(index, error)]."""
    pixels, indices, errors = [], [], []
    for index, image in items:
        try:
            pixels.append(_read_pixels(preprocess, image))
            indices.append(index)
        except (ValueError, OSError) as error:
            errors.append((index, error))
    return torch.stack(pixels) if pixels else None, indices, errors


def _read_pixels(preprocess, image):
    """A path or PIL image -> uint8 (3, S, S), as the evaluation prepares it."""
    names = ("image_size", "squash", "resample", "draft")
    options = {name: preprocess[name] for name in names if name in preprocess}
    images = data.ImageList([(image, 0)], "", **options)
    if isinstance(image, (str, os.PathLike)):
        return images[0][0]
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"got a {type(image).__name__} for an image; expected a path or a PIL image"
        )
    if image.getexif().get(0x0112, 1) != 1:  # a copy loses TIFF's tags: only if it must be turned
        image = ImageOps.exif_transpose(image)
    return images.prepare(data.to_rgb(image))


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # whatever the locale can print
    sys.exit(main())
