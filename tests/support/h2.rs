//! Hand-made HTTP/2 frames, so that they can be invalid.

use std::net::{SocketAddr, TcpStream};

use super::{RawClient, WAIT_LIMIT};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// A received frame.
#[derive(Clone, Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

/// How a request ended for the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The status of its response, if our small HPACK decoder knows it.
    Response(Option<u16>),
    /// RST_STREAM with this code.
    Reset(u32),
    /// GOAWAY with this code.
    GoAway(u32),
    Closed,
    /// Nothing within the read timeout.
    Silent,
}

pub struct H2Client {
    pub raw: RawClient,
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short frame").to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A header block of literals, nothing indexed, nothing compressed.
pub fn block<N: AsRef<[u8]>, V: AsRef<[u8]>>(fields: &[(N, V)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.push(0);
        text(&mut bytes, name.as_ref());
        text(&mut bytes, value.as_ref());
    }
    bytes
}

fn text(bytes: &mut Vec<u8>, text: &[u8]) {
    let length = text.len();
    if length < 127 {
        bytes.push(u8::try_from(length).expect("< 127"));
    } else {
        bytes.push(127);
        let mut rest = length - 127;
        while rest >= 128 {
            bytes.push(u8::try_from(rest % 128).expect("< 128") | 128);
            rest /= 128;
        }
        bytes.push(u8::try_from(rest).expect("< 128"));
    }
    bytes.extend(text);
}

/// `GET path` for the upstream named `up`.
pub fn get(path: &str) -> Vec<u8> {
    block(&[(":method", "GET"), (":scheme", "http"), (":authority", "up"), (":path", path)])
}

fn code(payload: &[u8], at: usize) -> u32 {
    payload.get(at..at + 4).map_or(u32::MAX, |code| u32::from_be_bytes([code[0], code[1], code[2], code[3]]))
}

/// `method path` for the upstream `host`, with more fields.
pub fn request(method: &str, host: &str, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let mut fields = vec![(":method", method), (":scheme", "http"), (":authority", host), (":path", path)];
    fields.extend(more);
    block(&fields)
}

/// The status, where it is the first field: indexed, or a literal with the indexed name.
fn status(block: &[u8]) -> Option<u16> {
    match *block {
        [0x88, ..] => Some(200),
        [0x89, ..] => Some(204),
        [0x8c, ..] => Some(400),
        [0x8d, ..] => Some(404),
        [0x8e, ..] => Some(500),
        [0x08 | 0x48, 3, a, b, c, ..] => std::str::from_utf8(&[a, b, c]).ok()?.parse().ok(),
        // Huffman: digits 0, 1, 2 have five bits, 3 to 9 six.
        [0x08 | 0x48, length, ..] if length & 0x80 != 0 => {
            digits(block.get(2..2 + usize::from(length & 0x7f))?)
        }
        _ => None,
    }
}

fn digits(huffman: &[u8]) -> Option<u16> {
    let bits: Vec<u8> =
        huffman.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect();
    let (mut at, mut number) = (0, 0);
    for _ in 0..3 {
        let take = |count: usize| {
            bits.get(at..at + count).map(|bits| bits.iter().fold(0, |sum, bit| sum << 1 | bit))
        };
        let (digit, used) = match take(5)? {
            digit @ 0..=2 => (digit, 5),
            _ => (take(6)?.checked_sub(0x19)? + 3, 6),
        };
        number = number * 10 + u16::from(digit);
        at += used;
    }
    Some(number)
}

impl H2Client {
    /// Connects with prior knowledge.
    #[track_caller]
    pub fn connect(address: SocketAddr) -> Self {
        let mut raw = RawClient::connect(address);
        raw.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        raw.send(frame(SETTINGS, 0, 0, &[]));
        Self { raw }
    }

    /// The server side of an accepted connection: reads the client's preface and sends SETTINGS.
    pub fn accept(stream: TcpStream) -> Option<Self> {
        Self::accept_with(stream, &[])
    }

    /// Like [`Self::accept`], with this payload of SETTINGS.
    pub fn accept_with(stream: TcpStream, settings: &[u8]) -> Option<Self> {
        stream.set_read_timeout(Some(WAIT_LIMIT)).ok()?;
        let mut peer = Self { raw: RawClient { stream, buffer: Vec::new() } };
        peer.raw.peek(24).ok()?;
        peer.raw.buffer.drain(..24);
        peer.send(frame(SETTINGS, 0, 0, settings));
        Some(peer)
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.raw.send(bytes)
    }

    /// Sends the fields of a request as one HEADERS frame.
    pub fn headers(&mut self, stream: u32, block: &[u8], end: bool) {
        let flags = END_HEADERS | if end { END_STREAM } else { 0 };
        self.send(frame(HEADERS, flags, stream, block));
    }

    /// The next frame; SETTINGS and PING are acknowledged on the way. Err: closed, or silent.
    pub fn next(&mut self) -> Result<Frame, End> {
        let length = self.raw.peek(9).map(|head| u32::from_be_bytes([0, head[0], head[1], head[2]]))?;
        let length = usize::try_from(length).expect("24 bits");
        let bytes = self.raw.peek(9 + length)?;
        let stream = u32::from_be_bytes([bytes[5] & 0x7f, bytes[6], bytes[7], bytes[8]]);
        let found = Frame { kind: bytes[3], flags: bytes[4], stream, payload: bytes[9..].to_vec() };
        self.raw.buffer.drain(..9 + length);
        match (found.kind, found.flags & ACK) {
            (SETTINGS, 0) => self.send(frame(SETTINGS, ACK, 0, &[])),
            (PING, 0) => self.send(frame(PING, ACK, 0, &found.payload)),
            _ => true,
        };
        Ok(found)
    }

    /// The next frame of a stream.
    #[track_caller]
    pub fn next_of(&mut self, stream: u32) -> Frame {
        loop {
            let frame = self.next().expect("a frame");
            if frame.stream == stream {
                return frame;
            }
        }
    }

    /// Reads until it is clear how the request on `stream` ends.
    pub fn end_of(&mut self, stream: u32) -> End {
        let mut status = None;
        loop {
            match self.next() {
                Err(end) => return end,
                Ok(Frame { kind: GOAWAY, payload, .. }) if code(&payload, 4) != 0 => {
                    return End::GoAway(code(&payload, 4));
                }
                Ok(frame) if frame.stream == stream => match frame.kind {
                    RST_STREAM if status.is_none() => return End::Reset(code(&frame.payload, 0)),
                    HEADERS => {
                        status = status.or(Some(self::status(&frame.payload)));
                        if frame.flags & END_STREAM != 0 {
                            return End::Response(status.flatten());
                        }
                    }
                    DATA if frame.flags & END_STREAM != 0 => return End::Response(status.flatten()),
                    RST_STREAM => return End::Response(status.flatten()),
                    _ => {}
                },
                Ok(_) => {}
            }
        }
    }

    /// Reads until GOAWAY arrives; its code.
    pub fn goaway(&mut self) -> Result<u32, End> {
        loop {
            let frame = self.next()?;
            if frame.kind == GOAWAY {
                return Ok(code(&frame.payload, 4));
            }
        }
    }

    /// A request that must get 200.
    #[track_caller]
    pub fn must_get(&mut self, stream: u32, path: &str) {
        self.headers(stream, &get(path), true);
        assert_eq!(self.end_of(stream), End::Response(Some(200)));
    }
}
