"""Chat templates: conversations become segments, segments become ids and labels in one pass.

A template is data only. Rendering a conversation gives segments, each either text, one visual input or one special
token, each trained or not; `write` then tokenises every segment once and appends ids and labels together, so the loss
mask is never guessed from a second tokenisation. A visual input is written as many image-token ids as the bridge will
produce for it.

`prompt` renders the same conversation up to the place where the assistant speaks:
ids of the prompt + ids of the reply = ids of the training row.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from nanovlm.data.records import check_order
from nanovlm.names import nearest
from nanovlm.vlm import IGNORE, IMAGE_TOKEN

IMAGE_PLACES = ("row", "turn", "inline")
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Template:
    """How turns are written. A first exchange, T = trained:

    system user_prefix QUESTION user_suffix assistant_prefix [answer_prefix ANSWER answer_suffix EOS]T

    A conversation of one assistant turn is plain text: BOS [TEXT answer_suffix EOS]T.
    Raises: ValueError for an unknown image_place or role.
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
    image_place: str = "inline"  # as given; "turn": before the words of its turn; "row": before everything, BOS too
    image_suffix: str = ""  # after every visual input
    lower_case: tuple[str, ...] = ()  # roles whose words are lower-cased

    def __post_init__(self):
        if self.image_place not in IMAGE_PLACES:
            raise ValueError(f"unknown image_place {self.image_place!r}.{nearest(self.image_place, IMAGE_PLACES)}")
        for role in self.lower_case:
            if role not in ROLES:
                raise ValueError(f"lower_case names an unknown role {role!r}.{nearest(role, ROLES)}")


# Lynx's form, arXiv:2307.02469: image tokens first, then BOS and text. Only questions are lower-cased: answers may
# spell capitals.
NANO = Template(image_place="row", turn_prefix="\n", lower_case=("user",))


class Segment(NamedTuple):
    """A stretch of a row: text, or a visual input (its number in the record), or a special token ("bos" or "eos")."""

    text: str = ""
    trained: bool = False
    visual: int | None = None
    special: str | None = None


@dataclass
class Row:
    """One row before batching.

    ids, labels: list of T int. images: (visual, start, stop) of every visual input in it, in order of appearance.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    images: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def num_trained(self):
        """Tokens with a loss: int; the first token of a row is predicted from nothing and never counts."""
        predicted = self.labels[1:]
        return len(predicted) - predicted.count(IGNORE)


def segments(conversation, template):
    """Render a conversation that ends with a reply, for training.

    Args:
      conversation: sequence of Turn: user and assistant alternate, or one assistant turn alone (plain text).
      template: Template.
    Returns: list of Segment.
    Raises: ValueError if the turns are out of order.
    """
    check_order([turn.role for turn in conversation])
    return _merge(_render(conversation, template))


def prompt(conversation, template):
    """Render a conversation that ends with a question, up to where the assistant speaks.

    Args and errors: as in `segments`, but the user speaks last.
    Returns: list of Segment, none of them trained but those of earlier replies.
    """
    check_order([turn.role for turn in conversation], last="user")
    return _merge(_render(conversation, template))


def write(segments, tokenizer, num_image_tokens):
    """Ids and labels in one pass.

    Args:
      segments: list of Segment.
      tokenizer: Tokenizer.
      num_image_tokens: for each visual input of the record, the image tokens that it becomes.
    Returns: Row.
    """
    row = Row()
    special = {"bos": tokenizer.bos, "eos": tokenizer.eos}
    for segment in segments:
        if segment.visual is not None:
            start = len(row.ids)
            ids = [IMAGE_TOKEN] * num_image_tokens[segment.visual]
            row.images.append((segment.visual, start, start + len(ids)))
        elif segment.special is not None:
            ids = [special[segment.special]]
        else:
            ids = tokenizer.encode(segment.text)
        row.ids += ids
        row.labels += ids if segment.trained else [IGNORE] * len(ids)
    return row


def _render(conversation, template):
    """Segments in order, texts not yet merged."""
    if template.image_place == "row":
        for turn in conversation:
            yield from _visuals(turn, template)
    if template.begin_with_bos:
        yield Segment(special="bos")
    if conversation[0].role == "user":
        yield Segment(template.system)
    for place, turn in enumerate(conversation):
        if turn.role == "user":
            yield Segment((template.turn_prefix if place else "") + template.user_prefix)
            yield from _words(turn, template)
            yield Segment(template.user_suffix + template.assistant_prefix)
        else:
            yield Segment(template.answer_prefix if place else "", trained=True)
            yield from _words(turn, template)
            yield Segment(template.answer_suffix, trained=True)
            if template.end_with_eos:
                yield Segment(special="eos", trained=True)


def _visuals(turn, template):
    for part in turn.parts:
        if not isinstance(part, str):
            yield Segment(visual=part)
            yield Segment(template.image_suffix)


def _words(turn, template):
    """What is said in a turn, with the visual inputs that stand in it."""
    trained = turn.role == "assistant"
    lower = turn.role in template.lower_case
    parts = turn.parts
    if template.image_place != "inline" and any(not isinstance(part, str) for part in parts):
        if template.image_place == "turn":
            yield from _visuals(turn, template)
        words = (part.strip() for part in parts if isinstance(part, str))  # the gap an image leaves closes
        parts = (" ".join(word for word in words if word),)
    for part in parts:
        if isinstance(part, str):
            yield Segment(part.lower() if lower else part, trained)
        else:
            yield Segment(visual=part)
            yield Segment(template.image_suffix)


def _merge(rendered):
    """Join neighbouring texts, so that a word may carry the newline before it into one token."""
    merged = []
    for segment in rendered:
        is_text = segment.visual is None and segment.special is None
        if is_text and not segment.text:
            continue
        last = merged[-1] if merged else None
        if is_text and last and last.text and last.trained == segment.trained:
            merged[-1] = Segment(last.text + segment.text, segment.trained)
        else:
            merged.append(segment)
    return merged
