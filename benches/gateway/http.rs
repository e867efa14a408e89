//! As much of HTTP/1.1 as both sides of the benchmark need, in as little time as possible: heads,
//! and bodies with a length or in chunks.

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

/// A kept connection.
pub struct Connection {
    /// For what is written.
    pub stream: TcpStream,
    buffer: Vec<u8>,
}

/// How much of a body is still to be read.
pub enum Body {
    /// A number of bytes.
    Length(usize),
    /// Chunks, up to an empty one.
    Chunks,
    /// Nothing more.
    Done,
}

impl Body {
    /// The body that follows a head in lower case.
    pub fn of(head: &str) -> Self {
        if head.contains("transfer-encoding: chunked") {
            return Self::Chunks;
        }
        let length = head.split_once("content-length:").map_or(0, |(_, rest)| {
            let digits = rest.split("\r\n").next().unwrap_or_default();
            digits.trim().parse().expect("a length")
        });
        match length {
            0 => Self::Done,
            _ => Self::Length(length),
        }
    }
}

impl Connection {
    /// Takes a new connection.
    pub fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).expect("an option of TCP");
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    async fn read_more(&mut self) -> Option<()> {
        match self.stream.read_buf(&mut self.buffer).await {
            Ok(1..) => Some(()),
            Ok(0) | Err(_) => None,
        }
    }

    /// The head of the next message in lower case; `None` at the end of the connection.
    pub async fn read_head(&mut self) -> Option<String> {
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            self.read_more().await?;
        };
        let head = self.buffer.drain(..end).collect::<Vec<u8>>();
        Some(String::from_utf8_lossy(&head).to_lowercase())
    }

    /// The next part of a body: a chunk, or all of a body with a length; `None` at its end and at
    /// that of the connection.
    pub async fn read_part(&mut self, body: &mut Body) -> Option<Vec<u8>> {
        match *body {
            Body::Done => None,
            Body::Length(length) => {
                while self.buffer.len() < length {
                    self.read_more().await?;
                }
                *body = Body::Done;
                Some(self.buffer.drain(..length).collect())
            }
            Body::Chunks => {
                let head = loop {
                    if let Some(at) = self.buffer.windows(2).position(|two| two == b"\r\n") {
                        break at;
                    }
                    self.read_more().await?;
                };
                let size = std::str::from_utf8(&self.buffer[..head]).ok()?;
                let size = usize::from_str_radix(size.split(';').next()?.trim(), 16).ok()?;
                let all = head + 2 + size + 2;
                while self.buffer.len() < all {
                    self.read_more().await?;
                }
                let chunk = self.buffer[head + 2..head + 2 + size].to_vec();
                self.buffer.drain(..all);
                if chunk.is_empty() {
                    *body = Body::Done;
                    return None;
                }
                Some(chunk)
            }
        }
    }
}
