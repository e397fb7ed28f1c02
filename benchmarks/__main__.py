"""`make bench`: runs every benchmark (or those named as arguments) one after the other and prints the table."""

import argparse
import json
import subprocess
import sys

from benchmarks import harness

BENCHMARKS = (
    "demo_vs_trl",
    "step_vs_trl",
    "actor_vs_inprocess",
    "actor_vs_llm",
    "actor_vs_http",
    "actor_vs_vllm_grpc",
    "image_ingress",
    "bad_requests",
    "event_loop_stall",
    "group_bytes",
    "packed_step",
    "fused_logprobs",
    "update_vs_broadcast",
    "update_pause",
    "update_vs_per_parameter",
    "update_overlap",
    "delta_bytes",
    "overlap",
    "fan_in",
)


def main() -> int:
    """Run the benchmarks; 1 if one of them did not end with its JSON line, else 0 (a missed goal is a finding)."""
    harness.end_cleanly()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run benchmarks and print a table.")
    parser.add_argument("names", nargs="*", choices=BENCHMARKS, metavar="name", help=f"of {', '.join(BENCHMARKS)}")
    lines, failed = [], []
    for name in parser.parse_args().names or BENCHMARKS:
        line = _run(name)
        if line is None:
            failed.append(name)
        else:
            lines.append(line)
    if lines:
        print("\n" + harness.table(lines))
    for name in failed:
        print(f"{name} failed: see above")
    return 1 if failed else 0


def _run(name: str) -> str | None:
    """Run one benchmark with its output passed on; its JSON line, or None if it failed."""
    print(f"\n== {name}", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    if process.returncode != 0:
        return None
    try:
        json.loads(last)
    except ValueError:
        return None
    return last


if __name__ == "__main__":
    sys.exit(main())
