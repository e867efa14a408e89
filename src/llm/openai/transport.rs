//! Connections to one upstream: pooled, over TLS if the address says so, made within a deadline,
//! and only to permitted addresses.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Request, Response, Uri};
use hyper_rustls::{HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use hyper_util::client::legacy::connect::{HttpConnector, capture_connection};
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tower::timeout::Timeout;
use tower::timeout::error::Elapsed;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, Service};

use super::fault::FaultKind;
use crate::config::is_private;

/// A connection idle for longer is closed: load balancers forget them after about a minute.
const IDLE: Duration = Duration::from_secs(50);
/// Idle connections kept.
const MAX_IDLE: usize = 256;
/// Bytes for the head of an answer and for reading ahead of its body.
const READ_AHEAD_BYTES: usize = 64 * 1024;
/// If a connection breaks within this time after a request was sent, it was dead already: the
/// upstream had closed a kept connection, or was restarting. No model works that fast. A connection
/// that breaks later may end work that was paid for, such as at a proxy's limit of 60 s for a
/// silent answer.
const EARLY: Duration = Duration::from_secs(2);
/// How often a silent connection is probed, so that a lost connection is noticed.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Connects within a deadline that covers name lookup, TCP and TLS.
type Connector = BoxCloneSyncService<Uri, MaybeHttpsStream<TokioIo<TcpStream>>, BoxError>;

/// Sends requests to one upstream over its connections.
#[derive(Clone, Debug)]
pub struct Transport(Client<Connector, Full<Bytes>>);

impl Transport {
    /// Connections that trust `tls`, made within `connect_timeout`. Without TLS, only private
    /// addresses are permitted.
    pub fn new(tls: &ClientConfig, is_https: bool, connect_timeout: Duration) -> Self {
        let mut system = GaiResolver::new();
        let resolver = tower::service_fn(move |name: Name| {
            let lookup = system.call(name);
            async move { allowed(lookup.await?.collect(), !is_https) }
        });
        let tcp = tcp_connector(resolver, connect_timeout);
        let builder = HttpsConnectorBuilder::new().with_tls_config(tls.clone());
        let builder = if is_https {
            builder.https_only()
        } else {
            builder.https_or_http()
        };
        let connector = builder.enable_http1().wrap_connector(tcp);
        let connector = Connector::new(Timeout::new(connector, connect_timeout));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(MAX_IDLE)
            .http1_max_buf_size(READ_AHEAD_BYTES)
            .build(connector);
        Self(client)
    }

    /// Sends a request and waits for the head of its answer. Redirects are not followed. Dropping
    /// the future cancels the request. Calls `on_connected` once there is a connection for it.
    ///
    /// # Errors
    /// `Connect`, `ConnectTimeout`, `Broken`, or `Malformed` if the answer is not HTTP.
    pub async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
        on_connected: impl FnOnce(),
    ) -> Result<Response<Incoming>, FaultKind> {
        let mut connection = capture_connection(&mut request);
        let sent_at = async {
            if connection.wait_for_connection_metadata().await.is_some() {
                on_connected();
            }
            Instant::now()
        };
        // `sent_at` ends with the request at the latest, whether there was a connection or not.
        let (response, sent_at) = tokio::join!(self.0.request(request), sent_at);
        response.map_err(|error| kind(&error, sent_at.elapsed() < EARLY))
    }
}

/// Makes TCP connections. `timeout` is for all addresses of a name. Each address gets an equal
/// part, so that a dead one leaves time for the next.
fn tcp_connector<R>(resolver: R, timeout: Duration) -> HttpConnector<R> {
    let mut tcp = HttpConnector::new_with_resolver(resolver);
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_keepalive(Some(KEEPALIVE));
    tcp.set_connect_timeout(Some(timeout));
    tcp
}

fn kind(error: &Error, is_early: bool) -> FaultKind {
    if error.is_connect() {
        let is_late = find::<Elapsed>(error).is_some()
            || find::<io::Error>(error).is_some_and(|io| io.kind() == io::ErrorKind::TimedOut);
        return match is_late {
            true => FaultKind::ConnectTimeout,
            false => FaultKind::Connect,
        };
    }
    match find::<hyper::Error>(error) {
        Some(error) if error.is_parse() => FaultKind::Malformed,
        Some(_) | None => FaultKind::Broken { is_early },
    }
}

/// The first cause of that type.
fn find<'a, E: std::error::Error + 'static>(
    error: &'a (dyn std::error::Error + 'static),
) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// TLS that trusts the system's certificates, or those that `SSL_CERT_FILE` and `SSL_CERT_DIR`
/// name; nobody if `is_needed` is false.
pub fn tls_config(is_needed: bool) -> Result<ClientConfig, super::Error> {
    let mut roots = RootCertStore::empty();
    if is_needed {
        // A certificate that cannot be read is left out. An upstream that needs it is not trusted.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err(super::Error::NoRoots);
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

/// The addresses of a name. Without TLS it refuses a name with a public address. This happens for
/// each connection, so a name whose address changes later is refused too.
fn allowed(
    addresses: Vec<SocketAddr>,
    only_private: bool,
) -> io::Result<std::vec::IntoIter<SocketAddr>> {
    if only_private && !addresses.iter().all(|address| is_private(address.ip())) {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "plain http is for private addresses only",
        ));
    }
    Ok(addresses.into_iter())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_dead_address_of_several_leaves_time_for_the_next() {
        let alive = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = alive.local_addr().unwrap().port();
        // Its queue is full, so the kernel accepts no further connection.
        let dead = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        let (dead, address) = (dead.unwrap(), SocketAddr::from(([127, 0, 0, 2], port)));
        dead.bind(&address.into()).unwrap();
        dead.listen(0).unwrap();
        let wait = Duration::from_millis(100);
        let _held: Vec<_> = (0..4)
            .map_while(|_| std::net::TcpStream::connect_timeout(&address, wait).ok())
            .collect();
        // A name with two addresses, of which the first does not respond.
        let twofold = tower::service_fn(|_: Name| {
            let addresses = [[127, 0, 0, 2], [127, 0, 0, 1]].map(|ip| SocketAddr::from((ip, 0)));
            std::future::ready(Ok::<_, io::Error>(Vec::from(addresses).into_iter()))
        });
        let mut connector = tcp_connector(twofold, Duration::from_secs(1));
        let uri = format!("http://upstream.example:{port}").parse().unwrap();
        let connecting = tokio::time::timeout(Duration::from_secs(1), connector.call(uri));
        assert!(connecting.await.unwrap().is_ok());
    }

    #[test]
    fn without_tls_a_name_with_one_public_address_is_refused() {
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        let mixed = vec![address("10.0.0.1:0"), address("93.184.216.34:0")];
        assert!(allowed(mixed.clone(), true).is_err());
        assert!(allowed(mixed, false).is_ok());
        let private = vec![address("10.0.0.1:0"), address("[fd00::1]:0")];
        assert_eq!(allowed(private, true).unwrap().count(), 2);
    }
}
