//! Checks that the upstreams can be reached, accept their keys and have their models. It asks for
//! their lists of models, which costs nothing.

use std::time::{Duration, SystemTime};

use anyhow::anyhow;

use super::preflight::Finding;
use crate::config::UpstreamConfig;
use crate::llm;

/// How long before a model ends the operator is warned.
const NOTICE: Duration = Duration::from_secs(90 * 86_400);

/// A finding for each upstream of `client`. `must_be_right`: a problem because of which prompts
/// fail is an error, not only worth knowing.
pub(super) async fn findings(
    client: &llm::Client,
    upstream: &UpstreamConfig,
    must_be_right: bool,
) -> Vec<anyhow::Result<Finding>> {
    let checks = client.check_models().await;
    checks
        .iter()
        .map(|check| {
            let (is_right, text) = finding(check, upstream);
            let text = format!("{} ({}): {text}", check.upstream, check.url);
            match is_right {
                Some(true) => Ok(Finding::Fine(text)),
                Some(false) if must_be_right => Err(anyhow!(text)),
                Some(false) | None => Ok(Finding::Note(text)),
            }
        })
        .collect()
}

/// The finding in words, and whether the upstream is usable; `None` if it is, but not for long.
fn finding(check: &llm::UpstreamCheck, upstream: &UpstreamConfig) -> (Option<bool>, String) {
    let model = &check.model;
    let has_key = upstream.endpoints[check.index].api_key.is_some();
    let [address, key, model_setting] = settings(check, upstream);
    let text = match &check.finding {
        llm::ModelFinding::HasModel {
            key_was_tried,
            shutdown,
        } => {
            if let Some(day) = ending(*shutdown) {
                let text = format!(
                    "the model {model} ends on {day} (its shutdown_date): set another in {model_setting}"
                );
                return (None, text);
            }
            let text = if has_key && !key_was_tried {
                format!(
                    "it has the model {model}; it shows its models to everybody, so the key was not tried"
                )
            } else if has_key {
                format!("it takes the key and has the model {model}")
            } else {
                format!("it has the model {model}")
            };
            return (Some(true), text);
        }
        llm::ModelFinding::Lists {
            number,
            key_was_tried,
        } => {
            let (is_right, text) = match number {
                0 => (
                    false,
                    format!("none of its models matches: set {model_setting}"),
                ),
                number => (true, format!("{number} of its models match")),
            };
            let note = match has_key && !key_was_tried {
                true => "; it shows its models to everybody, so the key was not tried",
                false => "",
            };
            return (Some(is_right), format!("{text}{note}"));
        }
        llm::ModelFinding::OtherModels { number, similar } => {
            let hint = similar
                .as_ref()
                .map_or_else(String::new, |name| format!(", but {name}"));
            format!("among its {number} models there is no {model}{hint}: set {model_setting}")
        }
        llm::ModelFinding::KeyRefused(status) if has_key => {
            format!("it refuses the key (status {status}): set {key}")
        }
        llm::ModelFinding::KeyRefused(status) => {
            format!("it wants a key (status {status}): set {key}")
        }
        llm::ModelFinding::NoList {
            status,
            better: Some(better),
        } => format!(
            "it has no list of models there (status {status}), but there is one under {better}: set {address} to that"
        ),
        llm::ModelFinding::NoList {
            status,
            better: None,
        } => format!(
            "it has no list of models there (status {status}): is the path in {address} right? Few servers have no such list"
        ),
        llm::ModelFinding::Unavailable(status) => {
            format!("it cannot say just now (status {status})")
        }
        llm::ModelFinding::Unreachable(word) => {
            format!("it cannot be reached ({word}): is {address} right, and is it running?")
        }
    };
    (Some(false), text)
}

/// The settings of an upstream's address, key and model.
fn settings(check: &llm::UpstreamCheck, upstream: &UpstreamConfig) -> [String; 3] {
    let name = &check.upstream;
    match check.index {
        _ if upstream.is_list => ["base_url", "key_env", "models"]
            .map(|member| format!("{member} of {name} in UPSTREAMS")),
        0 => ["OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"].map(str::to_owned),
        place => ["base_url", "api_key_env", "model"]
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

/// Logs which of the configured models end soon.
pub(super) async fn warn_of_endings(client: &llm::Client) {
    for check in client.check_models().await {
        if let llm::ModelFinding::HasModel { shutdown, .. } = check.finding
            && let Some(shutdown_date) = ending(shutdown)
        {
            let (upstream, model) = (check.upstream, check.model);
            tracing::warn!(
                upstream,
                model,
                shutdown_date,
                "the upstream ends this model soon: set another"
            );
        }
    }
}
