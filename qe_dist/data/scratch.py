"""Encoded images that are no files of their own (of a table, a data URI, an address) wait on disk, not in memory."""

import atexit
import os
import tempfile
from functools import cache
from threading import Lock

from qe_dist.core.errors import NO_ROOM, ConfigError, NoRoomError


class Scratch:
    """A temporary file without a name, which ends with the process."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="qe-dist-images-", buffering=0)  # noqa: SIM115 (for the whole process)
        self.close = self._file.close
        atexit.register(self.close)
        self._end, self._lock = 0, Lock()

    def put(self, content: bytes) -> tuple[int, int]:
        """Begin and length of the content in the file. NoRoomError where the disk is full, ConfigError where it
        cannot be written."""
        with self._lock:
            begin, self._end = self._end, self._end + len(content)
        try:
            written = 0
            while written < len(content):
                written += os.pwrite(self._file.fileno(), content[written:], begin + written)
        except OSError as error:
            raise (NoRoomError if error.errno in NO_ROOM else ConfigError)(
                f"{tempfile.gettempdir()}: the images of the samples cannot be kept there ({error.strerror}); "
                "TMPDIR can name another folder"
            ) from None
        return begin, len(content)

    def get(self, begin: int, length: int) -> bytes:
        """What was put there."""
        content = os.pread(self._file.fileno(), length, begin)
        if len(content) != length:
            raise RuntimeError("this image is in the scratch file of another process; send samples by `carried`")
        return content


_made, _first = cache(Scratch), Lock()


def scratch() -> Scratch:
    """The scratch file of this process, one for all of its threads."""
    with _first:
        return _made()
