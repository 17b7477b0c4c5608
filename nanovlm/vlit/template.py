"""A generator without a model: conversations put together from annotations by rules.

Everything it says stands in the annotations, or in the table of uses for a plan that asks for knowledge; so it never
errs where they do not, and its language is as poor as its rules. It is the baseline that a language model has to beat,
and the whole pipeline runs on it without one. The seed and the number of the draft decide every choice.
"""

import random

from nanovlm.vlit.annotations import middle
from nanovlm.vlit.replies import PROMPTS, Refused, digest
from nanovlm.vlit.self_instruct import SEVERAL, counts, listed, named_region, question, stopped, written
from nanovlm.vlit.words import ALWAYS_SEVERAL, GROUP_OF, NUMBERS, OTHER_NAMES, USES, counted, one_of, plural

ASKED = PROMPTS["template"]  # kind of question -> several ways to ask it
CLOSE = 0.05  # of the picture; objects nearer to each other than this are on no side of one another


class Template:
    """The rules as a generator, see generators.py. It answers chats that carry what they were made from."""

    name, accepts_images, batch_size, workers = "template", False, 1, 1

    def generate(self, chats, *, n=1, temperature=0.0, max_tokens=0, seed=0, stop=()):
        """As every generator; temperature, max_tokens and stop do not matter here."""
        found = []
        for chat in chats:
            if chat.material is None:
                raise Refused("the template generator works from annotations; this request needs a language model")
            plan, picture, region = chat.material
            draws = (random.Random(digest([seed, chat.sha, draft])) for draft in range(n))
            drafts = [Rounds(picture, region, draw).of_plan(plan) for draw in draws]
            if not all(drafts):
                raise Refused(f"picture {picture.id} has no annotation to make a {plan.name} conversation from")
            found.append(list(map(written, drafts)))
        return found


class Rounds:
    """Questions with their answers about one picture, each kind from its annotations.

    Args: picture: annotations.Picture. region: the marked Annotation, or None. draw: random.Random.
    Every method returns a list of (question, answer), shuffled; empty where the annotations say nothing.
    """

    def __init__(self, picture, region, draw):
        self.picture, self.region, self.draw = picture, region, draw
        self.counts = counts(picture.of_kind("object"))
        self.known = [name for name, number in self.counts.items() if number != SEVERAL]

    def of_plan(self, plan):
        """The rounds of a self_instruct.Plan, in their order."""
        seen, described = self.seen(), self.description()
        first = described or self.names()
        if plan.name == "region":
            return self.marked()
        if plan.name == "negative":
            denied = self.absent()[:2] + self.wrong_number()[:1]
            return (first + self._shuffled(denied + seen[:1])) if denied else []
        if plan.name == "knowledge":
            told = self.knowledge()[:2]
            return (first + told + seen[:1]) if told else []
        rounds = first + (self.names() if described else []) + seen
        if not plan.rounds:
            return rounds[:4]
        rounds += self.absent()[: max(0, plan.rounds - len(rounds))]
        return rounds[: plan.rounds + 1] if len(rounds) >= plan.rounds else []

    def description(self):
        """What the captions say, one or two of them."""
        told = [_sentence(one.value) for one in self._shuffled(self.picture.of_kind("caption"))]
        return [(self._ask("describe"), " ".join(told[: self.draw.choice((1, 2))]))] if told else []

    def names(self):
        """All categories with their numbers."""
        return [(self._ask("name all"), listed(self.counts))] if self.counts else []

    def seen(self):
        """Number, place, side and attributes of objects, what can be read, and the annotated questions."""
        picture, known = self.picture, self.known
        found = [(self._ask("how many", plural(name)), f"There {_are(name, self.counts[name])}.") for name in known]
        single = [one for one in picture.of_kind("object") if self.counts[one.value] == 1]
        placed = [one for one in single if one.value not in ALWAYS_SEVERAL]
        found += [(self._ask("where", one.value), f"The {one.value} is {place_of(one.box)}.") for one in placed]
        pairs = [(one, other) for one in placed for other in single if one is not other]
        for one, other in self._shuffled(pairs)[:2]:
            apart = middle(one.box)[0] - middle(other.box)[0]
            asked, truth = self.draw.choice(("left", "right")), "left" if apart < 0 else "right"
            if abs(apart) > CLOSE:
                yes, no = f"Yes, it is on the {truth}.", f"No, it is to the {truth} of the {other.value}."
                words = f"Is the {one.value} to the {asked} of the {other.value}?"
                found.append((words, yes if asked == truth else no))
        told = [(one.value, " and ".join(note.value for note in picture.attributes(one))) for one in single]
        found += [(f"What is the {name} like?", f"It is {words}.") for name, words in told if words]
        if words := ", ".join(f'"{one.value}"' for one in picture.of_kind("ocr")):
            found.append(("What can be read in the picture?", f"The characters {words} can be read."))
        found += [(_capital(question(one)), _sentence(one.value)) for one in picture.of_kind("vqa")]
        return self._shuffled(found)

    def absent(self):
        """Categories that are neither annotated nor spoken of; of people, captions speak in too many words."""
        if not self.counts:  # where nobody noted objects, none is known to be absent
            return []
        told = " ".join(one.value + " " + one.question for one in self.picture.annotations).lower()
        known = {*self.counts, *ALWAYS_SEVERAL, "person"}
        names = [name for name in GROUP_OF if name not in known and not any(
            part in told for part in (name.split()[-1], plural(name), *OTHER_NAMES.get(name, ())))]  # fmt: skip
        return [(self._ask("absent", one_of(name)), f"No, there is no {name} in the picture.")
                for name in self._shuffled(names)]  # fmt: skip

    def wrong_number(self):
        """A wrong number, put right."""
        wrong = [(name, self.counts[name] + self.draw.choice((1, 2))) for name in self._shuffled(self.known)]
        return [(f"Are there {counted(name, number)}?", f"No, there {_are(name, self.counts[name])}.")
                for name, number in wrong if number < len(NUMBERS)]  # fmt: skip

    def knowledge(self):
        """What the categories in the picture are for."""
        names = [name for name in self._shuffled(list(self.counts)) if name in USES]
        return [(self._ask("knowledge", plural(name)), _use(name)) for name in names]

    def marked(self):
        """About the marked object alone."""
        region, name = self.region, self.region.value
        first = self._ask("marked"), f"The box marks {named_region(self.picture, region)}."
        rounds = [("Where is the marked region?", f"It is {place_of(region.box)}.")]
        if region.kind == "object":
            number = self.counts.get(name)
            if number == 1:
                rounds.append((f"Is there another {name} besides the marked one?", "No, it is the only one."))
            elif number != SEVERAL:
                answer = f"Besides the marked one there {_are(name, number - 1)}."
                rounds.append(("How many more of the marked kind are there?", answer))
            other = self.draw.choice([other for other in GROUP_OF if other not in self.counts])
            rounds.append((f"Is {one_of(other)} in the box?", f"No, the box marks {one_of(name)}."))
            if name in USES:
                rounds.append((f"Can you tell me more about the marked {name}?", _use(name)))
        return [first, *self._shuffled(rounds)]

    def _ask(self, kind, *words):
        return self.draw.choice(ASKED[kind]).format(*words)

    def _shuffled(self, several):
        return self.draw.sample(several, len(several))


def place_of(box):
    """Where a box lies: "in the middle of the picture", "at the top left". By the thirds in which its centre falls."""
    thirds = [sum(side > edge for edge in (1 / 3, 2 / 3)) for side in middle(box)]
    place = " ".join(filter(None, (("top", "", "bottom")[thirds[1]], ("left", "", "right")[thirds[0]])))
    return f"at the {place} of the picture" if place else "in the middle of the picture"


def _are(name, number):
    return f"{'is' if number == 1 else 'are'} {counted(name, number)}"


def _use(name):
    """What a category is for, as a sentence: str."""
    return f"{_capital(one_of(name))} {'are' if name in ALWAYS_SEVERAL else 'is'} {USES[name]}."


def _sentence(words):
    """An annotation as a sentence: capital letter, full stop."""
    return stopped(_capital(words.strip()))


def _capital(words):
    return words[0].upper() + words[1:]
