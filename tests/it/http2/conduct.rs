//! Ordinary clients keep their connection, whatever of theirs is refused; those who flood it do not.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::support::{
    Proxy, Upstream, eventually,
    h2::{self, DATA, END_STREAM, End, Frame, GOAWAY, H2Client, RST_STREAM},
    text,
};

const PROTOCOL_ERROR: u32 = 1;
const REFUSED_STREAM: u32 = 7;

/// An upstream `up`; every other host is refused.
fn proxy() -> (Upstream, Proxy) {
    let upstream = Upstream::http1(|request| async {
        let _ = http_body_util::BodyExt::collect(request.into_body()).await;
        text("ok")
    });
    let proxy = Proxy::start(format!(
        "[outbound]\nunknown = \"deny\"\n\
         [[upstream]]\nname = \"up\"\nendpoints = [\"{}\"]\nprotocol = \"http1\"\n",
        upstream.address()
    ));
    (upstream, proxy)
}

const BATCHES: u32 = 11;
/// Longer than `h2` remembers a reset stream by default, and than any round trip.
const LATE: Duration = Duration::from_secs(2);

/// Sends what was under way on a stream when it was reset: data, a window update, trailers, each alone and together.
fn send_late_frames(client: &mut H2Client, stream: u32) {
    let kind = stream / 2 % 4;
    if kind < 2 {
        for _ in 0..8 {
            client.send(h2::frame(DATA, 0, stream, &[b'x'; 1000]));
        }
    }
    if kind == 3 {
        client.send(h2::frame(h2::WINDOW_UPDATE, 0, stream, &1000_u32.to_be_bytes()));
    }
    if kind > 0 {
        client.headers(stream, &h2::block(&[("x-late", "1")]), true);
    }
}

/// Waits until the proxy has read all that was sent. It must not answer any of it.
fn must_ignore_what_was_sent(client: &mut H2Client) {
    client.send(h2::frame(h2::PING, 0, 0, b"all read"));
    loop {
        let Frame { kind, flags, stream, payload } = client.next().expect("a frame");
        assert!(kind != GOAWAY, "GOAWAY {:?}", String::from_utf8_lossy(&payload));
        assert!(kind != RST_STREAM, "stream {stream} is reset once more: {payload:?}");
        if kind == h2::PING && flags & h2::ACK != 0 {
            return;
        }
    }
}

/// Uploads that are answered before they are read, by our own 403: what of them is on its way when they are reset is no
/// offence, however much it is and however late it comes.
#[test]
fn a_thousand_early_answered_uploads_leave_their_connection_alone() {
    let (_upstream, proxy) = proxy();
    let mut client = H2Client::connect(proxy.outbound());
    // For the bodies of the refusals.
    client.send(h2::frame(h2::WINDOW_UPDATE, 0, 0, &0x3fff_ffff_u32.to_be_bytes()));
    // An innocent upload that goes on beside them.
    client.headers(1, &h2::request("POST", "up", "/innocent", &[]), false);
    let post = h2::request("POST", "nowhere", "/", &[("content-type", "text/plain")]);
    for batch in 0..BATCHES {
        // With the innocent one no more than may be open.
        let streams: Vec<u32> = (0..99).map(|number| 3 + 2 * (batch * 99 + number)).collect();
        for stream in &streams {
            client.headers(*stream, &post, false);
        }
        let mut answered = 0;
        while answered < streams.len() {
            let Frame { kind, stream, payload, .. } = client.next().expect("a frame");
            assert!(kind != GOAWAY, "GOAWAY {:?}", String::from_utf8_lossy(&payload));
            answered += usize::from(kind == RST_STREAM && stream != 1);
        }
        if batch == BATCHES - 1 {
            let answered_at = Instant::now();
            eventually("a long round trip", || answered_at.elapsed() > LATE);
        }
        // Only now comes what had been sent before that was known.
        for stream in &streams {
            send_late_frames(&mut client, *stream);
        }
        must_ignore_what_was_sent(&mut client);
    }
    client.send(h2::frame(DATA, END_STREAM, 1, b"done"));
    assert_eq!(client.end_of(1), End::Answer(Some(200)));
    client.must_get(20_001, "/after");
}

/// A client that has not seen our limit yet.
#[test]
fn streams_before_settings_are_refused_one_by_one() {
    let (release, released) = watch::channel(false);
    let released = Arc::new(released);
    let upstream = Upstream::http1(move |_| {
        let mut released = (*released).clone();
        async move {
            let _ = released.wait_for(|released| *released).await;
            text("ok")
        }
    });
    let proxy = Proxy::start(format!(
        "[[upstream]]\nname = \"up\"\nprotocol = \"http1\"\nendpoints = [\"{}\"]\n",
        upstream.address()
    ));
    let mut client = H2Client::connect(proxy.outbound());
    let mut requests = Vec::new();
    for number in 0..300 {
        let flags = h2::END_HEADERS | END_STREAM;
        requests.extend(h2::frame(h2::HEADERS, flags, 1 + 2 * number, &h2::get("/")));
    }
    client.send(requests);
    let (mut refused, mut answered) = (0, 0);
    while refused + answered < 300 {
        let Frame { kind, payload, .. } = client.next().expect("a frame");
        assert!(kind != GOAWAY, "GOAWAY {:?}", String::from_utf8_lossy(&payload));
        if kind == RST_STREAM {
            assert_eq!(payload, REFUSED_STREAM.to_be_bytes());
            refused += 1;
            if refused == 200 {
                release.send(true).expect("the service is there");
            }
        }
        answered += u32::from(kind == h2::HEADERS);
    }
    assert_eq!((refused, answered), (200, 100));
    client.must_get(601, "/after");
}

/// A public entrance whose clients send what may not be sent: many of them, over one connection.
#[test]
fn malformed_requests_end_their_streams_only() {
    let (_upstream, proxy) = proxy();
    let mut client = H2Client::connect(proxy.outbound());
    client.headers(1, &h2::request("POST", "up", "/innocent", &[]), false);
    for number in 0..300 {
        let stream = 3 + 2 * number;
        client.headers(stream, &h2::request("GET", "up", "/a b", &[]), true);
        assert_eq!(client.end_of(stream), End::Reset(PROTOCOL_ERROR), "request {number}");
    }
    client.send(h2::frame(DATA, END_STREAM, 1, b"done"));
    assert_eq!(client.end_of(1), End::Answer(Some(200)));
    client.must_get(1001, "/after");
}

/// All clients of a gateway give up at once: their streams are taken back together.
#[test]
fn a_few_hundred_cancellations_at_once_are_put_up_with() {
    let (_upstream, proxy) = proxy();
    let mut client = H2Client::connect(proxy.outbound());
    let mut frames = Vec::new();
    for number in 0..400 {
        let stream = 1 + 2 * number;
        frames.extend(h2::frame(h2::HEADERS, h2::END_HEADERS | END_STREAM, stream, &h2::get("/reset")));
        frames.extend(h2::frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
    }
    client.send(frames);
    client.must_get(1001, "/after");
}
