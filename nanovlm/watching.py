"""What is looked at while a stage trains, beside the training itself: held-out records, movement, spikes, curves.

Nothing in here changes a weight or draws a random number that training would draw.
"""

import time

from nanovlm import checkpoint, held_out
from nanovlm.guards import Spikes
from nanovlm.movement import Movement, gradient_norms, movement_table
from nanovlm.progress import plot_curves, say
from nanovlm.update import total_norm
from nanovlm.utilisation import make_meter

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
            self.records = {name: held_out.held_out(self.run.sources[name]) for name in self.stage.mixture}
            if not any(self.records.values()):
                say(f"stage {self.stage.name}: no record is held out; one in {held_out.EVERY} is, chosen by its id")
        losses = held_out.losses(self.run, self.stage, self.records)
        shown = [records[0] for records in self.records.values() if records][:3]
        return {name: round(loss, 6) for name, loss in losses.items()}, held_out.answers(self.run, self.stage, shown)

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
