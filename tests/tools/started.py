"""Objects that start at the beginning of a `with` block, and close at its end."""


class Started:
    """Has `start`, which returns the object for the block, and `close`, which may be called at any
    point of a start."""

    def __enter__(self):
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_):
        self.close()
