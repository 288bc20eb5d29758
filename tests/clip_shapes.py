"""State dicts with the shapes of CLIP's releases and reproducible values, for the tests of CLIP."""

import json
import math

import numpy as np
import torch

# A prime, so that rows never align
POOL = np.random.RandomState(0).standard_normal(1_000_003).astype(np.float32)


def fill(shapes):
    """{name: shape} -> a state dict, the same on every machine: sorted names, sane scales."""
    pool, starts, state = np.concatenate([POOL, POOL]), np.random.RandomState(1), {}
    for name in sorted(shapes):
        shape, start = shapes[name], starts.randint(len(POOL))
        z = np.resize(pool[start : start + len(POOL)], shape)
        if name.endswith("num_batches_tracked"):
            z = np.zeros(shape, np.int64)
        elif name == "logit_scale":
            z = np.full(shape, math.log(100), np.float32)
        elif name.endswith("running_var"):
            z = 1 + 0.2 * abs(z)
        elif name.endswith("weight") and len(shape) == 1:  # of a norm
            z = 1 + 0.1 * z
        elif name.endswith(("bias", "embedding", "embedding.weight", "running_mean")):
            z = 0.1 * z
        else:
            z *= np.float32(math.prod(shape[1:]) ** -0.5)
        state[name] = torch.from_numpy(z)
    return state


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norms(width, *names):
    return {f"{name}.{entry}": (width,) for name in names for entry in ("weight", "bias")}


def blocks(prefix, width, layers):
    shapes = {}
    for block in (f"{prefix}.{i}." for i in range(layers)):
        shapes |= {block + "attn.in_proj_weight": (3 * width, width)}
        shapes |= {block + "attn.in_proj_bias": (3 * width,)}
        shapes |= linear(block + "attn.out_proj", width, width)
        shapes |= linear(block + "mlp.c_fc", 4 * width, width)
        shapes |= linear(block + "mlp.c_proj", width, 4 * width)
        shapes |= norms(width, block + "ln_1", block + "ln_2")
    return shapes


def text(dim, width, layers=12):
    return blocks("transformer.resblocks", width, layers) | {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "logit_scale": (),
        **norms(width, "ln_final"),
        "text_projection": (width, dim),
    }


def vit(dim, image_size, patch, width, layers):
    return blocks("visual.transformer.resblocks", width, layers) | {
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((image_size // patch) ** 2 + 1, width),
        "visual.proj": (width, dim),
        **norms(width, "visual.ln_pre", "visual.ln_post"),
    }


def resnet(dim, image_size, layers, width):
    shapes, top = {}, 32 * width

    def conv(conv_name, norm_name, channels_in, channels_out, kernel):
        norm = f"visual.{norm_name}."
        shapes[f"visual.{conv_name}.weight"] = (channels_out, channels_in, kernel, kernel)
        shapes[norm + "num_batches_tracked"] = ()
        for entry in ("weight", "bias", "running_mean", "running_var"):
            shapes[norm + entry] = (channels_out,)

    for i, sizes in enumerate([(3, width // 2), (width // 2, width // 2), (width // 2, width)], 1):
        conv(f"conv{i}", f"bn{i}", *sizes, 3)
    channels_in = width
    for stage, count in enumerate(layers):
        channels = width * 2**stage
        for i in range(count):
            block = f"layer{stage + 1}.{i}."
            conv(block + "conv1", block + "bn1", channels_in, channels, 1)
            conv(block + "conv2", block + "bn2", channels, channels, 3)
            conv(block + "conv3", block + "bn3", channels, 4 * channels, 1)
            if i == 0:
                conv(block + "downsample.0", block + "downsample.1", channels_in, 4 * channels, 1)
            channels_in = 4 * channels
    for name, size in (("q", top), ("k", top), ("v", top), ("c", dim)):
        shapes |= linear(f"visual.attnpool.{name}_proj", size, top)
    return shapes | {"visual.attnpool.positional_embedding": ((image_size // 32) ** 2 + 1, top)}


def hugging_face(dim, widths, image_size, patch, layers):
    """Shapes of a Hugging Face CLIPModel with text and vision `widths`."""
    text_width, vision_width = widths
    vision_embeddings = "vision_model.embeddings."
    shapes = {
        "logit_scale": (),
        "text_projection.weight": (dim, text_width),
        "visual_projection.weight": (dim, vision_width),
        "text_model.embeddings.token_embedding.weight": (49408, text_width),
        "text_model.embeddings.position_embedding.weight": (77, text_width),
        vision_embeddings + "class_embedding": (vision_width,),
        vision_embeddings + "patch_embedding.weight": (vision_width, 3, patch, patch),
        vision_embeddings + "position_embedding.weight": (
            (image_size // patch) ** 2 + 1,
            vision_width,
        ),
        **norms(text_width, "text_model.final_layer_norm"),
        **norms(vision_width, "vision_model.pre_layrnorm", "vision_model.post_layernorm"),
    }
    for tower, width in zip(("text_model", "vision_model"), widths):
        for block in (f"{tower}.encoder.layers.{i}." for i in range(layers)):
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= linear(f"{block}self_attn.{name}", width, width)
            shapes |= linear(block + "mlp.fc1", 4 * width, width)
            shapes |= linear(block + "mlp.fc2", width, 4 * width)
            shapes |= norms(width, block + "layer_norm1", block + "layer_norm2")
    return shapes


TINY = text(96, 64, 2) | vit(96, 64, 16, 128, 2)
TINY_RESNET = text(96, 64, 1) | resnet(96, 64, (1, 2, 1, 1), 16)
# ViT-H's width, whose heads are 80 wide, with open_clip's names (which are OpenAI's)
TINY_OPEN_CLIP = text(96, 64, 1) | vit(96, 64, 32, 1280, 1)
TINY_HUGGING_FACE = hugging_face(96, (64, 128), 64, 16, 2)


def inputs(image_size):
    """An image (1, 3, H, W) and two texts (2, 77) of 9 and 30 tokens."""
    images = torch.from_numpy(np.resize(POOL, (1, 3, image_size, image_size)))
    tokens = torch.zeros(2, 77, dtype=torch.long)
    for row, length in zip(tokens, (9, 30)):
        row[:length] = torch.from_numpy(np.random.RandomState(length).randint(300, 49000, length))
        row[0], row[length - 1] = 49406, 49407
    return images, tokens


def equal(clip, state):
    """Whether the model holds these values, as float32."""
    got = clip.state_dict()
    return got.keys() == state.keys() and all(
        got[key].dtype == (torch.float32 if value.is_floating_point() else value.dtype)
        and torch.equal(got[key], value.to(got[key].dtype))
        for key, value in state.items()
    )


SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def safetensors_bytes(state, pad=0):
    """The format as its specification has it: header length, JSON, raw little-endian tensors."""
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = dict(
            dtype=SAFETENSORS_NAMES[tensor.dtype],
            shape=list(tensor.shape),
            data_offsets=[len(raw), len(raw) + len(data)],
        )
        raw += data
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8 + pad)
    return len(header).to_bytes(8, "little") + header + raw
