"""`python -m learner`: one rank of a training run. Start several with `python -m learner.torchrun`.

Parse and validate first, then load torch.
"""

import argparse
import contextlib
import sys
import traceback
from pathlib import Path
from typing import NoReturn

EPILOG = """\
examples:
  python -m learner.torchrun --standalone --nproc-per-node 2 -m learner --config run.yaml \\
      rollout.actors='["127.0.0.1:50051"]'
  python -m learner --config run.yaml optimizer.lr=1e-5 trainer.total_steps=100
  python -m learner fleet 127.0.0.1:50051                    what the actors say of themselves
  python -m learner export RUN/checkpoints/step-000200 OUT   a checkpoint as a model, for transformers and vLLM

`outrider` starts actors and learner together on one machine.
Every key of the configuration can be given as key.path=value; learner/config/ lists them.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
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
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["fleet"]:
        from learner.reporting import fleet_view

        sys.exit(fleet_view.main(arguments[1:]))
    if arguments[:1] == ["export"]:
        from learner.storage import export

        sys.exit(export.main(arguments[1:]))
    options = parse(arguments)

    from common.process.lifecycle import end_process, tell_faults

    tell_faults()
    end_process(_run(options))


def _run(options: argparse.Namespace) -> int:
    from common.config import ConfigError, load_config
    from common.process.outliving import outliving_output
    from learner.config import LearnerConfig
    from learner.stopping import RunFailed

    run_dir: Path | None = None
    trace = ""
    try:
        config = load_config(LearnerConfig, options.config, options.overrides)
        run_dir = config.run_dir
        from learner.run import run

        with outliving_output():
            return run(config)
    except ConfigError as error:
        code, line = error.exit_code, str(error)
    except KeyboardInterrupt:
        print("learner: stopped", file=sys.stderr, flush=True)
        return 130
    except RunFailed as error:
        code, line = 1, str(error)
    except Exception as error:  # noqa: BLE001 - the end of the process: the whole story, then the line for the user
        trace = traceback.format_exc()
        code, line = 1, f"{type(error).__name__}: {error}"
    if run_dir is not None and run_dir.is_dir():
        from learner import last_words

        last_words.leave(run_dir, code, line)
    with contextlib.suppress(OSError):  # standard error may be a log on a disk that is full
        print(f"{trace}learner: {line}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
