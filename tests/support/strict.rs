//! A parser of HTTP/1 that accepts only what every other parser understands in the same way.

/// A request or a response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The request line or status line.
    pub start: String,
    pub fields: Vec<(String, String)>,
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// The message and how many bytes it had.
    Complete(Message, usize),
    Partial,
    /// Another parser could read it differently.
    Wrong(String),
}

impl Message {
    /// The status code; 0 for a request.
    pub fn status(&self) -> u16 {
        self.start.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok()).unwrap_or(0)
    }

    /// The request's target.
    pub fn target(&self) -> &str {
        self.start.split(' ').nth(1).unwrap_or("")
    }

    /// Every value of the field, in order; the name in lower case.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.fields
            .iter()
            .filter(move |(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

enum Framing {
    None,
    Length(usize),
    Chunked,
    UntilClose,
}

/// Reads one request from the front of `bytes`.
pub fn request(bytes: &[u8]) -> Progress {
    read(bytes, true, false)
}

/// Reads one response; `closed`: no more bytes will come.
pub fn response(bytes: &[u8], closed: bool) -> Progress {
    read(bytes, false, closed)
}

fn read(bytes: &[u8], is_request: bool, closed: bool) -> Progress {
    if bytes.is_empty() {
        return Progress::Partial;
    }
    match try_read(bytes, is_request, closed) {
        Ok(Some((message, used))) => Progress::Complete(message, used),
        Ok(None) => Progress::Partial,
        Err(why) => Progress::Wrong(why),
    }
}

fn try_read(bytes: &[u8], is_request: bool, closed: bool) -> Result<Option<(Message, usize)>, String> {
    let Some((start, mut at)) = line(bytes, 0)? else { return Ok(None) };
    if is_request {
        check_request_line(&start)?
    } else {
        check_status_line(&start)?
    };
    let Some((fields, after)) = fields(bytes, at)? else { return Ok(None) };
    at = after;
    let mut message = Message { start, fields, body: Vec::new(), trailers: Vec::new() };
    if is_request && message.all("host").count() != 1 {
        return Err("not exactly one Host".to_owned());
    }
    match framing(&message, is_request)? {
        Framing::None => {}
        Framing::Length(length) => {
            let Some(body) = bytes.get(at..at.saturating_add(length)) else { return Ok(None) };
            message.body = body.to_vec();
            at += length;
        }
        Framing::Chunked => loop {
            let Some((size, next)) = line(bytes, at)? else { return Ok(None) };
            if size.is_empty() || size.len() > 8 || !size.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(format!("chunk size {size:?}"));
            }
            let size = usize::from_str_radix(&size, 16).map_err(|error| error.to_string())?;
            if size == 0 {
                let Some((trailers, after)) = self::fields(bytes, next)? else { return Ok(None) };
                message.trailers = trailers;
                at = after;
                break;
            }
            let Some(chunk) = bytes.get(next..next + size + 2) else { return Ok(None) };
            if !chunk.ends_with(b"\r\n") {
                return Err("a chunk without its CRLF".to_owned());
            }
            message.body.extend_from_slice(&chunk[..size]);
            at = next + size + 2;
        },
        Framing::UntilClose if closed => {
            message.body = bytes[at..].to_vec();
            at = bytes.len();
        }
        Framing::UntilClose => return Ok(None),
    }
    Ok(Some((message, at)))
}

/// The line that begins at `at`, and where the next one begins.
fn line(bytes: &[u8], at: usize) -> Result<Option<(String, usize)>, String> {
    let rest = bytes.get(at..).unwrap_or_default();
    let Some(end) = rest.iter().position(|&byte| byte == b'\n') else {
        return if rest.contains(&0) { Err("NUL".to_owned()) } else { Ok(None) };
    };
    let Some(line) = rest[..end].strip_suffix(b"\r") else { return Err("a bare LF".to_owned()) };
    if let Some(byte) = line.iter().find(|&&byte| (byte < b' ' && byte != b'\t') || byte == 0x7f) {
        return Err(format!("control byte {byte:#04x}"));
    }
    Ok(Some((String::from_utf8_lossy(line).into_owned(), at + end + 1)))
}

type Fields = Vec<(String, String)>;

fn fields(bytes: &[u8], mut at: usize) -> Result<Option<(Fields, usize)>, String> {
    let mut fields = Vec::new();
    loop {
        let Some((line, next)) = line(bytes, at)? else { return Ok(None) };
        at = next;
        if line.is_empty() {
            return Ok(Some((fields, at)));
        }
        let Some((name, value)) = line.split_once(':') else { return Err(format!("no colon in {line:?}")) };
        if !is_token(name) {
            return Err(format!("field name {name:?}"));
        }
        fields.push((name.to_owned(), value.trim_matches([' ', '\t']).to_owned()));
    }
}

fn is_token(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

fn check_request_line(line: &str) -> Result<(), String> {
    let parts: Vec<&str> = line.split(' ').collect();
    match parts[..] {
        [method, target, "HTTP/1.1"]
            if is_token(method)
                && !target.is_empty()
                && target.bytes().all(|byte| byte > b' ' && byte != 0x7f) =>
        {
            Ok(())
        }
        _ => Err(format!("request line {line:?}")),
    }
}

fn check_status_line(line: &str) -> Result<(), String> {
    let code = line.strip_prefix("HTTP/1.1 ").or_else(|| line.strip_prefix("HTTP/1.0 ")).unwrap_or("");
    let well = code.len() >= 3
        && code.as_bytes()[..3].iter().all(u8::is_ascii_digit)
        && (code.len() == 3 || code.as_bytes()[3] == b' ');
    if well { Ok(()) } else { Err(format!("status line {line:?}")) }
}

fn framing(message: &Message, is_request: bool) -> Result<Framing, String> {
    let lengths: Vec<&str> = message.all("content-length").collect();
    let codings: Vec<&str> = message.all("transfer-encoding").collect();
    match (&lengths[..], &codings[..]) {
        (_, _) if matches!(message.status(), 100..=199 | 204 | 304) => Ok(Framing::None),
        ([], []) if is_request => Ok(Framing::None),
        ([], []) => Ok(Framing::UntilClose),
        ([length], []) if !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit()) => {
            length.parse().map(Framing::Length).map_err(|error| error.to_string())
        }
        ([], [coding]) if coding.eq_ignore_ascii_case("chunked") => Ok(Framing::Chunked),
        _ => Err(format!("Content-Length {lengths:?} with Transfer-Encoding {codings:?}")),
    }
}
