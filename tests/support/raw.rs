//! Plain sockets, which send exactly the bytes of the test.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use super::{
    WAIT_LIMIT,
    strict::{self, Message, Progress},
};

/// A client that writes bytes.
pub struct RawClient {
    pub stream: TcpStream,
    /// Read, but not yet consumed.
    pub buffer: Vec<u8>,
}

impl RawClient {
    #[track_caller]
    pub fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).expect("connect");
        stream.set_read_timeout(Some(WAIT_LIMIT)).expect("a timeout");
        stream.set_write_timeout(Some(WAIT_LIMIT)).expect("a timeout");
        stream.set_nodelay(true).expect("nodelay");
        Self { stream, buffer: Vec::new() }
    }

    /// Stops reading after this long.
    pub fn with_read_timeout(self, limit: Duration) -> Self {
        self.stream.set_read_timeout(Some(limit)).expect("a timeout");
        self
    }

    /// Sends; a peer that has closed is no error here, it shows when reading. False: it has closed, or accepts no
    /// more.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).is_ok()
    }

    pub fn finish(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut chunk = [0; 16 * 1024];
        let count = self.stream.read(&mut chunk)?;
        self.buffer.extend_from_slice(&chunk[..count]);
        Ok(count)
    }

    /// The next complete response to a request that was not HEAD or CONNECT, skipping interim ones. None: closed, or
    /// nothing within the read timeout. Err: not a valid HTTP/1 response.
    pub fn response(&mut self) -> Result<Option<Message>, String> {
        let mut closed = false;
        loop {
            match strict::response(&self.buffer, closed) {
                Progress::Complete(message, used) => {
                    self.buffer.drain(..used);
                    if !message.start.starts_with("HTTP/1.1 1") {
                        return Ok(Some(message));
                    }
                    continue;
                }
                Progress::Wrong(why) => {
                    return Err(format!("{why} in {:?}", String::from_utf8_lossy(&self.buffer)));
                }
                Progress::Partial if closed => return Ok(None),
                Progress::Partial => {}
            }
            match self.fill() {
                Ok(0) => closed = true,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => closed = true,
                Ok(_) => {}
                Err(_) => return Ok(None),
            }
        }
    }

    /// The next bytes, this many, which stay in the buffer.
    pub fn peek(&mut self, count: usize) -> Result<&[u8], super::h2::End> {
        while self.buffer.len() < count {
            match self.fill() {
                Ok(1..) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Err(super::h2::End::Silent);
                }
                Ok(0) | Err(_) => return Err(super::h2::End::Closed),
            }
        }
        Ok(&self.buffer[..count])
    }

    /// Sends a request and returns the response, which must come.
    #[track_caller]
    pub fn ask(&mut self, request: impl AsRef<[u8]>) -> Message {
        self.send(request);
        self.response().expect("a well-formed response").expect("a response")
    }

    /// Reads until `needle` has arrived; all that was read.
    #[track_caller]
    pub fn read_until(&mut self, needle: &[u8]) -> Vec<u8> {
        while !self.buffer.windows(needle.len()).any(|window| window == needle) {
            match self.fill() {
                Ok(0) | Err(_) => panic!(
                    "no {:?} came, but {:?}",
                    String::from_utf8_lossy(needle),
                    String::from_utf8_lossy(&self.buffer)
                ),
                Ok(_) => {}
            }
        }
        std::mem::take(&mut self.buffer)
    }

    /// Reads to the end; whether the end (a close or a reset) arrived within the read timeout.
    pub fn read_to_close(&mut self) -> (Vec<u8>, bool) {
        loop {
            match self.fill() {
                Ok(0) => return (std::mem::take(&mut self.buffer), true),
                Ok(_) => {}
                Err(error) => {
                    let waiting = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
                    return (std::mem::take(&mut self.buffer), !waiting);
                }
            }
        }
    }
}

/// A server that runs a closure for each connection, each on its own thread.
pub struct RawServer {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    connections: Arc<AtomicUsize>,
    received: Arc<Mutex<Vec<u8>>>,
}

impl RawServer {
    pub fn start(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        Self::start_at(([127, 0, 0, 1], 0).into(), serve)
    }

    /// The same at a given address, for a server that is restarted.
    pub fn start_at(address: SocketAddr, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        Self::start_on(TcpListener::bind(address).expect("bind"), serve)
    }

    /// The same on a listening socket.
    pub fn start_on(listener: TcpListener, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let address = listener.local_addr().expect("an address");
        let stop = Arc::new(AtomicBool::new(false));
        let connections = Arc::new(AtomicUsize::new(0));
        let serve = Arc::new(serve);
        let (stopped, count) = (stop.clone(), connections.clone());
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                count.fetch_add(1, Ordering::Relaxed);
                let serve = serve.clone();
                thread::spawn(move || serve(stream));
            }
        });
        Self { address, stop, connections, received: Arc::default() }
    }

    /// Reads to the end of a request's head, keeps what it received, sends `script`, and closes.
    pub fn scripted(script: impl Into<Vec<u8>>) -> Self {
        let received = Arc::<Mutex<Vec<u8>>>::default();
        let (script, log) = (script.into(), received.clone());
        let mut server = Self::start(move |mut stream| {
            let mut head = Vec::new();
            let mut chunk = [0; 4096];
            while !head.ends_with(b"\r\n\r\n") {
                match stream.read(&mut chunk) {
                    Ok(0) | Err(_) => break,
                    Ok(count) => head.extend_from_slice(&chunk[..count]),
                }
            }
            if let Ok(mut log) = log.lock() {
                log.extend_from_slice(&head);
            }
            let _ = stream.write_all(&script);
        });
        server.received = received;
        server
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// What a scripted server received.
    pub fn received(&self) -> Vec<u8> {
        self.received.lock().map(|bytes| bytes.clone()).unwrap_or_default()
    }
}

impl Drop for RawServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}
