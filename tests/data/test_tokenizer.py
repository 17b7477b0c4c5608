"""The tokenizer: every text comes back, special ids never come from text, symbols stand alone."""

import random

import pytest
import tokenizers

from nanovlm.data.tokenizer import SPECIAL, Tokenizer, check_vocabulary, train_tokenizer

TEXTS = ["user: what colour is the red circle?\nbot: red", "user: how many?\nbot: 12 AB 99 AB </s> <pad> <s>"] * 9


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


def pieces(tokenizer, text):
    return [tokenizer.decode([id]) for id in tokenizer.encode(text)]


def random_text(rng):
    """Any characters: ASCII, accents, Chinese, emoji, controls; no surrogates, which are no text."""
    ranges = [(0, 127), (32, 126), (160, 0x24F), (0x4E00, 0x4F00), (0x1F600, 0x1F64F), (0xFFF0, 0xFFFF)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randrange(40)))


def test_any_text_comes_back_exactly_and_holds_no_special_id(tokenizer):
    rng = random.Random(0)
    special = {tokenizer.bos, tokenizer.eos, tokenizer.pad}
    odd = ["", " ", "\n\n a\r\n", "user:", *SPECIAL, "a</s>b<s><pad>", "ſß İ"]
    for text in [random_text(rng) for _ in range(300)] + odd:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert special.isdisjoint(ids) and all(0 <= id < tokenizer.vocab_size for id in ids)
    ids = [tokenizer.bos, tokenizer.eos, tokenizer.pad]
    assert [tokenizer.special_names[id] for id in ids] == ["<s>", "</s>", "<pad>"]
    a, b = tokenizer.encode("A"), tokenizer.encode(" red")
    assert tokenizer.decode([ids[0], *a, ids[1], *b, ids[2]]) == "A red"
    with pytest.raises(ValueError, match="position 1: surrogates not allowed"):
        tokenizer.encode("a\ud83d")


def test_frequent_words_keep_one_blank_and_a_colon(tokenizer):
    assert pieces(tokenizer, "user: what colour\nbot: red") == ["user:", " what", " colour", "\nbot:", " red"]
    assert pieces(tokenizer, "  what")[-1] == " what"  # one blank, not two
    assert pieces(tokenizer, "AB 99 AB12") == ["A", "B", " ", "9", "9", " ", "A", "B", "1", "2"]


def test_stream_equals_decode_and_never_gives_half_a_character(tokenizer):
    rng = random.Random(1)
    for text in [random_text(rng) for _ in range(100)] + ["user: é 漢 😀 red"]:
        stream, given = tokenizer.stream(), []
        for id in tokenizer.encode(text):
            given.append(stream.push(id))
            assert text.startswith("".join(given))
        given.append(stream.finish())
        assert "".join(given) == text
    stream = tokenizer.stream()
    assert [stream.push(id) for id in tokenizer.encode("red A")] == pieces(tokenizer, "red A")
    first, second = tokenizer.encode("é")
    assert (stream.push(first), stream.push(second), stream.push(tokenizer.eos)) == ("", "é", "")
    assert [stream.push(id) for id in tokenizer.encode("漢")[:2]] == ["", ""]
    assert (stream.finish(), stream.finish()) == ("\ufffd", ""), "it ended within a character"


def test_training_is_reproducible_and_keeps_to_the_size(tokenizer):
    assert train_tokenizer(TEXTS, 320).backend.to_str() == tokenizer.backend.to_str()
    assert tokenizer.vocab_size == len(tokenizer.backend.get_vocab()) <= 320
    assert [train_tokenizer(TEXTS, size).vocab_size for size in (265, 259)] == [265, 259]
    with pytest.raises(ValueError, match="vocab_size 258 has no room .* at least 259"):
        train_tokenizer(TEXTS, 258)
    size = tokenizer.vocab_size
    check_vocabulary(tokenizer, size)
    check_vocabulary(tokenizer, size + 3, spare_rows=3)
    for rows, spare in ((size - 1, 0), (size + 1, 0), (size + 4, 3), (size - 1, 3)):
        with pytest.raises(ValueError, match=f"{size} tokens but the model {rows} embeddings"):
            check_vocabulary(tokenizer, rows, spare)


def test_what_a_file_does_by_itself_is_ignored(tokenizer, tmp_path):
    """Padding, truncation, special tokens around every text."""
    tokenizer.save(tmp_path / "odd.json")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "odd.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    special = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", special_tokens=special)
    backend.save(str(tmp_path / "odd.json"))
    loaded = Tokenizer(tmp_path / "odd.json")
    for text in ("red A 1", "A", "user: what\nbot:", "</s>", "é AB"):
        assert loaded.encode(text) == tokenizer.encode(text)
    assert (loaded.bos, loaded.eos, loaded.pad) == (tokenizer.bos, tokenizer.eos, tokenizer.pad)
    with pytest.raises(FileNotFoundError, match="none.json: no such tokenizer"):
        Tokenizer(tmp_path / "none.json")
    for content in ("", "{", '{"version": "1.0"}', tokenizer.backend.to_str()[:500]):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json: not a tokenizer file, or damaged"):
            Tokenizer(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="has no <s>, </s>, <pad>"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
