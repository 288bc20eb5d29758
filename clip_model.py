"""CLIP's image and text towers (Radford et al. 2021, arXiv 2103.00020).

    clip = CLIP.from_pretrained("RN50")          # or a file or folder in one of three key layouts
    image_features = clip.encode_image(images)   # (B, 3, H, W) -> (B, D), not normalised
    text_features = clip.encode_text(tokens)     # (M, 77) ids  -> (M, D), not normalised

Dims: B images, M texts, L tokens, W tower width, D joint dim, C channels, H x W pixels.
Parameters keep OpenAI's names (openai/CLIP@d05afc4 clip/model.py), and their shapes determine the
architecture. Differs from OpenAI's model: weights are float32, also on a GPU; `encode_text` stops
at the last [EOT], which is exact because the text tower is causal.

Copy together with: clip_weights.py (files and downloads); needs torch>=2.4.
Read in this order: CLIP, tiny_clip, image_tower, then the towers.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __package__:  # pasted into a package, clip_weights.py beside it
    from . import clip_weights
else:
    import clip_weights

__all__ = ["CLIP", "MODELS", "download", "image_tower", "read_safetensors", "tiny_clip"]

MODELS = clip_weights.MODELS
download, read_safetensors = clip_weights.download, clip_weights.read_safetensors
VOCAB_SIZE = 49408  # of CLIP's tokenizer; its last id is [EOT]


class CLIP(nn.Module):
    """Both towers. `visual` (B, 3, H, W) -> (B, D) is the image encoder on its own."""

    def __init__(
        self,
        visual: "ModifiedResNet | VisionTransformer",
        *,
        embed_dim: int,
        width: int,
        layers: int,
        mlp_width: int | None = None,
        context_length: int = 77,
        quick_gelu: bool = True,
    ) -> None:
        super().__init__()
        self.image_size, self.embed_dim = visual.image_size, embed_dim
        self.context_length, self.vocab_size = context_length, VOCAB_SIZE
        self.visual = visual
        self.transformer = Transformer(width, layers, mlp_width, quick_gelu, causal=True)
        self.token_embedding = nn.Embedding(VOCAB_SIZE, width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, width) * 0.01)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, image_size, image_size), normalised with CLIP's mean and std -> (B, D)."""
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids (M, up to context_length), zeros after [EOT] -> (M, D), the state at [EOT]."""
        fits = tokens.ndim == 2 and tokens.numel() > 0 and tokens.shape[1] <= self.context_length
        if not fits or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"got tokens {tokens.dtype} {tuple(tokens.shape)}; expected int64 "
                f"(M, {self.context_length}), as the tokenizer returns them"
            )
        eot = tokens.argmax(-1)  # (M,); [EOT] is the largest id of the vocabulary
        tokens = tokens[:, : int(eot.max()) + 1]  # (M, L); waits for the GPU
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (M, L, W)
        x = self.transformer(x)[torch.arange(len(x), device=x.device), eot]  # (M, W)
        return self.ln_final(x) @ self.text_projection  # (M, D)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike,
        *,
        cache_dir: str | PathLike | None = None,
        quick_gelu: bool | None = None,
        trust_torchscript: bool = False,
    ) -> "CLIP":
        """Public weights by name (downloaded once) or from a file or folder -> float32, eval mode.

        Args:
            name_or_path: a key of MODELS, a .pt / .bin / .safetensors file, a folder with one (or
                with parts and their index), or hf:ORG/NAME, which needs huggingface_hub.
            cache_dir: where downloads go; default ~/.cache/clip, which OpenAI's package uses too.
            quick_gelu: the activation of the weights; a wrong one costs accuracy silently. None: as
                in a config file beside the weights; OpenAI's own files need none.
            trust_torchscript: open a TorchScript archive of unknown origin. It can run any code.

        Raises FileNotFoundError, ConnectionError (download), ImportError (huggingface_hub),
        ValueError (damaged, unsafe or unsuitable file).
        """
        weights = clip_weights.load_weights(name_or_path, cache_dir, quick_gelu, trust_torchscript)
        return cls.from_state_dict(*weights)

    @classmethod
    def from_state_dict(
        cls, state_dict: dict[str, Tensor], quick_gelu: bool | None = True
    ) -> "CLIP":
        """Build the architecture that the shapes in `state_dict` call for and load it, strictly.

        Any of the three key layouts; values are copied, as float32. quick_gelu=None: True if the
        state dict is of OpenAI's archives, otherwise an error. Raises ValueError for another
        layout, for missing, unexpected or misshapen entries, and for nan and inf.
        """
        if quick_gelu is None and not (quick_gelu := "input_resolution" in state_dict):
            raise ValueError(
                "quick_gelu=None, and a state dict does not say its activation; pass "
                "quick_gelu=True (OpenAI, MetaCLIP) or quick_gelu=False (LAION, DataComp)"
            )
        state = clip_weights.to_openai_layout(state_dict)
        try:
            with torch.device("meta"):  # no time spent on initial values
                clip = cls(**_architecture(state, quick_gelu)).to_empty(device="cpu").float()
            for buffer in clip.buffers():  # some converters drop num_batches_tracked
                buffer.zero_()
            clip.load_state_dict(state)
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__} {' '.join(str(error).split())}"
            raise ValueError(
                f"not a complete CLIP: {reason:.300}; got {len(state)} entries "
                f"({', '.join([*state][:3])}), expected both towers, named as by OpenAI, open_clip "
                "or Hugging Face's CLIPModel: choose other weights"
            ) from error
        clip_weights.check_finite(clip.state_dict(), "the state dict")
        return clip.eval()


def tiny_clip(
    seed: int = 0,
    *,
    vision: str = "resnet",
    image_size: int = 64,
    embed_dim: int = 128,
    width: int = 128,
    layers: int = 2,
) -> CLIP:
    """A CLIP of toy size with random weights, the same for the same seed: for the demo and tests.

    Raises ValueError for a `vision` other than "resnet" and "vit".
    """
    if vision not in ("resnet", "vit"):
        raise ValueError(f"vision={vision!r}; expected 'resnet' or 'vit'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if vision == "resnet":
            visual = ModifiedResNet((1, 1, 1, 1), embed_dim, image_size, width=16)
        else:
            visual = VisionTransformer(image_size, 16, 128, 2, embed_dim)
        clip = CLIP(visual, embed_dim=embed_dim, width=width, layers=layers)
        nn.init.normal_(clip.token_embedding.weight, std=0.02)
    # CLIP's 100 would sharpen noise: training from random towers then first makes all ranks alike.
    clip.logit_scale.data.fill_(math.log(30.0))
    return clip.eval()


def image_tower(
    state: dict[str, Tensor], embed_dim: int, quick_gelu: bool = True, prefix: str = ""
) -> "ModifiedResNet | VisionTransformer":
    """The image tower that the shapes in a state dict call for; its values are not loaded.

    Its entries are named `prefix` + those of `clip.visual.state_dict()`. Raises KeyError where one
    is missing.
    """
    if prefix + "attnpool.positional_embedding" in state:
        grid = math.isqrt(len(state[prefix + "attnpool.positional_embedding"]) - 1)
        layers = [_count_blocks(state, f"{prefix}layer{i}.") for i in (1, 2, 3, 4)]
        width = len(state[prefix + "layer1.0.conv1.weight"])
        return ModifiedResNet(layers, embed_dim, 32 * grid, width)
    grid = math.isqrt(len(state[prefix + "positional_embedding"]) - 1)
    width, _, _, patch = state[prefix + "conv1.weight"].shape
    mlp_width = len(state[prefix + "transformer.resblocks.0.mlp.c_fc.weight"])
    layers = _count_blocks(state, prefix + "transformer.resblocks.")
    return VisionTransformer(grid * patch, patch, width, layers, embed_dim, mlp_width, quick_gelu)


def _architecture(state, quick_gelu):
    """The arguments of CLIP that the shapes in `state` call for."""
    width, embed_dim = state["text_projection"].shape
    if (num_tokens := len(state["token_embedding.weight"])) != VOCAB_SIZE:
        raise ValueError(f"a vocabulary of {num_tokens}; expected CLIP's {VOCAB_SIZE}")
    return dict(
        visual=image_tower(state, embed_dim, quick_gelu, "visual."),
        embed_dim=embed_dim,
        width=width,
        layers=_count_blocks(state, "transformer.resblocks."),
        mlp_width=len(state["transformer.resblocks.0.mlp.c_fc.weight"]),
        context_length=len(state["positional_embedding"]),
        quick_gelu=quick_gelu,
    )


def _count_blocks(state, prefix):
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


# ---------------------------------------------------------------------------------------- towers
class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block: (B, L, W) -> (B, L, W)."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, quick_gelu: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, num_heads)  # holds the parameters, is not called
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        c_fc, c_proj = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        gelu = QuickGELU() if quick_gelu else nn.GELU()
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=gelu, c_proj=c_proj))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        qkv = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)  # (B, L, 3W)
        qkv = qkv.unflatten(-1, (3, self.attn.num_heads, -1))  # (B, L, 3, heads, W/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, W/heads) each
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, heads, L, W/heads)
        x = x + self.attn.out_proj(out.transpose(1, 2).flatten(2))  # (B, L, W)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """`layers` blocks: (B, L, W) -> (B, L, W). ValueError: heads do not divide `width`."""

    def __init__(
        self,
        width: int,
        layers: int,
        mlp_width: int | None = None,
        quick_gelu: bool = True,
        causal: bool = False,
        head_width: int = 64,
    ) -> None:
        super().__init__()
        if width % head_width:
            raise ValueError(
                f"width={width}; expected a multiple of {head_width}, the width of CLIP's heads"
            )
        if not isinstance(quick_gelu, bool):
            raise TypeError(f"quick_gelu={quick_gelu!r}; expected True or False")
        self.causal = causal
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, width // head_width, mlp_width or 4 * width, quick_gelu)
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, self.causal)
        return x


class VisionTransformer(nn.Module):
    """ViT with a class token and a norm before the blocks: (B, 3, H, W) -> (B, D)."""

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        output_dim: int,
        mlp_width: int | None = None,
        quick_gelu: bool = True,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        tokens, head_width = (image_size // patch_size) ** 2 + 1, clip_weights.head_width(width)
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, mlp_width, quick_gelu, head_width=head_width)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, output_dim) * width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
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

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(channels_in, channels, 1)
        self.conv2, self.bn2 = _conv_bn(channels, channels, 3)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = _conv_bn(channels, 4 * channels, 1)
        self.downsample = nn.Identity()
        if channels_in != 4 * channels:  # wherever the stride is 2, too
            conv, bn = _conv_bn(channels_in, 4 * channels, 1)
            named_layers = {"-1": nn.AvgPool2d(stride), "0": conv, "1": bn}
            self.downsample = nn.Sequential(OrderedDict(named_layers))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))  # (B, 4 channels, H/stride, W/stride)
        return F.relu(out + self.downsample(x))


class AttentionPool2d(nn.Module):
    """One query, the mean over all positions, attends to all of them and itself."""

    def __init__(self, grid: int, width: int, num_heads: int, output_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) * width**-0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, output_dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        x = x.flatten(2).transpose(1, 2)  # (B, HW, C)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding  # (B, 1 + HW, C)
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1, C/heads)
        return self.c_proj(x.flatten(1))  # (B, D)


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, average-pooled strides, attention pooling."""

    def __init__(
        self, layers: Sequence[int], output_dim: int, image_size: int, width: int = 64
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.conv1, self.bn1 = _conv_bn(3, width // 2, 3, stride=2)
        self.conv2, self.bn2 = _conv_bn(width // 2, width // 2, 3)
        self.conv3, self.bn3 = _conv_bn(width // 2, width, 3)
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        for i, num_blocks in enumerate(layers):
            stage = nn.Sequential()
            for j in range(num_blocks):
                stage.append(Bottleneck(channels, width << i, stride=2 if i > 0 and j == 0 else 1))
                channels = 4 * (width << i)
            setattr(self, f"layer{i + 1}", stage)
        self.attnpool = AttentionPool2d(image_size // 32, channels, channels // 64, output_dim)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W)
        _check_images(images, self.image_size)
        x = F.relu(self.bn1(self.conv1(images)))  # (B, width/2, H/2, W/2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.avgpool(F.relu(self.bn3(self.conv3(x))))  # (B, width, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 32 width, H/32, W/32)
        return self.attnpool(x)  # (B, D)


def _check_images(images, size):
    if images.shape[1:] != (3, size, size) or not images.is_floating_point():
        raise ValueError(
            f"got images {images.dtype} {tuple(images.shape)}; expected float "
            f"(B, 3, {size}, {size}): resize them, scale to 0..1 and normalise"
        )
