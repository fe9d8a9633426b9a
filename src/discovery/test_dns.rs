//! A small DNS server on loopback whose zone a test can change at any time.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use hickory_resolver::proto::{
    op::{Message, OpCode, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use tokio::{net::UdpSocket, task::JoinHandle};

pub struct TestDns {
    pub address: SocketAddr,
    zone: Arc<Mutex<Zone>>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Zone {
    replies: HashMap<(String, RecordType), Reply>,
    asked: Vec<(String, RecordType)>,
}

#[derive(Clone)]
pub enum Reply {
    Records { answers: Vec<Record>, additionals: Vec<Record> },
    Code(ResponseCode),
    Silence,
}

impl TestDns {
    pub async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let zone = Arc::<Mutex<Zone>>::default();
        let task = tokio::spawn(serve(socket, zone.clone()));
        Self { address, zone, task }
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

    pub fn asked(&self, name: &str) -> usize {
        let zone = self.zone.lock().unwrap_or_else(PoisonError::into_inner);
        zone.asked.iter().filter(|(asked, _)| asked == name).count()
    }

    pub fn asked_at_all(&self) -> usize {
        self.zone.lock().unwrap_or_else(PoisonError::into_inner).asked.len()
    }
}

impl Drop for TestDns {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub fn record(name: &str, ttl: u32, data: RData) -> Record {
    Record::from_rdata(fqdn(name), ttl, data)
}

pub fn cname(name: &str, ttl: u32, target: &str) -> Record {
    record(name, ttl, RData::CNAME(rdata::CNAME(fqdn(target))))
}

pub fn srv(name: &str, ttl: u32, priority: u16, weight: u16, target: &str, port: u16) -> Record {
    record(name, ttl, RData::SRV(rdata::SRV::new(priority, weight, port, fqdn(target))))
}

fn fqdn(name: &str) -> Name {
    let mut name = Name::from_str_relaxed(name).unwrap();
    name.set_fqdn(true);
    name
}

async fn serve(socket: UdpSocket, zone: Arc<Mutex<Zone>>) {
    let mut buffer = [0; 4096];
    loop {
        let (length, peer) = socket.recv_from(&mut buffer).await.unwrap();
        let query = Message::from_vec(&buffer[..length]).unwrap();
        let question = query.queries[0].clone();
        let name = question.name().to_utf8().trim_end_matches('.').to_ascii_lowercase();
        let reply = {
            let mut zone = zone.lock().unwrap_or_else(PoisonError::into_inner);
            let key = (name, question.query_type());
            let reply = zone.replies.get(&key).cloned();
            zone.asked.push(key);
            reply.unwrap_or(Reply::Code(ResponseCode::NXDomain))
        };
        let mut message = Message::response(query.metadata.id, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.metadata.recursion_available = true;
        message.add_query(question);
        match reply {
            Reply::Records { answers, additionals } => {
                message.add_answers(answers);
                message.add_additionals(additionals);
            }
            Reply::Code(code) => message.metadata.response_code = code,
            Reply::Silence => continue,
        }
        socket.send_to(&message.to_vec().unwrap(), peer).await.unwrap();
    }
}
