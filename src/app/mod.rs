//! The composition root: builds and wires all parts from the configuration, serves, and stops the
//! parts in order. Only this module knows the implementation behind each trait.

mod background;
pub mod check;
mod check_prices;
mod check_upstream;
pub mod health_check;
pub mod keys;
mod listening;
mod preflight;
pub mod prices;
pub mod secret_files;
mod shared;
mod store;
pub mod transfer_commands;
pub mod usage;
pub mod users;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use axum::http::HeaderValue;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, OptionFuture};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use self::listening::listen;
use self::preflight::{Preflight, connection_room};
use self::shared::Shared;
use self::store::Store;
use crate::api::{self, AppState, Bounds, Connections, Documents, Lifecycle, ServerDeps};
use crate::config::Config;
use crate::credentials::{HashPool, Keys};
use crate::data_dir::{self, DataDir};
use crate::embed::{self, BackgroundEmbedder, Embedder};
use crate::fair_semaphore::FairSemaphore;
use crate::llm;
use crate::memory_budget::MemoryBudget;
use crate::realtime::Hub;
use crate::redis;
use crate::search::Similarity;
use crate::services::accounts::{Accounts, KnownUsers};
use crate::services::api_keys::ApiKeys;
use crate::services::embeddings::Embeddings;
use crate::services::health::{Health, StoreHealth};
use crate::services::models::Models;
use crate::services::prompts::{self, Prompts};
use crate::services::reembedding::{Reembedding, ReembeddingProgress};
use crate::services::search::Searches;
use crate::services::usage::Usages;
use crate::store::postgres::ServerLock;
use crate::telemetry::Metrics;

/// Logins that may wait for a thread: about two seconds of hashing on two cores. A client that
/// would wait longer is refused.
const LOGIN_QUEUE: usize = 256;
/// Requests that read prompts from the store and write them as JSON at once: enough to keep the
/// store's readers busy, and few enough that large responses to one user do not delay a small one
/// to another.
const READS_AT_ONCE: usize = 16;
/// Requests of all users that may wait for their turn to read.
const READS_WAITING: usize = 4096;
/// Connections to the metrics' own listener at once: scrapers and health checks are few. They do
/// not count towards `MAX_CONNECTIONS`, so that the metrics can be read when that limit is reached.
const METRICS_CONNECTIONS: usize = 32;

/// A built service that listens and does not serve yet.
pub struct App {
    listener: TcpListener,
    metrics_listener: Option<TcpListener>,
    connections: Arc<Connections>,
    state: AppState,
    store: Store,
    server_lock: Option<ServerLock>,
    llm: Arc<llm::Client>,
    embedder: Arc<Embedder>,
    similarity: Arc<dyn Similarity>,
    reembedding: Reembedding,
    redis: Option<redis::ConnectionManager>,
    _locks: Vec<data_dir::FileLock>,
}

impl App {
    /// Builds everything. First come the checks that can refuse a start (`preflight`), then the
    /// steps that make files: the data folder and its lock, the store, the key. Listening comes
    /// last.
    ///
    /// # Errors
    /// One line that names the setting at fault and the repair.
    // Boxed, as `serve` is: otherwise each program that awaits it compiles the service once more.
    pub fn build(config: Config) -> BoxFuture<'static, anyhow::Result<Self>> {
        Self::build_now(config).boxed()
    }

    async fn build_now(config: Config) -> anyhow::Result<Self> {
        let started = Instant::now();
        for sentence in config.misspelt.iter().chain(&config.unused) {
            tracing::warn!("{sentence}");
        }
        let metrics = Arc::new(Metrics::new());
        let lifecycle = Lifecycle::default();
        let mut preflight = Preflight::new(&config, Arc::clone(&metrics));
        preflight.pass().await?;
        let Preflight {
            engine: Some(engine),
            redis,
            llm: Some(llm),
            metering: Some(metering),
            price_notes,
            socket: Some(socket),
            metrics_socket,
            ..
        } = preflight
        else {
            unreachable!("every step was taken");
        };
        for sentence in &price_notes {
            tracing::warn!("{sentence}");
        }

        let locks = store::lock_files(&config.store)?;
        let store = Store::open(&config.store, Some(engine.dimension())).await?;
        // Without Redis nothing keeps limits and events of several servers together.
        let server_lock = store.lock_server(config.redis.is_some()).await?;
        let key = match &config.accounts.secret_key {
            Some(key) => key.clone(),
            None => DataDir::open(config.store.data_dir())?.secret_key()?,
        };
        let fallbacks = config
            .accounts
            .secret_key_fallbacks
            .iter()
            .map(|key| key.expose());
        let keys = Keys::new(key.expose(), fallbacks);

        let model = engine.model_id().clone();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let settings = embed::EmbedderSettings {
            workers: cores,
            ..embed::EmbedderSettings::default()
        };
        let embedder = Arc::new(Embedder::start(
            Arc::clone(&engine),
            &settings,
            Arc::clone(&metrics),
        )?);

        let prompt_store = Arc::clone(&store.prompts);
        let similarity = store.similarity(&engine, &config.search, cores, &lifecycle);
        let progress = Arc::new(ReembeddingProgress::default());
        let reembedding = Reembedding {
            store: Arc::clone(&prompt_store),
            embedder: Arc::new(BackgroundEmbedder::start(Arc::clone(&engine))?),
            model: model.clone(),
            similarity: Arc::clone(&similarity),
            progress: Arc::clone(&progress),
            metrics: Arc::clone(&metrics),
        };

        reembedding.plan().await.context("the store")?;

        let llm = Arc::new(llm);
        let hub = Arc::new(Hub::default());
        let hash_pool = HashPool::start(cores, LOGIN_QUEUE)?;
        let shared = Shared::build(&config, redis, &hub, &metrics, started).await?;
        let (connection, manager) = shared.redis.unzip();
        let accounts = Arc::new(Accounts {
            store: Arc::clone(&store.accounts),
            hash_pool,
            login_limiter: shared.login_limiter,
            tickets: shared.tickets,
            keys,
            known: KnownUsers::default(),
            api_keys: Arc::new(ApiKeys::new(
                Arc::clone(&store.api_keys),
                lifecycle.tasks.clone(),
            )),
            config: config.accounts.clone(),
            metrics: Arc::clone(&metrics),
            tasks: lifecycle.tasks.clone(),
        });
        let mut replica = [0; 16];
        getrandom::fill(&mut replica).context("the system's source of randomness")?;
        let memory = MemoryBudget::new(config.server.request_memory);
        let reads = FairSemaphore::new(READS_AT_ONCE, READS_WAITING);
        let metering = Arc::new(metering);
        let is_tracked = metering.service_budget().is_some();
        store.usage.track_service(is_tracked).await?;
        let prompts = Prompts::new(prompts::Deps {
            store: Arc::clone(&prompt_store),
            call_store: Arc::clone(&store.calls),
            chat_store: Arc::clone(&store.chats),
            replica,
            embedder: Arc::clone(&embedder),
            model: model.clone(),
            similarity: Arc::clone(&similarity),
            reembedding: Arc::clone(&progress),
            llm: Arc::clone(&llm),
            calls: config.calls,
            metering,
            memory: Arc::clone(&memory),
            broker: Arc::clone(&shared.broker),
            encode: api::encode_event,
            metrics: Arc::clone(&metrics),
            tasks: lifecycle.tasks.clone(),
        });
        let searches = Arc::new(Searches {
            store: Arc::clone(&prompt_store),
            embedder: Arc::clone(&embedder),
            model: model.clone(),
            similarity: Arc::clone(&similarity),
            scope: config.search.scope,
            reads: Arc::clone(&reads),
            memory: Arc::clone(&memory),
            reembedding: progress,
            metrics: Arc::clone(&metrics),
        });
        let embeddings = Embeddings {
            embedder: Arc::clone(&embedder),
            model: model.clone(),
            dimension: engine.dimension(),
            metrics: Arc::clone(&metrics),
        };
        let health = Arc::new(Health {
            store: prompt_store,
            embedder: Arc::clone(&embedder),
            similarity: Arc::clone(&similarity),
            redis_up: connection.as_ref().map(redis::Connection::watch),
            model_name: model.to_string(),
            metrics: Arc::clone(&metrics),
        });

        // The store was opened and read just now.
        health.set_store(StoreHealth::Ok);

        let listener = listen("BIND_ADDR", socket)?;
        let metrics_listener = metrics_socket
            .map(|socket| listen("METRICS_ADDR", socket))
            .transpose()?;
        metrics
            .build_info
            .with_label_values(&[env!("CARGO_PKG_VERSION"), &model.to_string()])
            .set(1.0);
        metrics
            .startup_duration
            .set(started.elapsed().as_secs_f64());
        let bounds = Bounds {
            most: connection_limit(config.server.max_connections),
            most_of_network: config.server.max_connections_per_network,
            proxies: config.server.trusted_proxies.clone(),
        };
        let connections = Connections::new(bounds, metrics.http_connections.clone());
        let state = Arc::new(api::State {
            server: config.server,
            accounts,
            prompts,
            usages: Usages {
                store: Arc::clone(&store.usage),
            },
            searches,
            embeddings,
            health,
            hub,
            broker: shared.broker,
            prompt_policy: config
                .prompt_throttle
                .policy()
                .and_then(|policy| HeaderValue::from_str(&policy).ok()),
            prompt_throttle: shared.prompt_throttle,
            v1_throttle: shared.v1_throttle,
            models: Models {
                llm: Arc::clone(&llm),
                embedding_model: model.folder_name().to_owned(),
            },
            register_throttle: shared.register_throttle,
            memory,
            reads,
            max_prompt_chars: config.max_prompt_chars,
            metrics,
            lifecycle,
        });
        let app = Self {
            listener,
            metrics_listener,
            connections,
            state,
            store,
            server_lock,
            llm,
            embedder,
            similarity,
            reembedding,
            redis: manager,
            _locks: locks,
        };
        app.log_start()?;
        Ok(app)
    }

    /// Where the service listens.
    ///
    /// # Errors
    /// If the system does not report it.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The address that a browser on this machine opens.
    ///
    /// # Errors
    /// If the system does not report where the service listens.
    pub fn url(&self) -> std::io::Result<String> {
        let address = health_check::reachable(self.local_addr()?);
        Ok(format!("http://{address}"))
    }

    /// Where the metrics' own listener listens, if there is one.
    ///
    /// # Errors
    /// If the system does not report it.
    pub fn metrics_addr(&self) -> std::io::Result<Option<SocketAddr>> {
        self.metrics_listener
            .as_ref()
            .map(TcpListener::local_addr)
            .transpose()
    }

    /// Serves until `shutdown` resolves, then stops in order: readiness off, some time in which new
    /// requests are still accepted, listener closed, requests in flight finished, sockets closed,
    /// background work ended, everything flushed.
    ///
    /// # Errors
    /// If the system does not report where it listens; if another server took the store.
    pub fn serve(self, shutdown: BoxFuture<'static, ()>) -> BoxFuture<'static, anyhow::Result<()>> {
        self.serve_until(shutdown).boxed()
    }

    async fn serve_until(mut self, shutdown: BoxFuture<'static, ()>) -> anyhow::Result<()> {
        let lifecycle = self.state.lifecycle.clone();
        let prompts = self.state.prompts.clone();
        self.start_background(&lifecycle);
        let ousted = self.hold_store(&lifecycle);

        let closing = lifecycle.closing.clone();
        let server = &self.state.server;
        let deps = ServerDeps {
            connections: Arc::clone(&self.connections),
            memory: Arc::clone(&self.state.memory),
            grace: server.shutdown_grace,
            ended: self.state.metrics.http_connections_ended.clone(),
        };
        let (delay, grace) = (server.shutdown_delay, server.shutdown_grace);
        let told = async {
            tokio::select! {
                () = shutdown => {}
                () = ousted.cancelled() => {}
            }
            lifecycle.drain();
            tracing::info!(delay_ms = delay.as_millis() as u64, "stopping");
            tokio::time::sleep(delay).await;
            closing.cancel();
            Instant::now() + grace
        };
        let metrics_bounds = Bounds {
            most: METRICS_CONNECTIONS,
            most_of_network: METRICS_CONNECTIONS,
            proxies: Vec::new(),
        };
        let metrics_deps = ServerDeps {
            connections: Connections::new(
                metrics_bounds,
                self.state.metrics.http_connections.clone(),
            ),
            ..deps.clone()
        };
        let main = api::serve(
            self.listener,
            api::router(&self.state, Documents::make()),
            deps,
            closing.clone(),
        );
        // The metrics are served until the end: a scrape in the last seconds shows how the stop
        // went.
        let metrics_closing = CancellationToken::new();
        let metrics_server = self.metrics_listener.map(|listener| {
            api::serve(
                listener,
                api::metrics_router(&self.state),
                metrics_deps,
                metrics_closing.clone(),
            )
        });
        let main = async {
            let ((), deadline) = tokio::join!(main, told);
            // Closing the connections does not wait for calls whose callers have disconnected.
            prompts.finish_calls(deadline).await;
            lifecycle.stopping.cancel();
            lifecycle.tasks.close();
            lifecycle.tasks.wait().await;
            metrics_closing.cancel();
        };
        tokio::join!(main, OptionFuture::from(metrics_server));

        if let Some(redis) = self.redis {
            redis.close().await;
        }
        let embedder = Arc::clone(&self.embedder);
        let grace = Instant::now() + self.state.server.shutdown_grace;
        let _ = tokio::task::spawn_blocking(move || embedder.shutdown(grace)).await;
        self.store.close().await;
        tracing::info!("stopped");
        anyhow::ensure!(
            !ousted.is_cancelled(),
            "DATABASE_URL: another prompt-service took the database while this one had lost it; stop one of them, or set the same REDIS_URL on both"
        );
        Ok(())
    }

    /// Keeps this server's lock of the store. The returned token is cancelled if a server has taken
    /// it that this one cannot be beside.
    fn hold_store(&mut self, lifecycle: &Lifecycle) -> CancellationToken {
        let ousted = CancellationToken::new();
        if let Some(lock) = self.server_lock.take() {
            let (stop, lost) = (lifecycle.stopping.clone(), ousted.clone());
            lifecycle.tasks.spawn(async move {
                if !lock.hold(stop).await {
                    lost.cancel();
                }
            });
        }
        ousted
    }

    fn log_start(&self) -> anyhow::Result<()> {
        if self.llm.is_mock() {
            tracing::warn!("prompts are answered by the built-in mock: no upstream is set");
        } else {
            let (provider, model) = (self.llm.provider(), self.llm.default_route().model());
            tracing::info!(provider, model, "prompts are answered by an upstream");
        }
        if let Some(addr) = self.metrics_addr()? {
            tracing::info!(%addr, "listening for metrics");
        }
        let addr = self.local_addr()?;
        tracing::info!(%addr, version = env!("CARGO_PKG_VERSION"), model = self.state.health.model_name, "listening");
        Ok(())
    }
}

/// The setting, or the number of connections that the system's limit on open files allows, if that
/// is less.
fn connection_limit(wanted: usize) -> usize {
    let room = connection_room();
    if room < wanted {
        tracing::warn!(
            limit = room,
            "fewer connections than MAX_CONNECTIONS: the system's limit on open files is lower"
        );
    }
    wanted.min(room.max(1))
}
