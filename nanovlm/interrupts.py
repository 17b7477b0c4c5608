"""Ctrl-C and SIGTERM as requests: finish the step, write a checkpoint, leave. Asking twice leaves at once."""

import contextlib
import os
import signal


class Stopped(Exception):
    """The run ended before its last step, with everything saved.

    exit_code: int, of the process. reason: str.
    """

    def __init__(self, exit_code, reason):
        super().__init__(exit_code, reason)  # both, so that it can be sent to another process
        self.exit_code = exit_code
        self.reason = reason

    def __str__(self):
        return self.reason


class StopRequests:
    """Context in which SIGINT and SIGTERM set `requested` instead of ending the process.

    requested: Stopped to raise at the next safe moment, or None.
    """

    def __init__(self):
        self.requested = None
        self.safe = False
        self.previous = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = Stopped(128 + number, f"{signal.Signals(number).name} received")
        if self.safe:
            raise self.requested

    @contextlib.contextmanager
    def anywhere(self):
        """Within, nothing trains and nothing is unsaved: a request takes effect immediately."""
        if self.requested is not None:
            raise self.requested
        self.safe = True
        try:
            yield
        finally:
            self.safe = False
