//! The rules as nf_tables expressions. Numbers are those of `linux/netfilter/nf_tables.h`.

use std::{io, net::IpAddr};

use super::{
    TABLE_NAME,
    netlink::{Attributes, Batch},
    plan::{Hook, Match, Plan, PortRange, Rule, RuleAction},
};
use crate::config::Network;

const SUBSYSTEM: u8 = 10;
const NEW_TABLE: u8 = 0;
const DELETE_TABLE: u8 = 2;
const NEW_CHAIN: u8 = 3;
const NEW_RULE: u8 = 6;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
/// Both families in one table.
const INET: u8 = 1;
const IPV4: u8 = 2;
const IPV6: u8 = 10;
const TCP: u8 = 6;

/// The register for values, and the verdict register.
const VALUE: u32 = 1;
const DECISION: u32 = 0;
const ACCEPT: u32 = 1;

#[derive(Clone, Copy)]
enum Meta {
    InputName = 6,
    OutputName = 7,
    SocketUser = 10,
    Family = 15,
    Protocol = 16,
}

#[derive(Clone, Copy)]
enum Compare {
    Equal = 0,
    AtMost = 3,
    AtLeast = 5,
}

/// Installs our table, replacing an earlier one.
pub(super) fn apply(plan: &Plan) -> io::Result<()> {
    let mut batch = Batch::new(SUBSYSTEM);
    delete_existing(&mut batch);
    table(&mut batch, NEW_TABLE, CREATE);
    for hook in Hook::ALL {
        chain(&mut batch, hook);
        for Rule { matches, action, comment: why } in plan.rules(hook) {
            rule(&mut batch, hook, why, |expressions| {
                meta(expressions, Meta::Protocol);
                compare(expressions, Compare::Equal, &[TCP]);
                matches.iter().for_each(|rule_match| condition(expressions, hook, *rule_match));
                verdict(expressions, action);
            });
        }
    }
    batch.commit()
}

/// Removes our table; succeeds if there is none.
pub(super) fn clear() -> io::Result<()> {
    let mut batch = Batch::new(SUBSYSTEM);
    delete_existing(&mut batch);
    batch.commit()
}

/// Creates the table before deleting it: deleting a missing table is an error, creating an existing one is not.
fn delete_existing(batch: &mut Batch) {
    table(batch, NEW_TABLE, CREATE);
    table(batch, DELETE_TABLE, 0);
}

fn table(batch: &mut Batch, message: u8, flags: u16) {
    batch.push(message, flags, INET, |table| table.text(1, TABLE_NAME));
}

fn chain_name(hook: Hook) -> &'static str {
    match hook {
        Hook::Inbound => "inbound",
        Hook::Outbound => "outbound",
    }
}

fn chain(batch: &mut Batch, hook: Hook) {
    batch.push(NEW_CHAIN, CREATE, INET, |chain| {
        chain.text(1, TABLE_NAME);
        chain.text(3, chain_name(hook));
        chain.nested(4, |at| {
            at.number(1, if hook == Hook::Inbound { 0 } else { 3 });
            // NF_IP_PRI_NAT_DST.
            at.number(2, (-100_i32).cast_unsigned());
        });
        chain.number(5, ACCEPT);
        chain.text(7, "nat");
    });
}

fn rule(batch: &mut Batch, hook: Hook, why: &str, expressions: impl FnOnce(&mut Attributes<'_>)) {
    batch.push(NEW_RULE, CREATE | APPEND, INET, |rule| {
        rule.text(1, TABLE_NAME);
        rule.text(2, chain_name(hook));
        rule.nested(4, expressions);
        // The comment format of `nft`: type 0, length, text with NUL.
        let length = u8::try_from(why.len() + 1).unwrap_or(u8::MAX);
        let comment: Vec<u8> = [0, length].into_iter().chain(why.bytes()).chain([0]).collect();
        rule.bytes(7, &comment);
    });
}

fn condition(expressions: &mut Attributes<'_>, hook: Hook, rule_match: Match) {
    match rule_match {
        Match::Loopback => {
            meta(expressions, if hook == Hook::Inbound { Meta::InputName } else { Meta::OutputName });
            let mut name = [0; 16];
            name[..2].copy_from_slice(b"lo");
            compare(expressions, Compare::Equal, &name);
        }
        Match::User(user) => {
            meta(expressions, Meta::SocketUser);
            // The only value that the kernel loads in host byte order.
            compare(expressions, Compare::Equal, &user.to_ne_bytes());
        }
        Match::Ports(PortRange { first, last }) => {
            payload(expressions, 2, 2, 2);
            if first == last {
                compare(expressions, Compare::Equal, &first.to_be_bytes());
            } else {
                compare(expressions, Compare::AtLeast, &first.to_be_bytes());
                compare(expressions, Compare::AtMost, &last.to_be_bytes());
            }
        }
        Match::Destination(network) => to(expressions, network),
    }
}

fn to(expressions: &mut Attributes<'_>, network: Network) {
    let (family, offset, address) = match network.address {
        IpAddr::V4(v4) => (IPV4, 16, v4.octets().to_vec()),
        IpAddr::V6(v6) => (IPV6, 24, v6.octets().to_vec()),
    };
    meta(expressions, Meta::Family);
    compare(expressions, Compare::Equal, &[family]);
    let bits = usize::from(network.prefix);
    let mask: Vec<u8> = (0..address.len())
        .map(|at| match bits.saturating_sub(at * 8) {
            0 => 0,
            ones @ 1..8 => 0xff << (8 - ones),
            _ => 0xff,
        })
        .collect();
    let length = u32::try_from(address.len()).unwrap_or_default();
    payload(expressions, 1, offset, length);
    expression(expressions, "bitwise", |data| {
        data.number(1, VALUE);
        data.number(2, VALUE);
        data.number(3, length);
        data.nested(4, |value| value.bytes(1, &mask));
        data.nested(5, |value| value.bytes(1, &vec![0; mask.len()]));
    });
    let masked: Vec<u8> = address.iter().zip(&mask).map(|(byte, mask)| byte & mask).collect();
    compare(expressions, Compare::Equal, &masked);
}

fn verdict(expressions: &mut Attributes<'_>, verdict: RuleAction) {
    match verdict {
        RuleAction::Accept => expression(expressions, "immediate", |data| {
            data.number(1, DECISION);
            data.nested(2, |data| data.nested(2, |verdict| verdict.number(1, ACCEPT)));
        }),
        RuleAction::Redirect(port) => {
            expression(expressions, "immediate", |data| {
                data.number(1, VALUE);
                data.nested(2, |data| data.bytes(1, &port.to_be_bytes()));
            });
            expression(expressions, "redir", |data| data.number(1, VALUE));
        }
    }
}

fn expression(expressions: &mut Attributes<'_>, name: &str, data: impl FnOnce(&mut Attributes<'_>)) {
    expressions.nested(1, |element| {
        element.text(1, name);
        element.nested(2, data);
    });
}

fn meta(expressions: &mut Attributes<'_>, key: Meta) {
    expression(expressions, "meta", |data| {
        data.number(1, VALUE);
        data.number(2, key as u32);
    });
}

fn compare(expressions: &mut Attributes<'_>, how: Compare, with: &[u8]) {
    expression(expressions, "cmp", |data| {
        data.number(1, VALUE);
        data.number(2, how as u32);
        data.nested(3, |value| value.bytes(1, with));
    });
}

/// Loads bytes of a header: base 1 is IP, 2 is TCP.
fn payload(expressions: &mut Attributes<'_>, base: u32, offset: u32, length: u32) {
    expression(expressions, "payload", |data| {
        data.number(1, VALUE);
        data.number(2, base);
        data.number(3, offset);
        data.number(4, length);
    });
}
