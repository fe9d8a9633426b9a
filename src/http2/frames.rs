//! Finds the frames in a byte stream, without decoding them.

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

/// The length of `PRI * HTTP/2.0…`, the preface of a client.
pub const PREFACE_LENGTH: u32 = 24;

const HEAD: usize = 9;
/// The head and the first bytes of the payload.
const PREFIX: usize = HEAD + 4;

/// The head of a frame (RFC 9113 §4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHead {
    pub length: u32,
    pub kind: u8,
    pub stream: u32,
    /// The first four bytes of the payload as a number; missing bytes are zero.
    pub value: u32,
}

/// Finds frames in bytes that arrive in pieces of any size.
#[derive(Debug, Default)]
pub struct FrameScanner {
    prefix: [u8; PREFIX],
    filled: usize,
    /// Bytes to skip before the next head.
    skip: u32,
}

impl FrameScanner {
    /// Skips the bytes before the first frame.
    pub fn skipping(bytes: u32) -> Self {
        Self { skip: bytes, ..Self::default() }
    }

    /// Reports each frame whose head and first bytes are complete with these bytes.
    pub fn scan(&mut self, mut bytes: &[u8], mut report: impl FnMut(FrameHead)) {
        loop {
            let skipped = bytes.len().min(usize::try_from(self.skip).unwrap_or(usize::MAX));
            bytes = &bytes[skipped..];
            self.skip -= skipped as u32;
            let wanted = if self.filled < HEAD { HEAD } else { HEAD + self.payload_prefix() };
            let take = bytes.len().min(wanted - self.filled);
            self.prefix[self.filled..self.filled + take].copy_from_slice(&bytes[..take]);
            self.filled += take;
            bytes = &bytes[take..];
            if self.filled >= HEAD && self.filled == HEAD + self.payload_prefix() {
                let frame = self.head();
                self.skip = frame.length - self.payload_prefix() as u32;
                (self.filled, self.prefix) = (0, [0; PREFIX]);
                report(frame);
            }
            if bytes.is_empty() {
                return;
            }
        }
    }

    fn length(&self) -> u32 {
        u32::from_be_bytes([0, self.prefix[0], self.prefix[1], self.prefix[2]])
    }

    /// How much of the payload is buffered.
    fn payload_prefix(&self) -> usize {
        (self.length() as usize).min(PREFIX - HEAD)
    }

    fn head(&self) -> FrameHead {
        let [_, _, _, kind, _, a, b, c, d, e, f, g, h] = self.prefix;
        FrameHead {
            length: self.length(),
            kind,
            stream: u32::from_be_bytes([a, b, c, d]) & 0x7fff_ffff,
            value: u32::from_be_bytes([e, f, g, h]),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, 0]);
        bytes.extend(stream.to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    proptest! {
        /// However the bytes are split, each frame is reported once.
        #[test]
        fn every_frame_is_found_in_pieces_of_any_size(
            frames in prop::collection::vec(
                (0_u8..10, 0_u32..0x7fff_ffff, prop::collection::vec(any::<u8>(), 0..40)),
                0..20,
            ),
            sizes in prop::collection::vec(1_usize..30, 1..50),
            preface in 0_u32..30,
        ) {
            let mut bytes = vec![0xff; preface as usize];
            let mut expected = Vec::new();
            for (kind, stream, payload) in &frames {
                bytes.extend(frame(*kind, *stream, payload));
                let mut value = [0; 4];
                let ahead = payload.len().min(4);
                value[..ahead].copy_from_slice(&payload[..ahead]);
                expected.push(FrameHead {
                    length: payload.len() as u32,
                    kind: *kind,
                    stream: *stream,
                    value: u32::from_be_bytes(value),
                });
            }
            let mut scanner = FrameScanner::skipping(preface);
            let (mut found, mut rest, mut turn) = (Vec::new(), &bytes[..], 0);
            while !rest.is_empty() {
                let size = sizes[turn % sizes.len()].min(rest.len());
                scanner.scan(&rest[..size], |frame| found.push(frame));
                rest = &rest[size..];
                turn += 1;
            }
            prop_assert_eq!(found, expected);
        }
    }
}
