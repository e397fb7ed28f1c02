"""The reward of text that is read off an image: how few letters are wrong."""

import unicodedata
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from learner.rewards.builtin.answer import answer_of


def ocr(*, completion: str, ground_truth: object, **_: object) -> float:
    """1 minus the edit distance (Levenshtein), divided by the length of the longer text: 0 to 1.

    Insertions, deletions and substitutions of a character cost 1 each. White space counts as one blank wherever it is,
    and not at all at the ends; letters are compared in Unicode's composed form (NFC), case matters. The text is that of
    the last `<answer>...</answer>`, or else the completion. Of several ground truths the nearest counts.

    Raises:
        ValueError: the ground truth is neither a text nor a list of texts.

    Example: "kitten" is worth 4/7 for the ground truth "sitting": 3 edits in 7 characters.
    """
    truths = _texts(ground_truth)
    if not truths:
        raise ValueError(f"the ground truth {ground_truth!r} is neither a text nor a list of texts")
    text = _normal(answer_of(completion))
    return max(Levenshtein.normalized_similarity(text, _normal(truth)) for truth in truths)


def _texts(ground_truth: object) -> list[str]:
    if isinstance(ground_truth, str):
        return [ground_truth]
    texts = list(ground_truth) if isinstance(ground_truth, Sequence) else []
    return texts if all(isinstance(text, str) for text in texts) else []


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
