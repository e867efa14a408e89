"""The tests inside the source package of OpenAI's Python library: each function of chat completions,
of embeddings and of models, strict and loose, synchronous and not."""

import os
import re
import subprocess
import sys

import openai_tests
from conftest import EMBEDDING_MODEL
from openai_shim import Shim

FILES = ("tests/api_resources/chat", "tests/api_resources/test_embeddings.py", "tests/api_resources/test_models.py")
# `delete` of models deletes a fine-tuned model, of which there are none.
NOT_OURS = "test_models and delete and not path_params"
# Without a wish for an encoding, the library asks for base64. Its strict mode refuses what it asked
# for, because it compares the answer with its types before it decodes it.
STRICT_BASE64 = "test_embeddings and (strict or aiohttp) and not all_params"


def run_tests(shim, keywords):
    """Runs the selected tests; returns how many passed. None may fail or be skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--tb=short", "-p", "no:cacheprovider", "-k", keywords, *FILES]
    environment = {**os.environ, "TEST_API_BASE_URL": shim.url}
    run = subprocess.run(command, cwd=openai_tests.folder(), env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    summary = run.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"\d+ passed(?:, \d+ deselected)? in .*", summary), summary
    return int(summary.split()[0])


def test_every_function_of_chat_completions_embeddings_and_models(target):
    with Shim(target.base_url, target.key, EMBEDDING_MODEL) as shim:
        assert run_tests(shim, f"not ({NOT_OURS}) and not ({STRICT_BASE64})") == 196
        # Not answered by the library itself.
        assert len(shim.passed) > 150


def test_strict_embeddings_as_numbers(target):
    with Shim(target.base_url, target.key, EMBEDDING_MODEL, as_numbers=True) as shim:
        assert run_tests(shim, STRICT_BASE64) == 9
