"""pytest tests/test_distributed.py -- two processes equal one."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TINY
from processes import run_script, run_two

from clip_model import tiny_clip
from ordinalclip import OrdinalCLIP, RankPrompts, Regression
from training.distributed import all_gather_rows, data_parallel, init_distributed
from training.methods import LossModule

ROOT = Path(__file__).parents[1]


def vit_model():
    clip = tiny_clip(vision="vit")  # no batch norm: its statistics are each process's own
    torch.manual_seed(0)
    return OrdinalCLIP(clip.visual.train(), RankPrompts(clip, 5, context=2), clip.logit_scale)


def regression_model():
    torch.manual_seed(2)
    return Regression(torch.nn.Flatten(), 3 * 64 * 64, 5, "l2")


def batch():
    torch.manual_seed(1)
    return torch.randn(8, 3, 64, 64), torch.tensor([0, 1, 1, 3, 3, 3, 4, 0])


def take_step(model):
    """-> gradients and parameters after a step of SGD, whose length follows the gradient's."""
    params = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(params, lr=0.01).step()
    return [p.grad for p in params], [p.detach() for p in params]


def step_of_two(rank, store, out):
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, (images, labels) = vit_model(), batch()
    loss_module = data_parallel(LossModule(model, "normalized"))
    total, _, _ = loss_module(images[rank::2], labels[rank::2])
    (total * 2).backward()  # DistributedDataParallel averages
    grads, params = take_step(model)
    rows, regression = all_gather_rows(labels[rank::2]), regression_model()
    shares = slice(5 * rank, 5 + 3 * rank)  # 5 and 3 images
    loss = regression.loss(images[shares], labels[shares], group=dist.group.WORLD)[0]
    loss.backward()
    dist.all_reduce(regression.head.weight.grad)
    saved = dict(total=total.detach(), grads=grads, params=params, rows=rows)
    saved |= dict(regression=loss.detach(), head=regression.head.weight.grad)
    torch.save(saved, f"{out}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_take_the_step_of_one(tmp_path):
    run_two(step_of_two, tmp_path / "store", tmp_path / "out")
    model, (images, labels) = vit_model(), batch()
    total, _, _ = model.loss(images, labels)
    total.backward()
    grads, params = take_step(model)
    regression = regression_model()
    loss = regression.loss(images, labels)[0]
    loss.backward()
    for rank in range(2):
        shared = torch.load(tmp_path / f"out{rank}.pt", weights_only=True)
        torch.testing.assert_close(shared["total"], total.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(shared["rows"], labels)
        torch.testing.assert_close(shared["regression"], loss.detach())
        torch.testing.assert_close(shared["head"], regression.head.weight.grad)
        for a, b in zip(shared["grads"], grads, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6
        for a, b in zip(shared["params"], params, strict=True):
            assert (a - b).abs().max() <= 1e-6


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])  # as asked for, as a resumed run has it
def test_each_process_has_a_gpu_of_its_own(monkeypatch, device):
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", calls.append)
    for name, value in dict(WORLD_SIZE="4", RANK="3", LOCAL_RANK="3", MASTER_ADDR="x").items():
        monkeypatch.setenv(name, value)
    args = Namespace(device=device)
    init_distributed(args)
    assert args.device == "cuda:3" and calls == [3, "nccl"]
    monkeypatch.delenv("WORLD_SIZE")
    args = Namespace(device="cuda:1")
    init_distributed(args)
    assert args.device == "cuda:1" and calls[2:] == [1]


def test_torchrun_trains_and_writes_once(gray, tmp_path):
    """Fewer validation images than processes: the second one reads none."""
    for part, count in (("train", 8), ("val", 1), ("test", 3)):
        lines = [f"{i % 4} gray/{i}.png {i % 4}" for i in range(count)]
        (tmp_path / f"{part}.txt").write_text("\n".join(lines) + "\n")
    lists = [f"--{part}-list={tmp_path}/{part}.txt" for part in ("train", "val", "test")]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "29518", "train.py", "--data", str(gray), *TINY, *lists]
    out = tmp_path / "run"
    process = run_script([*command, "--out", str(out)], ROOT)
    assert process.returncode == 0, process.stderr[-2000:]
    results = json.loads((out / "results.json").read_text())
    assert results["processes"] == 2 and results["images"] == dict(train=8, val=1, test=3)
    assert len((out / "predictions-best.csv").read_text().splitlines()) == 4
