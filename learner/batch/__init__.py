"""From finished groups to tensors: the processor's inputs, positions, packing, and packs as bytes. Pure, no FSDP, no gRPC."""
