"""A file system of a few MiB for the data of a service, which tests can fill. Standard library
only."""

import os
import subprocess
from pathlib import Path

from running_service import Service


class Unavailable(Exception):
    """This system does not allow its users to mount file systems."""


class SmallDisk:
    """An empty folder that is a separate file system for the services started on it.

    Only they see it, in a namespace, which every user can create if the kernel allows user
    namespaces. It lasts until `close`, so that a service can be killed and started again.
    """

    def __init__(self, folder, size="8m"):
        script = f'mount -t tmpfs -o size={size},mode=0700 none "$0" && echo mounted && exec cat'
        # It ends with its standard input, and so with the tests.
        self.holder = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        self.folder = folder
        if self.holder.stdout.readline() != b"mounted\n":
            self.close()
            raise Unavailable
        # The same folder, as seen by processes outside.
        self.outside = Path(f"/proc/{self.holder.pid}/root{folder}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def service(self, **settings):
        """A service whose data are on the disk, not yet started."""
        enter = ("nsenter", f"--target={self.holder.pid}", "--user", "--mount", "--preserve-credentials")
        return Service(data_dir=self.folder, command=enter, **settings)

    def fill(self):
        """Fills the file system with another program's file."""
        try:
            with open(self.outside / "ballast", "ab", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass

    def make_room(self):
        """Removes that file."""
        os.unlink(self.outside / "ballast")

    def close(self):
        """Ends the file system."""
        self.holder.stdin.close()
        self.holder.stdout.close()
        self.holder.wait()
