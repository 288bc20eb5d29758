"""CLIP's image and text towers, loading the public weights (Radford et al. 2021, arXiv 2103.00020).

    clip = CLIP.from_pretrained("RN50")          # or a file or folder in one of three key layouts
    image_features = clip.encode_image(images)   # (B, 3, H, W) -> (B, D), not normalised
    text_features = clip.encode_text(tokens)     # (M, 77) ids  -> (M, D), not normalised

Dims: B images, M texts, L tokens, W tower width, D joint dim, C channels, H x W pixels.
Contents: MODELS, CLIP, tiny_clip; the towers; architectures and key layouts; reading files; download.
Parameters keep OpenAI's names (openai/CLIP@d05afc4 clip/model.py); their shapes tell the architecture.

Differs from OpenAI's loader (clip/clip.py there): weights are float32, also on a GPU; files are opened with
`weights_only=True`, and a TorchScript archive, which can run code, only if its sha256 is in MODELS or the
caller trusts it; `encode_text` stops at the last [EOT], which is exact because the text tower is causal.

Copy-paste: needs only this file, torch>=2.4.
"""

import hashlib
import http.client
import json
import math
import mmap
import re
import sys
import urllib.error
import urllib.request
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

try:
    import fcntl
except ImportError:  # Windows: processes that download the same file do not wait for each other
    fcntl = None

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
MODELS = {name: (_URL.format(sha, re.sub("[/@]", "-", name)), sha) for name, sha in _SHA256.items()}
VOCAB_SIZE = 49408  # of CLIP's tokenizer; its last id is [EOT]
# Heads are 64 wide, except in open_clip's ViT-H, ViT-g, ViT-bigG and ViT-e; shapes cannot tell.
VISION_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}


class CLIP(nn.Module):
    """Both towers. `visual` (B, 3, H, W) -> (B, D) is the image encoder on its own."""

    def __init__(
        self,
        visual,
        *,
        embed_dim,
        width,
        layers,
        mlp_width=None,
        context_length=77,
        vocab_size=VOCAB_SIZE,
        quick_gelu=True,
    ):
        super().__init__()
        self.image_size, self.embed_dim = visual.image_size, embed_dim
        self.context_length, self.vocab_size = context_length, vocab_size
        self.visual = visual
        self.transformer = Transformer(width, layers, mlp_width, quick_gelu, causal=True)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, width) * 0.01)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images):
        """Images (B, 3, image_size, image_size), normalised with CLIP's mean and std -> (B, D)."""
        return self.visual(images)

    def encode_text(self, tokens):
        """Token ids (M, up to context_length), zeros after [EOT] -> (M, D), the state at [EOT]."""
        if (
            tokens.ndim != 2
            or 0 in tokens.shape
            or tokens.shape[1] > self.context_length
            or tokens.dtype not in (torch.int64, torch.int32)
        ):
            raise ValueError(
                f"tokens are {tokens.dtype} {tuple(tokens.shape)}; expected int64 "
                f"(M, {self.context_length}), as the tokenizer gives them"
            )
        eot = tokens.argmax(-1)  # (M,); [EOT] is the largest id of the vocabulary
        tokens = tokens[:, : int(eot.max()) + 1]  # (M, L); waits for the GPU
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (M, L, W)
        x = self.transformer(x)[torch.arange(len(x), device=x.device), eot]  # (M, W)
        return self.ln_final(x) @ self.text_projection  # (M, D)

    @classmethod
    def from_pretrained(
        cls, name_or_path, *, cache_dir=None, quick_gelu=None, trust_torchscript=False
    ):
        """Public weights by name (downloaded once) or from a file or folder -> CLIP, float32, eval mode.

        Args:
            name_or_path: a key of MODELS, a .pt / .bin / .safetensors file, or a folder with one.
            cache_dir: where downloads go; default ~/.cache/clip, which OpenAI's package uses too.
            quick_gelu: the activation of the weights; a wrong one costs accuracy silently. None: as in a
                config file beside the weights; OpenAI's own files need none.
            trust_torchscript: open a TorchScript archive of unknown origin. It can run any code.

        Raises FileNotFoundError, ConnectionError (download), ValueError (damaged, unsafe or unsuitable file).
        """
        named = name_or_path in MODELS
        path = download(*MODELS[name_or_path], cache_dir) if named else _find_weights(name_or_path)
        state_dict = _read_weights(path, trusted=named or trust_torchscript)
        if quick_gelu is None:
            quick_gelu = named or "input_resolution" in state_dict or _quick_gelu_from_config(path)
        return cls.from_state_dict(state_dict, quick_gelu)

    @classmethod
    def from_state_dict(cls, state_dict, quick_gelu=True):
        """Builds the architecture that the shapes in `state_dict` call for and loads it, strictly.

        Any of the three key layouts; values are copied, as float32. Raises ValueError for another layout
        and for missing, unexpected or misshapen entries.
        """
        state = _to_openai_layout(state_dict)
        try:
            with torch.device("meta"):  # no time spent on initial values
                clip = cls(**_architecture(state, quick_gelu)).to_empty(device="cpu").float()
            for buffer in clip.buffers():  # some converters drop num_batches_tracked
                buffer.zero_()
            clip.load_state_dict(state)
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"not a whole CLIP: {repr(error):.2000}; got {len(state)} entries ({', '.join([*state][:3])}), "
                "expected both towers, named as by OpenAI, open_clip or Hugging Face's CLIPModel, not SigLIP, "
                "CoCa or open_clip's timm and Hugging Face towers: choose other weights"
            ) from error
        return clip.eval()


def tiny_clip(seed=0, *, vision="resnet", image_size=64, embed_dim=128, width=128, layers=2):
    """A CLIP of toy size with random weights, the same for the same seed: for the demo and for tests."""
    if vision not in ("resnet", "vit"):
        raise ValueError(f"vision={vision!r}; expected 'resnet' or 'vit'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        visual = (
            ModifiedResNet((1, 1, 1, 1), embed_dim, image_size, width=16)
            if vision == "resnet"
            else VisionTransformer(image_size, 16, 128, 2, embed_dim)
        )
        clip = CLIP(visual, embed_dim=embed_dim, width=width, layers=layers)
        nn.init.normal_(clip.token_embedding.weight, std=0.02)
    # CLIP's 100 would sharpen noise: training from random towers then first makes all ranks alike.
    clip.logit_scale.data.fill_(math.log(30.0))
    return clip.eval()


def image_tower(state, embed_dim, quick_gelu=True, prefix=""):
    """The image tower, its values yet to be loaded, that the shapes in a state dict call for.

    Its entries are named `prefix` + those of `clip.visual.state_dict()`. Raises KeyError where one is missing.
    """
    if prefix + "attnpool.positional_embedding" in state:
        grid = math.isqrt(len(state[prefix + "attnpool.positional_embedding"]) - 1)
        layers = [_blocks(state, f"{prefix}layer{i}.") for i in (1, 2, 3, 4)]
        return ModifiedResNet(
            layers, embed_dim, 32 * grid, len(state[prefix + "layer1.0.conv1.weight"])
        )
    grid = math.isqrt(len(state[prefix + "positional_embedding"]) - 1)
    width, _, _, patch_size = state[prefix + "conv1.weight"].shape
    mlp_width = len(state[prefix + "transformer.resblocks.0.mlp.c_fc.weight"])
    layers = _blocks(state, prefix + "transformer.resblocks.")
    return VisionTransformer(
        grid * patch_size, patch_size, width, layers, embed_dim, mlp_width, quick_gelu
    )


# ------------------------------------------------------------------------------------------ towers
class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, num_heads, mlp_width, quick_gelu):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, num_heads)  # holds the parameters, is not called
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, mlp_width),
                gelu=QuickGELU() if quick_gelu else nn.GELU(),
                c_proj=nn.Linear(mlp_width, width),
            )
        )

    def forward(self, x, causal):  # (B, L, W)
        qkv = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)  # (B, L, 3W)
        qkv = qkv.unflatten(-1, (3, self.attn.num_heads, -1))  # (B, L, 3, heads, W/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, W/heads) each
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, heads, L, W/heads)
        x = x + self.attn.out_proj(out.transpose(1, 2).flatten(2))  # (B, L, W)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, mlp_width=None, quick_gelu=True, causal=False, head_width=64):
        super().__init__()
        if width % head_width:
            raise ValueError(
                f"width={width}; expected a multiple of {head_width}, the width of CLIP's heads"
            )
        self.causal = causal
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, width // head_width, mlp_width or 4 * width, quick_gelu)
            for _ in range(layers)
        )

    def forward(self, x):  # (B, L, W)
        for block in self.resblocks:
            x = block(x, self.causal)
        return x


class VisionTransformer(nn.Module):
    def __init__(
        self, image_size, patch_size, width, layers, output_dim, mlp_width=None, quick_gelu=True
    ):
        super().__init__()
        self.image_size = image_size
        tokens, head_width = (image_size // patch_size) ** 2 + 1, VISION_HEAD_WIDTHS.get(width, 64)
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, mlp_width, quick_gelu, head_width=head_width)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, output_dim) * width**-0.5)

    def forward(self, images):  # (B, 3, H, W)
        _check_images(images, self.image_size)
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (B, patches, W)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], 1)  # (B, 1 + patches, W)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))  # (B, 1 + patches, W)
        return self.ln_post(x[:, 0]) @ self.proj  # (B, D)


def _conv_bn(channels_in, channels_out, kernel, stride=1):
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(channels_out)


class Bottleneck(nn.Module):
    """ResNet bottleneck in which every stride is an average pool (anti-aliasing)."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(channels_in, channels, 1)
        self.conv2, self.bn2 = _conv_bn(channels, channels, 3)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = _conv_bn(channels, 4 * channels, 1)
        self.downsample = nn.Identity()
        if channels_in != 4 * channels:  # wherever the stride is 2, too
            conv, bn = _conv_bn(channels_in, 4 * channels, 1)
            self.downsample = nn.Sequential(
                OrderedDict({"-1": nn.AvgPool2d(stride), "0": conv, "1": bn})
            )

    def forward(self, x):  # (B, C, H, W)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))  # (B, 4 channels, H/stride, W/stride)
        return F.relu(out + self.downsample(x))


class AttentionPool2d(nn.Module):
    """One query, the mean over all places, attends to all places and itself."""

    def __init__(self, grid, width, num_heads, output_dim):
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) * width**-0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, output_dim)

    def forward(self, x):  # (B, C, H, W)
        x = x.flatten(2).transpose(1, 2)  # (B, HW, C)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding  # (B, 1 + HW, C)
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1, C/heads)
        return self.c_proj(x.flatten(1))  # (B, D)


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, average-pooled strides, attention pooling."""

    def __init__(self, layers, output_dim, image_size, width=64):
        super().__init__()
        self.image_size = image_size
        self.conv1, self.bn1 = _conv_bn(3, width // 2, 3, stride=2)
        self.conv2, self.bn2 = _conv_bn(width // 2, width // 2, 3)
        self.conv3, self.bn3 = _conv_bn(width // 2, width, 3)
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        for i, blocks in enumerate(layers):
            stage = nn.Sequential()
            for j in range(blocks):
                stage.append(Bottleneck(channels, width << i, stride=2 if i > 0 and j == 0 else 1))
                channels = 4 * (width << i)
            setattr(self, f"layer{i + 1}", stage)
        self.attnpool = AttentionPool2d(image_size // 32, channels, channels // 64, output_dim)

    def forward(self, images):  # (B, 3, H, W)
        _check_images(images, self.image_size)
        x = F.relu(self.bn1(self.conv1(images)))  # (B, width/2, H/2, W/2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.avgpool(F.relu(self.bn3(self.conv3(x))))  # (B, width, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 32 width, H/32, W/32)
        return self.attnpool(x)  # (B, D)


def _check_images(images, size):
    if images.shape[1:] != (3, size, size) or not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}; expected float "
            f"(B, 3, {size}, {size}): resize them, scale to 0..1 and normalise"
        )


# ---------------------------------------------------------------------------- architectures and key layouts
def _architecture(state, quick_gelu):
    """The arguments of CLIP that the shapes in `state` call for."""
    vocab_size, width = state["token_embedding.weight"].shape
    _, embed_dim = state["text_projection"].shape
    if vocab_size != VOCAB_SIZE:
        raise ValueError(f"a vocabulary of {vocab_size}; expected CLIP's {VOCAB_SIZE}")
    return dict(
        visual=image_tower(state, embed_dim, quick_gelu, "visual."),
        embed_dim=embed_dim,
        width=width,
        layers=_blocks(state, "transformer.resblocks."),
        mlp_width=len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        context_length=len(state["positional_embedding"]),
        quick_gelu=quick_gelu,
    )


def _blocks(state, prefix):
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


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


def _to_openai_layout(state_dict):
    """A state dict in any of the three layouts, wrapped or not -> one with OpenAI's names."""
    if not isinstance(state_dict, dict):
        raise ValueError(
            f"got a {type(state_dict).__name__}; expected a dict, as model.state_dict() gives"
        )
    for wrapper in ("state_dict", "model"):  # training checkpoints of open_clip and others
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
    # The prefixes are those of DataParallel, torch.compile and open_clip's CustomTextCLIP.
    state = {
        re.sub(r"^((module|_orig_mod)\.)*(text\.)?", "", str(k)): v for k, v in state_dict.items()
    }
    for extra in ("input_resolution", "context_length", "vocab_size", "attn_mask"):
        state.pop(extra, None)  # OpenAI's TorchScript archives carry these beside the parameters
    if not any(key.startswith(("text_model.", "vision_model.")) for key in state):
        return state
    out = {}
    for key, value in state.items():
        for theirs, ours in _HUGGING_FACE_NAMES.items():
            key = key.replace(theirs, ours)
        if not key.endswith("position_ids"):  # a constant that older versions stored
            out[key] = value.T if key in ("visual.proj", "text_projection") else value
    for query in [key for key in out if ".attn.q_proj." in key]:
        parts = [query.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        if all(part in out for part in parts):
            out[query.replace("q_proj.", "in_proj_")] = torch.cat([out.pop(part) for part in parts])
    return out


# ------------------------------------------------------------------------------------------- reading files
def _find_weights(path):
    names = (
        "model.safetensors",
        "open_clip_model.safetensors",
        "pytorch_model.bin",
        "open_clip_pytorch_model.bin",
    )
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
        known = {sha256 for _, sha256 in MODELS.values()}
        if trusted or (sha256 := hashlib.sha256(path.read_bytes()).hexdigest()) in known:
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
    except Exception as error:  # JSON, zip, pickle and torch each have errors of their own
        why = (
            str(error).split("WeightsUnpickler error:")[-1].strip()
        )  # without advice to trust the file
        raise ValueError(
            f"cannot read {path} ({path.stat().st_size} bytes): {type(error).__name__} {why:.300}; expected a "
            "state dict of tensors, also as safetensors or TorchScript. If it is damaged, get it again; if it "
            "holds other objects, load it where it was made and save its state_dict() alone"
        ) from error
    raise ValueError(
        f"{path} is a TorchScript archive, which can run code, and its sha256, {sha256}, is not in "
        "MODELS; expected a state dict; pass trust_torchscript=True if you trust where it came from"
    )


_SAFETENSORS_DTYPES = dict(
    F64=torch.float64,
    F32=torch.float32,
    F16=torch.float16,
    BF16=torch.bfloat16,
    I64=torch.int64,
    I32=torch.int32,
    I16=torch.int16,
    I8=torch.int8,
    U8=torch.uint8,
    BOOL=torch.bool,
)


def read_safetensors(path):
    """The state dict in a safetensors file (8 bytes of header length, JSON header, raw tensors), not copied."""
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
    found = set()
    for file in (path.with_name("config.json"), path.with_name("open_clip_config.json")):
        try:
            config = json.loads(file.read_bytes()) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(
                f"{file} is no JSON ({error}); expected a model's config: get it again"
            ) from error
        if "model_cfg" in config:
            found.add("quick_gelu" if config["model_cfg"].get("quick_gelu") else "gelu")
        elif config.get("model_type") == "clip":  # whose default is quick_gelu
            towers = (config.get("text_config") or {}, config.get("vision_config") or {})
            found.update(tower.get("hidden_act", "quick_gelu") for tower in towers)
    if found not in ({"quick_gelu"}, {"gelu"}):
        raise ValueError(
            f"the activation of {path} is unknown: config files beside it say {sorted(map(str, found))}; "
            "expected gelu or quick_gelu: pass quick_gelu=True (OpenAI, MetaCLIP) or False (LAION, DataComp)"
        )
    return found == {"quick_gelu"}


# ------------------------------------------------------------------------------------------------ download
def download(url, sha256, cache_dir=None):
    """The file behind `url`, checked against its sha256; from `cache_dir` if it is there already.

    A broken download goes on where it stopped (NAME.part); the file gets its name only when whole. Other
    processes that want it wait (NAME.lock). Progress goes to stderr if that is a terminal.
    """
    folder = Path(cache_dir or "~/.cache/clip").expanduser()
    path, part, lock = (folder / (url.rsplit("/", 1)[1] + end) for end in ("", ".part", ".lock"))
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with open(lock, "w") as file:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
                if not path.is_file():  # nobody was faster
                    _fetch(url, part)
                    _check_sha256(part, sha256)
                    part.replace(path)
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        raise ConnectionError(
            f"cannot download {url} to {path}: {error!r}\nRun again to go on where it stopped, choose another "
            f"cache_dir, or put the file (sha256 {sha256}) there yourself"
        ) from error
    _check_sha256(path, sha256)
    return path


def _fetch(url, part):
    """Downloads what `part` lacks of the file behind `url`."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing beyond `done`: it is whole, or the sha256 will tell
            return
        raise
    with response, open(part, "ab" if response.status == 206 else "wb") as file:
        done = file.tell()  # 0 where the server ignores Range and sends all
        total = done + int(response.headers.get("Content-Length") or 0)
        while chunk := response.read(1 << 20):
            file.write(chunk)
            done += len(chunk)
            if sys.stderr.isatty():
                end = "" if done < total else "\n"
                print(f"\r{url}: {done >> 20} of {total >> 20} MiB", end=end, file=sys.stderr)
    if done < total:
        raise ConnectionError(f"connection closed after {done} of {total} bytes")


def _check_sha256(path, expected):
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != expected:
        if path.suffix == ".part":
            path.unlink()  # so that the next run starts anew
        raise ValueError(
            f"{path} has sha256 {got}, expected {expected}; delete it if it is there, run again"
        )
