"""`python -m learner export`: a checkpoint of a run as a model, as the end of the run would have written it.

    python -m learner export runs/charts-20250101-120000/checkpoints/step-000200 ./charts-200

It needs no GPU and no learner, but memory: the model is loaded on the CPU in the dtype in which it trained.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m learner export",
        description="Write a checkpoint of a run as a model that transformers and vLLM load.",
    )
    parser.add_argument("checkpoint", type=Path, help="as RUN/checkpoints/step-000200")
    parser.add_argument("target", type=Path, metavar="OUT", help="the directory to make")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights; that of model.path if not given"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="where model.path of the run is now, if it has moved")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Write it; the exit code is 2 for a mistake of the user, 1 for what cannot be read or written."""
    options = parse(arguments)

    from common.config import ConfigError

    try:
        export(options.checkpoint, options.target, dtype=options.dtype, model_dir=options.model)
    except ConfigError as error:
        return _say(2, str(error))
    except (OSError, ValueError) as error:
        return _say(1, " ".join(str(error).split()))
    print(f"{options.target}: python -m actor --model {options.target} --standalone serves it")
    return 0


def export(checkpoint: Path, target: Path, *, dtype: str | None = None, model_dir: Path | None = None) -> None:
    """Write the policy of `checkpoint`. Raises ConfigError for mistakes of the user, and OSError."""
    from common.checkpoint import check_checkpoint
    from common.config import ConfigError, load_config
    from learner.config import LearnerConfig

    if not (checkpoint / "state.json").is_file():
        raise ConfigError(f"{checkpoint} is no checkpoint of a run; give one, as RUN/checkpoints/step-000200")
    if target.exists():
        raise ConfigError(f"{target} is there already; name another directory")
    run_dir = checkpoint.absolute().parents[1]
    # The launcher's own has the model that was prepared for the learner.
    file = next((path for path in (run_dir / "learner.yaml", run_dir / "config.yaml") if path.is_file()), None)
    if file is None:
        raise ConfigError(f"{run_dir} has no config.yaml, which says what was trained; copy it beside `checkpoints`")
    moved = [f"model.path={model_dir.absolute()}"] if model_dir is not None else []
    settings = load_config(LearnerConfig, file, moved).model
    check_checkpoint(settings.path, "model.path")

    import torch

    from learner.model.load import load_policy
    from learner.storage.checkpoint import load_weights, write_export

    model, _ = load_policy(
        settings.path, dtype=getattr(torch, settings.dtype), frozen=settings.frozen, adapter=settings.adapter
    )
    load_weights(checkpoint, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_export(model, dict(model.state_dict()), settings.path, target, getattr(torch, dtype) if dtype else None)


def _say(code: int, line: str) -> int:
    print(f"export: {line}", file=sys.stderr)
    return code
