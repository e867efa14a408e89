// The AI SDK with its provider for servers like OpenAI's: runs the case that the first argument names
// and prints what came of it as JSON. The tests give address, key, and the text of the question.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";

const [name, text] = process.argv.slice(2);
const provider = (apiKey) => createOpenAICompatible({ name: "service", baseURL: process.env.V1_BASE_URL, apiKey, includeUsage: true });
const chatModel = (model) => provider(process.env.V1_KEY).chatModel(model);

async function failure(call) {
  try {
    await call();
  } catch (error) {
    const body = error.responseBody ? JSON.parse(error.responseBody).error : {};
    return { kind: error.constructor.name, status: error.statusCode, code: body.code, type: body.type, message: error.message };
  }
  return { kind: "none" };
}

const ask = (model, options = {}) => generateText({ model: chatModel(model), prompt: text, maxRetries: 0, ...options });

const cases = {
  async stream() {
    const result = streamText({ model: chatModel("scripted"), prompt: text, maxRetries: 0 });
    let answer = "";
    let chunks = 0;
    for await (const piece of result.textStream) {
      chunks += 1;
      answer += piece;
    }
    const usage = await result.usage;
    return { text: answer, chunks, usage: { prompt_tokens: usage.inputTokens, completion_tokens: usage.outputTokens } };
  },
  async tools() {
    const calls = [];
    const get_weather = tool({
      inputSchema: z.object({ place: z.string() }),
      execute: async (input) => {
        calls.push({ name: "get_weather", arguments: JSON.stringify(input) });
        return "It rains.";
      },
    });
    const result = streamText({ model: chatModel("scripted"), prompt: text, tools: { get_weather }, stopWhen: isStepCount(2), maxRetries: 0 });
    const steps = await result.steps;
    return { calls, finish_reason: steps[0].finishReason.replace("-", "_"), text: await result.text };
  },
  error: () => failure(() => ask("error-400")),
  key: () => failure(() => generateText({ model: provider("ps_wrong").chatModel("scripted"), prompt: text, maxRetries: 0 })),
  limit: () => failure(() => ask("error-429")),
  async retry() {
    return { text: (await ask("once-429", { maxRetries: 1 })).text };
  },
  async cancel() {
    const abort = new AbortController();
    const result = streamText({ model: chatModel("paced-20x100"), prompt: text, abortSignal: abort.signal, maxRetries: 0, onAbort() {} });
    let chunks = 0;
    for await (const _ of result.textStream) {
      chunks += 1;
      if (chunks === 4) abort.abort();
    }
    return { chunks };
  },
};

console.log(JSON.stringify(await cases[name]()));
