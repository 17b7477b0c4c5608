"""Picture files that were decoded and resized before, as many as fit into a fixed amount of memory.

A key names the file as it stands on the disk (path, size in bytes, time of its last change), so that a picture that was
replaced is read anew. What was used longest ago goes first.
"""

import os
import threading
from collections import OrderedDict

MAX_BYTES = 256 * 2**20  # about 800 pictures of 336 x 336 pixels, or 20,000 of 64 x 64


class FrameCache:
    """Arrays by key, at most `max_bytes` of them; several threads may use it."""

    def __init__(self, max_bytes=MAX_BYTES):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.arrays = OrderedDict()  # the longest unused first
        self.lock = threading.Lock()

    def get(self, path, how, make):
        """The array of a picture file, made only if it is not there.

        Args:
          path: str or Path of the file. how: hashable, all else that decides the array. make: () -> numpy array.
        Returns: uint8 array that cannot be written to.
        Raises: whatever make raises; nothing is kept then.
        """
        try:
            status = os.stat(path)
        except OSError:
            return make()  # which says what is wrong with the file
        key = (str(path), status.st_size, status.st_mtime_ns, how)
        with self.lock:
            if key in self.arrays:
                self.arrays.move_to_end(key)
                return self.arrays[key]
        array = make()
        array.setflags(write=False)
        with self.lock:
            if key not in self.arrays:
                self.arrays[key] = array
                self.num_bytes += array.nbytes
            while self.num_bytes > self.max_bytes:
                _, dropped = self.arrays.popitem(last=False)
                self.num_bytes -= dropped.nbytes
        return array


FRAMES = FrameCache()
