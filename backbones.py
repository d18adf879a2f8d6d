"""Any image backbone instead of CLIP's: the paper's section 3.4 and Table 5, for which no code was released.

A backbone maps images (B, 3, H, W) to four feature maps, fine to coarse. `AttentionPoolBackbone` adds CLIP's attention
pool, randomly initialized, to the last of them, so that the frozen text encoder can guide the backbone.

    build_model("vitb16", names, clip="ViT-B/16", backbone=SwinPyramid("swin_t", "IMAGENET1K_V1"))  # of denseclip.py

UperNet, Swin's usual head, is here, too. This file needs torch, torchvision, clip_model.py and heads.py."""

import importlib
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import clip_model
from heads import conv, resize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]


class AttentionPoolBackbone(nn.Module):
    """Any module, images (B, 3, H, W) -> four maps (B, C_i, H_i, W_i), with an attention pool on its last map.
    embed_dim:          C of the text encoder, 1024 for CLIP's RN50 and 512 for ViT-B/16; 0: no pool, for the baselines
    input_resolution:   pixels per side for which the pool's positions are initialized; they are resized for other sizes
    imagenet_normalize: the module expects images with ImageNet's mean and std; False: with CLIP's
    The module is tried on an image of this size: a ValueError says what does not fit."""

    score_level = 3  # index of the map with the size of visual_embeddings

    def __init__(self, module: nn.Module, embed_dim: int, input_resolution: int = 512, imagenet_normalize: bool = True):
        super().__init__()
        self.module = module
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet_normalize else (clip_model.MEAN, clip_model.STD)
        mean, std = torch.tensor([clip_model.MEAN, mean]), torch.tensor([clip_model.STD, std])  # (2, 3), CLIP's first
        self.register_buffer("scale", (std[0] / std[1]).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean[0] - mean[1]) / std[1]).view(3, 1, 1), persistent=False)
        shapes = self.try_module(input_resolution)
        self.channels, self.attnpool = [shape[1] for shape in shapes], None
        if embed_dim:
            width, grid = shapes[-1][1:3]
            heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)  # of 64 channels, or more
            self.attnpool = clip_model.AttentionPool2d(grid, width, heads, embed_dim)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """Images (B, 3, H, W), normalized with CLIP's mean and std -> the four maps, z_bar (B, C), z (B, C, H_4, W_4);
        the latter two are None without a pool."""
        pyramid = self.pyramid(images)  # four maps (B, C_i, H_i, W_i)
        return pyramid, *(self.attnpool(pyramid[-1]) if self.attnpool else (None, None))

    def pyramid(self, images: Tensor) -> list[Tensor]:
        maps = self.module(images * self.scale + self.shift)  # list or dictionary of (B, C_i, H_i, W_i)
        return list(maps.values() if isinstance(maps, dict) else maps)

    @torch.no_grad()
    def try_module(self, side: int) -> list[tuple[int, ...]]:
        """The shapes of the module's maps for an image of side x side pixels, which must be four that halve in size."""
        name, training = type(self.module).__name__, self.module.training
        image = torch.zeros(1, 3, side, side, device=next((p.device for p in self.module.parameters()), None))
        self.module.eval()
        try:
            shapes = [tuple(x.shape) for x in self.pyramid(image)]
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{name} fails on an image of {side} x {side} pixels: {reason}") from error
        self.module.train(training)
        four = [len(shape) for shape in shapes] == [4] * 4
        if not four or any(abs(2 * shapes[i + 1][d] - shapes[i][d]) > 1 for i in range(3) for d in (2, 3)):
            raise ValueError(f"{name}: expected four maps (B, C, H, W) that halve in size each time, got {shapes}")
        return shapes


def four_scales(width: int) -> tuple[nn.Module, ...]:
    """For a ViT's four maps (B, D, h, w), what resamples them to 4h x 4w, 2h x 2w, h x w and h/2 x w/2."""
    up, norm = partial(nn.ConvTranspose2d, width, width, 2, stride=2), partial(nn.GroupNorm, 1, width)
    finest = nn.Sequential(norm(), up(), nn.BatchNorm2d(width), nn.GELU(), up())
    return finest, nn.Sequential(norm(), up()), norm(), nn.Sequential(norm(), nn.MaxPool2d(2))


class PyramidViT(clip_model.VisionTransformer):
    """CLIP's ViT with its four maps resampled to strides P/4, P/2, P and 2P, for patches of P pixels."""

    def __init__(self, a: clip_model.Architecture, *others):  # as VisionTransformer's
        super().__init__(a, *others)
        self.fpn1, self.fpn2, self.fpn3, self.fpn4 = four_scales(a.width)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        maps, *rest = super().forward(images)  # four (B, D, h, w); z_bar (B, C), z (B, C, h, w)
        return [self.fpn1(maps[0]), self.fpn2(maps[1]), self.fpn3(maps[2]), self.fpn4(maps[3])], *rest  # 4h x 4w, ...


class ViTPyramid(nn.Module):
    """torchvision's ViT without its classifier: outputs of blocks 3, 5, 7 and 11 (from 0), resampled like CLIP's."""

    def __init__(self, name: str, weights: str | None = None):
        super().__init__()
        net = load_torchvision(name, weights)
        self.conv_proj, self.class_token = net.conv_proj, net.class_token
        self.pos_embedding, self.layers = net.encoder.pos_embedding, net.encoder.layers
        self.fpn1, self.fpn2, self.fpn3, self.fpn4 = four_scales(net.hidden_dim)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = self.conv_proj(images), []  # (B, D, h, w)
        size, class_token = tuple(x.shape[-2:]), self.class_token.expand(x.shape[0], -1, -1)  # (B, 1, D)
        x = torch.cat([class_token, x.flatten(2).transpose(1, 2)], dim=1)  # (B, 1 + hw, D)
        x = x + clip_model.resize_positions(self.pos_embedding[0], size)  # (B, 1 + hw, D)
        for i, layer in enumerate(self.layers):
            x = layer(x)  # (B, 1 + hw, D)
            if i in (3, 5, 7, 11):
                maps.append(x[:, 1:].transpose(1, 2).unflatten(2, size))  # (B, D, h, w)
        return [self.fpn1(maps[0]), self.fpn2(maps[1]), self.fpn3(maps[2]), self.fpn4(maps[3])]  # (B, D, 4h, 4w), ...


class ResNetPyramid(nn.Module):
    """torchvision's ResNet without its classifier: four maps at strides 4, 8, 16, 32."""

    def __init__(self, name: str, weights: str | None = None):
        super().__init__()
        net = load_torchvision(name, weights)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]  # (B, 64, H/4, W/4)
        for stage in self.stages:
            maps.append(stage(maps[-1]))  # (B, C_i, H_i, W_i)
        return maps[1:]


class SwinPyramid(nn.Module):
    """torchvision's Swin without its classifier: four maps at strides 4, 8, 16, 32, each with a new LayerNorm. These
    norms and the padding of images to full patches follow mmsegmentation's Swin. drop_path grows linearly with depth;
    Swin's authors use 0.3 for UperNet on Swin-T and Swin-S."""

    def __init__(self, name: str, weights: str | None = None, drop_path: float = 0.3):
        super().__init__()
        features = load_torchvision(name, weights).features
        paths = [module for module in features.modules() if isinstance(module, torchvision.ops.StochasticDepth)]
        for i, path in enumerate(paths):
            path.p = drop_path * i / (len(paths) - 1)
        # Each stage starts with the layer that sets its size: the patch embedding, or a patch merging.
        self.stages = nn.ModuleList(features[i : i + 2] for i in (0, 2, 4, 6))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in (96, 192, 384, 768))

    def forward(self, images: Tensor) -> list[Tensor]:
        x, pyramid = F.pad(images, (0, -images.shape[3] % 4, 0, -images.shape[2] % 4)), []  # (B, 3, 4 H_1, 4 W_1)
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = stage(x)  # (B, H_i, W_i, C_i)
            pyramid.append(norm(x).permute(0, 3, 1, 2).contiguous())  # (B, C_i, H_i, W_i)
        return pyramid


class UperNetHead(nn.Module):
    """UperNet (Xiao et al., 2018) as in mmsegmentation, neck and head in one: pyramid pooling on the coarsest map,
    top-down sums, all levels resized to the finest one's size and fused by one convolution.

    Training needs two or more images per batch: after the coarsest pooling, batch norm sees one pixel per image."""

    def __init__(self, in_channels: list[int], num_classes: int, channels: int = 512, dropout: float = 0.1):
        super().__init__()
        (*finer, coarsest), bins = in_channels, (1, 2, 3, 6)
        pools = [nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(coarsest, channels, 1, norm=True)) for n in bins]
        self.psp_modules = nn.ModuleList(pools)
        self.bottleneck = conv(coarsest + len(bins) * channels, channels, 3, norm=True)
        self.lateral_convs = nn.ModuleList(conv(c, channels, 1, norm=True) for c in finer)
        self.fpn_convs = nn.ModuleList(conv(channels, channels, 3, norm=True) for _ in finer)
        self.fpn_bottleneck = conv(len(in_channels) * channels, channels, 3, norm=True)
        self.dropout, self.conv_seg = nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1)

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        """[(B, C_i, H_i, W_i)], fine to coarse -> logits (B, K, H_0, W_0)."""
        *finer, coarsest = pyramid
        pooled = [resize(pool(coarsest), coarsest.shape[-2:]) for pool in self.psp_modules]  # (B, channels, H_3, W_3)
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, finer, strict=True)]  # (B, channels, H_i, W_i)
        levels.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[-2:])
        outputs = [output(x) for output, x in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        x = torch.cat([resize(x, outputs[0].shape[-2:]) for x in outputs], dim=1)  # (B, 4 channels, H_0, W_0)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(x)))  # (B, K, H_0, W_0)


class FCNHead(nn.Sequential):
    """UperNet's auxiliary head on the third map, for training alone: (B, C, H, W) -> logits (B, K, H, W)."""

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256, dropout: float = 0.1):
        classifier = nn.Conv2d(channels, num_classes, 1)
        super().__init__(conv(in_channels, channels, 3, norm=True), nn.Dropout2d(dropout), classifier)


PYRAMIDS = dict.fromkeys(("resnet18", "resnet50", "resnet101"), ResNetPyramid)
PYRAMIDS |= {"swin_t": SwinPyramid, "swin_s": SwinPyramid, "vit_b_16": ViTPyramid}


def build_backbone(name: str, weights: str | None = None, drop_path: float | None = None) -> nn.Module:
    """A torchvision network, for images with ImageNet's mean and std; weights: see `load_torchvision`, drop_path: for
    Swin. Or, if `name` is "package.module:function", the module that this function of yours returns."""
    if ":" in name:
        path, _, function = name.partition(":")
        try:
            module = getattr(importlib.import_module(path), function)()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"--backbone {name}: {error}; modules are looked for here and on PYTHONPATH") from error
        except (Exception, SystemExit) as error:  # of that code
            raise ValueError(f"--backbone {name}: {type(error).__name__}: {error}") from error
        if not isinstance(module, nn.Module):
            raise ValueError(f"--backbone {name}: it returned a {type(module).__name__}, expected a module")
        return module
    if name not in PYRAMIDS:
        own = "package.module:function; your own module is given again to load_checkpoint(path, backbone=module)"
        raise ValueError(f"no backbone named {name!r}: choose one of {', '.join(PYRAMIDS)} or {own}")
    return PYRAMIDS[name](name, weights, *([] if drop_path is None else [drop_path]))


def load_torchvision(name: str, weights: str | None = None) -> nn.Module:
    """torchvision's network of this name without its classifier: ResNet's fc, Swin's norm and head, ViT's heads.
    weights: "IMAGENET1K_V1" (used in most papers), "DEFAULT" (torchvision's best) or another of torchvision's names,
             downloaded once; or the path of a state dict with torchvision's parameter names, alone or as in the files
             of MoCo, DenseCL and others, under "state_dict" or "model" and "module.", "encoder_q." or "backbone.";
             None: random"""
    named = torchvision.models.get_model_weights(name).__members__
    if weights and weights not in named and not Path(weights).is_file():
        raise FileNotFoundError(f"{weights}: no such file; weights of {name} are a path or one of {', '.join(named)}")
    if weights in named:
        url = named[weights].value.url
        try:
            with clip_model.one_at_a_time(Path(torch.hub.get_dir(), "checkpoints", Path(url).name)):
                net = torchvision.models.get_model(name, weights=weights)
        except (OSError, RuntimeError) as error:  # no connection, or a file with another hash
            raise ValueError(f"{url}: {error}; run again, or fetch it by hand and give its path") from None
    else:
        net = torchvision.models.get_model(name)
    classifier = [part for part in ("fc", "norm", "head", "heads") if hasattr(net, part)]
    for part in classifier:
        setattr(net, part, nn.Identity())
    if weights and weights not in named:
        state = clip_model.read_weights(weights)
        for prefix in ("module.", "encoder_q.", "backbone."):
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or state
        state = {k: v for k, v in state.items() if k.split(".")[0] not in classifier}
        clip_model.load_weights(net, state, weights)
    return net
