use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    net::{TcpListener, TcpStream},
};

use super::*;

#[tokio::test(start_paused = true)]
async fn only_an_idle_tunnel_ends() {
    let (mut left, a) = duplex(64);
    let (b, mut right) = duplex(64);
    let relay = relay(a, b, RequestWatch::off(), Some(Duration::from_secs(10)), None);
    let talk = async {
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_secs(8)).await;
            left.write_all(b"x").await.unwrap();
            let mut byte = [0];
            right.read_exact(&mut byte).await.unwrap();
        }
        Instant::now()
    };
    let (end, last) = tokio::join!(relay, talk);
    assert!(matches!(end, TunnelEnd::Idle));
    assert_eq!(last.elapsed().as_secs(), 10);
}

#[tokio::test]
async fn a_half_close_is_forwarded() {
    let (mut left, a) = duplex(64);
    let (b, mut right) = duplex(64);
    let relay = relay(a, b, RequestWatch::off(), None, None);
    let talk = async {
        left.write_all(b"question").await.unwrap();
        left.shutdown().await.unwrap();
        let mut text = String::new();
        right.read_to_string(&mut text).await.unwrap();
        right.write_all(b"answer").await.unwrap();
        drop(right);
        let mut answer = String::new();
        left.read_to_string(&mut answer).await.unwrap();
        (text, answer)
    };
    let (end, texts) = tokio::join!(relay, talk);
    assert_eq!(texts, ("question".to_owned(), "answer".to_owned()));
    assert!(matches!(end, TunnelEnd::Closed(Ok((8, 6)))));
}

/// Both ends of a connection.
async fn connected() -> (TcpStream, SharedTcp) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (client, server) =
        tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (client.unwrap(), SharedTcp::new(server.unwrap().0))
}

/// Bytes that show the offset that they come from.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|offset| (offset ^ (offset >> 8) ^ (offset >> 16)) as u8).collect()
}

#[tokio::test]
async fn bulk_data_is_spliced_without_loss() {
    let ((mut left, a), (mut right, b)) = (connected().await, connected().await);
    let plain_tcp = plain_tcp_of(&Prefixed::new(Bytes::new(), a.clone()))
        .zip(plain_tcp_of(&UpstreamIo::Plain(b.clone())));
    assert!(plain_tcp.is_some(), "both are plain TCP");
    let relay = relay(
        Prefixed::new(Bytes::from_static(b"first "), a),
        UpstreamIo::Plain(b),
        RequestWatch::off(),
        None,
        None,
    );
    let (upload, download) = (pattern(5_000_000), pattern(3_000_001));
    let talk = async {
        let (mut left_read, mut left_write) = left.split();
        let (mut right_read, mut right_write) = right.split();
        let (mut got_right, mut got_left) = (Vec::new(), Vec::new());
        let sends = async {
            left_write.write_all(&upload).await.unwrap();
            left_write.shutdown().await.unwrap();
        };
        let answers = async {
            right_read.read_to_end(&mut got_right).await.unwrap();
            right_write.write_all(&download).await.unwrap();
            right_write.shutdown().await.unwrap();
        };
        let reads = async { left_read.read_to_end(&mut got_left).await.unwrap() };
        tokio::join!(sends, answers, reads);
        assert!(got_right.strip_prefix(b"first ") == Some(&upload[..]));
        assert!(got_left == download);
    };
    let (end, ()) = tokio::join!(relay, talk);
    assert!(matches!(end, TunnelEnd::Closed(Ok((5_000_006, 3_000_001)))), "{end:?}");
}

#[tokio::test]
#[cfg(target_os = "linux")]
async fn only_bulk_data_takes_a_pipe() {
    let ((mut left, a), (mut right, b)) = (connected().await, connected().await);
    let (mut from, mut to) = (a.clone(), b.clone());
    let (moved, watch) = (Cell::new(Instant::now()), RefCell::new(RequestWatch::off()));
    let noted = RelayState { moved: &moved, watch: &watch };
    let mut flow = Flow::of(Sender::Client);
    let carry = async {
        poll_fn(|cx| flow.poll(cx, &mut from, &mut to, Some((&a, &b)), &noted)).await.unwrap();
    };
    let talk = async {
        left.write_all(b"a little").await.unwrap();
        left.shutdown().await.unwrap();
        right.read_to_end(&mut Vec::new()).await.unwrap();
    };
    tokio::join!(carry, talk);
    assert!(matches!(flow.mode, FlowMode::Done) && flow.bytes == 8);

    let (mut left, a) = connected().await;
    let (mut right, b) = connected().await;
    let (mut from, mut to) = (a.clone(), b.clone());
    let mut flow = Flow::of(Sender::Client);
    let size = SPLICE_FROM as usize * 4;
    let reads = async {
        left.write_all(&pattern(size)).await.unwrap();
        let mut got = vec![0; size];
        right.read_exact(&mut got).await.unwrap();
        assert!(got == pattern(size));
    };
    tokio::select! {
        _ = poll_fn(|cx| flow.poll(cx, &mut from, &mut to, Some((&a, &b)), &noted)) => unreachable!("neither side closes"),
        () = reads => {}
    }
    assert!(matches!(flow.mode, FlowMode::Splice(_)), "{flow:?}");
}

/// Bytes that could be read as a request do not reach the server; the bytes before them do.
#[tokio::test]
async fn a_request_hidden_in_a_byte_stream_is_cut_off() {
    let (mut left, a) = duplex(1024);
    let (b, mut right) = duplex(1024);
    let relay = relay(a, b, RequestWatch::default(), None, None);
    let talk = async {
        left.write_all(b"\x01\x02 /x").await.unwrap();
        let mut seen = [0; 5];
        right.read_exact(&mut seen).await.unwrap();
        left.write_all(b" 0\r\nx-admin: 1\r\n\r\n").await.unwrap();
        let mut rest = Vec::new();
        right.read_to_end(&mut rest).await.unwrap();
        rest
    };
    let (end, rest) = tokio::join!(relay, talk);
    assert!(matches!(end, TunnelEnd::HiddenRequest(_)));
    assert_eq!(rest, b"", "no byte of the header");
}
