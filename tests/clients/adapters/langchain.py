"""LangChain's `ChatOpenAI`."""

import json

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from adapters import CHUNKS_BEFORE_LEAVING, told


@tool
def get_weather(place: str) -> str:
    """The weather at a place."""
    return "It rains."


class Client:
    def __init__(self, target):
        self.target = target

    def chat(self, model, **options):
        # With an address of its own, it asks for usage only if told to.
        settings = {"base_url": self.target.base_url, "api_key": self.target.key, "max_retries": 0, "stream_usage": True}
        return ChatOpenAI(model=model, **settings | options)

    def failure(self, kind, model, text, **options):
        try:
            self.chat(model, **options).invoke(text)
        except kind as error:
            return told(error)

    def stream(self, text):
        first, *rest = self.chat("scripted").stream(text)
        chunks = 1 + len(rest)
        for chunk in rest:
            first += chunk
        usage = {"prompt_tokens": first.usage_metadata["input_tokens"], "completion_tokens": first.usage_metadata["output_tokens"]}
        return {"text": first.content, "chunks": chunks, "usage": usage}

    def tools(self, text):
        chat = self.chat("scripted").bind_tools([get_weather])
        asked = HumanMessage(text)
        answer = chat.invoke([asked])
        results = [ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"]) for call in answer.tool_calls]
        calls = [{"name": call["name"], "arguments": json.dumps(call["args"])} for call in answer.tool_calls]
        return {"calls": calls, "finish_reason": answer.response_metadata["finish_reason"], "text": chat.invoke([asked, answer, *results]).content}

    def error(self, text):
        return self.failure(openai.BadRequestError, "error-400", text)

    def key(self, text):
        return self.failure(openai.AuthenticationError, "scripted", text, api_key="ps_wrong")

    def limit(self, text):
        return self.failure(openai.RateLimitError, "error-429", text)

    def retry(self, text):
        return {"text": self.chat("once-429", max_retries=1).invoke(text).content}

    def cancel(self, text):
        stream = self.chat("paced-20x100").stream(text)
        for chunks, _ in enumerate(stream, 1):
            if chunks == CHUNKS_BEFORE_LEAVING:
                stream.close()
                return {"chunks": chunks}
