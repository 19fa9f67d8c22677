"""OpenAI's requests and responses, as far as they mean something here.

A field is one line. Those that OpenAI has and this service has not are declared too: `_refused` names why, and
`edge_phi3.api.openai.translate` refuses them by name when they ask for something; others of type Any are harmless.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from edge_phi3.api.schemas import about
from edge_phi3.generation.parameters import OPENAI_PARAMETERS, PARAMETERS

TEXT_ONLY = "this model reads and writes text only"
_NO_TOOLS = "this service does not call tools; put their description into the conversation"
_NOTHING: Final[tuple[object, ...]] = (False, "", [], {})

_Count = Annotated[int, Meta(ge=1)]


def _refused(reason: str, *harmless: object) -> Meta:
    """Mark a field that is refused, but for null and the values that ask for nothing."""
    return Meta(description=f"Not supported: {reason}.", extra={"reason": reason, "harmless": harmless})


def _described(name: str) -> Meta:
    """Return the meaning and range of one of OpenAI's own parameters."""
    parameter = OPENAI_PARAMETERS[name]
    limits = parameter.value.kind.limits
    return about(parameter.meaning, ge=limits["minimum"], le=limits["maximum"])


class StreamOptions(Struct, forbid_unknown_fields=True, kw_only=True):
    """What a stream holds beside the text."""

    include_usage: Annotated[bool | None, about("End the stream with a chunk that holds the token counts.")] = None
    include_obfuscation: bool | None = None


class JSONSchemaFormat(Struct, forbid_unknown_fields=True, kw_only=True, rename={"schema_": "schema"}):
    """A JSON schema that the answer follows."""

    name: str
    schema_: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True, kw_only=True):
    """What the answer's text is."""

    type: Annotated[str, about("text, json_object or json_schema.")]
    json_schema: JSONSchemaFormat | None = None


class ContentPart(Struct, kw_only=True):
    """A part of a message; only text is understood."""

    type: str
    text: str | None = None


class ChatCompletionMessage(Struct, forbid_unknown_fields=True, kw_only=True):
    """One turn of a conversation."""

    role: Annotated[str, about("system, developer (which counts as system), user or assistant.")]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: Any = None
    audio: Annotated[Any, _refused(TEXT_ONLY, *_NOTHING)] = None
    tool_calls: Annotated[Any, _refused(TEXT_ONLY, *_NOTHING)] = None
    function_call: Annotated[Any, _refused(TEXT_ONLY, *_NOTHING)] = None


class SamplingFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """What chat completions and completions share."""

    model: Annotated[str | None, about("Any name: one model is served, and the answer names it.", "phi-3")] = None
    temperature: Annotated[float, about("0 takes the likeliest token each time.", ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = 1.0
    n: Annotated[int, Meta(ge=1, le=128)] | None = 1
    stop: Annotated[str | list[str] | None, about("Up to four texts before which the answer ends.")] = None
    seed: Annotated[int | None, about(PARAMETERS["seed"].meaning)] = None
    presence_penalty: Annotated[float, _described("presence_penalty")] | None = 0.0
    frequency_penalty: Annotated[float, _described("frequency_penalty")] | None = 0.0
    logit_bias: Annotated[dict[str, float] | None, about("Added to the logits of token ids, -100 to 100.")] = None
    max_tokens: _Count | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    generate_kwargs: Annotated[
        dict[str, Any] | None,
        about("Parameters of `/chat` beside OpenAI's own, such as `top_k` or `repetition_penalty`."),
    ] = None


class ChatCompletionRequest(SamplingFields, kw_only=True):
    """A conversation to be continued by the assistant."""

    messages: Annotated[list[ChatCompletionMessage], Meta(min_length=1)]
    max_completion_tokens: Annotated[
        _Count | None, about("Tokens of the answer at most; what fits the context when not given.")
    ] = None
    response_format: Annotated[
        ResponseFormat | None, about("Holds the answer to JSON, or to JSON that follows a schema.")
    ] = None
    logprobs: Annotated[bool | None, about("Return each token's log-probability.")] = False
    top_logprobs: Annotated[int, _described("top_logprobs")] | None = None
    metadata: Any = None
    service_tier: Any = None
    parallel_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    store: Annotated[Any, _refused("nothing is stored", False)] = None
    modalities: Annotated[Any, _refused(TEXT_ONLY, ["text"])] = None
    audio: Annotated[Any, _refused(TEXT_ONLY)] = None
    tools: Annotated[Any, _refused(_NO_TOOLS, [])] = None
    tool_choice: Annotated[Any, _refused(_NO_TOOLS, "none", "auto")] = None
    functions: Annotated[Any, _refused(_NO_TOOLS, [])] = None
    function_call: Annotated[Any, _refused(_NO_TOOLS, "none", "auto")] = None
    prediction: Annotated[Any, _refused("no predicted output is taken")] = None
    reasoning_effort: Annotated[Any, _refused("this model does not reason apart from its answer", "none")] = None
    verbosity: Annotated[Any, _refused("ask for a short or long answer in the conversation", "medium")] = None
    web_search_options: Annotated[Any, _refused("this service does not search the web")] = None


class CompletionRequest(SamplingFields, kw_only=True):
    """One or more prompts to be continued."""

    prompt: Annotated[str | list[str | int | list[int]] | None, about("A text, token ids, or a list of either.")] = None
    echo: Annotated[bool | None, about("Whether the answer begins with the prompt.")] = False
    logprobs: Annotated[int, about("How many likeliest tokens to return.", ge=0, le=5)] | None = None
    best_of: int | None = None
    suffix: Annotated[Any, _refused("this model continues a text and does not fill gaps", "")] = None


class TopLogprob(Struct):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A chosen token, and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob] | None
    refusal: None = None


class AnswerMessage(Struct):
    """The assistant's turn."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(Struct):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None = None


class PromptTokensDetails(Struct):
    """Where a prompt's tokens came from."""

    cached_tokens: int


class CompletionUsage(Struct):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatCompletion(Struct):
    """The answers to a conversation."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    object: Literal["chat.completion"] = "chat.completion"


class Delta(Struct, omit_defaults=True):
    """A piece of the assistant's turn."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(Struct):
    """A piece of one answer."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(Struct, omit_defaults=True):
    """A piece of the answers to a conversation."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    object: Literal["chat.completion.chunk"]
    usage: CompletionUsage | UnsetType | None = UNSET


class CompletionLogprobs(Struct):
    """Log-probabilities of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Struct):
    """One completion."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: CompletionLogprobs | None = None


class Completion(Struct, omit_defaults=True):
    """The completions of one or more prompts, or pieces of them."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: Literal["text_completion"]
    usage: CompletionUsage | UnsetType | None = UNSET


class Model(Struct):
    """A model that is served."""

    id: str
    created: int
    object: Literal["model"] = "model"
    owned_by: str = "edge-phi3"


class ModelList(Struct):
    """The models that are served: one."""

    data: list[Model]
    object: Literal["list"] = "list"


class OpenAIErrorBody(Struct):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Struct):
    """OpenAI's shape of an error."""

    error: OpenAIErrorBody
