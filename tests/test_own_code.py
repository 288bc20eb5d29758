"""pytest tests/test_own_code.py -- the modules in others' code: their CLIP objects and state dicts,
their training loops, their packages."""

import copy
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_python, run_two
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from clip_model import CLIP, QuickGELU, tiny_clip
from ordinalclip import LinearPrototypes, OrdinalCLIP, RankPrompts, encode_prompts
from training.optim import build_average

ROOT = Path(__file__).parents[1]
CONTEXT = torch.tensor([320, 1125, 539, 518, 3001])


@pytest.fixture(scope="module")
def clip():
    return tiny_clip(embed_dim=48, width=128, layers=3)


# --- CLIP objects of other packages ---


class OpenAIBlock(nn.Module):
    """A text block with the modules of OpenAI's and open_clip's: nn.MultiheadAttention."""

    def __init__(self, block, layer_scale):
        super().__init__()
        self.attn = nn.MultiheadAttention(128, 2)
        self.attn.load_state_dict(block.attn.state_dict())
        self.ln_1, self.ln_2, self.mlp = block.ln_1, block.ln_2, block.mlp
        if layer_scale:
            self.ls_1, self.ls_2 = nn.Identity(), nn.Identity()


def other_clip(clip, layer_scale=False, linear_projection=False):
    other = nn.Module()
    other.transformer = nn.Module()
    blocks = [OpenAIBlock(block, layer_scale) for block in clip.transformer.resblocks]
    other.transformer.resblocks = nn.Sequential(*blocks)
    other.token_embedding, other.ln_final = clip.token_embedding, clip.ln_final
    other.positional_embedding = clip.positional_embedding
    if not linear_projection:
        other.text_projection = clip.text_projection
    else:
        other.text_projection = nn.Linear(128, 48, bias=False)
        other.text_projection.weight.data.copy_(clip.text_projection.T)
    return other


def test_openai_and_open_clip_objects_give_the_same_prototypes(clip):
    torch.manual_seed(0)
    prompts = RankPrompts(clip, 5, context=CONTEXT)
    wrapped = nn.Module()  # open_clip's CustomTextCLIP
    wrapped.text = other_clip(clip, layer_scale=True, linear_projection=True)
    for other in (other_clip(clip), wrapped):
        theirs = RankPrompts(other, 5, context=CONTEXT)
        theirs.load_state_dict(prompts.state_dict())
        torch.testing.assert_close(theirs(), prompts(), rtol=1e-5, atol=1e-5)


def test_layer_scale_is_applied(clip):
    other = other_clip(clip, layer_scale=True)
    prompts = RankPrompts(other, 5, context=CONTEXT)
    before = prompts()
    for block in other.transformer.resblocks:
        block.ls_2 = nn.Dropout(1.0)  # scales by zero in training mode
    assert (prompts() - before).abs().max() > 1e-3


def test_a_tower_that_is_not_clips_is_refused(clip):
    other = other_clip(clip)
    other.transformer.resblocks[0].attn = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match="Module is no CLIP .Linear has no in_proj_weight or q_proj.; ex"
    ):
        RankPrompts(other, 5, context=CONTEXT)


class HuggingFaceBlock(nn.Module):
    """A text block with the names of transformers' CLIPEncoderLayer."""

    def __init__(self, block):
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.num_heads, self.self_attn.out_proj = 2, block.attn.out_proj
        weights, biases = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
        for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases):
            proj = nn.Linear(128, 128)
            proj.weight.data.copy_(weight), proj.bias.data.copy_(bias)
            self.self_attn.add_module(name, proj)
        self.layer_norm1, self.layer_norm2 = block.ln_1, block.ln_2
        fc1, fc2 = block.mlp.c_fc, block.mlp.c_proj
        self.mlp = nn.Sequential()  # calls them in order, as CLIPMLP does
        for name, module in dict(fc1=fc1, activation_fn=QuickGELU(), fc2=fc2).items():
            self.mlp.add_module(name, module)


def hugging_face_clip(clip):
    """The text tower of a CLIPModel, which transformers 5.24 was found to agree with."""
    other, text = nn.Module(), nn.Module()
    text.embeddings, text.encoder = nn.Module(), nn.Module()
    text.embeddings.token_embedding = clip.token_embedding
    text.embeddings.position_embedding = nn.Embedding(77, 128)
    text.embeddings.position_embedding.weight.data.copy_(clip.positional_embedding)
    text.encoder.layers = nn.ModuleList(map(HuggingFaceBlock, clip.transformer.resblocks))
    text.final_layer_norm = clip.ln_final
    other.text_model, other.text_projection = text, nn.Linear(128, 48, bias=False)
    other.text_projection.weight.data.copy_(clip.text_projection.T)
    return other


@pytest.mark.parametrize("position", ["tail", "middle"])
def test_hugging_faces_clip_gives_the_same_prototypes(clip, position):
    torch.manual_seed(0)
    ours = RankPrompts(clip, 5, context=CONTEXT, rank_position=position)
    theirs = RankPrompts(hugging_face_clip(clip), 5, context=CONTEXT, rank_position=position)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs(), ours(), rtol=1e-5, atol=1e-5)
    for prompts in (ours, theirs):
        prompts()[:, 0].sum().backward()
    torch.testing.assert_close(theirs.rank_embeds.grad, ours.rank_embeds.grad, rtol=1e-4, atol=1e-5)
    features = encode_prompts(hugging_face_clip(clip), *ours.prompt_embeds())
    torch.testing.assert_close(features, ours(), rtol=1e-5, atol=1e-5)
    frozen = theirs._text[0].parameters()
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_other_models_are_refused(clip):
    small = copy.copy(clip)
    small._modules = dict(clip._modules, token_embedding=nn.Embedding(32000, 128))
    siglip = other_clip(clip)
    siglip.attn_mask = None  # as open_clip's text towers without a causal mask
    coca = other_clip(clip)
    coca.cls_emb = nn.Parameter(torch.zeros(128))
    for model, message in (
        (
            nn.Linear(2, 2),
            "Linear is no CLIP .*; expected both towers of ours, OpenAI's, open_clip",
        ),
        (small, "CLIP: the text tower is not CLIP's .32000 tokens, not 49408.$"),
        (siglip, "Module: the text tower is not CLIP's .its attention is not causal.$"),
        (coca, "Module: the text tower is not CLIP's .it has a class embedding, as CoCa's.$"),
    ):
        with pytest.raises(ValueError, match=message):
            RankPrompts(model, 5, context=CONTEXT)


# --- state dicts ---

NAMES = [[1000 + i] for i in range(5)]


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(interp="inverse"), "another interp"),
        (dict(rank_position="front"), "another rank_position"),
        (dict(interp="inverse", rank_position="middle"), "another interp, rank_position"),
        (dict(num_ranks=6), "another number of ranks"),
        (dict(rank_tokens=[[1, 2], [3]]), "another prompt length .context, rank names."),
        (dict(clip=tiny_clip(seed=1, embed_dim=48, width=128, layers=3)), "another text tower"),
        (dict(clip="gelu"), "another text tower"),
        (dict(clip="wider"), "another text tower"),
    ],
)
def test_a_state_dict_of_other_prompts_is_refused(clip, changed, message):
    """Their parameters have the same shapes: without a word the logits would be others."""
    options = dict(clip=clip, num_ranks=5, context=CONTEXT)
    if "rank_tokens" in changed:
        changed = dict(rank_tokens=[[1], [3, 4]])
        options |= dict(num_ranks=2, interp="none", rank_tokens=[[1, 2], [3]])
    if changed.get("clip") == "gelu":
        changed = dict(clip=CLIP.from_state_dict(clip.state_dict(), quick_gelu=False))
    if changed.get("clip") == "wider":
        changed = dict(clip=tiny_clip(embed_dim=64, width=128, layers=3))
    state = RankPrompts(**options).state_dict()
    other = RankPrompts(**options | changed)
    with pytest.raises(ValueError, match=f"a state dict of prompts with {message}; build the same"):
        other.load_state_dict(state)
    other.load_state_dict({key: v for key, v in state.items() if key != "_extra_state"})
    model = OrdinalCLIP(clip.visual, other, 3.0)
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(OrdinalCLIP(clip.visual, RankPrompts(**options), 3.0).state_dict())


def test_state_dicts_of_the_same_prompts_are_read(clip):
    prompts = RankPrompts(clip, 5, context=CONTEXT, rank_tokens=NAMES)
    state = prompts.state_dict()
    for precision in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        other = RankPrompts(copy.deepcopy(clip).to(precision), 5, context=CONTEXT)
        other.load_state_dict(state)
        assert torch.equal(other.rank_embeds, prompts.rank_embeds)
    older = {key: value for key, value in state.items() if key != "_extra_state"}
    for strict in (True, False):
        other = RankPrompts(clip, 5, context=CONTEXT)
        assert other.load_state_dict(older, strict=strict) == ([], [])
        assert torch.equal(other.rank_embeds, prompts.rank_embeds)
    with pytest.raises(RuntimeError, match="Missing key.*rank_embeds"):
        other.load_state_dict({"context_embeds": state["context_embeds"]})


# --- what models are given ---


class Outputs(nn.Module):
    """An encoder that returns what transformers' models return."""

    def forward(self, images):
        return dict(pooler_output=images.flatten(1))


def test_models_refuse_what_is_no_tensor():
    images, prototypes = torch.randn(2, 3, 4, 4), LinearPrototypes(3, 48)
    model = OrdinalCLIP(nn.Flatten(), prototypes, 3.0)
    with pytest.raises(
        ValueError, match=r"labels is a list; expected rank indices \(B,\): torch.t"
    ):
        model.loss(images, [0, 1])
    model = OrdinalCLIP(Outputs(), prototypes, 3.0)
    for call in (model, model.predict, lambda x: model.loss(x, torch.tensor([0, 1]))):
        with pytest.raises(ValueError, match=r"the image encoder gives a dict; expected a tensor"):
            call(images)


@pytest.mark.parametrize(
    "scale", [100, 100.0, torch.tensor(14.3), float("nan"), 7.1, torch.ones(2)]
)
def test_a_temperature_that_is_no_log_is_refused(scale):
    with pytest.raises(
        ValueError, match="expected one number from -7 to 7, .*: math.log.100., not"
    ):
        OrdinalCLIP(nn.Flatten(), LinearPrototypes(3, 48), scale)


# --- training loops ---


def model_of(vision="vit"):
    clip = tiny_clip(vision=vision, embed_dim=48, layers=2, image_size=32)
    torch.manual_seed(0)
    clip.visual.requires_grad_(True)
    return OrdinalCLIP(clip.visual, RankPrompts(clip, 5, context=2), clip.logit_scale)


def batch():
    torch.manual_seed(1)
    return torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 1, 3, 4, 0])


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, (images, labels) = model_of(), batch()
    exact = gradients(model, model.loss(images, labels)[0])
    with torch.autocast("cpu", dtype):
        total, i2t, t2i = model.loss(images, labels)
        assert model.image_encoder(images).dtype == dtype
    assert total.dtype == torch.float32  # softmax over ranks and batch in full precision
    mixed = gradients(model, total)
    for name, grad in mixed.items():
        assert (grad - exact[name]).norm() < 0.1 * exact[name].norm() + 1e-3, name


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compile(backend):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")
    model, (images, labels) = model_of(), batch()
    total = model.loss(images, labels)[0]
    exact = gradients(model, total)
    compiled = torch.compile(model.loss, backend=backend)
    got = compiled(images, labels)[0]
    torch.testing.assert_close(got, total, rtol=1e-4, atol=1e-4)
    for name, grad in gradients(model, got).items():
        torch.testing.assert_close(grad, exact[name], rtol=1e-3, atol=1e-4)


def test_activation_checkpointing():
    model, (images, labels) = model_of(), batch()
    exact = gradients(model, model.loss(images, labels)[0])
    for module in (model.image_encoder, model.prototypes):  # their outputs are computed again
        forward = module.forward
        module.forward = lambda *x, f=forward: checkpoint(f, *x, use_reentrant=False)
    for name, grad in gradients(model, model.loss(images, labels)[0]).items():
        torch.testing.assert_close(grad, exact[name], rtol=1e-5, atol=1e-6)


def test_averaged_model(clip):
    model, (images, labels) = model_of(), batch()
    averaged = AveragedModel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    history = []
    for _ in range(2):
        model.loss(images, labels)[0].backward()
        optimizer.step()
        averaged.update_parameters(model)
        history.append(model.prototypes.rank_embeds.detach().clone())
    mean = (history[0] + history[1]) / 2
    torch.testing.assert_close(averaged.module.prototypes.rank_embeds.detach(), mean)
    averaged.module.export().eval().predict(images)
    other = AveragedModel(model_of())
    other.load_state_dict(averaged.state_dict())
    torch.testing.assert_close(other.module(images), averaged.module(images))


def test_a_moving_average_keeps_the_layout_of_the_prompts():
    """Buffers of integers are copied: their mean, rounded down, would be another position."""
    model, (images, _) = model_of(), batch()
    model.eval()
    average = build_average(Namespace(ema=0.9), model)
    for _ in range(3):
        average.update_parameters(model)
    torch.testing.assert_close(average.module(images), model(images), rtol=1e-4, atol=1e-4)


def shard(rank, store, out):
    """One process of FSDP2: parameters in shards, temperature and text tower whole."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, (images, labels) = model_of(), batch()
    fully_shard(model.image_encoder, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    total = model.loss(images[rank::2], labels[rank::2], group=dist.group.WORLD)[0]
    total.backward()
    grad = model.image_encoder.conv1.weight.grad.full_tensor()
    if rank == 0:
        torch.save(dict(total=total.detach(), grad=grad * 2), out)  # FSDP averages
    dist.destroy_process_group()


def test_fsdp2_equals_one_process(tmp_path):
    run_two(shard, tmp_path / "store", tmp_path / "out.pt")
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    model, (images, labels) = model_of(), batch()
    total = model.loss(images, labels)[0]
    exact = gradients(model, total)
    torch.testing.assert_close(got["total"], total.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        got["grad"], exact["image_encoder.conv1.weight"], rtol=1e-4, atol=1e-5
    )


def unsynchronised(rank, store):
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    model = OrdinalCLIP(nn.Flatten(), LinearPrototypes(3, 48), 3.0)
    ddp = nn.parallel.DistributedDataParallel(model)
    images, labels = torch.randn(2, 3, 4, 4), torch.tensor([0, 2])
    with pytest.warns(UserWarning, match="loss of this process alone: pass group=dist.group.WORLD"):
        ddp.module.loss(images, labels)
    dist.destroy_process_group()


def test_a_loss_past_ddp_is_not_silent(tmp_path):
    run_two(unsynchronised, tmp_path / "store")


# --- in a package ---


def test_pasted_into_a_package(tmp_path):
    """mylib/ordinalclip.py finds kernels/ beside it, and no other kernels; so does clip_model.py."""
    (tmp_path / "mylib").mkdir()
    (tmp_path / "mylib" / "__init__.py").touch()
    for name in ("kernels.py", "clip_weights.py"):
        (tmp_path / name).write_text("raise ImportError('another module of that name')")
    for name in ("ordinalclip.py", "clip_model.py", "clip_weights.py"):
        shutil.copy(ROOT / name, tmp_path / "mylib")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels", tmp_path / "mylib" / "kernels", ignore=ignore)
    code = """import torch; from mylib.ordinalclip import OrdinalCLIP, RankPrompts
from mylib.clip_model import CLIP, tiny_clip
clip = CLIP.from_state_dict(tiny_clip().state_dict())
model = OrdinalCLIP(clip.visual, RankPrompts(clip, 3, context=2), clip.logit_scale)
print(model.loss(torch.randn(2, 3, 64, 64), torch.tensor([0, 2]))[0].isfinite().item())"""
    process = run_python(code, tmp_path)
    assert process.returncode == 0 and process.stdout.strip() == "True", process.stderr
