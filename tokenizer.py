"""CLIP's tokenizer: byte-level byte-pair encoding with 49,408 tokens (Radford et al. 2021, appendix).

Text is cleaned and lower-cased, cut into words, and every word is written as UTF-8 bytes, each byte standing as one
printable character. The vocabulary file lists pairs of symbols, most useful first; inside a word the best-ranked pair
is joined until no pair is in the list.

Needs ftfy, regex and `bpe_simple_vocab_16e6.txt.gz` beside this file, nothing else of this project.
"""

import gzip
import hashlib
import html
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

VOCABULARY = Path(__file__).resolve().parent / "bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
SOT, EOT = 49_406, 49_407
NUM_MERGES = SOT - 2 * 256  # tokens: 256 bytes, the same at the end of a word, joined pairs; the file lists more pairs
WORD_END = "</w>"
# A text may spell out the start and end tokens, as here in open_clip and as <|startoftext|>, <|endoftext|> in OpenAI's
# release, the one difference between the two.
SPECIAL = {"<start_of_text>": SOT, "<end_of_text>": EOT}
# Words: special tokens, English contractions, runs of letters, single digits, runs of anything else.
WORDS = regex.compile("|".join(SPECIAL) + r"|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def tokenize(texts: str | list[str], length: int = 77, truncate: bool = False) -> Tensor:
    """Token indices (len(texts), length), int64: [SOT, text, EOT, 0, 0, ...]; the largest index marks the end.

    A text of more than `length` tokens raises ValueError, or with `truncate` is cut, EOT staying last.
    """
    texts = [texts] if isinstance(texts, str) else texts
    result = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(result, texts, strict=True):
        tokens = [SOT, *encode(text), EOT]
        if len(tokens) > length:
            if not truncate:
                shown = text if len(text) <= 60 else text[:57] + "..."
                raise ValueError(
                    f"{shown!r} has {len(tokens)} tokens, start and end included, and {length} are allowed; "
                    f"shorten it or ask for truncation (truncate=True)"
                )
            tokens = tokens[: length - 1] + [EOT]
        row[: len(tokens)] = torch.tensor(tokens)
    return result


def encode(text: str) -> list[int]:
    """The tokens of a text, without start and end."""
    return [token for word in WORDS.findall(clean(text)) for token in encode_word(word)]


def decode(tokens: Iterable[int]) -> str:
    """The cleaned text of `encode`'s tokens or of a row of `tokenize`; start, end and padding are left out."""
    symbols, characters = list(vocabulary()[0]), byte_characters()
    to_byte = {character: byte for byte, character in characters.items()} | {" ": ord(" ")}
    text = ""
    for token in map(int, tokens):
        if token == EOT:
            break
        if token != SOT:
            symbol = symbols[token]
            text += symbol.removesuffix(WORD_END) + " " * symbol.endswith(WORD_END)
    return bytes(to_byte[character] for character in text).decode("utf-8", errors="replace").strip()


def clean(text: str) -> str:
    """Repairs broken encodings, resolves HTML entities (twice, for `&amp;amp;`), single spaces, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=100_000)
def encode_word(word: str) -> tuple[int, ...]:
    """The tokens of one word: the best-ranked pair of neighbours is joined wherever it occurs, until none is listed."""
    if word in SPECIAL:
        return (SPECIAL[word],)
    index, ranks = vocabulary()
    symbols = [byte_characters()[byte] for byte in word.encode("utf-8")]
    symbols[-1] += WORD_END
    while len(symbols) > 1:
        best = min(zip(symbols, symbols[1:], strict=False), key=lambda pair: ranks.get(pair, NUM_MERGES))
        if best not in ranks:
            break
        joined, i = [], 0
        while i < len(symbols):
            step = 2 if tuple(symbols[i : i + 2]) == best else 1
            joined.append("".join(symbols[i : i + step]))
            i += step
        symbols = joined
    return tuple(index[symbol] for symbol in symbols)


@cache
def vocabulary() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """Token of each symbol (without SOT and EOT, in order of the tokens), and rank of each pair."""
    if not VOCABULARY.is_file():
        raise FileNotFoundError(
            f"{VOCABULARY}: CLIP's vocabulary is missing; it belongs beside tokenizer.py, and the Python packages "
            f"open_clip_torch and clip-anytorch contain it"
        )
    data = VOCABULARY.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ValueError(f"{VOCABULARY}: not CLIP's vocabulary, or cut short; expected sha256 {SHA256}")
    lines = gzip.decompress(data).decode("utf-8").split("\n")[1 : 1 + NUM_MERGES]  # line 0 is a version
    pairs = [tuple(line.split()) for line in lines]
    characters = list(byte_characters().values())
    symbols = characters + [c + WORD_END for c in characters] + [first + second for first, second in pairs]
    return {symbol: i for i, symbol in enumerate(symbols)}, {pair: rank for rank, pair in enumerate(pairs)}


@cache
def byte_characters() -> dict[int, str]:
    """A visible character for each of the 256 bytes, in the order of the first 256 tokens: Latin-1's own where it has
    one, the characters from 256 on for white space and control codes."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}
