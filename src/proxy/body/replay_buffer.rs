//! The buffered beginning of a request's body, for another attempt.

use bytes::{Bytes, BytesMut};

/// Shorter parts are copied; longer ones keep the buffer that they were read into.
const COPY_BELOW: usize = 8 * 1024;
/// Copied parts are joined up to this length.
const MAX_JOINED: usize = 16 * 1024;

/// The buffered bytes. Takes at most about twice their size, in whatever pieces the client sends them.
#[derive(Debug, Default)]
pub(super) struct ReplayBuffer {
    parts: Vec<Bytes>,
    /// Small parts after `parts`, joined.
    tail: BytesMut,
    length: u64,
}

impl ReplayBuffer {
    /// In bytes.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    pub(super) fn push(&mut self, data: &Bytes) {
        self.length += data.len() as u64;
        if data.len() < COPY_BELOW && self.tail.len() + data.len() <= MAX_JOINED {
            return self.tail.extend_from_slice(data);
        }
        if !self.tail.is_empty() {
            self.parts.push(std::mem::take(&mut self.tail).freeze());
        }
        if data.len() < COPY_BELOW {
            self.tail.extend_from_slice(data)
        } else {
            self.parts.push(data.clone())
        }
    }

    /// The buffered bytes from `offset` on, as far as they are contiguous. `None`: there are none.
    pub(super) fn part_at(&self, mut offset: u64) -> Option<Bytes> {
        for part in &self.parts {
            match usize::try_from(offset) {
                Ok(offset) if offset < part.len() => return Some(part.slice(offset..)),
                _ => offset -= part.len() as u64,
            }
        }
        let rest = self.tail.get(usize::try_from(offset).ok()?..)?;
        (!rest.is_empty()).then(|| Bytes::copy_from_slice(rest))
    }

    /// The memory that is held, approximately.
    #[cfg(test)]
    pub(super) fn allocated(&self) -> usize {
        let parts: usize = self.parts.iter().map(Bytes::len).sum();
        parts + self.tail.capacity() + self.parts.capacity() * size_of::<Bytes>()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the parts and the offset: the bytes are those that were pushed.
        #[test]
        fn buffered_bytes_are_read_from_any_offset(
            lengths in prop::collection::vec(1_usize..20_000, 0..12),
            from in 0_usize..100_000,
        ) {
            let mut kept = ReplayBuffer::default();
            let mut all = Vec::new();
            for (number, length) in lengths.into_iter().enumerate() {
                let part: Vec<u8> = (0..length).map(|at| (at * 7 + number) as u8).collect();
                all.extend_from_slice(&part);
                kept.push(&part.into());
            }
            prop_assert_eq!(kept.length(), all.len() as u64);
            let from = from.min(all.len());
            let (mut read, mut offset) = (Vec::new(), from as u64);
            while let Some(part) = kept.part_at(offset) {
                prop_assert!(!part.is_empty());
                offset += part.len() as u64;
                read.extend_from_slice(&part);
            }
            prop_assert_eq!(&read[..], &all[from..]);
        }
    }

    #[test]
    fn a_body_in_single_bytes_takes_little_more_memory_than_its_size() {
        let mut kept = ReplayBuffer::default();
        for byte in 0..64 * 1024 {
            kept.push(&Bytes::copy_from_slice(&[byte as u8]));
        }
        assert!(kept.allocated() <= 2 * 64 * 1024 + 1024, "{} bytes", kept.allocated());
    }
}
