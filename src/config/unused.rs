//! Settings that are set and have no effect together with the others.

use super::{Settings, SimilarScope, StoreConfig, UpstreamList};

/// A sentence for each group of settings that the operator set and that nothing reads: without a
/// word the operator would believe in them.
pub(super) fn unused(
    settings: &Settings,
    has_upstream: bool,
    has_redis: bool,
    store: &StoreConfig,
) -> Vec<String> {
    let given = |name: &str| settings.given.settings.iter().any(|given| given == name);
    let mut sentences = Vec::new();
    if !has_upstream {
        let is_of_upstream = |name: &&String| {
            name.starts_with("OPENAI_")
                || ["SYSTEM_PROMPT", "UPSTREAM_DAILY_LIMIT"].contains(&name.as_str())
        };
        let names: Vec<&str> = settings
            .given
            .settings
            .iter()
            .filter(is_of_upstream)
            .map(String::as_str)
            .collect();
        if !names.is_empty() {
            sentences.push(format!(
                "{}: set for an upstream, and there is none: the built-in mock answers; set OPENAI_API_KEY, OPENAI_BASE_URL or UPSTREAMS",
                names.join(", ")
            ));
        }
    }
    let is_postgres = matches!(store, StoreConfig::Postgres { .. });
    if given("REDIS_PREFIX") && !has_redis {
        sentences.push("REDIS_PREFIX: has no effect without REDIS_URL".to_owned());
    }
    if given("DATABASE_POOL_SIZE") && !is_postgres {
        sentences.push(
            "DATABASE_POOL_SIZE: has no effect on the embedded store; set DATABASE_URL to postgres://… or unset it"
                .to_owned(),
        );
    }
    if given("SEARCH_MEMORY") && is_postgres {
        sentences.push(
            "SEARCH_MEMORY: has no effect on PostgreSQL, which finds vectors itself".to_owned(),
        );
    } else if given("SEARCH_MEMORY") && settings.similar_scope == SimilarScope::Shared {
        sentences.push(
            "SEARCH_MEMORY: has no effect with SIMILAR_SCOPE=shared, which keeps all vectors in memory"
                .to_owned(),
        );
    }
    sentences
}

/// A sentence if `OPENAI_API_KEY` is set and no upstream of a list gets it.
pub(super) fn key(has_key: bool, list: &UpstreamList) -> Option<String> {
    const KEY: &str = "OPENAI_API_KEY";
    let is_unused = has_key && !list.0.is_empty() && list.key_variables().all(|name| name != KEY);
    is_unused.then(|| format!("{KEY}: has no effect, because no key_env in UPSTREAMS names it"))
}
