"""Any image backbone in the place of CLIP's: the paper's section 3.4 and Table 5. Its code was never released.

A backbone is whatever turns images (B, 3, H, W) into four feature maps, fine to coarse. `WithAttentionPool` puts
CLIP's attention pool, from random weights, on the last of them, and the frozen text encoder guides what comes out.

    backbone = WithAttentionPool(SwinPyramid("swin_t", "IMAGENET1K_V1"), SwinPyramid.channels["swin_t"], embed_dim=1024)

This file needs torch, torchvision and clip_model.py.
"""

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from clip_model import MEAN, STD, AttentionPool2d, load_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)


class WithAttentionPool(nn.Module):
    """A backbone that a text encoder can guide, from any module: images (B, 3, H, W) -> four maps (B, C_i, H_i, W_i).

    channels:         C_1 .. C_4 of the module's maps
    embed_dim:        C of the text encoder, 1024 for CLIP's RN50 and 512 for ViT-B/16; 0: no pool, for the baselines
    input_resolution: pixels a side for which the pool's positions are laid out; for other sizes they are resized
    stride:           of the last map
    """

    score_level = 3  # the level of the pyramid whose positions visual_embeddings has

    def __init__(
        self, module: nn.Module, channels: list[int], embed_dim: int, input_resolution: int = 512, stride: int = 32
    ):
        super().__init__()
        self.module = module
        self.channels = list(channels)
        self.attnpool = None
        if embed_dim:
            width = self.channels[-1]
            heads = max(1, width // 64)
            self.attnpool = AttentionPool2d(max(1, input_resolution // stride), width, heads, embed_dim)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """images: (B, 3, H, W); return: the pyramid, z_bar (B, C), z (B, C, H_4, W_4), or None for both of these."""
        pyramid = list(self.module(images))
        found = [x.shape[1] for x in pyramid]
        if found != self.channels:
            name = type(self.module).__name__
            raise ValueError(f"{name}: expected feature maps of {self.channels} channels, got {found}")
        return pyramid, *(self.attnpool(pyramid[-1]) if self.attnpool else (None, None))


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
        x = self.stem(self.normalize(images))
        pyramid = []
        for stage in self.stages:
            x = stage(x)
            pyramid.append(x)
        return pyramid


class SwinPyramid(nn.Module):
    """torchvision's Swin without its classifier: four maps at strides 4, 8, 16, 32, each with a new LayerNorm.

    These norms, and the padding of images to full patches, are as in mmsegmentation's Swin; the drop path is
    torchvision's, 0.2 for Swin-T and 0.3 for Swin-S, which the authors of Swin use for ADE20K as well.
    """

    channels = {"swin_t": [96, 192, 384, 768], "swin_s": [96, 192, 384, 768]}

    def __init__(self, name: str, weights: str | None = None):
        super().__init__()
        features = load_torchvision(name, weights).features
        self.normalize = ImageNetNormalize()
        # Each stage begins with what brings the image, or the map before, to its size: embedding or merging of patches.
        self.stages = nn.ModuleList(features[i : i + 2] for i in (0, 2, 4, 6))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels[name])

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.normalize(images)
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        pyramid = []
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = stage(x)  # (B, H_i, W_i, C_i)
            pyramid.append(norm(x).permute(0, 3, 1, 2).contiguous())
        return pyramid


class ImageNetNormalize(nn.Module):
    """Images as everywhere in this project, normalised with CLIP's mean and std, to ImageNet's mean and std."""

    def __init__(self):
        super().__init__()
        mean, std = torch.tensor([MEAN, IMAGENET_MEAN]), torch.tensor([STD, IMAGENET_STD])
        self.register_buffer("scale", (std[0] / std[1]).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean[0] - mean[1]) / std[1]).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift


PYRAMIDS = {name: pyramid for pyramid in (ResNetPyramid, SwinPyramid) for name in pyramid.channels}


def build_backbone(
    name: str, weights: str | None = None, embed_dim: int = 0, input_resolution: int = 512
) -> WithAttentionPool:
    """One of torchvision's networks, from `weights` (see `load_torchvision`), under `WithAttentionPool`."""
    if name not in PYRAMIDS:
        raise ValueError(
            f"no backbone named {name!r}: choose one of {', '.join(PYRAMIDS)}. A model with your own module is built "
            'by build_model(..., backbone=module), then model.load_state_dict(read_checkpoint(path)["model"])'
        )
    pyramid = PYRAMIDS[name]
    return WithAttentionPool(pyramid(name, weights), pyramid.channels[name], embed_dim, input_resolution)


def load_torchvision(name: str, weights: str | None = None) -> nn.Module:
    """torchvision's network of this name, its classifier removed.

    weights: "IMAGENET1K_V1" (what papers start from), "DEFAULT" (torchvision's best) or another name that torchvision
        has for them, fetched once and checked by it; or the path of a state dict with its names; None: random
    """
    known = torchvision.models.get_model_weights(name)
    if weights is None:
        return without_classifier(torchvision.models.get_model(name, weights=None))
    if weights in known.__members__:
        try:
            return without_classifier(torchvision.models.get_model(name, weights=weights))
        except (OSError, RuntimeError) as error:  # no connection, or a file of another hash
            url = known[weights].value.url
            raise ValueError(f"{url}: {error}; run again, or fetch it by hand and give its path") from None

    if not Path(weights).is_file():
        names = ", ".join(known.__members__)
        raise FileNotFoundError(f"{weights}: no such file; the weights of {name} are a path or one of {names}")
    try:
        state_dict = dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # torch's own errors run over many lines and do not name the file
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{weights}: not a state dict, or cut short: fetch it again ({reason})") from None
    net = without_classifier(torchvision.models.get_model(name, weights=None))
    classifier = ("fc.", "norm.", "head.")
    load_weights(net, {key: value for key, value in state_dict.items() if not key.startswith(classifier)}, weights)
    return net


def without_classifier(net: nn.Module) -> nn.Module:
    """ResNet's fc, Swin's norm and head replaced by nothing."""
    for part in ("fc", "norm", "head"):
        if hasattr(net, part):
            setattr(net, part, nn.Identity())
    return net
