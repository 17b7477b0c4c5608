"""The training loop: stages one after the other, each a plain sequence of updates.

    for stage in stages: resize, freeze, make optimizers, measure
        for step in range(stage.steps): records -> gradient -> update -> log -> exam, checkpoint
        prove that nothing frozen moved, measure again

One process runs this loop, or a thousand do (parallel.py): each reads its share of the records, and the gradient is that
of all of them. What decides how the loop goes on is agreed upon.

A run that is killed at any moment and resumed gives the same losses and the same weights, bit for bit: everything
random comes from the seed and a position (record n of a source, torch's own random state), and the position is in
every checkpoint.
"""

import contextlib
import hashlib
import itertools
import string
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from nanovlm.data.augment import augmented
from nanovlm.data.batching import Report
from nanovlm.data.feed import DamageReport, Feed, Mixture
from nanovlm.data.records import Changed
from nanovlm.names import nearest
from nanovlm.training import checkpoint, optimizer
from nanovlm.training.checkpoint import Writer
from nanovlm.training.diagnostics import next_to_train, Watch
from nanovlm.training.processes import lay_out, text_side, whole
from nanovlm.training.progress import Bar, Log, measures_table, NoLog, plot_curves, say, Stopped
from nanovlm.training.stages import Stage
from nanovlm.training.update import gradient, MOST_SKIPPED, NotFinite, preparation, reading, step, TrainingError


# The stage that is training: what it is made of, and how all that is kept in a checkpoint.


@dataclass
class Later:
    """A source that begins at record `start`, so that a stage reads on where the stage before it stopped."""

    source: Any
    start: int

    def __len__(self):
        return len(self.source)

    def record(self, n):
        """Record start + n of the source."""
        return self.source.record(self.start + n)


@dataclass
class Current:
    """The stage that is training."""

    index: int  # among run.stages
    stage: Stage
    optimizers: list
    feed: Feed
    damage: DamageReport
    watch: Watch
    report: Report = field(default_factory=Report)  # rows cut to max_tokens
    frozen: dict = field(default_factory=dict)  # tensor name -> digest at the start of the stage
    step: int = 0  # updates of this stage that are done
    skipped: int = 0  # of them, the last ones, without a step, as the loss or gradient was not finite

    def tensors(self, run):
        """What a checkpoint keeps of it: dict file name -> dict name -> Tensor."""
        return {"model": run.model.state_dict(), "text_tower": text_side(run.contrastive),
                "optimizer": checkpoint.optimizer_tensors(self.optimizers), "movement": self.watch.movement.start}

    def state(self, run):
        """What else a checkpoint keeps of it: dict of JSON values. All processes call this."""
        return {"stage": self.index, "stage_step": self.step, "report": asdict(run.processes.sum_up(self.report)),
                "frozen": self.frozen, "skipped": self.skipped, "image_size": run.model.vision.image_size}

    def restore(self, run, folder, state):
        """Put what a checkpoint holds back in its place, in a stage that has just begun.

        Args:
          folder: Path of the checkpoint. state: dict of its state.json.
        """
        targets = self.tensors(run) | {"optimizer": checkpoint.optimizer_places(self.optimizers)}
        tensors = checkpoint.read_sharded(folder, targets, run.processes)
        checkpoint.copy_into(run.model.state_dict(), tensors["model"], "model.safetensors")
        checkpoint.copy_into(text_side(run.contrastive), tensors["text_tower"], "text_tower.safetensors")
        checkpoint.load_optimizer(self.optimizers, tensors["optimizer"])
        torch.set_rng_state(tensors["random"]["cpu"])
        if run.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random"]["cuda"], run.device)
        self.watch.movement.start = tensors["movement"]
        self.feed.load_state(state["feed"])
        self.report = Report(**state["report"]) if run.processes.main else Report()  # the others' counts are in it
        self.frozen, self.step, self.skipped = state["frozen"], state["stage_step"], state["skipped"]


def digests(tensors):
    """A fingerprint of the bytes of each tensor, sharded or not: dict name -> Tensor to dict name -> str."""
    def digest(tensor):
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return hashlib.sha256(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()).hexdigest()

    return {name: digest(tensor) for name, tensor in tensors.items()}


def random_state(device):
    """torch's random states: dict of uint8 Tensors, "cpu" and, on a GPU, "cuda"."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


POSITION = ("step", "starts", "measures", "answers")  # of a Trainer, in every checkpoint

class Trainer:
    """Trains a Run.

    Args:
      run: run.Run.
      stop: interrupts.StopRequests.
    """

    def __init__(self, run, stop):
        self.run = run
        self.processes = run.processes
        self.stop = stop
        self.log = Log(run.out / "log.jsonl", run.log) if run.processes.main else NoLog()
        self.writer = Writer(run.background)
        self.step = 0  # updates of the whole run that are done
        self.starts = dict.fromkeys(run.sources, 0)  # records that finished stages have read
        self.measures = {}  # stage name -> "before" | "after" -> measure -> share
        self.answers = []  # of the last exam
        self.seconds_before = 0.0  # in earlier processes of this run
        self.cpu_seconds_before = 0.0
        self.began = time.monotonic()

    def seconds(self):
        """Seconds of training so far, without the time between two processes."""
        return self.seconds_before + time.monotonic() - self.began

    def cpu_seconds(self):
        """CPU-seconds of all threads so far, which other work on the machine hardly changes."""
        return self.cpu_seconds_before + time.process_time()

    def train(self):
        """Train all stages, or what the last checkpoint leaves of them, and write the results.

        Raises: interrupts.Stopped on request, with a checkpoint written; TrainingError for bad data or numbers that are
          not finite, with a checkpoint of the last good step written; checkpoint.CheckpointError.
        """
        try:
            saved = self.last_checkpoint()
            first = saved[1]["stage"] if saved else 0
            for index in range(first, len(self.run.stages)):
                self.train_stage(self.begin(index, saved if index == first else None))
            self.finish()
        except Exception as error:
            if not self.processes.is_lost(error):  # or nobody would come to finish the checkpoint
                self.writer.wait()
            raise

    def last_checkpoint(self):
        """Take over the newest checkpoint's position in the run: (its folder, its state), or None at the beginning."""
        folders = self.processes.by_main(lambda: checkpoint.complete(self.run.out))
        if not folders:
            self.log.cut(0)
            return None
        state = checkpoint.read_state(folders[-1])
        changed = checkpoint.difference(state["identity"], self.run.identity)
        if changed:
            raise checkpoint.CheckpointError(f"{folders[-1]} belongs to another run: {changed}")
        vars(self).update({name: state[name] for name in POSITION})
        self.seconds_before, self.cpu_seconds_before = state["seconds"], state["cpu_seconds"]
        self.log.cut(state["log_bytes"])
        say(f"continuing after step {self.step}, in stage {self.run.stages[state['stage']].name}")
        if state["processes"] != self.processes.size:
            say(f"{state['processes']} processes wrote the checkpoint, {self.processes.size} go on: sums are taken in another "
                "order, so the last digits of losses and weights will differ")
        return folders[-1], state

    def begin(self, index, saved):
        """Make a stage ready: picture size, frozen parts, optimizers, data; then restore what was saved, if it was."""
        run, stage = self.run, self.run.stages[index]
        lay_out(run, stage)
        if stage.copy_vision_branch:
            run.model.copy_vision_branch()
        parts = run.parts()
        chosen = {name: Changed(run.sources[name], next_to_train) if run.held_out else run.sources[name] for name in stage.mixture}
        sources = {name: Later(augmented(source, stage.augmentation, run.seed), self.starts[name])
                   for name, source in chosen.items()}
        prepare = preparation(run, stage)
        damage = DamageReport(run.out / "damaged.jsonl", stage.name, self.step, run.max_damaged)
        feed = Feed(Mixture(sources, stage.mixture), prepare, stage.batch_size, stage.steps, stage.group, prepare.length, run.seed,
                    self.processes.rank, self.processes.size, run.workers)
        current = Current(index, stage, optimizer.build(parts, stage, torch.get_num_threads()), feed, damage, Watch(self, stage))
        if saved:
            current.restore(run, *saved)
        else:
            current.frozen = digests(run.frozen(stage))
        say(f"\nstage {stage.name}: {stage.steps} steps of {stage.batch_size} examples at {stage.image_size} pixels")
        say("\n".join(optimizer.table(parts, stage)))
        return current

    def train_stage(self, current):
        """The updates of a stage that are left, between two measurements."""
        stage = current.stage
        if current.step == 0:
            self.measure(stage, "before")
        bar = Bar(stage, current.step, self.processes.main)
        try:
            while current.step < stage.steps:
                self.one_step(current, bar)
        finally:
            bar.close()
            current.feed.close()
        now = digests(self.run.frozen(stage))
        moved = [name for name, digest in current.frozen.items() if now[name] != digest]
        if moved:
            raise TrainingError(f"stage {stage.name}: frozen tensors have moved: {', '.join(moved)}")
        say("\n".join([*current.watch.report(), f"stage {stage.name}: none of the {len(now)} frozen tensors has moved"]))
        report = self.processes.sum_up(current.report)
        if report.truncated_rows:
            say(f"stage {stage.name}: {report.truncated_rows:,} of {report.rows:,} rows were cut to "
                f"max_tokens {stage.max_tokens}, {report.truncated_tokens:,} tokens lost")
        self.measure(stage, "after")
        if current.damage.count:
            say(f"stage {stage.name}: {current.damage.count:,} damaged records were replaced by the next, see {current.damage.path}")
        for name, drawn in current.feed.state()["drawn"].items():
            self.starts[name] += drawn

    def read(self, current):
        """This process's share of the records of the next update: list of Record; what was damaged is written down."""
        with reading():
            records = self.processes.together(current.feed.next)
            damaged = sum(self.processes.gather(current.feed.damaged), [])
            if damaged:
                so_far = (current.step + 1) * current.stage.batch_size
                self.processes.by_main(lambda: current.damage.add(self.step + 1, damaged, so_far))
        return records

    def one_step(self, current, bar):
        """One update, its log line, and what is due after it: exam, checkpoint, stop."""
        run, stage, began = self.run, current.stage, time.monotonic()
        boundary = current.feed.state(), random_state(run.device)
        parameters = [p for one in current.optimizers for group in one.param_groups for p in group["params"]]
        try:
            records = self.read(current)
            loss, norm, tokens = gradient(run, stage, records, parameters, current.report)
            current.skipped = 0
        except Exception as error:
            if self.may_skip(current, error):
                loss, norm, tokens = None, None, 0
            else:
                if self.processes.size == 1 or isinstance(error, TrainingError):  # which all processes raise together
                    self.save(current, *boundary)  # nothing has moved since the last update
                if isinstance(error, TrainingError):
                    raise TrainingError(f"stage {stage.name}, step {current.step + 1} of {stage.steps}: {error}") from error
                raise
        if loss is not None:
            optimizer.set_lr(current.optimizers, optimizer.lr_factor(current.step, stage))
            step(current.optimizers, run.device)
        current.step += 1
        self.step += 1
        self.tell(current, bar, records if loss is not None else [], loss, norm, tokens, time.monotonic() - began)
        current.watch.after_step(self.step, norm, current.step == stage.steps)
        if self.step % run.exam_every == 0 and stage.objective == "language":
            self.exam(stage)
        if run.max_minutes is not None and time.monotonic() - self.began >= 60 * run.max_minutes:
            self.stop.requested = self.stop.requested or Stopped(0, f"--max-minutes {run.max_minutes:g} are over")
        stop = self.processes.first(self.stop.requested)
        if stop or self.step % run.save_every == 0 or current.step == stage.steps:
            self.save(current, current.feed.state(), random_state(run.device))
        if stop:
            raise stop

    def may_skip(self, current, error):
        """Whether an update is left out because of an error; then it is written down."""
        if not isinstance(error, NotFinite) or current.stage.non_finite == "stop" or current.skipped == MOST_SKIPPED:
            return False
        current.skipped += 1
        self.log.write(stage=current.stage.name, step=self.step + 1, skipped=str(error))
        say(f"stage {current.stage.name}, step {current.step + 1}: the update is left out: {error}")
        return True

    def tell(self, current, bar, records, loss, norm, tokens, seconds):
        """Log a step and show it. records: this process's; loss: None for one that was left out; seconds: it took."""
        lr = max(group["lr"] for one in current.optimizers for group in one.param_groups)
        waited, used = current.feed.waited, current.watch.utilisation(records, tokens, seconds)
        if loss is not None:
            more = {} if used is None else {"utilisation": round(used, 4)}
            limit = current.watch.spikes(loss)
            if limit is not None:
                more["spike"] = round(limit, 4)
                say(f"stage {current.stage.name}, step {current.step}: the loss jumped to {loss:.4f}, above {limit:.4f}")
            self.log.write(stage=current.stage.name, step=self.step, loss=loss, lr=lr, gradient_norm=norm,
                           tokens_per_second=round(tokens / seconds), data_seconds=round(waited, 4),
                           seconds=round(self.seconds(), 3), **more)
        bar.update(current.step, loss, lr, tokens / seconds, min(1.0, waited / seconds), used)

    def save(self, current, feed, random):
        """Write a checkpoint of the present weights; feed and random: their states after the last update."""
        run, own = self.run, {name: vars(self)[name] for name in POSITION}
        state = own | current.state(run) | {
            "identity": run.identity, "feed": feed, "seconds": self.seconds(), "cpu_seconds": self.cpu_seconds(),
            "log_bytes": self.log.size(), "processes": self.processes.size}
        self.writer.save(run.out, self.step, current.tensors(run) | {"random": random}, state, self.processes, run.keep)

    @contextlib.contextmanager
    def looking(self):
        """Within, the model is asked, not trained, by the main process: no gradient, no trace in the random state."""
        run = self.run
        devices = [run.device] if run.device.type == "cuda" else []
        with whole(run), torch.no_grad(), torch.random.fork_rng(devices):
            models = [model for model in (run.model, run.contrastive) if model is not None]
            for model in models:
                model.eval()
            yield
            for model in models:
                model.train()

    def ask(self, function):
        """What a function(run) finds out about the model, in the main process; a request to stop ends it at once."""
        def asked():
            with self.stop.anywhere():
                return function(self.run)

        with self.looking():
            return self.processes.by_main(asked)

    def measure(self, stage, moment):
        """Measure a stage before or after it, log it, and say afterwards what the stage achieved."""
        found = self.ask(lambda run: run.evaluate(run, stage))
        self.measures.setdefault(stage.name, {})[moment] = found
        self.log.write(stage=stage.name, step=self.step, when=moment, measures=found)
        for _, key, _, _ in string.Formatter().parse(stage.summary):
            if key is not None and key not in found:
                raise TrainingError(f"the summary of stage {stage.name!r} names {key!r}, which is not measured."
                                    f"{nearest(key, found)}")
        if moment == "after" and stage.summary:
            before = self.measures[stage.name]["before"]
            say(stage.summary.format(**{key: f"{before[key]:.1%} → {found[key]:.1%}" for key in found}))

    def exam(self, stage):
        """Ask the exam's questions and print the answers that have changed."""
        with self.looking():
            answers = self.processes.by_main(lambda: self.run.exam(self.run))
        if answers != self.answers:
            self.log.write(stage=stage.name, step=self.step, exam=answers)
        for old, new in itertools.zip_longest(self.answers, answers):
            if new is not None and new != old:
                say(f"step {self.step}: {new}")
        self.answers = answers

    def finish(self):
        """Write the model, the curves and the results, and print the tables."""
        self.writer.wait()
        self.ask(self.write_results)

    def write_results(self, run):
        """What `finish` does, in the main process."""
        out = run.out
        checkpoint.replace_json(out / "config.json", run.identity | run.made_of | {"image_size": run.model.vision.image_size})
        if run.contrastive is not None:
            checkpoint.replace_tensors(out / "text_tower.safetensors", text_side(run.contrastive))
        checkpoint.replace_tensors(out / "model.safetensors", run.model.state_dict())
        checkpoint.replace(out / "curves.png", lambda path: plot_curves(self.log.read(), path, run.seed))
        results = run.finish(run)
        results |= {"parameters": sum(p.numel() for p in run.model.parameters()), "seconds": round(self.seconds(), 1),
                    "cpu_seconds": round(self.cpu_seconds(), 1)}
        checkpoint.replace_json(out / "results.json", results)
        say("\n".join(["", *measures_table(self.measures), "", *run.report(run, results)]))
