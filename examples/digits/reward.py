"""The reward of examples/digits. docs/rewards.md lists what a reward function may take."""


def exact_match(*, completion: str, ground_truth: str) -> float:
    """1.0 if the completion's text is the digit and nothing else (surrounding white space aside), else 0.0."""
    return 1.0 if completion.strip() == ground_truth else 0.0
