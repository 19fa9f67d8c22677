"""Every field of a request to ``/v1`` and ``/tokenize``, once: what OpenAI's, vLLM's and llama-server's mean here.

A field that is honoured is one of a request type, with its meaning. `OTHERS` says of the rest whether they are ignored
or refused, and why. `edge_phi3.api.body.sift` goes by this table, and docs/api.md's is made from it. What is in
neither is ignored, and named in the log and in a response header.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from msgspec import Meta, Struct

from edge_phi3.api.openai.schemas import ToolCall
from edge_phi3.api.openai.tools import Tool
from edge_phi3.api.schemas import about
from edge_phi3.generation.parameters import OPENAI_PARAMETERS, PARAMETERS
from edge_phi3.generation.values import Refused

TEXT_ONLY = "this model reads and writes text only"
_BANNED = "`false` bans the token"
_BOS = "false: leave out the `<s>` that some tokenizers put in front of a text; it never stands before a conversation."

_Most = Annotated[int, Meta(ge=-1)]
_Natural = Annotated[int, Meta(ge=0)]
_Count = Annotated[int, Meta(ge=1)]
_Tokens = list[_Natural]
_SomeTokens = Annotated[_Tokens, Meta(min_length=1)]
_Positive = Annotated[float, Meta(gt=0)]
_Schema = dict[str, Any] | str | None


def _described(name: str) -> Meta:
    """Return the meaning and range of one of the parameters that this API has beside those of ``/chat``."""
    parameter = OPENAI_PARAMETERS[name]
    limits = parameter.value.kind.limits
    return about(parameter.meaning, ge=limits.get("minimum"), le=limits.get("maximum"))


def _as_parameter(name: str) -> Meta:
    """Return the meaning of a parameter of ``/chat``, which checks its range."""
    return about(PARAMETERS[name].meaning)


class StreamOptions(Struct, kw_only=True):
    """What a stream holds beside the text."""

    include_usage: Annotated[bool | None, about("End the stream with a chunk that holds the token counts.")] = None
    continuous_usage_stats: Annotated[bool | None, about("With `include_usage`: hold them in every chunk.")] = None


class JSONSchemaFormat(Struct, forbid_unknown_fields=True, kw_only=True, rename={"schema_": "schema"}):
    """A JSON schema that the answer follows."""

    name: str
    schema_: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(
    Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, rename={"schema_": "schema"}
):
    """What the answer's text is."""

    type: Annotated[str, about("text, json_object or json_schema.")]
    json_schema: JSONSchemaFormat | None = None
    schema_: Annotated[dict[str, Any] | None, about("Where responses and llama-server have a schema.")] = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ContentPart(Struct, kw_only=True):
    """A part of a message; only text is understood."""

    type: str
    text: str | None = None


class ChatCompletionMessage(Struct, kw_only=True):
    """One turn of a conversation."""

    role: Annotated[str, about("system, developer (which counts as system), user, assistant or tool.")]
    content: Annotated[str | list[ContentPart] | None, about("A text, or parts of type `text`.")] = None
    tool_calls: Annotated[list[ToolCall] | None, about("What the assistant called.")] = None
    tool_call_id: Annotated[str | None, about("The call whose result a tool's turn is.")] = None


class SamplingFields(Struct, kw_only=True):
    """What chat completions and completions share."""

    model: Annotated[
        str | None, about("The model's name or an adapter's (`--lora NAME=FILE`); where none has a name, any.", "phi-3")
    ] = None
    temperature: Annotated[float, about("0 takes the likeliest token each time.", ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1, description=PARAMETERS["top_p"].meaning)] | None = 1.0
    top_k: Annotated[_Most | None, about("Samples from the k likeliest tokens; 0 and -1: from all.")] = None
    min_p: Annotated[float | None, _as_parameter("min_p")] = None
    typical_p: Annotated[float | None, _as_parameter("typical_p")] = None
    presence_penalty: Annotated[float, _described("presence_penalty")] | None = 0.0
    frequency_penalty: Annotated[float, _described("frequency_penalty")] | None = 0.0
    repetition_penalty: Annotated[float | None, _as_parameter("repetition_penalty")] = None
    repeat_penalty: Annotated[_Positive | None, about("`repetition_penalty` of the last `repeat_last_n`.")] = None
    repeat_last_n: Annotated[_Most | None, about("What `repeat_penalty` looks back on: 64 tokens; -1: all.")] = None
    length_penalty: Annotated[float | None, _as_parameter("length_penalty")] = None
    logit_bias: Annotated[
        dict[str, float | bool] | list[tuple[int | str, float | bool]] | None,
        about(f"Added to logits: token ids -> -100 to 100, or pairs of a token id or text and a number; {_BANNED}."),
    ] = None
    allowed_token_ids: Annotated[_SomeTokens | None, about("The only tokens that may be generated.")] = None
    bad_words: Annotated[list[str] | None, about("Texts that are not generated, as the tokens that spell them.")] = None
    n: Annotated[int, about("How many answers.", ge=1, le=128)] | None = 1
    seed: Annotated[int | None, about(PARAMETERS["seed"].meaning)] = None
    stop: Annotated[str | list[str] | None, about("A text, or up to 64, before which the answer ends.")] = None
    stop_token_ids: Annotated[_Tokens | None, about("Tokens that end the answer, beside the model's own.")] = None
    include_stop_str_in_output: Annotated[bool | None, about("Whether the text ends with what stopped it.")] = False
    ignore_eos: Annotated[bool | None, about("Go on past the model's own end tokens.")] = False
    min_tokens: Annotated[_Natural | None, about("The fewest tokens before an end token, though not a `stop`.")] = None
    max_completion_tokens: Annotated[
        _Most | None, about("Tokens at most; -1, or too many: what the context leaves.")
    ] = None
    max_tokens: Annotated[
        _Most | None, about("An older name of `max_completion_tokens`; 0 where `echo` and `logprobs` score a prompt.")
    ] = None
    n_predict: Annotated[_Most | None, about("llama-server's name of `max_tokens`, and stronger.")] = None
    truncate_prompt_tokens: Annotated[
        _Most | None,
        about("Keep so many tokens of the prompt at most; -1: what leaves room for the answer."),
    ] = None
    truncation_side: Annotated[str | None, about("`left` (the default) or `right`: where the prompt is cut.")] = None
    skip_special_tokens: Annotated[bool | None, about("Whether the text leaves special tokens out.")] = True
    cache_prompt: Annotated[bool | None, about("false: compute the prompt without the prefix cache.")] = True
    response_format: Annotated[ResponseFormat | None, about("Holds the answer to JSON, or to a JSON schema.")] = None
    structured_outputs: Annotated[
        dict[str, Any] | None,
        about("vLLM's: one of `json` (a schema), `regex`, `choice` (a list of texts), `grammar` and `json_object`."),
    ] = None
    guided_json: Annotated[_Schema, about("Holds the answer to a JSON schema.")] = None
    json_schema: Annotated[_Schema, about("Likewise.")] = None
    guided_regex: Annotated[str | None, about("The regular expression that the whole answer matches.")] = None
    guided_choice: Annotated[list[str] | None, about("The texts one of which the answer is.")] = None
    guided_grammar: Annotated[str | None, about("A grammar of the answer, in Lark or GBNF.")] = None
    grammar: Annotated[str | None, about("Likewise.")] = None
    stream: Annotated[bool | None, about("Answer with server-sent events.")] = False
    stream_options: StreamOptions | None = None
    generate_kwargs: Annotated[
        dict[str, Any] | None, about("Parameters of `/chat`, which win over those beside them, such as `num_beams`.")
    ] = None


class ToolFields(SamplingFields, kw_only=True):
    """What may be called, in chat completions and responses."""

    tool_choice: Annotated[
        str | dict[str, Any] | None,
        about("`none`, `auto` (the default), `required`, a function, or `allowed_tools` with a mode and functions."),
    ] = None
    parallel_tool_calls: Annotated[bool | None, about("Whether an answer may hold several calls.")] = True


class ChatCompletionRequest(ToolFields, kw_only=True):
    """A conversation to be continued by the assistant."""

    messages: Annotated[list[ChatCompletionMessage], Meta(min_length=1, description="The conversation.")]
    tools: Annotated[list[Tool], Meta(max_length=128, description="Functions that the model may call.")] | None = None
    logprobs: Annotated[bool | None, about("Return each token's log-probability.")] = False
    top_logprobs: Annotated[int, _described("top_logprobs")] | None = None
    add_generation_prompt: Annotated[
        bool | None, about("Whether the assistant's turn is begun; true unless a message is continued.")
    ] = None
    continue_final_message: Annotated[
        bool | None, about("Whether the last message is continued; by default where it is the assistant's.")
    ] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, about("What the chat template finds by name.")] = None


class CompletionRequest(SamplingFields, kw_only=True):
    """One or more prompts to be continued."""

    prompt: Annotated[str | list[str | int | list[int]] | None, about("A text, token ids, or a list of either.")] = None
    echo: Annotated[
        bool | None,
        about("Whether the answer begins with the prompt, and with `logprobs` their tokens with those of the prompt."),
    ] = False
    logprobs: Annotated[int, about("How many likeliest tokens to return.", ge=0, le=20)] | None = None
    best_of: Annotated[_Count | None, about("Of so many, the `n` likeliest per token are returned; no stream.")] = None
    add_special_tokens: Annotated[bool | None, about(_BOS)] = True


class TokenizeRequest(Struct, kw_only=True):
    """A text, or a conversation, to be split into tokens. Give one of the first four fields."""

    text: Annotated[str | None, about("The text.", "<|user|>\nHello<|end|>")] = None
    prompt: Annotated[str | None, about("The text, as vLLM calls it.")] = None
    content: Annotated[str | None, about("The text, as llama-server calls it.")] = None
    messages: (
        Annotated[
            list[ChatCompletionMessage],
            Meta(min_length=1, description="A conversation, of which the model's chat template makes the text."),
        ]
        | None
    ) = None
    parse_special_tokens: Annotated[
        bool | None, about("Whether `<|user|>` and the like are tokens, as in prompts, or plain text.")
    ] = True
    parse_special: Annotated[bool | None, about("llama-server's name of `parse_special_tokens`.")] = True
    add_generation_prompt: Annotated[bool | None, about("Whether the assistant's turn is begun; true.")] = None
    continue_final_message: Annotated[bool | None, about("Whether the last message is continued.")] = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, about("What the chat template finds by name.")] = None
    model: Annotated[str | None, about("Any name.")] = None
    add_special_tokens: Annotated[bool | None, about(_BOS)] = True
    add_special: Annotated[bool | None, about("llama-server's name of `add_special_tokens`.")] = True
    return_token_strs: Annotated[bool | None, about("vLLM: return the tokens' texts as `token_strs`.")] = False
    with_pieces: Annotated[bool | None, about("llama-server: return tokens with their texts.")] = False


# -- what is not honoured


@dataclass(frozen=True, slots=True)
class Ignored:
    """A field that does not change the answer; `named` where its sender may expect something all the same."""

    reason: str
    named: bool = False


_NOTHING: Final[tuple[object, ...]] = (False, "", [], {})
_ZERO: Final = (0, 0.0)


def _refused(reason: str, names: str = "", **harmless: tuple[object, ...]) -> Iterator[tuple[str, Refused]]:
    """Yield fields that are refused, but for null, what is empty, and values that ask for nothing."""
    yield from ((name, Refused(reason, _NOTHING + harmless.get(name, ()))) for name in (*names.split(), *harmless))


def _ignored(reason: str, names: str, *, named: bool = False) -> Iterator[tuple[str, Ignored]]:
    yield from ((name, Ignored(reason, named)) for name in names.split())


_IDENTIFIES = "it identifies or traces"
_SPEED = "it is about caches, queues or speed, and changes no answer"
_REASONING = "this model does not reason apart from its answer"

OTHERS: Final[Mapping[str, Ignored | Refused]] = dict(
    (
        *_ignored(_IDENTIFIES, "user metadata safety_identifier request_id session_id chat_id id trace_id"),
        *_ignored(
            _SPEED,
            "prompt_cache_key prompt_cache_options prompt_cache_retention cache_control service_tier prediction id_slot"
            " n_cache_reuse backend_sampling sse_ping_interval guided_decoding_backend speculative.n_max"
            " speculative.n_min speculative.p_min speculative.type speculative.ngram_min_hits speculative.ngram_size_m"
            " speculative.ngram_size_n",
        ),
        *_ignored("nothing is dropped from a context", "n_keep n_discard"),
        *_ignored("special tokens have no spaces between them", "spaces_between_special_tokens"),
        *_ignored("a conversation has those of its template", "add_special_tokens"),
        *_ignored("a completion calls no tools", "parallel_tool_calls"),
        *_ignored("calls of tools are always parsed", "parse_tool_calls"),
        *_ignored(
            "it is llama-server's own, which takes it from its chat template",
            "chat_format chat_parser generation_prompt grammar_lazy grammar_triggers preserved_tokens"
            " message_delimiters reasoning_budget_start_tag reasoning_budget_end_tags",
        ),
        *_ignored(
            "it belongs to a sampler or field that is refused",
            "dynatemp_exponent dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers xtc_threshold"
            " mirostat_tau mirostat_eta adaptive_decay post_sampling_probs",
        ),
        *_ignored(
            _REASONING,
            "reasoning_effort reasoning_format include_reasoning thinking_token_budget thinking_budget_tokens"
            " reasoning_budget_tokens reasoning_budget_message reasoning_control reasoning",
            named=True,
        ),
        *_ignored("requests are served in their order", "priority", named=True),
        *_ignored(
            "an answer does not hold it", "timings_per_token return_progress verbose return_token_offsets", named=True
        ),
        *_ignored(
            "a prompt has no chat template",
            "add_generation_prompt continue_final_message chat_template_kwargs",
            named=True,
        ),
        *_refused("use `tools` and `tool_choice`", "functions", function_call=("none", "auto")),
        *_refused(TEXT_ONLY, "audio image image_data media_io_kwargs mm_processor_kwargs", modalities=(["text"],)),
        *_refused("a prompt is text or token ids", "prompt_embeds"),
        *_refused(
            "nothing is stored",
            "store previous_response_id conversation background background_options context_management",
        ),
        *_refused("nothing is left out of a conversation", truncation=("disabled",)),
        *_refused("it is a field of completions, and there are no stored prompts", "prompt"),
        *_ignored("the service runs no tools itself", "max_tool_calls"),
        *_refused("nothing is moderated", "moderation"),
        *_refused("this service does not search the web", "web_search_options"),
        *_refused("ask for a short or long answer in the conversation", verbosity=("medium",)),
        *_refused("this model continues a text and does not fill gaps", "suffix input_prefix input_suffix input_extra"),
        *_refused("use `structured_outputs`", "grammar_type guided_json_object guided_whitespace_pattern"),
        *_refused("put `num_beams` into `generate_kwargs`", "use_beam_search"),
        *_refused("use `echo` with `logprobs`", "prompt_logprobs"),
        *_refused("it is a field of completions", "echo", best_of=(1,)),
        *_refused("it is a field of chat completions", "tools", tool_choice=("none", "auto"), top_logprobs=(0,)),
        *_refused(
            "`/chat` returns token ids with `return_dict_in_generate`",
            "return_token_ids return_tokens return_tokens_as_token_ids",
        ),
        *_refused(
            "an answer has the fields of OpenAI's API",
            "response_fields return_prompt_text return_assistant_tokens_mask",
        ),
        *_refused("use `logprobs`", n_probs=_ZERO),
        *_refused("use `n`", n_cmpl=(1,)),
        *_refused("put `max_time` into `generate_kwargs`", t_max_predict_ms=(*_ZERO, -1), t_max_prompt_ms=(*_ZERO, -1)),
        *_refused(
            "the samplers are those of transformers",
            "samplers repetition_detection",
            **dict.fromkeys(("mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range"), _ZERO),
            **dict.fromkeys(("min_keep", "n_indent"), _ZERO),
            **dict.fromkeys(("top_n_sigma", "adaptive_target"), (-1, -1.0)),
        ),
        *_refused("choose an adapter by `model`", "lora"),
        *_refused("the model's own chat template is used", "chat_template"),
        *_refused("put them into the conversation", "documents"),
        *_refused("requests share one prefix cache; `cache_prompt` false does without", "cache_salt"),
        *_refused("one process serves the model", "kv_transfer_params ec_transfer_params"),
        *_refused("there are no extensions", "vllm_xargs access_programs"),
    )
)
"""The fields of a body that its type does not have."""

NESTED: Final[Mapping[type[Struct], Mapping[str, Ignored | Refused]]] = {
    ChatCompletionMessage: dict(
        (
            *_refused("use `tool_calls`", "function_call"),
            *_refused(TEXT_ONLY, "audio"),
            *_ignored(_IDENTIFIES, "id name"),
            *_ignored(_SPEED, "cache_control"),
            *_ignored("the chat template has no place for it", "refusal annotations"),
            *_ignored(_REASONING, "reasoning reasoning_content"),
        )
    ),
    ContentPart: dict(_ignored(_SPEED, "cache_control prompt_cache_breakpoint")),
    StreamOptions: dict(_ignored("nothing is padded", "include_obfuscation")),
}
"""Likewise of what is inside a body."""
