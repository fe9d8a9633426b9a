//! Keeps a bad field from ending the whole connection: header blocks are checked, and rewritten if necessary, before
//! `h2` reads them ([`super::hpack`]), so that only their stream ends. Everything else passes unchanged and without a
//! copy.

#[cfg(test)]
mod tests;

use std::{
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    frames::{CONTINUATION, DATA, HEADERS, PREFACE_LENGTH, RST_STREAM},
    hpack::{BlockChecker, BlockKind, CheckedBlock, FieldFault},
    pending_requests::RequestDetails,
    wire_state::WireState,
};

const HEAD: usize = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// The dependency and the weight.
const PRIORITY_LENGTH: usize = 5;
/// SETTINGS_MAX_FRAME_SIZE, which keeps its default.
const MAX_FRAME: usize = 16_384;
/// The most streams tracked. Beyond that, the oldest have been reset here.
const MAX_OPEN: usize = 1024;
/// A head in more frames is left to `h2`, which closes the connection.
const MAX_CONTINUATIONS: usize = 8;
/// The same for trailers. Trailers that are too large are an error of their stream.
const MAX_TRAILER_CONTINUATIONS: usize = 32;

/// A stream of frames from a client, or from a server.
#[derive(Debug)]
pub struct HeaderFilter<S> {
    stream: S,
    wire: Rc<WireState>,
    checker: BlockChecker,
    /// Bytes of the current frame that are still to pass.
    passing: usize,
    /// Bytes that were read and cannot pass yet, from the head of a frame on.
    held: Vec<u8>,
    /// Bytes that may pass.
    ready: Vec<u8>,
    passed: usize,
    /// The frames come from a server.
    responses: bool,
    /// Requests that have not ended: their next header blocks are trailers. `h2` handles other streams.
    open: Vec<u32>,
    /// The input is not HTTP/2: it is left to `h2`.
    is_passthrough: bool,
}

/// What is at the start of some bytes.
enum ScanResult {
    /// This many bytes may pass; so may the rest of the frame, of the second length.
    Pass(usize, usize),
    /// A header block of this many bytes is to be replaced.
    Replace(usize, Vec<u8>),
    /// It is incomplete.
    Partial,
    /// It is not HTTP/2.
    NotHttp2,
}

impl<S> HeaderFilter<S> {
    /// For frames of a client. Records its requests in `wire`.
    pub fn for_client(stream: S, wire: &Rc<WireState>) -> Self {
        Self {
            stream,
            wire: Rc::clone(wire),
            checker: BlockChecker::default(),
            passing: PREFACE_LENGTH as usize,
            held: Vec::new(),
            ready: Vec::new(),
            passed: 0,
            responses: false,
            open: Vec::new(),
            is_passthrough: false,
        }
    }

    /// The same for frames of a server. There is no preface, and a head may follow another (1xx).
    pub fn for_server(stream: S, wire: &Rc<WireState>) -> Self {
        Self { passing: 0, responses: true, ..Self::for_client(stream, wire) }
    }

    /// How many of the bytes may pass unchanged, and what follows them.
    fn pass(&mut self, bytes: &[u8]) -> (usize, ScanResult) {
        let mut at = 0;
        loop {
            let taken = self.passing.min(bytes.len() - at);
            self.passing -= taken;
            at += taken;
            if at == bytes.len() {
                return (at, ScanResult::Pass(0, self.passing));
            }
            match self.scan_frame(&bytes[at..]) {
                ScanResult::Pass(count, more) => (at, self.passing) = (at + count, more),
                other => return (at, other),
            }
        }
    }

    fn scan_frame(&mut self, bytes: &[u8]) -> ScanResult {
        let Some(head) = Head::of(bytes) else { return ScanResult::Partial };
        match head.kind {
            HEADERS => self.block(bytes, &head),
            CONTINUATION => ScanResult::NotHttp2,
            kind => {
                if kind == RST_STREAM || (kind == DATA && head.flags & END_STREAM != 0) {
                    self.close_stream(head.stream);
                }
                let whole = HEAD + head.length;
                let count = whole.min(bytes.len());
                ScanResult::Pass(count, whole - count)
            }
        }
    }

    fn close_stream(&mut self, stream: u32) {
        if let Some(at) = self.open.iter().position(|open| *open == stream) {
            self.open.swap_remove(at);
        }
    }

    /// A header block, which may continue in other frames.
    fn block(&mut self, bytes: &[u8], first: &Head) -> ScanResult {
        if first.length > MAX_FRAME {
            return ScanResult::NotHttp2;
        }
        let Some(payload) = bytes.get(HEAD..HEAD + first.length) else { return ScanResult::Partial };
        let Some((priority, fragment)) = parts(payload, first.flags) else { return ScanResult::NotHttp2 };
        let mut whole = HEAD + first.length;
        let kind = self.kind_of(first.stream);
        let max_continuations =
            if kind == BlockKind::RequestTrailers { MAX_TRAILER_CONTINUATIONS } else { MAX_CONTINUATIONS };
        let mut continuations = Vec::new();
        let mut headers_ended = first.flags & END_HEADERS != 0;
        while !headers_ended {
            let Some(head) = bytes.get(whole..).and_then(Head::of) else { return ScanResult::Partial };
            let fits = head.kind == CONTINUATION && head.stream == first.stream && head.length <= MAX_FRAME;
            if !fits || continuations.len() == max_continuations {
                return ScanResult::NotHttp2;
            }
            let Some(more) = bytes.get(whole + HEAD..whole + HEAD + head.length) else {
                return ScanResult::Partial;
            };
            continuations.push(more);
            whole += HEAD + head.length;
            headers_ended = head.flags & END_HEADERS != 0;
        }
        let joined: Vec<u8>;
        let block = if continuations.is_empty() {
            fragment
        } else {
            joined = [&[fragment][..], &continuations[..]].concat().concat();
            &joined
        };
        let Some(mut checked) = self.checker.check(block, kind) else { return ScanResult::NotHttp2 };
        let mut kept_priority = priority;
        if depends_on_itself(first.stream, priority) {
            // `h2` would reset the stream without decoding the block, and then lack its entries in the table.
            kept_priority = &[];
            checked.fail(FieldFault::DependsOnItself, block);
        }
        if kind == BlockKind::Request {
            let details = self.details(block, &checked);
            self.wire.pending_requests.add(first.stream, details);
        }
        if first.flags & END_STREAM != 0 {
            self.close_stream(first.stream);
        } else if kind == BlockKind::Request {
            if self.open.len() == MAX_OPEN {
                self.open.remove(0);
            }
            self.open.push(first.stream);
        }
        match checked.replacement {
            None => ScanResult::Pass(whole, 0),
            Some(block) => ScanResult::Replace(whole, frames(first, kept_priority, &block)),
        }
    }

    fn kind_of(&self, stream: u32) -> BlockKind {
        if self.responses {
            BlockKind::Response
        } else if self.open.contains(&stream) {
            BlockKind::RequestTrailers
        } else {
            BlockKind::Request
        }
    }

    /// What `h2` does not report of a request.
    fn details(&mut self, block: &[u8], checked: &CheckedBlock) -> Option<Box<RequestDetails>> {
        let (path, fault) = (checked.path.clone(), checked.fault);
        let line = match fault {
            Some(_) => self.checker.request_line(block),
            None if path.is_none() => return None,
            None => Default::default(),
        };
        Some(Box::new(RequestDetails { path, fault, request_line: line }))
    }

    /// Handles bytes that were read; returns how many of them may pass unchanged.
    fn take(&mut self, bytes: &[u8]) -> usize {
        let (count, next) = self.pass(bytes);
        match next {
            ScanResult::Pass(..) => {}
            ScanResult::Replace(length, rewritten) => {
                self.ready = rewritten;
                self.held = bytes[count + length..].to_vec();
            }
            ScanResult::Partial => self.held = bytes[count..].to_vec(),
            ScanResult::NotHttp2 => {
                self.is_passthrough = true;
                return bytes.len();
            }
        }
        count
    }

    /// Releases the held bytes that may pass.
    fn release(&mut self) {
        let mut held = std::mem::take(&mut self.held);
        let (count, next) = self.pass(&held);
        let rewritten = match next {
            ScanResult::Partial | ScanResult::Pass(..) => Vec::new(),
            ScanResult::Replace(length, rewritten) => {
                held.drain(count..count + length);
                rewritten
            }
            ScanResult::NotHttp2 => {
                self.is_passthrough = true;
                self.ready = held;
                return;
            }
        };
        let rest = held.split_off(count);
        held.extend_from_slice(&rewritten);
        self.ready = held;
        self.held = rest;
    }
}

struct Head {
    length: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Head {
    fn of(bytes: &[u8]) -> Option<Self> {
        let &[a, b, c, kind, flags, d, e, f, g] = bytes.first_chunk::<HEAD>()?;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        Some(Self { length, kind, flags, stream: u32::from_be_bytes([d, e, f, g]) & 0x7fff_ffff })
    }
}

/// The priority and the header block fragment in the payload of a HEADERS frame.
fn parts(payload: &[u8], flags: u8) -> Option<(&[u8], &[u8])> {
    let mut rest = payload;
    if flags & PADDED != 0 {
        let (padding, after) = rest.split_first()?;
        rest = after.get(..after.len().checked_sub(usize::from(*padding))?)?;
    }
    rest.split_at_checked(if flags & PRIORITY != 0 { PRIORITY_LENGTH } else { 0 })
}

/// Whether the priority of a stream names that stream (RFC 9113 §5.3.2), an error of the stream.
fn depends_on_itself(stream: u32, priority: &[u8]) -> bool {
    let dependency = priority.first_chunk().map(|bytes| u32::from_be_bytes(*bytes) & 0x7fff_ffff);
    dependency == Some(stream)
}

/// A header block as frames like the original ones. `priority` may be empty.
fn frames(first: &Head, priority: &[u8], block: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(block.len() + 2 * HEAD);
    let kept = if priority.is_empty() { END_STREAM } else { END_STREAM | PRIORITY };
    let (mut rest, mut kind, mut flags) = (block, HEADERS, first.flags & kept);
    let mut before = priority;
    loop {
        let (part, after) = rest.split_at(rest.len().min(MAX_FRAME - before.len()));
        flags |= if after.is_empty() { END_HEADERS } else { 0 };
        let length = ((before.len() + part.len()) as u32).to_be_bytes();
        out.extend_from_slice(&length[1..]);
        out.extend_from_slice(&[kind, flags]);
        out.extend_from_slice(&first.stream.to_be_bytes());
        out.extend_from_slice(before);
        out.extend_from_slice(part);
        if after.is_empty() {
            return out;
        }
        (rest, kind, flags, before) = (after, CONTINUATION, 0, &[]);
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for HeaderFilter<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.passed < this.ready.len() {
                let count = buf.remaining().min(this.ready.len() - this.passed);
                buf.put_slice(&this.ready[this.passed..this.passed + count]);
                this.passed += count;
                if this.passed == this.ready.len() {
                    (this.ready, this.passed) = (Vec::new(), 0);
                    // More bytes may pass after the replaced block.
                    if !this.held.is_empty() {
                        this.release();
                    }
                }
                return Poll::Ready(Ok(()));
            }
            let before = buf.filled().len();
            ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
            let read = buf.filled().len() - before;
            if read == 0 || this.is_passthrough {
                return Poll::Ready(Ok(()));
            }
            if this.held.is_empty() {
                // The usual case.
                let bytes = buf.filled().get(before..).unwrap_or_default();
                let count = this.take(bytes);
                buf.set_filled(before + count);
            } else {
                this.held.extend_from_slice(buf.filled().get(before..).unwrap_or_default());
                buf.set_filled(before);
                this.release();
            }
            if buf.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for HeaderFilter<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
