// POST /chat, or OpenAI's route, as server-sent events, read from fetch: EventSource can only GET.

/** A request that the service refused or could not finish; the message is a sentence for people. */
export class ServiceError extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

/**
 * Send a body and follow the answer. Calls of tools become code blocks that have the tool's name.
 * @param {string} route
 * @param {string} body JSON
 * @param {{key: string, signal: AbortSignal, onPiece: (index: number, text: string, chunk: number) => void}} options
 * @returns {Promise<object>} the plain response of /chat, or of OpenAI's route usage and finish reasons
 * @throws {ServiceError} with the service's own sentence
 * @throws {DOMException} named AbortError, when `signal` was aborted
 */
export async function chat(route, body, { key, signal, onPiece }) {
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
  if (key) headers.Authorization = `Bearer ${key}`;
  try {
    const response = await fetch(route, { method: "POST", headers, body, signal });
    if (!response.ok) throw new ServiceError(await detailOf(response), response.status);
    const told = new Told();
    for await (const { name, data, chunk } of eventsOf(response.body)) {
      if (data === "[DONE]") return told.result();
      const content = JSON.parse(data);
      if (name === "result") return content;
      if (name === "error" || content.error) throw new ServiceError(content.detail ?? content.error.message);
      if (content.choices) {
        for (const [index, text] of told.take(content)) onPiece(index, text, chunk);
        continue;
      }
      onPiece(content.index, content.text, chunk);
    }
  } catch (error) {
    if (error instanceof ServiceError || error.name === "AbortError") throw error;
    throw new ServiceError("The service cannot be reached, or the connection broke. Is it still running?");
  }
  throw new ServiceError("The connection ended before the answer was complete.");
}

/** What OpenAI's route has told so far. */
class Told {
  constructor() {
    this.usage = null;
    this.reasons = [];
    this.calls = [];
  }

  /** Take a chunk, and return its texts with the indices of their answers. */
  take({ choices, usage }) {
    this.usage = usage ?? this.usage;
    const texts = [];
    for (const { index, delta, finish_reason: reason } of choices) {
      let text = delta.content ?? "";
      for (const call of delta.tool_calls ?? []) {
        if (call.function.name) {
          text += `${this.calls[index] ? "\n```" : ""}\n\`\`\`${call.function.name}\n`;
          this.calls[index] = true;
        }
        text += call.function.arguments;
      }
      if (reason) {
        this.reasons[index] = reason;
        if (this.calls[index]) text += "\n```";
      }
      if (text) texts.push([index, text]);
    }
    return texts;
  }

  result() {
    return { usage: this.usage, reasons: this.reasons };
  }
}

async function detailOf(response) {
  try {
    const content = await response.json();
    const detail = content.detail ?? content.error?.message;
    if (typeof detail === "string") return detail;
  } catch {
    // Not the service's own answer, but that of something between.
  }
  return `The service answered with status ${response.status}.`;
}

/** Split a stream of bytes into server-sent events, each with the number of the chunk that brought its end. */
export async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let name = "";
  let data = [];
  for (let chunk = 0; ; chunk++) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
      if (line === "") {
        if (data.length) yield { name, data: data.join("\n"), chunk };
        name = "";
        data = [];
      }
      const [, field, content] = /^([^:]*):? ?(.*)$/s.exec(line);
      if (field === "event") name = content;
      else if (field === "data") data.push(content);
    }
  }
}
