"""The figure of the method in the README: the data flow of denseclip.py, with its names and shapes.

    python -m experiments.figure

Writes assets/method.svg. Everything is placed by hand, in pixels at a width of 900, with room for wide fonts.
"""

from itertools import pairwise
from pathlib import Path

FIGURE = Path(__file__).resolve().parents[1] / "assets" / "method.svg"
STYLES = {  # fill, stroke, dashes; x and text in the legend
    "image": ("#ffffff", "#2b6cb0", "none", 22, "image"),
    "text": ("#ffffff", "#d9730d", "none", 90, "text"),
    "both": ("#ffffff", "#333333", "none", 150, "image and text"),
    "learned": ("#dcf0dc", "#3a8a4d", "none", 274, "learned"),
    "frozen": ("#e2e2e2", "#757575", "none", 354, "frozen"),
    "option": ("#dcf0dc", "#3a8a4d", "4 3", 428, "alternative: pre-model prompting, without Eqs. (5) and (6)"),
}
BOXES = {  # center x and y, width, height, style; title, name in the code, shape or equation
    "images": (82, 66, 120, 52, "image", "image", "images", "(B, 3, H, W)"),
    "backbone": (229, 66, 120, 52, "learned", "image encoder", "backbone", "CLIP's ResNet or ViT"),
    "pyramid": (376, 66, 120, 52, "image", "x1 .. x4", "pyramid", "(B, C_i, H_i, W_i)"),
    "joined": (670, 66, 120, 52, "both", "[x4, s]", "pyramid[level]", "(B, C4 + K, H4, W4)"),
    "attnpool": (376, 180, 120, 112, "learned", "attention pool", "backbone.attnpool", "Eq. (1)"),
    "z": (523, 150, 120, 52, "image", "z", "visual_embeddings", "(B, C, H4, W4)"),
    "z_bar": (523, 210, 120, 52, "image", "z_bar", "global_embedding", "(B, C)"),
    "score_map": (670, 150, 120, 66, "both", "s = cos(z, t)", "score_map", "(B, K, H4, W4)", "Eq. (2)"),
    "queries": (82, 180, 120, 52, "option", "q", "queries", "(1, N, C)"),
    "prompt_decoder": (229, 180, 120, 52, "option", "context decoder", "prompt_decoder", "Eq. (4)"),
    "contexts": (82, 330, 120, 52, "learned", "p", "contexts", "(1, N, D)"),
    "tokens": (82, 420, 120, 52, "text", "class names e_k", "tokens", "(K, L)"),
    "text_encoder": (229, 375, 120, 142, "frozen", "text encoder", "text_encoder", "Eq. (3)"),
    "t": (376, 330, 120, 52, "text", "t", "text_embeddings", "(B, K, C)"),
    "context_decoder": (523, 330, 120, 52, "learned", "context decoder", "context_decoder", "Eq. (5)"),
    "refined": (670, 330, 120, 66, "text", "t + gamma v", "text_embeddings", "(B, K, C)", "Eq. (6)"),
    "gamma": (670, 420, 120, 52, "learned", "weight of v", "gamma", "(C,)"),
    "head": (822, 66, 120, 52, "learned", "FPN and head", "neck, decode_head", "Semantic FPN"),
    "logits": (822, 150, 120, 52, "both", "segmentation", "logits", "(B, K, H / 4, W / 4)"),
    "loss": (822, 240, 120, 38, "both", "cross-entropy", "loss"),
    "labels": (822, 330, 120, 52, "image", "y", "labels", "(B, H, W)"),
    "aux_loss": (822, 420, 120, 52, "both", "pixel-text loss", "aux_loss", "s / tau, Eq. (7)"),
}
CHAINS = {  # boxes joined by straight arrows, and the dashes of these arrows
    "images backbone pyramid joined head logits loss, labels loss, labels aux_loss": "none",
    "pyramid attnpool z score_map joined, attnpool z_bar": "none",
    "contexts text_encoder t context_decoder refined score_map, tokens text_encoder, gamma refined": "none",
    "queries prompt_decoder text_encoder": "4 3",
}
PATHS = {  # of all other arrows, and their dashes
    "M523 274 V304": "none",  # [z_bar, z] to context_decoder
    "M523 289 H302 V180 H289": "4 3",  # [z_bar, z] to prompt_decoder
    "M376 356 V380 H638 V363": "none",  # t to t + gamma v
    "M730 150 H747 V420 H762": "none",  # s to its loss
}
LABELS = {  # x and y of the left end
    "LanguageGuidedEncoder.forward": (22, 29),
    "DenseCLIP.forward": (762, 29),
    "x4": (382, 112),
    "[z_bar, z], memory": (470, 252),
    "(B, 1 + H4 W4, C)": (470, 266),
    "instead of p": (154, 258),
    "v": (591, 324),
    "ViT: z_bar and z without a pool; s joins x3": (316, 424),
}
HEADER = """<svg xmlns="http://www.w3.org/2000/svg" width="900" height="500" viewBox="0 0 900 500" font-size="11.5"
font-family="Helvetica, Arial, sans-serif" fill="#333333"><title>DenseCLIP: data flow of denseclip.py</title>
<marker id="tip" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto"><path d="M0 0.5 8 4 0 7.5"/></marker>
<rect width="900" height="500" rx="8" fill="#ffffff"/>
<rect x="10" y="10" width="732" height="446" rx="5" fill="#f5f6f8"/>
<rect x="752" y="10" width="138" height="446" rx="5" fill="#f5f6f8"/>
<rect x="455" y="116" width="136" height="158" rx="5" fill="#e3edf8"/>
"""


def draw_box(x: int, y: int, width: int, height: int, style: str, *lines: str) -> str:
    """A rectangle around (x, y) with centered lines, the first in bold."""
    fill, stroke, dashes = STYLES[style][:3]
    corner = f'x="{x - width // 2}" y="{y - height // 2}" width="{width}" height="{height}" rx="5"'
    svg = f'<rect {corner} fill="{fill}" stroke="{stroke}" stroke-width="1.5" stroke-dasharray="{dashes}"/>\n'
    for i, line in enumerate(lines):
        font = "" if i else ' font-size="12.5" font-weight="bold"'
        svg += f'<text x="{x}" y="{y + 11 - 7 * len(lines) + 14 * i}" text-anchor="middle"{font}>{line}</text>\n'
    return svg


def join(start: str, end: str) -> str:
    """The path from box to box, horizontal or vertical, through the center of the smaller one."""
    (x1, y1, w1, h1), (x2, y2, w2, h2) = BOXES[start][:4], BOXES[end][:4]
    if abs(x1 - x2) > abs(y1 - y2):
        return f"M{x1 + w1 // 2} {y1 if h1 < h2 else y2} H{x2 - w2 // 2}"
    return f"M{x1} {y1 + h1 // 2} V{y2 - h2 // 2}" if y1 < y2 else f"M{x1} {y1 - h1 // 2} V{y2 + h2 // 2}"


def draw() -> str:
    """The text of the SVG file."""
    svg = HEADER + "".join(draw_box(*box) for box in BOXES.values())
    chains = {chain: dashes for chains, dashes in CHAINS.items() for chain in chains.split(",")}
    arrows = {join(*pair): dashes for chain, dashes in chains.items() for pair in pairwise(chain.split())}
    for path, dashes in (arrows | PATHS).items():
        svg += f'<path d="{path}" fill="none" stroke="#333333" stroke-dasharray="{dashes}" marker-end="url(#tip)"/>\n'
    svg += "".join(f'<text x="{x}" y="{y}">{label}</text>\n' for label, (x, y) in LABELS.items())
    for style, (*_, x, label) in STYLES.items():
        svg += draw_box(x + 8, 478, 16, 12, style) + f'<text x="{x + 22}" y="482">{label}</text>\n'
    return svg + "</svg>\n"


if __name__ == "__main__":
    FIGURE.write_text(draw(), encoding="utf-8")
