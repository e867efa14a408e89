//! Pages, files and schema, and the rules of HTTP on every route: slashes, methods, negotiation,
//! other origins.

use hyper::Method;
use prompt_service::api::Documents;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Response, spawn_app};

/// The `Accept` header of a browser.
const BROWSER: &str = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8";

/// The path that a relative link leads to from a page of the service. A link that begins with a
/// slash would leave the prefix that a proxy may put before all paths, and fails.
fn resolved(page: &str, link: &str) -> String {
    let folder = &page[..page.rfind('/').unwrap()];
    if let Some(rest) = link.strip_prefix("./") {
        format!("{folder}/{rest}")
    } else if let Some(rest) = link.strip_prefix("../") {
        format!("{}/{rest}", &folder[..folder.rfind('/').unwrap()])
    } else {
        panic!("{page}: {link} is no relative link")
    }
}

fn is_html(answer: &Response) -> bool {
    answer.header("content-type") == Some("text/html; charset=utf-8")
}

#[tokio::test]
async fn the_front_page_is_html_to_a_browser_and_json_to_others() {
    let app = spawn_app(|_| ()).await;
    for accept in [
        None,
        Some("*/*"),
        Some("application/json"),
        Some("application/json, text/html"),
    ] {
        let mut request = app.get("/");
        if let Some(accept) = accept {
            request = request.header("accept", accept);
        }
        let answer = request.send().await;
        assert_eq!(answer.status, 200, "{accept:?}");
        let page = answer.json();
        assert_eq!(
            (&page["name"], &page["version"]),
            (&json!("Prompt Service"), &json!(env!("CARGO_PKG_VERSION")))
        );
        for link in ["docs", "redoc", "schema", "metrics", "health", "readiness"] {
            let address = resolved("/", page[link].as_str().unwrap());
            assert_eq!(app.get(&address).send().await.status, 200, "{link}");
        }
    }
    let answer = app.get("/").header("accept", BROWSER).send().await;
    assert!(answer.status == 200 && is_html(&answer), "{answer:?}");
    assert_eq!(answer.header("vary"), Some("Accept"));
    let version = format!("Version {}<", env!("CARGO_PKG_VERSION"));
    assert!(answer.text().contains(&version), "{}", answer.text());
}

#[tokio::test]
async fn pages_load_only_files_that_this_service_serves() {
    let app = spawn_app(|_| ()).await;
    let mut linked = 0;
    for path in ["/", "/docs", "/redoc", "/docs/", "/redoc/"] {
        let answer = app.get(path).header("accept", BROWSER).send().await;
        assert!(
            answer.status == 200 && is_html(&answer),
            "{path}: {answer:?}"
        );
        let policy = answer.header("content-security-policy").unwrap();
        for rule in [
            "default-src 'none'",
            "script-src 'self';",
            "connect-src 'self';",
            "frame-ancestors 'none'",
        ] {
            assert!(policy.contains(rule), "{path}: {policy}");
        }
        assert!(!policy.contains("http"), "{path}: {policy}");
        let page = answer.text();
        assert!(
            !page.contains("<script>"),
            "{path}: the policy forbids scripts in the page"
        );
        let links = ["src=\"", "href=\""]
            .into_iter()
            .flat_map(|name| page.split(name).skip(1));
        for link in links.map(|rest| rest.split('"').next().unwrap()) {
            // An empty icon keeps browsers from asking for one.
            if link == "data:," {
                continue;
            }
            let address = resolved(path, link);
            let status = app.get(&address).send().await.status;
            assert_eq!(status, 200, "{path}: {link}");
            linked += 1;
        }
    }
    assert!(linked > 16, "only {linked} links were found");
}

#[tokio::test]
async fn the_files_behind_the_pages_have_their_types() {
    let app = spawn_app(|_| ()).await;
    for (name, kind) in [
        ("docs.js", "text/javascript; charset=utf-8"),
        ("redoc.js", "text/javascript; charset=utf-8"),
        ("redoc.standalone.js", "text/javascript; charset=utf-8"),
        ("swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
        ("swagger-ui.css", "text/css; charset=utf-8"),
        ("pages.css", "text/css; charset=utf-8"),
    ] {
        let answer = app.get(&format!("/assets/{name}")).send().await;
        assert_eq!(
            (answer.status, answer.header("content-type")),
            (200, Some(kind)),
            "{name}"
        );
        assert_eq!(
            answer.header("cache-control"),
            Some("public, max-age=3600"),
            "{name}"
        );
        assert_eq!(
            answer.header("x-content-type-options"),
            Some("nosniff"),
            "{name}"
        );
        assert!(!answer.body.is_empty(), "{name}");
    }
    for path in [
        "/assets/",
        "/assets/none.js",
        "/assets/../Cargo.toml",
        "/assets/..%2fCargo.toml",
    ] {
        assert_eq!(app.get(path).send().await.status, 404, "{path}");
    }
}

#[tokio::test]
async fn the_schema_is_json_or_yaml_as_the_client_asks() {
    let app = spawn_app(|_| ()).await;
    let documents = Documents::make();
    let kind = |answer: &Response| answer.header("content-type").unwrap().to_owned();
    for (path, accept) in [
        ("/schema", "*/*"),
        ("/schema", "application/json"),
        ("/schema?format=json", "application/yaml"),
        ("/schema", BROWSER),
    ] {
        let answer = app.get(path).header("accept", accept).send().await;
        assert_eq!(
            (answer.status, kind(&answer).as_str()),
            (200, "application/json"),
            "{path} {accept}"
        );
        assert_eq!(answer.body, documents.json);
    }
    for (path, accept) in [
        ("/schema?format=yaml", "application/json"),
        ("/schema", "application/yaml"),
        (
            "/schema",
            "application/vnd.oai.openapi, application/json;q=0.5",
        ),
    ] {
        let answer = app.get(path).header("accept", accept).send().await;
        assert_eq!(
            (answer.status, kind(&answer).as_str()),
            (200, "application/yaml"),
            "{path} {accept}"
        );
        assert_eq!(answer.body, documents.json);
    }
    let answer = app.get("/schema?format=xml").send().await;
    assert_eq!(
        (answer.status, answer.json()["detail"].is_string()),
        (404, true)
    );
}

#[tokio::test]
async fn server_address_of_the_schema_is_relative_to_the_requested_address() {
    let app = spawn_app(|_| ()).await;
    let mut documents = Vec::new();
    for path in ["/schema", "/schema/", "/schema/?format=json"] {
        let mut document = app.get(path).send().await.json();
        let server = document["servers"][0].take();
        assert_eq!(
            resolved(path, server["url"].as_str().unwrap()),
            "/",
            "{path}"
        );
        documents.push(document);
    }
    assert!(documents.windows(2).all(|pair| pair[0] == pair[1]));
    let yaml = app.get("/schema/?format=yaml").send().await.text();
    assert!(yaml.contains("\"../\"") && !yaml.contains("\"./\""));
}

#[tokio::test]
async fn every_route_responds_with_and_without_a_slash_and_never_redirects() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let document: Value = serde_json::from_slice(&Documents::make().json).unwrap();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            let method: Method = method.to_uppercase().parse().unwrap();
            let bare = path.replace("{id}", "999").trim_end_matches('/').to_owned();
            let mut answers = Vec::new();
            for path in [format!("{bare}/"), bare] {
                let path = if path.is_empty() {
                    "/".to_owned()
                } else {
                    path
                };
                let answer = user.client.request(method.clone(), &path).send().await;
                assert!(!(300..400).contains(&answer.status), "{method} {path}");
                assert_ne!(answer.status, 405, "{method} {path}");
                answers.push(answer.status);
            }
            assert_eq!(answers[0], answers[1], "{method} {path}");
        }
    }
}

#[tokio::test]
async fn errors_are_json_and_checked_in_order() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    let ask = async |client: &crate::support::Client, method: &str, path: &str, accept: &str| {
        let request = client.request(method.parse().unwrap(), path);
        request.header("accept", accept).send().await
    };
    let (stranger, known) = (app.client(), &user.client);
    for (client, method, path, accept, status) in [
        // An unknown path is checked first.
        (stranger, "GET", "/nowhere", "*/*", 404),
        (stranger, "PUT", "/api/nowhere/", "text/html", 404),
        (known, "GET", "/api/prompts/similar/more/", "*/*", 404),
        (stranger, "GET", "//", "application/json", 200),
        // Content negotiation is checked before the credentials.
        (stranger, "GET", "/api/prompts/", "text/html", 406),
        (stranger, "PUT", "/api/auth/login/", "text/html", 406),
        (
            stranger,
            "GET",
            "/api/prompts/",
            "application/xml;q=0.9, application/json;q=0",
            406,
        ),
        // The credentials are checked before the method.
        (stranger, "PUT", "/api/prompts/", "*/*", 401),
        (stranger, "DELETE", "/api/auth/me/", "*/*", 401),
        (stranger, "OPTIONS", "/api/prompts/", "*/*", 401),
        (known, "PUT", "/api/prompts/", "*/*", 405),
        (known, "POST", "/api/prompts/7/", "*/*", 405),
        (stranger, "GET", "/api/auth/login/", "*/*", 405),
        (stranger, "POST", "/healthz", "*/*", 405),
        (stranger, "DELETE", "/", "*/*", 405),
    ] {
        let answer = ask(client, method, path, accept).await;
        let at = format!("{method} {path} {accept}: {answer:?}");
        assert_eq!(answer.status, status, "{at}");
        if status != 200 {
            assert!(answer.json()["detail"].is_string(), "{at}");
            assert_eq!(
                answer.header("content-security-policy"),
                Some("default-src 'none'; frame-ancestors 'none'")
            );
        }
        assert!(answer.header("x-request-id").is_some(), "{at}");
    }
}

#[tokio::test]
async fn wrong_method_and_options_list_the_allowed_methods() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    for (path, allowed) in [
        ("/api/prompts/", "GET, HEAD, POST, OPTIONS"),
        ("/api/prompts/7/", "GET, HEAD, DELETE, OPTIONS"),
        ("/api/prompts/similar/", "GET, HEAD, OPTIONS"),
        ("/api/auth/login/", "POST, OPTIONS"),
        ("/api/auth/me/", "GET, HEAD, OPTIONS"),
        ("/ws/prompts/", "GET, HEAD, OPTIONS"),
        ("/healthz", "GET, HEAD, OPTIONS"),
        ("/assets/docs.js", "GET, HEAD, OPTIONS"),
    ] {
        let sorted = |allow: &str| {
            let mut methods: Vec<String> = allow.split(", ").map(str::to_owned).collect();
            methods.sort();
            methods
        };
        let wrong = user.client.request(Method::PATCH, path).send().await;
        assert_eq!(wrong.status, 405, "{path}");
        assert_eq!(
            sorted(wrong.header("allow").unwrap()),
            sorted(allowed),
            "{path}"
        );
        let options = user.client.request(Method::OPTIONS, path).send().await;
        assert_eq!(options.status, 200, "{path}");
        assert_eq!(
            sorted(options.header("allow").unwrap()),
            sorted(allowed),
            "{path}"
        );
    }
}

#[tokio::test]
async fn responses_of_the_api_vary_by_accept() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    for (answer, status) in [
        (user.get("/api/prompts/").send().await, 200),
        (user.get("/api/prompts/7/").send().await, 404),
        (app.get("/api/prompts/").send().await, 401),
        (
            app.post("/api/auth/login/").json(&json!({})).send().await,
            400,
        ),
        (user.delete("/api/auth/me/").send().await, 405),
        (
            user.get("/api/auth/me/")
                .header("accept", "text/html")
                .send()
                .await,
            406,
        ),
    ] {
        assert_eq!(answer.status, status, "{answer:?}");
        assert_eq!(answer.header("vary"), Some("Accept"), "{answer:?}");
    }
    for (path, name) in [
        ("/schema?format=json", "Prompt Service API.json"),
        ("/schema?format=yaml", "Prompt Service API.yaml"),
    ] {
        let answer = app.get(path).send().await;
        let disposition = format!("inline; filename=\"{name}\"");
        assert_eq!(
            answer.header("content-disposition"),
            Some(disposition.as_str())
        );
    }
}

#[tokio::test]
async fn missing_host_is_refused_with_a_json_error() {
    let app = spawn_app(|_| ()).await;
    let mut stream = TcpStream::connect(app.addr).await.unwrap();
    let request = b"GET /healthz HTTP/1.1\r\nX-Request-Id: no-host\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let answer = answer.to_lowercase();
    for part in [
        "http/1.1 400 ",
        "x-request-id: no-host\r\n",
        "x-content-type-options: nosniff\r\n",
        "connection: close\r\n",
        "{\"detail\":",
    ] {
        assert!(answer.contains(part), "{part}: {answer}");
    }
    let counted = "http_requests_total{method=\"GET\",route=\"/healthz\",status=\"400\"}";
    assert_eq!(app.metric(counted).await, Some(1.0));
}

#[tokio::test]
async fn options_request_that_is_no_preflight_is_checked_like_any_request() {
    let listed = "https://app.example";
    let open = spawn_app(|config| config.server.cors_allowed_origins = vec![listed.to_owned()]);
    let app = open.await;
    let user = app.user("alice").await;
    let preflight = ("access-control-request-method", "POST");
    for (path, headers, status) in [
        ("/api/nope/", vec![], 404),
        ("/api/prompts/", vec![], 401),
        ("/api/prompts/", vec![("origin", listed)], 401),
        ("/api/prompts/", vec![preflight], 401),
        (
            "/api/prompts/",
            vec![preflight, ("origin", "https://evil.example")],
            401,
        ),
        ("/api/prompts/", vec![("accept", "text/html")], 406),
        ("/api/prompts/", vec![preflight, ("origin", listed)], 200),
    ] {
        let mut request = app.client().request(Method::OPTIONS, path);
        for (name, value) in &headers {
            request = request.header(name, value);
        }
        let answer = request.send().await;
        assert_eq!(answer.status, status, "{path} {headers:?}: {answer:?}");
    }
    let known = user.client.request(Method::OPTIONS, "/api/prompts/");
    let known = known.send().await;
    assert_eq!(known.status, 200);
    assert!(known.header("allow").is_some(), "{known:?}");
}

#[tokio::test]
async fn head_is_get_without_the_body() {
    let app = spawn_app(|_| ()).await;
    let user = app.user("alice").await;
    for path in [
        "/",
        "/docs",
        "/schema",
        "/healthz",
        "/assets/docs.js",
        "/api/auth/me/",
        "/api/prompts/",
    ] {
        let get = user.get(path).send().await;
        let head = user.client.request(Method::HEAD, path).send().await;
        assert_eq!((head.status, head.body.len()), (200, 0), "{path}");
        for name in ["content-type", "content-length"] {
            assert_eq!(head.header(name), get.header(name), "{path}: {name}");
        }
    }
}

#[tokio::test]
async fn pages_of_listed_origins_may_call_and_others_may_not() {
    let listed = "https://app.example";
    let app =
        spawn_app(|config| config.server.cors_allowed_origins = vec![listed.to_owned()]).await;
    let user = app.user("alice").await;
    let preflight = async |app: &crate::support::App, origin: &str| {
        let request = app.client().request(Method::OPTIONS, "/api/prompts/");
        request
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header(
                "access-control-request-headers",
                "authorization,content-type",
            )
            .send()
            .await
    };
    let allowed = preflight(&app, listed).await;
    assert_eq!(
        allowed.status, 200,
        "no credentials are asked for: {allowed:?}"
    );
    assert_eq!(allowed.header("access-control-allow-origin"), Some(listed));
    assert_eq!(
        allowed.header("access-control-allow-credentials"),
        Some("true")
    );
    let methods = allowed.header("access-control-allow-methods").unwrap();
    for method in ["GET", "POST", "PATCH", "DELETE"] {
        assert!(methods.contains(method), "{methods}");
    }
    let headers = allowed
        .header("access-control-allow-headers")
        .unwrap()
        .to_lowercase();
    assert!(
        headers.contains("authorization") && headers.contains("content-type"),
        "{headers}"
    );
    for origin in [
        "https://evil.example",
        "https://app.example.evil.example",
        "http://app.example",
        "null",
    ] {
        let refused = preflight(&app, origin).await;
        assert_eq!(
            refused.header("access-control-allow-origin"),
            None,
            "{origin}"
        );
    }

    let answer = user
        .get("/api/prompts/")
        .header("origin", listed)
        .send()
        .await;
    assert_eq!(
        (answer.status, answer.header("access-control-allow-origin")),
        (200, Some(listed))
    );
    let exposed = answer
        .header("access-control-expose-headers")
        .unwrap()
        .to_lowercase();
    for name in [
        "x-request-id",
        "ratelimit",
        "retry-after",
        "x-search-coverage",
    ] {
        assert!(exposed.contains(name), "{exposed}");
    }
    let refused = app
        .get("/api/prompts/")
        .header("origin", listed)
        .send()
        .await;
    assert_eq!(
        refused.header("access-control-allow-origin"),
        Some(listed),
        "a page may read its 401"
    );

    let closed = spawn_app(|_| ()).await;
    let answer = preflight(&closed, listed).await;
    assert_eq!(
        (answer.status, answer.header("access-control-allow-origin")),
        (401, None)
    );
}
