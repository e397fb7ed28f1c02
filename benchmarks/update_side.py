"""A bare receiver: `python -m benchmarks.update_side HOST PORT RANK WORLD_SIZE NUM_BYTES`.

For the first line of its input it joins a Gloo group. For each further one it receives a broadcast, in memory that it
has touched before, and answers with the checksum.
"""

import json
import sys


def main() -> None:
    """Obey until the standard input ends."""
    host, port, rank, world_size, num_bytes = sys.argv[1], *map(int, sys.argv[2:])
    import torch

    from common.checksum import checksum
    from common.collective import BroadcastGroup
    from common.types import EpochSpec

    memory = torch.ones(num_bytes, dtype=torch.uint8)
    print(json.dumps({"ready": {}}), flush=True)
    sys.stdin.readline()
    group = BroadcastGroup(EpochSpec("bare", 1, host, port, world_size, rank, "gloo", 120.0), rank)
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        group.broadcast(memory)
        print(json.dumps({"checksum": checksum(memory)}), flush=True)
    group.abort()


if __name__ == "__main__":
    main()
