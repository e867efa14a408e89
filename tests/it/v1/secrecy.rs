//! The log of chat calls: ids and outcomes, and none of their texts.

use std::time::Duration;

use serde_json::json;

use super::{CHAT, ask, chat, path, streamed, with};
use crate::support::{Reply, Upstream};
use crate::upstream::service;

#[tokio::test]
async fn no_line_carries_texts_of_the_request_the_answer_or_the_error() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let key = user.api_key("a program").await;
    let members = json!({
        "messages": [{ "role": "system", "content": "Answer as Admiral Featherstone." },
                     { "role": "user", "content": "Where is the walrus?" }],
        "metadata": { "topic": "marmalade" }, "user": "pseudonym-7",
    });
    let request = with(ask(""), &members);
    // An upstream may repeat what it was asked, and its key.
    let error =
        json!({ "error": { "message": "Featherstone walrus (sk-primary)", "param": "walrus" } });
    let refusal = |status| Reply::of(status, "application/json", &[], &error.to_string());
    upstream
        .plan(Reply::answer("In the pantry."))
        .plan(Reply::stream(&["In the ", "pantry."], Duration::ZERO))
        .plan(refusal(400))
        .plan(refusal(401))
        .plan(
            Reply::stream_head()
                .delta("pantry")
                .event(&error.to_string())
                .end(),
        )
        .plan(Reply::answer("In the pantry."));
    for (request, status) in [
        (request.clone(), 200),
        (streamed(request.clone()), 200),
        (request.clone(), 400),
        (streamed(request.clone()), 502),
        (streamed(request.clone()), 200),
    ] {
        let answer = chat(&user, &request).send().await;
        assert_eq!(answer.status, status, "{answer:?}");
    }
    let by_key = key.client.post(CHAT).json(&request).send().await;
    assert_eq!(by_key.status, 200, "{by_key:?}");
    let listed = user
        .get(&format!("{CHAT}?metadata[topic]=marmalade"))
        .send()
        .await;
    let id = listed.json()["data"][0]["id"].as_str().unwrap().to_owned();
    user.get(&format!("{}/messages", path(&id))).send().await;
    let labels = json!({ "metadata": { "topic": "honeycomb" } });
    assert_eq!(user.post(&path(&id)).json(&labels).send().await.status, 200);

    let log = app.log.text();
    assert!(log.contains("\"route\":\"/v1/chat/completions\""));
    assert!(log.contains("upstream failed"));
    for text in [
        "Featherstone",
        "walrus",
        "pantry",
        "marmalade",
        "honeycomb",
        "pseudonym",
        "sk-primary",
        &key.text,
        &user.access,
    ] {
        assert!(!log.contains(text), "{text}");
    }
    let metrics = app.get("/metrics").send().await.text();
    for text in ["walrus", "pantry", "marmalade"] {
        assert!(!metrics.contains(text), "{text}");
    }
}
