"""What the tests of instruction data share: pictures, items, files of them, the commands, and a generator that obeys."""

import io
import json
from pathlib import Path

from PIL import Image

from nanovlm.vlit import __main__ as command_line

GOLDEN = Path(__file__).parent / "golden" / "vlit"
PHOTOS = sorted(map(str, GOLDEN.glob("*_photos.json")))


def png(shade, size=(3, 2)):
    """A PNG file of one colour: bytes."""
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(file, "png")
    return file.getvalue()


def asked(question, answer="a"):
    """LLaVA's turns of a question and its answer."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def item(id, *said, roles=("human", "gpt"), **more):
    """LLaVA's item of a conversation; more: image and other fields."""
    turns = [{"from": roles[place % len(roles)], "value": text} for place, text in enumerate(said)]
    return {"id": id} | {key: value for key, value in more.items() if key == "image"} | {"conversations": turns} | more


def write_lines(path, values):
    """JSON lines; a str among the values is a line as it is. Returns: path."""
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in values))
    return path


def lines(path):
    """The values of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def vlit(*arguments, code=0):
    """Run `python -m nanovlm.vlit`, which must end with a code."""
    assert command_line.main(list(map(str, arguments))) == code


def notes(*names):
    """LLaVA's lines of boxes: two dogs on the picture NAME.png of each name."""
    dogs = [{"category": "dog", "bbox": [0, 0, 1, 1]}] * 2
    return [{"id": name, "image": f"{name}.png", "captions": [], "instances": dogs} for name in names]


class Says:
    """A generator whose answer is `reply(chat, n)`: a str for n equal texts, or a list. asked: list of Chat."""

    name, accepts_images, batch_size, workers = "judge", False, 4, 1

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def generate(self, chats, *, n, temperature, max_tokens, seed, stop):
        self.asked += chats
        found = [self.reply(chat, n) for chat in chats]
        return [[one] * n if isinstance(one, str) else one[:n] for one in found]
