//! The request that `explain` is about.

use crate::identity::{InvalidId, Peer};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, uri::PathAndQuery};

/// RFC 9110 §9.3 and RFC 5789.
const STANDARD_METHODS: [&str; 9] =
    ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

/// The parts of a request that routing uses.
#[derive(Debug)]
pub struct ExplainedRequest {
    pub method: Method,
    /// As given on the command line.
    pub url: String,
    pub host: String,
    pub port: Option<u16>,
    pub path: PathAndQuery,
    pub headers: HeaderMap,
    pub inbound: bool,
    /// TLS by the service itself (`https://`, CONNECT to 443): a byte stream for the proxy.
    pub opaque: bool,
    /// The client's identity, where given.
    pub peer: Option<Peer>,
}

impl ExplainedRequest {
    pub fn parse(method: &str, url: &str, headers: &[String], inbound: bool) -> Result<Self, String> {
        let method: Method = method.parse().map_err(|_| format!("`{method}` is not a method"))?;
        // Methods are case-sensitive (RFC 9110 §9.1): `get` matches no route.
        let upper = method.as_str().to_ascii_uppercase();
        if upper != method.as_str() && STANDARD_METHODS.contains(&&*upper) {
            return Err(format!("`{method}` is not `{upper}`: methods are written in capitals"));
        }
        let wrong = || {
            format!("`{url}` is not a URL: write e.g. http://payments/v1/charge, or HOST:PORT with CONNECT")
        };
        let connect = method == Method::CONNECT;
        let whole = if url.starts_with('/') {
            format!("http://localhost{url}")
        } else if url.contains("://") {
            url.to_owned()
        } else {
            format!("http://{url}")
        };
        let uri: Uri = whole.parse().map_err(|_| wrong())?;
        let https = uri.scheme_str() == Some("https");
        if !https && uri.scheme_str() != Some("http") {
            return Err(wrong());
        }
        if url.starts_with('/') && !inbound {
            return Err(format!("`{url}` names no host: write http://HOST{url}"));
        }
        let authority = uri.authority().ok_or_else(wrong)?;
        let port = authority.port_u16().or(Some(if https { 443 } else { 80 }).filter(|_| !connect));
        if connect && port.is_none() {
            return Err("CONNECT needs HOST:PORT".to_owned());
        }
        Ok(Self {
            opaque: !inbound && (https || connect && port == Some(443)),
            host: authority.host().to_owned(),
            port,
            path: uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/")),
            headers: headers.iter().map(|text| header(text)).collect::<Result<_, _>>()?,
            method,
            url: url.to_owned(),
            inbound,
            peer: None,
        })
    }

    /// Adds a client by its SPIFFE ID, or `dns:NAME`.
    pub fn with_peer(mut self, peer: Option<&str>) -> Result<Self, String> {
        let Some(text) = peer else { return Ok(self) };
        let wrong = |why: InvalidId| format!("`{text}` is not a SPIFFE ID: {why}");
        self.peer = Some(match text.strip_prefix("dns:") {
            Some(name) => Peer::with_names(None, &[name]),
            None => Peer::with_names(Some(text.parse().map_err(wrong)?), &[]),
        });
        Ok(self)
    }

    pub fn is_grpc(&self) -> bool {
        let content_type = self.headers.get(http::header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        content_type.is_some_and(|value| value.starts_with("application/grpc"))
    }

    /// By its method (RFC 9110 §9.2.2), or by an `Idempotency-Key`.
    pub fn is_idempotent(&self) -> bool {
        self.method.is_idempotent() || self.headers.contains_key("idempotency-key")
    }
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let wrong = || format!("`{text}` is not a header: write 'name: value'");
    let (name, value) = text.split_once(':').ok_or_else(wrong)?;
    Ok((name.trim().parse().map_err(|_| wrong())?, value.trim().parse().map_err(|_| wrong())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_case_sensitive() {
        let parse =
            |method| ExplainedRequest::parse(method, "http://up/", &[], false).map(|target| target.method);
        assert_eq!(parse("GET"), Ok(Method::GET));
        assert_eq!(parse("get"), Err("`get` is not `GET`: methods are written in capitals".to_owned()));
        assert!(parse("purge").is_ok(), "an extension method");
        assert!(parse("a b").is_err());
    }
}
