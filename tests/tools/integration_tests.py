#!/usr/bin/env python3
"""Builds tests/it and prints the path of its program.

    python3 tests/tools/integration_tests.py cargo --release --locked

tests/it waits more than it computes, so the time to optimise it would never be saved. Only tests/it
is compiled with the optimiser at level 1; the library is compiled as the profile says. Standard
library only.
"""

import json
import subprocess
import sys

OPTIMISATION = "opt-level=1"


def main(cargo, *profile):
    command = [cargo, "rustc", *profile, "--test", "it", "--message-format", "json-render-diagnostics", "--", "-C", OPTIMISATION]
    build = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if build.returncode != 0:
        sys.exit(build.returncode)
    messages = map(json.loads, build.stdout.splitlines())
    [program] = [
        message["executable"] for message in messages
        if message["reason"] == "compiler-artifact" and message["target"]["name"] == "it" and message["executable"]
    ]
    print(program)


if __name__ == "__main__":
    main(*sys.argv[1:])
