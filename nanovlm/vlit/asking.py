"""Put requests to a generator, several at once where it helps, and write every answer down before going on."""

import queue
import threading
from collections import Counter
from dataclasses import dataclass

from tqdm import tqdm

from nanovlm.data.images import ImageError
from nanovlm.vlit.generators import Chat, Refused
from nanovlm.vlit.replies import key_of


@dataclass(frozen=True)
class Request:
    """id: str, unique within a run. chat: Chat. what: whatever its maker needs to use the answer."""

    id: str
    chat: Chat
    what: object = None


def ask(requests, generator, drawing, replies, total=None):
    """Put every request whose answer is not in the file yet.

    Args:
      requests: iterable of Request. generator: see generators.py. drawing: generators.Drawing.
      replies: replies.Replies, which the answers are added to. total: number of requests, for the bar.
    Returns: (Counter of "asked", "recorded" and "refused", list of (id, why) of those refused).
    Raises: GeneratorError where the generator cannot go on; what was answered until then is in the file.
    """
    counts, refused = Counter(), []
    with tqdm(desc=f"asking {generator.name}", total=total, unit="request", disable=None) as bar:
        batches = _batches(requests, generator, drawing, replies, counts, bar)
        for batch, outcome in in_parallel(
            lambda batch: _answers(batch, generator, drawing), batches, generator.workers
        ):
            for request, answer in zip(batch, outcome):
                if isinstance(answer, list):
                    replies.add(key_of(request.chat, generator, drawing), request.chat, generator, answer)
                    counts["asked"] += 1
                else:
                    refused.append((request.id, str(answer)))
                    counts["refused"] += 1
            bar.update(len(batch))
            bar.set_postfix(counts, refresh=False)
    return counts, refused


def _batches(requests, generator, drawing, replies, counts, bar):
    """Lists of requests without an answer; two of the same words are asked once."""
    batch, waiting = [], set()
    for request in requests:
        key = key_of(request.chat, generator, drawing)
        if key in replies or key in waiting:
            counts["recorded"] += 1
            bar.update()
            continue
        waiting.add(key)
        batch.append(request)
        if len(batch) == generator.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _answers(batch, generator, drawing):
    """The answers to a batch: per request a list of str, or the exception that says why there is none."""
    try:
        return generator.generate(
            [request.chat for request in batch], n=drawing.n, temperature=drawing.temperature,
            max_tokens=drawing.max_tokens, seed=drawing.seed, stop=drawing.stop,
        )  # fmt: skip
    except (Refused, ImageError, FileNotFoundError) as error:
        if len(batch) == 1:
            return [error]
    return [answer for request in batch for answer in _answers([request], generator, drawing)]


def in_parallel(function, items, workers):
    """Call a function on items, in several threads.

    Args:
      function: item -> result. items: iterable, taken no faster than needed. workers: int; 1 = in this thread.
    Yields: (item, result), in the order of completion.
    Raises: what the function raises; first the results of the calls that were under way are handed out. The threads
      are daemons: a program that is interrupted does not wait for them.
    """
    if workers == 1:
        yield from ((item, function(item)) for item in items)
        return
    todo, done, under_way, failure = queue.Queue(), queue.Queue(), 0, None

    def work():
        while True:
            item = todo.get()
            try:
                done.put((item, function(item), None))
            except Exception as error:  # handed to the caller's thread
                done.put((item, None, error))

    for _ in range(workers):
        threading.Thread(target=work, daemon=True).start()
    items = iter(items)
    while True:
        while failure is None and under_way < workers:
            try:
                todo.put(next(items))
            except StopIteration:
                break
            under_way += 1
        if not under_way:
            break
        item, result, error = done.get()
        under_way -= 1
        if error is None:
            yield item, result
        else:
            failure = failure or error
    if failure is not None:
        raise failure
