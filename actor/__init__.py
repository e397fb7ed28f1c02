"""One gRPC server around one vLLM engine."""

import common as common  # repairs torchvision before anything imports it
