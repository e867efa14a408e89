"""LlamaIndex's `OpenAILike`."""

import gc
import json

import openai
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from adapters import CHUNKS_BEFORE_LEAVING, told


def get_weather(place: str) -> str:
    """The weather at a place."""
    return "It rains."


def user(text):
    return ChatMessage(role=MessageRole.USER, content=text)


class Client:
    def __init__(self, target):
        self.target = target

    def chat(self, model, **options):
        settings = {"api_base": self.target.base_url, "api_key": self.target.key, "max_retries": 0, "is_chat_model": True, "is_function_calling_model": True}
        return OpenAILike(model=model, **settings | options)

    def failure(self, kind, model, text, **options):
        try:
            self.chat(model, **options).chat([user(text)])
        except kind as error:
            return told(error)

    def stream(self, text):
        options = {"additional_kwargs": {"stream_options": {"include_usage": True}}}
        pieces = list(self.chat("scripted", **options).stream_chat([user(text)]))
        return {"text": pieces[-1].message.content, "chunks": len(pieces), "usage": pieces[-1].raw.usage.to_dict()}

    def tools(self, text):
        chat, tool = self.chat("scripted"), FunctionTool.from_defaults(get_weather)
        answer = chat.chat_with_tools([tool], user_msg=text)
        [call] = chat.get_tool_calls_from_response(answer)
        result = ChatMessage(role=MessageRole.TOOL, content=get_weather(**call.tool_kwargs), additional_kwargs={"tool_call_id": call.tool_id})
        last = chat.chat_with_tools([tool], chat_history=[user(text), answer.message, result])
        calls = [{"name": call.tool_name, "arguments": json.dumps(call.tool_kwargs)}]
        return {"calls": calls, "finish_reason": answer.raw.choices[0].finish_reason, "text": last.message.content}

    def error(self, text):
        return self.failure(openai.BadRequestError, "error-400", text)

    def key(self, text):
        return self.failure(openai.AuthenticationError, "scripted", text, api_key="ps_wrong")

    def limit(self, text):
        return self.failure(openai.RateLimitError, "error-429", text)

    def retry(self, text):
        return {"text": self.chat("once-429", max_retries=1).chat([user(text)]).message.content}

    def cancel(self, text):
        stream = self.chat("paced-20x100").stream_chat([user(text)])
        for chunks, _ in enumerate(stream, 1):
            if chunks == CHUNKS_BEFORE_LEAVING:
                stream.close()
                # It closes its own generator, but leaves OpenAI's to the collector.
                gc.collect()
                return {"chunks": chunks}
