"""Parameters and multiply-adds of the paper's systems, computed here, next to the paper's figures; cost of training.

    python -m experiments.tables > tables.md

Prints every row of Tables 1 to 5 that this code can build, in Markdown. Takes seconds and needs neither weights nor a
GPU: the models are built and run on torch's "meta" device, which computes shapes only.

Multiply-adds are counted as fvcore, the paper's tool, counts them: one for each multiplication in a convolution, a
linear layer or the two products of an attention; and for each output value 2 for a batch norm in evaluation mode, 5 for
any other norm, 4 for bilinear and 1 for nearest up-sampling. The image has 1024 x 1024 pixels and the classes are
ADE20K's 150; for detectors they are 800 x 1280 (H x W) and COCO's 80.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import denseclip
import detection
from clip_model import TextEncoder
from data import read_classes
from experiments.benchmark import released_texts


@dataclass(frozen=True)
class Cost:
    """Parameters in M and multiply-adds in G; the text encoder is counted separately."""

    parameters: float
    multiply_adds: float
    text_parameters: float
    text_multiply_adds: float


@dataclass(frozen=True)
class Row:
    """One system: how `build_model` builds it, and the paper's figures (mIoU or AP, M, G)."""

    label: str
    settings: dict
    score: str
    parameters: float | None = None
    multiply_adds: float | None = None
    notes: str = ""  # keys of NOTES


R50 = {"name": "vitb16", "backbone": "resnet50"}  # ImageNet's; here "name" decides only the text encoder
R101 = {"name": "vitb16", "backbone": "resnet101"}
SWIN_T = {"name": "vitb16", "backbone": "swin_t"}
SWIN_S = {"name": "vitb16", "backbone": "swin_s"}
VIT = {"name": "vitb16", "backbone": "vit_b_16", "crop_size": 640}
PLAIN = {"prompting": "none"}


def detection_rows(detector: str, *figures: tuple) -> list[Row]:
    """ImageNet, CLIP and DenseCLIP on R50, then on R101; each of `figures` is a row's fields from `score` on."""
    systems = {}
    for depth in (50, 101):
        name = {"name": f"{detector}_rn{depth}"}
        systems[f"ImageNet R{depth}"] = name | {"backbone": f"resnet{depth}"} | PLAIN
        systems |= {f"CLIP R{depth}": name | PLAIN, f"DenseCLIP R{depth}": name}
    return [Row(*system, *row) for system, row in zip(systems.items(), figures, strict=True)]


TABLES = {
    "Table 1: Semantic FPN": [
        Row("ImageNet R50", R50 | PLAIN, "38.6 / 40.6", 31.0, 227.1, "a"),
        Row("CLIP R50", {"name": "rn50"} | PLAIN, "39.6 / 41.6", 31.0, 248.8),
        Row("DenseCLIP R50", {"name": "rn50"}, "43.5 / 44.7", 50.3, 269.2, "b"),
        Row("ImageNet R101", R101 | PLAIN, "40.4 / 42.3", 50.0, 304.9, "a"),
        Row("CLIP R101", {"name": "rn101"} | PLAIN, "42.7 / 44.3", 50.0, 326.6),
        Row("DenseCLIP R101", {"name": "rn101"}, "45.1 / 46.5", 67.8, 346.3),
        Row("ImageNet ViT-B/16", VIT | PLAIN, "48.3 / 50.9", 100.8, 1037.4, "ci"),
        Row("CLIP ViT-B/16", {"name": "vitb16"} | PLAIN, "49.4 / 50.3", 100.8, 1037.4, "cd"),
        Row("DenseCLIP ViT-B/16", {"name": "vitb16"}, "50.6 / 51.3", 105.3, 1043.1, "c"),
    ],
    "Table 2: prompting, Semantic FPN on R50": [
        Row("ImageNet", R50 | PLAIN, "38.6", 31.0, 227, "a"),
        Row("CLIP", {"name": "rn50"} | PLAIN, "39.6", 31.0, 249),
        Row("learned contexts", {"name": "rn50", "prompting": "learned"}, "42.1", 46.5, 269, "e"),
        Row("pre-model", {"name": "rn50", "prompting": "pre"}, "42.9", 116.9, 368, "f"),
        Row("post-model", {"name": "rn50", "prompting": "post"}, "43.5", 50.2, 269, "b"),
    ],
    "Table 3: RetinaNet": detection_rows(
        "retinanet",
        ("36.3 55.3 38.6 19.3 40.0 48.8", 38, 239),
        ("36.9 57.7 39.1 22.5 40.7 47.1", 38, 265),
        ("37.8 59.9 40.0 24.8 42.0 47.9", 60, 285),
        ("38.5 57.6 41.0 21.7 42.8 50.4", 57, 315),
        ("40.5 61.6 43.4 25.6 44.6 51.3", 57, 341),
        ("41.1 63.4 44.1 26.9 45.5 52.4", 78, 360),
    ),
    "Table 4: Mask R-CNN, boxes / masks": detection_rows(
        "mask_rcnn",
        ("38.2 58.8 41.4 21.9 40.9 49.5 / 34.7 55.7 37.2 18.3 37.4 47.2", 44, 275, "j"),
        ("39.3 61.3 42.7 24.6 42.6 50.1 / 36.8 58.5 39.2 18.6 39.9 51.8", 44, 301, "j"),
        ("40.2 63.2 43.9 26.3 44.2 51.0 / 37.6 60.2 39.8 20.8 40.7 53.7", 67, 327, "jk"),
        ("40.0 60.5 44.0 22.6 44.0 52.6 / 36.1 57.5 38.6 18.8 39.7 49.5", 63, 351, "j"),
        ("42.2 64.2 46.5 26.4 46.1 54.0 / 38.9 61.4 41.8 20.5 42.3 55.1", 63, 377, "j"),
        ("42.6 65.1 46.5 27.7 46.5 54.2 / 39.6 62.4 42.4 21.4 43.0 56.2", 84, 399, "jk"),
    ),
    "Table 5: any backbone": [
        Row("R50, FPN", R50 | PLAIN, "38.6 / 40.6", notes="a"),
        Row("R50, FPN, DenseCLIP", R50, "41.0 / 43.0", notes="ag"),
        Row("R101, FPN", R101 | PLAIN, "40.4 / 42.3", notes="a"),
        Row("R101, FPN, DenseCLIP", R101, "43.0 / 45.2", notes="ag"),
        Row("Swin-T, UperNet", SWIN_T | PLAIN, "44.5 / 45.8", notes="h"),
        Row("Swin-T, UperNet, DenseCLIP", SWIN_T, "45.4 / 46.5", notes="gh"),
        Row("Swin-S, UperNet", SWIN_S | PLAIN, "47.6 / 49.5", notes="h"),
        Row("Swin-S, UperNet, DenseCLIP", SWIN_S, "48.3 / 49.7", notes="gh"),
    ],
}
NOTES = {
    "a": "The paper's baseline is mmsegmentation's ResNet: its stem of three 3 x 3 convolutions costs 5.04 G more than "
    "the 7 x 7 convolution of torchvision's ResNet.",
    "b": "The paper's figure does not include up-sampling the logits to the image's size, 0.629 G.",
    "c": "In 2021 fvcore counted a transposed convolution by the size of its output, which adds 173.946 G.",
    "d": "100.8 M implies a positional grid of 32 x 32; the released configuration, with crops of 640, has 40 x 40.",
    "e": "Nothing that the paper describes accounts for its additional 0.2 M.",
    "f": "Includes the text encoder, which runs for every image. The size of the pre-model decoder is not published: 6 "
    "layers of width 256, as here, give the paper's parameters (116.93 M if only the 13 text positions in use are "
    "counted, out of 77), but 24 G fewer multiply-adds than the paper's.",
    "g": "With the text encoder of CLIP's ViT-B/16 (C = 512), as in the released code; the paper does not say which.",
    "h": "Without language, Swin's authors report 60 M and 945 G (Swin-T), 81 M and 1038 G (Swin-S) for 512 x 2048 "
    "pixels. The parameters include the auxiliary FCN head, 0.9 M, which only training uses.",
    "i": "torchvision's ViT keeps its grid of 14 x 14 positions from ImageNet and resizes it at run time.",
    "j": "With the heads on 1000 boxes and 100 masks, as mmdetection's tool runs them. The paper's figure also counts "
    "the mask head's transposed convolution by the size of its output (see c), which adds 15.414 G.",
    "k": "The released code does not explain a further 6 G (R50) and 3 G (R101) of the paper's figure. To within "
    "rounding, a score map at stride 4 costs as much, 5.243 and 2.621 G; the released code computes it at stride 32.",
}


class PerValue(TorchDispatchMode):
    """Adds up what norms and up-sampling cost for each value of their output."""

    aten, total = torch.ops.aten, 0
    costs = {aten.native_batch_norm: 2, aten.native_layer_norm: 5, aten.native_group_norm: 5}
    costs |= {aten.upsample_bilinear2d: 4, aten.upsample_nearest2d: 1}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        if cost := self.costs.get(operation.overloadpacket):
            self.total += cost * (output if isinstance(output, torch.Tensor) else output[0]).numel()
        return output


def count(run: Callable[[], object]) -> float:
    """Multiply-adds, in G, of what `run` computes."""
    # as the paper's tool counts: up-sampling to the same size, too, which heads.resize skips outside of graphs, and
    # every class name as a text of its own
    graph = mock.patch.object(torch.compiler, "is_compiling", lambda: True)
    texts = mock.patch.object(TextEncoder, "forward_shared", released_texts)
    with graph, texts, FlopCounterMode(display=False) as products, PerValue() as others:
        run()
    return (products.get_total_flops() / 2 + others.total) / 1e9


def build(settings: dict) -> nn.Module:
    """The model on the meta device, with ADE20K's classes or, if it is a detector, COCO's."""
    detector = settings["name"] in detection.PRESETS
    with torch.device("meta"):
        class_names = read_classes("coco" if detector else "ade20k")[0]
        return (detection if detector else denseclip).build_model(class_names=class_names, **settings)


def run_detector(model: detection.Detector, images: Tensor, boxes: int, masks: int) -> list[Tensor]:
    """The outputs of all heads, for images (B, 3, H, W) and this many boxes and masks per image.

    RoIAlign and all that selects boxes is left out: it depends on values, which tensors on the meta device do not have.
    """
    levels, head = list(model.extract_features(images)[0].values()), model.head  # finest first: (B, C, H_i, W_i)
    if isinstance(head, detection.RetinaNet):
        return [head.classification_head(levels), head.regression_head(levels)]  # (B, A, K), (B, A, 4)
    roi_heads, (count, channels) = head.roi_heads, levels[0].shape[:2]
    shapes = (count * boxes, channels, 7, 7), (count * masks, channels, 14, 14)  # after RoIAlign
    box_features, mask_features = (torch.empty(shape, device="meta", requires_grad=True) for shape in shapes)
    outputs = [x for maps in head.rpn.head(levels) for x in maps]  # of every level: (B, 3, H_i, W_i), (B, 12, H_i, W_i)
    outputs += roi_heads.box_predictor(roi_heads.box_head(box_features))  # (B boxes, K + 1), (B boxes, 4 K)
    return [*outputs, roi_heads.mask_predictor(roi_heads.mask_head(mask_features))]  # (B masks, K, 28, 28)


def measure(model: nn.Module) -> Cost:
    """Cost of evaluating one image with a model on the meta device."""
    model.eval().requires_grad_(False)
    detector = isinstance(model, detection.Detector)
    size, encoder = (800, 1280) if detector else (1024, 1024), model.encoder
    image = torch.empty(1, 3, *size, device="meta")
    run = partial(run_detector, model, image, boxes=1000, masks=100) if detector else partial(model, image)
    total = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    if not hasattr(encoder, "text_encoder"):
        return Cost(total, count(run), 0.0, 0.0)
    text = sum(parameter.numel() for parameter in encoder.text_encoder.parameters()) / 1e6
    contexts = torch.empty(1, encoder.num_contexts, encoder.text_encoder.width, device="meta")
    text_multiply_adds = count(lambda: encoder.text_encoder.forward_shared(encoder.tokens, contexts))
    encoder.cached_text = torch.empty(1, len(encoder.tokens), encoder.text_encoder.embed_dim, device="meta")
    multiply_adds = count(run)
    if encoder.prompt_decoder is not None:  # pre-model prompting cannot cache the text
        multiply_adds -= text_multiply_adds
    return Cost(total - text, multiply_adds, text, text_multiply_adds)


def training_cost(model: nn.Module, batch_size: int) -> float:
    """Multiply-adds, in G, of one training iteration, forward and backward: convolutions and matrix products only.

    model: on the meta device; parameters without requires_grad are frozen. Text is encoded once, as by one process.
    Segmentation: crops of model.crop_size. Detection: the largest image, 800 x 1333, padded to 800 x 1344; of Mask
    R-CNN's 512 sampled boxes per image, 128 have masks, the most there can be. Auxiliary loss: next to no products.
    """
    model.train()
    with torch.device("meta"), FlopCounterMode(display=False) as products:
        if isinstance(model, detection.Detector):
            outputs = run_detector(model, torch.empty(batch_size, 3, 800, 1344), boxes=512, masks=128)
        else:
            size = (model.crop_size, model.crop_size)
            labels = torch.empty(batch_size, *size, dtype=torch.int64)
            outputs = model(torch.empty(batch_size, 3, *size), labels).values()
        sum(output.sum() for output in outputs).backward()
    return products.get_total_flops() / 2 / 1e9


def gpu_days(multiply_adds: float, peak: float = 156.0, share: float = 0.2) -> float:
    """Estimated days for 1e15 * multiply_adds at an assumed share of a GPU's peak in TFLOP/s (A100: 156 in TF32)."""
    return 2 * multiply_adds * 1e15 / (share * peak * 1e12) / (24 * 60 * 60)


def format_row(row: Row, cost: Cost) -> str:
    parameters, multiply_adds = cost.parameters, cost.multiply_adds
    if row.settings.get("prompting") == "pre":  # the text encoder runs for every image, so it counts
        parameters, multiply_adds = parameters + cost.text_parameters, multiply_adds + cost.text_multiply_adds
    sizes = [f"{parameters:.2f}", row.parameters, f"{multiply_adds:.2f}", row.multiply_adds]  # ours, the paper's, ...
    cells = [row.label, row.score, *("" if size is None else str(size) for size in sizes), ", ".join(row.notes)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    texts = {}  # number of classes -> cost of their text encoder
    for title, rows in TABLES.items():
        score = "AP AP50 AP75 APs APm APl" if rows[0].settings["name"] in detection.PRESETS else "mIoU"
        columns = ["", f"{score} (paper)", "parameters, M", "paper", "multiply-adds, G", "paper", "notes"]
        print(f"**{title}**\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in rows:
            model = build(row.settings)
            cost = measure(model)
            if cost.text_parameters:
                texts.setdefault(len(model.class_names), cost)
            print(format_row(row, cost), flush=True)
        print()
    costs = ", ".join(f"{cost.text_multiply_adds:.1f} G for {count} classes" for count, cost in texts.items())
    print("mIoU is single-scale / multi-scale. Where the text does not depend on the image, it is computed once, so")
    print(f"the text encoder ({texts[150].text_parameters:.2f} M, {costs}, each a text of its own) is not included.\n")
    print("\n".join(f"- {key}: {note}" for key, note in NOTES.items()))


if __name__ == "__main__":
    main()
