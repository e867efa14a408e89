"""What is started on entering a `with` block, and closed on leaving it."""


class Started:
    """Has `start`, which returns what the block works with, and `close`, which may come at any point of a start."""

    def __enter__(self):
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_):
        self.close()
