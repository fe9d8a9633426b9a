//! A small DNS server on loopback whose zone a test can change at any time. Like real ones, it truncates responses
//! longer than 512 bytes over UDP, and sends all of them over TCP.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use hickory_resolver::proto::{
    op::{Message, OpCode, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
};

pub struct TestDns {
    pub address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
    _tasks: JoinSet<()>,
}

#[derive(Default)]
struct Zone {
    replies: HashMap<(String, RecordType), Reply>,
    queries: Vec<(String, RecordType)>,
}

#[derive(Clone)]
pub enum Reply {
    Records { answers: Vec<Record>, additionals: Vec<Record> },
    Code(ResponseCode),
    Silence,
}

impl TestDns {
    pub async fn start() -> Self {
        // The same port for both; another test may take it in between.
        let (udp, tcp) = loop {
            let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            if let Ok(tcp) = TcpListener::bind(udp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        let address = udp.local_addr().unwrap();
        let zone = Arc::<Mutex<Zone>>::default();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_udp(udp, zone.clone()));
        tasks.spawn(serve_tcp(tcp, zone.clone()));
        Self { address, zone, _tasks: tasks }
    }

    pub fn set(&self, name: &str, kind: RecordType, reply: Reply) {
        let mut zone = self.zone.lock().unwrap_or_else(PoisonError::into_inner);
        zone.replies.insert((name.to_owned(), kind), reply);
    }

    /// The addresses of `name`, of both families.
    pub fn addresses(&self, name: &str, ttl: u32, ips: &[&str]) {
        for (kind, v6) in [(RecordType::A, false), (RecordType::AAAA, true)] {
            let ips = ips.iter().map(|ip| ip.parse::<IpAddr>().unwrap());
            let answers =
                ips.filter(|ip| ip.is_ipv6() == v6).map(|ip| record(name, ttl, ip.into())).collect();
            self.set(name, kind, Reply::Records { answers, additionals: Vec::new() });
        }
    }

    pub fn fail(&self, name: &str, reply: &Reply) {
        for kind in [RecordType::A, RecordType::AAAA, RecordType::SRV] {
            self.set(name, kind, reply.clone());
        }
    }

    pub fn query_count(&self, name: &str) -> usize {
        let zone = self.zone.lock().unwrap_or_else(PoisonError::into_inner);
        zone.queries.iter().filter(|(queried, _)| queried == name).count()
    }

    pub fn total_queries(&self) -> usize {
        self.zone.lock().unwrap_or_else(PoisonError::into_inner).queries.len()
    }
}

pub fn record(name: &str, ttl: u32, data: RData) -> Record {
    Record::from_rdata(fqdn(name), ttl, data)
}

pub fn cname(name: &str, ttl: u32, target: &str) -> Record {
    record(name, ttl, RData::CNAME(rdata::CNAME(fqdn(target))))
}

/// A record with a TTL of one second.
pub fn srv(name: &str, priority: u16, weight: u16, target: &str, port: u16) -> Record {
    record(name, 1, RData::SRV(rdata::SRV::new(priority, weight, port, fqdn(target))))
}

fn fqdn(name: &str) -> Name {
    let mut name = Name::from_str_relaxed(name).unwrap();
    name.set_fqdn(true);
    name
}

async fn serve_udp(socket: UdpSocket, zone: Arc<Mutex<Zone>>) {
    let mut buffer = [0; 4096];
    loop {
        let (length, peer) = socket.recv_from(&mut buffer).await.unwrap();
        let Some(reply) = respond(&buffer[..length], &zone) else { continue };
        let mut bytes = reply.to_vec().unwrap();
        if bytes.len() > 512 {
            bytes = reply.truncate().to_vec().unwrap();
        }
        socket.send_to(&bytes, peer).await.unwrap();
    }
}

async fn serve_tcp(listener: TcpListener, zone: Arc<Mutex<Zone>>) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        connections.spawn(serve_connection(stream, zone.clone()));
    }
}

async fn serve_connection(mut stream: TcpStream, zone: Arc<Mutex<Zone>>) {
    while let Ok(length) = stream.read_u16().await {
        let mut query = vec![0; length.into()];
        stream.read_exact(&mut query).await.unwrap();
        let Some(reply) = respond(&query, &zone) else { continue };
        let bytes = reply.to_vec().unwrap();
        stream.write_u16(bytes.len() as u16).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
    }
}

/// `None`: no response.
fn respond(query: &[u8], zone: &Mutex<Zone>) -> Option<Message> {
    let query = Message::from_vec(query).unwrap();
    let question = query.queries[0].clone();
    let name = question.name().to_utf8().trim_end_matches('.').to_ascii_lowercase();
    let key = (name, question.query_type());
    let mut zone = zone.lock().unwrap_or_else(PoisonError::into_inner);
    let reply = zone.replies.get(&key).cloned();
    zone.queries.push(key);
    let mut message = Message::response(query.metadata.id, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.metadata.recursion_available = true;
    message.add_query(question);
    match reply.unwrap_or(Reply::Code(ResponseCode::NXDomain)) {
        Reply::Records { answers, additionals } => {
            message.add_answers(answers);
            message.add_additionals(additionals);
        }
        Reply::Code(code) => message.metadata.response_code = code,
        Reply::Silence => return None,
    }
    Some(message)
}
