"""Records that a run never trains on: their loss per source, and a few answers, while it trains.

Whether a record is held out is a function of its id alone, one in EVERY of them, in every run and every epoch. Training
takes the next record of the source instead, as for a damaged one.
"""

import zlib

import torch

from nanovlm.data.batching import Report, build_batch, pixels_of, prompt_row
from nanovlm.data.templates import end_ids
from nanovlm.sampler import Decoding, generate

EVERY = 100
LOOKED_AT = 3200  # records of a source that are searched for held-out ones
KEPT = 16  # held-out records of a source that are asked
IN_A_ROW = 1000  # held-out ones behind one another: then the ids are all the same
LONGEST = 60  # characters of a sentence that are shown


def is_held_out(record):
    """Whether a record is never trained on."""
    return zlib.crc32(record.id.encode()) % EVERY == 0


def next_to_train(source, n):
    """Record n of a source, or the next that is not held out. Raises: ValueError if there is none."""
    for place in range(n, n + IN_A_ROW):
        record = source.record(place)
        if not is_held_out(record):
            return record
    raise ValueError(f"{source.name}: {IN_A_ROW} held-out records behind record {n}; records need ids of their own")


def held_out(source):
    """The held-out records of a source, at most KEPT of the first LOOKED_AT: list of Record; damaged ones are passed over."""
    found = []
    for n in range(min(len(source), LOOKED_AT)):
        try:
            record = source.record(n)
        except (ValueError, OSError):
            continue  # the training names it
        if is_held_out(record):
            found.append(record)
        if len(found) == KEPT:
            break
    return found


@torch.no_grad()
def losses(run, stage, records):
    """Loss of held-out records, in nats per trained token.

    Args: run: run.Run. stage: Stage. records: dict source -> list of Record.
    Returns: dict source -> float, of those that hold a record.
    """
    found = {}
    for name, own in records.items():
        total = count = 0
        for start in range(0, len(own), stage.micro_batch_size or 4):
            chosen = own[start : start + (stage.micro_batch_size or 4)]
            batch = build_batch(chosen, run.template_of(stage), run.tokenizer, run.model.num_image_tokens, stage.image_size,
                                stage.image_fit, stage.max_tokens, Report(), preprocessing=run.preprocessing)
            loss, trained = run.model.loss(batch.to(run.device))
            total, count = total + loss.item(), count + trained
        if count:
            found[name] = total / count
    return found


def answers(run, stage, records, max_new_tokens=32):
    """The model's words where a held-out record has its last answer.

    Args: run: run.Run. stage: Stage. records: list of Record.
    Returns: list of str, "id: question -> answer (right: truth)".
    """
    template, lines = run.template_of(stage), []
    for record in records:
        turns = record.conversations[0]
        asked = turns[:-1] if turns[-1].role == "assistant" else turns
        counts = [run.model.num_image_tokens(stage.image_size, len(visual.frames)) for visual in record.visuals]
        row = prompt_row(asked, template, run.tokenizer, counts, run.model.decoder.config.context_length - max_new_tokens)
        pixels = [pixels_of([visual], stage.image_size, stage.image_fit, run.preprocessing) for visual in record.visuals]
        shown = [pixels[image[0]].to(run.device) for image in row.images]
        decoding = Decoding(max_new_tokens=max_new_tokens, eos_ids=end_ids(template, run.tokenizer))
        said = run.tokenizer.decode(generate(run.model, [row.ids], decoding, [shown])[0])
        question, truth = asked[-1].text if asked else "", turns[-1].text
        lines.append(f"{record.id}: {short(question)} -> {short(said)} (right: {short(truth)})")
    return lines


def short(text):
    """One line of a text, cut where it is long."""
    text = " ".join("".join(one if one.isprintable() else " " for one in text).split()) or "(nothing)"
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
