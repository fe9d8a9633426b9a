//! The collector: its URL, protocol and credentials.

use std::fmt;

use http::{HeaderValue, Uri};

use crate::{
    config::{OtlpProtocol, Telemetry},
    redact,
};

const HTTP_PORT: u16 = 4318;
/// The OTLP path of traces, added where the URL has no path.
const TRACES: &str = "/v1/traces";

/// The collector that spans are exported to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collector {
    /// The URL, without userinfo.
    pub url: String,
    pub protocol: OtlpProtocol,
    /// The URL's userinfo as the value of an `Authorization` field.
    pub credentials: Option<HeaderValue>,
}

impl Collector {
    /// The configured collector; none where export is off.
    pub fn from_config(telemetry: &Telemetry) -> Option<Self> {
        let url = telemetry.otlp.as_ref()?.expose().trim_end_matches('/');
        let uri: Uri = url.parse().ok()?;
        let userinfo = uri.authority().and_then(|authority| authority.as_str().rsplit_once('@'));
        let url = match userinfo {
            Some((userinfo, _)) => url.replacen(&format!("{userinfo}@"), "", 1),
            None => url.to_owned(),
        };
        let by_port = if uri.port_u16() == Some(HTTP_PORT) { OtlpProtocol::Http } else { OtlpProtocol::Grpc };
        let protocol = telemetry.protocol.unwrap_or(by_port);
        let bare = matches!(uri.path(), "" | "/");
        let url = if protocol == OtlpProtocol::Http && bare { format!("{url}{TRACES}") } else { url };
        let credentials = uri.authority().and_then(redact::basic_credentials);
        Some(Self { url, protocol, credentials })
    }

    pub fn is_secure(&self) -> bool {
        self.url.starts_with("https://")
    }
}

impl fmt::Display for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            OtlpProtocol::Grpc => "gRPC",
            OtlpProtocol::Http => "HTTP",
        };
        write!(f, "{} (OTLP over {protocol})", redact::url(&self.url))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redact::Secret;

    #[test]
    fn userinfo_becomes_a_header_field_and_is_not_shown() {
        let otlp = Some(Secret::redact_url("http://user:pw@c:4318"));
        let to = Collector::from_config(&Telemetry { otlp, ..Telemetry::default() }).unwrap();
        assert_eq!(to.url, "http://c:4318/v1/traces");
        assert_eq!(to.credentials.as_ref().unwrap(), "Basic dXNlcjpwdw==");
        assert!(!format!("{to} {to:?}").contains("pw"), "{to:?}");
    }

    #[test]
    fn the_port_decides_the_protocol_and_a_bare_address_gets_the_path() {
        let of = |otlp: &str, protocol| {
            let telemetry =
                Telemetry { otlp: Some(Secret::redact_url(otlp)), protocol, ..Telemetry::default() };
            Collector::from_config(&telemetry).map(|to| (to.url, to.protocol))
        };
        let (grpc, http) = (OtlpProtocol::Grpc, OtlpProtocol::Http);
        for (otlp, protocol, expected) in [
            ("http://c:4317", None, ("http://c:4317", grpc)),
            ("http://c:4318", None, ("http://c:4318/v1/traces", http)),
            ("http://c:4318/", None, ("http://c:4318/v1/traces", http)),
            ("http://c:4318/otlp/v1/traces", None, ("http://c:4318/otlp/v1/traces", http)),
            ("https://c", Some(http), ("https://c/v1/traces", http)),
            ("http://c:4318", Some(grpc), ("http://c:4318", grpc)),
        ] {
            assert_eq!(of(otlp, protocol), Some((expected.0.to_owned(), expected.1)), "{otlp}");
        }
        assert_eq!(Collector::from_config(&Telemetry::default()), None);
    }
}
