"""What every run of an ablation is asked at its end, by the same held-out pictures and texts whatever its seed."""

from dataclasses import replace

from nanovlm.data.records import Turn
from nanovlm.data.scene_questions import Scenes, SceneTexts
from nanovlm.generation.answer import DESCRIBE
from nanovlm.recipes.nano_tests import ask, assistant, shares

SEED = 1000  # of the exam
PICTURES, TEXTS = 100, 300  # of a full exam; a smoke run has 4 of each
QUESTIONS = 3  # about each picture
UNSEEN_WORDINGS = ("please tell me: {}", "{} use one or two words.", "here is a picture. {}")  # none is trained
PICTURE_KINDS = ("color", "shape", "place", "size")
MEASURES = {  # column -> what it is
    "pictures": "questions about new pictures",
    "other wordings": "the same questions in wordings that no training used",
    "described first": "the same questions, after the model has described the picture",
    "text": "questions about new scenes told in words",
    "text beside a picture": "the same texts beside a picture that has nothing to do with them",
}


def reworded(turn, wording):
    """A user turn whose words stand in a wording, "{}" for the question."""
    return Turn(turn.role, tuple(wording.format(part) if isinstance(part, str) else part for part in turn.parts))


def in_wordings(record, wordings, first=0):
    """A record whose last questions stand in one wording after the other, beginning with number `first`."""
    talks = [
        (*turns[:-2], reworded(turns[-2], wordings[(first + place) % len(wordings)]), turns[-1])
        for place, turns in enumerate(record.conversations)
    ]
    return replace(record, conversations=tuple(talks))


def picture_questions(number):
    """The exam's pictures with their questions: list of Record."""
    source = Scenes(
        "new", seed=SEED, max_objects=1, string_share=0.0, questions_per_picture=QUESTIONS,
        weights=dict.fromkeys(PICTURE_KINDS, 1.0),
    )  # fmt: skip
    return [source.record(n) for n in range(number)]


def text_questions(number):
    """The exam's texts with a question each: list of Record."""
    source = SceneTexts("new", SEED, max_objects=2, string_share=0.0, weights={"described": 1.0, "listed": 1.0})
    return [source.record(n) for n in range(number)]


def beside(texts, shown):
    """Texts with a picture in front that has nothing to do with them.

    texts: list of Record without pictures. shown: list of Record with one each, taken in turn.
    Returns: list of Record.
    """
    found = []
    for place, record in enumerate(texts):
        ((question, answer),) = record.conversations
        picture = shown[place % len(shown)].visuals[0]
        turns = (Turn("user", (0, *question.parts)), answer)
        found.append(replace(record, visuals=(picture,), conversations=(turns,)))
    return found


def described(model, records):
    """Records whose questions follow the model's own description of the picture: list of Record. model: chat.Assistant."""
    asked = [
        replace(record, conversations=((Turn("user", (0, DESCRIBE)), Turn("assistant", ("",))),), kinds=("caption",))
        for record in records
    ]
    told = ask(model, asked, max_new_tokens=50)
    found = []
    for record, answer in zip(records, told, strict=True):
        before = (Turn("user", (0, DESCRIBE)), Turn("assistant", (answer.prediction,)))
        talks = tuple((*before, Turn("user", turns[0].parts[1:]), turns[1]) for turns in record.conversations)
        found.append(replace(record, conversations=talks))
    return found


def finish(run):
    """The share of right answers for every column of MEASURES: {column: share}."""
    model = assistant(run)
    asked = picture_questions(4 if run.args.smoke else PICTURES)
    texts = text_questions(4 if run.args.smoke else TEXTS)
    exams = {
        "pictures": asked,
        "other wordings": [in_wordings(record, UNSEEN_WORDINGS, n) for n, record in enumerate(asked)],
        "described first": described(model, asked),
        "text": texts,
        "text beside a picture": beside(texts, asked),
    }
    return {name: shares(ask(model, exams[name]))["all"] for name in MEASURES}
