//! An upstream's list of models: `GET …/models`. It costs nothing, and shows whether address, key
//! and model are right.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::Uri;

use super::endpoint::UpstreamEndpoint;
use super::reader::JsonValue;
use crate::config::ServedModels;
use crate::llm::mock;

/// How long an upstream may take for one answer.
const TIME: Duration = Duration::from_secs(10);
/// Longest list that is read; those of gateways to hundreds of models have about 1 MB.
const MOST_BYTES: usize = 8 << 20;

/// What the list of models of one upstream shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamCheck {
    /// The upstream: `primary`, `fallback-1`, …
    pub upstream: String,
    /// Its index in the list of upstreams.
    pub index: usize,
    /// The address of its list.
    pub url: String,
    /// The model that is configured.
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

/// Checks one upstream.
pub async fn check(index: usize, endpoint: &UpstreamEndpoint, default: &str) -> UpstreamCheck {
    let model = match &endpoint.config.models {
        ServedModels::Always(model) => model,
        ServedModels::Matching { .. } => default,
    };
    UpstreamCheck {
        upstream: endpoint.config.name.clone(),
        index,
        url: endpoint.config.base_url.join("/models"),
        model: model.to_owned(),
        finding: finding(endpoint, model)
            .await
            .unwrap_or_else(ModelFinding::Unreachable),
    }
}

async fn finding(endpoint: &UpstreamEndpoint, asked: &str) -> Result<ModelFinding, &'static str> {
    let base_url = &endpoint.config.base_url;
    let (status, body) = get(endpoint, &base_url.join("/models"), true).await?;
    let models = match status {
        200..=299 => list(&body),
        401 | 403 => return Ok(ModelFinding::KeyRefused(status)),
        408 | 429 | 500.. => return Ok(ModelFinding::Unavailable(status)),
        _ => None,
    };
    let Some(models) = models else {
        return Ok(ModelFinding::NoList {
            status,
            better: better(endpoint).await,
        });
    };
    let mut found = models.iter().find(|model| model.is(asked)).cloned();
    if found.is_none() {
        // A list need not have every name by which a model can be asked.
        let url = base_url.join(&format!("/models/{asked}"));
        if let Ok((200, body)) = get(endpoint, &url, true).await {
            found = ListEntry::read(JsonValue::new(body.trim_ascii()));
        }
    }
    let Some(model) = found else {
        return Ok(ModelFinding::OtherModels {
            number: models.len(),
            similar: similar(asked, &models),
        });
    };
    let has_key = endpoint.config.api_key.is_some();
    let is_public = has_key
        && matches!(
            get(endpoint, &base_url.join("/models"), false).await,
            Ok((200..=299, _))
        );
    Ok(ModelFinding::HasModel {
        key_was_tried: has_key && !is_public,
        shutdown: model.shutdown,
    })
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
        let sent = endpoint.transport.send(endpoint.get(uri, with_key)).await;
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
    shutdown: Option<SystemTime>,
}

impl ListEntry {
    /// A model as a list has it, or alone.
    fn read(value: JsonValue<'_>) -> Option<Self> {
        let [id, name, shutdown] = value.object(["id", "name", "shutdown_date"]).members;
        let name = value
            .text()
            .or_else(|| id?.text())
            .or_else(|| name?.text())?;
        Some(Self {
            name,
            shutdown: shutdown.and_then(date),
        })
    }

    /// Whether a request can use that name. Gateways list patterns, Ollama lists names with a tag,
    /// Gemini with a prefix.
    fn is(&self, asked: &str) -> bool {
        let name = self.name.strip_prefix("models/").unwrap_or(&self.name);
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

/// Reads a date: a text with or without a time, or seconds or milliseconds since 1970.
fn date(value: JsonValue<'_>) -> Option<SystemTime> {
    if let Some(number) = value.number() {
        let seconds = if number > 1e11 {
            number / 1000.0
        } else {
            number
        };
        let since = Duration::try_from_secs_f64(seconds).ok()?;
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
            let model = ListEntry {
                name: name.to_owned(),
                shutdown: None,
            };
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
            "1e300",
            "{}",
            r#""ééééééééé""#,
        ] {
            assert_eq!(date(JsonValue::new(written.as_bytes())), None, "{written}");
        }
    }

    #[test]
    fn a_similar_name_is_shown() {
        let models = ["gpt-6-luna", "gpt-5", "text-embedding-4"].map(|name| ListEntry {
            name: name.to_owned(),
            shutdown: None,
        });
        assert_eq!(
            similar("gpt-6-lunar", &models).as_deref(),
            Some("gpt-6-luna")
        );
        assert_eq!(similar("llama", &models), None);
        assert_eq!(similar("llama", &[]), None);
    }
}
