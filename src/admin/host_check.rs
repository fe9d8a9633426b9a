//! The check of `Host` that protects the admin server from web pages.

use http::{HeaderMap, Uri, header::HOST};

/// Whether the request's host is `localhost` or a literal address.
///
/// A web page can let the browser resolve the page's own name to 127.0.0.1 and then read the responses (DNS rebinding).
/// `Host` contains that name, so other names are rejected. Listen addresses are always one of the accepted forms.
pub fn host_is_local(uri: &Uri, headers: &HeaderMap) -> bool {
    let mut fields = headers.get_all(HOST).iter();
    let host = fields.next();
    if fields.next().is_some() {
        return false;
    }
    let in_field = match host {
        Some(host) => host.to_str().is_ok_and(is_local),
        // HTTP/1.0 has no Host, and browsers do not use it.
        None => true,
    };
    in_field && uri.authority().is_none_or(|authority| is_local(authority.as_str()))
}

fn is_local(authority: &str) -> bool {
    let Ok(authority) = authority.parse::<http::uri::Authority>() else { return false };
    let host = authority.host();
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || address.parse::<std::net::IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(uri: &'static str, hosts: &[&'static str]) -> bool {
        let mut headers = HeaderMap::new();
        for host in hosts {
            headers.append(HOST, http::HeaderValue::from_static(host));
        }
        host_is_local(&Uri::from_static(uri), &headers)
    }

    #[test]
    fn only_names_safe_from_dns_rebinding_are_accepted() {
        for good in
            ["localhost", "localhost:4191", "LOCALHOST", "127.0.0.1:4191", "[::1]:4191", "10.1.2.3:4191"]
        {
            assert!(local("/", &[good]), "{good}");
        }
        for bad in [
            "evil.example",
            "evil.example:4191",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "",
            "a b",
        ] {
            assert!(!local("/", &[bad]), "{bad}");
        }
        assert!(!local("/", &["localhost", "evil.example"]));
        assert!(!local("http://evil.example/", &["localhost"]));
        assert!(local("/", &[]), "HTTP/1.0");
    }
}
