"""Properties that hold for whatever hypothesis draws: tokenizer, transforms, windows, positions, scores, box maps and
masks; and numbers at the edge: all pixels ignored, 2 and 254 classes, one image, bf16.

The examples are the same in every run; `-m slow` draws ten times as many. `-rP` shows how many were run.
"""

import json
import math
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from test_tokenizer import FRAGMENTS
from torch import nn
from torch.nn import functional as F

import demo
from clip_model import resize_positions
from coco import CocoDetection, to_results
from data import SegmentationDataset, TrainTransform, find_split
from denseclip import build_model
from detection import box_map
from eval import SHORTEST, ConfusionMatrix, evaluate, sliding_window
from tokenizer import encode
from train import train


def holds_for(examples, **strategies):
    """Decorator: the function becomes a test of so many examples, its arguments drawn from hypothesis' strategies."""

    def decorate(function):
        @pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
        def test(times):
            count = []

            def counted(**arguments):
                count.append(1)
                function(**arguments)

            fixed = {"derandomize": True, "deadline": None, "database": None}
            settings(max_examples=times * examples, **fixed)(given(**strategies)(counted))()
            print(len(count), "examples")
            assert len(count) >= examples

        test.__name__, test.__doc__ = function.__name__, function.__doc__
        return test

    return decorate


seeds = st.integers(0, 2**32 - 1)

# ------------------------------------------------------------------------------------------------ segmentation

CLEANED = st.text(
    alphabet="&;#x1234lgtamp<>|_ 'sSdé\u00a0\u200bßİÃ©â€™", max_size=24
)  # HTML, broken encodings, contractions
REFERENCE = open_clip.SimpleTokenizer()


@holds_for(500, text=st.text(max_size=60) | CLEANED | st.lists(st.sampled_from(FRAGMENTS)).map("".join))
def test_tokens_are_those_of_open_clip(text):
    assert encode(text) == REFERENCE.encode(text)


@holds_for(
    100,
    height=st.integers(40, 160),
    width=st.integers(40, 160),
    crop=st.sampled_from([32, 48, 100]),
    short=st.integers(32, 100),
    seed=seeds,
)
def test_image_and_label_stay_together(height, width, crop, short, seed):
    """Every class has its own color, which distortion changes for all of its pixels alike; 255 is the padding, of 0."""
    torch.manual_seed(seed)
    blocks = torch.randint(4, (5, 5), dtype=torch.uint8)
    label = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)[:height, :width]  # (H, W)
    colors = torch.tensor([[150, 60, 60], [60, 150, 60], [60, 60, 150], [140, 140, 60]], dtype=torch.uint8)
    image, label = TrainTransform(crop, (2048, short))(colors[label.long()].permute(2, 0, 1), label)
    assert image.shape == (3, crop, crop) and label.shape == (crop, crop)

    padding = label == 255
    assert not image[:, padding].any()
    inside = int((~padding).any(1).sum()), int((~padding).any(0).sum())
    assert not padding[: inside[0], : inside[1]].any()

    margin = 2 * math.ceil(2 * short / min(height, width)) + 1  # near a border, bilinear resizing mixes colors
    around = [F.max_pool2d(s * label[None].float(), 2 * margin + 1, 1, margin)[0] for s in (1, -1)]
    interior = (around[0] == -around[1]) & ~padding
    interior = F.pad(interior[margin:-margin, margin:-margin], (margin,) * 4)  # a border may lie just outside the crop
    present = label[interior].unique().tolist()
    assume(present)
    found = []
    for k in present:
        pixels = image[:, interior & (label == k)]  # (3, n)
        assert (pixels - pixels[:, :1]).abs().max() < 1e-3
        found.append(pixels[:, 0])
    for i, color in enumerate(found):
        assert all((color - other).abs().max() > 0.05 for other in found[:i])


class Position(nn.Module):
    """Logits that depend on the pixel and on its place in the window."""

    def forward(self, x):
        h, w = x.shape[2:]
        place = torch.arange(h)[:, None] / h + 2 * torch.arange(w) / w  # (h, w)
        return torch.cat([x[:, :1] * place, x[:, 1:2] + place, x.mean((2, 3), keepdim=True)[:, :1] + 0 * x[:, :1]], 1)


@holds_for(
    150,
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    window=st.integers(1, 64),
    share=st.floats(0, 1),
    images=st.integers(1, 2),
)
def test_sliding_window_is_each_pixels_mean(height, width, window, share, images):
    """Every pixel's logits are the mean over the windows that hold it, of which there is at least one."""
    stride = max(1, round(share * window))
    height, width = (min(side, window + 6 * stride) for side in (height, width))  # few windows, or it takes long
    x = torch.randn(images, 3, height, width, generator=torch.Generator().manual_seed(0))
    logits = sliding_window(Position(), x, window, stride)

    least = min(SHORTEST, window)
    padded = F.pad(x, (0, max(least - width, 0), 0, max(least - height, 0)), mode="replicate")
    starts = [[*range(0, max(side - window, 0), stride), max(side - window, 0)] for side in padded.shape[2:]]
    total, count = torch.zeros(images, 3, *padded.shape[2:]), torch.zeros(padded.shape[2:])
    for top in starts[0]:
        for left in starts[1]:
            rows, columns = slice(top, top + window), slice(left, left + window)
            total[:, :, rows, columns] += Position()(padded[:, :, rows, columns])
            count[rows, columns] += 1
    assert count.min() >= 1
    assert logits.shape == (images, 3, height, width)
    torch.testing.assert_close(logits, (total / count)[:, :, :height, :width], rtol=1e-5, atol=1e-5)


@holds_for(200, grid=st.integers(1, 9), size=st.tuples(st.integers(1, 14), st.integers(1, 14)), seed=seeds)
def test_resized_positions(grid, size, seed):
    generator = torch.Generator().manual_seed(seed)
    positions, constant = torch.randn(1 + grid * grid, 4, generator=generator), torch.randn(1, 4, generator=generator)
    assert torch.equal(resize_positions(positions, (grid, grid)), positions)
    resized = resize_positions(positions, size)
    assert resized.shape == (1 + size[0] * size[1], 4) and torch.equal(resized[0], positions[0])
    assert (resized[1:] <= positions[1:].amax(0) + 1e-6).all() and (resized[1:] >= positions[1:].amin(0) - 1e-6).all()
    same = resize_positions(constant.expand(1 + grid * grid, 4), size)
    torch.testing.assert_close(same, constant.expand(len(same), 4))
    flipped = resize_positions(torch.cat([positions[:1], positions[1:].flip(0)]), size)  # turned by 180 degrees
    torch.testing.assert_close(flipped[1:].flip(0), resized[1:], rtol=1e-5, atol=1e-5)


@holds_for(200, k=st.integers(2, 7), shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9))), seed=seeds)
def test_scores_are_numpys(k, shapes, seed):
    random, matrix, counts = np.random.default_rng(seed), ConfusionMatrix(k), np.zeros((k, k), int)
    for shape in shapes:
        prediction = random.integers(0, k, shape)
        label = random.choice([*range(random.integers(1, k + 1)), 255, -1], shape)  # some classes may be missing
        matrix.update(torch.from_numpy(prediction), torch.from_numpy(label))
        for true, predicted in zip(label.flat, prediction.flat, strict=True):
            if 0 <= true < k:
                counts[true, predicted] += 1
    assert np.array_equal(matrix.counts.numpy(), counts)
    if not counts.sum():
        with pytest.raises(ValueError, match="all pixels are ignored"):
            matrix.compute()
        return
    union, labeled = counts.sum(0) + counts.sum(1) - np.diag(counts), counts.sum(1)
    iou = [100 * counts[i, i] / union[i] for i in range(k) if union[i]]
    accuracy = [100 * counts[i, i] / labeled[i] for i in range(k) if labeled[i]]
    scores = matrix.compute()
    assert scores["miou"] == pytest.approx(np.mean(iou)) and scores["mean_accuracy"] == pytest.approx(np.mean(accuracy))
    assert scores["pixel_accuracy"] == pytest.approx(100 * np.trace(counts) / counts.sum())
    assert scores["iou"].isnan().tolist() == (union == 0).tolist()
    assert scores["accuracy"].isnan().tolist() == (labeled == 0).tolist()


# ------------------------------------------------------------------------------------------------ detection

CORNERS = st.tuples(*[st.floats(-30, 120, width=32)] * 4)


@holds_for(150, boxes=st.lists(CORNERS, max_size=5), height=st.integers(1, 20), width=st.integers(1, 20), seed=seeds)
def test_box_maps_are_loops(boxes, height, width, seed):
    """Also with boxes that are empty, turned round or outside."""
    labels = np.random.default_rng(seed).integers(0, 3, len(boxes)).tolist()
    expected = torch.zeros(3, height, width)
    for label, box in zip(labels, boxes, strict=True):
        x1, y1, x2, y2 = (
            min(max(int(value / 4), 0), side - 1)
            for value, side in zip(box, (width, height, width, height), strict=True)
        )
        for y in range(y1, y2):
            for x in range(x1, x2):
                expected[label, y, x] = 1
    found = box_map(torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels, dtype=torch.long), 3, height, width)
    assert torch.equal(found, expected)


@holds_for(
    60,
    height=st.integers(2, 40),
    width=st.integers(2, 40),
    number=st.integers(1, 4),
    compressed=st.booleans(),
    seed=seeds,
)
def test_masks_survive_coco_format(height, width, number, compressed, seed):
    """Masks as run lengths in an annotation file, compressed or as lists, and detected masks in COCO's results."""
    random = np.random.default_rng(seed)
    masks = random.random((number, height, width)) < random.uniform(0.1, 0.9)  # (N, H, W)
    for mask in masks:
        y, x = random.integers(height - 1), random.integers(width - 1)
        mask[y : y + 2, x : x + 2] = True  # no empty mask
    annotations = []
    for i, mask in enumerate(masks):
        packed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        # runs of 0 and 1 in turn, from 0 on, down the columns
        changes = np.flatnonzero(np.diff(mask.flatten("F").astype(int))) + 1
        runs = [0] * bool(mask[0, 0]) + np.diff([0, *changes, mask.size]).tolist()
        counts = packed["counts"].decode() if compressed else runs
        rle = {"size": [height, width], "counts": counts}
        box = {"bbox": coco_mask.toBbox(packed).tolist(), "area": int(mask.sum()), "iscrowd": 0}
        annotations.append({"id": i + 1, "image_id": 1, "category_id": 7, "segmentation": rle, **box})
    image = {"id": 1, "file_name": "a.png", "height": height, "width": width}
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 7, "name": "cat"}]}
    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (width, height)).save(Path(folder, "a.png"))
        Path(folder, "a.json").write_text(json.dumps(content))
        dataset = CocoDetection(
            folder, Path(folder, "a.json"), lambda image, target: (image, target), load_masks=True, train=True
        )
        found = dataset[0][1]["masks"].numpy()  # (N, H, W)
    assert np.array_equal(found, masks)

    detected = {"boxes": torch.zeros(number, 4), "scores": torch.ones(number), "labels": torch.zeros(number).long()}
    results = to_results({**detected, "masks": torch.from_numpy(masks)}, 1, [7])
    assert np.array_equal(np.stack([coco_mask.decode(result["segmentation"]) for result in results]), masks)


# ------------------------------------------------------------------------------------------------ numbers at the edge


@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("k, batch", [(2, 1), (4, 2), (254, 1)])
def test_losses_and_gradients_are_finite(k, batch, ignored):
    """A batch whose pixels are all ignored has loss 0 and changes nothing."""
    torch.manual_seed(0)
    model = build_model("tiny", [f"class {i}" for i in range(k)], crop_size=64).train()
    labels = torch.full((batch, 64, 64), 255) if ignored else torch.randint(k, (batch, 64, 64))
    losses = model(torch.randn(batch, 3, 64, 64), labels)
    total = sum(losses.values())
    total.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert gradients.isfinite().all()
    if ignored:
        assert total.item() == 0 and not gradients.any()
    else:
        assert losses["loss"].item() == pytest.approx(math.log(k), rel=0.5) and gradients.any()
    assert model.eval()(torch.randn(batch, 3, 40, 50)).shape == (batch, k, 40, 50)


@pytest.mark.slow
def test_bf16_trains_the_demo(tmp_path):
    """200 iterations with the demo's data and recipe; train() raises if a loss is not finite."""
    demo.draw_dataset(tmp_path / "data", train=60, val=3)
    names = list(demo.CLASSES)
    torch.manual_seed(0)
    model = build_model("tiny", names, short_side=192)
    folders, val_folders = (find_split(tmp_path / "data", split) for split in ("train", "val"))
    transform = TrainTransform(model.crop_size, (2048, model.short_side))
    train_set = SegmentationDataset(*folders, len(names), transform, reduce_zero_label=True)
    val_set = SegmentationDataset(*val_folders, len(names), reduce_zero_label=True)
    recipe = replace(demo.RECIPE, iterations=200, batch_size=4, precision="bf16")
    score = partial(evaluate, dataset=val_set, device="cpu")
    loop = {"evaluate_model": score, "workers": 0, "log_every": 10}
    train(model, train_set, recipe, tmp_path, torch.device("cpu"), **loop)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [record["total"] for record in records if "total" in record]
    assert len(losses) == 20 and all(map(math.isfinite, losses)) and losses[-1] < 0.8 * losses[0]
