"""A bare receiver: `python -m benchmarks.update_side HOST PORT RANK WORLD_SIZE NUM_BYTES`.

For the line `{"join": true}` it joins a Gloo group. For each line `{"sizes": [...], "barrier": b}` it receives
broadcasts of these sizes, end to end in memory that it has touched before, and answers with the checksum of all.
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
    signal = torch.zeros(1, dtype=torch.uint8)
    print(json.dumps({"ready": {}}), flush=True)
    sys.stdin.readline()
    group = BroadcastGroup(EpochSpec("bare", 1, host, port, world_size, rank, "gloo", 120.0), rank)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        turn = json.loads(line)
        offset = 0
        for size in turn["sizes"]:
            group.broadcast(memory[offset : offset + size])
            if turn["barrier"]:
                group.broadcast(signal)
            offset += size
        print(json.dumps({"checksum": checksum(memory[:offset])}), flush=True)
    group.abort()


if __name__ == "__main__":
    main()
