"""pytest tests/test_predict.py -- exported models: loading, inputs, tables, pictures, ONNX."""

import csv
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_python, run_script

import backbones
import data
import exported as exported_files
import predict
from clip_model import tiny_clip
from ordinalclip import FixedPrototypes, OrdinalCLIP

ROOT = Path(__file__).parents[1]
NAMES = ["none", "a little", "some", "much"]
PREPROCESS = dict(image_size=64, mean=data.CLIP_MEAN, std=data.CLIP_STD)


@pytest.fixture(scope="module")
def run(finished_run, stripes):
    """(run folder, folder of its images)"""
    return finished_run[0], stripes


@pytest.fixture(scope="module")
def exported(run):
    return str(run[0] / "exported.pt")


def image_of(seed, mode="RGB", size=(80, 70)):
    pixels = np.random.RandomState(seed).randint(
        0, 256, (size[1], size[0], len(mode)), dtype=np.uint8
    )
    return Image.fromarray(pixels, mode) if mode == "RGB" else Image.fromarray(pixels)


def export(path, encoder, name="clip", dim=128, **entries):
    """An exported file as training/run_folder.py writes it, around any image encoder."""
    torch.manual_seed(0)
    model = OrdinalCLIP(encoder, FixedPrototypes(torch.randn(4, dim)), 3.0).eval()
    content = dict(
        format="ordinalclip-1",
        image_encoder=name,
        quick_gelu=True,
        state_dict=model.state_dict(),
        rank_names=NAMES,
        rank_values=[0.0, 1.0, 2.0, 5.0],
        preprocess=PREPROCESS,
        results={},
    )
    torch.save(content | entries, path)
    return model


def test_it_answers_what_the_run_answered(run, exported):
    out, root = run
    rows = list(csv.DictReader(open(out / "predictions-best.csv")))
    predictor = predict.load(exported)
    answers = predictor([root / row["path"] for row in rows], batch_size=3)
    assert isinstance(predictor.model.prototypes, FixedPrototypes) and not predictor.model.training
    assert answers["name"] == [row["rank"] for row in rows]
    expected = [float(row["expected_rank_index"]) for row in rows]
    assert answers["expected"].tolist() == pytest.approx(expected, abs=2e-4)
    highest = [float(row["prob"]) for row in rows]
    assert answers["probs"].max(1).values.tolist() == pytest.approx(highest, abs=2e-4)
    assert [predictor.rank_names[r] for r in answers["rank"]] == answers["name"]
    assert answers["probs"].shape == (len(rows), 4)
    torch.testing.assert_close(answers["probs"].sum(1), torch.ones(len(rows)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("vision", ["resnet", "vit"])
def test_both_towers_are_rebuilt_from_their_shapes(tmp_path, vision):
    clip = tiny_clip(vision=vision)
    model = export(tmp_path / "e.pt", clip.visual)
    images = [image_of(0), image_of(1)]
    predictor = predict.load(tmp_path / "e.pt")
    answers = predictor(images)
    pixels = torch.stack([predict._read_pixels(PREPROCESS, image) for image in images])
    want = model.predict(data.normalize(pixels, data.CLIP_MEAN, data.CLIP_STD))
    torch.testing.assert_close(answers["probs"], want["probs"])
    torch.testing.assert_close(answers["value"], want["probs"] @ torch.tensor([0.0, 1.0, 2.0, 5.0]))
    assert not any(p.requires_grad for p in predictor.model.parameters())


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_the_activation_of_a_vit(tmp_path, quick_gelu):
    export(tmp_path / "e.pt", tiny_clip(vision="vit").visual, quick_gelu=quick_gelu)
    block = predict.load(tmp_path / "e.pt").model.image_encoder.transformer.resblocks[0]
    assert type(block.mlp.gelu).__name__ == ("QuickGELU" if quick_gelu else "GELU")


def test_an_encoder_that_is_not_clips(tmp_path, monkeypatch):
    def small(dim):  # VGG-16 is 500 MB
        pool = torch.nn.AdaptiveAvgPool2d(1)
        return torch.nn.Sequential(pool, torch.nn.Flatten(), torch.nn.Linear(3, dim))

    monkeypatch.setattr(backbones, "VGG16", small)
    model = export(tmp_path / "e.pt", small(16), "vgg16", dim=16)
    answers = predict.load(tmp_path / "e.pt")([image_of(0)])
    pixels = predict._read_pixels(PREPROCESS, image_of(0))[None]
    want = model.predict(data.normalize(pixels, data.CLIP_MEAN, data.CLIP_STD))
    torch.testing.assert_close(answers["probs"], want["probs"])


def test_a_vgg16_gets_its_memory_from_the_file_only(tmp_path):
    encoder = exported_files._build_image_encoder("vgg16", 8, {}, True)
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
    answers = predictor(paths, batch_size=2, workers=1)
    assert alone["name"] == answers["name"][:1] and len(answers["name"]) == 5
    torch.testing.assert_close(alone["probs"], answers["probs"][:1])


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


def test_other_files_are_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt does not exist; expected the exported.pt"):
        predict.load(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="is a folder; expected the exported.pt"):
        predict.load(tmp_path)
    with pytest.raises(ValueError, match="another file: got format None with model, settings, "):
        predict.load(run[0] / "best.pt")


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
    saved, predictor = exported_files.load_prototypes(tmp_path / "p.pt"), predict.load(exported)
    assert torch.equal(saved["prototypes"], predictor.model.prototypes())
    assert saved["rank_names"] == predictor.rank_names
    assert saved["rank_values"] == predictor.rank_values
    assert saved["logit_scale"] == pytest.approx(predictor.model.logit_scale.item())
    encoder = predictor.model.image_encoder
    again = OrdinalCLIP(encoder, FixedPrototypes(saved["prototypes"]), saved["logit_scale"]).eval()
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(
        again.predict(images)["probs"], predictor.model.predict(images)["probs"]
    )
    assert (tmp_path / "p.pt").stat().st_size < 10_000

    exported_files.save_prototypes(tmp_path / "q.pt", torch.ones(2, 3).half(), ("a", "b"), 1)
    saved = exported_files.load_prototypes(tmp_path / "q.pt")
    assert saved["rank_values"] == [0.0, 1.0] and saved["prototypes"].dtype == torch.float32
    message = r"got prototypes \(2, 3\), 1 rank_names, 1 rank_values; expected"
    with pytest.raises(ValueError, match=message):
        exported_files.save_prototypes(tmp_path / "r.pt", torch.ones(2, 3), ["a"], 1)
    message = "got format 'ordinalclip-1' .*what save_prototypes writes"
    with pytest.raises(ValueError, match=message):
        exported_files.load_prototypes(exported)
    with pytest.raises(FileNotFoundError, match="r.pt does not exist"):
        exported_files.load_prototypes(tmp_path / "r.pt")


def test_table_csv_and_json_agree(run, exported, tmp_path, capsys):
    _, root = run
    images = sorted((root / "2 stripes").glob("*.png"))[:3]
    files = dict(csv=tmp_path / "o.csv", json=tmp_path / "o.json")
    flags = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    flags += ["--device", "cpu", "--batch-size", "2"]
    assert predict.main([exported, *map(str, images), *flags]) == 0
    answers = predict.load(exported)(images)
    rows, content = list(csv.DictReader(open(files["csv"]))), json.loads(files["json"].read_text())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "rank", "expected", "prob", "top", "3"] and len(lines) == 4
    assert content["rank_names"] == [f"{i} stripes" for i in (1, 2, 3, 4)]
    assert content["not_predicted"] == []
    for i, (line, row, image) in enumerate(zip(lines[1:], rows, content["images"])):
        assert line.startswith(str(images[i])) and row["file"] == image["file"] == str(images[i])
        assert row["rank"] == image["rank"] == answers["name"][i] and f"  {row['rank']}  " in line
        assert f"  {answers['value'][i]:.2f}  " in line
        assert f"  {answers['probs'][i].max():.1%}  " in line
        assert float(row["value"]) == pytest.approx(image["value"], abs=1e-4)
        assert image["probs"] == pytest.approx(answers["probs"][i].tolist(), abs=1e-6)
        assert int(row["rank_index"]) == image["rank_index"] == int(answers["rank"][i])
        assert line.count("%") == 4
    start = lines[0].index("rank")
    assert all(line[start - 1] == " " and line[start] != " " for line in lines)


def test_bad_files_are_named_at_the_end_and_the_rest_is_predicted(run, exported, tmp_path, capsys):
    good = sorted(run[1].rglob("*.png"))[:2]
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad = [tmp_path / "bad.png", tmp_path / "missing.jpg"]
    argv = [exported, *map(str, [good[0], *bad, good[1]])]
    assert predict.main([*argv, "--json", str(tmp_path / "o.json"), "--batch-size", "1"]) == 1
    out, err = capsys.readouterr()
    assert [line.split(".png")[0] + ".png" for line in out.splitlines()[1:]] == list(map(str, good))
    assert "not predicted: " in err and "bad.png cannot be read" in err
    assert "missing.jpg: there is no" in err
    content = json.loads((tmp_path / "o.json").read_text())
    assert len(content["images"]) == 2
    assert [row["file"] for row in content["not_predicted"]] == list(map(str, bad))

    outputs = (("--json", "o.json"), ("--csv", "o.csv"), ("--explain", "o.png"))
    flags = [word for flag, name in outputs for word in (flag, str(tmp_path / name))]
    assert predict.main([exported, str(tmp_path / "bad.png"), *flags]) == 1  # nothing left
    assert capsys.readouterr().out == "" and not (tmp_path / "o.png").exists()
    assert json.loads((tmp_path / "o.json").read_text())["images"] == []
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 1


def test_folders_are_searched_to_the_bottom(tmp_path, capsys):
    (tmp_path / "a b" / "c").mkdir(parents=True)
    (tmp_path / "@eaDir").mkdir()
    images = ("z.PNG", "a b/y.jpg", "a b/c/x 1.webp")
    for name in (*images, "a b/.hidden.png", "notes.md", "@eaDir/z.PNG", "a b/._y.jpg"):
        (tmp_path / name).touch()
    Image.new("RGB", (4, 4)).save(tmp_path / "without suffix", "png")
    paths = predict.find_images([str(tmp_path)])
    names = {str(Path(path).relative_to(tmp_path)) for path in paths}
    assert names == {*images, "without suffix"} and len(paths) == 4
    assert capsys.readouterr().err == "1 files of other types left out (.md 1)\n"


@pytest.mark.parametrize(
    "name, text, paths",
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
def test_lists(tmp_path, name, text, paths):
    (tmp_path / name).write_text(text, "utf-8", newline="")
    assert predict.find_images([tmp_path / name]) == [str(tmp_path / path) for path in paths]


def test_a_list_as_the_run_writes_it(run, exported, tmp_path, capsys):
    out, root = run
    shutil.copytree(root, tmp_path / "images")
    shutil.copy(out / "splits" / "test.txt", tmp_path / "images" / "mine.txt")
    assert predict.main([exported, str(tmp_path / "images" / "mine.txt")]) == 0
    rows = list(csv.DictReader(open(out / "predictions-best.csv")))
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == len(rows) and all(row["path"] in line for row, line in zip(rows, lines))


def test_invalid_commands_are_refused(exported, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "l.txt").write_text("# nothing\n")
    (tmp_path / "m.txt").write_bytes(b"\xff\xfe\xff")
    for argv, message in [
        ([exported, str(tmp_path / "empty")], "predict.py: no images in .*empty; expected .jpg"),
        ([exported, str(tmp_path / "l.txt")], "predict.py: no images in .*l.txt"),
        (
            [exported, str(tmp_path / "m.txt")],
            "m.txt:1: this is not UTF-8 text; save the file as UTF-8",
        ),
        ([str(tmp_path / "l.pt"), "a.png"], "predict.py: .*l.pt does not exist"),
    ]:
        with pytest.raises(SystemExit, match=message):
            predict.main(argv)
    for argv, message in [
        ([], "give images, folders or lists"),
        (["--onnx", "x.onnx", "--csv", "o.csv"], "give images, folders or lists for --csv"),
        (["--save-prototypes", "p.pt", "--json", "o", "--explain", "o"], "for --json, --explain"),
        (["a.png", "--batch-size", "0"], "must be at least 1"),
        (["a.png", "--workers", "-1"], "--workers at least 0"),
    ]:
        with pytest.raises(SystemExit):
            predict.main([exported, *argv])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", ["E --device cpu a b", "E a --device cpu b", "--device cpu E a b"])
def test_images_may_stand_before_and_after_options(argv):
    args = predict.parse_args(argv.split())
    assert (args.exported, args.images, args.device) == ("E", ["a", "b"], "cpu")
    assert predict.parse_args([*argv.split(), "--", "-x.png"]).images == ["a", "b", "-x.png"]


def test_the_progress_line_is_for_terminals(run, exported, capsys, monkeypatch):
    image = str(sorted(run[1].rglob("*.png"))[0])
    predict.main([exported, image])
    assert "images/s" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    predict.main([exported, image])
    assert "\r  1/1  " in capsys.readouterr().err


def test_the_picture(run, exported, tmp_path):
    images = [str(path) for path in sorted(run[1].rglob("*.png"))[::10]]
    assert len(images) == 8
    predict.main([exported, *images, "--explain", str(tmp_path / "o.png")])
    picture = Image.open(tmp_path / "o.png")
    assert picture.format == "PNG" and picture.size == (1000, 330 * 6)
    for row in range(6):
        part = np.asarray(picture)[330 * row : 330 * (row + 1)]
        assert part[14:284, 30:300].std() > 10
        assert (part[84:276, 390:970] == (29, 58, 95)).all(2).sum() > 1000


def test_the_pictures_are_of_images_from_over_the_whole_list(run, exported, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(predict, "explain", lambda *args: calls.append(args) or image_of(0))
    images = [str(path) for path in sorted(run[1].rglob("*.png"))[::10]]
    for count in (8, 2):
        predict.main([exported, *images[:count], "--explain", str(tmp_path / "o.png")])
    (pixels, rows, names), (_, few, _) = calls
    predictor = predict.load(exported)
    chosen = [images[i] for i in (0, 1, 3, 4, 6, 7)]
    assert [row["file"] for row in rows] == chosen and len(names) == 4
    assert [row["file"] for row in few] == images[:2]
    expected = predictor(chosen)
    torch.testing.assert_close(torch.stack([row["probs"] for row in rows]), expected["probs"])
    assert [row["rank"] for row in rows] == expected["name"]
    torch.testing.assert_close(predictor.predict(pixels)["probs"], expected["probs"])


def copy_modules(folder, *names):
    for name in names:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


MODEL_FILES = ("exported.py", "ordinalclip.py", "kernels", "clip_model.py", "clip_weights.py")


def test_it_runs_without_the_rest_of_the_project(run, exported, tmp_path):
    copy_modules(tmp_path, *MODEL_FILES, "predict.py", "data", "evaluation/plots.py")
    image = sorted(run[1].rglob("*.png"))[0]
    words = ["predict.py", exported, str(image), str(tmp_path / "missing.png")]
    process = run_script(words, tmp_path)
    assert process.returncode == 1 and str(image) in process.stdout, process.stderr
    missing = tmp_path / "missing.png"
    assert process.stderr == f"not predicted: {missing}: there is no such image\n"


def test_a_model_is_rebuilt_without_data_and_backbones(exported, tmp_path):
    copy_modules(tmp_path, *MODEL_FILES)
    code = f"""import torch, exported
model, names, _, preprocess = exported.load_model({exported!r}); s = preprocess['image_size']
print(model.eval().predict(torch.zeros(2, 3, s, s))['probs'].shape == (2, len(names)))"""
    process = run_python(code, tmp_path)
    assert process.returncode == 0 and process.stdout.strip() == "True", process.stderr
