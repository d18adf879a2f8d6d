"""Any image backbone instead of CLIP's: the paper's section 3.4 and Table 5, for which no code was released.

A backbone maps images (B, 3, H, W), normalized with CLIP's mean and std, to four feature maps, fine to coarse.
`AttentionPoolBackbone` adds CLIP's attention pool, randomly initialized, to the last of them, so that the frozen text
encoder can guide the backbone.

    swin = SwinPyramid("swin_t", "IMAGENET1K_V1")
    backbone = AttentionPoolBackbone(swin, SwinPyramid.channels["swin_t"], embed_dim=1024)

This file needs torch, torchvision and clip_model.py.
"""

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from clip_model import MEAN, STD, AttentionPool2d, VisionTransformer, load_weights, read_weights, resize_positions

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)


class AttentionPoolBackbone(nn.Module):
    """Any module, images (B, 3, H, W) -> four maps (B, C_i, H_i, W_i), with an attention pool on its last map.

    channels:         C_1 .. C_4 of the module's maps
    embed_dim:        C of the text encoder, 1024 for CLIP's RN50 and 512 for ViT-B/16; 0: no pool, for the baselines
    input_resolution: pixels per side for which the pool's positions are initialized; they are resized for other sizes
    stride:           of the last map
    """

    score_level = 3  # index of the map with the size of visual_embeddings

    def __init__(
        self, module: nn.Module, channels: list[int], embed_dim: int, input_resolution: int = 512, stride: int = 32
    ):
        super().__init__()
        self.module, self.channels = module, list(channels)
        self.attnpool = None
        if embed_dim:
            width, grid = self.channels[-1], max(1, input_resolution // stride)
            heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)  # of 64 channels, or more
            self.attnpool = AttentionPool2d(grid, width, heads, embed_dim)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """images: (B, 3, H, W); return: the four maps, z_bar (B, C), z (B, C, H_4, W_4), both None without a pool."""
        pyramid = list(self.module(images))  # four maps (B, C_i, H_i, W_i)
        channels = [x.shape[1] for x in pyramid]
        if channels != self.channels:
            name = type(self.module).__name__
            raise ValueError(f"{name}: expected feature maps of {self.channels} channels, got {channels}")
        return pyramid, *(self.attnpool(pyramid[-1]) if self.attnpool else (None, None))


class FourScales:
    """Resamples a ViT's four maps to strides P/4, P/2, P and 2P, for patches of P pixels."""

    def make_scales(self, width: int) -> None:
        def up() -> nn.Module:
            return nn.ConvTranspose2d(width, width, 2, stride=2)

        self.fpn1 = nn.Sequential(nn.GroupNorm(1, width), up(), nn.BatchNorm2d(width), nn.GELU(), up())
        self.fpn2 = nn.Sequential(nn.GroupNorm(1, width), up())
        self.fpn3 = nn.GroupNorm(1, width)
        self.fpn4 = nn.Sequential(nn.GroupNorm(1, width), nn.MaxPool2d(2))

    def rescale(self, maps: list[Tensor]) -> list[Tensor]:
        """Four maps (B, D, h, w) -> (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w), (B, D, h / 2, w / 2)."""
        return [scale(x) for scale, x in zip((self.fpn1, self.fpn2, self.fpn3, self.fpn4), maps, strict=True)]


class PyramidViT(VisionTransformer, FourScales):
    """CLIP's ViT with its four maps resampled."""

    def __init__(self, layers: int, width: int, *others):  # as VisionTransformer's
        super().__init__(layers, width, *others)
        self.make_scales(width)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        maps, global_embedding, visual_embeddings = super().forward(images)  # four (B, D, h, w), (B, C), (B, C, h, w)
        return self.rescale(maps), global_embedding, visual_embeddings


class ViTPyramid(nn.Module, FourScales):
    """torchvision's ViT without its classifier: outputs of blocks 3, 5, 7 and 11 (from 0), resampled like CLIP's."""

    channels = {"vit_b_16": [768] * 4}

    def __init__(self, name: str, weights: str | None = None):
        super().__init__()
        net = load_torchvision(name, weights)
        self.normalize, self.conv_proj, self.class_token = ImageNetNormalize(), net.conv_proj, net.class_token
        self.pos_embedding, self.layers = net.encoder.pos_embedding, net.encoder.layers
        self.make_scales(self.channels[name][0])

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.conv_proj(self.normalize(images))  # (B, D, h, w)
        size = x.shape[-2:]
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)  # (B, 1 + hw, D)
        x, maps = x + resize_positions(self.pos_embedding[0], tuple(size)), []  # (B, 1 + hw, D)
        for i, layer in enumerate(self.layers):
            x = layer(x)  # (B, 1 + hw, D)
            if i in (3, 5, 7, 11):
                maps.append(x[:, 1:].transpose(1, 2).unflatten(2, size))  # (B, D, h, w)
        return self.rescale(maps)


class ResNetPyramid(nn.Module):
    """torchvision's ResNet without its classifier: four maps at strides 4, 8, 16, 32."""

    channels = {
        "resnet18": [64, 128, 256, 512],
        "resnet50": [256, 512, 1024, 2048],
        "resnet101": [256, 512, 1024, 2048],
    }

    def __init__(self, name: str, weights: str | None = None):
        super().__init__()
        net = load_torchvision(name, weights)
        self.normalize = ImageNetNormalize()
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(self.normalize(images))  # (B, 64, H/4, W/4)
        pyramid = []
        for stage in self.stages:
            x = stage(x)  # (B, C_i, H_i, W_i)
            pyramid.append(x)
        return pyramid


class SwinPyramid(nn.Module):
    """torchvision's Swin without its classifier: four maps at strides 4, 8, 16, 32, each with a new LayerNorm.

    These norms and the padding of images to full patches follow mmsegmentation's Swin. drop_path grows linearly with
    depth; Swin's authors use 0.3 for UperNet on Swin-T and Swin-S.
    """

    channels = {"swin_t": [96, 192, 384, 768], "swin_s": [96, 192, 384, 768]}

    def __init__(self, name: str, weights: str | None = None, drop_path: float = 0.3):
        super().__init__()
        features = load_torchvision(name, weights).features
        paths = [module for module in features.modules() if isinstance(module, StochasticDepth)]
        for i, path in enumerate(paths):
            path.p = drop_path * i / (len(paths) - 1)
        self.normalize = ImageNetNormalize()
        # Each stage starts with the layer that sets its size: the patch embedding, or a patch merging.
        self.stages = nn.ModuleList(features[i : i + 2] for i in (0, 2, 4, 6))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels[name])

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.pad(self.normalize(images), (0, -images.shape[3] % 4, 0, -images.shape[2] % 4))  # (B, 3, 4 H_1, 4 W_1)
        pyramid = []
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = stage(x)  # (B, H_i, W_i, C_i)
            pyramid.append(norm(x).permute(0, 3, 1, 2).contiguous())  # (B, C_i, H_i, W_i)
        return pyramid


class ImageNetNormalize(nn.Module):
    """Images (B, 3, H, W) normalized with CLIP's mean and std, to ImageNet's mean and std."""

    def __init__(self):
        super().__init__()
        mean, std = torch.tensor([MEAN, IMAGENET_MEAN]), torch.tensor([STD, IMAGENET_STD])
        self.register_buffer("scale", (std[0] / std[1]).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean[0] - mean[1]) / std[1]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


PYRAMIDS = {name: pyramid for pyramid in (ResNetPyramid, SwinPyramid, ViTPyramid) for name in pyramid.channels}


def build_backbone(
    name: str,
    weights: str | None = None,
    embed_dim: int = 0,
    input_resolution: int = 512,
    drop_path: float | None = None,
) -> AttentionPoolBackbone:
    """A torchvision network with `weights` (see `load_torchvision`) under an attention pool; drop_path: of Swin."""
    if name not in PYRAMIDS:
        raise ValueError(
            f"no backbone named {name!r}: expected one of {', '.join(PYRAMIDS)}; your own module is given as "
            'build_model(..., backbone=module), its weights as model.load_state_dict(read_checkpoint(path)["model"])'
        )
    pyramid = PYRAMIDS[name]
    module = pyramid(name, weights) if drop_path is None else pyramid(name, weights, drop_path)
    return AttentionPoolBackbone(module, pyramid.channels[name], embed_dim, input_resolution)


def load_torchvision(name: str, weights: str | None = None) -> nn.Module:
    """torchvision's network of this name without its classifier: ResNet's fc, Swin's norm and head, ViT's heads.

    weights: "IMAGENET1K_V1" (used in most papers), "DEFAULT" (torchvision's best) or another of torchvision's names,
             downloaded once; or the path of a state dict with torchvision's parameter names, alone or as in the files
             of MoCo, DenseCL and others, under "state_dict" or "model" and "module.", "encoder_q." or "backbone.";
             None: random
    """
    named = torchvision.models.get_model_weights(name).__members__
    if weights and weights not in named and not Path(weights).is_file():
        raise FileNotFoundError(f"{weights}: no such file; weights of {name} are a path or one of {', '.join(named)}")
    try:
        net = torchvision.models.get_model(name, weights=weights if weights in named else None)
    except (OSError, RuntimeError) as error:  # no connection, or a file with another hash
        raise ValueError(
            f"{named[weights].value.url}: {error}; run again, or fetch it by hand and give its path"
        ) from None
    classifier = [part for part in ("fc", "norm", "head", "heads") if hasattr(net, part)]
    for part in classifier:
        setattr(net, part, nn.Identity())
    if weights and weights not in named:
        state_dict = read_weights(weights)
        for prefix in ("module.", "encoder_q.", "backbone."):
            inside = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
            state_dict = inside or state_dict
        load_weights(net, {k: v for k, v in state_dict.items() if k.split(".")[0] not in classifier}, weights)
    return net
