//! What calls used and cost, as their users and the operator see it, and budgets.

use std::path::PathBuf;

use prompt_service::app::users;
use prompt_service::cli::UserCommand;
use prompt_service::domain::{Budget, Picodollars, Subject, UserId};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use crate::support::{
    App, Folder, Reply, Response, Upstream, User, config_in, spawn_app, spawn_app_in, within_a_day,
};

/// The upstream of the tests counts 3 tokens of a request and 5 of an answer: 13 microdollars.
const PRICES: &str = r#"{"asked-1": {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6,
                                     "max_input_tokens": 1000, "max_output_tokens": 100}}"#;

struct Priced {
    app: App,
    upstream: Upstream,
    alice: User,
    _prices: TempDir,
}

fn prices() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prices.json");
    std::fs::write(&path, PRICES).unwrap();
    (folder, path)
}

/// A service with prices, an upstream, and perhaps a budget.
async fn priced(budget: Option<&str>) -> Priced {
    let (upstream, (folder, path)) = (Upstream::start().await, prices());
    let app = spawn_app(|config| {
        let mut asked = crate::llm::config(&upstream);
        asked.max_in_flight = 256;
        config.upstream = Some(asked);
        config.prices_file = Some(path);
        config.calls.budget = budget.map(|text| text.parse().unwrap());
    })
    .await;
    let alice = app.user("alice").await;
    Priced {
        app,
        upstream,
        alice,
        _prices: folder,
    }
}

async fn usage(user: &User, query: &str) -> Value {
    let shown = user.get(&format!("/api/usage{query}")).send().await;
    assert_eq!(shown.status, 200, "{shown:?}");
    shown.json()
}

async fn give_budget(app: &App, user: &User, budget: &str) {
    let budget: Budget = budget.parse().unwrap();
    let store = app.folder.store().await;
    let id = UserId(user.id);
    assert!(store.set_user_budget(id, Some(budget)).await.unwrap());
}

fn assert_over_budget(refused: &Response) {
    assert_eq!(refused.status, 429, "{refused:?}");
    assert_eq!(refused.header("x-should-retry"), Some("false"));
    assert_eq!(refused.header("retry-after"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_of_the_mock_is_metered_and_costs_nothing() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    let id = alice.prompt("hello world").await;
    let shown = alice.get(&format!("/api/prompts/{id}")).send().await;
    assert_eq!(shown.json()["cost_usd"], json!(0.0));
    let usage = usage(&alice, "?group_by=model").await;
    let [only] = &usage["results"].as_array().unwrap()[..] else {
        panic!("{usage}");
    };
    assert_eq!(only["model"], "mock");
    assert_eq!(only["attempts"], 1);
    assert_eq!(only["input_tokens"], 2);
    assert_eq!(only["unpriced_attempts"], 0);
    assert_eq!(app.metric("cost_usd_total").await, Some(0.0));
    let bob = app.user("bob").await;
    assert_eq!(self::usage(&bob, "").await["results"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_call_cost_is_shown_exactly_and_stays_when_it_is_deleted() {
    let Priced {
        app,
        upstream,
        alice,
        ..
    } = priced(None).await;
    let key = alice.api_key("report").await;
    upstream.plan_many(2, &Reply::answer("Because."));
    let id = alice.prompt("Why?").await;
    let asked = key
        .client
        .post("/api/prompts")
        .json(&json!({ "prompt": "Why?" }));
    assert_eq!(asked.send().await.status, 201);
    let shown = alice.get(&format!("/api/prompts/{id}")).send().await.text();
    assert!(shown.contains(r#""cost_usd":0.000013,"#), "{shown}");
    let deleted = alice.delete(&format!("/api/prompts/{id}")).send().await;
    assert_eq!(deleted.status, 204);
    let by_key = usage(&alice, "?group_by=key,day").await;
    let keys: Vec<&Value> = by_key["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|sum| &sum["api_key_id"])
        .collect();
    assert_eq!(keys, [&Value::Null, &json!(key.id)]);
    assert_eq!(by_key["total"]["attempts"], 2);
    assert_eq!(by_key["total"]["input_tokens"], 6);
    assert_eq!(by_key["total"]["output_tokens"], 10);
    let text = alice.get("/api/usage").send().await.text();
    assert!(text.contains(r#""cost_usd":0.000026,"#), "{text}");
    let tokens = app.metric(r#"metered_tokens_total{kind="output"}"#).await;
    assert_eq!(tokens, Some(10.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_is_a_table_for_those_who_ask_for_one() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    alice.prompt("hello").await;
    let table = alice
        .get("/api/usage?group_by=model")
        .header("accept", "text/csv");
    let table = table.send().await;
    assert_eq!(table.status, 200, "{table:?}");
    assert_eq!(
        table.header("content-type"),
        Some("text/csv; charset=utf-8")
    );
    let text = table.text();
    let lines: Vec<&str> = text.split("\r\n").collect();
    assert!(lines[0].starts_with("day,model,api_key_id,attempts,"));
    assert!(lines[1].starts_with(",mock,,1,1,0,0,"), "{lines:?}");
    assert_eq!(lines[2..], [""]);
    let other = alice.get("/api/prompts").header("accept", "text/csv");
    assert_eq!(other.send().await.status, 406);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_question_names_each_field() {
    let app = spawn_app(|_| {}).await;
    let alice = app.user("alice").await;
    for (query, fields) in [
        ("?from=yesterday", &["from"][..]),
        (
            "?from=2026-02-30&to=x&group_by=user",
            &["from", "to", "group_by"],
        ),
        ("?from=2026-02-02&to=2026-02-01", &["from"]),
        ("?from=2024-01-01&to=2026-02-01", &["from"]),
        ("?group_by=", &["group_by"]),
    ] {
        let refused = alice.get(&format!("/api/usage{query}")).send().await;
        assert_eq!(refused.status, 400, "{query}");
        let mut named: Vec<String> = refused
            .json()
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect();
        named.sort();
        let mut fields: Vec<String> = fields.iter().map(|&field| field.to_owned()).collect();
        fields.sort();
        assert_eq!(named, fields, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_beyond_a_budget_is_refused_before_anything_is_asked() {
    let Priced {
        app,
        upstream,
        alice,
        ..
    } = priced(None).await;
    // A call can cost 268 microdollars: 68 tokens of the request, 100 of the answer.
    give_budget(&app, &alice, "0.000280/month").await;
    let first = alice.try_prompt("Why?").await;
    assert_eq!(first.status, 201, "{first:?}");
    // 13 of 280 are spent, and 267 are left.
    let refused = alice.try_prompt("Why?").await;
    assert_over_budget(&refused);
    assert_eq!(refused.json()["code"], "insufficient_quota");
    let body = json!({ "model": "asked-1", "messages": [{ "role": "user", "content": "Why?" }] });
    let refused = alice.post("/v1/chat/completions").json(&body).send().await;
    assert_over_budget(&refused);
    assert_eq!(refused.json()["error"]["type"], "insufficient_quota");
    assert_eq!(refused.json()["error"]["code"], "insufficient_quota");
    // One with a smaller answer fits.
    let body = json!({ "model": "asked-1", "messages": [{ "role": "user", "content": "Why?" }], "max_tokens": 5 });
    let served = alice.post("/v1/chat/completions").json(&body).send().await;
    assert_eq!(served.status, 200, "{served:?}");
    assert_eq!(upstream.requests().len(), 2);
    assert_eq!(alice.all_prompts().await.len(), 2);
    let refusals = app
        .metric(r#"budget_refusals_total{reason="exceeded"}"#)
        .await;
    assert_eq!(refusals, Some(2.0));
    // Others have their own budgets.
    let bob = app.user("bob").await;
    assert_eq!(bob.try_prompt("Why?").await.status, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_a_budget_refuses_uses_up_nothing_of_the_days_limit() {
    within_a_day().await;
    let (upstream, (_folder, path)) = (Upstream::start().await, prices());
    let app = spawn_app(|config| {
        config.upstream = Some(crate::llm::config(&upstream));
        config.prices_file = Some(path);
        config.calls.daily_limit = Some(1);
    })
    .await;
    let (alice, bob) = (app.user("alice").await, app.user("bob").await);
    give_budget(&app, &alice, "0.000001/month").await;
    give_budget(&app, &bob, "20/month").await;
    for _ in 0..3 {
        assert_over_budget(&alice.try_prompt("Why?").await);
    }
    assert_eq!(bob.try_prompt("Why?").await.status, 201);
    let beyond = bob.try_prompt("Why?").await;
    assert_eq!(beyond.status, 503, "{beyond:?}");
    assert_eq!(beyond.json()["code"], "upstream_unavailable");
    // What a call beyond the limit has reserved is free again.
    let store = app.folder.store().await;
    let spend = store.spend(Subject::User(UserId(bob.id)), 0).await;
    assert_eq!(spend.unwrap().reserved, Picodollars(0));
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_sees_what_is_spent_and_reserved_of_a_users_budget() {
    let Priced {
        app,
        upstream,
        alice,
        ..
    } = priced(None).await;
    let mut config = config_in(app.folder.path());
    config.store = app.folder.store_config().await;
    let shown = async || {
        let command = UserCommand::Budget {
            username: "alice".to_owned(),
            amount: None,
        };
        let mut out = Vec::new();
        users::run(command, &config, &mut out).await.unwrap();
        String::from_utf8(out).unwrap()
    };
    assert_eq!(shown().await, "no budget\n");
    give_budget(&app, &alice, "20/month").await;
    assert_eq!(alice.try_prompt("Why?").await.status, 201);
    let gate = crate::support::Gate::new();
    upstream.plan(Reply::default().wait(&gate).and(Reply::answer("at last")));
    let held = alice
        .post("/api/prompts")
        .json(&json!({ "prompt": "Why?" }));
    let held = TaskTracker::new().spawn(held.send());
    eventually!(upstream.requests().len() == 2);
    let lines = "budget 20.00/month\nspent 0.000013\nreserved 0.000268\n";
    assert_eq!(shown().await, lines);
    gate.open();
    assert_eq!(held.await.unwrap().status, 201);
    let lines = "budget 20.00/month\nspent 0.000026\nreserved 0.00\n";
    assert_eq!(shown().await, lines);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_budget_of_a_key_bounds_its_calls_alone() {
    let service = priced(None).await;
    let alice = &service.alice;
    let body = json!({ "name": "small", "budget_usd": "0.000267", "budget_period": "day" });
    let key = alice.api_key_with(&body).await;
    let ask = json!({ "prompt": "Why?" });
    let refused = key.client.post("/api/prompts").json(&ask).send().await;
    assert_over_budget(&refused);
    assert_eq!(alice.try_prompt("Why?").await.status, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_calls_stay_within_the_budget_of_the_service() {
    // Nine calls of 268 microdollars fit, if none has ended.
    let Priced {
        app,
        upstream,
        alice,
        ..
    } = priced(Some("0.002500/total")).await;
    let bob = app.user("bob").await;
    let gate = crate::support::Gate::new();
    let held = Reply::default().wait(&gate).and(Reply::answer("at last"));
    upstream.plan_many(9, &held);
    let mut posts = JoinSet::new();
    for number in 0..24 {
        let user = if number % 2 == 0 { &alice } else { &bob };
        let post = user.post("/api/prompts").json(&json!({ "prompt": "Why?" }));
        posts.spawn(post.send());
    }
    let mut refused = 0;
    while refused < 15 {
        let answer = posts.join_next().await.unwrap().unwrap();
        assert_over_budget(&answer);
        refused += 1;
    }
    gate.open();
    let served = posts.join_all().await;
    assert_eq!(served.len(), 9);
    assert!(
        served.iter().all(|answer| answer.status == 201),
        "{served:?}"
    );
    assert_eq!(upstream.requests().len(), 9);
    // What was reserved and not used is free again.
    assert_eq!(alice.try_prompt("Why?").await.status, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_budget_in_force_a_model_needs_a_price() {
    let upstream = Upstream::start().await;
    let app = spawn_app(|config| config.upstream = Some(crate::llm::config(&upstream))).await;
    let alice = app.user("alice").await;
    let id = alice.prompt("Why?").await;
    let shown = alice.get(&format!("/api/prompts/{id}")).send().await.json();
    assert_eq!(shown["cost_usd"], Value::Null);
    assert_eq!(usage(&alice, "").await["total"]["unpriced_attempts"], 1);
    give_budget(&app, &alice, "5.00/month").await;
    let refused = alice.try_prompt("Why?").await;
    assert_eq!(refused.status, 404, "{refused:?}");
    assert_eq!(refused.json()["code"], "model_price_unknown");
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_start_warns_of_a_default_model_that_the_budget_makes_unusable() {
    const WARNING: &str = "every POST /api/prompts, because the default model";
    let upstream = Upstream::start().await;
    let app = spawn_app(|config| {
        config.upstream = Some(crate::llm::config(&upstream));
        config.calls.budget = Some("5.00/month".parse().unwrap());
    })
    .await;
    let alice = app.user("alice").await;
    let refused = alice.try_prompt("Why?").await;
    assert_eq!(refused.json()["code"], "model_price_unknown");
    let log = app.log.text();
    let warning = log.lines().find(|line| line.contains(WARNING)).unwrap();
    assert!(warning.contains("WARN"), "{warning}");
    let priced = priced(Some("5.00/month")).await;
    assert!(!priced.app.log.text().contains(WARNING));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_usage_and_what_is_left_of_a_budget() {
    let Priced {
        app,
        upstream,
        alice,
        _prices,
    } = priced(Some("0.000280/total")).await;
    assert_eq!(alice.try_prompt("Why?").await.status, 201);
    let folder: Folder = app.stop().await;
    let path = _prices.path().join("prices.json");
    let app = spawn_app_in(folder, |config| {
        config.upstream = Some(crate::llm::config(&upstream));
        config.prices_file = Some(path);
        config.calls.budget = Some("0.000280/total".parse().unwrap());
    })
    .await;
    let alice = User {
        client: app.client().with_bearer(&alice.access),
        ..alice
    };
    assert_over_budget(&alice.try_prompt("Why?").await);
    assert_eq!(usage(&alice, "").await["total"]["attempts"], 1);
}
