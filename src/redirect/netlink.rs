//! Netlink messages to the kernel's netfilter (RFC 3549): their layout, and sending a batch.

use std::{io, time::Duration};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind,
    netlink::{NETFILTER, SocketAddrNetlink},
    recv, sendto, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};

/// The limit for a response of the kernel, which normally responds at once.
const TIMEOUT: Duration = Duration::from_secs(5);

const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NESTED: u16 = 1 << 15;

/// Messages of a subsystem that take effect atomically.
#[derive(Debug)]
pub struct Batch {
    subsystem: u8,
    bytes: Vec<u8>,
    /// The offset of the last message.
    last: usize,
    count: u32,
}

impl Batch {
    pub fn new(subsystem: u8) -> Self {
        let mut batch = Self { subsystem, bytes: Vec::new(), last: 0, count: 0 };
        batch.message(BATCH_BEGIN, 0, 0, u16::from(subsystem), |_| {});
        batch
    }

    /// Adds a message of the subsystem for an address family.
    pub fn push(
        &mut self,
        message: u8,
        flags: u16,
        family: u8,
        attributes: impl FnOnce(&mut Attributes<'_>),
    ) {
        let kind = u16::from(self.subsystem) << 8 | u16::from(message);
        self.message(kind, flags, family, 0, attributes);
    }

    fn message(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        resource: u16,
        attributes: impl FnOnce(&mut Attributes<'_>),
    ) {
        let start = self.bytes.len();
        self.last = start;
        self.count += 1;
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        self.bytes.extend(self.count.to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        attributes(&mut Attributes(&mut self.bytes));
        let length = u32::try_from(self.bytes.len() - start).unwrap_or(u32::MAX);
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Sends the batch and waits for the result.
    ///
    /// # Errors
    /// Why the kernel rejected the batch; then nothing has changed.
    pub fn commit(mut self) -> io::Result<()> {
        // Success is acknowledged for the last message only; errors are sent without request.
        let flags = self.last + 6;
        let with_ack =
            (NLM_F_REQUEST | NLM_F_ACK) | u16::from_ne_bytes([self.bytes[flags], self.bytes[flags + 1]]);
        self.bytes[flags..flags + 2].copy_from_slice(&with_ack.to_ne_bytes());
        let awaited = self.count;
        let subsystem = u16::from(self.subsystem);
        self.message(BATCH_END, 0, 0, subsystem, |_| {});

        let socket =
            socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(NETFILTER))?;
        let kernel = SocketAddrNetlink::new(0, 0);
        bind(&socket, &kernel)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(TIMEOUT))?;
        sendto(&socket, &self.bytes, SendFlags::empty(), &kernel)?;
        let mut buffer = [0; 8192];
        loop {
            let (length, _) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
            if find_ack(&buffer[..length], awaited)? {
                return Ok(());
            }
        }
    }
}

/// Whether `bytes` contain the acknowledgement of message `awaited`. Returns the first error.
fn find_ack(mut bytes: &[u8], awaited: u32) -> io::Result<bool> {
    while let Some(header) = bytes.first_chunk::<HEADER>() {
        let [l0, l1, l2, l3, k0, k1, _, _, s0, s1, s2, s3, ..] = *header;
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let Some(message) = bytes.get(HEADER..length) else { break };
        if u16::from_ne_bytes([k0, k1]) == NLMSG_ERROR
            && let Some(code) = message.first_chunk::<4>()
        {
            match i32::from_ne_bytes(*code) {
                0 if u32::from_ne_bytes([s0, s1, s2, s3]) == awaited => return Ok(true),
                0 => {}
                code => return Err(io::Error::from_raw_os_error(-code)),
            }
        }
        bytes = bytes.get(padded(length)..).unwrap_or_default();
    }
    Ok(false)
}

const fn padded(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// Writes attributes: type, length, value.
#[derive(Debug)]
pub struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    pub fn bytes(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(padded(self.0.len()), 0);
    }

    pub fn text(&mut self, kind: u16, value: &str) {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes);
    }

    pub fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub fn nested(&mut self, kind: u16, inside: impl FnOnce(&mut Attributes<'_>)) {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend((kind | NESTED).to_ne_bytes());
        inside(&mut Attributes(self.0));
        let length = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_aligned_and_have_their_length() {
        let mut bytes = Vec::new();
        Attributes(&mut bytes).nested(1, |inner| {
            inner.text(2, "lo");
            inner.number(3, 7);
        });
        let expected: Vec<u8> = [
            &20u16.to_ne_bytes()[..],
            &(1 | NESTED).to_ne_bytes(),
            &7u16.to_ne_bytes(),
            &2u16.to_ne_bytes(),
            b"lo\0\0",
            &8u16.to_ne_bytes(),
            &3u16.to_ne_bytes(),
            &[0, 0, 0, 7],
        ]
        .concat();
        assert_eq!(bytes, expected);
    }

    #[test]
    fn errors_are_returned_and_other_acks_ignored() {
        let reply = |sequence: u32, code: i32| {
            let mut bytes = 36u32.to_ne_bytes().to_vec();
            bytes.extend(NLMSG_ERROR.to_ne_bytes());
            bytes.extend([0; 2]);
            bytes.extend(sequence.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(code.to_ne_bytes());
            bytes.resize(36, 0);
            bytes
        };
        assert!(find_ack(&reply(4, 0), 4).unwrap());
        assert!(!find_ack(&reply(3, 0), 4).unwrap());
        assert!(find_ack(&[reply(3, 0), reply(4, 0)].concat(), 4).unwrap());
        assert_eq!(find_ack(&reply(3, -1), 4).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(!find_ack(&[1, 2, 3], 4).unwrap());
    }
}
