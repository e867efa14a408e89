//! The release binary, before an upstream.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::client::Connection;

/// A running service with one user. Ended when dropped.
pub struct Service {
    /// Where it listens.
    pub addr: SocketAddr,
    /// The user's token.
    pub access: String,
    process: Child,
    folder: TempDir,
}

impl Service {
    /// Starts it and registers a user. Its data are in `STREAMS_BENCH_DIR`, or in the system's
    /// temporary folder.
    pub async fn start(upstream: SocketAddr) -> Self {
        let parent = std::env::var_os("STREAMS_BENCH_DIR")
            .map_or_else(std::env::temp_dir, std::path::PathBuf::from);
        let folder = tempfile::tempdir_in(parent).expect("a folder");
        let mut process = Command::new(env!("CARGO_BIN_EXE_prompt-service"))
            .current_dir(folder.path())
            .env_clear()
            .env("DATA_DIR", folder.path())
            .env("BIND_ADDR", "127.0.0.1:0")
            .env("PROMPT_THROTTLE", "off")
            .env("ACCESS_TOKEN_LIFETIME", "1h")
            .env("OPENAI_BASE_URL", format!("http://{upstream}/v1"))
            // One user holds all the streams, and may hold half of what there is.
            .env("OPENAI_MAX_IN_FLIGHT", "2048")
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut log = BufReader::new(process.stdout.take().expect("a pipe")).lines();
        let addr = loop {
            let line = log.next().expect("the address is logged").expect("text");
            let line: Value = serde_json::from_str(&line).expect("JSON");
            let fields = line.get("fields").unwrap_or(&line);
            if fields["message"] == "listening" {
                let addr = fields["addr"].as_str().expect("an address");
                break addr.parse().expect("an address");
            }
        };
        // Read on to the end, so that the pipe is never full.
        std::thread::spawn(move || log.for_each(drop));
        let mut connection = Connection::open(addr, None).await;
        let account = json!({ "username": "bench", "email": "b@example.org", "password": "Str0ng-enough-9x" });
        connection.send("/api/auth/register/", &account).await;
        connection.receive().await;
        connection.send("/api/auth/login/", &account).await;
        let (_, tokens) = connection.receive().await;
        let access = tokens["access"].as_str().expect("a token").to_owned();
        Self {
            addr,
            access,
            process,
            folder,
        }
    }

    /// Its resident memory in MiB.
    pub fn memory(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id()));
        let status = status.expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next());
        kib.and_then(|kib| kib.parse::<f64>().ok())
            .expect("a number")
            / 1024.0
    }

    /// How long the disk takes to keep something.
    pub fn commit(&self) -> Duration {
        let path = self.folder.path().join("commit");
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(path)
            .expect("a file");
        let began = Instant::now();
        file.write_all(&[0; 4096]).expect("room");
        file.sync_data().expect("a disk");
        began.elapsed()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
