"""pytest tests/test_train.py -- the training script: runs, files, resume, evaluation, many processes."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

import data
import train
from clip_model import tiny_clip
from ordinalclip import OrdinalCLIP, RankPrompts

ROOT = Path(__file__).parents[1]
TINY = (
    "--clip tiny --image-encoder clip --batch-size 16 --workers 0 --device cpu --lr 0.002".split()
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Own data: ranks told by the number of stripes, one folder per rank, every name with a space."""
    root = tmp_path_factory.mktemp("own data") / "stripes"
    rng = np.random.RandomState(0)
    for rank in range(4):
        (root / f"{rank + 1} stripes").mkdir(parents=True)
        for i in range(20):
            x = np.linspace(0, 2 * np.pi * (rank + 1), 80)[None, :, None]
            pixels = 128 + 100 * np.sin(x + rng.uniform(0, 6)) + rng.normal(0, 10, (80, 80, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / f"{rank + 1} stripes" / f"image {i}.png")
    return root


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """One whole run, looked at by several tests."""
    out = tmp_path_factory.mktemp("runs") / "a"
    results = train.main(["--data", str(folder), "--epochs", "3", "--out", str(out), *TINY])
    return out, results


def test_a_run_leaves_what_it_promises(finished, folder):
    out, results = finished
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "splits", "log.csv", "last.pt", "best.pt", "exported.pt",
                     "results.json", "predictions-best.csv", "pictures"}  # fmt: skip
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["lr"] == 0.002 and config["settings"]["interp"] == "linear"
    assert config["torch"] == str(torch.__version__) and "64 train" in config["protocol"]
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        assert math.isclose(float(row["loss"]), float(row["i2t"]) + float(row["t2i"]), rel_tol=1e-4)
        assert float(row["images_per_s"]) > 0 and float(row["peak_mb"]) > 0
    assert float(rows[0]["lr"]) == 0.002 and float(rows[2]["lr"]) < 0.001


def test_splits_are_disjoint_and_predictions_are_of_the_test_images(finished, folder):
    out, results = finished
    parts = [data.read_list(out / "splits" / f"{part}.txt", folder) for part in data.PARTS]
    assert [len(part) for part in parts] == [64, 8, 8]
    assert len({sample.path for part in parts for sample in part}) == 80
    rows = list(csv.DictReader(open(out / "predictions-best.csv")))
    assert [row["path"] for row in rows] == [sample.path for sample in parts[2]]
    wrong = [abs(int(row["rank"][0]) - int(row["label"][0])) for row in rows]
    assert results["test"]["mae_argmax"] == pytest.approx(sum(wrong) / 8)
    expected = [abs(float(row["expected_rank_index"]) + 1 - int(row["label"][0])) for row in rows]
    assert results["test"]["mae_expected"] == pytest.approx(sum(expected) / 8, abs=1e-3)


def test_the_best_epoch_is_chosen_by_validation(finished):
    out, results = finished
    rows = list(csv.DictReader(open(out / "log.csv")))
    best = min(rows, key=lambda row: float(row["val_mae_argmax"]))
    saved = torch.load(out / "best.pt", weights_only=True)
    assert saved["epoch"] == int(best["epoch"])
    assert results["val"]["mae_argmax"] == pytest.approx(float(best["val_mae_argmax"]))


def test_the_exported_file_has_no_text_tower_and_is_plain_tensors(finished):
    out, results = finished
    exported = torch.load(out / "exported.pt", weights_only=True)
    assert exported["rank_names"] == [f"{i} stripes" for i in (1, 2, 3, 4)]
    assert exported["state_dict"]["prototypes.prototypes"].shape == (4, 128)
    assert not any("token_embedding" in k or "context_embeds" in k for k in exported["state_dict"])
    assert exported["preprocess"]["mean"] == data.CLIP_MEAN
    assert (out / "exported.pt").stat().st_size < 7e6  # the vocabulary alone would be 25 MB


def test_eval_repeats_the_result(finished):
    out, results = finished
    again = train.main(["--eval", str(out / "best.pt"), "--workers", "0"])
    assert again["test"] == results["test"] and again["protocol"] == results["protocol"]
    assert json.loads((out / "eval-best.json").read_text())["test"] == results["test"]
    assert (out / "predictions-eval-best.csv").read_bytes() == (
        out / "predictions-best.csv"
    ).read_bytes()


def test_a_finished_run_is_not_written_over(finished, folder):
    out, _ = finished
    with pytest.raises(
        SystemExit, match="is finished, but with another --epochs: 3, not 5; give another --out"
    ):
        train.main(["--data", str(folder), "--out", str(out), *TINY, "--epochs", "5"])
    with pytest.raises(
        SystemExit, match="holds a finished run; --eval .* tests it again, --out starts"
    ):
        train.main(["--data", str(folder), "--out", str(out), *TINY, "--epochs", "3"])
    with pytest.raises(SystemExit, match="is finished, see .*results.json"):
        train.main(["--resume", str(out)])


def test_a_resumed_run_ends_like_an_uninterrupted_one(finished, folder, tmp_path, monkeypatch):
    whole, results = finished
    epoch = train.train_epoch

    def stop_before_the_third(*args):
        if args[-1] == 3:
            raise KeyboardInterrupt
        return epoch(*args)

    monkeypatch.setattr(train, "train_epoch", stop_before_the_third)
    with pytest.raises(KeyboardInterrupt):
        train.main(["--data", str(folder), "--epochs", "3", "--out", str(tmp_path / "b"), *TINY])
    monkeypatch.setattr(train, "train_epoch", epoch)
    resumed = train.main(["--resume", str(tmp_path / "b")])
    assert resumed["test"] == results["test"] and resumed["protocol"] == results["protocol"]
    a, b = (torch.load(out / "last.pt", weights_only=True) for out in (whole, tmp_path / "b"))
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
    assert [row["loss"] for row in a["log"]] == [row["loss"] for row in b["log"]]


@pytest.mark.parametrize(
    "options, trained",
    [
        (["--method", "coop"], "prototypes.rank_embeds"),
        (["--method", "linear"], "prototypes.weight"),
        (["--interp", "inverse", "--base-ranks", "2", "--context", "4", "--rank-position", "front",
          "--rank-init", "names"], "prototypes.context_embeds"),
    ],
)  # fmt: skip
def test_every_method_trains(folder, tmp_path, options, trained):
    out = tmp_path / "run"
    train.main(["--data", str(folder), "--epochs", "1", "--out", str(out), *TINY, *options])
    state = torch.load(out / "best.pt", weights_only=True)["model"]
    args = train.parse_args(["--data", str(folder), "--out", str(tmp_path), *TINY, *options])
    torch.manual_seed(args.seed)
    start = train.build_model(args, train.load_task(args))[0].state_dict()
    assert not torch.equal(state[trained], start[trained])
    assert not any(key.startswith("prototypes.text") for key in state)


def test_zero_shot_needs_no_training(folder, tmp_path):
    results = train.main(
        ["--data", str(folder), "--method", "zeroshot", "--out", str(tmp_path / "z"), *TINY]
    )
    assert not (tmp_path / "z" / "log.csv").exists() and 0 <= results["test"]["mae_argmax"] <= 3


def test_every_trainable_parameter_is_in_exactly_one_group():
    clip = tiny_clip()
    model = OrdinalCLIP(clip.visual, RankPrompts(clip, 5, context=2), clip.logit_scale)
    groups = train.param_groups(model)
    assert [group["name"] for group in groups] == ["image_encoder", "prototypes"]
    model.logit_scale.requires_grad_()  # belongs to no part
    with pytest.raises(AssertionError):
        train.param_groups(model)


def test_metrics():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.4, 0.6], [0.5, 0.0, 0.5]])
    found = train.metrics(probs, torch.tensor([0, 2, 1]))
    assert found["mae_expected"] == pytest.approx((0.4 + 0.4 + 0) / 3)
    assert found["mae_argmax"] == pytest.approx(1 / 3)
    assert found["acc_argmax"] == pytest.approx(2 / 3) and found["acc_expected"] == 1


def test_a_half_written_file_never_gets_the_name(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"whole")

    def broken(part):
        part.write_bytes(b"ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train.write(path, broken)
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--data", "morph2", "--data-root", "{tmp}/none"],
            "MORPH(.|\n)*morph_2008_nonCommercial.csv",
        ),
        (["--data", "{tmp}/none"], "no dataset or folder .*demo"),
        (["--data", "{folder}", "--split", "x"], "has no split 'x'"),
        (["--data", "{folder}", "--clip", "ViT-Z"], "no weights at 'ViT-Z'; expected one of RN50"),
        (
            ["--data", "{folder}", "--image-encoder", "vgg99"],
            "image encoder 'vgg99': expected one of vgg16",
        ),
        (
            ["--data", "{folder}", "--base-ranks", "5"],
            "num_base_ranks=5: expected 1 to num_ranks=4",
        ),
        (["--data", "{folder}", "--val-list", "x"], "need a --train-list"),
        (["--eval", "{tmp}/none.pt"], "no checkpoint at"),
        (["--eval", "{folder}/1 stripes/image 0.png"], "cannot be read"),
    ],
)
def test_mistakes_are_told_plainly(folder, tmp_path, argv, message):
    argv = [word.format(tmp=tmp_path, folder=folder) for word in argv]
    if "--eval" not in argv:
        tiny = [word for word in TINY]
        argv = [*tiny, "--out", str(tmp_path / "out"), *argv]
    with pytest.raises(SystemExit, match=message):
        train.main(argv)
    assert not (tmp_path / "out").exists()  # nothing begun


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "x.pt")
    with pytest.raises(
        SystemExit, match="is no checkpoint of this script for that use: it holds no 'settings'"
    ):
        train.main(["--eval", str(tmp_path / "x.pt")])


@pytest.mark.parametrize("argv, message", [
    (["--lr", "0.1", "--resume", "x"], "--lr: settings come from the checkpoint"),
    (["--methodd", "coop"], "unrecognized arguments: --methodd"),
    (["--interp", "cubic"], "invalid choice: 'cubic'"),
])  # fmt: skip
def test_wrong_flags_are_refused(capsys, argv, message):
    with pytest.raises(SystemExit):
        train.parse_args(argv)
    assert message in capsys.readouterr().err


def test_a_loss_that_is_not_a_number_stops_the_run(folder, tmp_path):
    with pytest.raises(FloatingPointError, match="loss is nan in epoch 1; try a lower --lr"):
        train.main(
            [
                "--data",
                str(folder),
                "--epochs",
                "1",
                "--out",
                str(tmp_path / "n"),
                *TINY,
                "--lr",
                "1e30",
            ]
        )


def test_batches_are_shared_out_evenly(monkeypatch):
    args = train.parse_args(["--batch-size", "9"])
    monkeypatch.setattr(train, "num_processes", lambda: 2)
    with pytest.raises(SystemExit, match="--batch-size 9 is over all processes: 2 must divide it"):
        train.loaders(args, None, {}, None)


def test_a_checkpoint_away_from_its_run_is_told_plainly(finished, tmp_path):
    (tmp_path / "best.pt").write_bytes((finished[0] / "best.pt").read_bytes())
    with pytest.raises(SystemExit, match="No such file or directory: .*splits/"):
        train.main(["--eval", str(tmp_path / "best.pt")])


def test_the_demo_command_of_the_readme_at_toy_size(tmp_path):
    assert "train.py --data demo\n" in (ROOT / "README.md").read_text()
    data._make_demo(tmp_path / "demo", (60, 30, 30))
    train.main(["--data", "demo", "--data-root", str(tmp_path / "demo"), "--epochs", "1", "--workers", "0",
                "--out", str(tmp_path / "run")])  # fmt: skip
    assert json.loads((tmp_path / "run" / "results.json").read_text())["images"]["train"] == 60


def test_the_morph_command_of_the_readme_at_toy_size(tmp_path):
    assert "train.py --data morph2 --interp linear\n" in (ROOT / "README.md").read_text()
    root, header = (
        tmp_path / "morph",
        "id_num,picture_num,dob,doa,race,gender,facial_hair,age,age_diff,glasses,photo",
    )
    (root / "Album2").mkdir(parents=True)
    rows = [header]
    for i in range(40):
        age, name = 16 + i, f"Album2/{i:06d}_1M{16 + i}.JPG"
        Image.new("RGB", (80, 96), (i, 99, 200)).save(root / name, "JPEG")
        rows.append(f"{i:06d},1,01/01/1950,01/01/2000,W,M,0,{age},0,0,{name}")
    (root / "morph_2008_nonCommercial.csv").write_text("\n".join(rows) + "\n")
    argv = ["--data", "morph2", "--interp", "linear", "--data-root", str(root), "--epochs", "1"]
    results = train.main([*argv, "--out", str(tmp_path / "run"), *TINY])
    assert results["images"]["test"] == 8 and results["settings"]["weight_decay"] == 5e-4


def test_help_names_every_flag():
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    for flag in ("--data --data-root --method --interp --base-ranks --context --rank-position --clip "
                 "--image-encoder --epochs --batch-size --lr --weight-decay --seed --device --precision "
                 "--out --resume --eval").split():  # fmt: skip
        assert flag in done.stdout, flag
    assert "(default: 100; demo:" in done.stdout


# ------------------------------------------------------------------------------------- two processes


def vit_model():
    clip = tiny_clip(vision="vit")  # no batch norm: its statistics are each process's own
    torch.manual_seed(0)
    return OrdinalCLIP(clip.visual.train(), RankPrompts(clip, 5, context=2), clip.logit_scale)


def batch():
    torch.manual_seed(1)
    return torch.randn(8, 3, 64, 64), torch.tensor([0, 1, 1, 3, 3, 3, 4, 0])


def half_a_step(rank, store, out):
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, (images, labels) = vit_model(), batch()
    total, _, _ = model.loss(images[rank::2], labels[rank::2], group=dist.group.WORLD)
    total.backward()
    params = [p for p in model.parameters() if p.requires_grad]
    train.sum_gradients(params)
    rows = train.all_processes(labels[rank::2])
    torch.save(
        dict(total=total.detach(), grads=[p.grad for p in params], rows=rows), f"{out}{rank}.pt"
    )
    dist.destroy_process_group()


def test_two_processes_take_the_step_of_one(tmp_path):
    mp.spawn(half_a_step, (tmp_path / "store", tmp_path / "out"), nprocs=2)
    model, (images, labels) = vit_model(), batch()
    total, _, _ = model.loss(images, labels)
    total.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    for rank in range(2):
        found = torch.load(tmp_path / f"out{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["total"], total.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(found["rows"], labels)
        for a, b in zip(found["grads"], grads, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def test_torchrun_trains_and_writes_once(folder, tmp_path):
    out = tmp_path / "two"
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517",
         "train.py", "--data", str(folder), "--epochs", "1", "--out", str(out), *TINY],
        cwd=ROOT, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert results["processes"] == 2 and results["images"] == dict(train=64, val=8, test=8)
    assert len((out / "predictions-best.csv").read_text().splitlines()) == 9
