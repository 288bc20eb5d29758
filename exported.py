"""Exported models as files: image encoder and rank prototypes, or the prototypes alone.

    save_model("mine.pt", model, "clip", rank_names, rank_values, preprocess)  # as train.py does
    model, rank_names, rank_values, preprocess = load_model("mine.pt")

    saved = load_prototypes("ranks.pt")
    model = OrdinalCLIP(encoder, FixedPrototypes(saved["prototypes"]), saved["logit_scale"])

Every entry is checked when it is read. Dims: R ranks, D joint dim.
Copy together with: ordinalclip.py, kernels/, clip_weights.py; clip_model.py or
backbones.py for the image encoder; data/ to save.
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

MODEL_FORMAT, PROTOTYPES_FORMAT = "ordinalclip-1", "ordinalclip-prototypes-1"


def save_model(
    path: str | Path,
    model: OrdinalCLIP | Regression,
    image_encoder: str,
    rank_names: Sequence[str],
    rank_values: Sequence[float],
    preprocess: dict[str, Any],
    results: dict[str, Any] | None = None,
) -> None:
    """Write what load_model and predict.py read: image encoder and prototypes, no text tower.

    image_encoder: "clip" for CLIP's own tower, or its name in `backbones.build_image_encoder`.
    rank_values [R]: what a rank is worth, such as an age. preprocess: image_size, mean and std of
    the encoder's images; perhaps squash, resample, draft of `data.ImageList`. results: kept as they
    are. Raises ValueError for entries of another form, sizes that differ, nan and inf.
    """
    import data

    exported = model.export(copy=False)
    modules = exported.image_encoder.modules()
    content = dict(
        format=MODEL_FORMAT,
        image_encoder=image_encoder,
        quick_gelu=any(type(module).__name__ == "QuickGELU" for module in modules),
        state_dict=exported.state_dict(),
        rank_names=list(rank_names),
        rank_values=[float(value) for value in rank_values],
        preprocess=dict(preprocess),
        results=results,
    )
    _check_content(content, EXPORTED, str(path), "give it")
    is_regression = isinstance(exported, Regression)
    per_rank = torch.empty(exported.num_ranks, 0) if is_regression else exported.prototypes()
    _check_sizes(per_rank, rank_names, rank_values, "")
    data.atomic_write(Path(path), partial(torch.save, content))


def load_model(path: str | Path) -> tuple[OrdinalCLIP | Regression, list[str], list[float], dict]:
    """-> model (float32, on the CPU), rank names [R], rank values [R], preprocessing of an export.

    Raises FileNotFoundError if there is no such file, ValueError for any other, damaged or
    incomplete file and for nan and inf, ImportError if the image encoder is timm's or torchvision's
    and that package is not installed.
    """
    content = _load_checked(path, MODEL_FORMAT, EXPORTED, "the exported.pt that train.py writes")
    name, quick_gelu, state, names, values, preprocess = (content[key] for key in EXPORTED)
    is_regression = "head.weight" in state
    empty = torch.empty(0, 0)
    matrix = state.get("head.weight" if is_regression else "prototypes.prototypes", empty)
    if not is_regression or len(names) != len(values):  # the head is (1, D)
        _check_sizes(matrix, names, values, f"{path}: ")
    try:
        encoder = _build_image_encoder(name, matrix.shape[1], state, quick_gelu)
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
            f"{path} holds no complete image encoder {name!r} ({reason:.300}); export the run again"
        ) from e
    return model.float(), names, values, preprocess


def _build_image_encoder(name, dim, state, quick_gelu):
    """Build the image encoder without loading its weights, if possible on the meta device."""
    if name != "clip":
        from backbones import build_image_encoder

        with torch.device("cpu" if ":" in name else "meta"):  # timm has values outside the state
            return build_image_encoder(name, dim)
    from clip_model import image_tower

    with torch.device("meta"):  # no time spent on initial values
        return image_tower(state, dim, quick_gelu, "image_encoder.")


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
    content = dict(
        prototypes=prototypes.detach().float().cpu().clone(),
        rank_names=list(rank_names),
        rank_values=[float(value) for value in values],
        logit_scale=float(logit_scale),
        format=PROTOTYPES_FORMAT,
    )
    data.atomic_write(Path(path), partial(torch.save, content))


def load_prototypes(path: str | Path) -> dict[str, Any]:
    """The dict(prototypes (R, D), rank_names, rank_values, logit_scale) of save_prototypes.

    Raises FileNotFoundError if there is no such file, ValueError for any other file.
    """
    content = _load_checked(path, PROTOTYPES_FORMAT, PROTOTYPES, "what save_prototypes writes")
    names, values = content["rank_names"], content["rank_values"]
    _check_sizes(content["prototypes"], names, values, f"{path}: ")
    return {key: content[key] for key in PROTOTYPES}


# ------------------------------------------------------------------------ every entry is checked


def _load_checked(path, expected_format, keys, expected):
    """The dict that torch.save wrote to a file of that format."""
    content = load_file(path, expected)
    content = content if isinstance(content, dict) else {}
    if content.get("format") != expected_format:
        got = ", ".join(map(str, list(content)[:9])) or "no entries"
        got = " ".join(f"format {content.get('format')!r} with {got}".split())
        raise ValueError(f"{path} is another file: got {got:.200}; expected {expected}")
    _check_content(content, keys, path, "export the run again")
    return content


def _check_content(content, keys, path, advice):
    _check_entries(content, keys, path, advice)
    if "preprocess" in keys:
        _check_entries(content["preprocess"], PREPROCESS, f"{path}: preprocess", advice)
    tensors = {key: content[key] for key in keys if torch.is_tensor(content[key])}
    check_finite(content["state_dict"] if "state_dict" in keys else tensors, str(path))


def _check_entries(entries, keys, where, advice):
    if missing := [key for key in keys if key not in entries]:
        raise ValueError(f"{where} lacks {', '.join(missing)}: {advice}")
    for key in [key for key in ENTRIES if key in entries]:
        if key in ("rank_values", "mean", "std") and torch.is_tensor(entries[key]):
            entries[key] = entries[key].tolist()  # of numpy's array, which load_file makes a tensor
        words, is_right = ENTRIES[key]
        if not is_right(entries[key]):
            got = f"{type(entries[key]).__name__} {' '.join(repr(entries[key]).split()):.60}"
            raise ValueError(f"{where}: {key} is the {got}; expected {words}: {advice}")


def _is_list(value, *types):
    return isinstance(value, (list, tuple)) and all(type(entry) in types for entry in value)


def _are_numbers(value, low=-math.inf):
    return _is_list(value, int, float) and all(low < number < math.inf for number in value)


def _are_tensors(value):
    return isinstance(value, dict) and all(
        type(key) is str and torch.is_tensor(tensor) and not tensor.is_complex()
        for key, tensor in value.items()
    )


IS_BOOL = "True or False", lambda value: type(value) is bool
ENTRIES = {  # what each must be, in words and in code
    "image_encoder": ("a text", lambda value: isinstance(value, str)),
    "quick_gelu": IS_BOOL,
    "state_dict": ("tensors by name", _are_tensors),
    "rank_names": ("a list of texts", lambda value: _is_list(value, str)),
    "rank_values": ("a list of finite numbers", _are_numbers),
    "preprocess": ("image_size, mean and std", lambda value: isinstance(value, dict)),
    "image_size": (
        "an integer, 1 to 9999",
        lambda value: type(value) is int and 0 < value < 10_000,
    ),
    "mean": ("3 numbers", lambda value: _are_numbers(value) and len(value) == 3),
    "std": ("3 numbers above 0", lambda value: _are_numbers(value, low=0) and len(value) == 3),
    "resample": ("bicubic or bilinear", lambda value: value in ("bicubic", "bilinear")),
    "squash": IS_BOOL,
    "draft": IS_BOOL,
    "prototypes": ("a tensor", torch.is_tensor),
    "logit_scale": ("a finite number", lambda value: _are_numbers([value])),
}
EXPORTED = (
    "image_encoder", "quick_gelu", "state_dict", "rank_names", "rank_values", "preprocess",
)  # fmt: skip
PREPROCESS = ("image_size", "mean", "std")  # perhaps also resample, squash, draft
PROTOTYPES = ("prototypes", "rank_names", "rank_values", "logit_scale")


def _check_sizes(prototypes, names, values, where):
    if prototypes.dim() != 2 or not len(prototypes) == len(names) == len(values) > 0:
        got = f"{tuple(prototypes.shape)}, {len(names)} rank_names, {len(values)} rank_values"
        raise ValueError(f"{where}got prototypes {got}; expected (R, D), R and R")
