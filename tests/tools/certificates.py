#!/usr/bin/env python3
"""Makes the certificates of a TLS test with openssl, which is fetched if it is not installed.

    python3 tests/tools/certificates.py FOLDER

There are two authorities, `authority.pem` and `other.pem`. The first has signed `server.pem`, which
is valid for `localhost` only. `own.pem`, for the same name, is self-signed and marked as an
authority, as openssl does. `unnamed.pem` is self-signed too and has only a common name. Each has
its key beside it, as `….key`.
"""

import subprocess
import sys
from pathlib import Path

import debian_tools

NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc")


def make(folder):
    openssl = debian_tools.path("openssl")

    def run(*arguments):
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True)

    def self_signed(name, subject, *extensions):
        added = [part for extension in extensions for part in ("-addext", extension)]
        run("req", "-x509", *NEW_KEY, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2", "-subj", f"/CN={subject}", *added)

    self_signed("authority", "Test authority")
    self_signed("other", "Other test authority")
    self_signed("own", "localhost", "subjectAltName=DNS:localhost")
    self_signed("unnamed", "localhost")
    run("req", *NEW_KEY, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    (folder / "extensions").write_text("subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n")
    run(
        "x509", "-req", "-in", "server.csr", "-CA", "authority.pem", "-CAkey", "authority.key", "-CAcreateserial", "-days", "2",
        "-extfile", "extensions", "-out", "server.pem",
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]))
