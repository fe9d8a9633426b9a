//! The API version that a request asks for: by a header field, a parameter of `Accept`, or the path.

use http::{HeaderMap, HeaderName, HeaderValue, header::ACCEPT};

use crate::config::{VersionMatch, VersionSource};

/// `match.version`, parsed once.
#[derive(Debug)]
pub enum VersionRule {
    Header(HeaderName, HeaderValue),
    /// The name and value of a media type parameter.
    Accept(String, String),
    /// The length of the first part of the path: `/v3` matches `/v3` and `/v3/…`, not `/v30`.
    Path(usize),
}

impl VersionRule {
    /// Nothing if a name or value is invalid; a validated configuration has none.
    pub fn new(version: &VersionMatch) -> Option<Self> {
        Some(match version.source()? {
            VersionSource::Header(name) => {
                Self::Header(name.parse().ok()?, HeaderValue::from_str(&version.is).ok()?)
            }
            VersionSource::MediaType(parameter) => Self::Accept(parameter.to_owned(), version.is.clone()),
            VersionSource::Path(prefix) => Self::Path(prefix.len() + version.is.len()),
        })
    }

    /// `path` is normal, and begins with the version where that is part of it.
    pub fn matches(&self, path: &str, headers: &HeaderMap) -> bool {
        match self {
            Self::Header(name, value) => headers.get_all(name).iter().any(|other| other == value),
            Self::Accept(name, value) => {
                let fields = headers.get_all(ACCEPT).iter().filter_map(|field| field.to_str().ok());
                fields.into_iter().any(|field| has_parameter(field, name, value))
            }
            Self::Path(length) => matches!(path.as_bytes().get(*length), None | Some(b'/')),
        }
    }
}

/// Whether a media range of the field has this parameter (RFC 9110 §12.5.1). Names are case-insensitive; a value may be
/// quoted.
fn has_parameter(field: &str, name: &str, value: &str) -> bool {
    parts(field, b',').any(|range| {
        let parameters = parts(range, b';').skip(1).filter_map(|parameter| parameter.split_once('='));
        let mut parameters = parameters.map(|(name, value)| (name.trim(), value.trim()));
        parameters.any(|(known, given)| {
            let given = given.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(given);
            known.eq_ignore_ascii_case(name) && given == value
        })
    })
}

/// Splits at a separator outside quoted strings.
fn parts(text: &str, separator: u8) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let (mut quoted, mut escaped) = (false, false);
        let end = text.bytes().position(|byte| {
            let is_end = byte == separator && !quoted;
            if byte == b'"' && !escaped {
                quoted = !quoted;
            }
            escaped = quoted && byte == b'\\' && !escaped;
            is_end
        });
        let part = end.map_or(text, |end| &text[..end]);
        rest = end.map(|end| &text[end + 1..]);
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_of_every_media_range_count() {
        for (field, expected) in [
            ("application/json; version=1", true),
            ("text/html, application/json;q=0.5; Version=\"1\"", true),
            ("application/json;version=2, */*;version=1", true),
            ("application/json;version=10", false),
            ("application/json;version=1.0", false),
            ("version=1", false),
            ("a/b; x=\"; version=1\"", false),
            ("a/b; x=\"\\\"; version=1", false),
            ("a/b; x=\"a,b\"; version=1", true),
            ("", false),
            (";version=1", true),
            ("a/b;version", false),
        ] {
            assert_eq!(has_parameter(field, "version", "1"), expected, "{field}");
        }
    }
}
