"""Sizes and costs of the paper's systems, computed here, beside the figures that the paper gives.

    python tables.py > tables.md

Prints every row of Tables 1, 2 and 5 that this code can build, in Markdown. No weights, no GPU, seconds: the models
are built and run on torch's "meta" device, which knows shapes alone.

Multiply-adds are counted as the paper's tool, fvcore, counts them: one for each multiplication of a convolution, a
linear layer or an attention's two products; besides, per value, 2 for a batch norm in evaluation, 5 for another norm,
4 for bilinear and 1 for nearest up-sampling. Image 1024 x 1024, 150 classes of ADE20K.
"""

import argparse
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data import read_classes
from denseclip import build_model


@dataclass(frozen=True)
class Cost:
    """Parameters in M and multiply-adds in G, those of the text encoder apart."""

    parameters: float
    multiply_adds: float
    text_parameters: float
    text_multiply_adds: float


@dataclass(frozen=True)
class Row:
    """One system: how `build_model` builds it, and what the paper says of it (M, G, mIoU single / multi-scale)."""

    label: str
    settings: dict
    miou: str
    parameters: float | None = None
    multiply_adds: float | None = None
    notes: str = ""  # keys of NOTES
    with_text: bool = False  # the text encoder runs for every image, and counts


R50 = {"name": "rn50", "backbone": "resnet50"}  # from ImageNet; "name" is CLIP's text encoder then
R101 = {"name": "rn50", "backbone": "resnet101"}
SWIN_T = {"name": "rn50", "backbone": "swin_t", "head": "upernet"}
SWIN_S = {"name": "rn50", "backbone": "swin_s", "head": "upernet"}
PLAIN = {"prompting": "none"}
TABLES = {
    "Table 1: Semantic FPN": [
        Row("ImageNet R50", R50 | PLAIN, "38.6 / 40.6", 31.0, 227.1, "a"),
        Row("CLIP R50", {"name": "rn50"} | PLAIN, "39.6 / 41.6", 31.0, 248.8),
        Row("DenseCLIP R50", {"name": "rn50"}, "43.5 / 44.7", 50.3, 269.2, "b"),
        Row("ImageNet R101", R101 | PLAIN, "40.4 / 42.3", 50.0, 304.9, "a"),
        Row("CLIP R101", {"name": "rn101"} | PLAIN, "42.7 / 44.3", 50.0, 326.6),
        Row("DenseCLIP R101", {"name": "rn101"}, "45.1 / 46.5", 67.8, 346.3),
        Row("CLIP ViT-B/16", {"name": "vitb16"} | PLAIN, "49.4 / 50.3", 100.8, 1037.4, "cd"),
        Row("DenseCLIP ViT-B/16", {"name": "vitb16"}, "50.6 / 51.3", 105.3, 1043.1, "c"),
    ],
    "Table 2: prompting, Semantic FPN on R50": [
        Row("ImageNet", R50 | PLAIN, "38.6", 31.0, 227, "a"),
        Row("CLIP", {"name": "rn50"} | PLAIN, "39.6", 31.0, 249),
        Row("learned contexts", {"name": "rn50", "prompting": "learned"}, "42.1", 46.5, 269, "e"),
        Row("pre-model", {"name": "rn50", "prompting": "pre"}, "42.9", 116.9, 368, "f", with_text=True),
        Row("post-model", {"name": "rn50", "prompting": "post"}, "43.5", 50.2, 269, "b"),
    ],
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
    "a": "The paper's baseline is mmsegmentation's ResNet, whose stem of three 3 x 3 convolutions costs 5.04 G more "
    "than the 7 x 7 convolution of torchvision's.",
    "b": "The paper's figure is without the up-sampling of the logits to the image's size, 0.629 G.",
    "c": "fvcore counted a transposed convolution by the size of its output in 2021, which adds 173.946 G.",
    "d": "100.8 M belongs to a positional grid of 32 x 32; the released configuration, with crops of 640, has 40 x 40.",
    "e": "The paper's 0.2 M more belong to nothing that it describes.",
    "f": "With the text encoder, which runs for every image. The sizes of the pre-model decoder are not published: "
    "those here (6 layers of width 256) give the paper's parameters (116.93 M with the 13 text positions that are used "
    "out of 77), but 24 G less than its multiply-adds.",
    "g": "With the text encoder of CLIP's RN50 (C = 1024); the paper does not say which it took.",
    "h": "Without language, Swin's authors give 60 M and 945 G (Swin-T), 81 M and 1038 G (Swin-S) for 512 x 2048 "
    "pixels, with an auxiliary FCN head of 0.9 M that only training uses, and that is not here.",
}


def measure(model: nn.Module, size: tuple[int, int] = (1024, 1024)) -> Cost:
    """Cost of one image of this size (H, W) in evaluation, for a model that was built on the meta device."""
    model.eval().requires_grad_(False)
    model.encoder.training = True  # itself, not its parts: it takes no stored text, so the text encoder is counted
    aten = torch.ops.aten
    norms = {aten.native_batch_norm: 2, aten.native_layer_norm: 5, aten.native_group_norm: 5}
    upsampling = {aten.upsample_bilinear2d: 4, aten.upsample_nearest2d: 1}
    formulas = {op: per_value(count) for op, count in {**norms, **upsampling}.items()}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(torch.empty(1, 3, *size, device="meta"))
    counts = {module: sum(ops.values()) / 2e9 for module, ops in counter.get_flop_counts().items()}

    parameters, text = 0, 0
    for name, parameter in model.named_parameters():
        if ".text_encoder." in name:
            text += parameter.numel() / 1e6
        else:
            parameters += parameter.numel() / 1e6
    text_multiply_adds = counts.get("DenseCLIP.encoder.text_encoder", 0.0)
    return Cost(parameters, counts["Global"] - text_multiply_adds, text, text_multiply_adds)


def per_value(count: int):
    """A formula for FlopCounterMode, where a multiply-add is 2: `count` multiply-adds for each value of the output."""

    def formula(*_, out_shape, **__) -> int:
        shape = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]  # norms return statistics as well
        return 2 * count * math.prod(shape)

    return formula


def format_row(row: Row, cost: Cost) -> str:
    parameters, multiply_adds = cost.parameters, cost.multiply_adds
    if row.with_text:
        parameters, multiply_adds = parameters + cost.text_parameters, multiply_adds + cost.text_multiply_adds
    paper = ["" if value is None else str(value) for value in (row.parameters, row.multiply_adds)]
    cells = [row.label, row.miou, f"{parameters:.2f}", paper[0], f"{multiply_adds:.2f}", paper[1], ", ".join(row.notes)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    class_names, _ = read_classes("ade20k")
    text = None
    for title, rows in TABLES.items():
        print(f"**{title}**\n")
        print("| | mIoU (paper) | parameters, M | paper | multiply-adds, G | paper | notes |")
        print("|---|---|---|---|---|---|---|")
        for row in rows:
            with torch.device("meta"):
                model = build_model(class_names=class_names, **row.settings)
            cost = measure(model)
            text = cost if cost.text_parameters else text
            print(format_row(row, cost), flush=True)
        print()
    print(
        "mIoU: as the paper's authors trained and measured it, single-scale / multi-scale. Costs are without the "
        f"text encoder ({text.text_parameters:.2f} M, {text.text_multiply_adds:.1f} G for {len(class_names)} classes) "
        "where its output does not depend on the image and is kept.\n"
    )
    for key, note in NOTES.items():
        print(f"- {key}: {note}")


if __name__ == "__main__":
    main()
