"""DenseCLIP's detectors: RetinaNet and Mask R-CNN on the language-guided encoder of denseclip.py.

Read `Detector.forward` first: encoder, FPN, heads, as in Figure 3 of the paper. Anchors, matching, sampling, RoIAlign
and NMS are torchvision's. Where the released models compute something else, a small class of ours says so in a line
that begins with "Released code".

    model = build_model("mask_rcnn_rn50", class_names, clip="RN50")
    model.train(); losses = model(images, targets)      # images: list of (3, H, W), RGB in [0, 1], any sizes
    model.eval(); detections = model(images)            # list of dicts: boxes, scores, labels, and masks of Mask R-CNN

    paper      here                  shape
    ---------  --------------------  -------------------------------------------------------------------------
    x1 .. x4   pyramid               four maps, (B, C_i, H_i, W_i); s / tau is joined to the last
    s          score_map             (B, K, H / 32, W / 32)  cosine of every pixel with every class name
    y~         `box_map`             (B, K, H / 4, W / 4)    1 inside the boxes of a class
    P2 .. P7   features              FPN's levels by name, (B, channels, H / 2^i, W / 2^i)

Boxes are (x1, y1, x2, y2) in pixels; labels are int64 in [0, K).
"""

import re
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import roi_heads, rpn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, roi_align, sigmoid_focal_loss
from torchvision.ops.poolers import LevelMapper

import denseclip
from clip_model import MEAN, STD, load_weights
from denseclip import FPN, build_encoder, conv, read_checkpoint, read_released_encoder, released_class_names, resize

SCORE_THRESHOLD, NMS_THRESHOLD, DETECTIONS = 0.05, 0.5, 100  # of the detections that come out, for an image


# ------------------------------------------------------------------------------------------------ the method


class Detector(nn.Module):
    """Language-guided encoder, FPN, and the heads of RetinaNet or Mask R-CNN.

    encoder: as `denseclip.build_encoder` makes it, with the score map divided by tau where it joins the pyramid
    neck:    pyramid -> OrderedDict of FPN's levels
    head:    (features, ImageList, targets) -> losses in training, detections otherwise
    tau, aux_weight: of the auxiliary loss, Eq. (8)
    """

    def __init__(
        self, encoder: nn.Module, neck: nn.Module, head: nn.Module, tau: float = 0.07, aux_weight: float = 1.0
    ):
        super().__init__()
        self.encoder = encoder
        self.neck = neck
        self.head = head
        self.tau, self.aux_weight = tau, aux_weight

    @property
    def class_names(self) -> list[str]:
        return self.encoder.class_names

    def forward(
        self,
        images: list[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        sizes: list[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, detections in evaluation.

        images:  (3, H, W) each, RGB in [0, 1], of any sizes. They are normalised and padded, not resized: resizing to
                 what the model was trained on is the data's part
        targets: in training, for every image: boxes (N, 4) float, labels (N,) int64, and for Mask R-CNN
                 masks (N, H, W), 0 or 1
        sizes:   (H, W) for every image, to which its detections are scaled; its own by default
        return:  {name: loss}, whose sum is to be minimised; or for every image, best first, at most 100:
                 boxes (N, 4), scores (N,), labels (N,), and of Mask R-CNN masks (N, H, W) bool
        """
        check_images(images)
        if self.training:
            check_targets(images, targets, len(self.class_names), masks=isinstance(self.head, MaskRCNN))
        batch = batch_images(images)                                          # (B, 3, H, W)
        features, score_map = self.extract_features(batch.tensors)            # Eqs. (1) to (6), then FPN
        outputs = self.head(features, batch, targets)
        if not self.training:
            wanted = sizes or batch.image_sizes
            return [scale_to(*each) for each in zip(outputs, batch.image_sizes, wanted, strict=True)]

        if score_map is not None and self.aux_weight:
            # Eq. (8): BCE(sigmoid(s / tau), y~)
            aux_loss = box_text_loss(score_map / self.tau, targets, batch.tensors.shape[-2:])
            outputs["aux_loss"] = self.aux_weight * aux_loss
        return outputs

    def extract_features(self, batch: Tensor) -> tuple[OrderedDict[str, Tensor], Tensor | None]:
        """batch: (B, 3, H, W) normalised with CLIP's MEAN and STD, H and W multiples of 32.

        return: FPN's levels, "p2" to "p6" or "p3" to "p7"; the score map (B, K, H / 32, W / 32), cosines, or None
        """
        pyramid, score_map, _ = self.encoder(batch)
        return self.neck(pyramid), score_map


def batch_images(images: list[Tensor], multiple: int = 32) -> ImageList:
    """Images in [0, 1] normalised, then padded with zeros at the bottom and on the right to one size."""
    mean, std = (images[0].new_tensor(values)[:, None, None] for values in (MEAN, STD))
    sizes = [tuple(image.shape[-2:]) for image in images]
    height, width = (-(-max(side) // multiple) * multiple for side in zip(*sizes, strict=True))
    batch = images[0].new_zeros(len(images), 3, height, width)
    for padded, image, (h, w) in zip(batch, images, sizes, strict=True):
        padded[:, :h, :w] = (image - mean) / std
    return ImageList(batch, sizes)


def box_text_loss(logits: Tensor, targets: list[dict[str, Tensor]], size: tuple[int, int]) -> Tensor:
    """Eq. (8): binary cross-entropy of every pixel's score for every class against the boxes, at stride 4.

    logits: (B, K, h, w), s / tau; size: (H, W) of the padded images
    Released code: only pixels inside a box count. (It is NaN where no box covers any; here the loss is 0.)
    """
    height, width = size[0] // 4, size[1] // 4
    logits = resize(logits.float(), (height, width))
    y = torch.stack([box_map(t["boxes"], t["labels"], logits.shape[1], height, width) for t in targets])
    inside = y.amax(1, keepdim=True)                                          # (B, 1, H / 4, W / 4)
    loss = F.binary_cross_entropy_with_logits(logits, y, reduction="none") * inside
    return loss.sum() / (inside.sum() * logits.shape[1]).clamp(min=1)


def box_map(boxes: Tensor, labels: Tensor, num_classes: int, height: int, width: int) -> Tensor:
    """y~ of one image: (K, height, width) at stride 4, 1 in the boxes of a class.

    Released code: a box's end is outside, and clamped to the last row or column, which is thus in no box.
    """
    last = torch.tensor([width - 1, height - 1] * 2, device=boxes.device)
    x1, y1, x2, y2 = (boxes / 4).long().clamp(min=0).minimum(last)[:, :, None].unbind(1)  # (N, 1)
    rows, columns = (torch.arange(n, device=boxes.device) for n in (height, width))
    rows, columns = (rows >= y1) & (rows < y2), (columns >= x1) & (columns < x2)
    classes = F.one_hot(labels, num_classes)
    return torch.einsum("nk,nh,nw->khw", classes.float(), rows.float(), columns.float()).clamp(max=1).float()


def check_images(images: list[Tensor]) -> None:
    if not len(images) or any(x.ndim != 3 or len(x) != 3 or not x.is_floating_point() for x in images):
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in images) or "none"
        raise ValueError(f"images have to be a list of (3, H, W) float tensors in [0, 1], got {shapes}")


def check_targets(images: list[Tensor], targets: list[dict] | None, num_classes: int, masks: bool) -> None:
    """A ValueError for what would otherwise fail later, or train on something else than was meant."""
    if targets is None or len(targets) != len(images):
        raise ValueError("training needs targets, a dictionary for each image; model.eval() for detections without")
    for image, target in zip(images, targets, strict=True):
        if missing := {"boxes", "labels", *(["masks"] if masks else [])} - target.keys():
            raise ValueError(f"targets need {' and '.join(sorted(missing))}")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.shape != (len(labels), 4) or not boxes.is_floating_point() or labels.dtype != torch.int64:
            raise ValueError(
                f"boxes have to be (N, 4) float and labels (N,) int64, got {tuple(boxes.shape)} {boxes.dtype} and "
                f"{tuple(labels.shape)} {labels.dtype}"
            )
        if masks and target["masks"].shape != (len(labels), *image.shape[1:]):
            raise ValueError(
                f"masks have to be (N, H, W) = {(len(labels), *image.shape[1:])}, got {tuple(target['masks'].shape)}"
            )
        if (boxes[:, 2:] <= boxes[:, :2]).any():
            raise ValueError("a box of zero or negative size: boxes are (x1, y1, x2, y2) with x1 < x2 and y1 < y2")
        if ((labels < 0) | (labels >= num_classes)).any():
            raise ValueError(f"labels {labels.unique().tolist()}: the {num_classes} classes are 0 to {num_classes - 1}")


# ------------------------------------------------------------------------------------------------ pyramids


class RetinaNetFPN(FPN):
    """P3 to P5 by FPN from x2 .. x4, P6 and P7 by strided convolutions from x4 on."""

    def __init__(self, in_channels: list[int], channels: int = 256):
        super().__init__(in_channels[1:], channels)
        self.p6 = conv(in_channels[-1], channels, 3, stride=2).conv
        self.p7 = conv(channels, channels, 3, stride=2).conv

    def forward(self, pyramid: list[Tensor]) -> OrderedDict[str, Tensor]:
        p6 = self.p6(pyramid[-1])
        p7 = self.p7(p6)  # Released code: no ReLU in between
        return OrderedDict(zip(("p3", "p4", "p5", "p6", "p7"), (*super().forward(pyramid[1:]), p6, p7), strict=True))


class MaskRCNNFPN(FPN):
    """P2 to P5 by FPN from x1 .. x4; P6 is every second position of P5, for the region proposals alone."""

    def forward(self, pyramid: list[Tensor]) -> OrderedDict[str, Tensor]:
        levels = super().forward(pyramid)
        p6 = F.max_pool2d(levels[-1], 1, stride=2)
        return OrderedDict(zip(("p2", "p3", "p4", "p5", "p6"), (*levels, p6), strict=True))


# ------------------------------------------------------------------------------------------------ boxes


class Anchors(AnchorGenerator):
    """Anchors centred on the corners of a level's cells, of ratios (height / width) 0.5, 1 and 2.

    strides: pixels, for each level; sizes: pixels, for each level one or more
    """

    def __init__(self, strides: tuple[int, ...], sizes: tuple[tuple[float, ...], ...]):
        super().__init__(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        self.strides = strides

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu") -> Tensor:
        # Released code: sides are not rounded.
        sizes, ratios = (torch.tensor(values, dtype=dtype, device=device) for values in (scales, aspect_ratios))
        widths, heights = (sizes / ratios.sqrt()[:, None]).flatten(), (sizes * ratios.sqrt()[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, images: ImageList, features: list[Tensor]) -> list[Tensor]:
        # Released code: the strides are powers of two, also where a level's size was rounded up.
        self.set_cell_anchors(torch.float32, features[0].device)
        levels = self.grid_anchors([x.shape[-2:] for x in features], [(stride, stride) for stride in self.strides])
        return [torch.cat(levels)] * len(images.image_sizes)


class ClampedBoxCoder(BoxCoder):
    """Box deltas. Released code: log sizes are clamped on both sides, not from above alone."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        deltas = rel_codes.unflatten(1, (-1, 4))
        low = [-torch.inf, -torch.inf, *(-self.bbox_xform_clip * weight for weight in self.weights[2:])]
        return super().decode_single(torch.maximum(deltas, deltas.new_tensor(low)).flatten(1), boxes)


class AnchorMatcher(Matcher):
    """Anchors to boxes by IoU; a box that none matches gets its best anchors, if their IoU is `least` or more.

    Released code: such an anchor belongs to that box, also if it overlaps another box more.
    """

    def __init__(self, high: float, low: float, least: float = 0.0):
        super().__init__(high, low, allow_low_quality_matches=True)
        self.least = least

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        best = match_quality_matrix.amax(1, keepdim=True)                     # (boxes, 1)
        chosen = (match_quality_matrix == best) & (best >= self.least) & (best > 0)
        boxes, anchors = chosen.nonzero(as_tuple=True)
        matches[anchors] = -1
        matches.scatter_reduce_(0, anchors, boxes, "amax")                    # of several boxes the last


def select(boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """The detections of an image: NMS within each class, the best 100.

    boxes: (N, K, 4), each class's own or expanded; scores: (N, K)
    """
    row, labels = (scores > SCORE_THRESHOLD).nonzero(as_tuple=True)
    boxes, scores = boxes[row, labels], scores[row, labels]
    keep = batched_nms(boxes, scores, labels, NMS_THRESHOLD)[:DETECTIONS]
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


def scale_to(detections: dict[str, Tensor], found: tuple[int, int], size: tuple[int, int]) -> dict[str, Tensor]:
    """Detections in an image of (H, W) `found` as those of the same image of (H, W) `size`, masks pasted into it."""
    ratio = (size[1] / found[1], size[0] / found[0]) * 2
    scaled = {**detections, "boxes": detections["boxes"] * detections["boxes"].new_tensor(ratio)}
    if "masks" in scaled:
        scaled["masks"] = paste_masks(scaled["masks"], scaled["boxes"], size)
    return scaled


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks in their boxes -> masks of the image: bilinear, at least 0.5.

    masks: (N, M, M) probabilities; boxes: (N, 4) in the image's pixels; size: (H, W); return: (N, H, W) bool
    Released code: to the boxes as they are (torchvision's function rounds them to whole pixels).
    """

    def weights(start: Tensor, end: Tensor, length: int) -> Tensor:
        """Of every cell of the mask (the last dimension) at every pixel, (N, length, M)."""
        pixels = torch.arange(length, device=boxes.device) + 0.5
        cells = torch.arange(masks.shape[-1], device=boxes.device) + 0.5
        position = (pixels - start[:, None]) / (end - start)[:, None].clamp(min=1e-6) * len(cells)
        return (1 - (position[..., None] - cells).abs()).clamp(min=0)

    x1, y1, x2, y2 = boxes.unbind(1)
    rows, columns = weights(y1, y2, size[0]), weights(x1, x2, size[1])
    pasted = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    for i in range(len(masks)):  # one by one: as probabilities they would take a gigabyte
        pasted[i] = rows[i] @ masks[i] @ columns[i].T >= 0.5
    return pasted


# ------------------------------------------------------------------------------------------------ RetinaNet


class RetinaNet(nn.Module):
    """RetinaNet (Lin et al., 2017): every anchor of every level classified and moved."""

    strides = (8, 16, 32, 64, 128)

    def __init__(self, num_classes: int, channels: int = 256):
        super().__init__()
        sizes = tuple(tuple(4 * stride * 2 ** (i / 3) for i in range(3)) for stride in self.strides)
        self.anchors = Anchors(self.strides, sizes)
        self.classification_head = RetinaNetClassificationHead(channels, 9, num_classes)
        self.regression_head = RetinaNetRegressionHead(channels, 9)
        self.matcher = AnchorMatcher(0.5, 0.4)
        self.box_coder = ClampedBoxCoder((1.0, 1.0, 1.0, 1.0))

    def forward(
        self, features: dict[str, Tensor], images: ImageList, targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        levels = list(features.values())
        logits = self.classification_head(levels).float()                     # (B, A, K), A: anchors of all levels
        deltas = self.regression_head(levels).float()                         # (B, A, 4)
        anchors = self.anchors(images, levels)[0]                             # (A, 4)
        if self.training:
            return self.losses(logits, deltas, anchors, targets)
        counts = [9 * x.shape[-2] * x.shape[-1] for x in levels]
        detected = zip(logits.sigmoid(), deltas, images.image_sizes, strict=True)
        return [self.detect(scores, moves, anchors, counts, size) for scores, moves, size in detected]

    def losses(self, logits: Tensor, deltas: Tensor, anchors: Tensor, targets: list[dict[str, Tensor]]) -> dict:
        """Focal loss of classes, L1 loss of boxes. Released code: both divided by the batch's positive anchors."""
        class_loss, box_loss, positives = 0.0, 0.0, 0
        for scores, moves, target in zip(logits, deltas, targets, strict=True):
            matches = anchors.new_full((len(anchors),), Matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64)
            if len(target["boxes"]):
                matches = self.matcher(box_iou(target["boxes"], anchors))
            counted, positive = matches != Matcher.BETWEEN_THRESHOLDS, matches >= 0
            y = torch.zeros_like(scores)
            y[positive, target["labels"][matches[positive]]] = 1
            wanted = self.box_coder.encode_single(target["boxes"][matches[positive]], anchors[positive])
            class_loss += sigmoid_focal_loss(scores[counted], y[counted], reduction="sum")
            box_loss += F.l1_loss(moves[positive], wanted, reduction="sum")
            positives += positive.sum().clamp(min=1)
        return {"class_loss": class_loss / positives, "box_loss": box_loss / positives}

    def detect(
        self, scores: Tensor, deltas: Tensor, anchors: Tensor, counts: list[int], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """scores: (A, K), deltas and anchors: (A, 4) of one image of `size` (H, W); counts: anchors of each level."""
        kept, first = [], 0
        for best in scores.amax(1).split(counts):  # Released code: the best 1000 anchors of a level, with all classes
            kept.append(first + best.topk(min(1000, len(best))).indices)
            first += len(best)
        kept = torch.cat(kept)
        boxes = clip_boxes_to_image(self.box_coder.decode_single(deltas[kept], anchors[kept]), size)
        return select(boxes[:, None].expand(-1, scores.shape[1], -1), scores[kept])


# ------------------------------------------------------------------------------------------------ Mask R-CNN


class MaskRCNN(nn.Module):
    """Mask R-CNN (He et al., 2017): region proposals, then for each its class, a better box, and a mask."""

    strides = (4, 8, 16, 32, 64)

    def __init__(self, num_classes: int, channels: int = 256):
        super().__init__()
        self.rpn = RegionProposalNetwork(self.strides, channels)
        self.roi_heads = RoIHeads(num_classes, channels)

    def forward(
        self, features: dict[str, Tensor], images: ImageList, targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        proposals, losses = self.rpn(images, features, targets)
        outputs = self.roi_heads(features, proposals, images.image_sizes, targets)
        if not self.training:
            return outputs
        return {"rpn_class_loss": losses["loss_objectness"], "rpn_box_loss": losses["loss_rpn_box_reg"], **outputs}


class RPNHead(rpn.RPNHead):
    """torchvision's, with outputs in full precision also under autocast: boxes need it."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class RegionProposalNetwork(rpn.RegionProposalNetwork):
    """torchvision's region proposals, with the released code's anchors, thresholds and loss."""

    def __init__(self, strides: tuple[int, ...], channels: int):
        super().__init__(
            Anchors(strides, tuple((8 * stride,) for stride in strides)), RPNHead(channels, 3),
            fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000}, nms_thresh=0.7,
            post_nms_top_n={"training": 1000, "testing": 1000},  # torchvision keeps 2000 in training
        )
        self.box_coder = ClampedBoxCoder((1.0, 1.0, 1.0, 1.0))
        self.proposal_matcher = AnchorMatcher(0.7, 0.3, least=0.3)

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(chosen).bool() for chosen in self.fg_bg_sampler(labels))
        sampled = positive | negative
        class_loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], torch.cat(labels)[sampled])
        # Released code: L1, not smooth L1
        box_loss = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum")
        return class_loss, box_loss / sampled.sum()


class RoIAlign(nn.Module):
    """Features of boxes, (N, C, size, size), each from the level of P2 .. P5 that suits its size.

    Released code: aligned, with as many samples as the box is large.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size, self.level_of = size, LevelMapper(2, 5)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_sizes=None) -> Tensor:
        rois = torch.cat([F.pad(each, (1, 0), value=i) for i, each in enumerate(boxes)])  # (N, 5)
        levels, x = self.level_of(boxes), features["p2"]
        pooled = x.new_zeros(len(rois), x.shape[1], self.size, self.size)
        for i in range(2, 6):
            here = (levels == i - 2).nonzero()[:, 0]
            pooled[here] = roi_align(features[f"p{i}"], rois[here], self.size, 0.5**i, aligned=True).to(x.dtype)
        return pooled


class BoxPredictor(FastRCNNPredictor):
    """Class logits (N, K + 1) and deltas (N, 4 K). Released code: the background is the last class, without a box."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__(in_channels, num_classes + 1)
        self.bbox_pred = nn.Linear(in_channels, num_classes * 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x).float(), self.bbox_pred(x).float()


class RoIHeads(roi_heads.RoIHeads):
    """What becomes of the proposals. torchvision's sampling; forward, losses and background are the released code's."""

    def __init__(self, num_classes: int, channels: int = 256):
        super().__init__(
            RoIAlign(7), TwoMLPHead(channels * 7 * 7, channels * 4), BoxPredictor(channels * 4, num_classes),
            fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=512, positive_fraction=0.25,
            bbox_reg_weights=None, score_thresh=None, nms_thresh=None, detections_per_img=None,  # see `select`
            mask_roi_pool=RoIAlign(14), mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(channels, channels, num_classes),
        )  # fmt: skip
        # torchvision's start divides by the number of classes: with few, masks would start very sure and wrong.
        nn.init.normal_(self.mask_predictor.mask_fcn_logits.weight, std=0.001)
        nn.init.zeros_(self.mask_predictor.mask_fcn_logits.bias)
        self.num_classes = num_classes
        self.box_coder = ClampedBoxCoder((10.0, 10.0, 5.0, 5.0))  # one over the deltas' stds 0.1, 0.1, 0.2, 0.2

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if self.training:
            # torchvision's sampling calls the background 0 and the classes 1 to K.
            shifted = [{**target, "labels": target["labels"] + 1} for target in targets]
            proposals, matches, labels, deltas = self.select_training_samples(proposals, shifted)
            positive = [each > 0 for each in labels]
            losses = self.box_losses(*self.boxes(features, proposals), torch.cat(labels) - 1, torch.cat(deltas))
            proposals, matches, labels = (
                [x[chosen] for x, chosen in zip(each, positive, strict=True)] for each in (proposals, matches, labels)
            )
            masks = [target["masks"] for target in targets]
            losses["mask_loss"] = self.mask_loss(
                self.masks(features, proposals), torch.cat(labels) - 1, proposals, masks, matches
            )
            return losses

        logits, deltas = self.boxes(features, proposals)
        scores = logits.softmax(1)[:, :-1]                                    # (N, K)
        boxes = self.box_coder.decode(deltas, proposals)                      # (N, K, 4)
        counts = [len(each) for each in proposals]
        detections = [
            select(clip_boxes_to_image(moved, size), score)
            for moved, score, size in zip(boxes.split(counts), scores.split(counts), image_shapes, strict=True)
        ]
        masks = self.masks(features, [found["boxes"] for found in detections]).sigmoid()
        for found, mask in zip(detections, masks.split([len(found["boxes"]) for found in detections]), strict=True):
            found["masks"] = own_class(mask, found["labels"])                 # (N, 28, 28)
        return detections

    def boxes(self, features: dict[str, Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (N, K + 1), the background's last, and deltas (N, 4 K) of boxes."""
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes)))

    def masks(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """Mask logits in boxes, (N, K, 28, 28)."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))).float()

    def box_losses(self, logits: Tensor, deltas: Tensor, labels: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """labels: (N,), -1 for the background; wanted: (N, 4) deltas."""
        positive = labels >= 0
        own = own_class(deltas[positive].unflatten(1, (-1, 4)), labels[positive])
        return {
            "class_loss": F.cross_entropy(logits, labels.where(labels >= 0, self.num_classes)),
            # Released code: L1, not smooth L1
            "box_loss": F.l1_loss(own, wanted[positive], reduction="sum") / len(labels),
        }

    def mask_loss(
        self, logits: Tensor, labels: Tensor, boxes: list[Tensor], masks: list[Tensor], matches: list[Tensor]
    ) -> Tensor:
        """logits: (N, K, M, M) in boxes, positive ones; masks: (n, H, W) of each image; matches: indices into them."""
        if not len(logits):
            return logits.sum()
        # Released code: the wanted mask is 0 or 1 after it was brought to M x M, too.
        rois = [torch.cat([match[:, None].to(box), box], 1) for match, box in zip(matches, boxes, strict=True)]
        pooled = [
            roi_align(mask[:, None].to(roi), roi, logits.shape[-1], aligned=True)
            for mask, roi in zip(masks, rois, strict=True)
        ]
        wanted = (torch.cat(pooled)[:, 0] >= 0.5).float()                     # (N, M, M)
        return F.binary_cross_entropy_with_logits(own_class(logits, labels), wanted)


def own_class(x: Tensor, labels: Tensor) -> Tensor:
    """(N, K, ...) -> (N, ...), what each has for its label."""
    return x[torch.arange(len(x), device=x.device), labels]


# ------------------------------------------------------------------------------------------------ factories


class Preset(NamedTuple):
    """A named detector."""

    head: type[nn.Module]
    neck: type[FPN]
    encoder: str  # preset of denseclip.py
    crop_size: int  # pixels a side, for which the positional grid is set up


PRESETS = {
    "retinanet_rn50": Preset(RetinaNet, RetinaNetFPN, "rn50", 1344),
    "retinanet_rn101": Preset(RetinaNet, RetinaNetFPN, "rn101", 1344),
    "mask_rcnn_rn50": Preset(MaskRCNN, MaskRCNNFPN, "rn50", 1344),
    "mask_rcnn_rn101": Preset(MaskRCNN, MaskRCNNFPN, "rn101", 1344),
    "retinanet_tiny": Preset(RetinaNet, RetinaNetFPN, "tiny", 640),  # for a CPU, from random weights
    "mask_rcnn_tiny": Preset(MaskRCNN, MaskRCNNFPN, "tiny", 640),
}


def build_model(
    name: str,
    class_names: list[str],
    clip: str | None = None,
    *,
    aux_weight: float = 1.0,
    tau: float = 0.07,
    **encoder_settings,
) -> Detector:
    """A detector.

    name: one of PRESETS; clip: weights by name or path (see `clip_model.load_clip`), None for random ones
    aux_weight, tau: of the auxiliary loss, Eq. (8); tau divides the score map in the pyramid, too
    encoder_settings: see `denseclip.build_encoder`; prompting="none" is the baseline without language
    """
    if name not in PRESETS:
        raise ValueError(f"no detector named {name!r}: choose one of {', '.join(PRESETS)}")
    head, neck, encoder_name, crop_size = PRESETS[name]
    # Released code: s / tau joins the pyramid, and positions are the corner of a large grid.
    settings = {"crop_size": crop_size, "crop_positions": True, "score_temperature": tau, **encoder_settings}
    encoder = build_encoder(encoder_name, class_names, clip, **settings)
    channels = denseclip.PRESETS[encoder_name].channels
    model = Detector(encoder, neck(encoder.channels, channels), head(len(class_names), channels), tau, aux_weight)
    model.name = name
    model.settings = {"aux_weight": aux_weight, "tau": tau, **encoder.settings}
    return model


# ------------------------------------------------------------------------------------------------ checkpoints


def load_checkpoint(path: str | Path, class_names: list[str] | None = None, unsafe: bool = False) -> Detector:
    """The detector in a file of train.py or of the authors' release, in evaluation mode on the CPU.

    class_names: for released files that do not hold them; unsafe: see `denseclip.read_checkpoint`
    """
    return restore_model(read_checkpoint(path, unsafe), path, class_names)


def is_detector(checkpoint: dict) -> bool:
    """Whether what `denseclip.read_checkpoint` read is a detector, ours or the authors'."""
    if "settings" in checkpoint:
        return checkpoint["name"] in PRESETS
    return any(key.startswith(("bbox_head.", "roi_head.")) for key in checkpoint["state_dict"])


def restore_model(checkpoint: dict, path: str | Path, class_names: list[str] | None = None) -> Detector:
    """The detector in what `denseclip.read_checkpoint` read from path."""
    if "settings" in checkpoint:
        name, weights, settings = checkpoint["name"], checkpoint["model"], checkpoint["settings"]
        class_names = checkpoint["class_names"]
        if name not in PRESETS:
            raise ValueError(f"{path}: a {name!r} is no detector; denseclip.load_checkpoint reads segmentation models")
    else:
        name, weights, settings, num_classes = from_released(checkpoint["state_dict"], path)
        class_names = released_class_names(checkpoint, num_classes, path, class_names)
    model = build_model(name, class_names, **settings)
    load_weights(model, weights, str(path))
    return model.eval()


RELEASED_NAMES = {  # of every preset's family: the released code's names, as regular expressions, and ours
    "retinanet": {
        r"neck\.fpn_convs\.3\.conv": r"neck.p6",
        r"neck\.fpn_convs\.4\.conv": r"neck.p7",
        r"bbox_head\.cls_convs\.(\d)\.conv": r"head.classification_head.conv.\1.0",
        r"bbox_head\.retina_cls": r"head.classification_head.cls_logits",
        r"bbox_head\.reg_convs\.(\d)\.conv": r"head.regression_head.conv.\1.0",
        r"bbox_head\.retina_reg": r"head.regression_head.bbox_reg",
    },
    "mask_rcnn": {
        r"rpn_head\.rpn_conv": r"head.rpn.head.conv.0.0",
        r"rpn_head\.rpn_cls": r"head.rpn.head.cls_logits",
        r"rpn_head\.rpn_reg": r"head.rpn.head.bbox_pred",
        r"roi_head\.bbox_head\.shared_fcs\.0": r"head.roi_heads.box_head.fc6",
        r"roi_head\.bbox_head\.shared_fcs\.1": r"head.roi_heads.box_head.fc7",
        r"roi_head\.bbox_head\.fc_cls": r"head.roi_heads.box_predictor.cls_score",
        r"roi_head\.bbox_head\.fc_reg": r"head.roi_heads.box_predictor.bbox_pred",
        r"roi_head\.mask_head\.convs\.(\d)\.conv": r"head.roi_heads.mask_head.\1.0",
        r"roi_head\.mask_head\.upsample": r"head.roi_heads.mask_predictor.conv5_mask",
        r"roi_head\.mask_head\.conv_logits": r"head.roi_heads.mask_predictor.mask_fcn_logits",
    },
}


def from_released(state_dict: dict[str, Tensor], path: str | Path) -> tuple[str, dict[str, Tensor], dict, int]:
    """The released code's weights under our names; return: preset, weights, settings of `build_model`, classes."""
    if "bbox_head.retina_cls.weight" in state_dict:
        family, num_classes = "retinanet", len(state_dict["bbox_head.retina_cls.weight"]) // 9
    elif "roi_head.mask_head.conv_logits.weight" in state_dict:
        family, num_classes = "mask_rcnn", len(state_dict["roi_head.mask_head.conv_logits.weight"])
    else:
        raise ValueError(f"{path}: neither a RetinaNet nor a Mask R-CNN of the released code")
    encoder, settings = read_released_encoder(state_dict, path)
    name = f"{family}_{encoder}"
    if name not in PRESETS:
        raise ValueError(f"{path}: no detector here has its backbone, {encoder}: choose from {', '.join(PRESETS)}")
    weights = {}
    for key, value in state_dict.items():
        new = next((re.sub(old, new, key) for old, new in RELEASED_NAMES[family].items() if re.match(old, key)), key)
        weights[new if new.startswith(("head.", "neck.")) else f"encoder.{key}"] = value
    return name, weights, settings, num_classes
