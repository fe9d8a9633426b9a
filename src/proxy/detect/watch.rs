//! A watch over bytes that pass unread: they are cut off before a lenient HTTP server could take them for a request.
//!
//! The opening of a connection does not decide everything. A JDK server takes any bytes before the first blank for a
//! method, and ignores the version: a binary message, even the ClientHello of TLS, can go on as a request line. So the
//! client's first line is followed, in the ways in which servers end lines, until it can no longer be a request line,
//! or until the server has sent something that is not HTTP. Nothing else ends the watch: servers differ in how long a
//! line and a header may be, so no number of bytes is enough. What ends a request line does not pass.

use super::opening::{HTTP_NAME, is_control, is_skipped_byte, separates_words, server_speaks_http};

/// The bytes could be read as an HTTP request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a server could read these bytes as an HTTP request")]
pub struct ReadsAsRequest;

/// See the first lines of this file. Fed with what the client sends before it is passed on, and with what the server
/// answers.
#[derive(Debug)]
pub struct RequestWatch {
    /// `None`: it is over.
    state: Option<Box<State>>,
}

#[derive(Debug, Default)]
struct State {
    loose: LooseLine,
    strict: StrictLine,
    three_words: ThreeWords,
    /// What the server answered so far, while that could be HTTP.
    answered: Vec<u8>,
}

/// The first line as servers read it that end lines by LF or CR.
#[derive(Debug)]
struct LooseLine {
    words: u8,
    in_word: bool,
    /// Bytes of `GET` that the first word has matched; none once it differs.
    get: Option<u8>,
    second_is_target: bool,
    is_text: bool,
    last: u8,
    version: Version,
    /// Bytes of `HTTP/` that the last word has matched most recently.
    name: u8,
    is_over: bool,
}

/// The first line as JDK servers read it: ended by CRLF, words between single blanks, and any version.
#[derive(Debug)]
struct StrictLine {
    is_empty: bool,
    blanks: u8,
    is_target: bool,
    last: u8,
    is_over: bool,
}

/// The first line as old versions of Twisted read it: ended by CRLF, three words between any ASCII white space, LF too.
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
        Self { is_empty: true, blanks: 0, is_target: false, last: 0, is_over: false }
    }
}

/// How much of `/1.1` the end of a word has matched.
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
    /// No watch, for bytes that may be anything.
    pub const fn off() -> Self {
        Self { state: None }
    }

    pub const fn is_over(&self) -> bool {
        self.state.is_none()
    }

    /// Follows what the client sends.
    ///
    /// # Errors
    ///
    /// None of these bytes may be passed on, nor what follows, nor may the server see an orderly end of the stream.
    pub fn client_sends(&mut self, bytes: &[u8]) -> Result<(), ReadsAsRequest> {
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

    /// The client sends nothing more. Some servers take this for the end of the line and of the header.
    ///
    /// # Errors
    ///
    /// This may not be passed on: the server must see that the connection breaks.
    pub fn client_ends(&mut self) -> Result<(), ReadsAsRequest> {
        let Some(state) = &mut self.state else { return Ok(()) };
        if state.loose.is_request() || state.strict.is_request() || state.three_words.is_request() {
            return Err(ReadsAsRequest);
        }
        self.state = None;
        Ok(())
    }

    /// Takes note of what the server answers: what is not HTTP ends the watch.
    pub fn server_answers(&mut self, bytes: &[u8]) {
        const ENOUGH: usize = 9;
        let Some(state) = &mut self.state else { return };
        let more = ENOUGH.saturating_sub(state.answered.len()).min(bytes.len());
        state.answered.extend_from_slice(&bytes[..more]);
        if server_speaks_http(&state.answered) == Some(false) {
            self.state = None;
        }
    }
}

impl LooseLine {
    fn step(&mut self, byte: u8) -> Result<(), ReadsAsRequest> {
        match byte {
            _ if self.is_over => {}
            byte if self.words == 0 && is_skipped_byte(byte) => {}
            // A server could end lines by CR alone.
            b'\n' | b'\r' if self.is_request() => return Err(ReadsAsRequest),
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

    /// Whether the last of three words or more is a version.
    fn ends_in_version(&self) -> bool {
        let has_name = usize::from(self.name) == HTTP_NAME.len();
        self.words > 2 && (self.version == Version::Minor || has_name)
    }

    /// Whether some server takes the line, if it ends here, for a request line. In HTTP/0.9 it has two words; of text some
    /// servers ignore all but these.
    fn is_request(&self) -> bool {
        let is_short = self.words == 2 && self.get == Some(3) && self.second_is_target;
        let is_text = self.words > 1 && self.is_text && self.second_is_target;
        !self.is_over && (self.ends_in_version() || is_short || is_text)
    }
}

impl StrictLine {
    fn step(&mut self, byte: u8) -> Result<(), ReadsAsRequest> {
        let last = std::mem::replace(&mut self.last, byte);
        match byte {
            _ if self.is_over => {}
            b'\n' if last == b'\r' && self.is_request() => return Err(ReadsAsRequest),
            // An empty line is skipped.
            b'\n' if last == b'\r' => self.is_over = !self.is_empty,
            byte => self.line_byte(last, byte),
        }
        Ok(())
    }

    fn line_byte(&mut self, last: u8, byte: u8) {
        // A CR may be the first byte of the line's end.
        self.is_empty &= byte == b'\r' && last != b'\r';
        match (byte, self.blanks) {
            (b' ', 0) => self.blanks = 1,
            (b' ', 1) => {
                self.blanks = 2;
                self.is_over = !self.is_target;
            }
            (byte, 1) => {
                // In origin or absolute form; `java.net.URI` takes no other bytes.
                self.is_target |= byte == b'/' && matches!(last, b' ' | b':');
                let is_legal = matches!(byte, b'!'..=b'~' | 0xa1..)
                    && !matches!(byte, b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}');
                self.is_over = !is_legal;
            }
            _ => {}
        }
    }

    /// Whether a JDK server takes the line, if it ends here, for a request line.
    const fn is_request(&self) -> bool {
        !self.is_over && self.blanks > 1
    }
}

impl ThreeWords {
    fn step(&mut self, byte: u8) -> Result<(), ReadsAsRequest> {
        let last = std::mem::replace(&mut self.last, byte);
        match byte {
            _ if self.is_over => {}
            b'\n' if last == b'\r' && self.is_request() => return Err(ReadsAsRequest),
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
