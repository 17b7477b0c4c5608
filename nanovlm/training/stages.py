"""A training stage as data: what trains, how fast, on which pictures, for how long.

A recipe is a tuple of stages that run one after the other on the same model. The trainer reads these values, and
`override` changes one of them from the command line. What a stage does not name stays frozen: `freeze` takes its
gradients away, and `fingerprints` prove at the end of the stage that not a byte of it has moved.
"""

import dataclasses
import hashlib
import types
import typing
import warnings

import torch
from torch.distributed.tensor import DTensor

from nanovlm import vlm
from nanovlm.names import check_known, nearest

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
GRAFTED = ("adapters", "cross_attention", "vision_branch")  # what papers add inside the language model stays as it was
AUGMENTATIONS = ("none", "crop", "crop_flip")
PRECISIONS = ("auto", "float32", "bfloat16")
CHOICES = {  # field -> what it may be
    "objective": tuple(TRAINABLE), "image_fit": ("crop", "pad", "stretch", "squash"), "augmentation": AUGMENTATIONS,
    "schedule": ("constant", "linear", "cosine", "trapezoid"), "optimizer": ("adamw", "muon"), "precision": PRECISIONS,
    "non_finite": ("stop", "skip"),
}  # fmt: skip
RANGES = {  # field -> where every number of it lies, ends in round brackets excluded
    "steps": "[1, inf)", "batch_size": "[1, inf)", "micro_batch_size": "[1, inf)", "group": "[1, inf)",
    "max_tokens": "[2, inf)", "image_size": "[1, inf)", "tiles": "[0, inf)", "learning_rates": "(0, inf)",
    "mixture": "(0, inf)", "muon_factor": "(0, inf)", "momentum": "[0, 1)", "betas": "[0, 1)", "eps": "(0, inf)",
    "weight_decay": "[0, inf)", "layer_decay": "(0, 1]", "clip": "(0, inf)", "decay_share": "(0, 1]",
    "warmup_steps": "[0, inf)", "start_lr_factor": "[0, 1]", "end_lr_factor": "[0, 1]",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage. Raises: ValueError, naming the field, if a value is out of range or a name unknown."""

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
    tiles: float | None = None         # squares along a picture's longer side (tiles.cut); 0 = one; None = as image_fit
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
        def demand(right, what):
            if not right:
                raise ValueError(f"stage {self.name!r}: {what}")

        demand(self.name and not {".", "="} & set(self.name), "a name is not empty and has no '.' and no '='")
        for field, known in CHOICES.items():
            check_known(f"stage {self.name!r}: unknown {field}", getattr(self, field), known)
        for field in ("learning_rates", "layer_decay"):
            for part in getattr(self, field):
                check_known(f"stage {self.name!r}: {field} names an unknown part", part, PARTS)
        reached = TRAINABLE[self.objective]
        for part in self.learning_rates:
            demand(part in reached, f"the {self.objective} loss does not reach {part!r}, but {', '.join(reached)}")
        for field, interval in RANGES.items():
            value = getattr(self, field)
            numbers = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
            fits = all(number is None or lies_in(number, interval) for number in numbers)
            demand(fits, f"{field} is {value}; expected: in {interval}")
        micro, size = self.micro_batch_size or self.batch_size, self.batch_size
        demand(self.learning_rates, "learning_rates names no part, so nothing would train")
        demand(self.mixture, "mixture names no data source")
        demand(micro <= size, f"micro_batch_size is {micro}; it lies between 1 and batch_size {size}")
        demand(self.warmup_steps < self.steps, f"warmup_steps is {self.warmup_steps}, but steps is {self.steps}")
        whole = self.objective != "contrastive" or (micro == size and self.group == 1 and not self.packing)
        demand(whole, f"a contrastive loss compares the whole batch of {size}, captions of all lengths: leave "
                      "micro_batch_size, group and packing out")  # fmt: skip


def lies_in(number, interval):
    """Whether a number lies in an interval, written as in RANGES."""
    low, high = map(float, interval[1:-1].split(","))
    return low < number < high or (number == low and interval[0] == "[") or (number == high and interval[-1] == "]")


def override(stage, settings):
    """Change values of a stage from text, as typed after `--set stage.`: Stage, checked when all changes are in.

    settings: field ("steps") or entry of a table ("learning_rates.bridge") -> text; "tune" sets all learning rates.
      "none" is None or removes an entry (`learning_rates.bridge=none` freezes the bridge); a tuple is "0.9,0.98".
    A warm-up that fewer steps would not leave room for shrinks with them.
    Raises: ValueError if a field is unknown, a text is not of its type, or the stage would not be valid.
    """
    hints, values = typing.get_type_hints(Stage), dict(vars(stage))
    for field, text in settings.items():
        (name, _, key), where = field.partition("."), f"{stage.name}.{field}"
        if field == "tune":
            values["learning_rates"] = tuned(stage.name, values["learning_rates"], text)
        elif name not in hints:
            raise ValueError(f"stage {stage.name!r} has no field {name!r}.{nearest(name, hints)}")
        elif (typing.get_origin(hints[name]) is dict) != bool(key):
            raise ValueError(f"{where}={text}: {name} is {'one value' if key else 'a table; write TABLE.KEY=VALUE'}")
        elif not key:
            values[name] = _parse(hints[name], text, where)
        elif text.lower() != "none":
            values[name] = values[name] | {key: _parse(float, text, where)}
        elif key in values[name]:
            values[name] = {other: value for other, value in values[name].items() if other != key}
        else:
            raise ValueError(f"{where}: there is no entry {key!r} to remove.{nearest(key, values[name])}")
    if values["steps"] <= values["warmup_steps"] == stage.warmup_steps and "warmup_steps" not in settings:
        values["warmup_steps"] = max(values["steps"], 0) * stage.warmup_steps // stage.steps
        warnings.warn(f"{stage.name}.warmup_steps is now {values['warmup_steps']}: {stage.warmup_steps} of "
                      f"{stage.steps} steps were meant, and {values['steps']} are asked for")
    return Stage(**values)


def tuned(stage_name, rates, choice):
    """Learning rates of a key of TUNES: as before, or the highest that there was; GRAFTED parts that trained go on."""
    check_known(f"unknown {stage_name}.tune", choice, TUNES)
    parts = (*TUNES[choice], *(part for part in GRAFTED if part in rates))
    return {part: rates.get(part, max(rates.values())) for part in parts}


def _parse(kind, text, where):
    """Turn text into a value of an annotated type: str, bool, int, float, `X | None` or a tuple of these."""
    is_tuple, kinds = typing.get_origin(kind) is tuple, typing.get_args(kind) or (kind,)
    if types.NoneType in kinds and text.lower() == "none":
        return None
    kinds = [one for one in kinds if one is not types.NoneType]
    try:
        found = [{"true": True, "false": False}[part.lower()] if one is bool else one(part)
                 for one, part in zip(kinds, text.split(",") if is_tuple else [text], strict=True)]
    except (ValueError, KeyError):
        raise ValueError(f"{where}={text}: {', '.join(one.__name__ for one in kinds)} expected") from None
    return tuple(found) if is_tuple else found[0]


def choose(stages, names=None, without=(), settings=()):
    """The stages of a run: tuple of Stage, in the recipe's order; settings: "stage.field=value" each, see `override`.

    Raises: ValueError for an unknown stage or field, a value of the wrong type, or when no stage is left.
    """
    known = [stage.name for stage in stages]
    for name in [*(names or ()), *without]:
        check_known("there is no stage", name, known)
    wanted = set(known if names is None else names) - set(without)
    chosen = {stage.name: stage for stage in stages if stage.name in wanted}
    if not chosen:
        raise ValueError(f"no stage is left to run of: {', '.join(known)}")
    changes = {name: {} for name in chosen}
    for setting in settings:
        where, equals, text = setting.partition("=")
        name, dot, field = where.partition(".")
        if not equals or not dot:
            raise ValueError(f"--set {setting}: expected stage.field=value, for example {next(iter(chosen))}.steps=100")
        check_known(f"--set {setting}: no such stage runs:", name, chosen)
        changes[name][field] = text
    return tuple(override(stage, changes[name]) for name, stage in chosen.items())


# Parts of a vision-language model and of the text tower beside it (contrastive: ContrastiveModel, or None).


def all_parts(model, contrastive):
    """dict part -> dict name -> Parameter; the ViT, which both models share, stands in it once."""
    return model.parts() | ({} if contrastive is None else {"text_tower": contrastive.parts()["text_tower"]})


def text_side(contrastive):
    """State of a contrastive model without its ViT: dict name -> Tensor, the model's own memory; empty for None."""
    held = {} if contrastive is None else contrastive.state_dict()
    return {name: tensor for name, tensor in held.items() if not name.startswith("vision.")}


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
            data = unsharded(tensor).detach().cpu().reshape(-1).view(torch.uint8).numpy()
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def unsharded(tensor):
    """A whole tensor from one that may be sharded; then all processes call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
