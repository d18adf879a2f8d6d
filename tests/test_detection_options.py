"""Detectors train, resume and are scored by the same train.py and eval.py as segmentation models."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import eval as evaluation
import train as training
from denseclip import read_checkpoint


def make_set(root, split, count, seed):
    """Discs and squares of one colour each, with boxes and polygons, in COCO's format."""
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
        annotations.append({"id": number + 1, "image_id": number, "category_id": (7, 3)[kind], "bbox": [x, y, 40, 40],
                            "area": 1600, "iscrowd": 0, "segmentation": [corners]})
    content = {"images": images, "annotations": annotations,
               "categories": [{"id": 3, "name": "green square"}, {"id": 7, "name": "red square"}]}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    make_set(root, "train", 6, 0)
    make_set(root, "val", 2, 1)
    return root


def run(script, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
    script.main()


@pytest.mark.parametrize("name", ["retinanet_tiny", pytest.param("mask_rcnn_tiny", marks=pytest.mark.slow)])
def test_trains_resumes_and_is_scored_by_options(name, root, tmp_path, monkeypatch, capsys):
    options = ["--model", name, "--data", root, "--batch-size", 2, "--short-side", 96, "--lr", 1e-3, "--warmup", 2,
               "--workers", 0, "--device", "cpu", "--iterations", 4, "--save-every", 2]
    run(training, monkeypatch, *options, "--out", tmp_path / "whole", "--eval-every", 4)
    assert "green square" in capsys.readouterr().out
    last = read_checkpoint(tmp_path / "whole" / "last.pt")
    assert last["arguments"]["schedule"] == "step" and last["arguments"]["clip_grad"] == 0.1

    # the state after two iterations, saved by a run of the same recipe, goes on to the same weights
    halfway = {}
    original = training.save

    def keep(path, model, rank, **extra):
        original(path, model, rank, **extra)
        if extra["iteration"] == 2:
            halfway["file"] = path.read_bytes()

    monkeypatch.setattr(training, "save", keep)
    run(training, monkeypatch, *options, "--out", tmp_path / "again", "--eval-every", 4)
    (tmp_path / "again" / "halfway.pt").write_bytes(halfway["file"])
    run(training, monkeypatch, *options, "--out", tmp_path / "again", "--eval-every", 4,
        "--resume", tmp_path / "again" / "halfway.pt")
    resumed = read_checkpoint(tmp_path / "again" / "last.pt")
    assert all(torch.equal(value, resumed["model"][key]) for key, value in last["model"].items())

    run(evaluation, monkeypatch, "--checkpoint", tmp_path / "whole" / "last.pt", "--data", root, "--workers", 0,
        "--device", "cpu", "--json", tmp_path / "scores.json", "--save-results", tmp_path / "results.json")
    assert "box AP" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["images"] == 2 and scores["class_names"] == ["green square", "red square"]
    assert ("mask_ap" in scores) == name.startswith("mask")
    assert isinstance(json.loads((tmp_path / "results.json").read_text()), list)


def test_a_detectors_iterations_are_twelve_epochs(root, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", lambda model, train_set, recipe, *a, **k: recipes.append(recipe))
    recipes = []
    run(training, monkeypatch, "--model", "retinanet_tiny", "--data", root, "--batch-size", 2, "--out", tmp_path)
    run(training, monkeypatch, "--model", "mask_rcnn_tiny", "--data", root, "--iterations", 5, "--out", tmp_path)
    # three wide and three tall images, in batches of two: two batches each
    assert [(r.iterations, r.batch_size, r.lr, r.warmup, r.short_side) for r in recipes] == [
        (48, 2, 1e-4, 500, 800), (5, 16, 2e-4, 500, 800),
    ]


@pytest.mark.parametrize("option", [("--crop-size", 64), ("--head", "upernet"), ("--classes", "voc"), ("--demo",)])
def test_options_without_a_meaning_for_detectors_are_refused(option, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"{option[0]} has no meaning for --model retinanet_tiny"):
        run(training, monkeypatch, "--model", "retinanet_tiny", *option, "--out", tmp_path)
    with pytest.raises(ValueError, match="no setting named 'head'"):
        run(training, monkeypatch, "--model", "retinanet_tiny", "--set", "head=upernet", "--out", tmp_path)
