"""What is looked at while a stage trains, beside the training itself: held-out records, movement, spikes, curves.

Nothing in here changes a weight or draws a random number that training would draw.
"""

import time
import zlib

import torch
from torch.distributed.tensor import DTensor

from nanovlm.data.batching import build_batch, Report
from nanovlm.generation.answer import Assistant, make_prompt, reply
from nanovlm.generation.prefill import Workspace
from nanovlm.generation.sampler import Decoding
from nanovlm.training import checkpoint
from nanovlm.training.cost import make_meter
from nanovlm.training.linear_cross_entropy import language_loss
from nanovlm.training.progress import plot_curves, say
from nanovlm.training.update import Spikes, total_norm


# What moves while a stage trains: each part's share of the gradient, and how far its weights have come.
#
#     part             gradient   moved
#     bridge            0.8123    12.41%      |g| of the part's gradient; |w - w0| / |w0|, w0 = weights when the stage began
#     language_model    frozen     0.00%
#
# A copy of all weights would double their memory, so at most SAMPLE evenly spaced numbers of every tensor are kept and
# compared; small tensors are compared whole.


SAMPLE = 4096  # numbers of a tensor


def sample(tensor):
    """At most SAMPLE evenly spaced numbers of a tensor, sharded or not, as a copy on the CPU: float32[S]."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    flat = tensor.detach().reshape(-1)
    return flat[:: -(-flat.numel() // SAMPLE)].float().cpu().clone()


class Movement:
    """Remembers where the parts that train began.

    Args: parts: dict part -> dict name -> Parameter. stage: Stage.
    """

    def __init__(self, parts, stage):
        self.names = {part: list(parts[part]) for part in stage.learning_rates if parts[part]}
        self.start = {name: sample(parts[part][name]) for part in self.names for name in self.names[part]}

    def measure(self, parts):
        """How far each part has come: dict part -> |w - w0| / |w0|. parts: as at the beginning, of the present model."""
        found = {}
        for part, names in self.names.items():
            moved = length = 0.0
            for name in names:
                before, weight = self.start[name], parts[part][name].numel() / self.start[name].numel()
                moved += weight * (sample(parts[part][name]) - before).square().sum().item()
                length += weight * before.square().sum().item()
            found[part] = (moved / length) ** 0.5 if length else float(moved > 0)  # what began at zero: all of it is new
        return found


def gradient_norms(parts, stage, norm_of, factor=1.0):
    """The norm of each part's gradient as it stands in the parameters: dict part -> float; 0 where nothing was reached.

    Args:
      norm_of: function(list of Tensor) -> float[], their common norm (update.total_norm).
      factor: float, what clipping has shortened the gradient to.
    """
    found = {}
    for part in stage.learning_rates:
        gradients = [parameter.grad for parameter in parts[part].values() if parameter.grad is not None]
        found[part] = norm_of(gradients).item() / factor if gradients else 0.0
    return found


def movement_table(entries, parts):
    """The table at the end of a stage.

    Args:
      entries: list of dict, the log's lines of this stage that have "parts": part -> {"gradient", "moved"}.
      parts: all parts of the model that hold a parameter, by name.
    Returns: list of str, lines; gradients are the middle one of those that were logged.
    """
    lines = [f"{'part':<18}{'gradient':>10}{'moved':>10}"]
    for part in parts:
        seen = [entry["parts"][part] for entry in entries if part in entry["parts"]]
        if not seen:
            lines.append(f"{part:<18}{'frozen':>10}{0:>10.2%}")
            continue
        gradients = sorted(one["gradient"] for one in seen)
        lines.append(f"{part:<18}{gradients[len(gradients) // 2]:>10.4f}{seen[-1]['moved']:>10.2%}")
    return lines


# Records that a run never trains on: their loss per source, and a few answers, while it trains.
#
# Whether a record is held out is a function of its id alone, one in EVERY of them, in every run and every epoch. Training
# takes the next record of the source instead, as for a damaged one.


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
def held_out_losses(run, stage, records):
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
            loss, trained = language_loss(run.model, batch.to(run.device), run.share_prefix)
            total, count = total + loss.item(), count + trained
        if count:
            found[name] = total / count
    return found


def held_out_answers(run, stage, records, max_new_tokens=32):
    """The model's words where a held-out record has its last answer.

    Args: run: run.Run. stage: Stage. records: list of Record.
    Returns: list of str, "id: question -> answer (right: truth)".
    """
    assistant = Assistant(run.model, run.tokenizer, run.template_of(stage), stage.image_size, stage.image_fit, run.preprocessing)
    asked = [turns[:-1] if turns[-1].role == "assistant" else turns for turns in (one.conversations[0] for one in records)]
    prompts = [make_prompt(assistant, turns, one.visuals, max_new_tokens) for turns, one in zip(asked, records)]
    decoding, workspace = Decoding(max_new_tokens=max_new_tokens), Workspace(share=run.share_prefix)
    lines = []
    for record, turns, said in zip(records, asked, reply(assistant, prompts, decoding, workspace=workspace)):
        question, truth = turns[-1].text if turns else "", record.conversations[0][-1].text
        lines.append(f"{record.id}: {short(question)} -> {short(said)} (right: {short(truth)})")
    return lines


def short(text):
    """One line of a text, cut where it is long."""
    text = " ".join("".join(one if one.isprintable() else " " for one in text).split()) or "(nothing)"
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


CURVES = 60.0  # seconds between two drawings of curves.png at least, and 100 times as long as a drawing takes


class Watch:
    """Watches one stage.

    Args: trainer: trainer.Trainer, at the stage's beginning. stage: Stage.
    """

    def __init__(self, trainer, stage):
        self.trainer, self.run, self.stage, self.log = trainer, trainer.run, stage, trainer.log
        self.movement = Movement(self.run.parts(), stage)
        self.meter = make_meter(self.run.model, stage, self.run.device, self.run.processes.size)
        self.spikes = Spikes([entry["loss"] for entry in self.entries() if "loss" in entry])
        self.records = None  # source -> held-out records, found when first asked
        self.next_curves = time.monotonic() + CURVES

    def entries(self):
        """The log's lines of this stage so far: list of dict."""
        return [entry for entry in self.log.read() if entry["stage"] == self.stage.name]

    def utilisation(self, records, tokens, seconds):
        """Share of the GPUs' peak in a step: float, or None on a CPU. records: of this process; tokens: of all."""
        if self.meter is None:
            return None
        number = self.run.processes.size
        pictures = sum(len(visual.frames) for record in records for visual in record.visuals)
        return self.meter.share(number * pictures, number * len(records), tokens, seconds)

    def after_step(self, step, norm, is_last):
        """What is due now and then. step: of the run. norm: of the whole gradient before clipping; None = no step was taken."""
        if step % self.run.exam_every == 0 or is_last:
            if norm is not None:
                self.measure_movement(step, norm)
            if self.run.held_out and self.stage.objective == "language":
                self.ask(step)
        if self.run.processes.main and time.monotonic() >= self.next_curves:
            self.draw()

    def measure_movement(self, step, norm):
        """Log each part's gradient and movement."""
        clip, parts = self.stage.clip, self.run.parts()
        gradients = gradient_norms(parts, self.stage, total_norm, min(1.0, clip / norm) if clip and norm else 1.0)
        moved = self.movement.measure(parts)
        found = {part: {"gradient": round(gradients[part], 6), "moved": round(moved[part], 6)} for part in moved}
        self.log.write(stage=self.stage.name, step=step, parts=found)

    def ask(self, step):
        """Log the loss of held-out records and print a few answers."""
        with self.trainer.looking():
            found = self.run.processes.by_main(self.held_out_now)
        losses, answers = found
        if losses:
            self.log.write(stage=self.stage.name, step=step, held_out=losses, answers=answers)
            say("\n".join([f"step {step}: held-out loss {', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())}",
                           *(f"  {line}" for line in answers)]))

    def held_out_now(self):
        """(dict source -> loss, list of answers) of the model as it is."""
        if self.records is None:
            self.records = {name: held_out(self.run.sources[name]) for name in self.stage.mixture}
            if not any(self.records.values()):
                say(f"stage {self.stage.name}: no record is held out; one in {EVERY} is, chosen by its id")
        losses = held_out_losses(self.run, self.stage, self.records)
        shown = [records[0] for records in self.records.values() if records][:3]
        return {name: round(loss, 6) for name, loss in losses.items()}, held_out_answers(self.run, self.stage, shown)

    def draw(self):
        """Write curves.png anew, seldom enough to cost less than 1% of the time."""
        began = time.monotonic()
        checkpoint.replace(self.run.out / "curves.png", lambda path: plot_curves(self.log.read(), path, self.run.seed))
        now = time.monotonic()
        self.next_curves = now + max(CURVES, 100 * (now - began))

    def report(self):
        """The table of what has moved: list of str, lines."""
        parts = [part for part, parameters in self.run.parts().items() if parameters]
        return movement_table([entry for entry in self.entries() if "parts" in entry], parts)
