//! A filter for byte streams that pass unread: it cuts them off before a lenient HTTP server could read a request.
//!
//! The first bytes of a connection do not decide everything. A JDK server takes any bytes before the first space for a
//! method, and ignores the version: a binary message, even a ClientHello, can continue as a request line. So the filter
//! follows the client's first line, with every line ending that servers accept, until it can be no request line,
//! or until the server has sent something that is not HTTP. Nothing else ends the watch: servers differ in how long a
//! line and a header may be, so no number of bytes is enough. The byte that ends a request line does not pass.

use super::opening::{HTTP_NAME, is_control, is_skipped_byte, separates_words, server_speaks_http};

/// The bytes could be read as an HTTP request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a server could read these bytes as an HTTP request")]
pub struct HiddenRequest;

/// See the first lines of this file. It gets the client's bytes before they are forwarded, and the server's.
#[derive(Debug)]
pub struct RequestWatch {
    /// `None`: the watch has ended.
    state: Option<Box<State>>,
}

#[derive(Debug, Default)]
struct State {
    loose: LooseLine,
    strict: StrictLine,
    three_words: ThreeWords,
    /// The server's first bytes, while they could be HTTP.
    server_bytes: Vec<u8>,
}

/// The first line, for servers that end lines at LF or CR.
#[derive(Debug)]
struct LooseLine {
    words: u8,
    in_word: bool,
    /// The number of bytes of `GET` that the first word has matched; `None` once it differs.
    get: Option<u8>,
    second_is_target: bool,
    is_text: bool,
    last: u8,
    version: Version,
    /// The number of bytes of `HTTP/` that the last word matches at this point.
    name: u8,
    is_over: bool,
}

/// The first line, for JDK servers: ended by CRLF, words separated by single spaces, any version.
#[derive(Debug)]
struct StrictLine {
    is_empty: bool,
    spaces: u8,
    is_target: bool,
    last: u8,
    is_over: bool,
}

/// The first line, for old versions of Twisted: ended by CRLF, three words separated by any ASCII white space, also LF.
#[derive(Debug, Default)]
struct ThreeWords {
    words: u8,
    in_word: bool,
    is_target: bool,
    last: u8,
    is_over: bool,
}

impl Default for LooseLine {
    fn default() -> Self {
        Self {
            words: 0,
            in_word: false,
            get: Some(0),
            second_is_target: false,
            is_text: true,
            last: 0,
            version: Version::None,
            name: 0,
            is_over: false,
        }
    }
}

impl Default for StrictLine {
    fn default() -> Self {
        Self { is_empty: true, spaces: 0, is_target: false, last: 0, is_over: false }
    }
}

/// How much of `/1.1` the end of a word matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Version {
    #[default]
    None,
    Slash,
    Major,
    Dot,
    Minor,
}

impl Version {
    const fn next(self, byte: u8) -> Self {
        match (self, byte) {
            (_, b'/') => Self::Slash,
            (Self::Slash | Self::Major, b'0'..=b'9') => Self::Major,
            (Self::Major, b'.') => Self::Dot,
            (Self::Dot | Self::Minor, b'0'..=b'9') => Self::Minor,
            _ => Self::None,
        }
    }
}

impl Default for RequestWatch {
    fn default() -> Self {
        Self { state: Some(Box::default()) }
    }
}

impl RequestWatch {
    /// No watch: all bytes pass.
    pub const fn off() -> Self {
        Self { state: None }
    }

    pub const fn is_over(&self) -> bool {
        self.state.is_none()
    }

    /// Follows the client's bytes.
    ///
    /// # Errors
    ///
    /// Neither these bytes nor later ones may be forwarded, and the server must not see an orderly end of the stream.
    pub fn follow_client(&mut self, bytes: &[u8]) -> Result<(), HiddenRequest> {
        let Some(state) = &mut self.state else { return Ok(()) };
        for byte in bytes {
            state.loose.step(*byte)?;
            state.strict.step(*byte)?;
            state.three_words.step(*byte)?;
            if state.loose.is_over && state.strict.is_over && state.three_words.is_over {
                self.state = None;
                return Ok(());
            }
        }
        Ok(())
    }

    /// The client has ended its stream. Some servers take this for the end of the line and of the header.
    ///
    /// # Errors
    ///
    /// The end may not be forwarded: the server must see a reset.
    pub fn end_client(&mut self) -> Result<(), HiddenRequest> {
        let Some(state) = &mut self.state else { return Ok(()) };
        if state.loose.is_request() || state.strict.is_request() || state.three_words.is_request() {
            return Err(HiddenRequest);
        }
        self.state = None;
        Ok(())
    }

    /// Follows the server's bytes: if they are not HTTP, the watch ends.
    pub fn follow_server(&mut self, bytes: &[u8]) {
        const FRAME_HEADER: usize = 9;
        let Some(state) = &mut self.state else { return };
        let more = FRAME_HEADER.saturating_sub(state.server_bytes.len()).min(bytes.len());
        state.server_bytes.extend_from_slice(&bytes[..more]);
        if server_speaks_http(&state.server_bytes) == Some(false) {
            self.state = None;
        }
    }
}

impl LooseLine {
    fn step(&mut self, byte: u8) -> Result<(), HiddenRequest> {
        match byte {
            _ if self.is_over => {}
            byte if self.words == 0 && is_skipped_byte(byte) => {}
            // A server could end lines at CR alone.
            b'\n' | b'\r' if self.is_request() => return Err(HiddenRequest),
            b'\n' => self.is_over = true,
            byte if separates_words(byte) => self.in_word = false,
            byte => self.word_byte(byte),
        }
        Ok(())
    }

    fn word_byte(&mut self, byte: u8) {
        if !self.in_word {
            self.in_word = true;
            self.words = self.words.saturating_add(1);
            self.version = Version::None;
            self.name = 0;
            if self.words == 2 {
                self.second_is_target = byte == b'/';
            }
        } else if self.words == 2 {
            self.second_is_target |= self.last == b':' && byte == b'/';
        }
        self.last = byte;
        self.is_text &= !is_control(byte);
        self.version = self.version.next(byte);
        if usize::from(self.name) < HTTP_NAME.len() {
            let matches = |at: u8| HTTP_NAME.get(usize::from(at)) == Some(&byte.to_ascii_uppercase());
            self.name = if matches(self.name) { self.name + 1 } else { u8::from(matches(0)) };
        }
        if self.words == 1 {
            self.get = self.get.filter(|at| b"GET".get(usize::from(*at)) == Some(&byte)).map(|at| at + 1);
        }
    }

    /// Whether the line has three words or more and the last is a version.
    fn ends_in_version(&self) -> bool {
        let has_name = usize::from(self.name) == HTTP_NAME.len();
        self.words > 2 && (self.version == Version::Minor || has_name)
    }

    /// Whether some server reads the line, if it ends here, as a request line. In HTTP/0.9 it has two words; some
    /// servers ignore the other words of a text line.
    fn is_request(&self) -> bool {
        let is_short = self.words == 2 && self.get == Some(3) && self.second_is_target;
        let is_text = self.words > 1 && self.is_text && self.second_is_target;
        !self.is_over && (self.ends_in_version() || is_short || is_text)
    }
}

impl StrictLine {
    fn step(&mut self, byte: u8) -> Result<(), HiddenRequest> {
        let last = std::mem::replace(&mut self.last, byte);
        match byte {
            _ if self.is_over => {}
            b'\n' if last == b'\r' && self.is_request() => return Err(HiddenRequest),
            // An empty line is skipped.
            b'\n' if last == b'\r' => self.is_over = !self.is_empty,
            byte => self.line_byte(last, byte),
        }
        Ok(())
    }

    fn line_byte(&mut self, last: u8, byte: u8) {
        // A CR may be the first byte of the line end.
        self.is_empty &= byte == b'\r' && last != b'\r';
        match (byte, self.spaces) {
            (b' ', 0) => self.spaces = 1,
            (b' ', 1) => {
                self.spaces = 2;
                self.is_over = !self.is_target;
            }
            (byte, 1) => {
                // Origin or absolute form; `java.net.URI` accepts no other bytes.
                self.is_target |= byte == b'/' && matches!(last, b' ' | b':');
                let is_legal = matches!(byte, b'!'..=b'~' | 0xa1..)
                    && !matches!(byte, b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}');
                self.is_over = !is_legal;
            }
            _ => {}
        }
    }

    /// Whether a JDK server reads the line, if it ends here, as a request line.
    const fn is_request(&self) -> bool {
        !self.is_over && self.spaces > 1
    }
}

impl ThreeWords {
    fn step(&mut self, byte: u8) -> Result<(), HiddenRequest> {
        let last = std::mem::replace(&mut self.last, byte);
        match byte {
            _ if self.is_over => {}
            b'\n' if last == b'\r' && self.is_request() => return Err(HiddenRequest),
            b'\n' if last == b'\r' => self.is_over = self.words > 0,
            b'\t'..=b'\r' | b' ' => self.in_word = false,
            byte => {
                let begins = !std::mem::replace(&mut self.in_word, true);
                self.words += u8::from(begins);
                self.is_target |= self.words == 2 && byte == b'/' && (begins || last == b':');
                self.is_over = self.words > 3 || self.words == 3 && !self.is_target;
            }
        }
        Ok(())
    }

    /// Whether the line, if it ends here, is a request line.
    const fn is_request(&self) -> bool {
        !self.is_over && self.words == 3
    }
}

#[cfg(test)]
mod tests;
