"""Imported by every Python that starts with this folder on its path: writes down each name that an unpickler looks up.

Unpickling can call whatever the bytes name; the interpreter announces each name that it looks up for that. One JSON
object a line goes to the file that the variable names: the process, the name, and who asked for it.
"""

import json
import os
import sys
import traceback
from typing import Any

LOG_VARIABLE = "OUTRIDER_AUDIT_LOG"


def _install(path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            callers = [f"{frame.filename}:{frame.name}" for frame in traceback.extract_stack(limit=12)[:-1]]
            line = {"pid": os.getpid(), "name": ".".join(map(str, arguments)), "callers": callers}
            os.write(log, (json.dumps(line) + "\n").encode())

    sys.addaudithook(hook)


if LOG_VARIABLE in os.environ:
    _install(os.environ[LOG_VARIABLE])
