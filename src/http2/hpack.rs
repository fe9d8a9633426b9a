//! Checks header blocks before `h2` decodes them.
//!
//! For `h2`, a field with a forbidden byte is an error of the whole connection: it stops in the middle of the block
//! and loses the compression state. RFC 9113 §8.1.1 makes it an error of the stream. So a block with such a field is
//! rewritten: a harmless field of the same size replaces it, which keeps both tables equal, and a field that HTTP/2
//! forbids is added, because of which `h2` resets the stream. A `:path` that every server accepts, though no URI may
//! have it, is replaced by a placeholder and passed on separately. Of other fields only sizes and kinds are stored,
//! no text.

mod field;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, rc::Rc};

use http::Method;

pub use self::field::FieldFault;
use self::field::{MessageState, NameKind, TableEntry, write_placeholder_path};
use super::huffman;
use crate::http1::target::{RejectedRequestLine, loggable_target};

/// SETTINGS_HEADER_TABLE_SIZE, which keeps its default.
const TABLE_SIZE: usize = 4096;
/// A field that makes a message malformed: `connection: x`, a literal without indexing.
const MALFORMED_FIELD: &[u8] = b"\x00\x0aconnection\x01x";

/// A block with the field that makes its message malformed.
fn mark_malformed(mut block: Vec<u8>) -> Vec<u8> {
    block.extend_from_slice(MALFORMED_FIELD);
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

/// The message that a block belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockKind {
    Request,
    /// They must have no pseudo-header fields (RFC 9113 §8.1), which `h2` ignores.
    RequestTrailers,
    /// Head or trailers. Only fields that `h2` cannot decode are looked for: it checks the rest itself.
    Response,
}

/// The result of a check.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct CheckedBlock {
    /// What `h2` is to decode instead.
    pub replacement: Option<Vec<u8>>,
    /// Why the message is malformed.
    pub fault: Option<FieldFault>,
    /// The original `:path`, if `h2` cannot hold it: it decodes a placeholder of the same length.
    pub path: Option<Rc<[u8]>>,
}

/// Checks the blocks of one direction of a connection, and tracks its dynamic table.
#[derive(Debug)]
pub struct BlockChecker {
    entries: VecDeque<TableEntry>,
    size: usize,
    max_size: usize,
    text: Vec<u8>,
}

struct NotHpack;

impl Default for BlockChecker {
    fn default() -> Self {
        Self { entries: VecDeque::new(), size: 0, max_size: TABLE_SIZE, text: Vec::new() }
    }
}

impl CheckedBlock {
    /// Makes the message of `block` malformed, if it is not yet.
    pub fn fail(&mut self, fault: FieldFault, block: &[u8]) {
        if self.fault.is_none() {
            self.fault = Some(fault);
            self.replacement =
                Some(mark_malformed(self.replacement.take().unwrap_or_else(|| block.to_vec())));
        }
    }
}

impl BlockChecker {
    /// Checks a complete block; `None`: it is not HPACK, and the connection cannot continue.
    pub fn check(&mut self, block: &[u8], kind: BlockKind) -> Option<CheckedBlock> {
        self.read(block, kind).ok()
    }

    fn read(&mut self, block: &[u8], kind: BlockKind) -> Result<CheckedBlock, NotHpack> {
        let (mut rest, mut message) = (block, MessageState::new(kind));
        // The rewritten block up to here, once a field has to be replaced.
        let mut rewritten: Option<Vec<u8>> = None;
        while let [first, ..] = rest {
            let (first, before) = (*first, rest);
            let mut after_name = None;
            let entry = if first & 0x80 != 0 {
                Some(self.entry(integer(&mut rest, 7)?)?)
            } else if first & 0x40 != 0 {
                Some(self.literal(&mut rest, 6, &mut after_name)?)
            } else if first & 0x20 != 0 {
                let max_size = integer(&mut rest, 5)?;
                if max_size > TABLE_SIZE {
                    return Err(NotHpack);
                }
                self.max_size = max_size;
                self.evict(0);
                None
            } else {
                Some(self.literal(&mut rest, 4, &mut after_name)?)
            };
            let consumed = &before[..before.len() - rest.len()];
            let Some(mut entry) = entry else {
                if let Some(rewritten) = &mut rewritten {
                    rewritten.extend_from_slice(consumed);
                }
                continue;
            };
            message.add(&entry);
            // The start of a literal, up to its value.
            let name = after_name.and_then(|left| before.get(..before.len() - left));
            let goes_into_table = first & 0xc0 == 0x40;
            let placeholder = entry.path.as_deref().zip(name);
            if (entry.is_undecodable || placeholder.is_some() || message.is_trailer_section_too_large())
                && rewritten.is_none()
            {
                rewritten = Some(block[..block.len() - before.len()].to_vec());
            }
            if let Some(rewritten) = &mut rewritten {
                match (placeholder, name) {
                    (Some((path, name)), _) => {
                        rewritten.extend_from_slice(name);
                        write_placeholder_path(path, rewritten);
                    }
                    (None, Some(name)) if entry.is_undecodable && goes_into_table => {
                        entry.write_replacement(name, rewritten).ok_or(NotHpack)?;
                    }
                    // Drop bad fields, and of trailers that are too large all fields that the table does not need.
                    _ if entry.is_undecodable
                        || (message.is_trailer_section_too_large() && !goes_into_table) => {}
                    _ => rewritten.extend_from_slice(consumed),
                }
            }
            if goes_into_table {
                self.add(entry);
            }
        }
        let mut checked = CheckedBlock { replacement: rewritten, fault: None, path: message.path };
        if let Some(fault) = message.fault {
            checked.fail(fault, block);
        }
        Ok(checked)
    }

    /// Method and path of a request, if its block has them as literals or from the static table.
    pub fn request_line(&mut self, block: &[u8]) -> RejectedRequestLine {
        let mut line = RejectedRequestLine::default();
        let mut rest = block;
        while let [first, ..] = rest {
            let first = *first;
            let field = if first & 0xe0 == 0x20 {
                integer(&mut rest, 5).map(|_| None)
            } else if first & 0x80 != 0 {
                integer(&mut rest, 7).map(static_field)
            } else {
                self.literal_field(&mut rest, if first & 0x40 != 0 { 6 } else { 4 })
            };
            match field {
                Ok(Some((NameKind::Method, method))) => line.method = Method::from_bytes(&method).ok(),
                Ok(Some((NameKind::Path, path))) => line.target = Some(loggable_target(&path)),
                Ok(_) => {}
                Err(NotHpack) => break,
            }
        }
        line
    }

    /// A literal. `None` if its name is from the dynamic table.
    fn literal_field(
        &mut self,
        rest: &mut &[u8],
        prefix: u32,
    ) -> Result<Option<(NameKind, Vec<u8>)>, NotHpack> {
        let name = match integer(rest, prefix)? {
            0 => Some(NameKind::of(string(rest, &mut self.text)?)),
            index => STATIC_NAMES.get(index - 1).map(|name| NameKind::of(name.as_bytes())),
        };
        let value = string(rest, &mut self.text)?.to_vec();
        Ok(name.map(|name| (name, value)))
    }

    fn entry(&self, index: usize) -> Result<TableEntry, NotHpack> {
        let at = index.checked_sub(1).ok_or(NotHpack)?;
        match STATIC_NAMES.get(at) {
            Some(name) => Ok(TableEntry {
                name: NameKind::of(name.as_bytes()),
                name_length: name.len(),
                value_length: static_value(index).len(),
                fault: (STATIC_NAMES[at] == "transfer-encoding").then_some(FieldFault::ConnectionField),
                is_undecodable: false,
                path: None,
            }),
            None => self.entries.get(at - STATIC_NAMES.len()).cloned().ok_or(NotHpack),
        }
    }

    /// `after_name`: set to how many bytes follow the name.
    fn literal(
        &mut self,
        rest: &mut &[u8],
        prefix: u32,
        after_name: &mut Option<usize>,
    ) -> Result<TableEntry, NotHpack> {
        let index = integer(rest, prefix)?;
        let (name, name_length) = if index == 0 {
            let name = string(rest, &mut self.text)?;
            (NameKind::of(name), name.len())
        } else {
            let entry = self.entry(index)?;
            (entry.name, entry.name_length)
        };
        *after_name = Some(rest.len());
        let value = string(rest, &mut self.text)?;
        Ok(TableEntry::new(name, name_length, value))
    }

    fn add(&mut self, entry: TableEntry) {
        let size = entry.size();
        self.evict(size);
        if size <= self.max_size {
            self.size += size;
            self.entries.push_front(entry);
        }
    }

    /// Evicts entries until `wanted` bytes fit.
    fn evict(&mut self, wanted: usize) {
        while self.size + wanted > self.max_size
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

fn static_field(index: usize) -> Option<(NameKind, Vec<u8>)> {
    let name = STATIC_NAMES.get(index.checked_sub(1)?)?;
    Some((NameKind::of(name.as_bytes()), static_value(index).as_bytes().to_vec()))
}

/// An integer (RFC 7541 §5.1) of up to five bytes, as `h2` accepts it.
fn integer(rest: &mut &[u8], prefix: u32) -> Result<usize, NotHpack> {
    let (first, mut after) = rest.split_first().ok_or(NotHpack)?;
    let max_prefix = (1_usize << prefix) - 1;
    let mut value = usize::from(*first) & max_prefix;
    if value == max_prefix {
        for shift in (0..28).step_by(7) {
            let (byte, next) = after.split_first().ok_or(NotHpack)?;
            after = next;
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
