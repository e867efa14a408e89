//! One upstream, and the checks of its model and key.

use super::{BaseUrl, Error, Secret};

/// One upstream: a model at an address.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The model that is asked.
    pub model: String,
    /// The address.
    pub base_url: BaseUrl,
    /// The key, which is sent to this address only.
    pub api_key: Option<Secret>,
}

/// Checks a model's name, which is written into metrics and into each row.
pub(super) fn checked_model(setting: &'static str, name: &str) -> Result<String, Error> {
    if name.is_empty() || name.len() > 200 || name.chars().any(char::is_control) {
        return Err(Error::new(
            setting,
            "a model's name has 1 to 200 bytes, without control characters",
        ));
    }
    Ok(name.to_owned())
}

/// Checks a key: it is sent in a header, so it must have characters that a header may have.
pub(super) fn checked_key(
    setting: &'static str,
    key: Option<Secret>,
) -> Result<Option<Secret>, Error> {
    match &key {
        Some(key) if !key.expose().bytes().all(|byte| byte.is_ascii_graphic()) => Err(Error::new(
            setting,
            "a key has visible ASCII characters only: is there a blank or a line break in it?",
        )),
        Some(_) | None => Ok(key),
    }
}
