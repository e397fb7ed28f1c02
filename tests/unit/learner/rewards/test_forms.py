"""The three forms of a reward function, the weighted sum, and that a failure is never a number."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageFile

from common.types import ChatMessage, MediaPart, TextPart
from examples.digits import data
from learner.rewards.base import RewardError, as_number
from learner.rewards.forms import as_group_reward
from learner.rewards.scoring import score
from learner.types import Scores
from tests.helpers.fakes import make_task

PNG = data.png(0)


def total(*functions: Callable[..., Any], task: Any = None, weights: list[float] | None = None) -> list[float]:
    return [float(value) for value in scores(*functions, task=task, weights=weights).rewards]


def scores(*functions: Callable[..., Any], task: Any = None, weights: list[float] | None = None) -> Scores:
    names = [f"reward {i}" for i in range(len(functions))]
    rewards = [as_group_reward(function, name) for function, name in zip(functions, names, strict=True)]
    return score(task or make_task("a", "b"), names, rewards, weights or [1.0] * len(rewards))


def test_ours_gets_what_it_asks_for() -> None:
    seen: list[Any] = []

    def reward(*, completion: str, ground_truth: str, token_ids: list[int], finish_reason: str) -> float:
        seen.append((completion, ground_truth, token_ids, finish_reason))
        return len(completion) + 0.5

    assert total(reward, task=make_task("a", "bcd", ground_truth="g")) == [1.5, 3.5]
    assert seen == [("a", "g", [0], "stop"), ("bcd", "g", [1], "stop")]


def test_ours_may_take_the_rest() -> None:
    seen: list[Any] = []
    task = make_task("a", images=(PNG,), data_source="s", extra={"k": 1})

    def reward(**everything: Any) -> float:
        seen.append(everything)
        return 0.0

    total(reward, task=task)
    [everything] = seen
    assert (everything["images"], everything["data_source"], everything["extra"]) == ((PNG,), "s", {"k": 1})
    assert everything["prompt"] == task.sample.messages


@pytest.mark.parametrize(
    ("extra", "extra_info"),
    [({"extra_info": {"split": "train"}, "k": 1}, {"split": "train"}), ({"k": 1}, {"k": 1})],
)
def test_verls(extra: dict[str, Any], extra_info: dict[str, Any]) -> None:
    seen: list[Any] = []

    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> bool:
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return solution_str == ground_truth

    task = make_task("g", "h", ground_truth="g", data_source="s", extra=extra)
    assert total(compute_score, task=task) == [1.0, 0.0]
    assert seen == [("s", "g", "g", extra_info), ("s", "h", "g", extra_info)]


def test_verls_dictionary() -> None:
    def scored(solution_str: str) -> dict[str, Any]:
        return {"score": np.float32(0.25), "tries": 3}

    def unscored(solution_str: str) -> dict[str, Any]:
        return {"tries": 3}

    def ours(completion: str) -> dict[str, Any]:
        return {"score": 1}

    assert total(scored) == [0.25, 0.25]
    for function, returned in ((unscored, "{'tries': 3}"), (ours, "{'score': 1}")):
        with pytest.raises(RewardError, match=rf"row 4, completion 0 .*returned {returned}") as caught:
            total(function)
        assert caught.value.reason == "REWARD_NOT_A_NUMBER"


def test_the_parts_are_what_each_function_said() -> None:
    """Of verl's dictionaries also the other numbers, where there are some."""

    def compute_score(solution_str: str) -> dict[str, Any]:
        more = (
            {"tries": np.int64(3), "note": "first", "worst": float("nan"), "guess": 10**400}
            if solution_str == "a"
            else {}
        )
        return {"score": 0.25, "acc": solution_str == "b", **more}

    def some(completions: Any) -> list[float | None]:
        return [None, 2]

    parts = scores(compute_score, some, weights=[1.0, 10.0]).parts
    assert parts == {
        "reward 0": [0.25, 0.25],
        "reward 0.acc": [0.0, 1.0],
        "reward 0.tries": [3.0, None],
        "reward 1": [None, 2.0],
    }


def test_only_a_dictionary_says_more_than_the_reward() -> None:
    def compute_score(solution_str: str) -> Any:
        return {"score": 0.5, "acc": 1.0} if solution_str == "a" else 0.25

    assert scores(compute_score).parts == {"reward 0": [0.5, 0.25], "reward 0.acc": [1.0, None]}


def test_arguments_with_a_default_may_have_any_name() -> None:
    def ours(completion: str, scale: float = 3.0) -> float:
        return scale * len(completion)

    def trls(completions: list[Any], trainer_state: object = None, **_: Any) -> list[float]:
        return [float(trainer_state is None)] * len(completions)

    assert total(ours, trls) == [4.0, 4.0]


@pytest.mark.parametrize("returned", [True, 1, np.float32(1), np.bool_(True), np.array(1.0), torch.tensor(1.0)])
def test_every_scalar_is_a_number(returned: object) -> None:
    [value] = scores(lambda **_: returned, task=make_task("a")).parts["reward 0"]
    assert (type(value), value) == (float, 1.0)


def test_trls_is_called_once_with_lists() -> None:
    seen: list[Any] = []

    def reward_func(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.append((prompts, completions, completion_ids, columns))
        return [0.5, 2]

    extra = {"difficulty": 3, "prompt": "not a column in TRL either"}
    assert total(reward_func, task=make_task("a", "b", ground_truth="g", extra=extra)) == [0.5, 2.0]
    [(prompts, completions, completion_ids, columns)] = seen
    assert prompts == [[{"role": "user", "content": "row 4"}]] * 2
    assert completions == [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]
    assert completion_ids == [[0], [1]]
    assert columns == {
        "ground_truth": ["g", "g"],
        "solution": ["g", "g"],
        "data_source": ["", ""],
        "difficulty": [3, 3],
    }


def test_trls_sees_the_datasets_own_solution_and_pictures() -> None:
    seen: list[Any] = []

    def reward_func(prompts: Any, completions: Any, solution: list[str], images: list[Any]) -> list[float]:
        seen.extend([prompts[0], solution, images])
        return [0.0, 0.0]

    message = ChatMessage("user", (MediaPart(0), TextPart("Which digit?")))
    total(reward_func, task=make_task("a", "b", images=(PNG,), messages=(message,), extra={"solution": "because"}))
    prompt, solution, images = seen
    assert prompt == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit?"}]}]
    assert solution == ["because", "because"]
    assert [[image.size for image in of_one] for of_one in images] == [[(56, 56)]] * 2


def test_trls_sees_what_the_model_sees() -> None:
    seen: list[Any] = []
    file, turned = io.BytesIO(), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(file, "PNG", exif=turned)

    def reward_func(completions: Any, images: list[Any], **_: Any) -> list[float]:
        seen.extend(images[0])
        return [0.0]

    total(reward_func, task=make_task("a", images=(file.getvalue(),)))
    [image] = seen
    assert (image.size, image.getcolors()) == ((20, 40), [(800, (255, 255, 255))])


@pytest.mark.parametrize(
    ("image_format", "mode", "orientation", "decoded"),
    [
        *((image_format, "RGB", 1, False) for image_format in ("PNG", "JPEG", "WEBP")),
        *((image_format, "RGB", 6, True) for image_format in ("PNG", "JPEG", "WEBP")),
        ("JPEG", "L", 1, True),
        ("PNG", "RGBA", 1, True),
    ],
)
def test_trls_decode_what_the_model_sees_otherwise(
    image_format: str, mode: str, orientation: int, decoded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    if orientation != 1:
        exif[ExifTags.Base.Orientation] = orientation
    Image.new(mode, (40, 20), "navy" if mode != "L" else 7).save(file, image_format, exif=exif)
    num_loaded = 0
    load = ImageFile.ImageFile.load

    def counted(image: ImageFile.ImageFile) -> Any:
        nonlocal num_loaded
        num_loaded += 1
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    total(lambda completions: [float(len(completions))], task=make_task("a", images=(file.getvalue(),)))
    assert (num_loaded > 0) is decoded


def test_trls_see_a_png_that_is_turned_behind_its_pixels() -> None:
    seen: list[Any] = []
    file, turned = io.BytesIO(), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 20)).save(file, "PNG")
    body = b"eXIf" + turned.tobytes()[6:]
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = file.getvalue()[:-12] + chunk + file.getvalue()[-12:]

    def reward_func(completions: Any, images: list[Any], **_: Any) -> list[float]:
        seen.extend(images[0])
        return [0.0]

    total(reward_func, task=make_task("a", images=(data,)))
    assert seen[0].size == (20, 40)


def test_trls_may_take_tokens_only() -> None:
    assert total(lambda completion_ids, **_: np.array([len(ids) for ids in completion_ids])) == [1.0, 1.0]


def test_the_sum_is_weighted() -> None:
    def length(completion: str) -> int:
        return len(completion)

    def place(completions: list[Any], **_: Any) -> list[float]:
        return [10.0 * i for i in range(len(completions))]

    # 2 * 1 - 0.5 * 0, 2 * 3 - 0.5 * 10
    assert total(length, place, task=make_task("a", "bcd"), weights=[2.0, -0.5]) == [2.0, 1.0]


def test_none_leaves_a_function_out() -> None:
    def first_only(completions: list[Any], **_: Any) -> list[float | None]:
        return [5.0, None]

    assert total(first_only, lambda **_: 1.0) == [6.0, 1.0]
    with pytest.raises(RewardError, match="row 4, completion 1: every reward function returned None") as caught:
        total(first_only, first_only)
    assert caught.value.reason == "REWARD_NOT_A_NUMBER"


@pytest.mark.parametrize(
    ("returned", "reason", "message"),
    [
        (float("nan"), "REWARD_NOT_FINITE", "completion 0 (reward 0): the reward returned nan"),
        (np.float32("inf"), "REWARD_NOT_FINITE", "completion 0 (reward 0): the reward returned np.float32(inf)"),
        ("1", "REWARD_NOT_A_NUMBER", "returned '1'"),
        (None, "REWARD_NOT_A_NUMBER", "returned None"),
        (np.ones(2), "REWARD_NOT_A_NUMBER", "returned array"),
        (1e300, "REWARD_NOT_FINITE", "the rewards add up to 1e+300"),
        (10**400, "REWARD_NOT_FINITE", "completion 0 (reward 0): the reward returned 1000"),
    ],
)
def test_what_is_no_number(returned: object, reason: str, message: str) -> None:
    check_failure(lambda **_: returned, reason, message)


def test_what_is_very_long_is_told_in_short() -> None:
    """All that the model wrote, as a number or a text; Python refuses to write ints of more than 4,300 digits."""
    too_long = "completion 0 (reward 0): the reward returned a value of the type int, too long to be shown"
    check_failure(lambda **_: 10**5000, "REWARD_NOT_FINITE", too_long)
    with pytest.raises(RewardError, match=r"the reward returned 'xxx.*xxx \.\.\.$") as caught:
        as_number("x" * 10**6, "x" * 10**6, "row 4")
    assert len(str(caught.value)) < 2100


@pytest.mark.parametrize(
    ("returned", "reason", "message"),
    [
        ([1.0], "REWARD_NOT_A_NUMBER", "row 4: 1 rewards for 2 completions (reward 0)"),
        (1.0, "REWARD_NOT_A_NUMBER", "row 4: 1.0 for 2 completions (reward 0)"),
        ([1, "x"], "REWARD_NOT_A_NUMBER", "row 4, completion 1 (reward 0): the reward returned 'x'"),
        ([1, float("nan")], "REWARD_NOT_FINITE", "row 4, completion 1 (reward 0): the reward returned nan"),
    ],
)
def test_what_is_no_list_of_numbers(returned: object, reason: str, message: str) -> None:
    def reward_func(completions: list[Any], **_: Any) -> Any:
        return returned

    check_failure(reward_func, reason, message)


def test_what_a_function_raises_is_told() -> None:
    def needs_a_column(completions: list[Any], difficulty: list[int]) -> list[float]:
        return [0.0, 0.0]

    check_failure(lambda **_: 1 / 0, "REWARD_RAISED", "completion 0: ZeroDivisionError: division by zero (reward 0)")
    check_failure(needs_a_column, "REWARD_RAISED", "row 4: TypeError: ")
    check_failure(needs_a_column, "REWARD_RAISED", "missing 1 required positional argument: 'difficulty' (reward 0)")


def test_the_innermost_line_of_the_users_code_is_told() -> None:
    def reward(completion: str) -> float:
        return float(json.loads(completion))

    line = reward.__code__.co_firstlineno + 1
    check_failure(reward, "REWARD_RAISED", f"(reward 0) at test_forms.py:{line}")


def check_failure(function: Callable[..., Any], reason: str, message: str) -> None:
    with pytest.raises(RewardError) as caught:
        total(function)
    assert caught.value.reason == reason
    assert message in str(caught.value)


def test_one_bad_completion_fails_the_group() -> None:
    def reward(*, token_ids: list[int], **_: Any) -> float:
        if token_ids == [2]:
            raise RuntimeError("judge is down")
        return 1.0

    with pytest.raises(RewardError, match="completion 2: RuntimeError: judge is down"):
        total(reward, task=make_task("a", "b", "c"))
