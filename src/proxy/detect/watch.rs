//! A watch over bytes that pass unread: they are cut off before a lenient HTTP server could take them for a request.
//!
//! The opening of a connection does not decide everything. A JDK server takes any bytes before the first blank for a
//! method, and ignores the version: a binary message, even the greeting of TLS, can go on as a request line. So the
//! first line of the client is followed, in the two ways in which servers end lines, until it can no longer be one of
//! a request, or until the server has answered something that is not HTTP. A request takes effect at the end of its
//! header at the earliest, and there the bytes stop.

use super::opening::{H2_PREFACE, is_skipped_byte, separates_words, server_speaks_http};

/// A first line that is longer than this is none: no server reads on.
const LONGEST_WATCH: usize = 1024 * 1024;

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
    seen: usize,
    /// Bytes of the HTTP/2 preface that have matched.
    preface: usize,
    loose: LooseLine,
    strict: StrictLine,
    /// What the server answered so far, while that could be HTTP.
    answered: Vec<u8>,
}

/// The first line as servers read it that end lines by LF, and take it for a request line if it ends in a version.
#[derive(Debug, Default)]
struct LooseLine {
    words: u8,
    in_word: bool,
    /// Bytes of `GET` that the first word has matched; none once it differs.
    get: Option<u8>,
    second_is_target: bool,
    last: u8,
    version: Version,
    /// The current line of the header has no byte yet.
    blank: bool,
    stage: Stage,
}

/// The first line as JDK servers read it: ended by CRLF, words between single blanks, and any version.
#[derive(Debug)]
struct StrictLine {
    length: usize,
    blanks: u8,
    is_target: bool,
    is_legal: bool,
    last: u8,
    stage: Stage,
}

impl Default for StrictLine {
    fn default() -> Self {
        Self { length: 0, blanks: 0, is_target: false, is_legal: true, last: 0, stage: Stage::Line }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Line,
    /// The line could be one of a request.
    Header,
    /// It is none.
    Over,
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
    /// None of these bytes may be passed on, nor what follows.
    pub fn client_sends(&mut self, bytes: &[u8]) -> Result<(), ReadsAsRequest> {
        let Some(state) = &mut self.state else { return Ok(()) };
        for byte in bytes {
            state.step(*byte)?;
            if state.is_over() {
                self.state = None;
                return Ok(());
            }
        }
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

impl State {
    fn step(&mut self, byte: u8) -> Result<(), ReadsAsRequest> {
        if self.preface == self.seen && H2_PREFACE.get(self.preface) == Some(&byte) {
            self.preface += 1;
            if self.preface == H2_PREFACE.len() {
                return Err(ReadsAsRequest);
            }
        }
        self.seen += 1;
        self.loose.step(byte)?;
        self.strict.step(byte)
    }

    fn is_over(&self) -> bool {
        let read = self.loose.stage == Stage::Over && self.strict.stage == Stage::Over;
        (read || self.seen > LONGEST_WATCH) && self.preface < self.seen
    }
}

impl LooseLine {
    fn step(&mut self, byte: u8) -> Result<(), ReadsAsRequest> {
        match (self.stage, byte) {
            (Stage::Over, _) => {}
            (Stage::Header, b'\n') if self.blank => return Err(ReadsAsRequest),
            (Stage::Header, b'\n') => self.blank = true,
            (Stage::Header, b'\r') => {}
            (Stage::Header, _) => self.blank = false,
            (Stage::Line, b'\n') if self.words > 0 => return self.end(),
            (Stage::Line, byte) if self.words == 0 && is_skipped_byte(byte) => {}
            (Stage::Line, byte) if separates_words(byte) => self.in_word = false,
            (Stage::Line, byte) => self.word_byte(byte),
        }
        Ok(())
    }

    fn word_byte(&mut self, byte: u8) {
        if !self.in_word {
            self.in_word = true;
            self.words = self.words.saturating_add(1);
            self.version = Version::None;
            match self.words {
                1 => self.get = Some(0),
                2 => self.second_is_target = byte == b'/',
                _ => {}
            }
        } else if self.words == 2 {
            self.second_is_target |= self.last == b':' && byte == b'/';
        }
        self.last = byte;
        self.version = self.version.next(byte);
        if self.words == 1 {
            self.get = self.get.filter(|at| b"GET".get(usize::from(*at)) == Some(&byte)).map(|at| at + 1);
        }
    }

    fn end(&mut self) -> Result<(), ReadsAsRequest> {
        if self.words == 2 && self.get == Some(3) && self.second_is_target {
            // HTTP/0.9: the line is all of the request.
            return Err(ReadsAsRequest);
        }
        let is_request = self.words > 2 && self.version == Version::Minor;
        self.stage = if is_request { Stage::Header } else { Stage::Over };
        self.blank = true;
        Ok(())
    }
}

impl StrictLine {
    fn step(&mut self, byte: u8) -> Result<(), ReadsAsRequest> {
        let last = std::mem::replace(&mut self.last, byte);
        match (self.stage, byte) {
            (Stage::Over, _) => {}
            // An empty line ends the header, whether it ends by CR, LF or both.
            (Stage::Header, b'\r' | b'\n') if matches!(last, b'\r' | b'\n') => {
                if (last, byte) != (b'\r', b'\n') {
                    return Err(ReadsAsRequest);
                }
            }
            (Stage::Header, _) => {}
            (Stage::Line, b'\n') if last == b'\r' => {
                // Behind its CR: an empty line is skipped.
                if self.length > 1 {
                    let is_request = self.blanks >= 2 && self.is_target && self.is_legal;
                    self.stage = if is_request { Stage::Header } else { Stage::Over };
                }
                self.length = 0;
            }
            (Stage::Line, byte) => self.line_byte(last, byte),
        }
        Ok(())
    }

    fn line_byte(&mut self, last: u8, byte: u8) {
        self.length += 1;
        match (byte, self.blanks) {
            (b' ', 0) => self.blanks = 1,
            (b' ', 1) => self.blanks = 2,
            (byte, 1) => {
                // In origin or absolute form; `java.net.URI` takes no other bytes.
                self.is_target |= byte == b'/' && matches!(last, b' ' | b':');
                self.is_legal &= matches!(byte, b'!'..=b'~' | 0xa1..)
                    && !matches!(byte, b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}');
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
