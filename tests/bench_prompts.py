"""python tests/bench_prompts.py -- encode_prompts against all 77 tokens, forward + backward.

RN50's text tower with random weights, R=101 ranks, 10 context tokens, K=3, rank at the tail; both
ways in turn on the same processor. Prints median times, their ratio, and the largest differences.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from clip_model import CLIP, ModifiedResNet
from ordinalclip import RankPrompts

RANKS, CONTEXT, ROUNDS = 101, 10, 5


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    visual = ModifiedResNet((1, 1, 1, 1), 1024, 224, width=16)  # not used here
    text = dict(embed_dim=1024, width=512, layers=12)
    clip = CLIP(visual, **text, quick_gelu=True).eval().to(device)
    prompts = RankPrompts(clip, RANKS, context=CONTEXT).to(device)
    gradient = torch.randn(RANKS, 1024, device=device)

    def all_77():
        shared, own, eot = prompts.prompt_embeds()
        used = len(shared) + own.shape[1]
        padding = clip.token_embedding.weight[0].detach().expand(RANKS, 77 - used, -1)
        x = torch.cat([shared.expand(RANKS, -1, -1), own, padding], 1) + clip.positional_embedding
        x = clip.ln_final(clip.transformer(x))  # (R, 77, W)
        return x[torch.arange(RANKS, device=device), len(shared) + eot] @ clip.text_projection

    def step(forward):
        prompts.zero_grad()
        start = time.perf_counter()
        out = forward()
        out.backward(gradient)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return seconds, [out.detach(), *(p.grad.clone() for p in prompts.parameters())]

    (_, slow), (_, fast) = step(all_77), step(prompts)  # also the warm-up
    error = [((a - b).norm() / b.norm()).item() for a, b in zip(fast, slow)]
    pairs = [(step(all_77)[0], step(prompts)[0]) for _ in range(ROUNDS)]
    times = [statistics.median(column) for column in zip(*pairs)]
    ratios = sorted(a / b for a, b in pairs)
    machine = f"{torch.get_num_threads()} CPU threads"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}: ", end="")
    print(f"77 tokens {times[0]:.3f} s, shared prefix {times[1]:.4f} s")
    ratio = statistics.median(ratios)
    print(f"ratio {ratio:.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}, {ROUNDS} pairs)")
    print("relative difference: prototypes {:.1e}, d context {:.1e}, d ranks {:.1e}".format(*error))


if __name__ == "__main__":
    main()
