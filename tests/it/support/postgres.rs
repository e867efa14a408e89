//! Real PostgreSQL servers: one for all tests of the binary, and others for tests that stop or
//! pause their server.

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, OnceLock};
use std::time::{Duration, Instant};

use prompt_service::store::postgres::{OpenOptions, PostgresStore};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::runtime::Builder;
use tokio_postgres::{Client, NoTls};

use super::DEADLINE;

/// The releases that the tests start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// For tests in which the release makes no difference: 16, or the one that `TEST_POSTGRES`
    /// names.
    Usual,
    /// PostgreSQL 18.
    Eighteen,
}

impl Release {
    fn installation(self) -> &'static Installation {
        static USUAL: LazyLock<Installation> = LazyLock::new(|| {
            let told = std::env::var("TEST_POSTGRES");
            Installation::told(&told.unwrap_or_else(|_| found("postgres")))
        });
        static EIGHTEEN: LazyLock<Installation> =
            LazyLock::new(|| Installation::told(&found("postgres18")));
        match self {
            Self::Usual => &USUAL,
            Self::Eighteen => &EIGHTEEN,
        }
    }
}

/// Where the programs are.
struct Installation {
    bin: PathBuf,
    uid: Option<u32>,
}

/// What `tests/tools/test_servers.py` says of a server that it knows by this name.
fn found(server: &str) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tools/test_servers.py");
    let answer = Command::new("python3")
        .args([script.as_os_str(), server.as_ref()])
        .stderr(Stdio::inherit())
        .output()
        .expect("the tests start a PostgreSQL server, which python3 fetches for them");
    assert!(
        answer.status.success(),
        "tests/tools/test_servers.py found no PostgreSQL server"
    );
    String::from_utf8(answer.stdout).unwrap()
}

impl Installation {
    fn told(told: &str) -> Self {
        let told: serde_json::Value = serde_json::from_str(told.trim()).unwrap();
        Self {
            bin: PathBuf::from(told["bin"].as_str().unwrap()),
            uid: told["uid"].as_u64().map(|uid| u32::try_from(uid).unwrap()),
        }
    }

    /// A command that runs as the account the server runs as.
    fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(self.bin.join(program));
        if let Some(uid) = self.uid {
            command.uid(uid).gid(uid);
        }
        command.stdin(Stdio::null()).current_dir("/");
        command
    }
}

/// Starts the server as its child and waits for the end of its input, which comes when the test
/// process ends in any way. Then it stops the server (which may be paused) and, if asked for,
/// removes its folder.
const SUPERVISOR: &str = r#"
    "$1" -D "$2" -c port="$3" -c fsync="$4" -c listen_addresses=127.0.0.1 -c unix_socket_directories= \
        -c max_connections=300 -c dynamic_shared_memory_type=mmap -c autovacuum_naptime=1s >>"$2/log" 2>&1 &
    server=$!
    echo $server >"$2/supervised"
    read -r word
    kill -QUIT $server
    kill -CONT $server $(ps -o pid= --ppid $server 2>/dev/null) 2>/dev/null
    wait $server
    [ "$word" = keep ] || { rm -rf "$2"; rmdir "${2%/*}"; }
"#;

/// A running server. Stopped when dropped.
pub struct Postgres {
    installation: &'static Installation,
    folder: PathBuf,
    port: u16,
    is_durable: bool,
    supervisor: Option<Child>,
    _parent: TempDir,
}

impl Postgres {
    /// Makes a database cluster in a temporary folder and starts a server on it. `is_durable`:
    /// whether commits wait for the disk.
    pub fn start(is_durable: bool) -> Self {
        Self::start_release(Release::Usual, is_durable)
    }

    fn start_release(release: Release, is_durable: bool) -> Self {
        let installation = release.installation();
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("cluster");
        std::fs::create_dir(&folder).unwrap();
        if let Some(uid) = installation.uid {
            chown(parent.path(), Some(uid), Some(uid)).unwrap();
            chown(&folder, Some(uid), Some(uid)).unwrap();
        }
        let made = installation
            .command("initdb")
            .args(["--no-sync", "--auth=trust", "--username=postgres"])
            .args(["--encoding=UTF8", "--locale=C", "--pgdata"])
            .arg(&folder)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let mut server = Self {
            installation,
            folder,
            port: 0,
            is_durable,
            supervisor: None,
            _parent: parent,
        };
        // Between finding a free port and taking it another process may take it.
        for _ in 0..5 {
            server.port = free_port();
            if server.try_resume() {
                return server;
            }
        }
        panic!("no server started: {}", server.log());
    }

    /// The URL of a database of it.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// Stops the server at once, as a crash does; its data stay.
    pub fn stop(&mut self) {
        self.end("keep\n");
    }

    /// Starts it again on its port.
    pub fn resume(&mut self) {
        assert!(self.try_resume(), "{}", self.log());
    }

    /// Pauses (`STOP`) or continues (`CONT`) the server and all its processes.
    pub fn signal(&self, signal: &str) {
        let server = self.pid();
        match signal {
            "STOP" => {
                // While it is paused, the server itself starts no further process.
                stop(server);
                children(server).into_iter().for_each(stop);
            }
            "CONT" => {
                // The server itself continues last, for the same reason.
                for process in children(server).into_iter().chain([server]) {
                    send(process, Signal::CONT);
                }
            }
            other => panic!("{other}"),
        }
    }

    fn pid(&self) -> i32 {
        let text = std::fs::read_to_string(self.folder.join("supervised")).unwrap();
        text.trim().parse().unwrap()
    }

    /// Whether the server that was started has reported that it is ready. The port is not asked:
    /// another server may have it.
    fn is_ready(&self) -> bool {
        let read = |name| std::fs::read_to_string(self.folder.join(name)).unwrap_or_default();
        let (supervised, told) = (read("supervised"), read("postmaster.pid"));
        let told: Vec<&str> = told.lines().map(str::trim).collect();
        matches!(told[..], [process, .., "ready"] if process == supervised.trim())
    }

    fn try_resume(&mut self) -> bool {
        let _ = std::fs::remove_file(self.folder.join("supervised"));
        let fsync = if self.is_durable { "on" } else { "off" };
        let mut command = Command::new("sh");
        if let Some(uid) = self.installation.uid {
            command.uid(uid).gid(uid);
        }
        let supervisor = command
            .args(["-c", SUPERVISOR, "sh"])
            .arg(self.installation.bin.join("postgres"))
            .arg(&self.folder)
            .args([&self.port.to_string(), fsync])
            .current_dir("/")
            .stdin(Stdio::piped())
            // An interrupt from the terminal must not end this process. It ends the tests, and the
            // end of their pipe then ends this process.
            .process_group(0)
            .spawn()
            .unwrap();
        self.supervisor = Some(supervisor);
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            let ready = self
                .installation
                .command("pg_isready")
                .args(["--quiet", "--host=127.0.0.1", "--port"])
                .arg(self.port.to_string())
                .status()
                .unwrap();
            if ready.success() && self.is_ready() {
                return true;
            }
            if self.log().contains("Address already in use") {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.end("keep\n");
        let _ = std::fs::remove_file(self.folder.join("log"));
        false
    }

    fn end(&mut self, word: &str) {
        if let Some(mut supervisor) = self.supervisor.take() {
            // A supervisor that has ended already reads nothing.
            if let Some(mut stdin) = supervisor.stdin.take() {
                let _ = stdin.write_all(word.as_bytes());
            }
            let _ = supervisor.wait();
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.end("remove\n");
    }
}

/// Pauses a process and waits until it is paused. A process that has ended meanwhile counts as
/// paused.
fn stop(process: i32) {
    send(process, Signal::STOP);
    let deadline = Instant::now() + DEADLINE;
    while stat(process).is_some_and(|(state, _)| !"TZ".contains(&state)) {
        assert!(Instant::now() < deadline, "process {process} runs on");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn send(process: i32, signal: Signal) {
    match kill_process(Pid::from_raw(process).unwrap(), signal) {
        Ok(()) | Err(Errno::SRCH) => {}
        Err(error) => panic!("{error}"),
    }
}

/// The state of a process, and its parent; `None` if there is none of that number.
fn stat(process: i32) -> Option<(String, i32)> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name before it may hold anything.
    let mut words = text.rsplit_once(')')?.1.split_whitespace();
    Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
}

fn children(parent: i32) -> Vec<i32> {
    let all = std::fs::read_dir("/proc").unwrap();
    let numbers = all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    numbers
        .filter(|process| stat(*process).is_some_and(|(_, its)| its == parent))
        .collect()
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// The server of a release that all tests share; each test has a separate database. The supervisor
/// ends a moment after the test process.
fn shared(release: Release) -> &'static Postgres {
    static USUAL: OnceLock<Postgres> = OnceLock::new();
    static EIGHTEEN: OnceLock<Postgres> = OnceLock::new();
    let shared = match release {
        Release::Usual => &USUAL,
        Release::Eighteen => &EIGHTEEN,
    };
    shared.get_or_init(|| {
        let server = Postgres::start_release(release, false);
        // On a new thread: the caller may be on a thread of a runtime, which must not block.
        std::thread::scope(|scope| {
            let made = scope.spawn(|| {
                Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .unwrap()
                    .block_on(async {
                        let admin = connect(&server.url("postgres")).await;
                        admin
                            .batch_execute("CREATE DATABASE migrated")
                            .await
                            .unwrap();
                        let store =
                            PostgresStore::open(&server.url("migrated"), OpenOptions::default())
                                .await
                                .unwrap();
                        store.close().await;
                    });
            });
            made.join().unwrap();
        });
        server
    })
}

/// A connection to a database that uses nothing of the store's code.
pub async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::runtime::Handle::current().spawn(connection);
    client
}

/// A database for one test, dropped with this.
pub struct Database {
    release: Release,
    name: String,
}

impl Database {
    /// An empty one, not migrated.
    pub async fn empty() -> Self {
        Self::make(Release::Usual, "").await
    }

    /// A migrated one without rows.
    pub async fn migrated() -> Self {
        Self::migrated_on(Release::Usual).await
    }

    /// The same on a server of this release.
    pub async fn migrated_on(release: Release) -> Self {
        Self::make(release, "TEMPLATE migrated").await
    }

    async fn make(release: Release, template: &str) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("test_{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let server = tokio::task::spawn_blocking(move || shared(release))
            .await
            .unwrap();
        let admin = connect(&server.url("postgres")).await;
        admin
            .batch_execute(&format!("CREATE DATABASE {name} {template}"))
            .await
            .unwrap();
        Self { release, name }
    }

    /// Its URL.
    pub fn url(&self) -> String {
        shared(self.release).url(&self.name)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its server listens, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        shared(self.release).port
    }

    /// A connection to it that uses nothing of the store's code.
    pub async fn client(&self) -> Client {
        connect(&self.url()).await
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let (url, name) = (
            shared(self.release).url("postgres"),
            std::mem::take(&mut self.name),
        );
        // On a new runtime: the test's runtime may be ending. A failure only costs disk space.
        let dropped = std::thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let (admin, connection) = tokio_postgres::connect(&url, NoTls)
                    .await
                    .map_err(std::io::Error::other)?;
                tokio::runtime::Handle::current().spawn(connection);
                admin
                    .batch_execute(&format!("DROP DATABASE {name} WITH (FORCE)"))
                    .await
                    .map_err(std::io::Error::other)
            })
        });
        let _ = dropped.join();
    }
}
