"""The reward 1 for the right answer and 0 for any other."""


def exact_match(*, completion: str, ground_truth: object, **_: object) -> float:
    """1.0 if the completion is the ground truth, surrounding white space aside, else 0.0."""
    return float(completion.strip() == str(ground_truth).strip())
