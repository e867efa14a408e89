//! The relative address of the service's root, as seen from the requested address.

use std::convert::Infallible;

use axum::extract::FromRequestParts;
use axum::http::Uri;
use axum::http::request::Parts;

/// The relative address of the service's root, with which the links of a page begin. An absolute
/// path would be wrong behind a proxy that strips a prefix, which the service does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// The address has no trailing slash (`/docs`), or is the root itself.
    Here,
    /// The address has a trailing slash (`/docs/`), so relative addresses begin one folder further
    /// down.
    Above,
}

impl Root {
    /// The root as seen from an address with its trailing slash, if it has one.
    pub fn of(uri: &Uri) -> Self {
        let path = uri.path();
        if path.len() > 1 && path.ends_with('/') {
            Self::Above
        } else {
            Self::Here
        }
    }

    /// The beginning of a relative address of the service.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Here => "./",
            Self::Above => "../",
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Root {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        // The server sets it before it strips the slash.
        Ok(parts
            .extensions
            .get::<Self>()
            .copied()
            .unwrap_or(Self::Here))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_one_folder_further_up_behind_a_trailing_slash() {
        for (address, root) in [
            ("/", "./"),
            ("/docs", "./"),
            ("/schema?format=yaml", "./"),
            ("/docs/", "../"),
            ("/schema/?format=yaml", "../"),
            ("//", "../"),
        ] {
            let root_of = Root::of(&address.parse().unwrap());
            assert_eq!(root_of.as_str(), root, "{address}");
        }
    }
}
