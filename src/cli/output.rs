//! Standard output, and whether its reader has closed it.

use std::io::{self, ErrorKind, Stdout, Write};

/// Standard output. Remembers whether its reader has closed it, as `head` does: that is no failure
/// and needs no message.
#[derive(Debug)]
pub struct Output {
    stdout: Stdout,
    reader_left: bool,
}

impl Default for Output {
    fn default() -> Self {
        Self {
            stdout: io::stdout(),
            reader_left: false,
        }
    }
}

impl Output {
    /// Whether a write has failed because the reader has closed the pipe.
    pub fn reader_left(&self) -> bool {
        self.reader_left
    }

    fn noted<T>(&mut self, written: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &written {
            self.reader_left |= error.kind() == ErrorKind::BrokenPipe;
        }
        written
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.stdout.write(bytes);
        self.noted(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.stdout.flush();
        self.noted(flushed)
    }
}
