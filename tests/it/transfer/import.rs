//! Importing rows: conflicts, rows that are present already, and continuing after an interruption.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use prompt_service::domain::{
    CallDetails, LastIds, Prompt, PromptId, PromptRecord, PromptSource, PromptStatus, Record,
    Timestamp, User, UserId,
};
use prompt_service::embed::{BackgroundEmbedder, Engine};
use prompt_service::store::sqlite::SqliteStore;
use prompt_service::store::{BulkStore, PromptStore};
use prompt_service::transfer::import::{Embedders, Import, Report};
use prompt_service::transfer::source::Source;
use prompt_service::transfer::{Error, Fault, Location, Meter, Problem, Row, RowCounts};

use crate::store::bulk::{prompt_records, put};
use crate::store::list_users;
use crate::support::Folder;
use crate::transfer::{embedded_store, interrupted};

const PAGE: usize = 100;

/// A source in memory.
struct Rows {
    users: Vec<User>,
    prompts: Vec<PromptRecord>,
    last: LastIds,
    read: usize,
}

impl Rows {
    fn of(users: Vec<User>, prompts: Vec<PromptRecord>) -> Self {
        Self {
            users,
            prompts,
            last: LastIds::NONE,
            read: 0,
        }
    }
}

#[async_trait]
impl Source for Rows {
    fn last_ids(&self) -> LastIds {
        self.last
    }

    async fn rewind(&mut self) -> Result<(), Error> {
        self.read = 0;
        Ok(())
    }

    async fn read(&mut self) -> Result<Vec<Row>, Error> {
        let users = self.users.iter().map(|user| Row {
            location: Location::User(user.id),
            record: Ok(Record::User(user.clone())),
        });
        let prompts = self.prompts.iter().map(|record| Row {
            location: Location::Prompt(record.prompt.id),
            record: Ok(Record::Prompt(record.clone())),
        });
        let page: Vec<Row> = users.chain(prompts).skip(self.read).take(PAGE).collect();
        self.read += page.len();
        Ok(page)
    }
}

fn user(id: i64, username: &str) -> User {
    User {
        id: UserId(id),
        username: username.to_owned(),
        email: String::new(),
        password_hash: "!".to_owned(),
        is_active: true,
        tokens_valid_from: Timestamp(0),
        created_at: Timestamp(1),
    }
}

fn prompt(id: i64, user_id: i64, text: &str) -> PromptRecord {
    PromptRecord {
        prompt: Prompt {
            id: PromptId(id),
            user_id: UserId(user_id),
            source: PromptSource::Api,
            prompt: text.to_owned(),
            response: Some("answer".to_owned()),
            model: "unknown".to_owned(),
            status: PromptStatus::Completed,
            error: None,
            created_at: Timestamp(id),
            call: CallDetails::default(),
        },
        vector: None,
        chat: None,
    }
}

/// A store, and the engine that embeds for it.
struct Target {
    _folder: Folder,
    store: SqliteStore,
    engine: Arc<Engine>,
    embedders: Vec<BackgroundEmbedder>,
    meter: Meter,
}

impl Target {
    fn new() -> Self {
        let folder = Folder::new();
        let engine = Arc::new(Engine::bundled().unwrap());
        let embedder = || BackgroundEmbedder::start(Arc::clone(&engine)).unwrap();
        Self {
            store: embedded_store(&folder),
            _folder: folder,
            embedders: vec![embedder(), embedder()],
            engine,
            meter: Meter::new(Instant::now()),
        }
    }

    fn import(&self) -> Import<'_> {
        Import {
            accounts: &self.store,
            prompts: &self.store,
            bulk: &self.store,
            max_prompt_chars: 1_000,
            meter: &self.meter,
        }
    }

    async fn run(&self, source: &mut Rows) -> Report {
        let import = self.import();
        let planned = import.check(source).await.unwrap();
        let embedders = Embedders {
            embedders: &self.embedders,
            model: self.engine.model_id(),
            dimension: self.engine.dimension(),
        };
        let done = import.run(source, embedders, planned.new.prompts);
        let done = done.await.unwrap();
        assert_eq!(done, planned, "what was done is what was planned");
        done
    }
}

fn counts(users: u64, prompts: u64) -> RowCounts {
    RowCounts { users, prompts }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interrupted_import_continues_and_doubles_nothing() {
    let target = Target::new();
    let users = (1..=7)
        .map(|id| user(id * 3, &format!("user{id}")))
        .collect();
    let prompts = (1..=1_500)
        .map(|id| prompt(id * 2, (id % 7 + 1) * 3, &format!("text {id}")))
        .collect();
    let mut source = Rows::of(users, prompts);
    source.last = LastIds {
        user: UserId(30),
        prompt: PromptId(5_000),
    };
    // First the ids, the users and a batch of prompts; then the ids, and two batches for every
    // hundred prompts.
    for operations in [3, 12] {
        let committed = || target.store.stats().committed_operations;
        let stop_at = committed() + operations;
        interrupted(target.run(&mut source), || committed() >= stop_at).await;
    }
    let before = prompt_records(&target.store).await.len() as u64;
    let report = target.run(&mut source).await;
    assert_eq!(report.new, counts(0, 1_500 - report.present.prompts));
    assert!((400..1_500).contains(&before) && report.present.prompts >= before);
    let records = prompt_records(&target.store).await;
    let stored: Vec<Prompt> = records.iter().map(|record| record.prompt.clone()).collect();
    let given: Vec<Prompt> = source
        .prompts
        .iter()
        .map(|record| record.prompt.clone())
        .collect();
    assert_eq!(stored, given);
    let model = target.engine.model_id();
    assert!(records.iter().all(|record| {
        record
            .vector
            .as_ref()
            .is_some_and(|vector| vector.model == *model)
    }));
    assert_eq!(list_users(&target.store, None, 99).await, source.users);
    assert_eq!(target.store.last_ids().await.unwrap(), source.last);

    let again = target.run(&mut source).await;
    assert_eq!((again.new, again.present), (counts(0, 0), counts(7, 1_500)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn import_makes_the_same_vector_as_a_post() {
    let app = crate::support::spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let text = "How do I bake bread?";
    alice.prompt(text).await;
    let folder = app.stop().await;
    let store = embedded_store(&folder);
    let posted = prompt_records(&store).await.remove(0);
    store.close().await;
    let target = Target::new();
    let mut damaged = prompt(2, 1, text);
    damaged.vector = posted.vector.clone();
    damaged.vector.as_mut().unwrap().f16_bytes.fill(0);
    let mut others = damaged.clone();
    others.prompt.id = PromptId(3);
    others.vector = posted.vector.clone();
    others.vector.as_mut().unwrap().model = crate::store::model("another");
    let mut source = Rows::of(
        vec![user(1, "alice")],
        vec![prompt(1, 1, text), damaged, others],
    );
    target.run(&mut source).await;
    for record in prompt_records(&target.store).await {
        assert_eq!(record.vector, posted.vector);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conflicts_with_the_store_are_reported_and_the_rest_is_imported() {
    let target = Target::new();
    let store = &target.store;
    let users = [user(1, "alice"), user(2, "bob")];
    put(store, Record::User, users).await.unwrap();
    let prompts = [prompt(1, 1, "mine"), prompt(2, 2, "his")];
    put(store, Record::Prompt, prompts).await.unwrap();
    let users = vec![
        user(1, "alice"),
        user(2, "carol"),
        user(3, "bob"),
        user(4, "dave"),
    ];
    let prompts = vec![
        prompt(1, 1, "mine"),
        prompt(2, 1, "his"),
        prompt(3, 3, "of a bob who is another"),
        prompt(4, 4, "new"),
        prompt(5, 9, "of nobody"),
        prompt(6, 2, "of the bob who is here"),
    ];
    let mut source = Rows::of(users, prompts);
    let report = target.run(&mut source).await;
    assert_eq!((report.new, report.present), (counts(1, 2), counts(1, 1)));
    let faults: Vec<(Location, Problem)> = report
        .first_faults
        .iter()
        .map(|Fault { location, problem }| (*location, problem.clone()))
        .collect();
    assert_eq!(
        faults,
        [
            (Location::User(UserId(2)), Problem::IdTaken),
            (Location::User(UserId(3)), Problem::NameTaken),
            (Location::Prompt(PromptId(2)), Problem::IdTaken),
            (Location::Prompt(PromptId(3)), Problem::NoOwner),
            (Location::Prompt(PromptId(5)), Problem::NoOwner),
        ]
    );
    let names = list_users(store, None, 9).await;
    let names: Vec<&str> = names.iter().map(|user| user.username.as_str()).collect();
    assert_eq!(names, ["alice", "bob", "dave"]);
    let found = store.prompt(UserId(2), PromptId(2)).await.unwrap();
    assert_eq!(found.unwrap().prompt, "his");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_changes_nothing() {
    let target = Target::new();
    let mut source = Rows::of(vec![user(1, "alice")], vec![prompt(1, 1, "x")]);
    source.last.user = UserId(9);
    let report = target.import().check(&mut source).await.unwrap();
    assert_eq!(report.new, counts(1, 1));
    assert_eq!(target.store.last_ids().await.unwrap(), LastIds::NONE);
    assert_eq!(list_users(&target.store, None, 9).await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unusual_accounts_are_imported_as_far_as_possible() {
    let target = Target::new();
    let hashed = |id, name: &str, hash: &str| User {
        password_hash: hash.to_owned(),
        ..user(id, name)
    };
    let users = vec![
        hashed(1, "md5", "md5$salt$abcdef"),
        hashed(2, "none", "!unusable"),
        hashed(3, "empty", ""),
        user(4, "\u{212b}ngstr\u{f6}m"),
        user(5, "two words"),
    ];
    let report = target.run(&mut Rows::of(users, Vec::new())).await;
    assert_eq!((report.new.users, report.lost_passwords), (3, 2));
    let problems: Vec<Problem> = report
        .first_faults
        .iter()
        .map(|fault| fault.problem.clone())
        .collect();
    assert_eq!(problems, [Problem::Name, Problem::Name]);
    let stored = list_users(&target.store, None, 9).await;
    let hashes: Vec<&str> = stored
        .iter()
        .map(|user| user.password_hash.as_str())
        .collect();
    assert_eq!(hashes, ["!", "!unusable", "!"]);
}
