"""What requests and responses look like: one msgspec type each, which the OpenAPI document is made from."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

JSONObject = dict[str, Any]


class Message(Struct, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Annotated[str, Meta(description="Who speaks: system, user or assistant.", examples=["user"])]
    content: Annotated[
        str, Meta(description="What is said.", examples=["How to explain Internet for a medieval knight?"])
    ]


class ChatRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """A prompt or a conversation, and how to go on from it. Give `prompt` or `messages`."""

    prompt: Annotated[
        str | None,
        Meta(
            description="The text that the model continues.",
            examples=["<|user|>\nHow to explain Internet for a medieval knight?<|end|>\n<|assistant|>\n"],
        ),
    ] = None
    messages: Annotated[
        list[Message] | None,
        Meta(description="A conversation, instead of `prompt`; the model's chat template makes the prompt."),
    ] = None
    return_full_text: Annotated[
        bool | None,
        Meta(description="true: prompt and answer; false: the answer alone. null: true.", examples=[False]),
    ] = True
    clean_up_tokenization_spaces: Annotated[
        bool | None,
        Meta(description="Remove spaces before punctuation and within contractions. null: false."),
    ] = False
    prefix: Annotated[str | None, Meta(description="A text put before the prompt.")] = None
    handle_long_generation: Annotated[
        str | None,
        Meta(
            description="`hole`: keep the end of a prompt that leaves no room for the new tokens. null: keep all.",
            examples=["hole"],
        ),
    ] = None
    generate_kwargs: Annotated[
        JSONObject | None,
        Meta(description="The parameters of generation.", examples=[{"do_sample": False, "max_new_tokens": 64}]),
    ] = None
    stream: Annotated[
        bool,
        Meta(
            description="Answer with server-sent events: pieces of text as they come, then the plain response.",
            examples=[True],
        ),
    ] = False


class TokenScore(Struct):
    """How one token was chosen."""

    token_id: int
    score: Annotated[float | None, Meta(description="The processed score; in beam modes the beam's. null: infinite.")]
    logprob: Annotated[
        float | None,
        Meta(description="Its logarithm of softmax; in beam modes the transition score. null: infinite."),
    ]


class Usage(Struct):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: Annotated[int, Meta(description="Over all returned sequences.")]


class ChatResponse(Struct):
    """The answer. Everything but `Result` is there when `return_dict_in_generate` is true."""

    Result: Annotated[str, Meta(description="The text; of several returned sequences, their texts joined in order.")]
    sequences: Annotated[
        list[list[int]] | UnsetType, Meta(description="Token ids of each returned sequence, prompt included.")
    ] = UNSET
    sequences_scores: Annotated[
        list[float | None] | UnsetType | None,
        Meta(description="The final score of each beam; null outside beam modes."),
    ] = UNSET
    scores: Annotated[
        list[list[TokenScore]] | UnsetType | None,
        Meta(description="For each sequence, each generated token; null unless `output_scores` is true."),
    ] = UNSET
    usage: Usage | UnsetType = UNSET


class ErrorResponse(Struct):
    """What was wrong, what is allowed, and which field."""

    detail: str


class RunningResponse(Struct):
    """The service is there."""

    message: str


class HealthResponse(Struct):
    """The service is well."""

    status: str


class ModelInfo(Struct):
    """The model that answers."""

    name: str
    description: Annotated[str, Meta(examples=["phi3 3B Q4_K - Medium"])]
    file: str
    parameters: int
    size: Annotated[int, Meta(description="Bytes of all its tensors.")]
    context_length: Annotated[int, Meta(description="Tokens that it was trained for.")]
    vocab_size: int


class VersionResponse(Struct):
    """What runs here."""

    version: Annotated[str, Meta(description="edge-phi3's own version.")]
    llama_cpp: Annotated[str, Meta(description="The version of llama-cpp-python.")]
    model: Annotated[ModelInfo | None, Meta(description="null while it loads.")]


class TokenizeRequest(Struct, forbid_unknown_fields=True):
    """A text to be split into tokens."""

    text: Annotated[str, Meta(examples=["<|user|>\nHello<|end|>"])]
    parse_special_tokens: Annotated[
        bool, Meta(description="Whether `<|user|>` and the like are tokens, as in prompts, or plain text.")
    ] = True


class TokenizeResponse(Struct):
    """Token ids."""

    tokens: list[int]


class DetokenizeRequest(Struct, forbid_unknown_fields=True):
    """Tokens to be turned into text."""

    tokens: list[Annotated[int, Meta(ge=0)]]
    skip_special_tokens: Annotated[bool, Meta(description="Leave out special tokens.")] = False


class DetokenizeResponse(Struct):
    """The text of tokens."""

    text: str


class MemoryInfo(Struct):
    """Memory, as "1.00 GB"."""

    used: str
    total: str


class GPUInfo(Struct):
    """One GPU."""

    id: str
    name: str
    load: Annotated[str, Meta(examples=["25.00%"])]
    temperature: Annotated[str, Meta(examples=["55 C"])]
    memory: MemoryInfo


class CPUInfo(Struct):
    """The CPUs of a machine without a GPU."""

    load_percentage: float
    physical_cores: int
    total_cores: int
    memory: MemoryInfo


class MetricsResponse(Struct):
    """The machine: its GPUs, or its CPUs when it has none; the other one is null."""

    gpu_info: list[GPUInfo] | None = None
    cpu_info: CPUInfo | None = None
