"""Published tokenizers: every form loads to the ids of the program that made it, and texts never spell special ids."""

import io
import json
import random
import struct
import sys
import warnings

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from nanovlm.data import templates
from nanovlm.published import tokenizers as published_tokenizers
from nanovlm.published.tokenizers import PADDED_ROWS, load_tokenizer
from nanovlm.data.records import Turn
from nanovlm.data.tokenizer import check_vocabulary, train_tokenizer
from nanovlm.vlm import IMAGE_TOKEN

WORDS = "the a user assistant asks what colour is shape picture answers question between and gives helpful of".split()
ODD = ["", " ", "   ", "\n", "a  b", "  indented\n\n\tline ", "été façade", "漢字 仮名", "😀", "aaaaaaa", "ab" * 9,
       "▁", "a▁b", "</s>", "a</s>b", "<s> <unk>", "<0x0A>", "<image>\nwhat?", "A\u00a0B", "\u3000", "12345 678"]


def sentences(number, seed=0):
    rng = random.Random(seed)
    marks = ["", "", "?", ".\n", "  ", ": ", " 42", " été", "aa", "<s", "</", "s>"]
    return ["".join(rng.choice(WORDS) + rng.choice([" ", *marks]) for _ in range(9)) for _ in range(number)]


def random_texts(number, seed):
    rng = random.Random(seed)
    whole = " ".join(sentences(60, seed))
    for _ in range(number):
        start = rng.randrange(len(whole))
        yield whole[start : start + rng.randrange(40)]
        yield "".join(rng.choice("ab  \n\t▁é漢😀<s>/0x0A_eiou") for _ in range(rng.randrange(24)))


@pytest.fixture(scope="module")
def trained():
    """A SentencePiece model made as LLaMA's was: bytes of a tokenizer.model."""
    spm = pytest.importorskip("sentencepiece")
    return train_sentencepiece(spm)


def train_sentencepiece(spm, **changes):
    settings = dict(vocab_size=420, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                    remove_extra_whitespaces=False, character_coverage=0.995, allow_whitespace_only_pieces=True,
                    split_digits=True, minloglevel=2)
    file = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(sentences(400)), model_writer=file, **settings | changes)
    return file.getvalue()


def field(number, value):
    """One field of a protobuf message."""
    if isinstance(value, float):
        return bytes([*varint(number << 3 | 5), *struct.pack("<f", value)])
    if isinstance(value, int):
        return bytes([*varint(number << 3), *varint(value)])
    return bytes([*varint(number << 3 | 2), *varint(len(value)), *value])


def varint(value):
    return [value] if value < 128 else [value & 127 | 128, *varint(value >> 7)]


def proto(pieces, prefix=True):
    """A SentencePiece model from (text, score, kind)."""
    data = b"".join(field(1, field(1, text.encode()) + field(2, score) + field(3, kind)) for text, score, kind in pieces)
    data += field(2, field(3, 2) + field(40, 0) + field(41, 1) + field(42, 2))
    return data + field(3, field(1, b"identity") + field(3, int(prefix)) + field(4, 0))


def folder_of(path, files):
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def loaded(path, backend, **others):
    """The tokenizer of a folder with a tokenizer.json; others: {name of a JSON file beside it: content}."""
    beside = {f"{name}.json": content for name, content in others.items()}
    return load_tokenizer(folder_of(path, {"tokenizer.json": backend.to_str()} | beside))


USUAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


VICUNA = {
    "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "pad_token": None,
                              "bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}},
    "special_tokens_map.json": {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "<unk>",
                                "unk_token": {"content": "<unk>"}},
    "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def vicuna(trained, tmp_path_factory):
    return load_tokenizer(folder_of(tmp_path_factory.mktemp("vicuna"), {"tokenizer.model": trained} | VICUNA))


def test_sentencepiece_ids_and_text(trained, vicuna):
    spm = pytest.importorskip("sentencepiece")
    processor = spm.SentencePieceProcessor(model_proto=trained)
    for text in [*random_texts(1500, 1), *ODD]:
        ids = processor.encode(text)
        assert vicuna.encode(text) == ids, text
        assert vicuna.decode(ids) == processor.decode(ids), text
    assert (vicuna.bos, vicuna.eos, vicuna.pad, vicuna.eos_ids, vicuna.add_bos) == (1, 2, 0, (2,), True)
    assert vicuna.vocab_size == processor.get_piece_size()


def naive(pieces, text):
    """SentencePiece's rule: join the neighbours whose piece scores highest, the first of equals."""
    score = {text: score for text, score, kind in pieces if kind == 1}
    parts = list(text)
    while True:
        known = [(score[a + b], -place) for place, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in score]
        if not known:
            return parts
        place = -max(known)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("a", -1.0, 1), ("b", -2.0, 1)]


def test_scores_decide_not_ids(tmp_path):
    """Random scores in any order of ids; kinds that are no text are never joined."""
    rng = random.Random(0)
    texts = {"".join(rng.choices("ab▁", k=rng.randrange(2, 5))) for _ in range(60)}
    letters = [("a", -900.0, 1), ("b", -901.0, 1), ("▁", -902.0, 1), ("c", -903.0, 1)]
    scores = rng.sample(range(800), len(texts))
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("ac", 0.0, 3)]
    pieces = special + letters + [(text, -float(score), 1) for text, score in zip(sorted(texts), scores)]
    assert [score for _, score, _ in pieces] != sorted((score for _, score, _ in pieces), reverse=True)
    tokenizer = load_tokenizer(folder_of(tmp_path, {"tokenizer.model": proto(pieces)}))
    ids = {text: id for id, (text, *_) in enumerate(pieces)}
    for _ in range(800):
        text = "".join(rng.choices("ab c", k=rng.randrange(1, 16)))
        expected = [ids[part] for part in naive(pieces, "▁" + text.replace(" ", "▁"))]
        assert tokenizer.encode(text) == expected, text
    assert tokenizer.encode("ac") == [ids[part] for part in naive(pieces, "▁ac")]
    assert tokenizer.encode("aéé", continues=True) == [ids["a"], 0]  # unknown ones in a row are one
    with pytest.raises(ValueError, match="no special token '<image>'"):
        tokenizer.special_id("<image>")
    pieces = [*PIECES, ("▁", -2.0, 1)]
    tokenizer = load_tokenizer(folder_of(tmp_path, {"tokenizer.model": proto(pieces, prefix=False)}))
    assert tokenizer.encode("a a") == [3, 5, 3] == tokenizer.encode("a a", continues=True)
    assert tokenizer.decode([5, 3]) == " a"


@pytest.mark.parametrize("data", [b"", b"version https://git-lfs.github.com/spec/v1", proto(PIECES)[:-3],
                                  proto(PIECES + PIECES[3:4]), proto(PIECES[1:])])  # fmt: skip
def test_damaged_models_are_named(tmp_path, data):
    with pytest.raises(ValueError, match="tokenizer.model.*git lfs pull" if b"git" in data else "tokenizer.model"):
        load_tokenizer(folder_of(tmp_path, {"tokenizer.model": data}))


@pytest.mark.parametrize("changes", [{"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True},
                                     {"model_type": "unigram"}, {"user_defined_symbols": ["<sep>"]}])  # fmt: skip
def test_models_that_cut_in_another_way_are_refused(tmp_path, changes):
    data = train_sentencepiece(pytest.importorskip("sentencepiece"), **changes)
    with pytest.raises(ValueError, match="tokenizer.model.*tokenizer.json"):
        load_tokenizer(folder_of(tmp_path, {"tokenizer.model": data}))


def test_without_the_package_the_error_names_it(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="sentencepiece"):
        load_tokenizer(folder_of(tmp_path, {"tokenizer.model": trained}))


# ---- tokenizer.json ----


def byte_level(special=(), added=(), template=None, prefix=False, size=420):
    """As GPT-2, Phi, SmolLM2 and BLIP-2 have it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  special_tokens=list(special), show_progress=False)
    backend.train_from_iterator(sentences(300), trainer)
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    if template:
        backend.post_processor = processors.TemplateProcessing(
            f"{template} $A", special_tokens=[(template, backend.token_to_id(template))]
        )
    return backend


def llama_json(trained, tmp_path):
    """A tokenizer.json in LLaMA's form, with what LLaVA adds."""
    (tmp_path / "llama.model").write_bytes(trained)
    backend = published_tokenizers.from_sentencepiece(tmp_path / "llama.model")
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<image>", "<pad>"])
    return backend


def pieces(tokenizer, ids):
    return [tokenizer.backend.id_to_token(id) for id in ids]


def test_llava(trained, tmp_path):
    """USER: <image>\\n is seven tokens: a text behind a special token begins with a blank of its own."""
    backend = llama_json(trained, tmp_path)
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    config = USUAL | {"pad_token": "<pad>", "extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = loaded(tmp_path, backend, tokenizer_config=config)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.add_bos) == (1, 2, 421, True)
    assert tokenizer.special_id("<image>") == 420 and tokenizer.vocab_size == 422
    row = templates.write(templates.prompt((Turn("user", (0, "what")),), templates.LLAVA), tokenizer, [2])
    assert row.ids.count(IMAGE_TOKEN) == 2
    ids = [id if id != IMAGE_TOKEN else 420 for id in row.ids]
    ids.remove(420)
    plain = tokenizers.Tokenizer.from_str(backend.to_str())
    plain.no_truncation(), plain.no_padding()
    assert ids == plain.encode("USER: <image>\nwhat ASSISTANT:").ids
    assert pieces(tokenizer, ids[ids.index(420) - 1 :][:3]) == ["▁", "<image>", "▁"]


def test_phi(tmp_path):
    """No BOS, one token ends and pads, the embedding has more rows, runs of blanks are added tokens."""
    backend = byte_level(["<|endoftext|>"], added=["   ", "  "])
    config = dict.fromkeys(USUAL, "<|endoftext|>") | {"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": False}
    tokenizer = loaded(tmp_path, backend, tokenizer_config=config)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.add_bos) == (0, 0, 0, False)
    assert tokenizer.encode("a   the") == backend.encode("a   the").ids
    assert backend.token_to_id("   ") in tokenizer.encode("a   the")
    assert tokenizer.decode([*tokenizer.encode("the a"), 0, 500, 51199]) == "the a"
    with pytest.raises(ValueError, match="id -1 is no token"):
        tokenizer.decode([-1])
    check_vocabulary(tokenizer, tokenizer.vocab_size + 905, PADDED_ROWS)
    for rows in (tokenizer.vocab_size - 1, tokenizer.vocab_size + PADDED_ROWS + 1):
        with pytest.raises(ValueError, match="embeddings"):
            check_vocabulary(tokenizer, rows, PADDED_ROWS)


def test_end_ids_of_another_model_are_left_out(tmp_path):
    """LLaVA-Phi's generation settings name LLaMA's ids."""
    backend = byte_level(["<|endoftext|>", "<|im_end|>"])
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    for eos, expected, number in (([1, 0], (1, 0), 0), (0, (0,), 0), (None, (1,), 0), ([], (1,), 0), (2, (1,), 1),
                                  ([2, 9999], (1,), 2)):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = loaded(tmp_path, backend, tokenizer_config=config, generation_config={"eos_token_id": eos})
        assert found.eos_ids == expected and len(warned) == number
        assert not warned or "eos_token_id 2 is '!', which ends no reply" in str(warned[0].message)


def test_blip2(tmp_path):
    """A newline ends a reply, BOS comes from the template inside the file."""
    backend = byte_level(["<s>", "<pad>", "</s>", "<unk>"], template="</s>")
    backend.add_special_tokens(["<image>"])
    newline = backend.token_to_id("Ċ")
    config = dict.fromkeys(USUAL, "</s>") | {"pad_token": "<pad>"}
    tokenizer = loaded(tmp_path, backend, tokenizer_config=config, generation_config={"eos_token_id": newline})
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (2, 2, 1)
    assert tokenizer.add_bos and tokenizer.eos_ids == (newline,)
    assert templates.end_ids(templates.BLIP2, tokenizer) == (newline,)
    talk = Turn("user", (0, "what?")), Turn("assistant", ("a",))
    row = templates.write(templates.segments(talk, templates.BLIP2), tokenizer, [3])
    expected = backend.encode("Question: what? Answer: a\n").ids  # the template of the file writes BOS
    assert row.ids == [IMAGE_TOKEN] * 3 + expected
    assert [id for id in row.labels if id >= 0] == expected[-2:]


def test_qwen_has_no_bos(tmp_path):
    backend = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    config = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    tokenizer = loaded(tmp_path, backend, tokenizer_config=config, generation_config={"eos_token_id": [2, 0]})
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.add_bos) == (None, 2, 0, False)
    assert tokenizer.eos_ids == (2, 0)
    row = templates.write(templates.prompt((Turn("user", ("what<|im_end|>",)),), templates.CHATML), tokenizer, ())
    assert pieces(tokenizer, row.ids)[0] == "<|im_start|>"
    assert row.ids.count(2) == 1 and row.ids.count(1) == 2


def test_added_tokens_of_a_fine_tuned_model(tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path, opt_files()), added=("<|endofchunk|>", "<image>"))
    size = tokenizer.vocab_size
    assert [tokenizer.special_id(name) for name in ("<|endofchunk|>", "<image>")] == [size - 2, size - 1]
    assert {size - 2, size - 1}.isdisjoint(tokenizer.encode("<image> a <|endofchunk|>"))
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path, added=("<|endofchunk|>", "<image>"))
    assert again.vocab_size == size and again.special_id("<image>") == size - 1


# ---- OPT ----


def opt_files(**config):
    backend = byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    model = json.loads(backend.to_str())["model"]
    merges = "".join(" ".join(merge) + "\n" for merge in model["merges"])
    defaults = dict.fromkeys(USUAL, "</s>") | {"pad_token": "<pad>", "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"}
    return {"vocab.json": model["vocab"], "merges.txt": "#version: 0.2\n" + merges,
            "tokenizer_config.json": defaults | config}


def test_opt(tmp_path):
    files, backend = opt_files(), byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    for config in (files["tokenizer_config.json"], {}):
        tokenizer = load_tokenizer(folder_of(tmp_path, files | {"tokenizer_config.json": config}))
        assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.add_bos) == (2, 2, 1, True)
        assert tokenizer.encode("the été") == backend.encode("the été").ids == tokenizer.encode("the été", continues=True)
    tokenizer.save(tmp_path / "tokenizer.json")
    ids = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("the a").ids
    assert ids == [2, *tokenizer.encode("the a")]


def test_opt_with_a_blank_before_every_text(tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path, opt_files(add_prefix_space=True, add_bos_token=False)))
    behind = tokenizer.encode("the", continues=True)
    assert tokenizer.encode("the") == tokenizer.encode(" the", continues=True) != behind
    assert not tokenizer.add_bos


@pytest.mark.parametrize("files, message", [
    ({"merges.txt": "a b c\n"}, "merges.txt"),
    ({"merges.txt": "漢 字\n"}, "vocab.json and merges.txt"),
    ({"vocab.json": "{"}, "vocab.json and merges.txt"),
    ({"vocab.json": "[1]"}, "vocab.json and merges.txt"),
    ({"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"}}, "a Qwen2Tokenizer cannot be made"),
    ({"tokenizer_config.json": {"eos_token": "<end>"}}, "eos_token '<end>' is not in the vocabulary"),
    ({"added_tokens.json": {"<image>": 7}}, "'<image>' should have id 7 but gets 420; these files belong to two"),
])  # fmt: skip
def test_files_that_do_not_belong_together(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder_of(tmp_path, opt_files() | files))


def test_files_that_add_tokens(tmp_path):
    added = {"<image>": 420, "<|endofchunk|>": 421}
    decoder = {"422": {"content": "<x>", "special": True}, "423": {"content": "<y>", "special": False}}
    files = opt_files(added_tokens_decoder=decoder) | {"added_tokens.json": added}
    tokenizer = load_tokenizer(folder_of(tmp_path, files))
    assert [tokenizer.special_id(name) for name in (*added, "<x>", "<y>")] == [420, 421, 422, 423]
    assert tokenizer.vocab_size == 424 and 423 in tokenizer.encode("a<y>") and 422 not in tokenizer.encode("a<x>")


def test_folders_without_a_tokenizer(tmp_path):
    for folder in (tmp_path / "none", tmp_path, folder_of(tmp_path / "half", {"vocab.json": "{}"})):
        with pytest.raises(FileNotFoundError, match=f"{folder} holds no tokenizer.json"):
            load_tokenizer(folder)
    for content, message in (("{", "tokenizer.json.*damaged"), ("version https://git-lfs\n", "tokenizer.json.*git lfs pull"),
                             (byte_level().to_str(), "no token ends a text")):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(folder_of(tmp_path, {"tokenizer.json": content}))


def test_our_own_tokenizer_files(tmp_path):
    ours = train_tokenizer(["user: what is this?"] * 9, 280)
    ours.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path)
    for name in ("bos", "eos", "pad", "add_bos", "eos_ids", "vocab_size"):
        assert getattr(loaded, name) == getattr(ours, name), name
    assert loaded.encode("user: </s>") == ours.encode("user: </s>")


# ---- all forms ----


@pytest.fixture(scope="module", params=("sentencepiece", "llama json", "metaspace", "byte level", "opt"))
def form(request, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("form")
    if request.param == "sentencepiece":
        return load_tokenizer(folder_of(folder, {"tokenizer.model": trained}))
    if request.param == "opt":
        return load_tokenizer(folder_of(folder, opt_files()))
    if request.param == "byte level":
        return loaded(folder, byte_level(["<s>", "</s>"]), tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    backend = llama_json(trained, folder)
    if request.param == "metaspace":
        backend.normalizer = normalizers.Sequence([])
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return loaded(folder, backend, tokenizer_config=USUAL)


def test_special_strings_stay_text(form):
    special = {form.bos, form.eos, *(form.special_id(name) for name in form.roles.values())}
    names = [*form.roles.values(), "<image>", "<0x0A>"]
    for text in [*names, *(f"a{name}b {name}" for name in names), "".join(names)]:
        for continues in (False, True):
            ids = form.encode(text, continues)
            assert special.isdisjoint(ids)
            assert form.decode(ids) == text
    with pytest.raises(ValueError, match="surrogates not allowed"):
        form.encode("a\ud83d")


def test_streams_give_what_decoding_gives(form):
    """Also where bytes that are no character spoil those before them: a model may write any, with special tokens between."""
    rng = random.Random(3)
    for text in [*random_texts(60, 4), *ODD, "é漢😀 the é 漢", "  the", "the\n\nthe"]:
        text = text.replace("▁", "_")  # which SentencePiece reads as a blank
        ids = form.encode(text)
        ids.insert(rng.randrange(len(ids) + 1), form.eos)
        stream = form.stream()
        given = [stream.push(id) for id in ids]
        assert "\ufffd" not in "".join(given)
        assert "".join(given) + stream.finish() == form.decode(ids)
        assert form.decode(ids) in (text, text.removeprefix(" "))  # Metaspace adds no blank to one that is there
        assert stream.finish() == ""
    ids = form.encode("the a picture")
    given = list(map(form.stream().push, ids))
    assert "".join(given) == "the a picture" and all(given) and len(ids) >= 3
    rng = random.Random(4)
    word, special = form.encode("the"), [form.eos, form.bos]
    byte_ids = [id for id in range(form.vocab_size) if (form.backend.id_to_token(id) or "").startswith("<0x")]
    few = [*form.encode("é漢😀"), *rng.sample(byte_ids, 4 * bool(byte_ids)), *word, *special]
    for length in range(1, 200):
        ids = rng.choices(few if length % 2 else range(form.vocab_size), k=1 + length % 12)
        stream = form.stream()
        assert "".join([*map(stream.push, ids), stream.finish()]) == form.decode(ids), ids


def test_a_text_goes_on_where_it_was_cut(form):
    """Ids of a prompt and of the reply behind it are the ids of both as one text, wherever a blank divides them."""
    for text in sentences(60, 5):
        for place in [place for place, letter in enumerate(text) if letter == " " and text[place - 1].isalpha()]:
            if text[place + 1 : place + 2].isalpha():
                assert form.encode(text[:place]) + form.encode(text[place:], continues=True) == form.encode(text)


def test_saved_and_loaded(form, tmp_path):
    form.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path)
    for name in ("bos", "eos", "pad", "add_bos", "eos_ids", "vocab_size"):
        assert getattr(again, name) == getattr(form, name), name
    for text in [*random_texts(60, 6), *ODD]:
        for continues in (False, True):
            assert again.encode(text, continues) == form.encode(text, continues)


def test_special_tokens_that_merges_can_spell(tmp_path):
    """Some files can make </s> of its own letters; it stays letters all the same."""
    vocab = {"<s>": 0, "</s>": 1, "<": 2, "/": 3, "s": 4, ">": 5, "</": 6, "s>": 7, "</s": 8}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s>")]))
    tokenizer = loaded(tmp_path, backend, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    assert tokenizer.encode("</s><s>/") == [2, 3, 7, 2, 7, 3]


# ---- transformers ----


def test_equal_to_transformers(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = USUAL | {"pad_token": "<pad>"}
    ours = loaded(tmp_path / "a", llama_json(trained, tmp_path), tokenizer_config=config)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "a" / "tokenizer.json"), **config)
    for text in [*random_texts(150, 7), *ODD]:
        assert [ours.bos, *ours.encode(text)] == theirs(text, split_special_tokens=True).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)
    for name in ("bos", "eos", "pad"):
        assert getattr(ours, name) == getattr(theirs, f"{name}_token_id")
    files = opt_files()
    folder = folder_of(tmp_path, files)
    ours = load_tokenizer(folder)
    merges = [tuple(line.split()) for line in files["merges.txt"].split("\n")[1:] if line]
    theirs = transformers.GPT2Tokenizer(vocab=files["vocab.json"], merges=merges, **files["tokenizer_config.json"])
    for text in [*random_texts(150, 8), *ODD]:
        assert ours.encode(text) == theirs(text, split_special_tokens=True, add_special_tokens=False).input_ids, text


def llava_ids(theirs, text):
    """LLaVA's own way (tokenizer_image_token): the texts around <image> one by one, of later ones BOS is dropped."""
    chunks = [theirs(chunk).input_ids for chunk in text.split("<image>")]
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids += [IMAGE_TOKEN, *chunk[1:]]
    return ids


LATER = "USER: and the colour? ASSISTANT: 42</s>"


@pytest.mark.parametrize("name, text", [
    ("VICUNA", f"{templates.SYSTEM}USER: <image>\nWhat is it? ASSISTANT: a shape</s>{LATER}"),
    ("LLAVA", f"USER: <image>\nWhat is it? ASSISTANT: a shape</s>{LATER}"),
    ("MPLUG_OWL2", f"USER: <image>What is it? ASSISTANT: a shape</s>{LATER}"),
    ("PLAIN", "<image>a shape\n42\n"),
])  # fmt: skip
def test_rows_equal_the_published_tokenisation(trained, tmp_path, name, text):
    transformers = pytest.importorskip("transformers")
    tokenizer = loaded(tmp_path, llama_json(trained, tmp_path), tokenizer_config=USUAL)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **USUAL)
    talk = (Turn("user", (0, "What is it?")), Turn("assistant", ("a shape",)),
            Turn("user", ("and the colour?",)), Turn("assistant", ("42",)))
    row = templates.write(templates.segments(talk, getattr(templates, name)), tokenizer, [1])
    assert row.ids == llava_ids(theirs, text)
