//! Ordinary clients keep their connection, however many of their requests are rejected; clients that flood it do not.

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

/// An upstream `up`; requests for every other host are rejected.
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
/// Longer than `h2` remembers a reset stream by default, and longer than any round trip.
const LATE: Duration = Duration::from_secs(2);

/// Sends the frames that were in flight on a stream when it was reset: data, a window update, trailers, each alone and
/// combined.
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

/// Waits until the proxy has read everything that was sent. It must not respond to any of it.
fn must_ignore_sent_frames(client: &mut H2Client) {
    client.send(h2::frame(h2::PING, 0, 0, b"all read"));
    loop {
        let Frame { kind, flags, stream, payload } = client.next().expect("a frame");
        assert!(kind != GOAWAY, "GOAWAY {:?}", String::from_utf8_lossy(&payload));
        assert!(kind != RST_STREAM, "stream {stream} is reset again: {payload:?}");
        if kind == h2::PING && flags & h2::ACK != 0 {
            return;
        }
    }
}

/// Uploads that get a 403 of the proxy before they are read: their data in flight when they are reset is no offence,
/// however much it is and however late it arrives.
#[test]
fn a_thousand_early_responses_to_uploads_keep_their_connection() {
    let (_upstream, proxy) = proxy();
    let mut client = H2Client::connect(proxy.outbound());
    // For the bodies of the rejections.
    client.send(h2::frame(h2::WINDOW_UPDATE, 0, 0, &0x3fff_ffff_u32.to_be_bytes()));
    // A legitimate upload in parallel.
    client.headers(1, &h2::request("POST", "up", "/innocent", &[]), false);
    let post = h2::request("POST", "nowhere", "/", &[("content-type", "text/plain")]);
    for batch in 0..BATCHES {
        // Together with the legitimate upload, as many as may be open.
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
        // Only now arrives what was sent before the client knew of the reset.
        for stream in &streams {
            send_late_frames(&mut client, *stream);
        }
        must_ignore_sent_frames(&mut client);
    }
    client.send(h2::frame(DATA, END_STREAM, 1, b"done"));
    assert_eq!(client.end_of(1), End::Response(Some(200)));
    client.must_get(20_001, "/after");
}

/// A client that has not seen our SETTINGS yet.
#[test]
fn streams_above_the_limit_before_settings_are_refused_individually() {
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

/// A public entry point whose clients send malformed requests: many of them over one connection.
#[test]
fn malformed_requests_reset_only_their_streams() {
    let (_upstream, proxy) = proxy();
    let mut client = H2Client::connect(proxy.outbound());
    client.headers(1, &h2::request("POST", "up", "/innocent", &[]), false);
    for number in 0..300 {
        let stream = 3 + 2 * number;
        client.headers(stream, &h2::request("GET", "up", "/a b", &[]), true);
        assert_eq!(client.end_of(stream), End::Reset(PROTOCOL_ERROR), "request {number}");
    }
    client.send(h2::frame(DATA, END_STREAM, 1, b"done"));
    assert_eq!(client.end_of(1), End::Response(Some(200)));
    client.must_get(1001, "/after");
}

/// All clients of a gateway give up at once: their streams are reset together.
#[test]
fn a_few_hundred_simultaneous_cancellations_are_tolerated() {
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
