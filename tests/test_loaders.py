"""pytest tests/test_loaders.py -- batches over processes, features of a frozen encoder."""

import gc
import json

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_run
from PIL import Image

import data
import predict
import train
from training import loaders
from training.loaders import load_task, make_images, make_loaders, without_image_encoder
from training.run_folder import Run


def test_batches_are_shared_out_evenly(monkeypatch):
    args = train.parse_args(["--batch-size", "9"])
    monkeypatch.setattr(loaders, "world_size", lambda: 2)
    with pytest.raises(SystemExit, match="--batch-size 9 is over all processes: 2 must divide it"):
        make_loaders(Run(args, None, None, {}))


def test_workers_that_stay_augment_as_none_do(gray, tmp_path):
    """Over two epochs, the first cut off within and begun again there."""

    def epochs(workers):
        args = train.parse_args(
            ["--data", str(gray), "--out", str(tmp_path / "x"), *TINY, "--workers", workers]
        )
        preprocess = dict(image_size=14)
        loader, val, test = make_loaders(Run(args, load_task(args), None, preprocess))
        assert loader.persistent_workers == val.persistent_workers == (workers == "2")
        assert not test.persistent_workers  # read once
        processes, batches = [], []
        for epoch, start in ((1, 0), (1, 32), (2, 0)):
            loader.sampler.set_epoch(epoch, start)
            batches.append(list(loader))
            iterator = loader._iterator
            processes.append([worker.pid for worker in iterator._workers] if iterator else None)
        assert processes[0] == processes[1] == processes[2]
        return [torch.cat([images for images, _ in epoch]) for epoch in batches]

    whole, rest, second = epochs("0")
    for images, others in zip((whole, rest, second), epochs("2")):
        assert images.equal(others)
    assert whole[32:].equal(rest)
    whole, second = ({image.numpy().tobytes() for image in epoch} for epoch in (whole, second))
    assert len(whole & second) < len(whole) / 4  # of 8 crops and mirrored ones each


def objects_per_image(holder):
    """Python objects that `holder` refers to, however deep, without modules and classes."""
    ids, queue = set(), [holder]
    while queue:
        for item in gc.get_referents(queue.pop()):
            if id(item) not in ids and not isinstance(item, (type, type(gc))):
                ids.add(id(item))
                queue.append(item)
    return len(ids)


def test_a_long_list_holds_no_object_per_image(tmp_path):
    names = [f"{i}.jpg {i % 3}" for i in range(5000)]
    (tmp_path / "train.txt").write_text("\n".join(names))
    for name in names:
        (tmp_path / name.split()[0]).touch()
    task = data.load(tmp_path)
    assert len(task.train) == 4000
    for images in (
        make_images(task, "train", dict(image_size=14)),
        make_images(data.few_shot(task, 1000), "train", dict(image_size=14)),
    ):
        assert objects_per_image(vars(images)) < 100
        assert objects_per_image(dict(vars(images), samples=[*images.samples])) > 4000


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Own data whose JPEGs have 8 times the sides of what they become."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for rank in "012":
        (root / rank).mkdir()
        for i in range(10):
            noise = Image.fromarray(rng.integers(0, 256, (50, 60, 3), np.uint8))
            noise.resize((1000, 800)).save(root / rank / f"{i}.jpg")
    return root


def test_training_uses_drafts_unless_official_or_told_otherwise(photos):
    def batches(*flags):
        run = tiny_run(photos, *flags)
        task, preprocess, loaders = run.task, run.preprocess, make_loaders(run)
        options = {key: preprocess[key] for key in ("squash", "resample") if key in preprocess}
        exact = data.ImageList(task.test, task.root, image_size=preprocess["image_size"], **options)
        test_images = torch.cat([images for images, _ in loaders[2]])
        return preprocess["draft"], test_images, torch.stack([image for image, _ in exact])

    for flags in (["--official"], ["--no-draft"]):
        draft, images, exact = batches(*flags)
        assert draft is False and images.equal(exact)
    draft, images, exact = batches()
    difference = (images.float() - exact.float()).abs().mean()
    assert draft is True and 0 < difference < 1
    with pytest.raises(SystemExit, match="--no-draft has no effect with --official; remove it"):
        batches("--official", "--no-draft")


def test_features_and_predictions_follow_how_the_run_read_its_images(photos, tmp_path, monkeypatch):
    calls, compute = [], loaders.compute_features
    monkeypatch.setattr(
        loaders, "compute_features", lambda *args: calls.append(args) or compute(*args)
    )
    for name, flags in (("draft", []), ("exact", ["--no-draft"])):
        argv = ["--data", str(photos), "--out", str(tmp_path / name), *TINY, "--freeze-image"]
        train.main([*argv, *flags])
        assert [args[1].draft for args in calls[-3:]] == [None if flags else 220] * 3
        preprocess = predict.load(tmp_path / name / "exported.pt").preprocess
        assert preprocess["draft"] is not bool(flags)
        images = make_images(load_task(train.parse_args(argv)), "test", preprocess)
        for sample, (image, _) in zip(images.samples, images):
            assert predict._read_pixels(preprocess, str(photos / sample.path)).equal(image)
    assert len(calls) == 6


def test_a_run_from_before_drafts_goes_on_with_images_in_full(gray, tmp_path):
    argv = ["--data", str(gray), *TINY, "--out", str(tmp_path / "run")]
    train.main(argv)
    for name in ("last.pt", "best.pt"):
        saved = torch.load(tmp_path / "run" / name, weights_only=True)
        del saved["settings"]["no_draft"]
        torch.save(saved, tmp_path / "run" / name)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["settings"]["no_draft"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "results.json").unlink()
    for flag in ("--resume", "--eval"):
        assert train.parse_args([flag, str(tmp_path / "run")]).no_draft is True
    with pytest.raises(SystemExit, match="other settings: --no-draft True, not False"):
        train.main(argv)
    train.main([*argv, "--no-draft"])


def test_a_frozen_encoder_stays_and_its_features_are_computed_once(
    gray, tmp_path, monkeypatch, capsys
):
    calls, compute = [], loaders.compute_features
    monkeypatch.setattr(
        loaders, "compute_features", lambda *args: calls.append(1) or compute(*args)
    )
    start = tiny_run(gray, "--freeze-image").model.image_encoder.state_dict()
    argv = ["--data", str(gray), *TINY, "--freeze-image", "--out"]
    results = train.main([*argv, str(tmp_path / "a")])
    assert len(calls) == 3  # train, val, test
    again = train.main([*argv, str(tmp_path / "b")])
    assert len(calls) == 3 and again["test"] == results["test"]
    for path in (data.cache_dir() / "features").iterdir():  # a number of each becomes another
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 64
        path.write_bytes(content)
    repaired = train.main([*argv, str(tmp_path / "c")])
    assert len(calls) == 6 and repaired["test"] == results["test"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")  # a full disk, a read-only home
    uncached = train.main([*argv, str(tmp_path / "d")])
    assert len(calls) == 9 and uncached["test"] == results["test"]
    assert "features are not cached: " in capsys.readouterr().err
    end = torch.load(tmp_path / "a" / "best.pt", weights_only=True)["model"]
    assert all(torch.equal(value, end[f"image_encoder.{key}"]) for key, value in start.items())
    whole = torch.load(tmp_path / "a" / "exported.pt", weights_only=True)["state_dict"]
    assert any(key.startswith("image_encoder.") for key in whole)


def test_features_give_the_logits_that_images_give(gray):
    model = tiny_run(gray, "--freeze-image").model.eval()
    images = torch.randn(4, 3, 96, 96)
    with torch.no_grad():
        features = model.image_encoder(images)
        assert torch.equal(without_image_encoder(model)(features), model(images))
    assert not isinstance(model.image_encoder, torch.nn.Identity)
