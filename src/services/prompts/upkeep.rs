//! What has to be done again and again while prompts are answered.

use std::time::Duration;

use super::{Prompts, announcements};
use crate::domain::PromptId;
use crate::error::{Error, FailedPrompt};

/// How long it takes at most until calls are looked for whose lease ran out.
const LAPSE_EVERY: Duration = Duration::from_secs(5);
/// Calls ended at once.
const LAPSE_BATCH: usize = 256;

impl Prompts {
    /// How often leases are to be tended: three attempts may fail before one runs out.
    pub fn tend_leases_every(&self) -> Duration {
        (self.0.parts.calls.lease / 4).min(LAPSE_EVERY)
    }

    /// Renews the leases of the calls in progress, then ends the calls whose lease ran out. In this order, and not the second
    /// without the first: a process that stood still, or could not reach the store, for longer than a lease must not take its
    /// own calls for those of a dead one.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn tend_leases(&self) -> Result<(), Error> {
        self.renew_leases().await?;
        self.lapse_calls().await
    }

    fn live_ids(&self) -> Vec<PromptId> {
        self.0.live().keys().copied().collect()
    }

    async fn renew_leases(&self) -> Result<(), Error> {
        let ids = self.live_ids();
        if ids.is_empty() {
            return Ok(());
        }
        let parts = &self.0.parts;
        parts
            .call_store
            .renew_leases(parts.replica, &ids, parts.calls.lease)
            .await?;
        Ok(())
    }

    /// Ends the calls of processes that died, this one's earlier lives among them, and tells their users' sockets. Calls in this
    /// process's hands are spared, whatever the store's clock says.
    async fn lapse_calls(&self) -> Result<(), Error> {
        let parts = &self.0.parts;
        loop {
            let lapsed = parts
                .call_store
                .lapse_calls(LAPSE_BATCH, &self.live_ids())
                .await?;
            for call in &lapsed {
                parts.metrics.calls_lapsed.inc();
                super::count_outcome(parts, call.prompt.status);
                if call.announce {
                    let failed = FailedPrompt::of(&call.prompt);
                    announcements::failed(parts, call.prompt.user_id, &failed);
                }
            }
            if !lapsed.is_empty() {
                tracing::warn!(
                    calls = lapsed.len(),
                    "calls of an ended process were given up"
                );
            }
            if lapsed.len() < LAPSE_BATCH {
                return Ok(());
            }
        }
    }
}
