//! Periodic renewal of leases, and the end of expired calls.

use std::time::Duration;

use super::Prompts;
use super::events::{self, Event};
use crate::domain::PromptId;
use crate::error::{Error, FailedPrompt};

/// The longest pause between two looks for expired calls.
const EXPIRE_EVERY: Duration = Duration::from_secs(5);
/// Calls ended in one transaction.
const EXPIRE_BATCH: usize = 256;

impl Prompts {
    /// How often [`tend_leases`](Self::tend_leases) must run: three renewals may fail before a
    /// lease expires.
    pub fn tend_leases_every(&self) -> Duration {
        (self.0.deps.calls.lease / 4).min(EXPIRE_EVERY)
    }

    /// Renews the leases of this process's calls, then ends the calls whose lease expired. In this
    /// order, and expires nothing if the renewal failed: a process that stood still, or could not
    /// reach the store, for longer than a lease must not end the calls that it runs.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn tend_leases(&self) -> Result<(), Error> {
        self.renew_leases().await?;
        self.expire_calls().await
    }

    fn running_ids(&self) -> Vec<PromptId> {
        self.0.streams.lock().keys().copied().collect()
    }

    async fn renew_leases(&self) -> Result<(), Error> {
        let ids = self.running_ids();
        if ids.is_empty() {
            return Ok(());
        }
        let deps = &self.0.deps;
        let lease = deps.calls.lease;
        let calls = &deps.call_store;
        calls.renew_leases(deps.replica, &ids, lease).await?;
        Ok(())
    }

    /// Ends the calls of processes that died, earlier lives of this one among them, and reports
    /// them to their users' sockets. Spares this process's calls, whatever the store's clock says.
    async fn expire_calls(&self) -> Result<(), Error> {
        let deps = &self.0.deps;
        loop {
            let expired = deps
                .call_store
                .expire_calls(EXPIRE_BATCH, &self.running_ids())
                .await?;
            for call in &expired {
                let prompt = &call.prompt;
                deps.metrics.calls_lapsed.inc();
                super::count_outcome(deps, prompt.status);
                tracing::warn!(
                    prompt_id = prompt.id.0,
                    user_id = prompt.user_id.0,
                    "the call of a process that ended has expired"
                );
                if call.announce {
                    let failed = FailedPrompt::of(prompt);
                    events::publish(deps, prompt.user_id, &Event::Failed(&failed));
                }
            }
            if expired.len() < EXPIRE_BATCH {
                return Ok(());
            }
        }
    }
}
