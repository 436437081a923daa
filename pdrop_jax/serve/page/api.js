// Requests to the server, in OpenAI's form.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function checked(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refused(response.status, body?.error?.message ?? response.statusText);
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

export async function health() {
  return (await (await fetch("health")).json()).status;
}

// The model: {name, layers, defaultBudget, budgets: [{name, shares}]}, from the most image tokens to the fewest.
export async function about(key) {
  const { data } = await (await checked(await fetch("v1/models", { headers: headers(key) }))).json();
  const { id, pdrop } = data[0];
  const budgets = Object.entries(pdrop.budgets).map(([name, { layers, ratios }]) => {
    const shares = Array.from({ length: pdrop.num_layers }, (_, n) => ratios[layers.filter((l) => l <= n).length - 1] ?? 1);
    return { name, shares, share: shares.reduce((a, b) => a + b) / shares.length };
  });
  budgets.sort((a, b) => b.share - a.share);
  return { name: id, layers: pdrop.num_layers, defaultBudget: pdrop.default, budgets };
}

// Yields {text} for each new piece of the answer, and {details} at its end.
export async function* ask({ picture, question, budget, key, signal }) {
  const content = [{ type: "image_url", image_url: { url: picture } }, { type: "text", text: question }];
  const response = await checked(
    await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...headers(key) },
      body: JSON.stringify({
        messages: [{ role: "user", content }],
        stream: true,
        temperature: 0,
        pdrop: budget,
        pdrop_details: true,
      }),
      signal,
    }),
  );
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(500, chunk.error.message);
    const text = chunk.choices[0]?.delta.content;
    if (text) yield { text };
    if (chunk.pdrop) yield { details: chunk.pdrop };
  }
  throw new TypeError("the stream ended early");
}

// The data of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}
