"""The detectors are the released ones: their checkpoints, loaded, give the released code's features, anchors, head
outputs, detections and losses (slow), their sizes are the paper's, and each part that differs from torchvision's does
what its "Released code" line says. A model takes images of any sizes and finds boxes in their own pixels."""

import re
from pathlib import Path
from statistics import median

import fill
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

import denseclip
from clip_model import MEAN, STD
from data import read_classes
from denseclip import save_checkpoint
from detection import (
    PRESETS,
    RELEASED_NAMES,
    AnchorMatcher,
    Anchors,
    ClampedBoxCoder,
    RetinaNet,
    RoIAlign,
    batch_images,
    box_map,
    box_text_loss,
    build_model,
    load_checkpoint,
    paste_masks,
    select,
)

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["cat", "dog", "traffic light"]


def make_targets(images):
    """One or two boxes with masks for each image."""
    targets = []
    for i, image in enumerate(images):
        boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [30.0, 10.0, 60.0, 60.0]])[: 1 + i % 2]
        masks = torch.zeros(len(boxes), *image.shape[1:], dtype=torch.uint8)
        masks[:, 10:45, 32:38] = 1
        targets.append({"boxes": boxes, "labels": torch.arange(len(boxes)), "masks": masks})
    return targets


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return [torch.rand(3, 70, 100), torch.rand(3, 96, 64)]


# ------------------------------------------------------------------------------------------------ released numbers


def difference(x, golden):
    """Largest absolute difference to the kept values, in the tensor's standard deviations."""
    assert list(x.shape) == list(golden["shape"])
    return (fill.sample(x) - golden["sample"]).abs().max().item() / golden["std"]


@pytest.fixture(scope="module", params=["retinanet", "mask_rcnn"])
def released(request, tmp_path_factory):
    """The golden file, the model of a released checkpoint that was saved and loaded, and the golden file's images."""
    golden = torch.load(GOLDEN / f"{request.param}_denseclip_r50.pt", weights_only=True)
    weights = {key: fill.tensor(key, shape) for key, shape in golden["keys"].items()}
    for key, value in weights.items():
        if key.endswith(tuple(golden["scaled_by_0_1"])):
            value *= 0.1
        if key.endswith(golden["minus_4"]):
            value -= 4
    path = tmp_path_factory.mktemp("released") / f"{request.param}.pth"
    torch.save({"state_dict": weights, "meta": {"CLASSES": tuple(read_classes("coco")[0])}}, path)
    batch = fill.tensor("input.image", (2, 3, 512, 640))
    batch[1, :, 500:] = batch[1, :, :, 620:] = 0
    return request.param, golden, load_checkpoint(path), ImageList(batch, [tuple(s) for s in golden["image_sizes"]])


def as_images(batch):
    """A normalised batch back as images in [0, 1]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    images = zip(batch.tensors, batch.image_sizes, strict=True)
    return [x[:, :height, :width] * std + mean for x, (height, width) in images]


@pytest.mark.slow
@torch.no_grad()
def test_every_stage_equals_the_released_code(released):
    name, golden, model, batch = released
    pyramid, global_embedding, visual_embeddings = model.encoder.backbone(batch.tensors)
    found = {"features": list(pyramid), "global_embedding": global_embedding, "visual_embeddings": visual_embeddings}
    _, score_map, found["text_embeddings"] = model.encoder(batch.tensors)
    found["score_map_over_tau"] = score_map / model.tau
    features, _ = model.extract_features(batch.tensors)
    levels = found["fpn"] = list(features.values())
    if name == "retinanet":
        # (B, all anchors, K) -> per level (B, anchors * K, H, W)
        counts = [9 * x.shape[-2] * x.shape[-1] for x in levels]
        heads = {"cls_logits": model.head.classification_head, "bbox_regression": model.head.regression_head}
        for key, head in heads.items():
            parts = zip(head(levels).split(counts, dim=1), levels, strict=True)
            found[key] = [part.reshape(len(x), *x.shape[-2:], -1).permute(0, 3, 1, 2) for part, x in parts]
        anchors = model.head.anchors(batch, levels)[0].split(counts)
    else:
        found["rpn_logits"], found["rpn_regression"] = model.head.rpn.head(levels)
        counts = [3 * x.shape[-2] * x.shape[-1] for x in levels]
        anchors = model.head.rpn.anchor_generator(batch, levels)[0].split(counts)
        proposals, _ = model.head.rpn(batch, features)
        assert [len(each) for each in proposals] == golden["proposals_count"]
        for each, expected in zip(proposals, golden["proposals_first50"], strict=True):
            torch.testing.assert_close(each[:50], expected[:, :4], rtol=0, atol=1e-2)
        roi_heads = model.head.roi_heads
        found["roi_features"] = roi_heads.box_roi_pool(features, golden["boxes"])
        logits, found["roi_regression"] = roi_heads.boxes(features, golden["boxes"])
        assert (logits - golden["roi_cls_logits"]).abs().max() < 1e-3 * golden["roi_cls_logits"].std()
        found["mask_logits"] = roi_heads.masks(features, golden["boxes"])

    for level, expected in zip(anchors, golden["anchors_first"], strict=True):
        torch.testing.assert_close(level[: len(expected)], expected, rtol=0, atol=1e-4)
    for key, value in found.items():
        pairs = zip(value, golden[key], strict=True) if isinstance(value, list) else [(value, golden[key])]
        for i, (x, expected) in enumerate(pairs):
            assert difference(x, expected) < 1e-3, (key, i)


@pytest.mark.slow
@torch.no_grad()
def test_detections_are_the_released_ones(released):
    _, golden, model, batch = released
    images = as_images(batch)
    assert (batch_images(images).tensors - batch.tensors).abs().max() < 1e-5
    for found, expected in zip(model.eval()(images), golden["detections"], strict=True):
        same_box = box_iou(expected["boxes"], found["boxes"]) > 0.99
        same_label = expected["labels"][:, None] == found["labels"]
        same_score = (expected["scores"][:, None] - found["scores"]).abs() < 1e-3
        assert len(found["boxes"]) == 100
        assert (same_box & same_label & same_score).any(1).sum() >= 98


@pytest.mark.slow
def test_losses_and_gradients_are_the_released_ones(released):
    name, golden, model, batch = released
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    boxes_and_labels = zip(golden["boxes"], golden["labels"], strict=True)
    targets = [{"boxes": boxes, "labels": labels} for boxes, labels in boxes_and_labels]
    expected = golden["train"]["losses"]
    if name == "mask_rcnn":  # its other losses depend on random samples
        with torch.no_grad():
            _, score_map = model.extract_features(batch.tensors)
            aux_loss = box_text_loss(score_map / model.tau, targets, batch.tensors.shape[-2:])
        assert aux_loss.item() == pytest.approx(expected["loss_aux_seg"], abs=1e-4)
        return

    losses = model(as_images(batch), targets)
    assert losses["class_loss"].item() == pytest.approx(expected["loss_cls"], abs=1e-3)
    assert losses["box_loss"].item() == pytest.approx(expected["loss_bbox"], abs=1e-3)
    assert losses["aux_loss"].item() == pytest.approx(expected["loss_seg"], abs=1e-4)
    sum(losses.values()).backward()
    parameters, errors = dict(model.named_parameters()), []
    for key, norm in golden["train"]["grad_norm"].items():
        if "k_proj.bias" in key:  # 0 in theory
            continue
        renames = [re.sub(old, new, key) for old, new in RELEASED_NAMES[name].items() if re.match(old, key)]
        ours = renames[0] if renames else key if key.startswith("neck.") else f"encoder.{key}"
        errors.append(abs(parameters[ours].grad.norm().item() - norm) / norm)
    assert len(errors) > 280 and median(errors) < 1e-3 and max(errors) < 1e-2


@pytest.mark.parametrize(
    "name, with_language, without",
    [
        ("retinanet_rn50", 60.449, 37.988),
        ("retinanet_rn101", 77.995, 56.980),
        ("mask_rcnn_rn50", 66.692, 44.416),
        ("mask_rcnn_rn101", 84.239, 63.408),
    ],
)
def test_parameters_without_the_text_encoder(name, with_language, without):
    for prompting, expected in (("post", with_language), ("none", without)):
        with torch.device("meta"):
            model = build_model(name, read_classes("coco")[0], prompting=prompting)
        millions = sum(p.numel() for key, p in model.named_parameters() if "text_encoder" not in key) / 1e6
        assert millions == pytest.approx(expected, abs=6e-4), prompting


@pytest.mark.parametrize("name, prompting, expected", [
    ("retinanet_rn50", "none", 265.17), ("retinanet_rn50", "post", 285.18),
    ("retinanet_rn101", "none", 341.14), ("retinanet_rn101", "post", 359.90),
])  # fmt: skip
def test_multiply_adds_of_retinanet_at_800_x_1280(name, prompting, expected):
    with torch.device("meta"):
        model = build_model(name, read_classes("coco")[0], prompting=prompting).eval()
        if prompting != "none":  # the text is not counted: it is computed once
            model.encoder.embed_class_names = lambda memory: torch.empty(1, 80, memory.shape[-1])
        with FlopCounterMode(display=False) as counter:
            levels = list(model.extract_features(torch.empty(1, 3, 800, 1280))[0].values())
            model.head.classification_head(levels), model.head.regression_head(levels)
    assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=5e-3)


# ------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("prompting", ["post", "none"])
@pytest.mark.parametrize("name", ["retinanet_tiny", "mask_rcnn_tiny"])
def test_training_gives_every_parameter_a_gradient(name, prompting, images):
    torch.manual_seed(0)
    model = build_model(name, NAMES, prompting=prompting).train()
    losses = model(images, make_targets(images))
    names = {"class_loss", "box_loss"} | ({"aux_loss"} if prompting == "post" else set())
    assert losses.keys() == names | ({"rpn_class_loss", "rpn_box_loss", "mask_loss"} if "mask" in name else set())
    sum(losses.values()).backward()
    without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["retinanet_tiny", "mask_rcnn_tiny"])
def test_images_without_boxes_give_finite_losses(name, images):
    torch.manual_seed(0)
    model = build_model(name, NAMES).train()
    targets = make_targets(images)
    for emptied in ([0], [0, 1]):
        for i in emptied:
            targets[i] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
                          "masks": torch.zeros(0, *images[i].shape[1:], dtype=torch.uint8)}  # fmt: skip
        losses = model(images, targets)
        assert all(torch.isfinite(loss) for loss in losses.values())
        sum(losses.values()).backward()
    assert losses["aux_loss"] == 0 and losses["box_loss"] == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["retinanet_tiny", "mask_rcnn_tiny"])
def test_detections_are_in_the_images_own_pixels(name, images, monkeypatch):
    torch.manual_seed(0)
    model = build_model(name, NAMES).eval()
    monkeypatch.setattr("detection.SCORE_THRESHOLD", 0.0)  # random weights find nothing with confidence
    sizes = [(140, 300), (96, 64)]
    for found, scaled, image, size in zip(model(images), model(images, sizes=sizes), images, sizes, strict=True):
        height, width = image.shape[1:]
        assert 0 < len(found["boxes"]) <= 100 and found["labels"].dtype == torch.int64
        assert found["boxes"].min() >= 0 and found["boxes"].max(0).values[2:].le(torch.tensor([width, height])).all()
        assert (found["scores"].diff() <= 0).all()
        ratio = torch.tensor([size[1] / width, size[0] / height] * 2)
        torch.testing.assert_close(scaled["boxes"], found["boxes"] * ratio)
        if "mask" in name:
            assert found["masks"].shape == (len(found["boxes"]), height, width) and found["masks"].dtype == torch.bool
            assert scaled["masks"].shape[1:] == size
        else:
            assert "masks" not in found


@torch.no_grad()
def test_features_take_their_names_and_the_score_map_is_a_cosine(images):
    batch = batch_images(images)
    assert batch.tensors.shape == (2, 3, 96, 128) and batch.image_sizes == [(70, 100), (96, 64)]
    assert (batch.tensors[0, :, 70:] == 0).all() and (batch.tensors[1, :, :, 64:] == 0).all()
    for name, levels in (("retinanet_tiny", "34567"), ("mask_rcnn_tiny", "23456")):
        model = build_model(name, NAMES, tau=0.05).eval()
        features, score_map = model.extract_features(batch.tensors)
        assert list(features) == [f"p{level}" for level in levels]
        assert score_map.shape == (2, 3, 3, 4) and score_map.abs().max() <= 1
        pyramid, _, _ = model.encoder(batch.tensors)
        torch.testing.assert_close(pyramid[3][:, -3:], score_map / 0.05)  # Released code: s / tau joins the pyramid
        assert build_model(name, NAMES, prompting="none").eval().extract_features(batch.tensors)[1] is None


def test_input_that_would_fail_later_is_named(images):
    model = build_model("mask_rcnn_tiny", NAMES).train()
    good = make_targets(images)
    bad = {
        "a dictionary for each image": good[:1],
        "targets need labels": [{"boxes": t["boxes"], "masks": t["masks"]} for t in good],
        "labels \\(N,\\) int64": [{**t, "labels": t["labels"].int()} for t in good],
        "the 3 classes are 0 to 2": [{**t, "labels": t["labels"] + 2} for t in good],
        "zero or negative size": [{**t, "boxes": t["boxes"][:, [2, 1, 0, 3]]} for t in good],
        "masks have to be": [{**t, "masks": t["masks"][:, :5]} for t in good],
    }
    for message, targets in bad.items():
        with pytest.raises(ValueError, match=message):
            model(images, targets)
    with pytest.raises(ValueError, match="training needs targets"):
        model(images)
    with pytest.raises(ValueError, match="list of \\(3, H, W\\) float"):
        model.eval()([(image * 255).byte() for image in images])
    with pytest.raises(ValueError, match="no detector named 'rn50': choose one of retinanet_rn50"):
        build_model("rn50", NAMES)
    with pytest.raises(TypeError):
        build_model("retinanet_tiny", NAMES, tua=0.07)


@pytest.mark.parametrize("name", ["retinanet_tiny", "mask_rcnn_tiny"])
@torch.no_grad()
def test_a_checkpoint_says_all_of_its_model(name, images, tmp_path):
    model = build_model(name, NAMES, tau=0.1, num_contexts=4).eval()
    save_checkpoint(tmp_path / "a.pt", model)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert (loaded.name, loaded.settings, loaded.class_names) == (name, model.settings, NAMES)
    assert not loaded.training and loaded.tau == 0.1
    batch = batch_images(images).tensors
    for x, y in zip(model.extract_features(batch)[0].values(), loaded.extract_features(batch)[0].values(), strict=True):
        torch.testing.assert_close(x, y)


def test_a_segmentation_checkpoint_is_no_detector(tmp_path):
    save_checkpoint(tmp_path / "s.pt", denseclip.build_model("tiny", NAMES))
    with pytest.raises(ValueError, match="is no detector"):
        load_checkpoint(tmp_path / "s.pt")
    torch.save({"state_dict": {"decode_head.conv_seg.weight": torch.zeros(1)}}, tmp_path / "r.pth")
    with pytest.raises(ValueError, match="neither a RetinaNet nor a Mask R-CNN"):
        load_checkpoint(tmp_path / "r.pth")


@pytest.mark.parametrize("prompting", ["post", "none"])
@pytest.mark.parametrize("family", ["retinanet", "mask_rcnn"])
def test_released_names_become_ours(family, prompting, tmp_path):
    golden = torch.load(GOLDEN / f"{family}_denseclip_r50.pt", weights_only=True)
    released = {}  # our name: the released code's
    for key in golden["keys"]:
        names = [re.sub(old, new, key) for old, new in RELEASED_NAMES[family].items() if re.match(old, key)]
        released[names[0] if names else key] = key
    model = build_model(f"{family}_tiny", NAMES, prompting=prompting)
    weights = {released.get(key, key).removeprefix("encoder."): value for key, value in model.state_dict().items()}
    assert not any(key.startswith("head.") for key in weights)
    torch.save({"state_dict": weights, "meta": {"CLASSES": ("cat", "dog", "traffic light")}}, tmp_path / "released.pth")
    loaded = load_checkpoint(tmp_path / "released.pth")
    assert loaded.name == model.name and loaded.class_names == NAMES and loaded.settings == model.settings
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    torch.save({"state_dict": weights}, tmp_path / "nameless.pth")
    with pytest.raises(ValueError, match="a model of 3 classes, but 0 names; give class_names"):
        load_checkpoint(tmp_path / "nameless.pth")
    assert load_checkpoint(tmp_path / "nameless.pth", NAMES).class_names == NAMES


@pytest.mark.parametrize("name", ["retinanet_tiny", "mask_rcnn_tiny"])
def test_boxes_keep_full_precision_under_autocast(name, images):
    torch.manual_seed(0)
    model = build_model(name, NAMES).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, make_targets(images))
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for found in model.eval()(images):
            assert found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_presets_are_those_of_the_paper_and_a_tiny_one():
    assert set(PRESETS) == {f"{d}_{e}" for d in ("retinanet", "mask_rcnn") for e in ("rn50", "rn101", "tiny")}


# ------------------------------------------------------------------------------------------------ the parts


def test_eq_8_counts_pixels_in_boxes():
    boxes = torch.tensor([[4.0, 8.0, 15.9, 16.0], [0.0, 0.0, 32.0, 24.0], [-5.0, 4.0, 9.0, 9.0]])
    y = box_map(boxes, torch.tensor([0, 2, 2]), 3, height=6, width=8)
    expected = torch.zeros(3, 6, 8)
    expected[0, 2:4, 1:3] = 1
    expected[2, 0:5, 0:7] = 1  # Released code: the last row and column are in no box
    torch.testing.assert_close(y, expected)

    logits = torch.randn(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    target = [{"boxes": boxes[:1], "labels": torch.tensor([0])}]
    p = logits[0, :, 2:4, 1:3].sigmoid()  # (K, 2, 2)
    by_hand = -(p[0].log().sum() + (1 - p[1:]).log().sum()) / p.numel()
    torch.testing.assert_close(box_text_loss(logits, target, (24, 32)), by_hand)
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]
    assert box_text_loss(logits, nothing, (24, 32)) == 0


def test_anchors_keep_their_strides_where_levels_were_rounded_up():
    levels = [torch.zeros(1, 1, 100, 160), torch.zeros(1, 1, 13, 20)]
    images = ImageList(torch.zeros(1, 3, 800, 1280), [(800, 1280)])
    anchors = Anchors((8, 64), ((4 * 2 ** (1 / 3),), (10.0,)))(images, levels)
    first, last = anchors[0][:3], anchors[0][-3:]
    sides = first[:, 2:] - first[:, :2]
    torch.testing.assert_close(sides.prod(1), torch.full((3,), (4 * 2 ** (1 / 3)) ** 2))       # not rounded
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close((last[:, :2] + last[:, 2:]) / 2, torch.tensor([[19.0 * 64, 12 * 64]] * 3))


def test_box_deltas_are_clamped_on_both_sides():
    boxes, weights = torch.tensor([[0.0, 0.0, 100.0, 200.0]]), (10.0, 10.0, 5.0, 5.0)
    tiny = ClampedBoxCoder(weights).decode_single(torch.tensor([[0.0, 0.0, -1000.0, -1000.0]]), boxes)
    torch.testing.assert_close(tiny[:, 2:] - tiny[:, :2], torch.tensor([[100.0, 200.0]]) * 16 / 1000)
    deltas = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[10.0, 20.0, 50.0, 90.0]]).expand(5, 4)
    torch.testing.assert_close(ClampedBoxCoder(weights).decode_single(deltas, boxes),
                               BoxCoder(weights).decode_single(deltas, boxes))  # fmt: skip


def test_a_box_that_no_anchor_matches_gets_its_best_ones():
    iou = torch.tensor([[0.6, 0.45, 0.1, 0.0, 0.41], [0.55, 0.2, 0.2, 0.0, 0.3], [0.0, 0.0, 0.0, 0.0, 0.42]])
    # The last anchor is the best of the last box. So is the first of the second box, which overlaps the first box more.
    assert AnchorMatcher(0.5, 0.4)(iou.clone()).tolist() == [1, -2, -1, -1, 2]
    assert Matcher(0.5, 0.4, True)(iou.clone()).tolist() == [0, -2, -1, -1, 2]
    assert AnchorMatcher(0.5, 0.4, least=0.43)(iou.clone()).tolist() == [1, -2, -1, -1, -2]
    assert AnchorMatcher(0.5, 0.4)(torch.zeros(1, 3)).tolist() == [-1, -1, -1]  # a box that no anchor touches


def test_roi_align_is_aligned_and_takes_the_level_of_the_boxs_size():
    features = {f"p{i}": torch.full((1, 1, 512 // 2**i, 512 // 2**i), float(i)) for i in range(2, 7)}
    features["p2"] = torch.arange(128.0).expand(1, 1, 128, 128)  # the column's number
    boxes = torch.tensor([[40.0, 40.0, 80.0, 80.0], [0, 0, 112, 112], [0, 0, 300, 300], [0, 0, 500, 500]])
    pooled = RoIAlign(2)(features, [boxes])
    assert pooled[1:].mean((1, 2, 3)).tolist() == [3, 4, 5]
    # 10 to 20 in P2's columns, halves centred on 12.5 and 17.5; column i's centre is i + 0.5
    torch.testing.assert_close(pooled[0, 0], torch.tensor([[12.0, 17.0], [12.0, 17.0]]))


def test_masks_are_pasted_where_their_boxes_are():
    boxes = torch.tensor([[2.0, 3.0, 12.0, 9.0], [-4.0, -4.0, 4.0, 4.0], [2.5, 3.5, 11.5, 8.5], [5.0, 5.0, 5.0, 5.0]])
    pasted = paste_masks(torch.ones(4, 28, 28), boxes, (12, 16))
    expected = torch.zeros(4, 12, 16, dtype=torch.bool)
    expected[0, 3:9, 2:12] = True
    expected[1, :4, :4] = True
    expected[2, 4:8, 3:11] = True  # pixels whose centres are well inside; those on the border count half, or a quarter
    assert torch.equal(pasted[:2], expected[:2])
    assert (pasted[2] | ~expected[2]).all() and not pasted[2, :3].any() and not pasted[3].any()
    half = torch.zeros(1, 28, 28)
    half[:, :, :14] = 1
    pasted = paste_masks(half, torch.tensor([[0.0, 0.0, 16.0, 12.0]]), (12, 16))
    assert pasted[0].float().mean(0).tolist() == [1] * 8 + [0] * 8


def test_nms_is_done_within_classes_and_keeps_100():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [50.0, 50.0, 60.0, 60.0]])
    scores = torch.tensor([[0.9, 0.8], [0.7, 0.01], [0.04, 0.06]])
    found = select(boxes[:, None].expand(-1, 2, -1), scores)
    assert found["labels"].tolist() == [0, 1, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.8, 0.06]))
    many = torch.arange(300.0)[:, None] * 20 + torch.tensor([0.0, 0.0, 10.0, 10.0])
    assert len(select(many[:, None], torch.linspace(0.1, 0.9, 300)[:, None])["boxes"]) == 100


def test_retinanet_losses_are_divided_by_the_batchs_positives():
    head = RetinaNet(3, 8).train()
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 4.5], [50.0, 50.0, 60.0, 60.0]])
    targets = [
        {"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]), "labels": torch.tensor([0, 2])},
    ]
    losses = head.losses(torch.zeros(2, 3, 3), torch.full((2, 3, 4), 0.5), anchors, targets)
    # Three positives with deltas 0, of which four are wrong by 0.5. The second anchor, IoU 0.45, counts for nothing.
    assert losses["box_loss"] == pytest.approx(4 * 0.5)
    positive, negative = 0.25 * 0.25 * 0.6931472, 0.75 * 0.25 * 0.6931472  # alpha (1 - p)^2 log 2
    assert losses["class_loss"].item() == pytest.approx((3 * positive + (2 * 6 - 3) * negative) / 3, rel=1e-5)
