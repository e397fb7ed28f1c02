"""The reward of examples/digits: did the completion name the digit, and nothing else?"""


def exact_match(completion: str, ground_truth: str) -> float:
    """1.0 if the completion's text, stripped, is the digit; else 0.0."""
    return 1.0 if completion.strip() == ground_truth else 0.0
