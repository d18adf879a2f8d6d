"""CLIP's encoders, and loading of OpenAI's weights ("Learning Transferable Visual Models From Natural Language
Supervision", Radford et al., 2021; https://github.com/openai/CLIP).

Both image encoders return what a dense task needs instead of one vector per image:

    pyramid              four feature maps, fine to coarse
    global_embedding     (B, C)        z_bar: CLIP's image embedding
    visual_embeddings    (B, C, H, W)  z: the same projection into the shared space, at every position

Parameter names are OpenAI's, so their files load without a key map. This file needs only torch and tqdm.
    clip = load_clip("RN50")  # or a file; then clip.encode_image(images), clip.encode_text(tokens)"""

import contextlib
import hashlib
import math
import os
import pickle
import re
import urllib.request
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
IGNORE_INDEX = 255  # label of pixels that count neither in a loss nor in a score


@dataclass(frozen=True)
class Architecture:
    """The sizes that distinguish one CLIP from another; a transformer of width D has D / 64 heads."""

    embed_dim: int  # C, of the space that images and texts share; 0: no projection into it
    input_resolution: int  # pixels per side, for which the positional embeddings were trained
    layers: int | tuple[int, ...]  # transformer blocks, or bottlenecks in each of the ResNet's four stages
    width: int  # of the ViT, or of the ResNet's stem
    patch_size: int  # 0: a ResNet
    text_width: int  # 0: no text encoder
    text_layers: int = 12
    context_length: int = 77
    vocab_size: int = 49408


ARCHITECTURES = {  # the paper's; `load_clip` reads any other off its weights
    "RN50": Architecture(1024, 224, (3, 4, 6, 3), 64, 0, 512),
    "RN101": Architecture(512, 224, (3, 4, 23, 3), 64, 0, 512),
    "ViT-B/16": Architecture(512, 224, 12, 768, 16, 512),
}

SERVER = "https://openaipublic.azureedge.net/clip/models"
FILES = {  # on the server: sha256 of the file / its name
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


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention. q: (B, N, D); k, v: (B, M, D); mask: (N, M), as for a block; return: (B, N, D)."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N or M, D / heads)
    short = mask is None and k.shape[2] <= 2048  # plain products need memory for all N x M
    if short and q.dtype == torch.bfloat16 and q.device.type == "cpu" and not q.requires_grad:
        # PyTorch's fused kernel for CPUs is no faster in bf16 than in fp32; plain products are
        x = (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(dim=3) @ v  # (B, heads, N, D / heads)
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, N, D / heads)
    return x.transpose(1, 2).flatten(2)  # (B, N, D)


def resize_positions(positions: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate the positional embeddings of a square grid to another grid size.
    positions: (1 + G * G, D), the first row for the class token or the mean; size: (H, W)
    return:    (1 + H * W, D), bilinear, the first row unchanged; at the grid's own size, the same numbers"""
    grid = math.isqrt(len(positions) - 1)
    square = positions[1:].T.reshape(1, -1, grid, grid)  # (1, D, G, G)
    square = F.interpolate(square, size=size, mode="bilinear", align_corners=False)  # (1, D, H, W)
    return torch.cat([positions[:1], square[0].flatten(1).T])  # (1 + HW, D)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1. Strides are average pools: after the 3x3 convolution, and before the 1x1 of the shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(channels, channels * 4, 1, bias=False), nn.BatchNorm2d(channels * 4)
        self.downsample = nn.Identity()
        if in_channels != channels * 4:
            shortcut = nn.Conv2d(in_channels, channels * 4, 1, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels * 4))
        nn.init.zeros_(self.bn3.weight)  # when trained from scratch, every block starts as its shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))  # (B, D, H, W), D the channels
        y = F.relu(self.bn2(self.conv2(y)))  # (B, D, H, W)
        y = self.bn3(self.conv3(self.avgpool(y)))  # (B, 4D, H / stride, W / stride)
        return F.relu(y + self.downsample(self.avgpool(x)))  # (B, 4D, H / stride, W / stride)


class AttentionPool2d(nn.Module):
    """CLIP's attention pool, but with an output for every position, not only for the mean: DenseCLIP's Eq. (1)."""

    def __init__(self, grid: int, width: int, heads: int, embed_dim: int, crop_positions: bool = False):
        super().__init__()
        self.heads, self.crop_positions = heads, crop_positions  # small maps get the grid's corner, not a resized grid
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width) * width**-0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)
        for projection in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def positions(self, height: int, width: int) -> Tensor:
        grid = math.isqrt(len(self.positional_embedding) - 1)
        rows, columns = (max(grid, height), max(grid, width)) if self.crop_positions else (height, width)
        positions = resize_positions(self.positional_embedding, (rows, columns))  # (1 + rows * columns, D)
        corner = positions[1:].view(rows, columns, -1)[:height, :width]  # (H, W, D)
        return torch.cat([positions[:1], corner.flatten(0, 1)])  # (1 + HW, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, D, H, W); return: z_bar (B, C), z (B, C, H, W)."""
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (B, HW, D)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # [x4_bar, x4]: (B, 1 + HW, D)
        x = x + self.positions(height, width).to(x.dtype)  # (B, 1 + HW, D)
        x = self.c_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))  # (B, 1 + HW, C)
        return x[:, 0], x[:, 1:].transpose(1, 2).unflatten(2, (height, width))  # (B, C), (B, C, H, W)


class ResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, average pools as strides, an attention pool at the end."""

    def __init__(self, a: Architecture, crop_positions: bool = False):
        super().__init__()
        width = a.width
        self.channels = [width * 4, width * 8, width * 16, width * 32]  # of the pyramid's four maps
        self.score_level = 3  # index of the map with the size of visual_embeddings
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        in_channels = width
        for i, (channels, blocks) in enumerate(zip(self.channels, a.layers, strict=True)):
            first = Bottleneck(in_channels, channels // 4, stride=2 if i else 1)
            rest = (Bottleneck(channels, channels // 4, stride=1) for _ in range(blocks - 1))
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *rest))
            in_channels = channels
        sizes = a.input_resolution // 32, width * 32, width * 32 // 64, a.embed_dim  # of grid, input, heads, output
        self.attnpool = AttentionPool2d(*sizes, crop_positions) if a.embed_dim else None

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """images: (B, 3, H, W); return: the pyramid at strides 4, 8, 16, 32, z_bar (B, C), z (B, C, H/32, W/32).
        With embed_dim 0, for baselines without language, z_bar and z are None."""
        x = F.relu(self.bn1(self.conv1(images)))  # (B, D/2, H/2, W/2), D the width
        x = F.relu(self.bn2(self.conv2(x)))  # (B, D/2, H/2, W/2)
        x = F.relu(self.bn3(self.conv3(x)))  # (B, D, H/2, W/2)
        x1 = self.layer1(F.avg_pool2d(x, 2))  # (B, 4D, H/4, W/4)
        x2 = self.layer2(x1)  # (B, 8D, H/8, W/8)
        x3 = self.layer3(x2)  # (B, 16D, H/16, W/16)
        x4 = self.layer4(x3)  # (B, 32D, H/32, W/32)
        return [x1, x2, x3, x4], *(self.attnpool(x4) if self.attnpool else (None, None))  # x1 .. x4, z_bar, z


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's models; most models that open_clip trained use nn.GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702  # silu(x) = x * sigmoid(x); keeps one tensor for the gradient, not two


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block. drop_path: probability of dropping a residual branch at a token in training."""

    def __init__(self, width: int, heads: int, quick_gelu: bool = True, drop_path: float = 0.0):
        super().__init__()
        self.drop_path = drop_path
        self.attn = nn.MultiheadAttention(width, heads)  # parameters alone: its forward is slow in evaluation
        self.ln_1 = nn.LayerNorm(width)
        gelu = QuickGELU() if quick_gelu else nn.GELU()
        mlp = {"c_fc": nn.Linear(width, width * 4), "gelu": gelu, "c_proj": nn.Linear(width * 4, width)}
        self.mlp = nn.Sequential(OrderedDict(mlp))
        self.ln_2 = nn.LayerNorm(width)

    def apply_drop_path(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        # Released code: a token position is dropped for the whole batch, since its tensors are (N, B, D) there.
        keep = torch.empty(1, branch.shape[1], 1, device=branch.device).bernoulli_(1 - self.drop_path)  # (1, N, 1)
        return branch * (keep / (1 - self.drop_path)).to(branch.dtype)  # (B, N, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, N, D); mask: (N, N), True where a token (row) attends to another (column); return: (B, N, D)."""
        qkv = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)  # (B, N, 3D)
        y = self.attn.out_proj(attention(*qkv.chunk(3, dim=2), self.attn.num_heads, mask))  # (B, N, D)
        x = x + self.apply_drop_path(y)  # (B, N, D)
        return x + self.apply_drop_path(self.mlp(self.ln_2(x)))  # (B, N, D)


class Transformer(nn.Module):
    """Transformer blocks whose drop path rates grow linearly with depth, from 0 to drop_path."""

    def __init__(self, width: int, layers: int, heads: int, quick_gelu: bool = True, drop_path: float = 0.0):
        super().__init__()
        rates = [drop_path * i / max(1, layers - 1) for i in range(layers)]
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, quick_gelu, rate) for rate in rates)
        for block in self.resblocks:  # CLIP's initialization
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * width * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * layers) ** -0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """x: (B, N, D); mask: (N, N), as for a block; return: the output of every block, (B, N, D)."""
        return [x := block(x, mask) for block in self.resblocks]  # one (B, N, D) per block


class VisionTransformer(nn.Module):
    """CLIP's ViT. The four feature maps are the outputs of the blocks at 1/3, 1/2, 2/3 and all of the depth."""

    def __init__(self, a: Architecture, quick_gelu: bool, drop_path: float = 0.0, double_class_embedding: bool = False):
        super().__init__()
        width, layers = a.width, a.layers
        self.channels, self.score_level, self.double_class_embedding = [width] * 4, 2, double_class_embedding
        self.blocks = [layers // 3 - 1, layers // 2 - 1, 2 * layers // 3 - 1, layers - 1]  # 3, 5, 7, 11 of 12
        self.conv1 = nn.Conv2d(3, width, a.patch_size, stride=a.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        grid = a.input_resolution // a.patch_size
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width) * width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, max(1, width // 64), quick_gelu, drop_path)
        self.proj = None
        if a.embed_dim:
            self.ln_post = nn.LayerNorm(width)
            self.proj = nn.Parameter(torch.randn(width, a.embed_dim) * width**-0.5)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """images: (B, 3, H, W); return: four maps (B, D, h, w), z_bar (B, C), z (B, C, h, w), where (h, w) = (H, W) //
        patch size: pixels beyond the last full patch are ignored. With embed_dim 0, z_bar and z are None."""
        x = self.conv1(images)  # (B, D, h, w)
        size = x.shape[-2:]
        # Released code of DenseCLIP: the class embedding is added to its token twice.
        class_token = self.class_embedding.to(x.dtype) * (2 if self.double_class_embedding else 1)  # (D,)
        x = torch.cat([class_token.expand(x.shape[0], 1, -1), x.flatten(2).transpose(1, 2)], dim=1)  # (B, 1 + hw, D)
        x = x + resize_positions(self.positional_embedding, tuple(size)).to(x.dtype)  # (B, 1 + hw, D)
        outputs = self.transformer(self.ln_pre(x))  # one (B, 1 + hw, D) per block
        pyramid = [outputs[i][:, 1:].transpose(1, 2).unflatten(2, size) for i in self.blocks]  # four (B, D, h, w)
        if self.proj is None:
            return pyramid, None, None
        z = self.ln_post(outputs[-1]) @ self.proj  # Eq. (1) of DenseCLIP: [z_bar, z], (B, 1 + hw, C)
        return pyramid, z[:, 0], z[:, 1:].transpose(1, 2).unflatten(2, size)  # ..., (B, C), (B, C, h, w)


class TextEncoder(nn.Module):
    """CLIP's text transformer, and the same with contexts before the words, as DenseCLIP uses it."""

    def __init__(self, a: Architecture, quick_gelu: bool = True):
        super().__init__()
        self.context_length, self.width, self.embed_dim = a.context_length, a.text_width, a.embed_dim
        self.token_embedding = nn.Embedding(a.vocab_size, self.width)
        self.positional_embedding = nn.Parameter(torch.randn(a.context_length, self.width) * 0.01)
        self.transformer = Transformer(self.width, a.text_layers, max(1, self.width // 64), quick_gelu)
        self.ln_final = nn.LayerNorm(self.width)
        self.text_projection = nn.Parameter(torch.randn(self.width, a.embed_dim) * self.width**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (K, L) int64, L at most context_length: start token, text, end-of-text token (the largest), zeros.
        return: (K, C), the output at the end-of-text token, projected into the shared space."""
        length = tokens.shape[1]  # L
        x = self.token_embedding(tokens) + self.positional_embedding[:length]  # (K, L, D)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        x = self.transformer(x, causal)[-1]  # (K, L, D)
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]  # at EOT: (K, D)
        return self.ln_final(x) @ self.text_projection  # (K, C)

    def forward_shared(self, tokens: Tensor, contexts: Tensor) -> Tensor:
        """Embeddings (B, K, C) of texts with contexts (B, N, D) after the start token, [SOT, p, e_k, EOT]: Eq. (3).

        The start token and the contexts come first and attention is causal, so they are the same in all texts: they
        appear once in a sequence, followed by several names: [SOT, p, e_1, EOT, e_2, EOT, ...]. The mask lets each name
        attend to SOT, p and itself, and each name keeps the positions that it would have alone. This is a third of the
        work of one sequence per text where names have up to 3 tokens and contexts 8."""
        (num_images, num_contexts), (num_texts, length) = contexts.shape[:2], tokens.shape  # (B, N), (K, L)
        if (total := num_contexts + length) > self.context_length:
            raise ValueError(f"text of {total} tokens, but the text encoder has {self.context_length} positions")
        first, rest = num_contexts + 1, length - 1  # tokens that are shared, and of each name
        rows = -(-num_texts // max(1, 128 // rest))  # R sequences per image; attention grows with their square
        size = -(-num_texts // rows)  # names per sequence; the last may have a few that are padding
        start = self.token_embedding(tokens[:1, :1]).expand(num_images, -1, -1)  # (B, 1, D)
        shared = torch.cat([start, contexts], dim=1)[:, None].expand(-1, rows, -1, -1)  # (B, R, 1 + N, D)
        names = F.pad(tokens[:, 1:], (0, 0, 0, rows * size - num_texts)).view(rows, -1)  # (R, size (L - 1))
        names = self.token_embedding(names).expand(num_images, -1, -1, -1)  # (B, R, size (L - 1), D)
        x = torch.cat([shared, names], dim=2).flatten(0, 1)  # (BR, M, D), M = 1 + N + size (L - 1)

        index = torch.arange(x.shape[1], device=x.device) - first  # (M,), below 0: shared
        name = index.div(rest, rounding_mode="floor").clamp(min=-1)  # (M,), -1: shared
        position = torch.where(index < 0, index, index % rest) + first  # (M,)
        sees = ((name[:, None] == name) | (name < 0)) & (position[:, None] >= position)  # (M, M)
        x = x + self.positional_embedding[position]  # (BR, M, D)
        x = self.transformer(x, sees)[-1][:, first:].reshape(num_images, rows * size, rest, -1)  # (B, R size, L - 1, D)
        x = x[:, torch.arange(num_texts, device=x.device), tokens.argmax(dim=1) - 1]  # at EOT: (B, K, D)
        return self.ln_final(x) @ self.text_projection  # (B, K, C)


class CLIP(nn.Module):
    """An image encoder and a text encoder that map into one embedding space."""

    def __init__(self, architecture: Architecture, quick_gelu: bool = True):
        super().__init__()
        self.architecture = a = architecture
        self.visual = VisionTransformer(a, quick_gelu) if a.patch_size else ResNet(a)
        self.text = TextEncoder(a, quick_gelu)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) normalized with MEAN and STD; return: (B, C), not normalized."""
        return self.visual(images)[1]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens: (K, L) as `tokenizer.tokenize` returns them; return: (K, C), not normalized."""
        return self.text(tokens)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B, K): the scaled cosine similarity of every image with every text."""
        images = F.normalize(self.encode_image(images), dim=1)  # (B, C)
        texts = F.normalize(self.encode_text(tokens), dim=1)  # (K, C)
        return self.logit_scale.exp() * images @ texts.T  # (B, K)


def load_clip(name_or_path: str, quick_gelu: bool = True, cache: str | None = None) -> CLIP:
    """CLIP with pretrained weights, in float32 and evaluation mode; the architecture is read off the weights.
    name_or_path: a name in FILES, downloaded once; or a file, OpenAI's TorchScript archive or open_clip's state dict
    quick_gelu:   False for weights trained with GELU, as most of open_clip's are; the file does not say"""
    weights = read_weights(name_or_path, cache)
    architecture = read_architecture(weights, name_or_path)
    try:
        with torch.device("meta"):  # no memory for parameters: those of the file are used, whatever sizes it claims
            model = CLIP(architecture, quick_gelu)
    except Exception as error:
        raise ValueError(f"{name_or_path}: no CLIP has these sizes: {architecture}") from error
    prefixes = {key: "" if key.startswith(("visual.", "logit_scale")) else "text." for key in weights}
    load_weights(model, {prefixes[key] + key: value for key, value in weights.items()}, name_or_path)
    return model.to(memory_format=torch.channels_last).eval()


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load a state dict that must match in names and shapes; a ValueError names `source` and what differs."""
    expected = module.state_dict()
    problems = [f"{key} is missing" for key in expected if key not in weights]
    problems += [f"{key} is not part of the model" for key in weights if key not in expected]
    shapes = [(key, tuple(weights[key].shape), tuple(expected[key].shape)) for key in expected if key in weights]
    problems += [f"{key} is {shape}, expected {required}" for key, shape, required in shapes if shape != required]
    problems += [f"{key} is not finite" for key, value in weights.items() if not value.isfinite().all()]
    if problems:
        first = "; ".join(problems[:5])
        raise ValueError(f"{source}: the weights do not fit the model: {first} ({len(problems)} differences in all)")
    module.load_state_dict(weights, assign=any(value.is_meta for value in expected.values()))


def read_weights(name_or_path: str, cache: str | None = None) -> dict[str, Tensor]:
    """A state dict in float32, from a name in FILES or a file (see `load_clip`)."""
    path = Path(name_or_path)
    if name_or_path in FILES:
        sha256, file = FILES[name_or_path].split("/")
        path = Path(cache or "~/.cache/clip").expanduser() / file  # the cache of OpenAI's own package
        download(f"{SERVER}/{sha256}/{file}", path, sha256)
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; CLIP's weights are a path or one of {', '.join(FILES)}")
    weights = read_tensors(path)
    for wrapping in ("state_dict", "model"):
        weights = weights.get(wrapping, weights) if isinstance(weights, dict) else {}
    if not weights or not all(isinstance(k, str) and is_plain(v) for k, v in weights.items()):
        raise ValueError(f"{path}: expected a state dict, parameter names and tensors; fetch it again")
    sizes = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI's archives store as tensors
    weights = {key.removeprefix("module."): value for key, value in weights.items() if key not in sizes}
    return {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}


def is_plain(x: object) -> bool:
    """Whether this is a tensor of real numbers in memory: not sparse, quantized, expanded or without its values."""
    plain = isinstance(x, Tensor) and x.is_cpu and x.layout == torch.strided and not (x.is_quantized or x.is_complex())
    return plain and x.nbytes <= x.untyped_storage().nbytes()


def read_tensors(path: str | Path) -> object:
    """What torch.save wrote to a file, on the CPU, or a TorchScript archive's state dict.
    A ValueError if the file is damaged or holds more than tensors and built-in types: no code in it is run."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: {'a folder, expected a' if os.path.isdir(path) else 'no such'} file")
    try:
        archive = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None
        if archive and (damaged := archive.testzip()):  # compares checksums, which torch.load does not
            raise ValueError(f"{damaged} in it differs from its checksum")
        files = archive.infolist() if archive else []
        code = [archive.read(file) for file in files if re.search(r"/code/.*\.py$", file.filename, re.IGNORECASE)]
        if len({file.filename.lower() for file in files}) < len(files) or any(b"__setstate__" in text for text in code):
            raise pickle.UnpicklingError  # of two entries readers may take either; torch.jit.load runs __setstate__
        if code:  # TorchScript
            with warnings.catch_warnings(action="ignore"):  # deprecated since torch 2.10
                return torch.jit.load(str(path), map_location="cpu").state_dict()
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        how = "if it is of the authors' release and you trust it, convert.py --unsafe runs what is in it"
        raise ValueError(f"{path}: it holds more than tensors and built-in types, or is damaged; {how}") from None
    except Exception as error:  # torch's own messages run over many lines and do not name the file
        reason = f" ({error})" if isinstance(error, ValueError | OSError) else ""
        raise ValueError(f"{path}: not a file of torch.save, or cut short or damaged{reason}") from None


def read_architecture(weights: dict[str, Tensor], source: str = "weights") -> Architecture:
    """The architecture of CLIP's weights, from their names and shapes; parts that are missing read as 0."""
    shapes = defaultdict(lambda: [0] * 4, {key: [*value.shape, 0, 0, 0, 0] for key, value in weights.items()})

    def blocks(prefix: str) -> int:
        return min(100, len({key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)}))

    if "visual.class_embedding" in weights:
        layers, embed_dim = blocks("visual.transformer.resblocks."), shapes["visual.proj"][1]
        width, patch_size = shapes["visual.conv1.weight"][0], shapes["visual.conv1.weight"][3]
        resolution = math.isqrt(max(0, shapes["visual.positional_embedding"][0] - 1)) * patch_size
    elif "visual.layer1.0.conv1.weight" in weights:
        layers = tuple(blocks(f"visual.layer{i}.") for i in (1, 2, 3, 4))
        embed_dim = shapes["visual.attnpool.c_proj.weight"][0]
        width, patch_size = shapes["visual.layer1.0.conv1.weight"][0], 0
        resolution = math.isqrt(max(0, shapes["visual.attnpool.positional_embedding"][0] - 1)) * 32
    else:
        raise ValueError(f"{source}: not CLIP's weights: no visual.class_embedding (ViT), no visual.layer1 (ResNet)")
    text = [shapes["ln_final.weight"][0], blocks("transformer.resblocks."), shapes["positional_embedding"][0]]
    return Architecture(embed_dim, resolution, layers, width, patch_size, *text, shapes["token_embedding.weight"][0])


def download(url: str, path: Path, checksum: str, algorithm: str = "sha256") -> None:
    """Fetch a file once, with a progress bar; an interrupted transfer resumes where it stopped.
    The file gets its final name only after its checksum has been verified. Of several processes, one downloads."""
    with one_at_a_time(path):
        new = not path.exists()
        file = path.with_name(path.name + ".part") if new else path
        if new:
            start = file.stat().st_size if file.exists() else 0
            request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    start = start if response.status == 206 else 0  # 200: the server sends the whole file
                    total = start + int(response.headers.get("Content-Length", 0))
                    progress = tqdm(total=total or None, initial=start, unit="B", unit_scale=True, desc=path.name)
                    with open(file, "ab" if start else "wb") as stream, progress:
                        while chunk := response.read(1 << 20):
                            progress.update(stream.write(chunk))
                if file.stat().st_size < total:
                    raise OSError(f"ended at {file.stat().st_size} of {total} bytes")
            except Exception as error:  # http.client's errors, too, and a length that is no number
                if getattr(error, "code", None) != 416 or not start:  # 416: nothing left to send, the part is complete
                    how = f"run again to resume, or fetch it by hand and save it as {path}"
                    raise OSError(f"{url}: {error}; {how}") from None
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, algorithm).hexdigest()
        if digest != checksum:
            if new:
                file.unlink()
            how = "the file was removed, run again" if new else "remove the file and run again"
            raise ValueError(f"{url if new else path}: {algorithm} {digest}, expected {checksum}; {how}")
        if new:
            os.replace(file, path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` at the end; after an error or an interruption, `path` is unchanged."""
    part = path.with_name(f".part-{path.name}")
    try:
        part.unlink(missing_ok=True)  # of a killed process
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch wraps what stopped its writing
        if getattr(cause, "errno", None) is None:  # Ctrl-C, a killed worker, no error of writing, or one of ours
            raise (cause or error) from None
        raise OSError(f"{path} was left as it was: writing failed, is the disk full? ({cause})") from None
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Lets one process at a time fetch a file that is not there; the others wait for a lock on its folder."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # Windows has no such locks
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                folder = os.open(path.parent, os.O_RDONLY)
                stack.callback(os.close, folder)
                fcntl.flock(folder, fcntl.LOCK_EX)
        yield
