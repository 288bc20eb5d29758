"""pytest tests/test_tokenizer.py -- the tokenizer against frozen ids of OpenAI's, against a slow
plain BPE, and its errors. Offline, CPU."""

import doctest
import gzip
import hashlib
import html
import pickle
import random

import ftfy
import pytest
import regex
import torch

import tokenizer
from tokenizer import VOCAB_PATH, Tokenizer

# Made with clip.simple_tokenizer of clip-anytorch 2.6.0 (OpenAI's file), ftfy 6.3.1,
# regex 2026.11.15, Python 3.11: SimpleTokenizer().encode(text).
# fmt: off
GOLDEN = [
    ("", []),
    ("   \t\n ", []),
    ("a photo of a cat", [320, 1125, 539, 320, 2368]),
    ("A Photo of a 26-year-old person.",
     [320, 1125, 539, 320, 273, 277, 268, 935, 268, 896, 2533, 269]),
    ("it's we've I'LL he'd they're i'm can't 'S",
     [585, 568, 649, 1200, 328, 1342, 797, 1896, 889, 982, 328, 880, 753, 713, 568]),
    ("x'\u017f K \xc5", [343, 6, 129, 379, 330, 127, 354]),
    ("age: 0123456789 \uff13\xb2\u2167\xbd",
     [805, 281, 271, 272, 273, 274, 275, 276, 277, 278, 279, 280, 274, 41175, 158, 227, 371,
      33613]),
    ("caf\xe9 na\xefve cafe\u0301", [15304, 1097, 35689, 563, 15304]),
    ("\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 \u039f\u0394\u03a5\u03a3\u03a3\u0395\u03a5"
     "\u03a3 \u1f48\u0394\u03a5\u03a3\u03a3\u0395\u038e\u03a3.",
     [139, 225, 138, 107, 139, 225, 139, 227, 139, 228, 138, 123, 139, 480, 138, 123, 138, 112, 139,
      227, 139, 225, 139, 225, 138, 113, 139, 227, 139, 480, 157, 121, 222, 138, 112, 139, 227, 139,
      225, 139, 225, 138, 113, 139, 235, 139, 480, 269]),
    ("\u0130stanbul stra\xdfe STRASSE", [328, 16384, 11231, 1894, 127, 253, 324, 1894, 8938]),
    ("!\u03b9 !\u0345 a\u0345", [256, 138, 373, 256, 320]),
    ("\ufb01ne \ufb02u\ufb03est \u0133", [3797, 3698, 19961, 1509, 72, 329]),
    ("\uff2c\uff2f\uff35\uff24\u3000\uff2e\uff2f\uff29\uff33\uff25\uff33 \uff83\uff7d\uff84",
     [7464, 31575, 2429, 228, 32421, 486]),
    ("\u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8 \ud55c\uad6d\uc5b4 \u4e2d\u6587",
     [39121, 44353, 34002, 252, 21575, 2429, 228, 32421, 486, 15197, 250, 31871, 255, 31625, 368,
      19759, 255, 29032, 485]),
    ("\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u05e9\u05dc"
     "\u05d5\u05dd \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22 \u041f\u0440\u0438"
     "\u0432\u0435\u0442",
     [12986, 10948, 25722, 16378, 22625, 16378, 12973, 18843, 12973, 29945, 147, 102, 147, 250, 147,
      243, 147, 507, 29446, 26721, 26090, 19389, 29552, 25751, 31718, 245, 33091, 26302, 16370,
      29503, 110, 22176, 141, 480]),
    ("\U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3"
     "\ufe0f\u200d\U0001f308 \U0001f1ec\U0001f1e7 \u2764\ufe0f",
     [12832, 43722, 25023, 26304, 964, 356, 32610, 11559, 1752]),
    ("rock &amp; roll &amp;amp; &lt;b&gt; <b>x</b> &hellip;",
     [2172, 261, 3341, 261, 283, 321, 285, 283, 321, 285, 343, 34308, 321, 285, 959]),
    ("&eacute;t&EACUTE; &#233; &#xe9 &#x1F600; &#55357; &#0; &notit; &unknown;",
     [3459, 39694, 4166, 4166, 7334, 39802, 39802, 126, 361, 585, 282, 261, 8685, 282]),
    ("sch\xc3\xb6n \xe2\u20ac\u0153quoted\xe2\u20ac\x9d don\xe2\u20ac\u2122t voil\xc3\xa0",
     [844, 7255, 333, 257, 27706, 257, 847, 713, 947, 543, 21259]),
    ("\u201ccurly\u201d \u2018quotes\u2019 \u2014 \u2026 \xab\xbb",
     [257, 20795, 257, 262, 5808, 262, 2005, 959, 126, 104, 7599]),
    ("\ud83d\ude00 \ud83d x \ude00", [7334, 39802, 343, 39802]),
    ("\udcff\ud800", [47356, 39802]),
    ("\x00a\x01b\x1b[31mred\x1b[0m\x7f c\x0bd\x0ce\x1cf\x85g", [596, 736, 4480, 1829, 959, 326]),
    ("a\u2028b\u2029c\xa0d\u3000e\u200bf\ufefeg\ufeffh\ufffdi",
     [320, 321, 322, 323, 324, 9844, 325, 171, 119, 378, 790, 39802, 328]),
    ("<|startoftext|>a<|endoftext|> <|ENDOFTEXT|> <|\u017ftartoftext|> <|endoftext|",
     [49406, 320, 49407, 49407, 27, 91, 129, 123, 2002, 6659, 18169, 91, 285, 27, 347, 40786, 4160,
      347]),
    ("word</w> </w> <w>", [2653, 34308, 342, 285, 34308, 342, 285, 283, 342, 285]),
    ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", [23126, 23126, 23126, 23126, 320]),
    ("!!!!!!?!?!?... ---- ____ $%^&*()",
     [4003, 1443, 9785, 9785, 22641, 30164, 25350, 3, 4, 61, 5, 9, 8475]),
    ("pneumonoultramicroscopicsilicovolcanoconiosis",
     [28714, 749, 20253, 9800, 535, 532, 1065, 901, 1556, 13697, 9916, 78, 39031, 13903]),
    ("http://example.org/?q=a&b=c&copy=1#x",
     [15066, 12441, 6228, 269, 5593, 14, 286, 336, 284, 320, 261, 321, 284, 322, 31148, 284, 272,
      258, 343]),
    ("\U000e0067\U0010ffff\U0001d4d0 \U00020000",
     [175, 254, 223, 100, 176, 237, 123, 379, 47110, 494, 172, 254, 222, 478]),
    ("\ufdd0\uffff \ue000", [171, 115, 238, 27850, 379, 36288, 478]),
    ("N\u0334\u0325o\u0337\u0353i\u0336\u0359s\u0335e",
     [333, 136, 112, 136, 354, 334, 136, 115, 137, 497, 328, 136, 114, 137, 503, 338, 136, 369,
      324]),
]
# Texts made of these reach every branch: plain ASCII, entities, mojibake, controls, surrogates.
BLOCKS = [
    (32, 127), (32, 127), (0, 32), (127, 592), (880, 1424), (1424, 8192), (8192, 12288),
    (12288, 55296), (55296, 57344), (57344, 65536), (65536, 0x110000), (0x1F300, 0x1FA00),
]
PIECES = [
    "a photo", "cat's", "WE'LL", "\u03a3\u03a3", "'\u017f", "\u03b9!\u0345", "&amp;amp;",
    "&eacute", "&#x1F600;", "&#28;", "&lt;", "<b>", "\xc3\xa9", "\xe2\u20ac\u2122", "\x1b[1m",
    "\ufb01", "\uff21", "</w>", "<|endoftext|>", "<|STARTOFTEXT|>", "<|", " ", "\n", "\x85",
    "\u3000", "42", "...", "zz" * 20,
]
# fmt: on


@pytest.fixture(scope="module")
def tok():
    return Tokenizer()


@pytest.fixture(scope="module")
def slow():
    """An encoder in plain steps, on strings, without cache, heap or fast path."""
    names = [chr(b) for b in range(256) if 33 <= b < 127 or 161 <= b < 173 or b >= 174]
    byte_names = {ord(name): name for name in names}
    for byte in range(256):
        if byte not in byte_names:
            byte_names[byte] = chr(256 + len(byte_names) - 188)
            names.append(byte_names[byte])
    pairs = [line.split() for line in gzip.open(VOCAB_PATH).read().decode().split("\n")[1:48895]]
    symbols = names + [name + "</w>" for name in names] + ["".join(pair) for pair in pairs]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    assert len(set(symbols)) == 49408
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    rank = {tuple(pair): i for i, pair in enumerate(pairs)}
    pattern = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|"
        r"[\p{N}]|[^\s\p{L}\p{N}]+",
        regex.IGNORECASE,
    )

    def word_ids(word):
        if word in symbols[-2:]:
            return [ids[word]]
        parts = [byte_names[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while pairs_left := [pair for pair in zip(parts, parts[1:]) if pair in rank]:
            best, merged = min(pairs_left, key=rank.get), []
            while parts:
                size = 2 if tuple(parts[:2]) == best else 1
                merged.append("".join(parts[:size]))
                parts = parts[size:]
            parts = merged
        return [ids[part] for part in parts]

    def encode(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = regex.sub(r"\s+", " ", text).strip().lower()
        return [i for word in pattern.findall(text) for i in word_ids(word)]

    return encode


def random_text(rng):
    parts = []
    for _ in range(rng.randrange(8)):
        if rng.random() < 0.5:
            parts.append(rng.choice(PIECES))
        else:
            block = rng.choice(BLOCKS)
            parts.append("".join(chr(rng.randrange(*block)) for _ in range(rng.randrange(1, 9))))
    return "".join(parts)


def test_vocabulary_file_is_openais():
    digest = hashlib.sha256(VOCAB_PATH.read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


def test_docstring_example():
    result = doctest.testmod(tokenizer)
    assert result.attempted == 1 and result.failed == 0


@pytest.mark.parametrize("text, ids", GOLDEN, ids=range(len(GOLDEN)))
def test_golden_ids(tok, text, ids):
    assert tok.encode(text) == ids
    assert tok.encode(text) == ids  # from the cache


def test_slow_bpe_agrees_with_golden_ids(slow):
    assert [slow(text) for text, _ in GOLDEN] == [ids for _, ids in GOLDEN]


@pytest.mark.parametrize("cases", [2000, pytest.param(100_000, marks=pytest.mark.full)])
def test_random_unicode_equals_slow_bpe(tok, slow, cases):
    rng = random.Random(0)
    for _ in range(cases):
        text = random_text(rng)
        ids = tok.encode(text)
        assert ids == slow(text), ascii(text)
        assert not ids or ids[-1] != 0, ascii(text)  # a last 0 is padding, never a word's end
    print(f"{cases} random texts: the ids of the plain steps, no exception")


def test_every_ascii_character_in_context_equals_slow_bpe(tok, slow):
    """All ASCII, so that the texts which skip ftfy are proven on every character they may hold."""
    for code in range(128):
        for text in (chr(code), f"a{chr(code)}b", f"1{chr(code)} {chr(code)}{chr(code)}[0m' s;x;"):
            assert tok.encode(text) == slow(text), ascii(text)


def test_texts_that_skip_ftfy_are_left_alone_by_it():
    rng = random.Random(1)
    plain = [chr(code) for code in range(32, 127) if chr(code) != "&"]
    for _ in range(2000):
        text = "".join(rng.choices(plain, k=rng.randrange(40)))
        assert html.unescape(html.unescape(ftfy.fix_text(text))) == text


def test_whitespace_only_separates():
    """Why `clean` neither strips nor collapses: all that str.strip removes, WORDS skips, except
    U+001C..1F, which ftfy removes and html.unescape never makes."""
    spaces = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    not_skipped = [space for space in spaces if tokenizer.WORDS.findall(space)]
    assert not_skipped == ["\x1c", "\x1d", "\x1e", "\x1f"]
    assert all(tokenizer.clean(f"a{space}") == "a" for space in not_skipped)
    assert html.unescape("&#28;&#29;&#30;&#31;&#x1c;") == ""


def test_merges_use_only_better_merges(tok):
    """Why `merge` may go pair by pair: no merge makes a pair that is better than itself."""
    assert all(left < new and right < new for (left, right), new in tok._merges.items())


@pytest.mark.parametrize("word", ["ab" * 50_000, "!" * 100_000, "\xe9" * 50_000])
def test_very_long_word_completes(tok, word):
    assert tok.decode(tok.encode(word)) == word + " "
    assert word not in tok._cache


def test_long_word_equals_slow_bpe(tok, slow):
    word = "".join(random.Random(2).choices("etaoinshrdlu", k=1000))
    assert tok.encode(word) == slow(word)


def test_cache_is_bounded():
    tok = Tokenizer()
    tok._cache.update((i, [0]) for i in range(2**16))
    size = len(tok._cache)
    assert tok.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert len(tok._cache) == size


def test_encode_returns_a_fresh_list(tok):
    tok.encode("cat").append(0)
    assert tok.encode("cat") == [2368]


def test_pickles(tok):
    assert pickle.loads(pickle.dumps(tok)).encode("a photo of a cat") == [320, 1125, 539, 320, 2368]


def test_constants(tok):
    assert (tok.vocab_size, tok.sot_token, tok.eot_token) == (49408, 49406, 49407)
    assert len(tok._pieces) == 49408 and len(tok._merges) == tokenizer.NUM_MERGES


# batches


def test_batch_layout(tok):
    tokens = tok(["a photo of a cat", "", "cat"])
    assert tokens.shape == (3, 77) and tokens.dtype == torch.int64
    assert tokens[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407] + [0] * 70
    assert tokens[1].tolist() == [49406, 49407] + [0] * 75
    assert tokens[2].tolist() == [49406, 2368, 49407] + [0] * 74


def test_one_text_tuple_and_empty_batch(tok):
    assert torch.equal(tok("cat"), tok(["cat"])) and torch.equal(tok("cat"), tok(("cat",)))
    assert tok([]).shape == (0, 77) and tok([]).dtype == torch.int64


def test_exact_fit_and_context_length(tok):
    assert tok("a photo of a cat", context_length=7)[0].tolist() == [
        49406,
        320,
        1125,
        539,
        320,
        2368,
        49407,
    ]
    assert tok("cat " * 75)[0, -2:].tolist() == [2368, 49407]
    assert tok("", context_length=2).tolist() == [[49406, 49407]]


def test_truncation_keeps_eot_last(tok):
    row = tok("a photo of a cat", context_length=5, truncate=True)[0]
    assert row.tolist() == [49406, 320, 1125, 539, 49407]
    assert tok("cat", context_length=2, truncate=True).tolist() == [[49406, 49407]]
    assert torch.equal(tok("a photo of a cat", truncate=True), tok("a photo of a cat"))
    assert tok(["cat " * 76, "cat"], truncate=True)[:, -1].tolist() == [49407, 0]


# decode


def test_round_trip(tok):
    for text in ("a photo of a cat", "caf\xe9 \u65e5\u672c \U0001f600", "it 's 2 6 - year !", ""):
        assert tok.decode(tok.encode(text)) == text + " " * bool(text)
        assert tok.decode(tok(text)[0]) == text + " " * bool(text)


def test_ids_survive_a_round_trip(tok):
    rng = random.Random(3)
    for _ in range(300):
        ids = tok.encode("".join(rng.choices("abc 's!19.-\xe9\u65e5\u03b1", k=12)))
        assert tok.encode(tok.decode(ids)) == ids


def test_decode_takes_lists_tensors_and_rows(tok):
    ids = tok.encode("a photo")
    assert tok.decode(torch.tensor(ids)) == tok.decode(tuple(ids)) == tok.decode(ids) == "a photo "
    assert tok.decode(torch.tensor(ids, dtype=torch.int32).numpy()) == "a photo "
    assert tok.decode(iter(torch.tensor(ids))) == "a photo "
    assert tok.decode([]) == tok.decode(torch.zeros(0, dtype=torch.long)) == ""


def test_decode_of_special_tokens_and_padding(tok):
    assert tok.decode([49406, 2368, 49407, 0, 0]) == "cat "
    assert tok.decode([49406, 2368]) == "cat "
    assert tok.decode([49406, 2368, 49407, 2368, 49407]) == "cat "
    assert tok.decode([2368, 49407, 0]) == "cat <|endoftext|>!"


def test_decode_of_broken_utf8_and_literal_word_end(tok):
    assert tok.decode([222, 100]) == "\ufffd" * 2
    assert tok.decode(tok.encode("</w>")).split() == ["</", "w", ">"]
    assert tok.decode([27, 14, 86, 29]) == " "  # "<", "/", "w", ">" spell a word's end, as in CLIP


# errors


@pytest.mark.parametrize(
    "call",
    [
        lambda tok: tok.encode(5),
        lambda tok: tok.encode(b"cat"),
        lambda tok: tok.encode(None),
        lambda tok: tok(["cat", 5]),
        lambda tok: tok([["cat"]]),
    ],
)
def test_text_that_is_no_string(tok, call):
    with pytest.raises(TypeError, match="text is a (int|bytes|NoneType|list), .*; give a str"):
        call(tok)


@pytest.mark.parametrize("texts", [5, None, b"cat", {"cat"}])
def test_texts_that_are_no_list(tok, texts):
    with pytest.raises(TypeError, match="texts is a .*; give a str or a list of str"):
        tok(texts)


def test_too_long_names_the_text(tok):
    with pytest.raises(ValueError, match="'cat cat .* 78 tokens.*77; shorten.*truncate=True"):
        tok(["cat", "cat " * 76])
    with pytest.raises(ValueError, match=r"'\\ud800x' makes 4 tokens"):
        tok("\ud800x", context_length=2)
    with pytest.raises(ValueError) as error:
        tok("cat" * 10**4)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("length", [1, 0, -77, 77.0, "77", None])
def test_context_length(tok, length):
    with pytest.raises(ValueError, match="context_length=.*give an int >= 2"):
        tok("cat", context_length=length, truncate=True)


@pytest.mark.parametrize("ids", [[49408], [-1], [320, 10**9], torch.tensor([320, 49408])])
def test_ids_out_of_range(tok, ids):
    with pytest.raises(ValueError, match="id .* is not in the vocabulary; give ids of 0 to 49407"):
        tok.decode(ids)


@pytest.mark.parametrize(
    "ids", ["cat", 5, None, [1.5], [[320, 2368]], torch.zeros(2, 77).long(), torch.tensor([1.0])]
)
def test_ids_that_are_no_ints(tok, ids):
    with pytest.raises(TypeError, match="ids is .*; give ints, and of a batch one row"):
        tok.decode(ids)


def test_missing_vocabulary(tmp_path):
    for path in (tmp_path / "none.gz", str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="no vocabulary file .*; copy bpe_simple_vocab"):
            Tokenizer(path)


@pytest.mark.parametrize("lines", [0, 1, 48894])
def test_short_vocabulary(tmp_path, lines):
    path = tmp_path / "short.gz"
    with gzip.open(VOCAB_PATH, "rt", encoding="utf-8") as source, gzip.open(path, "wt") as target:
        target.writelines(line for _, line in zip(range(lines), source))
    with pytest.raises(ValueError, match=f"has {max(lines - 1, 0)} merges.*expected 48894 or more"):
        Tokenizer(path)


def test_vocabulary_of_exactly_the_used_lines(tmp_path):
    path = tmp_path / "exact.gz"
    with gzip.open(VOCAB_PATH) as source:
        path.write_bytes(gzip.compress(b"".join(source.readlines()[:48895]), 1))
    assert Tokenizer(str(path)).encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
