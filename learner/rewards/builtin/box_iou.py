"""The reward of a bounding box: how much of it lies on the right one."""

import math
import re
from collections.abc import Sequence

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]")

Box = tuple[float, float, float, float]


def box_iou(*, completion: str, ground_truth: Sequence[float], **_: object) -> float:
    """Intersection over union, 0 to 1, of the last box in the completion with that of the ground truth.

    Boxes are `[x1, y1, x2, y2]` with x1 < x2 and y1 < y2, in whatever unit, the same for both. A completion without a
    box, or with one that is turned inside out, is worth 0.

    Raises:
        ValueError: the ground truth is no box.

    Example: "[0, 0, 2, 2]" is worth 1/3 for the ground truth [1, 0, 3, 2].
    """
    truth = _box(ground_truth)
    if truth is None:
        raise ValueError(f"the ground truth {ground_truth!r} is not a box [x1, y1, x2, y2]")
    found = _BOX.findall(completion)
    box = _box([float(number) for number in found[-1]]) if found else None
    if box is None:
        return 0.0
    width = min(box[2], truth[2]) - max(box[0], truth[0])
    height = min(box[3], truth[3]) - max(box[1], truth[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / (_area(box) + _area(truth) - shared)


def _box(numbers: Sequence[float]) -> Box | None:
    if len(numbers) != 4 or not all(math.isfinite(number) for number in numbers):
        return None
    x1, y1, x2, y2 = map(float, numbers)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
