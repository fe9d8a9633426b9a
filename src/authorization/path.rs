//! Paths in rules: matching, and the check for ambiguous paths.

/// A path of a rule: exact, or a prefix if it ends in `*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathPattern {
    Exactly(Box<str>),
    Prefix(Box<str>),
}

impl PathPattern {
    /// `text` is in normal form; loading the configuration rejects any other.
    pub fn new(text: &str) -> Self {
        match text.strip_suffix('*') {
            Some(prefix) => Self::Prefix(prefix.into()),
            None => Self::Exactly(text.into()),
        }
    }

    /// `path`: in normal form.
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exactly(exact) => **exact == *path,
            Self::Prefix(prefix) => path.starts_with(&**prefix),
        }
    }

    /// Whether it matches every path that the other one does.
    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Prefix(prefix), Self::Prefix(text) | Self::Exactly(text)) => text.starts_with(&**prefix),
            _ => self == other,
        }
    }
}

/// Why a path is ambiguous: two servers could interpret it differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the path contains {0}: two servers could interpret it differently, and allow rules match paths")]
pub struct AmbiguousPath(pub &'static str);

/// Rejects a path that the service could interpret as another one than the rules did: slashes are encoded, doubled
/// or backslashes; segments are dots or have parameters (`;`); a percent triplet is malformed, encodes another one or
/// a control character, or decodes to invalid UTF-8.
///
/// # Errors
/// [`AmbiguousPath`]
pub fn check_unambiguous(path: &str) -> Result<(), AmbiguousPath> {
    let bytes = path.as_bytes();
    // The decoded segment: `.` may be written as `%2e`.
    let mut segment = Vec::new();
    let mut at = 0;
    let mut after_slash = false;
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'/' if after_slash => return Err(AmbiguousPath("`//`")),
            b'/' => {
                check_segment(&segment)?;
                segment.clear();
            }
            b'\\' => return Err(AmbiguousPath("a backslash")),
            b';' => return Err(AmbiguousPath("`;`")),
            b'%' => {
                let decoded = decode(&bytes[at + 1..]).ok_or(AmbiguousPath("a `%` without two digits"))?;
                match decoded {
                    b'/' => return Err(AmbiguousPath("an encoded slash")),
                    b'\\' => return Err(AmbiguousPath("an encoded backslash")),
                    b';' => return Err(AmbiguousPath("an encoded `;`")),
                    b'%' if decode(&bytes[at + 3..]).is_some() => {
                        return Err(AmbiguousPath("a triplet in a triplet"));
                    }
                    0..=0x1f | 0x7f => return Err(AmbiguousPath("an encoded control character")),
                    _ => segment.push(decoded),
                }
                at += 2;
            }
            byte => segment.push(*byte),
        }
        after_slash = *byte == b'/';
        at += 1;
    }
    check_segment(&segment)
}

fn check_segment(segment: &[u8]) -> Result<(), AmbiguousPath> {
    match segment {
        b"." | b".." => Err(AmbiguousPath("a dot segment")),
        _ if std::str::from_utf8(segment).is_err() => Err(AmbiguousPath("bytes that are not UTF-8")),
        _ => Ok(()),
    }
}

/// Decodes two hexadecimal digits.
fn decode(digits: &[u8]) -> Option<u8> {
    let digit = |at: usize| digits.get(at).and_then(|byte| char::from(*byte).to_digit(16));
    u8::try_from(digit(0)? << 4 | digit(1)?).ok()
}
