//! The costs of the SQLite store: `cargo bench --bench store`. Prints a table. Compare ratios
//! within one run.
//!
//! The folder is `STORE_BENCH_DIR` or the system's temporary one. It should be on the disk in
//! question, not in memory.

#![expect(clippy::print_stdout, reason = "the table is the program's purpose")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use prompt_service::domain::{Embedding, ModelId, PromptId, PromptSource, Timestamp, UserId};
use prompt_service::store::sqlite::{OpenOptions, SqliteStore};
use prompt_service::store::{
    AccountStore, Begun, CallBudgets, CallOutcome, CallStore, Holder, NewCall, NewUser, PromptStore,
};
use tokio::task::JoinSet;

const DIMENSION: usize = 384;
const ROWS: usize = 200_000;
const USERS: usize = 50;
const PAGE_ROWS: usize = 16_384;
const PUT_ROWS: usize = 1_000;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime starts");
    let folder = std::env::var_os("STORE_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = tempfile::tempdir_in(folder).expect("the folder can be written");
    runtime.block_on(run(folder.path()));
}

fn vector(mark: usize) -> Embedding {
    Embedding(
        (0..DIMENSION)
            .map(|n| ((mark * 31 + n * 7) % 97) as f32 / 970.0)
            .collect(),
    )
}

/// What a post writes: the running row under its lease, then the outcome. Two commits.
async fn post(store: &SqliteStore, user_id: UserId, embedding: Option<(ModelId, Embedding)>) {
    static CALLS: AtomicI64 = AtomicI64::new(0);
    let holder = Holder {
        replica: [1; 16],
        call: CALLS.fetch_add(1, Ordering::Relaxed),
    };
    let call = NewCall {
        user_id,
        source: PromptSource::Api,
        chat: None,
        is_kept: true,
        prompt: "How do I keep a commit from waiting for the disk? ".repeat(4),
        model: "mock".to_owned(),
        created_at: Timestamp(1),
        announce: false,
        key: None,
        holder,
        lease: Duration::from_secs(60),
        max_prompts: None,
        api_key_id: None,
        budgets: CallBudgets::default(),
        daily: None,
    };
    let Ok(Begun::Started(prompt)) = store.begin_call(call).await else {
        panic!("the call begins");
    };
    let outcome = CallOutcome {
        embedding,
        ..CallOutcome::completed("Let several writes share it. ".repeat(20), "mock")
    };
    let settled = store.settle_call(prompt.id, holder, outcome).await;
    settled.expect("the call is settled");
}

fn row(what: &str, figure: String) {
    println!("{what:<58} {figure:>20}");
}

fn microseconds(duration: Duration) -> String {
    format!("{:.1} us", duration.as_secs_f64() * 1e6)
}

fn resident() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    format!("{:.1} MiB", kib.unwrap_or(0) as f64 / 1024.0)
}

fn percentile(durations: &mut [Duration], share: f64) -> Duration {
    durations.sort_unstable();
    durations[((durations.len() - 1) as f64 * share) as usize]
}

async fn run(folder: &Path) {
    let model = ModelId(Arc::from("bench"));
    let path = folder.join("bench.db");
    let began = Instant::now();
    let store = SqliteStore::open(&path, OpenOptions::default()).expect("the store opens");
    let store = Arc::new(store);
    row("open a new file", microseconds(began.elapsed()));
    row("resident after opening", resident());
    disk(folder);
    let mut users = Vec::new();
    for n in 0..USERS {
        let user = NewUser {
            username: format!("user{n}"),
            email: String::new(),
            password_hash: String::new(),
            created_at: Timestamp(0),
        };
        users.push(store.create_user(user).await.expect("a new name").id);
    }
    for callers in [1, 16, 64, 256] {
        posts(&store, &users, &model, callers).await;
    }
    fill(&store, &users, &model).await;
    reads(&store, &users, &model).await;
    hand_off(&path).await;
    vectors(&store, &users, &model).await;
    row("resident at the end", resident());
    store.close().await;
    let began = Instant::now();
    let store = SqliteStore::open(&path, OpenOptions::default()).expect("the store opens");
    row("open the filled file", microseconds(began.elapsed()));
    store.close().await;
}

/// The disk's own delay, to compare with.
fn disk(folder: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(folder.join("sync")).expect("a file is made");
    let mut durations: Vec<_> = (0..200)
        .map(|_| {
            let began = Instant::now();
            file.write_all(&[1; 16_384])
                .and_then(|()| file.sync_data())
                .expect("the disk takes it");
            began.elapsed()
        })
        .collect();
    row(
        "append 16 kB and fdatasync, p50",
        microseconds(percentile(&mut durations, 0.5)),
    );
}

async fn posts(store: &Arc<SqliteStore>, users: &[UserId], model: &ModelId, callers: usize) {
    let until = Duration::from_secs(3);
    let before = store.stats();
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for caller in 0..callers {
        let (store, model, user) = (
            Arc::clone(store),
            model.clone(),
            users[caller % users.len()],
        );
        tasks.spawn(async move {
            let mut durations = Vec::new();
            while began.elapsed() < until {
                let embedding = Some((model.clone(), vector(caller)));
                let began = Instant::now();
                post(&store, user, embedding).await;
                durations.push(began.elapsed());
            }
            durations
        });
    }
    let mut durations = tasks.join_all().await.concat();
    let rate = durations.len() as f64 / began.elapsed().as_secs_f64();
    let after = store.stats();
    let batches = after.committed_batches - before.committed_batches;
    let size = (after.committed_operations - before.committed_operations) as f64 / batches as f64;
    row(
        &format!("posts, {callers} callers, {size:.1} a commit"),
        format!("{rate:.0} /s"),
    );
    let (p50, p99) = (
        percentile(&mut durations, 0.5),
        percentile(&mut durations, 0.99),
    );
    row(
        "  latency p50, p99",
        format!("{}, {}", microseconds(p50), microseconds(p99)),
    );
}

/// Prompts up to the number of rows, their vectors put afterwards in large transactions.
async fn fill(store: &Arc<SqliteStore>, users: &[UserId], model: &ModelId) {
    let present = store
        .coverage(model, None)
        .await
        .expect("counted")
        .completed as usize;
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for caller in 0..256 {
        let (store, user) = (Arc::clone(store), users[caller % users.len()]);
        let missing = ROWS.saturating_sub(present) / 256;
        tasks.spawn(async move {
            for _ in 0..missing {
                post(&store, user, None).await;
            }
        });
    }
    tasks.join_all().await;
    row(
        "filled up to 200,000 prompts",
        format!("{:.1} s", began.elapsed().as_secs_f64()),
    );
    let began = Instant::now();
    let (mut after, mut put) = (None, 0);
    loop {
        let rows = store
            .unembedded(model, after, PUT_ROWS)
            .await
            .expect("listed");
        let Some(last) = rows.last() else { break };
        after = Some(last.id);
        put += rows.len();
        let rows = rows.iter().map(|row| (row.id, vector(put))).collect();
        store.put_embeddings(model, rows).await.expect("stored");
    }
    let rate = put as f64 / began.elapsed().as_secs_f64();
    row(
        "unembedded + put_embeddings, 1,000 at once",
        format!("{rate:.0} rows/s"),
    );
}

async fn timed<T>(what: &str, mut work: impl AsyncFnMut(usize) -> T) {
    let mut durations = Vec::new();
    for n in 0..5_000 {
        let began = Instant::now();
        work(n).await;
        durations.push(began.elapsed());
    }
    let (p50, p99) = (
        percentile(&mut durations, 0.5),
        percentile(&mut durations, 0.99),
    );
    row(
        what,
        format!("{}, {}", microseconds(p50), microseconds(p99)),
    );
}

async fn reads(store: &SqliteStore, users: &[UserId], model: &ModelId) {
    timed("ping, p50, p99", async |_| store.ping().await).await;
    timed("user by id", async |n| {
        store.user(users[n % users.len()]).await
    })
    .await;
    timed("one prompt", async |n| {
        let id = PromptId((n * 7919 % 190_000) as i64 + 1);
        store.prompts(None, &[id], usize::MAX).await
    })
    .await;
    timed("five prompts", async |n| {
        let id = |m: usize| PromptId(((n + m * 37) * 7919 % 190_000) as i64 + 1);
        store
            .prompts(None, &[id(0), id(1), id(2), id(3), id(4)], usize::MAX)
            .await
    })
    .await;
    timed("twenty prompts of a user's history", async |n| {
        store
            .list_prompts(users[n % users.len()], None, 20, usize::MAX)
            .await
    })
    .await;
    timed("coverage of one user", async |n| {
        store.coverage(model, Some(users[n % users.len()])).await
    })
    .await;
    timed("coverage of all", async |_| {
        store.coverage(model, None).await
    })
    .await;
}

/// The same point read without the store's threads: on a bare connection, and through the runtime's
/// blocking pool.
async fn hand_off(path: &Path) {
    let connection = rusqlite::Connection::open(path).expect("the file opens");
    let connection = Arc::new(std::sync::Mutex::new(connection));
    let read = |connection: &rusqlite::Connection, id: i64| {
        connection
            .prepare_cached("SELECT username FROM account WHERE id = ?1")
            .and_then(|mut statement| statement.query_row([id], |row| row.get::<_, String>(0)))
            .expect("the user exists")
    };
    timed(
        "  of which SQLite: a user by id on a bare connection",
        async |n| {
            read(
                &connection.lock().expect("not poisoned"),
                (n % USERS) as i64 + 1,
            )
        },
    )
    .await;
    timed(
        "  for comparison: a user by id by spawn_blocking",
        async |n| {
            let connection = Arc::clone(&connection);
            tokio::task::spawn_blocking(move || {
                read(
                    &connection.lock().expect("not poisoned"),
                    (n % USERS) as i64 + 1,
                )
            })
            .await
        },
    )
    .await;
}

async fn vectors(store: &SqliteStore, users: &[UserId], model: &ModelId) {
    for (what, owner) in [("of all", None), ("of one user", Some(users[0]))] {
        for _ in 0..2 {
            let began = Instant::now();
            let (mut after, mut rows) = (None, 0);
            loop {
                let page = store
                    .vectors(model, owner, after, PAGE_ROWS)
                    .await
                    .expect("read");
                rows += page.ids.len();
                after = page.ids.last().copied();
                if page.ids.len() < PAGE_ROWS {
                    break;
                }
            }
            let seconds = began.elapsed().as_secs_f64();
            row(
                &format!("{rows} vectors {what}, pages of {PAGE_ROWS}"),
                format!("{:.0} rows/s", rows as f64 / seconds),
            );
        }
    }
}
