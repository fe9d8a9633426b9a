use super::*;
use crate::{
    config::{Endpoints, HostPort, Policy},
    units::{HumanDuration, Toggle},
};

fn env(name: &str) -> Option<String> {
    (name == "OTEL_SERVICE_NAME").then(|| "shop".to_owned())
}

fn try_load(texts: &[&str]) -> Result<LoadedConfig, Diagnostics> {
    let source =
        |(at, text): (usize, &&str)| Source { path: format!("{at}.toml").into(), text: (*text).to_owned() };
    load_sources(Sources(texts.iter().enumerate().map(source).collect()), &env)
}

fn loaded(texts: &[&str]) -> Config {
    match try_load(texts) {
        Ok(loaded) => (*loaded.config).clone(),
        Err(problems) => panic!("{problems}"),
    }
}

fn problems(text: &str) -> String {
    try_load(&[text]).unwrap_err().to_string()
}

#[test]
fn no_file_means_built_in_defaults() {
    for texts in [&[][..], &[""]] {
        let config = loaded(texts);
        assert_eq!(config.service.name, "shop");
        assert_eq!(Config { service: Default::default(), ..config }, Config::default());
    }
}

/// Default limits do not exclude byte streams (`Cluster::request_policy`).
#[test]
fn distinguishes_configured_request_limits_from_defaults() {
    let limits = |text: &str| {
        let config = loaded(&[text]);
        let upstream = config.upstreams.first().map(|upstream| upstream.policy.sets_request_limits);
        (config.inbound.policy.sets_request_limits, upstream.unwrap_or_default())
    };
    assert_eq!(limits(""), (false, false));
    assert_eq!(limits("inbound.limits.max_connections = 8\n[[upstream]]\nname = 'a'"), (false, false));
    assert_eq!(limits("inbound.limits.max_requests = 1024"), (true, false));
    assert_eq!(limits("[[upstream]]\nname = 'a'\nlimits = { adaptive = true }"), (false, true));
    assert_eq!(limits("defaults.limits.max_requests = 1024\n[[upstream]]\nname = 'a'"), (false, false));
    assert_eq!(limits("defaults.limits.max_requests = 9\n[[upstream]]\nname = 'a'"), (false, true));
    assert!(loaded(&["inbound.forwarded = 'replace'"]).inbound.sets_forwarded);
}

#[test]
fn policies_inherit_key_by_key() {
    let config = loaded(&["
        [defaults]
        timeout = '9s'
        [defaults.retry]
        max = 5
        [[upstream]]
        name = 'a'
        [upstream.retry]
        body_limit = '1KiB'
        [[upstream.route]]
        match = { path = '/off*' }
        retry = false
        [[upstream.route]]
        match = { path = '/quick' }
        timeout = '1s'
        retry = { max = 1 }
        [[upstream]]
        name = 'b'
        retry = false
        [[upstream.route]]
        retry = { body_limit = '2KiB' }
    "]);
    let a = &config.upstreams[0];
    assert_eq!(a.policy.timeout, HumanDuration::from_secs(9));
    let retry = a.policy.retry.clone().0.unwrap();
    assert_eq!((retry.max, retry.body_limit.0), (5, 1024));
    assert_eq!(a.routes[0].policy.retry, Toggle::off());
    assert!(!a.routes[0].policy.route_sets_timeout);
    let quick = &a.routes[1].policy;
    assert!(quick.route_sets_timeout && !quick.route_sets_attempt_timeout);
    let retry = quick.retry.clone().0.unwrap();
    assert_eq!((quick.timeout, retry.max, retry.body_limit.0), (HumanDuration::from_secs(1), 1, 1024));
    let b = &config.upstreams[1];
    assert_eq!(b.policy.retry, Toggle::off());
    let retry = b.routes[0].policy.retry.clone().0.unwrap();
    assert_eq!((retry.max, retry.body_limit.0), (2, 2048), "a table over false starts from what is built in");
}

#[test]
fn inbound_inherits_nothing() {
    let config = loaded(&["[defaults]\ntimeout = '9s'\nidle_timeout = '1s'\n[inbound]\nmax_duration = '1h'"]);
    let expected = Policy { max_duration: HumanDuration::from_secs(3600), ..Policy::inbound() };
    assert_eq!(config.inbound.policy, expected);
}

#[test]
fn an_upstream_is_looked_up_by_its_first_host() {
    let config = loaded(&["
        [[upstream]]
        name = 'a'
        [[upstream]]
        name = 'b'
        hosts = ['b.example:8080', '*.b.example']
        [[upstream]]
        name = 'c'
        hosts = ['10.0.0.1']
    "]);
    let endpoints: Vec<_> = config.upstreams.iter().map(|upstream| upstream.endpoints.clone()).collect();
    assert_eq!(
        endpoints,
        [
            Endpoints::Dns(HostPort::new("a", 80)),
            Endpoints::Dns(HostPort::new("b.example", 8080)),
            Endpoints::Fixed(vec![HostPort::new("10.0.0.1", 80)]),
        ]
    );
    assert!(problems("[[upstream]]\nname = 'x'\nhosts = ['*']").contains("upstream `x` has no endpoints"));
}

#[test]
fn every_problem_is_reported_with_its_place() {
    let text = problems(
        "[runtime]
worker = 2
drain_delay = 5
[defaults]
timout = '1s'
retry = { max = 'two', body_limit = 'big' }
[[upstream]]
name = 'a'
endpoints = ['ok:1', 'bad', 'worse']
balance = 'p3c'
protocol = 'htp1'
[[upstream]]
[upstram]
",
    );
    for part in [
        "error: unknown key `worker`",
        "0.toml:2:1",
        "did you mean `workers`?",
        "help: keys here are drain_delay, drain_timeout, observe, workers",
        "error: `5` is not a duration",
        "help: write e.g. \"250ms\"",
        "0.toml:3:15",
        "did you mean `timeout`?",
        "expected a whole number from 0 to 4294967295, found a string",
        "`big` is not a size",
        "`bad` is not HOST:PORT",
        "0.toml:9:22",
        "`worse` is not HOST:PORT",
        "`p3c` is not a way to balance",
        "did you mean \"http1\"?",
        "`name` is missing here",
        "0.toml:12:1",
        "did you mean `upstream`?",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    assert_eq!(text.matches("error: ").count(), 11, "{text}");
}

#[test]
fn environment_values_can_be_numbers() {
    let config = loaded(&["[runtime]\nworkers = '${N:-3}'\n[telemetry]"]);
    assert_eq!(config.runtime.workers, Some(3));
    assert!(problems("[runtime]\nworkers = '3'").contains("found a string"));
    assert!(problems("[service]\nname = '${NONE}'").contains("NONE is not set"));
}

#[test]
fn later_files_win_and_places_name_the_right_one() {
    let base = "[defaults]\ntimeout = '1s'\n[[upstream]]\nname = 'a'\n[upstream.retry]\nmax = 1";
    let config = loaded(&[base, "[[upstream]]\nname = 'a'\ntimeout = '2s'"]);
    assert_eq!(config.upstreams.len(), 1);
    let policy = &config.upstreams[0].policy;
    assert_eq!((policy.timeout, policy.retry.0.as_ref().unwrap().max), (HumanDuration::from_secs(2), 1));
    let text = try_load(&[base, "[defaults]\ntimeout = 'x'"]).unwrap_err().to_string();
    assert!(text.contains("1.toml:2:11"), "{text}");
}

/// A part that could not be read hides no other problem and causes none.
#[test]
fn an_unreadable_part_hides_no_other_problem() {
    let lines_of = |texts: &[&str]| try_load(texts).unwrap_err().lines();
    // An unset variable is one problem in every place.
    for text in [
        "[service]\nname = '${NONE}'\n[runtime]\nworker = 1",
        "[[upstream]]\nname = '${NONE}'\n[runtime]\nworker = 1\n[defaults.fallback]\nupstream = 'dr'",
        "[[upstream]]\nname = 'a'\nhosts = ['*']\nendpoints = '${NONE}'\n[runtime]\nworker = 1",
        "[[upstream]]\nname = 'a'\nendpoints = ['${NONE}']\n[runtime]\nworker = 1",
        "[[upstream]]\nname = 'a'\nhealth = { path = '${NONE}' }\n[runtime]\nworker = 1",
        "defaults = '${NONE}'\n[runtime]\nworker = 1",
    ] {
        let lines = lines_of(&[text]);
        assert_eq!(lines.len(), 2, "{lines:#?}");
        assert!(lines.iter().any(|line| line.contains("NONE is not set")), "{lines:#?}");
        assert!(lines.iter().any(|line| line.contains("unknown key `worker`")), "{lines:#?}");
    }
    // A syntax error: reported are errors before it in its file, and all errors of the other files.
    let broken =
        "[defaults]\ntimout = '1s'\n[[upstream]]\nname = \nhosts = ['x'\nfoo = 1\n[runtime]\nworker = 1";
    let lines = lines_of(&[broken, "[admin]\nlisten = 1\n[defaults.fallback]\nupstream = 'x'"]);
    let syntax = lines.iter().filter(|line| line.contains("this is not TOML")).count();
    assert!(
        lines.iter().any(|line| line.starts_with("0.toml:2:1: error: unknown key `timout`")),
        "{lines:#?}"
    );
    assert!(lines.iter().any(|line| line.starts_with("1.toml:2:10: ")), "{lines:#?}");
    assert_eq!(lines.len(), syntax + 2, "{lines:#?}");
    assert!((2..=5).contains(&syntax), "one a line at most: {lines:#?}");
    // A missing file.
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.toml"), "[runtime]\nworker = 1\n[defaults.fallback]\nupstream = 'x'")
        .unwrap();
    let found = load(&[dir.path().join("none.toml"), dir.path().join("a.toml")], &env).unwrap_err();
    assert_eq!(found.count(), (2, 0), "{found}");
}

#[test]
fn each_problem_is_reported_once() {
    for text in ["endpoints = ['nohost']", "hosts = ['a b']", "endpoints = [1]"] {
        let found = try_load(&[&format!("[[upstream]]\nname = 'a'\n{text}")]).unwrap_err();
        assert_eq!(found.count(), (1, 0), "{found}");
    }
}

#[test]
fn finds_the_files() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(config_files(&[], dir.path(), &|_| None), [""; 0].map(PathBuf::from));
    std::fs::write(dir.path().join("outrigger.toml"), "").unwrap();
    assert_eq!(config_files(&[], dir.path(), &|_| None), [dir.path().join("outrigger.toml")]);
    let env = |name: &str| (name == "OUTRIGGER_CONFIG").then(|| "/e.toml".to_owned());
    assert_eq!(config_files(&[], dir.path(), &env), [PathBuf::from("/e.toml")]);
    assert_eq!(config_files(&["x.toml".into()], dir.path(), &env), [PathBuf::from("x.toml")]);
    let text = load(&["/none/x.toml".into()], &env).unwrap_err().to_string();
    assert_eq!(text, "error: cannot read /none/x.toml: there is no such file\n\n");
}

#[test]
fn a_value_in_place_of_a_table_is_one_problem() {
    for text in ["upstream = 1", "service = 'x'", "defaults = []", "[[inbound]]", "[upstream]\nname = 'a'"] {
        let found = try_load(&[text]).unwrap_err();
        assert_eq!(found.count(), (1, 0), "{found}");
    }
}

#[test]
fn thousands_of_upstreams_load_quickly() {
    let one = |at: usize| {
        format!(
            "[[upstream]]\nname = 'u{at}'\nendpoints = ['10.0.0.1:80']\ntimeout = '2s'\n[[upstream.route]]\nmatch = {{ path = '/x*' }}\nto = 'u{}'\n",
            at + 1
        )
    };
    let text = (0..10_000).map(one).collect::<String>()
        + "[[upstream]]\nname = 'u10000'\n[defaults]\nretry = { max = 1 }";
    let start = std::time::Instant::now();
    assert_eq!(loaded(&[&text]).upstreams.len(), 10_001);
    // Well under a second when optimised; this bound only distinguishes linear from quadratic.
    assert!(start.elapsed() < std::time::Duration::from_secs(30), "{:?}", start.elapsed());
    // An error in each of them is no slower, and the list is bounded.
    let found = try_load(&[&text.replace("timeout", "timout")]).unwrap_err();
    assert_eq!((found.count().0, found.omitted > 9_000), (100, true));
}

proptest::proptest! {
    #[test]
    fn any_text_is_handled(text in "(\\[|\\]|\\{|\\}|=|\"|'|,|\n|\\$\\{|upstream|route|name|match|retry|hosts|a|1|\\.|-|#|é){0,60}") {
        let _ = try_load(&[&text, &text]).map_err(|found| found.to_string());
    }
}
