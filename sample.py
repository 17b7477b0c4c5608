"""Talk to a trained model.

    python sample.py out/nano --draw "red circle left of blue star" "how many shapes are there?"
    python sample.py out/nano --image photo.jpg "what is this?"
    python sample.py out/nano                       a chat: /image PATH, /video PATH, /reset, /exit
    python sample.py PUBLISHED_FOLDER --dtype bfloat16 --device cuda --preset NAME --timing --image photo.jpg "what is this?"
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy
import torch

from nanovlm import recipes
from nanovlm.data import images, video
from nanovlm.data.scene_questions import parse_scene
from nanovlm.data.scenes import render
from nanovlm.evaluation import attention_maps
from nanovlm.generation.chat import Chat
from nanovlm.generation.fast_decode import FastDecoder
from nanovlm.generation.prefill import Workspace
from nanovlm.machine import DEVICES, DTYPES, check_device, default_device, slow_line
from nanovlm.names import nearest
from nanovlm.vlm import VLM

COMMANDS = ("/image", "/video", "/reset", "/exit")
BAD_INPUT, INTERRUPTED = 2, 130  # exit codes


def make_parser():
    """The command line, as an argparse parser."""
    parser = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="MODEL_FOLDER", help="what train.py wrote, for example out/nano, or a published model")
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="without one: a chat")
    parser.add_argument("--image", action="append", default=[], metavar="PATH", help="a picture; may be given several times")
    parser.add_argument("--video", action="append", default=[], metavar="PATH", help="a clip: folder of frames, GIF or film")
    parser.add_argument("--frames", type=int, default=5, metavar="N", help="pictures taken from a clip")
    parser.add_argument("--draw", metavar="TEXT", help='pose a scene, for example "red circle left of blue star"')
    parser.add_argument("--attention", metavar="PNG", help="save where the answer's tokens looked, over the picture")
    parser.add_argument("--describe-first", action="store_true", help="describe the picture, then answer in that history")
    parser.add_argument("--preset", default="default", metavar="NAME", help="one of the recipe's decodings")
    parser.add_argument("--greedy", action="store_true", help="the most probable token every time")
    parser.add_argument("--num-beams", type=int, metavar="N", help="beam search")
    parser.add_argument("--temperature", type=float, metavar="X", help="sample; below 1 sharper, above 1 flatter")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K most probable tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the nucleus of this probability")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="length of an answer at most")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of --draw")
    parser.add_argument("--recipe", metavar="FILE.py", help="the recipe file that the model was trained from, if from one")
    parser.add_argument("--device", default=default_device(), help=DEVICES)
    parser.add_argument("--fast", action="store_true", help="the same tokens by faster steps; on a GPU compiled first")
    parser.add_argument("--timing", action="store_true", help="say at the end how long pictures, prompts and answers took")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    return parser


def as_flag(name):
    """The flag of a namespace's field: top_k -> --top-k."""
    return "--" + name.replace("_", "-")


def parse(arguments):
    """Flags as a namespace; ends the program with code 2 for an unknown flag or two that contradict."""
    parser = make_parser()
    args, unknown = parser.parse_known_intermixed_args(arguments)  # the question may stand behind flags
    if unknown:
        flags = [as_flag(name) for name in vars(args) if name not in ("folder", "question")]
        for name in (word.split("=")[0] for word in unknown if word.startswith("-")):
            parser.error(f"unknown flag {name!r}.{nearest(name, flags)}")
        parser.error(f"unexpected {unknown[0]!r}; put the whole question in quotes")
    if args.greedy:
        for name in ("num_beams", "temperature", "top_k", "top_p"):
            if vars(args)[name] is not None:
                parser.error(f"--greedy and {as_flag(name)} contradict each other")
    if args.frames < 1:
        parser.error(f"--frames {args.frames}: a clip needs at least 1")
    if args.video and args.attention is not None:
        parser.error("--video and --attention contradict each other: only pictures are drawn")
    shown = args.image or args.video or args.draw is not None
    if args.attention is not None and not (shown and args.question):
        parser.error("--attention needs a question and a picture: give --image or --draw")
    if args.describe_first and args.question and not shown:
        parser.error("--describe-first needs a picture: give --image, --video or --draw")
    return args


def choose_decoding(decodings, args):
    """The preset, changed by the flags: sampler.Decoding."""
    if args.preset not in decodings:
        raise ValueError(f"unknown preset {args.preset!r}.{nearest(args.preset, decodings)}")
    names = ("num_beams", "temperature", "top_k", "top_p", "max_new_tokens")
    changes = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    if args.greedy:
        changes |= {"do_sample": False, "num_beams": 1}
    elif {"temperature", "top_k", "top_p"} & changes.keys():
        changes["do_sample"] = True
    return dataclasses.replace(decodings[args.preset], **changes)


def open_chat(loaded, args):
    """A Chat with the loaded model."""
    on_gpu = torch.device(args.device).type == "cuda"
    decoding = choose_decoding(loaded.decodings, args)
    fast = None
    if args.fast:
        fast = FastDecoder(loaded.model.decoder, static=on_gpu, compiled=on_gpu, rows=decoding.num_beams)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    return Chat(loaded, decoding, generator, Workspace(fast))


def first_pictures(loaded, args):
    """Pictures of the command line: PIL images, and tuples of them for clips; a posed scene is saved in the model's folder."""
    pictures = [images.load(path) for path in args.image]
    pictures += [tuple(video.load(path, args.frames)) for path in args.video]
    if args.draw is not None:
        generator = numpy.random.default_rng(args.seed)
        scene = render(parse_scene(args.draw, generator, loaded.image_size), generator)
        path = Path(args.folder) / "drawn.png"
        scene.save(path)
        print(f"(drawn: {path})")
        pictures.append(scene)
    return pictures


def answer(chat, loaded, args, question, pictures):
    """Print an answer while it is made."""
    if args.describe_first and pictures:
        describe = loaded.decodings.get("describe", chat.decoding)
        description, pieces = chat.describe_first(question, pictures, describe)
        print(f"(description: {description})")
    else:
        pieces = chat.ask(question, pictures)
    forgotten = chat.forgotten
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    if chat.forgotten > forgotten:
        print(f"(the context was full: {chat.forgotten - forgotten} earlier exchanges forgotten)")
    # its own training pictures have exactly this size; a photograph hardly ever has
    frames = [frame for picture in pictures for frame in (picture if isinstance(picture, tuple) else (picture,))]
    if loaded.remark and any(frame.size != (loaded.image_size, loaded.image_size) for frame in frames):
        print(f"({loaded.remark})")


def save_attention(chat, loaded, args, pictures):
    """Draw where the last answer looked."""
    exchange, tokenizer = chat.last, loaded.tokenizer
    heat = attention_maps.answer_heat(loaded.model, exchange.row, exchange.answer, exchange.visual_inputs)
    words = [tokenizer.decode([token]) for token in exchange.answer]
    title = f"where each token of the answer to {args.question!r} looked (seed {args.seed})"
    attention_maps.draw(args.attention, pictures, heat, words, loaded.image_size, loaded.image_fit, title)
    print(f"(attention: {args.attention})")


def converse(chat, loaded, args, pictures):
    """Chat until /exit or the end of the input."""
    print("Ask. /image PATH or /video PATH shows something with the next question, /reset begins anew, /exit ends.")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/exit":
                return
            if command == "/reset":
                chat.reset()
                pictures = []
            elif command == "/image":
                pictures = [*pictures, images.load(rest.strip())]
            elif command == "/video":
                pictures = [*pictures, tuple(video.load(rest.strip(), args.frames))]
            elif command.startswith("/"):
                print(f"unknown command {command!r}.{nearest(command, COMMANDS)}")
            elif line:
                answer(chat, loaded, args, line, pictures)
                pictures = []
        except (ValueError, OSError) as error:
            print(f"({error})")  # the conversation goes on as if nothing had been said
        except KeyboardInterrupt:
            print("\n(stopped; /exit ends)")


def main(arguments=None):
    """Run the command line; returns the exit code."""
    args = parse(arguments)
    try:
        check_device(args.device)
        if line := slow_line(args.dtype, args.device):
            print(f"({line})", file=sys.stderr)
        loaded = recipes.load(args.folder, dtype=DTYPES[args.dtype], device=args.device, recipe=args.recipe)
        if not isinstance(loaded.model, VLM):
            raise ValueError(f"{args.folder} holds a {type(loaded.model).__name__} alone, and no vision-language model; "
                             "put one together with `python -m nanovlm.recipes convert --vision PATH --language PATH`")
        chat = open_chat(loaded, args)
        pictures = first_pictures(loaded, args)
        if args.question is None:
            converse(chat, loaded, args, pictures)
        else:
            answer(chat, loaded, args, args.question, pictures)
            if args.attention is not None:
                save_attention(chat, loaded, args, pictures)
        if args.timing:
            print("\n".join(chat.workspace.report()), file=sys.stderr)
        return 0
    except (ValueError, OSError, ImportError) as error:  # a film needs a package that pictures do not
        print(f"sample.py: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print()
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
