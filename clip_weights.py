"""CLIP's public weights: download by name, every file format and key layout -> a state dict.

    state_dict, quick_gelu = load_weights("RN50")   # or a file or folder
    state_dict = to_openai_layout(state_dict)       # from open_clip's or Hugging Face's names

Differs from OpenAI's loader (openai/CLIP@d05afc4 clip/clip.py): files are opened with
`weights_only=True`, and a TorchScript archive, which can run code, only if its sha256 is in MODELS
or the caller trusts it.

Copy together with: nothing; needs torch>=2.4.
Read in this order: MODELS, load_weights, key layouts, files, download.
"""

import hashlib
import http.client
import json
import mmap
import re
import sys
import zipfile
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

_SHA256 = {  # as in OpenAI's own list of URLs
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
_URL = "https://openaipublic.azureedge.net/clip/models/{}/{}.pt"
MODELS: dict[str, tuple[str, str]] = {  # name -> url, sha256
    name: (_URL.format(sha256, re.sub("[/@]", "-", name)), sha256)
    for name, sha256 in _SHA256.items()
}
StateDict = dict[str, Tensor]


def load_weights(
    name_or_path: str | PathLike,
    cache_dir: str | PathLike | None = None,
    quick_gelu: bool | None = None,
    trust_torchscript: bool = False,
) -> tuple[StateDict, bool]:
    """-> state dict in any of the three key layouts, and whether the activation is QuickGELU.

    Arguments and errors: those of `CLIP.from_pretrained`.
    """
    is_public = name_or_path in MODELS
    if is_public:
        path = download(*MODELS[name_or_path], cache_dir)
    else:
        path = _find_weights(name_or_path)
    state_dict = _read_weights(path, trusted=is_public or trust_torchscript)
    if quick_gelu is None:
        is_openai = is_public or "input_resolution" in state_dict
        quick_gelu = is_openai or _quick_gelu_from_config(path)
    return state_dict, quick_gelu


# ----------------------------------------------------------------------------------- key layouts
_HUGGING_FACE_NAMES = {  # part of a name -> part of OpenAI's, applied in order
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.": "visual.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.embeddings.": "",
    "text_model.final_layer_norm.": "ln_final.",
    "position_embedding.weight": "positional_embedding",
    ".self_attn.": ".attn.",
    ".layer_norm": ".ln_",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def to_openai_layout(state_dict: StateDict) -> StateDict:
    """A state dict in any of the three layouts, wrapped or not -> one with OpenAI's names."""
    if not isinstance(state_dict, dict):
        got = type(state_dict).__name__
        raise ValueError(f"got a {got}; expected a dict, as model.state_dict() returns")
    for wrapper in ("state_dict", "model"):  # training checkpoints of open_clip and others
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
    # The prefixes are those of DataParallel, torch.compile and open_clip's CustomTextCLIP.
    prefixes = re.compile(r"^((module|_orig_mod)\.)*(text\.)?")
    state = {prefixes.sub("", str(key)): value for key, value in state_dict.items()}
    for extra in ("input_resolution", "context_length", "vocab_size", "attn_mask"):
        state.pop(extra, None)  # OpenAI's TorchScript archives carry these beside the parameters
    if not any(key.startswith(("text_model.", "vision_model.")) for key in state):
        return state
    out = {}
    for key, value in state.items():
        for hf_name, openai_name in _HUGGING_FACE_NAMES.items():
            key = key.replace(hf_name, openai_name)
        if not key.endswith("position_ids"):  # a constant that older versions stored
            out[key] = value.T if key in ("visual.proj", "text_projection") else value
    for query in [key for key in out if ".attn.q_proj." in key]:
        parts = [query.replace("q_proj", name) for name in ("q_proj", "k_proj", "v_proj")]
        if all(part in out for part in parts):
            out[query.replace("q_proj.", "in_proj_")] = torch.cat([out.pop(part) for part in parts])
    return out


# ----------------------------------------------------------------------------------------- files
def _find_weights(path):
    prefixes, files = ("", "open_clip_"), ("model.safetensors", "pytorch_model.bin")
    names = [prefix + file for file in files for prefix in prefixes]
    path = Path(path).expanduser()
    for file in (path, *(path / name for name in names)):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"no weights at {str(path)!r}; expected one of {', '.join(MODELS)}, or a file, or "
        f"a folder with {' or '.join(names)} (weights in parts must be merged)"
    )


def _read_weights(path, trusted):
    """-> the state dict in a file of any format."""
    try:
        if path.suffix.lower() == ".safetensors":
            return read_safetensors(path)
        is_zip = zipfile.is_zipfile(path)
        names = zipfile.ZipFile(path).namelist() if is_zip else []
        if not any(name.endswith("/constants.pkl") for name in names):  # not TorchScript
            return dict(torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True))
        public = {sha256 for _, sha256 in MODELS.values()}
        if trusted or (sha256 := hashlib.sha256(path.read_bytes()).hexdigest()) in public:
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
    except Exception as error:  # JSON, zip, pickle and torch each have errors of their own
        # without torch's advice to trust the file
        reason = str(error).split("WeightsUnpickler error:")[-1].strip()
        raise ValueError(
            f"cannot read {path} ({path.stat().st_size} bytes): {type(error).__name__} "
            f"{reason:.300}; expected a state dict of tensors, also as safetensors or TorchScript. "
            "If it is damaged, get it again; if it holds other objects, load it where it was made "
            "and save its state_dict() alone"
        ) from error
    raise ValueError(
        f"{path} is a TorchScript archive, which can run code, and its sha256, {sha256}, is not in "
        "MODELS; expected a state dict; pass trust_torchscript=True if you trust where it came from"
    )


# fmt: off
_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}
# fmt: on


def read_safetensors(path: str | PathLike) -> StateDict:
    """The state dict in a safetensors file, as views of the memory-mapped file, not copied.

    Format: 8 bytes of header length, JSON header, raw tensors. Raises ValueError or KeyError for a
    damaged file.
    """
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(data[:8], "little")
    header, data = json.loads(data[8:start]), torch.frombuffer(data, dtype=torch.uint8)
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        raw, dtype = data[begin:end], _SAFETENSORS_DTYPES[entry["dtype"]]
        raw = raw.clone() if begin % dtype.itemsize else raw  # aligned
        tensors[name] = raw.view(dtype).reshape(entry["shape"])
    if (size := sum(value.nbytes for value in tensors.values())) != len(data) - start:
        raise ValueError(f"{len(data) - start} bytes of tensors, its header says {size}")
    return tensors


def _quick_gelu_from_config(path):
    """Whether the config files beside the weights, Hugging Face's or open_clip's, say QuickGELU."""
    activations = set()
    for file in (path.with_name("config.json"), path.with_name("open_clip_config.json")):
        try:
            config = json.loads(file.read_bytes()) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(
                f"{file} is no JSON ({error}); expected a model's config: get it again"
            ) from error
        if "model_cfg" in config:
            activations.add("quick_gelu" if config["model_cfg"].get("quick_gelu") else "gelu")
        elif config.get("model_type") == "clip":  # whose default is quick_gelu
            towers = (config.get("text_config") or {}, config.get("vision_config") or {})
            activations.update(tower.get("hidden_act", "quick_gelu") for tower in towers)
    if activations not in ({"quick_gelu"}, {"gelu"}):
        raise ValueError(
            f"the activation of {path} is unknown: config files beside it say "
            f"{sorted(map(str, activations))}; expected gelu or quick_gelu: pass quick_gelu=True "
            "(OpenAI, MetaCLIP) or False (LAION, DataComp)"
        )
    return activations == {"quick_gelu"}


# -------------------------------------------------------------------------------------- download
def download(url: str, sha256: str, cache_dir: str | PathLike | None = None) -> Path:
    """The file behind `url`, checked against its sha256; from `cache_dir` if it is there already.

    torch.hub writes to a temporary name and renames the file when it is whole and its sha256 right.
    Progress goes to stderr if that is a terminal. Raises ConnectionError where the download fails
    and ValueError for a wrong sha256.
    """
    path = Path(cache_dir or "~/.cache/clip").expanduser() / url.rsplit("/", 1)[1]
    manual = f"choose another cache_dir, or put the file (sha256 {sha256}) there yourself"
    if path.is_file():
        if (got := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
            raise ValueError(f"{path} has sha256 {got}, expected {sha256}; delete it and run again")
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), sha256, progress=sys.stderr.isatty())
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        raise ConnectionError(
            f"cannot download {url} to {path}: {error!r}\nRun again, {manual}"
        ) from error
    except RuntimeError as error:  # torch.hub's, of the sha256
        raise ValueError(
            f"{url} is cut short or another file: {error}; run again, or {manual}"
        ) from error
    return path
