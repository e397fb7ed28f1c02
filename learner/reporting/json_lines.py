"""Files with one JSON object a line, which a kill leaves readable."""

import json
import math
import mmap
from pathlib import Path
from typing import Any, TextIO


class JsonLines:
    """Appends one JSON object per line, each on disk when `write` returns. A resumed run appends to what is there.

    A last line that a kill has torn is taken away: every line can be read.
    """

    def __init__(self, path: Path) -> None:
        # A model can sample half of a pair of surrogates, which JSON writes as an escape.
        self._file: TextIO = path.open("a", encoding="utf-8", errors="backslashreplace")
        self._file.truncate(_end_of_lines(path))

    def write(self, values: dict[str, Any]) -> None:
        """Append one line. Numbers that JSON does not know (NaN, infinity) become null, objects their text."""
        self._file.write(json.dumps(plain(values), allow_nan=False, ensure_ascii=False, default=str) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def plain(value: Any) -> Any:
    """Plain JSON values: arrays of numpy and their scalars unwrapped, numbers that are not finite as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _end_of_lines(path: Path) -> int:
    """Size of the file up to its last whole line."""
    if not path.stat().st_size:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.rfind(b"\n") + 1
