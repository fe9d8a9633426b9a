//! `[runtime] observe`: a policy decides, counts and logs, and its decision is not applied.

/// Applies a decision, unless `observing`. A refusal is recorded once in either case. While `observing`, a refused
/// request goes on without the permit or slot, so that there is nothing to release.
///
/// ```
/// use outrigger::resilience::observe::enforce;
///
/// let mut refused = 0;
/// let full: Result<&str, &str> = Err("limit_full");
/// assert_eq!(enforce(full, true, |_| refused += 1), Ok(None));
/// assert_eq!(enforce(full, false, |_| refused += 1), Err("limit_full"));
/// assert_eq!(enforce(Ok::<_, &str>("permit"), true, |_| refused += 1), Ok(Some("permit")));
/// assert_eq!(refused, 2);
/// ```
pub fn enforce<T, E>(
    decision: Result<T, E>,
    observing: bool,
    record: impl FnOnce(&E),
) -> Result<Option<T>, E> {
    match decision {
        Ok(given) => Ok(Some(given)),
        Err(refusal) => {
            record(&refusal);
            if observing { Ok(None) } else { Err(refusal) }
        }
    }
}
