// What is known about an answer once it has ended: how many tokens, how fast, and why it ended.

const REASONS = {
  stop: "complete",
  stop_string: "met a stop string",
  time: "out of time (max_time)",
  length: "cut at the length limit",
};

/**
 * Measure an answer.
 * @param {object} result the plain response
 * @param {object} kwargs the request's `generate_kwargs`
 * @param {number[]} endTokens what ends a sequence unless the request says otherwise
 * @param {{first: number|null, total: number}} times milliseconds from sending; first is null where no piece came
 * @param {number} together how many pieces came at once as the first
 */
export function factsOf(result, kwargs, endTokens, times, together) {
  const facts = { ...times, tokens: null, prompt: null, rate: null, reasons: [] };
  if (!result.usage) return facts;
  facts.prompt = result.usage.prompt_tokens;
  facts.tokens = result.usage.completion_tokens;
  // What came first has no time before it to be measured by. Where nothing came after it, all tokens and all time count.
  const later = times.first === null ? 0 : facts.tokens - Math.max(together, result.sequences.length);
  const [steps, span] = later > 0 ? [later, times.total - times.first] : [facts.tokens, times.total];
  if (steps > 0 && span > 0) facts.rate = (steps * 1000) / span;
  const reasons = result.sequences.map((tokens) => reasonOf(tokens.slice(facts.prompt), result.Result, kwargs, endTokens, facts.prompt));
  facts.reasons = [...new Set(reasons)];
  return facts;
}

function reasonOf(tokens, text, kwargs, endTokens, prompt) {
  const ends = kwargs.eos_token_id === undefined || kwargs.eos_token_id === null ? endTokens : [kwargs.eos_token_id].flat();
  if (ends.includes(tokens.at(-1))) return "stop";
  const strings = [kwargs.stop_strings ?? []].flat();
  if (strings.some((string) => text.includes(string))) return "stop_string";
  const limit = kwargs.max_new_tokens ?? (kwargs.max_length ? kwargs.max_length - prompt : Infinity);
  return kwargs.max_time !== undefined && kwargs.max_time !== null && tokens.length < limit ? "time" : "length";
}

/** Say it in a few words each. */
export function wordsOf(facts) {
  const words = [];
  if (facts.tokens !== null) words.push(["tokens", `${facts.tokens} ${facts.tokens === 1 ? "token" : "tokens"}`]);
  if (facts.rate !== null) words.push(["rate", `${shortNumber(facts.rate)} tokens/s`]);
  if (facts.first !== null) words.push(["first", `first after ${duration(facts.first)}`]);
  words.push(["total", `${duration(facts.total)} in all`]);
  for (const reason of facts.reasons) words.push(["reason", REASONS[reason]]);
  return words;
}

function shortNumber(value) {
  return value.toFixed(value < 10 ? 1 : 0);
}

function duration(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
}
