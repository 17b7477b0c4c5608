"""The training loop: stages one after the other, each a plain sequence of updates; `train_stage` is the one to read.

    for stage in stages: resize, freeze, make optimizers, measure
        for step in range(stage.steps): records -> losses -> gradients -> step -> log -> exam, checkpoint
        prove that nothing frozen moved, measure again

One process runs this loop, or a thousand do (processes.py), each with its share of the records. A run that is killed
and resumed gives the same losses and weights, bit for bit: everything random comes from the seed and a position (record
n of a source, torch's own random state), which is in every checkpoint.
"""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from nanovlm.data.batching import Report
from nanovlm.training import checkpoint, optimizer
from nanovlm.training.diagnostics import Watch
from nanovlm.training.optimizer import lr_factor
from nanovlm.training.processes import lay_out, whole
from nanovlm.training.progress import Bar, Log, Stopped, measures_table, say
from nanovlm.training.stages import fingerprints, text_side
from nanovlm.training.update import NotFinite, TrainingError, Update, make_feed, reading

MOST_SKIPPED = 10  # updates in a row
POSITION = ("step", "starts", "measures", "answers", "stage_step", "skipped", "frozen")  # of a Trainer, in checkpoints


class Trainer:
    """Trains a processes.Run, until it is done or progress.StopRequests has a request."""

    def __init__(self, run, stop):
        self.run, self.processes, self.stop = run, run.processes, stop
        self.log = Log(run.out / "log.jsonl" if run.processes.main else None, run.recipe.log)
        self.writer, self.writing = ThreadPoolExecutor(1), None  # of checkpoints; the one that is being written
        self.step, self.starts = 0, dict.fromkeys(run.sources, 0)  # updates done; records read in finished stages
        self.measures, self.answers = {}, []  # stage name -> "before" | "after" -> measure -> share; of the last exam
        self.began, self.earlier = time.monotonic(), {"seconds": 0.0, "cpu_seconds": 0.0}  # of earlier processes

    def train(self):
        """Train all stages, or what the last checkpoint leaves of them, and write the results.

        Raises: progress.Stopped, TrainingError, each with a checkpoint written; checkpoint.CheckpointError.
        """
        try:
            saved = self.last_checkpoint()
            first = saved[1]["stage"] if saved else 0
            for index in range(first, len(self.run.stages)):
                self.begin(index, saved if index == first else None)
                if self.stage_step == 0:
                    self.measure("before")
                self.train_stage()
                self.end()
            self.wait()
            self.ask(self.finish, self.stop.anywhere)
        except Exception as error:
            if not self.processes.is_lost(error):  # or nobody would come to finish the checkpoint
                self.wait()
            raise

    def train_stage(self):
        """The updates of a stage that are left; `begin` made feed, optimizers, report, watch and run.loss (lay_out)."""
        run, stage, optimizers = self.run, self.stage, self.optimizers
        with contextlib.closing(Bar(stage, self.stage_step, self.processes.main)) as bar, contextlib.closing(self.feed):
            while self.stage_step < stage.steps:
                began, update, average, tokens, norm = time.monotonic(), None, None, 0, None
                with self.nothing_lost():  # what goes wrong in here is saved as it was, or the update is left out
                    update = Update(run, stage, self.next_records(), optimizers.parameters, self.report)
                    optimizers.zero_grad()
                    for micro_batch in update.micro_batches():
                        loss = run.loss(*micro_batch.inputs)  # a sum over the trained tokens; contrastive: a mean
                        update.add(micro_batch, loss)
                        if loss.requires_grad:  # not where only the bridge trains and this micro-batch shows no picture
                            loss.backward()
                    average, tokens = update.average()
                    norm = update.clip(stage.clip)
                if norm is not None:  # None: the update was left out
                    optimizers.step(lr_factor(self.stage_step, stage))
                self.stage_step, self.step = self.stage_step + 1, self.step + 1
                self.log_step(bar, update, average, norm, tokens, time.monotonic() - began)
                self.watch.after_step(norm)
                if self.step % run.recipe.exam_every == 0 and stage.objective == "language":
                    self.exam()
                stop = self.asked_to_stop()
                if stop or self.step % run.recipe.save_every == 0 or self.stage_step == stage.steps:
                    self.save(self.feed.state(), random_state(run.device))
                if stop:
                    raise stop

    def begin(self, index, saved):
        """Make a stage ready: picture size, frozen parts, optimizers, data; then restore what was saved, if it was."""
        run, stage = self.run, self.run.stages[index]
        lay_out(run, stage)
        if stage.copy_vision_branch:
            run.model.copy_vision_branch()
        self.index, self.stage, self.report = index, stage, Report()  # of rows cut to max_tokens
        self.feed, self.damage = make_feed(run, stage, self.starts, self.step)
        self.optimizers = optimizer.Together(optimizer.build(run.parts(), stage, torch.get_num_threads()), run.device)
        self.watch = Watch(self)
        if saved:
            self.restore(*saved)
        else:
            self.stage_step = self.skipped = 0  # updates of this stage that are done; of them, the last ones, left out
            self.frozen = fingerprints(run.model, run.contrastive, stage)
        say(f"\nstage {stage.name}: {stage.steps} steps of {stage.batch_size} examples at {stage.image_size} pixels")
        say("\n".join(optimizer.table(run.parts(), stage)))
        if not saved:
            self.watch.ask()

    def next_records(self):
        """This process's share of the records of the next update; what was damaged is written down."""
        with reading():
            records = self.processes.together(self.feed.next)
            damaged = sum(self.processes.gather(self.feed.damaged), [])
            if damaged:
                so_far = (self.stage_step + 1) * self.stage.batch_size
                self.processes.by_main(lambda: self.damage.add(self.step + 1, damaged, so_far))
        return records

    @contextlib.contextmanager
    def nothing_lost(self):
        """Within, an update is made. What goes wrong leaves a checkpoint of the last good step, or the update out."""
        stage, position = self.stage, (self.feed.state(), random_state(self.run.device))
        try:
            yield
            self.skipped = 0
        except Exception as error:
            where = f"stage {stage.name}, step {self.stage_step + 1}"
            if isinstance(error, NotFinite) and stage.non_finite == "skip" and self.skipped < MOST_SKIPPED:
                self.skipped += 1
                self.note(step=self.step + 1, skipped=str(error))
                say(f"{where}: the update is left out: {error}")
                return
            if self.processes.size == 1 or isinstance(error, TrainingError):  # which all processes raise together
                self.save(*position)  # nothing has moved since the last update
            if isinstance(error, TrainingError):
                raise TrainingError(f"{where} of {stage.steps}: {error}") from error
            raise

    def note(self, **entry):
        """Log an entry of this stage."""
        self.log.write(**{"stage": self.stage.name, "step": self.step} | entry)

    def log_step(self, bar, update, loss, norm, tokens, seconds):
        """Log a step and show it; norm: None for one that was left out. seconds: it took."""
        lr, waited, more = self.optimizers.lr(), self.feed.waited, {}
        if norm is None:
            loss = None
        else:
            more = self.watch.step(update.records, loss, tokens, seconds)
            self.note(loss=loss, lr=lr, gradient_norm=norm, tokens_per_second=round(tokens / seconds),
                      data_seconds=round(waited, 4), seconds=round(self.clock()["seconds"], 3), **more)
        bar.update(self.stage_step, loss, lr, tokens / seconds, min(1.0, waited / seconds), more.get("utilisation"))

    def end(self):
        """Prove that nothing frozen has moved, measure, and say what a stage has met with."""
        stage, now = self.stage, fingerprints(self.run.model, self.run.contrastive, self.stage)
        moved = [name for name, digest in self.frozen.items() if now[name] != digest]
        if moved:
            raise TrainingError(f"stage {stage.name}: frozen tensors have moved: {', '.join(moved)}")
        say("\n".join([*self.watch.table(), f"stage {stage.name}: none of the {len(now)} frozen tensors has moved"]))
        counts = self.counts()
        if counts["truncated_rows"]:
            say(f"stage {stage.name}: {counts['truncated_rows']:,} of {counts['rows']:,} rows were cut to max_tokens "
                f"{stage.max_tokens}, {counts['truncated_tokens']:,} tokens lost")
        self.measure("after")
        if self.damage.count:
            told = f"{self.damage.count:,} damaged records were replaced by the next, see {self.damage.path}"
            say(f"stage {stage.name}: {told}")
        for name, drawn in self.feed.state()["drawn"].items():
            self.starts[name] += drawn

    def counts(self):
        """The Report of all processes together: dict of int."""
        return dict(zip(vars(self.report), map(int, self.processes.sum([*vars(self.report).values()]))))

    def clock(self):
        """Time of training so far, without that between two processes, and of all threads' work: dict of seconds."""
        return {"seconds": self.earlier["seconds"] + time.monotonic() - self.began,
                "cpu_seconds": self.earlier["cpu_seconds"] + time.process_time()}

    def asked_to_stop(self):
        """The Stopped to raise now, of any process, or None."""
        minutes = self.run.args.max_minutes
        if minutes is not None and time.monotonic() - self.began >= 60 * minutes:
            self.stop.requested = self.stop.requested or Stopped(0, f"--max-minutes {minutes:g} are over")
        return self.processes.first(self.stop.requested)

    def tensors(self):
        """What a checkpoint keeps of a stage: dict file name -> dict name -> Tensor."""
        return {"model": self.run.model.state_dict(), "text_tower": text_side(self.run.contrastive),
                "optimizer": checkpoint.optimizer_tensors(self.optimizers.all), "movement": self.watch.movement.start}

    def save(self, feed, random):
        """Write a checkpoint of the present weights; feed and random: their states after the last update."""
        run = self.run
        state = {name: vars(self)[name] for name in POSITION} | self.clock() | {
            "stage": self.index, "report": self.counts(), "identity": run.identity, "feed": feed,
            "image_size": run.model.vision.image_size, "log_bytes": self.log.size(), "processes": self.processes.size}
        tensors, background = self.tensors() | {"random": random}, run.args.save_in_background
        self.wait()
        self.writing = self.writer.submit(
            checkpoint.begin(run.out, self.step, tensors, state, self.processes, run.args.keep, background))
        if not background:
            self.wait()

    def wait(self):
        """Until the checkpoint is written that was begun. Raises: CheckpointError if it could not be."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def last_checkpoint(self):
        """Take over the newest checkpoint's position in the run: (its folder, its state), or None at the beginning."""
        folders = self.processes.by_main(lambda: checkpoint.complete(self.run.out))
        if not folders:
            self.log.cut(0)
            return None
        state = checkpoint.read_state(folders[-1])
        checkpoint.check_same(state["identity"], self.run.identity, f"{folders[-1]} belongs to another run")
        vars(self).update({name: state[name] for name in POSITION})
        self.earlier = {name: state[name] for name in self.earlier}
        self.log.cut(state["log_bytes"])
        say(f"continuing after step {self.step}, in stage {self.run.stages[state['stage']].name}")
        if state["processes"] != self.processes.size:
            say(f"{state['processes']} processes wrote the checkpoint, {self.processes.size} go on: the last digits of "
                "losses and weights will differ")
        return folders[-1], state

    def restore(self, folder, state):
        """Put what a checkpoint holds back in its place, in a stage that has just begun."""
        run, held = self.run, checkpoint.places(self.optimizers.all)
        targets = self.tensors() | {"optimizer": {place: parameter for place, (_, parameter, _) in held.items()}}
        found = checkpoint.read(folder, targets, self.processes)
        for kind in ("model", "text_tower"):
            checkpoint.copy_into(targets[kind], found[kind], f"{kind}.safetensors")
        checkpoint.load_optimizer(self.optimizers.all, found["optimizer"])
        torch.set_rng_state(found["random"]["cpu"])
        if run.device.type == "cuda":
            torch.cuda.set_rng_state(found["random"]["cuda"], run.device)
        self.watch.movement.start = found["movement"]
        self.feed.load_state(state["feed"])
        self.report = Report(**state["report"]) if self.processes.main else Report()  # the others' counts are in it

    def ask(self, function, context=contextlib.nullcontext):
        """What function(run) finds out in the main process: no gradient, no trace in the random state."""
        def answer():
            with context():
                return function(run)

        run = self.run
        with whole(run), torch.no_grad(), torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
            models = run.models().eval()
            found = self.processes.by_main(answer)
            models.train()
        return found

    def measure(self, moment):
        """Measure a stage before or after it, log it, and say afterwards what the stage achieved."""
        stage = self.stage
        found = self.ask(lambda run: run.recipe.evaluate(run, stage), self.stop.anywhere)
        measures = self.measures.setdefault(stage.name, {})
        measures[moment] = found
        self.note(when=moment, measures=found)
        if moment == "after" and stage.summary:
            told = {key: f"{measures['before'][key]:.1%} → {share:.1%}" for key, share in found.items()}
            say(stage.summary.format(**told))

    def exam(self):
        """Ask the exam's questions and print the answers that have changed."""
        answers = self.ask(self.run.recipe.exam)
        if answers != self.answers:
            self.note(exam=answers)
        for place, answer in enumerate(answers):
            if answer not in self.answers[place : place + 1]:
                say(f"step {self.step}: {answer}")
        self.answers = answers

    def finish(self, run):
        """Write the model, the curves and the results, and print the tables; in the main process."""
        tensors = {"model": run.model.state_dict(), "text_tower": text_side(run.contrastive)}
        checkpoint.write_model(run.out, tensors, run.model.vision.image_size)
        self.watch.draw()
        results = run.recipe.finish(run)
        results |= {"parameters": sum(p.numel() for p in run.model.parameters())}
        results |= {name: round(seconds, 1) for name, seconds in self.clock().items()}
        checkpoint.replace_json(run.out / "results.json", results)
        say("\n".join(["", *measures_table(self.measures), "", *run.recipe.report(run, results)]))


def random_state(device):
    """torch's random states: dict of uint8 Tensors, "cpu" and, on a GPU, "cuda"."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state
