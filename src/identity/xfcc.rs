//! `x-forwarded-client-cert`: passes the client's identity to the service. Envoy's format: one element with `By`,
//! `Hash`, `Subject`, `URI` and `DNS`, always of the verified peer.

use std::fmt::Write as _;

use http::HeaderValue;

use super::Peer;

/// The header value for a peer. `by`: the SPIFFE ID of this side, if it has one.
///
/// `Hash` is the SHA-256 of the peer's certificate in hexadecimal. `Subject` is always quoted, as in Envoy; other
/// values are quoted if they contain `,`, `;` or `=`. Values that are not allowed in a header field are omitted.
pub fn header_value(peer: &Peer, by: Option<&str>) -> Option<HeaderValue> {
    let mut text = String::with_capacity(256);
    if let Some(by) = by {
        push_pair(&mut text, "By", by, false);
    }
    let hash = peer.sha256.iter().fold(String::with_capacity(64), |mut hash, byte| {
        // Writing to a string does not fail.
        let _ = write!(hash, "{byte:02x}");
        hash
    });
    push_pair(&mut text, "Hash", &hash, false);
    // Parsers differ on a backslash before a quote. RFC 2253 has another escape for both.
    let subject = peer.subject.replace("\\\\", "\\5C").replace("\\\"", "\\22").replace('"', "\\22");
    push_pair(&mut text, "Subject", &subject, true);
    if let Some(id) = &peer.spiffe {
        push_pair(&mut text, "URI", id.as_str(), false);
    }
    for name in &peer.dns {
        push_pair(&mut text, "DNS", name, false);
    }
    HeaderValue::from_bytes(text.as_bytes()).ok()
}

/// The names of the peer in a value that [`header_value`] made.
pub fn read_names(value: &HeaderValue) -> Peer {
    let (mut spiffe, mut dns) = (None, Vec::new());
    let text = value.to_str().unwrap_or_default();
    let mut rest = text;
    while !rest.is_empty() {
        let mut quoted = false;
        let end = rest.find(|c| {
            quoted ^= c == '"';
            c == ';' && !quoted
        });
        let (pair, after) = rest.split_at(end.unwrap_or(rest.len()));
        match pair.split_once('=') {
            Some(("URI", id)) => spiffe = id.trim_matches('"').parse().ok(),
            Some(("DNS", name)) => dns.push(name.trim_matches('"')),
            _ => {}
        }
        rest = after.get(1..).unwrap_or_default();
    }
    Peer::with_names(spiffe, &dns)
}

fn push_pair(text: &mut String, key: &str, value: &str, quoted: bool) {
    let ends_with_backslash = value.ends_with('\\');
    if value.contains('"') || ends_with_backslash || value.chars().any(char::is_control) {
        return;
    }
    if !text.is_empty() {
        text.push(';');
    }
    let quote = if quoted || value.is_empty() || value.contains([',', ';', '=']) { "\"" } else { "" };
    for part in [key, "=", quote, value, quote] {
        text.push_str(part);
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn peer() -> Peer {
        Peer {
            spiffe: Some("spiffe://shop.example/ns/shop/sa/cart".parse().unwrap()),
            dns: vec!["cart".into(), "cart.shop.svc".into()],
            subject: "CN=cart,O=Shop".into(),
            sha256: [0xab; 32],
            not_after: SystemTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn the_format_is_envoys() {
        let hash = "ab".repeat(32);
        assert_eq!(
            header_value(&peer(), Some("spiffe://shop.example/ns/shop/sa/orders")).unwrap(),
            format!(
                "By=spiffe://shop.example/ns/shop/sa/orders;Hash={hash};Subject=\"CN=cart,O=Shop\";\
                 URI=spiffe://shop.example/ns/shop/sa/cart;DNS=cart;DNS=cart.shop.svc"
            )
        );
        let nameless = Peer { spiffe: None, dns: Vec::new(), subject: "".into(), ..peer() };
        assert_eq!(header_value(&nameless, None).unwrap(), format!("Hash={hash};Subject=\"\""));
    }

    #[test]
    fn the_names_are_read_back() {
        let odd = Peer { subject: "CN=\";URI=spiffe://shop.example/root;DNS=b".into(), ..peer() };
        let other = Peer { spiffe: None, dns: vec!["a,b".into()], ..peer() };
        for peer in [peer(), odd, other] {
            let read = read_names(&header_value(&peer, Some("spiffe://shop.example/by")).unwrap());
            assert_eq!((read.spiffe, read.dns), (peer.spiffe, peer.dns));
        }
    }

    /// The subject is chosen by the certificate's owner: it must not inject other pairs.
    #[test]
    fn a_subject_cannot_inject_pairs() {
        // In RFC 2253 form, and malformed.
        for (subject, expected) in [
            (
                r#"CN=x\";URI=spiffe://shop.example/root;By=\""#,
                r"CN=x\22;URI=spiffe://shop.example/root;By=\22",
            ),
            (r#"CN=x";URI=b,Hash=c"#, r"CN=x\22;URI=b,Hash=c"),
            (r#"CN=\\\";URI=b"#, r"CN=\5C\22;URI=b"),
            (r"CN=\\", r"CN=\5C"),
            (r"O=Shop\, Inc.", r"O=Shop\, Inc."),
        ] {
            let text = header_value(&Peer { subject: subject.into(), ..peer() }, None).unwrap();
            let text = text.to_str().unwrap();
            for escapes in [true, false] {
                let read = read(text, escapes);
                let keys: Vec<&str> = read.iter().map(|(key, _)| key.as_str()).collect();
                assert_eq!(keys, ["Hash", "Subject", "URI", "DNS", "DNS"], "{text}");
            }
            assert_eq!(read(text, false)[1].1, expected);
        }
        let odd = Peer {
            subject: "CN=a\r\nb".into(),
            dns: vec!["a,b".into(), "a\"".into(), "a\\".into()],
            ..peer()
        };
        let text = header_value(&odd, None).unwrap();
        let text = text.to_str().unwrap();
        assert!(!text.contains("Subject") && text.ends_with(";DNS=\"a,b\""), "{text}");
    }

    /// A parser by Envoy's rules: `;` between pairs, `"` around values. `escapes`: it treats `\` as an escape.
    fn read(text: &str, escapes: bool) -> Vec<(String, String)> {
        let (mut pairs, mut part, mut quoted, mut escaped) = (Vec::new(), String::new(), false, false);
        for c in text.chars().chain([';']) {
            match c {
                _ if escaped => {
                    part.push(c);
                    escaped = false;
                }
                '\\' if quoted && escapes => escaped = true,
                '"' => quoted = !quoted,
                ';' if !quoted => {
                    let (key, value) = part.split_once('=').unwrap();
                    pairs.push((key.to_owned(), value.to_owned()));
                    part.clear();
                }
                c => part.push(c),
            }
        }
        assert!(!quoted && part.is_empty(), "{text}");
        pairs
    }
}
