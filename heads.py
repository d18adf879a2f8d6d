"""A standard neck and head, not this paper's: FPN and Semantic FPN, initialized as in the released code.
Both take a feature pyramid: a list of maps (B, C_i, H_i, W_i), fine to coarse. This file needs torch alone."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing of (B, C, h, w) to (B, C, H, W); x itself if it has this size."""
    if not torch.compiler.is_compiling() and x.shape[2:] == tuple(size):  # exported graphs are for every size
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, norm: bool = False) -> nn.Sequential:
    """A convolution, or [convolution, batch norm, ReLU]. Initialized as in the released code."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=not norm)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    if norm:
        return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU(inplace=True)))
    nn.init.zeros_(convolution.bias)
    return nn.Sequential(OrderedDict(conv=convolution))


class FPN(nn.Module):
    """Feature pyramid (Lin et al., 2017): lateral 1x1, top-down sums with nearest up-sampling, 3x3 on each level."""

    def __init__(self, in_channels: list[int], channels: int = 256):
        super().__init__()
        self.lateral_convs = nn.ModuleList(conv(c, channels, 1) for c in in_channels)
        self.fpn_convs = nn.ModuleList(conv(channels, channels, 3) for _ in in_channels)

    def forward(self, pyramid: list[Tensor]) -> list[Tensor]:
        """[(B, C_i, H_i, W_i)], fine to coarse -> [(B, channels, H_i, W_i)]."""
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, pyramid, strict=True)]  # (B, channels, H_i, W_i)
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=levels[i - 1].shape[-2:])
        return [output(x) for output, x in zip(self.fpn_convs, levels, strict=True)]


class SemanticFPNHead(nn.Module):
    """Semantic FPN (Kirillov et al., 2019): brings every level to the finest one's size, sums and classifies.
    Level i, whose stride is twice that of level i - 1, has max(1, i) blocks, and x2 up-sampling after each if i > 0."""

    def __init__(self, num_classes: int, channels: int = 256, levels: int = 4, dropout: float = 0.1):
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for level in range(levels):
            up = [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)] if level else []
            blocks = [module for _ in range(max(1, level)) for module in (conv(channels, channels, 3, norm=True), *up)]
            self.scale_heads.append(nn.Sequential(*blocks))
        self.dropout, self.conv_seg = nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1)

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        """[(B, channels, H_i, W_i)] -> logits (B, K, H_0, W_0)."""
        finest, *coarser = (head(level) for head, level in zip(self.scale_heads, pyramid, strict=True))
        x = sum((resize(x, finest.shape[-2:]) for x in coarser), start=finest)  # (B, channels, H_0, W_0)
        return self.conv_seg(self.dropout(x))  # (B, K, H_0, W_0)
