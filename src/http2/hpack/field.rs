//! Header fields, as far as the dynamic table and the rules of RFC 9113 §8.2 are concerned, and the messages that
//! contain them.

use std::rc::Rc;

use http::{Method, StatusCode};

use super::BlockKind;
use crate::{http1::framing::MAX_TRAILERS, http2::field_bytes};

/// The overhead of an entry beside its text (RFC 7541 §4.1).
const OVERHEAD: usize = 32;

/// Why a message is malformed (RFC 9113 §8.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FieldFault {
    #[error("a field name is not allowed in HTTP/2")]
    Name,
    #[error("a field value has a byte that is not allowed")]
    Value,
    #[error("it has a connection-specific field of HTTP/1.1")]
    ConnectionField,
    #[error("its TE field has another value than `trailers`")]
    Te,
    #[error("its Content-Length is not a number")]
    ContentLength,
    #[error("its target has a space or a control byte")]
    TargetByte,
    #[error("a pseudo-header field is unknown, repeated, or follows other fields")]
    PseudoHeader,
    #[error("its trailers have a pseudo-header field")]
    PseudoHeaderInTrailers,
    #[error("its trailers have more than {MAX_TRAILERS} bytes")]
    TrailersTooLarge,
    #[error("its stream depends on itself")]
    DependsOnItself,
}

/// The kinds of field names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NameKind {
    Method,
    Status,
    Path,
    /// The other pseudo-header fields.
    Authority,
    Scheme,
    Protocol,
    Field,
    /// Connection-specific fields of HTTP/1.1 (RFC 9113 §8.2.2).
    Connection,
    Te,
    ContentLength,
    UnknownPseudo,
    Invalid,
}

#[derive(Clone, Debug)]
pub(super) struct TableEntry {
    pub name: NameKind,
    pub name_length: usize,
    pub value_length: usize,
    pub fault: Option<FieldFault>,
    /// `h2` would fail to decode it, and end the connection.
    pub is_undecodable: bool,
    /// A `:path` that `h2` decodes but cannot hold.
    pub path: Option<Rc<[u8]>>,
}

/// The state of a message while its block is read.
pub(super) struct MessageState {
    kind: BlockKind,
    pub fault: Option<FieldFault>,
    /// Pseudo-header fields so far, as bits.
    pseudo: u16,
    has_fields: bool,
    /// As HTTP/2 counts it (RFC 9113 §6.5.2).
    size: usize,
    pub path: Option<Rc<[u8]>>,
}

impl NameKind {
    pub fn of(name: &[u8]) -> Self {
        match name {
            b":method" => Self::Method,
            b":status" => Self::Status,
            b":path" => Self::Path,
            b":authority" => Self::Authority,
            b":scheme" => Self::Scheme,
            b":protocol" => Self::Protocol,
            [b':', ..] => Self::UnknownPseudo,
            b"te" => Self::Te,
            b"content-length" => Self::ContentLength,
            b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding" | b"upgrade" => {
                Self::Connection
            }
            [] => Self::Invalid,
            _ if field_bytes::is_field_name(name) => Self::Field,
            _ => Self::Invalid,
        }
    }

    const fn is_pseudo(self) -> bool {
        matches!(
            self,
            Self::Method | Self::Status | Self::Path | Self::Authority | Self::Scheme | Self::Protocol
        )
    }

    /// Whether `h2` can decode a value.
    fn is_decodable(self, value: &[u8]) -> bool {
        match self {
            Self::Method => Method::from_bytes(value).is_ok(),
            Self::Status => StatusCode::from_bytes(value).is_ok(),
            Self::Path | Self::Authority | Self::Scheme | Self::Protocol => {
                value.is_ascii() || std::str::from_utf8(value).is_ok()
            }
            Self::Field | Self::Connection | Self::Te | Self::ContentLength => {
                field_bytes::is_field_value(value)
            }
            Self::UnknownPseudo | Self::Invalid => false,
        }
    }

    fn fault(self, value: &[u8], is_decodable: bool) -> Option<FieldFault> {
        match self {
            Self::Invalid => Some(FieldFault::Name),
            Self::UnknownPseudo => Some(FieldFault::PseudoHeader),
            Self::Connection => Some(FieldFault::ConnectionField),
            Self::Path if value.iter().any(|byte| *byte <= b' ' || *byte == 0x7f) => {
                Some(FieldFault::TargetByte)
            }
            _ if !is_decodable => Some(FieldFault::Value),
            Self::Te if value != b"trailers" => Some(FieldFault::Te),
            Self::ContentLength if value.is_empty() || !value.iter().all(u8::is_ascii_digit) => {
                Some(FieldFault::ContentLength)
            }
            _ => None,
        }
    }
}

impl TableEntry {
    pub fn new(name: NameKind, name_length: usize, value: &[u8]) -> Self {
        // A path that other servers accept is forwarded (`http1::target`), though no URI may have it; a fragment is
        // rejected there.
        let odd = |byte: &u8| matches!(byte, b'"' | b'<' | b'>' | b'`' | b'#');
        let is_decodable = name.is_decodable(value);
        let is_odd = name == NameKind::Path
            && value.first() == Some(&b'/')
            && (!is_decodable || value.iter().any(odd));
        let path = is_odd.then(|| Rc::from(value));
        let fault = name.fault(value, is_decodable || is_odd);
        let undecodable = !is_decodable && !is_odd;
        Self { name, name_length, value_length: value.len(), fault, is_undecodable: undecodable, path }
    }
}

impl MessageState {
    pub const fn new(kind: BlockKind) -> Self {
        Self { kind, fault: None, pseudo: 0, has_fields: false, size: 0, path: None }
    }

    pub fn add(&mut self, entry: &TableEntry) {
        self.size += entry.size();
        let fault = if self.kind == BlockKind::Response {
            entry.fault.filter(|_| entry.is_undecodable)
        } else if !entry.name.is_pseudo() {
            self.has_fields = true;
            let too_large = self.is_trailer_section_too_large().then_some(FieldFault::TrailersTooLarge);
            entry.fault.or(too_large)
        } else if self.is_trailers() {
            Some(FieldFault::PseudoHeaderInTrailers)
        } else {
            let bit = 1 << entry.name as u16;
            let misplaced = self.has_fields || self.pseudo & bit != 0 || entry.name == NameKind::Status;
            self.pseudo |= bit;
            if entry.path.is_some() {
                self.path.clone_from(&entry.path);
            }
            entry.fault.or(misplaced.then_some(FieldFault::PseudoHeader))
        };
        self.fault = self.fault.or(fault);
    }

    const fn is_trailers(&self) -> bool {
        matches!(self.kind, BlockKind::RequestTrailers)
    }

    /// `h2` would truncate such trailers silently. It rejects a head that is too large.
    pub const fn is_trailer_section_too_large(&self) -> bool {
        self.is_trailers() && self.size > MAX_TRAILERS
    }
}

impl TableEntry {
    pub const fn size(&self) -> usize {
        self.name_length + self.value_length + OVERHEAD
    }

    /// Writes a literal of the same size in the table that `h2` can decode. `name` is the start of the replaced
    /// literal: later fields may refer to the name, if it is well-formed.
    pub fn write_replacement(&mut self, name: &[u8], out: &mut Vec<u8>) -> Option<()> {
        let keeps_name = match self.name {
            NameKind::Method => self.value_length > 0,
            NameKind::Status | NameKind::UnknownPseudo | NameKind::Invalid => false,
            _ => true,
        };
        if keeps_name {
            out.extend_from_slice(name);
            write_filler(self.value_length, out);
            return Some(());
        }
        self.name = NameKind::Invalid;
        // A name has at least one byte.
        let name_length = self.name_length.max(1);
        let value_length = (self.name_length + self.value_length).checked_sub(name_length)?;
        out.push(0x40);
        write_filler(name_length, out);
        write_filler(value_length, out);
        Some(())
    }
}

/// Writes a path of the same length that `h2` can hold.
pub(super) fn write_placeholder_path(path: &[u8], out: &mut Vec<u8>) {
    write_length(path.len(), out);
    out.extend(path.iter().map(|byte| match byte {
        b'"' | b'<' | b'>' | b'`' | b'#' | 0x80.. => b'x',
        byte => *byte,
    }));
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
