"""Bad calls by everything of a rollout but its media: sampling, prompts, names."""

import json
import math
from typing import Any

from common.pb.rollout.v1 import rollout_pb2 as pb
from tests.hostile import images
from tests.hostile.calls import GENERATE, INT32, INT64, INVALID, UINT32, BadCall, Maker, chat


class SamplingCalls(Maker):
    """Of Generate, whose sampling parameters are wrong."""

    def huge_n(self) -> BadCall:
        n = self._rng.choice((self._limits.max_group_size + 1, 10**6, UINT32))
        return self._sampling("n", n=n)

    def sampling_that_is_no_number(self) -> BadCall:
        name = self._rng.choice(_FLOATS)
        beams = {"num_beams": 2} if name == "length_penalty" else {}
        return self._sampling(name, **{name: self._rng.choice((math.nan, math.inf, -math.inf))}, **beams)

    def sampling_out_of_range(self) -> BadCall:
        name, values = self._rng.choice(_OUT_OF_RANGE)
        return self._sampling(name, **{name: self._rng.choice(values)})

    def ids_outside_the_vocabulary(self) -> BadCall:
        name = self._rng.choice(("stop_token_ids", "allowed_token_ids", "bad_token_ids", "logit_bias"))
        bad = self._rng.choice((-1, -INT32 - 1, self._vocab_size, INT32))
        return self._sampling(name, **{name: {bad: 1.0} if name == "logit_bias" else [3, bad]})

    def wrong_bias(self) -> BadCall:
        return self._sampling("logit_bias", logit_bias={3: self._rng.choice((math.nan, math.inf, 101.0, -1e30))})

    def too_many_strings(self) -> BadCall:
        name = self._rng.choice(("stop", "bad_words"))
        return self._sampling(name, **{name: self._rng.choice((["x"] * 17, [""], ["x" * 129]))})

    def wrong_structure(self) -> BadCall:
        structure = self._rng.choice(
            (
                pb.StructuredOutput(),
                pb.StructuredOutput(regex=""),
                pb.StructuredOutput(regex="a" * 5000),
                pb.StructuredOutput(json_schema="{" * 20000),
                pb.StructuredOutput(choice=pb.Choice()),
                pb.StructuredOutput(choice=pb.Choice(texts=["a", ""])),
                pb.StructuredOutput(grammar=""),
                pb.StructuredOutput(json_object=False),
            )
        )
        return self._sampling("structured_output", structured_output=structure)

    def too_many_beams(self) -> BadCall:
        num_beams = self._rng.choice((self._limits.max_logprobs // 2 + 1, 10**6, UINT32))
        return self._sampling("num_beams", num_beams=num_beams)


class PromptCalls(Maker):
    """Of Generate, whose prompt is wrong, or does not fit its media."""

    def nothing(self) -> BadCall:
        return BadCall("", GENERATE, (b"",), "prompt", INVALID)

    def no_prompt(self) -> BadCall:
        return self._generate("prompt", text=None)

    def empty_prompt(self) -> BadCall:
        values: Any = self._rng.choice(
            (
                {"text": ""},
                {"tokens": pb.TokenPrompt()},
                {"chat": pb.ChatPrompt()},
                {"chat": pb.ChatPrompt(messages=[pb.ChatMessage()])},
                {"chat": pb.ChatPrompt(messages=[pb.ChatMessage(role="user", parts=[pb.ChatPart()])])},
            )
        )
        return self._generate("text|tokens.*|chat.*", **values)

    def arguments_of_the_template(self) -> BadCall:
        rng = self._rng
        prompt = chat(0)
        bad = (
            json.dumps({rng.choice(("tokenize", "messages", "chat_template", "return_dict")): True}),
            json.dumps({"x": [rng.choice((math.nan, math.inf))]}),
            json.dumps({"x": "y" * 2**16}),
            json.dumps({"x": rng.choice(("\ud800", [[]] * 2**15))}),
            '{"x": 1, "x": 2}',
            rng.choice(("null", "[]", "{", "[" * 2**15, '{"x": 1e999}', '{"x": %s}' % ("9" * 5000))),
        )
        prompt.template_arguments = rng.choice(bad)
        return self._generate(r"chat\.template_arguments", chat=prompt)

    def ids_of_the_prompt(self) -> BadCall:
        bad = self._rng.choice((-1, -INT32 - 1, self._vocab_size, INT32))
        ids = [5] * self._rng.randint(0, 20) + [bad]
        return self._generate(r"tokens\.ids\[\d+\]", tokens=pb.TokenPrompt(ids=ids))

    def long_prompt(self) -> BadCall:
        length = self._limits.max_context_tokens
        if self._rng.random() < 0.5:
            return self._generate(r"tokens\.ids", tokens=pb.TokenPrompt(ids=[5] * (length + 1)))
        return self._generate("text", text="x" * (64 * length + 1))

    def placeholders_that_do_not_match(self) -> BadCall:
        rng = self._rng
        run = pb.PlaceholderRange
        runs = rng.choice(
            (
                [run(offset=0, length=0)],
                [run(offset=9, length=5)],
                [run(offset=UINT32, length=UINT32)],
                [run(offset=0, length=2), run(offset=2, length=2)],
                [run(offset=1, length=1)],
            )
        )
        item = pb.MediaItem(modality=pb.MODALITY_IMAGE, encoded=images.picture(rng))
        tokens = pb.TokenPrompt(ids=[5] * 10, placeholders=runs)
        return self._generate(r"tokens\.placeholders.*", tokens=tokens, media=[item])

    def media_that_the_prompt_does_not_hold(self) -> BadCall:
        rng = self._rng
        items = [pb.MediaItem(modality=pb.MODALITY_IMAGE, encoded=images.picture(rng)) for _ in range(2)]
        prompt: Any = rng.choice(
            (
                {"chat": chat(0)},
                {"chat": chat(1)},
                {"chat": chat(3)},
                {"chat": chat(2, first=1)},
                {"chat": chat(2, first=UINT32 - 1)},
                {"tokens": pb.TokenPrompt(ids=[5, 6, 7])},
            )
        )
        return self._generate(r"media|chat\..*|prompt", media=items, **prompt)

    def too_many_media(self) -> BadCall:
        count = self._limits.max_media_items + self._rng.randint(1, 50)
        item = pb.MediaItem(modality=pb.MODALITY_IMAGE, sha256=bytes(32))
        return self._generate("media", media=[item] * count, chat=chat(count))

    def wrong_name(self) -> BadCall:
        return self._generate("group_id", group_id=self._rng.choice(("", "x" * 129, "x" * 10**5)))

    def version_of_the_past_or_the_future(self) -> BadCall:
        version = self._rng.choice((-1, -INT64, 10**6, INT64))
        reason = "INVALID_REQUEST" if version < 0 else "WEIGHTS_PENDING"
        return self._generate("min_policy_version", (reason,), min_policy_version=version)

    def another_run(self) -> BadCall:
        return self._generate("", ("WEIGHTS_PENDING",), run_id=self._rng.choice(("another", "x" * 10**5)))


_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "length_penalty",
)
_OUT_OF_RANGE: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("temperature", (-1.0, 1e-30, 2.5, 101.0)),
    ("top_p", (0.0, -1.0, 1.5)),
    ("top_k", (UINT32,)),
    ("min_p", (-0.5, 2.0)),
    ("max_tokens", (10**6, UINT32)),
    ("min_tokens", (3, UINT32)),
    ("seed", (-1, INT64)),
    ("repetition_penalty", (0.0, -1.0, 1e9)),
    ("presence_penalty", (-3.0, 1e30)),
    ("frequency_penalty", (-3.0, 1e30)),
    ("top_logprobs", (10**4, UINT32)),
    ("prompt_top_logprobs", (10**4, UINT32)),
    ("length_penalty", (1.0,)),  # without beams
    ("repetition_detection", (pb.RepetitionDetection(), pb.RepetitionDetection(max_pattern_size=UINT32, min_count=2))),
)
