"""CLIP's text tokenizer: lower-cased, byte-level byte-pair encoding (BPE) with 49,408 ids.

Equals openai/CLIP, clip/simple_tokenizer.py and `tokenize` of clip/clip.py, id by id for any text,
broken Unicode included. Differs: over-long text is a ValueError, and `decode` unwraps rows.

Read in this order: `Tokenizer` (M texts -> ids and back), `clean`, `merge`, `load_merges`.
The vocabulary file is OpenAI's (MIT License, (c) 2021 OpenAI) as distributed in open_clip_torch.
Copy together with: bpe_simple_vocab_16e6.txt.gz; needs torch, ftfy, regex.

>>> Tokenizer().encode("a photo of a cat")
[320, 1125, 539, 320, 2368]
"""

import gzip
import html
import operator
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from itertools import islice
from os import PathLike
from pathlib import Path

import ftfy
import regex
import torch

VOCAB_PATH = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
NUM_MERGES = 49408 - 2 * 256 - 2  # ids: 256 bytes, 256 that end a word, merges, special tokens
SPECIAL = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
# IGNORECASE counts even in lower-case text: "'ſ" is a contraction too. The alternatives begin with
# different characters, so the most frequent can stand first. Whitespace only separates.
WORDS = regex.compile(
    r"\p{L}+|\p{N}|<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that name themselves
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]  # id -> byte
BYTE_IDS = bytes(BYTES.index(byte) for byte in range(256))  # byte -> id
Merges = dict[tuple[int, int], int]  # (left id, right id) -> merged id, best first


class Tokenizer:
    """Text to ids and back. `vocab_path`: by default the file beside this module."""

    vocab_size, sot_token, eot_token = 49408, *SPECIAL.values()

    def __init__(self, vocab_path: str | PathLike | None = None) -> None:
        self._merges, self._pieces = load_merges(Path(vocab_path or VOCAB_PATH))
        self._cache = {name: [i] for name, i in SPECIAL.items()}  # word -> ids

    def __call__(
        self, texts: str | list[str] | tuple, context_length: int = 77, truncate: bool = False
    ) -> torch.Tensor:
        """One text or M -> int64 (M, context_length): [SOT] ids [EOT] zeros.

        A text that does not fit is a ValueError; with `truncate`, [EOT] takes the last position.
        """
        if not isinstance(texts, (str, list, tuple)):
            raise TypeError(f"texts is a {type(texts).__name__}; give a str or a list of str")
        if not isinstance(context_length, int) or context_length < 2:
            raise ValueError(f"context_length={context_length!r}; give an int >= 2 (CLIP: 77)")
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            ids = [self.sot_token, *self.encode(text), self.eot_token]
            if len(ids) > context_length and not truncate:
                raise ValueError(
                    f"{text!r:.200} makes {len(ids)} tokens, context_length is "
                    f"{context_length}; shorten it or pass truncate=True"
                )
            ids[context_length - 1 : -1] = []  # none where the text fits
            rows.append(ids + [0] * (context_length - len(ids)))
        return torch.tensor(rows, dtype=torch.long).view(-1, context_length)

    def encode(self, text: str) -> list[int]:
        """Ids of one text of any length; [SOT] and [EOT] only where the text spells them out."""
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}, {text!r:.80}; give a str")
        ids, cache = [], self._cache
        for word in WORDS.findall(clean(text)):
            if (word_ids := cache.get(word)) is None:
                word_ids = merge(word.encode(), self._merges)
                if len(word) <= 64 and len(cache) < 2**16:  # bound: about 12 MB
                    cache[word] = word_ids
            ids += word_ids
        return ids

    def decode(self, ids: Iterable[int] | torch.Tensor) -> str:
        """One sequence of ids (list, tensor, array) -> lower-case text, a space after each word.

        A row of `__call__` (first id [SOT]) loses [SOT] and all from the first [EOT], where CLIP
        reads its text feature, to the end; otherwise [SOT], [EOT] and padding (0 is "!") are text.
        Raises TypeError for ids that are no integers, ValueError for ids out of the vocabulary.
        """
        try:
            ids = [operator.index(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        except TypeError as error:
            raise TypeError(f"ids is {ids!r:.80}; give ints, and of a batch one row") from error
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"id {wrong[0]} is not in the vocabulary; give ids of 0 to 49407")
        if ids[:1] == [self.sot_token]:
            ids = ids[1 : (ids + [self.eot_token]).index(self.eot_token)]
        text = b"".join(self._pieces[i] for i in ids).decode("utf-8", errors="replace")
        return text.replace("</w>", " ")


def clean(text: str) -> str:
    """Repaired, unescaped, lower-case text."""
    # Printable ASCII without "&" holds no control character, entity or mojibake and is normalised:
    # ftfy and html, the slowest steps, would return it unchanged.
    if not text.isascii() or not text.isprintable() or "&" in text:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return text.lower()


def merge(word: bytes, merges: Merges) -> list[int]:
    """Merge the bytes of one word, best pair first and from the left -> its ids."""
    # A heap over a linked list: n log n. Rescanning the word after each merge is no faster on
    # captions and takes minutes for 100,000 letters.
    ids = [*word.translate(BYTE_IDS), -1]  # -1: the end, or merged into its left neighbour
    ids[-2] += 256  # ends the word
    left, right = list(range(-1, len(word))), list(range(1, len(ids)))  # ids[-1] is the end, too
    heap = [(merges[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in merges]
    heapify(heap)
    while heap:
        new, i = heappop(heap)
        j = right[i]
        if merges.get((ids[i], ids[j])) != new:
            continue  # one of the two was merged meanwhile
        ids[i], ids[j] = new, -1
        right[i] = k = right[j]
        left[k] = i
        for pair, start in (((ids[left[i]], new), left[i]), ((new, ids[k]), i)):
            if pair in merges:
                heappush(heap, (merges[pair], start))
    return [i for i in ids if i >= 0]


def load_merges(path: Path) -> tuple[Merges, list[bytes]]:
    """Vocabulary file -> merges, bytes of each id. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"no vocabulary file {path}; copy {VOCAB_PATH.name} there")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = list(islice(file, 1, NUM_MERGES + 1))
    if len(lines) < NUM_MERGES:
        expected = f"expected {NUM_MERGES} or more; copy {VOCAB_PATH.name} again"
        raise ValueError(f"{path} has {len(lines)} merges after its header, {expected}")
    names = [*map(chr, PRINTABLE), *map(chr, range(256, 512 - len(PRINTABLE)))]
    ids = {name: i for i, name in enumerate(names + [name + "</w>" for name in names])}
    pieces = [bytes([byte]) + end for end in (b"", b"</w>") for byte in BYTES]
    merges = {}
    for new, line in enumerate(lines, start=len(ids)):
        left, right = line.split()
        i, j = ids[left], ids[right]
        merges[i, j] = ids[left + right] = new
        pieces.append(pieces[i] + pieces[j])
    return merges, pieces + [name.encode() for name in SPECIAL]
