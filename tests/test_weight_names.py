"""pytest tests/test_weight_names.py -- weights as people have them: prefixes, wrappers, numpy's
arrays, files in parts, repositories of Hugging Face; and other models, refused by their names."""

import json
import sys

import numpy as np
import pytest
import torch
from clip_shapes import TINY, TINY_HUGGING_FACE, TINY_RESNET, equal, fill, safetensors_bytes

import predict
from backbones import build_image_encoder
from clip_model import CLIP
from clip_weights import load_file, to_openai_layout

NAN = float("nan")


@pytest.fixture(scope="module")
def files(finished_run):
    """name -> content of the files of a finished run."""
    return {"exported.pt": torch.load(finished_run[0] / "exported.pt", weights_only=True)}


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


WRAPPERS = "state_dict model_state_dict model net ema model_ema params module".split()
PREFIXES = (
    "module. model. clip. clip_model. net. backbone. _orig_mod. module.model. model.clip_model. "
    "_orig_mod.module.net.backbone."
).split()


@pytest.mark.parametrize("wrapper", ["", *WRAPPERS])
@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_prefixes_and_wrappers_are_taken_off_and_named(capsys, tiny_state, prefix, wrapper):
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


def test_a_resnet_of_numpy_arrays():
    state = fill(TINY_RESNET)
    assert equal(CLIP.from_state_dict({key: v.numpy() for key, v in state.items()}), state)


# --- files in parts, repositories ---


def save_in_parts(state, folder, suffix):
    """As Hugging Face does: two files and an index."""
    suffixed = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{suffixed}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    keys = sorted(state)
    parts = dict(zip(names, (keys[::2], keys[1::2])))
    for name, part in parts.items():
        part = {key: state[key] for key in part}
        if suffix == "bin":
            torch.save(part, folder / name)
        else:
            (folder / name).write_bytes(safetensors_bytes(part))
    weight_map = {key: name for name, part in parts.items() for key in part}
    index = folder / f"{suffixed}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, names


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_parts(tmp_path, suffix):
    theirs = fill(TINY_HUGGING_FACE)
    index, names = save_in_parts(theirs, tmp_path, suffix)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"} | TOWERS))
    whole = CLIP.from_state_dict(theirs).state_dict()
    for path in (tmp_path, index):
        assert equal(CLIP.from_pretrained(path), whole)
    (tmp_path / names[1]).unlink()
    message = f"{index} names {names[1]}, not there; get all its files"
    with pytest.raises(FileNotFoundError, match=message):
        CLIP.from_pretrained(tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=f"{index} is no index of weights in parts; get it ag"):
            CLIP.from_pretrained(tmp_path)


TOWERS = dict(text_config={}, vision_config={})


def test_a_repository_of_hugging_face(tmp_path, monkeypatch):
    """By huggingface_hub where it is installed: one with weights of both formats, one with .bin."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = "hf:org/clip needs huggingface_hub: pip install huggingface_hub, or download the rep"
    with pytest.raises(ImportError, match=message):
        CLIP.from_pretrained("hf:org/clip")

    state, requests = fill(TINY), []
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"} | TOWERS))

    def snapshot_download(name, allow_patterns):
        requests.append(allow_patterns[0])
        if name == "org/none":
            raise OSError("404 Client Error.\nRepository not found")
        return str(tmp_path)

    hub = type(sys)("huggingface_hub")
    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert equal(CLIP.from_pretrained("hf:org/clip"), state)
    assert requests == ["*model*.safetensors", "*model*.bin"]
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(state))
    assert equal(CLIP.from_pretrained("hf:org/clip"), state) and len(requests) == 3
    message = (
        "cannot download hf:org/none: OSError 404 Client Error. Repository not found; check the "
        "name and the network, or download the repository and give its folder"
    )
    with pytest.raises(ConnectionError, match=message):
        CLIP.from_pretrained("hf:org/none")
