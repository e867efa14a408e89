//! What all tests use: the real service on a free port, clients for it, and waiting for conditions.

mod client;
mod log;
pub mod postgres;
pub mod redis;
mod socket;
mod stream;
pub mod tls;
mod upstream;

use std::cell::RefCell;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches};
use prompt_service::app::App as Service;
use prompt_service::cli::Cli;
use prompt_service::config::{Config, Secret, Secrets, StoreConfig};
use prompt_service::credentials::{Keys, TokenId, TokenType};
use prompt_service::domain::{Timestamp, UserId};
use prompt_service::store::postgres::{OpenOptions as PostgresOptions, PostgresStore};
use prompt_service::store::sqlite::{OpenOptions, SqliteStore};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{OnceCell, oneshot};
use tokio::task::JoinHandle;
use tracing::dispatcher::{self, DefaultGuard};

pub use client::{Client, Request, Response};
pub use log::Log;
pub use socket::Socket;
pub use stream::{Stream, names, text_of};
pub use upstream::{Gate, Reply, Upstream, chunk};

use crate::store::TestableStore;

/// How long tests wait for a condition. Only a failing test takes this long; on a machine under
/// load a passing one may take a large part of it.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// How long tests wait for work at lowered priority. Beside other tests that use every core it gets
/// a few hundredths of one core. So a second of work may take a minute, and several minutes on a
/// slow machine.
pub const BACKGROUND_DEADLINE: Duration = Duration::from_secs(300);

/// Waits until the condition holds; the condition may await. Fails at the deadline, which is
/// [`DEADLINE`] if no other is given.
macro_rules! eventually {
    (within $deadline:expr; $condition:expr $(, $($message:tt)+)?) => {{
        let deadline = std::time::Instant::now() + $deadline;
        loop {
            if $condition {
                break;
            }
            assert!(
                std::time::Instant::now() < deadline,
                "never came true: {} {}",
                stringify!($condition),
                String::new() $(+ &format!($($message)+))?
            );
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }};
    ($($rest:tt)+) => {
        eventually!(within $crate::support::DEADLINE; $($rest)+)
    };
}

/// The password of every account that the tests make.
pub const PASSWORD: &str = "correct horse battery";

/// Whether this run of the tests is about a service on PostgreSQL: `TEST_STORE=postgres`.
pub fn on_postgres() -> bool {
    std::env::var_os("TEST_STORE").is_some_and(|store| store == "postgres")
}

/// Whether a test that is about the embedded store alone must be skipped, in a run about
/// PostgreSQL. The run's output then says which test it was and why: the harness would call it
/// passed.
pub fn skipped_on_postgres(why: &str) -> bool {
    if on_postgres() {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default();
        let line = format!("skipped on PostgreSQL: {name}: {why}\n");
        // Not by `eprintln!`, whose output the test harness shows only if the test fails.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    on_postgres()
}

/// In the last minute of a UTC day, waits for the next day. So all that a test then does falls into
/// one day and counts for one daily limit.
pub async fn within_a_day() {
    eventually!(Timestamp::now().unix_seconds() % 86_400 < 86_400 - 59);
}

/// The data folder of an app, and its database if that is not in the folder. Removed with its last
/// owner.
#[derive(Clone)]
pub struct Folder {
    folder: Arc<TempDir>,
    database: Arc<OnceCell<postgres::Database>>,
    /// The stores that tests have opened in it.
    opened: Arc<Mutex<Vec<Weak<dyn TestableStore>>>>,
}

impl Folder {
    /// An empty one.
    pub fn new() -> Self {
        Self {
            folder: Arc::new(tempfile::tempdir().unwrap()),
            database: Arc::default(),
            opened: Arc::default(),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Where an app on it stores.
    pub async fn store_config(&self) -> StoreConfig {
        if !on_postgres() {
            return config_in(self.path()).store;
        }
        let database = self.database.get_or_init(postgres::Database::migrated);
        StoreConfig::Postgres {
            data_dir: self.path().to_owned(),
            url: Secret::new(database.await.url()),
            pool_size: 8,
        }
    }

    /// The store in it, as the operator's commands open it: also beside a running app.
    pub async fn store(&self) -> Arc<dyn TestableStore> {
        let store: Arc<dyn TestableStore> = match self.store_config().await {
            StoreConfig::Sqlite { path, .. } => {
                Arc::new(SqliteStore::open(&path, OpenOptions::default()).unwrap())
            }
            StoreConfig::Postgres { url, .. } => {
                let options = PostgresOptions::default();
                Arc::new(PostgresStore::open(url.expose(), options).await.unwrap())
            }
        };
        self.opened.lock().unwrap().push(Arc::downgrade(&store));
        store
    }

    /// Waits until its files are not in use any more. A test that has opened a store in it must
    /// drop that store first.
    async fn is_let_go_of(&self) {
        let held = |store: &Weak<_>| store.strong_count() > 0;
        if self.opened.lock().unwrap().iter().any(held) {
            return;
        }
        match self.store_config().await {
            StoreConfig::Sqlite { .. } => eventually!(!self.has_open_files()),
            StoreConfig::Postgres { url, .. } => {
                let client = postgres::connect(url.expose()).await;
                let others =
                    "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'
                              AND datname = current_database() AND pid <> pg_backend_pid()";
                eventually!({
                    let others = client.query_one(others, &[]).await.unwrap();
                    others.get::<_, i64>(0) == 0
                });
            }
        }
    }

    /// Whether this process has one of its files open.
    fn has_open_files(&self) -> bool {
        let folder = self.path().canonicalize().unwrap();
        let files = std::fs::read_dir("/proc/self/fd").unwrap();
        // The link of a file that was closed meanwhile has no target.
        let mut files = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
        files.any(|file| file.starts_with(&folder))
    }
}

thread_local! {
    /// Where this thread of an app's runtime logs to: each app has a separate log.
    static LOGS_TO: RefCell<Option<DefaultGuard>> = const { RefCell::new(None) };
}

/// A running service. It has a separate runtime, so that it can be killed at any moment. It ends
/// when this is dropped.
pub struct App {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Where its metrics' own listener listens, if it has one.
    pub metrics_addr: Option<SocketAddr>,
    /// Where its data are.
    pub folder: Folder,
    /// What its tasks have logged.
    pub log: Log,
    keys: Keys,
    client: Client,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<anyhow::Result<()>>,
    runtime: Option<Runtime>,
}

/// The configuration of an empty environment, with the data in `folder`, any free port, and no
/// throttle on prompts.
pub fn config_in(folder: &Path) -> Config {
    let folder = folder.to_str().unwrap();
    // The environment in which the tests run must not change their results.
    let command = Cli::command().mut_args(|arg| arg.env(clap::builder::Resettable::Reset));
    let matches = command.get_matches_from([
        "prompt-service",
        "--data-dir",
        folder,
        "--bind-addr",
        "127.0.0.1:0",
        "--prompt-throttle",
        "off",
    ]);
    let cli = Cli::from_arg_matches(&matches).unwrap();
    Config::load(cli.settings, Secrets::default()).unwrap()
}

/// Trusts the local peer as a proxy, so that tests can name any client address.
pub fn behind_proxy(config: &mut Config) {
    config.server.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
}

/// Starts a service on an empty folder: see [`config_in`] for what `adjust` starts from.
pub async fn spawn_app(adjust: impl FnOnce(&mut Config)) -> App {
    spawn_app_in(Folder::new(), adjust).await
}

/// Starts a service on a folder that an earlier service used.
pub async fn spawn_app_in(folder: Folder, adjust: impl FnOnce(&mut Config)) -> App {
    try_spawn_app_in(folder, adjust).await.unwrap()
}

/// The same, where the start may be refused.
pub async fn try_spawn_app_in(
    folder: Folder,
    adjust: impl FnOnce(&mut Config),
) -> anyhow::Result<App> {
    let mut config = config_in(folder.path());
    config.store = folder.store_config().await;
    adjust(&mut config);
    let key = config.accounts.secret_key.clone();
    let log = Log::default();
    let dispatch = log.dispatch();
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .on_thread_start(move || LOGS_TO.set(Some(dispatcher::set_default(&dispatch))))
        .on_thread_stop(|| LOGS_TO.set(None))
        .enable_all()
        .build()?;
    let built = runtime.spawn(Service::build(config)).await.unwrap();
    let service = match built {
        Ok(service) => service,
        Err(error) => {
            runtime.shutdown_background();
            return Err(error);
        }
    };
    let key = match key {
        Some(key) => key.expose().to_owned(),
        None => std::fs::read_to_string(folder.path().join("secret.key"))?,
    };
    let (addr, metrics_addr) = (service.local_addr()?, service.metrics_addr()?);
    let (stop, stopped) = oneshot::channel();
    let shutdown = async {
        // A sender that is dropped stops the service too.
        let _ = stopped.await;
    };
    let served = runtime.spawn(service.serve(Box::pin(shutdown)));
    Ok(App {
        addr,
        metrics_addr,
        folder,
        log,
        keys: Keys::new(key.trim_end_matches('\n'), []),
        client: Client::new(addr),
        stop: Some(stop),
        served,
        runtime: Some(runtime),
    })
}

impl App {
    /// A client without credentials.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// A request to `path` without credentials.
    pub fn get(&self, path: &str) -> Request {
        self.client.get(path)
    }

    /// A post to `path` without credentials.
    pub fn post(&self, path: &str) -> Request {
        self.client.post(path)
    }

    /// Registers an account and logs it in.
    pub async fn user(&self, name: &str) -> User {
        let registered = self.register(name).await;
        assert_eq!(registered.status, 201, "{registered:?}");
        let (access, refresh) = self.login(name).await;
        User {
            id: registered.json()["id"].as_i64().unwrap(),
            client: self.client.with_bearer(&access),
            access,
            refresh,
        }
    }

    /// Registers an account with [`PASSWORD`].
    pub async fn register(&self, name: &str) -> Response {
        let body = serde_json::json!({
            "username": name, "email": format!("{name}@example.org"), "password": PASSWORD,
        });
        self.post("/api/auth/register/").json(&body).send().await
    }

    /// Logs an account in: its access and its refresh token.
    pub async fn login(&self, name: &str) -> (String, String) {
        let answer = self.try_login(name, PASSWORD).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let token = |kind: &str| answer.json()[kind].as_str().unwrap().to_owned();
        (token("access"), token("refresh"))
    }

    /// The response to a login with that password.
    pub async fn try_login(&self, name: &str, password: &str) -> Response {
        let body = serde_json::json!({ "username": name, "password": password });
        self.post("/api/auth/login/").json(&body).send().await
    }

    /// Logs an account in with a session. Returns the cookie's secret and the response.
    pub async fn login_session(&self, name: &str) -> (String, Response) {
        let body = serde_json::json!({ "username": name, "password": PASSWORD, "session": true });
        let answer = self.post("/api/auth/login/").json(&body).send().await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let cookie = answer.header("set-cookie").unwrap();
        let (_name, secret) = cookie.split_once('=').unwrap();
        (secret.split(';').next().unwrap().to_owned(), answer)
    }

    /// A token as the service signs it, issued at `issued_at` for `lifetime`.
    pub fn token(
        &self,
        kind: TokenType,
        user_id: i64,
        issued_at: Timestamp,
        lifetime: Duration,
    ) -> String {
        let id = TokenId::random().unwrap();
        self.keys
            .sign(kind, Some(UserId(user_id)), id, issued_at, lifetime)
    }

    /// An access token that expired a minute ago.
    pub fn expired_token(&self, user_id: i64) -> String {
        let now = Timestamp::now().unix_seconds();
        self.token(
            TokenType::Access,
            user_id,
            Timestamp::from_unix_seconds(now - 120),
            Duration::from_secs(60),
        )
    }

    /// The value of one line of `/metrics`, such as `http_requests_total{method="GET",…}`. `None`
    /// if there is no such line.
    pub async fn metric(&self, series: &str) -> Option<f64> {
        let client = self
            .metrics_addr
            .map_or_else(|| self.client.clone(), Client::new);
        let text = client.get("/metrics").send().await.text();
        text.lines().find_map(|line| {
            let value = line.strip_prefix(series)?.strip_prefix(' ')?;
            value.parse().ok()
        })
    }

    /// Opens a WebSocket at `path_and_query` with these further headers. Returns the response as an
    /// error if the handshake is refused.
    pub async fn socket(
        &self,
        path_and_query: &str,
        headers: &[(&str, &str)],
    ) -> Result<Socket, Response> {
        Socket::connect(self.addr, path_and_query, headers).await
    }

    /// Requests the service to stop, as a signal does, and does not wait. Call it only once.
    pub fn begin_stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// Waits until the service has stopped by itself, and returns its folder.
    pub async fn stopped(mut self) -> Folder {
        let served = tokio::time::timeout(DEADLINE, &mut self.served).await;
        served
            .expect("the service stops in time")
            .expect("serving does not panic")
            .expect("serving ends well");
        self.folder.clone()
    }

    /// Stops the service in order, and returns its folder.
    pub async fn stop(mut self) -> Folder {
        self.begin_stop();
        self.stopped().await
    }

    /// Whether the service is still serving or stopping.
    pub fn is_running(&self) -> bool {
        !self.served.is_finished()
    }

    /// Drops every task of the service at once, and returns its folder when none of its files is
    /// open any more.
    pub async fn kill(mut self) -> Folder {
        let runtime = self.runtime.take().unwrap();
        // Waits until all tasks are dropped. Like dropping a runtime, this must not happen on an
        // async thread.
        tokio::task::spawn_blocking(move || runtime.shutdown_timeout(DEADLINE))
            .await
            .unwrap();
        // The threads of the store, or of the database, finish what they have begun.
        self.folder.is_let_go_of().await;
        self.folder.clone()
    }
}

impl Drop for App {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A registered account with its tokens.
pub struct User {
    /// Its id.
    pub id: i64,
    /// Its access token.
    pub access: String,
    /// Its refresh token.
    pub refresh: String,
    /// A client that sends the access token.
    pub client: Client,
}

/// An API key as its user got it.
pub struct Key {
    /// Its id.
    pub id: String,
    /// Its text.
    pub text: String,
    /// A client that sends the text.
    pub client: Client,
}

impl Key {
    /// The path of the key's own resource.
    pub fn path(&self) -> String {
        format!("/api/keys/{}", self.id)
    }
}

impl User {
    /// Makes an API key of that name, which must succeed.
    pub async fn api_key(&self, name: &str) -> Key {
        self.api_key_with(&serde_json::json!({ "name": name }))
            .await
    }

    /// Makes an API key by that body, which must succeed.
    pub async fn api_key_with(&self, body: &serde_json::Value) -> Key {
        let made = self.post("/api/keys").json(body).send().await;
        assert_eq!(made.status, 201, "{made:?}");
        let member = |name: &str| made.json()[name].as_str().unwrap().to_owned();
        let text = member("key");
        Key {
            id: member("id"),
            client: self.client.with_bearer(&text),
            text,
        }
    }

    /// A request to `path` as this user.
    pub fn get(&self, path: &str) -> Request {
        self.client.get(path)
    }

    /// A post to `path` as this user.
    pub fn post(&self, path: &str) -> Request {
        self.client.post(path)
    }

    /// A deletion of `path` as this user.
    pub fn delete(&self, path: &str) -> Request {
        self.client.delete(path)
    }

    /// Posts a prompt, which must succeed: its id.
    pub async fn prompt(&self, text: &str) -> i64 {
        let answer = self.try_prompt(text).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.json()["id"].as_i64().unwrap()
    }

    /// Posts a prompt.
    pub async fn try_prompt(&self, text: &str) -> Response {
        let body = serde_json::json!({ "prompt": text });
        self.post("/api/prompts/").json(&body).send().await
    }

    /// Searches, which must succeed.
    pub async fn search(&self, query: &str, k: usize) -> Response {
        let query: String = form_urlencoded::byte_serialize(query.as_bytes()).collect();
        let path = format!("/api/prompts/similar/?q={query}&k={k}");
        let answer = self.get(&path).send().await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer
    }

    /// The ids that a search finds, nearest first.
    pub async fn similar(&self, query: &str, k: usize) -> Vec<i64> {
        self.search(query, k).await.ids()
    }

    /// All prompts of this user by listing, newest first, through as many pages as it takes.
    pub async fn all_prompts(&self) -> Vec<serde_json::Value> {
        let (mut all, mut path) = (Vec::new(), "/api/prompts/?limit=100".to_owned());
        loop {
            let page = self.get(&path).send().await;
            assert_eq!(page.status, 200, "{page:?}");
            let page = page.json();
            all.extend(page["results"].as_array().unwrap().iter().cloned());
            let Some(next) = page["next"].as_str() else {
                return all;
            };
            path = format!("/api/prompts/?limit=100&cursor={next}");
        }
    }
}
