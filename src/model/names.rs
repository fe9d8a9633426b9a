//! The names under which this process passes messages on.

use http::{HeaderMap, HeaderValue, Version, header::VIA};

use super::Side;

/// The names of this process in `Proxy-Status` and `Via`.
#[derive(Debug)]
pub struct ProxyNames {
    /// The name in `Proxy-Status`.
    pub deployment: String,
    /// One for each direction, so that a service which forwards `Via` does not look like a loop.
    inbound: Via,
    outbound: Via,
}

impl ProxyNames {
    pub(super) fn new(service: &str, instance: &str) -> Self {
        let deployment = deployment(service);
        let name = deployment.replace('/', "-");
        Self {
            inbound: Via::new(format!("{name}-{instance}-in")),
            outbound: Via::new(format!("{name}-{instance}-out")),
            deployment,
        }
    }

    pub fn via(&self, side: &Side) -> &Via {
        match side {
            Side::Inbound => &self.inbound,
            Side::Outbound | Side::Upstream(_) => &self.outbound,
        }
    }
}

/// The `Via` members for each HTTP version, made once.
#[derive(Debug)]
pub struct Via {
    pub pseudonym: String,
    http10: HeaderValue,
    http11: HeaderValue,
    http2: HeaderValue,
}

impl Via {
    /// `pseudonym`: a token, unique for each instance and direction.
    pub fn new(pseudonym: String) -> Self {
        let value = |version: &str| {
            HeaderValue::try_from(format!("{version} {pseudonym}"))
                .unwrap_or(HeaderValue::from_static("1.1 outrigger"))
        };
        Self { http10: value("1.0"), http11: value("1.1"), http2: value("2"), pseudonym }
    }

    pub fn append(&self, headers: &mut HeaderMap, version: Version) {
        let member = match version {
            Version::HTTP_10 => &self.http10,
            Version::HTTP_2 => &self.http2,
            _ => &self.http11,
        };
        headers.append(VIA, member.clone());
    }
}

/// A deployment's name as an RFC 8941 token: `outrigger/SERVICE`.
pub fn deployment(service: &str) -> String {
    let token = |c: char| if c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~:/".contains(c) { c } else { '-' };
    format!("outrigger/{}", service.chars().map(token).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_name_becomes_a_token() {
        assert_eq!(deployment("check out/ä"), "outrigger/check-out/-");
    }
}
