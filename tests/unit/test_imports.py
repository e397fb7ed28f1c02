"""Who imports what, seen from outside: each case is a fresh interpreter, asked what it has loaded.

The contracts of import-linter (`pyproject.toml`) look at the import statements; these tests look at `sys.modules`,
where a lazy import or a dependency would show.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]

# Runs a command line in the process and then prints the top-level packages that it has loaded.
_REPORT = """
import json, runpy, sys
kind, name, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(name, run_name="__main__") if kind == "run" else __import__(name)
except SystemExit as stop:
    if stop.code not in (0, None):
        raise
finally:
    print("\\n" + json.dumps(sorted({module.partition(".")[0] for module in sys.modules})))
"""


def _loaded_packages(kind: str, module: str, *arguments: str) -> set[str]:
    """Top-level packages in `sys.modules` after `import module` (kind "import") or `python -m module` (kind "run")."""
    command = [sys.executable, "-c", _REPORT, kind, module, *arguments]
    result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    packages: list[str] = json.loads(result.stdout.splitlines()[-1])
    return set(packages)


def _modules_of(package: str) -> list[str]:
    paths = sorted((_ROOT / package).rglob("*.py"))
    names = [".".join(path.relative_to(_ROOT).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names if not name.endswith(".__main__")]


def test_learner_never_loads_vllm_nor_the_actor() -> None:
    imports = ", ".join(_modules_of("learner"))
    code = f"import sys, {imports}; print([name for name in ('vllm', 'actor', 'ray') if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["learner", "learner export", "actor", "learner.launcher", "examples.digits"])
def test_help_loads_no_torch(command: str) -> None:
    loaded = _loaded_packages("run", *command.split(), "--help")
    assert "argparse" in loaded  # the report is of a process that parsed its arguments
    assert not loaded & {"torch", "transformers", "vllm", "grpc", "numpy"}


@pytest.mark.parametrize("module", ["learner.config", "actor.config", "common.config"])
def test_config_modules_load_no_torch(module: str) -> None:
    loaded = _loaded_packages("import", module)
    assert "pydantic" in loaded
    assert not loaded & {"torch", "transformers", "vllm", "grpc"}


@pytest.mark.parametrize("package", ["learner/algorithms", "learner/batch"])
def test_pure_packages_know_nothing_of_distributed_training(package: str) -> None:
    paths = sorted((_ROOT / package).rglob("*.py"))
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not [name for name in names if name.startswith("torch.distributed")], path
