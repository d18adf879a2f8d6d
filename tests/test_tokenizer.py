"""tokenizer.py returns the same tokens as open_clip, its errors are clear, and it works alone in a folder."""

import hashlib
import random
import shutil
import subprocess
import sys
import unicodedata

import open_clip
import pytest
import torch

import data
import tokenizer
from tokenizer import EOT, SOT, encode, tokenize

FRAGMENTS = [
    *("a photo of a", "Dog's", "they'll", "I'D", "we've", "don't", "'s", "it’s", "l'été", "naïve café"),
    *("Ångström", "ﬁne", "it'ſ", "Привет, мир", "日本語のテキスト", "한국어 문장", "مرحبا بالعالم", "हिन्दी"),
    *("ΑΒΓ ς", "İstanbul", "Straße", "¿Qué?", "½ ² ③ ٣", "😀", "👩‍👩‍👧‍👦", "🇩🇪", "❤️", "&amp;"),
    *("&amp;amp;lt;b&amp;amp;gt;", "&lt;p&gt;", "&eacute;", "&#128512;", "&nbsp;", "&notanentity;", "cafÃ©"),
    *("â€œquotedâ€\x9d", "schÃ¶n", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "\ufffd", "\u200b", "\u00a0", "\u3000", "\t", "\n\n", "  "),
    *("\x00", "\x1b[31m", "<start_of_text>", "<end_of_text>", "<START_OF_TEXT>", "x<end_of_text>y"),
    *("<|startoftext|>", "</w>", "<", "||", "...", "!?!?", "1234567890", "3.14159", "100%", "C++", "#hashtag"),
    *("@user", "https://example.org/a?b=c&d=e", "snake_case", "CamelCase", "supercalifragilisticexpialidocious"),
    *("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "hahahahahahahaha", "'''", "''s's", "\\n", "{}[]()"),
]


def texts() -> list[str]:
    """Class names, every fragment, and 2,400 random mixtures of fragments, characters and broken encodings."""
    rng = random.Random(0)
    names = [name for classes in ("ade20k", "cityscapes", "voc", "camvid") for name in data.read_classes(classes)[0]]
    assigned = [chr(c) for c in range(32, 0x1FAFF) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    mixtures = []
    for _ in range(800):
        mixture = rng.choice(["", " ", " ", ", "]).join(rng.choices(FRAGMENTS, k=rng.randint(1, 12)))
        mixtures.append(mixture)
        mixtures.append("".join(rng.choices(assigned[: rng.choice([95, 700, len(assigned)])], k=rng.randint(1, 40))))
        mixtures.append(mixture.encode("utf-8")[rng.randint(0, 2) :].decode("latin-1"))  # mojibake
    return ["", *names, *FRAGMENTS, *mixtures]


def test_equals_open_clip():
    samples = texts()
    assert len(samples) > 2400 and sum(not text.isascii() for text in samples) > 1000
    short = [text for text in samples if len(encode(text)) <= 75]
    assert len(short) > 2000 and torch.equal(tokenize(short), open_clip.tokenize(short))
    reference = open_clip.SimpleTokenizer()
    for text in samples:
        assert encode(text) == reference.encode(text), text


def test_shape_start_end_and_padding():
    tokens = tokenize(["a dog", ""], length=6)
    assert tokens.shape == (2, 6) and tokens.dtype == torch.int64
    assert tokens[0, 0] == SOT and tokens[0].argmax() == 3 and tokens[0, 3] == EOT and not tokens[0, 4:].any()
    assert tokens[1].tolist() == [SOT, EOT, 0, 0, 0, 0]
    assert torch.equal(tokenize("a dog", length=6), tokens[:1])
    assert tokenize([]).shape == (0, 77)


def test_too_long():
    assert tokenize("one two three", length=5).shape == (1, 5)
    with pytest.raises(ValueError, match=r"'one two three' has 5 tokens, .* 4 are allowed"):
        tokenize("one two three", length=4)


def test_vocabulary_file():
    assert hashlib.sha256(tokenizer.VOCABULARY.read_bytes()).hexdigest() == tokenizer.SHA256
    index, ranks = tokenizer.vocabulary()
    assert len(index) == SOT and len(ranks) == tokenizer.NUM_MERGES and list(index.values()) == list(range(SOT))


ALONE = """
import sys
from pathlib import Path
import tokenizer

print(len(list(Path().glob("*.gz"))), "vocabularies")  # the import alone reads nothing
whole = Path(sys.argv[1]).read_bytes()
for data in (None, whole[:1000], whole):
    if data is not None:
        Path("bpe_simple_vocab_16e6.txt.gz").write_bytes(data)
    try:
        print(tokenizer.tokenize("a dog", 4).tolist())
    except (FileNotFoundError, ValueError) as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_works_alone_and_reports_a_missing_or_broken_vocabulary(tmp_path):
    shutil.copy(tokenizer.__file__, tmp_path)
    command = [sys.executable, "-c", ALONE, str(tokenizer.VOCABULARY)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    imported, missing, broken, whole = run.stdout.splitlines()
    assert imported == "0 vocabularies"
    path = tmp_path / tokenizer.VOCABULARY.name
    assert missing.startswith(f"FileNotFoundError {path}") and "open_clip_torch" in missing
    assert broken.startswith(f"ValueError {path}") and "truncated" in broken
    assert whole == f"{[[SOT, *encode('a dog'), EOT]]}"
