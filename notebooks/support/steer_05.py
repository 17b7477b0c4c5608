"""What the adapters of a trained lynx_mini do to its frozen language model.

    python notebooks/support/steer_05.py out/lynx_mini      writes notebooks/results/lynx_mini_adapters.json
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import torch
import torch.nn.functional as F
from support.provenance import stamp

from nanovlm import recipes
from nanovlm.adapter import Adapter
from nanovlm.data.batching import build_batch
from nanovlm.data.records import Record, Turn
from nanovlm.recipes import lynx_mini_tests, nano_tests
from nanovlm.vlm import IGNORE, IMAGE_TOKEN

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)  # times what every adapter has learned to add
PICTURES = 12  # of each test, at every scale


def questions(number):
    """Records of general knowledge without pictures."""
    return [Record(f"knowledge/{n}", (), ((Turn("user", (f"{question} Answer briefly.",)), Turn("assistant", (answer,))),))
            for n, (question, answer, *_) in enumerate(lynx_mini_tests.KNOWLEDGE[:number])]


def batch_of(assistant, records):
    """The vlm.Batch of some records, as the model was trained on them."""
    return build_batch(records, assistant.template, assistant.tokenizer, assistant.model.num_image_tokens,
                       assistant.image_size, assistant.image_fit, 512, preprocessing=assistant.preprocessing)


def adapters(model):
    """[(layer's number, its Adapter)]."""
    return [(n, layer.adapter) for n, layer in enumerate(model.decoder.layers) if isinstance(layer.adapter, Adapter)]


def writes(assistant, records):
    """What every adapter writes, as a share of what it is given: {"image tokens", "words"}: [one number a layer]."""
    batch, found = batch_of(assistant, records), {"image tokens": [], "words": []}
    places = {"image tokens": batch.ids == IMAGE_TOKEN, "words": (batch.ids != IMAGE_TOKEN) & (batch.segments >= 0)}

    def note(module, given, written):
        size = lambda x: x.square().mean(-1).sqrt()
        share = size(written - given[0]) / size(given[0])
        for name, chosen in places.items():
            found[name].append(share[chosen].median().item())

    hooks = [adapter.register_forward_hook(note) for _, adapter in adapters(assistant.model)]
    assistant.model(batch)
    for hook in hooks:
        hook.remove()
    return found


def fresh_shift(assistant, stds=(0.005, 0.02, 0.08), seed=0):
    """{std: Kullback-Leibler divergence in nats, where answers begin} of fresh adapters from N(0, std^2)."""
    model, batch, found = assistant.model, batch_of(assistant, questions(40)), {}
    predicts = batch.labels[:, 1:] != IGNORE
    learned = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".adapter." in name}
    with lynx_mini_tests.scaled(model, 0):
        before = model(batch)[:, :-1][predicts].log_softmax(-1)
    for std in stds:
        torch.manual_seed(seed)
        for _, adapter in adapters(model):
            adapter.__init__(adapter.norm.weight.numel(), adapter.down.out_features)
            for linear in (adapter.down, adapter.up):
                torch.nn.init.normal_(linear.weight, std=std)
        after = model(batch)[:, :-1][predicts].log_softmax(-1)
        found[str(std)] = F.kl_div(after, before, log_target=True, reduction="batchmean").item()
    model.load_state_dict(learned, strict=False)
    return found


def turned_up(assistant):
    """[{"scale", "knowledge", test: share of right answers}] with the adapters' scale turned from 0 to 1."""
    found, tests = [], lynx_mini_tests.tests(PICTURES)
    for scale in SCALES:
        with lynx_mini_tests.scaled(assistant.model, scale):
            right = {name: nano_tests.shares(nano_tests.ask(assistant, records))["all"] for name, records in tests.items()}
            found.append({"scale": scale, "knowledge": lynx_mini_tests.knows(assistant)} | right)
        print(found[-1], flush=True)
    return found


@torch.no_grad()
def main(folder):
    """Write the file. folder: of a finished run."""
    assistant = recipes.load(folder)
    scenes = lynx_mini_tests.tests(PICTURES)["scenes_new"]
    layers = [n for n, _ in adapters(assistant.model)]
    found = {"made of": stamp(), "turned up": turned_up(assistant), "layers": layers, "writes": writes(assistant, scenes),
             "fresh": fresh_shift(assistant)}
    path = ROOT / "notebooks" / "results" / "lynx_mini_adapters.json"
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
