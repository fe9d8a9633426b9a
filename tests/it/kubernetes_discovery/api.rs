//! A small API server: HTTPS, a token, EndpointSlices as a real one sent them. It can be made unreachable, and made to
//! forget versions.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::Duration,
};

use rustls::{ServerConnection, StreamOwned};
use serde_json::Value;

use crate::support::{pki::Pki, tls::server_config};

/// Recorded responses of the real server.
pub fn recorded(name: &str) -> Value {
    let path = format!("{}/tests/it/kubernetes_discovery/recorded/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).expect("a recording")).expect("JSON")
}

pub struct Api {
    address: SocketAddr,
    state: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    list: Value,
    events: Vec<Value>,
    token: String,
    /// Accepts connections and drops them.
    away: bool,
    /// Responds to watches with 410.
    forgetful: bool,
    /// Watches of an earlier generation end.
    generation: u64,
    /// Request lines, with the last word of the token.
    asked: Vec<String>,
}

impl Api {
    pub fn start(pki: &Pki, token: &str) -> Self {
        let config = Arc::new(server_config(&pki.issue("kubernetes", |_| {}), None, &["http/1.1"]));
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("an address");
        let state = Arc::<Shared>::default();
        state.with(|state| {
            state.token = token.to_owned();
            state.list = recorded("list")["body"].clone();
        });
        let serving = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, state) = (Arc::clone(&config), Arc::clone(&serving));
                thread::spawn(move || {
                    if !state.with(|state| state.away) {
                        let connection = ServerConnection::new(config).expect("a connection");
                        // A client that disconnects is no error.
                        let _ = state.serve(StreamOwned::new(connection, stream));
                    }
                });
            }
        });
        Self { address, state }
    }

    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.address.port())
    }

    /// What lists return from now on.
    pub fn list(&self, list: Value) {
        self.state.with(|state| state.list = list);
    }

    pub fn send_event(&self, event: Value) {
        self.state.with(|state| state.events.push(event));
    }

    pub fn token(&self, token: &str) {
        self.state.with(|state| state.token = token.to_owned());
    }

    pub fn end_watches(&self) {
        self.state.with(|state| state.generation += 1);
    }

    pub fn set_unreachable(&self, away: bool) {
        self.state.with(|state| {
            state.away = away;
            state.generation += 1;
        });
    }

    pub fn set_history_expired(&self, forgetful: bool) {
        self.state.with(|state| state.forgetful = forgetful);
    }

    /// The requests so far, lists and watches.
    pub fn requests(&self) -> (Vec<String>, Vec<String>) {
        let asked = self.state.with(|state| state.asked.clone());
        asked.into_iter().partition(|line| !line.contains("watch=1"))
    }
}

impl Shared {
    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state.lock().expect("a lock"));
        self.changed.notify_all();
        result
    }

    fn serve(&self, mut stream: StreamOwned<ServerConnection, TcpStream>) -> std::io::Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let line = head.lines().next().unwrap_or_default().to_owned();
        let (token, list, forgetful) = self.with(|state| {
            state.asked.push(line.clone());
            (state.token.clone(), state.list.clone(), state.forgetful)
        });
        let mut response = |status: &str, body: &Value| {
            let body = body.to_string();
            write!(
                stream,
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\nContent-Type: application/json\r\n\r\n{body}",
                body.len()
            )?;
            stream.flush()
        };
        if !head.to_ascii_lowercase().contains(&format!("authorization: bearer {token}\r\n")) {
            return response("401 Unauthorized", &recorded("unauthorized")["body"]);
        }
        let expected = "GET /apis/discovery.k8s.io/v1/namespaces/shop/endpointslices?";
        let Some(query) = line.strip_prefix(expected) else {
            return response("404 Not Found", &Value::Null);
        };
        let field = |name: &str| {
            let fields = query.split([' ', '&']);
            fields.filter_map(|field| field.strip_prefix(name)?.strip_prefix('=')).next()
        };
        // A request that names no service gets all.
        let service = field("labelSelector").map(|label| {
            label.strip_prefix("kubernetes.io%2Fservice-name%3D").expect("by the service").to_owned()
        });
        if field("watch").is_none() {
            let mut list = list;
            let items = list["items"].as_array_mut().expect("items");
            items.retain(|slice| is_of(slice, service.as_deref()));
            return response("200 OK", &list);
        }
        if forgetful {
            return response("410 Gone", &recorded("gone")["events"][0]["object"]);
        }
        let version = field("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
        self.watch(&mut stream, version, service.as_deref())
    }

    fn watch(&self, stream: &mut impl Write, version: u64, service: Option<&str>) -> std::io::Result<()> {
        write!(stream, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        stream.flush()?;
        let generation = self.with(|state| state.generation);
        let mut sent = 0;
        loop {
            let state = self.state.lock().expect("a lock");
            let news = |state: &mut State| state.generation == generation && state.events.len() == sent;
            let (state, _) =
                self.changed.wait_timeout_while(state, Duration::from_secs(30), news).expect("a lock");
            if state.generation != generation {
                // Without the last chunk, as when a server dies.
                return Ok(());
            }
            let news: Vec<Value> = state.events[sent..].to_vec();
            sent = state.events.len();
            drop(state);
            for event in news {
                let of_object = event["object"]["metadata"]["resourceVersion"]
                    .as_str()
                    .and_then(|v| v.parse::<u64>().ok());
                let new = of_object.is_none_or(|of_object| of_object > version);
                if new
                    && (event["type"] == "BOOKMARK"
                        || event["type"] == "ERROR"
                        || is_of(&event["object"], service))
                {
                    let line = format!("{event}\n");
                    // In pieces, as TCP may deliver them.
                    let (one, two) = line.split_at(line.len() / 2);
                    for piece in [one, two] {
                        write!(stream, "{:x}\r\n{piece}\r\n", piece.len())?;
                        stream.flush()?;
                    }
                }
            }
        }
    }
}

/// Whether a slice belongs to this service; without one, all do.
fn is_of(slice: &Value, service: Option<&str>) -> bool {
    service.is_none_or(|service| slice["metadata"]["labels"]["kubernetes.io/service-name"] == service)
}
