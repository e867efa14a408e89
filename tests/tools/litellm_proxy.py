"""LiteLLM's proxy as a process, for tests and benchmarks. Standard library only."""

import json
import os
import shutil
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from running_service import wait_until
from started import Started

MASTER_KEY = "sk-litellm-master"
# Seconds. The proxy loads many modules.
START_DEADLINE = 180


class LiteLlm(Started):
    """A proxy with these models, of the environment whose interpreter is `python`.

        with LiteLlm(python, [{"model_name": "*", "litellm_params": {…}}]) as proxy:
            … proxy.url, MASTER_KEY
    """

    def __init__(self, python, models, workers=1):
        self.folder = Path(tempfile.mkdtemp(prefix="litellm-"))
        config = {
            "model_list": models,
            "general_settings": {"master_key": MASTER_KEY},
            "litellm_settings": {"num_retries": 0, "telemetry": False},
        }
        # JSON is YAML.
        (self.folder / "config.yaml").write_text(json.dumps(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--num_workers", str(workers)]
        self.command = [python, "-c", "from litellm import run_server; run_server()", "--config", "config.yaml", *address]
        self.process = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(self.command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(self.is_live, START_DEADLINE, "the proxy answers", interval=0.2)
        return self

    def log(self):
        return (self.folder / "log").read_text(errors="replace")

    def is_live(self):
        assert self.process.poll() is None, self.log()[-4000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health/liveliness", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def close(self):
        if self.process:
            self.process.terminate()
            self.process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)
