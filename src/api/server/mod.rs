//! The listener: accepts connections within bounds and deadlines, and lets them finish when the
//! service stops.

mod activity;
mod connections;
mod socket;

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::header::ALLOW;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri};
use axum::response::Response;
use bytes::Bytes;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use prometheus::IntCounterVec;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;
use tracing::Span;

use self::activity::{Activity, Ending};
use self::socket::Socket;
use super::extract::{Peer, Root};
use super::request_log::RequestSpan;
use crate::domain::ClientNetwork;
use crate::memory_budget::{MemoryBudget, Owner};

pub use self::connections::{Bounds, Connections, Slot};

/// The longest head of a request, in bytes: a query may take nearly 64 KiB of an address, and other
/// headers need room too. Also the most that is read ahead of a body, and that waits to be sent of
/// a response.
const HEAD_BYTES: usize = 72 << 10;
/// The kernel buffers about this much unsent data of a response, in bytes. It would buffer
/// megabytes otherwise, for each connection whose client does not read.
const UNSENT_BYTES: u32 = 128 << 10;
/// How long sent data may stay unacknowledged before the kernel closes the connection.
const UNACKNOWLEDGED_DEADLINE: Duration = Duration::from_secs(60);
/// The pause when the process has no file descriptors left: accepting again at once would fail in a
/// busy loop.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);
/// The time to which a timer is set that is not needed.
const FAR: Duration = Duration::from_secs(3600);

/// The dependencies of one listener.
#[derive(Clone, Debug)]
pub struct ServerDeps {
    /// Bounds and counts them.
    pub connections: Arc<Connections>,
    /// The budget for their long heads.
    pub memory: Arc<MemoryBudget>,
    /// How long requests in flight may take to finish after the listener closed.
    pub grace: Duration,
    /// Counts the connections that the service ended before their clients did, by reason.
    pub ended: IntCounterVec,
}

/// Serves `router` on `listener` until `stop` is cancelled; then closes the listener, lets requests
/// in flight finish within the grace, and returns.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    deps: ServerDeps,
    stop: CancellationToken,
) {
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                pause_if_exhausted(&error).await;
                continue;
            }
        };
        let Some(slot) = deps.connections.admit(peer.ip()) else {
            deps.ended.with_label_values(&["no_room"]).inc();
            continue;
        };
        let connection = ServedConnection {
            peer,
            slot,
            router: router.clone(),
            memory: Arc::clone(&deps.memory),
        };
        let (ended, stop) = (deps.ended.clone(), stop.clone());
        tasks.spawn(async move {
            if let Some(ending) = connection.serve(stream, stop).await {
                ended.with_label_values(&[ending.as_str()]).inc();
            }
        });
    }
    drop(listener);
    tasks.close();
    if tokio::time::timeout(deps.grace, tasks.wait())
        .await
        .is_err()
    {
        tracing::warn!(
            connections = tasks.len(),
            "requests in flight were cut off at the end of SHUTDOWN_GRACE"
        );
    }
}

/// A connection that was accepted and has a slot.
struct ServedConnection {
    peer: SocketAddr,
    slot: Slot,
    router: Router,
    memory: Arc<MemoryBudget>,
}

impl ServedConnection {
    /// Serves requests until either side ends the connection. Returns the reason if the service
    /// ended it early.
    async fn serve(self, stream: TcpStream, stop: CancellationToken) -> Option<Ending> {
        tune(&stream);
        let activity = Arc::clone(self.slot.activity());
        let owner = Owner {
            user: None,
            network: Some(ClientNetwork::from(self.peer.ip())),
        };
        let socket = Socket::new(
            stream,
            Arc::clone(&activity),
            Arc::clone(&self.memory),
            owner,
        );
        let service = hyper::service::service_fn(|request| self.answer(request));
        let connection = http1::Builder::new()
            // The activity has the deadlines. It distinguishes an idle connection from a slow head.
            .header_read_timeout(None)
            .max_buf_size(HEAD_BYTES)
            .keep_alive(!self.slot.is_for_health())
            .serve_connection(TokioIo::new(socket), service)
            .with_upgrades();
        let mut connection = pin!(connection);
        let mut timer = pin!(tokio::time::sleep(FAR));
        let mut is_stopping = false;
        loop {
            tokio::select! {
                biased;
                served = connection.as_mut() => {
                    if let Err(error) = served {
                        tracing::debug!(%error, "connection ended early");
                    }
                    return None;
                }
                ending = poll_fn(|context| overdue(&activity, timer.as_mut(), context)) => {
                    return Some(ending);
                }
                () = activity.asked_to_leave() => {
                    // A request that came meanwhile is served.
                    if activity.readiness_to_leave().is_some() {
                        return Some(Ending::MadeRoom);
                    }
                    connection.as_mut().graceful_shutdown();
                }
                () = stop.cancelled(), if !is_stopping => {
                    is_stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }

    async fn answer(
        &self,
        mut request: hyper::Request<Incoming>,
    ) -> Result<hyper::Response<ResponseBody>, std::convert::Infallible> {
        let activity = Arc::clone(self.slot.activity());
        activity.begin_request();
        let root = Root::of(request.uri());
        request.extensions_mut().insert(root);
        trim_trailing_slash(request.uri_mut());
        request.extensions_mut().insert(Peer(self.peer));
        request.extensions_mut().insert(self.slot.clone());
        let request: Request = request.map(Body::new);
        let mut response: Response = self.router.clone().call(request).await?;
        list_options(response.headers_mut());
        // A connection that has become a WebSocket serves it until both end.
        let is_last = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let span = response.extensions_mut().remove();
        Ok(response.map(|body| ResponseBody {
            body,
            activity: (!is_last).then_some(activity),
            span: span.map_or_else(Span::none, |RequestSpan(span)| span),
        }))
    }
}

/// Becomes ready when the connection misses a deadline. Each poll, which is whenever anything
/// happens on the connection, reads the deadline again. The timer is set again only if it would
/// fire too late.
fn overdue(
    activity: &Activity,
    mut timer: Pin<&mut Sleep>,
    context: &mut Context<'_>,
) -> Poll<Ending> {
    loop {
        let deadline = activity.deadline();
        let due = match deadline {
            Some((at, ending)) if at <= Instant::now() => return Poll::Ready(ending),
            Some((at, _)) => at,
            None => Instant::now() + FAR,
        };
        if timer.is_elapsed() || timer.deadline() > due.into() {
            timer.as_mut().reset(due.into());
        }
        // A timer that fired for an older deadline is set to the present one.
        ready!(timer.as_mut().poll(context));
    }
}

/// A response's body. When it is dropped, all of it was handed over, and the connection's activity
/// notes the end of the request.
struct ResponseBody {
    body: Body,
    activity: Option<Arc<Activity>>,
    /// Entered while the body is written.
    span: Span,
}

impl hyper::body::Body for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        let _entered = this.span.enter();
        Pin::new(&mut this.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        if let Some(activity) = &self.activity {
            activity.end_request(Instant::now());
        }
    }
}

/// Nagle's algorithm would delay small responses, and unsent data would take memory for clients
/// that do not read.
fn tune(stream: &TcpStream) {
    let socket = socket2::SockRef::from(stream);
    let tuned = socket.set_tcp_nodelay(true);
    #[cfg(target_os = "linux")]
    let tuned = tuned
        .and_then(|()| socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_DEADLINE)))
        .and_then(|()| socket.set_tcp_notsent_lowat(UNSENT_BYTES));
    if let Err(error) = tuned {
        tracing::debug!(%error, "a connection could not be tuned");
    }
}

/// Every route works with and without a trailing slash; the router knows the form without.
fn trim_trailing_slash(uri: &mut Uri) {
    let path = uri.path();
    if path.len() < 2 || !path.ends_with('/') {
        return;
    }
    let trimmed = &path[..path.len() - 1];
    let rewritten = match uri.query() {
        Some(query) => format!("{trimmed}?{query}"),
        None => trimmed.to_owned(),
    };
    // The shorter path is valid again, except for `//`, which stays as it is.
    if let Ok(path_and_query) = rewritten.parse() {
        let mut parts = std::mem::take(uri).into_parts();
        parts.path_and_query = Some(path_and_query);
        if let Ok(rewritten) = Uri::from_parts(parts) {
            *uri = rewritten;
        }
    }
}

/// Adds `OPTIONS` to `Allow`: the router lists only methods that have a handler.
fn list_options(headers: &mut HeaderMap) {
    let Some(allow) = headers.get(ALLOW).and_then(|allow| allow.to_str().ok()) else {
        return;
    };
    let methods: Vec<&str> = allow
        .split(',')
        .map(str::trim)
        .filter(|method| !method.is_empty() && *method != "OPTIONS")
        .collect();
    let allow = [&methods[..], &["OPTIONS"]].concat().join(", ");
    if let Ok(allow) = HeaderValue::from_str(&allow) {
        headers.insert(ALLOW, allow);
    }
}

async fn pause_if_exhausted(error: &io::Error) {
    // A peer that disconnected before it was accepted is no problem of this service.
    let is_peers_fault = matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
    );
    if !is_peers_fault {
        tracing::warn!(%error, "connections cannot be accepted");
        tokio::time::sleep(EXHAUSTED_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_trailing_slash_is_trimmed_and_the_query_is_kept() {
        for (given, seen) in [
            ("/api/prompts/", "/api/prompts"),
            ("/api/prompts/?q=a/", "/api/prompts?q=a/"),
            ("/api/prompts", "/api/prompts"),
            ("/", "/"),
            ("//", "/"),
            (
                "http://host/ws/prompts/?token=x",
                "http://host/ws/prompts?token=x",
            ),
            ("/a//", "/a/"),
        ] {
            let mut uri: Uri = given.parse().unwrap();
            trim_trailing_slash(&mut uri);
            assert_eq!(uri.to_string(), seen, "{given}");
        }
    }

    #[test]
    fn options_is_listed_once_and_last() {
        for (given, listed) in [
            ("GET,HEAD", "GET, HEAD, OPTIONS"),
            ("POST", "POST, OPTIONS"),
            ("", "OPTIONS"),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(ALLOW, given.parse().unwrap());
            list_options(&mut headers);
            assert_eq!(headers[ALLOW], listed);
        }
    }
}
