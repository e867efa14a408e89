//! The address of an upstream: https anywhere, plain http only in the operator's own network.

use std::net::{IpAddr, Ipv4Addr};

use hyper::Uri;
use hyper::http::uri::Scheme;

/// The ends of the addresses of endpoints. People copy such an address whole, and mean the part
/// before this.
const ENDPOINTS: [&str; 5] = [
    "/chat/completions",
    "/completions",
    "/responses",
    "/embeddings",
    "/models",
];

/// The address of an upstream, checked: a scheme, a host, perhaps a port and a path; no user info,
/// no query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseUrl {
    /// Without a slash at the end.
    text: String,
    is_https: bool,
    host: String,
    port: u16,
}

impl BaseUrl {
    /// Checks an address. The path of an endpoint at its end, such as `/chat/completions`, is taken
    /// off.
    ///
    /// # Errors
    /// The problem, in words that quote nothing of the address.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let text = text.trim_end_matches('/');
        let base = ENDPOINTS.iter().find_map(|end| text.strip_suffix(end));
        let base = base.map(|base| base.trim_end_matches('/'));
        // Not from the host, even if it has such a name.
        let text = base.filter(|base| base.contains("://")).unwrap_or(text);
        let uri: Uri = text
            .parse()
            .map_err(|_| "must be https://host/path, or http:// to a private address")?;
        let is_https = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            Some(scheme) if *scheme == Scheme::HTTP => false,
            Some(_) | None => return Err("must begin with https:// or http://"),
        };
        let authority = uri.authority().ok_or("has no host")?;
        if authority.as_str().contains('@') {
            return Err("must not contain a user or password: keys have a variable of their own");
        }
        if uri.query().is_some() || text.contains('#') {
            return Err("must end with its path, without ? or #");
        }
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        if host.is_empty() || authority.as_str().ends_with(':') {
            return Err("has no host, or an empty port");
        }
        if let Ok(address) = host.parse::<IpAddr>()
            && !is_https
            && !is_private(address)
        {
            return Err("plain http is for loopback and private addresses only: use https");
        }
        let usual = if is_https { 443 } else { 80 };
        Ok(Self {
            text: text.to_owned(),
            is_https,
            host,
            port: authority.port_u16().unwrap_or(usual),
        })
    }

    /// The address with a path added, which begins with a slash.
    pub fn join(&self, path: &str) -> String {
        format!("{}{path}", self.text)
    }

    /// The host, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whether it is reached over TLS.
    pub fn is_https(&self) -> bool {
        self.is_https
    }

    /// Whether both are served by the same: scheme, host and port.
    pub fn is_same_origin(&self, other: &Self) -> bool {
        self.is_https == other.is_https
            && self.port == other.port
            && self.host.eq_ignore_ascii_case(&other.host)
    }

    /// Whether it is OpenAI's own.
    pub fn is_openai(&self) -> bool {
        self.host.eq_ignore_ascii_case("api.openai.com")
    }
}

/// Whether packets to the address stay on this machine or in the operator's own network: loopback,
/// RFC 1918, RFC 4193. Link-local addresses do not count: clouds serve credentials there.
pub fn is_private(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => is_private_v4(address),
        IpAddr::V6(address) => address.is_loopback() || address.is_unique_local(),
    }
}

fn is_private_v4(address: Ipv4Addr) -> bool {
    address.is_loopback() || address.is_private()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn https_is_allowed_anywhere_and_http_only_in_private_networks() {
        for good in [
            "https://api.openai.com/v1",
            "https://203.0.113.7:8443",
            "http://127.0.0.1:11434/v1/",
            "http://localhost:8080/v1",
            "http://ollama:11434/v1",
            "http://10.1.2.3/v1",
            "http://192.168.0.9",
            "http://172.16.0.1",
            "http://[::1]:80/v1",
            "http://[fd00::1]/v1",
            "http://[::ffff:10.0.0.1]/v1",
        ] {
            assert!(BaseUrl::parse(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "api.openai.com/v1",
            "/v1",
            "ftp://localhost",
            "unix:///run/x",
            "http://8.8.8.8/v1",
            "http://172.32.0.1",
            "http://169.254.169.254/v1",
            "http://[fe80::1]/",
            "http://[2001:db8::1]/v1",
            "http://[::ffff:8.8.8.8]/v1",
            "https://user@host/v1",
            "https://user:secret@host/v1",
            "https://host/v1?key=x",
            "https://host/v1#part",
            "https://",
            "https://host:/v1",
            "https://ho st/v1",
        ] {
            assert!(BaseUrl::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn path_of_an_endpoint_is_taken_off_the_address() {
        for end in [
            "",
            "/",
            "/chat/completions",
            "/chat/completions//",
            "/completions",
            "/responses",
            "/models",
            "//models/",
        ] {
            let url = BaseUrl::parse(&format!("https://host.example/v1{end}")).unwrap();
            assert_eq!(url.join(""), "https://host.example/v1", "{end}");
        }
        let url = BaseUrl::parse("https://host.example/chat/completions").unwrap();
        assert_eq!(url.join("/x"), "https://host.example/x");
        // Parts of other words are left alone.
        for kept in [
            "https://models",
            "https://host.example/my-models",
            "https://host.example/chat/v1",
        ] {
            assert_eq!(BaseUrl::parse(kept).unwrap().join(""), kept);
        }
        assert!(BaseUrl::parse("https://host.example/v1/chat/completions?x=1").is_err());
    }

    #[test]
    fn a_path_is_joined_with_one_slash() {
        let url = BaseUrl::parse("https://api.openai.com/v1//").unwrap();
        assert_eq!(
            url.join("/chat/completions"),
            "https://api.openai.com/v1/chat/completions"
        );
        assert!(url.is_openai() && url.is_https());
        assert!(
            !BaseUrl::parse("https://api.openai.com.evil.example")
                .unwrap()
                .is_openai()
        );
    }
}
