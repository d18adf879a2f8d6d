"""DenseCLIP's detectors: RetinaNet and Mask R-CNN on the language-guided encoder of denseclip.py.

Read from `Detector.forward`: encoder, FPN, head, as in Figure 3 of the paper. Anchors, matching, sampling, RoIAlign and
NMS come from torchvision. Where the released models compute something else, a small subclass overrides torchvision's,
and a comment "Released code" says what differs.

    model = build_model("mask_rcnn_rn50", class_names, clip="RN50")
    model.train(); losses = model(images, targets)  # images: list of (3, H, W), RGB in [0, 1], any sizes
    model.eval(); detections = model(images)        # list of dicts: boxes, scores, labels; masks for Mask R-CNN

    paper     here       shape
    x1 .. x4  pyramid    four maps (B, C_i, H_i, W_i); s / tau is concatenated to the last
    s         score_map  (B, K, H4, W4)        cosine similarity of every pixel and every class name
    y~        box_map    (B, K, H / 4, W / 4)  1 inside the boxes of a class
    P2 .. P7  features   FPN levels by name, Pi is (B, C, H / 2^i, W / 2^i)

K classes, A anchors of all levels, N boxes (x1, y1, x2, y2) in pixels, labels int64 in [0, K); H4 = H / 32."""

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import anchor_utils, mask_rcnn, retinanet, roi_heads, rpn
from torchvision.models.detection._utils import BoxCoder, Matcher  # private; checked in torchvision 0.21 and 0.29
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, roi_align, sigmoid_focal_loss
from torchvision.ops.poolers import LevelMapper

import denseclip
from clip_model import MEAN, STD
from denseclip import DenseCLIP, Settings, build_encoder, read_checkpoint, restore_model
from heads import FPN, conv, resize

SCORE_THRESHOLD, NMS_THRESHOLD, DETECTIONS = 0.05, 0.5, 100  # minimum score, maximum IoU, detections per image
Size = tuple[int, int]  # (H, W)
Instances = dict[str, Tensor]  # targets or detections of one image: boxes, labels, scores, masks
Targets = list[Instances] | None  # None in evaluation
Features = dict[str, Tensor]  # FPN levels by name
Outputs = dict[str, Tensor] | list[Instances]  # losses in training, detections in evaluation


class Detector(nn.Module):
    """Language-guided encoder, FPN, and the head of RetinaNet or Mask R-CNN.
    encoder:  from `denseclip.build_encoder`; concatenates the score map, divided by tau, to the last map
    neck:     pyramid -> FPN levels by name
    head:     (features, ImageList, targets) -> losses in training, detections in evaluation
    settings: temperature and weight of the auxiliary loss, Eq. (8); a checkpoint holds them and the `name`"""

    def __init__(self, encoder: nn.Module, neck: nn.Module, head: nn.Module, name: str, settings: Settings):
        super().__init__()
        self.encoder, self.neck, self.head, self.name, self.settings = encoder, neck, head, name, settings
        self.tau, self.aux_weight, self.short_side = settings.tau, settings.aux_weight, settings.short_side

    class_names, freeze_text = DenseCLIP.class_names, DenseCLIP.freeze_text  # a property and a method, see there

    def forward(self, images: list[Tensor], targets: Targets = None, sizes: list[Size] | None = None) -> Outputs:
        """Losses in training, detections in evaluation.
        images:  (3, H, W) each, RGB in [0, 1], of any sizes; normalized and padded here, resized in `detect.predict`
        targets: for training, per image: boxes (N, 4) float, labels (N,) int64, and for Mask R-CNN masks (N, H, W), 0/1
        sizes:   (H, W) per image, to which its detections are scaled; by default the sizes of the images
        return:  {name: loss}, to be summed and minimized; or per image, best first, at most 100: boxes (N, 4),
                 scores (N,), labels (N,), and for Mask R-CNN masks (N, H, W) bool"""
        batch = batch_images(images)  # (B, 3, H, W), H and W multiples of 32
        if self.training:
            check_targets(images, targets, needs_masks=isinstance(self.head, MaskRCNN))
        # Eqs. (1) to (6), then FPN
        features, score_map = self.extract_features(batch.tensors)  # {"p5": (B, C, H4, W4), ...}, (B, K, H4, W4)
        outputs = self.head(features, batch, targets)  # {name: loss}, or per image boxes (N, 4), scores (N,), ...
        if not self.training:
            for found, (h, w), size in zip(outputs, batch.image_sizes, sizes or batch.image_sizes, strict=True):
                scale = found["boxes"].new_tensor((size[1] / w, size[0] / h) * 2)  # (4,)
                found["boxes"] = found["boxes"] * scale  # (N, 4)
                if "masks" in found:
                    found["masks"] = paste_masks(found["masks"], found["boxes"], size)  # (N, H, W)
            return outputs
        if score_map is not None and self.aux_weight:  # Eq. (8): BCE(sigmoid(s / tau), y~)
            aux_loss = box_text_loss(score_map / self.tau, targets, batch.tensors.shape[-2:])  # scalar
            outputs["aux_loss"] = self.aux_weight * aux_loss
        return outputs

    def extract_features(self, batch: Tensor) -> tuple[Features, Tensor | None]:
        """FPN levels, "p2" to "p6" or "p3" to "p7", and the score map (None for a baseline without language) of images
        (B, 3, H, W) that are normalized with CLIP's MEAN and STD; H and W are multiples of 32."""
        pyramid, score_map, _ = self.encoder(batch)  # four maps (B, C_i, H_i, W_i), (B, K, H4, W4)
        return self.neck(pyramid), score_map  # {"p5": (B, C, H4, W4), ...}, (B, K, H4, W4)


def batch_images(images: list[Tensor]) -> ImageList:
    """Images in [0, 1], normalized, then zero-padded at the bottom and on the right to one size, multiples of 32."""
    if not len(images) or any(x.ndim != 3 or len(x) != 3 or not x.is_floating_point() for x in images):
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in images) or "none"
        raise ValueError(f"images must be a list of (3, H, W) float tensors in [0, 1], got {shapes}")
    mean, std = (images[0].new_tensor(values)[:, None, None] for values in (MEAN, STD))  # (3, 1, 1)
    sizes = [tuple(image.shape[-2:]) for image in images]
    height, width = (-(-max(side) // 32) * 32 for side in zip(*sizes, strict=True))
    padded = [F.pad((x - mean) / std, (0, width - w, 0, height - h)) for x, (h, w) in zip(images, sizes, strict=True)]
    return ImageList(torch.stack(padded), sizes)


def check_targets(images: list[Tensor], targets: Targets, needs_masks: bool) -> None:
    """Checks keys, shapes and dtypes. coco.py checks the values: reading them here would synchronize with the GPU."""
    if targets is None or len(targets) != len(images):
        raise ValueError("training needs targets, one dictionary per image; call model.eval() for detections")
    for image, target in zip(images, targets, strict=True):
        if missing := {"boxes", "labels", *(["masks"] if needs_masks else [])} - target.keys():
            raise ValueError(f"targets need {' and '.join(sorted(missing))}")
        boxes, labels, size = target["boxes"], target["labels"], (len(target["labels"]), *image.shape[1:])
        if boxes.shape != (len(labels), 4) or not boxes.is_floating_point() or labels.dtype != torch.int64:
            got = f"{tuple(boxes.shape)} {boxes.dtype} and {tuple(labels.shape)} {labels.dtype}"
            raise ValueError(f"boxes must be (N, 4) float and labels (N,) int64, got {got}")
        if needs_masks and target["masks"].shape != size:
            raise ValueError(f"masks must be (N, H, W) = {size}, got {tuple(target['masks'].shape)}")


def box_text_loss(logits: Tensor, targets: list[Instances], size: Size) -> Tensor:
    """Binary cross-entropy of every pixel and class at stride 4, with the boxes as ground truth, Eq. (8).
    logits: (B, K, H4, W4), s / tau; size: (H, W) of the padded images
    Released code: only pixels inside a box count. (It returns NaN if no box covers any; here the loss is 0.)"""
    height, width = size[0] // 4, size[1] // 4
    logits = resize(logits.float(), (height, width))  # (B, K, H / 4, W / 4)
    y = torch.stack([box_map(t["boxes"], t["labels"], logits.shape[1], height, width) for t in targets])
    inside = y.amax(1, keepdim=True)  # (B, 1, H / 4, W / 4)
    loss = F.binary_cross_entropy_with_logits(logits, y, reduction="none") * inside  # (B, K, H / 4, W / 4)
    return loss.sum() / (inside.sum() * logits.shape[1]).clamp(min=1)


def box_map(boxes: Tensor, labels: Tensor, num_classes: int, height: int, width: int) -> Tensor:
    """y~ of one image: (K, height, width) at stride 4, 1 inside the boxes of a class. Released code: box ends are
    exclusive and clamped to the last row and column, so those are never inside a box."""
    x1, x2 = (boxes[:, 0::2] / 4).long().clamp(0, width - 1)[:, :, None].unbind(1)  # (N, 1)
    y1, y2 = (boxes[:, 1::2] / 4).long().clamp(0, height - 1)[:, :, None].unbind(1)  # (N, 1)
    rows, columns = (torch.arange(n, device=boxes.device) for n in (height, width))
    rows = ((rows >= y1) & (rows < y2)).float()  # (N, height)
    columns = ((columns >= x1) & (columns < x2)).float()  # (N, width)
    return torch.einsum("nk,nh,nw->khw", F.one_hot(labels, num_classes).float(), rows, columns).clamp(max=1).float()


def paste_masks(masks: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """Resizes each mask (N, M, M) bilinearly to its box (N, 4) in an image of (H, W) pixels: (N, H, W), whether its
    probability is 0.5 or more. Released code: boxes are not rounded to whole pixels, as they are in torchvision."""
    weights = []  # of every mask cell at every row, (N, H, M), and at every column, (N, W, M)
    x1, y1, x2, y2 = boxes.unbind(1)
    for start, end, length in ((y1, y2, size[0]), (x1, x2, size[1])):
        pixels, cells = (torch.arange(n, device=boxes.device) + 0.5 for n in (length, masks.shape[-1]))
        position = (pixels - start[:, None]) / (end - start)[:, None].clamp(min=1e-6) * len(cells)  # (N, length)
        weights.append((1 - (position[..., None] - cells).abs()).clamp(min=0))
    rows, columns = weights
    pasted = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    with torch.autocast(masks.device.type, enabled=False):
        for i in range(len(masks)):  # one at a time: all probabilities together would take a gigabyte
            pasted[i] = rows[i] @ masks[i] @ columns[i].T >= 0.5
    return pasted


# ------------------------------------------------------------------------------------------------ RetinaNet
class RetinaNetFPN(FPN):
    """P3 to P5 from x2 .. x4 by FPN; P6 from x4 and P7 from P6 by strided convolutions."""

    def __init__(self, in_channels: list[int], channels: int = 256):
        super().__init__(in_channels[1:], channels)
        self.p6 = conv(in_channels[-1], channels, 3, stride=2).conv
        self.p7 = conv(channels, channels, 3, stride=2).conv

    def forward(self, pyramid: list[Tensor]) -> Features:
        p3, p4, p5 = super().forward(pyramid[1:])  # (B, C, H / 8, W / 8) to (B, C, H / 32, W / 32)
        p6 = self.p6(pyramid[-1])  # (B, C, H / 64, W / 64)
        p7 = self.p7(p6)  # (B, C, H / 128, W / 128). Released code: no ReLU in between
        return {"p3": p3, "p4": p4, "p5": p5, "p6": p6, "p7": p7}


class RetinaNet(nn.Module):
    """RetinaNet (Lin et al., 2017): every anchor of every level is classified and regressed."""

    def __init__(self, num_classes: int, channels: int = 256):
        super().__init__()
        self.anchors = Anchors((8, 16, 32, 64, 128), scales=(4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)))
        self.classification_head = retinanet.RetinaNetClassificationHead(channels, 9, num_classes)
        self.regression_head = retinanet.RetinaNetRegressionHead(channels, 9)
        self.matcher, self.box_coder = AnchorMatcher(0.5, 0.4), ClampedBoxCoder((1.0, 1.0, 1.0, 1.0))

    def forward(self, features: Features, images: ImageList, targets: Targets) -> Outputs:
        levels = list(features.values())  # (B, C, H / 8, W / 8) to (B, C, H / 128, W / 128)
        logits = self.classification_head(levels).float()  # (B, A, K)
        deltas = self.regression_head(levels).float()  # (B, A, 4)
        anchors = self.anchors(images, levels)[0]  # (A, 4)
        if self.training:
            return self.losses(logits, deltas, anchors, targets)  # {name: scalar}
        counts = [9 * x.shape[-2] * x.shape[-1] for x in levels]  # anchors per level
        per_image = zip(logits.sigmoid(), deltas, images.image_sizes, strict=True)  # (A, K), (A, 4), (H, W)
        return [self.detect(*each, anchors, counts) for each in per_image]  # per image: boxes (N, 4), ...

    def losses(self, logits: Tensor, deltas: Tensor, anchors: Tensor, targets: list[Instances]) -> dict[str, Tensor]:
        """Focal loss for classes, L1 loss for boxes. Released code: both divided by the batch's positive anchors."""
        class_loss, box_loss, num_positives = 0.0, 0.0, 0
        for image_logits, image_deltas, target in zip(logits, deltas, targets, strict=True):  # (A, K), (A, 4)
            iou = box_iou(target["boxes"], anchors)  # (N, A); without boxes, all anchors are background
            matches = self.matcher(iou) if len(iou) else iou.new_full(iou.shape[1:], -1, dtype=torch.int64)  # (A,)
            positive, counted = matches >= 0, matches != Matcher.BETWEEN_THRESHOLDS  # (A,), (A,)
            boxes, labels = target["boxes"][matches[positive]], target["labels"][matches[positive]]  # (N, 4), (N,)
            class_targets = torch.zeros_like(image_logits)  # (A, K)
            class_targets[positive, labels] = 1
            delta_targets = self.box_coder.encode_single(boxes, anchors[positive])  # (N, 4)
            class_loss += sigmoid_focal_loss(image_logits[counted], class_targets[counted], reduction="sum")  # scalar
            box_loss += F.l1_loss(image_deltas[positive], delta_targets, reduction="sum")  # scalar
            num_positives += positive.sum().clamp(min=1)  # scalar
        return {"class_loss": class_loss / num_positives, "box_loss": box_loss / num_positives}

    def detect(self, scores: Tensor, deltas: Tensor, size: Size, anchors: Tensor, counts: list[int]) -> Instances:
        """Detections of one image. scores: (A, K); deltas and anchors: (A, 4); counts: anchors per level."""
        # Released code: the best 1000 anchors of each level, with all their classes
        best, index = scores.amax(1).split(counts), torch.arange(len(scores), device=scores.device).split(counts)
        kept = torch.cat([i[x.topk(min(1000, len(x))).indices] for i, x in zip(index, best, strict=True)])  # (n,)
        boxes = self.box_coder.decode_single(deltas[kept], anchors[kept])  # (n, 4)
        return postprocess(boxes[:, None].expand(-1, scores.shape[1], -1), scores[kept], size)


# ------------------------------------------------------------------------------------------------ Mask R-CNN
class MaskRCNNFPN(FPN):
    """P2 to P5 from x1 .. x4 by FPN; P6 is P5 subsampled, for region proposals only."""

    def forward(self, pyramid: list[Tensor]) -> Features:
        p2, p3, p4, p5 = super().forward(pyramid)  # (B, C, H / 4, W / 4) to (B, C, H / 32, W / 32)
        p6 = F.max_pool2d(p5, 1, stride=2)  # (B, C, H / 64, W / 64)
        return {"p2": p2, "p3": p3, "p4": p4, "p5": p5, "p6": p6}


class MaskRCNN(nn.Module):
    """Mask R-CNN (He et al., 2017): region proposals, then a class, a refined box and a mask for each."""

    def __init__(self, num_classes: int, channels: int = 256):
        super().__init__()
        self.rpn = RegionProposalNetwork(channels)
        self.roi_heads = RoIHeads(num_classes, channels)

    def forward(self, features: Features, images: ImageList, targets: Targets) -> Outputs:
        proposals, losses = self.rpn(images, features, targets)  # per image (N, 4), N at most 1000; {name: scalar}
        outputs = self.roi_heads(features, proposals, images.image_sizes, targets)  # losses, or boxes (N, 4), ...
        if not self.training:
            return outputs
        return {"rpn_class_loss": losses["loss_objectness"], "rpn_box_loss": losses["loss_rpn_box_reg"], **outputs}


class RPNHead(rpn.RPNHead):
    """torchvision's, with float32 outputs even under autocast: box coordinates need the precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return tuple([level.float() for level in levels] for levels in super().forward(x))


class RegionProposalNetwork(rpn.RegionProposalNetwork):
    """torchvision's. Released code: L1 loss, not smooth L1; NMS keeps 1000 proposals in training, not 2000."""

    def __init__(self, channels: int):
        anchors, head = Anchors((4, 8, 16, 32, 64), scales=(8,)), RPNHead(channels, 3)
        sampling = {"fg_iou_thresh": 0.7, "bg_iou_thresh": 0.3, "batch_size_per_image": 256, "positive_fraction": 0.5}
        before, after = {"training": 2000, "testing": 1000}, {"training": 1000, "testing": 1000}
        super().__init__(anchors, head, **sampling, pre_nms_top_n=before, post_nms_top_n=after, nms_thresh=0.7)
        self.proposal_matcher, self.box_coder = AnchorMatcher(0.7, 0.3, 0.3), ClampedBoxCoder((1.0, 1.0, 1.0, 1.0))

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels))  # (B A,)
        sampled = positive | negative
        class_loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], torch.cat(labels)[sampled])
        box_loss = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum")
        return class_loss, box_loss / sampled.sum()


class RoIHeads(roi_heads.RoIHeads):
    """Class, box and mask of every proposal. The sampling is torchvision's, all else the released code's."""

    def __init__(self, num_classes: int, channels: int = 256):
        hidden = channels * 4
        parts = RoIAlign(7), TwoMLPHead(channels * 7 * 7, hidden), FastRCNNPredictor(hidden, num_classes + 1)
        sampling = {"fg_iou_thresh": 0.5, "bg_iou_thresh": 0.5, "batch_size_per_image": 512, "positive_fraction": 0.25}
        unused = {"bbox_reg_weights": None, "score_thresh": None, "nms_thresh": None, "detections_per_img": None}
        super().__init__(*parts, **sampling, **unused)
        self.box_predictor.bbox_pred = nn.Linear(hidden, num_classes * 4)  # Released code: no box for the background
        self.box_coder = ClampedBoxCoder((10.0, 10.0, 5.0, 5.0))  # inverse standard deviations of the deltas
        self.mask_roi_pool, self.mask_head = RoIAlign(14), mask_rcnn.MaskRCNNHeads(channels, (channels,) * 4, 1)
        self.mask_predictor = mask_rcnn.MaskRCNNPredictor(channels, channels, num_classes)
        # torchvision's standard deviation is sqrt(2 / K): with few classes, masks would start overconfident.
        nn.init.normal_(self.mask_predictor.mask_fcn_logits.weight, std=0.001)
        nn.init.zeros_(self.mask_predictor.mask_fcn_logits.bias)

    def forward(self, features: Features, proposals: list[Tensor], sizes: list[Size], targets: Targets) -> Outputs:
        if self.training:
            return self.losses(features, proposals, targets)  # {name: scalar}
        logits, deltas = self.predict_boxes(features, proposals)  # (N, K + 1), (N, 4 K)
        scores = logits.softmax(1)[:, :-1]  # (N, K)
        boxes = self.box_coder.decode_single(deltas, torch.cat(proposals)).unflatten(1, (-1, 4))  # (N, K, 4)
        counts = [len(x) for x in proposals]  # n per image
        per_image = zip(boxes.split(counts), scores.split(counts), sizes, strict=True)  # (n, K, 4), (n, K), (H, W)
        detections = [postprocess(*each) for each in per_image]  # boxes (n, 4), scores (n,), labels (n,)
        masks = self.predict_masks(features, [x["boxes"] for x in detections]).sigmoid()  # (N, K, 28, 28)
        for detection, mask in zip(detections, masks.split([len(x["boxes"]) for x in detections]), strict=True):
            detection["masks"] = gather_class(mask, detection["labels"])  # (n, 28, 28)
        return detections

    def losses(self, features: Features, boxes: list[Tensor], targets: list[Instances]) -> dict[str, Tensor]:
        # torchvision's sampling expects the background to be class 0. Released code: it is the last class, K.
        truth = [{**target, "labels": target["labels"] + 1} for target in targets]
        boxes, matches, labels, delta_targets = self.select_training_samples(boxes, truth)  # (n, 4), (n,), (n,), (n, 4)
        logits, deltas = self.predict_boxes(features, boxes)  # (N, K + 1), (N, 4 K)
        positive, class_targets = torch.cat(labels) > 0, (torch.cat(labels) - 1) % logits.shape[1]  # (N,), (N,)
        class_loss = F.cross_entropy(logits, class_targets)  # scalar
        # Released code: L1, not smooth L1
        deltas = gather_class(deltas[positive].unflatten(1, (-1, 4)), class_targets[positive])  # (P, 4)
        box_loss = F.l1_loss(deltas, torch.cat(delta_targets)[positive], reduction="sum") / len(positive)  # scalar
        # Released code: mask targets are 0 or 1 even after resizing
        boxes = [box[label > 0] for box, label in zip(boxes, labels, strict=True)]  # (n, 4) per image
        logits = gather_class(self.predict_masks(features, boxes), class_targets[positive])  # (P, 28, 28)
        mask_targets = []
        for box, label, match, target in zip(boxes, labels, matches, targets, strict=True):
            rois = torch.cat([match[label > 0, None].to(box), box], 1)  # (n, 5): index of the mask, box
            pooled = roi_align(target["masks"][:, None].to(box), rois, 28, aligned=True)  # (n, 1, 28, 28)
            mask_targets.append((pooled[:, 0] >= 0.5).float())  # (n, 28, 28)
        mask_targets = torch.cat(mask_targets)  # (P, 28, 28)
        mask_loss = F.binary_cross_entropy_with_logits(logits, mask_targets) if len(logits) else logits.sum()
        return {"class_loss": class_loss, "box_loss": box_loss, "mask_loss": mask_loss}

    def predict_boxes(self, features: Features, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (N, K + 1), the background last, and deltas (N, 4 K) of the boxes of all images."""
        return tuple(x.float() for x in self.box_predictor(self.box_head(self.box_roi_pool(features, boxes))))

    def predict_masks(self, features: Features, boxes: list[Tensor]) -> Tensor:
        """Mask logits (N, K, 28, 28) inside the boxes of all images."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))).float()


class RoIAlign(nn.Module):
    """Features of boxes, each from the level (P2 to P5) for its size. Released code: aligned, adaptive sampling."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.level_of = size, LevelMapper(2, 5)

    def forward(self, features: Features, boxes: list[Tensor]) -> Tensor:
        rois = torch.cat([F.pad(each, (1, 0), value=i) for i, each in enumerate(boxes)])  # (N, 5): image index, box
        levels, p2 = self.level_of(boxes), features["p2"]  # (N,) in 0 .. 3, (B, C, H / 4, W / 4)
        pooled = p2.new_zeros(len(rois), p2.shape[1], self.size, self.size)  # (N, C, size, size)
        for i in range(2, 6):
            index = (levels == i - 2).nonzero()[:, 0]  # (n,)
            x = roi_align(features[f"p{i}"], rois[index], self.size, 0.5**i, aligned=True)  # (n, C, size, size)
            pooled[index] = x.to(p2.dtype)
        return pooled


def gather_class(x: Tensor, labels: Tensor) -> Tensor:
    """x (N, K, ...), labels (N,) -> (N, ...): of each row, the entry of its label."""
    return x[torch.arange(len(x), device=x.device), labels]


# ------------------------------------------------------------------------------------------------ anchors and boxes
class Anchors(anchor_utils.AnchorGenerator):
    """Anchors centered on the top left corner of each cell: scale * stride pixels, height / width 0.5, 1 and 2.
    Released code: sides are not rounded; strides are powers of two, even if the size of a level was rounded up."""

    def __init__(self, strides: tuple[int, ...], scales: tuple[float, ...]):
        super().__init__()
        sides, roots = torch.tensor(scales, dtype=torch.float32), torch.tensor([0.5, 1.0, 2.0]).sqrt()[:, None]
        widths, heights = (sides / roots).flatten(), (sides * roots).flatten()  # (3 len(scales),), at stride 1
        cell = torch.stack([-widths, -heights, widths, heights], dim=1) / 2  # (3 len(scales), 4)
        self.strides, self.cell_anchors = strides, [stride * cell for stride in strides]

    def forward(self, images: ImageList, features: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, features[0].device)
        levels = self.grid_anchors([x.shape[-2:] for x in features], [(stride, stride) for stride in self.strides])
        return [torch.cat(levels)] * len(images.image_sizes)  # (A, 4) per image


class AnchorMatcher(Matcher):
    """Matches anchors to boxes by IoU. Each box also gets its best anchors, if their IoU is at least min_iou.
    Released code: these go to that box even if they overlap another box more."""

    def __init__(self, high: float, low: float, min_iou: float = 0.0):
        super().__init__(high, low, allow_low_quality_matches=True)
        self.min_iou = min_iou

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        best = match_quality_matrix.amax(1, keepdim=True)  # (N, 1)
        boxes, anchors = ((match_quality_matrix == best) & (best >= self.min_iou) & (best > 0)).nonzero(as_tuple=True)
        matches[anchors] = -1
        matches.scatter_reduce_(0, anchors, boxes, "amax")  # if several boxes share an anchor, the last one gets it


class ClampedBoxCoder(BoxCoder):
    """Box deltas. Released code: log sizes are clamped from below as well as from above."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        deltas = rel_codes.unflatten(1, (-1, 4))  # (N, 1 or K, 4)
        low = [-torch.inf, -torch.inf, *(-self.bbox_xform_clip * weight for weight in self.weights[2:])]
        return super().decode_single(torch.maximum(deltas, deltas.new_tensor(low)).flatten(1), boxes)


def postprocess(boxes: Tensor, scores: Tensor, size: Size) -> Instances:
    """Detections of one image: score threshold, clipping, NMS within each class, the best 100. boxes: (N, K, 4), one
    per class or the same for all; scores: (N, K); size: (H, W) of the image."""
    row, labels = (scores > SCORE_THRESHOLD).nonzero(as_tuple=True)
    boxes, scores = clip_boxes_to_image(boxes[row, labels], size), scores[row, labels]
    keep = batched_nms(boxes, scores, labels, NMS_THRESHOLD)[:DETECTIONS]
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


DetectorPreset = namedtuple("DetectorPreset", ["head", "neck", "encoder"])  # two classes and a denseclip.Preset
PRESETS = {}
for name, size in {"rn50": 1344, "rn101": 1344, "tiny": 640}.items():  # pixels of the released grid; tiny: for a CPU
    preset = replace(denseclip.PRESETS[name], crop_size=size, aux_weight=1.0, detection=True)
    PRESETS[f"retinanet_{name}"] = DetectorPreset(RetinaNet, RetinaNetFPN, preset)
    PRESETS[f"mask_rcnn_{name}"] = DetectorPreset(MaskRCNN, MaskRCNNFPN, preset)


def build_model(name: str, class_names: list[str], clip: str | None = None, **settings) -> Detector:
    """A detector: preset `name`, CLIP's weights `clip`, and `settings` as `denseclip.build_encoder` takes them."""
    if name not in PRESETS:
        raise ValueError(f"no detector named {name!r} (segmentation: eval.py): choose one of {', '.join(PRESETS)}")
    head, neck, preset = PRESETS[name]
    encoder, resolved = build_encoder(preset, class_names, clip, **settings)
    neck, head = neck(encoder.channels, preset.channels), head(len(class_names), preset.channels)
    return Detector(encoder, neck, head, name, resolved).to(memory_format=torch.channels_last)


def load_checkpoint(path: str | Path, backbone: str | nn.Module | None = None) -> Detector:
    """The detector saved by detect.py, in evaluation mode on the CPU. Options: see `denseclip.restore_model`."""
    return restore_model(read_checkpoint(path), path, build_model, backbone)
