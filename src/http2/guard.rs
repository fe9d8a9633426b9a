//! Sees to it that a bad field ends its stream and not the connection: header blocks are checked, and where need be written
//! anew, before `h2` reads them ([`super::hpack`]). All else passes as it comes, without a copy.

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
    arrivals::RequestNote,
    frames::{CONTINUATION, DATA, HEADERS, PREFACE_LENGTH, RST_STREAM},
    hpack::{BlockChecker, BlockKind, CheckedBlock, FieldFault},
    wire::Wire,
};

const HEAD: usize = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// The weight and what it depends on.
const PRIORITY_LENGTH: usize = 5;
/// SETTINGS_MAX_FRAME_SIZE, which is not changed.
const MAX_FRAME: usize = 16_384;
/// Streams that are followed. Of more, the oldest have been reset on this side.
const MOST_OPEN: usize = 1024;
/// A head in more frames is left to `h2`, which closes the connection.
const MOST_CONTINUATIONS: usize = 8;
/// Likewise trailers. Those that are too large are an error of their stream.
const MOST_TRAILER_CONTINUATIONS: usize = 32;

/// A stream of frames from a client, or from a server.
#[derive(Debug)]
pub struct Guarded<S> {
    stream: S,
    wire: Rc<Wire>,
    checker: BlockChecker,
    /// Bytes of the frame under way that are still to pass.
    passing: usize,
    /// What has been read and cannot pass yet, from the head of a frame.
    held: Vec<u8>,
    /// What may pass.
    ready: Vec<u8>,
    passed: usize,
    /// The frames come from a server.
    responses: bool,
    /// Requests whose end has not come yet: their next header blocks are trailers. On other streams `h2` knows better.
    open: Vec<u32>,
    /// What comes is not HTTP/2: left to `h2`.
    given_up: bool,
}

/// What there is at the beginning of some bytes.
enum Found {
    /// So many bytes may pass; the rest of the frame, so many, may pass too.
    Pass(usize, usize),
    /// A header block of so many bytes is to be replaced.
    Replace(usize, Vec<u8>),
    /// It is not complete.
    Partial,
    /// It is not HTTP/2.
    Nonsense,
}

impl<S> Guarded<S> {
    /// Of a client's frames. Notes in `wire` which requests come.
    pub fn new(stream: S, wire: &Rc<Wire>) -> Self {
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
            given_up: false,
        }
    }

    /// The same for what a server sends. There is no preface, and a head may follow another (1xx).
    pub fn of_server(stream: S, wire: &Rc<Wire>) -> Self {
        Self { passing: 0, responses: true, ..Self::new(stream, wire) }
    }

    /// How many of the bytes may pass as they are, and what comes behind them.
    fn pass(&mut self, bytes: &[u8]) -> (usize, Found) {
        let mut at = 0;
        loop {
            let taken = self.passing.min(bytes.len() - at);
            self.passing -= taken;
            at += taken;
            if at == bytes.len() {
                return (at, Found::Pass(0, self.passing));
            }
            match self.find(&bytes[at..]) {
                Found::Pass(count, more) => (at, self.passing) = (at + count, more),
                other => return (at, other),
            }
        }
    }

    fn find(&mut self, bytes: &[u8]) -> Found {
        let Some(head) = Head::of(bytes) else { return Found::Partial };
        match head.kind {
            HEADERS => self.block(bytes, &head),
            CONTINUATION => Found::Nonsense,
            kind => {
                if kind == RST_STREAM || (kind == DATA && head.flags & END_STREAM != 0) {
                    self.ended(head.stream);
                }
                let whole = HEAD + head.length;
                let count = whole.min(bytes.len());
                Found::Pass(count, whole - count)
            }
        }
    }

    fn ended(&mut self, stream: u32) {
        if let Some(at) = self.open.iter().position(|open| *open == stream) {
            self.open.swap_remove(at);
        }
    }

    /// A header block, which may go on in other frames.
    fn block(&mut self, bytes: &[u8], first: &Head) -> Found {
        if first.length > MAX_FRAME {
            return Found::Nonsense;
        }
        let Some(payload) = bytes.get(HEAD..HEAD + first.length) else { return Found::Partial };
        let Some((priority, fragment)) = parts(payload, first.flags) else { return Found::Nonsense };
        let mut whole = HEAD + first.length;
        let kind = self.kind_of(first.stream);
        let most =
            if kind == BlockKind::RequestTrailers { MOST_TRAILER_CONTINUATIONS } else { MOST_CONTINUATIONS };
        let mut continuations = Vec::new();
        let mut ended = first.flags & END_HEADERS != 0;
        while !ended {
            let Some(head) = bytes.get(whole..).and_then(Head::of) else { return Found::Partial };
            let fits = head.kind == CONTINUATION && head.stream == first.stream && head.length <= MAX_FRAME;
            if !fits || continuations.len() == most {
                return Found::Nonsense;
            }
            let Some(more) = bytes.get(whole + HEAD..whole + HEAD + head.length) else {
                return Found::Partial;
            };
            continuations.push(more);
            whole += HEAD + head.length;
            ended = head.flags & END_HEADERS != 0;
        }
        let joined: Vec<u8>;
        let block = if continuations.is_empty() {
            fragment
        } else {
            joined = [&[fragment][..], &continuations[..]].concat().concat();
            &joined
        };
        let Some(mut checked) = self.checker.check(block, kind) else { return Found::Nonsense };
        let mut kept_priority = priority;
        if depends_on_itself(first.stream, priority) {
            // `h2` would reset the stream without decoding the block, and then lack what the block puts into the table.
            kept_priority = &[];
            checked.fail(FieldFault::DependsOnItself, block);
        }
        if kind == BlockKind::Request {
            let note = self.note(block, &checked);
            self.wire.arrivals.arrived(first.stream, note);
        }
        if first.flags & END_STREAM != 0 {
            self.ended(first.stream);
        } else if kind == BlockKind::Request {
            if self.open.len() == MOST_OPEN {
                self.open.remove(0);
            }
            self.open.push(first.stream);
        }
        match checked.replacement {
            None => Found::Pass(whole, 0),
            Some(block) => Found::Replace(whole, frames(first, kept_priority, &block)),
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

    /// What is to be known of a request beside what `h2` reads.
    fn note(&mut self, block: &[u8], checked: &CheckedBlock) -> Option<Box<RequestNote>> {
        let (path, fault) = (checked.path.clone(), checked.fault);
        let line = match fault {
            Some(_) => self.checker.request_line(block),
            None if path.is_none() => return None,
            None => Default::default(),
        };
        Some(Box::new(RequestNote { path, fault, line }))
    }

    /// Takes what has been read; returns how much of it may pass as it is.
    fn take(&mut self, bytes: &[u8]) -> usize {
        let (count, behind) = self.pass(bytes);
        match behind {
            Found::Pass(..) => {}
            Found::Replace(length, anew) => {
                self.ready = anew;
                self.held = bytes[count + length..].to_vec();
            }
            Found::Partial => self.held = bytes[count..].to_vec(),
            Found::Nonsense => {
                self.given_up = true;
                return bytes.len();
            }
        }
        count
    }

    /// Lets pass what may of what is held.
    fn release(&mut self) {
        let mut held = std::mem::take(&mut self.held);
        let (count, behind) = self.pass(&held);
        let anew = match behind {
            Found::Partial | Found::Pass(..) => Vec::new(),
            Found::Replace(length, anew) => {
                held.drain(count..count + length);
                anew
            }
            Found::Nonsense => {
                self.given_up = true;
                self.ready = held;
                return;
            }
        };
        let rest = held.split_off(count);
        held.extend_from_slice(&anew);
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

/// The priority and the fragment of a header block that a HEADERS frame has.
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

/// A header block as frames like the ones it came in. `priority` may be left out.
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

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
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
                    // Behind what was replaced there may be more that can pass.
                    if !this.held.is_empty() {
                        this.release();
                    }
                }
                return Poll::Ready(Ok(()));
            }
            let before = buf.filled().len();
            ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
            let read = buf.filled().len() - before;
            if read == 0 || this.given_up {
                return Poll::Ready(Ok(()));
            }
            if this.held.is_empty() {
                // As it is most of the time.
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

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
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
