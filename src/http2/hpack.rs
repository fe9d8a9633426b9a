//! Checks header blocks before `h2` decodes them.
//!
//! To `h2` a field with a byte that is not allowed is an error of the whole connection: it stops in the middle of the block, and
//! the state of the compression is lost. RFC 9113 §8.1.1 makes it an error of the stream. So a block that has such a field is
//! written anew: a harmless field of the same size takes its place, which keeps both tables the same, and one that HTTP/2 does
//! not allow is added, by which `h2` resets the stream. Only sizes and kinds of fields are kept here, no text.

use std::collections::VecDeque;

use http::{Method, StatusCode};

use super::{huffman, octets};

/// SETTINGS_HEADER_TABLE_SIZE, which is not changed.
const TABLE_SIZE: usize = 4096;
/// What an entry costs beside its text (RFC 7541 §4.1).
const OVERHEAD: usize = 32;
/// A field that makes a message malformed: `connection: x`, a literal that is not put into the table.
const MARK: &[u8] = b"\x00\x0aconnection\x01x";

/// A block with the field that makes its message malformed.
pub fn marked(mut block: Vec<u8>) -> Vec<u8> {
    block.extend_from_slice(MARK);
    block
}

/// RFC 7541 appendix A.
const STATIC_NAMES: [&str; 61] = [
    ":authority",
    ":method",
    ":method",
    ":path",
    ":path",
    ":scheme",
    ":scheme",
    ":status",
    ":status",
    ":status",
    ":status",
    ":status",
    ":status",
    ":status",
    "accept-charset",
    "accept-encoding",
    "accept-language",
    "accept-ranges",
    "accept",
    "access-control-allow-origin",
    "age",
    "allow",
    "authorization",
    "cache-control",
    "content-disposition",
    "content-encoding",
    "content-language",
    "content-length",
    "content-location",
    "content-range",
    "content-type",
    "cookie",
    "date",
    "etag",
    "expect",
    "expires",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "last-modified",
    "link",
    "location",
    "max-forwards",
    "proxy-authenticate",
    "proxy-authorization",
    "range",
    "referer",
    "refresh",
    "retry-after",
    "server",
    "set-cookie",
    "strict-transport-security",
    "transfer-encoding",
    "user-agent",
    "vary",
    "via",
    "www-authenticate",
];

/// What a block is.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// `h2` can decode it.
    Decodable,
    /// Its message is malformed; to be decoded in its place.
    Malformed(Vec<u8>),
    /// Not HPACK: the connection cannot go on.
    Broken,
}

/// Follows the table of one direction of a connection.
#[derive(Debug)]
pub struct BlockChecker {
    entries: VecDeque<Entry>,
    size: usize,
    most: usize,
    text: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    Method,
    Status,
    /// Pseudo-header fields that are any UTF-8 to `h2`.
    Text,
    Field,
    Wrong,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    name: Name,
    name_length: usize,
    value_length: usize,
    /// `h2` would not decode it.
    wrong: bool,
}

struct NotHpack;

impl Default for BlockChecker {
    fn default() -> Self {
        Self { entries: VecDeque::new(), size: 0, most: TABLE_SIZE, text: Vec::new() }
    }
}

impl Name {
    fn of(name: &[u8]) -> Self {
        match name {
            b":method" => Self::Method,
            b":status" => Self::Status,
            b":authority" | b":scheme" | b":path" | b":protocol" => Self::Text,
            [] | [b':', ..] => Self::Wrong,
            _ if octets::is_field_name(name) => Self::Field,
            _ => Self::Wrong,
        }
    }

    const fn is_pseudo(self) -> bool {
        matches!(self, Self::Method | Self::Status | Self::Text)
    }

    fn takes(self, value: &[u8]) -> bool {
        match self {
            Self::Method => Method::from_bytes(value).is_ok(),
            Self::Status => StatusCode::from_bytes(value).is_ok(),
            Self::Text => std::str::from_utf8(value).is_ok(),
            Self::Field => octets::is_field_value(value),
            Self::Wrong => false,
        }
    }
}

impl BlockChecker {
    /// Checks a whole block. `trailers`: it must have no pseudo-header fields (RFC 9113 §8.1), which `h2` passes over.
    pub fn check(&mut self, block: &[u8], trailers: bool) -> Verdict {
        self.read(block, trailers).unwrap_or(Verdict::Broken)
    }

    fn read(&mut self, block: &[u8], trailers: bool) -> Result<Verdict, NotHpack> {
        let (mut rest, mut malformed) = (block, false);
        // What was written anew, and up to where.
        let mut anew: Option<Vec<u8>> = None;
        while let [first, ..] = rest {
            let (first, before) = (*first, rest);
            // How long the representation of the name is, where the field goes into the table.
            let mut added = None;
            let mut entry = if first & 0x80 != 0 {
                Some(self.entry(integer(&mut rest, 7)?)?)
            } else if first & 0x40 != 0 {
                let entry = self.literal(&mut rest, 6, &mut added)?;
                Some(entry)
            } else if first & 0x20 != 0 {
                let most = integer(&mut rest, 5)?;
                if most > TABLE_SIZE {
                    return Err(NotHpack);
                }
                self.most = most;
                self.evict(0);
                None
            } else {
                Some(self.literal(&mut rest, 4, &mut None)?)
            };
            let taken = &before[..before.len() - rest.len()];
            let wrong = entry.is_some_and(|entry| entry.wrong);
            malformed |= wrong || (trailers && entry.is_some_and(|entry| entry.name.is_pseudo()));
            if wrong && anew.is_none() {
                anew = Some(block[..block.len() - before.len()].to_vec());
            }
            if let (Some(entry), Some(left)) = (&mut entry, added) {
                if let Some(anew) = anew.as_mut().filter(|_| wrong) {
                    entry.write_in_place(&before[..before.len() - left], anew)?;
                }
                self.add(*entry);
            }
            if let Some(anew) = anew.as_mut().filter(|_| !wrong) {
                anew.extend_from_slice(taken);
            }
        }
        Ok(match (malformed, anew) {
            (false, _) => Verdict::Decodable,
            (true, anew) => Verdict::Malformed(marked(anew.unwrap_or_else(|| block.to_vec()))),
        })
    }

    fn entry(&self, index: usize) -> Result<Entry, NotHpack> {
        let at = index.checked_sub(1).ok_or(NotHpack)?;
        match STATIC_NAMES.get(at) {
            Some(name) => Ok(Entry {
                name: Name::of(name.as_bytes()),
                name_length: name.len(),
                value_length: 0,
                wrong: false,
            }),
            None => self.entries.get(at - STATIC_NAMES.len()).copied().ok_or(NotHpack),
        }
    }

    /// `behind_name`: how many bytes there are behind the name.
    fn literal(
        &mut self,
        rest: &mut &[u8],
        prefix: u32,
        behind_name: &mut Option<usize>,
    ) -> Result<Entry, NotHpack> {
        let index = integer(rest, prefix)?;
        let (name, name_length) = if index == 0 {
            let name = string(rest, &mut self.text)?;
            (Name::of(name), name.len())
        } else {
            let entry = self.entry(index)?;
            (entry.name, entry.name_length)
        };
        *behind_name = Some(rest.len());
        let value = string(rest, &mut self.text)?;
        Ok(Entry { name, name_length, value_length: value.len(), wrong: !name.takes(value) })
    }

    fn add(&mut self, entry: Entry) {
        let size = entry.size();
        self.evict(size);
        if size <= self.most {
            self.size += size;
            self.entries.push_front(entry);
        }
    }

    /// Makes room for so many bytes.
    fn evict(&mut self, wanted: usize) {
        while self.size + wanted > self.most
            && let Some(oldest) = self.entries.pop_back()
        {
            self.size -= oldest.size();
        }
    }
}

impl Entry {
    const fn size(&self) -> usize {
        self.name_length + self.value_length + OVERHEAD
    }

    /// Writes a literal that takes as much of the table, and that `h2` decodes. `name` is the beginning of what it replaces:
    /// later fields may refer to the name, where that is well-formed.
    fn write_in_place(&mut self, name: &[u8], out: &mut Vec<u8>) -> Result<(), NotHpack> {
        if matches!(self.name, Name::Field | Name::Text)
            || (self.name == Name::Method && self.value_length > 0)
        {
            out.extend_from_slice(name);
            write_filler(self.value_length, out);
            return Ok(());
        }
        self.name = Name::Wrong;
        // A name has at least one byte.
        let name_length = self.name_length.max(1);
        let value_length = (self.name_length + self.value_length).checked_sub(name_length).ok_or(NotHpack)?;
        out.push(0x40);
        write_filler(name_length, out);
        write_filler(value_length, out);
        Ok(())
    }
}

fn write_filler(length: usize, out: &mut Vec<u8>) {
    write_length(length, out);
    out.resize(out.len() + length, b'x');
}

fn write_length(length: usize, out: &mut Vec<u8>) {
    if length < 127 {
        return out.push(length as u8);
    }
    out.push(127);
    let mut rest = length - 127;
    while rest >= 128 {
        out.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    out.push(rest as u8);
}

/// An integer (RFC 7541 §5.1) of up to five bytes, as `h2` takes it.
fn integer(rest: &mut &[u8], prefix: u32) -> Result<usize, NotHpack> {
    let (first, mut after) = rest.split_first().ok_or(NotHpack)?;
    let most = (1_usize << prefix) - 1;
    let mut value = usize::from(*first) & most;
    if value == most {
        for shift in (0..28).step_by(7) {
            let (byte, behind) = after.split_first().ok_or(NotHpack)?;
            after = behind;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                *rest = after;
                return Ok(value);
            }
        }
        return Err(NotHpack);
    }
    *rest = after;
    Ok(value)
}

/// A string (RFC 7541 §5.2).
fn string<'b: 't, 't>(rest: &mut &'b [u8], text: &'t mut Vec<u8>) -> Result<&'t [u8], NotHpack> {
    let is_huffman = rest.first().ok_or(NotHpack)? & 0x80 != 0;
    let length = integer(rest, 7)?;
    let (raw, after) = rest.split_at_checked(length).ok_or(NotHpack)?;
    *rest = after;
    if !is_huffman {
        return Ok(raw);
    }
    text.clear();
    if huffman::decode(raw, text) { Ok(text) } else { Err(NotHpack) }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
    use proptest::prelude::*;
    use tokio::io::duplex;

    use super::{super::guard::Guarded, *};

    type Fields = Vec<(String, Vec<u8>)>;

    fn map(fields: &Fields) -> HeaderMap {
        let pair = |(name, value): &(String, Vec<u8>)| {
            Some((HeaderName::from_lowercase(name.as_bytes()).ok()?, HeaderValue::from_bytes(value).ok()?))
        };
        let mut map = HeaderMap::new();
        for (name, value) in fields.iter().filter_map(pair) {
            map.append(name, value);
        }
        map
    }

    fn a_request() -> impl Strategy<Value = Fields> {
        let name = prop_oneof!["x-[a-d]", "accept", "cookie", "user-agent", "x-[a-z]{1,60}"];
        let value = prop_oneof![
            "[ -~]{0,12}".prop_map(String::into_bytes),
            "v[0-3]".prop_map(String::into_bytes),
            prop::collection::vec(0x80_u8.., 0..20),
            "[a-z]{500,3000}".prop_map(String::into_bytes),
        ];
        prop::collection::vec((name, value), 0..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever a client's encoder puts into its table and takes out of it again, all arrives as it was sent.
        #[test]
        fn well_formed_requests_are_not_changed(requests in prop::collection::vec(a_request(), 1..25), piece in 20_usize..5000) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let expected: Vec<HeaderMap> = requests.iter().map(map).collect();
            let got = runtime.block_on(async {
                let (client, server) = duplex(piece);
                let (sender, connection) = h2::client::handshake(client).await.unwrap();
                let sends = async {
                    let mut sender = sender;
                    for fields in &expected {
                        let mut request = Request::builder().uri("http://a/").body(()).unwrap();
                        *request.headers_mut() = fields.clone();
                        sender = sender.ready().await.unwrap();
                        let (response, _) = sender.send_request(request, true).unwrap();
                        response.await.unwrap();
                    }
                };
                let serves = async {
                    let mut server = h2::server::handshake::<_>(Guarded::new(server)).await.unwrap();
                    let mut got = Vec::new();
                    while let Some(Ok((request, mut respond))) = server.accept().await {
                        got.push(request.headers().clone());
                        let _: h2::SendStream<Bytes> = respond.send_response(Response::new(()), true).unwrap();
                    }
                    got
                };
                let sends = async {
                    tokio::select! {
                        () = sends => {}
                        _ = connection => {}
                    }
                };
                tokio::join!(sends, serves).1
            });
            prop_assert_eq!(got, expected);
        }

        /// Nothing makes it panic, and what it writes anew is well-formed.
        #[test]
        fn any_bytes_are_checked(blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..20)) {
            let (mut checker, mut second) = (BlockChecker::default(), BlockChecker::default());
            for block in blocks {
                match checker.check(&block, false) {
                    Verdict::Decodable => prop_assert_eq!(second.check(&block, false), Verdict::Decodable),
                    Verdict::Malformed(anew) => prop_assert_eq!(second.check(&anew, false), Verdict::Decodable),
                    Verdict::Broken => return Ok(()),
                }
                prop_assert_eq!((checker.size, checker.entries.len()), (second.size, second.entries.len()));
            }
        }
    }
}
