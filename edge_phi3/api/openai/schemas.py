"""OpenAI's responses. The requests are in `edge_phi3.api.openai.fields`."""

from typing import Annotated, Literal

from msgspec import UNSET, Struct, UnsetType

from edge_phi3.api.schemas import about


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


class FunctionCall(Struct):
    """A call of a function, with its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(Struct, kw_only=True):
    """A call in an answer, or in a conversation."""

    id: str
    function: FunctionCall
    type: str = "function"


class AnswerMessage(Struct):
    """The assistant's turn."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ChatLogprobs | None = None


class PromptTokensDetails(Struct):
    """Where a prompt's tokens came from."""

    cached_tokens: int


class CompletionTokensDetails(Struct):
    """How the tokens that were drafted for an answer fared."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class CompletionUsage(Struct):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class ChatCompletion(Struct):
    """The answers to a conversation."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    object: Literal["chat.completion"] = "chat.completion"


class FunctionDelta(Struct, omit_defaults=True):
    """A piece of a call's arguments; the first has the function's name."""

    arguments: str
    name: str | UnsetType = UNSET


class CallDelta(Struct, omit_defaults=True):
    """A piece of a call."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(Struct, omit_defaults=True):
    """A piece of the assistant's turn."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChunkChoice(Struct):
    """A piece of one answer."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
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
    token_logprobs: Annotated[list[float | None], about("null for the first token of a prompt.")]
    top_logprobs: Annotated[list[dict[str, float] | None], about("Likewise.")]
    text_offset: list[int]


class CompletionChoice(Struct):
    """One completion."""

    index: int
    text: str
    finish_reason: Literal["stop", "length", "tool_calls"] | None
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
    max_model_len: Annotated[int, about("The most tokens of a prompt and its answer.")]
    object: Literal["model"] = "model"
    owned_by: str = "edge-phi3"
    parent: Annotated[str | UnsetType, about("Of an adapter: the model that it belongs to.")] = UNSET


class ModelList(Struct):
    """What is served: the model, and then its adapters."""

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
