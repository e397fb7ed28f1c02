"""Volumes of a pod as folders of this machine: files of ConfigMaps and Secrets, claims, and empty ones."""

import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.manifests.rendered import Manifest
from tests.manifests.runner import kernel

_SIZES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass
class Storage:
    """Where volumes come from."""

    folder: Path
    config_maps: dict[str, dict[str, str]]
    claims: dict[str, Path]
    secrets: dict[str, dict[str, bytes]]


@dataclass
class Volumes:
    """Those of one pod, below `folder`."""

    volumes: list[Manifest]
    folder: Path
    storage: Storage

    def make(self, group: int) -> None:
        """Create what is the pod's own; `group` may write, as fsGroup says."""
        for volume in self.volumes:
            path = self.path(volume["name"])
            if "configMap" in volume:
                path.mkdir(parents=True)
                for name, text in self.storage.config_maps[volume["configMap"]["name"]].items():
                    (path / name).write_text(text)
                continue
            if "secret" in volume:
                self.write_secret(volume, group)
                continue
            if "emptyDir" in volume:
                path.mkdir(parents=True)
                if volume["emptyDir"].get("medium") == "Memory":
                    size = parse_size(volume["emptyDir"]["sizeLimit"])
                    kernel.mount("tmpfs", str(path), "tmpfs", data=f"size={size}")
            os.chown(path, 0, group)
            path.chmod(0o2777)

    def write_secret(self, volume: Manifest, group: int) -> None:
        """The files of a secret, all in one moment, as the kubelet does it: names point into a folder behind a link."""
        path, mode = self.path(volume["name"]), volume["secret"]["defaultMode"]
        version = path / f"..{secrets.token_hex(4)}"
        version.mkdir(parents=True)
        for name, data in self.storage.secrets[volume["secret"]["secretName"]].items():
            (version / name).write_bytes(data)
            (version / name).chmod(mode)
            os.chown(version / name, 0, group)
            if not (path / name).is_symlink():
                (path / name).symlink_to(Path("..data", name))
        current = path / "..data"
        old = current.resolve() if current.is_symlink() else None
        (path / "..next").symlink_to(version.name)
        (path / "..next").replace(current)
        if old is not None:
            shutil.rmtree(old)

    def path(self, name: str) -> Path:
        """The folder that stands for a volume."""
        volume = self._find(name)
        if "persistentVolumeClaim" in volume:
            return self.storage.claims[volume["persistentVolumeClaim"]["claimName"]]
        return self.folder / name

    def is_config(self, name: str) -> bool:
        """ConfigMaps and Secrets cannot be written, whatever the mount says."""
        return not self._find(name).keys().isdisjoint({"configMap", "secret"})

    def _find(self, name: str) -> Manifest:
        [volume] = [volume for volume in self.volumes if volume["name"] == name]
        return volume


def parse_size(text: str) -> int:
    """Bytes of a quantity.

    Example: "2Gi" is 2147483648.
    """
    found = re.fullmatch(r"(\d+)([KMGT]i)", text)
    if found is None:
        raise NotImplementedError(f"size {text}")
    return int(found[1]) * _SIZES[found[2]]
