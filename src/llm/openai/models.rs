//! An upstream's list of models: `GET …/models`. It costs nothing, and shows whether address, key
//! and model are right.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::{BodyExt, Limited};
use hyper::Uri;

use super::endpoint::UpstreamEndpoint;
use super::line::one_line;
use super::reader::JsonValue;
use crate::config::{Endpoint, ModelPattern, ServedModels, UpstreamConfig, is_model_name};
use crate::llm::mock;

/// How long an upstream may take for one answer.
const TIME: Duration = Duration::from_secs(10);
/// Longest list that is read; those of gateways to hundreds of models have about 1 MB.
const MOST_BYTES: usize = 8 << 20;

/// What the list of models of one upstream shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamCheck {
    /// The upstream's name.
    pub upstream: String,
    /// Its index in the list of upstreams.
    pub index: usize,
    /// The address of its list.
    pub url: String,
    /// The model that is configured; empty if only patterns are.
    pub model: String,
    /// What was found.
    pub finding: ModelFinding,
}

/// What an upstream's list says about the configured model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelFinding {
    /// It has the model.
    HasModel {
        /// Whether the list needed the key. Some upstreams show it to everybody, and the key may be
        /// wrong then.
        key_was_tried: bool,
        /// When the model ends, where that is known.
        shutdown: Option<SystemTime>,
    },
    /// It has other models.
    OtherModels {
        /// How many.
        number: usize,
        /// A model with a similar name.
        similar: Option<String>,
    },
    /// It has a list, and its configuration names patterns alone.
    Lists {
        /// How many models match.
        number: usize,
        /// As for `HasModel`.
        key_was_tried: bool,
    },
    /// It refuses the key, or needs one.
    KeyRefused(u16),
    /// There is no list of models at the address.
    NoList {
        /// The status of the answer.
        status: u16,
        /// The base URL under which there is one.
        better: Option<String>,
    },
    /// It responds, but cannot give the list at the moment.
    Unavailable(u16),
    /// There was no response in time. The reason is one of a few words.
    Unreachable(&'static str),
}

/// A model that callers can ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedModel {
    /// Its name.
    pub id: String,
    /// The upstream that serves it.
    pub upstream: String,
    /// When it was made, in seconds since 1970, if the upstream says so.
    pub created: Option<u64>,
    /// Who has made it, if the upstream says so; one line of at most 200 characters.
    pub owned_by: Option<String>,
    /// When it ends, if the upstream says so.
    pub shutdown: Option<SystemTime>,
}

impl ListedModel {
    /// The mock's.
    pub fn mock() -> Self {
        Self {
            id: mock::NAME.to_owned(),
            upstream: mock::NAME.to_owned(),
            created: None,
            owned_by: None,
            shutdown: None,
        }
    }
}

/// How long a list is used before the upstream is asked again.
const FRESH: Duration = Duration::from_secs(300);
/// How long an upstream that gave no list is not asked again.
const AFTER_FAILURE: Duration = Duration::from_secs(30);
/// Models of one upstream that are kept. The largest gateways have some hundreds.
const MOST_MODELS: usize = 10_000;
/// Longest `owned_by`, in characters.
const OWNER_CHARS: usize = 200;

/// The list of models that an upstream gave last.
#[derive(Debug, Default)]
pub struct ModelCache {
    kept: parking_lot::Mutex<KeptList>,
    /// Held by the one caller that asks the upstream.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Clone, Debug, Default)]
struct KeptList {
    entries: Option<Arc<Vec<ListEntry>>>,
    /// When the upstream may be asked again; at once if it was never asked.
    next: Option<Instant>,
}

impl KeptList {
    fn is_due(&self) -> bool {
        self.next.is_none_or(|next| next <= Instant::now())
    }
}

/// The models of all upstreams, in the order of the configuration. A name belongs to the first
/// upstream that serves it. Names that are written in the configuration are always among them.
pub async fn all(config: &UpstreamConfig, endpoints: &[UpstreamEndpoint]) -> Vec<ListedModel> {
    let lists = join_all(endpoints.iter().map(kept_or_asked)).await;
    let serving = |name: &str| {
        let mut endpoints = config.endpoints.iter();
        endpoints.position(|endpoint| endpoint.models.serves(name))
    };
    let (mut models, mut seen) = (Vec::new(), HashSet::new());
    for (at, (endpoint, entries)) in config.endpoints.iter().zip(&lists).enumerate() {
        let entries = entries.as_deref().map_or(&[][..], Vec::as_slice);
        let mut add = |id: &str, entry: Option<&ListEntry>| {
            if serving(id) == Some(at) && seen.insert(id.to_owned()) {
                models.push(ListedModel {
                    id: id.to_owned(),
                    upstream: endpoint.name.clone(),
                    created: entry.and_then(|entry| entry.created),
                    owned_by: entry.and_then(|entry| entry.owned_by.clone()),
                    shutdown: entry.and_then(|entry| entry.shutdown),
                });
            }
        };
        for (id, target) in named(endpoint, &config.default_model) {
            add(id, entries.iter().find(|entry| entry.is(target)));
        }
        for entry in entries {
            // Gateways list patterns, too.
            if is_model_name(entry.id()) && !entry.id().contains('*') {
                add(entry.id(), Some(entry));
            }
        }
    }
    models
}

/// The names that an upstream's configuration has, each with the model that is asked.
fn named<'a>(
    endpoint: &'a Endpoint,
    default_model: &'a str,
) -> impl Iterator<Item = (&'a str, &'a str)> {
    let (patterns, aliases) = match &endpoint.models {
        ServedModels::Always(_) => (&[][..], None),
        ServedModels::Matching { patterns, aliases } => (&patterns[..], Some(aliases)),
    };
    let exact = patterns.iter().filter_map(ModelPattern::exact);
    let default = patterns.iter().any(|each| each.matches(default_model));
    let aliases = aliases.into_iter().flatten();
    let names = exact.chain(default.then_some(default_model));
    names
        .map(|name| (name, name))
        .chain(aliases.map(|(alias, target)| (alias.as_str(), target.as_str())))
}

/// The list that is kept, or a new one if that is due. `None` if the upstream has never given one.
async fn kept_or_asked(endpoint: &UpstreamEndpoint) -> Option<Arc<Vec<ListEntry>>> {
    if let ServedModels::Always(_) = endpoint.config.models {
        return None;
    }
    let cache = &endpoint.models;
    let kept = cache.kept.lock().clone();
    if !kept.is_due() {
        return kept.entries;
    }
    let _asking = match (cache.asking.try_lock(), &kept.entries) {
        (Ok(asking), _) => asking,
        // Another caller asks. The old list will do until then.
        (Err(_), Some(_)) => return kept.entries,
        (Err(_), None) => cache.asking.lock().await,
    };
    let kept = cache.kept.lock().clone();
    if !kept.is_due() {
        return kept.entries;
    }
    let url = endpoint.config.base_url.join("/models");
    let entries = match get(endpoint, &url, true).await {
        Ok((200..=299, body)) => list(&body),
        Ok(_) | Err(_) => None,
    };
    let mut kept = cache.kept.lock();
    let wait = match entries {
        Some(mut entries) => {
            entries.truncate(MOST_MODELS);
            kept.entries = Some(Arc::new(entries));
            FRESH
        }
        None => AFTER_FAILURE,
    };
    kept.next = Some(Instant::now() + wait);
    kept.entries.clone()
}

/// Checks one upstream: each model that its configuration names.
pub async fn check(index: usize, endpoint: &UpstreamEndpoint, default: &str) -> Vec<UpstreamCheck> {
    let mut asked: Vec<&str> = match &endpoint.config.models {
        ServedModels::Always(model) => vec![model],
        ServedModels::Matching { .. } => named(&endpoint.config, default)
            .map(|(_, target)| target)
            .collect(),
    };
    asked.sort_unstable();
    asked.dedup();
    let of = |model: String, finding| UpstreamCheck {
        upstream: endpoint.config.name.clone(),
        index,
        url: endpoint.config.base_url.join("/models"),
        model,
        finding,
    };
    let listed = listed(endpoint)
        .await
        .unwrap_or_else(|word| Err(ModelFinding::Unreachable(word)));
    let listed = match listed {
        Ok(listed) => listed,
        Err(finding) => {
            let model = asked.first().copied().unwrap_or_default();
            return vec![of(model.to_owned(), finding)];
        }
    };
    if asked.is_empty() {
        let matching = listed.entries.iter();
        let matching = matching.filter(|entry| endpoint.config.models.serves(entry.id()));
        let finding = ModelFinding::Lists {
            number: matching.count(),
            key_was_tried: listed.key_was_tried,
        };
        return vec![of(String::new(), finding)];
    }
    let mut checks = Vec::new();
    for model in asked {
        let finding = finding(endpoint, &listed, model).await;
        checks.push(of(model.to_owned(), finding));
    }
    checks
}

/// A list, and whether it needed the key.
struct Listed {
    entries: Vec<ListEntry>,
    key_was_tried: bool,
}

/// The list of an upstream, or what is found instead.
async fn listed(endpoint: &UpstreamEndpoint) -> Result<Result<Listed, ModelFinding>, &'static str> {
    let url = endpoint.config.base_url.join("/models");
    let (status, body) = get(endpoint, &url, true).await?;
    let entries = match status {
        200..=299 => list(&body),
        401 | 403 => return Ok(Err(ModelFinding::KeyRefused(status))),
        408 | 429 | 500.. => return Ok(Err(ModelFinding::Unavailable(status))),
        _ => None,
    };
    let Some(entries) = entries else {
        return Ok(Err(ModelFinding::NoList {
            status,
            better: better(endpoint).await,
        }));
    };
    let has_key = endpoint.config.api_key.is_some();
    let is_public = has_key && matches!(get(endpoint, &url, false).await, Ok((200..=299, _)));
    Ok(Ok(Listed {
        entries,
        key_was_tried: has_key && !is_public,
    }))
}

/// What an upstream's list says about a model.
async fn finding(endpoint: &UpstreamEndpoint, listed: &Listed, asked: &str) -> ModelFinding {
    let models = &listed.entries;
    let mut found = models.iter().find(|model| model.is(asked)).cloned();
    if found.is_none() {
        // A list need not have every name by which a model can be asked.
        let url = endpoint.config.base_url.join(&format!("/models/{asked}"));
        if let Ok((200, body)) = get(endpoint, &url, true).await {
            found = ListEntry::read(JsonValue::new(body.trim_ascii()));
        }
    }
    match found {
        Some(model) => ModelFinding::HasModel {
            key_was_tried: listed.key_was_tried,
            shutdown: model.shutdown,
        },
        None => ModelFinding::OtherModels {
            number: models.len(),
            similar: similar(asked, models),
        },
    }
}

/// The base URL with a version, if there is a list under it.
async fn better(endpoint: &UpstreamEndpoint) -> Option<String> {
    let base = endpoint.config.base_url.join("/v1");
    let (status, body) = get(endpoint, &format!("{base}/models"), true).await.ok()?;
    (matches!(status, 401 | 403) || list(&body).is_some()).then_some(base)
}

/// Sends a request. Returns the status and the body, or the word for what went wrong.
async fn get(
    endpoint: &UpstreamEndpoint,
    url: &str,
    with_key: bool,
) -> Result<(u16, Bytes), &'static str> {
    let uri: Uri = url.parse().map_err(|_| "unsendable")?;
    let asking = async {
        let sent = endpoint
            .transport
            .send(endpoint.get(uri, with_key), || {})
            .await;
        let response = sent.map_err(|kind| super::Fault::from(kind).error_type())?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), MOST_BYTES)
            .collect()
            .await;
        Ok((status, body.map_err(|_| "truncated")?.to_bytes()))
    };
    tokio::time::timeout(TIME, asking)
        .await
        .map_err(|_| "timeout")?
}

/// One model of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ListEntry {
    name: String,
    created: Option<u64>,
    owned_by: Option<String>,
    shutdown: Option<SystemTime>,
}

impl ListEntry {
    /// A model as a list has it, or alone.
    fn read(value: JsonValue<'_>) -> Option<Self> {
        let names = ["id", "name", "created", "owned_by", "shutdown_date"];
        let [id, name, created, owned_by, shutdown] = value.object(names).members;
        let name = value
            .text()
            .or_else(|| id?.text())
            .or_else(|| name?.text())?;
        let created = created.and_then(JsonValue::number);
        let owned_by = owned_by.and_then(JsonValue::text);
        Some(Self {
            name,
            created: created.filter(|at| *at >= 0.0).map(|at| at as u64),
            owned_by: owned_by.map(|owner| one_line(&owner, OWNER_CHARS)),
            shutdown: shutdown.and_then(date),
        })
    }

    /// The name by which it is asked. Gemini lists names with a prefix.
    fn id(&self) -> &str {
        self.name.strip_prefix("models/").unwrap_or(&self.name)
    }

    /// Whether a request can use that name. Gateways list patterns, Ollama lists names with a tag.
    fn is(&self, asked: &str) -> bool {
        let name = self.id();
        name == asked
            || name.strip_suffix(":latest") == Some(asked)
            || name
                .strip_suffix('*')
                .is_some_and(|start| asked.starts_with(start))
    }
}

/// Reads the models of a list, in any of the usual forms. `None` if there is no list.
fn list(body: &[u8]) -> Option<Vec<ListEntry>> {
    let body = JsonValue::new(body.trim_ascii());
    let [data, models] = body.object(["data", "models"]).members;
    let mut lists = [Some(body), data, models].into_iter().flatten();
    let list = lists.find(|list| list.is_array())?;
    Some(list.items().filter_map(ListEntry::read).collect())
}

/// The first day of the year 10000, in seconds since 1970. Dates are written with four digits.
const END_OF_DATES: Duration = Duration::from_secs(253_402_300_800);

/// Reads a date: a text with or without a time, or seconds or milliseconds since 1970. None before
/// 1970, or with a year of five digits.
fn date(value: JsonValue<'_>) -> Option<SystemTime> {
    if let Some(number) = value.number() {
        let seconds = if number > 1e11 {
            number / 1000.0
        } else {
            number
        };
        let since = Duration::try_from_secs_f64(seconds).ok()?;
        if since >= END_OF_DATES {
            return None;
        }
        return SystemTime::UNIX_EPOCH.checked_add(since);
    }
    let text = value.text()?;
    let day = text.trim().get(..10)?;
    humantime::parse_rfc3339(&format!("{day}T00:00:00Z")).ok()
}

/// The name with the longest common prefix, if that is at least half of the requested name.
fn similar(asked: &str, models: &[ListEntry]) -> Option<String> {
    let common = |name: &str| {
        let pairs = asked.chars().zip(name.chars());
        pairs
            .take_while(|(one, other)| one.eq_ignore_ascii_case(other))
            .count()
    };
    let best = models.iter().max_by_key(|model| common(&model.name))?;
    (2 * common(&best.name) >= asked.chars().count()).then(|| best.name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str) -> ListEntry {
        ListEntry {
            name: name.to_owned(),
            created: None,
            owned_by: None,
            shutdown: None,
        }
    }

    fn names(body: &str) -> Option<Vec<String>> {
        let models = list(body.as_bytes())?;
        Some(models.into_iter().map(|model| model.name).collect())
    }

    #[test]
    fn a_list_of_models_is_found_in_the_usual_places() {
        for body in [
            r#"{"object":"list","data":[{"id":"a","created":NaN},{"id":"b"}]}"#,
            r#"{"models":[{"name":"a"},{"name":"b"}]}"#,
            r#"[{"id":"a"},"b"]"#,
            " {\"data\":[null,{\"id\":\"a\"},{},{\"id\":7,\"name\":\"b\"}]}\n",
        ] {
            assert_eq!(
                names(body),
                Some(vec!["a".to_owned(), "b".to_owned()]),
                "{body}"
            );
        }
        assert_eq!(names(r#"{"data":[]}"#), Some(vec![]));
        for body in [
            "",
            "<html>",
            "{}",
            r#"{"data":{}}"#,
            r#"{"error":"no"}"#,
            "404 page not found",
        ] {
            assert_eq!(names(body), None, "{body}");
        }
    }

    #[test]
    fn a_model_is_known_by_the_names_that_servers_give_it() {
        for (name, asked) in [
            ("gpt-6-luna", "gpt-6-luna"),
            ("llama3.2:latest", "llama3.2"),
            ("models/gemini-2", "gemini-2"),
            ("openai/*", "openai/gpt-6-luna"),
        ] {
            let model = entry(name);
            assert!(model.is(asked), "{name}");
            assert!(!model.is("other"), "{name}");
        }
    }

    #[test]
    fn a_shutdown_date_is_read_in_every_usual_form() {
        let expected = humantime::parse_rfc3339("2026-12-11T00:00:00Z").unwrap();
        for written in [
            r#""2026-12-11""#,
            r#""2026-12-11T17:30:00Z""#,
            r#""2026-12-11 09:00:00+02:00""#,
            "1796947200",
            "1796947200000",
            r#""1796947200""#,
        ] {
            assert_eq!(
                date(JsonValue::new(written.as_bytes())),
                Some(expected),
                "{written}"
            );
        }
        for written in [
            "null",
            r#""soon""#,
            r#""""#,
            "-1",
            "253402300800000",
            "1e300",
            "{}",
            r#""ééééééééé""#,
        ] {
            assert_eq!(date(JsonValue::new(written.as_bytes())), None, "{written}");
        }
    }

    #[test]
    fn a_similar_name_is_shown() {
        let models = ["gpt-6-luna", "gpt-5", "text-embedding-4"].map(entry);
        assert_eq!(
            similar("gpt-6-lunar", &models).as_deref(),
            Some("gpt-6-luna")
        );
        assert_eq!(similar("llama", &models), None);
        assert_eq!(similar("llama", &[]), None);
    }
}
