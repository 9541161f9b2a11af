"""Reads requests: every field checked, and refused in a sentence that names it.

A field that would change the answer and is not honoured is refused, unless it has the value that changes nothing.
Fields that change nothing pass. A null is a field left out.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dspark_jax.config.cli import did_you_mean
from dspark_jax.errors import UserError
from dspark_jax.readers import Check, either, flag, integer, list_of, number, object_of, one_of, parse_json, shown, text
from dspark_jax.serving.api.errors import ApiError, bad_request
from dspark_jax.serving.api.messages import messages_of
from dspark_jax.serving.requests import Prompt
from dspark_jax.serving.sampling import SEEDS, SamplingParams

LIMIT = 2**31 - 1
IDS = list_of(integer(0), least=1)

COMMON: dict[str, Check] = {
    "model": text(empty=False),
    "max_tokens": integer(1, LIMIT),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": integer(-1, LIMIT),
    "min_p": number(0, 1),
    "n": integer(1, 128),
    "seed": integer(-(2**63), SEEDS - 1),
    "stop": either(text(empty=False), list_of(text(empty=False), most=4)),
    "stop_token_ids": list_of(integer(0), most=64),
    "stream": flag(),
    "stream_options": object_of(),
    "speculation": flag(),
    "policy": one_of("plain"),
    "ignore_eos": flag(),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 100),
    "logit_bias": object_of(number(-100, 100)),
    "priority": integer(0, 1),
}
"""Fields of both endpoints that are honoured."""

CHAT: dict[str, Check] = COMMON | {
    "messages": list_of(object_of(), least=1),
    "max_completion_tokens": integer(1, LIMIT),
    "chat_template_kwargs": object_of(),
    "tools": list_of(object_of()),
    "logprobs": flag(),
    "top_logprobs": integer(0, 20),
}
COMPLETION: dict[str, Check] = COMMON | {
    "prompt": either(text(), IDS, list_of(either(text(), IDS), least=1)),
    "logprobs": either(integer(0, 20), one_of(False)),
}

HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prediction", "parallel_tool_calls",
}  # fmt: skip
"""Fields that change no token of the answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "min_tokens": (0,),
    "top_logprobs": (0,), "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"), "functions": ([],), "function_call": ("auto", "none"), "modalities": (["text"],),
    "reasoning_effort": (), "verbosity": (), "audio": (), "web_search_options": (), "use_beam_search": (False,),
    "skip_special_tokens": (), "include_stop_str_in_output": (False,), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "guided_json": (), "guided_regex": (), "guided_choice": (),
    "guided_grammar": (), "structured_outputs": (),
}  # fmt: skip
"""Fields that would change the answer and are not honoured, with the values under which they do not."""


@dataclass(frozen=True)
class Ask:
    """A request, checked as far as it can be without the target.

    Attributes:
        chat: whether it came to /v1/chat/completions.
        model: as named by the client; None: not named.
        prompts: texts, token ids or messages; a chat has one.
        sampling: settings of every answer, but for seeds and limits.
        limit: the most new tokens; None: as many as fit.
        limit_field: the field that set it.
        choices: answers to each prompt.
        seed: of the first answer.
        variables: of the chat template, `tools` among them.
        stream, include_usage, usage_in_chunks: how to answer.
        speculation: whether the answer reports where its tokens came from.
        priority: 0, or 1 for work that waits behind that of others.
    """

    chat: bool
    model: str | None
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    limit: int | None
    limit_field: str
    choices: int
    seed: int
    variables: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    include_usage: bool = False
    usage_in_chunks: bool = False
    speculation: bool = False
    priority: int = 0

    @property
    def answers(self) -> int:
        """Requests of the engine that it takes."""
        return len(self.prompts) * self.choices

    @property
    def prompt_field(self) -> str:
        """The field that prompts come from."""
        return "messages" if self.chat else "prompt"


def read_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a body, without fields that are null. ApiError for anything else."""
    try:
        value = parse_json(data, "The request's body", expected="one JSON object in UTF-8")
    except UserError as error:
        raise bad_request(str(error), code="invalid_json") from None
    # parse_json takes any JSON value.
    if not isinstance(value, dict):
        raise bad_request("The request's body is no JSON object.", code="invalid_json")
    # OpenAI's client sends null for what was not set.
    return {name: item for name, item in value.items() if item is not None}


def read_ask(body: Mapping[str, Any], chat: bool) -> Ask:
    """The request of a body.

    Args:
        body: of `read_body`.
        chat: whether it is a chat completion.
    Raises:
        ApiError: a 400 that names the field at fault.
    """
    known = CHAT if chat else COMPLETION
    # Names first: a misspelt field explains a missing one.
    _check_names(body, known)
    # In the table's order and not the body's: the same faults give the same sentence.
    for name, check in known.items():
        if name in body and not check.holds(body[name]):
            raise bad_request(f"{name} is {shown(body[name])}; expected {check.expected}.", name)

    required = "messages" if chat else "prompt"
    if required not in body:
        raise bad_request(f"The request has no {required}; expected {known[required].expected}.", required)

    # The newer name wins where both are given.
    limit_field = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    # A completion without a limit has OpenAI's default, a chat takes what the context leaves.
    limit = body.get(limit_field, None if chat else 16)

    seed = body.get("seed")
    return Ask(
        chat=chat,
        model=body.get("model"),
        prompts=(messages_of(body["messages"]),) if chat else _prompts(body["prompt"]),
        sampling=_sampling(body, chat),
        limit=limit,
        limit_field=limit_field,
        choices=body.get("n", 1),
        # Without a seed every request samples anew.
        seed=secrets.randbits(64) if seed is None else seed % SEEDS,
        variables=_template_variables(body),
        stream=body.get("stream", False),
        **_stream_options(body),
        speculation=body.get("speculation", False),
        priority=body.get("priority", 0),
    )


def _check_names(body: Mapping[str, Any], known: Mapping[str, Check]) -> None:
    for name, value in body.items():
        if name in known or name in HARMLESS:
            continue
        if name in NEUTRAL:
            # 0 is not False here, nor 1 True: each is neutral for fields of its own type only.
            if any(
                value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]
            ):
                continue
            raise bad_request(
                f"{name} = {shown(value)} is not supported by this server; leave the field out.", name, "unsupported"
            )
        # The near-miss is looked for among names that have a meaning here; harmless ones would only be ignored.
        hint = did_you_mean(name, [*known, *NEUTRAL]) or "; leave it out."
        raise bad_request(f"The request has an unknown field {shown(name)}{hint}", name, "unknown_field")


def _prompts(prompt: Any) -> tuple[Prompt, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    # One prompt of ids; a list of lists, or of texts, is several prompts.
    if all(isinstance(item, int) for item in prompt):
        return (tuple(prompt),)
    return tuple(item if isinstance(item, str) else tuple(item) for item in prompt)


def _sampling(body: Mapping[str, Any], chat: bool) -> SamplingParams:
    # Values are within their ranges by now; what follows only renames them.
    stop = body.get("stop", ())
    stop_tokens = body.get("stop_token_ids")
    return SamplingParams(
        temperature=float(body.get("temperature", 1.0)),
        top_p=float(body.get("top_p", 1.0)),
        top_k=max(body.get("top_k", 0), 0),  # other servers write "off" as -1
        min_p=float(body.get("min_p", 0.0)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        # An empty list is no request to go on past the end: `ignore_eos` is.
        stop_tokens=None if not stop_tokens else tuple(stop_tokens),
        # Plain decoding within the same compiled loop: nothing is verified (docs/algorithm.md, rule 2).
        verify_length=0 if body.get("policy") == "plain" else None,
        ignore_eos=body.get("ignore_eos", False),
        presence_penalty=float(body.get("presence_penalty", 0.0)),
        frequency_penalty=float(body.get("frequency_penalty", 0.0)),
        repetition_penalty=float(body.get("repetition_penalty", 1.0)),
        logit_bias=_biases(body.get("logit_bias", {})),
        logprobs=_logprobs(body, chat),
    )


def _biases(given: Mapping[str, Any]) -> dict[int, float]:
    """Biases by token id; JSON's names are texts."""
    for name in given:
        # `isdigit` alone is true of digits of other scripts, and of superscripts, which int() refuses.
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise bad_request(f"logit_bias names {shown(name)}; expected a token id.", "logit_bias")
    return {int(name): float(value) for name, value in given.items()}


def _logprobs(body: Mapping[str, Any], chat: bool) -> int | None:
    """How many alternatives to report at each token; None: log-probabilities are not reported."""
    given = body.get("logprobs", False)
    # The older form has the number itself, the newer one a flag and a number.
    if not chat:
        return None if given is False else given
    if not given and body.get("top_logprobs"):
        raise bad_request("top_logprobs is for answers with logprobs; set logprobs to true.", "top_logprobs")
    return body.get("top_logprobs", 0) if given else None


FIELDS = {"stop_tokens": "stop_token_ids", "stop_slots": "stop_token_ids"} | {name: name for name in COMMON}
"""The API's names of the engine's settings."""


def field_of(sentence: str) -> str | None:
    """The field that a sentence of the engine is about, if it names one."""
    # This sentence counts them in words, without the setting's name.
    if "stop tokens" in sentence:
        return "stop_token_ids"
    words = sentence.replace(",", " ").split()
    return next((FIELDS[word] for word in words if word in FIELDS and "_" in word), None)


def _template_variables(body: Mapping[str, Any]) -> dict[str, Any]:
    # Copied, since `tools` joins them below.
    variables = dict(body.get("chat_template_kwargs", {}))
    # Names that the renderer itself sets: overwriting them would render another conversation than the messages'.
    taken = {
        "messages",
        "tokenizer",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
    } & variables.keys()
    if taken:
        raise bad_request(f"chat_template_kwargs sets {min(taken)}, which is not its to set.", "chat_template_kwargs")

    # "none" means that the model is not to call any: leaving them out of the prompt is the surest way.
    if body.get("tools") and body.get("tool_choice") != "none":
        for place, tool in enumerate(body["tools"]):
            if tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
                raise bad_request(f"tools[{place}] is no function; expected an object of the type 'function'.", "tools")
        variables["tools"] = body["tools"]
    return variables


def _stream_options(body: Mapping[str, Any]) -> dict[str, bool]:
    options = body.get("stream_options", {})
    if options and not body.get("stream"):
        raise bad_request("stream_options is for streams only; set stream, or leave it out.", "stream_options")

    for name, value in options.items():
        known = ("include_usage", "continuous_usage_stats", "include_obfuscation")
        if name not in known or not isinstance(value, bool):
            found = json.dumps({name: value}, default=str)[:60]
            raise bad_request(f"stream_options has {found}; expected include_usage, true or false.", "stream_options")
    # The second is other servers' way to tell how many tokens a chunk has brought.
    each = options.get("continuous_usage_stats", False)
    return {"include_usage": each or options.get("include_usage", False), "usage_in_chunks": each}


def require_model(ask: Ask, name: str) -> None:
    """ApiError, a 404, if the request is for another model than `name`."""
    if ask.model is not None and ask.model != name:
        raise ApiError(
            404, f"There is no model {shown(ask.model)} here; this server has {name}.", param="model",
            code="model_not_found",
        )  # fmt: skip
