"""CLIP's tokenizer: byte-level byte-pair encoding with 49,408 tokens (Radford et al. 2021, appendix).

Text is cleaned, lower-cased and split into words. A word is a sequence of UTF-8 bytes, each written as one printable
character; its best-ranked pair of neighboring symbols is merged until the vocabulary file lists none of its pairs.

Needs torch, ftfy, regex and `bpe_simple_vocab_16e6.txt.gz` in the same folder, no other file of this project."""

import gzip
import hashlib
import html
from functools import cache, lru_cache
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

VOCABULARY = Path(__file__).resolve().parent / "bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
SOT, EOT = 49_406, 49_407
NUM_MERGES = SOT - 2 * 256  # tokens: 256 bytes, 256 bytes that end a word, merges; the file lists more merges
WORD_END = "</w>"
# Texts may contain these, spelled as in open_clip; OpenAI's release spells them <|startoftext|> and <|endoftext|>.
SPECIAL = {"<start_of_text>": SOT, "<end_of_text>": EOT}
# Words: special tokens, English contractions, runs of letters, single digits, runs of anything else.
WORDS = regex.compile("|".join(SPECIAL) + r"|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def tokenize(texts: str | list[str], length: int = 77) -> Tensor:
    """Token indices (len(texts), length), int64: [SOT, text, EOT, 0, 0, ...]; ValueError if a text is longer."""
    texts = [texts] if isinstance(texts, str) else texts
    result = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(result, texts, strict=True):
        tokens = [SOT, *encode(text), EOT]
        if len(tokens) > length:
            raise ValueError(f"{text[:60]!r} has {len(tokens)} tokens, with start and end; {length} are allowed")
        row[: len(tokens)] = torch.tensor(tokens)
    return result


def encode(text: str) -> list[int]:
    """The tokens of a text, without SOT and EOT."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))  # broken encodings, HTML entities (twice: `&amp;amp;`)
    words = WORDS.findall(" ".join(text.split()).lower())
    return [token for word in words for token in encode_word(word)]


@lru_cache(maxsize=100_000)
def encode_word(word: str) -> tuple[int, ...]:
    """The tokens of one word: the best-ranked pair is merged wherever it occurs, until no listed pair is left."""
    if word in SPECIAL:
        return (SPECIAL[word],)
    index, ranks = vocabulary()
    symbols = [byte_characters()[byte] for byte in word.encode("utf-8")]
    symbols[-1] += WORD_END
    while len(symbols) > 1:
        best = min(zip(symbols, symbols[1:], strict=False), key=lambda pair: ranks.get(pair, NUM_MERGES))
        if best not in ranks:
            break
        for i in range(len(symbols)):  # merging shortens the list; a slice beyond its end equals no pair
            if tuple(symbols[i : i + 2]) == best:
                symbols[i : i + 2] = ["".join(best)]
    return tuple(index[symbol] for symbol in symbols)


@cache
def vocabulary() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """The token of each symbol, in the order of the tokens and without SOT and EOT, and the rank of each pair."""
    if not VOCABULARY.is_file():
        raise FileNotFoundError(f"{VOCABULARY} is missing; copy it there from this project, or from open_clip_torch")
    if hashlib.sha256(data := VOCABULARY.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{VOCABULARY}: not CLIP's vocabulary, or truncated; expected sha256 {SHA256}")
    lines = gzip.decompress(data).decode("utf-8").split("\n")
    pairs = [tuple(line.split()) for line in lines[1 : 1 + NUM_MERGES]]  # line 0 is the version
    characters = list(byte_characters().values())
    symbols = characters + [c + WORD_END for c in characters] + [first + second for first, second in pairs]
    return {symbol: i for i, symbol in enumerate(symbols)}, {pair: rank for rank, pair in enumerate(pairs)}


@cache
def byte_characters() -> dict[int, str]:
    """A printable character for each byte, in the order of the first 256 tokens: Latin-1's, or one from 256 upward."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}
