"""`python -m actor`: parse the command line, check what can be checked at once, then load the engine and serve."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

EPILOG = """\
examples:
  python -m actor --model runs/digits/export --standalone
  python -m actor --model /models/Qwen2.5-VL-3B-Instruct --listen 127.0.0.1:50051 vllm.dtype=bfloat16
  python -m actor --engine fake --standalone fake.token_s=0.01
  python -m actor ask --image digit.png "Which digit?"          ask a running actor; see `ask --help`

Every key of the configuration can be given as key.path=value; actor/config.py lists them.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m actor",
        description="Serve rollouts of a vision-language model over gRPC, with weights that a learner keeps current.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="checkpoint directory (config.json, safetensors)")
    parser.add_argument("--listen", help="host:port, by default 127.0.0.1:50051")
    parser.add_argument("--engine", choices=["vllm", "fake"], help="vllm by default; fake makes up its tokens")
    parser.add_argument("--standalone", action="store_true", default=None, help="serve without a learner, as version 0")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with any key of the configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the configuration")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit code is 2 for a mistake of the user, 1 for a dead engine."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["ask"]:
        from actor import ask

        return ask.main(arguments[1:])
    options = parse(arguments)

    from common.config import ConfigError

    try:
        _run(options)
    except ConfigError as error:
        print(f"actor: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> NoReturn:
    from actor.config import ActorConfig, check_model
    from common.config import load_config
    from common.log import configure

    flags = {name: getattr(options, name) for name in ("model", "listen", "engine", "standalone")}
    config = load_config(ActorConfig, options.config, options.overrides, flags)
    if config.engine == "vllm":
        check_model(config.model)
    configure(config.log_level)

    from actor.process import ActorProcess
    from common.process.lifecycle import end_process, tell_faults
    from common.rpc.server import check_port, reserve_port
    from common.rpc.tls import read_certificates

    tell_faults()
    if config.tls is not None:
        read_certificates(config.tls)  # mistakes show before the model loads
    reserved = reserve_port(config.listen, insecure=config.insecure, tls=config.tls is not None)
    for key, listen in (("metrics_listen", config.metrics_listen), ("health_listen", config.health_listen)):
        if listen is not None:
            check_port(key, listen)
    process = ActorProcess(config, reserved)
    end_process(process.run())


if __name__ == "__main__":
    sys.exit(main())
