"""torchvision can be imported, whoever has asked for it before."""

import subprocess
import sys

# As `datasets` does, which only wants to know whether it is there.
_LOOK = "importlib.util.find_spec('torchvision')"


def test_who_looks_for_torchvision_does_not_spoil_its_import() -> None:
    code = f"import importlib.util, common; {_LOOK}; common.install(); {_LOOK}; import torchvision; print('imported')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout.splitlines()[-1:] == ["imported"], result.stderr
