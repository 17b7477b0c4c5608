"""What to say when weights do not fit: every tensor by name, drawn together by layer, and the probable reason."""

import re


class WeightsError(ValueError):
    """Weights that do not fit, cannot be read or cannot be written; the message says which, and what to do."""


def grouped(names):
    """Names with their first number drawn together: ["h.0.w", "h.1.w"] -> ["h.{0-1}.w (2)"]."""
    groups = {}
    for name in names:
        head, number, tail = re.fullmatch(r"(\D*)(\d*)(.*)", name, re.DOTALL).groups()
        groups.setdefault((head, tail), []).append(number)
    lines = []
    for (head, tail), numbers in groups.items():
        single = len(numbers) == 1
        lines.append(f"{head}{numbers[0]}{tail}" if single else f"{head}{{{ranges(numbers)}}}{tail} ({len(numbers)})")
    return lines


def ranges(numbers):
    """["0", "1", "2", "5"] -> "0-2,5"."""
    numbers, runs = sorted(set(map(int, numbers))), []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def explain(found, where):
    """Say what does not fit, and why it probably does not.

    Args:
      found: Plan that does not fit. where: str, the checkpoint.
    Returns: str of several lines.
    """
    lines = [f"{where} does not fit the model."]
    for title, names in (("missing", list(found.missing.values())), ("unexpected", found.unexpected)):
        if names:
            lines.append(f"  {title} ({len(names)}): " + "; ".join(grouped(dict.fromkeys(names))))
    if found.misshaped:
        lines.append(f"  mis-shaped ({len(found.misshaped)}): " + "; ".join(
            f"{name} is {list(has)}, expected {list(expected)}" for name, (has, expected) in found.misshaped.items()))
    return "\n".join([*lines, f"  likely cause: {likely_cause(found)}"])


def likely_cause(found):
    """The probable reason why a Plan does not fit: str."""
    names = " ".join(found.unexpected)
    if "Wqkv" in names:
        return ("Phi-2's layout of before January 2024 (fused Wqkv), which is not read; download the present files "
                "of microsoft/phi-2")
    absent = {name.split(".")[0] for name in found.missing} - {
        part.split(".")[0] for _, names in found.consumed.values() for part in names if part is not None
    }
    if absent & {"vision", "decoder"} and found.consumed and not found.unexpected:
        return (f"the files hold no {' and no '.join(sorted(absent))}, as some were published; put them together with "
                "`python -m nanovlm.recipes convert ... --vision PATH --language PATH`")
    if len(found.missing) > len(found.consumed) and (found.unexpected or not found.consumed):
        return "a checkpoint of another family; name the right one with --family, or see what it is with inspect"
    if found.misshaped and not found.missing and not found.unexpected:
        if all("pos" in name for name in found.misshaped):
            return "a position table of another resolution; ask for its resizing with image_size"
        if all(has[1:] == expected[1:] and "embed" in name or "lm_head" in name
               for name, (has, expected) in found.misshaped.items()):
            return "another vocabulary; correct vocab_size in config.json"
        return "another size of the same family; config.json does not belong to these weights"
    if found.missing and not found.unexpected:
        return "a missing shard, or a file that holds only a part of the model (inspect names the parts)"
    if found.unexpected and not found.missing:
        return "a larger model, or one with more parts, than config.json says"
    return "config.json does not belong to these weights, or tensors were renamed"
