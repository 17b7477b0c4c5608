"""Does the port give what the official code gave? A golden file, run through the recipe and compared tensor by tensor.

    python tests/official/compare.py FILE.safetensors …

A golden file (golden.py) is a small model of any size with random weights under their published names, inputs, and the
outputs of the official code. The model is built from the file's config by the recipe, its weights go through the
recipe's rename table, and every output must agree to 1e-5: float32 on another machine moves a correct port by less
than half of that. Weights and outputs that are missing, left over or of another shape end the comparison as well.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from nanovlm.abstractor import patch_positions
from nanovlm.names import nearest
from nanovlm.recipes import llava_phi, lynx, mplug_owl2, open_flamingo
from golden import GoldenError, read
from golden_run import FAMILIES, PLACEHOLDER, run_spliced, take
from golden_sizes import settle
from nanovlm.attention import sincos
from nanovlm.vlm import IGNORE
from nanovlm.published.weights import plan, to_ours

TOLERANCE = 1e-5  # largest difference of a value
RECIPES = {"lynx": lynx, "mplug_owl2": mplug_owl2, "llava_phi": llava_phi, "open_flamingo": open_flamingo}


def build(golden):
    """The model of a golden file with its weights, float32, in evaluation mode.

    Args:
      golden: golden.Golden.
    Returns: vlm.VLM.
    Raises: ValueError (GoldenError, WeightsError) for sizes or weights that do not fit.
    """
    recipe = RECIPES[golden.family]
    config = settle(golden.family, getattr(recipe, "nested", dict)(golden.config), golden.weights)
    try:
        model = recipe.build(config)
    except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise GoldenError(f"config: a value has the wrong type, or makes no sense ({type(error).__name__}: {error})") from error
    table, state = recipe.LAYOUT(config), model.state_dict()
    renamed = to_ours(table, golden.weights, state, "weights/")
    model.load_state_dict({name: tensor.float() for name, tensor in renamed.items()})
    theirs, ours = ({name: tuple(tensor.shape) for name, tensor in some.items()} for some in (golden.weights, state))
    for name in plan(table, theirs, ours).skipped:
        check_computed(name, golden.weights[name].float(), model)
    return model.eval()


def check_computed(name, tensor, model):
    """Raise GoldenError for a table in the file that is not the one that the model computes."""
    config = model.decoder.config
    if name.endswith("inv_freq"):
        expected = config.rope_base ** (-torch.arange(0, config.num_rotary, 2) / config.num_rotary)
    elif name.endswith("q_pos_embed"):
        expected = sincos(*model.bridge.queries.shape)
    elif name.endswith("k_pos_embed"):
        expected = patch_positions(model.vision.num_tokens(model.vision.image_size), model.vision.config.width)
    else:
        return
    if tensor.shape != expected.shape or bool((tensor - expected).abs().max() > TOLERANCE):
        raise GoldenError(f"weights/{name} is no parameter but a table, and not the one that the model computes")


@torch.no_grad()
def run(golden):
    """Run a golden file's inputs.

    Args:
      golden: golden.Golden.
    Returns: {output name: (Tensor, bool mask over its first axes of what counts, or None for everything)}.
    Raises: ValueError (GoldenError, WeightsError) for what cannot be run.
    """
    execute, known, _ = FAMILIES[golden.family]
    unknown = [name for name in golden.inputs if name not in known]
    if unknown:
        raise GoldenError(f"in/{unknown[0]} is unknown to {golden.family}.{nearest(unknown[0], known)}")
    model = build(golden)
    vocab_size = model.decoder.config.vocab_size
    for name, others in (("input_ids", (PLACEHOLDER,) if execute is run_spliced else ()), ("text_ids", ()), ("labels", (IGNORE,))):
        if name in golden.inputs:
            check_ids(take(golden.inputs, name, "ids", (2,)), name, vocab_size, others)
    return execute(model, golden)


def check_ids(ids, name, vocab_size, others):
    """Raise GoldenError for what is neither an id of the vocabulary nor one of `others`."""
    wrong = [id for id in ids.flatten().tolist() if not 0 <= id < vocab_size and id not in others]
    if wrong:
        raise GoldenError(f"in/{name} holds {wrong[0]}, which is no id of the {vocab_size} in the vocabulary")


def verdicts(golden, results):
    """One line per output: list of (bool agrees, str).

    Args:
      golden: golden.Golden. results: as `run` returns.
    """
    lines = []
    for name, expected in golden.outputs.items():
        found, mask = results.get(name, (None, None))
        if found is None:
            lines.append((False, f"{name:16} unknown: {golden.family} gives {', '.join(results)}"))
        elif found.shape != expected.shape:
            shapes = f"the file has {list(expected.shape)}, the model gives {list(found.shape)}"
            lines.append((False, f"{name:16} misshapen: {shapes}"))
        else:
            difference = (found - expected.float()).abs()
            largest = float((difference if mask is None else difference[mask]).max())
            agrees = largest <= TOLERANCE  # false for NaN
            lines.append((agrees, f"{name:16} largest difference {largest:.1e}  {'agrees' if agrees else 'DIFFERS'}"))
    for name in FAMILIES[golden.family][2]:
        if name not in golden.outputs:
            lines.append((False, f"{name:16} missing: a file of {golden.family} has it"))
    return lines


def main(path):
    """Compare a file and print what came out.

    Args:
      path: str or Path of a golden file.
    Returns: int, the exit code: 0 if every output agrees, otherwise 1.
    """
    try:
        golden = read(path)
        lines = verdicts(golden, run(golden))
    except (ValueError, RuntimeError, IndexError) as error:
        print(f"{path}: cannot be compared. {error}", file=sys.stderr)
        return 1
    print(f"{path}: {golden.family}")
    print("\n".join(line for _, line in lines))
    return 0 if all(agrees for agrees, _ in lines) else 1


if __name__ == "__main__":
    sys.exit(max(main(path) for path in sys.argv[1:]))
