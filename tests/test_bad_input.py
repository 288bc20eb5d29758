"""pytest tests/test_bad_input.py -- train.py answers bad input in one line, before anything is read.

Each row: what is given, and the whole message. test_bad_data.py and test_bad_weights.py are the
same for images and lists, and for weights and checkpoints.
"""

import json
import os
import shutil

import pytest
from conftest import TINY, TINY_MODEL

import train

MAX_SEED = 2**32 - 1
NUMBER = "expected a number from 0, or all"
DEVICE = "expected cpu, cuda or cuda:N"
CONTEXT = "expected words, or a number of tokens from 1"
SHIFT = "expected 1 .. 4 ranks and a share above 0, at most 1"
CLIP_ENCODER = "needs --image-encoder clip: the last layer of the others starts at random"
PATTERN = (
    "expected one capture group, or (?P<label>...), and perhaps (?P<group>...); write (?:...) for "
)
PATTERN += "other parentheses"
BINS = "expected a number of bins, 2 .. 10,000, or rising edges such as 0,1.5,3,10"
RANKS = "expected whole numbers LOW-HIGH, at most 10,000 ranks, such as 16-77, or present"
FROM_CHECKPOINT = "settings come from the checkpoint; leave them out, or start a new run"

PARSER = [  # refused by the parser: after "error: "
    ("--lr 0.1 --resume x", f"--lr: {FROM_CHECKPOINT}"),
    ("--data x --epochs 3 --eval x", f"--data, --epochs: {FROM_CHECKPOINT}"),
    ("--methodd coop", "unrecognized arguments: --methodd coop"),
    ("runs/a", "unrecognized arguments: runs/a"),
    ("--epoch 3", "unrecognized arguments: --epoch 3"),
    ("--report x --lr 1", "--report takes no other flag"),
    ("--report", "argument --report: expected at least one argument"),
    ("--resume", "argument --resume: expected one argument"),
    ("--seed 1 --seeds 1 2", "--seed and --seeds: give one of them"),
    ("--seeds", "argument --seeds: expected at least one argument"),
    ("--seeds a", "argument --seeds: invalid int value: 'a'"),
    ("--seed 1e3", "argument --seed: invalid int value: '1e3'"),
    ("--epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
    ("--workers a", "argument --workers: invalid int value: 'a'"),
    ("--lr fast", "argument --lr: invalid float value: 'fast'"),
    ("--fold some", f"argument --fold: 'some': {NUMBER}"),
    ("--fold ²", f"argument --fold: '²': {NUMBER}"),
    ("--fold ٣", f"argument --fold: '٣': {NUMBER}"),
    ("--fold -1", f"argument --fold: '-1': {NUMBER}"),
    ("--shift ten", "argument --shift: 'ten': expected RANKS,KEEP such as 10,0.2"),
    ("--shift 10", "argument --shift: '10': expected RANKS,KEEP such as 10,0.2"),
    ("--shift 1,2,3", "argument --shift: '1,2,3': expected RANKS,KEEP such as 10,0.2"),
    ("--save-every x", "argument --save-every: invalid float value: 'x'"),
    ("--ema x", "argument --ema: invalid float value: 'x'"),
    ("--accumulate x", "argument --accumulate: invalid int value: 'x'"),
    ("--warmup x", "argument --warmup: invalid int value: 'x'"),
    ("--patience x", "argument --patience: invalid int value: 'x'"),
    ("--weight-decay x", "argument --weight-decay: invalid float value: 'x'"),
    ("--batch-size 1.5", "argument --batch-size: invalid int value: '1.5'"),
    ("--base-ranks two", "argument --base-ranks: invalid int value: 'two'"),
    ("--shots many", "argument --shots: invalid int value: 'many'"),
    ("--skip-bad 3", "unrecognized arguments: 3"),
]
VALUES = [  # out of range, on images that are there
    ("--shots 0", "--shots 0: expected 1 .. 1000000"),
    ("--shots 1 -1", "--shots -1: expected 1 .. 1000000"),
    ("--shots 4 4", "--shots names 4 twice; name each value once"),
    ("--epochs 0", "--epochs 0: expected 1 .. 1000000; --method zeroshot does without training"),
    ("--epochs -3", "--epochs -3: expected 1 .. 1000000; --method zeroshot does without training"),
    ("--base-ranks 4 1", "--base-ranks 1: expected 2 .. 10000; with 1 base rank every interpolated "
        "rank is the same vector"),
    ("--base-ranks 5", "--base-ranks 5, but {data} has 4 ranks; give at most 4"),
    ("--base-ranks 2 9", "--base-ranks 9, but {data} has 4 ranks; give at most 4"),
    ("--lr nan", "--lr nan: expected 1e-12 .. 1000.0"),
    ("--lr inf", "--lr inf: expected 1e-12 .. 1000.0"),
    ("--lr 0", "--lr 0.0: expected 1e-12 .. 1000.0"),
    ("--lr -1", "--lr -1.0: expected 1e-12 .. 1000.0"),
    ("--warmup 1", "--warmup 1: expected 0 .. 0; it must be below --epochs"),
    ("--weight-decay -5", "--weight-decay -5.0: expected 0 .. 1000.0"),
    ("--weight-decay nan", "--weight-decay nan: expected 0 .. 1000.0"),
    ("--batch-size 0", "--batch-size 0: expected 1 .. 1000000"),
    ("--workers -1", "--workers -1: expected 0 .. {max_workers}"),
    ("--workers 999", "--workers 999: expected 0 .. {max_workers}"),
    ("--seed -1", f"--seed -1: expected 0 .. {MAX_SEED}"),
    ("--seed 99999999999999999999", f"--seed 99999999999999999999: expected 0 .. {MAX_SEED}"),
    ("--seeds 1 -2", f"--seeds -2: expected 0 .. {MAX_SEED}"),
    ("--seeds 1 1", "--seeds names 1 twice; name each value once"),
    ("--split-seed -1", f"--split-seed -1: expected 0 .. {MAX_SEED}"),
    ("--save-every nan", "--save-every nan: expected 0 .. 1000000.0"),
    ("--save-every -1", "--save-every -1.0: expected 0 .. 1000000.0"),
    ("--device gpu", f"--device 'gpu': {DEVICE}"),
    ("--device meta", f"--device 'meta': {DEVICE}"),
    ("--device cuda:77", "--device cuda:77: this machine has {gpus} CUDA device(s)"),
    ("--method zeroshot --context 5", "--context '5': expected words"),
    ("--context ²", f"--context '²': {CONTEXT}"),
    ("--context 0", f"--context '0': {CONTEXT}"),
    ("--context -1", f"--context '-1': {CONTEXT}"),
    ("--context 1.5", f"--context '1.5': {CONTEXT}"),
    ("--context 9999", "train.py: a prompt of 10003 tokens, with [SOT], '.' and [EOT]; the text "
        "tower reads 77: shorten the context or the rank names"),
    ("--shift 0,0.5", f"train.py: shift of 0 ranks to 0.5: {SHIFT}"),
    ("--shift 99,0.5", f"train.py: shift of 99 ranks to 0.5: {SHIFT}"),
    ("--shift 1,0", f"train.py: shift of 1 ranks to 0.0: {SHIFT}"),
    ("--shift 1,2", f"train.py: shift of 1 ranks to 2.0: {SHIFT}"),
    ("--shift 1,nan", f"train.py: shift of 1 ranks to nan: {SHIFT}"),
    ("--resume=", "--resume is empty; give a value, or leave it out"),
    ("--eval=", "--eval is empty; give a value, or leave it out"),
    ("--init=", "--init is empty; give a value, or leave it out"),
    ("--data=", "--data is empty; give a value, or leave it out"),
    ("--out=", "--out is empty; give a value, or leave it out"),
    ("--device=", "--device is empty; give a value, or leave it out"),
    ("--clip=", "--clip is empty; give a value, or leave it out"),
    ("--accumulate 0", "--accumulate 0: expected 1 .. 10000"),
    ("--warmup -1", "--warmup -1: expected 0 .. 0; it must be below --epochs"),
    ("--patience 0", "--patience 0: expected 1 .. 1000000"),
    ("--ema 1", "--ema 1.0: expected 0.0 .. 0.999999"),
    ("--ema -0.5", "--ema -0.5: expected 0.0 .. 0.999999"),
    ("--lr-image 0", "--lr-image 0.0: expected 1e-12 .. 1000.0"),
    ("--lr-prompts nan", "--lr-prompts nan: expected 1e-12 .. 1000.0"),
    ("--device cuda", "--device cuda: this machine has {gpus} CUDA device(s)"),
    ("--device mps", f"--device 'mps': {DEVICE}"),
    ("--label-pattern=", "--label-pattern is empty; give a value, or leave it out"),
    ("--ranks=", "--ranks is empty; give a value, or leave it out"),
    ("--bins=", "--bins is empty; give a value, or leave it out"),
    ("--group=", "--group is empty; give a value, or leave it out"),
    ("--label-pattern (", "train.py: label pattern '(' is no regular expression: missing ), "
        "unterminated subpattern at position 0"),
    ("--label-pattern x", f"train.py: label pattern 'x': {PATTERN}"),
    ("--label-pattern (a)(b)", f"train.py: label pattern '(a)(b)': {PATTERN}"),
    ("--label-pattern (?P<age>.)", f"train.py: label pattern '(?P<age>.)': {PATTERN}"),
    ("--label-pattern (zzz)", "train.py: {data}: the label pattern matches no name of 70 images, "
        "such as '0.png', '1.png', '2.png'"),
    ("--label-pattern ([a-z]+)", "train.py: {data}: the order of rank 'png' is not known; name the "
        "ranks in {data}/ranks.txt, one a line, lowest first"),
    (r"--label-pattern (\d+) --group person", "train.py: group column 'person', but a label "
        "pattern: write (?P<group>...) in it"),
    ("--group person", "train.py: {data} has no table with the group column 'person'"),
    ("--split leave-one-group-out", "train.py: {data}: split leave-one-group-out needs a group "
        "column, or (?P<group>...) in the label pattern"),
    (r"--label-pattern (?P<group>\d)(?P<label>\d) --split leave-one-group-out --fold 99",
        "train.py: {data} has no fold 99; give 0 .. 2"),
    (r"--label-pattern (\d+) --bins 0", f"train.py: bins '0': {BINS}"),
    (r"--label-pattern (\d+) --bins 1", f"train.py: bins '1': {BINS}"),
    (r"--label-pattern (\d+) --bins x", f"train.py: bins 'x': {BINS}"),
    (r"--label-pattern (\d+) --bins 3,2,1", f"train.py: bins '3,2,1': {BINS}"),
    (r"--label-pattern (\d+) --bins 0,1", f"train.py: bins '0,1': {BINS}"),
    (r"--label-pattern (\d+) --bins 0,nan,2", f"train.py: bins '0,nan,2': {BINS}"),
    (r"--label-pattern (\d+) --bins 20000", f"train.py: bins '20000': {BINS}"),
    (r"--label-pattern (\d+) --bins=-1,-2", f"train.py: bins '-1,-2': {BINS}"),
    (r"--label-pattern (\d+) --bins 0,1,2 --ranks 0-5",
        "train.py: ranks '0-5' has no effect with bins '0,1,2'; remove it"),
    (r"--label-pattern (\d+) --bins 3 --ranks present",
        "train.py: ranks 'present' has no effect with bins '3'; remove it"),
    (r"--label-pattern (\d+) --bins 3 --ranks 7",
        "train.py: ranks '7': expected LOW-HIGH such as 16-77, or present"),
    (r"--label-pattern (\d+) --ranks 5-1", f"train.py: ranks '5-1': {RANKS}"),
    (r"--label-pattern (\d+) --ranks x", f"train.py: ranks 'x': {RANKS}"),
    (r"--label-pattern (\d+) --ranks 0-99999", f"train.py: ranks '0-99999': {RANKS}"),
    (r"--label-pattern (\d+) --ranks 0.5-2", f"train.py: ranks '0.5-2': {RANKS}"),
    (r"--label-pattern (\d+) --ranks 90-99", "train.py: 70 labels are not within 90 .. 99, such as "
        "0 of 0 gray/0.png, 1 of 0 gray/1.png, 2 of 0 gray/2.png"),
    ("--bins 3", "train.py: label '0 gray' of 0 gray/0.png is no number, as ranks and bins need"),
]  # fmt: skip
NO_LR = (
    "has no effect with --method ordinalclip and rates of its own for all that trains; remove it"
)
NO_EFFECT = [  # flags that go together with no other of the command
    ("--freeze-image --image-encoder vgg16", f"--freeze-image {CLIP_ENCODER}"),
    ("--method zeroshot --image-encoder vgg16", f"--method zeroshot {CLIP_ENCODER}"),
    ("--method coop --base-ranks 2 4",
        "--base-ranks has no effect with --method coop; remove it"),
    ("--method coop --interp inverse", "--interp has no effect with --method coop; remove it"),
    ("--method linear --interp inverse", "--interp has no effect with --method linear; remove it"),
    ("--method regression --tune rank", "--tune has no effect with --method regression; remove it"),
    ("--method zeroshot --seeds 1 2", "--seeds has no effect with --method zeroshot; remove it"),
    ("--regression-loss l2",
        "--regression-loss has no effect with --method ordinalclip; remove it"),
    ("--image-weights none", "--image-weights has no effect with --image-encoder clip; remove it"),
    ("--quick-gelu",
        "--quick-gelu has no effect with --clip tiny and --method ordinalclip; remove it"),
    ("--patience 3 --epochs 3",
        "--patience has no effect with --method ordinalclip and 3 epochs; remove it"),
    ("--ema 0", "--ema has no effect with --method ordinalclip and DECAY 0.0; remove it"),
    ("--shift 1,1", "--shift has no effect with --method ordinalclip and its share of images; "
        "remove it"),
    ("--shift 1,0.5 1,0.50", "--shift names 1,0.5 twice; name each value once"),
    ("--lr-image 1e-3 --lr-prompts 1e-3", f"--lr {NO_LR}"),
    ("--freeze-image --lr-prompts 1e-3", f"--lr {NO_LR}"),
    ("--train-list x.txt --val-list y.txt --fold all",
        "--fold has no effect with --data {data} and its lists; remove it"),
    ("--val-list x.txt", "--val-list and --test-list need a --train-list"),
    ("--category each", "--category each: {data} has no categories; leave it out"),
    ("--category nature", "train.py: {data} has no category, got 'nature'; leave it out"),
    ("--label-rule x", "train.py: {data} has no label_rule, got 'x'; leave it out"),
    ("--split x", "train.py: {data} has no split 'x'; give random or "
        "leave-one-group-out"),
    ("--official --no-draft", "--no-draft has no effect with --official; remove it"),
    (r"--train-list x.txt --label-pattern (\d)",
        "--label-pattern has no effect with --data {data} and its lists; remove it"),
    ("--method zeroshot --epochs 3", "--epochs has no effect with --method zeroshot; remove it"),
    ("--method linear --context words", "--context has no effect with --method linear; remove it"),
    ("--method linear --rank-init names",
        "--rank-init has no effect with --method linear; remove it"),
    ("--method linear --rank-position front",
        "--rank-position has no effect with --method linear; remove it"),
    ("--profile --accumulate 2", "--profile times steps of one batch; leave --accumulate out"),
]  # fmt: skip
CHECKPOINT = "give a run's folder, or a best.pt or last.pt"
FILES = [  # names of things that are not there
    ("--report none", "no finished run in none; give folders of runs\n- left out none: no such folder"),
    ("--resume none", "no checkpoint at none; " + CHECKPOINT),
    ("--eval none", "no checkpoint at none; " + CHECKPOINT),
    ("--eval {data}", "no checkpoint at {data}/best.pt; " + CHECKPOINT),
    ("--resume {data}", "no checkpoint at {data}/last.pt; " + CHECKPOINT),
    ("--init none", "no checkpoint at none; " + CHECKPOINT),
    ("--train-list none.txt", "--train-list none.txt is not there; give a list file `path label`"),
    ("--train-list {data}", "--train-list {data} is a folder; give a list file `path label`"),
    ("--data-root none", "train.py: there is no folder none, given as the data root; correct the path"),
    ("--data none", "train.py: there is no dataset or folder 'none'; give adience, aesthetics, "
        "demo, hci, morph2 or a folder of own data"),
    ("--data adience --fold 9", "train.py: adience has no fold 9; give 0 .. 4"),
    ("--image-encoder vgg61", "train.py: image encoder 'vgg61': expected one of vgg16, timm:NAME, "
        "torchvision:NAME"),
    ("--image-encoder vgg16 --image-weights none.pth",
        "train.py: no weights at none.pth; expected 'imagenet' or a state dict file"),
]  # fmt: skip
TINY_FLAGS = {"--method zeroshot": TINY_MODEL, "--report": [], "--resume": [], "--eval": []}


def test_a_world_size_without_torchrun_is_named(gray, tmp_path, monkeypatch):
    argv = ["--data", str(gray), *TINY, "--out"]
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="WORLD_SIZE is set without RANK; start train.py with tor"):
        train.main([*argv, str(tmp_path / "a")])
    monkeypatch.setenv("WORLD_SIZE", "1")
    train.main([*argv, str(tmp_path / "b")])


@pytest.mark.parametrize("command, message", PARSER)
def test_flags_that_do_not_parse(capsys, command, message):
    with pytest.raises(SystemExit):
        train.parse_args(command.split())
    assert capsys.readouterr().err.strip().endswith(f"error: {message}")


@pytest.mark.parametrize("command, message", VALUES + NO_EFFECT + FILES)
def test_one_line_says_what_is_wrong(gray, tmp_path, command, message):
    common = next((flags for word, flags in TINY_FLAGS.items() if word in command), TINY)
    if "--report" not in command and "--resume" not in command and "--eval" not in command:
        common = ["--data", str(gray), *common, "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as error:
        train.main([*common, *(word.format(data=gray) for word in command.split())])
    cpus, gpus = os.cpu_count() or 1, train.torch.cuda.device_count()
    names = dict(data=gray, max_workers=max(64, 2 * cpus), gpus=gpus)
    assert error.value.code == message.format(**names)
    assert not [*tmp_path.rglob("*.pt")]


EMPTY = "Expecting value: line 1 column 1 (char 0)"
NO_SETTINGS = "it holds no 'settings'"
DAMAGED = {"": EMPTY, "null": NO_SETTINGS, "[]": NO_SETTINGS, "3": NO_SETTINGS, "{}": NO_SETTINGS,
    '{"settings": null}': NO_SETTINGS, '{"settings": []}': NO_SETTINGS, "\ufeff{}": "Unexpected "
    "UTF-8 BOM (decode using utf-8-sig): line 1 column 1 (char 0)"}  # fmt: skip


@pytest.fixture(scope="module")
def damaged_run(finished_run, tmp_path_factory):
    """A copy, with config.json alone to say what it is."""
    run_dir = shutil.copytree(finished_run[0], tmp_path_factory.mktemp("damaged") / "run")
    (run_dir / "results.json").unlink()
    return run_dir


@pytest.mark.parametrize("text", DAMAGED)
@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_damaged_json_is_named(stripes, damaged_run, name, text):
    path = damaged_run / name
    message = f"{path} is damaged ({DAMAGED[text]}); restore it, or move it away and repeat the "
    message += "command of the run"
    original = path.read_bytes() if path.exists() else None
    path.write_text(text, encoding="utf-8")
    commands = [["--data", str(stripes), *TINY, "--epochs", "3", "--out", str(damaged_run)]]
    if name == "config.json":
        commands.append(["--eval", str(damaged_run)])
    for command in commands:
        with pytest.raises(SystemExit) as error:
            train.main(command)
        assert error.value.code == message
    path.unlink() if original is None else path.write_bytes(original)


def test_a_damaged_log_is_named(damaged_run):
    path = damaged_run / "log.csv"
    original = path.read_bytes()
    path.write_text("epoch,loss\n1,abc\n")
    with pytest.raises(SystemExit, match=r"log.csv is damaged \(could not convert .* 'abc'\)"):
        train.main(["--eval", str(damaged_run)])
    path.write_bytes(original)


@pytest.mark.parametrize("key", ["test", "protocol", "settings", "ordinality", "seconds"])
@pytest.mark.parametrize("is_null", [False, True])
def test_a_report_names_runs_that_miss_a_part_and_has_the_others(
    finished_run, tmp_path, key, is_null
):
    results = json.loads((finished_run[0] / "results.json").read_text())
    for name in ("whole", "damaged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        if name == "whole":
            results["settings"]["seed"] += 1  # the other is no copy
        results = {k: v for k, v in results.items() if k != key} | ({key: None} if is_null else {})
    text = train.main(["--report", str(tmp_path)])
    assert "[whole](whole/results.json)" in text
    if not is_null or key in ("test", "settings"):  # elsewhere null is "there is none"
        assert f"- left out {tmp_path / 'damaged' / 'results.json'}: damaged (" in text
