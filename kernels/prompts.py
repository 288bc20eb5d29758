"""CLIP's text tower on prompts that begin alike: the beginning is encoded once for all.

    encode_prompts   embeddings of R prompts -> text features (R, D), exact in value and gradient
    TextTower        what it needs of a CLIP object: ours, OpenAI's, open_clip's, Hugging Face's
    fingerprint      of a text tower: what same_tower compares
    token_table      the embeddings of such an object's vocabulary

Dims: R prompts, P tokens that all of them share in front, S that each has for itself, L = P + S,
W text width, D joint dim.

Copy together with: nothing; needs torch>=2.4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def encode_prompts(clip: nn.Module, shared: Tensor, own: Tensor, eot: Tensor) -> Tensor:
    """Prompts that begin alike -> text features (R, D), exact in value and gradient.

    The text tower is causal. So tokens after [EOT] never matter and are not encoded, and the keys
    and values of the shared beginning are the same for every rank: they are computed once and read
    by all. P + R S tokens are encoded instead of 77 R. Position P + s of rank r attends to the P
    shared tokens and the first s + 1 of its own.

    Args:
        clip: a CLIP model (ours, OpenAI's, open_clip's, Hugging Face's CLIPModel), used as it is.
        shared: (P, W) token embeddings at the front of every prompt, no positions added; P >= 1.
        own: (R, S, W) what follows, padded behind [EOT] with anything.
        eot: (R,) position of [EOT] within `own`.

    Raises ValueError where P + S exceeds the tower's context length or the model is not CLIP.
    """
    text = clip if isinstance(clip, TextTower) else TextTower(clip)
    num_shared, (num_ranks, num_own, _) = len(shared), own.shape
    length, positions = num_shared + num_own, text.positional_embedding
    if length > len(positions):
        raise ValueError(f"prompts of {length} tokens; the tower reads {len(positions)}")
    own = own + positions[num_shared:length]  # (R, S, W)
    x = torch.cat([shared + positions[:num_shared], own.flatten(0, 1)])  # (P + R S, W)
    x = x.to(_part(text.blocks[0], "attn", "self_attn").out_proj.weight.dtype)
    attn_mask = torch.ones(num_own, length, dtype=torch.bool, device=x.device).tril(num_shared)
    rows = num_shared + torch.arange(num_ranks, device=x.device) * num_own + eot  # (R,)
    no_scale = nn.Identity()  # only some of open_clip's models scale their layers
    for block in text.blocks:
        attn = _part(block, "attn", "self_attn")
        out = _part(block, "ln_1", "layer_norm1")(x)
        out = _attend(attn, out, num_shared, num_ranks, attn_mask)  # (P + R S, W)
        if block is text.blocks[-1]:  # of which only [EOT] is read
            x, out = x[rows], out[rows]  # (R, W)
        x = x + getattr(block, "ls_1", no_scale)(out)
        out = block.mlp(_part(block, "ln_2", "layer_norm2")(x))
        x = x + getattr(block, "ls_2", no_scale)(out)
    x, projection = text.ln_final(x), text.text_projection
    if isinstance(projection, nn.Module):  # Hugging Face's, some of open_clip's models
        return projection(x)
    return x.to(projection.dtype) @ projection  # (R, D)


class TextTower(nn.Module):
    """The parts of a CLIP model that turn embeddings into text features. Not a copy of them.

    Raises ValueError for a model whose text tower is not CLIP's.
    """

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        try:
            if hasattr(clip, "text_model"):  # Hugging Face's
                text, embeddings = clip.text_model, clip.text_model.embeddings
                self.blocks, self.ln_final = text.encoder.layers, text.final_layer_norm
                self.positional_embedding = embeddings.position_embedding.weight
                self.text_projection = clip.text_projection
            else:
                text = getattr(clip, "text", clip)  # where open_clip's CustomTextCLIP keeps it
                self.blocks, self.ln_final = text.transformer.resblocks, text.ln_final
                self.positional_embedding = text.positional_embedding
                self.text_projection = text.text_projection
            attn = _part(self.blocks[0], "attn", "self_attn")
            _part(attn, "in_proj_weight", "q_proj"), attn.num_heads, attn.out_proj
            _part(self.blocks[0], "ln_1", "layer_norm1")
            table = token_table(clip)
            faults = [f"{len(table)} tokens, not 49408"] if len(table) != 49408 else []
            if getattr(text, "attn_mask", text) is None:
                faults.append("its attention is not causal")
            if getattr(text, "cls_emb", None) is not None:
                faults.append("it has a class embedding, as CoCa's")
        except AttributeError as error:
            raise ValueError(
                f"{type(clip).__name__} is no CLIP ({error}); expected both towers of ours, "
                "OpenAI's, open_clip's or Hugging Face's CLIPModel"
            ) from error
        if faults:
            raise ValueError(
                f"{type(clip).__name__}: the text tower is not CLIP's ({', '.join(faults)})"
            )


def token_table(clip: nn.Module) -> Tensor:
    """The embeddings (V, W) of CLIP's vocabulary, as they are, without gradient."""
    text = (
        clip.text_model.embeddings if hasattr(clip, "text_model") else getattr(clip, "text", clip)
    )
    return text.token_embedding.weight.detach()


@torch.no_grad()
def fingerprint(text: TextTower, specials: Tensor) -> Tensor:
    """What tells text towers apart (1 + D,): gelu(1), and the text features of "." alone.

    specials: the embeddings (3, W) of [SOT], "." and [EOT]. float32 on the CPU.
    """
    eot = torch.ones(1, dtype=torch.long, device=specials.device)
    features = encode_prompts(text, specials[:1], specials[None, 1:], eot)[0]  # (D,)
    modules = text.blocks[0].mlp.modules()
    gelus = [m for m in modules if not [*m.children(), *m.parameters()]]
    return torch.cat([gelus[0](torch.ones(1)), features.float().cpu()])


def same_tower(one: Tensor, other: Tensor) -> bool:
    """Whether fingerprints are of one tower, perhaps in two precisions, which differ by 1 %."""
    if one.shape != other.shape or (one[0] - other[0]).abs() > 2e-3:  # QuickGELU's is 0.004 more
        return False
    return bool((one - other)[1:].norm() <= 0.05 * one[1:].norm())


def _part(module, *names):
    """The part of a module that has one of these names: OpenAI's or Hugging Face's."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"{type(module).__name__} has no {' or '.join(names)}")


def _attend(attn, x, num_shared, num_ranks, attn_mask):
    """Causal self-attention of P shared and R x S own tokens, all rows of x (P + R S, W)."""
    if hasattr(attn, "in_proj_weight"):
        qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)  # (P + R S, 3W)
    else:
        qkv = torch.cat([attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)], 1)  # (P + R S, 3W)
    qkv = qkv.unflatten(1, (3, attn.num_heads, -1))  # (P + R S, 3, heads, W/heads)
    qkv = qkv.permute(1, 2, 0, 3)  # (3, heads, P + R S, W/heads)
    shared = qkv[:, None, :, :num_shared]  # (3, 1, heads, P, W/heads)
    own = qkv[:, :, num_shared:].unflatten(2, (num_ranks, -1))  # (3, heads, R, S, W/heads)
    own = own.transpose(1, 2)  # (3, R, heads, S, W/heads)
    shared_kv = shared[1:].expand(-1, num_ranks, -1, -1, -1)  # (2, R, heads, P, W/heads)
    keys_values = torch.cat([shared_kv, own[1:]], 3)  # (2, R, heads, L, W/heads)
    shared = F.scaled_dot_product_attention(*shared, is_causal=True)  # (1, heads, P, W/heads)
    own = F.scaled_dot_product_attention(own[0], *keys_values, attn_mask=attn_mask)
    rows = [out.transpose(1, 2).flatten(2).flatten(0, 1) for out in (shared, own)]
    return attn.out_proj(torch.cat(rows))  # (P + R S, W)
