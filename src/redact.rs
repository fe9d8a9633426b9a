//! Texts that may contain credentials, and their redaction.
//!
//! The configuration stores them as [`Secret`]. Other texts (a library's error, a line of a file) go through
//! [`redact_userinfo`].

use std::{borrow::Cow, fmt};

use base64::{Engine, engine::general_purpose::STANDARD};
use http::HeaderValue;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Replaces a secret.
pub const REDACTED: &str = "***";

/// The newtype name with which [`Secret`] deserializes. A deserializer that knows this name passes a text from the
/// environment as bytes.
pub const SECRET_TYPE_NAME: &str = "outrigger::Secret";

/// A text that may contain a credential. `Display`, `Debug` and `Serialize` redact it: a URL loses its userinfo and
/// query; a text marked as hidden is replaced completely.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Secret {
    text: String,
    redaction: Redaction,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Redaction {
    /// Redact the credentials of a URL.
    Url,
    /// The same, for a text that came from the environment.
    UrlFromEnvironment,
    /// Redact the whole text.
    Full,
}

impl Secret {
    /// A URL, or a path.
    pub fn redact_url(text: impl Into<String>) -> Self {
        Self { text: text.into(), redaction: Redaction::Url }
    }

    /// A text that is redacted completely.
    pub fn hidden(text: impl Into<String>) -> Self {
        Self { text: text.into(), redaction: Redaction::Full }
    }

    /// A header field's value: hidden if its name denotes a credential, or if it came from the environment.
    fn of_field(name: &str, value: Self) -> Self {
        let from_environment = value.redaction == Redaction::UrlFromEnvironment;
        let is_credential = ["Basic ", "Bearer "].iter().any(|scheme| {
            value.text.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme))
        });
        if from_environment || is_credential || is_credential_name(name) {
            Self::hidden(value.text)
        } else {
            value
        }
    }

    /// The text itself. It must not appear in any output.
    pub fn expose(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.redaction {
            Redaction::Full => f.write_str(REDACTED),
            Redaction::Url | Redaction::UrlFromEnvironment => f.write_str(&url(&self.text)),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> de::Visitor<'de> for Text {
            type Value = Secret;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Secret, E> {
                Ok(Secret::redact_url(text))
            }
            fn visit_bytes<E: de::Error>(self, text: &[u8]) -> Result<Secret, E> {
                let text = str::from_utf8(text).map_err(E::custom)?.to_owned();
                Ok(Secret { text, redaction: Redaction::UrlFromEnvironment })
            }
            fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<Secret, D::Error> {
                inner.deserialize_str(Text)
            }
        }
        deserializer.deserialize_newtype_struct(SECRET_TYPE_NAME, Text)
    }
}

impl JsonSchema for Secret {
    fn schema_name() -> Cow<'static, str> {
        "Secret".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string" })
    }
}

/// Header fields whose values may be credentials.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, JsonSchema)]
pub struct HeaderFields(pub std::collections::BTreeMap<String, Secret>);

impl std::ops::Deref for HeaderFields {
    type Target = std::collections::BTreeMap<String, Secret>;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<'de> Deserialize<'de> for HeaderFields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields = std::collections::BTreeMap::<String, Secret>::deserialize(deserializer)?;
        Ok(fields.into_iter().collect())
    }
}

impl FromIterator<(String, Secret)> for HeaderFields {
    fn from_iter<I: IntoIterator<Item = (String, Secret)>>(fields: I) -> Self {
        let hide = |(name, value): (String, Secret)| {
            let value = Secret::of_field(&name, value);
            (name, value)
        };
        Self(fields.into_iter().map(hide).collect())
    }
}

/// Whether a key or header field of this name contains a credential. The path of a credential's file is none.
pub fn is_credential_name(name: &str) -> bool {
    const WORDS: [&str; 11] = [
        "authorization",
        "cookie",
        "secret",
        "token",
        "password",
        "passwd",
        "api-key",
        "apikey",
        "credential",
        "private-key",
        "auth",
    ];
    let name = name.to_ascii_lowercase().replace('_', "-");
    let is_word = |word: &&str| match *word {
        // Short, so only as a separate word.
        "auth" => name.split('-').any(|part| part == "auth"),
        word => name.contains(word),
    };
    !name.ends_with("-file") && !name.ends_with("-url") && WORDS.iter().any(is_word)
}

/// Redacts userinfo and query of a URL.
pub fn url(text: &str) -> Cow<'_, str> {
    let shown = redact_userinfo(text);
    match shown.split_once('?') {
        Some((before, _)) if shown.contains("://") => Cow::Owned(format!("{before}?{REDACTED}")),
        _ => shown,
    }
}

/// Redacts these secrets in a text.
pub fn redact_secrets(secrets: &[String], text: String) -> String {
    // Many types convert their text to lower case.
    secrets.iter().fold(text, |text, secret| {
        text.replace(secret, REDACTED).replace(&secret.to_ascii_lowercase(), REDACTED)
    })
}

/// Redacts the userinfo of every URL in a text (`scheme://user:password@host`).
pub fn redact_userinfo(text: &str) -> Cow<'_, str> {
    if !text.contains('@') || !text.contains("://") {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, authority) = rest.split_at(at + 3);
        out.push_str(before);
        let end = authority.find(ends_authority).unwrap_or(authority.len());
        match authority[..end].rfind('@') {
            Some(userinfo) => {
                out.push_str(REDACTED);
                rest = &authority[userinfo..];
            }
            None => rest = authority,
        }
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// The same, also for userinfo without a scheme: `user:password@host`.
pub fn redact_any_userinfo(text: &str) -> Cow<'_, str> {
    let mut out = String::new();
    let mut done = 0;
    for (at, _) in text.match_indices('@') {
        let start = start_of_userinfo(&text[..at]).max(done);
        if text[start..at].contains(':') {
            out.push_str(&text[done..start]);
            out.push_str(REDACTED);
            done = at;
        }
    }
    if done == 0 {
        return redact_userinfo(text);
    }
    out.push_str(&text[done..]);
    Cow::Owned(redact_userinfo(&out).into_owned())
}

fn start_of_userinfo(before: &str) -> usize {
    let delimiter = |(at, character): (usize, char)| {
        (ends_authority(character) || "=([{".contains(character)).then(|| at + character.len_utf8())
    };
    before.char_indices().rev().find_map(delimiter).unwrap_or(0)
}

fn ends_authority(character: char) -> bool {
    character.is_whitespace() || character.is_control() || "/?#\"'`<>\\,;".contains(character)
}

/// Redacts a line of a configuration file, with `*` for every byte of a credential, so that columns stay the same.
pub fn redact_line(text: &str) -> String {
    let mut bytes = text.as_bytes().to_vec();
    let mut hide = |from: usize, to: usize| {
        if let Some(part) = bytes.get_mut(from..to) {
            part.fill(b'*');
        }
    };
    // The userinfo of URLs, with or without a scheme.
    for (at, _) in text.match_indices('@') {
        let start = start_of_userinfo(&text[..at]);
        if text[start..at].contains(':') {
            hide(start, at);
        }
    }
    // The query of URLs.
    for (at, _) in text.match_indices('?') {
        let end = text[at..]
            .find(|c: char| c.is_whitespace() || "\"'`".contains(c))
            .map_or(text.len(), |end| at + end);
        if text[..at].contains("://") {
            hide(at + 1, end);
        }
    }
    // `key = "value"` if the key denotes a credential.
    for (at, _) in text.match_indices('=') {
        let key = text[..at].trim_end().trim_end_matches(['"', '\'']);
        let name = key.rsplit(|c: char| !(c.is_ascii_alphanumeric() || "-_".contains(c))).next();
        let value = text[at + 1..].trim_start();
        let from = text.len() - value.len();
        let Some(quote) = value.chars().next().filter(|quote| "\"'".contains(*quote)) else { continue };
        if name.is_some_and(is_credential_name)
            || value[1..].starts_with("Bearer ")
            || value[1..].starts_with("Basic ")
        {
            let inside = value.trim_start_matches(quote);
            let from = from + value.len() - inside.len();
            let end = inside.find(quote).unwrap_or(inside.len());
            hide(from, from + end);
        }
    }
    // Only whole characters were replaced, since credentials end at an ASCII character.
    String::from_utf8(bytes).unwrap_or_else(|_| "*".repeat(text.len()))
}

/// The credentials of a URL's userinfo as an `Authorization` field (RFC 7617).
pub fn basic_credentials(authority: &http::uri::Authority) -> Option<HeaderValue> {
    let (userinfo, _) = authority.as_str().rsplit_once('@')?;
    let mut field =
        HeaderValue::try_from(format!("Basic {}", STANDARD.encode(percent_decoded(userinfo)))).ok()?;
    field.set_sensitive(true);
    Some(field)
}

fn percent_decoded(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.as_bytes();
    while let [first, rest @ ..] = bytes {
        let decoded = match rest {
            [high, low, ..] if *first == b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                digit(*high).zip(digit(*low)).and_then(|(high, low)| u8::try_from(high * 16 + low).ok())
            }
            _ => None,
        };
        out.push(decoded.unwrap_or(*first));
        bytes = if decoded.is_some() { &rest[2..] } else { rest };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redacts_userinfo_and_query() {
        for (text, shown) in [
            ("http://u:p@h:1/x?k=v", "http://***@h:1/x?***"),
            ("https://u@h", "https://***@h"),
            ("http://u:p@s@h/", "http://***@h/"),
            ("http://h/x", "http://h/x"),
            ("/etc/jwks.json", "/etc/jwks.json"),
        ] {
            assert_eq!(Secret::redact_url(text).to_string(), shown);
            assert_eq!(format!("{:?}", Secret::redact_url(text)), format!("{shown:?}"));
            assert_eq!(serde_json::to_value(Secret::redact_url(text)).unwrap(), shown);
        }
        let text = "to http://u:p@h, then `https://a:b@c/d@e` and mail@example.org";
        assert_eq!(redact_any_userinfo("`u:pw@h:80` is not HOST:PORT"), "`***@h:80` is not HOST:PORT");
        assert_eq!(redact_userinfo(text), "to http://***@h, then `https://***@c/d@e` and mail@example.org");
    }

    #[test]
    fn hides_fields_by_name_scheme_and_origin() {
        let of = |name: &str, value: Secret| Secret::of_field(name, value).to_string();
        for name in [
            "authorization",
            "Cookie",
            "x-api-key",
            "X-Auth-Token",
            "x_secret",
            "proxy-authorization",
            "x-auth",
        ] {
            assert_eq!(of(name, Secret::redact_url("v")), REDACTED, "{name}");
        }
        assert_eq!(of("x-tier", Secret::redact_url("gold")), "gold");
        assert_eq!(of("x-author", Secret::redact_url("ann")), "ann");
        assert_eq!(of("x-upstream", Secret::redact_url("bearer abc")), REDACTED);
        let from_environment = Secret { text: "v".to_owned(), redaction: Redaction::UrlFromEnvironment };
        assert_eq!(of("x-tier", from_environment), REDACTED);
    }

    #[test]
    fn a_redacted_line_keeps_its_length() {
        for (text, shown) in [
            ("otlp = \"http://u:pw@h:1\"", "otlp = \"http://****@h:1\""),
            ("forward_to = 'u:pw@h'", "forward_to = '****@h'"),
            (
                "set = { authorization = \"Bearer ä\", x = 'y' }",
                "set = { authorization = \"*********\", x = 'y' }",
            ),
            ("set = { \"x-api-key\" = 'abc' }", "set = { \"x-api-key\" = '***' }"),
            ("client_secret_file = '/run/s'", "client_secret_file = '/run/s'"),
            ("jwks = 'https://h/k?key=abc'", "jwks = 'https://h/k?*******'"),
            ("x = 'Bearer abc'", "x = '**********'"),
            ("retry = { max = 1 }", "retry = { max = 1 }"),
        ] {
            assert_eq!(redact_line(text), shown);
            assert_eq!(redact_line(text).len(), text.len());
        }
    }

    #[test]
    fn userinfo_becomes_an_authorization_field() {
        let field = |authority: &str| basic_credentials(&authority.parse().unwrap());
        assert_eq!(field("u:p%40q@h:1").unwrap(), "Basic dTpwQHE=");
        assert_eq!(field("h:1"), None);
    }
}
