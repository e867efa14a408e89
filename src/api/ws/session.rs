//! The event loop of one open socket.

use std::ops::ControlFlow;
use std::pin::pin;
use std::sync::Arc;

use serde::Deserialize;
use tokio::time::{Instant, sleep_until};
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use super::connection::{Connection, ConnectionEvent, Io};
use crate::api::state::AppState;
use crate::domain::Timestamp;
use crate::realtime::{CloseReason, Subscription};
use crate::services::accounts::Caller;

/// A message of the client.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum ClientFrame {
    /// A newer access token of the same user.
    Auth { token: String },
}

/// Why a socket ends.
enum SocketEnd {
    /// The service closes it, with a close code and a reason for the client's log.
    Closing(u16, &'static str),
    /// The client closed it, with this close code.
    Closed(u16),
}

impl SocketEnd {
    /// The client disconnected without a close frame. The standard reserves a code for this, which
    /// is never sent.
    const GONE: Self = Self::Closed(1006);
    const SILENT: Self = Self::Closing(1011, "no answer to pings");
}

impl From<CloseReason> for SocketEnd {
    fn from(reason: CloseReason) -> Self {
        let (code, word) = reason.code();
        Self::Closing(code, word)
    }
}

/// One open socket.
pub struct SocketSession {
    /// The state that handlers share.
    pub state: AppState,
    /// The user of the socket, and when the credential expires.
    pub caller: Caller,
    /// Where its events come from.
    pub subscription: Subscription,
}

impl SocketSession {
    /// Serves the socket until either side ends it. Returns the close code, whichever side sent it.
    pub async fn run(mut self, mut connection: Connection<impl Io>) -> u16 {
        let metrics = Arc::clone(&self.state.metrics);
        metrics.websockets_open.inc();
        let end = self.serve(&mut connection).await;
        metrics.websockets_open.dec();
        let deadline = self.state.server.socket_timings.closing;
        // No event can be sent any more, so the socket stops counting towards the user's sockets,
        // even while it is still being closed.
        drop(self);
        let (code, reason) = match end {
            SocketEnd::Closing(code, reason) => (code, reason),
            SocketEnd::Closed(code) => {
                connection.close(None, deadline).await;
                return code;
            }
        };
        metrics
            .websockets_closed
            .with_label_values(&[&code.to_string()])
            .inc();
        let frame = CloseFrame {
            code: code.into(),
            reason: Utf8Bytes::from_static(reason),
        };
        connection.close(Some(frame), deadline).await;
        code
    }

    /// The event loop, the most urgent event first. Silence comes last: if this task was delayed,
    /// the client's messages must be read before the client counts as silent.
    async fn serve(&mut self, connection: &mut Connection<impl Io>) -> SocketEnd {
        let timings = self.state.server.socket_timings;
        let mut closing = pin!(self.closing());
        let mut expires = self.expires();
        let mut last_heard = Instant::now();
        let mut next_ping = last_heard + timings.ping_every;
        let user_id = self.caller.user_id();
        let hello = format!("{{\"message\": \"WebSocket connected\", \"user_id\": {user_id}}}");
        connection.send(Message::text(hello));
        loop {
            tokio::select! {
                biased;
                reason = &mut closing => return reason.into(),
                () = sleep_until(expires) => {
                    if self.caller.expires_at <= Timestamp::now() {
                        return CloseReason::CredentialEnded.into();
                    }
                    // The system's clock was set back.
                    expires = self.expires();
                }
                () = sleep_until(next_ping) => {
                    next_ping = Instant::now() + timings.ping_every;
                    connection.send(Message::Ping(bytes::Bytes::new()));
                    // Also notices that the clock was set forward.
                    expires = self.expires();
                }
                happened = next(connection, &mut self.subscription) => match happened {
                    SessionEvent::Hub(event) => connection.send_shared(event),
                    SessionEvent::Connection(Ok(ConnectionEvent::Sent)) => {}
                    SessionEvent::Connection(Ok(ConnectionEvent::Received(message))) => {
                        last_heard = Instant::now();
                        match self.take(message).await {
                            ControlFlow::Continue(reply) => {
                                if let Some(reply) = reply {
                                    connection.send(reply);
                                }
                            }
                            ControlFlow::Break(end) => return end,
                        }
                        expires = self.expires();
                    }
                    SessionEvent::Connection(Err(_)) => return SocketEnd::GONE,
                },
                () = sleep_until(last_heard + timings.silence) => return SocketEnd::SILENT,
            }
        }
    }

    /// Waits until the hub closes the socket, or the service stops.
    fn closing(&self) -> impl Future<Output = CloseReason> + use<> {
        let closed = self.subscription.closed();
        let stopping = self.state.lifecycle.stopping.clone();
        async move {
            tokio::select! {
                biased;
                reason = closed => reason,
                () = stopping.cancelled() => CloseReason::GoingAway,
            }
        }
    }

    /// Handles a message of the client: returns a reply, or the end of the socket.
    async fn take(
        &mut self,
        message: Option<Result<Message, Error>>,
    ) -> ControlFlow<SocketEnd, Option<Message>> {
        match message {
            Some(Ok(Message::Text(text))) => ControlFlow::Continue(self.take_text(&text).await),
            // The library replies to pings. Other messages are ignored.
            Some(Ok(
                Message::Binary(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_),
            )) => ControlFlow::Continue(None),
            Some(Ok(Message::Close(frame))) => {
                // The code for a close frame without one (RFC 6455, section 7.1.5). It is never
                // sent.
                let code = frame.map_or(1005, |frame| frame.code.into());
                ControlFlow::Break(SocketEnd::Closed(code))
            }
            None => ControlFlow::Break(SocketEnd::GONE),
            Some(Err(error)) => ControlFlow::Break(protocol_error(&error)),
        }
    }

    /// A newer access token of the same user extends the socket; anything else is ignored.
    async fn take_text(&mut self, text: &str) -> Option<Message> {
        let Ok(ClientFrame::Auth { token }) = serde_json::from_str(text) else {
            return None;
        };
        let accounts = &self.state.accounts;
        let renewed = accounts.authenticate(&token, Timestamp::now()).await;
        let answer = match renewed {
            Ok(caller) if caller.user_id() == self.caller.user_id() => {
                // A socket has one credential: the one that expires last. Its session, if it has
                // one, goes with it: a socket with one credential's expiry and another's session
                // would stay open after a logout.
                if caller.expires_at > self.caller.expires_at {
                    self.subscription.renew(caller.issued_at);
                    self.caller = caller;
                }
                "extended"
            }
            Ok(_) | Err(_) => "refused",
        };
        let answer = format!("{{\"type\": \"auth\", \"status\": \"{answer}\"}}");
        Some(Message::text(answer))
    }

    /// When the socket's credential expires, on the monotonic clock.
    fn expires(&self) -> Instant {
        Instant::now() + self.caller.expires_at.since(Timestamp::now())
    }
}

enum SessionEvent {
    Connection(Result<ConnectionEvent, Error>),
    Hub(Arc<str>),
}

/// The next event of the connection or the hub. If both are ready, one is chosen at random, so that
/// neither a busy client nor a stream of events starves the other. The next event of the hub waits
/// in its bounded queue until the last one is sent. Cancel safe.
async fn next(
    connection: &mut Connection<impl Io>,
    subscription: &mut Subscription,
) -> SessionEvent {
    let is_sending = connection.is_sending();
    tokio::select! {
        step = connection.step() => SessionEvent::Connection(step),
        Some(event) = subscription.next_event(), if !is_sending => SessionEvent::Hub(event),
    }
}

/// The close code for a frame of the client that breaks the protocol.
fn protocol_error(error: &Error) -> SocketEnd {
    match error {
        Error::Capacity(_) => SocketEnd::Closing(1009, "message too big"),
        Error::Utf8(_) => SocketEnd::Closing(1007, "not UTF-8"),
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => SocketEnd::GONE,
        Error::Protocol(_) => SocketEnd::Closing(1002, "protocol error"),
        Error::ConnectionClosed
        | Error::AlreadyClosed
        | Error::Io(_)
        | Error::Tls(_)
        | Error::WriteBufferFull(_)
        | Error::AttackAttempt
        | Error::Url(_)
        | Error::Http(_)
        | Error::HttpFormat(_) => SocketEnd::GONE,
    }
}
