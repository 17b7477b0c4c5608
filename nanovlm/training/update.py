"""One update of a stage: records become micro-batches, and what their losses leave in the gradients is averaged and
clipped.

A language loss is a sum over tokens and is divided by the trained tokens of the whole update: dividing a micro-batch,
or a process's share, by its own would count a word in a short one for more. A contrastive loss cannot be cut.

A loss or a gradient that is not a number would spoil every weight, so no step is taken. The stage says what then:
non_finite="stop" ends the run with a checkpoint of the last good step, "skip" leaves out this one update.
"""

import contextlib
import dataclasses
import functools
import math
import zlib
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.rnn import pad_sequence

from nanovlm.data.augment import augmented
from nanovlm.data.batching import Preparation, build_batch, contrastive_batch
from nanovlm.data.datasets import DATA
from nanovlm.data.feed import DamageReport, Feed, Mixture
from nanovlm.data.records import Changed
from nanovlm.training.processes import Processes, add_up_scalars, exchange_with, stage_loss
from nanovlm.vlm import IGNORE, IMAGE_TOKEN, Batch, part_of

EVERY = 100  # of files, one record in so many is held out: never trained on, but asked (diagnostics.py)
SMALL, FEW = 1000, 3  # records of a file that gives up a larger share, so that a few are held out
IN_A_ROW = 1000  # held-out records behind one another: then the ids are all the same


class TrainingError(RuntimeError):
    """Training cannot go on; the message names stage, step and records."""


class NotFinite(TrainingError):
    """A loss or a gradient is no finite number."""


@contextlib.contextmanager
def reading():
    """Within, data is read: what is wrong with it (OSError, ValueError) stops the training, in its own words."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise TrainingError(str(error)) from error


def holds_out(run, name):
    """Whether records of a source are held out: of files, not of what a recipe draws."""
    return run.recipe.published and name not in run.recipe.sources or name == DATA


def place_of(record):
    """What decides whether a record is held out: float, of its id alone, so in every run and every epoch."""
    digest = zlib.crc32(record.id.encode())
    return digest % EVERY + digest / 2**32


def held_out_limit(source):
    """Records of a lower `place_of` are held out: one in EVERY; of a small source FEW, or a fifth if they are fewer."""
    if len(source) >= SMALL:
        return 1.0
    places = []
    for n in range(len(source)):
        with contextlib.suppress(ValueError, OSError):  # the training names it
            places.append(place_of(source.record(n)))
    return sorted([*places, math.inf])[max(len(places) // EVERY, min(FEW, len(places) // 5))]


def next_to_train(source, n, limit):
    """Record n of a source, or the next of a `place_of` from limit on. Raises: ValueError if there is none."""
    for place in range(n, n + IN_A_ROW):
        record = source.record(place)
        if place_of(record) >= limit:
            return record
    raise ValueError(f"{source.name}: {IN_A_ROW} held-out records behind record {n}; records need ids of their own")


def make_feed(run, stage, starts, step):
    """The records of a stage: (feed.Feed, feed.DamageReport). starts: source -> its first record. step: the run's."""
    sources = {}
    for name in stage.mixture:
        source = run.sources[name]
        if holds_out(run, name):
            source = Changed(source, functools.partial(next_to_train, limit=held_out_limit(source)))
        source = augmented(source, stage.augmentation, run.args.seed)
        sources[name] = Changed(source, lambda source, n, start=starts[name]: source.record(start + n))
    prepare = Preparation(stage.image_size, stage.image_fit, run.recipe.preprocessing)
    if stage.objective == "language":
        prepare = dataclasses.replace(prepare, template=run.template_of(stage), tokenizer=run.tokenizer,
                                      num_image_tokens=run.model.num_image_tokens, max_tokens=stage.max_tokens,
                                      num_tiles=stage.tiles)
    feed = Feed(Mixture(sources, stage.mixture), prepare, stage.batch_size, stage.steps, stage.group, prepare.length,
                run.args.seed, run.processes.rank, run.processes.size, run.args.workers)  # fmt: skip
    return feed, DamageReport(run.out / "damaged.jsonl", stage.name, step, run.args.max_damaged)


@dataclass
class MicroBatch:
    """What passes through the model at once."""

    records: list  # what it was made of
    inputs: tuple  # of the stage's loss
    trained: int   # what the sum of the losses is divided by: trained tokens; 1 in all for a contrastive loss
    tokens: int


def make_batch(run, stage, records, report, pack=False):
    """The vlm.Batch of some records in a stage; report: batching.Report."""
    return build_batch(records, run.template_of(stage), run.tokenizer, run.model.num_image_tokens, stage.image_size,
                       stage.image_fit, stage.max_tokens, report, preprocessing=run.recipe.preprocessing, pack=pack,
                       num_tiles=stage.tiles)  # fmt: skip


def language_batch(run, stage, records, report, num_threads):
    """A MicroBatch of some records, a vlm.Batch for each thread."""
    shares = [records[thread::num_threads] for thread in range(min(num_threads, len(records)))]
    batches = [make_batch(run, stage, share, report, stage.packing) for share in shares]
    trained = sum(int((batch.labels[:, 1:] != IGNORE).sum()) for batch in batches)
    tokens = sum(int((batch.segments >= 0).sum()) for batch in batches)
    if run.processes.size > 1 and batches[0].pixels is None:
        batches = [with_blank_picture(batches[0], run.model, stage.image_size)]
    return MicroBatch(records, (batches,), trained, tokens)


def pairs_batch(run, stage, records, report, num_threads):
    """A MicroBatch of the pictures and captions of some records, the pictures in a share for each thread."""
    pixels, ids, lengths, right, looks = contrastive_batch(
        records, run.tokenizer, stage.image_size, stage.image_fit, stage.max_tokens, report, run.recipe.preprocessing)
    shares, start = [], 0
    for part in pixels.chunk(num_threads):
        own = looks[(looks[:, 0] >= start) & (looks[:, 0] < start + len(part))]
        shares.append((part, own - own.new_tensor([start, 0, 0])))
        start += len(part)
    return MicroBatch(records, (shares, ids, lengths, right), int(run.processes.main), int(lengths.sum()))


def with_blank_picture(batch, model, image_size):
    """A vlm.Batch without pictures, and one more row that shows a blank one and trains nothing.

    Of many processes every one runs every module; what only pictures reach gets zeros for gradients.
    """
    picture = [IMAGE_TOKEN] * model.num_image_tokens(image_size) if model.media_token is None else [model.media_token]
    row = torch.tensor([*picture, 0])  # some word behind it: what only text reaches is reached, too
    new = {"ids": (row, 0), "labels": (torch.full_like(row, IGNORE), IGNORE), "segments": (torch.zeros_like(row), -1),
           "positions": (torch.arange(len(row)), 0)}  # values, and the padding behind them
    return dataclasses.replace(
        batch, pixels=torch.zeros(1, 3, image_size, image_size), frames=torch.ones(1, dtype=torch.long),
        shown=torch.zeros(1, dtype=torch.long), owner=torch.tensor([len(batch.ids)]),
        **{name: pad_sequence([*getattr(batch, name), one], True, padding) for name, (one, padding) in new.items()})


def blank(run, stage):
    """A MicroBatch without a record, for a process that has none left while others have."""
    ids, none = torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    batch = Batch(ids, ids, ids, ids, None, none, none, none)
    return MicroBatch([], ([with_blank_picture(batch, run.model, stage.image_size)],), 0, 0)


def split(records, size):
    """Cut an update into lists of at most `size` records, pictures and text apart: longer rows would pad the others."""
    for group in ([one for one in records if one.visuals], [one for one in records if not one.visuals]):
        for start in range(0, len(group), size):
            yield group[start:start + size]


class Update:
    """One update, in each process its share of the records.

    parameters: those that train; what the records do not reach gets no gradient. report: counts rows cut to max_tokens.
    Raises: TrainingError, in all processes, for records of which no batch can be made.
    """

    def __init__(self, run, stage, records, parameters, report):
        self.run, self.stage, self.records, self.parameters = run, stage, records, parameters
        self.loss, self.trained, self.tokens, self.failure = 0.0, 0, 0, None
        num_threads = torch.get_num_threads() if run.device.type == "cpu" and run.processes.size == 1 else 1
        make = pairs_batch if stage.objective == "contrastive" else language_batch
        parts = split(records, stage.micro_batch_size or stage.batch_size)
        with reading():
            self.batches = run.processes.together(
                lambda: [make(run, stage, part, report, num_threads) for part in parts])

    def micro_batches(self):
        """Each MicroBatch in turn; every process has equally many."""
        number = max(self.run.processes.gather(len(self.batches)))
        for index in range(number):
            exchange_with(self.run, index == number - 1)
            yield self.batches[index] if index < len(self.batches) else blank(self.run, self.stage)

    def add(self, micro_batch, loss):
        """Count a MicroBatch's loss in, float[] summed over what it trains; `average` raises what is not finite."""
        value = loss.item()
        self.loss += value
        self.trained += micro_batch.trained
        self.tokens += micro_batch.tokens
        if not math.isfinite(value) and self.failure is None:  # other processes still wait for this gradient
            origin = loss_origin(self.run, self.stage, micro_batch.inputs)
            self.failure = NotFinite(f"the loss is {value}; records: {named(micro_batch.records)}; {origin}")

    def average(self):
        """Divide the gradients by what the update trains, of all processes: (float loss per token or pair, int tokens).

        Raises: NotFinite, in all processes, if a loss was not finite.
        """
        run, processes = self.run, self.run.processes
        processes.agree(self.failure)
        if processes.size > 1 and not any(processes.gather(any(record.visuals for record in self.records))):
            for part in ("vision", "bridge", "vision_branch", "cross_attention"):  # only blank pictures were shown
                for parameter in run.parts()[part].values():
                    parameter.grad = None
        loss, trained, tokens = processes.sum([self.loss, self.trained, self.tokens])
        self.parameters = [parameter for parameter in self.parameters if parameter.grad is not None]
        add_up_scalars(run, self.parameters)
        for parameter in self.parameters:  # only now is it known how many tokens the whole update trains
            parameter.grad /= trained
        return loss / trained, int(tokens)

    def clip(self, largest):
        """Shorten the gradient to a norm of at most `largest`, or None: float, the norm before. Raises: NotFinite."""
        norm = total_norm([parameter.grad for parameter in self.parameters])
        if not math.isfinite(norm):
            origin = gradient_origin(self.run, self.stage)
            raise NotFinite(f"the gradient's norm is {norm.item()}; records: {named(self.records)}; {origin}")
        if largest is not None:
            for group in by_sharding(self.parameters):
                torch.nn.utils.clip_grads_with_norm_(group, largest, norm)
        return norm.item()


def by_sharding(tensors):
    """Tensors as lists that torch can treat together: the sharded ones and the others, none of them empty."""
    groups = [[one for one in tensors if isinstance(one, DTensor) is sharded] for sharded in (True, False)]
    return [group for group in groups if group]


def total_norm(gradients):
    """The norm of a whole gradient, float[]; each process finds the same."""
    norms = [torch.nn.utils.get_total_norm(group) for group in by_sharding(gradients)]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


# Where a number stopped being finite, for an error's message.


def named(records):
    """The ids of records: str."""
    return ", ".join(record.id for record in records)


def arose(stage, name):
    """The name of a module or parameter with its part, in words."""
    tower = stage.objective == "contrastive" and not name.startswith("vision.")
    return f"it arose in the part {'text_tower' if tower else part_of(f'{name}.')}, first seen at {name}"


def loss_origin(run, stage, inputs):
    """Where a loss stopped being finite: the batch runs once more, and every module's output is looked at."""
    if run.processes.mode == "fsdp":
        return "with fsdp no process alone can say where it arose"
    loss, found = stage_loss(dataclasses.replace(run, processes=Processes()), stage), []
    for name, parameter in loss.model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"a weight is not finite itself: {name}"
    names = {module: name for name, module in loss.model.named_modules()}

    def look(module, inputs, output):
        if module in names and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
            found.append(names[module])

    with register_module_forward_hook(look), torch.no_grad():
        loss(*inputs)
    return arose(stage, found[0]) if found else "it arose in the loss itself"


def gradient_origin(run, stage):
    """Where a gradient stopped being finite.

    The backward pass spoils all that comes behind it, so it arose at the bad gradient that is nearest to the loss;
    parameters are named in the order from the pixels to the loss.
    """
    model = run.contrastive if stage.objective == "contrastive" else run.model
    bad = [name for name, parameter in model.named_parameters()
           if parameter.grad is not None and not math.isfinite(total_norm([parameter.grad]))]
    return arose(stage, bad[-1]) if bad else "all single gradients are finite"
