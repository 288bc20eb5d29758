"""pytest tests/test_clip_weights.py -- every file format, the activation of the weights, downloads
from a server on 127.0.0.1, and each error that a user can meet. Offline, CPU."""

import hashlib
import http.server
import json
import re
import socket
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from clip_shapes import POOL, TINY, TINY_RESNET, equal, fill, inputs, safetensors_bytes
from torch import nn

import clip_weights
from clip_model import CLIP, QuickGELU
from clip_weights import MODELS, download, read_safetensors


@pytest.fixture(scope="module")
def state():
    return fill(TINY)


# ----------------------------------------------------------------------------------------- files
def save_old(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


class Nest(nn.Module):
    """A module with the parameters and buffers of a state dict by their names, and more buffers."""

    def __init__(self, state, **extras):
        super().__init__()
        for key, value in state.items():
            *path, name = key.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, Nest({}))
                module = module._modules[part]
            if key.endswith(("num_batches_tracked", "running_mean", "running_var")):
                module.register_buffer(name, value)
            else:
                module.register_parameter(name, nn.Parameter(value))
        for name, value in extras.items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x):
        return x


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """-> path, state dict of a TorchScript archive like OpenAI's: fp16, three more entries."""
    path = tmp_path_factory.mktemp("archive") / "resnet.pt"
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in fill(TINY_RESNET).items()
    }
    nest = Nest(half, input_resolution=64, context_length=77, vocab_size=49408)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(nest, torch.zeros(1)).save(str(path))
    return path, half


def activations(clip):
    return {type(module.gelu) for module in clip.modules() if hasattr(module, "gelu")}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_torchscript_archive(archive, monkeypatch):
    path, half = archive
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    message = f"TorchScript.*{sha256}, is not in MODELS; .*pass trust_torchscript=True"
    with pytest.raises(ValueError, match=message):
        CLIP.from_pretrained(path)
    trusted = CLIP.from_pretrained(path, trust_torchscript=True)  # OpenAI's: needs no quick_gelu
    assert equal(trusted, half) and activations(trusted) == {QuickGELU}
    monkeypatch.setitem(MODELS, "known", ("http://127.0.0.1/", sha256))
    assert equal(CLIP.from_pretrained(path), half)
    assert activations(CLIP.from_pretrained(path, quick_gelu=False)) == {nn.GELU}


@pytest.mark.parametrize(
    "name, save",
    [
        ("zip.pt", torch.save),
        ("old.pt", save_old),
        ("model.SAFETENSORS", lambda state, path: path.write_bytes(safetensors_bytes(state))),
        ("odd.safetensors", lambda state, path: path.write_bytes(safetensors_bytes(state, pad=3))),
    ],
    ids=["zip", "not zip", "safetensors", "unaligned"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format(state, tmp_path, monkeypatch, name, save, dtype):
    saved = {key: value.to(dtype) for key, value in state.items()}
    save(saved, tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = CLIP.from_pretrained(f"~/{name}", quick_gelu=True)
    (tmp_path / name).write_bytes(b"")  # it is not needed any more
    assert equal(loaded, saved) and not loaded.training
    images, tokens = inputs(64)
    with torch.no_grad():
        features = loaded.encode_image(images), loaded.encode_text(tokens)
    assert all(torch.isfinite(feature).all() for feature in features)


def test_read_safetensors(tmp_path):
    tensors = {
        "half": torch.randn(3, 5).half(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
        "é": torch.randn(2, 3, 4).bfloat16(),
    }
    path = tmp_path / "some.safetensors"
    path.write_bytes(safetensors_bytes(tensors))
    got = read_safetensors(path)
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_damaged_and_foreign_files(state, archive, tmp_path):
    torch.save(state, tmp_path / "zip.pt")
    save_old(state, tmp_path / "old.pt")
    whole = {
        "safetensors": safetensors_bytes(state),
        "ts.pt": archive[0].read_bytes(),
        **{name: (tmp_path / name).read_bytes() for name in ("zip.pt", "old.pt")},
    }
    bad = {
        f"{i}.{name}": data[:size]
        for name, data in whole.items()
        for i, size in enumerate([0, 4, 300, len(data) // 2, len(data) - 9])
    }
    page = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    bad |= {
        "junk.safetensors": whole["safetensors"] + b"junk",
        "directory.pt": whole["zip.pt"].replace(b"PK\x01\x02", b"PK\x09\x02"),
        "types.safetensors": safetensors_bytes({"a": torch.zeros(2)}).replace(b"F32", b"F99"),
        "list.safetensors": (2).to_bytes(8, "little") + b"[]",
        "page.pt": page,
        "page.safetensors": page,
        "lfs.bin": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    }
    for name, data in bad.items():
        path = tmp_path / f"bad {name}"
        path.write_bytes(data)
        message = rf"{path} \({len(data)} bytes\) cannot be read: .*; expected a state dict"
        with pytest.raises(ValueError, match=message + " .*: get it again[^\n]*$"):
            CLIP.from_pretrained(path, quick_gelu=True, trust_torchscript=True)
    with pytest.raises(ValueError, match=r"\d+ bytes of tensors, its header says \d+"):
        read_safetensors(tmp_path / "bad junk.safetensors")


def test_objects_are_never_unpickled(tmp_path):
    for i, value in enumerate([nn.Linear(2, 2), {"a": Path("/")}, [1, 2], torch.zeros(2)]):
        path = tmp_path / f"{i}.pt"
        torch.save(value, path)
        message = r"expected a state dict"
        with pytest.raises(ValueError, match=message) as caught:
            CLIP.from_pretrained(path, quick_gelu=True)
        assert "`False`" not in str(caught.value) and "weights_only=False" not in str(caught.value)
    assert "weights_only=False" not in Path(clip_weights.__file__).read_text()


def test_folders(state, tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    message = (
        f"no weights at '{tmp_path}'; expected one of RN50, .* a file, or a folder with "
        "model.safetensors .*pytorch_model.bin.index.json"
    )
    with pytest.raises(FileNotFoundError, match=message):
        CLIP.from_pretrained(tmp_path)
    names = [
        "open_clip_pytorch_model.bin",
        "pytorch_model.bin",
        "open_clip_model.safetensors",
        "model.safetensors",
    ]
    for i, name in enumerate(names):  # each is preferred to the ones before
        variant = state | {"ln_final.bias": state["ln_final.bias"] + i}
        if name.endswith("bin"):
            torch.save(variant, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(safetensors_bytes(variant))
        assert equal(CLIP.from_pretrained(str(tmp_path), quick_gelu=False), variant)
    message = "no weights at 'RN51'; expected one of RN50, .*ViT-L/14@336px"
    with pytest.raises(FileNotFoundError, match=message):
        CLIP.from_pretrained("RN51")


# ------------------------------------------------------------------------------------ activation
@pytest.fixture
def tiny_folder(state, tmp_path):
    torch.save(state, tmp_path / "pytorch_model.bin")
    return tmp_path


def hugging_face(**text_config):
    return {"config.json": {"model_type": "clip", "text_config": text_config}}


def open_clip(**model_cfg):
    return {"open_clip_config.json": {"model_cfg": model_cfg}}


OTHER = {"config.json": {"model_type": "other"}}
GELU = {"hidden_act": "gelu"}
CLIP_GELU = {"model_type": "clip", "text_config": GELU, "vision_config": GELU}


@pytest.mark.parametrize(
    "configs, expected",
    [
        ({"config.json": CLIP_GELU}, nn.GELU),
        ({"config.json": {"model_type": "clip", "text_config": None}}, QuickGELU),  # its default
        (open_clip(embed_dim=96), nn.GELU),  # its default
        (open_clip(quick_gelu=True), QuickGELU),
        ({"config.json": CLIP_GELU} | open_clip(), nn.GELU),
        (OTHER | open_clip(), nn.GELU),
        ({}, r"say \[\]"),
        (OTHER, r"say \[\]"),
        ({"config.json": CLIP_GELU | {"vision_config": {}}}, r"say \['gelu', 'quick_gelu'\]"),
        ({"config.json": CLIP_GELU} | open_clip(quick_gelu=True), r"say \['gelu', 'quick_gelu'\]"),
        (hugging_face(hidden_act="relu"), r"\['quick_gelu', 'relu'\]"),
        (hugging_face(hidden_act=None), r"say \['None', 'quick_gelu'\]"),
    ],
)
def test_activation_from_the_config_beside_the_weights(tiny_folder, configs, expected):
    for name, config in configs.items():
        (tiny_folder / name).write_text(json.dumps(config))
    if isinstance(expected, str):
        message = f"(?s)activation of .*bin is unknown: .*{expected}; expected gelu or quick_gelu: "
        with pytest.raises(ValueError, match=message + "pass quick_gelu=True"):
            CLIP.from_pretrained(tiny_folder)
    else:
        assert activations(CLIP.from_pretrained(tiny_folder)) == {expected}


@pytest.mark.parametrize(
    "config, reason",
    [
        (
            {"model_type": "clip", "vision_config": {"hidden_size": 256, "num_attention_heads": 8}},
            "heads of 32 numbers in the image tower of width 256; expected 64",
        ),
        (hugging_face(hidden_size=512, num_attention_heads=4)["config.json"],
            "heads of 128 numbers in the text tower of width 512; expected 64"),
        (dict(model_cfg=dict(vision_cfg=dict(width=1280))),
            "heads of 64 numbers in the image tower of width 1280; expected 80"),
        (dict(model_cfg=dict(text_cfg=dict(width=640))),
            "heads of 80 numbers in the text tower of width 640; expected 64"),
    ],
)  # fmt: skip
def test_heads_of_another_width_are_refused(tiny_folder, config, reason):
    """Shapes do not show them: the features would be wrong in silence."""
    name = "open_clip_config.json" if "model_cfg" in config else "config.json"
    (tiny_folder / name).write_text(json.dumps(config))
    for quick_gelu in (None, True):
        with pytest.raises(ValueError, match=reason):
            CLIP.from_pretrained(tiny_folder, quick_gelu=quick_gelu)


@pytest.mark.parametrize(
    "config",
    [  # of open_clip's ViT-H-14, of Hugging Face's clip-vit-large-patch14
        dict(model_cfg=dict(vision_cfg=dict(width=1280, head_width=80, layers=32),
            text_cfg=dict(width=1024, heads=16))),
        dict(model_type="clip", text_config=dict(hidden_size=768, num_attention_heads=12),
            vision_config=dict(hidden_size=1024, num_attention_heads=16)),
    ],
)  # fmt: skip
def test_heads_of_public_models_are_taken(tiny_folder, config):
    name = "open_clip_config.json" if "model_cfg" in config else "config.json"
    (tiny_folder / name).write_text(json.dumps(config))
    CLIP.from_pretrained(tiny_folder)


@pytest.mark.parametrize(
    "text, reason",
    [("<html>", ".*char 0."), ("[1]", ".*no attribute.*"), ("3", ".*not iterable.*")],
)
def test_damaged_config(tiny_folder, text, reason):
    (tiny_folder / "config.json").write_text(text)
    message = rf"config.json is no config of a model \({reason}\); get it again"
    with pytest.raises(ValueError, match=message):
        CLIP.from_pretrained(tiny_folder)
    CLIP.from_pretrained(tiny_folder, quick_gelu=True)  # which needs none


# -------------------------------------------------------------------------------------- download
DATA = POOL.tobytes()[:3_000_000]
SHA256 = hashlib.sha256(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.data in the way that server.mode says, and counts the requests."""

    def do_GET(self):
        mode, data = self.server.mode, self.server.data
        self.server.requests += 1
        if mode == "404":
            return self.send_error(404)
        if mode == "garbage":
            return self.wfile.write(b"what?\r\n\r\n")
        self.send_response(200)
        if mode != "no length":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: 1_000_000 if mode == "cut" else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.mode, server.data, server.requests = "whole", DATA, 0
        server.url = f"http://127.0.0.1:{server.server_port}/some/model.pt"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("mode", ["whole", "no length"])
def test_download_once(server, tmp_path, mode):
    server.mode, folder = mode, tmp_path / "new" / "folder"
    path = download(server.url, SHA256, folder)
    assert path == folder / "model.pt" and path.read_bytes() == DATA
    assert download(server.url, SHA256, folder) == path and server.requests == 1
    assert [*folder.iterdir()] == [path]


def test_download_goes_to_the_home_folder(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download(server.url, SHA256) == tmp_path / ".cache" / "clip" / "model.pt"
    assert download(server.url, SHA256, "~/other") == tmp_path / "other" / "model.pt"


def test_a_broken_download_leaves_nothing_and_can_be_repeated(server, tmp_path):
    server.mode = "cut"
    got = hashlib.sha256(DATA[:1_000_000]).hexdigest()
    message = f"{server.url} is cut short .*{SHA256}.*{got}.*; run again, or choose another"
    with pytest.raises(ValueError, match=message):
        download(server.url, SHA256, tmp_path)
    assert [*tmp_path.iterdir()] == []
    server.mode = "whole"
    assert download(server.url, SHA256, tmp_path).read_bytes() == DATA


def test_wrong_file(server, tmp_path):
    server.data = b"<html>log in first</html>"
    got = hashlib.sha256(server.data).hexdigest()
    message = f"{server.url} is .*another file: .*{SHA256}.*{got}.*; run again"
    with pytest.raises(ValueError, match=message):
        download(server.url, SHA256, tmp_path)
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "model.pt").write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"model.pt has sha256 .*, expected {SHA256}; delete it"):
        download(server.url, SHA256, tmp_path)
    assert (tmp_path / "model.pt").read_bytes() == b"mine"  # not ours to delete


@pytest.mark.parametrize(
    "mode, reason", [("404", "HTTPError 404"), ("garbage", "BadStatusLine|RemoteDisconnected")]
)
def test_server_without_the_file(server, tmp_path, mode, reason):
    server.mode = mode
    message = f"cannot download {server.url} to {tmp_path}/model.pt: .*({reason})"
    with pytest.raises(ConnectionError, match=message):
        download(server.url, SHA256, tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/ViT.pt"
        monkeypatch.setitem(MODELS, "ViT", (url, SHA256))
        message = (
            rf"(?s)cannot download {url} to {tmp_path}/ViT.pt: .*refused.*choose another "
            rf"cache_dir, or put the file \(sha256 {SHA256}\) there yourself"
        )
        with pytest.raises(ConnectionError, match=message):
            CLIP.from_pretrained("ViT", cache_dir=tmp_path)


def test_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    message = "(?s)(NotADirectory|FileExists)Error.*choose another cache_dir"
    with pytest.raises(ConnectionError, match=message):
        download(server.url, SHA256, tmp_path / "file" / "folder")
    assert server.requests == 0


def test_several_at_once_do_not_disturb_each_other(server, tmp_path):
    contents = []
    threads = [
        threading.Thread(
            target=lambda: contents.append(download(server.url, SHA256, tmp_path).read_bytes())
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == [DATA] * 3 and [*tmp_path.iterdir()] == [tmp_path / "model.pt"]


def test_progress_on_a_terminal_only(server, tmp_path, capsys, monkeypatch):
    download(server.url, SHA256, tmp_path / "a")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    download(server.url, SHA256, tmp_path / "b")
    out, err = capsys.readouterr()
    assert out == "" and re.search("100(\\.0)?%", err)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_from_pretrained_by_name(server, archive, tmp_path, monkeypatch):
    path, half = archive
    server.data = path.read_bytes()
    monkeypatch.setitem(MODELS, "tiny", (server.url, hashlib.sha256(server.data).hexdigest()))
    for _ in range(2):
        assert equal(CLIP.from_pretrained("tiny", cache_dir=tmp_path), half)
    assert server.requests == 1
