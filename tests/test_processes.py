"""torchrun on this machine's CPU, with gloo: two processes, and two groups of processes as on two machines, train what
one process trains and score what it scores; when a process dies, the others end."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import NAMES, make_folders, torchrun

from data import SegmentationDataset
from denseclip import build_model, load_checkpoint, read_checkpoint
from eval import evaluate, to_json

ROOT = Path(__file__).resolve().parents[1]
DRIVER = """# ten iterations, without what differs between processes: batch norm in eval mode, no dropout
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

from data import SegmentationDataset, TrainTransform, run_script
from denseclip import build_model
from eval import evaluate, start_process
from helpers import NAMES
from train import Recipe, train


def main():
    out, train_root, val_root = map(Path, sys.argv[1:4])
    torch.set_num_threads(1)
    _, _, device = start_process("cpu")
    torch.manual_seed(0)
    model = build_model("tiny", NAMES, crop_size=64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    transform = TrainTransform(64, (2048, 64))
    train_set = SegmentationDataset(train_root / "images", train_root / "masks", len(NAMES), transform)
    val_set = SegmentationDataset(val_root / "images", val_root / "masks", len(NAMES))
    recipe = Recipe(iterations=10, batch_size=4, lr=1e-3, warmup=2)
    score = partial(evaluate, dataset=val_set, device=device)
    train(model, train_set, recipe, out, device, evaluate_model=score, workers=0, log_every=5)


run_script(main)
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """The driver's path and its options after the output folder."""
    root = tmp_path_factory.mktemp("processes")
    make_folders(root / "train", 7, seed=0)
    make_folders(root / "val", 5, seed=1)  # does not divide by two
    (root / "driver.py").write_text(DRIVER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield root / "driver.py", root / "train", root / "val"


@pytest.fixture(scope="module")
def two(arguments, tmp_path_factory):
    """The folder of a run in two processes."""
    driver, *folders = arguments
    out = tmp_path_factory.mktemp("two")
    torchrun(driver, out, *folders)
    return out


def weights(out):
    return read_checkpoint(out / "last.pt")["model"]


@pytest.mark.slow
def test_two_processes_train_what_one_does(arguments, two, tmp_path):
    """Weights after ten iterations agree to 2e-6; training moved them by up to a thousand times as much."""
    driver, *folders = arguments
    subprocess.run([sys.executable, driver, tmp_path, *folders], check=True, timeout=300)
    assert len(read_checkpoint(two / "last.pt")["random_states"]) == 2
    torch.manual_seed(0)
    before = build_model("tiny", NAMES, crop_size=64).state_dict()
    ours, theirs = weights(two), weights(tmp_path)
    differences, moved = (
        max((ours[name] - other[name]).abs().max().item() for name in ours) for other in (theirs, before)
    )
    print(f"differences up to {differences:.1e}, training moved weights by up to {moved:.1e}")
    assert differences < 2e-6 and moved > 2e-3


@pytest.mark.slow
def test_two_processes_score_a_set_that_does_not_divide(arguments, two):
    *_, val = arguments
    last = [json.loads(line) for line in (two / "log.jsonl").read_text().splitlines()][-1]
    val_set = SegmentationDataset(val / "images", val / "masks", len(NAMES))
    one = to_json(evaluate(load_checkpoint(two / "last.pt"), val_set, "cpu"))
    assert len(val_set) == 5 and last == {"iteration": 10, **one}


@pytest.mark.slow
def test_two_machines_by_the_readmes_line(arguments, two, tmp_path):
    """The README's command, with one process a machine and this script for train.py, twice on loopback."""
    driver, *folders = arguments
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    line = next(line for line in readme.splitlines() if line.startswith("torchrun --nnodes 2"))
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    words = shlex.split(line.replace("HOST:29500", f"localhost:{port}").replace("nproc_per_node 8", "nproc_per_node 1"))
    launcher = [sys.executable, "-m", "torch.distributed.run", *words[1 : words.index("train.py")]]
    command = list(map(str, [*launcher, "--local_addr", "localhost", driver, tmp_path, *folders]))
    machines = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[0]["processes"] == 2 and [record.get("iteration") for record in records] == [None, 5, 10, 10]
    ours, theirs = weights(tmp_path), weights(two)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def rank_of(process):
    """RANK in a process's environment, None without or if it has ended."""
    try:
        environment = Path(f"/proc/{process}/environ").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next((int(entry[5:]) for entry in environment if entry.startswith("RANK=")), None)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_others(arguments, tmp_path, rank):
    """Killed while training: within a minute the other has ended with a line, and the launcher names the one killed."""
    _, train, val = arguments
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    folders = ["--train", train / "images", train / "masks", "--val", val / "images", val / "masks"]
    options = ["--classes", tmp_path / "classes.txt", "--model", "tiny", "--set", "crop_size=64", "--device", "cpu"]
    options += ["--iterations", 100_000, "--batch-size", 4, "--warmup", 2, "--log-every", 2, "--eval-every", 10]
    options += ["--workers", 1, "--out", tmp_path / "run"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = list(map(str, [*launcher, ROOT / "train.py", *folders, *options]))
    with open(tmp_path / "errors", "w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        deadline = time.time() + 180
        while not (tmp_path / "run" / "last.pt").exists() and time.time() < deadline and process.poll() is None:
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = {rank_of(child): int(child) for child in children}
        os.kill(ranks[rank], signal.SIGKILL)
        begin = time.time()
        assert process.wait(timeout=90) != 0
        seconds = time.time() - begin
        errors.seek(0)
        text = errors.read()
    print(f"{seconds:.1f} s", text)
    assert "\nerror: " in text and seconds < 60 and f"exitcode  : -9 (pid: {ranks[rank]})" in text
    assert rank_of(ranks[1 - rank]) is None
    assert read_checkpoint(tmp_path / "run" / "last.pt")["iteration"] >= 10
