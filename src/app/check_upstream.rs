//! Whether the upstreams are where they are said to be, take their keys and have their models. Asks
//! for their lists of models, which costs nothing.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::check::{Finding, Verdict};
use super::make_llm;
use crate::config::{Config, UpstreamConfig};
use crate::llm;
use crate::telemetry::Metrics;

/// How long before a model ends one had better know of it.
const NOTICE: Duration = Duration::from_secs(90 * 86_400);

/// A finding for each upstream. `must_be_right`: what stands in the way of an answer is a fault,
/// not only worth knowing.
pub(super) async fn findings(config: &Config, must_be_right: bool) -> Vec<Finding> {
    let Some(upstream) = &config.upstream else {
        let note = "none is set: prompts are answered by the built-in mock";
        return vec![(Verdict::Note, note.to_owned())];
    };
    let client = match make_llm(Some(upstream), &Arc::new(Metrics::new())) {
        Ok(client) => client,
        Err(error) => return vec![(Verdict::Fault, format!("{error:#}"))],
    };
    let wrong = if must_be_right {
        Verdict::Fault
    } else {
        Verdict::Note
    };
    let looks = client.look().await;
    looks
        .iter()
        .map(|look| finding(look, upstream, wrong))
        .collect()
}

fn finding(look: &llm::Look, upstream: &UpstreamConfig, wrong: Verdict) -> Finding {
    let (url, model) = (&look.url, &look.model);
    let has_key = upstream.endpoints[look.place].api_key.is_some();
    let [address, key, model_setting] = settings(look.place);
    let (verdict, text) = match &look.finding {
        llm::Finding::HasModel {
            key_was_tried,
            shutdown,
        } => match ending(*shutdown) {
            Some(day) => (
                Verdict::Note,
                format!(
                    "the model {model} ends on {day} (its shutdown_date): set another in {model_setting}"
                ),
            ),
            None if has_key && !key_was_tried => (
                Verdict::Fine,
                format!(
                    "it has the model {model}; it shows its models to everybody, so the key was not tried"
                ),
            ),
            None if has_key => (
                Verdict::Fine,
                format!("it takes the key and has the model {model}"),
            ),
            None => (Verdict::Fine, format!("it has the model {model}")),
        },
        llm::Finding::OtherModels { number, similar } => {
            let hint = similar
                .as_ref()
                .map_or_else(String::new, |name| format!(", but {name}"));
            (
                wrong,
                format!("among its {number} models there is no {model}{hint}: set {model_setting}"),
            )
        }
        llm::Finding::KeyRefused(status) if has_key => (
            wrong,
            format!("it refuses the key (status {status}): set {key}"),
        ),
        llm::Finding::KeyRefused(status) => (
            wrong,
            format!("it wants a key (status {status}): set {key}"),
        ),
        llm::Finding::NoList {
            status,
            better: Some(better),
        } => (
            wrong,
            format!(
                "it has no list of models there (status {status}), but there is one under {better}: set {address} to that"
            ),
        ),
        llm::Finding::NoList {
            status,
            better: None,
        } => (
            wrong,
            format!(
                "it has no list of models there (status {status}): is the path in {address} right? Few servers have no such list"
            ),
        ),
        llm::Finding::Unavailable(status) => {
            (wrong, format!("it cannot say just now (status {status})"))
        }
        llm::Finding::Unreachable(word) => (
            wrong,
            format!("it cannot be reached ({word}): is {address} right, and is it running?"),
        ),
    };
    (verdict, format!("{} ({url}): {text}", look.upstream))
}

/// The settings of an upstream's address, key and model.
fn settings(place: usize) -> [String; 3] {
    match place {
        0 => ["OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"].map(str::to_owned),
        _ => ["base_url", "api_key_env", "model"]
            .map(|member| format!("{member} of entry {place} of OPENAI_FALLBACK")),
    }
}

/// The day on which a model ends, if that is near or over.
fn ending(shutdown: Option<SystemTime>) -> Option<String> {
    let near = SystemTime::now() + NOTICE;
    let shutdown = shutdown.filter(|shutdown| *shutdown <= near)?;
    let mut day = humantime::format_rfc3339_seconds(shutdown).to_string();
    day.truncate("2026-12-11".len());
    Some(day)
}

/// Says in the log which of the configured models end soon.
pub(super) async fn warn_of_endings(client: &llm::Client) {
    for look in client.look().await {
        if let llm::Finding::HasModel { shutdown, .. } = look.finding
            && let Some(shutdown_date) = ending(shutdown)
        {
            let (upstream, model) = (look.upstream, look.model);
            tracing::warn!(
                upstream,
                model,
                shutdown_date,
                "the upstream ends this model soon: set another"
            );
        }
    }
}
