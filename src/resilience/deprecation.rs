//! The end of an API version, announced in its responses: `Deprecation` (RFC 9745), `Sunset` (RFC 8594), `Link`.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use http::{HeaderMap, HeaderName, HeaderValue, header::LINK};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::Date;

const DEPRECATION: HeaderName = HeaderName::from_static("deprecation");
pub const SUNSET: HeaderName = HeaderName::from_static("sunset");

/// `deprecation` of a route; absent: none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DeprecationSettings {
    /// From when on clients should use another version.
    pub since: Date,
    /// When this version ends.
    #[serde(default)]
    pub sunset: Option<Date>,
    /// The address of a page that says what to use instead.
    #[serde(default)]
    pub link: Option<String>,
    /// What happens after the sunset.
    #[serde(default)]
    pub after: AfterSunset,
}

/// What a request after the sunset gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum AfterSunset {
    /// The service's response, as before.
    #[default]
    #[serde(rename = "serve")]
    Serve,
    /// 410.
    #[serde(rename = "410")]
    Gone,
}

/// The fields of a route's responses, made once.
#[derive(Clone, Debug)]
pub struct Deprecation {
    since: HeaderValue,
    sunset: Option<HeaderValue>,
    link: Option<HeaderValue>,
    gone_at: Option<Date>,
}

impl Deprecation {
    /// Fails if the link cannot be a header value.
    pub fn new(settings: &DeprecationSettings) -> Result<Self, InvalidLink> {
        let link = settings.link.as_ref().map(|link| {
            // Characters that would end the reference (RFC 8288 §3).
            let is_bare =
                link.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'<' | b'>' | b'"'));
            Some(format!("<{link}>; rel=\"deprecation\"")).filter(|_| is_bare)
        });
        let link = link.map(|text| text.and_then(|text| HeaderValue::try_from(text).ok()).ok_or(InvalidLink));
        Ok(Self {
            // A date of RFC 9651 §3.3.7.
            since: header(&format!("@{}", settings.since.unix_seconds())),
            sunset: settings.sunset.map(http_date),
            link: link.transpose()?,
            gone_at: settings.sunset.filter(|_| settings.after == AfterSunset::Gone),
        })
    }

    /// The date of the sunset, if it has passed and requests are no longer served.
    pub fn gone_since(&self, now: SystemTime) -> Option<Date> {
        self.gone_at.filter(|date| date.midnight() <= now)
    }

    /// Adds the fields to a response. What the service itself says of its deprecation stays.
    pub fn announce(&self, headers: &mut HeaderMap) {
        if !headers.contains_key(DEPRECATION) {
            headers.insert(DEPRECATION, self.since.clone());
        }
        if let Some(sunset) = &self.sunset
            && !headers.contains_key(SUNSET)
        {
            headers.insert(SUNSET, sunset.clone());
        }
        if let Some(link) = &self.link {
            headers.append(LINK, link.clone());
        }
    }
}

/// Requests of deprecated routes by route and client, to find who still uses a version.
#[derive(Debug, Default)]
pub struct DeprecatedRequests(Mutex<BTreeMap<(String, String), u64>>);

/// The most clients that are counted by name, of all routes together.
const MAX_CLIENTS: usize = 200;
/// The name of all others.
const OTHER: &str = "other";

impl DeprecatedRequests {
    pub fn count(&self, route: &str, client: &str) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = counts.len() >= MAX_CLIENTS;
        let mut key = (route.to_owned(), client.to_owned());
        if is_full && !counts.contains_key(&key) {
            key.1 = OTHER.to_owned();
        }
        *counts.entry(key).or_default() += 1;
    }

    /// Route, client and number of requests.
    pub fn read(&self) -> Vec<(String, String, u64)> {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.iter().map(|((route, client), count)| (route.clone(), client.clone(), *count)).collect()
    }
}

/// `link` is not a URL that a header field can contain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this is not a URL")]
pub struct InvalidLink;

/// The value of `Sunset`.
pub fn http_date(date: Date) -> HeaderValue {
    header(&httpdate::fmt_http_date(date.midnight()))
}

/// Digits, letters and punctuation of a date: always a valid value.
fn header(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(sunset: Option<&str>, link: Option<&str>) -> DeprecationSettings {
        DeprecationSettings {
            since: "2026-12-01".parse().expect("a date"),
            sunset: sunset.map(|date| date.parse().expect("a date")),
            link: link.map(ToOwned::to_owned),
            after: AfterSunset::Gone,
        }
    }

    #[test]
    fn responses_announce_the_dates_and_the_page() {
        let page = "https://example.com/v2?from=v1";
        let deprecation = Deprecation::new(&settings(Some("2027-06-01"), Some(page))).expect("valid");
        let mut headers = HeaderMap::new();
        headers.insert(LINK, HeaderValue::from_static("</next>; rel=\"next\""));
        deprecation.announce(&mut headers);
        assert_eq!(headers[DEPRECATION], "@1796083200");
        assert_eq!(headers[SUNSET], "Tue, 01 Jun 2027 00:00:00 GMT");
        let links: Vec<_> = headers.get_all(LINK).iter().collect();
        assert_eq!(links, ["</next>; rel=\"next\"", &*format!("<{page}>; rel=\"deprecation\"")]);
    }

    #[test]
    fn what_the_service_says_itself_stays() {
        let deprecation = Deprecation::new(&settings(Some("2027-06-01"), None)).expect("valid");
        let mut headers = HeaderMap::new();
        headers.insert(DEPRECATION, HeaderValue::from_static("@1"));
        headers.insert(SUNSET, HeaderValue::from_static("Wed, 01 Jan 2031 00:00:00 GMT"));
        deprecation.announce(&mut headers);
        assert_eq!(headers[DEPRECATION], "@1");
        assert_eq!(headers[SUNSET], "Wed, 01 Jan 2031 00:00:00 GMT");
        assert!(!headers.contains_key(LINK));
    }

    #[test]
    fn a_version_ends_at_midnight_of_its_sunset() {
        let gone = Deprecation::new(&settings(Some("2027-06-01"), None)).expect("valid");
        let date: Date = "2027-06-01".parse().expect("a date");
        let second = std::time::Duration::from_secs(1);
        assert_eq!(gone.gone_since(date.midnight() - second), None);
        assert_eq!(gone.gone_since(date.midnight()), Some(date));
        let served = DeprecationSettings { after: AfterSunset::Serve, ..settings(Some("2027-06-01"), None) };
        assert_eq!(Deprecation::new(&served).expect("valid").gone_since(date.midnight() + second), None);
        assert_eq!(Deprecation::new(&settings(None, None)).expect("valid").gone_since(date.midnight()), None);
    }

    #[test]
    fn clients_are_counted_by_name_up_to_a_bound() {
        let requests = DeprecatedRequests::default();
        for client in 0..1000 {
            requests.count("v1", &client.to_string());
        }
        requests.count("v1", "7");
        let counts = requests.read();
        assert_eq!(counts.len(), MAX_CLIENTS + 1);
        assert!(counts.contains(&("v1".to_owned(), "7".to_owned(), 2)));
        assert!(counts.contains(&("v1".to_owned(), OTHER.to_owned(), 800)));
    }

    #[test]
    fn a_link_cannot_add_other_parameters() {
        for link in ["https://a>; rel=\"x", "https://a b", "https://a\r\nx: y", ""] {
            let result = Deprecation::new(&settings(None, Some(link))).map(|_| ());
            assert_eq!(result.is_err(), !link.is_empty(), "{link:?}");
        }
    }
}
