"""A chat through a template: its arguments, and what is refused of them."""

import functools
import inspect
import logging
import math
from datetime import date
from typing import Any

import numpy as np
import pytest
from transformers import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from common.chat import arguments_from_json, has_template, render_chat, template_arguments
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


def test_arguments_are_rendered_as_they_cross(processor: Any) -> None:
    processor = build_processor()
    processor.chat_template = "{{ x }}"
    assert render_chat(processor, ChatPrompt(MESSAGES, {"x": (1, 2.0)})) == "[1, 2.0]"
    for arguments in ({"continue_final_message": False}, {"x": date(2026, 1, 1)}, {"x": "y" * 2**16}):
        with pytest.raises(InvalidRequest) as refused:
            render_chat(processor, ChatPrompt(MESSAGES, arguments))
        assert refused.value.field == "chat.template_arguments"


def test_a_template_that_raises_names_the_field(processor: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^chat.template_arguments: TypeError: can only concatenate str"):
        render_chat(processor, ChatPrompt(MESSAGES, {"enable_thinking": True, "budget": 9}))
    processor = build_processor()
    processor.chat_template = "{{ raise_exception('no system\nprompt') }}"
    with pytest.raises(InvalidRequest, match=r"^prompt: TemplateError: no system prompt$"):
        render_chat(processor, ChatPrompt(MESSAGES))


def test_a_model_without_a_template(processor: Any) -> None:
    bare = build_processor()
    bare.chat_template = None
    bare.tokenizer.chat_template = None
    for made in (bare, bare.tokenizer):
        with pytest.raises(InvalidRequest, match=r"^chat: the model has no chat template") as refused:
            render_chat(made, ChatPrompt(MESSAGES))
        assert refused.value.field == "chat"
        assert not has_template(made)
    assert has_template(processor)


def test_a_name_that_the_template_does_not_use_is_no_warning(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    logger = logging.getLogger("transformers.processing_utils")
    monkeypatch.setattr(logger, "callHandlers", lambda record: said.append(record.getMessage()))
    assert render_chat(processor, ChatPrompt(MESSAGES, {"of_another_model": 1})) == "hi"
    logger.warning("another")
    assert said == ["another"]


def test_values_are_what_json_makes_of_them() -> None:
    """In their order, with integers and doubles apart."""
    values = {"b": (1.5, None, True), "a": [3.0, 3], "c": {"é": 2**60, "d": "x", 1: np.float64(0.1)}}
    expected = {"b": [1.5, None, True], "a": [3.0, 3], "c": {"é": 2**60, "d": "x", "1": 0.1}}
    assert repr(template_arguments(values, "x")) == repr(expected)


_DEEP: list[Any] = functools.reduce(lambda inner, _: [inner], range(10**5), [])


@pytest.mark.parametrize("value", [math.nan, math.inf, [10**5000], b"x", object(), date(2026, 1, 1), "\ud800", _DEEP])
def test_what_json_has_no_form_for_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^x: has no form in JSON: "):
        template_arguments({"a": [value]}, "x")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is no JSON: Expecting property name"),
        ("[" * 2**15, "is no JSON: maximum recursion depth exceeded"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "is no JSON: 'b' comes twice in one object"),
        ("[1]", "is a JSON list; give an object"),
        ('{"a": NaN}', "has no form in JSON: "),
        ('{"a": 1e999}', "has no form in JSON: "),
        (r'{"a": "\ud800"}', "has no form in JSON: "),
        ('{"a": "%s"}' % ("é" * 2**15), "65545 bytes of JSON; the limit is 65536"),
        ('{"tokenize": true}', "tokenize is no variable"),
    ],
)
def test_texts_that_are_no_arguments_are_refused(text: str, problem: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        arguments_from_json(text, "x")
    assert refused.value.message.startswith(f"x: {problem}")


def test_names_that_are_not_the_callers_are_refused() -> None:
    """All that transformers takes beside variables of the template, but tools and documents."""
    methods = (ProcessorMixin.apply_chat_template, PreTrainedTokenizerBase.apply_chat_template)
    names = {name for method in methods for name in inspect.signature(method).parameters}
    for name in names - {"tools", "documents", "kwargs"} | {"messages", "conversations"}:
        with pytest.raises(InvalidRequest, match=f"^x: {name} is no variable"):
            template_arguments({name: True}, "x")
