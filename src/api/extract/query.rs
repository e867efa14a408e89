//! Query parameters by name. If a name comes twice, the last one counts, as in Django.

use std::convert::Infallible;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;

/// The decoded query string. Bytes that are no UTF-8 become replacement characters, as the URL
/// standard says.
#[derive(Clone, Debug, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Decodes what follows the `?`.
    pub fn parse(query: &str) -> Self {
        Self(
            form_urlencoded::parse(query.as_bytes())
                .into_owned()
                .collect(),
        )
    }

    /// The last value of that name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .rev()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// All names and values, in their order.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        let pairs = self.0.iter();
        pairs.map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The whole number of that name: `default` if it is absent.
    ///
    /// # Errors
    /// A message for the field, if it is no whole number or outside `range`.
    pub fn integer(
        &self,
        name: &str,
        default: usize,
        range: std::ops::RangeInclusive<usize>,
    ) -> Result<usize, String> {
        let Some(text) = self.get(name) else {
            return Ok(default);
        };
        let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err("A valid integer is required.".to_owned());
        }
        // More digits than a number holds are out of range like any other large number.
        match text.parse::<i128>().unwrap_or(if text.starts_with('-') {
            i128::MIN
        } else {
            i128::MAX
        }) {
            number if number < *range.start() as i128 => Err(format!(
                "Ensure this value is greater than or equal to {}.",
                range.start()
            )),
            number if number > *range.end() as i128 => Err(format!(
                "Ensure this value is less than or equal to {}.",
                range.end()
            )),
            number => Ok(usize::try_from(number).unwrap_or(*range.end())),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Query {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self::parse(parts.uri.query().unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_of_a_name_counts_and_escapes_are_decoded() {
        let query = Query::parse("q=a&q=b+c%20d%C3%A9&empty=&bad=%ff");
        assert_eq!(query.get("q"), Some("b c dé"));
        assert_eq!(query.get("empty"), Some(""));
        assert_eq!(query.get("bad"), Some("\u{fffd}"));
        assert_eq!(query.get("other"), None);
    }

    #[test]
    fn whole_numbers_in_range_pass_and_nothing_else() {
        let k = |text: &str| Query::parse(text).integer("k", 5, 1..=100);
        assert_eq!(k(""), Ok(5));
        assert_eq!(k("k=1"), Ok(1));
        assert_eq!(k("k=100"), Ok(100));
        for bad in [
            "k=0",
            "k=-1",
            "k=101",
            "k=",
            "k=abc",
            "k=1.5",
            "k=--1",
            "k=99999999999999999999999999999999999999999",
            "k=%00",
        ] {
            assert!(k(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_integer_passes_if_and_only_if_it_is_in_range(k in prop_oneof![any::<i128>(), -200_i128..200]) {
            let read = Query::parse(&format!("k={k}")).integer("k", 5, 1..=100);
            let expected = usize::try_from(k).ok().filter(|k| (1..=100).contains(k));
            prop_assert_eq!(read.ok(), expected);
        }

        #[test]
        fn any_text_is_a_number_in_range_or_an_error(text in any::<String>()) {
            let query: String = form_urlencoded::Serializer::new(String::new()).append_pair("k", &text).finish();
            if let Ok(k) = Query::parse(&query).integer("k", 5, 1..=100) {
                prop_assert!((1..=100).contains(&k));
            }
        }
    }
}
