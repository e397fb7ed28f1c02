"""What a container of the runner finds around itself: who it is, what it may write, whom it can reach. Prints JSON."""

import json
import os
import socket
import sys
from pathlib import Path

_TIMEOUT_S = 1.0


def _writable(folder: str) -> bool:
    try:
        path = Path(folder, "written")
        path.write_text("x")
        path.unlink()
    except OSError:
        return False
    return True


def _reachable(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), _TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _addresses(name: str) -> list[str] | None:
    try:
        return sorted({str(answer[4][0]) for answer in socket.getaddrinfo(name, 50051, type=socket.SOCK_STREAM)})
    except socket.gaierror:
        return None


def main() -> None:
    """Targets as [[address, port], ...] and names as [...] on the command line."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    shared = os.statvfs("/dev/shm")
    found = {
        "user": [os.getuid(), os.getgid(), os.getgroups()],
        "capabilities": [int(status[key], 16) for key in ("CapPrm", "CapEff", "CapBnd")],
        "no_new_privileges": status["NoNewPrivs"],
        "pid": os.getpid(),
        "hostname": socket.gethostname(),
        "writable": [
            folder
            for folder in (
                "/",
                "/app",
                "/etc/outrider",
                "/models",
                "/cache",
                "/tmp",
                "/dev/shm",
                "/usr",
                "/proc/sys/net",
            )
            if _writable(folder)
        ],
        "shared_memory_bytes": shared.f_frsize * shared.f_blocks,
        "service_variables": [name for name in os.environ if name.endswith(("_SERVICE_HOST", "_PORT_50051_TCP"))],
        "config": sorted(path.name for path in Path("/etc/outrider").iterdir()),
        "reachable": [[address, port] for address, port in json.loads(sys.argv[1]) if _reachable(address, port)],
        "names": {name: _addresses(name) for name in json.loads(sys.argv[2])},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
