"""The detectors are the paper's: their sizes are, and each part that differs from torchvision's does what its "Released
code" comment says. A model takes images of any sizes and returns boxes in their pixels."""

import pytest
import torch
from helpers import readme_block
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.image_list import ImageList

from data import read_classes
from denseclip import save_checkpoint
from detection import (
    AnchorMatcher,
    Anchors,
    ClampedBoxCoder,
    RetinaNet,
    RoIAlign,
    RoIHeads,
    batch_images,
    box_map,
    box_text_loss,
    build_model,
    load_checkpoint,
    paste_masks,
    postprocess,
)

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


# ------------------------------------------------------------------------------------------------ sizes


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


@pytest.mark.parametrize(
    "name, with_language, without", [("retinanet_rn50", 285.18, 265.17), ("retinanet_rn101", 359.90, 341.14)]
)
def test_multiply_adds_of_retinanet_at_800_x_1280(name, with_language, without):
    for prompting, expected in (("post", with_language), ("none", without)):
        with torch.device("meta"):
            model = build_model(name, read_classes("coco")[0], prompting=prompting).eval()
            if prompting == "post":  # the text encoder runs once and is not counted
                model.encoder.embed_class_names = lambda memory: torch.empty(1, 80, memory.shape[-1])
            with FlopCounterMode(display=False) as counter:
                levels = list(model.extract_features(torch.empty(1, 3, 800, 1280))[0].values())
                model.head.classification_head(levels), model.head.regression_head(levels)
        assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=5e-3), prompting


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
    for i in (0, 1):  # first one image without boxes, then both
        targets[i] = {key: value[:0] for key, value in targets[i].items()}
        losses = model(images, targets)
        assert all(torch.isfinite(loss) for loss in losses.values())
        sum(losses.values()).backward()
    assert losses["aux_loss"] == 0 and losses["box_loss"] == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["retinanet_tiny", "mask_rcnn_tiny"])
def test_detections_are_in_pixels_of_their_images(name, images, monkeypatch):
    torch.manual_seed(0)
    model = build_model(name, NAMES).eval()
    monkeypatch.setattr("detection.SCORE_THRESHOLD", 0.0)  # random weights are not confident of anything
    sizes = [(140, 300), (96, 64)]
    for plain, scaled, image, size in zip(model(images), model(images, sizes=sizes), images, sizes, strict=True):
        height, width = image.shape[1:]
        assert 0 < len(plain["boxes"]) <= 100 and plain["labels"].dtype == torch.int64
        assert plain["boxes"].min() >= 0 and plain["boxes"].max(0).values[2:].le(torch.tensor([width, height])).all()
        assert (plain["scores"].diff() <= 0).all()
        ratio = torch.tensor([size[1] / width, size[0] / height] * 2)
        torch.testing.assert_close(scaled["boxes"], plain["boxes"] * ratio)
        if "mask" in name:
            assert plain["masks"].shape == (len(plain["boxes"]), height, width) and plain["masks"].dtype == torch.bool
            assert scaled["masks"].shape[1:] == size
        else:
            assert "masks" not in plain


@torch.no_grad()
def test_feature_names_and_score_map(images):
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


def test_bad_input_is_named(images):
    model = build_model("mask_rcnn_tiny", NAMES).train()
    good = make_targets(images)
    bad = {
        "training needs targets": None,
        "one dictionary per image": good[:1],
        "targets need labels": [{"boxes": t["boxes"], "masks": t["masks"]} for t in good],
        "labels \\(N,\\) int64": [{**t, "labels": t["labels"].int()} for t in good],
        "boxes must be": [{**t, "boxes": t["boxes"][:, :2]} for t in good],
        "masks must be": [{**t, "masks": t["masks"][:, :5]} for t in good],
    }
    for message, targets in bad.items():
        with pytest.raises(ValueError, match=message):
            model(images, targets)
    with pytest.raises(ValueError, match="list of \\(3, H, W\\) float"):
        model.eval()([(image * 255).byte() for image in images])
    with pytest.raises(ValueError, match="no detector named 'rn50' .* choose one of retinanet_rn50"):
        build_model("rn50", NAMES)
    with pytest.raises(TypeError):
        build_model("retinanet_tiny", NAMES, tua=0.07)


@pytest.mark.parametrize("name", ["retinanet_tiny", "mask_rcnn_tiny"])
@torch.no_grad()
def test_a_checkpoint_restores_its_model(name, images, tmp_path):
    model = build_model(name, NAMES, tau=0.1, num_contexts=4).eval()
    save_checkpoint(tmp_path / "a.pt", model)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert (loaded.name, loaded.settings, loaded.class_names) == (name, model.settings, NAMES)
    assert not loaded.training and loaded.tau == 0.1
    batch = batch_images(images).tensors
    for x, y in zip(model.extract_features(batch)[0].values(), loaded.extract_features(batch)[0].values(), strict=True):
        torch.testing.assert_close(x, y)
    save_checkpoint(tmp_path / "frozen.pt", loaded.freeze_text())
    frozen, (features, score_map) = load_checkpoint(tmp_path / "frozen.pt"), model.extract_features(batch)
    assert torch.equal(frozen.extract_features(batch)[1], score_map) and len(features) == 5
    assert not any("text_encoder.transformer" in key for key in frozen.state_dict())


@pytest.mark.parametrize("name", ["retinanet_tiny", "mask_rcnn_tiny"])
def test_boxes_and_masks_keep_full_precision_under_autocast(name, images):
    torch.manual_seed(0)
    model = build_model(name, NAMES).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, make_targets(images))
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for detections in model.eval()(images):
            assert detections["boxes"].dtype == detections["scores"].dtype == torch.float32
    masks, boxes = torch.rand(3, 28, 28), torch.tensor([[3.3, 5.1, 80.7, 60.2]]).expand(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        pasted = paste_masks(masks, boxes, (70, 100))
    assert torch.equal(pasted, paste_masks(masks, boxes, (70, 100)))


def test_the_readmes_example_runs():
    exec(readme_block("mask_rcnn_tiny"), scope := {})
    assert scope["boxes"].shape == (len(scope["scores"]), 4) and scope["masks"].shape[1:] == (960, 1280)


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


def test_anchor_strides_are_powers_of_two_even_if_level_sizes_were_rounded_up():
    levels = [torch.zeros(1, 1, 100, 160), torch.zeros(1, 1, 13, 20)]
    images = ImageList(torch.zeros(1, 3, 800, 1280), [(800, 1280)])
    anchors = Anchors((8, 64), scales=(4 * 2 ** (1 / 3),))(images, levels)
    first, last = anchors[0][:3], anchors[0][-3:]
    sides = first[:, 2:] - first[:, :2]
    torch.testing.assert_close(sides.prod(1), torch.full((3,), (8 * 4 * 2 ** (1 / 3)) ** 2))  # not rounded
    torch.testing.assert_close(sides[:, 1] / sides[:, 0], torch.tensor([0.5, 1.0, 2.0]))
    torch.testing.assert_close((last[:, :2] + last[:, 2:]) / 2, torch.tensor([[19.0 * 64, 12 * 64]] * 3))


def test_box_deltas_are_clamped_on_both_sides():
    boxes, weights = torch.tensor([[0.0, 0.0, 100.0, 200.0]]), (10.0, 10.0, 5.0, 5.0)
    tiny = ClampedBoxCoder(weights).decode_single(torch.tensor([[0.0, 0.0, -1000.0, -1000.0]]), boxes)
    torch.testing.assert_close(tiny[:, 2:] - tiny[:, :2], torch.tensor([[100.0, 200.0]]) * 16 / 1000)
    deltas = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[10.0, 20.0, 50.0, 90.0]]).expand(5, 4)
    expected = BoxCoder(weights).decode_single(deltas, boxes)
    torch.testing.assert_close(ClampedBoxCoder(weights).decode_single(deltas, boxes), expected)


def test_a_box_that_no_anchor_matches_gets_its_best_anchors():
    iou = torch.tensor([[0.6, 0.45, 0.1, 0.0, 0.41], [0.55, 0.2, 0.2, 0.0, 0.3], [0.0, 0.0, 0.0, 0.0, 0.42]])
    # The last anchor is the best of the last box. So is the first of the second box, which overlaps the first box more.
    assert AnchorMatcher(0.5, 0.4)(iou.clone()).tolist() == [1, -2, -1, -1, 2]
    assert Matcher(0.5, 0.4, True)(iou.clone()).tolist() == [0, -2, -1, -1, 2]
    assert AnchorMatcher(0.5, 0.4, min_iou=0.43)(iou.clone()).tolist() == [1, -2, -1, -1, -2]
    assert AnchorMatcher(0.5, 0.4)(torch.zeros(1, 3)).tolist() == [-1, -1, -1]  # a box that no anchor touches


def test_roi_align_is_aligned_and_picks_the_level_by_box_size():
    features = {f"p{i}": torch.full((1, 1, 512 // 2**i, 512 // 2**i), float(i)) for i in range(2, 7)}
    features["p2"] = torch.arange(128.0).expand(1, 1, 128, 128)  # the column's number
    boxes = torch.tensor([[40.0, 40.0, 80.0, 80.0], [0, 0, 112, 112], [0, 0, 300, 300], [0, 0, 500, 500]])
    pooled = RoIAlign(2)(features, [boxes])
    assert pooled[1:].mean((1, 2, 3)).tolist() == [3, 4, 5]
    # 10 to 20 in P2's columns, halves centered at 12.5 and 17.5; the center of column i is i + 0.5
    torch.testing.assert_close(pooled[0, 0], torch.tensor([[12.0, 17.0], [12.0, 17.0]]))


@torch.no_grad()
def test_roi_heads_without_proposals_detect_nothing():
    features = {f"p{i}": torch.zeros(1, 8, 64 // 2**i, 64 // 2**i) for i in range(2, 7)}
    detections = RoIHeads(3, channels=8).eval()(features, [torch.zeros(0, 4)], [(64, 64)], None)[0]
    assert detections["boxes"].shape == (0, 4) and detections["masks"].shape == (0, 28, 28)


def test_masks_are_pasted_where_their_boxes_are():
    boxes = torch.tensor([[2.0, 3.0, 12.0, 9.0], [-4.0, -4.0, 4.0, 4.0], [2.5, 3.5, 11.5, 8.5], [5.0, 5.0, 5.0, 5.0]])
    pasted = paste_masks(torch.ones(4, 28, 28), boxes, (12, 16))
    expected = torch.zeros(4, 12, 16, dtype=torch.bool)
    expected[0, 3:9, 2:12] = True
    expected[1, :4, :4] = True
    expected[2, 4:8, 3:11] = True  # pixels whose centers are well inside; those on the border count a half or a quarter
    assert torch.equal(pasted[:2], expected[:2])
    assert (pasted[2] | ~expected[2]).all() and not pasted[2, :3].any() and not pasted[3].any()
    half = (torch.arange(28) < 14).float().expand(1, 28, 28)
    pasted = paste_masks(half, torch.tensor([[0.0, 0.0, 16.0, 12.0]]), (12, 16))
    assert pasted[0].float().mean(0).tolist() == [1] * 8 + [0] * 8


def test_nms_is_per_class_and_keeps_100():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [50.0, 50.0, 60.0, 60.0]])
    scores = torch.tensor([[0.9, 0.8], [0.7, 0.01], [0.04, 0.06]])
    detections = postprocess(boxes[:, None].expand(-1, 2, -1), scores, (100, 55))
    assert detections["labels"].tolist() == [0, 1, 1]
    torch.testing.assert_close(detections["scores"], torch.tensor([0.9, 0.8, 0.06]))
    assert detections["boxes"][2].tolist() == [50, 50, 55, 60]  # clipped to the image
    many = torch.arange(300.0)[:, None] * 20 + torch.tensor([0.0, 0.0, 10.0, 10.0])
    assert len(postprocess(many[:, None], torch.linspace(0.1, 0.9, 300)[:, None], (6000, 6000))["boxes"]) == 100


def test_retinanet_losses_are_divided_by_the_positives_of_the_batch():
    head = RetinaNet(3, 8).train()
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 4.5], [50.0, 50.0, 60.0, 60.0]])
    targets = [
        {"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]]), "labels": torch.tensor([0, 2])},
    ]
    losses = head.losses(torch.zeros(2, 3, 3), torch.full((2, 3, 4), 0.5), anchors, targets)
    # Three positives, all target deltas 0: each of four is off by 0.5. The second anchor, IoU 0.45, does not count.
    assert losses["box_loss"] == pytest.approx(4 * 0.5)
    positive, negative = 0.25 * 0.25 * 0.6931472, 0.75 * 0.25 * 0.6931472  # alpha (1 - p)^2 log 2
    assert losses["class_loss"].item() == pytest.approx((3 * positive + (2 * 6 - 3) * negative) / 3, rel=1e-5)
