"""From finished groups to tensors: the processor's outputs, positions, packing, packs as bytes. No FSDP, no gRPC."""
