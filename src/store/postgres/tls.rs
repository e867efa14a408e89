//! TLS to the server, by the `sslmode` of the URL.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use tokio_postgres::config::SslMode;
use tokio_postgres_rustls::MakeRustlsConnect;

/// How the server is authenticated, by libpq's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tls {
    /// `disable`: never encrypted.
    Disable,
    /// `allow`, `prefer`: encrypted if the server supports it; any certificate is accepted.
    Prefer,
    /// `require`: encrypted; any certificate is accepted.
    Require,
    /// `verify-ca`: encrypted, and the server's certificate comes from one of the roots.
    VerifyCa(Roots),
    /// `verify-full`: as `verify-ca`, and the certificate names the host of the URL.
    VerifyFull(Roots),
}

/// The trusted root certificates.
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
    /// The driver's part of the mode: whether TLS is used at all.
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
        let (chain, pinned) = match self {
            Self::Disable | Self::Prefer | Self::Require => (None, Vec::new()),
            Self::VerifyCa(roots) | Self::VerifyFull(roots) => {
                let (store, pinned) = load(roots)?;
                let chain = WebPkiServerVerifier::builder_with_provider(
                    Arc::new(store),
                    Arc::clone(&provider),
                );
                (Some(chain.build().map_err(|_| TlsError::NoRoots)?), pinned)
            }
        };
        let verifier = Verifier {
            chain,
            pinned,
            is_name_checked: matches!(self, Self::VerifyFull(_)),
            provider,
        };
        let config = builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        Ok(MakeRustlsConnect::new(config))
    }
}

/// The roots, and those of them that the operator has named.
fn load(roots: &Roots) -> Result<(RootCertStore, Vec<CertificateDer<'static>>), TlsError> {
    let (certificates, pinned) = match roots {
        Roots::System => (rustls_native_certs::load_native_certs().certs, Vec::new()),
        Roots::File(path) => {
            let named: Vec<_> = CertificateDer::pem_file_iter(path)
                .and_then(Iterator::collect)
                .map_err(|_| TlsError::RootFile)?;
            (named.clone(), named)
        }
    };
    let mut store = RootCertStore::empty();
    // A system's folder may hold certificates that are too old or unusual to be read; the others
    // still count.
    let (added, _ignored) = store.add_parsable_certificates(certificates);
    match (added, roots) {
        (0, Roots::System) => Err(TlsError::NoRoots),
        (0, Roots::File(_)) => Err(TlsError::RootFile),
        _ => Ok((store, pinned)),
    }
}

/// Checks what the mode asks for. That is less than rustls checks by itself, or, for a certificate
/// that the operator has named, something else. In every mode the peer proves that it holds the key
/// of its certificate; as libpq defines `require`, that is all.
#[derive(Debug)]
struct Verifier {
    chain: Option<Arc<WebPkiServerVerifier>>,
    /// Trusted as they are, as libpq does: a server's self-signed certificate is often its own root
    /// and calls itself an authority, and the check of the chain accepts no authority as a server.
    pinned: Vec<CertificateDer<'static>>,
    is_name_checked: bool,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
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
            // The name is checked last, after the chain was found valid.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.is_name_checked => Ok(ServerCertVerified::assertion()),
            // `Other` means how the certificate was made. Its dates were checked before.
            Err(rustls::Error::InvalidCertificate(CertificateError::Other(_)))
                if self.pinned.iter().any(|named| named == end_entity) =>
            {
                if self.is_name_checked {
                    verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                }
                Ok(ServerCertVerified::assertion())
            }
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

/// Why a server was not trusted, with the fix, if that is what broke the connection.
pub(super) fn distrust(error: &tokio_postgres::Error) -> Option<&'static str> {
    use CertificateError as Fault;

    let system = std::error::Error::source(error)?.downcast_ref::<io::Error>()?;
    let rustls::Error::InvalidCertificate(fault) = system.get_ref()?.downcast_ref()? else {
        return None;
    };
    let is_name = matches!(
        fault,
        Fault::NotValidForName | Fault::NotValidForNameContext { .. }
    );
    let is_date = matches!(
        fault,
        Fault::Expired
            | Fault::ExpiredContext { .. }
            | Fault::NotValidYet
            | Fault::NotValidYetContext { .. }
    );
    Some(if is_name {
        "it is not made out to this host; use a host name that the certificate has among its subjectAltNames, or sslmode=verify-ca"
    } else if is_date {
        "it has expired or is not valid yet; renew it on the server, or correct a clock"
    } else {
        "no root here vouches for it; name the file of its authority with sslrootcert"
    })
}
