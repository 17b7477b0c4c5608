"""A training stage as data: what trains, how fast, on which pictures, for how long.

A recipe is a tuple of stages that run one after the other on the same model. The trainer reads these values, and
`override` changes one of them from the command line. What a stage does not name stays frozen: `freeze` takes its gradients
away, and `fingerprints` prove at the end of the stage that not a byte of it has moved.
"""

import dataclasses
import hashlib
import math
import types
import typing

import torch
from torch.distributed.tensor import DTensor

from nanovlm import vlm
from nanovlm.names import nearest

PARTS = (*vlm.PARTS, "text_tower")
TRAINABLE = {  # objective -> parts that its loss reaches
    "contrastive": ("vision", "text_tower"),
    "language": vlm.PARTS,
}
WORDS = ("embedding", "language_model", "lm_head")
TUNES = {  # what instruction tuning trains, by name ("Vision-Language Instruction Tuning: A Review", Sec. 3.1)
    "bridge": ("bridge",),
    "bridge_lm": ("bridge", *WORDS),
    "lora": ("bridge", "lora"),
    "all": ("vision", "bridge", *WORDS),
}
GRAFTED = ("adapters", "cross_attention", "vision_branch")  # what papers add inside the language model: it stays as it was
IMAGE_FITS = ("crop", "pad", "stretch", "squash")
AUGMENTATIONS = ("none", "crop", "crop_flip")
SCHEDULES = ("constant", "linear", "cosine", "trapezoid")
OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("auto", "float32", "bfloat16")
NON_FINITE = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage.

    Raises: ValueError if a value is out of range or a name unknown; the message names the field.
    """

    name: str                          # what --stages, --set and the log call it
    objective: str                     # "contrastive": pictures against captions; "language": next-token prediction
    learning_rates: dict[str, float]   # part -> peak learning rate; a part that is absent stays frozen
    mixture: dict[str, float]          # data source -> weight; the shares of records are weight / sum of weights
    steps: int                         # optimizer steps
    batch_size: int                    # examples (records) per update, over all micro-batches and devices
    micro_batch_size: int | None = None  # examples per forward and backward; None = the whole batch at once
    group: int = 1                     # updates whose records are drawn at once and sorted by modality and length
    max_tokens: int = 256              # tokens per row at most, image tokens included
    packing: bool = False              # whether a row holds as many conversations as fit into max_tokens
    image_size: int = 64               # pixels, the side of the square that the vision tower sees
    image_fit: str = "crop"            # how a picture becomes square: "crop", "pad", "stretch", "squash"
    augmentation: str = "none"         # of training pictures: "crop" = a random part, "crop_flip" = mirrored too
    copy_vision_branch: bool = False   # begin by copying the text's norms, keys and values over the images' own
    optimizer: str = "adamw"           # "adamw", or "muon": Muon for matrices inside blocks, AdamW for the rest
    muon_factor: float = 5.0           # with "muon": a matrix's rate is this times its part's (see optimizer.py)
    momentum: float = 0.95             # Muon's momentum, a share in [0, 1)
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's running averages of gradient and squared gradient
    eps: float = 1e-8                  # AdamW's denominator guard, in units of the gradient
    weight_decay: float = 0.0          # per unit of learning rate, on matrices inside blocks only
    layer_decay: dict[str, float] = dataclasses.field(default_factory=dict)  # part -> factor per block from its top
    clip: float | None = 1.0           # largest norm of the whole gradient; None = as it comes
    schedule: str = "trapezoid"        # "constant", "linear", "cosine", or "trapezoid" = constant, then linear
    decay_share: float = 0.4           # with "trapezoid": share of the steps, at the end, that decay
    warmup_steps: int = 0              # optimizer steps from start_lr_factor up to the peak
    start_lr_factor: float = 0.1       # learning rate at step 0 / peak, when there is a warm-up
    end_lr_factor: float = 0.0         # learning rate / peak that the schedule falls towards
    # "bfloat16" = autocast of the forward pass and Muon's products, weights stay float32; "auto" = what the machine on
    # which the run begins is fast in, see machine.py
    precision: str = "float32"
    non_finite: str = "stop"           # when a loss or gradient is no finite number: "stop", or "skip" the update
    summary: str = ""                  # sentence printed at the end; "{key}" becomes "43.0% → 98.5%" of that measure

    def __post_init__(self):
        for field, known in (("objective", TRAINABLE), ("image_fit", IMAGE_FITS),
                             ("augmentation", AUGMENTATIONS), ("schedule", SCHEDULES),
                             ("optimizer", OPTIMIZERS), ("precision", PRECISIONS),
                             ("non_finite", NON_FINITE)):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"stage {self.name!r}: {field} {value!r} is unknown.{nearest(value, known)}")
        for field in ("learning_rates", "layer_decay"):
            for part in getattr(self, field):
                if part not in PARTS:
                    raise ValueError(f"stage {self.name!r}: {field} names an unknown part {part!r}."
                                     f"{nearest(part, PARTS)}")
        unreached = [part for part in self.learning_rates if part not in TRAINABLE[self.objective]]
        if unreached:
            raise ValueError(f"stage {self.name!r}: the {self.objective} loss does not reach {unreached[0]!r}; "
                             f"it can train {', '.join(TRAINABLE[self.objective])}")
        self._check_ranges()

    def _check_ranges(self):
        micro = self.batch_size if self.micro_batch_size is None else self.micro_batch_size
        rates = list(self.learning_rates.values())
        for wrong, message in (
            (not self.name or "." in self.name or "=" in self.name, "a name is not empty and has no '.' and no '='"),
            (self.steps < 1, f"steps is {self.steps}; at least 1 is needed"),
            (self.batch_size < 1, f"batch_size is {self.batch_size}; at least 1 is needed"),
            (not 1 <= micro <= self.batch_size,
             f"micro_batch_size is {micro}; it lies between 1 and batch_size {self.batch_size}"),
            (self.objective == "contrastive" and micro != self.batch_size,
             f"micro_batch_size is {micro}, but a contrastive loss compares the whole batch of {self.batch_size}: "
             "leave micro_batch_size out"),
            (self.group < 1, f"group is {self.group}; it is at least 1, which leaves the records as they are drawn"),
            (self.objective == "contrastive" and (self.group > 1 or self.packing),
             "group and packing are for language stages; a contrastive loss compares captions of all lengths"),
            (self.max_tokens < 2, f"max_tokens is {self.max_tokens}; at least 2 are needed"),
            (self.image_size < 1, f"image_size is {self.image_size}; at least 1 is needed"),
            (not rates, "learning_rates names no part, so nothing would train"),
            (not all(0 < rate < math.inf for rate in rates),
             f"learning_rates are {rates}; each is above 0 (leave a part out to freeze it)"),
            (not self.mixture, "mixture names no data source"),
            (not all(0 < weight < math.inf for weight in self.mixture.values()),
             f"mixture is {self.mixture}; each weight is above 0 (leave a source out to skip it)"),
            (not all(0 < decay <= 1 for decay in self.layer_decay.values()),
             f"layer_decay is {self.layer_decay}; each factor lies in (0, 1]"),
            (not self.muon_factor > 0, f"muon_factor is {self.muon_factor}; it is above 0"),
            (not 0 <= self.momentum < 1, f"momentum is {self.momentum}; it lies in [0, 1)"),
            (not all(0 <= beta < 1 for beta in self.betas), f"betas are {self.betas}; each lies in [0, 1)"),
            (not self.eps > 0, f"eps is {self.eps}; it is above 0"),
            (not self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; it is not negative"),
            (self.clip is not None and not self.clip > 0, f"clip is {self.clip}; it is above 0, or none"),
            (not 0 < self.decay_share <= 1, f"decay_share is {self.decay_share}; it lies in (0, 1]"),
            (not 0 <= self.warmup_steps < self.steps,
             f"warmup_steps is {self.warmup_steps}; it lies between 0 and steps - 1 = {self.steps - 1}"),
            (not 0 <= self.start_lr_factor <= 1, f"start_lr_factor is {self.start_lr_factor}; it lies in [0, 1]"),
            (not 0 <= self.end_lr_factor <= 1, f"end_lr_factor is {self.end_lr_factor}; it lies in [0, 1]"),
        ):
            if wrong:
                raise ValueError(f"stage {self.name!r}: {message}")


def override(stage, settings):
    """Change values of a stage from text, as typed after `--set stage.`.

    Args:
      stage: Stage.
      settings: dict of str to str: a field's name ("steps"), or for a table "field.key" ("learning_rates.bridge"), and
        the value. "tune" sets all learning rates at once, see `tuned`. "none" is None for an optional field and removes an entry of a table (`learning_rates.bridge=none`
        freezes the bridge); tuples are written with commas ("0.9,0.98").
    Returns: Stage, a changed copy, checked only when all changes are in.
    Raises: ValueError if a field is unknown, a text is not of its type, or the stage would not be valid.
    """
    hints = typing.get_type_hints(Stage)
    values = dict(vars(stage))
    for field, text in settings.items():
        name, _, key = field.partition(".")
        if field == "tune":
            values["learning_rates"] = tuned(stage.name, values["learning_rates"], text)
            continue
        where = f"{stage.name}.{field}"
        if name not in hints:
            raise ValueError(f"stage {stage.name!r} has no field {name!r}.{nearest(name, hints)}")
        if typing.get_origin(hints[name]) is dict:
            values[name] = _change_table(values[name], key, text, where)
        elif key:
            raise ValueError(f"{stage.name}.{name} is one value, not a table; write {stage.name}.{name}={text}")
        else:
            values[name] = _parse(hints[name], text, where)
    return Stage(**values)


def tuned(stage_name, rates, choice):
    """Learning rates of another choice of what a stage trains.

    Args:
      rates: dict part -> rate, as it is. choice: a key of TUNES.
    Returns: dict part -> rate: of the choice, and of the GRAFTED parts that trained already; each as before, or at the
      highest rate there was.
    Raises: ValueError for an unknown choice.
    """
    if choice not in TUNES:
        raise ValueError(f"{stage_name}.tune={choice} is unknown.{nearest(choice, TUNES)}")
    parts = (*TUNES[choice], *(part for part in GRAFTED if part in rates))
    return {part: rates.get(part, max(rates.values())) for part in parts}


def _change_table(table, key, text, where):
    """A copy of a dict str -> float with one entry set, or removed by "none"."""
    if not key:
        raise ValueError(f"{where} is a table; write {where}.KEY={text}")
    if text.lower() != "none":
        return table | {key: _parse(float, text, where)}
    if key not in table:
        raise ValueError(f"{where}: there is no entry {key!r} to remove.{nearest(key, table)}")
    return {name: value for name, value in table.items() if name != key}


def _parse(kind, text, where):
    """Turn text into a value of an annotated type: str, int, float, `X | None` or a tuple of these."""
    if isinstance(kind, types.UnionType):
        return None if text.lower() == "none" else _parse(typing.get_args(kind)[0], text, where)
    if typing.get_origin(kind) is tuple:
        kinds, texts = typing.get_args(kind), text.split(",")
        if len(texts) != len(kinds):
            raise ValueError(f"{where}={text}: {len(kinds)} values with commas between them are expected")
        return tuple(_parse(kind, text, where) for kind, text in zip(kinds, texts))
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"{where}={text}: {kind.__name__} expected") from None


def choose(stages, names=None, without=(), settings=()):
    """Pick the stages of a run and change values in them.

    Args:
      stages: tuple of Stage, a recipe's.
      names: list of str, the stages to run (in the recipe's order, whatever theirs); None = all.
      without: list of str, stages to leave out.
      settings: list of str, "stage.field=value" each; see `override`.
    Returns: tuple of Stage.
    Raises: ValueError for an unknown stage or field, a value of the wrong type, or when no stage is left.
    """
    known = [stage.name for stage in stages]
    for name in [*(names or ()), *without]:
        if name not in known:
            raise ValueError(f"there is no stage {name!r}.{nearest(name, known)}")
    chosen = {stage.name: stage for stage in stages
              if (names is None or stage.name in names) and stage.name not in without}
    if not chosen:
        raise ValueError(f"no stage is left to run of: {', '.join(known)}")
    changes = {name: {} for name in chosen}
    for setting in settings:
        where, equals, text = setting.partition("=")
        name, dot, field = where.partition(".")
        if not equals or not dot:
            raise ValueError(f"--set {setting}: expected stage.field=value, for example {next(iter(chosen))}.steps=100")
        if name not in chosen:
            raise ValueError(f"--set {setting}: no stage {name!r} runs.{nearest(name, chosen)}")
        changes[name][field] = text
    return tuple(override(stage, changes[name]) for name, stage in chosen.items())


# Parts of a vision-language model and of the text tower beside it (contrastive: ContrastiveModel, or None).


def all_parts(model, contrastive):
    """dict part -> dict name -> Parameter; the ViT, which both models share, stands in it once."""
    if contrastive is None:
        return model.parts()
    return model.parts() | {"text_tower": contrastive.parts()["text_tower"]}


def text_side(contrastive):
    """State of a contrastive model without its ViT: dict name -> Tensor, the model's own memory; empty for None."""
    if contrastive is None:
        return {}
    return {name: tensor for name, tensor in contrastive.state_dict().items() if not name.startswith("vision.")}


def everything(model, contrastive):
    """Every tensor of both models, the ViT's once: dict name -> Tensor."""
    return model.state_dict() | text_side(contrastive)


def freeze(model, contrastive, stage):
    """Let exactly those parameters have gradients that a stage trains and its loss can reach."""
    config = model.vision.config
    behind = () if config.feature_layer is None else (
        "vision.post_norm.", *(f"vision.blocks.{n}." for n in range(config.feature_layer, config.num_layers)))
    for part, parameters in all_parts(model, contrastive).items():
        for name, parameter in parameters.items():
            parameter.requires_grad_(part in stage.learning_rates and not name.startswith(behind))


def fingerprints(model, contrastive, stage):
    """SHA-256 of every tensor, sharded or not, that a stage must leave alone: dict name -> str."""
    trained = {name for part in stage.learning_rates for name in all_parts(model, contrastive)[part]}
    found = {}
    for name, tensor in everything(model, contrastive).items():
        if name not in trained:
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            data = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
            found[name] = hashlib.sha256(data).hexdigest()
    return found
