//! The Huffman code of HPACK (RFC 7541 appendix B). It is canonical: the lengths of its codes determine it.

const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28,
    28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6,
    6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7,
    8, 13, 19, 13, 14, 6, 15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7,
    15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24,
    23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23,
    23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26,
    26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20,
    21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27,
    27, 27, 26,
];

const SHORTEST: usize = 5;
const LONGEST: usize = 30;

/// The codes of each length: the first one, how many, and where their symbols start.
struct Code {
    first: [u32; LONGEST + 1],
    count: [u32; LONGEST + 1],
    symbols_from: [usize; LONGEST + 1],
    symbols: [u8; 256],
}

const CODE: Code = code();

const fn code() -> Code {
    let mut code = Code {
        first: [0; LONGEST + 1],
        count: [0; LONGEST + 1],
        symbols_from: [0; LONGEST + 1],
        symbols: [0; 256],
    };
    let (mut length, mut next, mut at) = (SHORTEST, 0_u32, 0);
    while length <= LONGEST {
        next <<= if length == SHORTEST { 0 } else { 1 };
        code.first[length] = next;
        code.symbols_from[length] = at;
        let mut symbol = 0;
        while symbol < 256 {
            if LENGTHS[symbol] as usize == length {
                code.symbols[at] = symbol as u8;
                code.count[length] += 1;
                (next, at) = (next + 1, at + 1);
            }
            symbol += 1;
        }
        length += 1;
    }
    code
}

/// The symbol of the code that eight bits start with, and the length of the code; 0: longer than eight bits.
const SHORT: [(u8, u8); 256] = short();

const fn short() -> [(u8, u8); 256] {
    let (mut table, mut bits) = ([(0, 0); 256], 0);
    while bits < 256 {
        let mut length = SHORTEST;
        while length <= 8 {
            let at = ((bits >> (8 - length)) as u32).wrapping_sub(CODE.first[length]);
            if at < CODE.count[length] {
                table[bits] = (CODE.symbols[CODE.symbols_from[length] + at as usize], length as u8);
                break;
            }
            length += 1;
        }
        bits += 1;
    }
    table
}

/// Decodes `bytes` and appends the result. False if they are invalid.
pub fn decode(bytes: &[u8], out: &mut Vec<u8>) -> bool {
    let (mut bits, mut count) = (0_u64, 0);
    let mut bytes = bytes.iter();
    loop {
        while count <= 56
            && let Some(byte) = bytes.next()
        {
            bits = bits << 8 | u64::from(*byte);
            count += 8;
        }
        let Some((symbol, length)) = first_symbol(bits, count) else { break };
        out.push(symbol);
        count -= length;
        bits &= (1 << count) - 1;
    }
    // The rest is padding: the start of the code for end-of-string, which is all ones.
    count < 8 && bits == (1 << count) - 1
}

/// The symbol of the code that the highest of `count` bits start with, and the length of the code.
fn first_symbol(bits: u64, count: usize) -> Option<(u8, usize)> {
    // A code shorter than eight bits does not depend on the missing ones.
    let head = if count >= 8 { bits >> (count - 8) } else { bits << (8 - count) };
    let (symbol, length) = SHORT[(head & 0xff) as usize];
    if length != 0 {
        return (usize::from(length) <= count).then_some((symbol, usize::from(length)));
    }
    (9..=LONGEST.min(count)).find_map(|length| {
        let at = ((bits >> (count - length)) as u32).wrapping_sub(CODE.first[length]);
        (at < CODE.count[length]).then(|| (CODE.symbols[CODE.symbols_from[length] + at as usize], length))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7541 appendix C.4 and C.6.
    #[test]
    fn the_examples_of_the_rfc_are_decoded() {
        for (hex, text) in [
            ("f1e3c2e5f23a6ba0ab90f4ff", "www.example.com"),
            ("a8eb10649cbf", "no-cache"),
            ("25a849e95ba97d7f", "custom-key"),
            ("25a849e95bb8e8b4bf", "custom-value"),
            ("d07abe941054d444a8200595040b8166e082a62d1bff", "Mon, 21 Oct 2013 20:13:21 GMT"),
            (
                "94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007",
                "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
            ),
        ] {
            let bytes: Vec<u8> = (0..hex.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
                .collect();
            let mut out = Vec::new();
            assert!(decode(&bytes, &mut out), "{text}");
            assert_eq!(String::from_utf8(out).unwrap(), text);
        }
    }

    /// Uses the lengths of the codes alone, one length after the other.
    fn first_symbol_by_lengths(bits: u64, count: usize) -> Option<(u8, usize)> {
        (SHORTEST..=LONGEST.min(count)).find_map(|length| {
            let at = ((bits >> (count - length)) as u32).wrapping_sub(CODE.first[length]);
            (at < CODE.count[length]).then(|| (CODE.symbols[CODE.symbols_from[length] + at as usize], length))
        })
    }

    proptest::proptest! {
        #[test]
        fn the_table_of_short_codes_agrees_with_the_lengths(bits: u64, count in 0_usize..=64) {
            let bits = if count == 64 { bits } else { bits & ((1 << count) - 1) };
            proptest::prop_assert_eq!(first_symbol(bits, count), first_symbol_by_lengths(bits, count));
        }
    }

    #[test]
    fn wrong_padding_and_end_of_string_are_rejected() {
        let mut out = Vec::new();
        assert!(!decode(&[0b0001_1000], &mut out), "padded with zeros");
        assert!(!decode(&[0xff], &mut out), "more than seven bits of padding");
        assert!(!decode(&[0xff; 4], &mut out), "the code for end-of-string");
        assert!(decode(&[], &mut out));
    }
}
