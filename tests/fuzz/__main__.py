"""Coverage-guided fuzzing: `python -m tests.fuzz generate --seconds 60`, or `make fuzz`.

The exit code is not 0 for a find, whose bytes stay in a file; `python -m tests.fuzz generate FILE` runs those again.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from tests.hostile.seeds import generate_requests, stage_requests, upload_streams

SEEDS = {
    "generate": generate_requests,
    "planted": generate_requests,
    "stage": stage_requests,
    "upload": upload_streams,
}
# Bytes of one input; and what one may take: a small input that needs more is a find.
MAX_BYTES = 2**14
TIMEOUT_S = 10
MEMORY_MIB = 2048


def main() -> int:
    """Fuzz in a process of its own, which libFuzzer ends, and clean up after it."""
    options = _parse()
    if options.inputs:
        _fuzz(options)
    with tempfile.TemporaryDirectory(prefix="outrider-fuzz-") as corpus:
        for index, data in enumerate(SEEDS[options.target]()):
            (Path(corpus) / f"seed-{index}").write_bytes(data)
        return subprocess.run([sys.executable, "-m", "tests.fuzz", *sys.argv[1:], corpus], check=False).returncode


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=sorted(SEEDS))
    parser.add_argument("inputs", nargs="*", help="files to run once each; or a folder to start from, which grows")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--finds", type=Path, default=Path(), help="folder for the bytes of a find")
    return parser.parse_intermixed_args()


def _fuzz(options: argparse.Namespace) -> NoReturn:
    import atheris

    with atheris.instrument_imports(include=["actor", "common", "PIL"]):
        from tests.fuzz import targets
    arguments = [
        f"-max_total_time={options.seconds}",
        f"-seed={options.seed}",
        f"-max_len={MAX_BYTES}",
        f"-timeout={TIMEOUT_S}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-artifact_prefix={options.finds}/fuzz-{options.target}-",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *arguments, *options.inputs], getattr(targets, options.target))
    atheris.Fuzz()
    raise AssertionError("libFuzzer returned")


if __name__ == "__main__":
    sys.exit(main())
