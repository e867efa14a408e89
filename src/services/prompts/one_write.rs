//! A post that the built-in mock answers: it costs nothing and takes no time, so one write after the answer is enough. A crash
//! leaves nothing of it, and nothing was paid.

use tokio::sync::oneshot;

use super::finish::millis;
use super::work::{Admission, Answer, Cut, Ended, count, embed};
use super::{CreatePrompt, Created, Inner, announcements};
use crate::config::OnClientDisconnect;
use crate::domain::PromptStatus;
use crate::error::{Error, FailedPrompt};
use crate::store::{self, NewPrompt};

/// Serves the post and answers it.
pub(super) async fn run(
    inner: &Inner,
    admission: Admission,
    new: CreatePrompt,
    mut reply: oneshot::Sender<Result<Created, Error>>,
) {
    let answer = match outcome(inner, admission, &new, &mut reply).await {
        Ok(Ok(answer)) => keep(inner, new, answer).await,
        Ok(Err(ended)) => fail(inner, new, ended).await,
        Err(error) => Err(error),
    };
    // Without a receiver the caller is gone, and what was stored stays.
    let _ = reply.send(answer);
}

/// The answer, or why there is none; an error if nothing was begun.
async fn outcome(
    inner: &Inner,
    admission: Admission,
    new: &CreatePrompt,
    reply: &mut oneshot::Sender<Result<Created, Error>>,
) -> Result<Result<Answer, Ended>, Error> {
    let parts = &inner.parts;
    if let Some(refusal) = count(parts, new.now).await? {
        return Ok(Err(Ended::Failed(refusal)));
    }
    let deserted = async {
        match parts.calls.on_client_disconnect {
            OnClientDisconnect::Cancel => reply.closed().await,
            OnClientDisconnect::Finish => std::future::pending().await,
        }
    };
    // What fails first ends the other.
    let working = async {
        let (completion, embedding) = tokio::try_join!(
            async {
                let memory = admission.memory;
                let answer = parts
                    .llm
                    .complete(admission.call, memory, &new.prompt, None);
                answer.await.map_err(Ended::Failed)
            },
            async {
                let embedding = embed(parts, admission.text, &new.prompt);
                embedding.await.map_err(Ended::Broken)
            },
        )?;
        Ok(Answer {
            completion,
            embedding: Some(embedding),
        })
    };
    Ok(tokio::select! {
        biased;
        outcome = working => outcome,
        () = deserted => Err(Ended::Cut(Cut::Deserted)),
        () = inner.cut.cancelled() => Err(Ended::Cut(Cut::Stopping)),
    })
}

async fn keep(inner: &Inner, new: CreatePrompt, answer: Answer) -> Result<Created, Error> {
    let parts = &inner.parts;
    let Answer {
        completion,
        embedding,
    } = answer;
    let took = completion.upstream_duration;
    let inserted = parts
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
            embedding: embedding
                .clone()
                .map(|embedding| (parts.model.clone(), embedding)),
            max_prompts: parts.calls.max_prompts_per_user,
        })
        .await;
    if let Err(store::Error::Unavailable(_)) = inserted {
        // It may be stored all the same.
        parts.similarity.invalidate(new.user_id);
    }
    let prompt = inserted?;
    super::make_searchable(parts, &prompt, embedding.as_ref());
    super::count_outcome(parts, prompt.status);
    if new.announce {
        announcements::completed(parts, &prompt);
    }
    Ok(Created::Answered {
        prompt: prompt.into(),
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
            max_prompts: parts.calls.max_prompts_per_user,
        })
        .await?;
    super::count_outcome(parts, stored.status);
    let failed = ended.told(FailedPrompt::of(&stored));
    if new.announce {
        announcements::failed(parts, stored.user_id, &failed);
    }
    Err(Error::Failed(failed))
}
