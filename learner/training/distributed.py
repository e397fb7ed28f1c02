"""The ranks of the learner: rank 0 talks to the actors and tells the others, all of them train.

Started by torchrun, or alone as a single rank. Everything that goes from rank 0 to the others is a flat uint8 tensor.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from common.config import ConfigError
from learner.model.sequence_parallel import SequenceGroup, make_sequence_group

# Rank 0 waits for rollouts, and the others wait for rank 0; how long that takes is not the group's business.
TIMEOUT = timedelta(hours=12)
# What torchrun tells each rank.
_ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
}


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the learner's ranks."""

    rank: int
    num_ranks: int
    device: torch.device
    mesh: DeviceMesh
    sequence_group: SequenceGroup | None = None
    """The ranks that share each sequence with this one; None: it has its own."""

    local_rank: int = 0
    """Among those of its node, whose ranks are consecutive."""
    num_local_ranks: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The ranks of a node run the block one after the other; nodes do not wait for each other.

        One that fails in it lets the next one go on all the same, to fail for its own reason.
        """
        turn = torch.empty(1)
        if 0 < self.local_rank < self.num_local_ranks:
            dist.recv(turn, src=self.rank - 1)
        try:
            yield
        finally:
            if self.local_rank + 1 < self.num_local_ranks:
                dist.send(turn, dst=self.rank + 1)

    def scatter(self, parts: Sequence[torch.Tensor] | None) -> torch.Tensor:
        """Give each rank its part of a list that rank 0 has: uint8 `[any]` on the CPU."""
        sizes = torch.zeros(self.num_ranks, dtype=torch.int64)
        if parts is not None:
            sizes = torch.tensor([part.numel() for part in parts])
        dist.broadcast(sizes, src=0)
        if parts is not None:
            for rank in range(1, self.num_ranks):
                dist.send(parts[rank], dst=rank)
            return parts[0]
        mine = torch.empty(int(sizes[self.rank]), dtype=torch.uint8)
        dist.recv(mine, src=0)
        return mine

    def any(self, flag: bool) -> bool:
        """True on every rank if any rank passes true. A collective."""
        said = torch.tensor(int(flag))
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said)

    def broadcast(self, data: bytes | None) -> bytes:
        """Give every rank the bytes that rank 0 has."""
        packed = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data is not None else None
        return self.scatter([packed] * self.num_ranks if packed is not None else None).numpy().tobytes()


def make_mesh(device: str, num_ranks: int, shard_ranks: int | None) -> DeviceMesh:
    """One dimension over all ranks; or two, copies x the ranks that share one (hybrid sharding)."""
    if shard_ranks is None or shard_ranks == num_ranks:
        return init_device_mesh(device, (num_ranks,))
    if num_ranks % shard_ranks:
        raise ConfigError(f"trainer.fsdp_size is {shard_ranks}, which does not divide the {num_ranks} ranks")
    shape = (num_ranks // shard_ranks, shard_ranks)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def keep_float32() -> None:
    """Have float32 computed as such: cuDNN's convolutions, as those of patches, round it to TF32 unless told not to."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@contextlib.contextmanager
def join_ranks(device: str | None, shard_ranks: int | None = None, sequence_parallel_size: int = 1) -> Iterator[Ranks]:
    """Set up the default process group: gloo for CPU tensors, NCCL for CUDA ones.

    Args:
        device: "cpu" or "cuda"; None: CUDA if there is one.
        shard_ranks: ranks that share one copy of the parameters, neighbours in rank order; None: all of them.
        sequence_parallel_size: ranks that share each sequence, neighbours too.

    Raises:
        ConfigError: one of the two does not divide the number of ranks.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, alone in _ALONE.items():
        os.environ.setdefault(name, alone)
    store = None
    if "MASTER_PORT" not in os.environ:  # not started by torchrun: a single rank
        store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        keep_float32()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        timeout=TIMEOUT,
        store=store,
        rank=int(os.environ["RANK"]) if store is not None else -1,
        world_size=int(os.environ["WORLD_SIZE"]) if store is not None else -1,
    )
    try:
        num_ranks = dist.get_world_size()
        where = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
        mesh = make_mesh(kind, num_ranks, shard_ranks)
        sequence_group = make_sequence_group(kind, num_ranks, sequence_parallel_size)
        local_rank, num_local_ranks = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        yield Ranks(dist.get_rank(), num_ranks, where, mesh, sequence_group, local_rank, num_local_ranks)
    finally:
        dist.destroy_process_group()
