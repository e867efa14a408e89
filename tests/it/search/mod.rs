//! Search by similarity: whose prompts it finds, how many, in which order, and when.

mod stage;

use crate::store::{InsertPrompt, NewPrompt};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use half::f16;
use prompt_service::config::{Config, SimilarScope};
use prompt_service::credentials::TokenType;
use prompt_service::domain::{Embedding, ModelId, PromptStatus, Timestamp, UserId};
use prompt_service::embed::{Encode, Engine};
use prompt_service::store::NewUser;
use tokio::task::JoinSet;

use crate::support::{
    App, BACKGROUND_DEADLINE, Folder, Response, User, on_postgres, spawn_app, spawn_app_in,
};

const ANIMALS: [&str; 6] = ["cat", "dog", "horse", "salmon", "eagle", "spider"];
const DEEDS: [&str; 5] = [
    "sleeps in",
    "runs through",
    "hides under",
    "eats beside",
    "is painted on",
];
const PLACES: [&str; 4] = [
    "the kitchen",
    "a burning city",
    "the parliament",
    "an old ship",
];

/// 120 sentences with different meanings.
fn sentences() -> impl Iterator<Item = String> {
    ANIMALS.into_iter().flat_map(|animal| {
        DEEDS.into_iter().flat_map(move |deed| {
            PLACES
                .into_iter()
                .map(move |place| format!("The {animal} {deed} {place}."))
        })
    })
}

fn scores(found: &Response) -> Vec<f64> {
    let results = found.json()["results"].clone();
    let results = results.as_array().unwrap();
    results
        .iter()
        .map(|result| result["score"].as_f64().unwrap())
        .collect()
}

/// The share of prompts that the search could find, if it says so.
fn coverage(found: &Response) -> Option<f64> {
    found
        .header("x-search-coverage")
        .map(|share| share.parse().unwrap())
}

async fn delete(user: &User, id: i64) {
    let answer = user.delete(&format!("/api/prompts/{id}/")).send().await;
    assert_eq!(answer.status, 204, "{answer:?}");
}

#[tokio::test]
async fn scores_and_order_are_those_of_an_exact_comparison() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    for sentence in sentences() {
        user.prompt(&sentence).await;
    }
    let engine = Engine::bundled().unwrap();
    let store = app.folder.store().await;
    let stored = store
        .vectors(engine.model_id(), Some(UserId(user.id)), None, usize::MAX)
        .await
        .unwrap();
    assert_eq!(stored.ids.len(), 120);
    let rows: Vec<Vec<f64>> = stored
        .f16_bytes
        .chunks_exact(2 * engine.dimension())
        .map(|row| {
            let numbers = row
                .chunks_exact(2)
                .map(|two| f16::from_le_bytes([two[0], two[1]]));
            numbers.map(f64::from).collect()
        })
        .collect();
    for query in [
        "a pet at home",
        "politics",
        "The eagle hides under an old ship.",
        "x",
    ] {
        let embedded = engine.embed(&[&engine.tokenize(query)], &mut engine.scratch());
        let score = |row: &Vec<f64>| -> f64 {
            row.iter()
                .zip(embedded[0].0.iter())
                .map(|(a, b)| a * f64::from(*b))
                .sum()
        };
        let mut exact: Vec<(i64, f64)> = stored
            .ids
            .iter()
            .zip(&rows)
            .map(|((_, id), row)| (id.0, score(row)))
            .collect();
        exact.sort_by(|a, b| b.1.total_cmp(&a.1));
        for k in [1, 5, 100] {
            let found = user.search(query, k).await;
            let (ids, scores) = (found.ids(), scores(&found));
            assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), k);
            assert!(
                scores.is_sorted_by(|a, b| a >= b),
                "nearest first: {scores:?}"
            );
            for (at, (id, score)) in ids.iter().zip(&scores).enumerate() {
                // Sums of 384 products in single precision, over vectors of length 1 up to
                // rounding. PostgreSQL compares with the query in half precision too.
                let tolerance = if on_postgres() { 1e-4 } else { 1e-5 };
                let own = exact.iter().find(|(exact_id, _)| exact_id == id).unwrap().1;
                for exact in [own, exact[at].1] {
                    let difference = (exact.clamp(-1.0, 1.0) - score).abs();
                    assert!(
                        difference < tolerance,
                        "{query}: {id} in place {at} scores {score}, not {exact}"
                    );
                }
            }
        }
    }
}

#[tokio::test]
async fn a_caller_finds_only_its_own_prompts() {
    let app = spawn_app(|_| ()).await;
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    let mut own = Vec::new();
    for n in 0..7 {
        own.push(alice.prompt(&format!("bread, loaf number {n}")).await);
    }
    for n in 0..150 {
        bob.prompt(&format!("how to bake bread in oven {n}")).await;
    }
    for (k, expected) in [(1, 1), (7, 7), (100, 7)] {
        let found = alice.similar("how to bake bread in an oven", k).await;
        assert_eq!(found.len(), expected, "k = {k}");
        assert!(found.iter().all(|id| own.contains(id)), "{found:?}");
    }
    assert_eq!(bob.similar("bread, loaf number 1", 100).await.len(), 100);
    let newcomer = app.user("carol").await;
    assert_eq!(newcomer.similar("bread", 100).await.len(), 0);
}

#[tokio::test]
async fn shared_scope_finds_everybodys_prompts_also_after_a_restart() {
    let shared = |config: &mut Config| config.search.scope = SimilarScope::Shared;
    let app = spawn_app(shared).await;
    eventually!(app.get("/readyz").send().await.status == 200);
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    let gone = alice.prompt("a recipe for pancakes").await;
    let kept = alice.prompt("a recipe for waffles").await;
    assert_eq!(bob.similar("pancakes", 5).await, [gone, kept]);
    delete(&alice, gone).await;
    assert_eq!(bob.similar("pancakes", 5).await, [kept]);
    assert_eq!(
        bob.get(&format!("/api/prompts/{kept}/"))
            .send()
            .await
            .status,
        404
    );

    let app = spawn_app_in(app.stop().await, shared).await;
    eventually!(app.get("/readyz").send().await.status == 200);
    let bob = User {
        client: app.client().with_bearer(&bob.access),
        ..bob
    };
    assert_eq!(bob.similar("pancakes", 5).await, [kept]);
}

#[tokio::test]
async fn racing_posts_are_found_and_racing_deletions_are_not_found_at_once() {
    let app = Arc::new(spawn_app(|_| ()).await);
    let mut users = JoinSet::new();
    for n in 0..6 {
        let app = Arc::clone(&app);
        users.spawn(async move {
            let user = app.user(&format!("user-{n}")).await;
            let mut kept = BTreeSet::new();
            for (at, sentence) in sentences().step_by(4).enumerate() {
                let text = format!("{sentence} ({n}, {at})");
                let id = user.prompt(&text).await;
                assert_eq!(
                    user.similar(&text, 1).await,
                    [id],
                    "found by the very next request"
                );
                if at % 3 == 0 {
                    delete(&user, id).await;
                    let found = user.similar(&text, 100).await;
                    assert!(!found.contains(&id), "gone by the very next request");
                } else {
                    kept.insert(id);
                }
            }
            // As many as there are, so that a deleted one would take the place of one that is
            // there.
            let found = user.similar("anything", kept.len()).await;
            assert_eq!(found.into_iter().collect::<BTreeSet<i64>>(), kept);
        });
    }
    users.join_all().await;
}

#[tokio::test]
async fn searches_that_race_with_posts_find_every_acknowledged_prompt() {
    let app = Arc::new(spawn_app(|_| ()).await);
    let user = Arc::new(app.user("alice").await);
    let mut tasks = JoinSet::new();
    for n in 0..8 {
        let user = Arc::clone(&user);
        tasks.spawn(async move {
            for sentence in sentences().skip(n).step_by(8) {
                let id = user.prompt(&sentence).await;
                assert_eq!(user.similar(&sentence, 1).await, [id], "{sentence}");
            }
        });
    }
    tasks.join_all().await;
    let listed = user.all_prompts().await.len();
    assert_eq!(
        (listed, user.similar("anything", 100).await.len()),
        (120, 100)
    );
}

#[tokio::test]
async fn memory_for_one_user_serves_all_users() {
    let app = spawn_app(|config| config.search.memory_bytes = 1).await;
    let mut users = Vec::new();
    for n in 0..4 {
        let user = app.user(&format!("user-{n}")).await;
        let id = user.prompt(&format!("the first of {n}")).await;
        users.push((user, vec![id]));
    }
    for round in 0..3 {
        for (user, ids) in &mut users {
            let text = format!("a prompt of round {round}");
            ids.push(user.prompt(&text).await);
            let found = user.similar(&text, 100).await;
            assert_eq!(found.iter().collect::<BTreeSet<_>>(), ids.iter().collect());
            assert_eq!(found.first(), ids.last());
        }
        let (user, ids) = &mut users[round];
        delete(user, ids.remove(0)).await;
    }
    // PostgreSQL searches in the database, so nothing is in memory.
    if !on_postgres() {
        let evicted = app.metric("search_evicted_users").await.unwrap();
        assert!(evicted >= 8.0, "{evicted}");
    }
}

/// A vector of another model: of another length where the store takes several.
fn other_vector() -> Embedding {
    let length = if on_postgres() { 384 } else { 2 };
    Embedding(vec![0.05; length].into())
}

/// A folder with one user, whose `count` prompts have vectors of a model that is not in use.
async fn folder_of_another_model(count: usize) -> (Folder, UserId) {
    let folder = Folder::new();
    let store = folder.store().await;
    let new = NewUser {
        username: "alice".to_owned(),
        email: "a@b.c".to_owned(),
        password_hash: "$argon2id$unused".to_owned(),
        created_at: Timestamp::now(),
    };
    let user_id = store.create_user(new).await.unwrap().id;
    let mut inserts = JoinSet::new();
    for n in 0..count {
        let store = Arc::clone(&store);
        inserts.spawn(async move {
            let prompt = NewPrompt {
                user_id,
                // Some 80 tokens: the change of model takes a good part of a second on a machine at
                // rest, where it must not be over before it is looked at, and not all of the
                // deadline on a busy one.
                prompt: format!(
                    "{n}: {}",
                    sentences().skip(n % 60).take(10).collect::<String>()
                ),
                response: Some("an answer".to_owned()),
                model: "mock".to_owned(),
                status: PromptStatus::Completed,
                error: None,
                finish_reason: None,
                created_at: Timestamp::now(),
                llm_duration_ms: None,
                prompt_tokens: None,
                completion_tokens: None,
                embedding: Some((ModelId(Arc::from("another-model")), other_vector())),
                max_prompts: None,
            };
            store.insert_prompt(prompt).await.unwrap();
        });
    }
    inserts.join_all().await;
    (folder, user_id)
}

/// The user of such a folder, without a login.
fn known_user(app: &App, user_id: UserId) -> User {
    let hour = Duration::from_secs(3600);
    let access = app.token(TokenType::Access, user_id.0, Timestamp::now(), hour);
    User {
        id: user_id.0,
        client: app.client().with_bearer(&access),
        access,
        refresh: String::new(),
    }
}

#[tokio::test]
async fn searches_say_how_far_a_change_of_model_is() {
    const PROMPTS: usize = 200;
    let (folder, user_id) = folder_of_another_model(PROMPTS).await;
    let app = spawn_app_in(folder, |_| ()).await;
    let user = known_user(&app, user_id);
    let first = user.search("the cat", 100).await;
    let mut last = coverage(&first).expect("the work has only begun");
    assert!((0.0..1.0).contains(&last), "{last}");
    assert_eq!(
        app.get("/readyz").send().await.status,
        200,
        "the service serves meanwhile"
    );
    // A prompt that is posted meanwhile is found at once.
    let posted = user.prompt("a prompt of the new age").await;
    assert_eq!(user.similar("a prompt of the new age", 1).await, [posted]);
    eventually!(within BACKGROUND_DEADLINE; {
        let found = user.search("the cat", 100).await;
        let share = coverage(&found);
        if let Some(share) = share {
            assert!(share >= last && share < 1.0, "{share} after {last}");
            last = share;
        }
        share.is_none()
    });
    eventually!(within BACKGROUND_DEADLINE; app.metric("reembedding_remaining_prompts").await == Some(0.0));
    let found = user.search("the cat", 100).await;
    assert_eq!((coverage(&found), found.ids().len()), (None, 100));
    let model = Engine::bundled().unwrap().model_id().clone();
    let covered = app
        .folder
        .store()
        .await
        .coverage(&model, Some(user_id))
        .await
        .unwrap();
    assert_eq!(
        (covered.embedded, covered.completed),
        (PROMPTS as u64 + 1, PROMPTS as u64 + 1)
    );
}

#[tokio::test]
async fn an_interrupted_change_of_model_continues_after_a_restart() {
    const PROMPTS: u64 = 200;
    let (folder, user_id) = folder_of_another_model(PROMPTS as usize).await;
    let model = Engine::bundled().unwrap().model_id().clone();
    let store = folder.store().await;
    let embedded = async || store.coverage(&model, None).await.unwrap().embedded;
    let app = spawn_app_in(folder, |_| ()).await;
    eventually!(within BACKGROUND_DEADLINE; embedded().await > 0);
    let folder = app.kill().await;
    let before = embedded().await;
    assert!((1..PROMPTS).contains(&before), "{before}");

    let app = spawn_app_in(folder, |_| ()).await;
    eventually!(within BACKGROUND_DEADLINE; embedded().await == PROMPTS);
    let finished = |log: Vec<serde_json::Value>| {
        let message = "every prompt has a vector of the model in use";
        log.into_iter().find(|line| line["message"] == message)
    };
    eventually!(within BACKGROUND_DEADLINE; finished(app.log.lines()).is_some());
    assert_eq!(finished(app.log.lines()).unwrap()["done"], PROMPTS - before);
    let user = known_user(&app, user_id);
    let found = user.search("the cat", 100).await;
    assert_eq!((coverage(&found), found.ids().len()), (None, 100));
}
