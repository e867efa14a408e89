//! Certificates, and a proxy that ends TLS before a server.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use tempfile::TempDir;

/// A certificate or key of `tests/tools/certificates.py`, which lists them.
pub fn pem(name: &str) -> PathBuf {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let made = Command::new("python3")
            .arg(tool("certificates.py"))
            .arg(folder.path())
            .status()
            .expect("these tests need python3, which makes their certificates");
        assert!(made.success(), "tests/tools/certificates.py made none");
        folder
    });
    folder.path().join(name)
}

fn tool(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/tools")
        .join(name)
}

/// A proxy to a server on this machine that speaks TLS to the client.
pub struct TlsProxy {
    /// Where it listens.
    pub port: u16,
    process: Child,
}

impl TlsProxy {
    /// To a Redis on `target`, as the server of this certificate.
    pub fn to_redis(target: u16, certificate: &str) -> Self {
        Self::start(target, certificate, &[])
    }

    /// To a PostgreSQL on `target`.
    pub fn to_postgres(target: u16, certificate: &str) -> Self {
        Self::start(target, certificate, &["postgres"])
    }

    fn start(target: u16, certificate: &str, kind: &[&str]) -> Self {
        let mut process = Command::new("python3")
            .arg(tool("tls_proxy.py"))
            .arg(target.to_string())
            .arg(pem(&format!("{certificate}.pem")))
            .arg(pem(&format!("{certificate}.key")))
            .args(kind)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        Self {
            port: line.trim().parse().expect("the proxy says its port"),
            process,
        }
    }
}

impl Drop for TlsProxy {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}
