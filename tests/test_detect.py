"""detect.py trains, resumes and scores detectors on train.py's loop, by the released schedule."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_line, run
from PIL import Image, ImageDraw

import detect
import train as training
from denseclip import build_model, read_checkpoint, save_checkpoint


def make_set(root, split, count, seed):
    """Discs and squares of one color each, with boxes and polygons, in COCO's format."""
    random = np.random.default_rng(seed)
    (root / "images" / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        width, height = ((128, 96), (96, 128))[number % 2]
        image = Image.new("RGB", (width, height), (90, 90, 90))
        kind, x, y = number % 2, *random.integers(10, 50, 2).tolist()
        box = [x, y, x + 40, y + 40]
        ImageDraw.Draw(image).rectangle(box, fill=((220, 40, 40), (40, 220, 40))[kind])
        image.save(root / "images" / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        corners = [box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]
        annotations.append(
            {
                "id": number + 1,
                "image_id": number,
                "category_id": (7, 3)[kind],
                "bbox": [x, y, 40, 40],
                "area": 1600,
                "iscrowd": 0,
                "segmentation": [corners],
            }
        )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "green square"}, {"id": 7, "name": "red square"}],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    make_set(root, "train", 6, 0)
    make_set(root, "val", 2, 1)
    return root


@pytest.mark.parametrize("name", ["retinanet_tiny", pytest.param("mask_rcnn_tiny", marks=pytest.mark.slow)])
def test_trains_resumes_and_is_scored_by_options(name, root, tmp_path, monkeypatch, capsys):
    options = [
        "--model",
        name,
        "--data",
        root,
        "--batch-size",
        2,
        "--short-side",
        96,
        "--lr",
        1e-3,
        "--warmup",
        2,
        "--workers",
        0,
        "--device",
        "cpu",
        "--iterations",
        4,
        "--save-every",
        2,
    ]
    run(detect, monkeypatch, "train", *options, "--out", tmp_path / "whole", "--eval-every", 4)
    assert "green square" in capsys.readouterr().out
    last = read_checkpoint(tmp_path / "whole" / "last.pt")
    assert last["run"]["schedule"] == "step" and last["run"]["clip_grad"] == 0.1

    # last.pt as it was after two iterations of the same run leads to the same weights
    halfway, original = {}, training.save_checkpoint

    def keep(path, model, **extra):
        original(path, model, **extra)
        if extra["iteration"] == 2:
            halfway["file"] = path.read_bytes()

    monkeypatch.setattr(training, "save_checkpoint", keep)
    again = [*options, "--out", tmp_path / "again", "--eval-every", 4]
    run(detect, monkeypatch, "train", *again)
    (tmp_path / "again" / "halfway.pt").write_bytes(halfway["file"])
    run(detect, monkeypatch, "train", *again, "--resume", tmp_path / "again" / "halfway.pt")
    resumed = read_checkpoint(tmp_path / "again" / "last.pt")
    assert all(torch.equal(value, resumed["model"][key]) for key, value in last["model"].items())

    run(
        detect,
        monkeypatch,
        "eval",
        "--checkpoint",
        tmp_path / "whole" / "last.pt",
        "--data",
        root,
        "--workers",
        0,
        "--device",
        "cpu",
        "--json",
        tmp_path / "scores.json",
        "--save-results",
        tmp_path / "results.json",
    )
    assert "box AP" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["images"] == 2 and scores["class_names"] == ["green square", "red square"]
    assert ("mask_ap" in scores) == name.startswith("mask")
    assert isinstance(json.loads((tmp_path / "results.json").read_text()), list)


def test_a_detectors_iterations_are_twelve_epochs(root, tmp_path, monkeypatch):
    monkeypatch.setattr(detect, "train", lambda model, train_set, recipe, *a, **k: recipes.append(recipe))
    monkeypatch.setattr(detect, "format_ap_table", lambda *_: "")
    recipes = []
    run(detect, monkeypatch, "train", "--model", "retinanet_tiny", "--data", root, "--batch-size", 2, "--out", tmp_path)
    run(detect, monkeypatch, "train", "--model", "mask_rcnn_tiny", "--data", root, "--iterations", 5, "--out", tmp_path)
    # three wide and three tall images, in batches of two: two batches each
    assert [(r.iterations, r.batch_size, r.lr, r.warmup, r.short_side) for r in recipes] == [
        (48, 2, 1e-4, 500, 800),
        (5, 16, 2e-4, 500, 800),
    ]


def test_what_is_wrong_is_said_in_one_line(root, tmp_path, monkeypatch, capsys):
    images, annotations = root / "images" / "train", root / "annotations" / "instances_train.json"
    save_checkpoint(tmp_path / "segmentation.pt", build_model("tiny", ["cat", "dog"]))
    for options, words in [
        (["train", "--model", "retinanet_tiny", "--data", root, "--set", "head=upernet"], ["head", "no effect"]),
        (["train", "--train", images, annotations], ["--val"]),
        (["train", "--data", tmp_path], [str(tmp_path), "annotations/instances_train2017.json"]),
        (["eval", "--checkpoint", tmp_path / "segmentation.pt"], ["segmentation.pt", "no detector named 'tiny'"]),
    ]:
        end = ["--out", tmp_path / "out"] if options[0] == "train" else []
        error = error_line(detect, capsys, monkeypatch, *options, "--device", "cpu", *end)
        assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [[], ["train"], ["eval"]])
def test_help(command, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(detect, monkeypatch, *command, "--help")
    assert stop.value.code == 0 and "detect.py train" in capsys.readouterr().out


@pytest.mark.slow
def test_a_backbone_with_an_unused_map_trains_in_two_processes(root, tmp_path):
    """RetinaNet does not use the finest map, so that Swin's norm on it never gets a gradient."""
    options = ["--model", "retinanet_tiny", "--backbone", "swin_t", "--backbone-weights", "none", "--data", root]
    options += [
        "--batch-size",
        2,
        "--short-side",
        96,
        "--iterations",
        3,
        "--warmup",
        2,
        "--workers",
        0,
        "--clip",
        "none",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "detect.py"]
    command = [*command, "train", *options, "--device", "cpu", "--out", tmp_path / "run"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_checkpoint(tmp_path / "run" / "last.pt")["iteration"] == 3
