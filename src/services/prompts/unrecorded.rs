//! A post that nobody needs to know of before its answer: one write, after the answer.

use std::time::Duration;

use tokio::sync::oneshot;

use super::work::{Admission, Answer, Cut, Ended, count, work};
use super::{CreatePrompt, Created, Inner, announcements};
use crate::config::OnClientDisconnect;
use crate::domain::PromptStatus;
use crate::error::{Error, FailedPrompt};
use crate::store::NewPrompt;

/// Serves the post and answers it.
pub(super) async fn run(
    inner: &Inner,
    admission: Admission,
    new: CreatePrompt,
    mut reply: oneshot::Sender<Result<Created, Error>>,
) {
    let outcome = outcome(inner, admission, &new, &mut reply).await;
    let answer = match outcome {
        Ok(answer) => keep(inner, new, answer).await,
        Err(ended) => fail(inner, new, ended).await,
    };
    // Without a receiver the caller is gone, and what was stored stays.
    let _ = reply.send(answer);
}

async fn outcome(
    inner: &Inner,
    admission: Admission,
    new: &CreatePrompt,
    reply: &mut oneshot::Sender<Result<Created, Error>>,
) -> Result<Answer, Ended> {
    let parts = &inner.parts;
    let deserted = async {
        match parts.calls.on_client_disconnect {
            OnClientDisconnect::Cancel => reply.closed().await,
            OnClientDisconnect::Finish => std::future::pending().await,
        }
    };
    let working = async {
        count(parts, new.now).await?;
        work(parts, admission, &new.prompt, None).await
    };
    tokio::select! {
        biased;
        outcome = working => outcome,
        () = deserted => Err(Ended::Cut(Cut::Deserted)),
        () = inner.cut.cancelled() => Err(Ended::Cut(Cut::Stopping)),
    }
}

async fn keep(inner: &Inner, new: CreatePrompt, answer: Answer) -> Result<Created, Error> {
    let parts = &inner.parts;
    let Answer {
        completion,
        embedding,
    } = answer;
    let took = completion.upstream_duration;
    let prompt = parts
        .store
        .insert_prompt(NewPrompt {
            user_id: new.user_id,
            prompt: new.prompt,
            response: Some(completion.text),
            model: completion.model,
            status: PromptStatus::Completed,
            error: None,
            finish_reason: completion.finish_reason,
            created_at: new.now,
            llm_duration_ms: Some(millis(took)),
            prompt_tokens: completion.prompt_tokens,
            completion_tokens: completion.completion_tokens,
            embedding: Some((parts.model.clone(), embedding.clone())),
        })
        .await?;
    parts
        .similarity
        .inserted(prompt.user_id, prompt.id, &embedding);
    super::count_outcome(parts, prompt.status);
    if new.announce {
        announcements::completed(parts, &prompt);
    }
    Ok(Created::Answered {
        prompt,
        upstream: Some(took),
        is_replayed: false,
    })
}

async fn fail(inner: &Inner, new: CreatePrompt, ended: Ended) -> Result<Created, Error> {
    let parts = &inner.parts;
    let code = ended.code();
    let stored = parts
        .store
        .insert_prompt(NewPrompt {
            user_id: new.user_id,
            prompt: new.prompt,
            response: None,
            model: parts.llm.model().to_owned(),
            status: PromptStatus::Failed,
            error: Some(code),
            finish_reason: None,
            created_at: new.now,
            llm_duration_ms: None,
            prompt_tokens: None,
            completion_tokens: None,
            embedding: None,
        })
        .await?;
    super::count_outcome(parts, stored.status);
    let failed = ended.told(FailedPrompt::of(&stored));
    if new.announce {
        announcements::failed(parts, stored.user_id, &failed);
    }
    Err(Error::Failed(failed))
}

/// Whole milliseconds, as they are stored.
pub(super) fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
