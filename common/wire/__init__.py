"""The only codec between protobuf messages and the domain types of `common.types`.

`*_to_proto` builds a message; `*_from_proto` takes one apart and trusts nothing in it: what came from a client raises
`InvalidRequest` or `Unimplemented` with the path of the field, what came from a server raises `MalformedResponse`.
Ranges that depend on a server's limits are not checked here but in `actor.validation.request`.
"""

from common.wire.bounds import check_bounds
from common.wire.requests import request_from_proto, request_to_proto
from common.wire.responses import (
    completion_from_proto,
    completion_to_proto,
    prompt_info_from_proto,
    prompt_info_to_proto,
    response_from_proto,
    response_to_proto,
)
from common.wire.server import (
    server_info_from_proto,
    server_info_to_proto,
    status_from_proto,
    status_to_proto,
)
from common.wire.tensors import tensor_from_proto, tensor_to_proto
from common.wire.weights import epoch_from_proto, epoch_to_proto, manifest_from_proto, manifest_to_proto

__all__ = [
    "check_bounds",
    "completion_from_proto",
    "completion_to_proto",
    "epoch_from_proto",
    "epoch_to_proto",
    "manifest_from_proto",
    "manifest_to_proto",
    "prompt_info_from_proto",
    "prompt_info_to_proto",
    "request_from_proto",
    "request_to_proto",
    "response_from_proto",
    "response_to_proto",
    "server_info_from_proto",
    "server_info_to_proto",
    "status_from_proto",
    "status_to_proto",
    "tensor_from_proto",
    "tensor_to_proto",
]
