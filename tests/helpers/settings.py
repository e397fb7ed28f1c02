"""Whether the keys of a configuration say what they do."""

import ast
from collections.abc import Iterable
from pathlib import Path

from common.config import Config


def undocumented_keys(files: Iterable[Path]) -> tuple[int, list[str]]:
    """How many keys the classes of configuration in these files have, and which have no docstring below them."""
    num_keys, without = 0, []
    for path in files:
        for cls in ast.walk(ast.parse(path.read_text())):
            if not isinstance(cls, ast.ClassDef) or [ast.unparse(base) for base in cls.bases] != ["Config"]:
                continue
            for key, below in zip(cls.body, [*cls.body[1:], None], strict=True):
                if isinstance(key, ast.AnnAssign):
                    num_keys += 1
                    match below:
                        case ast.Expr(ast.Constant(str())):
                            pass
                        case _:
                            without.append(f"{path.name}: {ast.unparse(key.target)}")
    return num_keys, without


def num_keys(cls: type[Config]) -> int:
    """Of a class of configuration, with those of its sections."""
    kinds = [field.annotation for field in cls.model_fields.values()]
    return len(kinds) + sum(num_keys(kind) for kind in kinds if isinstance(kind, type) and issubclass(kind, Config))
