"""A real language model, SmolLM2-135M-Instruct, says what transformers says. Absent optional data, in one line:

    python tests/official/smollm2.py out/smollm2 && NANOVLM_SMOLLM2=out/smollm2 pytest -n0 -m slow tests/published/test_smollm2.py
"""

import os
from pathlib import Path

import pytest
import torch

import nanovlm
from nanovlm.data.records import Turn
from nanovlm.generation.answer import make_prompt
from nanovlm.generation.sampler import Decoding, generate

FOLDER = os.environ.get("NANOVLM_SMOLLM2", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER, reason="absent optional data: " + __doc__.split("\n\n")[1].strip())]
QUESTIONS = (
    "What is the capital of France?", "Name three fruits.", "Which hue does the sky have at noon?", "What is 7 + 5?",
    "Write one sentence about owls.", "Who wrote Hamlet?", "Translate \"good morning\" into French.", "Is a whale a fish?",
    "How many days has a leap year?", "What sound does a cow make?", "Continue: 1, 2, 4, 8,", "What is the opposite of cold?",
    "Why is the sea salty?", "Give a synonym for quick.", "Which planet is the largest?", "What is water made of?",
    "Sort these numbers: 30, 4, 12.", "Say hello in Spanish.", "Où est Paris ?", "What\u2019s 10% of 250 \u20ac?\nAnswer briefly.",
)  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    """(transformers' tokenizer, its model)."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig()
    return transformers.AutoTokenizer.from_pretrained(FOLDER), model


@pytest.fixture(scope="module")
def ours():
    return nanovlm.load(FOLDER)


def chat_ids(tokenizer, question):
    """A question as the folder's own chat template writes it, by transformers: list of int."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def test_the_tokenizer_is_theirs(ours, theirs):
    odd = ["", " ", "a  b\n\n c\t", "<|im_end|> stays text", "naïve 日本語 🦉", "3.14159 and 007", "\r\n it's I'LL"]
    pages = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[2].glob("nanovlm/*.py"))]
    for text in [*QUESTIONS, *odd, *pages]:
        ids = ours.tokenizer.encode(text)
        assert ids == theirs[0](text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.tokenizer.decode(ids) == text
    for question in QUESTIONS:
        assert make_prompt(ours, [Turn("user", (question,))], [], 8).row.ids == chat_ids(theirs[0], question)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_greedy_and_beam_text_token_by_token(ours, theirs, num_beams):
    tokenizer, model = theirs
    end, number = tokenizer.eos_token_id, 16 if num_beams == 1 else 5
    prompts = [chat_ids(tokenizer, question) if num_beams == 1 else tokenizer(question).input_ids for question in QUESTIONS]
    longest = max(map(len, prompts))
    ids, mask = (torch.tensor([[fill] * (longest - len(prompt)) + [one or token for token in prompt] for prompt in prompts])
                 for fill, one in ((end, None), (0, 1)))
    made = model.generate(ids, attention_mask=mask, max_new_tokens=number, num_beams=num_beams, do_sample=False, eos_token_id=end,
                          pad_token_id=end)[:, longest:].tolist()  # fmt: skip
    expected = [row[: row.index(end)] if end in row else row for row in made]
    decoding = Decoding(max_new_tokens=number, num_beams=num_beams, eos_ids=(end,))
    assert generate(ours.model, prompts, decoding) == expected
    if num_beams == 1:
        texts = ours.ask(list(QUESTIONS[:3]), decoding=decoding)
        assert texts == [tokenizer.decode(row).strip() for row in expected[:3]] and "Paris" in texts[0]


def test_bfloat16_has_the_same_numbers_rounded(ours):
    half = nanovlm.load(FOLDER, dtype=torch.bfloat16)
    state = half.model.state_dict()
    assert all(torch.equal(state[name], tensor.bfloat16()) for name, tensor in ours.model.state_dict().items())
    assert "Paris" in half.ask(QUESTIONS[0])
