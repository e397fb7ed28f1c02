"""One container: a process in a root of its own, made as the manifest says. Run by the runner as root with a JSON file.

Enters the pod's sandbox, makes new mount and process namespaces, builds a root in memory with nothing in it but the
system's programs, the Python environment, the code and the volumes, gives its privileges up and starts the command.
Standard output and error are the log. Prints nothing; the exit code is the command's, or 128 and the signal's number.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.manifests.runner import kernel

# Where the code lies in the images.
WORKDIR = "/app"
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ssl", "localtime", "alternatives")


@dataclass(frozen=True)
class Spec:
    """What to run, and where."""

    sandbox_pid: int
    root: str  # an empty directory to build in
    checkout: str
    environment: list[str]  # directories of Python's environment, shown where they are
    files: dict[str, str]  # of /etc
    mounts: list[dict[str, Any]]  # {"source": ..., "target": ..., "readonly": ...}
    readonly_root: bool
    uid: int
    gid: int
    groups: list[int]
    command: list[str]
    env: dict[str, str]
    pid_file: str
    shares_processes: bool  # with the pod's own process, which is then process 1


def main() -> None:
    """Parent: waits for the command and passes its end on. Child: becomes it."""
    kernel.die_with_parent()
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    for kind in ("net", "uts", "ipc"):
        kernel.enter(spec.sandbox_pid, kind)
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWPID)
    if spec.shares_processes and os.fork() == 0:
        kernel.die_with_parent()
        signal.pause()
    pid = os.fork()
    if pid == 0:
        kernel.die_with_parent()
        _become(spec)
    partial = Path(f"{spec.pid_file}.partial")
    partial.write_text(str(pid))
    partial.rename(spec.pid_file)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    sys.exit(code if code >= 0 else 128 - code)


def _become(spec: Spec) -> None:
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    _build_root(spec)
    os.chroot(spec.root)
    os.chdir(WORKDIR)
    if spec.readonly_root:
        kernel.mount("", "/", flags=kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY)
    os.umask(0o022)
    kernel.give_up_privileges(spec.uid, spec.gid, spec.groups)
    kernel.die_with_parent()  # again: another user does not inherit it
    os.closerange(3, 256)
    program = _find(spec.command[0], spec.env["PATH"])
    os.execve(program, [program, *spec.command[1:]], spec.env)


def _build_root(spec: Spec) -> None:
    root = Path(spec.root)
    kernel.mount("tmpfs", spec.root, "tmpfs", data="mode=755")
    for name in ("usr", "bin", "sbin", "lib", "lib32", "lib64", "opt"):
        source = Path("/", name)
        if source.is_symlink():
            (root / name).symlink_to(source.readlink())
        elif source.is_dir():
            _show(str(source), root, f"/{name}")
    for name in ("proc", "sys", "dev", "etc"):
        (root / name).mkdir()
    kernel.mount("proc", str(root / "proc"), "proc")
    kernel.bind("/sys", str(root / "sys"), readonly=True)
    for name in _DEVICES:
        (root / "dev" / name).touch()
        kernel.bind(f"/dev/{name}", str(root / "dev" / name), readonly=False)
    (root / "dev" / "shm").mkdir()
    kernel.mount("tmpfs", str(root / "dev" / "shm"), "tmpfs", data="mode=1777,size=64m")
    for name in _ETC:
        if Path("/etc", name).exists():
            _show(f"/etc/{name}", root, f"/etc/{name}")
    for path, text in spec.files.items():
        (root / path.lstrip("/")).write_text(text)
    _show(spec.checkout, root, WORKDIR)
    for mount in sorted(spec.mounts, key=lambda mount: str(mount["target"])):
        _show(mount["source"], root, mount["target"], readonly=mount["readonly"])
    for folder in spec.environment:
        _show(folder, root, folder)


def _show(source: str, root: Path, target: str, *, readonly: bool = True) -> None:
    place = root / target.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    if Path(source).is_dir():
        place.mkdir(exist_ok=True)
    else:
        place.touch()
    kernel.bind(source, str(place), readonly=readonly)


def _find(program: str, path: str) -> str:
    for folder in path.split(":"):
        if os.access(candidate := f"{folder}/{program}", os.X_OK):
            return candidate
    raise FileNotFoundError(program)


if __name__ == "__main__":
    main()
