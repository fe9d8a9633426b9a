//! `Prefer` (RFC 7240).

use std::time::Duration;

use http::{HeaderMap, HeaderName};

pub const PREFER: HeaderName = HeaderName::from_static("prefer");

/// The preferences that a queue honours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefer {
    pub respond_async: bool,
    /// How long the client waits for the result.
    pub wait: Option<Duration>,
}

impl Prefer {
    /// Reads all lines; of a repeated preference the first counts (§2).
    pub fn of(headers: &HeaderMap) -> Self {
        let mut found = Self::default();
        let lines = headers.get_all(PREFER).iter().filter_map(|line| line.to_str().ok());
        for preference in lines.flat_map(|line| line.split(',')) {
            let preference = preference.split(';').next().unwrap_or_default();
            let (name, value) = preference.split_once('=').unwrap_or((preference, ""));
            let (name, value) = (name.trim(), value.trim().trim_matches('"'));
            if name.eq_ignore_ascii_case("respond-async") {
                found.respond_async = true;
            } else if name.eq_ignore_ascii_case("wait")
                && found.wait.is_none()
                && let Ok(seconds) = value.parse()
            {
                found.wait = Some(Duration::from_secs(seconds));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn preferences_are_read_from_all_lines() {
        let read = |lines: &[&'static str]| {
            let values = lines.iter().map(|line| (PREFER, HeaderValue::from_static(line)));
            Prefer::of(&values.collect())
        };
        let prefer =
            |respond_async, wait: Option<u64>| Prefer { respond_async, wait: wait.map(Duration::from_secs) };
        assert_eq!(read(&[]), prefer(false, None));
        assert_eq!(read(&["respond-async"]), prefer(true, None));
        assert_eq!(read(&["return=minimal, Respond-Async; foo=\"a b\", WAIT = 10"]), prefer(true, Some(10)));
        assert_eq!(read(&["wait=\"5\"", "respond-async, wait=9"]), prefer(true, Some(5)));
        assert_eq!(read(&["respond-asynchronously, wait=soon"]), prefer(false, None));
    }
}
