//! The list of models, and who may ask which.

use serde_json::{Value, json};

use super::{CHAT, ask};
use crate::support::{Reply, Upstream, spawn_app};
use crate::upstream::service;

fn names(list: &Value) -> Vec<&str> {
    let data = list["data"].as_array().unwrap();
    data.iter()
        .map(|model| model["id"].as_str().unwrap())
        .collect()
}

#[tokio::test]
async fn models_of_the_upstream_and_of_the_service_are_listed_and_shown() {
    let upstream = Upstream::start().await;
    let model = json!({ "id": "asked-1", "object": "model", "created": 7, "owned_by": "somebody" });
    let other = json!({ "id": "org/other-2", "object": "model" });
    upstream.show_models(Reply::json(
        &json!({ "object": "list", "data": [model, other] }),
    ));
    let (_app, user) = service(&upstream, |_| ()).await;
    let list = user.get("/v1/models").send().await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(names(&list), ["asked-1", "org/other-2", "all-MiniLM-L6-v2"]);
    let expected = with_null(&model);
    assert_eq!(list["data"][0], expected);
    let shown = user.get("/v1/models/asked-1").send().await;
    assert_eq!((shown.status, shown.json()), (200, expected));
    let shown = user.get("/v1/models/org%2Fother-2").send().await;
    assert_eq!(shown.json()["owned_by"], "primary");
    let none = user.get("/v1/models/none").send().await;
    assert_eq!(none.status, 404);
    assert_eq!(none.json()["error"]["code"], "model_not_found");
}

fn with_null(model: &Value) -> Value {
    super::with(model.clone(), &json!({ "shutdown_date": null }))
}

#[tokio::test]
async fn a_key_asks_only_its_models() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let body = json!({ "name": "bounded", "models": ["mo*"], "scopes": ["chat"] });
    let key = user.api_key_with(&body).await.client;
    let list = key.get("/v1/models").send().await.json();
    assert_eq!(names(&list), ["mock"]);
    let other = key.get("/v1/models/all-MiniLM-L6-v2").send().await;
    assert_eq!(other.status, 404);
    let refused = key.post(CHAT).json(&ask("hello")).send().await;
    assert_eq!(refused.status, 404, "{refused:?}");
    let error = &refused.json()["error"];
    assert_eq!(error["code"], "model_not_found");
    assert_eq!(error["param"], "model");
    assert!(user.all_prompts().await.is_empty());
    let mut request = ask("hello");
    request["model"] = json!("mock");
    let answer = key.post(CHAT).json(&request).send().await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let text = "[mock] You said: hello";
    assert_eq!(answer.json()["choices"][0]["message"]["content"], text);
}
