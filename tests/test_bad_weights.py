"""pytest tests/test_bad_weights.py -- checkpoints, exported files and weights that are damaged,
foreign or incomplete: one line each, whole, and what is read after all."""

import random
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_shapes import TINY, TINY_RESNET, equal, fill
from torch import nn

import predict
import train
from backbones import build_image_encoder
from clip_model import CLIP, tiny_clip
from clip_weights import load_file
from exported import load_model, load_prototypes, save_prototypes
from ordinalclip import FixedPrototypes, OrdinalCLIP

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

PREPROCESS = "image_size (an integer), mean and std (3 numbers each), perhaps squash, resample"
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
    ("image_encoder", "vgg99", "{path} holds no whole image encoder 'vgg99' (ValueError image "
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
    ("preprocess", None, "{path}: preprocess is the NoneType None; expected " + PREPROCESS
     + ": export the run again"),
    ("preprocess", {}, "{path}: preprocess is the dict {{}}; expected " + PREPROCESS
     + ": export the run again"),
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
    (CONV, "DEL", "{path} holds no whole image encoder 'clip' (RuntimeError Error(s) in loading "
     "state_dict for OrdinalCLIP: Missing key(s) in state_dict: \"image_encoder.conv1.weight\".); "
     "export the run again"),
    (CONV, torch.full((8, 3, 3, 3), NAN), "{path}: image_encoder.conv1.weight holds nan or inf in "
     "216 of 216 values; expected finite numbers: training diverged or the file is damaged, take "
     "another one"),
    (CONV, torch.full((8, 3, 3, 3), 1e38), "the model answers nan: its weights are finite, but too "
     "large or damaged"),
    ("state_dict/image_encoder.bn1.bias", torch.zeros(3), "{path} holds no whole image encoder "
     "'clip' (RuntimeError Error(s) in loading state_dict for OrdinalCLIP: size mismatch for "
     "image_encoder.bn1.bias: copying a param with shape torch.Size([3]) from checkpoint, the shape "
     "in current model is torch.Size([8]).); export the run again"),
    ("state_dict/image_encoder.bn1.bias", torch.zeros(8, dtype=torch.long), "{path} holds no whole "
     "image encoder 'clip' (TypeError image_encoder.bn1.bias is torch.int64, not torch.float32); "
     "export the run again"),
]  # fmt: skip
for entry, value in (
    ("image_size", "DEL"), ("image_size", 0), ("image_size", 64.0), ("mean", [0.5]),
    ("mean", "abc"), ("std", (0.2, 0.2, 0.0)), ("std", (0.2, 0.2, NAN)), ("squash", 1),
    ("resample", "nearest"),
):  # fmt: skip
    EXPORTED.append((f"preprocess/{entry}", value, None))


@pytest.mark.parametrize("key, value, message", EXPORTED)
def test_an_exported_file_with_a_wrong_part(files, stripes, tmp_path, key, value, message):
    path, image = tmp_path / "x.pt", str(stripes / "1 stripes" / "image 0.png")
    torch.save(replaced(files["exported.pt"], key, value), path)
    got = message_of(predict.main, [str(path), image])
    if message is None:  # the whole entry is named
        assert re.fullmatch(f"predict.py: {path}: preprocess is the dict .*; expected "
                            f"{re.escape(PREPROCESS)}: export the run again", got)  # fmt: skip
    else:
        assert got == "predict.py: " + message.format(path=path)


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
    ("--init", "model", "DEL", NO_CHECKPOINT + " for that use: it holds no 'model'"),
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
    flags = "--clip tiny --image-encoder clip --batch-size 16 --workers 0 --device cpu".split()
    return ["--data", str(stripes), *flags, "--init", str(path), "--out", f"{path}.run"]


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
               "it holds Python objects (torch.nn.modules.linear.Linear), which can run code"),
    "path": (lambda path: torch.save({"model": Path("/")}, path),
             "it holds Python objects (pathlib.PosixPath), which can run code"),
    "objects": (lambda path: torch.save({"model": np.array([{}])}, path),
                "it holds Python objects (numpy.dtypes.ObjectDType), which can run code"),
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
        "expected a state dict of tensors, also as safetensors or TorchScript: get it again, or "
        "save its state_dict() alone"
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


@pytest.fixture
def small_encoder(monkeypatch):
    """Stands in for VGG-16, which has 500 MB."""

    def build(dim):
        encoder = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, dim))
        encoder.last_layer = "1"
        return encoder

    monkeypatch.setattr("backbones.VGG16", build)


# --- what is read: numpy, prefixes, wrappers ---


def test_numbers_and_arrays_of_numpy_are_read(files, finished_run, stripes, tmp_path):
    """Also as numpy 1 names them."""
    content = files["exported.pt"]
    state = {key: value.numpy() for key, value in content["state_dict"].items()}
    preprocess = {**content["preprocess"], "mean": np.array(content["preprocess"]["mean"]),
                  "image_size": np.int64(content["preprocess"]["image_size"])}  # fmt: skip
    values = np.array(content["rank_values"], np.float32)
    changed = content | dict(
        state_dict=state, preprocess=preprocess, rank_values=values, quick_gelu=np.bool_(True)
    )
    torch.save(changed, tmp_path / "x.pt")
    image = stripes / "2 stripes" / "image 3.png"
    answers = [predict.load(p)(image) for p in (tmp_path / "x.pt", finished_run[0] / "exported.pt")]
    assert torch.equal(answers[0]["probs"], answers[1]["probs"])
    assert answers[0]["value"] == answers[1]["value"]

    torch.save({"a": np.float64(2.5), "b": [np.arange(3)], "c": (np.str_("d"),)}, tmp_path / "y.pt")
    got = load_file(tmp_path / "y.pt", "")
    assert got["a"] == 2.5 and type(got["a"]) is float and got["c"] == ("d",)
    assert torch.equal(got["b"][0], torch.arange(3))


def nested(prefix, wrapper, state):
    state = {prefix + key: value for key, value in state.items()}
    return {"epoch": 3, wrapper: state} if wrapper else state


WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "ema",
    "model_ema",
    "params",
    "module",
)
PREFIXES = ("module.", "model.", "clip.", "clip_model.", "net.", "backbone.", "_orig_mod.",
            "module.model.", "model.clip_model.", "_orig_mod.module.net.backbone.")  # fmt: skip


@pytest.mark.parametrize("wrapper", ["", *WRAPPERS])
@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_prefixes_and_wrappers_are_taken_off_and_named(capsys, tiny_state, prefix, wrapper):
    from clip_weights import to_openai_layout

    state = to_openai_layout(nested(prefix, wrapper, tiny_state), "x.pt")
    assert state.keys() == tiny_state.keys()
    assert all(state[key] is tiny_state[key] for key in state)
    parts = [f"the wrapper '{wrapper}'"] * bool(wrapper) + [f"the prefix '{prefix}'"] * bool(prefix)
    assert capsys.readouterr().err == (f"x.pt: without {', '.join(parts)}\n" if parts else "")


@pytest.fixture(scope="module")
def tiny_state():
    return fill(TINY)


def test_names_that_become_one(tiny_state):
    both = tiny_state | {"module.ln_final.bias": torch.zeros(64)}
    with pytest.raises(ValueError) as caught:
        CLIP.from_state_dict(both)
    assert str(caught.value) == (
        "state dict: several entries are named ln_final.bias without their prefixes "
        "(, module.); save the one model alone"
    )


@pytest.mark.parametrize("prefix, wrapper", [("module.", ""), ("model.", "state_dict")])
def test_weights_of_an_encoder_with_prefix_and_wrapper(
    tmp_path, small_encoder, capsys, prefix, wrapper
):
    state = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3), "1.weight": torch.ones(9, 3)}
    torch.save(nested(prefix, wrapper, state), tmp_path / "x.pth")
    encoder = build_image_encoder("vgg16", 4, weights=tmp_path / "x.pth")
    assert torch.equal(encoder[0].weight, torch.ones(3, 2)) and encoder[1].weight.std() > 0
    names = ", ".join(repr(name) for name in sorted({prefix, wrapper} - {""}))
    assert capsys.readouterr().err == f"{tmp_path / 'x.pth'}: without {names}\n"


# --- CLIP's weights ---

OTHER = "state dict is {}, with {}; expected CLIP: choose other weights"
TIMM = "a model with an image tower of timm (SigLIP, EVA, ConvNeXt)"
ROBERTA = "a model with a text tower of Hugging Face's"
ONLY = "state dict holds the {} tower only; expected both of CLIP's: choose other weights"
NOT_CLIP = [  # keys left out, keys added, the message
    ((), {"logit_bias": torch.zeros(1)}, OTHER.format("SigLIP", "logit_bias")),
    ((), {"vision_model.head.probe": torch.zeros(1)},
     OTHER.format("SigLIP", "vision_model.head.probe")),
    ((), {"text_decoder.ln_final.bias": torch.zeros(1)},
     OTHER.format("CoCa", "text_decoder.ln_final.bias")),
    (("visual.",), {"visual.trunk.norm.weight": torch.zeros(1)},
     OTHER.format(TIMM, "visual.trunk.norm.weight")),
    ((), {"visual.blocks.0.norm1.bias": torch.zeros(1)},
     OTHER.format("EVA-CLIP", "visual.blocks.0.norm1.bias")),
    (("transformer.",), {"text.transformer.encoder.layer.0.bias": torch.zeros(1)},
     OTHER.format(ROBERTA, "text.transformer.encoder.layer.0.bias")),
    (("visual.",), {}, ONLY.format("text")),
    (("transformer.", "token_embedding."), {}, ONLY.format("image")),
    ((), {"visual.proj": 3}, "state dict: visual.proj is a int; expected a tensor"),
    ((), {"visual.proj": torch.full((128, 96), NAN)}, "the state dict: visual.proj holds nan or inf "
     "in 12288 of 12288 values; expected finite numbers: training diverged or the file is damaged, "
     "take another one"),
]  # fmt: skip


@pytest.mark.parametrize("left_out, added, message", NOT_CLIP)
def test_other_models_are_refused_by_name(tiny_state, left_out, added, message):
    state = {k: v for k, v in tiny_state.items() if not left_out or not k.startswith(left_out)}
    with pytest.raises(ValueError) as caught:
        CLIP.from_state_dict(state | added)
    assert str(caught.value) == message


def test_another_model_is_refused_before_its_activation_is_asked_for(tiny_state, tmp_path):
    torch.save(tiny_state | {"logit_bias": torch.zeros(1)}, tmp_path / "x.pt")
    message = f"{tmp_path / 'x.pt'} is SigLIP, with logit_bias; expected CLIP"
    with pytest.raises(ValueError, match=message):
        CLIP.from_pretrained(tmp_path / "x.pt")


# --- fuzzing ---


def mutate(rng, content, path):
    """Write content, changed at random, to path; returns what was done."""
    state = dict(content["state_dict"])
    key = rng.choice(sorted(state))
    change = rng.choice(["flip", "cut", "rename", "shape", "dtype", "drop", "fill", "entry"])
    if change == "rename":
        state[key[::-1]] = state.pop(key)
    elif change == "shape":
        shape = [rng.choice([0, 1, 2, size, size + 1]) for size in state[key].shape]
        state[key] = torch.zeros(rng.choice([shape, shape[1:], [*shape, 2]]))
    elif change == "dtype":
        state[key] = state[key].to(rng.choice([torch.int64, torch.float16, torch.complex64]))
    elif change == "drop":
        del state[key]
    elif change == "fill":
        value = rng.choice([NAN, float("inf"), 3e38, -3e38, 0.0])
        state[key] = torch.full(state[key].shape, value)
    content = content | {"state_dict": state}
    if change == "entry":
        key = rng.choice(sorted(content))
        content[key] = rng.choice([None, 0, 1.5, "x", [], {}, [NAN], (1, 2, 3), torch.zeros(2)])
    torch.save(content, path)
    data = bytearray(path.read_bytes())
    if change == "cut":
        data = data[: rng.randrange(len(data))]
    for _ in range(rng.choice([1, 3, 20]) if change == "flip" else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return change


@pytest.mark.parametrize("cases", [40, pytest.param(3000, marks=pytest.mark.full)])
def test_mutated_exported_files(tmp_path, cases):
    """Each gives the answers of the whole file, other finite ones, or one line that names it."""
    rng, path, encoder = random.Random(cases), tmp_path / "x.pt", tiny_clip(image_size=32).visual
    whole = OrdinalCLIP(encoder, FixedPrototypes(torch.randn(4, 128)), 3.0).eval()
    content = dict(
        format="ordinalclip-1", image_encoder="clip", quick_gelu=True, state_dict=whole.state_dict(),
        rank_names=list("abcd"), rank_values=[0.0, 1.0, 2.0, 3.0],
        preprocess=dict(image_size=32, mean=(0.5,) * 3, std=(0.2,) * 3),
    )  # fmt: skip
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    refused = answered = 0
    for _ in range(cases):
        change = mutate(rng, content, path)
        try:
            predictor = predict.load(path)
            if predictor.preprocess["image_size"] == 32:
                assert predictor.predict(pixels)["probs"].isfinite().all()
            answered += 1
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and "weights_only" not in str(error), change
            assert str(path) in str(error) or "the model answers nan" in str(error), change
    print(f"{cases} mutated exported files: {refused} refused in one line, {answered} answered")
    assert refused > cases // 3 and answered > 0 and refused + answered == cases


def test_a_flipped_bit_anywhere_is_found_or_harmless(tmp_path):
    """torch.load does not compare checksums; load_file does."""
    path, tensors = tmp_path / "x.pt", {"a": torch.arange(2000.0), "b": [1, "two"]}
    torch.save(tensors, path)
    data, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(200):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            got = load_file(path, "it")
            assert torch.equal(got["a"], tensors["a"]) and got["b"] == tensors["b"]
        except ValueError as error:
            assert re.match(rf"{path} \(\d+ bytes\) cannot be read: ", str(error))
            refused += 1
    assert refused > 150


def test_a_resnet_of_numpy_arrays():
    state = fill(TINY_RESNET)
    assert equal(CLIP.from_state_dict({key: v.numpy() for key, v in state.items()}), state)


def test_load_model_gives_what_was_exported(files, finished_run):
    model, names, values, preprocess = load_model(finished_run[0] / "exported.pt")
    content = files["exported.pt"]
    assert names == content["rank_names"] and values == content["rank_values"]
    assert preprocess == content["preprocess"]
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in content["state_dict"].items())
