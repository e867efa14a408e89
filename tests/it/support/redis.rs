//! A real redis-server as a child of the test, and a way to it that can be slowed down and cut.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use prompt_service::config::{RedisConfig, Secret};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::DEADLINE;

/// Starts the server, prints its process id, and kills it when the test process closes the pipe or
/// ends in any way.
const WATCHDOG: &str =
    r#""$@" >/dev/null 2>&1 & echo $!; cat >/dev/null; kill -9 $! 2>/dev/null; wait"#;

/// A redis-server with a free port and a temporary folder. It ends when this is dropped, or with
/// the test process.
pub struct RedisServer {
    folder: TempDir,
    port: u16,
    is_cluster_node: bool,
    running: Option<Running>,
}

struct Running {
    watchdog: Child,
    server: Pid,
}

impl RedisServer {
    /// Starts one that keeps nothing on disk, and waits until it responds.
    pub fn start() -> Self {
        Self::start_as(false)
    }

    /// Starts a cluster of one node. It sends no redirections. Like any node it refuses a command
    /// whose keys are in different slots.
    pub fn start_cluster() -> Self {
        let server = Self::start_as(true);
        let slots: Vec<String> = (0..16_384).map(|slot| slot.to_string()).collect();
        let mut words = vec!["CLUSTER", "ADDSLOTS"];
        words.extend(slots.iter().map(String::as_str));
        let added = server.command(&words);
        assert!(added.starts_with("+OK"), "{added}");
        let deadline = Instant::now() + DEADLINE;
        while !server
            .command(&["CLUSTER", "INFO"])
            .contains("cluster_state:ok")
        {
            assert!(Instant::now() < deadline, "{}", server.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn start_as(is_cluster_node: bool) -> Self {
        let mut server = Self {
            folder: tempfile::tempdir().unwrap(),
            port: 0,
            is_cluster_node,
            running: None,
        };
        let deadline = Instant::now() + DEADLINE;
        // Another process may take the port after it was found free and before the server starts.
        let port = if is_cluster_node {
            free_port_of_a_node
        } else {
            free_port
        };
        while !server.try_launch(port()) {
            assert!(Instant::now() < deadline, "{}", server.log());
        }
        server
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    /// The configuration of a replica for tests in which this server runs or has ended. Its time
    /// limits are long, so that no reply counts as late.
    pub fn config(&self) -> RedisConfig {
        config_at(self.addr())
    }

    /// The configuration of a replica for tests in which this server is paused.
    pub fn impatient_config(&self) -> RedisConfig {
        impatient_config_at(self.addr())
    }

    /// Kills it: what it held is gone.
    pub fn stop(&mut self) {
        drop(self.running.take());
    }

    /// Starts it again, empty, on the same port.
    pub fn restart(&mut self) {
        self.stop();
        let deadline = Instant::now() + DEADLINE;
        while !self.try_launch(self.port) {
            assert!(Instant::now() < deadline, "{}", self.log());
        }
    }

    /// Pauses it: it accepts connections and sends nothing.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Continues it.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Runs a command, and returns the reply byte by byte as it was sent.
    pub fn command(&self, words: &[&str]) -> String {
        command(self.addr(), words).unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.running.as_ref().unwrap().server, signal).unwrap();
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    fn try_launch(&mut self, port: u16) -> bool {
        self.port = port;
        let _ = std::fs::remove_file(self.folder.path().join("log"));
        let mut watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, "sh"])
            .arg(binary())
            .args(["--bind", "127.0.0.1", "--port", &port.to_string()])
            .args(["--save", "", "--appendonly", "no", "--logfile", "log"])
            .args(if self.is_cluster_node {
                &["--cluster-enabled", "yes"][..]
            } else {
                &[]
            })
            .arg("--dir")
            .arg(self.folder.path())
            .current_dir(self.folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(watchdog.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let server = Pid::from_raw(line.trim().parse().unwrap()).unwrap();
        self.running = Some(Running { watchdog, server });
        // Another server may have the port.
        let itself = format!("process_id:{}\r\n", server.as_raw_nonzero());
        let deadline = Instant::now() + DEADLINE;
        loop {
            if command(self.addr(), &["INFO", "server"]).is_ok_and(|told| told.contains(&itself)) {
                return true;
            }
            if self.log().contains("Failed listening") || Instant::now() > deadline {
                self.stop();
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The watchdog kills the server, also a paused one, and ends after it.
        drop(self.watchdog.stdin.take());
        let _ = self.watchdog.wait();
    }
}

/// The configuration of a replica for a Redis at this address that runs or has ended.
pub fn config_at(addr: SocketAddr) -> RedisConfig {
    RedisConfig {
        url: Secret::new(format!("redis://{addr}")),
        prefix: "test:".into(),
        patience: DEADLINE,
    }
}

/// The same for a Redis that does not always respond. The time limit is longer than the service's,
/// and longer than a busy machine delays this process, because the replica must connect before
/// Redis is paused.
pub fn impatient_config_at(addr: SocketAddr) -> RedisConfig {
    RedisConfig {
        patience: 3 * RedisConfig::PATIENCE,
        ..config_at(addr)
    }
}

/// The server's program, fetched if necessary.
fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools/test_servers.py");
        let found = Command::new("python3")
            .arg(script)
            .arg("redis")
            .stderr(Stdio::inherit())
            .output()
            .expect("these tests need python3, which finds the redis-server to test with");
        assert!(
            found.status.success(),
            "no redis-server to test with: tests/tools/test_servers.py says why"
        );
        let found: serde_json::Value = serde_json::from_slice(&found.stdout).unwrap();
        PathBuf::from(found["server"].as_str().unwrap())
    })
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// A cluster's node also uses the port 10,000 above its port.
fn free_port_of_a_node() -> u16 {
    loop {
        let port = free_port();
        if let Some(other) = port.checked_add(10_000)
            && TcpListener::bind(("127.0.0.1", other)).is_ok()
        {
            return port;
        }
    }
}

fn command(addr: SocketAddr, words: &[&str]) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    let mut request = format!("*{}\r\n", words.len());
    for word in words {
        request += &format!("${}\r\n{word}\r\n", word.len());
    }
    request += "*1\r\n$4\r\nQUIT\r\n";
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// A proxy to a server that can be slowed down and cut.
pub struct Proxy {
    /// Where it listens.
    pub addr: SocketAddr,
    road: watch::Sender<Road>,
    _stop: DropGuard,
}

#[derive(Clone, Copy)]
struct Road {
    delay: Duration,
    is_open: bool,
}

impl Proxy {
    /// A proxy to `target` that neither delays nor loses anything.
    pub fn start(target: SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(128).unwrap();
        let addr = listener.local_addr().unwrap();
        let road = watch::Sender::new(Road {
            delay: Duration::ZERO,
            is_open: true,
        });
        let stop = CancellationToken::new();
        let (tasks, state, stopped) = (TaskTracker::new(), road.subscribe(), stop.clone());
        let inner = tasks.clone();
        tasks.spawn(async move {
            loop {
                let accepted = tokio::select! {
                    () = stopped.cancelled() => return,
                    accepted = listener.accept() => accepted,
                };
                let Ok((near, _)) = accepted else { continue };
                let (mut state, stopped) = (state.clone(), stopped.clone());
                if !state.borrow().is_open {
                    continue;
                }
                inner.spawn(async move {
                    let Ok(far) = tokio::net::TcpStream::connect(target).await else {
                        return;
                    };
                    let (near_read, near_write) = near.into_split();
                    let (far_read, far_write) = far.into_split();
                    let (there, back) = (state.clone(), state.clone());
                    tokio::select! {
                        () = stopped.cancelled() => {}
                        () = forward(near_read, far_write, there) => {}
                        () = forward(far_read, near_write, back) => {}
                        _ = state.wait_for(|road| !road.is_open) => {}
                    }
                });
            }
        });
        Self {
            addr,
            road,
            _stop: stop.drop_guard(),
        }
    }

    /// Delays everything by this much in each direction.
    pub fn delay(&self, delay: Duration) {
        self.road.send_modify(|road| road.delay = delay);
    }

    /// Breaks all connections, and lets none through.
    pub fn cut(&self) {
        self.road.send_modify(|road| road.is_open = false);
    }

    /// Lets connections through again.
    pub fn mend(&self) {
        self.road.send_modify(|road| road.is_open = true);
    }
}

/// Reads at once, and passes each piece on after the delay: high latency, not low bandwidth.
async fn forward(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, road: watch::Receiver<Road>) {
    let (sent, mut arriving) = mpsc::unbounded_channel();
    let send = async {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            let arrival = tokio::time::Instant::now() + road.borrow().delay;
            if sent.send((arrival, buffer[..read].to_vec())).is_err() {
                return;
            }
        }
    };
    let arrive = async {
        while let Some((arrival, bytes)) = arriving.recv().await {
            tokio::time::sleep_until(arrival).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = send => {}
        () = arrive => {}
    }
}
