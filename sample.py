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

from nanovlm import recipes
from nanovlm.data import images, video
from nanovlm.data.scene_questions import parse_scene
from nanovlm.data.scenes import render
from nanovlm.evaluation import attention_maps
from nanovlm.generation.fast_decode import FastDecoder
from nanovlm.names import nearest

COMMANDS = ("/image", "/video", "/reset", "/exit")
BAD_INPUT, INTERRUPTED = 2, 130  # exit codes


def parse(arguments):
    """Flags as a namespace; ends the program with code 2 for an unknown flag or two that contradict."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sample.py", description=__doc__, allow_abbrev=False, formatter_class=form)
    add = parser.add_argument
    add("folder", metavar="MODEL_FOLDER", help="what train.py wrote, for example out/nano, a published model's folder or owner/name, or nano")
    add("question", nargs="?", metavar="QUESTION", help="without one: a chat")
    add("--image", action="append", default=[], metavar="PATH", help="a picture; may be given several times")
    add("--video", action="append", default=[], metavar="PATH", help="a clip: folder of frames, GIF or film")
    add("--frames", type=int, default=5, metavar="N", help="pictures taken from a clip")
    add("--tiles", type=float, metavar="N", help="squares along the longer side of a picture; 0: one of the whole; default: as trained")
    add("--draw", metavar="TEXT", help='pose a scene, for example "red circle left of blue star"')
    add("--attention", metavar="PNG", help="save where the answer's tokens looked, over the picture")
    add("--describe-first", action="store_true", help="describe the picture, then answer in that history")
    add("--preset", default="default", metavar="NAME", help="one of the recipe's decodings")
    add("--greedy", action="store_true", help="the most probable token every time")
    add("--num-beams", type=int, metavar="N", help="beam search")
    add("--temperature", type=float, metavar="X", help="sample; below 1 sharper, above 1 flatter")
    add("--top-k", type=int, metavar="K", help="sample among the K most probable tokens")
    add("--top-p", type=float, metavar="P", help="sample from the nucleus of this probability")
    add("--max-new-tokens", type=int, metavar="N", help="length of an answer at most")
    add("--seed", type=int, default=0, help="of sampling and of --draw")
    add("--fast", action="store_true", help="the same tokens by faster steps; on a GPU compiled first")
    add("--timing", action="store_true", help="say at the end how long pictures, prompts and answers took")
    recipes.model_flags(parser)
    args, unknown = parser.parse_known_intermixed_args(arguments)  # the question may stand behind flags
    if unknown:
        for name in (word.split("=")[0] for word in unknown if word.startswith("-")):
            parser.error(f"unknown flag {name!r}.{nearest(name, parser._option_string_actions)}")
        parser.error(f"unexpected {unknown[0]!r}; put the whole question in quotes")
    if args.greedy:
        for name in ("num_beams", "temperature", "top_k", "top_p"):
            if vars(args)[name] is not None:
                parser.error(f"--greedy and --{name.replace('_', '-')} contradict each other")
    if args.frames < 1:
        parser.error(f"--frames {args.frames}: a clip needs at least 1")
    if args.tiles is not None and not args.tiles >= 0:
        parser.error(f"--tiles {args.tiles}: a number from 0 on was expected")
    if args.video and args.attention is not None:
        parser.error("--video and --attention contradict each other: only pictures are drawn")
    shown = args.image or args.video or args.draw is not None
    if args.attention is not None and not (shown and args.question):
        parser.error("--attention needs a question and a picture: give --image or --draw")
    if args.describe_first and args.question and not shown:
        parser.error("--describe-first needs a picture: give --image, --video or --draw")
    return args


def choose_decoding(loaded, args):
    """The preset, changed by the flags: sampler.Decoding."""
    names = ("num_beams", "temperature", "top_k", "top_p", "max_new_tokens")
    changes = {name: vars(args)[name] for name in names if vars(args)[name] is not None}
    if args.greedy:
        changes |= {"do_sample": False, "num_beams": 1}
    elif {"temperature", "top_k", "top_p"} & changes.keys():
        changes["do_sample"] = True
    return dataclasses.replace(loaded.preset(args.preset), **changes)


def first_pictures(loaded, args):
    """Pictures of the command line: PIL images, lists of them for clips; a posed scene is saved in the model's folder."""
    pictures = [images.load(path) for path in args.image] + [[*video.Clip(path, args.frames)] for path in args.video]
    if args.draw is not None:
        generator = numpy.random.default_rng(args.seed)
        size = loaded.image_size or 48  # a model that reads no pictures says so when it is asked
        scene = render(parse_scene(args.draw, generator, size), generator)
        path = (Path(args.folder) if Path(args.folder).is_dir() else Path()) / "drawn.png"
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
        pieces = chat.stream(question, pictures)
    forgotten = chat.forgotten
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    if chat.forgotten > forgotten:
        print(f"(the context was full: {chat.forgotten - forgotten} earlier exchanges forgotten)")
    # its own training pictures have exactly this size; a photograph hardly ever has
    frames = [frame for picture in pictures for frame in (picture if isinstance(picture, list) else [picture])]
    if loaded.remark and any(frame.size != (loaded.image_size, loaded.image_size) for frame in frames):
        print(f"({loaded.remark})")


def save_attention(chat, loaded, args, pictures):
    """Draw where the last answer looked."""
    heat = attention_maps.answer_heat(loaded.model, chat.prompt, chat.answer)
    words = [loaded.tokenizer.decode([token]) for token in chat.answer]
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
                pictures = [*pictures, [*video.Clip(rest.strip(), args.frames)]]
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
        loaded = recipes.load_by_flags(args.folder, args)
        loaded = loaded if args.tiles is None else dataclasses.replace(loaded, tiles=args.tiles)
        chat = loaded.chat(choose_decoding(loaded, args), args.seed)
        if args.fast:
            chat.workspace.fast = FastDecoder(loaded.model.decoder, rows=chat.decoding.num_beams)
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
