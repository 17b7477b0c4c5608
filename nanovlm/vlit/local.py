"""A model of this project as a generator: what train.py wrote, what `convert` wrote, or a published language model."""

import dataclasses
import zlib

import torch
from torch import nn

from nanovlm.data.batching import pixels_of, prompt_row
from nanovlm.data.records import Turn, Visual
from nanovlm.data.templates import end_ids
from nanovlm.decoder import Decoder
from nanovlm.generation.sampler import Decoding, generate
from nanovlm.vlit.generators import Refused
from nanovlm.vlm import VLM


class NoBridge(nn.Module):
    """Stands where a language model by itself has no bridge."""

    def __init__(self, width):
        super().__init__()
        self.output_width = width


class Local:
    """A loaded model as a generator, see generators.py.

    The system message goes before the first user's words: templates here have no place for one.

    Args:
      loaded: recipes.Loaded with a VLM or a bare Decoder. name: str for provenance. batch_size: chats at once.
    Raises: ValueError for a model that writes no text.
    """

    workers = 1

    def __init__(self, loaded, name, batch_size=4):
        model = loaded.model
        if isinstance(model, Decoder):
            model = VLM(None, NoBridge(model.config.width), model)
        if not isinstance(model, VLM):
            raise ValueError(f"{name}: a {type(model).__name__} writes no text; give the folder of a language model")
        self.loaded, self.model, self.name, self.batch_size = loaded, model, f"local {name}", batch_size
        self.accepts_images = model.vision is not None

    def generate(self, chats, *, n=1, temperature=0.0, max_tokens=1024, seed=0, stop=()):
        """As every generator; temperature 0 = greedy, the same text n times. Raises: Refused for a prompt that is too long."""
        draws = n if temperature else 1
        rows, inputs, generators = [], [], []
        for chat in chats:
            ids, pixels = self._prompt(chat, max_tokens)
            rows += [ids] * draws
            inputs += [pixels] * draws
            device = self.model.decoder.embedding.weight.device
            for draft in range(draws):  # a text depends on its own chat and number, not on the batch
                number = zlib.crc32(f"{seed}/{chat.sha}/{draft}".encode())
                generators.append(torch.Generator(device).manual_seed(number))
        decoding = Decoding(max_new_tokens=max_tokens, eos_ids=end_ids(self.loaded.template, self.loaded.tokenizer))
        if temperature:
            decoding = dataclasses.replace(decoding, do_sample=True, temperature=temperature)
        found = generate(self.model, rows, decoding, inputs, generators if temperature else None)
        texts = [self._text(ids, stop) for ids in found]
        return [texts[place * draws : (place + 1) * draws] * (n // draws) for place in range(len(chats))]

    def _prompt(self, chat, max_tokens):
        """(ids, visual inputs) of a chat; its picture stands before the last message."""
        loaded, config = self.loaded, self.model.decoder.config
        system = "".join(text + "\n" for role, text in chat.messages if role == "system")
        turns, shown = [], ()
        for place, (role, text) in enumerate(one for one in chat.messages if one[0] != "system"):
            turns.append(Turn(role, (system + text if place == 0 else text,)))
        if self.accepts_images and chat.image:
            visual = Visual(chat.image, (chat.image,))
            shown = (pixels_of([visual], loaded.image_size, loaded.image_fit, loaded.preprocessing),)
            turns[-1] = Turn("user", (0, *turns[-1].parts))
        counts = [self.model.num_image_tokens(loaded.image_size, len(pixels)) for pixels in shown]
        try:
            row = prompt_row(turns, loaded.template, loaded.tokenizer, counts, config.context_length - max_tokens)
        except ValueError as error:
            raise Refused(str(error)) from error
        return row.ids, list(shown)

    def _text(self, ids, stop):
        """New ids as text, up to the first of the stopping words."""
        text = self.loaded.tokenizer.decode(ids).removesuffix(self.loaded.template.answer_suffix)
        places = [place for place in map(text.find, stop) if place >= 0]
        return text[: min(places, default=len(text))].strip()
