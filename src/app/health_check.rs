//! The health check of a running service: one request to the service's port. Containers run it as
//! their health check, so that the image needs no other program.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, ensure};

/// How long connecting, and each read and write, may take. `/readyz` gives the store two seconds,
/// so this is a little more.
const PATIENCE: Duration = Duration::from_secs(3);
/// The length of `HTTP/1.1 200`, the part of the response that decides.
const STATUS_LINE_BYTES: usize = 12;

/// Asks the service that listens on `bind_addr` on this machine whether it is alive, or with
/// `ready` whether it is ready. Blocks for a few seconds at most. It uses no other setting, so it
/// works whatever settings the server was started with.
///
/// # Errors
/// One line: no fixed port, no server, or a response other than 200.
pub fn run(bind_addr: SocketAddr, ready: bool) -> anyhow::Result<()> {
    ensure!(
        bind_addr.port() != 0,
        "BIND_ADDR: port 0 does not say where the server listens"
    );
    let path = if ready { "/readyz" } else { "/healthz" };
    let answer = ask(reachable(bind_addr), path)
        .with_context(|| format!("no answer from {bind_addr}{path}"))?;
    let status = answer.strip_prefix("HTTP/1.1 ").unwrap_or("no HTTP");
    ensure!(
        status == "200",
        "{bind_addr}{path} answered {status}, not 200"
    );
    Ok(())
}

/// The first bytes of the response: its protocol and status.
fn ask(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut connection = TcpStream::connect_timeout(&address, PATIENCE)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.set_write_timeout(Some(PATIENCE))?;
    // In one write: a server may respond and disconnect after the first bytes that it reads.
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    connection.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    // Read to the end, although only the status counts: otherwise the server would log a broken
    // connection.
    connection.take(64 * 1024).read_to_end(&mut answer)?;
    answer.truncate(STATUS_LINE_BYTES);
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Where a listener on every address is reached from this machine.
pub(super) fn reachable(bind_addr: SocketAddr) -> SocketAddr {
    let ip = match bind_addr.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip @ (IpAddr::V4(_) | IpAddr::V6(_)) => ip,
    };
    SocketAddr::new(ip, bind_addr.port())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// A server for one request: returns where it listens, and afterwards the request.
    fn answering(answer: &'static [u8]) -> (SocketAddr, thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let read = connection.read(&mut request).unwrap();
            connection.write_all(answer).unwrap();
            String::from_utf8_lossy(&request[..read]).into_owned()
        });
        (address, server)
    }

    #[test]
    fn status_200_is_healthy_and_readiness_has_its_own_path() {
        for (ready, path) in [(false, "/healthz"), (true, "/readyz")] {
            let (address, server) = answering(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}");
            run(address, ready).unwrap();
            let request = server.join().unwrap();
            assert!(
                request.starts_with(&format!("GET {path} HTTP/1.1\r\n")),
                "{request}"
            );
        }
    }

    #[test]
    fn every_other_answer_is_an_error() {
        for (answer, told) in [
            (
                &b"HTTP/1.1 503 Service Unavailable\r\n\r\n"[..],
                "answered 503",
            ),
            (&b"SSH-2.0-OpenSSH\r\n"[..], "answered no HTTP"),
            (&b""[..], "answered no HTTP"),
        ] {
            let (address, server) = answering(answer);
            let error = run(address, true).unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
            server.join().unwrap();
        }
    }

    #[test]
    fn missing_server_and_missing_port_are_errors() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let error = format!("{:#}", run(address, false).unwrap_err());
        assert!(error.starts_with("no answer from 127.0.0.1:"), "{error}");
        let error = run("127.0.0.1:0".parse().unwrap(), false).unwrap_err();
        assert!(error.to_string().starts_with("BIND_ADDR: "));
    }

    #[test]
    fn a_listener_on_every_address_is_asked_on_loopback() {
        for (bound, asked) in [
            ("0.0.0.0:8000", "127.0.0.1:8000"),
            ("[::]:8000", "[::1]:8000"),
            ("10.1.2.3:80", "10.1.2.3:80"),
        ] {
            assert_eq!(
                reachable(bound.parse().unwrap()),
                asked.parse::<SocketAddr>().unwrap()
            );
        }
    }
}
