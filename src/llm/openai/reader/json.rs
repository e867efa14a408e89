//! A lenient JSON reader: it looks only at the members that are needed. The rest need not be valid.
//!
//! Serde's parser refuses a whole answer for one `NaN` in a member that is not needed, for a member
//! that comes twice, or for half a surrogate pair. This one follows brackets, quotes and commas
//! only. It does not recurse, so deep nesting is safe, and reading a value passes over its bytes
//! once. An object ends here where [`Nesting`] ends it, which reads the ones that come in pieces:
//! how a body is cut must not change what is found in it.

use super::nesting::{Nesting, find_either, is_blank, skip};

/// A value, as its bytes, which are not checked. If the text was cut off, the end of an object or
/// array may be missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JsonValue<'a>(&'a [u8]);

/// What was found of an object.
#[derive(Debug)]
pub struct Object<'a, const N: usize> {
    /// The requested members, in the order of their names. Of duplicates the last one counts that
    /// is not null.
    pub members: [Option<JsonValue<'a>>; N],
    /// Whether it has a member, or is the empty object. Otherwise it is not JSON.
    pub is_readable: bool,
    /// Its length in bytes. `None` if it is cut off, or if a part of it is not JSON.
    pub length: Option<usize>,
}

/// Iterates over the members of an object, up to the first that is not JSON.
pub struct ObjectMembers<'a> {
    rest: &'a [u8],
    /// The bytes after the closing bracket, once the iteration has reached it.
    after: Option<&'a [u8]>,
}

/// The complete items of an array.
pub struct Items<'a>(&'a [u8]);

fn trim_start(bytes: &[u8]) -> &[u8] {
    skip(bytes, is_blank)
}

/// The bytes after the comma that may follow a member or an item.
fn after_comma(bytes: &[u8]) -> &[u8] {
    let rest = trim_start(bytes);
    rest.strip_prefix(b",").unwrap_or(rest)
}

/// The length of the string at the start of `bytes`, quotes included. `None` if its end is missing.
pub fn string_end(bytes: &[u8]) -> Option<usize> {
    let mut at = 1;
    loop {
        let rest = bytes.get(at..)?;
        at += find_either(rest, b'"', b'\\')?;
        if bytes[at] == b'"' {
            return Some(at + 1);
        }
        // The escaped byte can be a quote.
        at += 2;
    }
}

/// The length of the value at the start of `bytes`. `None` if its end is missing.
fn value_end(bytes: &[u8]) -> Option<usize> {
    match bytes.first()? {
        b'"' => string_end(bytes),
        b'{' | b'[' => Nesting::default().end(bytes),
        // A quote or a bracket is never a part of it, even where the comma before is missing.
        _ => bytes.iter().position(|&byte| {
            matches!(byte, b',' | b'"' | b'{' | b'[' | b'}' | b']') || is_blank(byte)
        }),
    }
}

impl<'a> JsonValue<'a> {
    /// A value that takes up all of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub fn bytes(self) -> &'a [u8] {
        self.0
    }

    fn first(self) -> u8 {
        self.0.first().copied().unwrap_or_default()
    }

    /// Whether it is null.
    pub fn is_null(self) -> bool {
        self.0 == b"null"
    }

    /// Whether it is an object.
    pub fn is_object(self) -> bool {
        self.first() == b'{'
    }

    /// Whether it is an array.
    pub fn is_array(self) -> bool {
        self.first() == b'['
    }

    /// Whether it is a number.
    pub fn is_number(self) -> bool {
        let first = self.first();
        first == b'-' || first.is_ascii_digit()
    }

    /// Its members by name, if it is an object.
    pub fn object<const N: usize>(self, names: [&str; N]) -> Object<'a, N> {
        let mut members = [None; N];
        let mut any = false;
        let mut all = self.members();
        for (key, value) in &mut all {
            any = true;
            if let Some(at) = place_of(key, &names) {
                let slot: &mut Option<JsonValue<'a>> = &mut members[at];
                if slot.is_none() || !value.is_null() {
                    *slot = Some(value);
                }
            }
        }
        Object {
            members,
            is_readable: any || all.after.is_some(),
            length: all.after.map(|after| self.0.len() - after.len()),
        }
    }

    /// Its members, if it is an object: each key as it is written between its quotes.
    pub fn members(self) -> ObjectMembers<'a> {
        ObjectMembers {
            rest: self.0.strip_prefix(b"{").unwrap_or_default(),
            after: None,
        }
    }

    /// Its complete items, if it is an array.
    pub fn items(self) -> Items<'a> {
        Items(self.0.strip_prefix(b"[").unwrap_or_default())
    }

    /// The bytes between its quotes, with escapes, if it is a string.
    pub fn string(self) -> Option<&'a [u8]> {
        self.0.strip_prefix(b"\"")?.strip_suffix(b"\"")
    }

    /// Its text, if it is a string that is not blank.
    pub fn text(self) -> Option<String> {
        let text = super::text::decoded(self.string()?);
        (!text.trim().is_empty()).then_some(text)
    }

    /// Its number, also if the number is written as a string.
    pub fn number(self) -> Option<f64> {
        let text = self.string().unwrap_or(self.0);
        let number: f64 = std::str::from_utf8(text).ok()?.trim().parse().ok()?;
        number.is_finite().then_some(number)
    }

    /// Whether it has content. Null, false, 0, an empty text, and an object or array of these have
    /// none. Values nested deeper than `depth` count as content.
    pub fn holds_anything(self, depth: u32) -> bool {
        match self.first() {
            b'{' | b'[' if depth == 0 => true,
            b'{' => self
                .members()
                .any(|(_, value)| value.holds_anything(depth - 1)),
            b'[' => self.items().any(|item| item.holds_anything(depth - 1)),
            b'"' => self.string().is_some_and(|text| !is_nothing(text)),
            _ => !(self.is_null() || self.0 == b"false" || self.number() == Some(0.0)),
        }
    }
}

/// Whether a text means null, as some servers write it.
pub fn is_nothing(text: &[u8]) -> bool {
    let text = text.trim_ascii();
    text.is_empty() || text.eq_ignore_ascii_case(b"null") || text.eq_ignore_ascii_case(b"none")
}

/// The place of a key among the names. A key may be written with escapes.
fn place_of(key: &[u8], names: &[&str]) -> Option<usize> {
    let place = |key: &[u8]| names.iter().position(|name| key == name.as_bytes());
    if key.contains(&b'\\') {
        return place(super::text::decoded(key).as_bytes());
    }
    place(key)
}

impl<'a> Iterator for ObjectMembers<'a> {
    type Item = (&'a [u8], JsonValue<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let rest = trim_start(self.rest);
        self.rest = b"";
        match rest.first()? {
            b'"' => {}
            b'}' => {
                self.after = Some(&rest[1..]);
                return None;
            }
            _ => return None,
        }
        let (key, rest) = rest.split_at(string_end(rest)?);
        let value = trim_start(trim_start(rest).strip_prefix(b":")?);
        let key = &key[1..key.len() - 1];
        let Some(end) = value_end(value) else {
            // The value is cut off. The beginning of an object or array is still useful.
            let is_nested = matches!(value.first()?, b'{' | b'[');
            return is_nested.then_some((key, JsonValue(value)));
        };
        self.rest = after_comma(&value[end..]);
        Some((key, JsonValue(&value[..end])))
    }
}

impl<'a> Iterator for Items<'a> {
    type Item = JsonValue<'a>;

    fn next(&mut self) -> Option<JsonValue<'a>> {
        let rest = trim_start(self.0);
        self.0 = b"";
        // No item begins with these. An item without bytes would be found again and again.
        if matches!(rest.first()?, b']' | b'}' | b',') {
            return None;
        }
        let (item, rest) = rest.split_at(value_end(rest)?);
        self.0 = after_comma(rest);
        Some(JsonValue(item))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn member<'a>(json: &'a str, name: &str) -> Option<&'a str> {
        let [value] = JsonValue::new(json.as_bytes()).object([name]).members;
        value.map(|value| std::str::from_utf8(value.bytes()).unwrap())
    }

    #[test]
    fn a_member_is_found_beside_any_other() {
        for json in [
            r#"{"a":7}"#,
            r#" { "x" : NaN , "a" : 7 } "#.trim(),
            r#"{"x":-Infinity,"y":[1,{"a":8}],"z":"\"a\":9}","a":7}"#,
            r#"{"a":6,"a":7}"#,
            r#"{"a":7,"a":null}"#,
            r#"{"a":null,"a":7,}"#,
            r#"{"\u0061":7}"#,
            "{\n\t\"a\":\r\n7\n}",
            r#"{"x":{oops},"a":7}"#,
            r#"{"a":7,oops}"#,
            r#"{"a":7,"b":[}"#,
            r#"{"a":7,"b":"cut o"#,
        ] {
            assert_eq!(member(json, "a"), Some("7"), "{json}");
        }
        for json in [
            "",
            "{",
            "{}",
            "[]",
            "7",
            r#"{"b":7}"#,
            r#"{"a""#,
            r#"{"a":7"#,
        ] {
            assert_eq!(member(json, "a"), None, "{json}");
        }
    }

    #[test]
    fn an_object_without_members_that_is_not_empty_is_not_json() {
        for (json, is_readable) in [
            ("{}", true),
            ("{ }", true),
            (r#"{"a":1}"#, true),
            (r#"{"a":1,oops"#, true),
            ("{oops}", false),
            ("{", false),
            (r#"{"a" 1}"#, false),
            ("[]", false),
            ("oops", false),
        ] {
            let object = JsonValue::new(json.as_bytes()).object([]);
            assert_eq!(object.is_readable, is_readable, "{json}");
        }
    }

    #[test]
    fn only_complete_items_of_a_cut_array_count() {
        let list = |json: &'static str| -> Vec<&str> {
            let items = JsonValue::new(json.as_bytes()).items();
            items
                .map(|item| std::str::from_utf8(item.bytes()).unwrap())
                .collect()
        };
        assert_eq!(
            list(r#"[1, "b]", {"c": [2]} ]"#),
            ["1", r#""b]""#, r#"{"c": [2]}"#]
        );
        assert_eq!(list(r#"[1, {"c": [2]"#), ["1"]);
        assert_eq!(list(r#"[1, 2"#), ["1"]);
        assert_eq!(list("[,,]"), [""; 0]);
        assert_eq!(member(r#"{"a":[1,{"b":2"#, "a"), Some(r#"[1,{"b":2"#));
    }

    #[test]
    fn numbers_are_read_from_numbers_and_strings() {
        for (json, number) in [
            ("5", Some(5.0)),
            ("5.5", Some(5.5)),
            ("-1", Some(-1.0)),
            (r#"" 5 ""#, Some(5.0)),
            ("NaN", None),
            ("1e999", None),
            ("null", None),
            ("[5]", None),
            (r#""five""#, None),
        ] {
            assert_eq!(JsonValue::new(json.as_bytes()).number(), number, "{json}");
        }
    }

    #[test]
    fn values_with_content_are_recognised() {
        for json in [
            "null",
            "false",
            "0",
            "0.0",
            r#""""#,
            r#"" ""#,
            r#""null""#,
            r#""None""#,
            "{}",
            "[]",
            "[null]",
            r#"{"message":"","type":"","param":"","code":null,"details":[]}"#,
        ] {
            assert!(!JsonValue::new(json.as_bytes()).holds_anything(3), "{json}");
        }
        for json in [
            "true",
            "1",
            "NaN",
            r#""x""#,
            "[0,1]",
            r#"{"a":{"b":"x"}}"#,
            "[[[[]]]]",
        ] {
            assert!(JsonValue::new(json.as_bytes()).holds_anything(3), "{json}");
        }
    }

    #[test]
    fn nesting_a_million_deep_is_skipped() {
        let json = [r#"{"x":"#.repeat(1 << 20), "}".repeat(1 << 20)].concat();
        assert_eq!(value_end(json.as_bytes()), Some(json.len()));
        assert!(JsonValue::new(json.as_bytes()).holds_anything(3));
    }

    proptest! {
        #[test]
        fn an_object_ends_at_its_closing_bracket(
            json in r#"\{[ ,\x0c]?("a":("b"|7|x|7"|x\{|\[\}|\{,"c":1\})[ ,\x0c]?|\}){0,9}"#,
        ) {
            let object = JsonValue::new(json.as_bytes()).object([]);
            if let Some(length) = object.length {
                prop_assert_eq!(Nesting::checked().end(json.as_bytes()), Some(length));
            }
        }

        #[test]
        fn no_bytes_make_it_panic_or_hang(bytes in prop::collection::vec(
            prop_oneof![Just(b'{'), Just(b'['), Just(b'}'), Just(b']'), Just(b'"'), Just(b'\\'), Just(b','), Just(b':'), any::<u8>()],
            0..120,
        )) {
            let value = JsonValue::new(&bytes);
            prop_assert!(value.members().count() <= bytes.len());
            prop_assert!(value.items().count() <= bytes.len());
            let _ = (value.object(["a"]), value.number(), value.string(), value.holds_anything(3));
        }
    }
}
