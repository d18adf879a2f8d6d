"""CLIP's encoders, and loading of OpenAI's weights ("Learning Transferable Visual Models From Natural Language
Supervision", Radford et al., 2021; https://github.com/openai/CLIP).

Both image encoders return what a dense task needs, in place of one vector an image:

    pyramid              four feature maps, fine to coarse
    global_embedding     (B, C)        z_bar: CLIP's image embedding
    visual_embeddings    (B, C, H, W)  z: the same map from features to language, kept at every position

Parameter names are OpenAI's, so their files load without a key map. This file needs torch and tqdm alone.

    clip = load_clip("RN50")                      # or the path of a file
    clip.encode_image(images), clip.encode_text(tokens)
"""

import hashlib
import http.client
import math
import os
import re
import shutil
import urllib.request
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one CLIP from another; `read_architecture` finds it in the weights. Heads are width // 64."""

    embed_dim: int  # C, shared by images and text; 0: without the way into the shared space
    input_resolution: int  # pixels a side, at which the positional embeddings are laid out
    layers: int | tuple[int, ...]  # transformer blocks, or bottlenecks in each of the ResNet's four stages
    width: int  # of the ViT, or of the ResNet's stem
    patch_size: int  # 0: a ResNet
    text_width: int  # 0: no text encoder
    text_layers: int = 12
    context_length: int = 77
    vocab_size: int = 49408


ARCHITECTURES = {
    "RN50": Architecture(1024, 224, (3, 4, 6, 3), 64, 0, 512),
    "RN101": Architecture(512, 224, (3, 4, 23, 3), 64, 0, 512),
    "RN50x4": Architecture(640, 288, (4, 6, 10, 6), 80, 0, 640),
    "RN50x16": Architecture(768, 384, (6, 8, 18, 8), 96, 0, 768),
    "RN50x64": Architecture(1024, 448, (3, 15, 36, 10), 128, 0, 1024),
    "ViT-B/32": Architecture(512, 224, 12, 768, 32, 512),
    "ViT-B/16": Architecture(512, 224, 12, 768, 16, 512),
    "ViT-L/14": Architecture(768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": Architecture(768, 336, 24, 1024, 14, 768),
}

SERVER = "https://openaipublic.azureedge.net/clip/models"
FILES = {  # on the server, under the file's sha256
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd/RN50x4.pt",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa/RN50x16.pt",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c/RN50x64.pt",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}


# ------------------------------------------------------------------------------------------------ positions


def resize_positions(positions: Tensor, size: tuple[int, int]) -> Tensor:
    """Positional embeddings of a class or mean token and a square grid, laid out for another grid.

    positions: (1 + G * G, D); size: (H, W); return: (1 + H * W, D), bilinear, the first row as it is.
    """
    grid = math.isqrt(len(positions) - 1)
    if size == (grid, grid):
        return positions
    square = positions[1:].T.reshape(1, -1, grid, grid)
    square = F.interpolate(square, size=size, mode="bilinear", align_corners=False)
    return torch.cat([positions[:1], square[0].flatten(1).T])


# ------------------------------------------------------------------------------------------------ ResNet


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1. A stride is an average pool, behind the 3x3 convolution and in front of the 1x1 shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, channels * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * 4)
        self.downsample = nn.Identity()
        if stride > 1 or in_channels != channels * 4:
            shortcut = {"-1": nn.AvgPool2d(stride), "0": nn.Conv2d(in_channels, channels * 4, 1, bias=False)}
            self.downsample = nn.Sequential(OrderedDict(shortcut, **{"1": nn.BatchNorm2d(channels * 4)}))
        nn.init.zeros_(self.bn3.weight)  # without weights to load, every block starts as its shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.avgpool(y)))
        return F.relu(y + self.downsample(x))


class AttentionPool2d(nn.Module):
    """CLIP's attention pool, applied to every position and not to the mean alone: DenseCLIP's Eq. (1)."""

    def __init__(self, grid: int, width: int, heads: int, embed_dim: int, crop_positions: bool = False):
        super().__init__()
        self.heads = heads
        self.crop_positions = crop_positions  # take the grid's corner, where it is large enough, in place of resizing
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width) * width**-0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for projection in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def positions(self, height: int, width: int) -> Tensor:
        grid = math.isqrt(len(self.positional_embedding) - 1)
        if not self.crop_positions:
            return resize_positions(self.positional_embedding, (height, width))
        positions = resize_positions(self.positional_embedding, (max(grid, height), max(grid, width)))
        corner = positions[1:].view(max(grid, height), max(grid, width), -1)[:height, :width]
        return torch.cat([positions[:1], corner.flatten(0, 1)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, D, H, W); return: z_bar (B, C), z (B, C, H, W)."""
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (B, HW, D)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # [x4_bar, x4]: (B, 1 + HW, D)
        x = x + self.positions(height, width).to(x.dtype)
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v)  # (B, heads, 1 + HW, D / heads)
        x = self.c_proj(x.transpose(1, 2).flatten(2))  # (B, 1 + HW, C)
        return x[:, 0], x[:, 1:].transpose(1, 2).unflatten(2, (height, width))


class ResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, average pools for strides, an attention pool at the end."""

    def __init__(
        self,
        layers: tuple[int, ...],
        width: int,
        embed_dim: int,
        input_resolution: int = 224,
        crop_positions: bool = False,
    ):
        super().__init__()
        self.channels = [width * 4, width * 8, width * 16, width * 32]  # of the pyramid
        self.score_level = 3  # the level of the pyramid whose positions visual_embeddings has
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, layers[0], stride=1)
        self.layer2 = self._stage(width * 4, width * 2, layers[1], stride=2)
        self.layer3 = self._stage(width * 8, width * 4, layers[2], stride=2)
        self.layer4 = self._stage(width * 16, width * 8, layers[3], stride=2)
        self.attnpool = None
        if embed_dim:
            heads = max(1, width * 32 // 64)
            self.attnpool = AttentionPool2d(input_resolution // 32, width * 32, heads, embed_dim, crop_positions)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = Bottleneck(in_channels, channels, stride)
        return nn.Sequential(first, *(Bottleneck(channels * 4, channels, 1) for _ in range(blocks - 1)))

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """images: (B, 3, H, W); return: the pyramid at strides 4, 8, 16, 32, z_bar (B, C), z (B, C, H/32, W/32).

        Without an embed_dim, as the baselines without language are built, z_bar and z are None.
        """
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.avg_pool2d(x, 2)
        pyramid = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            pyramid.append(x)
        return pyramid, *(self.attnpool(x) if self.attnpool else (None, None))


# ------------------------------------------------------------------------------------------------ transformers


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): what OpenAI trained with. open_clip's own training runs use nn.GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block. drop_path: probability with which a sample skips a branch in training."""

    def __init__(self, width: int, heads: int, quick_gelu: bool = True, drop_path: float = 0.0):
        super().__init__()
        self.drop_path = drop_path
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        gelu = QuickGELU() if quick_gelu else nn.GELU()
        mlp = {"c_fc": nn.Linear(width, width * 4), "gelu": gelu, "c_proj": nn.Linear(width * 4, width)}
        self.mlp = nn.Sequential(OrderedDict(mlp))
        self.ln_2 = nn.LayerNorm(width)

    def skip(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = torch.empty(len(branch), 1, 1, device=branch.device).bernoulli_(1 - self.drop_path)
        return branch * (keep / (1 - self.drop_path)).to(branch.dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.skip(self.attn(y, y, y, need_weights=False, attn_mask=mask)[0])
        return x + self.skip(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """Blocks whose drop path grows linearly from 0 to drop_path over the depth."""

    def __init__(self, width: int, layers: int, heads: int, quick_gelu: bool = True, drop_path: float = 0.0):
        super().__init__()
        rates = [drop_path * i / max(1, layers - 1) for i in range(layers)]
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, quick_gelu, rate) for rate in rates)
        for block in self.resblocks:  # CLIP's own initialisation
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * width * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * layers) ** -0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """x: (B, N, width); mask: (N, N), added to the attention's logits; return: every block's output."""
        outputs = []
        for block in self.resblocks:
            x = block(x, mask)
            outputs.append(x)
        return outputs


class VisionTransformer(nn.Module):
    """CLIP's ViT. Its four feature maps come from blocks a third, a half, two thirds and all the way up."""

    def __init__(
        self,
        layers: int,
        width: int,
        patch_size: int,
        embed_dim: int,
        input_resolution: int = 224,
        quick_gelu: bool = True,
        drop_path: float = 0.0,
        double_class_embedding: bool = False,
    ):
        super().__init__()
        self.channels = [width] * 4
        self.score_level = 2
        self.double_class_embedding = double_class_embedding
        self.blocks = [layers // 3 - 1, layers // 2 - 1, 2 * layers // 3 - 1, layers - 1]  # 3, 5, 7, 11 of 12
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        grid = input_resolution // patch_size
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, max(1, width // 64), quick_gelu, drop_path)
        self.proj = None
        if embed_dim:
            self.ln_post = nn.LayerNorm(width)
            self.proj = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """images: (B, 3, H, W); return: four maps (B, width, H/P, W/P), z_bar (B, C), z (B, C, H/P, W/P).

        P is the patch size; rows and columns beyond its last multiple are not seen. Without an embed_dim z_bar and z
        are None.
        """
        x = self.conv1(images)
        size = x.shape[-2:]
        # Released code of DenseCLIP: the class embedding is added to its token twice.
        class_token = self.class_embedding * (2 if self.double_class_embedding else 1)
        x = torch.cat([class_token.to(x.dtype).expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        x = x + resize_positions(self.positional_embedding, tuple(size)).to(x.dtype)  # (B, 1 + HW, width)
        outputs = self.transformer(self.ln_pre(x))
        pyramid = [outputs[i][:, 1:].transpose(1, 2).unflatten(2, size) for i in self.blocks]
        if self.proj is None:
            return pyramid, None, None
        z = self.ln_post(outputs[-1]) @ self.proj  # (B, 1 + HW, C)
        return pyramid, z[:, 0], z[:, 1:].transpose(1, 2).unflatten(2, size)


class TextEncoder(nn.Module):
    """CLIP's text transformer, which also takes learnable contexts in front of the words."""

    def __init__(
        self,
        embed_dim: int,
        width: int,
        layers: int = 12,
        context_length: int = 77,
        vocab_size: int = 49408,
        quick_gelu: bool = True,
    ):
        super().__init__()
        self.context_length, self.width, self.embed_dim = context_length, width, embed_dim
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, width) * 0.01)
        self.transformer = Transformer(width, layers, max(1, width // 64), quick_gelu)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, contexts: Tensor | None = None) -> Tensor:
        """Embeddings of texts, read at their end-of-text token.

        tokens:   (K, L) int64, the start token first, zeros behind the end-of-text token (the largest number there is)
        contexts: (B, N, width) put behind the start token of every text: DenseCLIP's Eq. (3)
        return:   (K, C), or with contexts (B, K, C)
        """
        x = self.token_embedding(tokens)  # (K, L, width)
        end = tokens.argmax(dim=1)  # (K,)
        if contexts is not None:
            (num_images, num_contexts), num_texts = contexts.shape[:2], len(tokens)
            x = x.expand(num_images, -1, -1, -1)
            p = contexts[:, None].expand(-1, num_texts, -1, -1)
            x = torch.cat([x[:, :, :1], p, x[:, :, 1:]], dim=2).flatten(0, 1)  # [SOT, p, e_k, EOT]: (BK, N + L, width)
            end = (end + num_contexts).repeat(num_images)
        if x.shape[1] > self.context_length:
            raise ValueError(f"text of {x.shape[1]} tokens, but the text encoder has {self.context_length} positions")
        x = x + self.positional_embedding[: x.shape[1]].to(x.dtype)
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf, device=x.device, dtype=x.dtype).triu(1)  # causal
        x = self.transformer(x, mask)[-1]
        x = self.ln_final(x[torch.arange(len(x), device=x.device), end]) @ self.text_projection
        return x if contexts is None else x.view(num_images, num_texts, -1)


# ------------------------------------------------------------------------------------------------ CLIP


class CLIP(nn.Module):
    """An image encoder and a text encoder into one space."""

    def __init__(self, architecture: Architecture, quick_gelu: bool = True):
        super().__init__()
        self.architecture = a = architecture
        if a.patch_size:
            sizes = (a.layers, a.width, a.patch_size, a.embed_dim, a.input_resolution)
            self.visual = VisionTransformer(*sizes, quick_gelu)
        else:
            self.visual = ResNet(a.layers, a.width, a.embed_dim, a.input_resolution)
        self.text = TextEncoder(a.embed_dim, a.text_width, a.text_layers, a.context_length, a.vocab_size, quick_gelu)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) normalised with MEAN and STD; return: (B, C), not normalised."""
        return self.visual(images)[1]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens: (K, L) as `tokenizer.tokenize` gives them; return: (K, C), not normalised."""
        return self.text(tokens)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Scaled cosine similarity of every image with every text, (B, K): a softmax over K classifies."""
        images, texts = F.normalize(self.encode_image(images), dim=1), F.normalize(self.encode_text(tokens), dim=1)
        return self.logit_scale.exp() * images @ texts.T


# ------------------------------------------------------------------------------------------------ weights


def load_clip(name_or_path: str, quick_gelu: bool = True, cache: str | None = None) -> CLIP:
    """CLIP with its weights, in float32, in evaluation mode.

    name_or_path: one of FILES, downloaded once, or a file: OpenAI's TorchScript archive, or a state dict of the same
        names such as open_clip's. The architecture is read off the weights.
    quick_gelu: False for weights trained with GELU, as most of open_clip's are; the weights cannot tell.
    """
    weights = read_weights(name_or_path, cache)
    model = CLIP(read_architecture(weights, name_or_path), quick_gelu)
    names = {key: key if key.startswith("visual.") or key == "logit_scale" else f"text.{key}" for key in weights}
    load_weights(model, {names[key]: value for key, value in weights.items()}, name_or_path)
    return model.eval()


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights into a module that must have exactly their names and shapes; a ValueError names what differs."""
    own = module.state_dict()
    problems = [f"{key} is missing" for key in own if key not in weights]
    problems += [f"{key} is not part of the model" for key in weights if key not in own]
    problems += [
        f"{key} is {tuple(weights[key].shape)} where {tuple(own[key].shape)} was expected"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source}: the weights do not fit the model: {'; '.join(problems[:5])}{more}")
    module.load_state_dict(weights)


def read_weights(name_or_path: str, cache: str | None = None) -> dict[str, Tensor]:
    """CLIP's state dict in float32 with OpenAI's names, from one of FILES or from a file (see `load_clip`)."""
    if name_or_path in FILES:
        sha256, file = FILES[name_or_path].split("/")
        path = Path(cache or "~/.cache/clip").expanduser() / file  # where OpenAI's package keeps them as well
        download(f"{SERVER}/{sha256}/{file}", path, sha256)
    elif not (path := Path(name_or_path)).is_file():
        raise FileNotFoundError(f"{path}: no such file; CLIP's weights are a path or one of {', '.join(FILES)}")
    try:
        weights = _read_file(path)
    except (ValueError, FileNotFoundError):
        raise
    except Exception as error:  # the readers' own errors run over many lines and do not name the file
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: not a readable weights file, perhaps cut short: fetch it again ({reason})") from None
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {}
    if not weights or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in dict(weights).items()):
        raise ValueError(f"{path}: expected a state dict of CLIP's weights, found something else")
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    for key in ("input_resolution", "context_length", "vocab_size"):  # numbers that OpenAI's archives keep as tensors
        weights.pop(key, None)
    return {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}


def _read_file(path: Path) -> dict:
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{path}: needs the package safetensors: pip install safetensors") from None
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            torchscript = any("/code/" in name for name in archive.namelist())
        if torchscript:
            with warnings.catch_warnings():  # torch >= 2.10 calls TorchScript deprecated
                warnings.simplefilter("ignore")
                return torch.jit.load(str(path), map_location="cpu").state_dict()
    return torch.load(path, map_location="cpu", weights_only=True)


def read_architecture(weights: dict[str, Tensor], source: str = "weights") -> Architecture:
    """The architecture that CLIP's weights belong to, read off their names and shapes.

    Parts that are not there (text encoder, attention pool) read as 0.
    """

    def size(key: str, axis: int) -> int:
        return weights[key].shape[axis] if key in weights else 0

    def blocks(prefix: str) -> int:
        found = [re.match(rf"{prefix}\.(\d+)\.", key) for key in weights]
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    if "visual.class_embedding" in weights:
        layers = blocks(r"visual\.transformer\.resblocks")
        width, patch_size = size("visual.conv1.weight", 0), size("visual.conv1.weight", 3)
        embed_dim = size("visual.proj", 1)
        resolution = math.isqrt(size("visual.positional_embedding", 0) - 1) * patch_size
    elif "visual.layer1.0.conv1.weight" in weights:
        layers = tuple(blocks(rf"visual\.layer{stage}") for stage in (1, 2, 3, 4))
        width, patch_size = size("visual.layer1.0.conv1.weight", 0), 0
        embed_dim = size("visual.attnpool.c_proj.weight", 0)
        resolution = math.isqrt(max(0, size("visual.attnpool.positional_embedding", 0) - 1)) * 32
    else:
        raise ValueError(
            f"{source}: not CLIP's weights: neither visual.class_embedding (ViT) nor visual.layer1.0.conv1.weight "
            f"(ResNet) among {', '.join(sorted(weights)[:4])}, ..."
        )
    return Architecture(
        embed_dim=embed_dim,
        input_resolution=resolution,
        layers=layers,
        width=width,
        patch_size=patch_size,
        text_width=size("ln_final.weight", 0),
        text_layers=blocks(r"transformer\.resblocks"),
        context_length=size("positional_embedding", 0),
        vocab_size=size("token_embedding.weight", 0),
    )


# ------------------------------------------------------------------------------------------------ download


def download(url: str, path: Path, checksum: str, algorithm: str = "sha256") -> None:
    """Fetch a file once, with a progress bar; a broken transfer goes on where it stopped.

    The file has its own name only after its checksum was found right.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            start = start if response.status == 206 else 0  # 200: the server sends the file from its beginning
            total = start + int(response.headers.get("Content-Length", 0))
            if (free := shutil.disk_usage(path.parent).free) < total - start:
                raise OSError(f"{(total - start) >> 20} MiB needed in {path.parent}, {free >> 20} MiB are free")
            progress = tqdm(total=total or None, initial=start, unit="B", unit_scale=True, desc=path.name)
            with open(part, "ab" if start else "wb") as file, progress:
                while chunk := response.read(1 << 20):
                    progress.update(file.write(chunk))
        if part.stat().st_size < total:
            raise OSError(f"ended at {part.stat().st_size} of {total} bytes")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:  # 416: nothing is left to send, the part is complete
            raise OSError(f"{url}: {error}; run again to go on, or fetch it by hand and save it as {path}") from None
    with open(part, "rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != checksum:
        part.unlink()
        raise ValueError(f"{url}: {algorithm} {found}, expected {checksum}; the file was removed, run again")
    os.replace(part, path)
