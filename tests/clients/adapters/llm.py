"""The command `llm`, with its file of extra models."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from adapters import CHUNKS_BEFORE_LEAVING

MODELS = ("scripted", "error-400", "error-429", "once-429", "paced-20", "paced-20x100")
FUNCTION = 'def get_weather(place: str) -> str:\n    return "It rains."\n'


class Client:
    def __init__(self, target):
        self.folder = tempfile.TemporaryDirectory()
        self.key_of_target = target.key
        models = [
            {"model_id": name, "model_name": name, "api_base": target.base_url, "api_key_name": "service", "supports_tools": True} for name in MODELS
        ]
        # JSON is YAML.
        Path(self.folder.name, "extra-openai-models.yaml").write_text(json.dumps(models))

    def command(self, model, text, *options, key=None):
        return [sys.executable, "-m", "llm", "prompt", "-m", model, "--key", key or self.key_of_target, *options, text]

    def options(self):
        return {"env": {**os.environ, "LLM_USER_PATH": self.folder.name}, "stdin": subprocess.DEVNULL}

    def run(self, *arguments, **named):
        return subprocess.run(self.command(*arguments, **named), capture_output=True, text=True, timeout=60, **self.options())

    def failure(self, *arguments, **named):
        """The error as the command prints it: a status and a message."""
        run = self.run(*arguments, **named)
        assert run.returncode == 1, run
        status, message = re.search(r"Error code: (\d+) - (.*)", run.stderr).groups()
        return {"status": int(status), "message": message}

    def stream(self, text):
        chunks = []
        process = subprocess.Popen(self.command("paced-20", text, "--usage"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **self.options())
        while piece := os.read(process.stdout.fileno(), 4096):
            chunks.append(piece)
        found = re.search(r"Token usage: ([\d,]+) input, ([\d,]+) output", process.stderr.read().decode())
        assert process.wait(60) == 0
        usage = dict(zip(("prompt_tokens", "completion_tokens"), (int(number.replace(",", "")) for number in found.groups())))
        return {"text": b"".join(chunks).decode(), "chunks": len(chunks), "usage": usage}

    def tools(self, text):
        run = self.run("scripted", text, "--functions", FUNCTION, "--tools-debug")
        assert run.returncode == 0, run
        found = re.findall(r"Tool call: (\w+)\((.*)\)", run.stderr)
        calls = [{"name": name, "arguments": arguments.replace("'", '"')} for name, arguments in found]
        return {"calls": calls, "finish_reason": "tool_calls", "text": run.stdout}

    def error(self, text):
        return self.failure("error-400", text)

    def key(self, text):
        return self.failure("scripted", text, key="ps_wrong")

    def limit(self, text):
        return self.failure("error-429", text)

    def retry(self, text):
        return {"text": self.run("once-429", text).stdout}

    def cancel(self, text):
        process = subprocess.Popen(self.command("paced-20x100", text), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **self.options())
        for chunks in range(CHUNKS_BEFORE_LEAVING):
            assert os.read(process.stdout.fileno(), 4096)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        return {"chunks": CHUNKS_BEFORE_LEAVING}
