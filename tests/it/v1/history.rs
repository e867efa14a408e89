//! Stored chat calls: listing, showing, labelling and deleting them.

use serde_json::{Value, json};

use super::{CHAT, answered, ask, chat, id_of, listed, number, path, posting, streamed, with};
use crate::support::{Gate, Reply, Upstream};
use crate::upstream::{held_answer, service};

fn labelled(text: &str, labels: &Value) -> Value {
    with(ask(text), &json!({ "metadata": labels }))
}

#[tokio::test]
async fn calls_are_listed_by_page_order_model_and_labels() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    let mut ids = Vec::new();
    for (at, topic) in ["tea", "tea", "rain", "tea", "rain"].iter().enumerate() {
        let model = if at < 4 { "scripted-1" } else { "scripted-2" };
        let choice = json!({ "index": 0, "finish_reason": "stop", "message": { "role": "assistant", "content": "x" } });
        upstream.plan(Reply::json(&json!({ "id": "up", "object": "chat.completion", "model": model, "choices": [choice] })));
        let request = labelled("hello", &json!({ "topic": topic, "at": at.to_string() }));
        ids.push(id_of(&answered(&user, &request).await));
    }
    let of = |places: &[usize]| -> Vec<String> {
        places.iter().map(|place| ids[*place].clone()).collect()
    };
    for (query, places) in [
        ("", &[0, 1, 2, 3, 4][..]),
        ("?order=asc&limit=2", &[0, 1]),
        ("?order=desc", &[4, 3, 2, 1, 0]),
        ("?model=scripted-2", &[4]),
        ("?model=asked-1", &[]),
        ("?metadata[topic]=tea", &[0, 1, 3]),
        ("?metadata%5Btopic%5D=tea&metadata[at]=3", &[3]),
        ("?metadata[topic]=snow", &[]),
        ("?metadata[other]=tea", &[]),
        ("?limit=0", &[]),
    ] {
        assert_eq!(listed(&user, query).await, of(places), "{query}");
    }
    for order in ["asc", "desc"] {
        let (mut all, mut after) = (Vec::new(), String::new());
        loop {
            let page = user.get(&format!("{CHAT}?limit=2&order={order}{after}"));
            let page = page.send().await.json();
            assert_eq!(page["object"], "list");
            let data = page["data"].as_array().unwrap();
            assert_eq!(page["first_id"], data[0]["id"]);
            assert_eq!(page["last_id"], data.last().unwrap()["id"]);
            all.extend(
                data.iter()
                    .map(|call| call["id"].as_str().unwrap().to_owned()),
            );
            if page["has_more"] == json!(false) {
                break;
            }
            after = format!("&after={}", page["last_id"].as_str().unwrap());
        }
        if order == "desc" {
            all.reverse();
        }
        assert_eq!(all, ids, "{order}");
    }
    for (query, param) in [
        ("?limit=101", "limit"),
        ("?limit=x", "limit"),
        ("?order=up", "order"),
        ("?after=7", "after"),
        ("?after=chatcmpl-x", "after"),
        ("?model=%00", "model"),
        ("?metadata[topic]=a%00", "metadata"),
        ("?metadata[%00]=a", "metadata"),
        (
            &format!("?{}", "metadata[topic]=tea&".repeat(17)),
            "metadata",
        ),
    ] {
        let refused = user.get(&format!("{CHAT}{query}")).send().await;
        assert_eq!(refused.status, 400, "{query}");
        assert_eq!(refused.json()["error"]["param"], param, "{query}");
    }
}

#[tokio::test]
async fn a_call_is_shown_with_the_settings_and_labels_of_its_request() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    let members = json!({ "temperature": 0.5, "seed": 7, "user": "u", "metadata": { "topic": "tea", "not kept": 7 } });
    let answer = answered(&user, &with(ask("hello"), &members)).await;
    let id = id_of(&answer);
    let shown = user.get(&path(&id)).send().await.json();
    for (member, value) in answer.json().as_object().unwrap() {
        assert_eq!(shown[member], *value, "{member}");
    }
    for (member, value) in [
        ("object", json!("chat.completion")),
        ("metadata", json!({ "topic": "tea" })),
        ("temperature", json!(0.5)),
        ("seed", json!(7)),
        ("user", json!("u")),
        ("top_p", Value::Null),
        ("tools", Value::Null),
    ] {
        assert_eq!(shown[member], value, "{member}");
    }
    assert!(shown.as_object().unwrap().contains_key("tools"));
    let page = user.get(CHAT).send().await.json();
    assert_eq!(page["data"], json!([shown]));
}

#[tokio::test]
async fn messages_come_back_equal_and_by_page() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    let calls =
        json!([{ "id": "t", "type": "function", "function": { "name": "f", "arguments": "{}" } }]);
    let messages = json!([
        { "role": "system", "content": "Be brief.", "name": "x" },
        { "role": "user", "content": [{ "type": "text", "text": "é 🦀 \u{1}" }, { "type": "image_url", "image_url": { "url": "https://example.org/a.png" } }] },
        { "role": "assistant", "content": null, "tool_calls": calls, "x_unknown": [1.5, { "a": null }] },
        { "role": "tool", "tool_call_id": "t", "content": "7" },
        { "role": "user", "content": "And now?", "id": "the client's own" },
    ]);
    let request = with(ask(""), &json!({ "messages": messages }));
    let id = id_of(&answered(&user, &request).await);
    let path = format!("{}/messages", path(&id));
    let page = user.get(&path).send().await.json();
    let data = page["data"].as_array().unwrap();
    assert_eq!(data.len(), 5);
    for (place, (shown, sent)) in data.iter().zip(messages.as_array().unwrap()).enumerate() {
        let mut shown = shown.clone();
        assert_eq!(shown["id"], format!("{id}-{place}"));
        shown.as_object_mut().unwrap().remove("id");
        let mut sent = sent.clone();
        sent.as_object_mut().unwrap().remove("id");
        assert_eq!(shown, sent);
    }
    let places = |page: &Value| -> Vec<String> {
        let data = page["data"].as_array().unwrap();
        data.iter()
            .map(|message| message["role"].to_string())
            .collect()
    };
    let first = user.get(&format!("{path}?limit=3")).send().await.json();
    assert_eq!(first["has_more"], true);
    assert_eq!(places(&first), ["\"system\"", "\"user\"", "\"assistant\""]);
    let after = first["last_id"].as_str().unwrap();
    let rest = user
        .get(&format!("{path}?limit=3&after={after}"))
        .send()
        .await
        .json();
    assert_eq!(rest["has_more"], false);
    assert_eq!(places(&rest), ["\"tool\"", "\"user\""]);
    let newest = user
        .get(&format!("{path}?order=desc&limit=2"))
        .send()
        .await
        .json();
    assert_eq!(places(&newest), ["\"user\"", "\"tool\""]);
    let wrong = user.get(&format!("{path}?after=x")).send().await;
    assert_eq!(wrong.status, 400);
}

#[tokio::test]
async fn labels_are_replaced() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    let request = labelled("hello", &json!({ "topic": "tea", "old": "x" }));
    let id = id_of(&answered(&user, &request).await);
    let set = |metadata: Value| {
        let request = user.post(&path(&id));
        request.json(&json!({ "metadata": metadata })).send()
    };
    let changed = set(json!({ "topic": "rain" })).await;
    assert_eq!(changed.status, 200, "{changed:?}");
    assert_eq!(changed.json()["metadata"], json!({ "topic": "rain" }));
    assert_eq!(changed.json(), user.get(&path(&id)).send().await.json());
    assert!(listed(&user, "?metadata[topic]=tea").await.is_empty());
    assert_eq!(listed(&user, "?metadata[topic]=rain").await, [id.as_str()]);
    let many: Value = (0..17)
        .map(|n| (n.to_string(), json!("")))
        .collect::<serde_json::Map<_, _>>()
        .into();
    for wrong in [
        json!({ "n": 1 }),
        json!("x"),
        many,
        json!({ "x": "y".repeat(513) }),
    ] {
        let refused = set(wrong).await;
        assert_eq!(refused.status, 400, "{refused:?}");
        assert_eq!(refused.json()["error"]["param"], "metadata");
    }
    let shown = user.get(&path(&id)).send().await.json();
    assert_eq!(shown["metadata"], json!({ "topic": "rain" }));
    assert_eq!(set(Value::Null).await.json()["metadata"], json!({}));
}

#[tokio::test]
async fn a_deleted_call_is_gone_everywhere() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    let id = id_of(&answered(&user, &ask("hello")).await);
    let kept = id_of(&answered(&user, &ask("hello again")).await);
    let gone = user.delete(&path(&id)).send().await;
    let expected = json!({ "id": id, "object": "chat.completion.deleted", "deleted": true });
    assert_eq!((gone.status, gone.json()), (200, expected));
    assert_eq!(user.delete(&path(&id)).send().await.status, 404);
    assert_eq!(user.get(&path(&id)).send().await.status, 404);
    assert_eq!(listed(&user, "").await, [kept.as_str()]);
    assert_eq!(user.similar("hello", 9).await, [number(&kept)]);
    let prompt = format!("/api/prompts/{}", number(&id));
    assert_eq!(user.get(&prompt).send().await.status, 404);
    // And by the other front door.
    let prompt = format!("/api/prompts/{}", number(&kept));
    assert_eq!(user.delete(&prompt).send().await.status, 204);
    assert_eq!(user.get(&path(&kept)).send().await.status, 404);
}

#[tokio::test]
async fn calls_of_others_prompts_and_calls_without_answer_do_not_exist_here() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let stranger = app.user("bob").await;
    let answered = id_of(&answered(&user, &ask("hello")).await);
    let prompt = format!("chatcmpl-{}", user.prompt("hello").await);
    upstream.plan(Reply::error(500, &[]));
    assert_eq!(chat(&user, &ask("hello")).send().await.status, 502);
    let failed = user.all_prompts().await[0]["id"].clone();
    let gate = Gate::new();
    upstream.plan(held_answer(&gate));
    let client = posting(chat(&user, &ask("hello")));
    eventually!(user.all_prompts().await[0]["status"] == "running");
    let running = user.all_prompts().await[0]["id"].clone();

    assert_eq!(listed(&user, "").await, [answered.as_str()]);
    assert!(listed(&stranger, "").await.is_empty());
    let unknown = "chatcmpl-999999".to_owned();
    for (user, id) in [
        (&stranger, answered.clone()),
        (&user, prompt),
        (&user, format!("chatcmpl-{failed}")),
        (&user, format!("chatcmpl-{running}")),
        (&user, unknown),
        (&user, "chatcmpl-".to_owned()),
        (&user, "chatcmpl-+1".to_owned()),
        (&user, answered.replace("chatcmpl-", "")),
    ] {
        let labels = user
            .post(&path(&id))
            .json(&json!({ "metadata": { "a": "b" } }));
        for request in [
            user.get(&path(&id)),
            user.get(&format!("{}/messages", path(&id))),
            user.delete(&path(&id)),
            labels,
        ] {
            let none = request.send().await;
            assert_eq!(none.status, 404, "{id}: {none:?}");
            assert_eq!(none.json()["error"]["message"], "Not found.", "{id}");
        }
    }
    gate.open();
    assert_eq!(client.await.unwrap().status, 200);
    assert_eq!(listed(&user, "").await.len(), 2);
}

#[tokio::test]
async fn long_calls_end_a_page_early() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    let long = "word ".repeat(140_000);
    let mut ids = Vec::new();
    for _ in 0..2 {
        let request = with(
            ask(""),
            &json!({ "messages": [{ "role": "system", "content": long }] }),
        );
        ids.push(id_of(&answered(&user, &streamed_off(request)).await));
    }
    let page = user.get(CHAT).send().await.json();
    assert_eq!(page["data"].as_array().unwrap().len(), 1);
    assert_eq!(page["has_more"], true);
    assert_eq!(
        listed(&user, &format!("?after={}", ids[0])).await,
        [ids[1].clone()]
    );
    let messages = user
        .get(&format!("{}/messages", path(&ids[1])))
        .send()
        .await;
    assert_eq!(messages.json()["data"][0]["content"], long.as_str());
}

#[tokio::test]
async fn half_characters_and_long_numbers_come_back_as_they_were_written() {
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |_| ()).await;
    let content = r#""content":"cut \ud83d","n":1e400"#;
    let choices = format!(
        r#"[{{"index":0,"finish_reason":"stop","message":{{"role":"assistant",{content}}}}}]"#
    );
    let answer = format!(r#"{{"id":"up","model":"scripted-1","choices":{choices}}}"#);
    upstream.plan(Reply::of(200, "application/json", &[], &answer));
    let message = format!(r#"{{"role":"user",{content}}}"#);
    let request = format!(
        r#"{{"model":"asked-1","messages":[{message}],"seed":0.100000000000000000001,"metadata":{{"a":"b","c":"\ud83d"}}}}"#
    );
    let post = |body: String| {
        let post = user.post(CHAT).header("idempotency-key", "k");
        post.body("application/json", body).send()
    };
    let answered = post(request.clone()).await;
    assert_eq!(answered.status, 200, "{answered:?}");
    assert_eq!(upstream.requests()[0].bytes, request);
    let id = answered.text().split('"').nth(3).unwrap().to_owned();
    let text = async |path: String| user.get(&path).send().await.text().to_owned();
    let messages = text(format!("{}/messages", path(&id))).await;
    let expected = format!(r#"[{{"id":"{id}-0","role":"user",{content}}}]"#);
    assert!(messages.contains(&expected), "{messages}");
    for shown in [text(path(&id)).await, text(CHAT.to_owned()).await] {
        for part in [
            &*choices,
            r#""seed":0.100000000000000000001"#,
            "\"metadata\":{\"a\":\"b\",\"c\":\"\u{fffd}\"}",
        ] {
            assert!(shown.contains(part), "{part} in {shown}");
        }
    }
    let streamed = request.replacen('{', r#"{"stream":true,"#, 1);
    let replayed = post(streamed).await;
    assert_eq!(replayed.header("idempotent-replayed"), Some("true"));
    let delta = format!(r#""delta":{{"role":"assistant",{content}}}"#);
    assert!(replayed.text().contains(&delta), "{}", replayed.text());
}

#[tokio::test]
async fn calls_larger_than_a_user_may_hold_are_shown_listed_labelled_and_deleted() {
    const BUDGET: usize = 16 << 20;
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |config| config.server.request_memory = BUDGET).await;
    // Kept twice: as the prompt and as the messages.
    let long = "word ".repeat(BUDGET / 8 * 3 / 2 / 5 + 1000);
    let first = id_of(&answered(&user, &ask(&long)).await);
    let settings =
        json!({ "tools": [{ "type": "function", "function": { "description": long } }] });
    let second = id_of(&answered(&user, &with(ask("hello"), &settings)).await);
    let third = id_of(&answered(&user, &ask("hello")).await);
    eventually!(app.metric("request_memory_bytes").await == Some(0.0));

    let messages = user.get(&format!("{}/messages", path(&first))).send().await;
    assert_eq!(messages.json()["data"][0]["content"], long.as_str());
    let shown = user.get(&path(&second)).send().await.json();
    assert_eq!(shown["tools"], settings["tools"]);
    let (mut all, mut after) = (Vec::new(), String::new());
    while let Some(id) = listed(&user, &format!("?limit=1{after}")).await.pop() {
        after = format!("&after={id}");
        all.push(id);
    }
    assert_eq!(all, [first.clone(), second.clone(), third.clone()]);
    let page = user
        .get(&format!("{CHAT}?after={first}"))
        .send()
        .await
        .json();
    assert_eq!(
        (&page["data"][0]["id"], &page["has_more"]),
        (&json!(second), &json!(true))
    );
    // Its settings find no room beside themselves.
    assert_eq!(page["data"][0]["choices"], json!([]));
    for id in [&first, &second] {
        eventually!(app.metric("request_memory_bytes").await == Some(0.0));
        let labels = json!({ "metadata": { "topic": "long" } });
        let labelled = user.post(&path(id)).json(&labels).send().await;
        assert_eq!(labelled.status, 200, "{}", labelled.text());
        assert_eq!(labelled.json()["metadata"], labels["metadata"]);
        let gone = user.delete(&path(id)).send().await;
        assert_eq!(gone.status, 200, "{gone:?}");
    }
    assert_eq!(listed(&user, "").await, [third]);
}

/// The request with the member that says that nothing is streamed.
fn streamed_off(request: Value) -> Value {
    with(streamed(request), &json!({ "stream": false }))
}
