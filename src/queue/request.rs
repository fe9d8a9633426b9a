//! The head of a stored request, and its form on disk: the direction, then the head as HTTP/1 writes it.

use aws_lc_rs::digest::{Context, SHA256};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};

/// Fields of a stored request: more than a request can have that the proxy accepts, with those it adds.
const MAX_FIELDS: usize = 128;

/// Which way the request went when it was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Inbound,
    Outbound,
}

/// A request without its body.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredRequest {
    pub direction: Direction,
    pub method: Method,
    /// With scheme and authority.
    pub uri: Uri,
    pub headers: HeaderMap,
}

/// Stored bytes that are not a request.
#[derive(Debug, thiserror::Error)]
#[error("the stored head cannot be read: {0}")]
pub struct UnreadableRequest(String);

impl Direction {
    pub const fn word(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

impl StoredRequest {
    pub fn encode(&self) -> Vec<u8> {
        let start = format!("{}\r\n{} {} HTTP/1.1\r\n", self.direction.word(), self.method, self.uri);
        let mut bytes = start.into_bytes();
        for (name, value) in &self.headers {
            bytes.extend_from_slice(name.as_str().as_bytes());
            bytes.extend_from_slice(b": ");
            bytes.extend_from_slice(value.as_bytes());
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"\r\n");
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, UnreadableRequest> {
        let unreadable = |what: &dyn ToString| UnreadableRequest(what.to_string());
        let (direction, head) = [Direction::Inbound, Direction::Outbound]
            .into_iter()
            .find_map(|direction| {
                let rest = bytes.strip_prefix(direction.word().as_bytes())?;
                Some((direction, rest.strip_prefix(b"\r\n")?))
            })
            .ok_or_else(|| unreadable(&"no direction"))?;
        let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
        let mut parsed = httparse::Request::new(&mut fields);
        let status = parsed.parse(head).map_err(|error| unreadable(&error))?;
        let (httparse::Status::Complete(_), Some(method), Some(target)) =
            (status, parsed.method, parsed.path)
        else {
            return Err(unreadable(&"it is cut off"));
        };
        let mut headers = HeaderMap::with_capacity(parsed.headers.len());
        for field in parsed.headers.iter() {
            let name = HeaderName::try_from(field.name).map_err(|error| unreadable(&error))?;
            let value = HeaderValue::from_bytes(field.value).map_err(|error| unreadable(&error))?;
            headers.append(name, value);
        }
        Ok(Self {
            direction,
            method: method.parse().map_err(|error| unreadable(&error))?,
            uri: target.parse().map_err(|error| unreadable(&error))?,
            headers,
        })
    }

    /// The fingerprint of method, target and body: a repeated `Idempotency-Key` must come with the same.
    pub fn fingerprint(&self, body: &[u8]) -> [u8; 32] {
        let mut context = Context::new(&SHA256);
        context.update(format!("{} {}\n", self.method, self.uri).as_bytes());
        context.update(body);
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(context.finish().as_ref());
        fingerprint
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> StoredRequest {
        let mut headers = HeaderMap::new();
        headers.append("x-a", HeaderValue::from_static("1"));
        headers.append("x-a", HeaderValue::from_bytes(b"\xff 2").unwrap());
        headers.append("content-type", HeaderValue::from_static(""));
        let uri = Uri::from_static("http://payments:8080/v1/charge?a=%20");
        StoredRequest { direction: Direction::Inbound, method: Method::POST, uri, headers }
    }

    #[test]
    fn decodes_what_it_encodes() {
        let decoded = StoredRequest::decode(&request().encode()).unwrap();
        assert_eq!(decoded, request());
    }

    #[test]
    fn other_bytes_are_an_error() {
        let encoded = request().encode();
        for length in 0..encoded.len() {
            assert!(StoredRequest::decode(&encoded[..length]).is_err(), "{length}");
        }
        assert!(StoredRequest::decode(b"sideways\r\nGET http://a/ HTTP/1.1\r\n\r\n").is_err());
    }

    #[test]
    fn the_fingerprint_covers_method_target_and_body() {
        let same = request().fingerprint(b"a");
        let mut other = request();
        other.headers.clear();
        assert_eq!(other.fingerprint(b"a"), same);
        assert_ne!(other.fingerprint(b"b"), same);
        other.uri = Uri::from_static("http://payments/");
        assert_ne!(other.fingerprint(b"a"), same);
    }
}
