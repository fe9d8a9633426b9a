use super::*;

/// Decodes a whole chunked body in reads of this many bytes. Returns the number of data parts, the data, the
/// trailers, and the bytes left after it.
fn decode(body: &[u8], read: usize) -> Result<(usize, Vec<u8>, Option<HeaderMap>, BytesMut), FramingError> {
    let (mut decoder, mut input) = (Decoder::new(Framing::Chunked), BytesMut::new());
    let (mut parts, mut data, mut reads) = (0, Vec::new(), body.chunks(read));
    loop {
        match decoder.decode(&mut input)? {
            DecodeResult::Data(part) => {
                parts += 1;
                data.extend_from_slice(&part);
            }
            DecodeResult::Trailers(trailers) => return Ok((parts, data, Some(trailers), input)),
            DecodeResult::End => return Ok((parts, data, None, input)),
            DecodeResult::NeedMore => input.extend_from_slice(reads.next().expect("a whole body")),
        }
    }
}

fn rejection(body: &str) -> FramingError {
    let errors = [1, 3, body.len()].map(|read| decode(body.as_bytes(), read).unwrap_err());
    assert_eq!(errors[0], errors[1], "{body:.40}");
    assert_eq!(errors[0], errors[2], "{body:.40}");
    errors[0]
}

#[test]
fn extensions_up_to_16_kib_pass_and_more_is_refused() {
    let one = |length: usize| format!("1;{}\r\nx\r\n0\r\n\r\n", "a".repeat(length - 1));
    for read in [1, 7, 100_000] {
        assert_eq!(decode(one(MAX_EXTENSIONS).as_bytes(), read).unwrap().1, b"x");
    }
    assert_eq!(rejection(&one(MAX_EXTENSIONS + 1)), FramingError::Extensions);
    let many = |count: usize| format!("{}0\r\n\r\n", format!("1;{}\r\nx\r\n", "a".repeat(127)).repeat(count));
    assert_eq!(decode(many(128).as_bytes(), 100).unwrap().1.len(), 128);
    assert_eq!(rejection(&many(129)), FramingError::Extensions);
    // Whitespace and leading zeros are limited as well.
    assert_eq!(rejection(&format!("1{}\r\nx\r\n0\r\n\r\n", " ".repeat(20_000))), FramingError::Extensions);
    assert_eq!(rejection(&format!("{}1\r\nx\r\n0\r\n\r\n", "0".repeat(20))), FramingError::ChunkSize);
}

#[test]
fn a_trailer_line_ends_with_cr_lf() {
    for (wrong, why) in [
        ("0\r\na: 1\n\r\n", FramingError::TrailerLineEnd),
        ("0\r\na: 1\r\n\n", FramingError::TrailerLineEnd),
        ("0\r\n\n", FramingError::TrailerLineEnd),
        ("0\r\n\nGET /smuggled HTTP/1.1\r\n\r\n", FramingError::TrailerLineEnd),
        ("0\r\na: 1\r2\r\n\r\n", FramingError::Trailers),
        ("0\r\na : 1\r\n\r\n", FramingError::Trailers),
        ("0\r\nno colon\r\n\r\n", FramingError::Trailers),
    ] {
        assert_eq!(rejection(wrong), why, "{wrong:?}");
    }
    let (_, data, trailers, rest) = decode(b"1\r\nx\r\n0\r\na: 1\r\nb: 2\r\n\r\nGET", 100).unwrap();
    assert_eq!((&data[..], trailers.unwrap().len(), &rest[..]), (&b"x"[..], 2, &b"GET"[..]));
}

#[test]
fn too_many_trailers_are_an_error() {
    let of =
        |bytes: usize| format!("0\r\n{}\r\n", format!("t: {}\r\n", "a".repeat(995)).repeat(bytes / 1000));
    assert_eq!(decode(of(60_000).as_bytes(), 1000).unwrap().2.map(|trailers| trailers.len()), Some(60));
    assert_eq!(rejection(&of(70_000)), FramingError::TooManyTrailers);
    assert_eq!(rejection(&format!("0\r\n{}\r\n", "t: a\r\n".repeat(101))), FramingError::TooManyTrailers);
    // They are rejected before they end.
    assert_eq!(rejection(&format!("0\r\nt: {}", "a".repeat(70_000))), FramingError::TooManyTrailers);
}

/// A sender that splits a body into tiny chunks must not cost more than another.
#[test]
fn small_chunks_that_arrive_together_are_returned_together() {
    const COUNT: usize = 20_000;
    let body = [b"1\r\nx\r\n".repeat(COUNT), b"0\r\n\r\nGET".to_vec()].concat();
    let (parts, data, trailers, rest) = decode(&body, 16 * 1024).unwrap();
    assert_eq!((data, trailers), (vec![b'x'; COUNT], None));
    assert_eq!(&rest[..], b"GET", "bytes after the body are left");
    assert!(parts <= body.len() / (16 * 1024) + 1, "{parts} parts");
}

#[test]
fn large_chunks_are_not_joined_and_no_data_is_lost() {
    let chunk = |byte: u8, length: usize| {
        [format!("{length:x}\r\n").into_bytes(), vec![byte; length], b"\r\n".to_vec()].concat()
    };
    let body = [
        chunk(b'a', 1),
        chunk(b'b', 10_000),
        chunk(b'c', 3),
        chunk(b'd', 4),
        chunk(b'e', 9000),
        b"0\r\n\r\n".to_vec(),
    ];
    let expected = [vec![b'a'], vec![b'b'; 10_000], vec![b'c'; 3], vec![b'd'; 4], vec![b'e'; 9000]].concat();
    let body = body.concat();
    for read in [1, 2, 5, 1000, 8192, 100_000] {
        assert_eq!(decode(&body, read).unwrap().1, expected, "in reads of {read}");
    }
    assert_eq!(decode(&body, 100_000).unwrap().0, 4, "a, b, c with d, e");
}

/// A few bytes do not keep the buffer alive that they were read into.
#[test]
fn small_chunks_do_not_keep_a_large_buffer_alive() {
    let mut input = BytesMut::from(&b"1\r\nx\r\n".repeat(2000)[..]);
    let Ok(DecodeResult::Data(data)) = Decoder::new(Framing::Chunked).decode(&mut input) else {
        panic!("no data")
    };
    let held = data.try_into_mut().map(|data| data.capacity()).unwrap();
    assert!(held <= 4000, "{held} bytes for 2000");
}
