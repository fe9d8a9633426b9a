use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::*;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn literal(first: u8, name: &str, value: &str) -> Vec<u8> {
    let mut bytes = vec![first, name.len() as u8];
    bytes.extend(name.bytes());
    bytes.push(value.len() as u8);
    bytes.extend(value.bytes());
    bytes
}

/// The filtered output of `bytes`, written in pieces of `size`.
async fn filter(bytes: &[u8], size: usize) -> Vec<u8> {
    let (mut client, stream) = duplex(1 << 20);
    let mut guarded = HeaderFilter::for_client(stream, &WireState::server());
    let mut out = Vec::new();
    for piece in bytes.chunks(size) {
        client.write_all(piece).await.unwrap();
        let mut read = [0; 700];
        // Whatever may pass passes at once.
        while let Ok(Ok(count @ 1..)) =
            tokio::time::timeout(std::time::Duration::ZERO, guarded.read(&mut read)).await
        {
            out.extend_from_slice(&read[..count]);
        }
    }
    drop(client);
    guarded.read_to_end(&mut out).await.unwrap();
    out
}

#[tokio::test(start_paused = true)]
async fn valid_frames_pass_unchanged_in_pieces_of_any_size() {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    let request = [&[0x82, 0x86, 0x84][..], &literal(0x40, "x-a", "1"), &[0xbe]].concat();
    bytes.extend(frame(HEADERS, END_HEADERS, 1, &request));
    bytes.extend(frame(0, 0, 1, &[7; 3000]));
    // In two frames, with padding and a priority, split in the middle of a string.
    let padded = [&[3][..], &[0, 0, 0, 0, 16], &request[..5], &[0; 3]].concat();
    bytes.extend(frame(HEADERS, PADDED | PRIORITY, 3, &padded));
    bytes.extend(frame(CONTINUATION, END_HEADERS, 3, &request[5..]));
    bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, 1, &literal(0, "x-end", "1")));
    for size in [1, 2, 7, 100, 5000] {
        assert_eq!(filter(&bytes, size).await, bytes, "pieces of {size}");
    }
}

/// Otherwise `h2` resets the stream before it decodes the block, and the next block that refers to the table ends the
/// connection.
#[tokio::test(start_paused = true)]
async fn a_block_of_a_stream_that_depends_on_itself_is_decoded() {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let block = [&[0x82, 0x86, 0x84][..], &literal(0x40, "x-a", "1")].concat();
    let with = |dependency: [u8; 4], block: &[u8]| [&dependency[..], &[16], block].concat();
    let marked = [&block[..], b"\x00\x0aconnection\x01x"].concat();
    let (mut bytes, mut expected) = (preface.to_vec(), preface.to_vec());
    // Exclusive, and in two frames.
    bytes.extend(frame(HEADERS, END_STREAM | PRIORITY, 1, &with([0x80, 0, 0, 1], &block[..4])));
    bytes.extend(frame(CONTINUATION, END_HEADERS, 1, &block[4..]));
    expected.extend(frame(HEADERS, END_STREAM | END_HEADERS, 1, &marked));
    let bad = [&block[..], &literal(0, "X-B", "1")].concat();
    bytes.extend(frame(HEADERS, END_HEADERS | PRIORITY, 3, &with([0, 0, 0, 3], &bad)));
    expected.extend(frame(HEADERS, END_HEADERS, 3, &marked));
    let other = frame(HEADERS, END_HEADERS | PRIORITY, 5, &with([0, 0, 0, 1], &[0x82, 0xbe]));
    bytes.extend(&other);
    expected.extend(&other);
    for size in [1, 20, 5000] {
        assert_eq!(filter(&bytes, size).await, expected, "pieces of {size}");
    }
}

/// Both heads of a response, its trailers, and the frames of other streams pass; a bad field is marked.
#[tokio::test(start_paused = true)]
async fn frames_of_a_server_are_filtered_from_the_first() {
    let bad = [&[0x88][..], &literal(0x40, "X-Bad", "1")].concat();
    let marked = [&[0x88][..], &literal(0x40, "xxxxx", "x"), b"\x00\x0aconnection\x01x"].concat();
    let early = [&literal(0x08, "", "103")[..1], &[3], &b"103"[..]].concat();
    let (mut bytes, mut expected) = (frame(4, 0, 0, &[]), frame(4, 0, 0, &[]));
    for (block, out) in [(&bad[..], &marked[..]), (&early, &early), (&[0x88], &[0x88]), (&[0x88], &[0x88])] {
        bytes.extend(frame(HEADERS, END_HEADERS, 1, block));
        expected.extend(frame(HEADERS, END_HEADERS, 1, out));
    }
    let (mut server, stream) = duplex(1 << 20);
    let mut guarded = HeaderFilter::for_server(stream, &WireState::client());
    server.write_all(&bytes).await.unwrap();
    drop(server);
    let mut out = Vec::new();
    guarded.read_to_end(&mut out).await.unwrap();
    assert_eq!(out, expected);
}

/// A bad field is replaced by one that keeps the table, and marked; later blocks are not changed.
#[tokio::test(start_paused = true)]
async fn malformed_blocks_are_marked_in_pieces_of_any_size() {
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let bad = [&[0x82][..], &literal(0x40, "x-a", "b\0d"), &literal(0, "X-B", "1"), &[0x84]].concat();
    let marked = [&[0x82][..], &literal(0x40, "x-a", "xxx"), &[0x84], b"\x00\x0aconnection\x01x"].concat();
    let good = [&[0x82, 0x84][..], &literal(0x40, "x-c", "1"), &[0xbe]].concat();
    let refers = [0x82, 0xbf];
    let trailers = [0x84];
    let mut bytes = preface.to_vec();
    let mut expected = preface.to_vec();
    for (stream, block, out) in [
        (1, &bad[..], &marked[..]),
        (3, &good, &good),
        // Refers to the bad field, which is the second newest by now.
        (5, &refers, b"\x82\x00\x0aconnection\x01x"),
        (3, &trailers, b"\x84\x00\x0aconnection\x01x"),
        (7, &good, &good),
    ] {
        bytes.extend(frame(HEADERS, END_HEADERS, stream, block));
        bytes.extend(frame(0, 0, stream, &[1; 10]));
        expected.extend(frame(HEADERS, END_HEADERS, stream, out));
        expected.extend(frame(0, 0, stream, &[1; 10]));
    }
    for size in [1, 3, 20, 5000] {
        assert_eq!(filter(&bytes, size).await, expected, "pieces of {size}");
    }
}

/// `h2` only resets its stream; the log names the fault and the request.
#[tokio::test]
async fn a_request_that_depends_on_itself_is_recorded_with_its_fault() {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let payload = [0, 0, 0, 1, 16, 0x82, 0x86, 0x84];
    bytes.extend(frame(HEADERS, END_STREAM | END_HEADERS | PRIORITY, 1, &payload));
    let wire = WireState::server();
    let (mut client, stream) = duplex(1 << 20);
    client.write_all(&bytes).await.unwrap();
    drop(client);
    HeaderFilter::for_client(stream, &wire).read_to_end(&mut Vec::new()).await.unwrap();
    wire.pending_requests.record_reset(1, h2::Reason::PROTOCOL_ERROR);
    let [rejected] = &wire.pending_requests.take_rejected()[..] else { panic!("one request is rejected") };
    let note = rejected.details.as_ref().unwrap();
    assert_eq!(note.fault, Some(FieldFault::DependsOnItself));
    assert_eq!(
        (note.request_line.method.as_ref(), note.request_line.target.as_deref()),
        (Some(&http::Method::GET), Some("/"))
    );
}
