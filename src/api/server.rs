//! The listener: accepts connections within bounds and deadlines, and lets them finish when told to stop.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::header::ALLOW;
use axum::http::{HeaderMap, HeaderValue, Uri};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::IntGauge;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;

use super::extract::{Peer, Root};

/// How long a request's head may take to arrive; also how long a kept connection may idle between requests.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);
/// How long sent data may stay unacknowledged before the kernel gives the peer up: an answer nobody reads must not hold
/// its connection for ever.
const UNACKNOWLEDGED_DEADLINE: Duration = Duration::from_secs(60);
/// How long to rest when the process has no file descriptors left: accepting again at once would only spin.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(50);

/// Bounds of one listener.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections at once; further ones wait in the kernel's queue.
    pub connections: Arc<Semaphore>,
    /// How long requests in flight may take to finish after the listener closed.
    pub grace: Duration,
    /// Counts open connections.
    pub open: IntGauge,
}

/// A connection's place among those served at once, in every request's extensions. Who takes the connection over from HTTP
/// keeps it, so that open sockets count too; it is free again when the last of its clones is dropped.
#[derive(Clone)]
pub struct Place {
    _shared: Arc<OpenConnection>,
}

struct OpenConnection {
    _permit: OwnedSemaphorePermit,
    open: IntGauge,
}

impl Place {
    fn take(permit: OwnedSemaphorePermit, open: IntGauge) -> Self {
        open.inc();
        Self {
            _shared: Arc::new(OpenConnection {
                _permit: permit,
                open,
            }),
        }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.open.dec();
    }
}

/// Serves `router` on `listener` until `stop` is cancelled; then closes the listener, lets requests in flight finish within
/// the grace, and returns.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: CancellationToken) {
    let connections = TaskTracker::new();
    loop {
        let permit = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            permit = Arc::clone(&limits.connections).acquire_owned() => permit.expect("the semaphore is never closed"),
        };
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
        let place = Place::take(permit, limits.open.clone());
        connections.spawn(serve_connection(
            stream,
            peer,
            place,
            router.clone(),
            stop.clone(),
        ));
    }
    drop(listener);
    connections.close();
    if tokio::time::timeout(limits.grace, connections.wait())
        .await
        .is_err()
    {
        tracing::warn!(
            connections = connections.len(),
            "requests in flight were cut off at the end of the grace"
        );
    }
}

async fn serve_connection(
    stream: TcpStream,
    peer: SocketAddr,
    place: Place,
    router: Router,
    stop: CancellationToken,
) {
    tune(&stream);
    let service = hyper::service::service_fn(move |mut request: hyper::Request<Incoming>| {
        let root = Root::of(request.uri());
        request.extensions_mut().insert(root);
        trim_trailing_slash(request.uri_mut());
        request.extensions_mut().insert(Peer(peer));
        request.extensions_mut().insert(place.clone());
        let request: Request = request.map(axum::body::Body::new);
        let mut router = router.clone();
        async move {
            let mut response = router.call(request).await?;
            list_options(response.headers_mut());
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "connection ended early");
    }
}

/// Nagle's algorithm would hold back small answers; without a deadline on unread data a stalled reader would stay for ever.
fn tune(stream: &TcpStream) {
    let socket = socket2::SockRef::from(stream);
    let tuned = socket.set_tcp_nodelay(true);
    #[cfg(target_os = "linux")]
    let tuned = tuned.and_then(|()| socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_DEADLINE)));
    if let Err(error) = tuned {
        tracing::debug!(%error, "a connection could not be tuned");
    }
}

/// Every route answers with and without a trailing slash; the router knows the form without.
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
    // A part of a path that was taken is a path again; `//` alone would not be, and stays as it came.
    if let Ok(path_and_query) = rewritten.parse() {
        let mut parts = std::mem::take(uri).into_parts();
        parts.path_and_query = Some(path_and_query);
        if let Ok(rewritten) = Uri::from_parts(parts) {
            *uri = rewritten;
        }
    }
}

/// The router lists the methods that have a handler; `OPTIONS` is answered beside it.
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
    // A peer that went away before it was accepted concerns nobody.
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
    fn one_trailing_slash_is_trimmed_and_the_query_kept() {
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
