"""How checkpoints are written: whole or not at all, at once or while training goes on.

The folder is written under a temporary name, every file is forced to the disk, then the folder is renamed: a rename
happens or does not, so a kill or a full disk at any moment leaves the previous checkpoint in place. Of several processes
the main one writes; where they hold shards, each writes its own, and the main one renames when all are done. What fails
in one of them has failed in all.
"""

import json
import os
import shutil
import threading

from safetensors import SafetensorError

from nanovlm import sharded_checkpoint
from nanovlm.checkpoint import PREFIX, TEMPORARY, CheckpointError, complete, sync, write_tensors, write_text
from nanovlm.parallel import Processes


def save(out, step, tensors, state, processes=Processes(), keep=1):
    """Write a checkpoint, then remove the older ones.

    Args:
      out: Path, the run's output folder.
      step: int, optimizer steps of the whole run that are done.
      tensors: dict of dicts, file name without ending -> tensor name -> Tensor.
      state: JSON-able dict.
      processes: all of them call this. keep: int, checkpoints that stay, this one included.
    Returns: Path of the checkpoint's folder.
    Raises: CheckpointError if the disk is full or the folder cannot be written; the previous checkpoint stays.
    """
    return begin(out, step, tensors, state, processes, keep)()


def begin(out, step, tensors, state, processes, keep, copy=False):
    """`save` in two parts: what must happen before the next step.

    Args:
      copy: bool, the tensors may change before the rest has happened.
    Returns: a function for the rest, with `save`'s result.
    """
    folder = out / "state" / f"{PREFIX}{step:08d}"
    temporary = folder.with_name(folder.name + TEMPORARY)

    def attempt(action, here):
        """Try something in this process, if it is its turn; if it fails anywhere, it has failed everywhere."""
        error = result = None
        try:
            result = action() if here else None
        except (OSError, SafetensorError) as raised:
            error = raised
        try:
            processes.agree(error, processes.saving)
        except (OSError, SafetensorError) as error:
            if processes.main:
                shutil.rmtree(temporary, ignore_errors=True)  # gives the space back; the next save sweeps up what is left
            raise CheckpointError(f"the checkpoint of step {step} could not be written to {out / 'state'} ({error}). "
                                  f"{_intact(out)} Make room, then continue with --resume.") from error
        return result

    def make_room():
        remove_unfinished(out)
        temporary.mkdir(parents=True)

    def write():
        for name, content in tensors.items():
            write_tensors(temporary / f"{name}.safetensors", content)

    def complete_it():
        write_text(temporary / "state.json", json.dumps(state, indent=1))
        sync(temporary)
        os.rename(temporary, folder)
        sync(folder.parent)
        remove_old(out, keep)

    if processes.first(folder.exists() or None):
        return lambda: folder  # the same step of the same run: the same content
    attempt(make_room, processes.main)
    if processes.mode == "fsdp":
        write = sharded_checkpoint.begin(temporary, tensors, processes)  # from here on its thread talks to the others
    elif copy and processes.main:
        tensors = {name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in content.items()}
                   for name, content in tensors.items()}

    def rest():
        attempt(write, processes.main or processes.mode == "fsdp")
        attempt(complete_it, processes.main)
        return folder

    return rest


def remove_old(out, keep):
    """Remove all but the last `keep` checkpoints."""
    for old in complete(out)[:-keep]:
        doomed = old.with_name(old.name + TEMPORARY)  # a half-removed folder must not look complete
        os.rename(old, doomed)
        shutil.rmtree(doomed)


class Writer:
    """Writes one checkpoint after the other, at once or, with `background`, by a thread while training goes on."""

    def __init__(self, background):
        self.background = background
        self.thread = None
        self.error = None

    def save(self, out, step, tensors, state, processes, keep):
        """As `save`; in the background, what goes wrong is raised by the next call."""
        self.wait()
        rest = begin(out, step, tensors, state, processes, keep, copy=self.background)
        if not self.background:
            rest()
            return

        def work():
            try:
                rest()
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=work)
        self.thread.start()

    def wait(self):
        """Until what was begun is written. Raises: CheckpointError if it could not be."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error


def _intact(out):
    found = complete(out)
    return f"The checkpoint {found[-1].name} is intact." if found else "There is no earlier checkpoint."


def remove_unfinished(out):
    """Delete what a killed or failed write has left behind."""
    for path in (out / "state").glob(f"*{TEMPORARY}"):
        shutil.rmtree(path)
