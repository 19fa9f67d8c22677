// A request to POST /chat, or with a schema or tools to OpenAI's route: its body as the very text that is sent and shown, and the curl command for it.

/** The conversation as the service takes it: answered questions, and the new one. */
export function messagesOf(system, exchanges, question) {
  const messages = system.trim() ? [{ role: "system", content: system.trim() }] : [];
  for (const { user, answers } of exchanges) {
    if (!answers[0]) continue;
    messages.push({ role: "user", content: user }, { role: "assistant", content: answers[0] });
  }
  messages.push({ role: "user", content: question });
  return messages;
}

/**
 * Write the body. Values of parameters are JSON source, so that a 64-bit seed keeps all its digits.
 * @param {object[]} messages
 * @param {Record<string, string>} parameters
 * @param {{schema: string, tools: string}} wanted JSON source, or nothing
 */
export function bodyOf(messages, parameters, wanted) {
  const turns = messages.map((message) => `    ${JSON.stringify(message)}`).join(",\n");
  const names = Object.entries(parameters).map(([name, source]) => `    ${JSON.stringify(name)}: ${source}`);
  const kwargs = names.length ? `{\n${names.join(",\n")}\n  }` : "{}";
  const { schema, tools } = { schema: wanted.schema.trim(), tools: wanted.tools.trim() };
  const more = [];
  if (schema) more.push(`"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": ${schema}}}`);
  if (tools) more.push(`"tools": ${tools}`);
  // What /chat takes by default, and counts by itself.
  if (more.length) more.push('"top_k": 10', '"stream_options": {"include_usage": true}');
  const fields = more.map((field) => `  ${field},\n`).join("");
  return `{\n  "messages": [\n${turns}\n  ],\n  "generate_kwargs": ${kwargs},\n${fields}  "stream": true\n}`;
}

/** The route that takes a body. */
export function routeOf(wanted) {
  return wanted.schema.trim() || wanted.tools.trim() ? "v1/chat/completions" : "chat";
}

/** Quote a text for a POSIX shell. */
export function shellQuote(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** Write the curl command that sends `body` to `route`; a key stays a variable of the shell. */
export function curlOf(route, body, needsKey) {
  const url = new URL(route, document.baseURI).href;
  const lines = [`curl -N ${shellQuote(url)}`, "-H 'Content-Type: application/json'"];
  if (needsKey) lines.push('-H "Authorization: Bearer $EDGE_PHI3_KEY"');
  lines.push(`-d ${shellQuote(body)}`);
  return lines.join(" \\\n  ");
}
