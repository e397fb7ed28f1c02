"""The process group that carries weights: one learner and some workers, fixed for one epoch.

`group` is what both ends use: rendezvous, broadcast, abort. What carries the bytes is `gloo`, a chain of pairs, or
`nccl`, a communicator.
"""

from common.collective.address import address_towards
from common.collective.group import BroadcastGroup, epoch_of

__all__ = ["BroadcastGroup", "address_towards", "epoch_of"]
