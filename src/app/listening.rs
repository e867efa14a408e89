//! Listening addresses: bound early, listened on late.

use std::io;
use std::net::SocketAddr;

use anyhow::{Context, anyhow};
use tokio::net::{TcpListener, TcpSocket};

use super::preflight::Finding;

/// Connections that the kernel queues until they are accepted; the same as in Tokio's own
/// listeners.
const BACKLOG: u32 = 1024;

/// Binds an address without listening on it, so that no client has to wait for a start that takes
/// long or fails.
pub(super) fn bind(
    setting: &'static str,
    address: SocketAddr,
) -> anyhow::Result<(Option<TcpSocket>, Finding)> {
    match try_bind(address) {
        Ok(socket) => Ok((Some(socket), Finding::Fine(format!("{address} is free")))),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let finding = Finding::InUse {
                text: format!("{address} is in use by the server that runs"),
                refusal: cannot_listen(setting, address, &error),
            };
            Ok((None, finding))
        }
        Err(error) => Err(cannot_listen(setting, address, &error)),
    }
}

fn try_bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    // A port whose last connections have just ended counts as free.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// Why an address cannot be listened on, and how to fix it.
fn cannot_listen(setting: &'static str, address: SocketAddr, error: &io::Error) -> anyhow::Error {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "the system's other errors have no repair of their own"
    )]
    let problem = match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "another program uses that port; stop it, or set {setting} to another port (`ss -ltnp 'sport = :{}'` names the program)",
            address.port()
        ),
        io::ErrorKind::AddrNotAvailable => {
            "this machine has no such address; 127.0.0.1 is for this machine alone, 0.0.0.0 for all its networks".to_owned()
        }
        io::ErrorKind::PermissionDenied => {
            "this user may not use that port; choose one from 1024 on, or give the program the capability CAP_NET_BIND_SERVICE".to_owned()
        }
        _ => error.to_string(),
    };
    anyhow!("{setting}: cannot listen on {address}: {problem}")
}

/// Listens on an address that was bound before.
pub(super) fn listen(setting: &'static str, socket: TcpSocket) -> anyhow::Result<TcpListener> {
    let address = socket.local_addr().context(setting)?;
    socket
        .listen(BACKLOG)
        .map_err(|error| cannot_listen(setting, address, &error))
}
