"""predictions.jsonl: what a model answered, one line each, so that a run can be stopped at any time and taken up again."""

import json
import os


class PredictionFile:
    """Predictions on disk. The first line holds the settings; a run with other settings is refused.

    Args:
      path: Path. settings: dict, all that the answers depend on.
    Raises: ValueError if the file belongs to other settings, naming the first that differs, or if a line is broken.
    """

    def __init__(self, path, settings):
        self.path, self.predictions = path, []
        if not path.exists():
            path.write_text(json.dumps({"settings": settings}) + "\n")
            return
        text = path.read_text()
        lines = text.split("\n")
        if lines[-1]:  # the run ended while it wrote this line
            os.truncate(path, len(text.encode()) - len(lines[-1].encode()))
        try:
            head, *self.predictions = [json.loads(line) for line in lines[:-1]]
            found = head["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of predictions ({error}); give another --out, or delete it") from error
        for name in settings.keys() | found.keys():
            if settings.get(name) != found.get(name):
                raise ValueError(
                    f"{path} was made with {name} {found.get(name)!r}, now it is {settings.get(name)!r}; give another --out"
                )

    def done(self):
        """Ids that have an answer: set of str."""
        return {one["id"] for one in self.predictions}

    def add(self, prediction):
        """Write one down; it is in the file when this returns."""
        self.predictions.append(prediction)
        with open(self.path, "a") as file:
            file.write(json.dumps(prediction, ensure_ascii=True) + "\n")
