//! Fault injection before the upstream, to rehearse failures.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::{HumanDuration, Ratio};

/// `[defaults.fault]`; absent = none. Never counted against the upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FaultSettings {
    /// How long a request is delayed.
    pub delay: HumanDuration,
    /// Share of the requests that are delayed.
    pub delay_ratio: Ratio,
    /// The status of an aborted request.
    pub abort: Option<u16>,
    /// Share of the requests that are aborted.
    pub abort_ratio: Ratio,
}

/// The faults to inject into a request before it is sent: first the delay, then the abort.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fault {
    pub delay: Option<Duration>,
    /// The status to return instead of sending the request.
    pub abort: Option<u16>,
}

impl FaultSettings {
    /// Decides for one request, from two random numbers in [0, 1). A request may get both faults.
    pub fn decide(&self, delay_draw: f64, abort_draw: f64) -> Fault {
        Fault {
            delay: self.delay.limit().filter(|_| delay_draw < *self.delay_ratio),
            abort: self.abort.filter(|_| abort_draw < *self.abort_ratio),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_drawn_independently() {
        let settings = FaultSettings {
            delay: HumanDuration::from_millis(200),
            delay_ratio: Ratio::constant(0.1),
            abort: Some(503),
            abort_ratio: Ratio::constant(0.05),
        };
        let delay = Some(Duration::from_millis(200));
        assert_eq!(settings.decide(0.09, 0.9), Fault { delay, abort: None });
        assert_eq!(settings.decide(0.1, 0.04), Fault { delay: None, abort: Some(503) });
        assert_eq!(settings.decide(0.0, 0.0), Fault { delay, abort: Some(503) });
    }

    #[test]
    fn zero_is_never_and_one_is_always() {
        let never = FaultSettings { abort: Some(500), ..FaultSettings::default() };
        assert_eq!(never.decide(0.0, 0.0), Fault::default());
        let always = FaultSettings { abort_ratio: Ratio::constant(1.0), ..never };
        assert_eq!(always.decide(0.0, 0.999_999).abort, Some(500));
        let no_delay = FaultSettings { delay_ratio: Ratio::constant(1.0), ..never };
        assert_eq!(no_delay.decide(0.0, 0.0).delay, None);
    }
}
