//! Where the service's root is, as seen from the address that was asked.

use std::convert::Infallible;

use axum::extract::FromRequestParts;
use axum::http::Uri;
use axum::http::request::Parts;

/// The relative address of the service's root. The links of a page begin with it, because the root
/// has a prefix where a proxy takes one off the path, and the service does not know that prefix.
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

    /// What a relative address of the service begins with.
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
        // The server notes it before it takes the slash off.
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
