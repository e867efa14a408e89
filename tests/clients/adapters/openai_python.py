"""OpenAI's library for Python."""

import asyncio

import openai

from adapters import CHUNKS_BEFORE_LEAVING, told

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def user(text):
    return [{"role": "user", "content": text}]


class Client:
    def __init__(self, target):
        self.client = openai.OpenAI(base_url=target.base_url, api_key=target.key, max_retries=0)

    def ask(self, model, text, client=None, **members):
        return (client or self.client).chat.completions.create(model=model, messages=user(text), **members)

    def failure(self, kind, *arguments, **members):
        try:
            self.ask(*arguments, **members)
        except kind as error:
            return told(error)

    def stream(self, text):
        chunks = list(self.ask("scripted", text, stream=True, stream_options={"include_usage": True}))
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        return {"text": answer, "chunks": len(chunks), "usage": chunks[-1].usage.to_dict()}

    def tools(self, text):
        with self.client.chat.completions.stream(model="scripted", messages=user(text), tools=[TOOL]) as stream:
            [choice] = stream.get_final_completion().choices
        [call] = choice.message.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
        messages = [*user(text), choice.message.to_dict(), result]
        last = self.client.chat.completions.create(model="scripted", messages=messages, tools=[TOOL])
        calls = [{"name": call.function.name, "arguments": call.function.arguments}]
        return {"calls": calls, "finish_reason": choice.finish_reason, "text": last.choices[0].message.content}

    def error(self, text):
        return self.failure(openai.BadRequestError, "error-400", text)

    def key(self, text):
        return self.failure(openai.AuthenticationError, "scripted", text, client=self.client.with_options(api_key="ps_wrong"))

    def limit(self, text):
        return self.failure(openai.RateLimitError, "error-429", text)

    def retry(self, text):
        answer = self.ask("once-429", text, client=self.client.with_options(max_retries=1))
        return {"text": answer.choices[0].message.content}

    def cancel(self, text):
        with self.ask("paced-20x100", text, stream=True) as stream:
            for chunks, _ in enumerate(stream, 1):
                if chunks == CHUNKS_BEFORE_LEAVING:
                    return {"chunks": chunks}


class AsyncClient:
    """The same library with its asynchronous client. `cancel` cancels a task."""

    def __init__(self, target):
        self.target = target

    def run(self, use, **options):
        """Runs `use` with a client of its own, because a connection belongs to one loop."""

        async def with_client():
            settings = {"base_url": self.target.base_url, "api_key": self.target.key, "max_retries": 0, **options}
            async with openai.AsyncOpenAI(**settings) as client:
                return await use(client.chat.completions)

        return asyncio.run(with_client())

    def failure(self, kind, model, text, **options):
        try:
            self.run(lambda chat: chat.create(model=model, messages=user(text)), **options)
        except kind as error:
            return told(error)

    def stream(self, text):
        async def use(chat):
            stream = await chat.create(model="scripted", messages=user(text), stream=True, stream_options={"include_usage": True})
            return [chunk async for chunk in stream]

        chunks = self.run(use)
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        return {"text": answer, "chunks": len(chunks), "usage": chunks[-1].usage.to_dict()}

    def tools(self, text):
        async def use(chat):
            first = await chat.create(model="scripted", messages=user(text), tools=[TOOL], parallel_tool_calls=False)
            [call] = first.choices[0].message.tool_calls
            result = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
            messages = [*user(text), first.choices[0].message.to_dict(), result]
            last = await chat.create(model="scripted", messages=messages, tools=[TOOL])
            calls = [{"name": call.function.name, "arguments": call.function.arguments}]
            return {"calls": calls, "finish_reason": first.choices[0].finish_reason, "text": last.choices[0].message.content}

        return self.run(use)

    def error(self, text):
        return self.failure(openai.BadRequestError, "error-400", text)

    def key(self, text):
        return self.failure(openai.AuthenticationError, "scripted", text, api_key="ps_wrong")

    def limit(self, text):
        return self.failure(openai.RateLimitError, "error-429", text)

    def retry(self, text):
        answer = self.run(lambda chat: chat.create(model="once-429", messages=user(text)), max_retries=1)
        return {"text": answer.choices[0].message.content}

    def cancel(self, text):
        async def use(chat):
            reached = asyncio.Event()
            seen = []

            async def read():
                async for chunk in await chat.create(model="paced-20x100", messages=user(text), stream=True):
                    seen.append(chunk)
                    if len(seen) == CHUNKS_BEFORE_LEAVING:
                        reached.set()

            task = asyncio.create_task(read())
            await reached.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return {"chunks": len(seen)}

        return self.run(use)
