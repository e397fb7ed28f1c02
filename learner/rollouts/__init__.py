"""Rollouts: which actors there are, which prompts they get, and the finished groups that wait for the trainer."""
