//! The upstream that answers prompts: its settings, and the checked configuration of its client.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::endpoint::{Endpoint, ServedModels, checked_key, checked_model};
use super::fallback::{self, Fallbacks};
use super::upstream_list::{self, UpstreamList};
use super::{BaseUrl, ByteSize, Error, Secret};

/// The settings of the upstream that are no secrets.
#[derive(Args, Clone, Debug)]
pub struct UpstreamSettings {
    /// Address of an OpenAI-compatible upstream, https or private [default: OpenAI's if there is a
    /// key, else a mock answers]
    #[arg(long, env, value_name = "URL", global = true)]
    pub openai_base_url: Option<String>,

    /// The model that is asked
    #[arg(
        long,
        env,
        default_value = "gpt-6-luna",
        value_name = "NAME",
        global = true
    )]
    pub openai_model: String,

    /// What the model is told before each prompt [default: nothing]
    #[arg(long, env, value_name = "TEXT", global = true)]
    pub system_prompt: Option<String>,

    /// Most tokens of an answer [default: the upstream's]
    #[arg(long, env, value_parser = clap::value_parser!(u32).range(1..), value_name = "N", global = true)]
    pub openai_max_tokens: Option<u32>,

    /// Sampling temperature, 0 to 2 [default: the upstream's]
    #[arg(long, env, value_name = "NUMBER", global = true)]
    pub openai_temperature: Option<f64>,

    /// Nucleus sampling, above 0 up to 1 [default: the upstream's]
    #[arg(long, env, value_name = "NUMBER", global = true)]
    pub openai_top_p: Option<f64>,

    /// Longest time to a connection with the upstream, TLS included
    #[arg(long, env, default_value = "5s", value_name = "TIME", global = true)]
    pub openai_connect_timeout: humantime::Duration,

    /// Longest time to the first token of a streamed answer
    #[arg(long, env, default_value = "60s", value_name = "TIME", global = true)]
    pub openai_first_token_timeout: humantime::Duration,

    /// Longest silence within an answer that has begun
    #[arg(long, env, default_value = "30s", value_name = "TIME", global = true)]
    pub openai_token_timeout: humantime::Duration,

    /// Longest time to a whole answer, with all retries and fallbacks
    #[arg(long, env, default_value = "2m", value_name = "TIME", global = true)]
    pub openai_total_timeout: humantime::Duration,

    /// Further tries of each upstream, all before the first token
    #[arg(long, env, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=10), value_name = "N", global = true)]
    pub openai_max_retries: u32,

    /// Calls in flight, at most half of them one user's; further ones are refused at once with 503
    #[arg(long, env, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=100_000), value_name = "N", global = true)]
    pub openai_max_in_flight: u32,

    /// Longest answer, in bytes of its text; a longer one is a failure
    #[arg(long, env, default_value = "1MiB", value_name = "SIZE", global = true)]
    pub openai_max_response_bytes: ByteSize,

    /// Upstreams to ask when the first fails, in order: [{"model": "…", "base_url": "https://…",
    /// "api_key_env": "NAME"}, …]
    #[arg(long, env, value_name = "JSON", global = true)]
    pub openai_fallback: Option<Fallbacks>,

    /// Upstreams chosen by the model that is asked for, in place of OPENAI_BASE_URL: [{"name": "…",
    /// "base_url": "https://…", "key_env": "NAME", "models": ["gpt-*"], "aliases": {"fast": "…"},
    /// "fallback": ["…"]}, …]
    #[arg(long, env, value_name = "JSON", global = true)]
    pub upstreams: Option<UpstreamList>,

    /// A file that holds that list
    #[arg(long, env, value_name = "FILE", global = true)]
    pub upstreams_file: Option<PathBuf>,
}

impl UpstreamSettings {
    /// The list of `UPSTREAMS`, or of the file that `UPSTREAMS_FILE` names. Empty if neither is
    /// set.
    ///
    /// # Errors
    /// Both are set, or the file cannot be used.
    pub fn upstream_list(&self) -> Result<UpstreamList, Error> {
        let list = self.upstreams.as_ref().filter(|list| !list.0.is_empty());
        // An empty variable counts as unset, as it does for secrets.
        let file = self.upstreams_file.as_deref();
        match (list, file.filter(|path| !path.as_os_str().is_empty())) {
            (Some(_), Some(_)) => Err(Error::new(
                upstream_list::SETTING,
                "set UPSTREAMS or UPSTREAMS_FILE, not both",
            )),
            (Some(list), None) => Ok(list.clone()),
            (None, Some(path)) => UpstreamList::read_file(path),
            (None, None) => Ok(UpstreamList::default()),
        }
    }
}

/// A real upstream and the limits of its calls. Without one, the built-in mock is used.
#[derive(Clone, Debug)]
pub struct UpstreamConfig {
    /// Whether they are those of `UPSTREAMS`.
    pub is_list: bool,
    /// The upstreams. The first whose models include the requested one is asked first.
    pub endpoints: Vec<Endpoint>,
    /// The model of `POST /api/prompts`. One of the upstreams has it.
    pub default_model: String,
    /// The system prompt, sent before each prompt.
    pub system_prompt: Option<String>,
    /// Most tokens of an answer.
    pub max_tokens: Option<u32>,
    /// Sampling temperature, 0 to 2.
    pub temperature: Option<f64>,
    /// Nucleus sampling, above 0 up to 1.
    pub top_p: Option<f64>,
    /// Longest time to a connection, name lookup and TLS included.
    pub connect_timeout: Duration,
    /// Longest time from asking an upstream to the first token of a streamed answer.
    pub first_token_timeout: Duration,
    /// Longest silence within an answer that has begun.
    pub token_timeout: Duration,
    /// Longest time to a whole answer, with all retries and fallbacks.
    pub total_timeout: Duration,
    /// Further tries of each upstream.
    pub max_retries: u32,
    /// Calls in flight.
    pub max_in_flight: usize,
    /// Longest answer, in bytes of its text.
    pub max_response_bytes: usize,
}

/// Checks the settings of the upstream; `None` means the mock.
///
/// # Errors
/// The first setting that cannot be used.
pub(super) fn checked(
    settings: &UpstreamSettings,
    list: &UpstreamList,
    api_key: Option<Secret>,
    keys: &[(String, Secret)],
) -> Result<Option<UpstreamConfig>, Error> {
    let default_model = checked_model("OPENAI_MODEL", &settings.openai_model)?;
    let endpoints = match list.0.is_empty() {
        true => chain(settings, api_key, keys)?,
        false => by_model(settings, list, keys, &default_model)?,
    };
    if endpoints.is_empty() {
        return Ok(None);
    }
    let in_range = |setting, value: Option<f64>, least: f64, most: f64| match value {
        Some(value) if !(least..=most).contains(&value) => Err(Error::new(
            setting,
            format!("must be from {least} to {most}"),
        )),
        Some(_) | None => Ok(value),
    };
    Ok(Some(UpstreamConfig {
        is_list: !list.0.is_empty(),
        endpoints,
        default_model,
        system_prompt: settings
            .system_prompt
            .clone()
            .filter(|prompt| !prompt.trim().is_empty()),
        max_tokens: settings.openai_max_tokens,
        temperature: in_range("OPENAI_TEMPERATURE", settings.openai_temperature, 0.0, 2.0)?,
        top_p: in_range("OPENAI_TOP_P", settings.openai_top_p, 0.001, 1.0)?,
        connect_timeout: timeout("OPENAI_CONNECT_TIMEOUT", settings.openai_connect_timeout)?,
        first_token_timeout: timeout(
            "OPENAI_FIRST_TOKEN_TIMEOUT",
            settings.openai_first_token_timeout,
        )?,
        token_timeout: timeout("OPENAI_TOKEN_TIMEOUT", settings.openai_token_timeout)?,
        total_timeout: timeout("OPENAI_TOTAL_TIMEOUT", settings.openai_total_timeout)?,
        max_retries: settings.openai_max_retries,
        max_in_flight: settings.openai_max_in_flight as usize,
        max_response_bytes: response_bytes(settings.openai_max_response_bytes)?,
    }))
}

/// The one upstream of the settings, which serves every model, with its fallbacks. Empty for the
/// mock.
fn chain(
    settings: &UpstreamSettings,
    api_key: Option<Secret>,
    keys: &[(String, Secret)],
) -> Result<Vec<Endpoint>, Error> {
    let base_url = settings.openai_base_url.as_deref();
    let fallbacks = settings.openai_fallback.clone().unwrap_or_default().0;
    // An empty variable counts as unset, as it does for secrets.
    let base_url = match (base_url.filter(|url| !url.is_empty()), &api_key) {
        (None, None) if fallbacks.is_empty() => return Ok(Vec::new()),
        (None, None) => {
            return Err(Error::new(
                "OPENAI_FALLBACK",
                "there is no first upstream: set OPENAI_API_KEY or OPENAI_BASE_URL too",
            ));
        }
        (None, Some(_)) => OPENAI,
        (Some(url), _) => url,
    };
    let first = Endpoint {
        name: "primary".to_owned(),
        base_url: BaseUrl::parse(base_url)
            .map_err(|problem| Error::new("OPENAI_BASE_URL", problem))?,
        api_key: checked_key("OPENAI_API_KEY", api_key)?,
        models: ServedModels::any(),
        fallback: (1..=fallbacks.len()).collect(),
    };
    let others = fallback::checked(&fallbacks, &first.base_url, keys)?;
    Ok(std::iter::once(first).chain(others).collect())
}

/// The upstreams of `UPSTREAMS`.
fn by_model(
    settings: &UpstreamSettings,
    list: &UpstreamList,
    keys: &[(String, Secret)],
    default_model: &str,
) -> Result<Vec<Endpoint>, Error> {
    let has_url = settings
        .openai_base_url
        .as_deref()
        .is_some_and(|url| !url.is_empty());
    let has_fallback = settings
        .openai_fallback
        .as_ref()
        .is_some_and(|list| !list.0.is_empty());
    for (is_set, setting) in [
        (has_url, "OPENAI_BASE_URL"),
        (has_fallback, "OPENAI_FALLBACK"),
    ] {
        if is_set {
            return Err(Error::new(
                setting,
                "has no place beside UPSTREAMS: make it an entry of that list, and unset it here",
            ));
        }
    }
    let endpoints = upstream_list::checked(list, keys)?;
    if !endpoints
        .iter()
        .any(|each| each.models.serves(default_model))
    {
        return Err(Error::new(
            "OPENAI_MODEL",
            "no upstream of UPSTREAMS serves it: set it to a model of theirs, or add it to the models of one",
        ));
    }
    Ok(endpoints)
}

/// The address that is used if only a key is set.
const OPENAI: &str = "https://api.openai.com/v1";
/// Text that is stored in one row and sent in one event.
const MOST_RESPONSE_BYTES: u64 = 64 << 20;

fn timeout(setting: &'static str, value: humantime::Duration) -> Result<Duration, Error> {
    let value = Duration::from(value);
    if value < Duration::from_millis(1) || value > Duration::from_secs(3600) {
        return Err(Error::new(setting, "must be from 1ms to 1h"));
    }
    Ok(value)
}

fn response_bytes(size: ByteSize) -> Result<usize, Error> {
    usize::try_from(size.0)
        .ok()
        .filter(|_| (1..=MOST_RESPONSE_BYTES).contains(&size.0))
        .ok_or_else(|| Error::new("OPENAI_MAX_RESPONSE_BYTES", "must be from 1 to 64MiB"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        settings: UpstreamSettings,
    }

    fn load(
        flags: &[&str],
        key: Option<&str>,
        keys: &[(&str, &str)],
    ) -> Result<Option<UpstreamConfig>, Error> {
        let line = std::iter::once("prompt-service").chain(flags.iter().copied());
        let keys: Vec<_> = keys
            .iter()
            .map(|(name, key)| ((*name).to_owned(), Secret::new(*key)))
            .collect();
        let settings = Line::parse_from(line).settings;
        let list = settings.upstream_list()?;
        checked(&settings, &list, key.map(Secret::new), &keys)
    }

    #[test]
    fn neither_key_nor_address_means_the_mock() {
        assert!(load(&[], None, &[]).unwrap().is_none());
        assert!(
            load(&["--openai-base-url", ""], None, &[])
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn a_key_alone_leads_to_openai_and_an_address_alone_sends_no_key() {
        let config = load(&[], Some("sk-x"), &[]).unwrap().unwrap();
        assert!(config.endpoints[0].base_url.is_openai());
        assert_eq!(config.endpoints[0].api_key, Some(Secret::new("sk-x")));
        let flags = ["--openai-base-url", "http://localhost:11434/v1"];
        let config = load(&flags, None, &[]).unwrap().unwrap();
        assert_eq!(config.endpoints[0].api_key, None);
    }

    #[test]
    fn a_fallback_has_the_key_that_it_names() {
        let list = r#"[{"model": "a", "base_url": "https://a.example/v1", "api_key_env": "A_KEY"},
                       {"model": "b", "base_url": "http://127.0.0.1:1/v1"}]"#;
        let flags = ["--openai-fallback", list];
        let config = load(&flags, Some("sk-x"), &[("A_KEY", "sk-a")]);
        let endpoints = config.unwrap().unwrap().endpoints;
        let keys: Vec<_> = endpoints.iter().map(|each| each.api_key.clone()).collect();
        let secret = |key| Some(Secret::new(key));
        assert_eq!(keys, [secret("sk-x"), secret("sk-a"), None]);

        let error = load(&flags, Some("sk-x"), &[]).unwrap_err().to_string();
        assert!(error.starts_with("OPENAI_FALLBACK: entry 1"), "{error}");
        let error = load(&flags, None, &[("A_KEY", "sk-a")]).unwrap_err();
        assert!(error.to_string().starts_with("OPENAI_FALLBACK: "));
    }

    const LIST: &str = r#"[{"name": "a", "base_url": "https://a.example/v1", "key_env": "A_KEY", "models": ["gpt-*"]},
        {"name": "b", "base_url": "http://127.0.0.1:1/v1", "models": ["llama3.2"]}]"#;

    #[test]
    fn upstreams_take_the_place_of_the_one() {
        let config = load(&["--upstreams", LIST], None, &[("A_KEY", "sk-a")]);
        let config = config.unwrap().unwrap();
        assert!(config.is_list);
        let names: Vec<_> = config.endpoints.iter().map(|each| &*each.name).collect();
        assert_eq!(names, ["a", "b"]);
        assert!(load(&["--upstreams", ""], None, &[]).unwrap().is_none());
    }

    #[test]
    fn upstreams_stand_alone_and_serve_the_default_model() {
        for (flags, setting) in [
            (
                &["--openai-base-url", "https://a.example"][..],
                "OPENAI_BASE_URL",
            ),
            (
                &[
                    "--openai-fallback",
                    r#"[{"model": "a", "base_url": "https://a.example"}]"#,
                ],
                "OPENAI_FALLBACK",
            ),
            (&["--openai-model", "claude-9"], "OPENAI_MODEL"),
            (&["--upstreams-file", "/nonexistent"], "UPSTREAMS"),
        ] {
            let flags = [&["--upstreams", LIST], flags].concat();
            let error = load(&flags, None, &[("A_KEY", "sk-a")])
                .unwrap_err()
                .to_string();
            assert!(error.starts_with(&format!("{setting}: ")), "{error}");
        }
    }

    #[test]
    fn unusable_setting_is_named_without_its_value() {
        for (flags, key) in [
            (&["--openai-base-url", "http://8.8.8.8/hunter2"][..], None),
            (&["--openai-temperature", "2.5"], Some("x")),
            (&["--openai-top-p", "0"], Some("x")),
            (&["--openai-model", ""], Some("x")),
            (&["--openai-total-timeout", "2h"], Some("x")),
            (&["--openai-max-response-bytes", "1GiB"], Some("x")),
        ] {
            let error = load(flags, key, &[]).unwrap_err().to_string();
            let name = flags[0].trim_start_matches('-').replace('-', "_");
            assert!(error.starts_with(&name.to_uppercase()), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        let error = load(&[], Some("hunter2\n"), &[]).unwrap_err().to_string();
        assert!(error.starts_with("OPENAI_API_KEY: ") && !error.contains("hunter2"));
    }
}
