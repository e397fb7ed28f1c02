"""What a completion of this task is worth; docs/rewards.md has the other arguments and forms."""


def reward(*, completion: str, ground_truth: str, **_: object) -> float:
    """1 for the right answer and nothing else, 0 for anything else."""
    return float(completion.strip() == ground_truth)
