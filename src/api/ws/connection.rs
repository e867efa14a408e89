//! One WebSocket over an upgraded connection. It reads and writes concurrently, in bounded memory,
//! and closes with a reason.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

/// The largest message that a client may send, in bytes. Clients only send access tokens.
const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// The initial size of a socket's buffers, in bytes. The default of 128 KiB would take 64 MiB for
/// 500 idle sockets.
const BUFFER_BYTES: usize = 4 << 10;
/// The most that waits in a socket's own write buffer, in bytes: one frame, and pongs. Without a
/// bound, a client that sends pings and never reads would fill the service's memory with pongs.
const MAX_WRITE_BUFFER_BYTES: usize = 64 << 10;
/// Longer texts are sent in frames of this many bytes. The write buffer copies its input and never
/// shrinks, so with whole events each socket would keep the size of its largest event. The text
/// itself is shared by all sockets.
const FRAME_BYTES: usize = 16 << 10;
/// Messages that may wait behind the one being written. At this bound nothing is read from the
/// client until it reads: each message waits because the client sent something, or because it was
/// silent.
const MAX_WAITING: usize = 8;

/// A byte stream that can carry a WebSocket.
pub trait Io: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Io for S {}

/// An event of the connection.
pub enum ConnectionEvent {
    /// Everything to send was handed over.
    Sent,
    /// A message came; `None` if no more will come.
    Received(Option<Result<Message, Error>>),
}

/// A message that waits to be sent.
enum Outgoing {
    Message(Message),
    /// The bytes of a text, which is sent in one or more frames.
    Text(Bytes),
}

/// One WebSocket.
pub struct Connection<S> {
    socket: WebSocketStream<S>,
    /// The rest of a text that is sent in several frames.
    rest: Bytes,
    waiting: VecDeque<Outgoing>,
    is_sending: bool,
    /// Whether reading failed, so that data of the client is left unread.
    is_broken: bool,
}

impl<S: Io> Connection<S> {
    /// The server's side of a WebSocket whose handshake is done.
    pub async fn new(io: S) -> Self {
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES))
            .read_buffer_size(BUFFER_BYTES)
            .write_buffer_size(BUFFER_BYTES)
            .max_write_buffer_size(MAX_WRITE_BUFFER_BYTES);
        Self {
            socket: WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await,
            rest: Bytes::new(),
            waiting: VecDeque::new(),
            is_sending: false,
            is_broken: false,
        }
    }

    /// Queues `message`: the next calls of [`Self::step`] send it.
    pub fn send(&mut self, message: Message) {
        self.push(Outgoing::Message(message));
    }

    /// Queues a text without copying it.
    pub fn send_shared(&mut self, text: Arc<str>) {
        struct SharedText(Arc<str>);
        impl AsRef<[u8]> for SharedText {
            fn as_ref(&self) -> &[u8] {
                self.0.as_bytes()
            }
        }
        self.push(Outgoing::Text(Bytes::from_owner(SharedText(text))));
    }

    fn push(&mut self, outgoing: Outgoing) {
        self.waiting.push_back(outgoing);
        self.is_sending = true;
    }

    /// Whether a queued message was not yet handed over.
    pub fn is_sending(&self) -> bool {
        self.is_sending
    }

    /// Drives writes and reads concurrently until one of them makes progress. A client that stops
    /// reading does not stop the service from reading its messages. Cancel safe.
    pub async fn step(&mut self) -> Result<ConnectionEvent, Error> {
        poll_fn(|cx| self.poll_step(cx)).await
    }

    fn poll_step(&mut self, cx: &mut Context<'_>) -> Poll<Result<ConnectionEvent, Error>> {
        while let Poll::Ready(flushed) = Pin::new(&mut self.socket).poll_flush(cx) {
            flushed?;
            if !self.write_next()? {
                if std::mem::take(&mut self.is_sending) {
                    return Poll::Ready(Ok(ConnectionEvent::Sent));
                }
                break;
            }
        }
        if self.waiting.len() >= MAX_WAITING {
            return Poll::Pending;
        }
        let received = ready!(Pin::new(&mut self.socket).poll_next(cx));
        self.is_broken |= matches!(received, Some(Err(_)));
        Poll::Ready(Ok(ConnectionEvent::Received(received)))
    }

    /// Puts the next frame into the write buffer, which is empty. Returns whether there was one.
    fn write_next(&mut self) -> Result<bool, Error> {
        let frame = if self.rest.is_empty() {
            match self.waiting.pop_front() {
                None => return Ok(false),
                Some(Outgoing::Message(message)) => message,
                Some(Outgoing::Text(text)) => {
                    self.rest = text;
                    self.next_frame(Data::Text)
                }
            }
        } else {
            self.next_frame(Data::Continue)
        };
        Pin::new(&mut self.socket).start_send(frame)?;
        Ok(true)
    }

    fn next_frame(&mut self, kind: Data) -> Message {
        let part = self.rest.split_to(self.rest.len().min(FRAME_BYTES));
        let is_last = self.rest.is_empty();
        Message::Frame(Frame::message(part, OpCode::Data(kind), is_last))
    }

    /// Closes the connection with `frame`, or, if there is none, completes the client's own close.
    /// Queued messages are dropped. Takes up to `deadline`, because a client that is behind reads
    /// the close frame last.
    pub async fn close(mut self, frame: Option<CloseFrame>, deadline: Duration) {
        let _ = timeout(deadline, async {
            if let Some(frame) = frame {
                self.socket.flush().await?;
                self.socket.send(Message::Close(Some(frame))).await?;
            }
            // Reading drives the closing handshake.
            while let Some(message) = self.socket.next().await {
                message?;
            }
            if self.is_broken {
                // Closing a connection with unread data resets it, and the close frame would be
                // lost.
                let mut io = self.socket.into_inner();
                io.shutdown().await?;
                let mut unread = [0; 1024];
                while io.read(&mut unread).await? > 0 {}
            }
            Ok::<_, Error>(())
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::io::{DuplexStream, duplex};

    use super::*;

    /// A connection, and the client's end of it as bytes; `room` bytes fit in between.
    async fn connection(room: usize) -> (Connection<DuplexStream>, DuplexStream) {
        let (client, server) = duplex(room);
        (Connection::new(server).await, client)
    }

    /// The events that are ready now.
    fn steps(connection: &mut Connection<DuplexStream>) -> Vec<ConnectionEvent> {
        std::iter::from_fn(|| connection.step().now_or_never())
            .map(Result::unwrap)
            .collect()
    }

    #[tokio::test]
    async fn client_that_does_not_read_is_read_from_until_too_much_waits_for_it() {
        let (mut connection, mut client) = connection(64 << 10).await;
        // An empty text, masked with zeros.
        client
            .write_all(&b"\x81\x80\0\0\0\0".repeat(1000))
            .await
            .unwrap();
        let mut heard = 0;
        while let Some(Ok(step)) = connection.step().now_or_never() {
            if let ConnectionEvent::Received(Some(Ok(_))) = step {
                heard += 1;
                connection.send(Message::text("x".repeat(60 << 10)));
            }
        }
        // One answer went through, one is being written, the others wait.
        assert_eq!(heard, MAX_WAITING + 2);
        // With the client reading again, it goes on.
        let mut read = vec![0; 64 << 10];
        while heard < 1000 {
            let _ = client.read(&mut read).await.unwrap();
            heard += steps(&mut connection)
                .iter()
                .filter(|step| matches!(step, ConnectionEvent::Received(Some(Ok(_)))))
                .count();
        }
    }

    #[tokio::test]
    async fn client_is_read_from_while_a_text_is_being_written() {
        let (mut connection, mut client) = connection(1 << 10).await;
        connection.send_shared("x".repeat(100 << 10).into());
        assert!(steps(&mut connection).is_empty());
        client.write_all(b"\x89\x80\0\0\0\0").await.unwrap();
        let steps = steps(&mut connection);
        assert!(matches!(
            steps[..],
            [ConnectionEvent::Received(Some(Ok(Message::Ping(_))))]
        ));
        assert!(connection.is_sending());
    }

    #[tokio::test]
    async fn long_text_is_sent_in_several_frames() {
        let (mut connection, mut client) = connection(1 << 20).await;
        for length in [0, 1, FRAME_BYTES, FRAME_BYTES + 1, 3 * FRAME_BYTES] {
            let text = "x".repeat(length);
            connection.send_shared(text.clone().into());
            assert!(matches!(
                steps(&mut connection)[..],
                [ConnectionEvent::Sent]
            ));
            assert!(!connection.is_sending());
            let (mut read, mut frames) = (Vec::new(), 0);
            loop {
                let first = client.read_u8().await.unwrap();
                let opcode = if frames == 0 { 1 } else { 0 };
                assert_eq!(first & 0x7f, opcode);
                let length = match client.read_u8().await.unwrap() {
                    126 => usize::from(client.read_u16().await.unwrap()),
                    short => usize::from(short),
                };
                let mut payload = vec![0; length];
                client.read_exact(&mut payload).await.unwrap();
                read.extend(payload);
                frames += 1;
                if first & 0x80 != 0 {
                    break;
                }
            }
            assert_eq!(read, text.as_bytes());
            assert_eq!(frames, length.div_ceil(FRAME_BYTES).max(1));
        }
    }
}
