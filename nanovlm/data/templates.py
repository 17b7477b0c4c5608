"""Chat templates: conversations become segments, segments become ids and labels in one pass.

A template is data only. Rendering a conversation gives segments, each either text, one visual input or one special
token, each trained or not; `write` then tokenises every segment once and appends ids and labels together, so the loss
mask is never guessed from a second tokenisation. A visual input is written as many image-token ids as the bridge will
produce for it, or as one media token where the model reads its pictures through cross-attention.

A template may use special tokens of the tokenizer by their names (`specials`); the words of a turn never become one.

`prompt` renders the same conversation up to the place where the assistant speaks:
ids of the prompt + ids of the reply = ids of the training row.
"""

import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from nanovlm.data.records import check_order
from nanovlm.names import check_known
from nanovlm.vlm import IGNORE, IMAGE_TOKEN


@dataclass(frozen=True)
class Template:
    """How turns are written. A first exchange, T = trained:

    system user_prefix QUESTION user_suffix assistant_prefix [answer_prefix ANSWER answer_suffix EOS]T

    A conversation of one assistant turn is plain text: BOS [TEXT answer_suffix EOS]T. BOS is left out where the
    tokenizer adds none by itself (`add_bos`).
    Raises: ValueError for an unknown image_place.
    """

    user_prefix: str = "user: "
    user_suffix: str = "\n"
    assistant_prefix: str = "bot:"
    answer_prefix: str = " "
    answer_suffix: str = ""
    turn_prefix: str = ""  # before every later user turn
    system: str = ""  # once, before the first turn
    begin_with_bos: bool = True
    end_with_eos: bool = True  # after every reply
    image_place: str = "inline"  # as given; "turn": before its turn's words; "chunk": and prefix; "row": before BOS
    image_suffix: str = ""  # after every visual input
    picture_prefix: str | None = None  # in place of user_prefix where a turn begins with a visual input
    image_marks: tuple[str, ...] = ()  # special tokens in front of a picture's image tokens
    tile_marks: tuple[str, ...] = ()  # the same of a tile, with its {row} and {column} from 1
    lower_case: tuple[str, ...] = ()  # roles whose words are lower-cased
    specials: tuple[str, ...] = ()  # names of special tokens in the texts of this template
    media_token: str = ""  # special token that a visual input becomes; "" = the bridge's image tokens
    without_questions: bool = False  # of a user's turn only the visual inputs are written
    rounds: bool = False  # every reply is a row of its own: earlier ones are context, neither trained nor ended by EOS

    def __post_init__(self):
        check_known("unknown image_place", self.image_place, ("row", "chunk", "turn", "inline"))


SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions. ")  # LLaVA's; Vicuna itself says "human" for "user"

# Lynx's form, arXiv:2307.02469: image tokens first, then BOS and text. Only questions are lower-cased: answers may
# spell capitals.
NANO = Template(image_place="row", turn_prefix="\n", lower_case=("user",))

# As released (bytedance/lynx-llm, issue 2): everything is lower-cased, a dialogue is one text without EOS inside.
LYNX = Template(image_place="row", turn_prefix="\n", lower_case=("user", "assistant"), rounds=True)

# Conversation v1 of LLaVA: Vicuna, LLaVA-1.5 and mPLUG-Owl2's fine-tuning script. The first word of an answer is
# trained, here as everywhere: LLaVA-Phi's first version masked it by mistake.
VICUNA = Template("USER: ", " ", "ASSISTANT:", system=SYSTEM, image_place="turn", image_suffix="\n")
LLAVA = replace(VICUNA, system="")  # llava-hf's model card and chat template
MPLUG_OWL2 = Template("USER: ", " ", "ASSISTANT:", image_place="turn")  # at inference, X-PLUG/mPLUG-Owl
LLAVA_PHI = replace(VICUNA, begin_with_bos=False)  # "phi-2_v0", zhuyiche/llava-phi; ends with <|endoftext|>
PHI = Template("Instruct: ", "\n", "Output:", begin_with_bos=False, image_place="turn", image_suffix="\n")

# LLaVA's first stage: image, caption, newline; what the user asks is left out and no EOS ends it.
PLAIN = Template("", "", "", "", "\n", end_with_eos=False, image_place="turn", without_questions=True)

# LAVIS, blip2_opt: a newline ends the answer; Hugging Face's processor writes image tokens before BOS.
BLIP2 = Template("Question: ", " ", "Answer:", answer_suffix="\n", end_with_eos=False, image_place="row")
BLIP2_CAPTION = replace(PLAIN, image_place="row")

# mlfoundations/open_flamingo: a picture is one token, <|endofchunk|> ends its text and the generation.
OPEN_FLAMINGO = Template(
    "", "", "", "", "<|endofchunk|>", end_with_eos=False, image_place="chunk",
    specials=("<|endofchunk|>",), media_token="<image>",
)  # fmt: skip
# Its evaluation script's: a newline between the shots; the hateful memes' question is written out by whoever asks it.
OPEN_FLAMINGO_VQA = replace(OPEN_FLAMINGO, user_prefix="Question:", assistant_prefix=" Short answer:", turn_prefix="\n")
OPEN_FLAMINGO_CAPTION = replace(OPEN_FLAMINGO, assistant_prefix="Output:", turn_prefix="\n")

# SmolLM2-Instruct and Qwen2.5-Instruct, without and with the system turns of their chat templates.
CHATML = Template(
    "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "", "<|im_end|>", "\n",
    begin_with_bos=False, end_with_eos=False, image_place="turn", specials=("<|im_start|>", "<|im_end|>"),
)  # fmt: skip
CHATML_SMOLLM2, CHATML_QWEN = (replace(CHATML, system=f"<|im_start|>system\n{system}<|im_end|>\n") for system in (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."))

# SmolVLM-Instruct: marks tell where a tile stands; there are those of MOST_TILES rows and columns.
MOST_TILES = 6
_FAKE, _TILE = "<fake_token_around_image>", "<row_{row}_col_{column}>"
_TILES = (_TILE.format(row=n // MOST_TILES + 1, column=n % MOST_TILES + 1) for n in range(MOST_TILES**2))
SMOLVLM = Template(
    "User: ", "<end_of_utterance>\n", "Assistant:", " ", "<end_of_utterance>", "\n", "<|im_start|>",
    begin_with_bos=False, end_with_eos=False, image_suffix=_FAKE, picture_prefix="User:",
    image_marks=(_FAKE, "<global-img>"), tile_marks=(_FAKE, _TILE),
    specials=("<|im_start|>", "<global-img>", *_TILES, _FAKE, "<image>", "<end_of_utterance>"),
)  # fmt: skip


class Segment(NamedTuple):
    """A stretch of a row: text, or a visual input (its number in the record), or a special token.

    special: "bos", "eos" or the token's own name; beside a visual input, the one token that it becomes.
    """

    text: str = ""
    trained: bool = False
    visual: int | None = None
    special: str | None = None


@dataclass
class Row:
    """One row before batching."""

    ids: list[int] = field(default_factory=list)  # T
    labels: list[int] = field(default_factory=list)  # T
    images: list[tuple[int, int, int]] = field(default_factory=list)  # (visual, start, stop) in order of appearance

    @property
    def num_trained(self):
        """Tokens with a loss: int; the first token of a row is predicted from nothing and never counts."""
        predicted = self.labels[1:]
        return len(predicted) - predicted.count(IGNORE)


def segments(conversation, template, last="assistant"):
    """Render a conversation that ends with a reply, for training.

    Args:
      conversation: sequence of Turn: user and assistant alternate, or one assistant turn alone (plain text).
      template: Template. last: who speaks last.
    Returns: list of Segment; neighbouring texts are one, so that a word may carry the newline before it into one token.
    Raises: ValueError if the turns are out of order.
    """
    check_order([turn.role for turn in conversation], last)
    joined = []
    for one in _pieces(conversation, template):
        before = joined[-1] if joined else Segment()
        if one.text and before.text and one.trained == before.trained:
            joined[-1] = Segment(before.text + one.text, one.trained)
        elif one != Segment(trained=one.trained):
            joined.append(one)
    return joined


def _pieces(conversation, template):
    """The segments of a conversation; texts may be empty, and several behind one another."""
    if template.image_place == "row":
        yield from _shown([visual for turn in conversation for visual in turn.visuals], template)
    if template.begin_with_bos:
        yield Segment(special="bos")
    if conversation[0].role == "user":
        yield from _written(template.system, template)
    for place, turn in enumerate(conversation):
        if turn.role == "user":
            yield from _written(template.turn_prefix if place else "", template)
            if template.image_place == "chunk":
                yield from _shown(turn.visuals, template)
            begins = template.picture_prefix is not None and not isinstance(turn.parts[0], str)
            yield from _written(template.picture_prefix if begins else template.user_prefix, template)
            yield from _spoken(turn, template)
            yield from _written(template.user_suffix + template.assistant_prefix, template)
        else:
            closed = not template.rounds or place == len(conversation) - 1
            yield from _written(template.answer_prefix if place else "", template, closed)
            yield from _spoken(turn, template, closed)
            yield from _written(template.answer_suffix, template, closed)
            if closed and template.end_with_eos:
                yield Segment(special="eos", trained=True)


def _written(text, template, trained=False):
    """A text of the template, cut at its special tokens."""
    names = "|".join(map(re.escape, template.specials)) or "$^"  # which is nowhere
    for piece in re.split(f"({names})", text):
        yield Segment(special=piece, trained=trained) if piece in template.specials else Segment(piece, trained)


def _shown(visuals, template, suffix_last=True):
    """Visual inputs, each with its suffix, the last perhaps without."""
    for left, visual in enumerate(visuals, start=1 - len(visuals)):
        yield Segment(visual=visual, special=template.media_token or None)
        yield from _written(template.image_suffix if left or suffix_last else "", template)


def _spoken(turn, template, trained=False):
    """What is said in a turn, with the visual inputs that stand in it."""
    parts, visuals = turn.parts, turn.visuals
    if visuals and template.image_place != "inline":
        words = (part.strip() for part in parts if isinstance(part, str))  # the gap an image leaves closes
        parts = (" ".join(filter(None, words)),)
        if template.image_place == "turn":  # no newline before no words
            yield from _shown(visuals, template, suffix_last=parts[0] or template.without_questions)
    for part in parts:
        if not isinstance(part, str):
            yield from _shown([part], template)
        elif not (template.without_questions and turn.role == "user"):
            part = part.strip("\n") if visuals else part  # LLaVA's files break the line at a picture
            yield Segment(part.lower() if turn.role in template.lower_case else part, trained)


def prompt(conversation, template):
    """Render a conversation that ends with a question, up to where the assistant speaks: as `segments`.

    None of them is trained but those of earlier replies.
    """
    return segments(conversation, template, last="user")


def rounds(conversation, template):
    """The conversations that become training rows: one per reply where the template says so, otherwise this one."""
    if not template.rounds or len(conversation) < 2:
        return [conversation]
    return [conversation[:stop] for stop in range(2, len(conversation) + 1, 2)]


def picture_ids(visual, template, tokenizer, num_image_tokens):
    """What a visual input becomes in the row: list of int, the image tokens of every frame behind their marks.

    A row of tiles ends with a newline, and one more stands before the picture as a whole.

    Args:
      visual: records.Visual, cut into tiles (tiles.cut) where they are wanted. num_image_tokens: of all its frames.
    Raises: ValueError if there is no such mark.
    """
    if not template.image_marks:
        return [IMAGE_TOKEN] * num_image_tokens
    (rows, columns), ids = visual.grid or (0, 0), []
    if max(rows, columns) > MOST_TILES:
        raise ValueError(
            f"{visual.key}: cut into {rows} x {columns} tiles, but this model has marks for {MOST_TILES} a side at "
            f"most; ask for fewer (sample.py --tiles {MOST_TILES}, train.py --set STAGE.tiles={MOST_TILES})"
        )
    for frame in range(len(visual.frames)):
        newlines, marks, (row, column) = "\n\n" if rows else "", template.image_marks, divmod(frame, columns or 1)
        if row < rows:
            newlines = "\n" if row and not column else ""
            marks = [mark.format(row=row + 1, column=column + 1) for mark in template.tile_marks]
        ids += [*tokenizer.encode(newlines), *map(tokenizer.special_id, marks)]
        ids += [IMAGE_TOKEN] * (num_image_tokens // len(visual.frames))
    return ids


def write(segments, tokenizer, num_image_tokens):
    """Ids and labels of a list of Segment in one pass: Row. Raises: ValueError if the tokenizer lacks a special token.

    num_image_tokens: for each visual input of the record, the image tokens that it becomes, or its `picture_ids`.
    """
    row, after_text = Row(), False
    for text, trained, visual, special in segments:
        if special == "bos":
            ids = [tokenizer.bos] if tokenizer.add_bos else []
        elif special:
            ids = [tokenizer.eos if special == "eos" else tokenizer.special_id(special)]
        elif visual is None:
            ids = tokenizer.encode(text, continues=after_text)
        else:
            shown = num_image_tokens[visual]
            ids = [IMAGE_TOKEN] * shown if isinstance(shown, int) else shown
        if visual is not None:
            places = [place for place, id in enumerate(ids, len(row.ids)) if special or id == IMAGE_TOKEN]
            row.images.append((visual, places[0], places[-1] + 1))
        after_text = visual is None and special is None
        row.ids += ids
        row.labels += ids if trained else [IGNORE] * len(ids)
    return row


def end_ids(template, tokenizer):
    """Ids that end a reply in this form: tuple of int, the tokenizer's own and what the template writes last."""
    ids, suffix = list(tokenizer.eos_ids), template.answer_suffix
    if suffix and not template.end_with_eos:
        special = next(filter(suffix.endswith, template.specials), None)
        ids.append(tokenizer.special_id(special) if special else tokenizer.encode(suffix)[-1])
    return tuple(dict.fromkeys(ids))
