"""A chat through a template: its arguments, and what is refused of them."""

import inspect
import json
import math
from typing import Any

import pytest
from transformers import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from common.chat import render_chat, template_arguments
from common.errors import InvalidRequest
from common.types import ChatMessage, ChatPrompt, TextPart
from examples.digits.model import build_processor

MESSAGES = (ChatMessage("user", (TextPart("hi"),)),)
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking %}<think>{{ 'at most ' + budget }}{% endif %}"
)


@pytest.fixture(scope="module")
def processor() -> Any:
    made = build_processor()
    made.chat_template = TEMPLATE
    return made


def test_the_template_gets_the_arguments(processor: Any) -> None:
    assert render_chat(processor, ChatPrompt(MESSAGES)) == "hi"
    assert render_chat(processor, ChatPrompt(MESSAGES, {"enable_thinking": False})) == "hi"
    arguments = {"enable_thinking": True, "budget": "9"}
    assert render_chat(processor, ChatPrompt(MESSAGES, arguments)) == "hi<think>at most 9"


def test_a_template_that_raises_names_the_field(processor: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^chat.template_arguments: TypeError: can only concatenate str"):
        render_chat(processor, ChatPrompt(MESSAGES, {"enable_thinking": True, "budget": 9}))
    processor = build_processor()
    processor.chat_template = "{{ raise_exception('no system\nprompt') }}"
    with pytest.raises(InvalidRequest, match=r"^prompt: TemplateError: no system prompt$"):
        render_chat(processor, ChatPrompt(MESSAGES))


def test_values_are_json_with_whole_numbers_as_such() -> None:
    values = {"a": 3.0, "b": (1.5, None, True), "c": {"d": 2**60, "e": "x"}}
    expected = {"a": 3, "b": [1.5, None, True], "c": {"d": 2**60, "e": "x"}}
    assert json.dumps(template_arguments(values, "x")) == json.dumps(expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, 10**400, b"x", {1: 2}, [object()]])
def test_what_is_no_json_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^x: has a .* that JSON has no form for"):
        template_arguments({"a": [value]}, "x")


def test_names_that_are_not_the_callers_are_refused() -> None:
    """All that transformers takes beside variables of the template, but tools and documents."""
    methods = (ProcessorMixin.apply_chat_template, PreTrainedTokenizerBase.apply_chat_template)
    names = {name for method in methods for name in inspect.signature(method).parameters}
    for name in names - {"tools", "documents", "kwargs"} | {"messages", "conversations"}:
        with pytest.raises(InvalidRequest, match=f"^x: {name} is no variable"):
            template_arguments({name: True}, "x")
