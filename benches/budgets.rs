//! What checking a budget costs, with ten million rows of usage in the SQLite store:
//! `cargo bench --bench budgets`. `--short` takes a hundredth of the rows. Prints a table. Compare
//! ratios within one run.
//!
//! The folder is `STORE_BENCH_DIR` or the system's temporary one.

#![expect(clippy::print_stdout, reason = "the table is the program's purpose")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use prompt_service::domain::{
    ApiKeyId, Budget, Period, Picodollars, PromptSource, Subject, Timestamp, UserId,
};
use prompt_service::store::sqlite::{OpenOptions, SqliteStore};
use prompt_service::store::{
    AccountStore, Begun, CallBudgets, CallOutcome, CallStore, Holder, NewCall, NewUser, UsageStore,
};

const ROWS: i64 = 10_000_000;
const SHORT_ROWS: i64 = 100_000;
/// Rows of one transaction while the store is filled.
const FILL_ROWS: i64 = 500_000;
/// Users and days over which the rows are spread.
const USERS: i64 = 1_000;
const DAYS: i64 = 365;
const CHECKS: usize = 5_000;
const CALLS: usize = 1_000;
/// The last day with usage, in days since 1970.
const TODAY: i64 = 20_788;
const MICROS_A_DAY: i64 = 86_400_000_000;

fn main() {
    let is_short = std::env::args().any(|argument| argument == "--short");
    let rows = if is_short { SHORT_ROWS } else { ROWS };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime starts");
    let folder = std::env::var_os("STORE_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = tempfile::tempdir_in(folder).expect("the folder can be written");
    runtime.block_on(run(&folder.path().join("bench.db"), rows));
}

fn row(what: &str, durations: &mut [Duration]) {
    durations.sort_unstable();
    let at = |share: f64| durations[((durations.len() - 1) as f64 * share) as usize];
    let micros = |duration: Duration| duration.as_secs_f64() * 1e6;
    println!(
        "{what:<46} p50 {:>8.1} us   p99 {:>8.1} us",
        micros(at(0.5)),
        micros(at(0.99))
    );
}

async fn run(path: &Path, rows: i64) {
    let store = SqliteStore::open(path, OpenOptions::default()).expect("the store opens");
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
    let key = ApiKeyId::parse("Bench001").expect("eight letters and digits");
    checks(&store, &users, key, "no rows").await;
    store.close().await;

    let began = Instant::now();
    fill(path, rows, key).expect("the rows are written");
    println!(
        "{rows} rows of usage written in {:.0} s",
        began.elapsed().as_secs_f64()
    );
    let store = SqliteStore::open(path, OpenOptions::default()).expect("the store opens");
    store
        .track_service(true)
        .await
        .expect("the service is tracked");
    checks(&store, &users, key, &format!("{rows} rows")).await;
    calls(&store, &users, key).await;
    store.close().await;
}

/// Rows of usage with the sums and counters that belong to them: each user has the same number on
/// each of the days.
fn fill(path: &Path, rows: i64, key: ApiKeyId) -> rusqlite::Result<()> {
    let connection = rusqlite::Connection::open(path)?;
    connection.pragma_update(None, "synchronous", "OFF")?;
    let first_day = TODAY - DAYS + 1;
    let mut done = 0;
    while done < rows {
        let batch = FILL_ROWS.min(rows - done);
        connection.execute(
            "WITH RECURSIVE n (n) AS (SELECT ?1 UNION ALL SELECT n + 1 FROM n WHERE n + 1 < ?1 + ?2)
             INSERT INTO usage (user_id, api_key_id, prompt_id, source, begun_at, day, upstream, model_asked, model,
                                input, cache_read, cache_write, output, reasoning, cost, price_version, outcome, is_estimated)
             SELECT 1 + n % ?3, ?6, n, 'v1', (?4 + n / ?3 % ?5) * ?7, ?4 + n / ?3 % ?5, 'primary', 'gpt', 'gpt',
                    100, 0, 0, 50, 0, 1000, 'bench', 'answered', 0 FROM n",
            rusqlite::params![done, batch, USERS, first_day, DAYS, key.as_str(), MICROS_A_DAY],
        )?;
        done += batch;
    }
    connection.execute_batch(
        "INSERT INTO usage_day (user_id, day, api_key_id, model, attempts, input, cache_read, cache_write, output, reasoning, cost, unpriced)
         SELECT user_id, day, api_key_id, model, count(*), sum(input), 0, 0, sum(output), 0, sum(cost), 0 FROM usage GROUP BY 1, 2, 3, 4;
         INSERT INTO spend (kind, subject_id, day, settled, reserved)
         SELECT 'user', user_id, day, sum(cost), 0 FROM usage_day GROUP BY user_id, day
         UNION ALL SELECT 'user', user_id, -1, sum(cost), 0 FROM usage_day GROUP BY user_id
         UNION ALL SELECT 'key', api_key_id, day, sum(cost), 0 FROM usage_day GROUP BY api_key_id, day
         UNION ALL SELECT 'key', api_key_id, -1, sum(cost), 0 FROM usage_day GROUP BY api_key_id;",
    )
}

/// What a check reads: how much a subject has spent and reserved in its period.
async fn checks(store: &SqliteStore, users: &[UserId], key: ApiKeyId, with: &str) {
    for (name, first_day) in [("a month", TODAY - 30), ("all time", -1)] {
        let mut durations = Vec::new();
        for n in 0..CHECKS {
            let subject = match n % 3 {
                0 => Subject::Service,
                1 => Subject::User(users[n % users.len()]),
                _ => Subject::Key(key),
            };
            let began = Instant::now();
            store
                .spend(subject, first_day)
                .await
                .expect("spend is read");
            durations.push(began.elapsed());
        }
        row(&format!("spend of {name}, {with}"), &mut durations);
    }
}

/// Calls with three budgets in force and without any, in turn: begun and settled.
async fn calls(store: &SqliteStore, users: &[UserId], key: ApiKeyId) {
    let budget = Budget {
        amount: Picodollars(i64::MAX / 2),
        period: Period::Month,
    };
    let user = users[0];
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for n in 0..2 * CALLS {
        let has_budgets = n % 2 == 0;
        let set = store.set_user_budget(user, has_budgets.then_some(budget));
        assert!(set.await.expect("the budget is set"));
        let holder = Holder {
            replica: [1; 16],
            call: n as i64,
        };
        let call = NewCall {
            user_id: user,
            source: PromptSource::V1,
            chat: None,
            is_kept: true,
            prompt: "How much does it cost to ask?".to_owned(),
            model: "gpt".to_owned(),
            created_at: Timestamp(TODAY * MICROS_A_DAY),
            announce: false,
            key: None,
            holder,
            lease: Duration::from_secs(60),
            max_prompts: None,
            api_key_id: Some(key),
            budgets: match has_budgets {
                true => CallBudgets {
                    most_cost: Some(Picodollars(1_000)),
                    key: Some(budget),
                    service: Some(budget),
                },
                false => CallBudgets::default(),
            },
            daily: None,
        };
        let began = Instant::now();
        let begun = store.begin_call(call).await;
        let took = began.elapsed();
        let Ok(Begun::Started(prompt)) = begun else {
            panic!("the call begins");
        };
        if has_budgets { &mut with } else { &mut without }.push(took);
        let settled =
            store.settle_call(prompt.id, holder, CallOutcome::completed("Nothing.", "gpt"));
        settled.await.expect("the call is settled");
    }
    row("a call begun without a budget", &mut without);
    row("a call begun within three budgets", &mut with);
}
