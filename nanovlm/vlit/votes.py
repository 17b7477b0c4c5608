"""Whether responses are right, by a judge that is asked several times: the majority decides.

The review's way (Sec. 4.2.3): LLaVA-1.5 and examples written by hand there, any generator of generators.py here.
"""

from nanovlm.evaluation.protocols import parse_verdict
from nanovlm.vlit.generators import Chat

JUDGED = (
    "You check training data for a model that answers questions about pictures. Is the answer right for the picture and "
    "the question? Answer with Yes or No.\n"
    'Question: "How many dogs are there?" Answer: "There are two dogs." (the picture shows two dogs) Yes\n'
    'Question: "What color is the bus?" Answer: "The bus is green." (the picture shows a red bus) No\n'
    'Question: "Is there a cat?" Answer: "No, a cat cannot be seen." (the picture shows no cat) Yes\n'
    '{told}Question: "{instruction}" Answer: "{response}"'
)


def judge_chat(instruction, response, image="", told=""):
    """What a judge is asked: Chat. told: a description, for judges that see no pictures."""
    told = f"About the picture: {told}\n" if told else ""
    return Chat((("user", JUDGED.format(instruction=instruction, response=response, told=told)),), image=image)


def vote(judge, chats, votes=5, temperature=0.8, seed=0):
    """Repeated judgement.

    Args:
      judge: generator as in generators.py. chats: list of Chat of `judge_chat`. votes: odd number of answers drawn
        each.
    Returns: per chat (right: True, False, or None where the readable votes tie or are none; share of the readable votes
      that agree with the majority; number of unreadable votes).
    Raises: ValueError for an even number of votes, which can tie.
    """
    if votes < 1 or votes % 2 == 0:
        raise ValueError(f"{votes} votes can tie; use an odd number")
    replies = judge.generate(chats, n=votes, temperature=temperature, max_tokens=8, seed=seed, stop=())
    found = []
    for several in replies:
        verdicts = [verdict for text in several if (verdict := parse_verdict(text)) is not None]
        yes = sum(verdicts)
        no = len(verdicts) - yes
        found.append((yes > no if yes != no else None, max(yes, no) / max(1, yes + no), len(several) - len(verdicts)))
    return found
