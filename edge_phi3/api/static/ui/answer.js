// What is known about an answer once it has ended: how many tokens, how fast, and why it ended.

const REASONS = {
  stop: "complete",
  stop_string: "met a stop string",
  time: "out of time (max_time)",
  length: "cut at the length limit",
  tool_calls: "calls a tool",
};

/** Milliseconds: in less, what is measured is how the browser was told of the text, not how the model wrote it. */
const TELLING_SPAN = 250;

/**
 * Measure an answer. The rate is that of the tokens after the first, or of the whole request where those came within a
 * moment or all at once, as in beam search.
 * @param {object} result the plain response, or usage and finish reasons
 * @param {object} kwargs the request's `generate_kwargs`
 * @param {number[]} endTokens what ends a sequence unless the request says otherwise
 * @param {{first: number|null, total: number}} times milliseconds from sending; first is null where no piece came
 * @param {number} together how many pieces came at once as the first
 */
export function factsOf(result, kwargs, endTokens, times, together) {
  const facts = { ...times, tokens: null, prompt: null, rate: null, decoding: false, reasons: [] };
  if (!result.usage) return facts;
  facts.prompt = result.usage.prompt_tokens;
  facts.tokens = result.usage.completion_tokens;
  const count = (result.reasons ?? result.sequences).length;
  const later = facts.tokens - Math.max(together, count);
  const span = times.total - times.first;
  facts.decoding = times.first !== null && later > 0 && span >= TELLING_SPAN;
  facts.rate = (1000 * (facts.decoding ? later : facts.tokens)) / (facts.decoding ? span : times.total);
  const reasons =
    result.reasons ??
    result.sequences.map((tokens) => reasonOf(tokens, facts.prompt, result.Result, kwargs, endTokens));
  facts.reasons = [...new Set(reasons)];
  return facts;
}

// The response does not say why a sequence ended; it holds what that follows from.
function reasonOf(tokens, prompt, text, kwargs, endTokens) {
  const ends = [kwargs.eos_token_id ?? endTokens].flat();
  if (ends.includes(tokens.at(-1))) return "stop";
  const strings = [kwargs.stop_strings ?? []].flat();
  if (strings.some((string) => text.includes(string))) return "stop_string";
  const limit = kwargs.max_new_tokens ?? (kwargs.max_length ? kwargs.max_length - prompt : Infinity);
  return (kwargs.max_time ?? null) !== null && tokens.length - prompt < limit ? "time" : "length";
}

/** Say it in a few words each: what kind of fact, the words, and what they mean where that is not plain. */
export function wordsOf(facts) {
  const words = [];
  if (facts.tokens !== null) words.push(["tokens", `${facts.tokens} ${facts.tokens === 1 ? "token" : "tokens"}`]);
  if (facts.rate !== null) {
    const what = facts.decoding ? "After the first token" : "Over the whole request";
    words.push(["rate", `${facts.rate.toFixed(facts.rate < 10 ? 1 : 0)} tokens/s`, what]);
  }
  if (facts.first !== null) words.push(["first", `first after ${duration(facts.first)}`]);
  words.push(["total", `${duration(facts.total)} in all`]);
  for (const reason of facts.reasons) words.push(["reason", REASONS[reason]]);
  return words;
}

function duration(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
}
