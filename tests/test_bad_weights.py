"""pytest tests/test_bad_weights.py -- checkpoints, exported files and weights that are damaged,
foreign or incomplete: one line each, whole, and what is read after all."""

import hashlib
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_shapes import TINY, fill
from conftest import TINY_MODEL
from torch import nn

import predict
import train
from backbones import build_image_encoder
from clip_model import tiny_clip
from exported import load_model, load_prototypes, save_model, save_prototypes
from ordinalclip import FixedPrototypes, LinearPrototypes, OrdinalCLIP, Regression

NAN = float("nan")


@pytest.fixture(scope="module")
def files(finished_run):
    """name -> content of the files of a finished run."""
    names = ("exported.pt", "best.pt", "last.pt")
    return {name: torch.load(finished_run[0] / name, weights_only=True) for name in names}


@pytest.fixture
def run_dir(finished_run, tmp_path):
    """A copy of the run, as if cut off after its last epoch."""
    shutil.copytree(finished_run[0], tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "exported.pt").unlink()
    return tmp_path / "run"


def message_of(function, argv):
    """The line with which a command ends."""
    with pytest.raises(SystemExit) as caught:
        function(argv)
    text = str(caught.value)
    assert "\n" not in text and "weights_only" not in text and "`" not in text
    return text


def replaced(content, key, value):
    """content with the entry at a path like "model/logit_scale" replaced, or removed ("DEL")."""
    name, _, rest = key.partition("/")
    content = dict(content)
    if rest:
        content[name] = replaced(content[name], rest, value)
    elif isinstance(value, str) and value == "DEL":
        del content[name]
    else:
        content[name] = value
    return content


# --- exported files ---

CONV = "state_dict/image_encoder.conv1.weight"
EXPORTED = [  # entry, its new value, the message
    ("format", "DEL", "{path} is another file: got format None with image_encoder, quick_gelu, "
     "state_dict, rank_names, rank_values, preprocess, results; expected the exported.pt that "
     "train.py writes"),
    ("format", "ordinalclip-9", "{path} is another file: got format 'ordinalclip-9' with format, "
     "image_encoder, quick_gelu, state_dict, rank_names, rank_values, preprocess, results; "
     "expected the exported.pt that train.py writes"),
    ("image_encoder", "DEL", "{path} lacks image_encoder: export the run again"),
    ("quick_gelu", "DEL", "{path} lacks quick_gelu: export the run again"),
    ("state_dict", "DEL", "{path} lacks state_dict: export the run again"),
    ("rank_names", "DEL", "{path} lacks rank_names: export the run again"),
    ("rank_values", "DEL", "{path} lacks rank_values: export the run again"),
    ("preprocess", "DEL", "{path} lacks preprocess: export the run again"),
    ("image_encoder", 3, "{path}: image_encoder is the int 3; expected a text: export the run again"),
    ("image_encoder", "vgg99", "{path} holds no complete image encoder 'vgg99' (ValueError image "
     "encoder 'vgg99': expected one of vgg16, timm:NAME, torchvision:NAME); export the run again"),
    ("quick_gelu", 1, "{path}: quick_gelu is the int 1; expected True or False: export the run again"),
    ("quick_gelu", None, "{path}: quick_gelu is the NoneType None; expected True or False: "
     "export the run again"),
    ("state_dict", [1], "{path}: state_dict is the list [1]; expected tensors by name: "
     "export the run again"),
    ("state_dict", {}, "{path}: got prototypes (0, 0), 4 rank_names, 4 rank_values; expected "
     "(R, D), R and R"),
    ("state_dict", {"a": 1}, "{path}: state_dict is the dict {{'a': 1}}; expected tensors by name: "
     "export the run again"),
    ("state_dict", {3: torch.zeros(1)}, "{path}: state_dict is the dict {{3: tensor([0.])}}; "
     "expected tensors by name: export the run again"),
    ("rank_names", "abcd", "{path}: rank_names is the str 'abcd'; expected a list of texts: "
     "export the run again"),
    ("rank_names", [1, 2, 3, 4], "{path}: rank_names is the list [1, 2, 3, 4]; expected a list of "
     "texts: export the run again"),
    ("rank_names", ["a"], "{path}: got prototypes (4, 128), 1 rank_names, 4 rank_values; expected "
     "(R, D), R and R"),
    ("rank_values", [1.0, 2.0], "{path}: got prototypes (4, 128), 4 rank_names, 2 rank_values; "
     "expected (R, D), R and R"),
    ("rank_values", [0.0, 1.0, NAN, 3.0], "{path}: rank_values is the list [0.0, 1.0, nan, 3.0]; "
     "expected a list of finite numbers: export the run again"),
    ("rank_values", ["0", "1", "2", "3"], "{path}: rank_values is the list ['0', '1', '2', '3']; "
     "expected a list of finite numbers: export the run again"),
    ("preprocess", None, "{path}: preprocess is the NoneType None; expected image_size, mean and "
     "std: export the run again"),
    ("preprocess", {}, "{path}: preprocess lacks image_size, mean, std: export the run again"),
    ("preprocess/image_size", "DEL", "{path}: preprocess lacks image_size: export the run again"),
    ("state_dict/prototypes.prototypes", "DEL", "{path}: got prototypes (0, 0), 4 rank_names, "
     "4 rank_values; expected (R, D), R and R"),
    ("state_dict/prototypes.prototypes", torch.zeros(4), "{path}: got prototypes (4,), "
     "4 rank_names, 4 rank_values; expected (R, D), R and R"),
    ("state_dict/prototypes.prototypes", torch.full((4, 128), NAN), "{path}: "
     "prototypes.prototypes holds nan or inf in 512 of 512 values; expected finite numbers: "
     "training diverged or the file is damaged, take another one"),
    ("state_dict/logit_scale", torch.tensor(float("inf")), "{path}: logit_scale holds nan or inf "
     "in 1 of 1 values; expected finite numbers: training diverged or the file is damaged, take "
     "another one"),
    (CONV, "DEL", "{path} holds no complete image encoder 'clip' (RuntimeError Error(s) in loading "
     "state_dict for OrdinalCLIP: Missing key(s) in state_dict: \"image_encoder.conv1.weight\".); "
     "export the run again"),
    (CONV, torch.full((8, 3, 3, 3), NAN), "{path}: image_encoder.conv1.weight holds nan or inf in "
     "216 of 216 values; expected finite numbers: training diverged or the file is damaged, take "
     "another one"),
    (CONV, torch.full((8, 3, 3, 3), 1e38), "the model answers nan: its weights are finite, but too "
     "large or damaged"),
    ("state_dict/image_encoder.bn1.bias", torch.zeros(3), "{path} holds no complete image encoder "
     "'clip' (RuntimeError Error(s) in loading state_dict for OrdinalCLIP: size mismatch for "
     "image_encoder.bn1.bias: copying a param with shape torch.Size([3]) from checkpoint, the shape "
     "in current model is torch.Size([8]).); export the run again"),
    ("state_dict/image_encoder.bn1.bias", torch.zeros(8, dtype=torch.long), "{path} holds no "
     "complete image encoder 'clip' (TypeError image_encoder.bn1.bias is torch.int64, not torch.float32); "
     "export the run again"),
]  # fmt: skip
INTEGER, ABOVE_0, BOOL = "an integer, 1 to 9999", "3 numbers above 0", "True or False"
for entry, value, expected in (
    ("image_size", 0, INTEGER), ("image_size", 64.0, INTEGER), ("mean", [0.5], "3 numbers"),
    ("mean", "abc", "3 numbers"), ("std", (0.2, 0.2, 0.0), ABOVE_0), ("std", (0.2, 0.2, NAN), ABOVE_0),
    ("squash", 1, BOOL), ("draft", 512, BOOL), ("resample", "nearest", "bicubic or bilinear"),
):  # fmt: skip
    got = f"{type(value).__name__} {value!r}"
    message = f"preprocess: {entry} is the {got}; expected {expected}: export the run again"
    EXPORTED.append((f"preprocess/{entry}", value, "{path}: " + message))


@pytest.mark.parametrize("key, value, message", EXPORTED)
def test_an_exported_file_with_a_wrong_part(files, stripes, tmp_path, key, value, message):
    path, image = tmp_path / "x.pt", str(stripes / "1 stripes" / "image 0.png")
    torch.save(replaced(files["exported.pt"], key, value), path)
    assert message_of(predict.main, [str(path), image]) == "predict.py: " + message.format(
        path=path
    )


PROTOTYPES = [
    ("format", "x", "{path} is another file: got format 'x' with prototypes, rank_names, "
     "rank_values, logit_scale, format; expected what save_prototypes writes"),
    ("prototypes", "DEL", "{path} lacks prototypes: export the run again"),
    ("prototypes", [1.0], "{path}: prototypes is the list [1.0]; expected a tensor: "
     "export the run again"),
    ("prototypes", torch.zeros(3), "{path}: got prototypes (3,), 2 rank_names, 2 rank_values; "
     "expected (R, D), R and R"),
    ("prototypes", torch.full((2, 3), NAN), "{path}: prototypes holds nan or inf in 6 of 6 values; "
     "expected finite numbers: training diverged or the file is damaged, take another one"),
    ("logit_scale", NAN, "{path}: logit_scale is the float nan; expected a finite number: "
     "export the run again"),
]  # fmt: skip


@pytest.mark.parametrize("key, value, message", PROTOTYPES)
def test_stored_prototypes_with_a_wrong_part(tmp_path, key, value, message):
    path = tmp_path / "p.pt"
    save_prototypes(path, torch.ones(2, 3), ["a", "b"], 1.0)
    torch.save(replaced(torch.load(path, weights_only=True), key, value), path)
    with pytest.raises(ValueError) as caught:
        load_prototypes(path)
    assert str(caught.value) == message.format(path=path)


def test_nan_is_neither_stored_nor_exported(tmp_path):
    prototypes = torch.ones(3, 4)
    prototypes[1, 2] = NAN
    message = "prototype 1 of 3 holds nan or inf; lower the learning rate, or take other weights"
    with pytest.raises(FloatingPointError, match=message):
        FixedPrototypes(prototypes)
    message = "prototypes holds nan or inf in 1 of 12 values"
    with pytest.raises(ValueError, match=message):
        save_prototypes(tmp_path / "p.pt", prototypes, ["a", "b", "c"], 1.0)
    assert not (tmp_path / "p.pt").exists()


BAD_MODELS = [  # argument of save_model, its value, the message
    ("image_encoder", None, "{path}: image_encoder is the NoneType None; expected a text: give it"),
    ("rank_names", ["a", "b"], "got prototypes (3, 8), 2 rank_names, 3 rank_values; "
     "expected (R, D), R and R"),
    ("rank_values", [0, NAN, 2], "{path}: rank_values is the list [0.0, nan, 2.0]; expected a list of "
     "finite numbers: give it"),
    ("rank_names", ["a", "b", "c", "d"], "got prototypes (3, 8), 4 rank_names, 3 rank_values; "
     "expected (R, D), R and R"),
    ("preprocess", dict(image_size=64, mean=[0.5] * 3), "{path}: preprocess lacks std: give it"),
]  # fmt: skip


@pytest.mark.parametrize("name, value, message", BAD_MODELS, ids=[row[0] for row in BAD_MODELS])
def test_a_model_is_saved_with_all_that_loading_needs(tmp_path, name, value, message):
    clip, path = tiny_clip(embed_dim=8), tmp_path / "mine.pt"
    model = OrdinalCLIP(clip.visual, LinearPrototypes(3, 8), clip.logit_scale).train()
    arguments = dict(
        image_encoder="clip", rank_names=("a", "b", "c"), rank_values=np.array([1, 2, 4.5])
    )
    arguments["preprocess"] = dict(image_size=64, mean=(0.5,) * 3, std=torch.ones(3))
    with pytest.raises(ValueError) as caught:
        save_model(path, model, **arguments | {name: value})
    assert str(caught.value) == message.format(path=path) and not path.exists()
    save_model(path, model, **arguments)
    assert model.training and torch.is_tensor(arguments["preprocess"]["std"])
    regression = Regression(clip.visual, 8, 5, "l1")
    with pytest.raises(ValueError, match=r"got prototypes \(5, 0\), 3 rank_names, 3 rank_values"):
        save_model(tmp_path / "r.pt", regression, **arguments)
    loaded, names, values, preprocess = load_model(path)
    assert (names, values, preprocess["std"]) == (["a", "b", "c"], [1, 2, 4.5], [1, 1, 1])
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.eval()(images), model.eval()(images))


# --- checkpoints ---

NO_CHECKPOINT = "{path} is no checkpoint of this script"
CHECKPOINTS = [  # flag, entry, its new value, the message
    *[("--eval", key, "DEL", f"{NO_CHECKPOINT} for that use: it holds no '{key}'")
      for key in ("model", "settings")],
    *[("--resume", key, "DEL", f"{NO_CHECKPOINT} for that use: it holds no '{key}'")
      for key in ("model", "settings", "epoch", "log", "seconds", "initial_similarity", "optimizer",
                  "schedule", "scaler")],
    *[("--resume", key, None, NO_CHECKPOINT + f": {key} of type NoneType")
      for key in ("model", "settings", "epoch", "log", "seconds", "optimizer", "schedule", "scaler")],
    ("--init", "model", "DEL", "--init {path} holds neither an image_encoder nor a prompt_learner"),
    ("--eval", "model", {"a": 1}, "{path}: a of the model is of type int; expected a tensor"),
    ("--eval", "model/logit_scale", torch.tensor(NAN), "{path}: logit_scale holds nan or inf in "
     "1 of 1 values; expected finite numbers: training diverged or the file is damaged, take "
     "another one"),
    ("--eval", "model/logit_scale", torch.zeros(2), "{path} is of another model: Error(s) in "
     "loading state_dict for OrdinalCLIP: size mismatch for logit_scale: copying a param with "
     "shape torch.Size([2]) from checkpoint, the shape in current model is torch.Size([])."),
    ("--eval", "model/more", torch.zeros(2), "{path} is of another model: Error(s) in loading "
     "state_dict for OrdinalCLIP: Unexpected key(s) in state_dict: \"more\". "),
    ("--eval", "model/prototypes.rank_embeds", "DEL", "{path} is of another model: Error(s) in "
     "loading state_dict for OrdinalCLIP: Missing key(s) in state_dict: "
     "\"prototypes.rank_embeds\". "),
    ("--eval", "settings/method", "psychic", "{path} is damaged: its --method is 'psychic'"),
    ("--eval", "settings/lr", "fast", "{path} is damaged: its --lr is 'fast'"),
    ("--eval", "settings/shift", [1], "{path} is damaged: its --shift is [1]"),
    ("--eval", "settings/base_ranks", {}, "{path} is damaged: its --base-ranks is {{}}"),
    ("--resume", "log", [], "{path} is damaged: 0 rows of its log, epoch 3, progress with nothing"),
    ("--resume", "progress", {"steps": 2}, "{path} is damaged: 3 rows of its log, epoch 3, "
     "progress with steps"),
    ("--resume", "schedule", {}, "{path}: its schedule holds nothing"),
    ("--resume", "optimizer", {}, "{path}: its optimizer is of another model: 'param_groups'"),
    ("--resume", "optimizer/param_groups", [], "{path}: its optimizer is of another model: loaded "
     "state dict has a different number of parameter groups"),
    ("--init", "model/prototypes.context_embeds", torch.zeros(2, 2), "--init {path}: "
     "prototypes.context_embeds is (2, 2) there, here (2, 128); use the same --image-encoder, "
     "--clip and number of context tokens"),
]  # fmt: skip


def command(flag, path, stripes):
    if flag != "--init":
        return [flag, str(path)]
    return ["--data", str(stripes), *TINY_MODEL, "--init", str(path), "--out", f"{path}.run"]


@pytest.mark.parametrize("flag, key, value, message", CHECKPOINTS)
def test_a_checkpoint_with_a_wrong_part(files, run_dir, stripes, flag, key, value, message):
    path = run_dir / ("last.pt" if flag == "--resume" else "best.pt")
    torch.save(replaced(files[path.name], key, value), path)
    got = message_of(train.main, command(flag, path, stripes))
    assert got.strip() == message.format(path=path).strip()


# --- files of other formats ---


def save_torchscript(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))


def write_bytes(change):
    """A whole file, changed."""

    def write(path):
        torch.save({"a": torch.zeros(1000)}, path)
        path.write_bytes(change(path.read_bytes()))

    return write


def flipped(data):
    """One bit changed within the tensor."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGED = "it is damaged or of another format"
FORMATS = {  # name -> how to write it, why it is not read
    "empty": (write_bytes(lambda data: b""), DAMAGED),
    "page": (write_bytes(lambda data: b"<html>404"), DAMAGED),
    "pickled": (write_bytes(lambda data: b"\x80\x04K\x01."), DAMAGED),
    "half": (write_bytes(lambda data: data[: len(data) // 2]), DAMAGED),
    "flipped": (write_bytes(flipped), "it is damaged, the checksum of {}/data/0 is wrong"),
    "module": (lambda path: torch.save(nn.Linear(2, 2), path),
               "it holds Python objects (torch.nn.modules.linear.Linear), which can run code: "
             "save the state_dict() alone"),
    "path": (lambda path: torch.save({"model": Path("/")}, path),
             "it holds Python objects (pathlib.PosixPath), which can run code: "
             "save the state_dict() alone"),
    "objects": (lambda path: torch.save({"model": np.array([{}])}, path),
                "it holds Python objects (numpy.dtypes.ObjectDType), which can run code: "
             "save the state_dict() alone"),
    "torchscript": (save_torchscript, "it is a TorchScript archive, which can run code"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("flag", ["predict", "--eval", "--resume", "--init"])
def test_a_file_of_another_format(tmp_path, stripes, name, flag):
    write, reason = FORMATS[name]
    path = tmp_path / f"{name}.pt"
    write(path)
    got = f"{path} ({path.stat().st_size} bytes) cannot be read: {reason.format(name)}; expected "
    if flag == "predict":
        got = f"predict.py: {got}the exported.pt that train.py writes"
        assert message_of(predict.main, [str(path), "a.png"]) == got
    else:
        got += "last.pt or best.pt of a run"
        assert message_of(train.main, command(flag, path, stripes)) == got


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "torchscript"])
def test_weights_of_another_format(tmp_path, stripes, name):
    write, reason = FORMATS[name]
    path = tmp_path / f"{name}.pt"
    write(path)
    argv = ["--data", str(stripes), "--clip", str(path), "--image-encoder", "clip"]
    assert message_of(train.main, [*argv, "--out", str(tmp_path / "run"), "--device", "cpu"]) == (
        f"train.py: {path} ({path.stat().st_size} bytes) cannot be read: {reason.format(name)}; "
        "expected a state dict of tensors, also as safetensors or TorchScript: get it again"
    )


@pytest.mark.parametrize("content, message", [
    ([1], "{path} holds a list; expected a state dict"),
    ({"a": torch.zeros(2)}, "{path} does not fit Sequential: 3 entries missing, unexpected or of "
     "another shape, e.g. 0.bias, 0.weight, a"),
    ({"0.weight": torch.full((3, 2), NAN), "0.bias": torch.zeros(3)},
     "{path}: 0.weight holds nan or inf; get the file again"),
    (nn.Linear(2, 2), "{path} cannot be read as a state dict (UnpicklingError); save state_dict() "
     "alone"),
])  # fmt: skip
def test_weights_of_an_encoder(tmp_path, small_encoder, content, message):
    path = tmp_path / "x.pth"
    torch.save(content, path)
    with pytest.raises(ValueError) as caught:
        build_image_encoder("vgg16", 4, weights=path)
    assert str(caught.value) == message.format(path=path)


def test_load_model_gives_what_was_exported(files, finished_run):
    model, names, values, preprocess = load_model(finished_run[0] / "exported.pt")
    content = files["exported.pt"]
    assert names == content["rank_names"] and values == content["rank_values"]
    assert preprocess == content["preprocess"]
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in content["state_dict"].items())


# --- hints name flags; the official code's checkpoints ---


def test_hints_on_the_command_line_name_flags(tmp_path, stripes):
    torch.save(fill(TINY), tmp_path / "clip.pt")
    save_torchscript(tmp_path / "archive.pt")
    sha256 = hashlib.sha256((tmp_path / "archive.pt").read_bytes()).hexdigest()
    argv = ["--data", str(stripes), "--image-encoder", "clip", "--device", "cpu", "--clip"]
    assert message_of(train.main, [*argv, str(tmp_path / "clip.pt")]) == (
        f"train.py: the activation of {tmp_path / 'clip.pt'} is unknown: config files beside it "
        "say []; expected gelu or quick_gelu: pass --quick-gelu (OpenAI, MetaCLIP) or "
        "--no-quick-gelu (LAION, DataComp)"
    )
    assert message_of(train.main, [*argv, str(tmp_path / "archive.pt")]) == (
        f"train.py: {tmp_path / 'archive.pt'} is a TorchScript archive, which can run code, and "
        f"its sha256, {sha256}, is not in MODELS; expected a state dict; pass --trust-torchscript "
        "if you trust where it came from"
    )


def test_zeroshot_refuses_the_names_of_special_tokens(stripes, tmp_path):
    """CLIP would read its feature before the rank's name: all ranks alike."""
    argv = ["--data", str(stripes), *TINY_MODEL]
    argv += ["--method", "zeroshot", "--context", "a <|ENDOFTEXT|>", "--out", str(tmp_path / "run")]
    assert message_of(train.main, argv) == (
        "train.py: 'a <|ENDOFTEXT|> 1 stripes.' spells out a special token of CLIP; use other words"
    )


def official(state):
    """A checkpoint as xk-huang/OrdinalCLIP@ca10a20 writes it, through Lightning."""
    names = {
        "module." + key.replace("prototypes.", "prompt_learner."): v for key, v in state.items()
    }
    names |= {"module.text_encoder.ln_final.bias": torch.zeros(2)}
    return {"epoch": 3, "global_step": 9, "state_dict": names, "callbacks": {}}


def test_init_takes_a_checkpoint_of_the_official_code(
    files, stripes, tmp_path, capsys, monkeypatch
):
    state = {k: v for k, v in files["best.pt"]["model"].items() if "_extra" not in k}
    torch.save(official(state), tmp_path / "official.ckpt")
    starts = []
    monkeypatch.setattr(
        train, "fit", lambda run, *_: starts.append(run.model.state_dict()) or 1 / 0
    )
    for path in (tmp_path / "official.ckpt", tmp_path / "ours.pt"):
        torch.save(files["best.pt"], tmp_path / "ours.pt")
        with pytest.raises(ZeroDivisionError):
            train.main(command("--init", path, stripes))
    assert all(torch.equal(starts[0][key], value) for key, value in starts[1].items())
    assert torch.equal(starts[0]["prototypes.rank_embeds"], state["prototypes.rank_embeds"])
    key = "image_encoder.conv1.weight"
    assert torch.equal(starts[0][key], state[key])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("starts")]
    assert lines == [
        f"starts with the image encoder and prompts of {tmp_path / 'official.ckpt'}, without its "
        "logit_scale, text_encoder",
        f"starts with the image encoder and prompts of {tmp_path / 'ours.pt'}, without its "
        "logit_scale",
    ]
    for changed, message in (
        ({"state_dict": {"a": torch.zeros(1)}}, "--init {} holds neither an image_encoder nor a "
         "prompt_learner"),
        (official(state | {"logit_scale": torch.tensor(NAN)}), "--init {}: logit_scale holds nan "
         "or inf in 1 of 1 values; expected finite numbers: training diverged or the file is "
         "damaged, take another one"),
        (official(state | {"prototypes.rank_embeds": torch.zeros(3)}), "--init {}: "
         "prototypes.rank_embeds is (3,) there, here (3, 1, 128); use the same --image-encoder, "
         "--clip and number of context tokens"),
    ):  # fmt: skip
        torch.save(changed, tmp_path / "x.ckpt")
        got = message_of(train.main, command("--init", tmp_path / "x.ckpt", stripes))
        assert got == message.format(tmp_path / "x.ckpt")
