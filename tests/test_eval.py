"""eval.py computes the scores that README describes: mIoU is a plain count of pixels, the sliding window and the
multi-scale protocol are the released ones, and several processes score what one does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NAMES, error_line, run, torchrun
from PIL import Image
from torch import nn

import eval as evaluation
from data import SegmentationDataset
from denseclip import build_model, load_checkpoint, save_checkpoint
from eval import ConfusionMatrix, evaluate, predict_labels, probability_strips, sliding_window, window_starts

ROOT = Path(__file__).resolve().parents[1]


def predict_probabilities(model, image, size, **protocol):
    return torch.cat(list(probability_strips(model, image, size, **protocol)), dim=1)


class Toy(nn.Module):
    """Logits from a 3 x 3 convolution: cheap, and with borders that differ from window to window."""

    def __init__(self, crop_size=32, short_side=32):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.crop_size, self.class_names = nn.Conv2d(3, len(NAMES), 3, padding=1), crop_size, NAMES
        self.short_side = short_side
        self.sizes = []

    def forward(self, images):
        self.sizes.append(tuple(images.shape[-2:]))
        return self.conv(images)


class MeanOfWindow(Toy):
    """Constant logits, the mean of what the window sees."""

    def forward(self, images):
        return images.mean((1, 2, 3), keepdim=True).expand(-1, len(NAMES), *images.shape[-2:])


@pytest.fixture
def folders(tmp_path):
    """Seven images of several sizes with their masks, values 0..3 and 255."""
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for i in range(7):
        height, width = 40 + 5 * i, 70 - 4 * i
        mask = random.integers(0, 4, (height // 8 + 1, width // 8 + 1)).repeat(8, 0).repeat(8, 1)[:height, :width]
        mask[random.random(mask.shape) < 0.1] = 255
        pixels = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    return str(tmp_path / "images"), str(tmp_path / "masks")


# ------------------------------------------------------------------------------------------------ metric


def test_scores_equal_a_plain_count():
    random = np.random.default_rng(1)
    label = random.integers(0, 4, (3, 20, 30))  # class 4 is predicted but nowhere labeled, class 5 is neither
    prediction = np.where(random.random(label.shape) < 0.6, label, random.integers(0, 5, label.shape))
    label[random.random(label.shape) < 0.2] = 255
    prediction[:, :3] = 5
    label[:, :3] = 255  # predictions on ignored pixels do not count

    matrix = ConfusionMatrix(6)
    for p, y in zip(prediction, label, strict=True):
        matrix.update(torch.from_numpy(p), torch.from_numpy(y))
    scores = matrix.compute()

    valid, ious, accuracies = label != 255, [], []
    for k in range(5):
        true, found = (label == k) & valid, (prediction == k) & valid
        ious.append((true & found).sum() / (true | found).sum())
        accuracies += [(true & found).sum() / true.sum()] if true.any() else []
    assert ious[4] == 0 and len(accuracies) == 4
    assert scores["miou"] == pytest.approx(100 * np.mean(ious))
    assert scores["mean_accuracy"] == pytest.approx(100 * np.mean(accuracies))
    assert scores["pixel_accuracy"] == pytest.approx(100 * (prediction == label)[valid].mean())
    assert scores["iou"][:5].tolist() == pytest.approx([100 * iou for iou in ious])
    assert scores["iou"][5].isnan() and scores["accuracy"][4].isnan()

    table = evaluation.format_table(scores, ["a", "b", "c", "d", "predicted", "absent"])
    assert "(1 of 6 classes are neither labeled nor predicted)" in table and f"{scores['miou']:.2f}" in table
    assert "predicted           0.00         -" in table and "absent  " not in table
    assert evaluation.to_json(scores)["iou"][5] is None


def test_nothing_labeled_is_an_error():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.zeros(4, 4, dtype=torch.int64), torch.full((4, 4), 255))
    with pytest.raises(ValueError, match="ignored"):
        matrix.compute()


# ------------------------------------------------------------------------------------------------ prediction


@pytest.mark.parametrize("window, stride", [(512, 341), (640, 426), (128, 85), (32, 21), (7, 7)])
def test_windows_are_the_released_grid(window, stride):
    for side in [1, window - 1, window, window + 1, window + stride, window + stride + 1, 683, 1024, 2048]:
        released = []
        for i in range(max(side - window + stride - 1, 0) // stride + 1):
            end = min(i * stride + window, side)
            released.append(max(end - window, 0))
        starts = window_starts(side, window, stride)
        assert starts == released and len(set(starts)) == len(starts)
        covered = {p for start in starts for p in range(start, min(start + window, side))}
        assert covered == set(range(side))


@pytest.mark.parametrize("size", [(32, 32), (33, 97), (20, 80), (100, 31), (10, 12)])
def test_sliding_window_of_a_constant_is_constant(size):
    model = MeanOfWindow()
    logits = sliding_window(model, torch.full((2, 3, *size), 0.7), 32, 21)
    torch.testing.assert_close(logits, torch.full((2, len(NAMES), *size), 0.7))


def test_sliding_window_averages_overlapping_logits():
    torch.manual_seed(0)
    model, images = MeanOfWindow(), torch.randn(2, 3, 33, 97)
    expected = torch.zeros(2, len(NAMES), 33, 97)
    count = torch.zeros(33, 97)
    for top in (0, 1):
        for left in (0, 21, 42, 63, 65):
            rows, columns = slice(top, top + 32), slice(left, left + 32)
            expected[:, :, rows, columns] += images[:, :, rows, columns].mean((1, 2, 3))[:, None, None, None]
            count[rows, columns] += 1
    torch.testing.assert_close(sliding_window(model, images, 32, 21), expected / count)


def test_a_small_image_goes_through_whole():
    model = Toy()
    images = torch.randn(1, 3, 40, 62)
    torch.testing.assert_close(sliding_window(model, images, 64, 42), model.conv(images))
    assert model.sizes == [(40, 62)]
    sliding_window(model, torch.randn(1, 3, 40, 80), 64, 42)
    assert model.sizes[1:] == [(40, 64)]
    # A model needs 32 pixels: the last row is repeated, and cut off again
    assert sliding_window(model, torch.randn(1, 3, 5, 62), 64, 42).shape[-2:] == (5, 62)
    assert model.sizes[2:] == [(32, 62)]


def test_multi_scale_is_the_mean_of_softmaxes(monkeypatch):
    model, image, size = Toy(), torch.randn(3, 40, 60), (50, 75)
    expected = []
    for scale in evaluation.SCALES:
        factor = int(36 * scale) / 40
        h, w = int(40 * factor + 0.5), int(60 * factor + 0.5)
        scaled = nn.functional.interpolate(image[None], size=(h, w), mode="bilinear", align_corners=False)
        for flip in (False, True):
            logits = sliding_window(model, scaled.flip(-1) if flip else scaled, 32, 21)
            logits = nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            probabilities = logits.softmax(1)[0]
            expected.append(probabilities.flip(-1) if flip else probabilities)
    protocol = {"short_side": 36, "multi_scale": True}
    actual = predict_probabilities(model, image, size, **protocol)
    torch.testing.assert_close(actual, torch.stack(expected).mean(0))
    for strip in (1, len(NAMES) * 75 * 7):  # one row at a time, seven rows
        monkeypatch.setattr(evaluation, "STRIP", strip)
        torch.testing.assert_close(predict_probabilities(model, image, size, **protocol), actual)
        assert torch.equal(predict_labels(model, image, size, **protocol), actual.argmax(0))
    assert not actual.requires_grad
    torch.testing.assert_close(actual.sum(0), torch.ones(size))


def test_images_are_resized_to_fit_both_limits():
    model = Toy(crop_size=4000, short_side=512)
    predict_probabilities(model, torch.zeros(3, 300, 400), (300, 400))
    predict_probabilities(model, torch.zeros(3, 100, 1000), (5, 5))
    assert model.sizes == [(512, 683), (205, 2048)]


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluate_scores_every_image_once_and_leaves_no_trace(folders):
    model, dataset = Toy().train(), SegmentationDataset(*folders, len(NAMES))
    matrix = ConfusionMatrix(len(NAMES))
    for image, label, _ in dataset:
        matrix.update(predict_labels(model, image, label.shape), label)
    before = torch.get_rng_state()
    scores = evaluate(model, dataset, "cpu")
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert evaluation.to_json(scores) == evaluation.to_json(matrix.compute())
    assert evaluation.to_json(evaluate(model, dataset, "cpu", workers=2)) == evaluation.to_json(scores)
    assert evaluation.to_json(evaluate(model, dataset, "cpu", short_side=40)) != evaluation.to_json(scores)


@pytest.mark.parametrize("reduce_zero_label", [False, True])
def test_saved_masks_hold_the_data_sets_own_values(folders, tmp_path, reduce_zero_label):
    class Perfect(Toy):
        def forward(self, images):
            return nn.functional.one_hot(self.label, len(NAMES)).permute(2, 0, 1)[None].float()

    images, masks = folders
    for path in Path(masks).iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 255, 3, mask) + np.uint8(reduce_zero_label)).save(path)
    dataset = SegmentationDataset(images, masks, len(NAMES), reduce_zero_label=reduce_zero_label)
    dataset.pairs = dataset.pairs[:1]
    model = Perfect(crop_size=10_000)
    model.label = dataset[0][1]
    colors = [(1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12)]
    evaluate(model, dataset, "cpu", short_side=40, save_masks=tmp_path / "saved", colors=colors)
    saved, original = Image.open(tmp_path / "saved" / "0.png"), np.array(Image.open(Path(masks, "0.png")))
    assert saved.mode == "P" and np.array_equal(np.array(saved), original)
    first_pixel = colors[original[0, 0] - reduce_zero_label]
    assert saved.convert("RGB").getpixel((0, 0)) == first_pixel


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "best.pt", build_model("tiny", NAMES, short_side=64))
    return tmp_path / "best.pt"


@pytest.mark.slow
def test_two_processes_score_what_one_does(folders, checkpoint, tmp_path):
    options = ["--checkpoint", checkpoint, "--val", *folders, "--workers", 0, "--save-masks", tmp_path / "saved"]
    printed = torchrun("eval.py", *options)
    assert len(list((tmp_path / "saved").iterdir())) == 7  # an odd number: one process has more than the other
    one = evaluate(load_checkpoint(checkpoint), SegmentationDataset(*folders, len(NAMES)), "cpu")
    assert printed.count(evaluation.format_table(one, NAMES)) == 1  # once, with the same scores


# ------------------------------------------------------------------------------------------------ bad input


def test_a_bad_mask_met_in_a_worker_ends_in_one_line(folders, checkpoint, tmp_path, capsys, monkeypatch):
    """More mistakes are in test_bad_inputs.py."""
    images, masks = folders
    for path in Path(masks).iterdir():
        Image.fromarray(np.full(Image.open(path).size[::-1], 9, np.uint8)).save(path)
    options = ["--checkpoint", checkpoint, "--val", *folders, "--workers", 1, "--device", "cpu"]
    assert "value 9 is not a class" in error_line(evaluation, capsys, monkeypatch, *options)


@pytest.mark.parametrize("device", ["meta", "hpu", "cuda:-1", "cpu:", "cuda:999", "GPU", "cpu,cuda", "cpu\n"])
def test_devices_that_pytorch_has_but_this_does_not_are_refused(device):
    with pytest.raises(ValueError, match="--device"):
        evaluation.start_process(device)


def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--device cuda:1 puts every process of torchrun on one GPU"):
        evaluation.start_process("cuda:1")


@pytest.mark.slow
def test_conventions_of_the_training_data_are_the_checkpoints(folders, tmp_path, monkeypatch, capsys):
    """Masks are read as in training, unless an option says otherwise."""
    images, masks = folders
    for path in Path(masks).iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 255, 9, mask + 1).astype(np.uint8)).save(path)
    run_settings = {"ignore_index": 9, "reduce_zero_label": True}
    save_checkpoint(tmp_path / "best.pt", build_model("tiny", NAMES, short_side=64), run=run_settings)
    options = ["--checkpoint", tmp_path / "best.pt", "--val", *folders, "--workers", 0, "--device", "cpu"]
    run(evaluation, monkeypatch, *options)
    assert "on 7 images" in capsys.readouterr().out
    assert "value 9" in error_line(evaluation, capsys, monkeypatch, *options, "--ignore-index", 255)

    # The validation set and the colors, too
    colors = [(1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12)]
    known = {"run": run_settings, "data": {"val": list(folders), "colors": colors}}
    save_checkpoint(tmp_path / "best.pt", build_model("tiny", NAMES, short_side=64), **known)
    alone = ["--checkpoint", tmp_path / "best.pt", "--workers", 0, "--device", "cpu"]
    run(evaluation, monkeypatch, *alone, "--save-masks", tmp_path / "saved")
    assert "on 7 images" in capsys.readouterr().out
    assert {tuple(c) for _, c in Image.open(tmp_path / "saved/0.png").convert("RGB").getcolors()} <= set(colors)
    save_checkpoint(tmp_path / "best.pt", build_model("tiny", NAMES, short_side=64), data={"val": ["gone", "too"]})
    assert "gone: the validation set of training is not here; give --val" in error_line(
        evaluation, capsys, monkeypatch, *alone
    )

    # A checkpoint that was not made by training knows nothing of masks: then ADE20K's layout decides.
    save_checkpoint(tmp_path / "bare.pt", build_model("tiny", NAMES, short_side=64))
    Path(masks).rename(tmp_path / "validation")
    (tmp_path / "annotations").mkdir()
    ade20k = (tmp_path / "validation").rename(tmp_path / "annotations" / "validation")
    bare = ["--checkpoint", tmp_path / "bare.pt", "--val", images, ade20k, "--ignore-index", 9, *options[5:]]
    run(evaluation, monkeypatch, *bare)
    assert "value 4 is not a class" in error_line(evaluation, capsys, monkeypatch, *bare, "--no-reduce-zero-label")
