"""What requests and responses look like: one msgspec type each, which the OpenAPI document is made from."""

from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from edge_phi3.pipeline import ModelCard


def about(description: str, *examples: Any, ge: float | None = None, le: float | None = None) -> Meta:
    """Return what a field means, with examples and limits."""
    return Meta(description=description, examples=list(examples) or None, ge=ge, le=le)


class Message(Struct, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Annotated[str, about("Who speaks: system, user or assistant.", "user")]
    content: Annotated[str, about("What is said.", "How to explain Internet for a medieval knight?")]


class ChatRequest(Struct, kw_only=True):
    """A prompt or a conversation, and how to go on from it. Give `prompt` or `messages`."""

    prompt: Annotated[
        str | None,
        about(
            "The text that the model continues.",
            "<|user|>\nHow to explain Internet for a medieval knight?<|end|>\n<|assistant|>\n",
        ),
    ] = None
    messages: Annotated[
        list[Message] | None, about("A conversation, instead of `prompt`; the model's chat template makes the prompt.")
    ] = None
    return_full_text: Annotated[
        bool | None, about("true: prompt and answer; false: the answer alone. null: true.", False)
    ] = True
    clean_up_tokenization_spaces: Annotated[
        bool | None, about("Remove spaces before punctuation and within contractions. null: false.")
    ] = False
    prefix: Annotated[str | None, about("A text put before the prompt.")] = None
    handle_long_generation: Annotated[
        str | None,
        about("`hole`: keep the end of a prompt that leaves no room for the new tokens. null: keep all.", "hole"),
    ] = None
    adapters: Annotated[
        str | list[str] | None, about("The name of an adapter (`--lora NAME=FILE`) to answer with, or a list of one.")
    ] = None
    generate_kwargs: Annotated[
        dict[str, Any] | None, about("The parameters of generation.", {"do_sample": False, "max_new_tokens": 64})
    ] = None
    stream: Annotated[
        bool | None,
        about("Answer with server-sent events: pieces of text as they come, then the plain response.", True),
    ] = False


class TokenScore(Struct):
    """How one token was chosen."""

    token_id: int
    score: Annotated[float | None, about("The processed score; in beam modes the beam's. null: infinite.")]
    logprob: Annotated[
        float | None, about("Its logarithm of softmax; in beam modes the transition score. null: infinite.")
    ]


class Usage(Struct):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: Annotated[int, about("Over all returned sequences.")]


class ChatResponse(Struct):
    """The answer. Everything but `Result` is there when `return_dict_in_generate` is true."""

    Result: Annotated[str, about("The text; of several returned sequences, their texts joined in order.")]
    sequences: Annotated[
        list[list[int]] | UnsetType, about("Token ids of each returned sequence, prompt included.")
    ] = UNSET
    sequences_scores: Annotated[
        Sequence[float | None] | UnsetType | None, about("The final score of each beam; null outside beam modes.")
    ] = UNSET
    scores: Annotated[
        list[list[TokenScore]] | UnsetType | None,
        about("For each sequence, each generated token; null unless `output_scores` is true."),
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


class VersionResponse(Struct):
    """What runs here."""

    version: Annotated[str, about("edge-phi3's own version.")]
    llama_cpp: Annotated[str, about("The version of llama-cpp-python.")]
    model: Annotated[ModelCard | None, about("null while it loads.")]


class TokenPiece(Struct):
    """A token and its text, or its bytes where they are a part of a character."""

    id: int
    piece: str | list[int]


class TokenizeResponse(Struct):
    """Token ids."""

    tokens: Annotated[Sequence[int | TokenPiece], about("Token ids; with `with_pieces`, with their texts.")]
    count: int
    max_model_len: Annotated[int, about("The most tokens of a prompt and its answer.")]
    token_strs: list[str] | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """Tokens to be turned into text."""

    tokens: list[Annotated[int, Meta(ge=0)]]
    skip_special_tokens: Annotated[bool | None, about("Leave out special tokens.")] = False
    model: Annotated[str | None, about("Any name.")] = None


class DetokenizeResponse(Struct):
    """The text of tokens, under the names of edge-phi3, vLLM and llama-server."""

    text: str
    prompt: str
    content: str


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
