"""Generates `common/pb/` from the proto files.

`python proto/generate.py` writes it; `--check` writes nothing and fails if what is checked in is not what the proto
files give. Needs grpcio-tools and mypy-protobuf in the versions that `pyproject.toml` pins: their output differs
between versions.
"""

import argparse
import filecmp
import os
import re
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

PROTO_ROOT = Path(__file__).resolve().parent
OUTPUT = PROTO_ROOT.parent / "common" / "pb"
HEADER = '"""Generated from proto/ by proto/generate.py; do not edit."""\n'


def generate(output: Path) -> None:
    """Write modules, stubs and package markers for every proto file. Raises SystemExit if protoc fails."""
    sources = sorted(str(path.relative_to(PROTO_ROOT)) for path in PROTO_ROOT.glob("*/v*/*.proto"))
    output.mkdir(parents=True, exist_ok=True)
    well_known = str(resources.files("grpc_tools") / "_proto")
    plugins = {"python": "", "grpc_python": "", "mypy": "quiet:", "mypy_grpc": "quiet:"}
    options = [f"--{name}_out={flags}{output}" for name, flags in plugins.items()]
    # protoc looks for its plugins on PATH, where those of a virtual environment that is not activated are missing.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if protoc.main(["protoc", f"-I{PROTO_ROOT}", f"-I{well_known}", *options, *sources]) != 0:
        raise SystemExit("protoc failed: see above")
    packages = {source.split("/")[0] for source in sources}
    for path in sorted(output.rglob("*.py*")):
        path.write_text(_under_common(path.read_text(), packages))
    for folder in {output, *(path.parent for path in output.rglob("*_pb2.py"))}:
        (folder / "__init__.py").write_text(HEADER)
        if folder != output:
            (folder.parent / "__init__.py").write_text(HEADER)


def _under_common(code: str, packages: set[str]) -> str:
    """Generated imports are absolute from the proto root; here that root is the package `common.pb`."""
    names = "|".join(sorted(packages))
    code = re.sub(rf"^from ({names})(\.| import)", r"from common.pb.\1\2", code, flags=re.MULTILINE)
    return re.sub(rf"^import ({names})\.", r"import common.pb.\1.", code, flags=re.MULTILINE)


def differences(left: Path, right: Path) -> list[str]:
    """Relative names of generated files that are missing on one side or differ."""
    names = {
        str(path.relative_to(root)) for root in (left, right) for path in root.rglob("*.py*") if path.suffix != ".pyc"
    }
    return sorted(
        name
        for name in names
        if not (left / name).is_file()
        or not (right / name).is_file()
        or not filecmp.cmp(left / name, right / name, shallow=False)
    )


def main() -> int:
    """Entry point; 1 if `--check` finds a difference."""
    parser = argparse.ArgumentParser(description="Generate common/pb from proto/.")
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if common/pb is not current")
    if not parser.parse_args().check:
        generate(OUTPUT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = differences(Path(folder), OUTPUT)
    if stale:
        print(f"common/pb is not what proto/ gives: run `make proto` ({', '.join(stale)})", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
