"""`python -m learner`: one rank of a training run. Start several with torchrun.

Parse and validate first, then load torch.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

EPILOG = """\
examples:
  torchrun --standalone --nproc-per-node 2 -m learner --config run.yaml rollout.actors='["127.0.0.1:50051"]'
  python -m learner --config run.yaml optimizer.lr=1e-5 trainer.total_steps=100

`outrider` starts actors and learner together on one machine.
Every key of the configuration can be given as key.path=value; learner/config.py lists them.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m learner",
        description="Train a vision-language model by reinforcement learning on rollouts of the actors.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the configuration")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point; the exit code is 2 for a mistake of the user, 1 for a run that failed."""
    options = parse(arguments)

    from common.lifecycle import end_process

    end_process(_run(options))


def _run(options: argparse.Namespace) -> int:
    from common.config import ConfigError, load_config
    from learner.config import LearnerConfig

    code, run_dir = 1, None
    try:
        config = load_config(LearnerConfig, options.config, options.overrides)
        run_dir = config.run_dir
        from learner.run import run

        code = run(config)
    except ConfigError as error:
        print(f"learner: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print("learner: stopped", file=sys.stderr)
        code = 130
    except Exception as error:  # noqa: BLE001 - the end of the process: the whole story, then the line for the user
        traceback.print_exc()
        print(f"learner: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        # For the launcher: torchrun's own exit code does not tell.
        if run_dir is not None and run_dir.is_dir() and os.environ.get("RANK", "0") == "0":
            (run_dir / "exit-code").write_text(str(code))
    return code


if __name__ == "__main__":
    main()
