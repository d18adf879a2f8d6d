"""FPN, Semantic FPN and UperNet take maps of any sizes. UperNet, for which there are no released numbers, is
mmsegmentation's, step by step, and trains with and without language."""

import pytest
import torch
from helpers import NAMES, check_round_trip, train_steps
from torch.nn import functional as F

from backbones import FCNHead, UperNetHead
from denseclip import build_model
from heads import FPN, SemanticFPNHead

CHANNELS = [8, 12, 16, 20]


@torch.no_grad()
def test_shapes_at_odd_sizes():
    sizes = [(19, 27), (10, 14), (5, 7), (3, 4)]
    pyramid = [torch.randn(1, c, *size) for c, size in zip(CHANNELS, sizes, strict=True)]
    levels = FPN(CHANNELS, 16)(pyramid)
    assert [tuple(x.shape) for x in levels] == [(1, 16, *size) for size in sizes]
    for logits in (SemanticFPNHead(5, 16).eval()(levels), UperNetHead(CHANNELS, 5, 16).eval()(pyramid)):
        assert logits.shape == (1, 5, *sizes[0]) and logits.isfinite().all()


def test_upernet_is_mmsegmentations():
    with torch.device("meta"):
        head = UperNetHead([96, 192, 384, 768], 150)
    assert {key: tuple(value.shape) for key, value in head.state_dict().items() if value.ndim == 4} == {
        **{f"psp_modules.{i}.1.conv.weight": (512, 768, 1, 1) for i in range(4)},
        "bottleneck.conv.weight": (512, 768 + 4 * 512, 3, 3),
        **{f"lateral_convs.{i}.conv.weight": (512, c, 1, 1) for i, c in enumerate((96, 192, 384))},
        **{f"fpn_convs.{i}.conv.weight": (512, 512, 3, 3) for i in range(3)},
        "fpn_bottleneck.conv.weight": (512, 4 * 512, 3, 3),
        "conv_seg.weight": (150, 512, 1, 1),
    }


@torch.no_grad()
def test_upernet_step_by_step():
    torch.manual_seed(0)
    head = UperNetHead(CHANNELS, 2, channels=8).eval()
    x1, x2, x3, x4 = pyramid = [torch.randn(1, c, 12 >> i, 16 >> i) for i, c in enumerate(CHANNELS)]

    def up(x, like):
        return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)

    pooled = [up(head.psp_modules[i][1](F.adaptive_avg_pool2d(x4, bins)), x4) for i, bins in enumerate((1, 2, 3, 6))]
    p4 = head.bottleneck(torch.cat([x4, *pooled], 1))
    p3 = head.lateral_convs[2](x3) + up(p4, x3)
    p2 = head.lateral_convs[1](x2) + up(p3, x2)
    p1 = head.lateral_convs[0](x1) + up(p2, x1)
    fused = [head.fpn_convs[0](p1), up(head.fpn_convs[1](p2), x1), up(head.fpn_convs[2](p3), x1), up(p4, x1)]
    assert torch.allclose(head(pyramid), head.conv_seg(head.fpn_bottleneck(torch.cat(fused, 1))), atol=1e-6)


@pytest.mark.parametrize("prompting", ["post", "none"])
@pytest.mark.parametrize("settings", [{"name": "tiny_vit"}, {"name": "tiny", "backbone": "resnet18"}])
def test_upernet_trains_and_reloads(settings, prompting, tmp_path):
    torch.manual_seed(0)
    model = build_model(class_names=NAMES, crop_size=64, prompting=prompting, head="upernet", **settings)
    history = train_steps(model)
    assert sum(history[-1].values()) < sum(history[0].values())
    check_round_trip(model, tmp_path / "model.pt")


def test_upernet_trains_an_auxiliary_fcn_head():
    fcn = sum(parameter.numel() for parameter in FCNHead(384, 150).parameters())
    assert fcn == 384 * 256 * 9 + 2 * 256 + 256 * 150 + 150  # mmsegmentation's
    model = build_model("tiny", NAMES, head="upernet", crop_size=64)
    assert {"loss", "fcn_loss", "aux_loss"} == train_steps(model, 1)[0].keys()
    assert build_model("tiny", NAMES, head="upernet", fcn_weight=0.0).fcn_head is None
    assert build_model("tiny", NAMES).fcn_head is None
