//! Upstreams that are chosen by the model, and the list of their models.

use std::sync::Arc;

use prompt_service::config::UpstreamConfig;
use prompt_service::llm::{
    AttemptLog, Client, Completion, Content, Failure, ListedModel, Question,
};
use serde_json::json;

use super::{USER, Watched, config, memory, named};
use crate::support::{DEADLINE, Reply, Upstream};

/// `a` has `gpt-*` and the alias `fast`, with `b` behind it; `b` has `llama3.2` and names of its
/// own for `gpt-6`; the default model is `llama3.2`.
fn two(a: &Upstream, b: &Upstream) -> UpstreamConfig {
    let fast = [("fast", "gpt-6")];
    let own = [("gpt-6", "openai/gpt-6"), ("slow", "llama3.1")];
    UpstreamConfig {
        is_list: true,
        default_model: "llama3.2".to_owned(),
        endpoints: vec![
            named("a", a, &["gpt-*"], &fast, &[1]),
            named("b", b, &["llama3.2", "gpt-5"], &own, &[]),
        ],
        ..config(a)
    }
}

async fn ask(client: &Watched, model: &str) -> Result<Completion, Failure> {
    let route = client.client.route(Some(model)).unwrap();
    let question = Question {
        route: &route,
        content: Content::Prompt("the-prompt"),
        attempts: AttemptLog::default(),
    };
    let permit = client.client.admit(USER).unwrap();
    let call = client.client.complete(permit, memory(), question, None);
    tokio::time::timeout(DEADLINE, call).await.unwrap()
}

fn asked(upstream: &Upstream) -> Vec<String> {
    let requests = upstream.requests();
    let models = requests
        .iter()
        .map(|request| request.body["model"].as_str());
    models.map(|model| model.unwrap().to_owned()).collect()
}

#[tokio::test]
async fn the_first_upstream_whose_model_or_alias_matches_is_asked() {
    let (a, b) = (Upstream::start().await, Upstream::start().await);
    let client = Watched::new(&two(&a, &b));
    for model in ["gpt-6", "fast", "gpt-5", "llama3.2", "slow"] {
        ask(&client, model).await.unwrap();
    }
    assert_eq!(asked(&a), ["gpt-6", "gpt-6", "gpt-5"]);
    assert_eq!(asked(&b), ["llama3.2", "llama3.1"]);
    for unknown in ["llama3", "GPT-6", "", "gpt-\n", &"gpt-".repeat(100)] {
        assert!(client.client.route(Some(unknown)).is_none(), "{unknown:?}");
    }
    let route = client.client.route(None).unwrap();
    assert_eq!((route.model(), route.upstream()), ("llama3.2", "b"));
    let route = client.client.route(Some("fast")).unwrap();
    let candidates: Vec<_> = route.candidates().collect();
    assert_eq!(candidates, [("a", "gpt-6"), ("b", "openai/gpt-6")]);
    assert!(!route.is_mock());
}

#[tokio::test]
async fn a_fallback_is_asked_by_its_own_name_for_the_model() {
    let (a, b) = (Upstream::start().await, Upstream::start().await);
    let client = Watched::new(&two(&a, &b));
    a.plan_many(3, &Reply::error(501, &[]));
    for model in ["fast", "gpt-6", "gpt-7"] {
        let answer = ask(&client, model).await.unwrap();
        assert_eq!(answer.attempts[0].upstream, "b");
    }
    assert_eq!(asked(&b), ["openai/gpt-6", "openai/gpt-6", "gpt-7"]);
}

#[tokio::test]
async fn after_a_useless_answer_that_told_its_cost_nobody_else_is_asked() {
    let (a, b) = (Upstream::start().await, Upstream::start().await);
    let client = Watched::new(&two(&a, &b));
    let mut useless = json!({ "choices": [{ "index": 0, "message": { "content": null } }] });
    a.plan(Reply::json(&useless));
    let answer = ask(&client, "gpt-6").await.unwrap();
    assert_eq!((answer.attempts.len(), asked(&b).len()), (2, 1));

    useless["usage"] = json!({ "prompt_tokens": 9, "completion_tokens": 100 });
    a.plan(Reply::json(&useless));
    let failure = ask(&client, "gpt-6").await.unwrap_err();
    let used = failure.attempts[0].usage.unwrap();
    assert_eq!((failure.attempts.len(), used.output), (1, 100));
    assert_eq!(asked(&b).len(), 1);
}

#[tokio::test]
async fn each_upstream_has_a_breaker_of_its_own() {
    let (a, b) = (Upstream::start().await, Upstream::start().await);
    let client = Watched::new(&two(&a, &b));
    a.plan_many(5, &Reply::error(501, &[]));
    for _ in 0..6 {
        ask(&client, "gpt-6").await.unwrap();
    }
    assert_eq!((a.requests().len(), b.requests().len()), (5, 6));
    let state = &client.metrics.upstream_breaker_state;
    assert_eq!(state.with_label_values(&["a"]).get(), 2.0);
    assert_eq!(state.with_label_values(&["b"]).get(), 0.0);
    ask(&client, "llama3.2").await.unwrap();
}

#[tokio::test]
async fn metrics_have_words_of_the_configuration_and_never_a_callers() {
    let (a, b) = (Upstream::start().await, Upstream::start().await);
    let client = Watched::new(&two(&a, &b));
    for model in ["gpt-callers-own", "fast", "llama3.2"] {
        ask(&client, model).await.unwrap();
    }
    for label in ["model=\"gpt-*\"", "model=\"gpt-6\"", "model=\"llama3.2\""] {
        assert_eq!(client.ended(label), 1, "{label}");
    }
    // Without a list, one upstream serves every model.
    let client = Watched::new(&config(&a));
    for model in ["callers-own", "asked-1"] {
        ask(&client, model).await.unwrap();
    }
    for label in ["model=\"*\"", "model=\"asked-1\""] {
        assert_eq!(client.ended(label), 1, "{label}");
    }
    let text = String::from_utf8(client.metrics.render()).unwrap();
    assert!(!text.contains("callers-own"));
}

#[tokio::test]
async fn without_a_list_fallbacks_are_asked_for_their_own_model() {
    let (a, b) = (Upstream::start().await, Upstream::start().await);
    let mut config = config(&a);
    super::add_fallback(&mut config, &b.url(), "spare", None);
    a.plan(Reply::error(501, &[]));
    let client = Watched::new(&config);
    ask(&client, "anything").await.unwrap();
    assert_eq!(
        (asked(&a), asked(&b)),
        (vec!["anything".to_owned()], vec!["spare".to_owned()])
    );
}

#[test]
fn a_default_model_that_nobody_serves_is_refused() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let a = Upstream::start().await;
        let mut config = two(&a, &a);
        config.default_model = "claude-9".to_owned();
        Client::new(&config, Arc::default()).unwrap_err();
    });
}

fn list(models: &[serde_json::Value]) -> Reply {
    Reply::json(&json!({ "object": "list", "data": models }))
}

fn ids(models: &[ListedModel]) -> Vec<(&str, &str)> {
    models
        .iter()
        .map(|model| (&*model.id, &*model.upstream))
        .collect()
}

#[tokio::test]
async fn the_models_of_all_upstreams_are_joined() {
    let (a, b) = (Upstream::start().await, Upstream::start().await);
    a.show_models(list(&[
        json!({ "id": "gpt-6", "created": 1_700_000_000, "owned_by": "openai", "shutdown_date": "2027-01-14" }),
        json!({ "id": "gpt-7" }),
        json!({ "id": "gpt-7" }),
        json!({ "id": "gpt-*" }),
        json!({ "id": "whisper-1" }),
    ]));
    b.show_models(list(&[
        json!({ "id": "gpt-7" }),
        json!({ "id": "llama3.2:latest", "owned_by": "library" }),
    ]));
    let client = Watched::new(&two(&a, &b));
    let models = client.client.models().await;
    let expected = [
        ("fast", "a"),
        ("gpt-6", "a"),
        ("gpt-7", "a"),
        ("llama3.2", "b"),
        ("slow", "b"),
    ];
    assert_eq!(ids(&models), expected);
    assert_eq!(models[0].owned_by.as_deref(), Some("openai"));
    assert_eq!(models[1].created, Some(1_700_000_000));
    assert!(models[1].shutdown.is_some());
    assert_eq!(models[3].owned_by.as_deref(), Some("library"));

    // They are kept.
    a.show_models(Reply::error(500, &[]));
    b.show_models(list(&[]));
    assert_eq!(client.client.models().await, models);
}

#[tokio::test]
async fn an_outage_hides_only_the_models_of_its_own_upstream() {
    let (a, b) = (Upstream::start().await, Upstream::start().await);
    a.show_models(list(&[json!({ "id": "gpt-7" })]));
    let config = two(&a, &b);
    b.stop().await;
    let client = Watched::new(&config);
    let models = client.client.models().await;
    assert_eq!(
        ids(&models),
        [
            ("fast", "a"),
            ("gpt-7", "a"),
            ("llama3.2", "b"),
            ("slow", "b")
        ]
    );

    let (a, b) = (Upstream::start().await, Upstream::start().await);
    a.show_models(Reply::error(500, &[]));
    b.show_models(list(&[]));
    let client = Watched::new(&two(&a, &b));
    let models = client.client.models().await;
    assert_eq!(
        ids(&models),
        [("fast", "a"), ("llama3.2", "b"), ("slow", "b")]
    );
}

#[tokio::test]
async fn an_upstream_is_asked_for_its_models_by_one_caller_at_a_time() {
    let (a, b) = (Upstream::start().await, Upstream::start().await);
    a.show_models(list(&[json!({ "id": "gpt-7" })]));
    let client = Watched::new(&two(&a, &b));
    let calls = (0..8).map(|_| client.client.models());
    let answers = futures_util::future::join_all(calls).await;
    assert!(answers.iter().all(|models| *models == answers[0]));
    assert_eq!((a.model_requests(), b.model_requests()), (1, 1));
}

#[tokio::test]
async fn the_mock_has_one_model_and_answers_every_name() {
    let client = Client::mock(Arc::default());
    assert_eq!(ids(&client.models().await), [("mock", "mock")]);
    let route = client.route(Some("anything")).unwrap();
    assert!(route.is_mock());
    assert_eq!((route.model(), route.upstream()), ("mock", "mock"));
    assert_eq!(route.candidates().collect::<Vec<_>>(), [("mock", "mock")]);
}
