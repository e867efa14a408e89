// OpenAI's library for Node: runs the case that the first argument names and prints what came of it
// as JSON. The tests give address, key, and the text of the question.
import OpenAI from "openai";

const [name, text] = process.argv.slice(2);
const messages = [{ role: "user", content: text }];
const client = new OpenAI({ baseURL: process.env.V1_BASE_URL, apiKey: process.env.V1_KEY, maxRetries: 0 });
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      parameters: { type: "object", properties: { place: { type: "string" } }, required: ["place"] },
    },
  },
];

async function failure(call) {
  try {
    await call();
  } catch (error) {
    const { status, code, type, message } = error;
    return { kind: error.constructor.name, status, code, type, message, request_id: error.requestID };
  }
  return { kind: "none" };
}

const cases = {
  async stream() {
    const stream = await client.chat.completions.create({
      model: "scripted", messages, stream: true, stream_options: { include_usage: true },
    });
    let text = "";
    let chunks = 0;
    let usage = null;
    for await (const chunk of stream) {
      chunks += 1;
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    return { text, chunks, usage };
  },
  async tools() {
    const stream = client.chat.completions.stream({ model: "scripted", messages, tools });
    const { choices: [{ message, finish_reason }] } = await stream.finalChatCompletion();
    const [call] = message.tool_calls;
    const { choices: [last] } = await client.chat.completions.create({
      model: "scripted", tools,
      messages: [...messages, message, { role: "tool", tool_call_id: call.id, content: "It rains." }],
    });
    return { calls: [call.function], finish_reason, text: last.message.content };
  },
  error: () => failure(() => client.chat.completions.create({ model: "error-400", messages })),
  key: () => failure(() => client.withOptions({ apiKey: "ps_wrong" }).chat.completions.create({ model: "scripted", messages })),
  limit: () => failure(() => client.chat.completions.create({ model: "error-429", messages })),
  async retry() {
    const answer = await client.withOptions({ maxRetries: 1 }).chat.completions.create({ model: "once-429", messages });
    return { text: answer.choices[0].message.content };
  },
  async cancel() {
    const stream = await client.chat.completions.create({ model: "paced-20x100", messages, stream: true });
    let chunks = 0;
    for await (const _ of stream) {
      chunks += 1;
      if (chunks === 4) {
        stream.controller.abort();
        break;
      }
    }
    return { chunks };
  },
};

console.log(JSON.stringify(await cases[name]()));
