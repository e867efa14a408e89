//! Large bodies, and media inside them.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{CHAT, answered, ask, id_of, number, path, with};
use crate::support::{Upstream, config_in};
use crate::transfer::command;
use crate::upstream::{service, shown};

#[tokio::test]
async fn bodies_up_to_the_bound_are_taken_and_no_larger_ones() {
    const MOST: usize = 3 << 20;
    let upstream = Upstream::start().await;
    let (_app, user) = service(&upstream, |config| config.server.max_v1_body = MOST).await;
    let mut request = ask("hello").to_string();
    request.push_str(&" ".repeat(MOST - request.len()));
    let post = |body: String| user.post(CHAT).body("application/json", body).send();
    let taken = post(request.clone()).await;
    assert_eq!(taken.status, 200, "{taken:?}");
    assert_eq!(upstream.requests()[0].bytes, request);
    let refused = post(format!("{request} ")).await;
    assert_eq!(refused.status, 413, "{refused:?}");
    let message = "The request body is larger than 3 MiB.";
    assert_eq!(refused.json()["error"]["message"], message);
    assert_eq!(upstream.requests().len(), 1);
}

#[tokio::test]
async fn media_reach_the_upstream_whole_and_are_stored_by_type_size_and_hash() {
    let upstream = Upstream::start().await;
    let (app, user) = service(&upstream, |_| ()).await;
    let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let data = STANDARD.encode(&bytes);
    let messages = json!([{ "role": "user", "content": [
        { "type": "text", "text": "What is this?" },
        { "type": "image_url", "image_url": { "url": format!("data:image/png;base64,{data}"), "detail": "low" } },
        { "type": "input_audio", "input_audio": { "data": data, "format": "wav" } },
        { "type": "file", "file": { "filename": "a.pdf", "file_data": format!("data:application/pdf;base64,{data}") } },
    ] }]);
    let request = with(ask(""), &json!({ "messages": messages }));
    let id = id_of(&answered(&user, &request).await);
    assert_eq!(upstream.requests()[0].bytes, request.to_string());
    let stored = user.get(&format!("{}/messages", path(&id))).send().await;
    let content = &stored.json()["data"][0]["content"];
    let hash: String = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let kept = |media_type: &str| json!({ "media_type": media_type, "size_bytes": 100_000, "sha256": hash });
    let expected: Value = json!([
        { "type": "text", "text": "What is this?" },
        { "type": "image_url", "image_url": { "url": kept("image/png"), "detail": "low" } },
        { "type": "input_audio", "input_audio": { "data": kept("audio/wav"), "format": "wav" } },
        { "type": "file", "file": { "filename": "a.pdf", "file_data": kept("application/pdf") } },
    ]);
    assert_eq!(*content, expected);
    assert_eq!(shown(&user, number(&id)).await["prompt"], "What is this?");
    let mut config = config_in(app.folder.path());
    config.store = app.folder.store_config().await;
    let stored = command(&config, &["export"]).await.unwrap();
    assert!(!stored.contains(&data[..100]));
    assert!(stored.contains(&hash));
}
