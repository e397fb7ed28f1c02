"""What stands for the images: this environment's Python, the checkout as /app, and the files of /etc."""

import os
import sys
from pathlib import Path

from tests.manifests.rendered import ROOT
from tests.manifests.runner.container import WORKDIR

_SESSION_VARIABLE = "OUTRIDER_TEST_SESSION"


def python_folders() -> list[str]:
    """Folders of this Python, of its environment, and of what else it imports from."""
    folders: list[Path] = []
    for folder in sorted({Path(path).resolve() for path in (sys.prefix, sys.base_prefix, *sys.path) if path}):
        known = (
            (*folders, Path("/usr"), ROOT) if not Path(sys.prefix).is_relative_to(ROOT) else (*folders, Path("/usr"))
        )
        if folder.is_dir() and folder != ROOT and not any(folder.is_relative_to(other) for other in known):
            folders.append(folder)
    return [str(folder) for folder in folders]


def environment() -> dict[str, str]:
    """Variables of the images."""
    variables = {
        "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": WORKDIR,
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if _SESSION_VARIABLE in os.environ:
        variables[_SESSION_VARIABLE] = os.environ[_SESSION_VARIABLE]
    return variables


def etc(uid: int, hostname: str, hosts: str, name_server: str, namespace: str) -> dict[str, str]:
    """Files of /etc: those of the image, and those that a kubelet makes."""
    domain = "svc.cluster.local"
    search = f"{namespace}.{domain} {domain} cluster.local"
    return {
        "/etc/passwd": f"root:x:0:0::/root:/sbin/nologin\noutrider:x:{uid}:{uid}::/cache:/sbin/nologin\n",
        "/etc/group": f"root:x:0:\noutrider:x:{uid}:\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
        "/etc/hostname": f"{hostname}\n",
        "/etc/hosts": hosts,
        "/etc/resolv.conf": f"search {search}\nnameserver {name_server}\noptions ndots:5\n",
    }
