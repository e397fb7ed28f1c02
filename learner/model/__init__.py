"""The policy: load and freeze, packed attention, log-probabilities, FSDP2, optimizer."""
