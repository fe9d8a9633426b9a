//! Checks header blocks before `h2` decodes them.
//!
//! To `h2` a field with a byte that is not allowed is an error of the whole connection: it stops in the middle of the block, and
//! the state of the compression is lost. RFC 9113 §8.1.1 makes it an error of the stream. So a block that has such a field is
//! written anew: a harmless field of the same size takes its place, which keeps both tables the same, and one that HTTP/2 does
//! not allow is added, by which `h2` resets the stream. A `:path` that every server takes, though no URI may have it, is replaced
//! by a stand-in and handed on beside `h2`. Only sizes and kinds of other fields are kept here, no text.

mod field;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, rc::Rc};

use http::Method;

pub use self::field::FieldFault;
use self::field::{Entry, Message, Name, write_stand_in};
use super::huffman;
use crate::http1::target::{RefusedLine, shown};

/// SETTINGS_HEADER_TABLE_SIZE, which is not changed.
const TABLE_SIZE: usize = 4096;
/// A field that makes a message malformed: `connection: x`, a literal that is not put into the table.
const MARK: &[u8] = b"\x00\x0aconnection\x01x";

/// A block with the field that makes its message malformed.
fn marked(mut block: Vec<u8>) -> Vec<u8> {
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

/// Whose a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockKind {
    Request,
    /// They must have no pseudo-header fields (RFC 9113 §8.1), which `h2` passes over.
    RequestTrailers,
    /// Head or trailers. Only what `h2` cannot decode is looked for: it judges the rest itself.
    Response,
}

/// What a block is found to be.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct CheckedBlock {
    /// What `h2` is to decode in its place.
    pub replacement: Option<Vec<u8>>,
    /// Why the message is malformed.
    pub fault: Option<FieldFault>,
    /// The `:path` as it came, where `h2` cannot hold it: it decodes a stand-in of the same length.
    pub path: Option<Rc<[u8]>>,
}

/// Follows the table of one direction of a connection.
#[derive(Debug)]
pub struct BlockChecker {
    entries: VecDeque<Entry>,
    size: usize,
    most: usize,
    text: Vec<u8>,
}

struct NotHpack;

impl Default for BlockChecker {
    fn default() -> Self {
        Self { entries: VecDeque::new(), size: 0, most: TABLE_SIZE, text: Vec::new() }
    }
}

impl CheckedBlock {
    /// Makes the message of `block` malformed, if it is not yet.
    pub fn fail(&mut self, fault: FieldFault, block: &[u8]) {
        if self.fault.is_none() {
            self.fault = Some(fault);
            self.replacement = Some(marked(self.replacement.take().unwrap_or_else(|| block.to_vec())));
        }
    }
}

impl BlockChecker {
    /// Checks a whole block; `None`: it is not HPACK, and the connection cannot go on.
    pub fn check(&mut self, block: &[u8], kind: BlockKind) -> Option<CheckedBlock> {
        self.read(block, kind).ok()
    }

    fn read(&mut self, block: &[u8], kind: BlockKind) -> Result<CheckedBlock, NotHpack> {
        let (mut rest, mut message) = (block, Message::new(kind));
        // What was written anew, and up to where.
        let mut anew: Option<Vec<u8>> = None;
        while let [first, ..] = rest {
            let (first, before) = (*first, rest);
            let mut behind_name = None;
            let entry = if first & 0x80 != 0 {
                Some(self.entry(integer(&mut rest, 7)?)?)
            } else if first & 0x40 != 0 {
                Some(self.literal(&mut rest, 6, &mut behind_name)?)
            } else if first & 0x20 != 0 {
                let most = integer(&mut rest, 5)?;
                if most > TABLE_SIZE {
                    return Err(NotHpack);
                }
                self.most = most;
                self.evict(0);
                None
            } else {
                Some(self.literal(&mut rest, 4, &mut behind_name)?)
            };
            let taken = &before[..before.len() - rest.len()];
            let Some(mut entry) = entry else {
                if let Some(anew) = &mut anew {
                    anew.extend_from_slice(taken);
                }
                continue;
            };
            message.add(&entry);
            // The beginning of a literal, up to its value.
            let name = behind_name.and_then(|left| before.get(..before.len() - left));
            let goes_into_table = first & 0xc0 == 0x40;
            let stand_in = entry.path.as_deref().zip(name);
            if (entry.undecodable || stand_in.is_some() || message.is_too_large()) && anew.is_none() {
                anew = Some(block[..block.len() - before.len()].to_vec());
            }
            if let Some(anew) = &mut anew {
                match (stand_in, name) {
                    (Some((path, name)), _) => {
                        anew.extend_from_slice(name);
                        write_stand_in(path, anew);
                    }
                    (None, Some(name)) if entry.undecodable && goes_into_table => {
                        entry.write_in_place(name, anew).ok_or(NotHpack)?;
                    }
                    // What is bad is left out, and of trailers that are too large what the table can do without.
                    _ if entry.undecodable || (message.is_too_large() && !goes_into_table) => {}
                    _ => anew.extend_from_slice(taken),
                }
            }
            if goes_into_table {
                self.add(entry);
            }
        }
        let mut checked = CheckedBlock { replacement: anew, fault: None, path: message.path };
        if let Some(fault) = message.fault {
            checked.fail(fault, block);
        }
        Ok(checked)
    }

    /// Method and path of a request, as far as its block has them in words and not by an index of the table.
    pub fn request_line(&mut self, block: &[u8]) -> RefusedLine {
        let mut line = RefusedLine::default();
        let mut rest = block;
        while let [first, ..] = rest {
            let first = *first;
            let field = if first & 0xe0 == 0x20 {
                integer(&mut rest, 5).map(|_| None)
            } else if first & 0x80 != 0 {
                integer(&mut rest, 7).map(static_field)
            } else {
                self.words(&mut rest, if first & 0x40 != 0 { 6 } else { 4 })
            };
            match field {
                Ok(Some((Name::Method, method))) => line.method = Method::from_bytes(&method).ok(),
                Ok(Some((Name::Path, path))) => line.target = Some(shown(&path)),
                Ok(_) => {}
                Err(NotHpack) => break,
            }
        }
        line
    }

    /// A literal whose name is no index of the table that changes.
    fn words(&mut self, rest: &mut &[u8], prefix: u32) -> Result<Option<(Name, Vec<u8>)>, NotHpack> {
        let name = match integer(rest, prefix)? {
            0 => Some(Name::of(string(rest, &mut self.text)?)),
            index => STATIC_NAMES.get(index - 1).map(|name| Name::of(name.as_bytes())),
        };
        let value = string(rest, &mut self.text)?.to_vec();
        Ok(name.map(|name| (name, value)))
    }

    fn entry(&self, index: usize) -> Result<Entry, NotHpack> {
        let at = index.checked_sub(1).ok_or(NotHpack)?;
        match STATIC_NAMES.get(at) {
            Some(name) => Ok(Entry {
                name: Name::of(name.as_bytes()),
                name_length: name.len(),
                value_length: static_value(index).len(),
                fault: (STATIC_NAMES[at] == "transfer-encoding").then_some(FieldFault::ConnectionField),
                undecodable: false,
                path: None,
            }),
            None => self.entries.get(at - STATIC_NAMES.len()).cloned().ok_or(NotHpack),
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
        Ok(Entry::new(name, name_length, value))
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

/// The value of an entry of RFC 7541 appendix A.
const fn static_value(index: usize) -> &'static str {
    match index {
        2 => "GET",
        3 => "POST",
        4 => "/",
        5 => "/index.html",
        6 => "http",
        7 => "https",
        8 => "200",
        9 => "204",
        10 => "206",
        11 => "304",
        12 => "400",
        13 => "404",
        14 => "500",
        16 => "gzip, deflate",
        _ => "",
    }
}

fn static_field(index: usize) -> Option<(Name, Vec<u8>)> {
    let name = STATIC_NAMES.get(index.checked_sub(1)?)?;
    Some((Name::of(name.as_bytes()), static_value(index).as_bytes().to_vec()))
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
