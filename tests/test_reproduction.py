"""Every experiment in REPRODUCTION.md has a command that parses and whose model builds, and the batch, iterations, crop
and cost in its row are those of the run that it starts: no row can rot."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import make_folders, run
from PIL import Image

import coco
import detect
import predict
import train as training
from data import read_classes
from denseclip import build_model, save_checkpoint
from experiments.tables import gpu_days, training_cost

ROOT = Path(__file__).resolve().parents[1]
TABLE = (ROOT / "REPRODUCTION.md").read_text(encoding="utf-8").partition("## Differences")[0]
HEADER = "| experiment | paper | command | batch x iterations | crop | multiply-adds, P | GPU-days (estimate) | notes |"
ROWS = re.findall(r"^\|.*\| `python ((?:train|detect)\.py.*?)` \| ((?:[^|]* \| ){3}[^|]*) \|", TABLE, re.MULTILINE)
QUICK = ("train.py", "detect.py train --model mask_rcnn_rn50")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data/ADEChallengeData2016 and data/coco with an image each."""
    root = tmp_path_factory.mktemp("reproduction")
    for split in ("training", "validation"):
        make_folders(root / split, 1)
        for kind, source in (("images", "images"), ("annotations", "masks")):
            target = root / "data" / "ADEChallengeData2016" / kind
            target.mkdir(parents=True, exist_ok=True)
            (root / split / source).rename(target / split)
    for split in ("train2017", "val2017"):
        (root / "data/coco" / split).mkdir(parents=True)
        Image.new("RGB", (64, 48)).save(root / "data/coco" / split / "1.png")
        (root / "data/coco/annotations").mkdir(exist_ok=True)
        square = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
        square["segmentation"] = [[5, 5, 25, 5, 25, 25, 5, 25]]
        content = {"images": [{"id": 1, "file_name": "1.png", "width": 64, "height": 48}], "annotations": [square]}
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(read_classes("coco")[0], start=1)]
        (root / "data/coco/annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def test_every_table_is_there():
    for title in (
        "Table 1",
        "Section 4.1",
        "Table 2",
        "Table 3",
        "Table 4",
        "Table 5",
        "Table 6",
        "Table 7",
        "Table 8",
        "Figure 2",
        "Figure 5",
    ):
        assert f"| {title}: " in TABLE, title
    assert HEADER in TABLE and len(ROWS) == 40


def plan(command, folder, monkeypatch, out):
    """The model, on the meta device, and the recipe that a command would train."""
    script, *options = shlex.split(command)
    module = {"train.py": training, "detect.py": detect}[script]
    runs = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(module, "train", lambda model, train_set, recipe, *_, **__: runs.append((model, recipe)))
    epoch = -(-117_266 // 16) * 16  # train2017's images in full batches
    monkeypatch.setattr(coco.CocoDetection, "sampler", lambda *_: SimpleNamespace(size=epoch))
    for name in ("format_table", "format_ap_table"):
        monkeypatch.setattr(module, name, lambda *_: "", raising=False)
    options = [option for option in options if not option.endswith(".pth")]
    if "--backbone-weights" in options:
        options.remove("--backbone-weights")
    build = module.build_model

    def build_on_meta(*args, **kwargs):
        with torch.device("meta"):
            return build(*args, **kwargs)

    monkeypatch.setattr(module, "build_model", build_on_meta)
    weights = ["--clip", "none", "--backbone-weights", "none"]
    run(module, monkeypatch, *options, *weights, "--device", "cpu", "--out", out)
    return runs[0]


def planned_cells(model, recipe):
    """The cells of a row, from batch to GPU-days."""
    training.parameter_groups(model, recipe)  # freezes what training freezes
    cost = training_cost(model, recipe.batch_size) * recipe.iterations / 1e6
    size = model.crop_size if hasattr(model, "crop_size") else model.short_side
    return f"{recipe.batch_size} x {recipe.iterations:,} | {size} | {cost:,.0f} | {gpu_days(cost):.1f}"


@pytest.mark.parametrize(
    "command, cells", [pytest.param(*row, marks=() if row[0] in QUICK else pytest.mark.slow) for row in ROWS]
)
def test_commands_train_what_their_rows_say(command, cells, folder, monkeypatch, tmp_path):
    model, recipe = plan(command, folder, monkeypatch, tmp_path / "run")
    assert hasattr(model.encoder, "text_encoder") != ("--prompting none" in command)
    if command.startswith("train.py"):
        assert recipe.iterations == (160_000 if "swin" in command else 80_000) and recipe.reduce_zero_label
        assert model.crop_size == (640 if "vit" in command else 512)
    else:
        assert (recipe.batch_size, recipe.schedule, recipe.clip_grad) == (16, "step", 0.1)
        assert recipe.lr == (2e-4 if "mask" in command else 1e-4)
    assert planned_cells(model, recipe) == cells


def test_pictures_are_drawn(folder, monkeypatch):
    """Figure 5, by its row's command."""
    command = re.search(r"`python predict\.py (.*?)`", TABLE)[1]
    save_checkpoint(folder / "runs/NAME/last.pt", build_model("tiny", ["wall", "sky", "tree"]))
    monkeypatch.chdir(folder)
    images = "data/ADEChallengeData2016/images/validation"
    run(predict, monkeypatch, *shlex.split(command.replace("IMAGES", images)), "--device", "cpu")
    assert len(list(Path("predictions").glob("*_sheet.png"))) == 1
