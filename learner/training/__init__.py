"""The training loop of every rank: the batch of each step, the step, and the ranks as one."""
