"""Parameters and multiply-adds of the paper's systems, computed here, next to the paper's figures.

    python -m experiments.tables > tables.md

Prints every row of Tables 1, 2 and 5 that this code can build, in Markdown. Takes seconds and needs neither weights nor
a GPU: the models are built and run on torch's "meta" device, which computes shapes only.

Multiply-adds are counted as fvcore, the paper's tool, counts them: one for each multiplication in a convolution, a
linear layer or the two products of an attention; and for each output value 2 for a batch norm in evaluation mode, 5 for
any other norm, 4 for bilinear and 1 for nearest up-sampling. One image of 1024 x 1024 pixels, ADE20K's 150 classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from data import read_classes
from denseclip import build_model


@dataclass(frozen=True)
class Cost:
    """Parameters in M and multiply-adds in G; the text encoder is counted separately."""

    parameters: float
    multiply_adds: float
    text_parameters: float
    text_multiply_adds: float


@dataclass(frozen=True)
class Row:
    """One system: how `build_model` builds it, and the paper's figures (mIoU single / multi-scale, M, G)."""

    label: str
    settings: dict
    miou: str
    parameters: float | None = None
    multiply_adds: float | None = None
    notes: str = ""  # keys of NOTES


R50 = {"name": "vitb16", "backbone": "resnet50"}  # ImageNet's; here "name" decides only the text encoder
R101 = {"name": "vitb16", "backbone": "resnet101"}
SWIN_T = {"name": "vitb16", "backbone": "swin_t"}
SWIN_S = {"name": "vitb16", "backbone": "swin_s"}
VIT = {"name": "vitb16", "backbone": "vit_b_16", "crop_size": 640}
PLAIN = {"prompting": "none"}
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
    with FlopCounterMode(display=False) as products, PerValue() as others:
        run()
    return (products.get_total_flops() / 2 + others.total) / 1e9


def measure(model: nn.Module, size: tuple[int, int] = (1024, 1024)) -> Cost:
    """Cost of evaluating one image of this size (H, W) with a model on the meta device."""
    model.eval().requires_grad_(False)
    encoder, image = model.encoder, torch.empty(1, 3, *size, device="meta")
    total = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    if not hasattr(encoder, "text_encoder"):
        return Cost(total, count(lambda: model(image)), 0.0, 0.0)
    text = sum(parameter.numel() for parameter in encoder.text_encoder.parameters()) / 1e6
    contexts = torch.empty(1, encoder.num_contexts, encoder.text_encoder.width, device="meta")
    text_multiply_adds = count(lambda: encoder.text_encoder(encoder.tokens, contexts))
    encoder.cached_text = torch.empty(1, len(encoder.tokens), encoder.text_encoder.embed_dim, device="meta")
    multiply_adds = count(lambda: model(image))
    if encoder.prompt_decoder is not None:  # pre-model prompting cannot cache the text
        multiply_adds -= text_multiply_adds
    return Cost(total - text, multiply_adds, text, text_multiply_adds)


def format_row(row: Row, cost: Cost) -> str:
    parameters, multiply_adds = cost.parameters, cost.multiply_adds
    if row.settings.get("prompting") == "pre":  # the text encoder runs for every image, so it counts
        parameters, multiply_adds = parameters + cost.text_parameters, multiply_adds + cost.text_multiply_adds
    paper = ["" if value is None else str(value) for value in (row.parameters, row.multiply_adds)]
    cells = [row.label, row.miou, f"{parameters:.2f}", paper[0], f"{multiply_adds:.2f}", paper[1], ", ".join(row.notes)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    class_names, text = read_classes("ade20k")[0], None
    for title, rows in TABLES.items():
        columns = ["", "mIoU (paper)", "parameters, M", "paper", "multiply-adds, G", "paper", "notes"]
        print(f"**{title}**\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for row in rows:
            with torch.device("meta"):
                model = build_model(class_names=class_names, **row.settings)
            cost = measure(model)
            text = text or (cost if cost.text_parameters else None)
            print(format_row(row, cost), flush=True)
        print()
    text_cost = f"{text.text_parameters:.2f} M, {text.text_multiply_adds:.1f} G for {len(class_names)} classes"
    print("mIoU: the paper's, single-scale / multi-scale. Where the text does not depend on the image, it is computed")
    print(f"once, so the text encoder ({text_cost}) is not included.\n")
    print("\n".join(f"- {key}: {note}" for key, note in NOTES.items()))


if __name__ == "__main__":
    main()
