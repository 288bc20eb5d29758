"""pytest tests/test_predict.py -- the exported file put to use: loading, inputs, tables, picture, ONNX."""

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import backbones
import data
import predict
import train
from clip_model import tiny_clip
from ordinalclip import FixedPrototypes, OrdinalCLIP

ROOT = Path(__file__).parents[1]
TINY = (
    "--clip tiny --image-encoder clip --batch-size 16 --workers 0 --device cpu --lr 0.002".split()
)
NAMES = ["none", "a little", "some", "much"]
PREPROCESS = dict(image_size=64, mean=data.CLIP_MEAN, std=data.CLIP_STD)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on a folder of stripes: -> (run folder, image folder)."""
    root = tmp_path_factory.mktemp("own data") / "stripes"
    rng = np.random.RandomState(0)
    for rank in range(4):
        (root / f"{rank + 1} stripes").mkdir(parents=True)
        for i in range(20):
            x = np.linspace(0, 2 * np.pi * (rank + 1), 90)[None, :, None]
            pixels = 128 + 100 * np.sin(x + rng.uniform(0, 6)) + rng.normal(0, 10, (70, 90, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / f"{rank + 1} stripes" / f"image {i}.png")
    out = tmp_path_factory.mktemp("runs") / "a"
    train.main(["--data", str(root), "--epochs", "1", "--out", str(out), *TINY])
    return out, root


@pytest.fixture
def exported(run):
    return str(run[0] / "exported.pt")


def image_of(seed, mode="RGB", size=(80, 70)):
    pixels = np.random.RandomState(seed).randint(
        0, 256, (size[1], size[0], len(mode)), dtype=np.uint8
    )
    return Image.fromarray(pixels, mode) if mode == "RGB" else Image.fromarray(pixels)


def export(path, encoder, name="clip", dim=128, **more):
    """An exported file as train.export writes it, around any image encoder."""
    torch.manual_seed(0)
    model = OrdinalCLIP(encoder, FixedPrototypes(torch.randn(4, dim)), 3.0).eval()
    content = dict(format="ordinalclip-1", image_encoder=name, state_dict=model.state_dict(), results={},
                   rank_names=NAMES, rank_values=[0.0, 1.0, 2.0, 5.0], preprocess=PREPROCESS)  # fmt: skip
    torch.save(content | more, path)
    return model


# ------------------------------------------------------------------------------------------- predictor


def test_it_answers_what_the_run_answered(run, exported):
    out, root = run
    rows = list(csv.DictReader(open(out / "predictions-best.csv")))
    predictor = predict.load(exported)
    found = predictor([root / row["path"] for row in rows], batch_size=3)
    assert isinstance(predictor.model.prototypes, FixedPrototypes) and not predictor.model.training
    assert found["name"] == [row["rank"] for row in rows]
    expected = [float(row["expected_rank_index"]) for row in rows]
    assert found["expected"].tolist() == pytest.approx(expected, abs=2e-4)
    assert found["probs"].max(1).values.tolist() == pytest.approx(
        [float(r["prob"]) for r in rows], abs=2e-4
    )
    assert [predictor.rank_names[r] for r in found["rank"]] == found["name"]
    assert found["probs"].shape == (len(rows), 4) and (found["probs"].sum(1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("vision", ["resnet", "vit"])
def test_both_kinds_of_tower_come_back_from_their_shapes(tmp_path, vision):
    clip = tiny_clip(vision=vision)
    model = export(tmp_path / "e.pt", clip.visual)
    images = [image_of(0), image_of(1)]
    predictor = predict.load(tmp_path / "e.pt")
    found = predictor(images)
    pixels = torch.stack([predict._read_pixels(PREPROCESS, image) for image in images])
    want = model.predict(data.normalize(pixels, data.CLIP_MEAN, data.CLIP_STD))
    torch.testing.assert_close(found["probs"], want["probs"])
    torch.testing.assert_close(found["value"], want["probs"] @ torch.tensor([0.0, 1.0, 2.0, 5.0]))
    assert not any(p.requires_grad for p in predictor.model.parameters())


@pytest.mark.parametrize(
    "more, quick",
    [
        (dict(), True),
        (dict(quick_gelu=False), False),
        (dict(results=dict(settings=dict(clip="some/file.pt", quick_gelu=False))), False),
        (dict(quick_gelu=True, results=dict(settings=dict(clip="x", quick_gelu=False))), True),
        (dict(results=dict(settings=dict(clip="ViT-B/32", quick_gelu=None))), True),
    ],
)
def test_the_activation_of_a_vit(tmp_path, more, quick):
    export(tmp_path / "e.pt", tiny_clip(vision="vit").visual, **more)
    block = predict.load(tmp_path / "e.pt").model.image_encoder.transformer.resblocks[0]
    assert type(block.mlp.gelu).__name__ == ("QuickGELU" if quick else "GELU")


def test_an_activation_that_nothing_tells_is_said(tmp_path, capsys):
    settings = dict(clip="some/file.pt", quick_gelu=None)
    export(tmp_path / "e.pt", tiny_clip(vision="vit").visual, results=dict(settings=settings))
    predict.load(tmp_path / "e.pt")
    assert "does not say its activation; taking QuickGELU" in capsys.readouterr().err


def test_an_encoder_that_is_not_clips(tmp_path, monkeypatch):
    class Small(torch.nn.Module):  # VGG-16 is 500 MB
        def __init__(self, dim):
            super().__init__()
            self.last = torch.nn.Linear(3, dim)

        def forward(self, images):
            return self.last(images.mean((2, 3)))

    monkeypatch.setattr(backbones, "VGG16", Small)
    model = export(tmp_path / "e.pt", Small(16), "vgg16", dim=16)
    found = predict.load(tmp_path / "e.pt")([image_of(0)])
    pixels = predict._read_pixels(PREPROCESS, image_of(0))[None]
    want = model.predict(data.normalize(pixels, data.CLIP_MEAN, data.CLIP_STD))
    torch.testing.assert_close(found["probs"], want["probs"])


def test_a_vgg16_gets_its_memory_from_the_file_only(tmp_path):
    content = dict(image_encoder="vgg16", state_dict={})
    encoder = predict._image_encoder("x", content, 8)
    assert isinstance(encoder, backbones.VGG16) and all(p.is_meta for p in encoder.parameters())


@pytest.mark.parametrize(
    "preprocess", [{}, dict(squash=True), dict(resample="bilinear"), dict(squash=False)]
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "upright"])
def test_a_pil_image_is_prepared_as_its_file_is(tmp_path, mode, preprocess):
    path, exif = tmp_path / "a b.tif", Image.Exif()
    image = image_of(3, "RGBA")
    if mode == "upright":
        exif[0x0112] = 6
        image.convert("RGB").save(path, exif=exif)
    else:
        (image if mode == "RGBA" else image.convert("RGB").convert(mode)).save(path)
    settings = PREPROCESS | preprocess
    want = data.ImageList([data.Sample(path.name, 0)], tmp_path, image_size=64, **preprocess)[0][0]
    with Image.open(path) as opened:
        before = opened.size
        assert torch.equal(predict._read_pixels(settings, opened), want)
        assert opened.size == before
    assert torch.equal(predict._read_pixels(settings, str(path)), want)


def test_one_image_alone_and_reading_in_workers(run, exported):
    _, root = run
    predictor, paths = predict.load(exported), sorted(root.rglob("*.png"))[:5]
    alone = predictor(paths[0])
    found = predictor(paths, batch_size=2, workers=1)
    assert alone["name"] == found["name"][:1] and len(found["name"]) == 5
    torch.testing.assert_close(alone["probs"], found["probs"][:1])


def test_what_cannot_be_predicted_is_refused(tmp_path, exported):
    predictor = predict.load(exported)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="got no image; expected paths or PIL images"):
        predictor([])
    with pytest.raises(ValueError, match="bad.png cannot be read as an image"):
        predictor([image_of(0), tmp_path / "bad.png"])
    with pytest.raises(FileNotFoundError, match="there is no such image"):
        predictor([tmp_path / "none.png"])
    with pytest.raises(ValueError, match="got a int for an image; expected a path or a PIL image"):
        predictor([3])


# ------------------------------------------------------------------------------------------- files


def test_other_files_are_refused(run, tmp_path):
    def saved(content):
        torch.save(content, tmp_path / "x.pt")
        return tmp_path / "x.pt"

    (tmp_path / "text.pt").write_text("hello")
    whole = torch.load(run[0] / "exported.pt", weights_only=True)
    state = whole["state_dict"]
    part = {key: value for key, value in state.items() if key != "image_encoder.conv1.weight"}
    ours = "expected the exported.pt that train.py writes"
    with pytest.raises(FileNotFoundError, match=f"no file .*none.pt; {ours}"):
        predict.load(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=f"text.pt cannot be read .*; {ours}"):
        predict.load(tmp_path / "text.pt")
    with pytest.raises(
        ValueError, match=f"is another file: got format None with model, .*; {ours}"
    ):
        predict.load(run[0] / "best.pt")
    for content, message in [
        ([1], "is another file: got format None with no entries"),
        (whole | dict(format="ordinalclip-9"), "got format 'ordinalclip-9'"),
        ({k: v for k, v in whole.items() if k != "preprocess"}, f"{ours}: .*preprocess"),
        (whole | dict(rank_names=["one"]), "holds 4 prototypes, 4 values and 1 names"),
        (whole | dict(state_dict={}), "holds 0 prototypes, .*a regression run has no prototypes"),
        (whole | dict(state_dict=part), "no whole image encoder 'clip' .*conv1.weight"),
        (whole | dict(image_encoder="vgg99"), "image encoder 'vgg99': expected one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            predict.load(saved(content))


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_missing_package_is_named(run, tmp_path):
    whole = torch.load(run[0] / "exported.pt", weights_only=True)
    torch.save(whole | dict(image_encoder="timm:resnet18"), tmp_path / "x.pt")
    with pytest.raises(ImportError, match="pip install timm"):
        predict.load(tmp_path / "x.pt")
    with pytest.raises(SystemExit, match="predict.py: image encoder timm:resnet18 needs timm"):
        predict.main([str(tmp_path / "x.pt"), "a.png"])


def test_prototypes_alone(run, exported, tmp_path):
    assert predict.main([exported, "--save-prototypes", str(tmp_path / "p.pt")]) == 0
    found, predictor = predict.load_prototypes(tmp_path / "p.pt"), predict.load(exported)
    assert torch.equal(found["prototypes"], predictor.model.prototypes())
    assert (
        found["rank_names"] == predictor.rank_names
        and found["rank_values"] == predictor.rank_values
    )
    assert found["logit_scale"] == pytest.approx(predictor.model.logit_scale.item())
    encoder = predictor.model.image_encoder
    again = OrdinalCLIP(encoder, FixedPrototypes(found["prototypes"]), found["logit_scale"]).eval()
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(
        again.predict(images)["probs"], predictor.model.predict(images)["probs"]
    )
    assert (tmp_path / "p.pt").stat().st_size < 10_000

    predict.save_prototypes(tmp_path / "q.pt", torch.ones(2, 3).half(), ("a", "b"), 1)
    found = predict.load_prototypes(tmp_path / "q.pt")
    assert found["rank_values"] == [0.0, 1.0] and found["prototypes"].dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"got prototypes \(2, 3\), 1 rank_names and 1 rank_values"
    ):
        predict.save_prototypes(tmp_path / "r.pt", torch.ones(2, 3), ["a"], 1)
    with pytest.raises(
        ValueError, match="got format 'ordinalclip-1' .*a file that save_prototypes writes"
    ):
        predict.load_prototypes(exported)
    with pytest.raises(FileNotFoundError, match="no file"):
        predict.load_prototypes(tmp_path / "r.pt")


# ------------------------------------------------------------------------------------------- command line


def test_the_table_the_csv_and_the_json_say_the_same(run, exported, tmp_path, capsys):
    _, root = run
    images = sorted((root / "2 stripes").glob("*.png"))[:3]
    files = dict(csv=tmp_path / "o.csv", json=tmp_path / "o.json")
    flags = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert (
        predict.main([exported, *map(str, images), *flags, "--device", "cpu", "--batch-size", "2"])
        == 0
    )
    found = predict.load(exported)(images)
    rows, told = list(csv.DictReader(open(files["csv"]))), json.loads(files["json"].read_text())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "rank", "expected", "prob", "top", "3"] and len(lines) == 4
    assert (
        told["rank_names"] == [f"{i} stripes" for i in (1, 2, 3, 4)] and told["not_predicted"] == []
    )
    for i, (line, row, image) in enumerate(zip(lines[1:], rows, told["images"])):
        assert line.startswith(str(images[i])) and row["file"] == image["file"] == str(images[i])
        assert row["rank"] == image["rank"] == found["name"][i] and f"  {row['rank']}  " in line
        assert (
            f"  {found['value'][i]:.2f}  " in line and f"  {found['probs'][i].max():.1%}  " in line
        )
        assert float(row["value"]) == pytest.approx(image["value"], abs=1e-4)
        assert image["probs"] == pytest.approx(found["probs"][i].tolist(), abs=1e-6)
        assert int(row["rank_index"]) == image["rank_index"] == int(found["rank"][i])
        assert line.count("%") == 4
    place = lines[0].index("rank")
    assert all(line[place - 1] == " " and line[place] != " " for line in lines)


def test_bad_files_are_told_at_the_end_and_the_rest_is_predicted(run, exported, tmp_path, capsys):
    good = sorted(run[1].rglob("*.png"))[:2]
    (tmp_path / "bad.png").write_bytes(b"no image")
    words = [
        exported,
        str(good[0]),
        str(tmp_path / "bad.png"),
        str(tmp_path / "gone.jpg"),
        str(good[1]),
    ]
    assert predict.main([*words, "--json", str(tmp_path / "o.json"), "--batch-size", "1"]) == 1
    out, err = capsys.readouterr()
    assert [line.split(".png")[0] + ".png" for line in out.splitlines()[1:]] == list(map(str, good))
    assert (
        "not predicted: " in err
        and "bad.png cannot be read" in err
        and "gone.jpg: there is no" in err
    )
    told = json.loads((tmp_path / "o.json").read_text())
    assert len(told["images"]) == 2
    assert [Path(file["file"]).name for file in told["not_predicted"]] == ["bad.png", "gone.jpg"]

    outputs = (("--json", "o.json"), ("--csv", "o.csv"), ("--explain", "o.png"))
    flags = [word for flag, name in outputs for word in (flag, str(tmp_path / name))]
    assert predict.main([exported, str(tmp_path / "bad.png"), *flags]) == 1  # nothing left
    assert capsys.readouterr().out == "" and not (tmp_path / "o.png").exists()
    assert json.loads((tmp_path / "o.json").read_text())["images"] == []
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 1


def test_folders_are_searched_to_the_bottom(run, tmp_path):
    (tmp_path / "a b" / "c").mkdir(parents=True)
    for name in ("z.PNG", "a b/y.jpg", "a b/c/x 1.webp", "a b/.hidden.png", "notes.md"):
        (tmp_path / name).touch()
    found = [str(Path(path).relative_to(tmp_path)) for path in predict.find_images([str(tmp_path)])]
    assert found == ["a b/c/x 1.webp", "a b/y.jpg", "z.PNG"]


@pytest.mark.parametrize(
    "name, text, found",
    [
        (
            "l.txt",
            "a.png\n# no\n\nb c.jpg 3\nd 4.png\n./#e.png 0",
            ["a.png", "b c.jpg", "d 4.png", "#e.png"],
        ),
        ("l.txt", "path label\na.png 1\n", ["a.png"]),
        ("l.csv", "label,path\n3,a b.png\n4,c.png\n", ["a b.png", "c.png"]),
        ("l.csv", 'a b.png,3\n"c, d.png",1\n', ["a b.png", "c, d.png"]),
        ("l.csv", "\ufefffile\na.png\n", ["a.png"]),
        ("l.tsv", "a b.png\t3\r\nc.png\t0\r\n", ["a b.png", "c.png"]),
    ],
)
def test_lists(tmp_path, name, text, found):
    (tmp_path / name).write_text(text, "utf-8", newline="")
    assert predict.find_images([tmp_path / name]) == [str(tmp_path / path) for path in found]


def test_a_list_as_the_run_writes_it(run, exported, tmp_path, capsys):
    out, root = run
    shutil.copy(out / "splits" / "test.txt", root / "mine.txt")
    assert predict.main([exported, str(root / "mine.txt")]) == 0
    (root / "mine.txt").unlink()
    rows = list(csv.DictReader(open(out / "predictions-best.csv")))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(rows) and all(row["path"] in line for row, line in zip(rows, lines))


def test_commands_that_make_no_sense(exported, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "l.txt").write_text("# nothing\n")
    (tmp_path / "m.txt").write_bytes(b"\xff\xfe\xff")
    for words, message in [
        ([exported, str(tmp_path / "empty")], "predict.py: no images in .*empty; expected .jpg"),
        ([exported, str(tmp_path / "l.txt")], "predict.py: no images in .*l.txt"),
        ([exported, str(tmp_path / "m.txt")], "m.txt is not UTF-8 text .*; save it as UTF-8"),
        ([str(tmp_path / "l.pt"), "a.png"], "predict.py: no file .*l.pt"),
    ]:
        with pytest.raises(SystemExit, match=message):
            predict.main(words)
    for words, message in [([], "give images"), (["a.png", "--batch-size", "0"], "must be at least 1"),
                           (["a.png", "--workers", "-1"], "--workers at least 0")]:  # fmt: skip
        with pytest.raises(SystemExit):
            predict.main([exported, *words])
        assert message in capsys.readouterr().err


def test_the_progress_line_is_for_terminals(run, exported, capsys, monkeypatch):
    image = str(sorted(run[1].rglob("*.png"))[0])
    predict.main([exported, image])
    assert "images/s" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    predict.main([exported, image])
    assert "\r  1/1  " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- picture


def test_the_picture(run, exported, tmp_path):
    images = [str(path) for path in sorted(run[1].rglob("*.png"))[::10]]
    assert len(images) == 8
    predict.main([exported, *images, "--explain", str(tmp_path / "o.png")])
    picture = Image.open(tmp_path / "o.png")
    assert picture.format == "PNG" and picture.size == (1000, 330 * 6)
    for row in range(6):
        part = np.asarray(picture)[330 * row : 330 * (row + 1)]
        assert (
            part[14:284, 30:300].std() > 10
            and (part[84:276, 390:970] == (29, 58, 95)).all(2).sum() > 1000
        )


@pytest.mark.parametrize(
    "num_ranks, name",
    [(2, "{}"), (101, "{}"), (9, "a rather long name of rank {}"), (3, "w" * 200)],
)
def test_names_of_ranks_do_not_touch(num_ranks, name, monkeypatch):
    drawn, text = [], ImageDraw.ImageDraw.text

    def seen(draw, xy, words, fill, font, anchor):
        if anchor == "ma":
            drawn.append(draw.textbbox(xy, words, font, anchor))
        text(draw, xy, words, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", seen)
    names = [name.format(rank) for rank in range(num_ranks)]
    probs = torch.rand(1, num_ranks, generator=torch.Generator().manual_seed(0)).softmax(1)
    answers = dict(file=["x" * 300 + ".png"], name=names[:1], probs=probs, expected=torch.tensor([0.4]),
                   value=torch.tensor([0.4]), rank=torch.tensor([0]))  # fmt: skip
    picture = predict.explain(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), answers, names)
    assert picture.size == (1000, 330) and drawn
    assert drawn[0][0] > 0 and drawn[-1][2] <= 1000
    assert all(left[2] < right[0] for left, right in zip(drawn, drawn[1:]))


# ------------------------------------------------------------------------------------------- alone, ONNX


def test_it_runs_without_the_rest_of_the_project(run, exported, tmp_path):
    for name in ("predict", "ordinalclip", "clip_model", "clip_weights", "backbones", "data"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copytree(
        ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    image = sorted(run[1].rglob("*.png"))[0]
    command = [sys.executable, "predict.py", exported, str(image), str(tmp_path / "gone.png")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and str(image) in done.stdout, done.stderr
    assert done.stderr == f"not predicted: {tmp_path / 'gone.png'}: there is no such image\n"


def test_a_model_is_rebuilt_without_data_and_backbones(exported, tmp_path):
    for name in ("predict.py", "ordinalclip.py", "clip_model.py", "clip_weights.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    code = (
        f"import torch, predict; p = predict.load({exported!r}); s = p.preprocess['image_size']\n"
    )
    code += (
        "print(p.model.predict(torch.zeros(2, 3, s, s))['probs'].shape == (2, len(p.rank_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "True", done.stderr


HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript"))


@pytest.mark.skipif(HAS_ONNX, reason="onnx is installed")
def test_onnx_missing_is_said(exported, tmp_path):
    with pytest.raises(SystemExit, match="--onnx needs two packages .*pip install onnx onnxscript"):
        predict.main([exported, "--onnx", str(tmp_path / "m.onnx")])
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        predict.export_onnx(predict.load(exported), tmp_path / "m.onnx")


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx and onnxscript")
@pytest.mark.parametrize("vision", ["resnet", "vit"])
def test_onnx_answers_like_pytorch(tmp_path, vision, monkeypatch):
    import onnx.reference

    model = export(tmp_path / "e.pt", tiny_clip(vision=vision).visual)
    assert predict.main([str(tmp_path / "e.pt"), "--onnx", str(tmp_path / "m.onnx")]) == 0
    session = onnx.reference.ReferenceEvaluator(onnx.load(tmp_path / "m.onnx"))
    images = torch.randn(5, 3, 64, 64)
    probs, expected = map(torch.from_numpy, session.run(None, dict(images=images.numpy())))
    want = model.predict(images)
    torch.testing.assert_close(probs, want["probs"], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(expected, want["expected"], atol=1e-4, rtol=1e-3)

    wrong = [np.zeros((3, 4), "f4"), np.zeros(3, "f4")]
    monkeypatch.setattr(onnx.reference.ReferenceEvaluator, "run", lambda *_: wrong)
    with pytest.raises(ValueError, match="the ONNX model answers"):
        predict.export_onnx(predict.load(tmp_path / "e.pt"), tmp_path / "n.onnx")
    assert not list(tmp_path.glob("n.onnx*"))
