//! TLS to the server, by the `sslmode` of the URL.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use tokio_postgres::config::SslMode;
use tokio_postgres_rustls::MakeRustlsConnect;

/// How the server is trusted, by libpq's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tls {
    /// `disable`: never encrypted.
    Disable,
    /// `allow`, `prefer`: encrypted if the server can, whoever it is.
    Prefer,
    /// `require`: encrypted, whoever the server is.
    Require,
    /// `verify-ca`: encrypted, and the server's certificate comes from one of the roots.
    VerifyCa(Roots),
    /// `verify-full`: that, and it is made out to the host of the URL.
    VerifyFull(Roots),
}

/// Where trust begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Roots {
    /// The system's.
    System,
    /// A PEM file: `sslrootcert`.
    File(PathBuf),
}

/// Why no connector could be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum TlsError {
    #[error("sslrootcert names a file that holds no certificate in PEM form, or cannot be read")]
    RootFile,
    #[error("the system has no root certificates; name a file with sslrootcert")]
    NoRoots,
    #[error("this build has no usable cipher suite")]
    Setup(#[source] rustls::Error),
}

impl Tls {
    /// The driver's half of the mode: whether TLS is asked for at all.
    pub fn driver_mode(&self) -> SslMode {
        match self {
            Self::Disable => SslMode::Disable,
            Self::Prefer => SslMode::Prefer,
            Self::Require | Self::VerifyCa(_) | Self::VerifyFull(_) => SslMode::Require,
        }
    }

    /// Makes connections of this kind.
    pub fn connector(&self) -> Result<MakeRustlsConnect, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Setup)?;
        let config = match self {
            Self::VerifyFull(roots) => builder
                .with_root_certificates(load(roots)?)
                .with_no_client_auth(),
            Self::Disable | Self::Prefer | Self::Require => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Lenient {
                    chain: None,
                    provider,
                }))
                .with_no_client_auth(),
            Self::VerifyCa(roots) => {
                let roots = Arc::new(load(roots)?);
                let chain =
                    WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider))
                        .build()
                        .map_err(|_| TlsError::NoRoots)?;
                builder
                    .dangerous()
                    .with_custom_certificate_verifier(Arc::new(Lenient {
                        chain: Some(chain),
                        provider,
                    }))
                    .with_no_client_auth()
            }
        };
        Ok(MakeRustlsConnect::new(config))
    }
}

fn load(roots: &Roots) -> Result<RootCertStore, TlsError> {
    let certificates = match roots {
        Roots::System => rustls_native_certs::load_native_certs().certs,
        Roots::File(path) => from_file(path)?,
    };
    let mut store = RootCertStore::empty();
    // A system's folder may hold certificates too old or odd to be read; the others still count.
    let (added, _ignored) = store.add_parsable_certificates(certificates);
    match (added, roots) {
        (0, Roots::System) => Err(TlsError::NoRoots),
        (0, Roots::File(_)) => Err(TlsError::RootFile),
        _ => Ok(store),
    }
}

fn from_file(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|_| TlsError::RootFile)
}

/// Checks less than rustls does by itself: the chain without the name, or (as libpq's `require` is defined) nothing but that
/// the peer holds the key of the certificate it shows.
#[derive(Debug)]
struct Lenient {
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else {
            return Ok(ServerCertVerified::assertion());
        };
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // The name is checked last, after the chain was found good.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            checked => checked,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
