"""Exported models as files: image encoder and rank prototypes, or the prototypes alone.

    model, rank_names, rank_values, preprocess = load_model("runs/NAME/exported.pt")

    saved = load_prototypes("ranks.pt")
    model = OrdinalCLIP(encoder, FixedPrototypes(saved["prototypes"]), saved["logit_scale"])

Every entry is checked when it is read. Letters: R ranks, D joint dim.
Copy together with: ordinalclip.py, kernels/, clip_weights.py; clip_model.py or
backbones.py for the image encoder; data/ to save prototypes.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_weights import check_finite, load_file
from ordinalclip import FixedPrototypes, OrdinalCLIP, Regression

FORMAT, PROTOTYPES_FORMAT = "ordinalclip-1", "ordinalclip-prototypes-1"
EXPORTED = dict(  # the entries of an exported file, and what each must be
    image_encoder="a text",
    quick_gelu="True or False",
    state_dict="tensors by name",
    rank_names="a list of texts",
    rank_values="a list of finite numbers",
    preprocess="image_size (an integer), mean and std (3 numbers each), perhaps squash, resample, "
    "draft",
)
PROTOTYPES = dict(
    prototypes="a tensor",
    rank_names="a list of texts",
    rank_values="a list of finite numbers",
    logit_scale="a finite number",
)
Exported = tuple[OrdinalCLIP | Regression, list[str], list[float], dict[str, Any]]


def load_model(path: str | Path) -> Exported:
    """-> model (float32, on the CPU), rank names [R], rank values [R], preprocessing of an export.

    Raises FileNotFoundError if there is no such file, ValueError for any other, damaged or
    incomplete file and for nan and inf, ImportError if the image encoder is timm's or torchvision's
    and that package is not installed.
    """
    content = _load_file(path, FORMAT, EXPORTED, "the exported.pt that train.py writes")
    name, _, state, names, values, preprocess = (content[key] for key in EXPORTED)
    is_regression = "head.weight" in state
    matrix = state.get("head.weight" if is_regression else "prototypes.prototypes")
    matrix = torch.empty(0, 0) if matrix is None else matrix  # (R, D), or (1, D) of regression
    if not is_regression or len(names) != len(values):
        _check_sizes(matrix, names, values, f"{path}: ")
    try:
        encoder = _build_image_encoder(content, matrix.shape[1])
        if is_regression:
            model = Regression(encoder, matrix.shape[1], len(names), "l1")
        else:
            model = OrdinalCLIP(encoder, FixedPrototypes(matrix), 0.0)
        for key, value in model.state_dict().items():
            if key in state and state[key].is_floating_point() != value.is_floating_point():
                raise TypeError(f"{key} is {state[key].dtype}, not {value.dtype}")
        model.load_state_dict(state, assign=True)  # the encoder may be on the meta device
    except (LookupError, AttributeError, ArithmeticError, TypeError, ValueError, RuntimeError) as e:
        reason = f"{type(e).__name__} {' '.join(str(e).split())}"
        raise ValueError(
            f"{path} holds no whole image encoder {name!r} ({reason:.300}); export the run again"
        ) from e
    return model.float(), names, values, preprocess


def save_prototypes(
    path: str | Path,
    prototypes: Tensor,
    rank_names: Sequence[str],
    logit_scale: float | Tensor,
    rank_values: Sequence[float] | None = None,
) -> None:
    """Save only the rank prototypes (R, D), to use with an image encoder you already have.

    They fit the encoder they were trained with: the public CLIP only if that was frozen.
    logit_scale is a log, as in CLIP; rank_values: by default 0 .. R-1. Raises ValueError for
    sizes that differ, nan and inf.
    """
    import data

    values = range(len(rank_names)) if rank_values is None else rank_values
    _check_sizes(prototypes, rank_names, values, "")
    check_finite(dict(prototypes=prototypes), "save_prototypes")
    prototypes = prototypes.detach().float().cpu().clone()
    row = (prototypes, list(rank_names), [float(value) for value in values], float(logit_scale))
    content = dict(zip(PROTOTYPES, row), format=PROTOTYPES_FORMAT)
    data.atomic_write(Path(path), partial(torch.save, content))


def load_prototypes(path: str | Path) -> dict[str, Any]:
    """The dict(prototypes (R, D), rank_names, rank_values, logit_scale) of save_prototypes.

    Raises FileNotFoundError if there is no such file, ValueError for any other file.
    """
    content = _load_file(path, PROTOTYPES_FORMAT, PROTOTYPES, "what save_prototypes writes")
    prototypes, names, values, _ = (content[key] for key in PROTOTYPES)
    _check_sizes(prototypes, names, values, f"{path}: ")
    return {key: content[key] for key in PROTOTYPES}


def _load_file(path, expected_format, entries, expected):
    """The dict that torch.save wrote to a file of that format, with entries as `entries` says."""
    content = load_file(path, expected)
    content = content if isinstance(content, dict) else {}
    if content.get("format") != expected_format:
        got = ", ".join(map(str, list(content)[:9])) or "no entries"
        got = " ".join(f"format {content.get('format')!r} with {got}".split())
        raise ValueError(f"{path} is another file: got {got:.200}; expected {expected}")
    if missing := [key for key in entries if key not in content]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: export the run again")
    for key, what in entries.items():
        content[key] = _without_arrays(key, content[key])
        if not IS_RIGHT[what.split(" (")[0]](content[key]):
            got = f"{type(content[key]).__name__} {' '.join(repr(content[key]).split()):.60}"
            raise ValueError(f"{path}: {key} is the {got}; expected {what}: export the run again")
    tensors = {key: value for key, value in content.items() if torch.is_tensor(value)}
    check_finite(content.get("state_dict", tensors), str(path))
    return content


def _without_arrays(key, value):
    """numpy's arrays, which load_file makes tensors, as lists where lists belong."""
    if key == "preprocess" and isinstance(value, dict):
        return {name: _without_arrays(name, entry) for name, entry in value.items()}
    is_array = torch.is_tensor(value) and key in ("rank_values", "mean", "std")
    return value.tolist() if is_array else value


def _is_list(types, value):
    return isinstance(value, (list, tuple)) and all(type(entry) in types for entry in value)


def _are_numbers(value, low=-math.inf):
    return _is_list((int, float), value) and all(low < number < math.inf for number in value)


def _are_tensors(value):
    return isinstance(value, dict) and all(
        type(key) is str and torch.is_tensor(tensor) and not tensor.is_complex()
        for key, tensor in value.items()
    )


def _is_preprocess(value):
    if not isinstance(value, dict):
        return False
    size, mean, std = (value.get(key) for key in ("image_size", "mean", "std"))
    is_right = type(size) is int and 0 < size < 10_000 and _are_numbers(mean)
    is_right = is_right and _are_numbers(std, 0) and len(mean) == len(std) == 3
    is_filter = value.get("resample", "bicubic") in ("bicubic", "bilinear")
    are_bool = all(type(value.get(key, False)) is bool for key in ("squash", "draft"))
    return is_right and is_filter and are_bool


IS_RIGHT = {  # what an entry must be, in words and in code
    "a text": lambda value: isinstance(value, str),
    "True or False": lambda value: isinstance(value, bool),
    "a tensor": torch.is_tensor,
    "tensors by name": _are_tensors,
    "a list of texts": partial(_is_list, (str,)),
    "a list of finite numbers": _are_numbers,
    "a finite number": lambda value: _are_numbers([value]),
    "image_size": _is_preprocess,
}


def _check_sizes(prototypes, names, values, where):
    if prototypes.dim() != 2 or not len(prototypes) == len(names) == len(values) > 0:
        got = f"{tuple(prototypes.shape)}, {len(names)} rank_names, {len(values)} rank_values"
        raise ValueError(f"{where}got prototypes {got}; expected (R, D), R and R")


def _build_image_encoder(content, dim):
    """Build the image encoder without loading its weights, if possible on the meta device."""
    name = content["image_encoder"]
    if name != "clip":
        from backbones import build_image_encoder

        with torch.device("cpu" if ":" in name else "meta"):  # timm has values outside the state
            return build_image_encoder(name, dim)
    from clip_model import image_tower

    with torch.device("meta"):  # no time spent on initial values
        return image_tower(content["state_dict"], dim, content["quick_gelu"], "image_encoder.")
