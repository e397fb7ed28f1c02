"""Rows to prompts, and that every mistake is one line."""

import dataclasses
import json
import types
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from common.config import ConfigError, parse_config
from common.types import ChatMessage, MediaPart, TextPart
from learner.config.data import DataConfig
from learner.types import PixelBounds, PromptSample
from tests.helpers.fakes import make_sample
from tests.helpers.rows import MODULE, image, load, verl_row, write_parquet


@pytest.mark.parametrize("prompt", ["Which?", [{"role": "user", "content": "Which?"}]])
@pytest.mark.parametrize("pictures", [[1], [1, 2]])
def test_images_stand_before_a_text_without_markers(
    prompt: str | list[dict[str, str]], pictures: list[int], tmp_path: Path
) -> None:
    """Columns of data sets of the hub, as TRL reads them."""
    row = {"problem": prompt, "image": [{"bytes": image(value), "path": None} for value in pictures], "solution": "7"}
    path = write_parquet(tmp_path / "t.parquet", [row])
    sample = load(path, prompt_column="problem", image_column="image", answer_column="solution", suffix=" Think.")[0]
    parts = (*(MediaPart(i) for i in range(len(pictures))), TextPart("Which? Think."))
    assert sample.messages == (ChatMessage("user", parts),)
    assert sample.images == tuple(image(value) for value in pictures)


def test_rows_with_markers_may_follow_rows_without(module: types.ModuleType) -> None:
    rows = [{"prompt": text, "images": image(1), "answer": 1} for text in ("What?", "This: <image>", "<image><image>")]
    module.rows = lambda: rows  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="row 2 has 2 <image> markers for 1 images"):
        load(f"{MODULE}:rows")
    del rows[2]
    dataset = load(f"{MODULE}:rows")
    assert dataset[0].messages == (ChatMessage("user", (MediaPart(0), TextPart("What?"))),)
    assert dataset[1].messages == (ChatMessage("user", (TextPart("This: "), MediaPart(0))),)


def test_a_marker_in_the_first_row_asks_for_them_in_all(module: types.ModuleType) -> None:
    """A row without is then a mistake; one that asks the common question is not."""
    first = {"prompt": "<image>?", "images": image(1), "answer": 1}
    rows: list[dict[str, Any]] = [first, first | {"prompt": None}]
    module.rows = lambda: rows  # type: ignore[attr-defined]
    assert load(f"{MODULE}:rows", question="What?")[1].messages == (
        ChatMessage("user", (MediaPart(0), TextPart("What?"))),
    )
    rows[1] = first | {"prompt": "What?"}
    with pytest.raises(ConfigError, match="row 1 has 0 <image> markers for 1 images; write"):
        load(f"{MODULE}:rows")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "x", "answer": 1}], {}, "no image column 'images' .it has prompt, answer.; set data.image_column"),
        ([{"images": image(1), "answer": 1}], {}, "no prompt column 'prompt' .* or data.question"),
        ([{"prompt": None, "images": image(1), "answer": 1}], {}, "row 0 has no 'prompt'; name the column, or give"),
        ([verl_row(0, "no marker")], {}, "row 0 has 0 <image> markers for 1 images; write one marker"),
        ([verl_row(0), verl_row(1, "<image><image>")], {}, "row 1 has 2 <image> markers for 1 images"),
        (
            [{"prompt": "<image> or?", "images": [image(1), image(2)], "answer": 1}],
            {},
            "row 0 has 1 <image> markers for 2 images; write one marker",
        ),
        (
            [
                {
                    "prompt": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}],
                    "images": image(1),
                    "answer": 1,
                }
            ],
            {},
            "row 0 has 0 <image> markers for 1 images; write one marker, or part of type image, into the prompt",
        ),
        ([{"prompt": "No picture: <image>", "images": None, "answer": 1}], {}, "row 0 has 1 <image> markers for 0 im"),
        ([{"prompt": "<image>", "images": image(1)}], {}, r"row 0 has no ground truth \(reward_model.ground_truth or"),
        (
            [{"prompt": "<image>", "images": image(1), "loesung": 7}],
            {"answer_column": "antwort"},
            r"row 0 has no ground truth \(antwort; it has prompt, images, loesung\); set data.answer_column",
        ),
        (
            [{"prompt": "<image>", "images": image(1), "meta": {"solution": 7, "level": 1}}],
            {"answer_column": "meta.answer"},
            r"row 0 has no ground truth \(meta.answer; it has prompt, images, meta\); set data.answer_column",
        ),
        ([{"prompt": "<image>", "images": b"junk", "answer": 1}], {}, "row 0 image 0 cannot be read"),
        (
            [{"prompt": "<image>", "images": "a.png", "answer": 1}],
            {},
            "row 0 image 0 is the file .*a.png: No such file",
        ),
        (
            [{"prompt": "<image>", "images": {"bytes": image(1), "resized_height": 28}, "answer": 1}],
            {},
            "row 0 image 0 has resized_height, which is not understood; there are bytes, image, path, min_pixels",
        ),
        (
            [{"prompt": "<image>", "images": {"bytes": image(1), "max_pixels": 0}, "answer": 1}],
            {},
            "row 0 image 0: max_pixels is 0; give a whole number, 1 or more",
        ),
        (
            [{"prompt": "<image>", "images": {"bytes": image(1), "min_pixels": 9}, "answer": 1}],
            {"max_pixels": 8},
            r"row 0 image 0: min_pixels \(9\) is more than max_pixels \(8\)",
        ),
        (
            [PromptSample(0, (ChatMessage("user", (MediaPart(0),)),), (b"",), 1, image_bounds=(PixelBounds(),) * 2)],
            {},
            "row 0 has image_bounds for 2 images, but 1 images",
        ),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "image", "max_pixels": 9}]}], "images": image(1)}],
            {},
            "row 0 bounds the pixels of an image in the prompt; do so in the image column",
        ),
        ([{"prompt": 3, "images": None, "answer": 1}], {}, "neither text nor a list of role and content"),
        ([{"prompt": "x", "images": None, "videos": [b"v"], "answer": 1}], {}, "row 0 has videos"),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "answer": 1}],
            {"image_column": ""},
            "row 0 has a content part of type 'video'; there are 'text', with its text, and 'image'",
        ),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "image_url"}, {"type": "text"}]}], "answer": 1}],
            {"image_column": ""},
            "row 0 has a content part of type 'image_url'",
        ),
        (
            [{"prompt": [{"role": "assistant", "content": [{"type": "thinking", "text": "x"}]}], "answer": 1}],
            {"image_column": ""},
            "row 0 has a content part of type 'thinking'",
        ),
        (
            [{"prompt": [{"role": "user", "content": ["hello"]}], "answer": 1}],
            {"image_column": ""},
            "part of type 'str'",
        ),
        (
            [{"prompt": [{"role": "assistant", "content": "x"}], "images": None, "answer": 1}],
            {"suffix": "y"},
            "row 0 has no message of the role 'user' for the suffix",
        ),
        ([], {}, "has no rows"),
        ([verl_row(0)], {"held_out_fraction": 0.5}, "leaves nothing of 1 rows"),
    ],
)
def test_mistakes_in_rows_are_one_line(
    module: types.ModuleType, rows: list[Any], options: dict[str, Any], message: str
) -> None:
    module.rows = lambda: rows  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=message) as caught:
        load(f"{MODULE}:rows", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", [None, -1])
def test_a_row_without_its_label_is_one_line(module: types.ModuleType, missing: int | None) -> None:
    import datasets

    features = datasets.Features({"prompt": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat"])})
    rows = datasets.Dataset.from_dict({"prompt": ["x"] * 9, "label": [0] * 8 + [missing]}, features=features)
    module.rows = lambda: rows  # type: ignore[attr-defined]
    dataset = load(f"{MODULE}:rows", image_column="")
    assert dataset[7].ground_truth == "cat"
    with pytest.raises(ConfigError, match="row 8 has no ground truth"):
        dataset[8]


def test_text_only_by_choice(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    assert load(tmp_path / "t.jsonl", image_column="")[0] == PromptSample(
        0, (ChatMessage("user", (TextPart("1+1?"),)),), (), "2", extra={"answer": "2"}
    )


def test_arguments_of_the_chat_template_are_those_of_each_row(module: types.ModuleType) -> None:
    own = dataclasses.replace(make_sample(3), template_arguments={"budget": 9})
    module.rows = lambda: [{"prompt": "?", "answer": 1}]  # type: ignore[attr-defined]
    module.samples = lambda: [own]  # type: ignore[attr-defined]
    arguments = {"enable_thinking": False, "budget": 3.0}
    for name, budget in (("rows", 3.0), ("samples", 9)):
        sample = load(f"{MODULE}:{name}", image_column="", chat_template_arguments=arguments)[0]
        assert json.dumps(sample.template_arguments) == json.dumps({"enable_thinking": False, "budget": budget})
    with pytest.raises(ConfigError, match=r"chat_template_arguments: add_generation_prompt is no variable of a chat"):
        parse_config(DataConfig, {"train": "a", "chat_template_arguments": {"add_generation_prompt": False}}, "x")


def test_arguments_of_a_sample_are_those_that_actors_take(module: types.ModuleType) -> None:
    own = dataclasses.replace(make_sample(3), template_arguments={"size": (1, 2)})
    module.samples = lambda: [own]  # type: ignore[attr-defined]
    assert load(f"{MODULE}:samples", image_column="")[0].template_arguments == {"size": [1, 2]}
    for arguments, problem in (
        ({"day": date(2026, 1, 1)}, "has no form in JSON: Object of type date"),
        ({"continue_final_message": False}, "continue_final_message is no variable of a chat template"),
    ):
        own.template_arguments.clear()
        own.template_arguments.update(arguments)
        with pytest.raises(ConfigError, match=f": row 0 template_arguments: {problem}"):
            load(f"{MODULE}:samples", image_column="")[0]


def test_all_rows_may_have_a_system_prompt_and_a_suffix(module: types.ModuleType) -> None:
    """Where a row has a system prompt it stays, and what follows the last user message stays behind it."""
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "user", "content": "Look <image>"},
        {"role": "assistant", "content": "Well"},
    ]
    module.rows = lambda: [  # type: ignore[attr-defined]
        {"prompt": "<image>How many?", "images": image(1), "answer": 1},
        verl_row(0),
        {"prompt": turns, "images": image(1), "answer": 1},
    ]
    module.samples = lambda: [make_sample(3)]  # type: ignore[attr-defined]
    options = {"system": "Be brief.", "suffix": " Think."}
    dataset = load(f"{MODULE}:rows", **options)
    system = ChatMessage("system", (TextPart("Be brief."),))
    assert dataset[0].messages == (system, ChatMessage("user", (MediaPart(0), TextPart("How many? Think."))))
    assert dataset[1].messages == (
        ChatMessage("system", (TextPart("Answer."),)),
        ChatMessage("user", (MediaPart(0), TextPart("Which digit? Think."))),
    )
    assert dataset[2].messages[2:] == (
        ChatMessage("user", (TextPart("Look "), MediaPart(0), TextPart(" Think."))),
        ChatMessage("assistant", (TextPart("Well"),)),
    )
    assert load(f"{MODULE}:samples", **options)[0].messages == (
        system,
        ChatMessage("user", (TextPart("row 3 Think."),)),
    )
