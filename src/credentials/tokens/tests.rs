use proptest::prelude::*;
use serde_json::json;

use super::*;

const SECRET: &str = "a secret key of 32 bytes or more…";
const NOW: Timestamp = Timestamp(1_795_381_726_500_000);

fn keys() -> Keys {
    Keys::new(SECRET, [])
}

fn signed_text(header: &str, payload: &[u8], secret: &str) -> String {
    let signed = format!(
        "{}.{}",
        URL_SAFE_NO_PAD.encode(header),
        URL_SAFE_NO_PAD.encode(payload)
    );
    let mac = HmacSha256::new_from_slice(secret.as_bytes()).unwrap();
    let signature = mac.chain_update(&signed).finalize().into_bytes();
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

fn signed(claims: &Value) -> String {
    signed_text(
        r#"{"alg":"HS256","typ":"JWT"}"#,
        claims.to_string().as_bytes(),
        SECRET,
    )
}

fn verified(token: &str) -> Result<Claims, TokenError> {
    keys().verify(token, TokenType::Access, Some(NOW))
}

/// Valid claims with some replaced; null removes one.
fn claims(changes: &Value) -> Value {
    let mut claims = json!({"token_type": "access", "exp": 1_795_382_026, "iat": 1_795_381_726, "jti": "0f", "user_id": "7"});
    for (name, value) in changes.as_object().unwrap() {
        if value.is_null() {
            claims.as_object_mut().unwrap().remove(name);
        } else {
            claims[name] = value.clone();
        }
    }
    claims
}

fn refused(changes: &Value) -> TokenError {
    verified(&signed(&claims(changes))).unwrap_err()
}

fn access(keys: &Keys) -> String {
    keys.sign(
        TokenType::Access,
        Some(UserId(7)),
        TokenId([0xab; 16]),
        NOW,
        Duration::from_secs(300),
    )
}

#[test]
fn token_has_the_recorded_form() {
    let token = access(&keys());
    let parts: Vec<_> = token
        .split('.')
        .map(|part| URL_SAFE_NO_PAD.decode(part).unwrap())
        .collect();
    assert_eq!(parts[0], br#"{"alg":"HS256","typ":"JWT"}"#);
    assert_eq!(
        String::from_utf8(parts[1].clone()).unwrap(),
        r#"{"token_type":"access","exp":1795382026,"iat":1795381726,"jti":"abababababababababababababababab","user_id":"7"}"#
    );
    assert_eq!(parts[2].len(), 32);
}

#[test]
fn signature_agrees_with_the_example_of_rfc_7515() {
    // Appendix A.1 of the RFC: its key is binary, which a setting cannot be, so only the arithmetic
    // is compared.
    let key = URL_SAFE_NO_PAD
        .decode("AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow")
        .unwrap();
    let signed = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
    let keys = Keys {
        keys: vec![HmacSha256::new_from_slice(&key).unwrap()],
    };
    let token = format!("{signed}.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk");
    assert_eq!(keys.signed_claims(&token).unwrap()["iss"], "joe");
}

#[test]
fn signed_token_is_verified() {
    let claims = verified(&access(&keys())).unwrap();
    assert_eq!(claims.user(), Ok(UserId(7)));
    assert_eq!(claims.jti, "ab".repeat(16));
    assert_eq!(claims.issued_at, Some(Timestamp(1_795_381_726_000_000)));
    assert_eq!(claims.expires_at, Timestamp(1_795_382_026_000_000));
}

#[test]
fn token_expires_at_the_second_of_exp() {
    let token = access(&keys());
    let at = |micros| keys().verify(&token, TokenType::Access, Some(Timestamp(micros)));
    assert!(at(1_795_382_025_999_999).is_ok());
    assert_eq!(at(1_795_382_026_000_000), Err(TokenError::Expired));
}

#[test]
fn fallback_keys_verify_and_do_not_sign() {
    let token = access(&keys());
    let rotated = Keys::new("the new key, as long as the old one", ["another", SECRET]);
    assert!(rotated.verify(&token, TokenType::Access, Some(NOW)).is_ok());
    assert_eq!(verified(&access(&rotated)), Err(TokenError::Invalid));
}

#[test]
fn every_fault_has_its_recorded_message() {
    assert_eq!(refused(&json!({"exp": 1_795_381_726})), TokenError::Expired);
    assert_eq!(refused(&json!({"exp": null})), TokenError::NoExpiry);
    assert_eq!(refused(&json!({"jti": null})), TokenError::NoId);
    assert_eq!(refused(&json!({"token_type": null})), TokenError::NoType);
    assert_eq!(
        refused(&json!({"token_type": "refresh"})),
        TokenError::WrongType
    );
    assert_eq!(refused(&json!({"token_type": 7})), TokenError::WrongType);
    assert_eq!(TokenError::NoExpiry.to_string(), "Token has no 'exp' claim");
}

#[test]
fn first_of_several_faults_is_reported() {
    let every = json!({"exp": 1, "jti": null, "token_type": null, "user_id": "x"});
    assert_eq!(refused(&every), TokenError::Expired);
    assert_eq!(
        refused(&json!({"exp": null, "jti": null, "token_type": null})),
        TokenError::NoExpiry
    );
    assert_eq!(
        refused(&json!({"jti": null, "token_type": "refresh"})),
        TokenError::NoId
    );
    assert_eq!(
        refused(&json!({"token_type": "refresh", "user_id": "x"})),
        TokenError::WrongType
    );
    assert_eq!(
        refused(&json!({"exp": 1, "nbf": 1_895_381_726})),
        TokenError::Invalid
    );
}

#[test]
fn token_without_user_is_valid_but_names_no_user() {
    let claims = verified(&signed(&claims(&json!({"user_id": null})))).unwrap();
    assert_eq!(claims.user(), Err(TokenError::NoUser));
    let nobody = keys().sign(
        TokenType::Access,
        None,
        TokenId([1; 16]),
        NOW,
        Duration::from_secs(300),
    );
    assert_eq!(verified(&nobody).unwrap().user_id, None);
}

#[test]
fn user_id_must_be_digits_or_a_number() {
    assert_eq!(
        verified(&signed(&claims(&json!({"user_id": 7}))))
            .unwrap()
            .user(),
        Ok(UserId(7))
    );
    for unusable in [
        json!("alice"),
        json!(""),
        json!("-1"),
        json!("+1"),
        json!(" 1"),
        json!("1.0"),
        json!("9223372036854775808"),
        json!(1.5),
        json!(u64::MAX),
        json!(true),
        json!([7]),
        json!({"id": 7}),
    ] {
        assert_eq!(
            refused(&json!({"user_id": unusable})),
            TokenError::NoUser,
            "{unusable}"
        );
    }
}

#[test]
fn times_of_any_form_are_read_as_integers() {
    assert_eq!(
        refused(&json!({"exp": 1_795_381_726.9})),
        TokenError::Expired
    );
    assert!(verified(&signed(&claims(&json!({"exp": 1_795_381_727.1})))).is_ok());
    for past in [json!(0), json!(-1), json!(-1e300), json!(i64::MIN)] {
        assert_eq!(
            refused(&json!({"exp": past})),
            TokenError::Expired,
            "{past}"
        );
    }
    for odd in [
        json!(MAX_EXPIRY + 1),
        json!(u64::MAX),
        json!(1e300),
        json!("1895382026"),
        json!(true),
        json!([]),
        json!({}),
    ] {
        assert_eq!(refused(&json!({"exp": odd})), TokenError::Invalid, "{odd}");
    }
    assert!(verified(&signed(&claims(&json!({"exp": MAX_EXPIRY})))).is_ok());
    for (name, odd) in [
        ("iat", json!("x")),
        ("nbf", json!([])),
        ("nbf", json!(1_795_381_727)),
        ("jti", json!(7)),
    ] {
        assert_eq!(refused(&json!({name: odd})), TokenError::Invalid, "{name}");
    }
    assert_eq!(
        refused(&json!({"jti": "x".repeat(256)})),
        TokenError::Invalid
    );
    assert!(
        verified(&signed(&claims(
            &json!({"iat": null, "nbf": 1_795_381_726})
        )))
        .unwrap()
        .issued_at
        .is_none()
    );
}

#[test]
fn null_claim_is_not_a_missing_claim() {
    for (name, error) in [
        ("exp", TokenError::Invalid),
        ("jti", TokenError::Invalid),
        ("token_type", TokenError::WrongType),
        ("user_id", TokenError::NoUser),
    ] {
        let mut claims = claims(&json!({}));
        claims[name] = Value::Null;
        assert_eq!(verified(&signed(&claims)), Err(error), "{name}");
    }
}

#[test]
fn only_plain_hs256_is_verified() {
    let payload = claims(&json!({})).to_string();
    let token = |header: &str| signed_text(header, payload.as_bytes(), SECRET);
    for header in [
        r#"{"typ":"JWT","alg":"HS256"}"#,
        r#"{"alg":"HS256"}"#,
        r#"{"alg":"HS256","kid":"1"}"#,
    ] {
        assert!(verified(&token(header)).is_ok(), "{header}");
    }
    for header in [
        r#"{"alg":"none","typ":"JWT"}"#,
        r#"{"alg":"HS512","typ":"JWT"}"#,
        r#"{"alg":"hs256","typ":"JWT"}"#,
        r#"{"alg":["HS256"],"typ":"JWT"}"#,
        r#"{"alg":"HS256","crit":["b64"],"b64":false}"#,
        r#"{"alg":"HS256","b64":false}"#,
        r#"{"alg":"HS256","crit":null}"#,
        r#"{"typ":"JWT"}"#,
        r#"["HS256"]"#,
        "",
        "{",
    ] {
        assert_eq!(
            verified(&token(header)),
            Err(TokenError::Invalid),
            "{header}"
        );
    }
}

#[test]
fn broken_forms_are_invalid() {
    let good = access(&keys());
    let (head, signature) = good.rsplit_once('.').unwrap();
    let mut broken: Vec<String> = ["", ".", "..", "...", "garbage", "a.b.c", "ñ.ñ.ñ"]
        .map(str::to_owned)
        .into();
    broken.extend([
        format!("{head}."),
        head.to_owned(),
        good[..good.len() - 3].to_owned(),
        format!("{good}="),
        format!("{good}."),
        format!(" {good}"),
        format!("{head}.{signature}A"),
        format!(".{good}"),
        "a".repeat(1 << 20),
        ".".repeat(1 << 20),
        signed_text(r#"{"alg":"HS256","typ":"JWT"}"#, &[b'['; 5000], SECRET),
        signed_text(r#"{"alg":"HS256","typ":"JWT"}"#, b"[1]", SECRET),
        signed_text(r#"{"alg":"HS256","typ":"JWT"}"#, b"\xff", SECRET),
        signed_text(
            r#"{"alg":"HS256","typ":"JWT"}"#,
            br#"{"exp":1e999}"#,
            SECRET,
        ),
        signed(&claims(&json!({"more": "x".repeat(9000)}))),
        signed_text(
            r#"{"alg":"HS256","typ":"JWT"}"#,
            claims(&json!({})).to_string().as_bytes(),
            "x",
        ),
    ]);
    for token in broken {
        assert_eq!(verified(&token), Err(TokenError::Invalid), "{token:.80}");
    }
}

#[test]
fn unused_bits_of_the_last_character_must_be_zero() {
    // 32 bytes leave two bits of the 43rd character unused: four spellings of one signature, one of
    // them canonical.
    let good = access(&keys());
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let (head, last) = good.split_at(good.len() - 1);
    let accepted = alphabet
        .chars()
        .filter(|c| verified(&format!("{head}{c}")).is_ok());
    assert_eq!(accepted.collect::<String>(), last);
}

#[test]
fn debug_output_hides_the_keys() {
    assert_eq!(format!("{:?}", keys()), "Keys(hidden)");
}

#[test]
fn random_ids_differ_and_have_32_digits() {
    let (a, b) = (
        TokenId::random().unwrap().to_string(),
        TokenId::random().unwrap().to_string(),
    );
    assert_ne!(a, b);
    assert!(
        a.len() == 32
            && a.bytes()
                .all(|c| c.is_ascii_hexdigit() && !c.is_ascii_uppercase())
    );
    assert_eq!(TokenId([0; 16]).to_string(), "0".repeat(32));
}

proptest! {
    #[test]
    fn every_signed_token_is_verified(user in 0..i64::MAX, id: [u8; 16], micros in 0..MAX_EXPIRY * 1_000_000 / 2, lifetime in 1..10_000_000_u64) {
        let now = Timestamp(micros);
        let token = keys().sign(TokenType::Refresh, Some(UserId(user)), TokenId(id), now, Duration::from_secs(lifetime));
        let claims = keys().verify(&token, TokenType::Refresh, Some(now)).unwrap();
        prop_assert_eq!(claims.user_id, Some(UserId(user)));
        prop_assert_eq!(claims.jti, TokenId(id).to_string());
        prop_assert_eq!(claims.expires_at.unix_seconds() - now.unix_seconds(), i64::try_from(lifetime).unwrap());
        prop_assert_eq!(keys().verify(&token, TokenType::Access, Some(now)), Err(TokenError::WrongType));
    }

    #[test]
    fn any_text_is_refused_without_a_panic(text: String, parts in "[A-Za-z0-9_.=-]{0,200}") {
        prop_assert_eq!(verified(&text), Err(TokenError::Invalid));
        prop_assert_eq!(verified(&parts), Err(TokenError::Invalid));
        prop_assert_eq!(verified(&format!("{HEADER}.{parts}")), Err(TokenError::Invalid));
    }

    #[test]
    fn any_signed_payload_is_checked_without_a_panic(payload: Vec<u8>, claim in "exp|iat|nbf|jti|token_type|user_id", value: f64) {
        let header = r#"{"alg":"HS256","typ":"JWT"}"#;
        prop_assert!(verified(&signed_text(header, &payload, SECRET)).is_err());
        let odd = claims(&json!({claim: value}));
        if let Ok(claims) = verified(&signed(&odd)) {
            prop_assert!(claims.expires_at > NOW);
        }
    }

    #[test]
    fn one_changed_byte_breaks_a_token(at in 0..200_usize, bit in 0..7_u32) {
        let mut token = access(&keys()).into_bytes();
        token[at] ^= 1 << bit;
        prop_assert_eq!(verified(std::str::from_utf8(&token).unwrap()), Err(TokenError::Invalid));
    }
}
