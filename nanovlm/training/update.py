"""The gradient of one update: records become batches, batches a loss, micro-batches and processes add up.

A language loss is a sum over tokens and is divided by the trained tokens of the whole update, so that cutting it into
micro-batches, or giving every process its share, changes nothing: dividing each micro-batch by its own tokens would
count a word in a short batch for more. A contrastive loss compares all pairs and cannot be cut.
"""

import contextlib
import math
import statistics
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.distributed.tensor import DTensor

from nanovlm.data.batching import build_batch, contrastive_batch, Preparation, Report
from nanovlm.training.optimizer import BLOCK
from nanovlm.training.processes import add_up_scalars, LanguageStep, last, no_rows, with_blank_picture
from nanovlm.vlm import part_of


# What watches over a run's numbers: where one stopped being finite, and when the loss jumped.
#
# A loss that is not a number spoils every weight with its first step, so no step is taken. The stage says what then:
# non_finite="stop" ends the run with a checkpoint of the last good step, "skip" leaves out this one update; so many in a
# row end the run all the same.
#
# A spike is a loss far above the last ones: more than SPIKE times their usual distance from their median. It is written
# down and nothing else; what to do about it (a smaller rate, other data) is for people to decide.


MOST_SKIPPED = 10  # updates in a row
WINDOW, FEWEST = 50, 20  # losses that a new one is compared with, at most and at least
SPIKE = 8.0  # times the median distance of the last losses from their median


class Spikes:
    """Looks at one loss after the other, over a sliding window.

    Args: losses: list of float, the last ones of the stage so far.
    """

    def __init__(self, losses=()):
        self.losses = deque(losses, WINDOW)

    def __call__(self, loss):
        """Whether a loss is a spike: None, or the limit it exceeds; then it joins the others."""
        limit = None
        if len(self.losses) >= FEWEST:
            middle = statistics.median(self.losses)
            limit = middle + SPIKE * statistics.median(abs(one - middle) for one in self.losses)
        self.losses.append(loss)
        return limit if limit is not None and loss > limit else None


def loss_origin(run, stage, batch):
    """Where a loss stopped being finite: str for an error's message.

    The batch goes through the model once more, and every module's output is looked at. Not with fsdp, where one
    process alone cannot run the model.
    Args: run: run.Run. stage: Stage. batch: as the stage's loss takes it.
    """
    if run.processes.mode == "fsdp":
        return ""
    autocast = torch.autocast(run.device.type, torch.bfloat16, enabled=stage.precision == "bfloat16")
    for part, parameters in run.parts().items():
        for name, parameter in parameters.items():
            if not torch.isfinite(parameter).all():
                return f"; a weight of the part {part} is not finite itself: {name}"
    with autocast:
        if stage.objective == "contrastive":
            name = first_bad_output(run.contrastive, lambda: run.contrastive.loss(*(one.to(run.device) for one in batch)))
            part = name and ("vision" if name.startswith("vision.") else "text_tower")
        else:
            name = first_bad_output(run.model, lambda: run.model.loss(batch.to(run.device)))
            part = name and part_of(f"{name}.", run.model.vision_branches())
    return f"; it arose in the part {part}, first seen behind {name}" if name else "; it arose in the loss itself"


def first_bad_output(model, work):
    """The first module to give out what is not finite, an inner one before the one around it: its name, or None.

    Args: model: the module that work runs. work: function without arguments, a forward pass.
    """
    found, hooks = [], []

    def watch(name):
        def look(module, inputs, output):
            if not found and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                found.append(name)
        return look

    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_hook(watch(name)))
    try:
        with torch.no_grad():
            work()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def gradient_origin(run):
    """Where a gradient stopped being finite: str for an error's message.

    The backward pass goes from the loss to the pixels and spoils all that comes behind it, so the bad gradient that is
    nearest to the loss is where it arose.
    """
    bad = [(nearness(name), part, name) for part, parameters in run.parts().items() for name, parameter in parameters.items()
           if parameter.grad is not None and not math.isfinite(norm_of(parameter.grad))]  # fmt: skip
    return f"; it arose in the part {max(bad)[1]}, at {max(bad)[2]}" if bad else ""


def norm_of(tensor):
    """The norm of a tensor, sharded or not: float."""
    norm = tensor.norm()
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def nearness(name):
    """Where a parameter stands on the way from the pixels to the loss: (tower, bridge, words, layers, head; which layer)."""
    order = ("vision.", "text.", "project_", "bridge.", "decoder.embedding.", "decoder.layers.", "decoder.")
    place = next((place for place, start in enumerate(order) if name.startswith(start)), len(order))
    block = BLOCK.search(name)
    return place, int(block.group(1)) if block else -1


class TrainingError(RuntimeError):
    """Training cannot go on; the message names stage, step and records."""


class NotFinite(TrainingError):
    """A loss or a gradient is no finite number: a step with it would spoil every weight."""


@contextlib.contextmanager
def reading():
    """Within, data is read: what is wrong with it (OSError, ValueError) stops the training, in its own words."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise TrainingError(str(error)) from error


def preparation(run, stage):
    """What is done to a stage's records before a batch is made of them: Preparation."""
    if stage.objective == "contrastive":
        return Preparation(stage.image_size, stage.image_fit, run.preprocessing)
    return Preparation(stage.image_size, stage.image_fit, run.preprocessing, run.template_of(stage), run.tokenizer,
                       run.model.num_image_tokens, stage.max_tokens)


def language_batch(run, stage, records, report):
    """The vlm.Batch of some records.

    Args:
      run: run.Run. stage: Stage. records: list of Record.
      report: batching.Report, counts rows cut to max_tokens.
    """
    with reading():
        return build_batch(records, run.template_of(stage), run.tokenizer, run.model.num_image_tokens,
                           stage.image_size, stage.image_fit, stage.max_tokens, report,
                           preprocessing=run.preprocessing, pack=stage.packing)


def language_loss(run, stage, batch):
    """Next-token loss of a vlm.Batch.

    Returns: (float[] summed over the trained tokens in nats, int trained tokens, int tokens in all).
    """
    tokens = int((batch.segments >= 0).sum())
    if run.processes.size > 1 and batch.pixels is None:
        batch = with_blank_picture(batch, run.model, stage.image_size)
    loss, trained = (run.training or LanguageStep(run.model, run.share_prefix, lean=True))(batch.to(run.device))
    return loss, trained, tokens


def pairs_batch(run, stage, records, report):
    """Pictures and captions of some records, see batching.contrastive_batch; arguments as in `language_batch`."""
    with reading():
        return contrastive_batch(records, run.tokenizer, stage.image_size, stage.image_fit, stage.max_tokens, report,
                                 run.preprocessing)


def contrastive_loss(run, stage, batch):
    """Contrastive loss of pictures and captions.

    Returns: (float[] mean over pictures and captions in nats, of several processes this one's share; int what the sum
      over all processes is to be divided by, 1 in all; int tokens of the captions that differ).
    """
    pixels, ids, lengths, right, looks = (tensor.to(run.device) for tensor in batch)
    loss = (run.training or run.contrastive.loss)(pixels, ids, lengths, right, looks)
    return loss, int(run.processes.main), int(lengths.sum())


BATCHES = {"language": language_batch, "contrastive": pairs_batch}
LOSSES = {"language": language_loss, "contrastive": contrastive_loss}


def autocast(device, stage):
    """The context of a forward pass in the stage's precision.

    Without torch's cache of cast weights on a CPU: all threads share it, and the first to finish its pass empties it. How
    often a weight is cast, and so how its gradient is rounded, would depend on which thread was faster.
    """
    return torch.autocast(device.type, torch.bfloat16, stage.precision == "bfloat16", cache_enabled=device.type != "cpu")


def micro_batches(records, size):
    """Cut an update into micro-batches of at most `size` records, pictures and plain text apart.

    The rows of the two differ in length, and in one batch the longer would pad the others; the loss does not notice.
    """
    for group in ([one for one in records if one.visuals], [one for one in records if not one.visuals]):
        for start in range(0, len(group), size):
            yield group[start:start + size]


def gradient(run, stage, records, parameters, report):
    """Leave the gradient of one update in the parameters: accumulated, divided by what it trains, clipped.

    Args:
      run: run.Run. stage: Stage.
      records: list of Record, this process's share of the update.
      parameters: list of the Parameters that train; those that the records do not reach get no gradient.
      report: batching.Report.
    Returns: (float loss per trained token or pair in nats, float norm of the gradient before clipping, int tokens), of
      all processes together.
    Raises: TrainingError, in all processes, if the loss or the gradient is not finite.
    """
    for parameter in parameters:
        parameter.grad = None
    num_threads = torch.get_num_threads()
    if run.device.type == "cpu" and run.processes.size == 1 and min(num_threads, len(records)) > 1:
        sums = BY_THREADS[stage.objective](run, stage, records, parameters, report, num_threads)
    else:
        sums = one_after_another(run, stage, records, report, torch.Tensor.backward)
    total, divisor, tokens = run.processes.sum(sums)
    reached = [parameter for parameter in parameters if parameter.grad is not None]
    add_up_scalars(run, reached)
    for parameter in reached:  # only now is it known how many tokens the whole update trains
        parameter.grad /= divisor
    norm = total_norm([parameter.grad for parameter in reached])
    check_finite(norm, "gradient's norm", records, lambda: gradient_origin(run))
    if stage.clip is not None:
        for group in by_sharding(reached):
            torch.nn.utils.clip_grads_with_norm_(group, stage.clip, norm)
    return total / divisor, norm.item(), int(tokens)


def by_sharding(tensors):
    """Tensors as lists that torch can treat together: the sharded ones and the others, none of them empty."""
    groups = [[one for one in tensors if isinstance(one, DTensor) is sharded] for sharded in (True, False)]
    return [group for group in groups if group]


def total_norm(gradients):
    """The norm of a whole gradient, float[]; each process finds the same."""
    norms = [torch.nn.utils.get_total_norm(group) for group in by_sharding(gradients)]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


def one_after_another(run, stage, records, report, backward, size=None):
    """Run the micro-batches of some records forward and backward; every process runs equally many.

    Args:
      backward: function(float[] loss summed over a micro-batch) that keeps its gradient.
      size: records per micro-batch; None = the stage's.
    Returns: (float summed loss in nats, int what it is to be divided by, int tokens).
    """
    processes, total, divisor, tokens, failure, pictures = run.processes, 0.0, 0, 0, None, 0
    parts = list(micro_batches(records, size or stage.micro_batch_size or stage.batch_size))
    batches = processes.together(lambda: [BATCHES[stage.objective](run, stage, part, report) for part in parts])
    number = max(processes.gather(len(parts)))
    for index in range(number):
        part, batch = (parts[index], batches[index]) if index < len(parts) else ((), no_rows())
        pictures += any(record.visuals for record in part)
        with last(run, index == number - 1):
            with autocast(run.device, stage):
                loss, trained, count = LOSSES[stage.objective](run, stage, batch)
            try:
                check_finite(loss, "loss", part, lambda: loss_origin(run, stage, batch))
            except TrainingError as error:
                if processes.size == 1:
                    raise
                failure = failure or error  # the others still wait for this gradient
            if loss.requires_grad:  # text alone never reaches a bridge
                backward(loss)
        total, divisor, tokens = total + loss.item(), divisor + trained, tokens + count
    processes.agree(failure)
    if processes.size > 1 and not any(processes.gather(pictures)):
        forget_blank_pictures(run)
    return total, divisor, tokens


def forget_blank_pictures(run):
    """Where no process has shown a picture, what only pictures reach has no gradient, as in one process."""
    for part in ("vision", "bridge", "vision_branch", "cross_attention"):
        for parameter in run.parts()[part].values():
            parameter.grad = None


@contextlib.contextmanager
def workers(number):
    """A pool of CPU threads, each computing by itself.

    The tensors of a small model are too small to be cut: two threads on one product gain little, two threads with half
    the pictures each nearly halve the time. What they find is added in a fixed order, so that equal runs stay equal to
    the last bit.
    """
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)  # a worker's setting is everybody's


def add_gradients(parameters, gradients):
    """Add float tensors, or None where a parameter was not reached, to the parameters' gradients."""
    for parameter, value in zip(parameters, gradients):
        if value is not None:
            parameter.grad = value if parameter.grad is None else parameter.grad + value


def language_by_threads(run, stage, records, parameters, report, num_threads):
    """`one_after_another`, with a share of the records for each thread."""
    shares = [records[thread::num_threads] for thread in range(min(num_threads, len(records)))]
    size = math.ceil((stage.micro_batch_size or stage.batch_size) / num_threads)

    def work(share):
        found, own_report = [], Report()
        backward = lambda loss: found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
        return one_after_another(run, stage, share, own_report, backward, size), found, own_report

    with workers(len(shares)) as pool:
        results = list(pool.map(work, shares))
    for _, found, own_report in results:
        report.add(own_report)
        for gradients in found:
            add_gradients(parameters, gradients)
    return tuple(sum(values) for values in zip(*(sums for sums, _, _ in results)))


def contrastive_by_threads(run, stage, records, parameters, report, num_threads):
    """The contrastive loss, with a share of the pictures for each thread.

    The loss needs all pictures at once, their features do not: features apart, then loss and its gradient with respect to
    them, then the rest of the backward pass apart again (GradCache, arXiv:2101.06983, Sec. 3.2).
    """
    model = run.contrastive
    pixels, ids, lengths, right, looks = pairs_batch(run, stage, records, report)

    def forward(share):
        with autocast(run.device, stage):
            return model.embed_images(*share)

    def backward(features, gradient):
        if features.requires_grad:
            return torch.autograd.grad(features, parameters, gradient, allow_unused=True)
        return [None] * len(parameters)  # the tower is frozen

    with workers(num_threads) as pool:
        features = list(pool.map(forward, shares_of_pictures(pixels, looks, num_threads)))
        leaves = [one.detach().requires_grad_() for one in features]
        with autocast(run.device, stage):
            loss = model.match(torch.cat(leaves), model.embed_texts(ids, lengths), right)
        check_finite(loss, "loss", records, lambda: loss_origin(run, stage, (pixels, ids, lengths, right, looks)))
        gradients = torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True)
        add_gradients(parameters, gradients[len(leaves):])
        for gradients in pool.map(backward, features, gradients[:len(leaves)]):
            add_gradients(parameters, gradients)
    return loss.item(), 1, int(lengths.sum())


def shares_of_pictures(pixels, looks, number):
    """Pictures and the looks at them, see batching.contrastive_batch, in `number` parts: list of (pixels, looks)."""
    shares, start = [], 0
    for part in pixels.chunk(number):
        own = looks[(looks[:, 0] >= start) & (looks[:, 0] < start + len(part))]
        shares.append((part, own - own.new_tensor([start, 0, 0])))
        start += len(part)
    return shares


BY_THREADS = {"language": language_by_threads, "contrastive": contrastive_by_threads}


def step(optimizers, device):
    """Take a step with each optimizer; on a CPU by a thread each, as Muon's products are too small for several."""
    if device.type != "cpu":
        for one in optimizers:
            one.step()
        return
    with workers(min(torch.get_num_threads(), len(optimizers))) as pool:
        list(pool.map(lambda one: one.step(), optimizers))


def check_finite(value, what, records, origin):
    """Raise NotFinite unless a loss or a norm, float[], is a finite number; origin() says where it arose: str."""
    if not math.isfinite(value.item()):
        raise NotFinite(f"the {what} is {value.item()}; records: {', '.join(record.id for record in records)}{origin()}")
