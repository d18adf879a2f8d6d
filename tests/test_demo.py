"""demo.py draws the same data every time, trains on it, and leaves pictures of what the model sees."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import error_line, run
from PIL import Image

import demo
from data import SegmentationDataset, find_split
from denseclip import build_model
from eval import ConfusionMatrix
from predict import Predictor


def test_drawings_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        demo.draw_dataset(tmp_path / name, train=6, val=2)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 17  # 8 images, 8 masks, the class list
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    masks = [np.asarray(Image.open(path)) for path in (tmp_path / "a").rglob("drawing_*.png")]
    assert {0, len(demo.CLASSES)} <= set(np.unique(np.concatenate([mask.ravel() for mask in masks])))
    assert all(mask.max() <= len(demo.CLASSES) for mask in masks)


@pytest.mark.parametrize("file", ["best.pt", "last.pt"])
def test_the_demo_keeps_a_run_that_is_not_its_own(file, tmp_path, monkeypatch, capsys):
    (tmp_path / file).write_text("mine")
    line = error_line(demo, capsys, monkeypatch, "--out", tmp_path)
    assert "already holds a run that is not the demo's" in line
    assert [path.name for path in tmp_path.iterdir()] == [file]


@pytest.mark.slow
def test_demo_runs_and_leaves_pictures(tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    monkeypatch.setattr(demo, "draw_dataset", lambda root, draw=demo.draw_dataset: draw(root, train=16, val=9))
    monkeypatch.setattr(demo, "RECIPE", replace(demo.RECIPE, iterations=2, batch_size=2))
    for _ in range(2):  # a second demo may replace the first
        run(demo, monkeypatch, "--out", out)
    printed = capsys.readouterr().out
    pictures = sorted((out / "pictures").iterdir())
    assert len(pictures) == 8 and all(Image.open(path).width > 1000 for path in pictures)
    assert [path.name[:10] for path in pictures] == [f"{rank}_drawing_" for rank in range(1, 9)]
    assert "python eval.py --checkpoint" in printed and str(out / "pictures") in printed
    assert Predictor(out / "best.pt").colors == list(demo.CLASSES.values())


@pytest.mark.slow
def test_the_best_sheets_come_first(tmp_path, monkeypatch):
    demo.draw_dataset(tmp_path / "data", train=1, val=12)
    folders = find_split(tmp_path / "data", "val")
    dataset = SegmentationDataset(*folders, len(demo.CLASSES), reduce_zero_label=True)
    truths = [truth for _, truth, _ in dataset]
    classes = [len(set(truth[truth != 255].tolist())) for truth in truths]
    wrong = [torch.where(truth == 255, 0, truth) for truth in truths]
    for i, labels in enumerate(wrong):
        labels[: 2 * (i * 5 % 12)] = 7  # the number of wrong rows
    predictions = iter(wrong)
    monkeypatch.setattr(demo, "predict_labels", lambda *_: next(predictions))
    demo.write_sheets(build_model("tiny", list(demo.CLASSES)).eval(), dataset, tmp_path / "sheets", number=12)
    order = [int(path.stem.rpartition("_")[2]) for path in sorted((tmp_path / "sheets").iterdir(), key=rank_of)]
    assert len(set(order)) == 12 and [classes[i] >= 5 for i in order] == sorted((c >= 5 for c in classes), reverse=True)
    for many in (True, False):
        part = [score(wrong[i], truths[i]) for i in order if (classes[i] >= 5) == many]
        assert len(part) > 2 and part == sorted(part, reverse=True)


def rank_of(path):
    return int(path.name.partition("_")[0])


def score(labels, truth):
    matrix = ConfusionMatrix(len(demo.CLASSES))
    matrix.update(labels, truth)
    return matrix.compute()["miou"]
