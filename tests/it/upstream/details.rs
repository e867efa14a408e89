//! Which details of a call are shown with its answer.

use serde_json::{Value, json};

use super::{hello, service, shown};
use crate::support::{Reply, Upstream};

/// The members with these details.
fn details(prompt: &Value) -> (&Value, &Value) {
    (&prompt["finish_reason"], &prompt["usage"])
}

#[tokio::test]
async fn reason_usage_and_duration_are_shown_of_a_prompt_and_in_the_list() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let held_back = json!({
        "choices": [{ "message": { "content": null }, "finish_reason": "content_filter" }],
        "usage": { "prompt_tokens": 7 },
    });
    let said_nothing = json!({ "choices": [{ "message": { "content": "x" } }] });
    upstream.plan(Reply::answer("answered"));
    upstream.plan(Reply::json(&held_back));
    upstream.plan(Reply::json(&said_nothing));
    upstream.plan(Reply::error(500, &[]));
    let usage = |asked: Value, answered: Value, total: Value| json!({ "prompt_tokens": asked, "completion_tokens": answered, "total_tokens": total });
    for (status, response, reason, usage) in [
        (
            201,
            json!("answered"),
            json!("stop"),
            usage(json!(3), json!(5), json!(8)),
        ),
        (
            201,
            json!(""),
            json!("content_filter"),
            usage(json!(7), Value::Null, Value::Null),
        ),
        (201, json!("x"), Value::Null, Value::Null),
        (502, Value::Null, Value::Null, Value::Null),
    ] {
        let answer = user.post("/api/prompts").json(&hello()).send().await;
        assert_eq!(answer.status, status, "{answer:?}");
        let posted = answer.json();
        if status == 201 {
            let mut members: Vec<_> = posted.as_object().unwrap().keys().collect();
            members.sort();
            assert_eq!(members, ["created_at", "id", "model", "prompt", "response"]);
        }
        let id = posted["id"].as_i64().unwrap();
        let prompt = shown(&user, id).await;
        assert_eq!(prompt["response"], response);
        assert_eq!(details(&prompt), (&reason, &usage));
        assert_eq!(prompt["duration_ms"].is_u64(), status == 201, "{prompt}");
        assert_eq!(user.all_prompts().await[0], prompt);
    }
    // A search shows none of them.
    let found = user.get("/api/prompts/similar?q=hello&k=1").send().await;
    assert_eq!(found.json()["results"][0].as_object().unwrap().len(), 5);
    drop(app);
}
