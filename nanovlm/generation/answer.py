"""A question becomes an answer: turns and pictures become a row, the row is continued, its new ids become text.

Everything that puts questions to a model does it here: the chat, the benchmarks, the questions during training.
"""

import dataclasses
import zlib
from dataclasses import dataclass

import torch

from nanovlm.data import templates, tiles
from nanovlm.data.batching import pixels_of
from nanovlm.data.templates import Row
from nanovlm.generation import sampler
from nanovlm.vlm import VLM

DESCRIBE = "describe the image."  # asked first where the answer is given in the history of a description


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it. visual_inputs: float32[f, 3, S, S] each, in the order of row.images."""

    row: Row
    visual_inputs: list[torch.Tensor]


class PromptTooLong(ValueError):
    """A conversation for which the context has no room."""


def check_speaks(model):
    """Raise ValueError for a vision tower, which is not asked anything."""
    if not isinstance(model, VLM):
        raise ValueError(f"a {type(model).__name__} alone writes no text; give the folder of a language model")


def make_prompt(assistant, turns, visuals, max_new_tokens, pixels=None):
    """Write a conversation up to where the assistant speaks.

    Args:
      assistant: chat.Assistant.
      turns: list of Turn, any history and the user's last. visuals: list of records.Visual that they mention by number.
      max_new_tokens: room for the answer.
      pixels: dict Visual.key -> float32[f, 3, S, S], and (Visual.key, "ids") -> its ids in the row, filled here; of
        prompts that share one, a picture is read and encoded once.
    Returns: Prompt.
    Raises: PromptTooLong; ValueError if the turns are out of order, or for pictures without a tower; what reading a
      picture raises.
    """
    check_speaks(assistant.model)
    model, size, pixels = assistant.model, assistant.image_size, {} if pixels is None else pixels
    for visual in (visual for visual in visuals if visual.key not in pixels):
        seen = tiles.cut(visual, size, assistant.tiles)
        count = model.num_image_tokens(size, len(seen.frames))
        pixels[visual.key, "ids"] = templates.picture_ids(seen, assistant.template, assistant.tokenizer, count)
        pixels[visual.key] = pixels_of([seen], size, assistant.image_fit, assistant.preprocessing)
    pictures = [pixels[visual.key, "ids"] for visual in visuals]
    row = templates.write(templates.prompt(turns, assistant.template), assistant.tokenizer, pictures)
    context = model.decoder.config.context_length
    if len(row.ids) + max_new_tokens > context:
        raise PromptTooLong(f"the prompt has {len(row.ids)} tokens and the answer up to {max_new_tokens}, the context "
                            f"has {context}: ask less, drop earlier turns or pictures, or lower max_new_tokens")
    return Prompt(row, [pixels[visuals[place].key] for place, _, _ in row.images])


def reply(assistant, prompts, decoding, seeds=None, stop=(), batch_size=None, workspace=None):
    """Answer prompts: list of str, as `clean` leaves them. Without sampling, equal prompts run once, short ones first.

    Args:
      assistant: chat.Assistant. prompts: list of Prompt.
      decoding: sampler.Decoding of one sequence; without eos_ids, what ends a reply in this form does.
      seeds: list of str, one per prompt, each of which alone decides its random numbers; None = torch's generator.
      stop: words before which an answer ends. batch_size, workspace: as in sampler.generate.
    """
    model, generators = assistant.model, None
    if decoding.do_sample:
        keys, runs = range(len(prompts)), dict(enumerate(prompts))
        if seeds is not None:
            device, numbers = model.decoder.embedding.weight.device, [zlib.crc32(seed.encode()) for seed in seeds]
            generators = [torch.Generator(device).manual_seed(number) for number in numbers]
    else:
        keys = [(tuple(prompt.row.ids), tuple(map(id, prompt.visual_inputs))) for prompt in prompts]
        runs = dict(sorted(dict(zip(keys, prompts)).items(), key=lambda run: len(run[1].row.ids)))
    ids, inputs = [run.row.ids for run in runs.values()], [run.visual_inputs for run in runs.values()]
    found = sampler.generate(model, ids, with_end(assistant, decoding), inputs, generators, batch_size, workspace)
    texts = {key: clean(assistant.tokenizer.decode(new), assistant.template, stop) for key, new in zip(runs, found)}
    return [texts[key] for key in keys]


def stream(assistant, prompt, decoding, said, generator=None, workspace=None):
    """Answer one prompt as it is made; args as of `reply` and sampler.stream. said: list that receives the new ids.

    Returns: iterator of str, pieces that are never empty; together what `clean` leaves of the whole.
    """
    model, decoding, inputs = assistant.model, with_end(assistant, decoding), prompt.visual_inputs
    if decoding.num_beams > 1:
        (ids,) = sampler.generate(model, [prompt.row.ids], decoding, [inputs], generator, workspace=workspace)
    else:
        ids = sampler.stream(model, prompt.row.ids, decoding, inputs, generator, workspace)
    return pieces(decoded(ids, assistant.tokenizer.stream(), said), assistant.template)


def with_end(assistant, decoding):
    """A decoding that stops where a reply of this template ends, unless it says itself where."""
    if decoding.eos_ids:
        return decoding
    return dataclasses.replace(decoding, eos_ids=templates.end_ids(assistant.template, assistant.tokenizer))


def clean(text, template, stop=()):
    """The answer in a model's text: without the template's suffix, what follows a stop word, the prefix, blanks."""
    text = text.removesuffix(template.answer_suffix)
    text = text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]
    return text.removeprefix(template.answer_prefix).strip()


def decoded(ids, decoder, said):
    """Text of ids as they come, which are also appended to `said`."""
    for token in ids:
        said.append(token)
        yield decoder.push(token)
    yield decoder.finish()


def pieces(texts, template):
    """What `clean` makes of the joined texts, piece by piece; what may be the prefix or the suffix waits."""
    whole, given, suffix = "", 0, template.answer_suffix
    for text in texts:
        whole += text
        waits = next((n for n in range(len(suffix), 0, -1) if whole.endswith(suffix[:n])), 0)
        sure = whole[: len(whole) - waits]
        answer = "" if template.answer_prefix.startswith(sure) else clean(sure, template)
        if answer[given:]:
            yield answer[given:]
            given = len(answer)
    if rest := clean(whole, template)[given:]:
        yield rest
