"""What is looked at while a stage trains, beside the training itself: movement, spikes, held-out records, curves.

Nothing in here changes a weight or draws a random number that training would draw.

    part             gradient   moved
    bridge            0.8123    12.41%      |g| of the part's gradient; |w - w0| / |w0|, w0 = weights at the beginning
    language_model    frozen     0.00%

A spike is a loss far above the last ones: more than SPIKE times their usual distance from their median. It is only
written down; what to do about it (a smaller rate, other data) is for people to decide.
"""

import contextlib
import math
import statistics
import time
from collections import deque
from itertools import zip_longest

import torch

from nanovlm.data.batching import Report
from nanovlm.generation.answer import make_prompt, reply
from nanovlm.generation.chat import Assistant
from nanovlm.generation.prefill import Workspace
from nanovlm.generation.sampler import Decoding
from nanovlm.training import checkpoint
from nanovlm.training.cost import make_meter, peak_flops
from nanovlm.training.language_loss import language_loss
from nanovlm.training.progress import plot_curves, readable, say
from nanovlm.training.stages import unsharded
from nanovlm.training.update import held_out_limit, holds_out, make_batch, place_of, reading, total_norm

SAMPLE = 4096  # numbers of a tensor that stand for all, evenly spaced: a copy of all weights would double their memory
WINDOW, FEWEST = 50, 20  # losses that a new one is compared with, at most and at least
SPIKE = 8.0  # times the median distance of the last losses from their median
LOOKED_AT = 3200  # records of a source that are searched for held-out ones
KEPT = 16  # held-out records of a source that are asked
LONGEST = 60  # characters of a sentence that are shown
ANSWER = 32  # tokens of an answer to a held-out record, at most
CURVES = 60.0  # seconds between two drawings of curves.png at least, and 100 times as long as a drawing takes


def sample(tensor):
    """At most SAMPLE evenly spaced numbers of a tensor, sharded or not, as a copy on the CPU: float32[S]."""
    flat = unsharded(tensor).detach().reshape(-1)
    return flat[:: -(-flat.numel() // SAMPLE)].float().cpu().clone()


class Movement:
    """Remembers where the parts that train began. parts: dict part -> dict name -> Parameter. stage: Stage."""

    def __init__(self, parts, stage):
        self.names = {part: list(parts[part]) for part in stage.learning_rates if parts[part]}
        self.start = {name: sample(parts[part][name]) for part in self.names for name in self.names[part]}

    def measure(self, parts):
        """How far each part has come: dict part -> |w - w0| / |w0|. parts: as at the beginning, of today's model."""
        found = {}
        for part, names in self.names.items():
            moved = length = 0.0
            for name in names:
                before, weight = self.start[name], parts[part][name].numel() / self.start[name].numel()
                moved += weight * (sample(parts[part][name]) - before).square().sum().item()
                length += weight * before.square().sum().item()
            found[part] = (moved / length) ** 0.5 if length else float(moved > 0)  # what began at zero is all new
        return found


def spike_limit(losses):
    """What a loss exceeds if it is a spike after these, list of float; infinity for too few of them."""
    if len(losses) < FEWEST:
        return math.inf
    middle = statistics.median(losses)
    return middle + SPIKE * statistics.median(abs(one - middle) for one in losses)


def held_out(source, use=lambda record: None):
    """The held-out records of a source, at most KEPT of the first LOOKED_AT: list. use: fails for damaged ones."""
    found, limit = [], held_out_limit(source)
    for n in range(min(len(source), LOOKED_AT)):
        with contextlib.suppress(ValueError, OSError):  # the training names it
            record = source.record(n)
            if place_of(record) < limit:
                use(record)
                found.append(record)
        if len(found) == KEPT:
            break
    return found


def held_out_losses(run, stage, records):
    """Loss of held-out records, source -> list of Record, in nats per trained token: dict source -> float."""
    found, size = {}, stage.micro_batch_size or 4
    for name, own in records.items():
        total = count = 0
        for start in range(0, len(own), size):
            batch = make_batch(run, stage, own[start : start + size], Report())
            loss, trained = language_loss(run.model, batch.to(run.device), run.share_prefix)
            total, count = total + loss.item(), count + trained
        if count:
            found[name] = total / count
    return found


def held_out_answers(run, stage, records):
    """The model's words for held-out records' last answers: (list of str, how many are right word by word)."""
    assistant = Assistant(run.model, run.tokenizer, run.template_of(stage), stage.image_size, stage.image_fit,
                          run.recipe.preprocessing, stage.tiles)  # fmt: skip
    talks = [record.conversations[0] for record in records]
    asked = [turns[:-1] if turns[-1].role == "assistant" else turns for turns in talks]
    prompts = [make_prompt(assistant, turns, one.visuals, ANSWER) for turns, one in zip(asked, records)]
    found = reply(assistant, prompts, Decoding(ANSWER), workspace=Workspace(share=run.share_prefix))
    lines, right = [], 0
    for record, turns, said, truth in zip(records, asked, found, [turns[-1].text for turns in talks]):
        right += said.lower().split() == truth.lower().split()
        question, said, truth = (readable(text, LONGEST) for text in (turns[-1].text if turns else "", said, truth))
        lines.append(f"{record.id}: {question} -> {said} (right: {truth})")
    return lines, right


class Watch:
    """Watches one stage. trainer: trainer.Trainer, at the stage's beginning."""

    def __init__(self, trainer):
        self.trainer, self.run, self.stage = trainer, trainer.run, trainer.stage
        self.movement = Movement(self.run.parts(), self.stage)
        device, self.share_of_peak = self.run.device, None  # on a CPU, or of a GPU that is not known
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if peak and self.stage.objective == "language":
            self.share_of_peak = make_meter(self.run.model, self.stage, self.run.processes.size * peak)
        self.losses = deque((entry["loss"] for entry in self.entries("loss")), WINDOW)
        self.records = None  # source -> held-out records, found when first asked
        self.next_curves = time.monotonic() + CURVES

    def entries(self, key):
        """The log's lines of this stage so far that have a key: list of dict."""
        return [entry for entry in self.trainer.log.read() if entry["stage"] == self.stage.name and key in entry]

    def step(self, records, loss, tokens, seconds):
        """What the log says of a step beside its numbers: {"utilisation", "spike"}; tokens: of all processes."""
        found, limit, number = {}, spike_limit(self.losses), self.run.processes.size
        if self.share_of_peak:
            pictures = sum(len(visual.frames) for record in records for visual in record.visuals)
            share = self.share_of_peak(number * pictures, number * len(records), tokens, seconds)
            found["utilisation"] = round(share, 4)
        if loss > limit:
            found["spike"] = round(limit, 4)
            where = f"stage {self.stage.name}, step {self.trainer.stage_step}"
            say(f"{where}: the loss jumped to {loss:.4f}, above {limit:.4f}")
        self.losses.append(loss)
        return found

    def after_step(self, norm):
        """What is due now and then. norm: of the whole gradient before clipping; None = no step was taken."""
        trainer, recipe = self.trainer, self.run.recipe
        if trainer.step % recipe.exam_every == 0 or trainer.stage_step == self.stage.steps:
            if norm is not None:
                self.measure_movement(norm)
            self.ask()
        if self.run.processes.main and time.monotonic() >= self.next_curves:
            self.draw()

    def measure_movement(self, norm):
        """Log each part's gradient, as it was before clipping, and movement."""
        clip, parts, found = self.stage.clip, self.run.parts(), {}
        clipped = min(1.0, clip / norm) if clip and norm else 1.0
        for part, moved in self.movement.measure(parts).items():
            gradients = [one.grad for one in parts[part].values() if one.grad is not None]
            gradient = total_norm(gradients).item() / clipped if gradients else 0.0
            found[part] = {"gradient": round(gradient, 6), "moved": round(moved, 6)}
        self.trainer.note(parts=found)

    def ask(self):
        """Log the loss of held-out records, and how many of their answers are right; print a few."""
        if self.stage.objective != "language" or not any(holds_out(self.run, name) for name in self.stage.mixture):
            return
        with reading():
            losses, answers, right, asked = self.trainer.ask(self.held_out_now)
        if losses:
            self.trainer.note(held_out=losses, answers=answers, right=[right, asked])
            told = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            told = f"step {self.trainer.step}: held-out loss {told}; {right} of {asked} answers as in the file"
            say("\n  ".join([told, *answers]))

    def held_out_now(self, run):
        """(dict source -> loss, a few answers in words, how many of how many are right) of the model as it is."""
        stage = self.stage
        if self.records is None:
            use = lambda record: make_batch(run, stage, [record], Report())
            self.records = {name: held_out(run.sources[name], use) for name in stage.mixture if holds_out(run, name)}
            if not any(self.records.values()):
                say(f"stage {stage.name}: no record is held out; chosen by its id, one in 100 is, of five at least one")
        losses = held_out_losses(run, stage, self.records)
        asked = [record for records in zip_longest(*self.records.values()) for record in records if record][:KEPT]
        answers, right = held_out_answers(run, stage, asked)
        return {name: round(loss, 6) for name, loss in losses.items()}, answers[:3], right, len(asked)

    def draw(self):
        """Write curves.png anew, seldom enough to cost less than 1% of the time."""
        began, run = time.monotonic(), self.run
        entries = self.trainer.log.read()
        checkpoint.replace(run.out / "curves.png", lambda path: plot_curves(entries, path, run.args.seed))
        now = time.monotonic()
        self.next_curves = now + max(CURVES, 100 * (now - began))

    def table(self):
        """What has moved, with the middle one of its gradients, and held-out records before and after: list of str."""
        entries, lines = self.entries("parts"), [f"{'part':<18}{'gradient':>10}{'moved':>10}"]
        for part in (part for part, held in self.run.parts().items() if held):
            seen = [entry["parts"][part] for entry in entries if part in entry["parts"]]
            gradient = f"{statistics.median_high(one['gradient'] for one in seen):.4f}" if seen else "frozen"
            lines.append(f"{part:<18}{gradient:>10}{seen[-1]['moved'] if seen else 0:>10.2%}")
        if entries := self.entries("held_out"):
            first, last = entries[0], entries[-1]
            for name, loss in first["held_out"].items():
                lines.append(f"held out of {name}: loss {loss:.4f} → {last['held_out'][name]:.4f}")
            lines.append("answers as in the file: {} of {} → {} of {}".format(*first["right"], *last["right"]))
        return lines
