//! One fetch for all that wait for the same response.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    thread,
    time::Duration,
};

use tokio::sync::Semaphore;

use super::*;
use crate::support::RawServer;

/// Answers when permitted.
fn held(fields: &'static [(&'static str, &'static str)]) -> (Service, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let permits = Arc::clone(&gate);
    let service = Service::start(move |number, _| {
        let permits = Arc::clone(&permits);
        async move {
            permits.acquire().await.unwrap().forget();
            response(200, fields, number.to_string())
        }
    });
    (service, gate)
}

fn ask_together(proxy: &Proxy, count: usize) -> Vec<thread::JoinHandle<(u16, String, String)>> {
    let address = proxy.outbound();
    let ask_one = move || ask(address, "GET / HTTP/1.1\r\nHost: up\r\n\r\n");
    (0..count).map(|_| thread::spawn(ask_one)).collect()
}

#[test]
fn concurrent_misses_are_one_fetch() {
    let (service, gate) = held(&[("cache-control", "max-age=60")]);
    let proxy = proxy(service.address, "");
    let clients = ask_together(&proxy, 50);
    eventually("all but one wait", || waiting(&proxy) == 49);
    gate.add_permits(50);
    for client in clients {
        let (status, body, _) = client.join().unwrap();
        assert_eq!((status, body.as_str()), (200, "1"));
    }
    assert_eq!(service.requests(), 1);
}

/// Clients that have the response already wait too, and get a 304; those with another one get it whole.
#[test]
fn conditional_requests_wait_for_the_same_fetch() {
    let (service, gate) = held(&[("cache-control", "max-age=1"), ("etag", "\"v1\"")]);
    let proxy = proxy(service.address, "coalesce = \"60s\"");
    gate.add_permits(1);
    get(&proxy, "/", "");
    eventually("it has expired", || get(&proxy, "/", "Cache-Control: only-if-cached\r\n").0 == 504);
    let address = proxy.outbound();
    let first = ask_together(&proxy, 1);
    eventually("it is fetched", || service.requests() == 2);
    let clients: Vec<_> = (0..10)
        .map(|number| {
            let request = format!("GET / HTTP/1.1\r\nHost: up\r\nIf-None-Match: \"v{}\"\r\n\r\n", number % 2);
            thread::spawn(move || ask(address, &request))
        })
        .collect();
    eventually("they wait", || waiting(&proxy) == 10);
    gate.add_permits(1);
    first.into_iter().for_each(|client| assert_eq!(client.join().unwrap().0, 200));
    let mut statuses: Vec<u16> = clients.into_iter().map(|client| client.join().unwrap().0).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, [[200; 5], [304; 5]].concat());
    assert_eq!(service.requests(), 2);
}

#[test]
fn a_client_that_leaves_does_not_end_the_fetch_for_the_others() {
    let (service, gate) = held(&[("cache-control", "max-age=60")]);
    let proxy = proxy(service.address, "coalesce = \"60s\"");
    let mut first = TcpStream::connect(proxy.outbound()).unwrap();
    first.write_all(b"GET / HTTP/1.1\r\nHost: up\r\n\r\n").unwrap();
    eventually("it is fetched", || service.requests() == 1);
    let others = ask_together(&proxy, 3);
    eventually("the others wait", || waiting(&proxy) == 3);
    drop(first);
    gate.add_permits(10);
    for other in others {
        assert_eq!(other.join().unwrap().1, "1");
    }
    assert_eq!(service.requests(), 1);
}

#[test]
fn a_response_that_cannot_be_shared_lets_the_others_go() {
    let (service, gate) = held(&[("cache-control", "private, max-age=60")]);
    let proxy = proxy(service.address, "");
    let clients = ask_together(&proxy, 10);
    eventually("all but one wait", || waiting(&proxy) == 9);
    gate.add_permits(20);
    let mut bodies: Vec<usize> =
        clients.into_iter().map(|it| it.join().unwrap().1.parse().unwrap()).collect();
    bodies.sort_unstable();
    assert_eq!(bodies, (1..=10).collect::<Vec<_>>(), "each has its own");
}

#[test]
fn those_who_wait_too_long_go_alone() {
    let (service, gate) = held(&[("cache-control", "max-age=60")]);
    let proxy = proxy(service.address, "coalesce = \"100ms\"");
    let clients = ask_together(&proxy, 2);
    eventually("both are fetched", || service.requests() == 2);
    gate.add_permits(2);
    clients.into_iter().for_each(|client| assert_eq!(client.join().unwrap().0, 200));
}

/// The body is larger than what sockets buffer; the first reader does not read.
#[test]
fn a_slow_first_reader_holds_nobody() {
    let large = vec![b'x'; 900_000];
    let (gate, body) = (Arc::new(Semaphore::new(0)), large.clone());
    let permits = Arc::clone(&gate);
    let service = Service::start(move |_, _| {
        let (permits, body) = (Arc::clone(&permits), body.clone());
        async move {
            permits.acquire().await.unwrap().forget();
            response(200, &[("cache-control", "max-age=60")], body)
        }
    });
    let proxy = proxy(service.address, "coalesce = \"60s\"");
    let mut first = TcpStream::connect(proxy.outbound()).unwrap();
    first.write_all(b"GET / HTTP/1.1\r\nHost: up\r\n\r\n").unwrap();
    eventually("it is fetched", || service.requests() == 1);
    let others = ask_together(&proxy, 2);
    eventually("the others wait", || waiting(&proxy) == 2);
    gate.add_permits(10);
    others.into_iter().for_each(|other| assert_eq!(other.join().unwrap().1.len(), large.len()));
    first.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut rest = RawClient::connect(proxy.outbound());
    assert_eq!(rest.ask("GET / HTTP/1.1\r\nHost: up\r\n\r\n").body.len(), large.len());
    assert_eq!(service.requests(), 1);
}

/// Sends one byte every few milliseconds, until its connection is closed.
fn endless(fields: &'static str) -> (RawServer, Arc<AtomicUsize>) {
    let closed = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&closed);
    let server = RawServer::start(move |mut stream| {
        let _ = stream.read(&mut [0; 4096]);
        let head = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{fields}\r\n");
        let _ = stream.write_all(head.as_bytes());
        let _ = stream.set_read_timeout(Some(Duration::from_millis(5)));
        while stream.write_all(b"1\r\nx\r\n").is_ok() && !matches!(stream.read(&mut [0; 16]), Ok(0)) {}
        count.fetch_add(1, Ordering::SeqCst);
    });
    (server, closed)
}

/// A response without an end (a watch, a feed) costs a permit and a connection: only as long as a client reads it.
#[test]
fn a_response_without_an_end_ends_with_its_client() {
    for fields in ["", "Cache-Control: max-age=60\r\n", "Content-Type: text/event-stream\r\n"] {
        let (server, closed) = endless(fields);
        let proxy = proxy(server.address(), "");
        let mut client = TcpStream::connect(proxy.outbound()).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: up\r\n\r\n").unwrap();
        assert!(client.read(&mut [0; 4096]).unwrap() > 0);
        assert_eq!(closed.load(Ordering::SeqCst), 0);
        drop(client);
        eventually("the service's connection is closed", || closed.load(Ordering::SeqCst) == 1);
    }
}

#[test]
fn no_request_waits_for_the_end_of_a_response_that_is_not_shared() {
    let (server, _) = endless("");
    let proxy = proxy_with(server.address(), "coalesce = \"600s\"", "timeout = \"600s\"\n");
    let clients: Vec<TcpStream> = (0..3)
        .map(|_| {
            let mut client = TcpStream::connect(proxy.outbound()).unwrap();
            client.write_all(b"GET / HTTP/1.1\r\nHost: up\r\n\r\n").unwrap();
            client
        })
        .collect();
    eventually("each has its own", || server.connections() == 3);
    drop(clients);
}
