"""Why a learner ended, left in its run folder for the process that started it."""

import contextlib
import os
from pathlib import Path


def clear(run_dir: Path) -> None:
    """Before a learner starts."""
    for path in run_dir.glob("last-words-*"):
        path.unlink(missing_ok=True)


def leave(run_dir: Path, code: int, line: str) -> None:
    """Why the learner ends, for who started it; the first rank to fail has the word, the others fail because of it.

    The file is named after their parent, torchrun: a learner whose launcher was killed may still end in the folder.
    """
    path = run_dir / f"last-words-{os.getppid()}"
    with contextlib.suppress(OSError), path.open("x", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{code} {line}\n")


def read(run_dir: Path, torchrun: int) -> tuple[int, str] | None:
    """Exit code and line of the learner of this process, which has ended; None if it had no time to say so."""
    with contextlib.suppress(OSError, ValueError):
        code, _, line = (run_dir / f"last-words-{torchrun}").read_text(encoding="utf-8").strip().partition(" ")
        return int(code), line
    return None
