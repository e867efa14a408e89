//! What goes on over one open socket.

use std::ops::ControlFlow;
use std::pin::pin;
use std::sync::Arc;

use serde::Deserialize;
use tokio::time::{Instant, sleep_until};
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use super::connection::{Connection, Io, Step};
use crate::api::state::AppState;
use crate::domain::Timestamp;
use crate::realtime::{CloseReason, Subscription};
use crate::services::accounts::Caller;

/// What a client may say.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum ClientFrame {
    /// A newer access token of the same user.
    Auth { token: String },
}

/// How a socket came to its end.
enum End {
    /// The service closes it, with a close code and a word for the client's log.
    Closing(u16, &'static str),
    /// The client closed it, with this close code.
    Closed(u16),
}

impl End {
    /// The client is gone without a word. The standard keeps a code for that, which is never sent.
    const GONE: Self = Self::Closed(1006);
    const SILENT: Self = Self::Closing(1011, "no answer to pings");
}

impl From<CloseReason> for End {
    fn from(reason: CloseReason) -> Self {
        let (code, word) = reason.code();
        Self::Closing(code, word)
    }
}

/// One open socket.
pub struct Session {
    /// What handlers share.
    pub state: AppState,
    /// Whose socket it is, and until when.
    pub caller: Caller,
    /// Where its events come from.
    pub subscription: Subscription,
}

impl Session {
    /// Serves the socket until either side ends it. Answers the close code, whoever sent it.
    pub async fn run(mut self, mut connection: Connection<impl Io>) -> u16 {
        let metrics = Arc::clone(&self.state.metrics);
        metrics.websockets_open.inc();
        let end = self.serve(&mut connection).await;
        metrics.websockets_open.dec();
        let deadline = self.state.server.socket_timings.closing;
        // Nothing more can be told, so the place among the user's sockets is free, however long the closing takes.
        drop(self);
        let (code, reason) = match end {
            End::Closing(code, reason) => (code, reason),
            End::Closed(code) => {
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

    /// The loop over what may happen, the most pressing first. Silence comes last: of a client that was not listened to for a
    /// while, first take what it said.
    async fn serve(&mut self, connection: &mut Connection<impl Io>) -> End {
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
                    // The system's clock was set back meanwhile.
                    expires = self.expires();
                }
                () = sleep_until(next_ping) => {
                    next_ping = Instant::now() + timings.ping_every;
                    connection.send(Message::Ping(bytes::Bytes::new()));
                    // A good moment to notice that the clock was set forward.
                    expires = self.expires();
                }
                happened = next(connection, &mut self.subscription) => match happened {
                    Happened::Event(event) => connection.send_shared(event),
                    Happened::Step(Ok(Step::Sent)) => {}
                    Happened::Step(Ok(Step::Received(message))) => {
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
                    Happened::Step(Err(_)) => return End::GONE,
                },
                () = sleep_until(last_heard + timings.silence) => return End::SILENT,
            }
        }
    }

    /// Waits until the hub or the whole service wants the socket closed.
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

    /// Takes what came from the client: an answer to send, or the end.
    async fn take(
        &mut self,
        message: Option<Result<Message, Error>>,
    ) -> ControlFlow<End, Option<Message>> {
        match message {
            Some(Ok(Message::Text(text))) => ControlFlow::Continue(self.take_text(&text).await),
            // Pings are answered beneath; frames of unknown kind are ignored.
            Some(Ok(
                Message::Binary(_) | Message::Ping(_) | Message::Pong(_) | Message::Frame(_),
            )) => ControlFlow::Continue(None),
            Some(Ok(Message::Close(frame))) => {
                // A close frame without a code counts as this one, which is never sent.
                let code = frame.map_or(1005, |frame| frame.code.into());
                ControlFlow::Break(End::Closed(code))
            }
            None => ControlFlow::Break(End::GONE),
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
                // What stands behind a socket is one credential, the one that lasts longest: to end the socket by that one's
                // time and let go of the session that opened it would keep it open after a logout.
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

    /// When the credential behind the socket ends, on the clock that timers go by.
    fn expires(&self) -> Instant {
        Instant::now() + self.caller.expires_at.since(Timestamp::now())
    }
}

enum Happened {
    Step(Result<Step, Error>),
    Event(Arc<str>),
}

/// The next thing to happen on the connection or in the hub. Which of two comes first is left to chance, so that neither a
/// talkative client nor a stream of events keeps the other waiting. The next event waits in the hub's bounded queue until the
/// last is sent. Cancel safe.
async fn next(connection: &mut Connection<impl Io>, subscription: &mut Subscription) -> Happened {
    let is_sending = connection.is_sending();
    tokio::select! {
        step = connection.step() => Happened::Step(step),
        Some(event) = subscription.next_event(), if !is_sending => Happened::Event(event),
    }
}

/// What a client's broken frame is answered with.
fn protocol_error(error: &Error) -> End {
    match error {
        Error::Capacity(_) => End::Closing(1009, "message too big"),
        Error::Utf8(_) => End::Closing(1007, "not UTF-8"),
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => End::GONE,
        Error::Protocol(_) => End::Closing(1002, "protocol error"),
        Error::ConnectionClosed
        | Error::AlreadyClosed
        | Error::Io(_)
        | Error::Tls(_)
        | Error::WriteBufferFull(_)
        | Error::AttackAttempt
        | Error::Url(_)
        | Error::Http(_)
        | Error::HttpFormat(_) => End::GONE,
    }
}
