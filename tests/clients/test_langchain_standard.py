"""`langchain-tests`: the standard tests of LangChain's chat models and embeddings, with
`langchain-openai`."""

import base64
from types import SimpleNamespace

import pytest
from conftest import EMBEDDING_MODEL
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests, chat_models

# One white point.
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTs1PAAAAABJRU5ErkJggg==")
FILES = {"png": PNG, "pdf": b"%PDF-1.4\n%%EOF\n", "wav": b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00"}


@pytest.fixture(autouse=True)
def files_from_here(monkeypatch):
    """The tests would fetch their files from the internet."""

    def get(url, **_):
        return SimpleNamespace(content=FILES[url.rpartition(".")[2]])

    monkeypatch.setattr(chat_models, "httpx", SimpleNamespace(get=get))
    monkeypatch.setenv("LANGCHAIN_TESTS_USER_AGENT", "the tests")


class TestChatOpenAI(ChatModelIntegrationTests):
    chat_model_class = ChatOpenAI
    supports_image_inputs = True
    supports_image_urls = True
    supports_image_tool_message = True
    supports_pdf_inputs = True
    supports_pdf_tool_message = True
    supports_audio_inputs = True
    supports_json_mode = True
    supports_anthropic_inputs = True
    supports_model_override = True
    model_override_value = "another"
    # Its stopwatch wants a recorded conversation.
    enable_vcr_tests = False
    supported_usage_metadata_details = {
        "invoke": ["reasoning_output", "cache_read_input"], "stream": ["reasoning_output", "cache_read_input"],
    }

    @pytest.fixture(autouse=True)
    def _target(self, target):
        self.target = target

    def chat(self, model):
        return ChatOpenAI(**self.chat_model_params | {"model": model})

    @property
    def chat_model_params(self):
        # With an address of its own, LangChain does not ask for usage unless told to.
        return {"model": "scripted", "base_url": self.target.base_url, "api_key": self.target.key, "stream_usage": True}

    def ask(self, model, stream):
        if not stream:
            return self.chat(model).invoke("What is the answer?")
        first, *rest = self.chat(model).stream("What is the answer?")
        for chunk in rest:
            first += chunk
        return first

    def invoke_with_reasoning_output(self, *, stream=False):
        return self.ask("o3", stream)

    def invoke_with_cache_read_input(self, *, stream=False):
        return self.ask("scripted", stream)


class TestOpenAIEmbeddings(EmbeddingsIntegrationTests):
    embeddings_class = OpenAIEmbeddings

    @pytest.fixture(autouse=True)
    def _target(self, target):
        self.target = target

    @property
    def embedding_model_params(self):
        # Without this setting it sends the ids of tokens, which only OpenAI's models can read.
        return {"model": EMBEDDING_MODEL, "base_url": self.target.base_url, "api_key": self.target.key, "check_embedding_ctx_length": False}
