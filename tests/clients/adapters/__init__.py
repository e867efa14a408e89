"""One adapter for each client: a class whose methods run the cases of test_matrix.py.

    stream(text)     -> {"text", "chunks", "usage"}: a streamed answer with its usage
    tools(text)      -> {"calls", "finish_reason", "text"}: the tool `get_weather` is called, its
                        result is sent back, and the answer to that is a text
    error(text)      -> {"status", "code", "type"}, or {"status", "message"} where the client shows
                        no more: the model `error-400`
    key(text)        -> the same: a key that the service does not know
    limit(text)      -> the same: the model `error-429`, without another try
    retry(text)      -> {"text"}: the model `once-429`, with another try
    cancel(text)     -> {"chunks"}: a long stream that the client leaves after some chunks
"""

import importlib

# Each client with the module and the class of its adapter.
CLIENTS = {
    "openai-python": ("openai_python", "Client"),
    "openai-python-async": ("openai_python", "AsyncClient"),
    "openai-node": ("node", "OpenAI"),
    "ai-sdk": ("node", "AiSdk"),
    "langchain": ("langchain", "Client"),
    "llama-index": ("llama_index", "Client"),
    "llm": ("llm", "Client"),
}
# After this many chunks a client leaves the stream.
CHUNKS_BEFORE_LEAVING = 4


def adapter(name, target):
    module, kind = CLIENTS[name]
    return getattr(importlib.import_module(f"adapters.{module}"), kind)(target)


def told(error):
    """What an error of OpenAI's Python library says; other libraries raise it too."""
    return {"status": error.status_code, "code": error.code, "type": error.type, "request_id": error.request_id}
