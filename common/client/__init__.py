"""One actor as its clients see it: typed calls with deadlines, domain types in and out.

Every method raises `common.errors.OutriderError`, whatever went wrong on the way.
"""

from common.client.grpc_client import CHUNK_BYTES, GrpcClient
from common.client.interface import ActorClient, SampledGroup

__all__ = ["CHUNK_BYTES", "ActorClient", "GrpcClient", "SampledGroup"]
