"""demo.py draws the same data every time, trains on it, and leaves pictures of what the model sees."""

from dataclasses import replace

import numpy as np
from helpers import run
from PIL import Image

import demo


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


def test_demo_runs_and_leaves_pictures(tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    monkeypatch.setattr(demo, "draw_dataset", lambda root, draw=demo.draw_dataset: draw(root, train=16, val=9))
    monkeypatch.setattr(demo, "RECIPE", replace(demo.RECIPE, iterations=2, batch_size=2))
    for _ in range(2):  # a second demo may replace the first
        run(demo, monkeypatch, "--out", out)
    printed = capsys.readouterr().out
    pictures = list((out / "pictures").iterdir())
    assert len(pictures) == 8 and all(Image.open(path).width > 1000 for path in pictures)
    assert "python eval.py --checkpoint" in printed and str(out / "pictures") in printed
