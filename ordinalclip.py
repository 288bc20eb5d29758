"""OrdinalCLIP: ordinal regression as image-language matching (Li et al. 2022, arXiv 2206.02338).

Ranks are prototypes: an image encoder, a source of one vector per rank, a temperature. What the
paper compares differs in the source only (but for Regression, one neuron):

    RankPrompts(interp="linear" | "inverse")   frozen text tower, learned prompts  OrdinalCLIP
    RankPrompts(interp="none")                 the same, one embedding per rank    CoOp
    LinearPrototypes                           a learned matrix                    classification
    FixedPrototypes                            a stored matrix                     zero-shot, export

Dims, here and in kernels/prompts.py:
    B images    R ranks             K base ranks     N context tokens    T tokens per rank
    L tokens in use of a prompt     W text width     D joint dim
    P tokens that the prompts of all ranks share in front, S = L - P tokens that each has for itself

Differs from the official code (xk-huang/OrdinalCLIP@ca10a20), with equal prototypes:
- prompts are encoded up to [EOT], and what all begin with once (models/ordinalclip.py#L52-L54);
- with K < R, `rank_tokens` names all R ranks (official: K names, rank_prompt_learner.py#L58-L60);
- logits, losses and the interpolation are float32 or better, whatever the towers' precision.

    >>> from clip_model import tiny_clip
    >>> clip = tiny_clip()
    >>> prompts = RankPrompts(clip, num_ranks=30, context=4, interp="linear", num_base_ranks=3)
    >>> model = OrdinalCLIP(clip.visual, prompts, clip.logit_scale)
    >>> images, labels = torch.randn(8, 3, 64, 64), torch.randint(30, (8,))
    >>> total, i2t, t2i = model.loss(images, labels)
    >>> model.export().eval().predict(images)["expected"].shape
    torch.Size([8])

Copy together with: kernels/, where the loss is (reference.py) and the way through the text tower
(prompts.py); needs torch>=2.4 and a CLIP: clip_model.py's, OpenAI's, open_clip's, Hugging Face's.
"""

import operator
import warnings
from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

if __package__:  # pasted into a package, kernels/ beside it
    from .kernels import check_labels, match, matching_loss, similarity, unit
    from .kernels.prompts import TextTower, encode_prompts, fingerprint, same_tower, token_table
else:
    from kernels import check_labels, match, matching_loss, similarity, unit
    from kernels.prompts import TextTower, encode_prompts, fingerprint, same_tower, token_table

SOT, FULL_STOP, EOT = 49406, 269, 49407  # ids in CLIP's vocabulary
POSITIONS = ("tail", "middle", "front")
INTERPOLATIONS = ("linear", "inverse", "none")


def interpolation_weights(num_ranks: int, num_base_ranks: int, kind: str) -> Tensor:
    """Weights (R, K) that make R rank embeddings out of K base embeddings; rows sum to 1.

    Base ranks lie at b = linspace(0, R-1, K), a single one in the middle; d = |rank - b|; each row
    is normalised after

        "linear"    w = 1 - d / (R-1)       "inverse"   w = 1 / (d + 1e-5)

    "linear" is not piecewise linear: with K > 2 every base contributes to every rank, and only
    "inverse" (all but) reproduces a base embedding at its own position. Computed in float64,
    returned in torch's default dtype. Raises ValueError for an unknown kind, R < 2, K < 1 or K > R.
    Source: paper Sec. 3.3; rank_prompt_learner.py#L19-L23, L86-L99.
    """
    if num_ranks < 2:
        raise ValueError(f"num_ranks={num_ranks}: an order needs at least 2 ranks")
    if not 1 <= num_base_ranks <= num_ranks:
        raise ValueError(f"num_base_ranks={num_base_ranks}: expected 1 to num_ranks={num_ranks}")
    ranks = torch.arange(num_ranks, dtype=torch.float64)
    distance = (ranks[:, None] - _base_positions(num_ranks, num_base_ranks)).abs()  # (R, K)
    if kind == "linear":
        weights = 1 - distance / (num_ranks - 1)
    elif kind == "inverse":
        weights = 1 / (distance + 1e-5)
    else:
        raise ValueError(f"interp={kind!r}: expected linear or inverse; RankPrompts: or none")
    return (weights / weights.sum(1, keepdim=True)).to(torch.get_default_dtype())


def _base_positions(num_ranks, num_base_ranks):
    first = (num_ranks - 1) / 2 if num_base_ranks == 1 else 0
    return torch.linspace(first, num_ranks - 1, num_base_ranks, dtype=torch.float64)  # (K,)


class RankPrompts(nn.Module):
    """Prompts `[SOT] context rank . [EOT]` through CLIP's frozen text tower: call -> (R, D).

    Learned: `context_embeds` (N, W) or (R, N, W), `rank_embeds` (K, T, W); both float32, named as
    in the official checkpoints. The text tower belongs to `clip`: it moves with this module (`.to`,
    `.half`) but is not among its parameters nor in its state dict, and is set to need no gradient.
    A state dict of other settings or another text tower is a ValueError (see `_extra_state`).

    Args:
        clip: ours, OpenAI's, open_clip's CLIP or Hugging Face's CLIPModel.
        num_ranks: R >= 2.
        context: token ids (N,) whose embeddings start the context, without [SOT], [EOT] and
            padding, or an int N for N random ones.
        rank_tokens: R sequences of token ids, the names of all ranks; None starts at random. With
            interp="none" every rank starts at its name, token by token, else the K base embeddings
            at the names nearest their positions, each pooled to `tokens_per_rank`.
        interp: "linear", "inverse", or "none" for one free embedding per rank (CoOp).
        num_base_ranks: K, with interpolation.
        tokens_per_rank: T; names with interp="none" bring their own number.
        rank_position: the rank after ("tail"), amid ("middle") or before ("front") the context.
        rank_specific_context: a context of its own for each rank.

    Raises ValueError for values that do not fit, and for prompts longer than the text tower reads.
    Source: plain_prompt_learner.py#L72-L150, rank_prompt_learner.py#L48-L99.
    """

    def __init__(
        self,
        clip: nn.Module,
        num_ranks: int,
        *,
        context: Tensor | Sequence[int] | int,
        rank_tokens: Sequence[Sequence[int] | Tensor] | None = None,
        interp: str = "linear",
        num_base_ranks: int = 3,
        tokens_per_rank: int = 1,
        rank_position: str = "tail",
        rank_specific_context: bool = False,
    ) -> None:
        super().__init__()
        if rank_position not in POSITIONS:
            raise ValueError(f"rank_position={rank_position!r}: expected tail, middle or front")
        if min(num_ranks - 1, tokens_per_rank) < 1:
            got = f"num_ranks={num_ranks}, tokens_per_rank={tokens_per_rank}"
            raise ValueError(f"{got}: expected at least 2 ranks and 1 token")
        self.interp, self.rank_position = interp, rank_position
        self._text = (TextTower(clip).requires_grad_(False),)  # in a tuple it is not a submodule
        table = token_table(clip).float()  # (V, W)
        width, device = table.shape[1], table.device

        if not isinstance(context, int):
            context_embeds = _lookup(table, context, "context")  # (N, W)
        elif 0 <= context < 10_000:  # before they are made; the tower reads 77
            context_embeds = torch.randn(context, width, device=device) * 0.02
        else:
            raise ValueError(f"context={context}: expected a number of tokens or their ids")
        num_context = len(context_embeds)
        if rank_specific_context:
            context_embeds = context_embeds.repeat(num_ranks, 1, 1)  # (R, N, W)
        self.context_embeds = nn.Parameter(context_embeds)

        sizes, is_free = (num_ranks, num_base_ranks), interp == "none"  # then K = R
        weights = torch.eye(num_ranks) if is_free else interpolation_weights(*sizes, interp)
        lengths, size = [tokens_per_rank] * num_ranks, (weights.shape[1], tokens_per_rank, width)
        if rank_tokens is None:
            rank_embeds = torch.randn(size, device=device) * 0.02
        else:
            if len(rank_tokens) != num_ranks:
                got = f"rank_tokens holds {len(rank_tokens)} names"
                raise ValueError(f"{got}; expected num_ranks={num_ranks} lists of token ids")
            names = [_lookup(table, ids, "a name of rank_tokens", 1) for ids in rank_tokens]
            if is_free:
                rank_embeds = nn.utils.rnn.pad_sequence(names, batch_first=True)
                lengths = [len(name) for name in names]
            else:
                nearest = _base_positions(*sizes).round().long().tolist()
                pooled = [F.adaptive_avg_pool1d(names[i].T, tokens_per_rank).T for i in nearest]
                rank_embeds = torch.stack(pooled)
        self.rank_embeds = nn.Parameter(rank_embeds)  # (K, T, W)

        before = {"tail": num_context, "middle": num_context // 2, "front": 0}[rank_position]
        self.num_shared = 1 if rank_specific_context else 1 + before  # P
        layout = _prompt_layout(context_embeds.shape[:-1], lengths, before)  # (R, L)
        if layout.shape[1] > (max_length := len(self._text[0].positional_embedding)):
            raise ValueError(
                f"a prompt of {layout.shape[1]} tokens, with [SOT], '.' and [EOT]; the text tower "
                f"reads {max_length}: shorten the context or the rank names"
            )
        eot = num_context + 2 + torch.tensor(lengths)  # (R,)
        self.register_buffer("weights", weights.to(device), persistent=False)  # (R, K)
        self.register_buffer("specials", table[[SOT, FULL_STOP, EOT]], persistent=False)  # (3, W)
        for name, value in dict(layout=layout, eot=eot).items():  # hidden from averages of buffers
            self._text[0].register_buffer(name, value.to(device))

    def forward(self) -> Tensor:
        """Prototypes (R, D), not normalised."""
        return encode_prompts(self._text[0], *self.prompt_embeds())

    def prompt_embeds(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `encode_prompts` reads: shared (P, W), own (R, S, W), eot (R,)."""
        with torch.autocast(self.weights.device.type, enabled=False):
            ranks = torch.einsum("rk,ktw->rtw", self.weights, self.rank_embeds)  # (R, T, W)
        pool = [self.specials, self.context_embeds.flatten(0, -2), ranks.flatten(0, 1)]
        prompts = F.embedding(self._text[0].layout, torch.cat(pool))  # (R, L, W)
        shared, own = prompts[0, : self.num_shared], prompts[:, self.num_shared :]
        return shared, own, self._text[0].eot - self.num_shared

    def get_extra_state(self) -> Tensor:
        """A tensor, as safetensors needs: interp, rank_position, R, where [EOT] is, fingerprint."""
        settings = [INTERPOLATIONS.index(self.interp), POSITIONS.index(self.rank_position)]
        settings += [len(eot := self._text[0].eot.tolist()), *eot]
        return torch.cat([torch.tensor(settings), fingerprint(self._text[0], self.specials)])

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing is set. ValueError if the state is of other settings or another text tower."""
        expected, end, state = self.get_extra_state(), 3 + len(self._text[0].eot), state.float()
        settings = state[:end].round().cpu()  # an average of equal state dicts is all but equal
        names = ("interp", "rank_position", "number of ranks")
        differing = [name for name, a, b in zip(names, expected, settings) if a != b]
        if not differing and not torch.equal(expected[:end], settings):
            differing = ["prompt length (context, rank names)"]
        elif not differing and not same_tower(expected[end:], state[end:].cpu()):
            differing = ["text tower"]
        if differing:
            raise ValueError(
                f"a state dict of prompts with another {', '.join(differing)}; build the same ones "
                "(values of the same shapes load without the entry _extra_state)"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())  # in older files
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn, recurse=True):
        self._text[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)


class LinearPrototypes(nn.Module):
    """A learned (R, D) matrix: with it, OrdinalCLIP is the paper's classification baseline."""

    def __init__(self, num_ranks: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_ranks, dim) * dim**-0.5)

    def forward(self) -> Tensor:
        """Prototypes (R, D), not normalised."""
        return self.weight


class FixedPrototypes(nn.Module):
    """A stored (R, D) tensor, copied: zero-shot text features, or the result of training.

    Raises ValueError for another shape, FloatingPointError for nan and inf.
    """

    def __init__(self, prototypes: Tensor) -> None:
        super().__init__()
        if prototypes.dim() != 2 or not prototypes.is_floating_point():
            got = f"{prototypes.dtype} {tuple(prototypes.shape)}"
            raise ValueError(f"got prototypes {got}; expected float (R, D)")
        if not (finite := prototypes.isfinite().all(1)).all():
            bad = f"prototype {int(finite.long().argmin())} of {len(finite)} holds nan or inf"
            raise FloatingPointError(f"{bad}; lower the learning rate, or take other weights")
        self.register_buffer("prototypes", prototypes.detach().clone())

    def forward(self) -> Tensor:
        """Prototypes (R, D), not normalised."""
        return self.prototypes


class OrdinalCLIP(nn.Module):
    """Images against rank prototypes.

    Args:
        image_encoder: module (B, 3, H, W) -> (B, D), e.g. `clip.visual`.
        prototypes: module whose call gives (R, D): RankPrompts, LinearPrototypes, FixedPrototypes.
        logit_scale: log of the temperature's inverse, as CLIP stores it (log(100): 100 is a
            ValueError), number or tensor. Copied, as a buffer; to make it learn:
            `model.logit_scale = nn.Parameter(model.logit_scale)`.
    """

    def __init__(
        self, image_encoder: nn.Module, prototypes: nn.Module, logit_scale: float | Tensor
    ) -> None:
        super().__init__()
        self.image_encoder, self.prototypes = image_encoder, prototypes
        logit_scale = torch.as_tensor(logit_scale).detach().float().clone()
        if logit_scale.numel() != 1 or not -7 <= logit_scale.item() <= 7:  # 1/1097 to 1097
            raise ValueError(
                f"logit_scale={logit_scale.tolist()}: expected one number from -7 to 7, the log of "
                "the multiplier as CLIP stores it: math.log(100), not 100"
            )
        self.register_buffer("logit_scale", logit_scale)  # FSDP2 has no scalar parameters

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, R) = exp(logit_scale) * cosine."""
        return similarity(*self._match_inputs(images))

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        target: str = "normalized",
        impl: str = "auto",
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W), rank indices (B,) -> (total, i2t, t2i), total = i2t + t2i (Eq. 4).
        Keywords and errors: `kernels.matching_loss`'s."""
        if self.logit_scale.requires_grad and "logit_scale" in self._buffers:
            raise ValueError(
                "logit_scale needs a gradient but is no parameter; to make it learn: "
                "model.logit_scale = nn.Parameter(model.logit_scale)"
            )
        is_distributed = dist.is_available() and dist.is_initialized()
        if group is None and is_distributed and dist.get_world_size() > 1:
            warnings.warn("loss of this process alone: pass group=dist.group.WORLD", stacklevel=2)
        x, p, scale = self._match_inputs(images)
        i2t, t2i = matching_loss(x, p, labels, scale, target=target, impl=impl, group=group)
        return i2t + t2i, i2t, t2i

    @torch.no_grad()
    def predict(self, images: Tensor, *, impl: str = "auto") -> dict[str, Tensor]:
        """Images (B, 3, H, W) -> dict(rank=most probable (B,), expected rank (B,), probs (B, R)).

        Of a model with RankPrompts, predict with `model.export()`: there the text tower ran once.
        """
        probs, expected, rank = match(*self._match_inputs(images), impl=impl)
        return dict(rank=rank, expected=expected, probs=probs)

    @torch.no_grad()
    def export(self, copy: bool = True) -> "OrdinalCLIP":
        """The same model, its prototypes (R, D) stored; its image encoder: copied, or shared."""
        encoder = deepcopy(self.image_encoder) if copy else self.image_encoder
        fixed = FixedPrototypes(self.prototypes())
        return OrdinalCLIP(encoder, fixed, self.logit_scale).train(self.training)

    def _apply(self, fn, recurse=True):
        scale = self.logit_scale.detach().float()
        super()._apply(fn, recurse)
        if "logit_scale" in self._buffers and self.logit_scale.dtype.itemsize == 2:
            self.logit_scale = scale.to(self.logit_scale.device)  # log(100) in bfloat16 is log(99)
        return self

    def _match_inputs(self, images):
        features = self.image_encoder(images)  # (B, D)
        if not torch.is_tensor(features):
            raise ValueError(
                f"the image encoder gives a {type(features).__name__}; expected a tensor (B, D): "
                "wrap it in a module whose forward returns that"
            )
        return features, self.prototypes(), self.logit_scale.exp()  # (B, D), (R, D), ()


class Regression(nn.Module):
    """The paper's regression baseline: one neuron, which starts at the middle rank; L1 or L2 loss.
    Used as OrdinalCLIP is (`target`, `impl`: no effect); probs: of the two nearest ranks."""

    def __init__(self, image_encoder: nn.Module, dim: int, num_ranks: int, loss_type: str) -> None:
        super().__init__()
        if loss_type not in ("l1", "l2"):
            raise ValueError(f"loss_type={loss_type!r}: expected l1 or l2")
        self.image_encoder, self.num_ranks, self.loss_type = image_encoder, num_ranks, loss_type
        self.head = nn.Linear(dim, 1)
        nn.init.constant_(self.head.bias, (num_ranks - 1) / 2)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> rank indices (B,), of any size; float32, also under autocast."""
        features = self.image_encoder(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.to(next(self.head.parameters()).dtype))[:, 0].float()

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        target: str | None = None,
        impl: str = "auto",
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W), ranks (B,) -> (mean loss, the same, 0). ValueError: other labels."""
        loss, predicted = F.l1_loss if self.loss_type == "l1" else F.mse_loss, self(images)
        check_labels(labels, predicted, self.num_ranks)
        own = loss(predicted, labels.float(), reduction="sum")
        sums = torch.stack([own.detach(), own.new_tensor(float(len(labels)))])
        if group is not None:
            dist.all_reduce(sums, group=group)
        total = (sums[0] + (own - own.detach())) / sums[1].clamp_min(1)  # gradient: of own images
        return total, total, torch.zeros_like(total)

    @torch.no_grad()
    def predict(self, images: Tensor, *, impl: str = "auto") -> dict[str, Tensor]:
        """As OrdinalCLIP.predict: dict(rank=nearest (B,), expected (B,), probs (B, R))."""
        ranks = torch.arange(self.num_ranks, device=images.device)
        expected = self(images).clamp(0, self.num_ranks - 1)  # (B,)
        probs = (1 - (expected[:, None] - ranks).abs()).clamp_min(0)  # (B, R)
        return dict(rank=probs.argmax(1), expected=expected, probs=probs)

    def export(self, copy: bool = True) -> "Regression":
        return deepcopy(self) if copy else self


def ordinality(prototypes: Tensor, span: int | None = None, official: bool = False) -> float:
    """How far the prototypes (R, D) are in order: the share of comparisons, in [0, 1], in which
    the nearer rank is the more similar one.

    Rank i is compared with ranks j and j' = j + 1 on its right, and with j and j' = j - 1 on its
    left, as long as |i - j'| <= span (default: all); in order means cos(i, j) > cos(i, j'). Its
    comparison with itself is left out, so unordered prototypes score 1/2. `official=True` scores as
    the paper's figures do: right side only, and j = i counts, which lifts unordered ones above 1/2
    (`ordinality_chance`). Raises ValueError for R < 3, and for a span without comparisons.
    Source: paper Fig. 3; scripts/vis_ordinality.py#L70-L77 (there: ages 15 to 75 of MORPH's 101).
    """
    mask = _comparisons(len(prototypes), span, official)  # (R, R-1)
    rows = unit(prototypes.cpu().double())  # also under autocast
    cosine = rows @ rows.T  # (R, R)
    sides = [cosine] if official else [cosine, cosine.flip(0, 1)]  # flipped: left is right
    is_in_order = [(side[:, :-1] > side[:, 1:])[mask] for side in sides]  # rank i against j, j + 1
    return (torch.cat(is_in_order).double().mean() + 0 * cosine.sum()).item()  # nan stays nan


def ordinality_chance(num_ranks: int, span: int | None = None, official: bool = False) -> float:
    """The expected score of unordered prototypes: 1/2, or more if `official`: j = i always wins."""
    mask = _comparisons(num_ranks, span, official)
    trivial, total = mask.diagonal().sum().item(), mask.sum().item()
    return (trivial + 0.5 * (total - trivial)) / total


def _comparisons(num_ranks, span, official):
    """Which (i, j) count, (R, R-1) bool: j against j + 1, compared with i."""
    first, span = 1 - official, num_ranks - 1 if span is None else span
    if num_ranks < 3 or not 1 + first <= span <= num_ranks - 1:
        raise ValueError(f"R={num_ranks}, span={span}: expected R >= 3, span {1 + first} to R-1")
    i, j = torch.arange(num_ranks)[:, None], torch.arange(num_ranks - 1)
    return (j >= i + first) & (j + 1 - i <= span)


def _lookup(table, ids, name, at_least=0):
    """Rows of the embedding table (V, W) for token ids (M,) -> (M, W)."""
    try:
        words = [operator.index(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError:  # texts, fractions, more than one row
        words = [EOT]  # refused below
    if len(words) < at_least or not all(0 <= i < SOT for i in words) or words[-1:] == [0]:
        got = f"{name} is {' '.join(repr(ids).split()):.80}; expected token ids (N,)"
        raise ValueError(f"{got} without [SOT], [EOT] and padding: tokenizer.encode(text)")
    return F.embedding(torch.tensor(words, dtype=torch.long, device=table.device), table)


def _prompt_layout(contexts_shape, lengths, before):
    """Indices (R, L) into the pool [SOT, ".", EOT, contexts.., ranks..]; lengths (R,) of ranks."""
    num_ranks = len(lengths)
    sizes = 3, contexts_shape.numel(), num_ranks * max(lengths)
    specials, contexts, ranks = torch.arange(sum(sizes)).split(sizes)
    contexts = contexts.view(contexts_shape).expand(num_ranks, -1)  # (R, N)
    prompts = []
    for context, rank, length in zip(contexts, ranks.view(num_ranks, -1), lengths):
        words = [specials[:1], context[:before], rank[:length], context[before:], specials[1:]]
        prompts.append(torch.cat(words))
    return nn.utils.rnn.pad_sequence(prompts, batch_first=True)
