"""What several test files share: seeded images, folders of images and masks, training steps, scripts run in-process."""

import gc
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from data import run_script
from denseclip import load_checkpoint, save_checkpoint

NAMES = ["wall", "sky", "tree", "traffic light"]
COLORS = np.array([(200, 50, 50), (50, 200, 50), (50, 50, 200), (200, 200, 50)])


def images(batch=2, height=64, width=64, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def make_folders(root, count, seed=0, height=96, width=128):
    """Draw `count` images of blocks, whose color shows their class (0 to 3), and masks with 5% ignored pixels.

    return: the folders of images and masks
    """
    random = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for i in range(count):
        blocks = random.integers(0, 4, (-(-height // 16), -(-width // 16)))
        mask = blocks.repeat(16, 0).repeat(16, 1)[:height, :width]  # (H, W)
        image = (COLORS[mask] + random.normal(0, 20, (height, width, 3))).clip(0, 255)
        mask[random.random(mask.shape) < 0.05] = 255
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"{i}.png")
        Image.fromarray(mask.astype(np.uint8)).save(root / "masks" / f"{i}.png")
    return str(root / "images"), str(root / "masks")


def train_steps(model, steps=3):
    """Train on the same two images without dropout, every parameter with a gradient; return each step's losses."""
    x, labels = images(), torch.arange(64).div(22, rounding_mode="floor").expand(2, 64, 64).contiguous()
    for module in model.train().modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, history = torch.optim.AdamW(trained, lr=3e-4), []
    for _ in range(steps):
        losses = model(x, labels)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        history.append({name: loss.item() for name, loss in losses.items()})
        assert all(loss.isfinite() for loss in losses.values())
    return history


@torch.no_grad()
def check_round_trip(model, path, size=(75, 53)):
    """The model, saved and loaded again, gives the same logits for an image of an odd size."""
    save_checkpoint(path, model)
    loaded, logits = load_checkpoint(path), model.eval()(images(1, *size))
    assert logits.shape == (1, len(model.class_names), *size) and logits.isfinite().all()
    assert torch.equal(loaded(images(1, *size)), logits)
    assert (loaded.name, loaded.settings, loaded.class_names) == (model.name, model.settings, model.class_names)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def run(script, monkeypatch, *options):
    """The main() of a script's module with these command-line options."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
    script.main()


def error_line(script, capsys, monkeypatch, *options):
    """The one line on stderr with which a script refuses these options, exiting with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: run(script, monkeypatch, *options))
    line = capsys.readouterr().err
    if multiprocessing.active_children():
        gc.collect()  # a traceback may hold a loader, whose workers end with it
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    return line


def torchrun(script, *options):
    """What a script prints when torchrun runs it in two processes on the CPU."""
    root, launcher = Path(__file__).resolve().parents[1], ["-m", "torch.distributed.run", "--standalone"]
    command = [sys.executable, *launcher, "--nproc_per_node", "2", root / script, *options, "--device", "cpu"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def readme_block(word):
    """The README's first Python snippet that contains `word`."""
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    return next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if word in block)
