"""Clients on Node: the programs of tests/clients/node."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import node_tools

PROGRAMS = Path(__file__).resolve().parents[1] / "node"


class Program:
    """Runs one program; each case prints what it returns as JSON."""

    name = None

    def __init__(self, target):
        home = node_tools.packages(PROGRAMS)
        # A program finds only packages beside it.
        self.path = shutil.copy(PROGRAMS / self.name, home)
        self.environment = {**os.environ, "V1_BASE_URL": target.base_url, "V1_KEY": target.key}

    def __getattr__(self, case):
        def run(text):
            command = [str(node_tools.EXECUTABLE), self.path, case, text]
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr[-4000:]
            return json.loads(done.stdout)

        return run


class OpenAI(Program):
    name = "openai.mjs"


class AiSdk(Program):
    name = "ai_sdk.mjs"
