"""The fields of a request's body: which are read, which change nothing here, and which are refused by name."""

from collections.abc import Mapping
from typing import Any

from mirasol.app.server.questions import Choosing
from mirasol.app.server.refusals import Refusal
from mirasol.app.server.settings import Caps
from mirasol.errors import quote_text

READ = frozenset(
    {
        *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature"),
        *("top_p", "seed", "stop", "logprobs", "top_logprobs"),
    }
)
# What OpenAI's clients send along, and what changes no answer.
HARMLESS = frozenset(
    {
        *("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("store", "parallel_tool_calls"),
    }
)
# Fields that are accepted with the values that mean what is done anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
MOST_STOPS, LONGEST_STOP, MOST_ALTERNATIVES = 4, 64, 20


def check_fields(body: Any, known: frozenset[str] = READ) -> dict[str, Any]:
    """The fields of a body that are given and are read. Raises Refusal (400) for one that would change the answer in a
    way that the server cannot."""
    if not isinstance(body, dict):
        raise Refusal(400, "the body is not a JSON object", "invalid_type")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name in known or name in HARMLESS:
            continue
        if name not in NEUTRAL:
            raise Refusal(400, f"{quote_text(name)}: not supported here: leave it out", "unknown_parameter", name[:80])
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in NEUTRAL[name]):
            raise Refusal(400, f"{name}={_quote(value)}: not supported here: leave it out", "unsupported_value", name)
    return {name: value for name, value in given.items() if name in known}


def check_model(body: Mapping[str, Any], name: str) -> None:
    """Raises Refusal (404) for another model than the one that is served."""
    wanted = body.get("model", name)
    if wanted != name:
        shown = quote_text(wanted) if isinstance(wanted, str) else _quote(wanted)
        raise Refusal(404, f"model {shown} is not served here: ask {name!r}", "model_not_found", "model")


def read_choosing(body: Mapping[str, Any], caps: Caps) -> Choosing:
    """How an answer's tokens are chosen: greedily unless a temperature is given. Raises Refusal (400)."""
    longest = read_number(body, "max_tokens", None, 1, caps.max_tokens, whole=True)
    newer = read_number(body, "max_completion_tokens", None, 1, caps.max_tokens, whole=True)
    if longest is not None and newer is not None and longest != newer:
        raise Refusal(400, "max_tokens and max_completion_tokens differ: give one", "invalid_value", "max_tokens")
    chosen = next((value for value in (longest, newer) if value is not None), min(32, caps.max_tokens))
    wants = read_flag(body, "logprobs")
    alternatives = read_number(body, "top_logprobs", 0, 0, MOST_ALTERNATIVES, whole=True)
    if alternatives and not wants:
        raise Refusal(400, "top_logprobs without logprobs: give logprobs=true", "invalid_value", "top_logprobs")
    return Choosing(
        max_tokens=chosen,
        temperature=float(read_number(body, "temperature", 0, 0, 2)),
        top_p=float(read_number(body, "top_p", 1, 0, 1)),
        seed=read_number(body, "seed", None, -(2**63), 2**63 - 1, whole=True),
        stop=read_stops(body),
        alternatives=alternatives,
    )


def read_stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts at which an answer ends."""
    value = body.get("stop", ())
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or len(stops) > MOST_STOPS:
        raise Refusal(400, f"stop: give a text, or a list of up to {MOST_STOPS}", "invalid_value", "stop")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= LONGEST_STOP:
            raise Refusal(400, f"stop: each is a text of 1 to {LONGEST_STOP} characters", "invalid_value", "stop")
        check_text(stop, "stop")
    return tuple(stops)


def read_flag(body: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false; False where it is not given."""
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise Refusal(400, f"{name}={_quote(value)}: give true or false", "invalid_type", name)
    return value


def read_number(
    body: Mapping[str, Any], name: str, default: Any, least: float, most: float, *, whole: bool = False
) -> Any:
    """A field that is a number from `least` to `most`. Raises Refusal (400) for anything else."""
    value = body.get(name)
    if value is None:
        return default
    kinds = int if whole else int | float
    is_number = isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < 2**64
    if not (is_number and least <= value <= most):
        kind = "a whole number" if whole else "a number"
        raise Refusal(400, f"{name}={_quote(value)}: give {kind} from {least:g} to {most:g}", "invalid_value", name)
    return value


def read_text(body: Mapping[str, Any], name: str, longest: int = 100_000) -> str:
    """A field that is a text. Raises Refusal (400) for anything else."""
    value = body.get(name)
    if not isinstance(value, str) or len(value) > longest:
        raise Refusal(400, f"{name}: give a text of up to {longest} characters", "invalid_type", name)
    return check_text(value, name)


def check_text(text: str, name: str) -> str:
    """Returns the text. Raises Refusal (400) for half of a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refusal(400, f"{name}: has half of a surrogate pair at {error.start}", "invalid_value", name) from error
    return text


def _quote(value: Any) -> str:
    return quote_text(value) if isinstance(value, str) else repr(value)[:80]
