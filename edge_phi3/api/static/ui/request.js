// A request to POST /chat: its body as the very text that is sent and shown, and the curl command for it.

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
 */
export function bodyOf(messages, parameters) {
  const turns = messages.map((message) => `    ${JSON.stringify(message)}`).join(",\n");
  const names = Object.entries(parameters).map(([name, source]) => `    ${JSON.stringify(name)}: ${source}`);
  const kwargs = names.length ? `{\n${names.join(",\n")}\n  }` : "{}";
  return `{\n  "messages": [\n${turns}\n  ],\n  "generate_kwargs": ${kwargs},\n  "stream": true\n}`;
}

/** Quote a text for a POSIX shell. */
export function shellQuote(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

/** Write the curl command that sends `body`; a key stays a variable of the shell. */
export function curlOf(body, needsKey) {
  const url = new URL("chat", document.baseURI).href;
  const lines = [`curl -N ${shellQuote(url)}`, "-H 'Content-Type: application/json'"];
  if (needsKey) lines.push('-H "Authorization: Bearer $EDGE_PHI3_KEY"');
  lines.push(`-d ${shellQuote(body)}`);
  return lines.join(" \\\n  ");
}
