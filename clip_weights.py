"""CLIP's public weights: download by name, every file format and key layout -> a state dict.

    state_dict, quick_gelu = load_weights("RN50")   # or a file, a folder, hf:ORG/NAME
    state_dict = to_openai_layout(state_dict)       # from open_clip's or Hugging Face's names
    content = load_file("runs/NAME/best.pt", "a checkpoint")   # any other file of torch.save

Differs from OpenAI's loader (openai/CLIP@d05afc4 clip/clip.py): files are opened with
`weights_only=True`, and a TorchScript archive, which can run code, only if its sha256 is in MODELS
or the caller trusts it.

Copy together with: nothing; needs torch>=2.4, numpy.
Read in this order: MODELS, load_weights, key layouts, files, download.
"""

import hashlib
import http.client
import json
import mmap
import re
import sys
import warnings
import zipfile
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
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
# Heads are 64 wide, except in open_clip's ViT-H, ViT-g, ViT-bigG and ViT-e; shapes cannot tell.
_VISION_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
StateDict = dict[str, Tensor]


def load_weights(
    name_or_path: str | PathLike,
    cache_dir: str | PathLike | None = None,
    quick_gelu: bool | None = None,
    trust_torchscript: bool = False,
) -> tuple[StateDict, bool]:
    """-> state dict with OpenAI's names, and whether the activation is QuickGELU.

    Arguments and errors: those of `CLIP.from_pretrained`.
    """
    is_public = name_or_path in MODELS
    if is_public:
        path = download(*MODELS[name_or_path], cache_dir)
    else:
        path = _find_weights(name_or_path)
    content = _read_weights(path, is_public or trust_torchscript)
    state_dict = to_openai_layout(content, str(path))
    if "input_resolution" in content:  # OpenAI's
        return state_dict, quick_gelu is not False
    activations = _read_configs(path, must_parse=quick_gelu is None)
    if quick_gelu is None and activations not in ({"quick_gelu"}, {"gelu"}):
        raise ValueError(
            f"the activation of {path} is unknown: config files beside it say "
            f"{sorted(map(str, activations))}; expected gelu or quick_gelu: pass quick_gelu=True "
            "(OpenAI, MetaCLIP) or quick_gelu=False (LAION, DataComp)"
        )
    elif quick_gelu is None:
        quick_gelu = activations == {"quick_gelu"}
    return state_dict, quick_gelu


def head_width(width: int) -> int:
    """Numbers per attention head of an image tower of this width, in all public CLIPs."""
    return _VISION_HEAD_WIDTHS.get(width, 64)


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
# Of training checkpoints; the first that is there is read
_WRAPPERS = "state_dict model_state_dict model net module params model_ema ema".split()
# Of DataParallel, torch.compile, Lightning and other packages' modules around a CLIP
_PREFIXES = re.compile(r"((module|_orig_mod|model|clip|clip_model|net|backbone)\.)*")
_OTHER_MODELS = {  # part of a name -> whose it is
    "logit_bias": "SigLIP",
    "vision_model.head.": "SigLIP",
    "text_decoder.": "CoCa",
    "visual.trunk.": "a model with an image tower of timm (SigLIP, EVA, ConvNeXt)",
    "visual.blocks.": "EVA-CLIP",
    "text.transformer.enc": "a model with a text tower of Hugging Face's",
}


def unwrap(state_dict: dict, origin: str, quiet: bool = False) -> dict:
    """A state dict without what training put around it: {"state_dict": ...}, "module." and such.

    One line on stderr says what was taken off, unless `quiet`. Raises ValueError if two names
    become one.
    """
    removed = []
    while wrapper := next((key for key in _WRAPPERS if isinstance(state_dict.get(key), dict)), ""):
        state_dict = state_dict[wrapper]
        removed.append(f"the wrapper {wrapper!r}")
    out, prefixes = {}, set()
    for key, value in state_dict.items():
        prefix = _PREFIXES.match(str(key))[0]
        name = str(key).removeprefix(prefix)
        if name in out:
            raise ValueError(
                f"{origin}: several entries are named {name} without their prefixes "
                f"({', '.join(sorted(prefixes | {prefix}))}); save the one model alone"
            )
        out[name] = value
        prefixes.add(prefix)
    removed += [f"the prefix {prefix!r}" for prefix in sorted(prefixes - {""})]
    if removed and not quiet:
        print(f"{origin}: without {', '.join(removed)}", file=sys.stderr)
    return out


def to_openai_layout(state_dict: StateDict, origin: str = "state dict") -> StateDict:
    """A state dict in any of the three layouts, wrapped or not -> one with OpenAI's names.

    origin: where it is from, for messages. Raises ValueError for other models by their names.
    """
    if not isinstance(state_dict, dict):
        got = type(state_dict).__name__
        raise ValueError(f"got a {got}; expected a dict, as model.state_dict() returns")
    state = unwrap(state_dict, origin)
    for part, name in _OTHER_MODELS.items():
        if key := next((key for key in state if part in key), ""):
            raise ValueError(f"{origin} is {name}, with {key}; expected CLIP: choose other weights")
    state = {key.removeprefix("text."): value for key, value in state.items()}  # CustomTextCLIP
    towers = dict(image=("visual.", "vision_model."), text=("transformer.", "text_model."))
    present = [tower for tower, names in towers.items() if any(k.startswith(names) for k in state)]
    if len(present) == 1:
        raise ValueError(
            f"{origin} holds the {present[0]} tower only; expected both of CLIP's: choose other "
            "weights"
        )
    for extra in ("input_resolution", "context_length", "vocab_size", "attn_mask"):
        state.pop(extra, None)  # OpenAI's TorchScript archives carry these beside the parameters
    state = _without_numpy(state)
    if key := next((key for key, value in state.items() if not torch.is_tensor(value)), None):
        raise ValueError(f"{origin}: {key} is a {type(state[key]).__name__}; expected a tensor")
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
def load_file(
    path: str | PathLike, expected: str, lazy: bool = False, trust_torchscript: bool = False
) -> Any:
    """What torch.save wrote: tensors, numbers, texts and containers of them, on the CPU; or the
    state dict in a safetensors file, or in a TorchScript archive, if that is trusted.

    numpy's arrays become tensors, its numbers Python's. lazy: leave tensors on the disk until they
    are read. Raises FileNotFoundError, and ValueError for other files: damaged ones, other Python
    objects. `expected` says in these messages what the file should be.
    """
    path = Path(path)
    if not path.is_file():
        got = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {got}; expected {expected}")
    try:
        if path.suffix.lower() == ".safetensors":
            return read_safetensors(path)
        is_zip = zipfile.is_zipfile(path)
        if _is_torchscript(path):
            if trust_torchscript:
                return dict(torch.jit.load(path, map_location="cpu").state_dict())
            reason = "it is a TorchScript archive, which can run code"
        elif is_zip and (member := zipfile.ZipFile(path).testzip()):  # torch.load has no such test
            reason = f"it is damaged, the checksum of {member} is wrong"
        else:
            with warnings.catch_warnings(), _allow_numpy():
                warnings.simplefilter("ignore")  # torch's, about the pickle protocol
                content = torch.load(path, "cpu", mmap=lazy and is_zip, weights_only=True)
            return _without_numpy(content)
    except Exception as error:  # zip, pickle, JSON and torch each have errors of their own
        reason = _load_error(error)
    size = path.stat().st_size
    raise ValueError(f"{path} ({size} bytes) cannot be read: {reason}; expected {expected}")


def _is_torchscript(path):
    try:
        return any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist())
    except Exception:  # no zip archive, or a damaged one
        return False


def _load_error(error):
    """One line, without torch's advice to trust the file."""
    text = str(error)
    if match := re.search(r"(?:GLOBAL |but got <class ')([\w.]+)", text):
        return (
            f"it holds Python objects ({match[1]}), which can run code: save the state_dict() alone"
        )
    is_plain = type(error) in (PermissionError, ValueError)  # not of JSON, of Unicode
    if is_plain and not re.search("weights_only|mmap", text):
        return " ".join(text.split())[:300]
    return "it is damaged or of another format"


def _allow_numpy():
    """A context in which torch.load reads arrays and scalars of numpy, but not those of objects."""
    if torch.__version__ < (2, 6):  # knows no second names
        return nullcontext()
    new = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    functions = [
        (getattr(new, name), f"numpy.{module}.multiarray.{name}")
        for name in ("_reconstruct", "scalar")
        for module in ("core", "_core")  # of numpy 1 and 2
    ]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdU"]
    return torch.serialization.safe_globals([np.ndarray, np.dtype, *functions, *dtypes])


def _without_numpy(value):
    """Arrays as tensors, scalars as Python's, also within dicts, lists and tuples."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist() if value.dtype.kind == "U" else torch.from_numpy(value)
    if isinstance(value, dict):
        return {_without_numpy(key): _without_numpy(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_numpy, value))
    return value


def check_finite(state_dict: StateDict, origin: str) -> None:
    """Raises ValueError that names the first tensor with nan or inf."""
    for key, value in state_dict.items():
        if value.is_floating_point() and not (finite := value.isfinite()).all():
            bad = int((~finite).sum())
            raise ValueError(
                f"{origin}: {key} holds nan or inf in {bad} of {value.numel()} values; expected "
                "finite numbers: training diverged or the file is damaged, take another one"
            )


_EXPECTED = "a state dict of tensors, also as safetensors or TorchScript"
_CONFIGS = ("config.json", "open_clip_config.json")  # of Hugging Face and open_clip


def _find_weights(path):
    """The file with the weights, or the index of its parts, at a path or of hf:ORG/NAME."""
    prefixes, files = ("", "open_clip_"), ("model.safetensors", "pytorch_model.bin")
    names = [prefix + file for file in files for prefix in prefixes]
    names += [file + ".index.json" for file in files]
    if str(path).startswith("hf:"):
        path = _download_from_hugging_face(str(path)[3:])
    path = Path(path).expanduser()
    for file in (path, *(path / name for name in names)):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"no weights at {str(path)!r}; expected one of {', '.join(MODELS)}, hf:ORG/NAME, a file, "
        f"or a folder with {' or '.join(names)}"
    )


def _download_from_hugging_face(name):
    """The folder of a repository's weights and configs, in huggingface_hub's cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"hf:{name} needs huggingface_hub: pip install huggingface_hub, or download the "
            "repository and give its folder"
        ) from error
    try:
        for ending in ("safetensors", "bin"):  # most have both; the first is preferred
            patterns = [f"*model*.{ending}", f"*model*.{ending}.index.json", *_CONFIGS]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
            if any(folder.glob(patterns[0])):
                break
        return folder
    except Exception as error:  # of the network, of the hub, of the name
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"cannot download hf:{name}: {type(error).__name__} {reason:.200}; check the name and "
            "the network, or download the repository and give its folder"
        ) from error


def _read_weights(path, trusted):
    """-> the state dict in a file of any format, or in the parts that an index names beside it."""
    if path.name.endswith(".index.json"):
        try:
            names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
            parts = [path.with_name(Path(name).name) for name in names]
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is no index of weights in parts; get it again") from error
        if missing := [part.name for part in parts if not part.is_file()]:
            names = ", ".join(missing)
            raise FileNotFoundError(f"{path} names {names}, not there; get all its files")
        return {key: v for part in parts for key, v in _read_weights(part, trusted).items()}
    if not trusted and _is_torchscript(path):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        trusted = sha256 in {sha256 for _, sha256 in MODELS.values()}
        if not trusted:
            raise ValueError(
                f"{path} is a TorchScript archive, which can run code, and its sha256, {sha256}, "
                "is not in MODELS; expected a state dict; pass trust_torchscript=True if you trust "
                "where it came from"
            )
    content = load_file(path, f"{_EXPECTED}: get it again", lazy=True, trust_torchscript=trusted)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected {_EXPECTED}")
    return content


_SAFETENSORS_DTYPES = dict(
    F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
    I64=torch.int64, I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8,
    BOOL=torch.bool,
)  # fmt: skip


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


def _read_configs(path, must_parse):
    """The activations in the config files beside the weights, Hugging Face's or open_clip's.

    ValueError for heads of another width than the model would have: shapes do not show it.
    """
    activations = set()
    for file in filter(Path.is_file, map(path.with_name, _CONFIGS)):
        widths = []  # (width, its heads' width) of the text and image tower
        try:
            config = json.loads(file.read_bytes())
            if "model_cfg" in config:
                config = config["model_cfg"]
                text, vision = config.get("text_cfg") or {}, config.get("vision_cfg") or {}
                activations.add("quick_gelu" if config.get("quick_gelu") else "gelu")
                width = text.get("width", 512)
                widths = [(width, width / text.get("heads", 8))]
                widths += [(vision.get("width", 768), vision.get("head_width", 64))]
            elif config.get("model_type") == "clip":  # whose default is quick_gelu
                towers = (config.get("text_config") or {}, config.get("vision_config") or {})
                activations.update(tower.get("hidden_act", "quick_gelu") for tower in towers)
                for tower, width, heads in zip(towers, (512, 768), (8, 12)):  # its defaults
                    width = tower.get("hidden_size", width)
                    widths += [(width, width / tower.get("num_attention_heads", heads))]
        except (ValueError, AttributeError, TypeError, ArithmeticError) as error:
            if not must_parse:
                continue
            raise ValueError(f"{file} is no config of a model ({error}); get it again") from error
        for name, (width, got), expected in zip(("text", "image"), widths, (64, None)):
            if got != (expected := expected or head_width(width)):
                raise ValueError(
                    f"{file}: heads of {got:g} numbers in the {name} tower of width {width}; "
                    f"expected {expected}, as all public CLIPs have: choose other weights"
                )
    return activations


# -------------------------------------------------------------------------------------- download
def download(url: str, sha256: str, cache_dir: str | PathLike | None = None) -> Path:
    """The file behind `url`, checked against its sha256; from `cache_dir` if it is there already.

    torch.hub writes to a temporary name and renames the complete file if its sha256 is right.
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
            f"cannot download {url} to {path}: {error!r}; run again, {manual}"
        ) from error
    except RuntimeError as error:  # torch.hub's, of the sha256
        raise ValueError(
            f"{url} is cut short or another file: {error}; run again, or {manual}"
        ) from error
    return path
