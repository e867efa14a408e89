//! PostgreSQL over TLS: which servers each `sslmode` trusts, and how the others are refused.

use prompt_service::store::PromptStore;
use prompt_service::store::postgres::{OpenError, OpenOptions, PostgresStore};

use crate::support::postgres::Database;
use crate::support::tls::{TlsProxy, pem};

/// A database whose server shows a certificate.
struct Encrypted {
    database: Database,
    proxy: TlsProxy,
}

impl Encrypted {
    async fn by(certificate: &str) -> Self {
        let database = Database::migrated().await;
        let proxy = TlsProxy::to_postgres(database.port(), certificate);
        Self { database, proxy }
    }

    /// Opens the store at a host's name, with these parameters. `root`: the certificate given as
    /// sslrootcert.
    async fn open(&self, host: &str, mode: &str, root: Option<&str>) -> Result<(), OpenError> {
        let mut url = format!(
            "postgres://postgres@{host}:{}/{}?sslmode={mode}",
            self.proxy.port,
            self.database.name()
        );
        if let Some(root) = root {
            url += &format!("&sslrootcert={}", pem(&format!("{root}.pem")).display());
        }
        let store = PostgresStore::open(&url, OpenOptions::default()).await?;
        store.ping().await.unwrap();
        Ok(())
    }

    async fn refused(&self, host: &str, mode: &str, root: Option<&str>) -> String {
        let error = self.open(host, mode, root).await.unwrap_err();
        assert!(matches!(error, OpenError::Distrusted(_)), "{error:?}");
        let text = error.to_string();
        assert!(text.starts_with("DATABASE_URL: "), "{text}");
        assert!(text.contains("certificate is not trusted"), "{text}");
        assert!(!text.contains('\n'), "{text}");
        text
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_mode_trusts_the_servers_that_it_should() {
    let server = Encrypted::by("server").await;
    server.open("127.0.0.1", "require", None).await.unwrap();
    let authority = Some("authority");
    for mode in ["require", "verify-ca", "verify-full"] {
        server.open("localhost", mode, authority).await.unwrap();
        let text = server.refused("localhost", mode, Some("other")).await;
        assert!(text.contains("sslrootcert"), "{text}");
    }
    // The system does not trust this authority.
    server.refused("localhost", "verify-full", None).await;
    // The certificate names only the host name.
    server
        .open("127.0.0.1", "verify-ca", authority)
        .await
        .unwrap();
    let text = server.refused("127.0.0.1", "verify-full", authority).await;
    assert!(
        text.contains("not made out to this host") && text.contains("verify-ca"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn self_signed_certificate_is_its_own_root() {
    let server = Encrypted::by("own").await;
    let own = Some("own");
    for mode in ["require", "verify-ca", "verify-full"] {
        server.open("localhost", mode, own).await.unwrap();
        server.refused("localhost", mode, Some("other")).await;
    }
    server.open("127.0.0.1", "verify-ca", own).await.unwrap();
    server.refused("127.0.0.1", "verify-full", own).await;
    // A common name is not a host name.
    let server = Encrypted::by("unnamed").await;
    let unnamed = Some("unnamed");
    server
        .open("localhost", "verify-ca", unnamed)
        .await
        .unwrap();
    server.refused("localhost", "verify-full", unnamed).await;
}

#[tokio::test]
async fn server_without_tls_is_refused_by_modes_that_require_it() {
    let database = Database::migrated().await;
    let url = database.url();
    for parameters in ["sslmode=require", "sslmode=verify-full"] {
        let opened =
            PostgresStore::open(&format!("{url}?{parameters}"), OpenOptions::default()).await;
        assert!(opened.is_err(), "{parameters}");
    }
    // An operator who names a root does not mean a mode that needs none.
    let root = pem("authority.pem");
    let url = format!("{url}?sslrootcert={}", root.display());
    let error = PostgresStore::open(&url, OpenOptions::default()).await;
    assert!(matches!(error, Err(OpenError::Url(_))), "{error:?}");
}
