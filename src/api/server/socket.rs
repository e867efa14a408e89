//! A connection's socket, which records its traffic.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::activity::Activity;
use crate::memory_budget::{MemoryBudget, Owner};

/// The most bytes of one read. The HTTP library makes its buffer as large as the reads that fill
/// it, up to the longest head, and keeps it for as long as the connection lasts.
const READ_BYTES: u64 = 8 << 10;

/// A TCP connection whose traffic is recorded in its [`Activity`].
#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
    activity: Arc<Activity>,
    budget: Arc<MemoryBudget>,
    owner: Owner,
}

impl Socket {
    /// Records the traffic of `stream` in `activity`. A long head reserves memory of `budget` for
    /// `owner`.
    pub fn new(
        stream: TcpStream,
        activity: Arc<Activity>,
        budget: Arc<MemoryBudget>,
        owner: Owner,
    ) -> Self {
        Self {
            stream,
            activity,
            budget,
            owner,
        }
    }

    fn note_write(&self, outcome: &Poll<io::Result<usize>>) {
        match outcome {
            Poll::Ready(Ok(bytes)) => self.activity.note_written(*bytes, Instant::now()),
            Poll::Ready(Err(_)) => {}
            Poll::Pending => self.activity.note_blocked(Instant::now()),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let mut part = (&mut self.stream).take(READ_BYTES);
        let outcome = Pin::new(&mut part).poll_read(context, buffer);
        let bytes = buffer.filled().len() - before;
        if bytes > 0 {
            let reserve = |bytes| self.budget.reserve(self.owner, bytes);
            self.activity
                .note_read(bytes, Instant::now(), reserve)
                .map_err(io::Error::other)?;
        }
        outcome
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note_write(&outcome);
        outcome
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.note_write(&outcome);
        outcome
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
