//! Chat requests: they pass with all their members, and so do their answers.

mod accumulated;
mod refusals;
mod requests;
mod streams;

use bytes::Bytes;
use prompt_service::llm::{
    AnswerSink, AttemptLog, ChatRequest, Completion, Content, Failure, Question,
};

use super::{USER, Watched, memory};
use crate::support::DEADLINE;

/// Keeps what is handed over.
#[derive(Default)]
struct Kept {
    text: String,
    chunks: Vec<String>,
}

impl AnswerSink for Kept {
    fn text(&mut self, piece: &str) {
        self.text.push_str(piece);
    }

    fn chunk(&mut self, json: &[u8]) {
        self.chunks.push(String::from_utf8(json.to_vec()).unwrap());
    }
}

fn parsed(body: &str) -> ChatRequest {
    ChatRequest::parse(Bytes::copy_from_slice(body.as_bytes())).unwrap()
}

/// Asks with that body. Returns what was handed over, too.
async fn ask(client: &Watched, body: &str) -> (Kept, Result<Completion, Failure>) {
    let (request, mut kept) = (parsed(body), Kept::default());
    let route = client.client.route(Some(request.model())).unwrap();
    let question = Question {
        route: &route,
        content: Content::Chat(&request),
        attempts: AttemptLog::default(),
    };
    let permit = client.client.admit(USER).unwrap();
    let call = client
        .client
        .complete(permit, memory(), question, Some(&mut kept));
    let answer = tokio::time::timeout(DEADLINE, call).await.unwrap();
    (kept, answer)
}

/// The whole answer.
fn answer_of(completion: &Completion) -> serde_json::Value {
    serde_json::from_slice(completion.answer.as_ref().unwrap()).unwrap()
}
