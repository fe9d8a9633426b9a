//! Checks the files that a configuration names: whether they exist and are valid.

use std::{fs, path::Path, time::SystemTime};

use crate::{
    config::{Config, Endpoints, Node, Origin, Problem},
    discovery,
    identity::{
        files::{self, FileKey},
        jwt::KeySet,
    },
};

const NAMED_HERE: &str = "the file is named here";

/// All problems of these files.
pub(super) fn problems(config: &Config, tree: &Node) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (key, error) in files::check(config, SystemTime::now()) {
        let origin = match key {
            FileKey::Identity(key) => at(tree, &["identity", key]),
            FileKey::Upstream(index) => of_upstream(tree, index, &["ca"]),
        };
        problems.push(Problem::error(origin, error.to_string()).label(NAMED_HERE));
    }
    let limitation = files::limitation(config, SystemTime::now());
    problems.extend(
        limitation.map(|limitation| {
            Problem::warning(at(tree, &["identity", "cert"]), limitation).label(NAMED_HERE)
        }),
    );
    if let Some(jwt) = &config.inbound.jwt {
        let path = jwt.jwks.expose();
        if path.starts_with('/') {
            let checked = fs::read(path).map_err(|error| error.to_string());
            let checked = checked.and_then(|text| KeySet::parse(&text).map_err(|error| error.to_string()));
            problems.extend(wrong(at(tree, &["inbound", "jwt", "jwks"]), Path::new(path), checked.map(drop)));
        }
        if let Some(ca) = &jwt.ca {
            problems.extend(wrong(at(tree, &["inbound", "jwt", "ca"]), ca, readable(ca)));
        }
    }
    for (index, upstream) in config.upstreams.iter().enumerate() {
        if let Endpoints::File(path) = &upstream.endpoints {
            let checked = discovery::check_file(path);
            problems.extend(wrong(of_upstream(tree, index, &["endpoints"]), path, checked));
        }
        if let Some(oauth2) = &upstream.oauth2 {
            let secret = &oauth2.client_secret_file;
            let origin = of_upstream(tree, index, &["oauth2", "client_secret_file"]);
            problems.extend(wrong(origin, secret, readable(secret)));
            if let Some(ca) = &oauth2.ca {
                problems.extend(wrong(of_upstream(tree, index, &["oauth2", "ca"]), ca, readable(ca)));
            }
        }
    }
    problems
}

fn readable(path: &Path) -> Result<(), String> {
    fs::read(path).map(drop).map_err(|error| error.to_string())
}

fn wrong(origin: Option<Origin>, path: &Path, checked: Result<(), String>) -> Option<Problem> {
    let why = checked.err()?;
    Some(Problem::error(origin, format!("{}: {why}", path.display())).label(NAMED_HERE))
}

fn at(tree: &Node, path: &[&str]) -> Option<Origin> {
    let mut node = tree;
    for key in path {
        match node.get(key) {
            Some(next) => node = next,
            None => break,
        }
    }
    node.origin
}

fn of_upstream(tree: &Node, index: usize, path: &[&str]) -> Option<Origin> {
    at(tree.get("upstream")?.item(index)?, path)
}
