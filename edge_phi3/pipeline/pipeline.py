"""The way of a request from text to text.

A request's prompt becomes tokens (prefix, chat template, truncation), the engine continues them, and the tokens become
the text that the original service answers with.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from itertools import repeat
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.added_tokens import SHIELD
from edge_phi3.engine.constraint import ConstraintVocabulary
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.errors import ContextLengthError
from edge_phi3.engine.grammars import CALL_TOKENS, Grammar
from edge_phi3.engine.json_schema import DEFAULT_LIMITS, SchemaLimits
from edge_phi3.engine.sequence import Event, FinishedEvent, GenerationRequest, TokensEvent
from edge_phi3.engine.token_offsets import TokenOffsets, placed, placed_prompt
from edge_phi3.engine.tokenizer import Tokenizer, clean_up_tokenization
from edge_phi3.generation.config import GenerationConfig
from edge_phi3.generation.decoding import GenerationResult
from edge_phi3.generation.stopping import StopTexts
from edge_phi3.pipeline.answer import GenerationOutput, ModelCard, TextDelta, TextStream
from edge_phi3.pipeline.chat_template import ChatTemplate
from edge_phi3.pipeline.prompt import PreparedPrompt, PromptError, cut_hole, make_room_for_prefix
from edge_phi3.pipeline.tool_calls import BARE_MARKS


class TextGenerationPipeline:
    """Turns requests into answers, on a loaded engine.

    With `encode_user_tokens_as_text`, what a conversation says is text even where it spells a token of the template.
    `call_tokens` are those that stand around a list of calls, or None.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        encode_user_tokens_as_text: bool = False,
        schema_limits: SchemaLimits = DEFAULT_LIMITS,
    ) -> None:
        self.engine = engine
        self.schema_limits = schema_limits
        self._encode_user_tokens_as_text = encode_user_tokens_as_text
        loaded = engine.model
        self.tokenizer: Tokenizer = loaded.tokenizer
        self._defaults = loaded.defaults
        model = loaded.model
        self.model = ModelCard(
            name=model.path.stem,
            description=model.description,
            file=model.path.name,
            parameters=model.parameters,
            size=model.size,
            context_length=model.context_length,
            vocab_size=model.vocab_size,
        )
        template = model.chat_template or self.tokenizer.family.chat_template
        begin, end = map(self.tokenizer.special_token, CALL_TOKENS)
        self.call_tokens = None if begin is None or end is None else (begin, end)
        marks = CALL_TOKENS if self.call_tokens else BARE_MARKS
        self._template = ChatTemplate(template, self.tokenizer.special_tokens, marks)
        self.foreign_template = self._template.foreign
        self._constraints = ConstraintVocabulary(self.tokenizer, schema_limits)

    @property
    def names(self) -> list[str]:
        """What requests may choose: the model by its name, and each adapter that has one."""
        return [self.model.name, *self.engine.settings.adapters]

    # -- text to tokens

    def prepare(
        self,
        *,
        prompt: str | Sequence[int] | None = None,
        messages: Sequence[Mapping[str, str]] | None = None,
        generate_kwargs: Mapping[str, object] = MappingProxyType({}),
        prefix: str | None = None,
        return_full_text: bool = True,
        clean_up_tokenization_spaces: bool = False,
        handle_long_generation: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Mapping[str, Any]] = (),
        add_special_tokens: bool = True,
        truncate: tuple[int, str] | None = None,
        whole_runs: bool = True,
        skip_special_tokens: bool = True,
        show_stop_tokens: bool = True,
        stop: Sequence[str] = (),
        adapter: int = 0,
    ) -> PreparedPrompt:
        """Check a request and turn its prompt into tokens.

        Args:
            prompt: the text to continue, or its tokens, which stay as they are. With `return_full_text` the answer
                begins with it (the prefix left out).
            messages: a conversation, instead of a prompt; the answer is the assistant's new text alone.
            generate_kwargs: the generation parameters as the client gave them.
            prefix: text put before the prompt; its tokens are added to ``max_length`` and ``min_length``.
            return_full_text: whether the answer begins with the prompt.
            clean_up_tokenization_spaces: whether spaces before punctuation are removed from the answer.
            handle_long_generation: None, or "hole": cut the prompt on its left so that the answer fits the
                model's context.
            add_generation_prompt: see `ChatTemplate.render`; the next two, too.
            continue_final_message: see there.
            chat_template_kwargs: see there.
            tools: see there.
            add_special_tokens: whether a text gets the <s> that the tokenizer puts in front.
            truncate: how many tokens of the prompt are kept at most, and whether it is cut on its "left" or "right".
            whole_runs: whether a run of byte tokens that is no UTF-8 is lost as a whole, as in transformers, rather
                than what is no character of it.
            skip_special_tokens: whether the answer's text leaves special tokens out.
            show_stop_tokens: whether a token that ends the answer is part of its text, unless it is special.
            stop: texts, none of them empty, that end an answer when they have been generated.
            adapter: the place of what answers in `names`.

        Raises:
            ContextLengthError: the prompt is as long as the context, or longer.
            PromptError: no prompt, an unknown role, or no room for an answer.
            ParameterError: a generation parameter is wrong.
        """
        if handle_long_generation not in {None, "hole"}:
            raise PromptError(f"handle_long_generation must be null or 'hole', not {handle_long_generation[:40]!r}.")
        longest = self.engine.max_length
        below = longest if truncate is None and handle_long_generation is None else sys.maxsize
        spelt = functools.partial(self.tokenizer.decode, skip_special_tokens=False, whole_runs=whole_runs)
        if messages:
            if prompt:
                raise PromptError("Give prompt or messages, not both.")
            lead = ""
            prompt_ids = self.encode_conversation(
                messages,
                chat_template_kwargs,
                prefix=prefix or "",
                below=below,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        elif isinstance(prompt, str) and prompt:
            lead = prompt if return_full_text else ""
            prompt_ids = self.tokenizer.encode((prefix or "") + prompt, add_bos=add_special_tokens, below=below)
        elif prompt:
            prompt_ids = np.array(prompt, dtype=np.int32)
            lead = spelt(prompt) if return_full_text and len(prompt) < below else ""
        else:
            raise PromptError("Text generation parameter prompt required")
        if truncate is not None and len(prompt_ids) > truncate[0]:
            prompt_ids = prompt_ids[: truncate[0]] if truncate[1] == "right" else prompt_ids[-truncate[0] :]
            lead = lead and spelt(prompt_ids.tolist())
        kwargs = dict(generate_kwargs)
        if prefix:
            make_room_for_prefix(kwargs, len(self.tokenizer.encode(prefix)))
        config = GenerationConfig.resolve(kwargs, self._defaults)
        if handle_long_generation == "hole":
            prompt_ids = cut_hole(prompt_ids, config, longest)
        if len(prompt_ids) >= longest:
            raise ContextLengthError(
                f"The prompt has {len(prompt_ids)} tokens, but this model's maximum context length is {longest} tokens;"
                " shorten the prompt."
            )
        config.total_length(len(prompt_ids))  # raises when the prompt leaves no room for an answer
        decoded = self.tokenizer.decode_prompt(
            prompt_ids,
            skip_special_tokens=skip_special_tokens,
            whole_runs=whole_runs,
            hidden=() if show_stop_tokens else config.eos_token_id,
        )
        stop_texts = None
        if stop:
            stop_texts = StopTexts(stop, self.tokenizer.shown_bytes[skip_special_tokens], len(prompt_ids))
        clean_up = clean_up_tokenization_spaces
        return PreparedPrompt(prompt_ids, decoded, config, lead, clean_up, stop_texts=stop_texts, adapter=adapter)

    def encode_conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        kwargs: Mapping[str, Any],
        *,
        prefix: str = "",
        parse_special: bool = True,
        below: int = sys.maxsize,
        tools: Sequence[Mapping[str, Any]] = (),
        **wanted: bool | None,
    ) -> NDArray[np.int32]:
        """Return the tokens of what the chat template makes of a conversation; only the template may put <s> there.

        `wanted` are further arguments of `ChatTemplate.render`, which raises `PromptError`.
        """
        try:
            if self._encode_user_tokens_as_text:
                messages, kwargs, tools = self.tokenizer.shield([messages, kwargs, tools])
            text = self._template.render(messages, kwargs=kwargs, tools=tools, **wanted)
        except RecursionError:
            raise PromptError("`chat_template_kwargs` is nested too deeply.") from None
        except PromptError as error:
            raise PromptError(str(error).replace(SHIELD, "")) from error
        text = prefix + text
        return self.tokenizer.encode(text, parse_special=parse_special, add_bos=False, below=below)

    # -- tokens to text

    async def generate(
        self, prepared: PreparedPrompt, *, timeout: float | None = None, request_id: str = ""
    ) -> GenerationOutput:
        """Run a prepared request to its end; `EngineError` when the engine refuses or fails it."""
        async for event in self._events(prepared, timeout, request_id):
            if isinstance(event, FinishedEvent):
                return self._output(prepared, event)
        raise AssertionError("the engine ends every request with an event")

    async def stream(
        self,
        prepared: PreparedPrompt,
        *,
        timeout: float | None = None,
        request_id: str = "",
        generated: Callable[[int], object] = lambda _: None,
    ) -> AsyncGenerator[Sequence[TextDelta | GenerationOutput], None]:
        """Run a prepared request, giving text as it becomes certain, and at last the whole answer.

        What becomes known at the same moment comes together, so that it can be sent together. `generated` is called
        with the numbers of tokens that have come, before what has become known by them.

        Closing the iterator early cancels the request. Beam modes give the whole answer only.
        """
        count = prepared.config.num_return_sequences
        streams = [TextStream(prepared) for _ in range(count)]
        placers: list[TokenOffsets] = []
        if prepared.config.top_logprobs is not None:
            placers = [TokenOffsets(self.tokenizer, prepared.text) for _ in range(count)]
        async with contextlib.aclosing(self._events(prepared, timeout, request_id, stream=True)) as events:
            async for event in events:
                deltas: list[TextDelta | GenerationOutput] = []
                if isinstance(event, FinishedEvent):
                    output = self._output(prepared, event)
                    for index, text in enumerate(output.texts):
                        rest = "" if prepared.config.num_beams > 1 else text[len(prepared.lead) + streams[index].sent :]
                        if rest:
                            deltas.append(TextDelta(index, rest))
                    deltas.append(output)
                elif isinstance(event, TokensEvent):
                    generated(len(event.tokens))
                    for (index, token), logprobs in zip(event.tokens, event.logprobs or repeat(None), strict=False):
                        found = placers[index].push(logprobs) if logprobs else None
                        if (text := streams[index].push([token])) or found:
                            deltas.append(TextDelta(index, text, [found] if found else []))
                if deltas:
                    yield deltas

    def _events(
        self, prepared: PreparedPrompt, timeout: float | None, request_id: str, *, stream: bool = False
    ) -> AsyncGenerator[Event, None]:
        request = GenerationRequest(
            prepared.prompt_ids,
            prepared.config,
            stream=stream,
            timeout=timeout,
            request_id=request_id,
            constraint=prepared.constraint,
            stop_texts=prepared.stop_texts,
            scored_prompt=prepared.scored,
            adapter=prepared.adapter,
        )
        return self.engine.generate(request)

    def _output(self, prepared: PreparedPrompt, event: FinishedEvent) -> GenerationOutput:
        result, generated = event.result, event.generated_tokens
        if prepared.only_scored:
            count, generated = len(result.sequences), 0
            result = GenerationResult(
                result.prompt_length, [prepared.prompt_ids] * count, ["length"] * count, logprobs=[[]] * count
            )
        scored, prompt_logprobs = prepared.scored is not None, None
        if scored:
            prompt_logprobs = placed_prompt(self.tokenizer, prepared.prompt_ids, event.prompt_logprobs)
        logprobs = [placed(self.tokenizer, prepared.text, each, every=scored) for each in result.logprobs or ()]
        texts = [prepared.lead + self._answer(prepared, sequence) for sequence in result.sequences]
        return GenerationOutput(
            text="".join(texts),
            texts=texts,
            finish_reasons=list(result.finish_reasons),
            sequences=[sequence.tolist() for sequence in result.sequences],
            sequences_scores=result.sequences_scores,
            scores=result.scores,
            prompt_tokens=len(prepared.prompt_ids),
            completion_tokens=generated,
            cached_tokens=event.cached_tokens,
            drafted_tokens=event.drafted_tokens,
            accepted_tokens=event.accepted_tokens,
            timing=event.timing,
            logprobs=None if result.logprobs is None else logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _answer(self, prepared: PreparedPrompt, sequence: NDArray[np.int32]) -> str:
        """Decode what was generated as transformers does: the whole, less as many characters as the prompt's."""
        decoder, prompt = prepared.text.decoder.copy(), prepared.text.whole
        whole = prepared.text.certain + decoder.push(sequence[len(prepared.prompt_ids) :].tolist()) + decoder.finish()
        if prepared.clean_up:
            whole, prompt = clean_up_tokenization(whole), clean_up_tokenization(prompt)
        return whole[len(prompt) :]

    def constrain(self, prepared: PreparedPrompt, grammar: Grammar) -> PreparedPrompt:
        """Hold a prepared request to a grammar; `SchemaError` when that cannot be, or ends nowhere."""
        constraint = self._constraints.constrain(grammar, prepared.config.eos_token_id)
        return dataclasses.replace(prepared, constraint=constraint)
